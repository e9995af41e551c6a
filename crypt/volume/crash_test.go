package volume

import (
	"encoding/hex"
	"encoding/json"
	"errors"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"syscall"
	"testing"

	"golang.org/x/sys/unix"

	"overkeep/crypt/secret"
	"overkeep/tests/bed/loop"
	"overkeep/tests/need"
)

// killOrder tells the child what to create, and before which durable step to die.
type killOrder struct {
	Spec   Spec
	Master string
	Step   int // 0: live, and print the name of every step
}

// killedCreate is the child: a Create that is killed, not one that fails.
func killedCreate() {
	var o killOrder
	b, err := hex.DecodeString(os.Getenv(envCreate))
	if err == nil {
		err = json.Unmarshal(b, &o)
	}
	if err != nil {
		panic(err)
	}
	key, _ := hex.DecodeString(o.Master)
	m, err := secret.From(key)
	if err != nil {
		panic(err)
	}
	n := 0
	crash = func(name string) {
		if n++; n == o.Step {
			_ = syscall.Kill(os.Getpid(), syscall.SIGKILL)
			select {}
		}
		fmt.Println(name)
	}
	if _, err := Create(ctxT(new(testing.T)), o.Spec, m, "killed"); err != nil {
		fmt.Fprintln(os.Stderr, err)
		os.Exit(1)
	}
}

func runKilled(t *testing.T, o killOrder) (steps []string, killed bool) {
	t.Helper()
	b, err := json.Marshal(o)
	if err != nil {
		t.Fatal(err)
	}
	cmd := exec.Command("/proc/self/exe")
	cmd.Env = append(os.Environ(), envCreate+"="+hex.EncodeToString(b))
	var stderr strings.Builder
	cmd.Stderr = &stderr
	out, err := cmd.Output()
	if exit := (*exec.ExitError)(nil); errors.As(err, &exit) {
		if ws := exit.Sys().(syscall.WaitStatus); ws.Signaled() && ws.Signal() == syscall.SIGKILL {
			return strings.Fields(string(out)), true
		}
	}
	if err != nil {
		t.Fatalf("child: %v: %s", err, stderr.String())
	}
	return strings.Fields(string(out)), false
}

// A Create killed before any of its durable steps is cleaned up by what was
// known before it began, and the same Create then succeeds.
func TestKilledCreate(t *testing.T) {
	need.Encryption(t)
	for name := range specs(device{}) {
		t.Run(name, func(t *testing.T) {
			d := newDevice(t, 512<<20, "-O", "encrypt")
			s, m := specs(d)[name], newMaster(t)
			s.Size = MinSize
			protector, err := ProtectorDescriptor(m)
			if err != nil {
				t.Fatal(err)
			}
			// A neighbour whose things must survive every clean-up.
			neighbour := Spec{Backend: Dir, Dir: filepath.Join(d.mnt, "neighbour")}
			nm := newMaster(t)
			nid, err := Create(ctxT(t), neighbour, nm, "neighbour")
			if err != nil {
				t.Fatal(err)
			}
			o := killOrder{Spec: s, Master: hex.EncodeToString(m.Bytes())}
			before := entries(t, d.mnt)
			if err := Cleanup(ctxT(t), s, protector); err != nil {
				t.Fatalf("nothing to clean up: %v", err)
			}
			for o.Step = 1; ; o.Step++ {
				steps, killed := runKilled(t, o)
				if !killed {
					t.Logf("%d steps: %v", len(steps), steps)
					break
				}
				for range 2 { // the second time there is nothing to do
					if err := Cleanup(ctxT(t), s, protector); err != nil {
						t.Fatalf("step %d, after %v: %v", o.Step, steps, err)
					}
				}
				after := slices.DeleteFunc(entries(t, d.mnt), func(e string) bool { return e == "fs" })
				if !slices.Equal(before, after) {
					t.Fatalf("step %d: before %v, after %v", o.Step, before, after)
				}
			}
			if o.Step < 5 {
				t.Errorf("only %d steps", o.Step)
			}
			// Cleanup also undoes a finished Create; its document says so.
			if err := Cleanup(ctxT(t), s, protector); err != nil {
				t.Fatal(err)
			}
			id := mustCreate(t, s, m)
			target := filepath.Join(t.TempDir(), "k")
			mustOpen(t, s, id, m, target)
			mustLock(t, s, id, target)
			mustOpen(t, neighbour, nid, nm, target)
			mustLock(t, neighbour, nid, target)
		})
	}
}

