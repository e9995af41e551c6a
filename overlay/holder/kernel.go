package holder

import (
	"bufio"
	"encoding/hex"
	"errors"
	"fmt"
	"io"
	"os"
	"runtime"
	"strconv"
	"unsafe"

	"golang.org/x/sys/unix"
)

// This file holds the single calls to the kernel.

// lookAt returns the object that name, seen from dirfd, leads to. Links of /proc
// lead to the inode itself, also when its name or mount is gone.
//
// Nothing is asked for and nothing synchronised, so that a dead network or FUSE
// server cannot block or refuse the call; local filesystems answer in full all
// the same (vfs_getattr), and the mount id is always filled in.
func lookAt(dirfd int, name string) (object, error) { return statx(dirfd, name, 0) }

// lookAtFile is lookAt for our own open file.
func lookAtFile(f *os.File) (object, error) {
	o, err := statx(int(f.Fd()), "", unix.AT_EMPTY_PATH)
	runtime.KeepAlive(f)
	return o, err
}

func statx(dirfd int, name string, flags int) (object, error) {
	var st unix.Statx_t
	err := unix.Statx(dirfd, name, flags|unix.AT_NO_AUTOMOUNT|unix.AT_STATX_DONT_SYNC, 0, &st)
	if err != nil {
		return object{}, err
	}
	o := object{
		dev: unix.Mkdev(st.Dev_major, st.Dev_minor), rdev: unix.Mkdev(st.Rdev_major, st.Rdev_minor),
		ino: st.Ino, mode: st.Mode, encrypted: st.Attributes&unix.STATX_ATTR_ENCRYPTED != 0,
	}
	if st.Mask&unix.STATX_MNT_ID != 0 {
		o.mnt = st.Mnt_id
	}
	return o, nil
}

// readLink returns the target of a link below /proc as the kernel prints it, cut
// at PATH_MAX; "?" when it cannot be printed, as for a name that is too long.
func readLink(dirfd int, name string) string {
	var buf [unix.PathMax]byte
	n, err := unix.Readlinkat(dirfd, name, buf[:])
	if err != nil || n <= 0 {
		return "?"
	}
	return string(buf[:n])
}

// readAt reads a small file below /proc, at most limit bytes of it.
func readAt(dirfd int, name string, limit int64) ([]byte, error) {
	f, err := openAt(dirfd, name, unix.O_RDONLY)
	if err != nil {
		return nil, err
	}
	defer f.Close()
	return io.ReadAll(io.LimitReader(f, limit))
}

// openProc opens the caller's /proc, to be used from inside other namespaces.
func openProc() (*os.File, error) {
	f, err := openAt(unix.AT_FDCWD, "/proc", unix.O_PATH|unix.O_DIRECTORY)
	if err != nil {
		return nil, &os.PathError{Op: "open", Path: "/proc", Err: err}
	}
	return f, nil
}

func openAt(dirfd int, name string, flags int) (*os.File, error) {
	fd, err := openFD(dirfd, name, flags)
	if err != nil {
		return nil, err
	}
	return os.NewFile(uintptr(fd), name), nil
}

// openFD is openAt without an os.File, which costs a further system call: for
// what is done several times for every process of the machine.
func openFD(dirfd int, name string, flags int) (int, error) {
	for {
		fd, err := unix.Openat(dirfd, name, flags|unix.O_CLOEXEC, 0)
		if err != unix.EINTR {
			return fd, err
		}
	}
}

// fdReader reads from a bare descriptor.
type fdReader int

func (r fdReader) Read(b []byte) (int, error) {
	for {
		n, err := unix.Read(int(r), b)
		switch {
		case err == unix.EINTR:
			continue
		case err != nil:
			return 0, err
		case n == 0:
			return 0, io.EOF
		}
		return n, nil
	}
}

// policyKey returns the fscrypt v2 master key identifier, in hexadecimal, of the
// regular file or directory behind a link of /proc; "" when it has none. The
// file is opened anew for the moment: nonblocking, so that a lease on it makes
// the call fail instead of wait (fcntl(2), F_SETLEASE).
func policyKey(dirfd int, name string) (key string, version int, err error) {
	f, err := openAt(dirfd, name, unix.O_RDONLY|unix.O_NONBLOCK|unix.O_NOCTTY)
	if err != nil {
		return "", 0, err
	}
	defer f.Close()
	return policyOf(f)
}

