// Package bed is the throw-away laptop: a real Debian with stock Nix on its own
// ext4 disk, in namespaces of its own, that a test may fill, kill, cut the
// power of, boot again, and search block by block.
//
// It promises: a machine starts from a clean disk; nothing it does is seen
// outside; what it wrote is on Disk, /tmp included, and can be searched there;
// and it is gone with its processes, mounts, loop devices and files when the
// test ends, also when the test process is killed.
//
// Start with
//
//	m := bed.Start(t, bed.Forky)
//	m.SystemNix(t)
//	m.Install(t, bed.Binary(t))
//	out := m.Must(t, "alice", "nix --version")
//
// There is no systemd in it: its PID 1 mounts, waits and reaps (see init.go).
// Tests of units, logind and PAM need another bed. It is no security boundary:
// root in the machine is root of this kernel. Do not use it where a loop-mounted
// directory would do; a start copies some 300 MB.
//
// Importing the package is enough: a re-executed test binary becomes PID 1 in an
// init function, no TestMain needed.
package bed

import (
	"errors"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"runtime"
	"strings"
	"sync"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"overkeep/tests/bed/loop"
	"overkeep/tests/need"
)

// Suite is a Debian release, and with it a version of Nix.
type Suite string

const (
	Trixie Suite = "trixie" // Nix 2.26
	Forky  Suite = "forky"  // Nix 2.34
)

// Suites are all there are, oldest first.
var Suites = []Suite{Trixie, Forky}

// patience bounds every wait for the kernel or a daemon. Nothing is measured
// by it; it only ends a hang with a message instead of a dead test run.
const patience = 60 * time.Second

// Machine is one laptop. Its methods may be called from several goroutines,
// save Boot, Kill, PowerCut and Stop, which nothing else may run beside.
type Machine struct {
	Suite  Suite
	Disk   string // raw image of the whole disk; a file outside the machine
	Device string // the loop device that carries it, "/dev/loopN"
	Root   string // its root directory seen from outside: /proc/PID/root

	dir  string // holds Disk, the mount point and the lock
	lock *os.File

	init   *exec.Cmd // PID 1; nil while off
	life   *os.File  // closed: PID 1 exits
	exited chan struct{}
	pidfd  int
	guests sync.WaitGroup // commands under way
}

// Start makes a machine with a new disk and boots it. It is stopped when the
// test ends. The first start of a suite ever builds its image (tests/bed/rootfs,
// under a minute); later ones copy it.
func Start(t testing.TB, suite Suite) *Machine {
	t.Helper()
	return start(t, suite, runDir)
}

// StartInMemory is Start with the disk in memory, where there is room: for
// campaigns that sync thousands of times. A sync then costs what the file system
// does, not what the disk does; what a power cut loses is the same.
func StartInMemory(t testing.TB, suite Suite) *Machine {
	t.Helper()
	return start(t, suite, memoryDir)
}

func start(t testing.TB, suite Suite, dir func(image string) string) *Machine {
	t.Helper()
	need.Root(t)
	need.Tool(t, "cp", "sha256sum")
	need.Namespaces(t)
	need.Encryption(t)
	img := image(t, suite)
	m, err := newMachine(img, suite, dir(img))
	if err != nil {
		t.Fatalf("bed: new %s machine: %v", suite, err)
	}
	t.Cleanup(func() { m.Stop(t) })
	m.Boot(t)
	return m
}

// runDir holds the work directories, beside the image.
func runDir(image string) string { return filepath.Join(filepath.Dir(image), "run") }

// memoryDir holds those of machines in memory: a tmpfs, or runDir where that or
// the memory behind it has little room left.
func memoryDir(image string) string {
	const shm, room = "/dev/shm", 2 << 30
	var fs unix.Statfs_t
	if unix.Statfs(shm, &fs) != nil || fs.Type != unix.TMPFS_MAGIC || fs.Bavail*uint64(fs.Bsize) < room || available() < room {
		return runDir(image)
	}
	return filepath.Join(shm, "overkeep-bed")
}

// available is the memory that can be had without swapping (proc_meminfo(5)).
func available() (bytes uint64) {
	b, _ := os.ReadFile("/proc/meminfo")
	_, rest, _ := strings.Cut(string(b), "MemAvailable:")
	_, _ = fmt.Sscanf(rest, "%d kB", &bytes)
	return bytes << 10
}

