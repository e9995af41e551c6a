package crash

import (
	"errors"
	"fmt"
	"os"
	"strings"
	"syscall"
	"testing"

	"overkeep/systemd/keep"
	"overkeep/tests/bed"
	"overkeep/tests/fixture"
	"overkeep/tests/lock/proof"
)

// changing are the system calls by which a build changes what will be found after
// a crash.
const changing = "pwrite64,ftruncate,fsync,fdatasync,rename,link,symlink,unlink,unlinkat,mkdir,chown,lchown,fchown,chmod,fchmod,utimensat,mount"

// TestBuild: a build in the view is killed at its Nth changing system call, by
// counting (strace(1), inject), or the power is cut there. The keep locks with
// proof, unlocks again, is sound, still has what was built before, and builds the
// same thing.
func TestBuild(t *testing.T) {
	t.Parallel()
	for _, c := range []struct {
		backend string
		cut     bool
		step    int // between two N; the first is 1
	}{
		{"image", false, 2},
		{"image", true, 3},
		{"dir", true, 4},
	} {
		t.Run(fmt.Sprintf("%s, power cut %v", c.backend, c.cut), func(t *testing.T) {
			t.Parallel()
			m := newMachine(t, c.backend)
			m.make(t)
			m.fill(t)
			points := 0
			for n := 1; ; n += c.step {
				m.unlock(t)
				build := "nix-build --no-out-link -E " + fixture.Quote(fixture.Derivation(
					fmt.Sprintf("%s-%d", m.canary, n), fmt.Sprintf("echo %s %d > $out", m.canary, n)))
				stop := m.trace(t, n)
				out, err := m.AliceRun(build)
				var failed *bed.Failed
				if err != nil && !errors.As(err, &failed) {
					t.Fatal(err)
				}
				if err == nil { // nobody made so many calls
					stop()
					m.lockSoon(t)
					break
				}
				points++
				if c.cut {
					m.cut(t)
				} else {
					stop()
					if s := m.status(t); s == keep.Locked {
						t.Errorf("after a kill at call %d the state is %q", n, s)
					}
					m.must(t, overkeep("", "lock", name, "--kill", "--yes"))
				}
				m.clean(t)
				m.unlock(t)
				// No row without its path, no path that is not what its row says.
				if out, err := m.AliceRun("nix-store --verify --check-contents 2>&1"); err != nil {
					t.Errorf("after a crash at call %d the store is not sound: %v\n%s", n, err, out)
				}
				got, err := m.AliceRun("cat $(" + build + " 2>/dev/null)")
				if want := fmt.Sprintf("%s %d\n", m.canary, n); err != nil || got != want {
					t.Errorf("after a crash at call %d the same build gives %q, %v", n, got, err)
				}
				m.lockSoon(t)
				m.whole(t, false)
				if t.Failed() {
					t.Fatalf("the build that was interrupted said:\n%s", out)
				}
			}
			if points < 5 {
				t.Errorf("a build has been interrupted at %d points only", points)
			}
			m.crashed["build"] = points
			m.sound(t)
		})
	}
}

// trace lets the personal nix-daemon and all its workers and builders run under
// strace, which kills each that makes its nth changing call. The function that
// comes back ends that.
func (m *machine) trace(t *testing.T, n int) func() {
	t.Helper()
	daemon, supervisor := 0, proof.Outside(t, m.Machine, m.keeps(t)[0].Supervisor)
	proof.Await(t, func() string {
		for _, p := range proof.Processes(t, m.Machine) {
			if p.Name == "nix-daemon" && p.Parent == supervisor {
				daemon = p.Inside
				return ""
			}
		}
		return "there is no personal nix-daemon"
	})
	p, err := m.Start("root", fmt.Sprintf("exec strace -f -q -o /run/trace -p %d -e trace=%s -e inject=%s:signal=KILL:when=%d", daemon, changing, changing, n))
	if err != nil {
		t.Fatal(err)
	}
	proof.Await(t, func() string {
		select {
		case <-p.Done():
			t.Fatalf("strace: %s", p.Output())
		default:
		}
		b, err := os.ReadFile(fmt.Sprintf("/proc/%d/status", proof.Outside(t, m.Machine, daemon)))
		if err != nil || strings.Contains(string(b), "TracerPid:\t0\n") {
			return fmt.Sprintf("strace has not attached (%v): %s", err, p.Output())
		}
		return ""
	})
	return func() {
		_ = p.Signal(syscall.SIGTERM)
		<-p.Done()
	}
}
