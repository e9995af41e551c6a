package tree

import (
	"context"
	"errors"
	"io"
	"os"
	"runtime"

	"golang.org/x/sys/unix"

	"overkeep/overlay/nar"
)

// Copy copies the file, symbolic link or directory name of src to newName of dst, which
// must not exist, in canonical form.
//
// On an error, and when ctx ends, what was copied so far is left at newName: Remove it.
// EEXIST (fs.ErrExist) for newName itself means that nothing was made.
func Copy(ctx context.Context, src *os.File, name string, dst *os.File, newName string, o Options) (Result, error) {
	defer runtime.KeepAlive(dst)
	t, err := newTarget(int(dst.Fd()), newName, o)
	if err != nil {
		return Result{}, err
	}
	return newCopier().run(ctx, src, name, t, newName, nil, o.Progress)
}

// Hash reads the tree name of dir as Copy does and writes nothing.
func Hash(ctx context.Context, dir *os.File, name string, o Options) (Result, error) {
	return newCopier().run(ctx, dir, name, nil, "", nil, o.Progress)
}

// Dump writes the tree name of dir to w as a NAR, in large pieces. An error of w comes
// back as it is.
func Dump(ctx context.Context, w io.Writer, dir *os.File, name string, o Options) (Result, error) {
	return newCopier().run(ctx, dir, name, nil, "", w, o.Progress)
}

// copier copies, hashes or dumps one tree at a time.
type copier struct {
	walker
	dst  *target // nil: nothing is written
	out  *stream
	res  Result
	link []byte
	name string // of the tree
	most int64  // bytes of its NAR; 0: any number
}

func newCopier() *copier {
	return &copier{walker: newWalker(), out: newStream(), link: make([]byte, nar.MaxTarget+1)}
}

func (c *copier) run(ctx context.Context, src *os.File, name string, dst *target, newName string, w io.Writer, progress func(int64)) (Result, error) {
	defer runtime.KeepAlive(src)
	if err := single(name); err != nil {
		return Result{}, err
	}
	if dst != nil {
		if err := single(newName); err != nil {
			return Result{}, err
		}
		defer dst.close()
	}
	c.begin(ctx, int(src.Fd()))
	defer c.src.close()
	c.dst, c.res, c.name = dst, Result{}, name
	c.out.begin(w, progress)
	defer c.out.stop()
	if err := c.walk(name, newName); err != nil {
		return Result{}, err
	}
	var err error
	if c.res.NarHash, c.res.NarSize, err = c.out.end(); err != nil {
		return Result{}, err
	}
	if dst != nil {
		c.res.Blocks = dst.blocks
	}
	return c.res, nil
}

func (c *copier) walk(name, newName string) error {
	c.out.cur = nar.AppendMagic(c.out.cur)
	if err := c.ctx.Err(); err != nil {
		return err
	}
	if err := c.node(name, newName, unix.DT_UNKNOWN); err != nil {
		return err
	}
	for len(c.frames) > 0 {
		if err := c.out.room(nar.MaxPiece); err != nil {
			return err
		}
		entry, typ, left, err := c.next()
		if err != nil {
			return err
		}
		if left {
			if c.dst != nil {
				if err := c.dst.up(); err != nil {
					return err
				}
			}
			c.out.cur = nar.AppendEnd(c.out.cur)
			if len(c.frames) > 0 {
				c.out.cur = nar.AppendEnd(c.out.cur)
			}
			continue
		}
		c.out.cur = nar.AppendEntry(c.out.cur, entry)
		depth := len(c.frames)
		if err := c.node(entry, entry, typ); err != nil {
			return err
		}
		if len(c.frames) == depth {
			c.out.cur = nar.AppendEnd(c.out.cur)
		}
	}
	return nil
}

// node copies name, a directory only as far as that it is entered. typ is what the
// directory says of it (DT_*).
func (c *copier) node(name, newName string, typ uint8) error {
	mode, err := c.mode(name, typ)
	if err != nil {
		return err
	}
	switch mode {
	case unix.S_IFREG:
		return c.regular(name, newName)
	case unix.S_IFLNK:
		return c.symlink(name, newName)
	case unix.S_IFDIR:
		if err := c.enter(name, true); err != nil {
			return err
		}
		if c.dst != nil {
			if err := c.dst.down(newName); err != nil {
				return err
			}
		}
		c.out.cur = nar.AppendDirectory(c.out.cur)
		c.res.Dirs++
		return nil
	}
	return &UnsupportedError{name, kind(mode)}
}

