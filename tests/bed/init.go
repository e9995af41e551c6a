package bed

import (
	"errors"
	"fmt"
	"io"
	"os"
	"os/signal"
	"path/filepath"

	"golang.org/x/sys/unix"
)

const (
	initName  = "overkeep-bed-init" // argv[0] of PID 1
	readyWord = "ready\n"
	loops     = 256 // loop device nodes in the machine's /dev
)

func init() {
	if os.Args[0] != initName || os.Getpid() != 1 {
		return
	}
	ready := os.NewFile(3, "ready")
	if err := pid1(os.Args[1], os.Args[2]); err != nil {
		_, _ = io.WriteString(ready, err.Error())
		os.Exit(1)
	}
	_, _ = io.WriteString(ready, readyWord)
	ready.Close()
	go func() { // our end of the lifeline: the test is gone, so are we
		_, _ = io.Copy(io.Discard, os.Stdin)
		os.Exit(0)
	}()
	reap()
}

// reap waits for orphans for ever.
func reap() {
	child := make(chan os.Signal, 1)
	signal.Notify(child, unix.SIGCHLD)
	signal.Ignore(unix.SIGHUP, unix.SIGINT, unix.SIGTERM)
	for {
		for {
			pid, err := unix.Wait4(-1, nil, unix.WNOHANG, nil)
			if errors.Is(err, unix.EINTR) {
				continue
			}
			if pid <= 0 {
				break
			}
		}
		<-child
	}
}

// pid1 makes the machine out of new namespaces and a disk, and pivots into it.
// pivot_root, not chroot: a chrooted process may not make user namespaces, and
// with them Nix's build sandbox (user_namespaces(7)).
func pid1(disk, root string) error {
	in := func(p string) string { return filepath.Join(root, p) }
	type mount struct {
		source, target, fs string
		flags              uintptr
		data               string
	}
	const plain = unix.MS_NOSUID | unix.MS_NODEV | unix.MS_NOEXEC
	for _, m := range []mount{
		{"", "/", "", unix.MS_REC | unix.MS_PRIVATE, ""},
		{disk, root, "ext4", 0, ""},
		{"proc", in("proc"), "proc", plain, ""},
		{"sysfs", in("sys"), "sysfs", plain | unix.MS_RDONLY, ""},
		{"dev", in("dev"), "tmpfs", unix.MS_NOSUID, "mode=755,size=1m"},
		{"run", in("run"), "tmpfs", unix.MS_NOSUID | unix.MS_NODEV, "mode=755"},
	} {
		if err := unix.Mount(m.source, m.target, m.fs, m.flags, m.data); err != nil {
			return fmt.Errorf("mount %s on %s: %w", m.fs, m.target, err)
		}
	}
	if err := devices(in("dev")); err != nil {
		return err
	}
	if err := unix.Sethostname([]byte("bed")); err != nil {
		return fmt.Errorf("set the host name: %w", err)
	}
	if err := loopbackUp(); err != nil {
		return err
	}
	// The new root and the old at one place: no directory for the old needed
	// (pivot_root(2), "pivot_root(".", ".")").
	if err := os.Chdir(root); err != nil {
		return err
	}
	if err := unix.PivotRoot(".", "."); err != nil {
		return fmt.Errorf("pivot_root: %w", err)
	}
	if err := unix.Unmount(".", unix.MNT_DETACH); err != nil {
		return fmt.Errorf("let go of the old root: %w", err)
	}
	return os.Chdir("/")
}

// devices fills a /dev: nodes, links, terminals, shared memory. Loop devices
// belong to it: an image-backed volume needs them.
func devices(dev string) error {
	unix.Umask(0)
	defer unix.Umask(0o022)
	type node struct {
		name         string
		mode         uint32
		major, minor uint32
	}
	nodes := []node{
		{"null", unix.S_IFCHR | 0o666, 1, 3}, {"zero", unix.S_IFCHR | 0o666, 1, 5},
		{"full", unix.S_IFCHR | 0o666, 1, 7}, {"random", unix.S_IFCHR | 0o666, 1, 8},
		{"urandom", unix.S_IFCHR | 0o666, 1, 9}, {"tty", unix.S_IFCHR | 0o666, 5, 0},
		{"kmsg", unix.S_IFCHR | 0o644, 1, 11}, {"fuse", unix.S_IFCHR | 0o666, 10, 229},
		{"loop-control", unix.S_IFCHR | 0o660, 10, 237},
	}
	for n := range uint32(loops) {
		nodes = append(nodes, node{fmt.Sprintf("loop%d", n), unix.S_IFBLK | 0o660, 7, n})
	}
	for _, n := range nodes {
		if err := unix.Mknod(filepath.Join(dev, n.name), n.mode, int(unix.Mkdev(n.major, n.minor))); err != nil {
			return fmt.Errorf("make the device %s: %w", n.name, err)
		}
	}
	for name, target := range map[string]string{
		"fd": "/proc/self/fd", "stdin": "/proc/self/fd/0", "stdout": "/proc/self/fd/1",
		"stderr": "/proc/self/fd/2", "ptmx": "pts/ptmx",
	} {
		if err := os.Symlink(target, filepath.Join(dev, name)); err != nil {
			return err
		}
	}
	for _, m := range []struct{ name, fs, data string }{
		{"pts", "devpts", "newinstance,ptmxmode=0666,mode=620,gid=5"},
		{"shm", "tmpfs", "mode=1777"},
	} {
		dir := filepath.Join(dev, m.name)
		if err := os.Mkdir(dir, 0o755); err != nil {
			return err
		}
		if err := unix.Mount(m.fs, dir, m.fs, unix.MS_NOSUID|unix.MS_NOEXEC, m.data); err != nil {
			return fmt.Errorf("mount %s: %w", m.fs, err)
		}
	}
	return nil
}

// loopbackUp brings up the only network the machine has (netdevice(7)).
func loopbackUp() error {
	fd, err := unix.Socket(unix.AF_INET, unix.SOCK_DGRAM|unix.SOCK_CLOEXEC, 0)
	if err != nil {
		return fmt.Errorf("socket: %w", err)
	}
	defer unix.Close(fd)
	req, err := unix.NewIfreq("lo")
	if err != nil {
		return err
	}
	req.SetUint16(unix.IFF_UP | unix.IFF_RUNNING)
	if err := unix.IoctlIfreq(fd, unix.SIOCSIFFLAGS, req); err != nil {
		return fmt.Errorf("bring up lo: %w", err)
	}
	return nil
}
