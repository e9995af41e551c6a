package lock

import (
	"errors"
	"fmt"
	"os"
	"strings"
	"sync"
	"testing"

	"overkeep/overlay/holder"
	"overkeep/systemd/keep"
	"overkeep/tests/bed"
	"overkeep/tests/crash/inject"
	"overkeep/tests/fixture"
	"overkeep/tests/lock/proof"
)

// view is a shell command that runs a script as root in the view, which needs no
// working keep.
func inNamespace(script string) string {
	return "cd /; nsenter --mount=/run/overkeep/alice/ns/mnt " + inBash(script)
}

// TestLazyUnmount: root hides the mounts while somebody has a file open. What is
// hidden is not locked, and who has it open is still named.
func TestLazyUnmount(t *testing.T) {
	each(t, func(t *testing.T, k *locked) {
		for _, c := range []struct {
			name, hold, detach string
			how                holder.How
		}{
			{"the overlay", "exec 3<@upper", "umount -l /nix/store", holder.OpenFile},
			{"the overlay, a lower file", "exec 3<@lower", "umount -l /nix/store", holder.OpenFile},
			{"the work directory", "exec 3<" + secretFile, "umount -l /home/alice/keep", holder.OpenFile},
			{"the volume", "exec 3<" + secretFile, "umount -l " + volume, holder.OpenFile},
			{"all of it", "exec 3<" + secretFile + " 4<@upper", "umount -l /nix/store /home/alice/keep " + volume, holder.OpenFile},
			{"the volume, a working directory", "cd " + inView + "dir", "umount -l " + volume, holder.CurrentDirectory},
		} {
			t.Run(c.name, func(t *testing.T) {
				e := k.open(t)
				fill := strings.NewReplacer("@upper", k.upper, "@lower", k.lower).Replace
				held := k.hold(t, asAlice(fill(c.hold)+stay), "")
				k.Must(t, "root", inNamespace(c.detach))
				for range 2 { // and not because it was the first look
					named(t, k.refused(t), held.pid, c.how)
					if s := k.status(t); s.State == keep.Locked {
						t.Errorf("hidden, and the state is %q, the key %q", s.State, s.Key)
					}
				}
				e.Readable(t)
				held.release(t)
				k.mustLock(t)
				k.isLocked(t, e)
				k.worksAgain(t)
			})
		}
	})
}

// worksAgain unlocks, sees that nothing was lost, and locks.
func (k *locked) worksAgain(t *testing.T) {
	t.Helper()
	e := k.open(t)
	if got := k.Alice(t, "nix-store --query --hash "+k.upper+" >/dev/null 2>&1; cat secret"); got != k.secret {
		t.Errorf("after all that alice reads %q", got)
	}
	k.mustLock(t)
	k.isLocked(t, e)
}

// TestNobodyInProc: an open file that no process of the machine shows. There is
// nobody to name, but it is not called locked.
func TestNobodyInProc(t *testing.T) {
	each(t, func(t *testing.T, k *locked) {
		e := k.open(t)
		// The test itself, which no process of the machine can see.
		f, err := os.Open(e.Root() + secretFile)
		if err != nil {
			t.Fatal(err)
		}
		defer f.Close()
		hs := k.refused(t)
		if len(hs) != 0 {
			t.Errorf("lock names %v, which hold nothing", hs)
		}
		if s := k.status(t); s.State == keep.Locked || s.Key == "absent" {
			t.Errorf("a file is open, and the state is %q, the key %q", s.State, s.Key)
		}
		b := make([]byte, len(k.secret))
		if _, err := f.ReadAt(b, 0); err != nil || string(b) != k.secret {
			t.Errorf("the open file gives %q, %v", b, err)
		}
		f.Close()
		k.mustLock(t)
		k.isLocked(t, e)
		k.worksAgain(t)
	})
}

