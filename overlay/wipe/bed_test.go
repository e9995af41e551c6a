package wipe

import (
	"context"
	"errors"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"runtime"
	"syscall"
	"testing"

	"golang.org/x/sys/unix"

	"overkeep/tests/bed/loop"
	"overkeep/tests/need"
)

const envPrivate = "OVERKEEP_WIPE_PRIVATE" // in its own mount namespace already

// TestMain moves the whole run into a private mount namespace, so that nothing a test
// mounts is ever seen outside and all of it goes with the last process.
func TestMain(m *testing.M) {
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

// newDevice makes and mounts an ext4. Its backing file lies on a file system that can
// punch holes, so that the device can discard, or on one that cannot.
func newDevice(t *testing.T, size int64, discard bool, mkfsArgs ...string) device {
	t.Helper()
	need.Encryption(t) // loop devices and mkfs.ext4
	dir := t.TempDir()
	d := device{mnt: filepath.Join(dir, "mnt"), raw: filepath.Join(dir, "disk", "raw")}
	if err := errors.Join(os.Mkdir(d.mnt, 0o755), os.Mkdir(filepath.Dir(d.raw), 0o700)); err != nil {
		t.Fatal(err)
	}
	if !discard {
		mount(t, "none", filepath.Dir(d.raw), "ramfs")
	}
	if err := errors.Join(os.WriteFile(d.raw, nil, 0o600), os.Truncate(d.raw, size)); err != nil {
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
	mount(t, l.Path, d.mnt, "ext4")
	return d
}

func mount(t *testing.T, from, at, kind string) {
	t.Helper()
	if err := unix.Mount(from, at, kind, 0, ""); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		if err := unix.Unmount(at, 0); err != nil {
			t.Errorf("unmount %s: %v", at, err)
			_ = unix.Unmount(at, unix.MNT_DETACH)
		}
	})
}

func opened(t *testing.T, path string) *os.File {
	t.Helper()
	f, err := os.Open(path)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { f.Close() })
	return f
}

// onDisk counts the names on the raw device, once all is written back.
func (d device) onDisk(t *testing.T, names ...string) map[string]int {
	t.Helper()
	m := opened(t, d.mnt)
	if err := unix.Syncfs(int(m.Fd())); err != nil {
		t.Fatal(err)
	}
	disk, err := OpenDisk(d.raw)
	if err != nil {
		t.Fatal(err)
	}
	defer disk.Close()
	var list [][]byte
	for _, n := range names {
		list = append(list, []byte(n))
	}
	found := map[string]int{}
	if err := Search(context.Background(), disk, list, func(n int, _ int64) { found[names[n]]++ }); err != nil {
		t.Fatal(err)
	}
	return found
}
