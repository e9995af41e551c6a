package boundary

import (
	"bytes"
	"encoding/binary"
	"fmt"
	"os"
	"path"
	"strconv"
	"strings"
	"unsafe"

	"golang.org/x/sys/unix"
)

type watcher struct {
	Config
	listener, cut int
	report        Report
}

var byNumber = func() map[int32]*call {
	m := map[int32]*call{}
	for i := range calls {
		m[int32(calls[i].nr)] = &calls[i]
	}
	return m
}()

// watch answers every reported call until no watched process is left.
func (w *watcher) watch() error {
	// The caller and we take turns: to be woken on the same CPU is faster.
	_, _, _ = unix.Syscall(unix.SYS_IOCTL, uintptr(w.listener), notifSetFlags, syncWakeUp)
	for {
		fds := []unix.PollFd{{Fd: int32(w.listener), Events: unix.POLLIN}}
		if _, err := unix.Poll(fds, -1); err == unix.EINTR {
			continue
		} else if err != nil {
			return fmt.Errorf("poll: %w", err)
		}
		if fds[0].Revents&unix.POLLIN == 0 { // POLLHUP: the filter's last user is gone
			return nil
		}
		var n notification
		switch errno := ioctl(w.listener, notifRecv, unsafe.Pointer(&n)); errno {
		case 0:
		case unix.EINTR, unix.ENOENT: // a caller that was killed or interrupted meanwhile
			continue
		default:
			return fmt.Errorf("receive a notification: %w", errno)
		}
		if done, err := w.answer(&n); done || err != nil {
			return err
		}
	}
}

// answer decides about one call. done: everything has been killed.
func (w *watcher) answer(n *notification) (done bool, err error) {
	name, object, counts := describe(n)
	// What was read may be of another process if the caller is gone meanwhile.
	if ioctl(w.listener, notifIDValid, unsafe.Pointer(&n.id)) != 0 {
		return false, nil
	}
	resp := response{id: n.id, flags: flagContinue}
	if counts {
		w.report.Count++
		if w.Trace != nil {
			fmt.Fprintf(w.Trace, "%d %s %s\n", w.report.Count, name, object)
		}
		if w.report.Count == w.At {
			w.report.At, w.report.Call, w.report.Object = w.At, name, object
			if w.Errno == 0 {
				err := w.stop()
				killAll()
				return true, err
			}
			resp.flags, resp.error = 0, -int32(w.Errno)
		}
	}
	if errno := ioctl(w.listener, notifSend, unsafe.Pointer(&resp)); errno != 0 && errno != unix.ENOENT {
		return false, fmt.Errorf("answer a notification: %w", errno)
	}
	return false, nil
}

// stop stops the file system, if one is to be: EXT4_IOC_SHUTDOWN with the flag
// that drops the unwritten part of the journal (fs/ext4/ext4.h), as a power cut
// would.
func (w *watcher) stop() error {
	if w.cut < 0 {
		return nil
	}
	const shutdown, noLogFlush = 0x8004587d, 2
	if err := unix.IoctlSetPointerInt(w.cut, shutdown, noLogFlush); err != nil {
		return fmt.Errorf("shut down the file system of %q: %w", w.Cut, err)
	}
	return nil
}

// describe says what a call is about, and whether it changes what lasts.
func describe(n *notification) (name, object string, counts bool) {
	c := byNumber[n.data.nr]
	if c == nil {
		return fmt.Sprint("call ", n.data.nr), "", true
	}
	args, name := n.data.args, c.name
	if c.request {
		name = requests[uint32(args[1])]
	}
	if n.data.nr == unix.SYS_OPENAT2 { // struct open_how begins with the flags
		var how [8]byte
		if m, err := read(n.pid, args[2], how[:]); err == nil && m == len(how) &&
			binary.LittleEndian.Uint64(how[:])&changing == 0 {
			return name, "", false
		}
	}
	var names []string
	for i, o := range c.objects {
		p := n.object(o)
		if i == 0 && stateless(p) {
			return name, p, false
		}
		names = append(names, p)
	}
	return name, strings.Join(names, " -> "), true
}