// newMachine copies the image into a work directory in run. Whoever made the
// directory holds a lock on it until its end, so that what a killed test left
// behind is known and removed by the next one.
func newMachine(image string, suite Suite, run string) (*Machine, error) {
	if err := os.MkdirAll(run, 0o700); err != nil {
		return nil, err
	}
	sweep(run)
	dir, err := os.MkdirTemp(run, string(suite)+"-")
	if err != nil {
		return nil, err
	}
	m := &Machine{Suite: suite, Disk: filepath.Join(dir, "disk"), dir: dir, pidfd: -1}
	if m.lock, err = lockDir(dir); err != nil {
		return nil, errors.Join(err, os.Remove(dir))
	}
	err = os.Mkdir(filepath.Join(dir, "mnt"), 0o700)
	if err == nil {
		var out []byte
		out, err = exec.Command("cp", "--sparse=always", "--reflink=auto", image, m.Disk).CombinedOutput()
		if err != nil {
			err = fmt.Errorf("copy the image: %w: %s", err, out)
		}
	}
	if err != nil {
		return nil, errors.Join(err, m.remove())
	}
	return m, nil
}

// lockDir takes the lock of a work directory, without waiting.
func lockDir(dir string) (*os.File, error) {
	f, err := os.Open(dir)
	if err != nil {
		return nil, err
	}
	if err := unix.Flock(int(f.Fd()), unix.LOCK_EX|unix.LOCK_NB); err != nil {
		f.Close()
		return nil, fmt.Errorf("lock %q: %w", dir, err)
	}
	return f, nil
}

// sweep removes work directories that nobody holds. A new one is unlocked for an
// instant; its age protects it.
func sweep(run string) {
	entries, _ := os.ReadDir(run)
	for _, e := range entries {
		dir := filepath.Join(run, e.Name())
		if fi, err := e.Info(); err != nil || time.Since(fi.ModTime()) < patience {
			continue
		}
		f, err := lockDir(dir)
		if err != nil {
			continue
		}
		_ = (&Machine{dir: dir, Disk: filepath.Join(dir, "disk"), lock: f}).remove()
	}
}

// remove deletes the work directory file by file: should something still be
// mounted on mnt, rmdir refuses, and nothing is lost.
func (m *Machine) remove() error {
	defer m.lock.Close()
	err := os.Remove(m.Disk)
	if errors.Is(err, os.ErrNotExist) {
		err = nil
	}
	return errors.Join(err, os.Remove(filepath.Join(m.dir, "mnt")), os.Remove(m.dir))
}

// Boot starts the machine from its disk as it is, replaying the filesystem's
// journal if need be. It fails the test if the machine runs already.
func (m *Machine) Boot(t testing.TB) {
	t.Helper()
	if m.init != nil {
		t.Fatalf("bed: boot: the machine is on")
	}
	for range 3 {
		if err := m.boot(); err != nil {
			t.Fatalf("bed: boot %s: %v", m.Suite, err)
		}
		if pinnable(m.init.Process.Pid) {
			return
		}
		m.Kill(t)
	}
	t.Fatalf("bed: boot %s: no mount namespace with a low id", m.Suite)
}

func (m *Machine) boot() (err error) {
	dev, err := loop.Attach(m.Disk)
	if err != nil {
		return err
	}
	defer dev.Close() // from here on the mount holds it
	m.Device = dev.Path

	lifeR, lifeW, err := os.Pipe()
	if err != nil {
		return err
	}
	defer lifeR.Close()
	readyR, readyW, err := os.Pipe()
	if err != nil {
		return errors.Join(err, lifeW.Close())
	}
	defer readyR.Close()
	defer readyW.Close()

	cmd := exec.Command("/proc/self/exe", dev.Path, filepath.Join(m.dir, "mnt"))
	cmd.Args[0] = initName
	cmd.Env = []string{}
	cmd.Stdin = lifeR
	cmd.ExtraFiles = []*os.File{readyW}
	cmd.SysProcAttr = &unix.SysProcAttr{
		Cloneflags: unix.CLONE_NEWNS | unix.CLONE_NEWPID | unix.CLONE_NEWIPC | unix.CLONE_NEWUTS | unix.CLONE_NEWNET,
		Setsid:     true,
	}
	if err := onThread(func() error { lowestCPU(); return cmd.Start() }); err != nil {
		return errors.Join(err, lifeW.Close())
	}
	m.init, m.life, m.exited = cmd, lifeW, make(chan struct{})
	go func(done chan struct{}) { _ = cmd.Wait(); close(done) }(m.exited)

	readyW.Close()
	_ = readyR.SetReadDeadline(time.Now().Add(patience))
	msg := make([]byte, 4096)
	n, err := readyR.Read(msg)
	if err != nil || string(msg[:n]) != readyWord {
		return errors.Join(fmt.Errorf("PID 1: %q (%v)", msg[:n], err), m.kill())
	}
	if m.pidfd, err = unix.PidfdOpen(cmd.Process.Pid, 0); err != nil {
		return errors.Join(err, m.kill())
	}
	m.Root = fmt.Sprintf("/proc/%d/root", cmd.Process.Pid)
	return nil
}

