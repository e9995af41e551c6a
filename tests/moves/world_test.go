// Package moves shows that paths which move between the stores survive everything:
// the commands that move them are killed before every one of their system calls that
// changes something (tests/boundary), each of these calls fails once with each error,
// and the power is cut at each step of the journal. Afterwards both stores are sound
// for the real Nix, each path is valid in one place, whole, nothing private lies in
// plaintext, and the next command finishes what was begun or takes it back.
//
// Do not look here for what a move does when nothing goes wrong.
package moves

import (
	"bytes"
	"crypto/rand"
	"encoding/json"
	"errors"
	"fmt"
	"os"
	"path"
	"path/filepath"
	"slices"
	"strings"
	"testing"

	"golang.org/x/sys/unix"

	"overkeep/tests/bed"
	"overkeep/tests/boundary"
	"overkeep/tests/fixture"
)

const (
	policyFile = "/etc/overkeep/policy"
	keepDir    = "/run/overkeep/alice/k"
	upperDir   = keepDir + "/store/upper"
	resultLink = "/home/alice/result" // a root of alice's, outside the view
	toolPath   = "/usr/local/bin/boundary"
)

// home is where a path is valid and lies.
type home string

const (
	inSystem home = "system"
	inKeep   home = "keep"
)

// slots bounds how many machines run at a time: two are enough for a small computer.
var slots = make(chan struct{}, 2)

// world is a machine with alice's keep, unlocked, and a handful of paths that move
// back and forth: a chain of three private outputs with their derivations, which
// refers to two public paths. Names and contents of the private ones hold the canary.
type world struct {
	*fixture.Keep
	canary  string
	private []string // store paths
	public  []string
	top     string   // the last output of the chain; result leads to it
	first   string   // the first output of the chain: everything else refers to it
	drvs    []string // of the outputs; each refers to the output before it. The last has a build log
	hashes  []string
	runs    int
	searchN int
}

// newWorld makes one, with the private paths in the keep. Disks lie in memory where
// there is room.
func newWorld(t *testing.T) *world {
	t.Helper()
	slots <- struct{}{}
	t.Cleanup(func() { <-slots })
	w := &world{Keep: &fixture.Keep{Machine: bed.StartInMemory(t, bed.Forky)}, canary: "canary" + strings.ToLower(rand.Text())}
	w.Install(t, bed.Binary(t))
	w.Put(t, boundary.Binary(t), toolPath, 0o755)
	w.SystemNix(t)
	w.MustOverkeep(t, 0, fixture.Passphrase, "init", "--user", "alice", "--work-factor", "10", "--passphrase-fd", "0",
		"--recovery-out", "/run/recovery", "--yes", "--size", "96M")
	w.Unlock(t)
	w.fill(t)
	w.policy(t, inKeep)
	w.Must(t, "root", "sync") // what is installed is not to be lost with the power
	return w
}

// fill builds the paths: the public ones outside, the private ones in the view, where
// nothing of them shows outside.
func (w *world) fill(t *testing.T) {
	t.Helper()
	build := func(name, script string, deps ...string) string {
		return fixture.Derivation(name, script, deps...)
	}
	w.Write(t, "/run/pub.nix", build("pub-lib", "mkdir $out; echo public > $out/lib"))
	lib := w.Must(t, "alice", "nix-build --no-out-link /run/pub.nix 2>/dev/null")
	w.Write(t, "/run/pub2.nix", build("pub-tool", "echo tool $deps > $out", lib))
	tool := w.Must(t, "alice", "nix-build -o ~/public /run/pub2.nix 2>/dev/null")
	w.public = []string{lib, tool}

	c := w.canary
	make := func(name, script string, deps ...string) (out string) {
		t.Helper()
		w.runs++
		file := fmt.Sprintf("/run/private-%d.nix", w.runs)
		w.Write(t, file, build("priv-"+c+"-"+name, script, deps...))
		drv := w.Alice(t, "nix-instantiate "+file+" 2>/dev/null")
		out = w.Alice(t, "nix-store --realise "+drv+" 2>/dev/null")
		w.drvs = append(w.drvs, drv)
		w.private = append(w.private, out)
		return out
	}
	w.first = make("a", "mkdir -p $out/d; echo "+c+"-first $deps > $out/d/f; ln $out/d/f $out/hard; ln -s d/f $out/link", lib)
	middle := make("b", "echo "+c+"-middle $deps > $out", w.first)
	w.top = make("c", "mkdir $out; echo "+c+"-log; echo "+c+"-top $deps > $out/x; for i in 1 2 3; do echo $i "+c+" > $out/$i; done", middle, tool)
	w.private = append(w.private, w.drvs...)
	for _, p := range w.private {
		h, _, _ := strings.Cut(path.Base(p), "-")
		w.hashes = append(w.hashes, h)
	}
	w.Alice(t, "nix-store --realise "+w.top+" --add-root ~/keep/result >/dev/null")
}

