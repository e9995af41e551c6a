package verdicts

import (
	"errors"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"sync"
	"testing"

	"overkeep/tests/bed"
	"overkeep/tests/need"
)

// readsProgram builds tests/verdicts/reads, static: the machine's libraries are not ours.
var readsProgram = sync.OnceValues(func() ([]byte, error) {
	dir, err := os.MkdirTemp("", "reads-")
	if err != nil {
		return nil, err
	}
	file := filepath.Join(dir, "reads")
	out, err := exec.Command("go", "build", "-tags", "osusergo,netgo,sqlite_omit_load_extension",
		"-ldflags", "-s -w -linkmode external -extldflags -static", "-o", file, "./reads").CombinedOutput()
	if err != nil {
		return nil, errors.Join(fmt.Errorf("build reads: %w: %s", err, out), os.Remove(dir))
	}
	b, err := os.ReadFile(file)
	return b, errors.Join(err, os.Remove(file), os.Remove(dir))
})

// reads is how often the databases are read on each machine: ten thousand times
// beside a real Nix in all.
const reads = 1000

// safety reads both databases beside a Nix that adds and deletes all the time: in the
// system store directly and through the daemon, and in the keep. No read fails or sees
// half of a change, and no Nix ever finds a database busy.
func safety(t *testing.T, w *world) {
	need.Tool(t, "go", "cc")
	program, err := readsProgram()
	if err != nil {
		t.Fatal(err)
	}
	if err := os.WriteFile(w.Root+"/run/reads", program, 0o755); err != nil {
		t.Fatal(err)
	}
	// A pair, as an archive that can be imported again and again.
	pair := func(x string) string {
		dep := w.build(t, echo("pair-"+x+"-dep", x))
		top := w.build(t, echo("pair-"+x+"-top", x, dep))
		w.Must(t, "root", fmt.Sprintf("nix-store --export %s %s > /run/pair-%s; nix-store --delete $(nix-store --query --deriver %[2]s) %[2]s %[1]s", dep, top, x), daemon)
		return top + " " + dep
	}
	w.Must(t, "root", "touch /run/go-on; chmod 644 /run/go-on")
	loop := func(script string) string {
		return "n=0; while test -e /run/go-on; do " + script + "; n=$((n+1)); done; echo rounds $n"
	}
	importing := func(x string) string {
		return loop("nix-store --import < /run/pair-" + x + "; nix-store --delete " + pair(x) + " || :")
	}
	const adding = "echo $n > $TMPDIR/added-$n; nix-store --delete $(nix-store --add $TMPDIR/added-$n) || :; rm $TMPDIR/added-$n"
	writers := map[string]*bed.Proc{}
	start := func(name, user, script string, env ...string) {
		p, err := w.Start(user, script, env...)
		if err != nil {
			t.Fatal(err)
		}
		t.Cleanup(p.Kill)
		writers[name] = p
	}
	start("root, directly", "root", importing("a"), "NIX_REMOTE=local")
	start("bob, daemon", "bob", loop(adding), daemon, "TMPDIR=/tmp")
	start("alice, keep", "root", "cd /; exec overkeep run alice -- bash -euo pipefail -c "+"'"+loop(adding)+"'")

	r, err := w.Exec(bed.Command{Script: fmt.Sprintf("exec overkeep run alice --as-root -- /run/reads alice %d", reads)})
	w.Must(t, "root", "rm /run/go-on")
	if err != nil || r.Code != 0 {
		t.Errorf("reading: %v %+v", err, r)
	} else {
		var seen struct {
			Reads, Full, Pairs, Came, Went int
			Longest, FullReads             string
		}
		decode(t, r.Stdout, &seen)
		t.Logf("%+v", seen)
		if seen.Reads != reads || seen.Pairs == 0 || seen.Came == 0 || seen.Went == 0 {
			t.Errorf("nothing went on meanwhile: %+v", seen)
		}
	}
	for name, p := range writers {
		r, err := p.Wait()
		rounds := r.Stdout[max(0, strings.LastIndex(r.Stdout, "rounds ")):]
		t.Logf("%s: %s", name, strings.TrimSpace(rounds))
		if err != nil || r.Code != 0 || rounds == "rounds 0\n" {
			t.Errorf("%s: %v, code %d\n%s", name, err, r.Code, r.Stdout)
		}
		if low := strings.ToLower(r.Stdout); strings.Contains(low, "busy") || strings.Contains(low, "sqlite") || strings.Contains(low, "locked") {
			t.Errorf("%s: Nix had to wait:\n%s", name, r.Stdout)
		}
	}
}