func (c *copier) symlink(name, newName string) error {
	n, err := readlink(c.src.fd(), name, c.link)
	if err != nil {
		return c.lost("readlink", name, err)
	}
	if n == 0 || n > nar.MaxTarget {
		return &Error{"readlink", name, false, unix.ENAMETOOLONG}
	}
	to := string(c.link[:n])
	if c.dst != nil {
		if err := c.dst.symlink(newName, to); err != nil {
			return err
		}
	}
	// Its place was made with that of its entry; a target is as long as a whole piece.
	if err := c.out.room(nar.MaxPiece); err != nil {
		return err
	}
	c.out.cur = nar.AppendSymlink(c.out.cur, to)
	c.res.Links++
	return nil
}

func (c *copier) regular(name, newName string) error {
	var st unix.Stat_t
	fd, err := c.open(name, unix.O_RDONLY, &st)
	if err != nil {
		return err
	}
	defer func() { _ = shut(fd) }()
	if st.Mode&unix.S_IFMT != unix.S_IFREG {
		return &Error{"read", name, false, ErrChanged}
	}
	// A damaged inode may claim any size: hashing that would take for ever.
	if c.most > 0 && st.Size > c.most-c.out.n-int64(len(c.out.cur)) {
		return &SizeError{c.name, c.most}
	}
	exec := st.Mode&unix.S_IXUSR != 0
	c.out.cur = nar.AppendRegular(c.out.cur, exec, st.Size)
	if c.dst == nil {
		err = c.contents(fd, name, &st, nil)
	} else {
		var f file
		if f, err = c.dst.create(newName, exec, st.Size); err != nil {
			return err
		}
		if err = c.contents(fd, name, &st, &f); err != nil {
			f.abandon()
			return err
		}
		err = f.close()
	}
	if err != nil {
		return err
	}
	if err := c.out.room(nar.MaxPiece); err != nil {
		return err
	}
	c.out.cur = nar.AppendEnd(nar.AppendPadding(c.out.cur, st.Size))
	c.res.Files++
	c.res.Bytes += st.Size
	return nil
}

// Where the holes of smaller files are is not asked: reading zeros finds them as well.
const minSparse = 64 << 10

// contents passes a file's bytes on, from the place in the stream that they were read to.
func (c *copier) contents(fd int, name string, st *unix.Stat_t, f *file) error {
	const block = 4096 // reads end where blocks do, so that none is written twice
	size := st.Size
	sparse, data := size >= minSparse && st.Blocks*512 < size, int64(0) // data up to there
	for off := int64(0); off < size; {
		if err := c.ctx.Err(); err != nil {
			return err
		}
		if !sparse {
			data = size
		}
		if off == data {
			from, to, err := extent(fd, off, size)
			if err != nil { // not every file system knows
				sparse = false
				continue
			}
			if err := c.hole(from - off); err != nil {
				return err
			}
			off, data = from, to
			continue
		}
		left := data - off
		if err := c.out.room(int(min(left+1, pieceSize/2))); err != nil {
			return err
		}
		at := len(c.out.cur)
		free := int64(cap(c.out.cur) - at)
		want := left
		switch {
		case left > free:
			want = free - (off+free)%block
		case data == size && left < free:
			want++ // one byte too many shows that the file has grown
		}
		var n int
		err := again(func() (err error) { n, err = unix.Pread(fd, c.out.cur[at:at+int(want)], off); return err })
		if err != nil {
			return &Error{"read", name, false, err}
		}
		if n == 0 || off+int64(n) > size {
			return &Error{"read", name, false, ErrChanged}
		}
		c.out.cur = c.out.cur[:at+n]
		if f != nil {
			if err := f.write(c.out.cur[at:], off); err != nil {
				return err
			}
		}
		off += int64(n)
	}
	return nil
}

// extent is the next range of a file that holds data, at or after off; size and size if none does.
func extent(fd int, off, size int64) (from, to int64, err error) {
	seek := func(off int64, whence int) (at int64, err error) {
		err = again(func() (err error) { at, err = unix.Seek(fd, off, whence); return err })
		return min(at, size), err
	}
	if from, err = seek(off, unix.SEEK_DATA); errors.Is(err, unix.ENXIO) {
		return size, size, nil
	} else if err != nil {
		return 0, 0, err
	}
	if from == size {
		return size, size, nil
	}
	to, err = seek(from, unix.SEEK_HOLE)
	if errors.Is(err, unix.ENXIO) || err == nil && to <= from { // it shrinks as we look: reading will show it
		to, err = size, nil
	}
	return from, to, err
}

// hole passes n zeros on that are neither read nor written.
func (c *copier) hole(n int64) error {
	for n > 0 {
		if err := c.ctx.Err(); err != nil {
			return err
		}
		if err := c.out.room(int(min(n, pieceSize/2))); err != nil {
			return err
		}
		at := len(c.out.cur)
		now := min(n, int64(cap(c.out.cur)-at))
		c.out.cur = c.out.cur[:at+int(now)]
		clear(c.out.cur[at:])
		n -= now
	}
	return nil
}