// policy writes root's policy: what it wants of the private paths. It tells none of
// their names.
func (w *world) policy(t *testing.T, want home) {
	t.Helper()
	text := "system name \"*\"\n"
	if want == inKeep {
		text += "personal name \"priv-*\"\n"
	}
	w.Must(t, "root", "mkdir -p /etc/overkeep")
	w.Write(t, policyFile, text)
}

// outside gives alice her result link outside the view, and a build log, as a build
// in the system store would have. No Nix client makes them: its worker would hold the
// paths for a moment longer than the client lives.
func (w *world) outside(t *testing.T) {
	t.Helper()
	drv := path.Base(w.drvs[len(w.drvs)-1])
	w.Must(t, "root", "d=/nix/var/log/nix/drvs/"+drv[:2]+"; mkdir -p $d; echo "+w.canary+"-log >$d/"+drv[2:]+
		"; ln -sfn "+w.top+" "+resultLink+"; chown -h alice: "+resultLink+
		"; ln -sfn "+resultLink+" /nix/var/nix/gcroots/auto/00000000000000000000000000000000")
}

// disturb runs a command of overkeep as root under the boundary tool.
func (w *world) disturb(t *testing.T, options string, args ...string) (boundary.Report, bed.Result) {
	t.Helper()
	return w.disturbIn(t, "", options, args...)
}

// disturbIn is disturb with standard input.
func (w *world) disturbIn(t *testing.T, stdin, options string, args ...string) (boundary.Report, bed.Result) {
	t.Helper()
	w.runs++
	file := fmt.Sprintf("/run/report.%d", w.runs)
	r, err := w.Exec(bed.Command{Stdin: stdin,
		Script: "exec boundary -report " + file + " " + options + " -- overkeep " + fixture.Quote(args...)})
	if err != nil {
		t.Fatalf("overkeep %q: %v", args, err)
	}
	rep, err := boundary.ReadReport(w.Root + file)
	if err != nil {
		t.Fatalf("overkeep %q under %q: %v\n%s%s", args, options, err, r.Stdout, r.Stderr)
	}
	_ = os.Remove(w.Root + file)
	return rep, r
}

// class is what kind of object a call was about: names differ from run to run.
func (w *world) class(r boundary.Report) string {
	o := r.Object
	switch {
	case strings.Contains(o, keepDir+"/journal"):
		o = "journal"
	case strings.Contains(o, keepDir+"/nix/db"):
		o = "keep db"
	case strings.Contains(o, keepDir+"/store/incoming"):
		o = "incoming"
	case strings.Contains(o, keepDir+"/store/trash"):
		o = "trash"
	case strings.Contains(o, keepDir+"/store"):
		o = "upper"
	case strings.Contains(o, keepDir):
		o = "keep"
	case strings.Contains(o, "/nix/var/nix/db"):
		o = "system db"
	case strings.Contains(o, "-overkeep-moving"):
		o = "stage"
	case strings.Contains(o, ".lock"):
		o = "lock"
	case strings.Contains(o, "/nix/store"), strings.Contains(o, w.canary):
		o = "store"
	case strings.Contains(o, "/nix/var/nix"):
		o = "system state"
	case strings.Contains(o, "/nix/var/log"):
		o = "log"
	case strings.HasPrefix(o, "/run"):
		o = "run"
	}
	return r.Call + " " + o
}

// state is what state.sh found.
type state struct {
	System, Keep []string // valid, of the private paths
	Lower, Upper []string // lying there
	Verify       string   // complaints of nix-store --verify, both stores
	Left         string   // what must not be there between two commands
	Open         []string // references to what is not valid, rows that are not sound
	Journal      string   // the last event of the newest operation
	Result       string   // where the root outside leads
	verified     bool
}

// look establishes the state in one go. With verify the real Nix checks both stores by
// contents, which takes half of the time.
func (w *world) look(t *testing.T, verify bool) *state {
	t.Helper()
	r, err := w.Exec(bed.Command{Script: "exec bash /run/state.sh " + fmt.Sprint(verify), Stdin: strings.Join(w.private, "\n") + "\n"})
	if err != nil || r.Code != 0 {
		t.Fatalf("state: %v %+v", err, r)
	}
	s := &state{verified: verify}
	for line := range strings.Lines(r.Stdout) {
		key, value, _ := strings.Cut(strings.TrimSpace(line), " ")
		switch key {
		case "system":
			s.System = append(s.System, value)
		case "keep":
			s.Keep = append(s.Keep, value)
		case "lower":
			s.Lower = append(s.Lower, value)
		case "upper":
			s.Upper = append(s.Upper, value)
		case "left":
			s.Left += value + "\n"
		case "open":
			s.Open = append(s.Open, value)
		case "result":
			s.Result = value
		case "verify":
			if bad := complaint(value); bad != "" {
				s.Verify += bad + "\n"
			}
		case "journal":
			s.Journal = event(value)
		default:
			t.Fatalf("state: %q", line)
		}
	}
	for _, l := range [][]string{s.System, s.Keep, s.Lower, s.Upper} {
		slices.Sort(l)
	}
	return s
}