func policyOf(f *os.File) (key string, version int, err error) {
	arg := unix.FscryptGetPolicyExArg{Size: uint64(len(unix.FscryptGetPolicyExArg{}.Policy))}
	_, _, e := unix.Syscall(unix.SYS_IOCTL, f.Fd(), unix.FS_IOC_GET_ENCRYPTION_POLICY_EX, uintptr(unsafe.Pointer(&arg)))
	runtime.KeepAlive(f)
	switch e {
	case 0:
	case unix.ENODATA, unix.ENOTTY, unix.EOPNOTSUPP:
		return "", 0, nil
	default:
		return "", 0, e
	}
	// struct fscrypt_policy_v2: version, two modes, flags, four bytes, identifier.
	if v := int(arg.Policy[0]); v != unix.FSCRYPT_POLICY_V2 {
		return "", v, nil
	}
	return hex.EncodeToString(arg.Policy[8:24]), unix.FSCRYPT_POLICY_V2, nil
}

// overlayID returns the statfs id behind a link of /proc when its filesystem is
// an overlay.
func overlayID(dirfd int, name string) (FSID, bool, error) {
	f, err := openAt(dirfd, name, unix.O_PATH)
	if err != nil {
		return FSID{}, false, err
	}
	defer f.Close()
	return overlayIDOf(f)
}

func overlayIDOf(f *os.File) (FSID, bool, error) {
	var st unix.Statfs_t
	err := unix.Fstatfs(int(f.Fd()), &st)
	runtime.KeepAlive(f)
	return FSID(st.Fsid.Val), err == nil && st.Type == unix.OVERLAYFS_SUPER_MAGIC, err
}

// procmapQuery is struct procmap_query of linux/fs.h.
type procmapQuery struct {
	size, flags, addr          uint64
	start, end                 uint64
	vmaFlags, pageSize, offset uint64
	inode                      uint64
	major, minor               uint32
	nameSize, buildIDSize      uint32
	nameAddr, buildIDAddr      uint64
}

// mappedFiles calls f for every mapping of a file, asking an open /proc/PID/maps
// for one after the other (PROCMAP_QUERY, Linux 6.11): several times as fast as
// its text. ENOTTY where the kernel cannot.
func mappedFiles(maps int, f func(mapping)) error {
	const (
		query  = 0xc0686611 // _IOWR('f', 17, struct procmap_query)
		orNext = 0x10       // PROCMAP_QUERY_COVERING_OR_NEXT_VMA
		backed = 0x20       // PROCMAP_QUERY_FILE_BACKED_VMA
	)
	var q procmapQuery
	for next := uint64(0); ; next = q.end {
		q = procmapQuery{size: uint64(unsafe.Sizeof(q)), flags: orNext | backed, addr: next}
		_, _, e := unix.Syscall(unix.SYS_IOCTL, uintptr(maps), query, uintptr(unsafe.Pointer(&q)))
		switch {
		case e == unix.ENOENT || e == unix.ESRCH: // no more, or the process has ended
			return nil
		case e != 0:
			return e
		case q.end <= next:
			return errors.New("mappings are out of order")
		}
		f(mapping{start: q.start, end: q.end, dev: unix.Mkdev(q.major, q.minor), ino: q.inode})
	}
}

// sameTable tells whether two tasks share what kind names (kcmp(2)). When the
// kernel does not say, they are taken to differ.
func sameTable(a, b, kind int) bool {
	r, _, e := unix.Syscall6(unix.SYS_KCMP, uintptr(a), uintptr(b), uintptr(kind), 0, 0, 0)
	return e == 0 && r == 0
}

// Kinds of kcmp(2), linux/kcmp.h.
const (
	kcmpFiles = 2
	kcmpFS    = 3
)

