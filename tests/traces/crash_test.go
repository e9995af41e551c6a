package traces

import (
	"strings"
	"testing"

	"overkeep/tests/bed"
	"overkeep/tests/fixture"
)

// A moment is something alice is in the middle of when all ends. Her script says
// READY when it is there, and goes on for ever; by then there are canaries in
// these places of the keep.
type moment struct {
	name, script string
	written      []string
}

// waits is what a build does that waits to be killed: it has written names and
// contents into its directory, its output and its log.
const waits = `echo CANARY-half > $out/CANARY-half; echo READY; sleep 3600`

var moments = []moment{
	{"a build", expression(waits) + `nix-build CANARY-build.nix`, []string{"builds/", "store/upper/", "log/drvs/"}},
	{"an evaluation", expression(waits) + `
		mkdir -p CANARY-eval; cat > CANARY-eval/flake.nix <<'END'
		{ outputs = _: { CANARY-one = "CANARY"; }; }
END
		( cd CANARY-eval; git init -q .; git add .; git -c user.name=a -c user.email=a@b commit --allow-empty -qm CANARY; nix eval --raw .#CANARY-one )
		nix eval --print-build-logs --impure --raw --expr 'builtins.readFile "${import /home/alice/keep/CANARY-build.nix}/x"'`, []string{"builds/", "home/cache/eval-cache-"}},
	{"a shell", `
		echo CANARY > $TMPDIR/CANARY-tmp; p=$(readlink CANARY-result); nix profile install $p; echo CANARY > CANARY-file
		nix shell $p -c bash -c 'type CANARY-program; echo READY; sleep 3600 & wait'`, []string{"tmp/", "home/work/"}},
}

// ends are the ways in which all ends. After each the keep is locked.
var ends = []struct {
	name string
	end  func(*testing.T, *laptop, ...string)
}{
	{"kill -9 of all that serves the keep", func(t *testing.T, l *laptop, needles ...string) {
		// By the program: every one of Nix (the system's daemon as well) and overkeep.
		l.Must(t, "root", `for p in /proc/[0-9]*; do
			case $(readlink $p/exe || true) in /usr/local/bin/overkeep|*/nix|*/nix-daemon) kill -9 ${p#/proc/} || true;; esac; done`)
		l.SystemNix(t)
		l.clean(t, "killed", true, needles...)
		l.Lock(t, "--kill")
		l.clean(t, "locked after it", false, needles...)
	}},
	{"kill -9 of everything", func(t *testing.T, l *laptop, needles ...string) {
		l.Machine.Kill(t)
		l.off(t, "killed", needles...)
		l.again(t)
	}},
	{"power cut", func(t *testing.T, l *laptop, needles ...string) {
		l.Cut(t)
		l.off(t, "off", needles...)
		l.again(t)
	}},
}

// again boots the machine.
func (l *laptop) again(t *testing.T) {
	t.Helper()
	l.Boot(t)
	l.SystemNix(t)
}

// begin starts a moment and waits until it is there. Its script goes into the
// keep first, for only there it is nobody's business.
func (l *laptop) begin(t *testing.T, m moment) *bed.Proc {
	t.Helper()
	enter(t, l.Keep, false, "cat > moment", strings.ReplaceAll(m.script, "CANARY", l.n))
	p, err := l.Start("root", "exec overkeep run alice -- bash -euo pipefail -c 'cd ~/keep; . ./moment'")
	if err != nil {
		t.Fatal(err)
	}
	await(t, p, "READY")
	return p
}

// In the middle of something all ends, in every way; then the machine is
// searched as it lies there, then booted, then opened: what alice had is hers,
// and nobody else's. Every end meets every moment with the image back-end; with
// the others every end and every moment comes once.
func TestInTheMiddle(t *testing.T) {
	each(t, func(t *testing.T, k *fixture.Keep, backend string) {
		l := newLaptop(t, k)
		for _, s := range steps[:2] {
			l.do(t, s)
		}
		for i, m := range moments {
			for j, e := range ends {
				if backend != "image" && i != j {
					continue
				}
				name := e.name + " during " + m.name
				p := l.begin(t, m)
				needles := append(hashes(t, k), l.n)
				there := "\n" + inside(t, k, l.n)
				for _, w := range m.written {
					if !strings.Contains(there, "\n./"+w) {
						t.Errorf("%s: no canary in %s of the keep", name, w)
					}
				}
				l.clean(t, m.name, true, needles...)
				enter(t, k, true, "sync -f /run/overkeep/alice/k", "")
				e.end(t, l, needles...)
				<-p.Done()
				l.clean(t, "after "+name, false, needles...)
				k.Unlock(t)
				enter(t, k, false, strings.ReplaceAll("grep -q CANARY-content CANARY-result/CANARY-output; nix log ./CANARY-result | grep -q CANARY-in-log; nix-store --verify --check-contents", "CANARY", l.n), "")
			}
		}
		k.Lock(t)
		l.clean(t, "locked", false, l.n)
	})
}