// complaint is a line of a verification that is not about its progress.
func complaint(line string) string {
	for _, p := range []string{"waiting for the big garbage collector lock", "reading the Nix store", "checking path existence",
		"checking hashes", "checking store hashes", "checking link hashes", "warning: you don't have Internet access"} {
		if strings.HasPrefix(line, p) || strings.HasPrefix(line, "keep: "+p) || strings.HasPrefix(line, "system: "+p) {
			return ""
		}
	}
	return line
}

// event is the type in a line of the journal.
func event(line string) string {
	_, text, _ := strings.Cut(line, " ")
	var e struct{ Type string }
	if json.Unmarshal([]byte(text), &e) != nil {
		return "torn: " + line
	}
	return e.Type
}

// stateScript prints the state, a fact a line. Store paths come on standard input.
// It enters the view once.
const stateScript = `
set -eu
verify=$1
cat >/run/private.list
export NIX_REMOTE=daemon
sys=/nix/var/nix/db/db.sqlite
open='select "row of " || v.path from Refs r join ValidPaths v on v.id = r.referrer left join ValidPaths w on w.id = r.reference where w.id is null;
	select "integrity: " || integrity_check from pragma_integrity_check where integrity_check <> "ok"; select "key of " || "table" from pragma_foreign_key_check;'
sqlite3 $sys 'select path from ValidPaths' >/run/valid.system
grep -Fxf /run/private.list /run/valid.system | sed 's/^/system /' || :
sqlite3 $sys "$open" | sed 's/^/open system: /'
while read -r p; do [ ! -e $p -a ! -L $p ] || echo lower $p; done </run/private.list
while read -r p; do [ -e $p -o -L $p ] || echo "open system: no files of $p"; done </run/valid.system
find /nix/store -mindepth 1 -maxdepth 1 \( -name '.overkeep*' -o -name '*-overkeep-moving' -o -name '*.lock' -o -name '*.tmp' \) -printf 'left /nix/store/%f\n'
[ ! -L ` + resultLink + ` ] || echo result $(readlink ` + resultLink + `)
$verify && nix-store --verify --check-contents 2>&1 | sed 's/^/verify system: /' || :
exec overkeep run alice --as-root -- bash -eu -c '
	k=` + keepDir + `
	db=$k/nix/db/db.sqlite
	sqlite3 $db "select path from ValidPaths" >/run/valid.keep
	grep -Fxf /run/private.list /run/valid.keep | sed "s/^/keep /" || :
	sqlite3 $db "$2" | sed "s/^/open keep: /"
	while read -r p; do n=${p##*/}; [ ! -e $k/store/upper/$n -a ! -L $k/store/upper/$n ] || echo upper $p; done </run/private.list
	while read -r p; do [ -e $p -o -L $p ] || echo "open keep: no files of $p"; done </run/valid.keep
	find $k/store/upper -mindepth 1 -maxdepth 1 \( -name ".overkeep*" -o -name "*.lock" -o -type c \) -printf "left upper/%f\n"
	for d in incoming trash; do [ ! -e $k/store/$d ] || echo left $d; done
	[ ! -d $k/journal ] || find $k/journal -name "*.new" -printf "left journal/%f\n"
	last=$(ls $k/journal/*.moves 2>/dev/null | tail -n 1)
	[ -z "$last" ] || echo journal $(tail -n 1 $last)
	! $1 || NIX_REMOTE=daemon nix-store --verify --check-contents 2>&1 | sed "s/^/verify keep: /" || :
' - $verify "$open"
`

// at fails the test unless all private paths are at home there and nowhere else.
func (s *state) at(t *testing.T, w *world, want home) {
	t.Helper()
	for _, p := range w.private {
		if got := s.home(p); got != string(want) {
			t.Errorf("%s is %s, want %s", p, got, want)
		}
	}
}

// home says where a path is at home; anything but "system" and "keep" is wrong
// between two commands.
func (s *state) home(p string) string {
	has := func(l []string) bool { return slices.Contains(l, p) }
	switch {
	case has(s.System) && has(s.Lower) && !has(s.Upper):
		return string(inSystem) // its row in the keep does no harm
	case has(s.Keep) && has(s.Upper) && !has(s.System) && !has(s.Lower):
		return string(inKeep)
	}
	return fmt.Sprintf("valid in system %v, keep %v; lying in lower %v, upper %v", has(s.System), has(s.Keep), has(s.Lower), has(s.Upper))
}

