package crash

import (
	"errors"
	"fmt"
	"os"
	"slices"
	"strings"
	"syscall"
	"testing"

	"golang.org/x/sys/unix"

	"overkeep/tests/lock/proof"
)

// TestStranger: a lock that is interrupted between the volume's unmount and the
// removal of its key leaves a description that names loop devices which are free
// by then. Whoever is given one of them next is not taken for a holder.
func TestStranger(t *testing.T) {
	t.Parallel()
	for _, backend := range []string{"image", "on-image"} {
		t.Run(backend, func(t *testing.T) {
			t.Parallel()
			m := newMachine(t, backend)
			m.make(t)
			m.fill(t)
			m.unlock(t)
			points, _, r := m.armed(t, overkeep("", "lock", name), 1<<20, kill)
			at := slices.Index(points, "lock.key") + 1
			if r.Code != 0 || at == 0 {
				t.Fatalf("lock: exit code %d, points %q", r.Code, points)
			}

			m.unlock(t)
			before := proof.Loops(t, m.Machine)
			if _, fired, _ := m.armed(t, overkeep("", "lock", name), at, kill); !fired {
				t.Fatal("the lock did not crash")
			}
			var freed []string
			proof.Await(t, func() string {
				freed = slices.DeleteFunc(slices.Clone(before), func(l string) bool { return slices.Contains(proof.Loops(t, m.Machine), l) })
				if len(freed) == 0 {
					return fmt.Sprint("no loop device is free: ", before)
				}
				return ""
			})
			m.Must(t, "root", "truncate --size=1M /root/stranger")
			var release []func()
			for _, l := range freed {
				dev, _, _ := strings.Cut(l, " ")
				release = append(release, m.bind(t, dev, "/root/stranger"))
			}
			m.lock(t)
			m.unlock(t)
			if got := m.Alice(t, "cat data "+m.upper); got != m.canary+"\n"+m.canary {
				t.Errorf("the data are %q", got)
			}
			m.lock(t)
			for _, f := range release {
				f()
			}
			m.clean(t)
		})
	}
}

// TestLeftNamespace: the namespace that an interrupted lock, or a session that
// outlives one, has left works when the keep is opened again, whatever was done to
// the keep meanwhile, and does not outlive the keep.
func TestLeftNamespace(t *testing.T) {
	t.Parallel()
	m := newMachine(t, "image")
	m.make(t)
	m.fill(t)
	verify := func() {
		t.Helper()
		m.must(t, overkeep(m.pass, "key", "recovery", name, "--passphrase-fd=0", "--recovery-out", m.file("recovery")))
		m.unlock(t)
		if got := m.Alice(t, "cat data "+m.upper); got != m.canary+"\n"+m.canary {
			t.Errorf("the data are %q", got)
		}
	}

	m.unlock(t)
	points, _, _ := m.armed(t, overkeep("", "lock", name), 1<<20, kill)
	at := slices.Index(points, "lock.unpin") + 1
	interrupted := func() {
		t.Helper()
		m.unlock(t)
		if _, fired, _ := m.armed(t, overkeep("", "lock", name), at, kill); !fired || at == 0 {
			t.Fatalf("the lock did not crash: %q", points)
		}
	}
	interrupted()
	verify()
	m.lockSoon(t)
	m.clean(t)

	session := func() (end func()) {
		t.Helper()
		m.unlock(t)
		p, err := m.Start("root", "cd /; exec overkeep run alice -- bash -c 'cd /; echo ready; exec sleep infinity'")
		if err != nil {
			t.Fatal(err)
		}
		await(t, func() bool { return strings.Contains(p.Output(), "ready") })
		m.lockSoon(t)
		return func() { _ = p.Signal(syscall.SIGTERM); <-p.Done() }
	}
	end := session()
	verify()
	end()
	m.lockSoon(t)
	m.clean(t)

	for _, leave := range []func() func(){session, func() func() { interrupted(); return func() {} }} {
		end := leave()
		m.must(t, overkeep("", "destroy", name, "--yes"))
		m.make(t)
		m.fill(t)
		end()
		m.whole(t, false)
	}
}

// bind gives a loop device to a file of the machine, unless somebody, who is as
// good a stranger, was quicker. The function that comes back frees it.
func (m *machine) bind(t *testing.T, dev, file string) func() {
	t.Helper()
	d, err := os.OpenFile(m.Root+dev, os.O_RDWR, 0)
	if err != nil {
		t.Fatal(err)
	}
	defer d.Close()
	f, err := os.OpenFile(m.Root+file, os.O_RDWR, 0)
	if err != nil {
		t.Fatal(err)
	}
	defer f.Close()
	err = unix.IoctlSetInt(int(d.Fd()), unix.LOOP_SET_FD, int(f.Fd()))
	if errors.Is(err, unix.EBUSY) {
		return func() {}
	}
	if err != nil {
		t.Fatalf("bind %s: %v", dev, err)
	}
	return func() {
		d, err := os.OpenFile(m.Root+dev, os.O_RDWR, 0)
		if err == nil {
			err = unix.IoctlSetInt(int(d.Fd()), unix.LOOP_CLR_FD, 0)
			d.Close()
		}
		if err != nil {
			t.Errorf("free %s: %v", dev, err)
		}
	}
}