// object is the path of one.
func (n *notification) object(o object) string {
	var dir string
	if o.fd != none {
		dir = n.descriptor(int32(n.data.args[o.fd]))
	} else if o.path != none {
		dir = n.descriptor(unix.AT_FDCWD)
	}
	if o.path == none {
		return dir
	}
	p := n.text(n.data.args[o.path])
	if p == "" { // AT_EMPTY_PATH, or a null path to utimensat
		return dir
	}
	return n.through(join(dir, p))
}

// join is path.Join for a path that may be absolute; it resolves no "..", of which
// only the kernel knows where they lead.
func join(dir, p string) string {
	if strings.HasPrefix(p, "/") {
		return p
	}
	return strings.TrimSuffix(dir, "/") + "/" + p
}

// descriptor is where a descriptor leads, by its link in /proc; AT_FDCWD is the
// working directory. One that is not open has no name, and the call will fail.
func (n *notification) descriptor(fd int32) string {
	link := "cwd"
	if fd != unix.AT_FDCWD {
		link = "fd/" + strconv.Itoa(int(fd))
	}
	p, _ := os.Readlink("/proc/" + strconv.Itoa(int(n.pid)) + "/" + link)
	return p
}

// through replaces the links that lead out of /proc and /dev by where they lead.
func (n *notification) through(p string) string {
	clean := path.Clean(p)
	switch clean {
	case "/dev/stdin":
		return n.descriptor(0)
	case "/dev/stdout":
		return n.descriptor(1)
	case "/dev/stderr":
		return n.descriptor(2)
	}
	if rest, ok := strings.CutPrefix(clean, "/dev/fd/"); ok {
		clean = "/proc/self/fd/" + rest
	}
	f := strings.SplitN(clean, "/", 6) // "", proc, PID, fd, 3, rest
	if len(f) < 4 || f[1] != "proc" {
		return p
	}
	link := f[:4]
	switch {
	case f[3] == "fd" && len(f) > 4:
		link = f[:5]
	case f[3] == "cwd", f[3] == "root":
	default:
		return p
	}
	rest := strings.Join(f[len(link):], "/")
	if f[2] == "self" || f[2] == "thread-self" {
		f[2] = strconv.Itoa(int(n.pid))
	}
	to, err := os.Readlink(strings.Join(link, "/"))
	if err != nil || rest == "" {
		return to
	}
	return join(to, rest)
}

// text reads a path of the caller.
func (n *notification) text(addr uint64) string {
	if addr == 0 {
		return ""
	}
	var out []byte
	const page = 4096
	for len(out) < unix.PathMax {
		// Page by page: the next one may not be there.
		buf := make([]byte, page-addr%page)
		m, err := read(n.pid, addr, buf)
		if err != nil || m == 0 {
			break
		}
		if end := bytes.IndexByte(buf[:m], 0); end >= 0 {
			return string(append(out, buf[:end]...))
		}
		out, addr = append(out, buf[:m]...), addr+uint64(m)
	}
	return string(out)
}

func read(pid uint32, addr uint64, buf []byte) (int, error) {
	local := []unix.Iovec{{Base: &buf[0]}}
	local[0].SetLen(len(buf))
	return unix.ProcessVMReadv(int(pid), local, []unix.RemoteIovec{{Base: uintptr(addr), Len: len(buf)}}, 0)
}

// stateless reports whether nothing that is done to what this link of /proc or
// path leads to lasts: pipes, sockets, terminals, memory, the kernel's own files.
func stateless(p string) bool {
	switch {
	case strings.HasPrefix(p, "/dev/shm/"):
		return false
	case strings.HasPrefix(p, "/proc/"), strings.HasPrefix(p, "/sys/"), strings.HasPrefix(p, "/dev/pts/"),
		strings.HasPrefix(p, "/memfd:"):
		return true
	case strings.HasPrefix(p, "/"):
		switch p {
		case "/dev/null", "/dev/zero", "/dev/full", "/dev/tty", "/dev/console", "/dev/ptmx", "/dev/kmsg",
			"/dev/random", "/dev/urandom":
			return true
		}
		return false
	}
	// "pipe:[1]", "socket:[2]", "anon_inode:[eventfd]", or nothing: a descriptor
	// that is not open.
	return true
}