// onThread runs f on an operating-system thread of its own, which may change its
// namespaces, root and working directory: the thread ends after f. It is taken
// back to its first mount namespace before, for it ends a moment after onThread
// returns and must not be found in another until then.
//
// The process's first thread never ends (runtime.mexit parks it), and what it
// becomes is what /proc/PID shows of the whole process: it is stepped aside from.
func onThread(f func() error) error {
	done := make(chan error, 1)
	go func() {
		runtime.LockOSThread()
		if unix.Gettid() == unix.Getpid() {
			// While this goroutine occupies the first thread, no other can get it.
			done <- onThread(f)
			runtime.UnlockOSThread()
			return
		}
		// Not unlocked: the runtime ends a thread whose goroutine ends locked.
		if err := unix.Unshare(unix.CLONE_FS); err != nil {
			done <- fmt.Errorf("unshare the thread's root: %w", err)
			return
		}
		home, err := openAt(unix.AT_FDCWD, "/proc/thread-self/ns/mnt", unix.O_RDONLY)
		if err != nil {
			done <- err
			return
		}
		defer home.Close()
		err = f()
		_ = enter(home)
		done <- err
	}()
	return <-done
}

// enter moves the calling thread, one of onThread, into mount namespace ns. Its
// root and working directory become those of the namespace.
func enter(ns *os.File) error {
	err := unix.Setns(int(ns.Fd()), unix.CLONE_NEWNS)
	runtime.KeepAlive(ns)
	if err != nil {
		return fmt.Errorf("enter mount namespace: %w", err)
	}
	return nil
}

// maxLine bounds a line of mountinfo or maps; of a longer one the beginning is
// parsed. Options of an overlay take 4 KiB, paths usually 4 KiB each.
const maxLine = 64 << 10

// readMounts parses the mountinfo of the calling thread's namespace and calls f
// for every mount. proc is the caller's own /proc, for the namespace may have
// none.
func readMounts(proc int, lines *bufio.Reader, f func(mount)) error {
	in, err := openAt(proc, "thread-self/mountinfo", unix.O_RDONLY)
	if err != nil {
		return fmt.Errorf("read mountinfo: %w", err)
	}
	defer in.Close()
	return eachLine(in, lines, func(line []byte, cut bool) error {
		m, err := parseMount(line, cut)
		if err == nil {
			f(m)
		}
		return err
	})
}

// eachLine calls f for every line of in, without its newline; cut says that the
// rest of a line longer than the buffer of r was dropped.
func eachLine(in io.Reader, r *bufio.Reader, f func(line []byte, cut bool) error) error {
	r.Reset(in)
	for {
		line, err := r.ReadSlice('\n')
		cut := errors.Is(err, bufio.ErrBufferFull)
		if len(line) > 0 {
			if line[len(line)-1] == '\n' {
				line = line[:len(line)-1]
			}
			if ferr := f(line, cut); ferr != nil {
				return ferr
			}
		}
		for errors.Is(err, bufio.ErrBufferFull) {
			_, err = r.ReadSlice('\n')
		}
		if err == io.EOF {
			return nil
		}
		if err != nil {
			return err
		}
	}
}

// names calls f for every entry of an open directory. buf is scratch space.
func names(dirfd int, buf []byte, f func(name string)) error {
	var list []string
	for {
		n, err := unix.ReadDirent(dirfd, buf)
		if err == unix.EINTR {
			continue
		}
		if err != nil {
			return err
		}
		if n <= 0 {
			return nil
		}
		_, _, list = unix.ParseDirent(buf[:n], -1, list[:0])
		for _, s := range list {
			f(s)
		}
	}
}

// processes lists the process ids that proc shows.
func processes(proc int) ([]int, error) {
	dir, err := openAt(proc, ".", unix.O_RDONLY|unix.O_DIRECTORY)
	if err != nil {
		return nil, err
	}
	defer dir.Close()
	var pids []int
	err = names(int(dir.Fd()), make([]byte, 32<<10), func(s string) {
		if n, err := strconv.Atoi(s); err == nil && n > 0 {
			pids = append(pids, n)
		}
	})
	return pids, err
}

// gone tells whether err means that a process, or a descriptor of it, ended
// while it was looked at.
func gone(err error) bool { return errors.Is(err, unix.ENOENT) || errors.Is(err, unix.ESRCH) }

// openHandle opens the inode of a watch by its handle. mount is any open file on
// its filesystem.
func openHandle(mount *os.File, w watch) (*os.File, error) {
	fd, err := unix.OpenByHandleAt(int(mount.Fd()), unix.NewFileHandle(w.kind, w.handle), unix.O_RDONLY|unix.O_NONBLOCK|unix.O_CLOEXEC|unix.O_NOCTTY)
	if err != nil {
		return nil, err
	}
	return os.NewFile(uintptr(fd), "handle"), nil
}
