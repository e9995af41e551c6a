package volume

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"io"
	"log"
	"os"
	"os/exec"
	"path/filepath"
	"runtime"
	"strings"
	"syscall"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"overkeep/crypt/secret"
	"overkeep/tests/bed/loop"
	"overkeep/tests/need"
)

// Environment by which the test binary calls itself.
const (
	envPrivate = "OVERKEEP_VOLUME_PRIVATE" // in its own mount namespace already
	envCreate  = "OVERKEEP_VOLUME_CREATE"  // be the Create that is killed
)

// TestMain moves the whole run into a private mount namespace, so that nothing a
// test mounts is ever seen outside and all of it goes with the last process.
func TestMain(m *testing.M) {
	log.SetOutput(io.Discard) // as every command of ours does
	if os.Getenv(envCreate) != "" {
		killedCreate()
		return
	}
	if os.Geteuid() != 0 || os.Getenv(envPrivate) != "" {
		os.Exit(m.Run())
	}
	runtime.LockOSThread() // Pdeathsig goes by the thread
	cmd := exec.Command("/proc/self/exe", os.Args[1:]...)
	cmd.Env = append(os.Environ(), envPrivate+"=1")
	cmd.Stdin, cmd.Stdout, cmd.Stderr = os.Stdin, os.Stdout, os.Stderr
	cmd.SysProcAttr = &syscall.SysProcAttr{Unshareflags: syscall.CLONE_NEWNS, Pdeathsig: syscall.SIGKILL}
	err := cmd.Run()
	if exit := (*exec.ExitError)(nil); errors.As(err, &exit) {
		os.Exit(exit.ExitCode())
	}
	if err != nil {
		fmt.Fprintln(os.Stderr, err)
		os.Exit(1)
	}
}

// device is a throw-away ext4 on a loop device.
type device struct {
	mnt string // where it is mounted
	raw string // its backing file: all that a thief has
}

// newDevice makes and mounts an ext4 of size bytes. At the end of the test it
// must unmount, and no loop device may be left over anything in its directory.
func newDevice(t *testing.T, size int64, mkfsArgs ...string) device {
	t.Helper()
	need.Encryption(t)
	dir := t.TempDir()
	d := device{mnt: filepath.Join(dir, "mnt"), raw: filepath.Join(dir, "raw")}
	if err := errors.Join(os.Mkdir(d.mnt, 0o755), os.WriteFile(d.raw, nil, 0o600), os.Truncate(d.raw, size)); err != nil {
		t.Fatal(err)
	}
	if out, err := exec.Command("mkfs.ext4", append(append([]string{"-q", "-b", "4096"}, mkfsArgs...), d.raw)...).CombinedOutput(); err != nil {
		t.Fatalf("mkfs.ext4: %v: %s", err, out)
	}
	l, err := loop.Attach(d.raw)
	if err != nil {
		t.Fatal(err)
	}
	defer l.Close()
	if err := unix.Mount(l.Path, d.mnt, "ext4", 0, ""); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		if err := unix.Unmount(d.mnt, 0); err != nil {
			rows, _ := os.ReadFile("/proc/self/mountinfo")
			t.Errorf("unmount the device: %v\n%s", err, grep(rows, dir))
			_ = unix.Unmount(d.mnt, unix.MNT_DETACH)
		}
		err := poll(ctxT(t), func() (bool, error) {
			left, err := loop.Backed(dir)
			return len(left) == 0, err
		})
		if err != nil {
			t.Errorf("loop devices are left over files in %s: %v", dir, err)
		}
	})
	return d
}

func grep(b []byte, word string) string {
	var out []string
	for l := range strings.Lines(string(b)) {
		if strings.Contains(l, word) {
			out = append(out, l)
		}
	}
	return strings.Join(out, "")
}

// ctxT bounds what waits; a bound, not a measure.
func ctxT(t *testing.T) context.Context {
	t.Helper()
	ctx, cancel := context.WithTimeout(context.Background(), 30*time.Second)
	t.Cleanup(cancel)
	return ctx
}

func newMaster(t *testing.T) *secret.Bytes {
	t.Helper()
	m, err := secret.Random(MasterLen)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(m.Wipe)
	return m
}

// specs are all shapes of a volume on a device.
func specs(d device) map[string]Spec {
	out := map[string]Spec{}
	for _, b := range []Backend{Image, Dir} {
		out[string(b)] = Spec{Backend: b, Dir: filepath.Join(d.mnt, "volume"), Size: 32 << 20}
		out[string(b)+" on image"] = Spec{
			Backend: b, Dir: filepath.Join(d.mnt, "fs", "volume"), Size: 32 << 20,
			FSImage: filepath.Join(d.mnt, "keep.img"), FSMount: filepath.Join(d.mnt, "fs"),
		}
	}
	return out
}

func mustCreate(t *testing.T, s Spec, m *secret.Bytes) ID {
	t.Helper()
	id, err := Create(ctxT(t), s, m, "keep of a test")
	if err != nil {
		t.Fatalf("create: %v", err)
	}
	return id
}

func mustOpen(t *testing.T, s Spec, id ID, m *secret.Bytes, target string) {
	t.Helper()
	if err := Open(ctxT(t), s, id, m, target); err != nil {
		t.Fatalf("open: %v", err)
	}
}

// mustLock goes through the pieces of a lock in their order.
func mustLock(t *testing.T, s Spec, id ID, target string, names ...string) {
	t.Helper()
	for _, f := range []struct {
		name string
		run  func() error
	}{
		{"unmount", func() error { return Unmount(target) }},
		{"remove key", func() error { return RemoveKeyWait(ctxT(t), s, id) }},
		{"drop caches", DropCaches},
		{"prove", func() error { return ProveLocked(s, id, names...) }},
		{"detach", func() error { return DetachFS(ctxT(t), s) }},
		{"prove after detach", func() error { return ProveLocked(s, id, names...) }},
	} {
		if err := f.run(); err != nil {
			t.Fatalf("%s: %v", f.name, err)
		}
	}
}

func mustStatus(t *testing.T, s Spec, id ID, want Status) {
	t.Helper()
	if got, err := KeyStatus(s, id); err != nil || got != want {
		t.Fatalf("key is %v (%v), want %v", got, err, want)
	}
}

// rawHits counts a word in the allocated parts of a device's backing file.
func rawHits(t *testing.T, raw, word string) int {
	t.Helper()
	unix.Sync()
	f, err := os.Open(raw)
	if err != nil {
		t.Fatal(err)
	}
	defer f.Close()
	hits, off := 0, int64(0)
	for {
		start, err := unix.Seek(int(f.Fd()), off, unix.SEEK_DATA)
		if err == unix.ENXIO {
			return hits
		}
		if err != nil {
			t.Fatal(err)
		}
		if off, err = unix.Seek(int(f.Fd()), start, unix.SEEK_HOLE); err != nil {
			t.Fatal(err)
		}
		b, err := io.ReadAll(io.NewSectionReader(f, start, off-start))
		if err != nil {
			t.Fatal(err)
		}
		hits += bytes.Count(b, []byte(word))
	}
}

// entries lists the names below dir, without what the fixture itself put there.
func entries(t *testing.T, dir string) []string {
	t.Helper()
	var out []string
	err := filepath.WalkDir(dir, func(p string, e os.DirEntry, err error) error {
		if err == nil && p != dir && e.Name() != "lost+found" {
			rel, _ := filepath.Rel(dir, p)
			out = append(out, rel)
		}
		if e != nil && e.Name() == "lost+found" {
			return filepath.SkipDir
		}
		return err
	})
	if err != nil {
		t.Fatal(err)
	}
	return out
}