// Cleanup and Destroy leave alone what has another policy or holds something.
func TestCleanupForeign(t *testing.T) {
	d := newDevice(t, 256<<20, "-O", "encrypt")
	m := newMaster(t)
	p, err := ProtectorDescriptor(m)
	if err != nil {
		t.Fatal(err)
	}
	good := Spec{Backend: Dir, Dir: filepath.Join(d.mnt, "good")}
	id := mustCreate(t, good, newMaster(t))
	full := Spec{Backend: Dir, Dir: filepath.Join(d.mnt, "full")}
	if err := errors.Join(os.Mkdir(full.Dir, 0o700), os.WriteFile(filepath.Join(full.Dir, "file"), nil, 0o600)); err != nil {
		t.Fatal(err)
	}
	for _, s := range []Spec{good, full} {
		if err := Cleanup(ctxT(t), s, p); !errors.As(err, new(*ForeignError)) {
			t.Errorf("clean up %s: %v", s.Dir, err)
		}
	}
	if err := Destroy(ctxT(t), full, id); !errors.As(err, new(*ForeignError)) {
		t.Errorf("destroy %s: %v", full.Dir, err)
	}
	if _, err := os.Stat(filepath.Join(full.Dir, "file")); err != nil {
		t.Error(err)
	}
	if err := ProveLocked(good, id); err != nil {
		t.Error(err)
	}
}

// What is mounted inside the directory is never deleted.
func TestDestroyNeverCrosses(t *testing.T) {
	d := newDevice(t, 256<<20, "-O", "encrypt")
	s, m := Spec{Backend: Dir, Dir: filepath.Join(d.mnt, "volume")}, newMaster(t)
	id := mustCreate(t, s, m)
	target := filepath.Join(t.TempDir(), "k")
	mustOpen(t, s, id, m, target)
	if err := os.MkdirAll(filepath.Join(target, "a/b"), 0o700); err != nil {
		t.Fatal(err)
	}
	mustLock(t, s, id, target, "a")
	var inside string
	for _, e := range entries(t, s.Dir) {
		inside = filepath.Join(s.Dir, e)
	}
	outside := t.TempDir()
	if err := os.WriteFile(filepath.Join(outside, "precious"), nil, 0o600); err != nil {
		t.Fatal(err)
	}
	if err := unix.Mount(outside, inside, "", unix.MS_BIND, ""); err != nil {
		t.Fatal(err)
	}
	err := Destroy(ctxT(t), s, id)
	if !errors.As(err, new(*BusyError)) {
		t.Errorf("destroy with a mount inside: %v", err)
	}
	t.Log(err)
	if _, err := os.Stat(filepath.Join(outside, "precious")); err != nil {
		t.Error(err)
	}
	if err := unix.Unmount(inside, 0); err != nil {
		t.Fatal(err)
	}
	if err := Destroy(ctxT(t), s, id); err != nil {
		t.Errorf("destroy, once nothing is mounted: %v", err)
	}
	if _, err := os.Lstat(s.Dir); !errors.Is(err, os.ErrNotExist) {
		t.Error(err)
	}
}

