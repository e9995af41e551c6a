package tree

import (
	"bytes"
	"encoding/binary"
	"errors"
	"slices"
	"strings"

	"golang.org/x/sys/unix"
)

// again repeats what a signal interrupted. Go's runtime sends itself signals (preemption),
// and handlers are installed with SA_RESTART, which not every call honours (signal(7)).
func again(f func() error) error {
	for {
		if err := f(); !errors.Is(err, unix.EINTR) {
			return err
		}
	}
}

// open opens name of the directory dir, and nothing beyond it: no link, no mount point.
// O_NONBLOCK: a fifo that has taken a file's place must not stop us.
func open(dir int, name string, flags int) (fd int, err error) {
	how := unix.OpenHow{
		Flags:   uint64(flags | unix.O_CLOEXEC | unix.O_NOFOLLOW | unix.O_NONBLOCK),
		Resolve: unix.RESOLVE_NO_XDEV | unix.RESOLVE_NO_SYMLINKS,
	}
	err = again(func() (err error) {
		fd, err = unix.Openat2(dir, name, &how)
		return err
	})
	if errors.Is(err, unix.EXDEV) {
		err = ErrMount
	}
	return fd, err
}

const openDir = unix.O_RDONLY | unix.O_DIRECTORY

// shut closes a descriptor. On Linux it is gone also after EINTR (close(2)).
func shut(fd int) error {
	if err := unix.Close(fd); !errors.Is(err, unix.EINTR) {
		return err
	}
	return nil
}

func fstat(fd int, st *unix.Stat_t) error {
	return again(func() error { return unix.Fstat(fd, st) })
}

func lstatat(dir int, name string, st *unix.Stat_t) error {
	return again(func() error { return unix.Fstatat(dir, name, st, unix.AT_SYMLINK_NOFOLLOW) })
}

func readlink(dir int, name string, buf []byte) (n int, err error) {
	err = again(func() (err error) { n, err = unix.Readlinkat(dir, name, buf); return err })
	return n, err
}

// single reports whether a caller's name is one element of a path.
func single(name string) error {
	if name == "" || name == "." || name == ".." || len(name) > 255 || strings.ContainsAny(name, "/\x00") {
		return &Error{Op: "use", Name: name, Err: ErrName}
	}
	return nil
}

// kind is the name of a file type (st_mode & S_IFMT) that a store path cannot hold.
func kind(mode uint32) string {
	switch mode & unix.S_IFMT {
	case unix.S_IFBLK, unix.S_IFCHR:
		return "device"
	case unix.S_IFIFO:
		return "fifo"
	case unix.S_IFSOCK:
		return "socket"
	}
	return "file of an unknown kind"
}

// names are those of a directory, with their types, in little memory: a hundred thousand
// of them are a few MiB.
type names struct {
	bytes []byte
	spans []span
}

type span struct {
	from   uint32
	length uint8
	typ    uint8 // DT_*
}

func (n *names) slice(i int) []byte {
	s := n.spans[i]
	return n.bytes[s.from : s.from+uint32(s.length)]
}

// sort brings them into the order of a NAR, that of their bytes.
func (n *names) sort() {
	slices.SortFunc(n.spans, func(a, b span) int {
		return bytes.Compare(n.bytes[a.from:a.from+uint32(a.length)], n.bytes[b.from:b.from+uint32(b.length)])
	})
}

var errDirent = errors.New("directory entry that makes no sense")

// readNames reads the directory fd from where it stands to its end, in its order. buf is
// for the kernel's answers.
func readNames(fd int, buf []byte) (n names, err error) {
	for {
		var got int
		if err := again(func() (err error) { got, err = unix.Getdents(fd, buf); return err }); err != nil {
			return n, err
		}
		if got == 0 {
			return n, nil
		}
		// struct linux_dirent64 (getdents(2)): inode, offset, length of the record, type, name, NUL.
		for b := buf[:got]; len(b) > 0; {
			const head = 19
			if len(b) < head {
				return n, errDirent
			}
			size := int(binary.NativeEndian.Uint16(b[16:]))
			if size <= head || size > len(b) {
				return n, errDirent
			}
			typ, name := b[18], b[head:size]
			b = b[size:]
			for i, c := range name {
				if c == 0 {
					name = name[:i]
					break
				}
			}
			if string(name) == "." || string(name) == ".." {
				continue
			}
			// Offsets of 32 bits: 4 GiB are more than ten million of the longest names.
			if len(name) == 0 || len(name) > 255 || len(n.bytes) > 1<<32-256 {
				return n, errDirent
			}
			n.spans = append(n.spans, span{uint32(len(n.bytes)), uint8(len(name)), typ})
			n.bytes = append(n.bytes, name...)
		}
	}
}