// safe fails the test if a path is lost: what must hold at every instant, also right
// after a kill.
func (s *state) safe(t *testing.T, w *world) {
	t.Helper()
	has := func(l []string, p string) bool { return slices.Contains(l, p) }
	for _, p := range w.private {
		if !(has(s.System, p) && has(s.Lower, p)) && !(has(s.Keep, p) && has(s.Upper, p)) {
			t.Errorf("%s is lost: %s", p, s.home(p))
		}
	}
	for _, o := range s.Open {
		// Files may still be on their way out below a row of the keep: it is of a path
		// that the system store has.
		if !strings.HasPrefix(o, "keep: no files") {
			t.Errorf("open: %s", o)
		}
	}
}

// sound fails the test unless all is in order: what must hold when a command has
// ended, whatever came before. Each path is at home in one place.
func (s *state) sound(t *testing.T, w *world) {
	t.Helper()
	s.safe(t, w)
	for _, p := range w.private {
		if h := s.home(p); h != string(inSystem) && h != string(inKeep) {
			t.Errorf("%s is nowhere at home: %s", p, h)
		}
	}
	for _, o := range s.Open {
		t.Errorf("open: %s", o)
	}
	if s.Verify != "" {
		t.Errorf("Nix's own check says:\n%s", s.Verify)
	}
	if s.Left != "" {
		t.Errorf("left behind:\n%s", s.Left)
	}
	if s.Journal != "end" && s.Journal != "" {
		t.Errorf("the journal's last event is %q", s.Journal)
	}
}

// hidden fails the test if anything private is on the disk: by the canary, which all
// names and contents hold, and every few times by all that tells of a path.
func (w *world) hidden(t *testing.T) {
	t.Helper()
	words := []string{w.canary}
	if w.searchN++; w.searchN%4 == 0 {
		words = append(words, w.hashes[w.searchN/4%len(w.hashes)])
	}
	for _, word := range words {
		if at := w.search(t, word); len(at) > 0 {
			t.Errorf("%q is on the disk %d times, first %s:\n%q", word, len(at), w.Owner(at[0]), w.excerpt(at[0]))
		}
	}
}

// search is bed's Find for one word on a disk in memory: in place, some times as fast.
func (w *world) search(t *testing.T, word string) (hits []int64) {
	t.Helper()
	dir, err := os.Open(w.Root)
	if err != nil {
		t.Fatal(err)
	}
	defer dir.Close()
	f, err := os.Open(w.Disk)
	if err != nil {
		t.Fatal(err)
	}
	defer f.Close()
	st, err := f.Stat()
	if err == nil {
		err = unix.Syncfs(int(dir.Fd()))
	}
	if err != nil {
		t.Fatal(err)
	}
	disk, err := unix.Mmap(int(f.Fd()), 0, int(st.Size()), unix.PROT_READ, unix.MAP_SHARED)
	if err != nil {
		t.Fatal(err)
	}
	defer unix.Munmap(disk)
	for end := int64(0); ; { // from one hole to the next; none is within a word
		start, err := unix.Seek(int(f.Fd()), end, unix.SEEK_DATA)
		if errors.Is(err, unix.ENXIO) {
			return hits
		}
		if err == nil {
			end, err = unix.Seek(int(f.Fd()), start, unix.SEEK_HOLE)
		}
		if err != nil {
			t.Fatal(err)
		}
		for at := start; ; at++ {
			i := bytes.Index(disk[at:end], []byte(word))
			if i < 0 {
				break
			}
			at += int64(i)
			hits = append(hits, at)
		}
	}
}

// excerpt is what lies around a byte of the disk.
func (w *world) excerpt(at int64) string {
	f, err := os.Open(w.Disk)
	if err != nil {
		return err.Error()
	}
	defer f.Close()
	b := make([]byte, 400)
	_, err = f.ReadAt(b, max(0, at-200))
	if err != nil {
		return err.Error()
	}
	return string(b)
}

// shown fails the test unless a search finds what lies in the system store: else
// hidden proves nothing.
func (w *world) shown(t *testing.T) {
	t.Helper()
	for _, word := range append(slices.Clone(w.hashes), w.canary) {
		if len(w.search(t, word)) == 0 {
			t.Errorf("%q lies in the system store, and the search does not find it", word)
		}
	}
}

func (w *world) script(t *testing.T) {
	t.Helper()
	if err := os.WriteFile(filepath.Join(w.Root, "run/state.sh"), []byte(stateScript), 0o644); err != nil {
		t.Fatal(err)
	}
}