// TestSupervisorKilled: without its supervisor the keep is neither usable nor
// called locked; it can be locked, and it can be unlocked again.
func TestSupervisorKilled(t *testing.T) {
	each(t, func(t *testing.T, k *locked) {
		t.Run("lock", func(t *testing.T) {
			e := k.open(t)
			k.killSupervisor(t)
			k.mustLock(t)
			k.isLocked(t, e)
			k.worksAgain(t)
		})
		t.Run("unlock", func(t *testing.T) {
			e := k.open(t)
			k.killSupervisor(t)
			k.unlock(t)
			if got := k.Alice(t, "cat secret"); got != k.secret {
				t.Errorf("alice reads %q", got)
			}
			k.mustLock(t)
			k.isLocked(t, e)
		})
		t.Run("unlock under a session", func(t *testing.T) {
			e := k.open(t)
			held := k.hold(t, asAlice("exec 3<"+secretFile+stay), "")
			k.killSupervisor(t)
			k.unlock(t)
			if got := k.Alice(t, "cat secret"); got != k.secret {
				t.Errorf("alice reads %q", got)
			}
			named(t, k.refused(t), held.pid, holder.OpenFile)
			held.release(t)
			k.mustLock(t)
			k.isLocked(t, e)
		})
		t.Run("lock with a holder", func(t *testing.T) {
			e := k.open(t)
			held := k.hold(t, asAlice("exec 3<"+secretFile+stay), "")
			k.killSupervisor(t)
			named(t, k.refused(t), held.pid, holder.OpenFile)
			e.Readable(t)
			held.release(t)
			k.mustLock(t)
			k.isLocked(t, e)
		})
		t.Run("wrong passphrase", func(t *testing.T) {
			e := k.open(t)
			k.killSupervisor(t)
			if r := k.Overkeep(t, "not "+k.pass, "unlock", name, "--passphrase-fd=0"); r.Code == 0 {
				t.Error("a keep without a supervisor opens with any passphrase")
			}
			k.mustLock(t)
			k.isLocked(t, e)
		})
	})
}

// TestSupervisorEnds: a lock is a success only when the supervisor has ended, which goes
// on while the lock unmounts. One that does not end when it should is killed.
func TestSupervisorEnds(t *testing.T) {
	both(t, func(t *testing.T, k *locked) {
		for _, stopped := range []bool{false, true} {
			e := k.open(t)
			pid := k.status(t).Supervisor
			if stopped {
				k.Must(t, "root", fmt.Sprint("kill -STOP ", pid))
			}
			k.mustLock(t)
			if out, err := k.Run("root", fmt.Sprintf("! grep -s '^State' /proc/%d/status", pid)); err != nil {
				t.Errorf("locked, but the supervisor is there (stopped: %v): %s", stopped, out)
			}
			k.isLocked(t, e)
		}
	})
}

// killSupervisor kills it and returns when it is seen to be gone.
func (k *locked) killSupervisor(t *testing.T) {
	t.Helper()
	pid := k.status(t).Supervisor
	if pid == 0 {
		t.Fatal("status knows no supervisor")
	}
	k.Must(t, "root", fmt.Sprint("kill -9 ", pid))
	proof.Await(t, func() string { // it is some time in dying
		switch k.status(t).State {
		case keep.Locking:
			return ""
		case keep.Locked:
			t.Fatal("without a supervisor the keep is called locked")
		}
		return "the supervisor lives on after SIGKILL"
	})
	if r := k.Overkeep(t, "", "run", name, "--", "true"); r.Code == 0 {
		t.Error("run works without a supervisor")
	}
}

// TestStateLost: the files in which overkeep notes what it did are not what the
// state is read from. Nothing of it makes a keep look locked that is not.
func TestStateLost(t *testing.T) {
	both(t, func(t *testing.T, k *locked) {
		for _, lost := range []string{"state.json", "target.json", "lower/control", "socket/socket"} {
			t.Run(strings.ReplaceAll(lost, "/", "_"), func(t *testing.T) {
				e := k.open(t)
				held := k.hold(t, asAlice("exec 3<"+secretFile+stay), "")
				k.refused(t)
				k.Must(t, "root", "rm -f /run/overkeep/alice/"+lost)
				named(t, k.refused(t), held.pid, holder.OpenFile)
				if s := k.status(t); s.State == keep.Locked {
					t.Errorf("without %s the state is %q", lost, s.State)
				}
				e.Readable(t)
				held.release(t)
				k.mustLock(t)
				k.isLocked(t, e)
				k.worksAgain(t)
			})
		}
		t.Run("the pin", func(t *testing.T) {
			// Without the pin no command finds the view any more: the key must say
			// that it is not locked, whoever the holder is.
			e := k.open(t)
			held := k.hold(t, asAlice("exec 3<"+secretFile+stay), "")
			k.Must(t, "root", "umount -l /run/overkeep/alice/ns/mnt")
			k.refused(t)
			if s := k.status(t); s.State == keep.Locked {
				t.Errorf("without the pin the state is %q", s.State)
			}
			e.Readable(t)
			held.release(t)
			k.mustLock(t)
			k.isLocked(t, e)
			k.worksAgain(t)
		})
	})
}

// TestLockLocked: locking what is locked is a success, and as well proved.
func TestLockLocked(t *testing.T) {
	both(t, func(t *testing.T, k *locked) {
		e := k.open(t)
		k.mustLock(t)
		for range 2 {
			if out := k.MustOverkeep(t, 0, "", "lock", name); !strings.Contains(out, "already") {
				t.Errorf("lock of a locked keep says %q", out)
			}
			k.isLocked(t, e)
		}
	})
}

