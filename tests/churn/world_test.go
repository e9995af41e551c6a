// Package churn lets everything that works on the two stores work at once: builds in
// the view and outside, both garbage collectors, the commands that move paths, under
// policies that change, locks and unlocks, all at random moments. Whatever happens, no
// path is lost that a root of its owner's holds, both stores are sound for the real
// Nix, every command comes to an end, and nothing is left lying about.
//
// TestChurn is that; OVERKEEP_CHURN says for how long (2m), OVERKEEP_CHURN_SEED with
// which choices (the times are the machine's own). Beside it stand tests of the races
// that it found or could find, each with its moment forced.
//
// Do not look here for what a move does when nothing else happens.
package churn

import (
	"crypto/rand"
	"fmt"
	"os"
	"path"
	"strings"
	"sync/atomic"
	"testing"

	"overkeep/tests/bed"
	"overkeep/tests/fixture"
)

const (
	policyFile = "/etc/overkeep/policy"
	keepDir    = "/run/overkeep/alice/k"
	storeDir   = "/nix/store"
)

// world is a machine with alice's keep, unlocked.
type world struct {
	*fixture.Keep
	files  atomic.Int64 // expressions written so far
	canary string
}

// slots bounds how many machines run at a time: two are enough for a small computer.
var slots = make(chan struct{}, 2)

func newWorld(t *testing.T, suite bed.Suite, tools ...string) *world {
	t.Helper()
	slots <- struct{}{}
	t.Cleanup(func() { <-slots }) // after the machine's own clean-up
	w := &world{Keep: &fixture.Keep{Machine: bed.StartInMemory(t, suite)}, canary: strings.ToLower(rand.Text())}
	w.Install(t, bed.Binary(t))
	for _, tool := range tools {
		w.Put(t, tool, "/usr/local/bin/"+path.Base(tool), 0o755)
	}
	w.SystemNix(t)
	w.MustOverkeep(t, 0, fixture.Passphrase, "init", "--user", "alice", "--work-factor", "10", "--passphrase-fd", "0",
		"--recovery-out", "/run/recovery", "--yes", "--size", "256M")
	w.Unlock(t)
	w.Must(t, "root", "mkdir -p /etc/overkeep")
	w.Write(t, "/run/state.sh", stateScript)
	return w
}

// policy writes root's policy: of what names the keep is the place. Everything else
// may lie in the system store.
func (w *world) policy(t testing.TB, personal ...string) {
	t.Helper()
	text := "system name \"*\"\n"
	for _, p := range personal {
		text += fmt.Sprintf("personal name %q\n", p)
	}
	w.Write(t, policyFile, text)
}

// expression writes a derivation to a file that everybody can read, and returns that.
func (w *world) expression(t testing.TB, name, script string, deps ...string) string {
	t.Helper()
	file := fmt.Sprintf("/run/expr-%d.nix", w.files.Add(1))
	w.Write(t, file, fixture.Derivation(name, script, deps...))
	return file
}

// sums prints the SHA-256 of the NAR of each path that it is given, as the file system
// has it now, and nothing else. Nix's own words go to standard error.
const sums = `for p in %s; do echo $p $(nix-store --dump $p | sha256sum | cut -d" " -f1); done`

// state is what state.sh found wrong: a line each.
func (w *world) state(t testing.TB) []string {
	t.Helper()
	r, err := w.Exec(bed.Command{Script: "exec bash /run/state.sh"})
	if err != nil || r.Code != 0 {
		t.Fatalf("state: %v %+v", err, r)
	}
	var out []string
	for line := range strings.Lines(r.Stdout) {
		if line = strings.TrimSpace(line); !quiet(line) {
			out = append(out, line)
		}
	}
	return out
}

// quiet reports whether a line is of a verification and about its progress.
func quiet(line string) bool {
	_, said, verify := strings.Cut(line, "verify: ")
	for _, p := range []string{"waiting for the big garbage collector lock", "reading the Nix store", "checking path existence",
		"checking hashes", "checking store hashes", "checking link hashes", "warning: you don't have Internet access"} {
		if verify && strings.HasPrefix(said, p) {
			return true
		}
	}
	return line == ""
}

// stateScript prints what is not in order in either store, when nothing is under way:
// references to what is not valid, rows without files, what commands should have
// removed, what Nix's own verification says, and a journal that has not ended.
const stateScript = `
set -eu
export NIX_REMOTE=daemon
sys=/nix/var/nix/db/db.sqlite
open='select "open: row of " || v.path from Refs r join ValidPaths v on v.id = r.referrer left join ValidPaths w on w.id = r.reference where w.id is null;
	select "integrity: " || integrity_check from pragma_integrity_check where integrity_check <> "ok"; select "open: key of " || "table" from pragma_foreign_key_check;'
sqlite3 -cmd '.timeout 20000' $sys "$open" | sed 's/^/system /'
sqlite3 -cmd '.timeout 20000' $sys 'select path from ValidPaths' >/run/valid.system
while read -r p; do [ -e $p -o -L $p ] || echo "system: no files of $p"; done </run/valid.system
find /nix/store -mindepth 1 -maxdepth 1 \( -name '.overkeep*' -o -name '*-overkeep-moving' -o -name '*.lock' -o -name '*.tmp' \) -printf 'system: left %f\n'
nix-store --verify --check-contents 2>&1 | sed 's/^/system verify: /' || :
exec overkeep run alice --as-root -- bash -eu -c '
	k=` + keepDir + `
	db=$k/nix/db/db.sqlite
	sqlite3 -cmd ".timeout 20000" $db "$1" | sed "s/^/keep /"
	sqlite3 -cmd ".timeout 20000" $db "select path from ValidPaths" >/run/valid.keep
	while read -r p; do [ -e $p -o -L $p ] || echo "keep: no files of $p"; done </run/valid.keep
	find $k/store/upper -mindepth 1 -maxdepth 1 \( -name ".overkeep*" -o -type c \) -printf "keep: left %f\n"
	for d in incoming trash; do [ ! -e $k/store/$d ] || echo "keep: left $d"; done
	[ ! -d $k/journal ] || find $k/journal -name "*.new" -printf "keep: left journal/%f\n"
	[ ! -d $k/nix/gcroots/overkeep-moving ] || echo "keep: left gcroots/overkeep-moving"
	last=$(ls $k/journal/*.moves 2>/dev/null | tail -n 1)
	[ -z "$last" ] || tail -n 1 $last | grep -q "\"type\":\"end\"" || echo "keep: the journal has not ended: $(tail -n 1 $last | cut -c 1-200)"
	nix-store --verify --check-contents 2>&1 | sed "s/^/keep verify: /" || :
' - "$open"
`

// stuck says what everything in the machine waits for.
func (w *world) stuck() string {
	out, _ := w.Run("root", `ps -eo pid,ppid,user,stat,wchan:30,etimes,args --forest | cut -c 1-180; echo; cat /proc/locks
		for p in $(pgrep -f 'overkeep|nix'); do for f in /proc/$p/fd/*; do case $(readlink $f) in *.lock|*/lock|*/supervisor) echo $p $(readlink $f) $(stat -L -c %i $f);; esac; done; done 2>/dev/null || :`)
	return out
}

// number reads one from the environment, or else returns the given one.
func number[T any](t testing.TB, name string, n T) T {
	t.Helper()
	if s := os.Getenv(name); s != "" {
		if _, err := fmt.Sscan(s, &n); err != nil {
			t.Fatal(err)
		}
	}
	return n
}
