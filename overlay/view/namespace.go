package view

import (
	"errors"
	"fmt"
	"os"
	"os/exec"
	"runtime"

	"golang.org/x/sys/unix"
)

// Namespace is a handle on a mount namespace. Close releases the handle, not
// the namespace.
type Namespace struct{ f *os.File }

// The main goroutine keeps the main thread for itself. A goroutine that ends
// while it is locked to the main thread does not end the thread (the runtime
// parks it instead, proc.go): the process's own /proc/self would stay in a
// namespace that was meant for a moment.
func init() { runtime.LockOSThread() }

// onThread runs f on an operating-system thread of its own that is thrown away,
// for what it changes (its mount namespace) cannot be changed back reliably.
func onThread(f func() error) error {
	ch := make(chan error, 1)
	go func() {
		runtime.LockOSThread() // never unlocked: the runtime ends the thread
		ch <- f()
	}()
	return <-ch
}

// NewNamespace makes a mount namespace that receives what the host mounts and
// gives nothing back (MS_SLAVE). To namespaces made from within it is shared: a
// less privileged one (bubblewrap, rootless podman) could not give up its copies of
// the mounts by itself (mount_namespaces(7)), so they go with ours.
func NewNamespace() (*Namespace, error) { return newNamespace(-1) }

// NewPinned makes a namespace and pins it in dir, as Pin does.
//
// A namespace can only be bound into an older one (mnt_ns_loop in the kernel's
// fs/namespace.c). Since Linux 6.18 their numbers come from per-CPU batches, so
// that a younger one may look older: EINVAL, unless the caller lives in the
// machine's first namespace. It is made again on another processor then; every
// batch in turn ends up above the caller's number.
func NewPinned(dir string) (*Namespace, error) {
	const batches = 8 // tries a processor
	var last error
	for try := range batches * runtime.NumCPU() {
		cpu := -1
		if try > 0 {
			cpu = try % runtime.NumCPU()
		}
		ns, err := newNamespace(cpu)
		if err != nil {
			return nil, err
		}
		if last = ns.Pin(dir); last == nil {
			return ns, nil
		}
		ns.Close()
		if !errors.Is(last, unix.EINVAL) {
			break
		}
	}
	return nil, last
}

func newNamespace(cpu int) (*Namespace, error) {
	var ns *Namespace
	err := onThread(func() error {
		if cpu >= 0 {
			var set unix.CPUSet
			set.Set(cpu)
			_ = unix.SchedSetaffinity(0, &set) // this thread only, and it dies soon
		}
		// CLONE_NEWNS implies CLONE_FS is unshared for this thread (unshare(2)).
		if err := unix.Unshare(unix.CLONE_NEWNS | unix.CLONE_FS); err != nil {
			return fmt.Errorf("make a mount namespace: %w", err)
		}
		if err := unix.Mount("", "/", "", unix.MS_SLAVE|unix.MS_REC, ""); err != nil {
			return fmt.Errorf("make the namespace a slave of the host's: %w", err)
		}
		if err := unix.Mount("", "/", "", unix.MS_SHARED|unix.MS_REC, ""); err != nil {
			return fmt.Errorf("share the namespace with those made from it: %w", err)
		}
		f, err := os.Open("/proc/thread-self/ns/mnt")
		if err != nil {
			return err
		}
		ns = &Namespace{f}
		return nil
	})
	return ns, err
}

// OpenNamespace opens a pinned namespace or /proc/PID/ns/mnt. os.ErrNotExist is
// returned when path is missing or is not a namespace.
func OpenNamespace(path string) (*Namespace, error) {
	f, err := os.Open(path)
	if err != nil {
		return nil, err
	}
	t, _, e := unix.Syscall(unix.SYS_IOCTL, f.Fd(), unix.NS_GET_NSTYPE, 0)
	if e != 0 || t != unix.CLONE_NEWNS {
		f.Close()
		return nil, fmt.Errorf("%s is not a mount namespace: %w", path, os.ErrNotExist)
	}
	return &Namespace{f}, nil
}

// Close releases the handle.
func (n *Namespace) Close() error { return n.f.Close() }

// File is the open namespace file.
func (n *Namespace) File() *os.File { return n.f }

// Inode identifies the namespace, as in readlink /proc/PID/ns/mnt.
func (n *Namespace) Inode() (uint64, error) {
	var st unix.Stat_t
	if err := unix.Fstat(int(n.f.Fd()), &st); err != nil {
		return 0, err
	}
	return st.Ino, nil
}

// Pin binds the namespace to dir/mnt so that it outlives its last process. dir
// becomes a private mount of its own first (mount_namespaces(7)).
func (n *Namespace) Pin(dir string) error {
	if err := unix.Mount(dir, dir, "", unix.MS_BIND, ""); err != nil {
		return fmt.Errorf("pin namespace at %s: %w", dir, err)
	}
	undo := func(err error) error {
		return errors.Join(fmt.Errorf("pin namespace at %s: %w", dir, err), Unpin(dir))
	}
	if err := unix.Mount("", dir, "", unix.MS_PRIVATE, ""); err != nil {
		return undo(err)
	}
	mnt := dir + "/mnt"
	f, err := os.OpenFile(mnt, os.O_CREATE|os.O_RDONLY|unix.O_NOFOLLOW, 0o400)
	if err != nil {
		return undo(err)
	}
	f.Close()
	if err := unix.Mount(fmt.Sprintf("/proc/self/fd/%d", n.f.Fd()), mnt, "", unix.MS_BIND, ""); err != nil {
		return undo(err)
	}
	return nil
}

// Unpin takes Pin back, however far it came. It is no error when nothing is
// pinned.
func Unpin(dir string) error {
	for _, p := range []string{dir + "/mnt", dir} {
		for {
			err := unix.Unmount(p, unix.UMOUNT_NOFOLLOW|unix.MNT_DETACH)
			if err == unix.EINVAL || err == unix.ENOENT {
				break
			}
			if err != nil {
				return fmt.Errorf("unpin %s: %w", p, err)
			}
		}
	}
	if err := os.Remove(dir + "/mnt"); err != nil && !errors.Is(err, os.ErrNotExist) {
		return err
	}
	return nil
}

// Do runs f on a thread inside the namespace. /proc/self still shows the
// process's own namespace there; code that reads it belongs in a child made by
// Start.
func (n *Namespace) Do(f func() error) error {
	return onThread(func() error {
		if err := n.join(); err != nil {
			return err
		}
		return f()
	})
}

func (n *Namespace) join() error {
	// setns(2): EINVAL for a thread that shares its root and cwd with others.
	if err := unix.Unshare(unix.CLONE_FS); err != nil {
		return err
	}
	if err := unix.Setns(int(n.f.Fd()), unix.CLONE_NEWNS); err != nil {
		return fmt.Errorf("enter the view's namespace: %w", err)
	}
	return nil
}

// Start starts cmd inside the namespace: a child is born in the namespaces of
// the thread that forks it. Its working directory is "/" unless cmd.Dir is set.
func (n *Namespace) Start(cmd *exec.Cmd) error {
	if cmd.Dir == "" {
		cmd.Dir = "/"
	}
	return n.Do(cmd.Start)
}

// Enter moves the calling thread into the namespace for good, to exec there.
// The caller has locked its goroutine to the thread.
func (n *Namespace) Enter() error { return n.join() }