// TestTogether: of several commands at once every one either does all of its
// work or says that another is at it, and the last lock is one.
func TestTogether(t *testing.T) {
	both(t, func(t *testing.T, k *locked) {
		e := k.open(t)
		var all sync.WaitGroup
		codes := make([]int, 8)
		for i := range codes {
			all.Go(func() {
				r, err := k.Exec(bed.Command{Script: "exec overkeep lock alice"})
				if err != nil {
					t.Error(err)
				}
				codes[i] = r.Code
			})
		}
		all.Wait()
		done := 0
		for _, c := range codes {
			switch c {
			case 0:
				done++
			case exitInUse:
			default:
				t.Errorf("of eight locks at once one ended with %d", c)
			}
		}
		if done == 0 {
			t.Error("of eight locks at once none locked")
		}
		k.isLocked(t, e)

		// Unlocks and locks at once, in any order: whatever comes of it is whole.
		for range 4 {
			for range 3 {
				all.Go(func() {
					if r, err := k.Exec(bed.Command{Script: "exec overkeep unlock alice --passphrase-fd=0", Stdin: k.pass}); err != nil || r.Code != 0 && r.Code != exitInUse {
						t.Errorf("unlock beside locks: %v, %+v", err, r)
					}
				})
				all.Go(func() {
					if r, err := k.Exec(bed.Command{Script: "exec overkeep lock alice"}); err != nil || r.Code != 0 && r.Code != exitInUse {
						t.Errorf("lock beside unlocks: %v, %+v", err, r)
					}
				})
			}
			all.Wait()
			if s := k.status(t); s.State == keep.Locking {
				t.Errorf("after commands at once the state is %q: %+v", s.State, s)
			}
		}
		k.mustLock(t)
		k.isLocked(t, e)
		k.worksAgain(t)
	})
}

// TestBesideRuns: a lock is not turned away because somebody just begins to run
// something in the view; it waits for that, and nothing gets in after it.
func TestBesideRuns(t *testing.T) {
	both(t, func(t *testing.T, k *locked) {
		for range 5 {
			e := k.open(t)
			var runs []*bed.Proc
			for range 3 {
				p, err := k.Start("root", "cd /; while overkeep run alice -- echo run; do :; done")
				if err != nil {
					t.Fatal(err)
				}
				t.Cleanup(p.Kill)
				runs = append(runs, p)
			}
			for _, p := range runs {
				proof.Await(t, func() string {
					if strings.Contains(p.Output(), "run\n") {
						return ""
					}
					return "nothing runs: " + p.Output()
				})
			}
			k.mustLock(t, "--wait")
			k.isLocked(t, e)
			for _, p := range runs {
				<-p.Done()
			}
			k.isLocked(t, e)
		}
	})
}

// TestDuringUnlock: an unlock that is under way is stopped at each of its steps;
// no other command gets in between, and none calls the keep locked once the key
// is in the kernel.
func TestDuringUnlock(t *testing.T) {
	both(t, func(t *testing.T, k *locked) {
		k.Install(t, inject.Binary(t))
		steps := 0
		for at := 1; ; at++ {
			count, log := fmt.Sprint("/run/count.", at), fmt.Sprint("/run/log.", at)
			p, err := k.Start("root", "exec overkeep unlock alice --passphrase-fd 3 3< <(printf %s "+fixture.Quote(k.pass)+")",
				fmt.Sprint("OVERKEEP_CRASH_AT=", at), "OVERKEEP_CRASH_HOW=stop", "OVERKEEP_CRASH_COUNT="+count, "OVERKEEP_CRASH_LOG="+log)
			if err != nil {
				t.Fatal(err)
			}
			stopped := 0
			proof.Await(t, func() string {
				select {
				case <-p.Done():
					return ""
				default:
				}
				for _, x := range proof.Processes(t, k.Machine) {
					if x.State == "T" {
						stopped = x.Inside
						return ""
					}
				}
				return "unlock neither stops nor ends: " + p.Output()
			})
			if stopped == 0 {
				if r, err := p.Wait(); err != nil || r.Code != 0 {
					t.Fatalf("unlock: %v, %+v", err, r)
				}
				break
			}
			steps++
			lines := strings.Split(strings.TrimSpace(k.Read(t, log)), "\n")
			for _, args := range [][]string{{"lock", name}, {"lock", name, "--kill", "--yes"}, {"unlock", name, "--passphrase-fd=0"}, {"destroy", name, "--yes"}} {
				r := k.Overkeep(t, k.pass, args...)
				// Once the view is served, it is open already for a second unlock; and
				// destroy looks whether it is locked before anything else.
				fine := r.Code == exitInUse || args[0] == "destroy" && r.Code == exitNotLocked ||
					args[0] == "unlock" && r.Code == 0 && k.status(t).State == keep.Unlocked
				if !fine {
					t.Errorf("%v while unlock stands at %q: exit code %d\n%s%s", args, lines[len(lines)-1], r.Code, r.Stdout, r.Stderr)
				}
			}
			k.Must(t, "root", fmt.Sprint("kill -CONT ", stopped))
			if r, err := p.Wait(); err != nil || r.Code != 0 {
				t.Fatalf("unlock after a stop at %q: %v, %+v", lines[len(lines)-1], err, r)
			}
			k.mustLock(t)
		}
		if steps < 8 {
			t.Errorf("unlock was stopped at %d steps; there must be more", steps)
		}
		t.Logf("unlock stopped at %d steps", steps)
		e := proof.Gather(t, k.Machine, name, secretFile, k.upper)
		k.mustLock(t)
		k.isLocked(t, e)
	})
}