// PID is the machine's PID 1 as seen from outside.
func (m *Machine) PID() int { return m.init.Process.Pid }

// Kill ends every process of the machine at once, as a kernel that stops would,
// but the filesystem is unmounted in good order: what was written is kept.
// For a loss of unwritten data use PowerCut. The machine is off afterwards.
func (m *Machine) Kill(t testing.TB) {
	t.Helper()
	if err := m.kill(); err != nil {
		t.Fatalf("bed: kill: %v", err)
	}
}

func (m *Machine) kill() error {
	if m.init == nil {
		return nil
	}
	_ = m.init.Process.Kill()
	m.life.Close()
	select {
	case <-m.exited: // the kernel has ended and reaped the whole pid namespace
	case <-time.After(patience):
		return fmt.Errorf("PID 1 (%d) does not die", m.init.Process.Pid)
	}
	m.guests.Wait()
	if m.pidfd >= 0 {
		_ = unix.Close(m.pidfd)
	}
	m.init, m.pidfd, m.Root = nil, -1, ""
	return m.released()
}

// released waits until no loop device carries the disk any more: the mounts of
// a dead namespace are undone some time after its last process, and no event
// tells. Loop devices whose files lie on the disk would hold it for ever; a
// computer that is switched off has none, so they are detached.
func (m *Machine) released() error {
	const grace = 500 * time.Millisecond // most disks are free by then
	start := time.Now()
	for {
		devs, err := loop.Backed(m.Disk)
		if err != nil || len(devs) == 0 {
			return err
		}
		waited := time.Since(start)
		if waited > 5*patience { // gigabytes may have to be written back first
			return fmt.Errorf("the disk is still in use by %v", devs)
		}
		if waited > grace {
			for _, d := range devs {
				loop.DetachOn(d)
			}
		}
		time.Sleep(5 * time.Millisecond)
	}
}

// PowerCut loses power and boots again: the filesystem stops at this instant,
// its journal not flushed (EXT4_IOC_SHUTDOWN with NOLOGFLUSH), so data and names
// that were never synced may be gone; then everything is killed, and the journal
// replayed by the next boot. It does not reorder or tear writes that the
// filesystem had already issued.
func (m *Machine) PowerCut(t testing.TB) {
	t.Helper()
	m.Cut(t)
	m.Boot(t)
}

// Cut is PowerCut without the boot: the machine is off.
func (m *Machine) Cut(t testing.TB) {
	t.Helper()
	if err := shutdown(m.Root); err != nil {
		t.Fatalf("bed: power cut: %v", err)
	}
	m.Kill(t)
}

// shutdown stops the ext4 at path. The numbers are of linux/fs/ext4/ext4.h
// (include/uapi/linux/ext4.h), which golang.org/x/sys/unix does not have.
func shutdown(path string) error {
	const (
		ext4IocShutdown  = 0x8004587d // _IOR('X', 125, __u32)
		flagsNoLogFlush  = 2
		rootOfFilesystem = unix.O_RDONLY | unix.O_DIRECTORY | unix.O_CLOEXEC
	)
	fd, err := unix.Open(path, rootOfFilesystem, 0)
	if err != nil {
		return &os.PathError{Op: "open", Path: path, Err: err}
	}
	defer unix.Close(fd)
	if err := unix.IoctlSetPointerInt(fd, ext4IocShutdown, flagsNoLogFlush); err != nil {
		return fmt.Errorf("EXT4_IOC_SHUTDOWN on %q: %w", path, err)
	}
	return nil
}

// Stop kills the machine, checks that no loop device of its disk is left, and
// removes the disk. Start has arranged for it to be called.
func (m *Machine) Stop(t testing.TB) {
	t.Helper()
	if m.lock == nil {
		return
	}
	if err := m.kill(); err != nil {
		t.Errorf("bed: stop: %v", err)
		return // the disk is in use: leave it to the sweep of a later start
	}
	if err := m.remove(); err != nil {
		t.Errorf("bed: stop: %v", err)
	}
	m.lock = nil
}

// onThread runs f on an operating system thread that ends with it, so that f may
// change the thread's namespaces, directory and CPUs. A locked goroutine that
// returns takes its thread along (runtime.LockOSThread).
func onThread(f func() error) error {
	done := make(chan error)
	go func() {
		runtime.LockOSThread()
		done <- f()
	}()
	return <-done
}
