package wipe

import (
	"crypto/sha256"
	"encoding/binary"
	"errors"
	"fmt"
	"hash"
	"io"
	"os"

	"golang.org/x/sys/unix"

	"overkeep/overlay/drv/storepath"
)

// dropLinks unlinks the names in .links of files that have no other name outside of
// the trees. That is made durable before anything is overwritten: if a power cut
// brought such a name back, for a file of zeros, Nix's optimiser would give that
// file to the next path with the content, for it compares no more than the size
// (optimise-store.cc, optimisePath_).
func (w *wiper) dropLinks(parent *os.File, names []string) error {
	if w.o.Links == nil || len(w.inodes) == 0 {
		return nil
	}
	var st unix.Stat_t
	if err := unix.Fstat(int(w.o.Links.Fd()), &st); err != nil {
		return quoted("stat", w.o.Links.Name(), err)
	}
	if st.Dev != w.dev {
		return nil
	}
	lost := map[uint64]bool{}
	if err := w.each(parent, names, func(dir int, name string, st *unix.Stat_t, _ bool) error {
		return w.dropLink(dir, name, st, lost)
	}); err != nil {
		return err
	}
	if len(lost) > 0 {
		if err := w.findLinks(lost); err != nil {
			return err
		}
	}
	return w.sync(parent, w.r.Links > 0)
}

// dropLink unlinks the name in .links if that is the only one outside, and else notes
// the file as one whose last name was not found.
func (w *wiper) dropLink(dir int, name string, st *unix.Stat_t, lost map[uint64]bool) error {
	i := w.inodes[st.Ino]
	if i == nil || i.asked || uint64(st.Nlink) != i.inside+1 {
		return nil
	}
	i.asked = true
	link, err := w.linkName(dir, name, st)
	if err != nil {
		return gone(err)
	}
	found, err := w.unlinkLink(link, st.Ino)
	if err == nil && !found {
		lost[st.Ino] = true
	}
	return err
}

// unlinkLink unlinks a name in .links if it is of that inode.
func (w *wiper) unlinkLink(link string, ino uint64) (found bool, err error) {
	at := int(w.o.Links.Fd())
	var st unix.Stat_t
	err = retry(func() error { return unix.Fstatat(at, link, &st, unix.AT_SYMLINK_NOFOLLOW) })
	if errors.Is(err, unix.ENOENT) || err == nil && (st.Ino != ino || st.Dev != w.dev || st.Mode&unix.S_IFMT == unix.S_IFDIR) {
		return false, nil
	}
	if err == nil {
		err = retry(func() error { return unix.Unlinkat(at, link, 0) })
	}
	if err != nil {
		return false, gone(quoted("unlink", link, err))
	}
	w.r.Links++
	w.r.LinkNames = append(w.r.LinkNames, link)
	return true, nil
}

// findLinks looks through .links for inodes whose content is not what their name says,
// such as those that an earlier call had begun to overwrite.
func (w *wiper) findLinks(inodes map[uint64]bool) error {
	fd, err := w.open(int(w.o.Links.Fd()), ".", unix.O_RDONLY|unix.O_DIRECTORY)
	if err != nil {
		return err
	}
	defer unix.Close(fd)
	buf := make([]byte, 64<<10)
	var names []string
	for {
		if err := w.ctx.Err(); err != nil {
			return err
		}
		var n int
		if err := retry(func() (err error) { n, err = unix.ReadDirent(fd, buf); return err }); err != nil {
			return quoted("read", w.o.Links.Name(), err)
		}
		if n <= 0 {
			break
		}
		// struct linux_dirent64, see getdents64(2): d_ino, d_off, d_reclen.
		for rest := buf[:n]; len(rest) >= 19; {
			size := int(binary.NativeEndian.Uint16(rest[16:]))
			if size < 19 || size > len(rest) {
				return quoted("read", w.o.Links.Name(), unix.EIO)
			}
			if inodes[binary.NativeEndian.Uint64(rest)] {
				_, _, names = unix.ParseDirent(rest[:size], 1, names)
			}
			rest = rest[size:]
		}
	}
	for _, name := range names {
		for ino := range inodes {
			if found, err := w.unlinkLink(name, ino); err != nil {
				return err
			} else if found {
				break
			}
		}
	}
	return nil
}

// linkName is the name that Nix's optimiser gives: the SHA-256 of the NAR of a file or
// symbolic link, in base 32.
func (w *wiper) linkName(dir int, name string, st *unix.Stat_t) (string, error) {
	h := sha256.New()
	narString(h, "nix-archive-1")
	narString(h, "(")
	narString(h, "type")
	if st.Mode&unix.S_IFMT == unix.S_IFLNK {
		target := make([]byte, unix.PathMax)
		n, err := unix.Readlinkat(dir, name, target)
		if err != nil {
			return "", quoted("readlink", name, err)
		}
		narString(h, "symlink")
		narString(h, "target")
		narString(h, string(target[:n]))
	} else {
		narString(h, "regular")
		if st.Mode&0o100 != 0 {
			narString(h, "executable")
			narString(h, "")
		}
		narString(h, "contents")
		if err := w.narFile(h, dir, name); err != nil {
			return "", err
		}
	}
	narString(h, ")")
	return storepath.Base32(h.Sum(nil)), nil
}

func (w *wiper) narFile(h hash.Hash, dir int, name string) error {
	fd, err := w.open(dir, name, unix.O_RDONLY)
	if err != nil {
		return err
	}
	f := os.NewFile(uintptr(fd), name)
	defer f.Close()
	st, err := f.Stat()
	if err != nil {
		return err
	}
	narLength(h, uint64(st.Size()))
	n, err := io.Copy(h, &untilDone{w, io.LimitReader(f, st.Size())})
	if err == nil && n != st.Size() {
		err = fmt.Errorf("%q: %w", name, io.ErrUnexpectedEOF)
	}
	narPad(h, uint64(n))
	return err
}

// untilDone is a reader that ends with the context.
type untilDone struct {
	w *wiper
	r io.Reader
}

func (u *untilDone) Read(b []byte) (int, error) {
	if err := u.w.ctx.Err(); err != nil {
		return 0, err
	}
	return u.r.Read(b)
}

// A string of a NAR is its length, its bytes, and zeros up to a multiple of eight.
func narString(h hash.Hash, s string) {
	narLength(h, uint64(len(s)))
	_, _ = io.WriteString(h, s) // a hash never fails
	narPad(h, uint64(len(s)))
}

func narLength(h hash.Hash, n uint64) {
	var b [8]byte
	binary.LittleEndian.PutUint64(b[:], n)
	_, _ = h.Write(b[:])
}

func narPad(h hash.Hash, n uint64) {
	var b [8]byte
	_, _ = h.Write(b[:(8-n%8)%8])
}