// After a power cut the journal of the inner filesystem is replayed by the
// mount, without e2fsck; what was synced is there.
func TestPowerCut(t *testing.T) {
	need.Encryption(t)
	for _, name := range []string{"image", "image on image", "dir"} {
		t.Run(name, func(t *testing.T) {
			d := newDevice(t, 512<<20, "-O", "encrypt")
			s, m := specs(d)[name], newMaster(t)
			id := mustCreate(t, s, m)
			target := filepath.Join(t.TempDir(), "k")
			mustOpen(t, s, id, m, target)
			f, err := os.Create(filepath.Join(target, "synced"))
			if err != nil {
				t.Fatal(err)
			}
			if _, err := f.WriteString("kept"); err != nil {
				t.Fatal(err)
			}
			if err := errors.Join(f.Sync(), f.Close()); err != nil {
				t.Fatal(err)
			}
			if err := os.WriteFile(filepath.Join(target, "unsynced"), nil, 0o600); err != nil {
				t.Fatal(err)
			}
			// EXT4_IOC_SHUTDOWN, dropping what the journal has not written.
			root, err := os.Open(d.mnt)
			if err != nil {
				t.Fatal(err)
			}
			if err := unix.IoctlSetPointerInt(int(root.Fd()), 0x8004587d, 2); err != nil {
				t.Fatal(err)
			}
			root.Close()
			for _, mnt := range []string{target, s.FSMount, d.mnt} {
				if mnt == "" {
					continue
				}
				if err := unix.Unmount(mnt, 0); err != nil {
					t.Fatal(mnt, err)
				}
			}
			if err := poll(ctxT(t), func() (bool, error) {
				left, err := loop.Backed(filepath.Dir(d.mnt))
				return len(left) == 0, err
			}); err != nil {
				t.Fatal(err)
			}
			l, err := loop.Attach(d.raw)
			if err != nil {
				t.Fatal(err)
			}
			if err := errors.Join(unix.Mount(l.Path, d.mnt, "ext4", 0, ""), l.Close()); err != nil {
				t.Fatal(err)
			}
			if err := ProveLocked(s, id, "synced"); err != nil {
				t.Error("after the cut:", err)
			}
			mustOpen(t, s, id, m, target)
			if b, err := os.ReadFile(filepath.Join(target, "synced")); string(b) != "kept" {
				t.Errorf("%q, %v", b, err)
			}
			mustLock(t, s, id, target, "synced")
		})
	}
}

// An inner filesystem with the error flag is repaired before it is mounted; one
// that cannot be repaired without questions is not mounted, and the key goes.
func TestDamagedFilesystem(t *testing.T) {
	need.Encryption(t)
	need.Tool(t, "debugfs", "e2fsck")
	d := newDevice(t, 512<<20, "-O", "encrypt")
	s, m := specs(d)["image"], newMaster(t)
	id := mustCreate(t, s, m)
	target := filepath.Join(t.TempDir(), "k")
	// debug edits the image while it is not mounted.
	debug := func(requests ...string) {
		t.Helper()
		ds := s
		ds.Backend = Dir
		mustOpen(t, ds, id, m, target)
		for _, r := range requests {
			if out, err := exec.Command("debugfs", "-w", "-R", r, filepath.Join(target, ImageName)).CombinedOutput(); err != nil {
				t.Fatalf("debugfs: %v: %s", err, out)
			}
		}
		mustLock(t, ds, id, target, ImageName)
	}
	debug("set_super_value state 2")
	mustOpen(t, s, id, m, target)
	mustLock(t, s, id, target)
	ds := s
	ds.Backend = Dir
	mustOpen(t, ds, id, m, target)
	f, err := os.Open(filepath.Join(target, ImageName))
	if err != nil {
		t.Fatal(err)
	}
	if sb, err := readSuperblock(f); err != nil || sb.Errors {
		t.Errorf("not repaired: %+v, %v", sb, err)
	}
	f.Close()
	mustLock(t, ds, id, target, ImageName)

	debug("set_super_value state 2", "clri <2>") // the root directory is gone
	err = Open(ctxT(t), s, id, m, target)
	if !errors.As(err, new(*DamagedError)) {
		t.Errorf("open of a damaged filesystem: %v", err)
	}
	t.Log(err)
	mustStatus(t, s, id, Absent)
	if err := ProveLocked(s, id); err != nil {
		t.Error(err)
	}
}

// An FSImage is large enough for its inner image to be filled to the brim.
func TestFillOnImage(t *testing.T) {
	d := newDevice(t, 512<<20, "-O", "encrypt")
	s, m := specs(d)["image on image"], newMaster(t)
	s.Size = 96 << 20
	id := mustCreate(t, s, m)
	target := filepath.Join(t.TempDir(), "k")
	mustOpen(t, s, id, m, target)
	f, err := os.Create(filepath.Join(target, "fill"))
	if err != nil {
		t.Fatal(err)
	}
	b := make([]byte, 1<<20)
	for err == nil {
		_, err = f.Write(b)
	}
	if !errors.Is(err, unix.ENOSPC) {
		t.Error(err)
	}
	if err := errors.Join(f.Sync(), f.Close()); err != nil {
		t.Errorf("the outer filesystem is full: %v", err)
	}
	if u, err := Usage(s, target); err != nil || u.ImageAllocated < s.Size*9/10 || u.FSImage != (s.Size+overhead(s.Size)+4095)/4096*4096 || u.FSImageAllocated < u.ImageAllocated {
		t.Errorf("usage %+v, %v", u, err)
	}
	mustLock(t, s, id, target)
}
