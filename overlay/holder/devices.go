package holder

import (
	"errors"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"unsafe"

	"golang.org/x/sys/unix"
)

// loops lists the bound loop devices. The backing file is asked from the device,
// for its path is only text; where the device cannot be opened the path has to do.
func loops() []loopDevice {
	dirs, _ := filepath.Glob("/sys/block/loop*/loop") // the pattern is well formed
	var out []loopDevice
	for _, dir := range dirs {
		block := filepath.Dir(dir)
		num, err := os.ReadFile(block + "/dev")
		if err != nil {
			continue
		}
		major, minor, _ := strings.Cut(strings.TrimSpace(string(num)), ":")
		ma, ok1 := parseUint([]byte(major), 10)
		mi, ok2 := parseUint([]byte(minor), 10)
		if !ok1 || !ok2 {
			continue
		}
		l := loopDevice{name: filepath.Base(block), dev: unix.Mkdev(uint32(ma), uint32(mi))}
		if !l.ask(dir+"/backing_file", uint32(mi)) {
			continue // unbound meanwhile
		}
		stack, _ := os.ReadDir(block + "/holders")
		for _, s := range stack {
			l.stack = append(l.stack, s.Name())
		}
		out = append(out, l)
	}
	return out
}

// ask fills in file and path, both of one binding: between two questions a device
// may be unbound, or bound anew by a stranger. It returns false for a device that
// is not bound. One that changes hands all the time stays unknown.
func (l *loopDevice) ask(backing string, number uint32) bool {
	var f *os.File
	var err error
	if f, err = openAt(unix.AT_FDCWD, "/dev/"+l.name, unix.O_RDONLY|unix.O_NONBLOCK); err == nil {
		defer f.Close()
	}
	status := func() (FileID, error) {
		if f == nil {
			return FileID{}, err
		}
		st, err := unix.IoctlLoopGetStatus64(int(f.Fd()))
		if err != nil || st.Number != number {
			return FileID{}, err
		}
		// lo_device is in the encoding of stat(2) (huge_encode_dev in loop.c).
		return FileID{st.Device, st.Inode}, nil
	}
	for range 16 {
		before, err := status()
		if unbound(err) {
			return false
		}
		path, err := os.ReadFile(backing)
		if err != nil {
			return false
		}
		after, err := status()
		if unbound(err) {
			return false
		}
		if before == after {
			l.file, l.path = after, strings.TrimSuffix(string(path), "\n")
			break
		}
	}
	return true
}

// unbound tells whether a loop device answered that it has no file (loop(4)).
func unbound(err error) bool { return errors.Is(err, unix.ENXIO) }

// deviceHolders names the kernel's own holders: loop devices, what is stacked on
// them, and swap files.
func (m *matcher) deviceHolders(spaces map[uint64]*space, swaps []string) []Holder {
	var out []Holder
	for _, l := range m.loops {
		// The device that carries the keep itself is no holder while the keep is
		// mounted: it goes with the last unmount, unless it was told not to.
		if !slices.Contains(m.target.Devices, l.dev) || !mounted(spaces, l.dev) {
			out = append(out, Holder{Command: "loop device /dev/" + printable(l.name, 32),
				Holds: []Hold{{LoopDevice, printable(l.path, maxWhat)}}})
		}
		for _, s := range l.stack {
			out = append(out, Holder{Command: "block device /dev/" + printable(s, 64),
				Holds: []Hold{{BlockDevice, "/dev/" + printable(l.name, 32)}}})
		}
	}
	for _, s := range swaps {
		// The kernel allows no swap file on an overlay.
		if m.pathOurs(s, false) {
			out = append(out, Holder{Command: "swap file", Holds: []Hold{{SwapFile, printable(s, maxWhat)}}})
		}
	}
	return out
}

func mounted(spaces map[uint64]*space, dev uint64) bool {
	for _, sp := range spaces {
		if slices.ContainsFunc(sp.mounts, func(m mount) bool { return m.dev == dev }) {
			return true
		}
	}
	return false
}

// siocUnixFile opens the name a unix socket is bound to, as O_PATH (Linux 4.12,
// linux/un.h; needs CAP_NET_ADMIN).
const siocUnixFile = 0x89e0

// boundFile opens, as O_PATH, what descriptor fd of task tid, a unix socket, is
// bound to.
func boundFile(tid, fd int) (*os.File, error) {
	p, err := unix.PidfdOpen(tid, unix.O_EXCL) // PIDFD_THREAD, Linux 6.9
	if err == unix.EINVAL {
		p, err = unix.PidfdOpen(tid, 0)
	}
	if err != nil {
		return nil, err
	}
	defer unix.Close(p)
	s, err := unix.PidfdGetfd(p, fd, 0)
	if err != nil {
		return nil, err
	}
	defer unix.Close(s)
	b, err := unix.IoctlRetInt(s, siocUnixFile)
	if err != nil {
		return nil, err
	}
	return os.NewFile(uintptr(b), "socket"), nil
}

// boundSockets adds to all the sockets of the calling thread's network
// namespace that are bound to names in filesystems want accepts.
func boundSockets(want func(FileID) bool, all map[uint64]bound) error {
	fd, err := unix.Socket(unix.AF_NETLINK, unix.SOCK_RAW|unix.SOCK_CLOEXEC, unix.NETLINK_SOCK_DIAG)
	if err != nil {
		return err
	}
	defer unix.Close(fd)
	// struct unix_diag_req of linux/unix_diag.h after the netlink header.
	type request struct {
		unix.NlMsghdr
		family, protocol uint8
		_                uint16
		states           uint32
		ino              uint32
		show             uint32
		cookie           [2]uint32
	}
	const showName, showVFS = 1, 2
	req := request{family: unix.AF_UNIX, states: ^uint32(0), show: showName | showVFS}
	req.Len = uint32(unsafe.Sizeof(req))
	req.Type = unix.SOCK_DIAG_BY_FAMILY
	req.Flags = unix.NLM_F_REQUEST | unix.NLM_F_DUMP
	msg := unsafe.Slice((*byte)(unsafe.Pointer(&req)), unsafe.Sizeof(req))
	if err := unix.Sendto(fd, msg, 0, &unix.SockaddrNetlink{Family: unix.AF_NETLINK}); err != nil {
		return err
	}
	buf := make([]byte, 64<<10)
	for {
		n, _, err := unix.Recvfrom(fd, buf, 0)
		if err == unix.EINTR {
			continue
		}
		if err != nil {
			return err
		}
		if n == 0 {
			return errDiag
		}
		done, err := parseUnixDiag(buf[:n], func(b bound) {
			if want(b.file) {
				all[b.socket] = b
			}
		})
		if done || err != nil {
			return err
		}
	}
}