// TestSession: a process that lives in the view and holds nothing does not
// prevent the lock, sees nothing after it, and sees the keep again once it is
// unlocked.
func TestSession(t *testing.T) {
	each(t, func(t *testing.T, k *locked) {
		e := k.open(t)
		session := k.hold(t, asAlice("mkfifo -m 600 /dev/shm/ask; exec 3<>/dev/shm/ask; rm /dev/shm/ask; echo pid $$; while read -r f <&3; do cat $f || echo gone; done"), "")
		root := fmt.Sprintf("/proc/%d/root", proof.Outside(t, k.Machine, session.pid))
		for range 3 {
			if b, err := os.ReadFile(root + secretFile); err != nil || strings.TrimSpace(string(b)) != k.secret {
				t.Errorf("the session reads %q, %v", b, err)
			}
			if _, err := os.Stat(root + k.upper); err != nil {
				t.Errorf("the session does not see %s: %v", k.upper, err)
			}
			k.mustLock(t)
			k.isLocked(t, e)
			if _, err := os.Stat(root + secretFile); !errors.Is(err, os.ErrNotExist) {
				t.Errorf("the session still reads: %v", err)
			}
			if _, err := os.Stat(root + k.lower); err != nil {
				t.Errorf("the session has lost the system store: %v", err)
			}
			k.unlock(t)
		}
		session.release(t)
		k.mustLock(t)
		k.isLocked(t, e)
		k.noneLeft(t)
	})
}

// noneLeft sees that a locked keep without sessions has left nothing in /run.
func (k *locked) noneLeft(t *testing.T) {
	t.Helper()
	if out := k.Must(t, "root", "find /run/overkeep -mindepth 1 ! -name '.*.lock'"); out != "" {
		t.Errorf("left in /run/overkeep:\n%s", out)
	}
	if out := k.Must(t, "root", "grep overkeep /proc/self/mountinfo || true"); out != "" {
		t.Errorf("still mounted:\n%s", out)
	}
}

// TestPinnedView: somebody keeps the view's own namespace alive, by a descriptor
// or by a bind mount. It is emptied, so it holds nothing: the lock succeeds, the
// namespace shows nothing of the keep, and the next unlock works.
func TestPinnedView(t *testing.T) {
	both(t, func(t *testing.T, k *locked) {
		const look = " sh -c 'ls " + secretFile + " " + volume + "/keep.json @upper 2>/dev/null || true'"
		see := func(t *testing.T, ns string) string {
			t.Helper()
			return k.Must(t, "root", "cd /; nsenter --mount="+ns+strings.ReplaceAll(look, "@upper", k.upper))
		}
		t.Run("descriptor", func(t *testing.T) {
			e := k.open(t)
			held := k.hold(t, "exec 3</run/overkeep/alice/ns/mnt"+stay, "")
			ns := fmt.Sprintf("/proc/%d/fd/3", held.pid)
			if see(t, ns) == "" {
				t.Error("an unlocked keep does not show through the descriptor")
			}
			k.mustLock(t)
			k.isLocked(t, e)
			if out := see(t, ns); out != "" {
				t.Errorf("locked, but the descriptor leads to %s", out)
			}
			k.worksAgain(t)
			if out := see(t, ns); out != "" {
				t.Errorf("locked, but the descriptor leads to %s", out)
			}
			held.release(t)
			k.noneLeft(t)
		})
		t.Run("bind mount", func(t *testing.T) {
			e := k.open(t)
			k.Must(t, "root", "touch /run/pin; mount --bind /run/overkeep/alice/ns/mnt /run/pin")
			if see(t, "/run/pin") == "" {
				t.Error("an unlocked keep does not show through the bind mount")
			}
			k.mustLock(t)
			k.isLocked(t, e)
			if out := see(t, "/run/pin"); out != "" {
				t.Errorf("locked, but the bind mount leads to %s", out)
			}
			k.worksAgain(t)
			k.Must(t, "root", "umount /run/pin; rm /run/pin")
			k.noneLeft(t)
		})
	})
}
