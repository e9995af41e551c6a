package wipe

import (
	"context"
	"errors"
	"fmt"
	"io"
	"math"
	"os"
	"strconv"
	"strings"

	"golang.org/x/sys/unix"
)

// Options say how Tree works.
type Options struct {
	// Links is the store's directory .links, or nil if there is none: the names that
	// Nix's optimiser gives to the contents of files (libstore/optimise-store.cc).
	Links *os.File
}

// Tree overwrites and removes the entry name of parent, whatever it is. No such entry
// is no error. After an error, what was not done is still there under its name:
// repeat it.
//
// A file with other names outside of the tree is only unlinked and counted as shared:
// its content is somebody else's, too. The name in .links does not count as
// such; it goes first. What is immutable or append-only is made to change.
//
// The parent's own directory entry is cleared by the kernel since Linux 5.13 (commit
// 6c0912739699, "ext4: wipe ext4_dir_entry2 upon file deletion"). The bytes are on the
// device before a name goes; that the names have gone is on the device after the next
// sync, which Device does.
func Tree(ctx context.Context, parent *os.File, name string, o Options) (Report, error) {
	return Trees(ctx, parent, []string{name}, o)
}

// Trees is Tree for many entries of one directory with one sync for all. A file with
// names in several of them is not shared.
func Trees(ctx context.Context, parent *os.File, names []string, o Options) (r Report, err error) {
	w := &wiper{ctx: ctx, o: o, r: &r, parent: parent, inodes: map[uint64]*inode{}}
	defer func() {
		if w.locator != nil {
			err = errors.Join(err, w.locator.disk.Close())
		}
	}()
	var fs unix.Statfs_t
	if err := retry(func() error { return unix.Fstatfs(int(parent.Fd()), &fs) }); err != nil {
		return r, quoted("statfs", parent.Name(), err)
	}
	w.block = max(512, fs.Bsize)
	w.ext4 = uint32(fs.Type) == unix.EXT4_SUPER_MAGIC
	if !inPlace(&fs) {
		r.note(noteElsewhere)
	}
	if w.ext4 && kernelBefore(5, 13) {
		r.note(noteNames)
	}
	var st unix.Stat_t
	if err := unix.Fstat(int(parent.Fd()), &st); err != nil {
		return r, quoted("stat", parent.Name(), err)
	}
	w.dev = st.Dev
	for _, pass := range []func() error{
		func() error { return w.each(parent, names, w.survey) },
		func() error { return w.dropLinks(parent, names) },
		func() error { return w.each(parent, names, w.overwrite) },
		func() error { return w.sync(parent, w.r.Files > 0) },
		// Names before directories, with a sync between: the blocks of a directory that
		// is removed are not written any more, and would keep what they held.
		func() error { return w.each(parent, names, w.unlink) },
		func() error { return w.sync(parent, w.unlinked) },
		func() error { return w.each(parent, names, w.remove) },
	} {
		if err := pass(); err != nil {
			return r, err
		}
	}
	if r.LongLinks > 0 {
		r.note(NoteLongLinks)
	}
	return r, nil
}

// inode is a file or symbolic link with more than one name.
type inode struct {
	inside uint64 // names in the trees
	asked  bool   // its name in .links has been looked for
	done   bool   // overwritten, or left
}

type wiper struct {
	ctx    context.Context
	o      Options
	r      *Report
	dev    uint64
	block  int64
	ext4   bool
	inodes map[uint64]*inode

	parent  *os.File
	locator *locator
	lost    bool // there is none

	moved    int  // directories that got another name
	unlinked bool // a name in a directory of the trees
}

// visit is called for every entry of a tree, for a directory after all in it. At the
// top it is an entry of the parent.
type visit func(dir int, name string, st *unix.Stat_t, top bool) error

func (w *wiper) each(parent *os.File, names []string, v visit) error {
	for _, n := range names {
		if n == "" || n == "." || n == ".." || strings.ContainsAny(n, "/\x00") {
			return quoted("wipe", n, unix.EINVAL)
		}
		if err := w.walk(int(parent.Fd()), n, -1, 0, v); err != nil {
			return err
		}
	}
	return nil
}

const (
	deepest   = 64          // directories that are open at a time; deeper ones are moved up
	movedName = ".moved-%d" // names of those, and of all before they are removed
)

// walk goes through the entry name of dir. top is the descriptor of the tree's first
// directory, -1 at the top.
func (w *wiper) walk(dir int, name string, top, depth int, v visit) error {
	if err := w.ctx.Err(); err != nil {
		return err
	}
	var st unix.Stat_t
	if err := retry(func() error { return unix.Fstatat(dir, name, &st, unix.AT_SYMLINK_NOFOLLOW) }); err != nil {
		return gone(quoted("stat", name, err))
	}
	if st.Dev != w.dev {
		return quoted("wipe", name, unix.EXDEV)
	}
	if st.Mode&unix.S_IFMT != unix.S_IFDIR {
		return v(dir, name, &st, depth == 0)
	}
	fd, err := w.open(dir, name, unix.O_RDONLY|unix.O_DIRECTORY)
	if err != nil {
		return gone(err)
	}
	defer unix.Close(fd)
	if top < 0 {
		top = fd
	}
	if err := w.entries(fd, top, depth, v); err != nil {
		return err
	}
	return v(dir, name, &st, depth == 0)
}

// entries walks what is in a directory. A tree may be deeper than there are
// descriptors: then a directory is moved to the top, where the walk, which reads the
// top again until nothing is left to do, finds it.
func (w *wiper) entries(fd, top, depth int, v visit) error {
	seen := map[string]bool{}
	for again := true; again; {
		names, err := list(fd)
		if err != nil {
			return err
		}
		again = false
		for _, n := range names {
			if seen[n] {
				continue
			}
			seen[n] = true
			if depth+1 >= deepest {
				if moved, err := w.move(fd, n, top); err != nil {
					return err
				} else if moved {
					continue
				}
			}
			if err := w.walk(fd, n, top, depth+1, v); err != nil {
				return err
			}
			again = fd == top // something may have been moved here
		}
	}
	return nil
}

// move gives a directory a name that says nothing, in directory to.
func (w *wiper) move(fd int, name string, to int) (moved bool, err error) {
	var st unix.Stat_t
	if err := unix.Fstatat(fd, name, &st, unix.AT_SYMLINK_NOFOLLOW); err != nil {
		return false, gone(quoted("stat", name, err))
	}
	if st.Mode&unix.S_IFMT != unix.S_IFDIR {
		return false, nil
	}
	for _, d := range []int{fd, to} {
		if err := w.permit(d, true); err != nil {
			return false, err
		}
	}
	for {
		err := unix.Renameat2(fd, name, to, fmt.Sprintf(movedName, w.moved), unix.RENAME_NOREPLACE)
		switch {
		case errors.Is(err, unix.EEXIST):
			w.moved++
		case errors.Is(err, unix.EINTR):
		case err != nil:
			return false, quoted("rename", name, err)
		default:
			w.moved++
			return true, nil
		}
	}
}

// list reads the names in a directory from its beginning.
func list(fd int) (names []string, err error) {
	if _, err := unix.Seek(fd, 0, io.SeekStart); err != nil {
		return nil, quoted("seek", "directory", err)
	}
	buf := make([]byte, 64<<10)
	for {
		var n int
		if err := retry(func() (err error) { n, err = unix.ReadDirent(fd, buf); return err }); err != nil {
			return nil, quoted("read", "directory", err)
		}
		if n <= 0 {
			return names, nil
		}
		_, _, names = unix.ParseDirent(buf[:n], -1, names)
	}
}

// open opens an entry of dir that is no link and no other mount (RESOLVE_NO_XDEV also
// sees a bind mount of the same file system).
func (w *wiper) open(dir int, name string, flags uint64) (fd int, err error) {
	how := unix.OpenHow{Flags: flags | unix.O_NOFOLLOW | unix.O_CLOEXEC | unix.O_NONBLOCK | unix.O_NOCTTY,
		Resolve: unix.RESOLVE_BENEATH | unix.RESOLVE_NO_SYMLINKS | unix.RESOLVE_NO_XDEV}
	err = retry(func() error { fd, err = unix.Openat2(dir, name, &how); return err })
	if err != nil {
		return -1, quoted("open", name, err)
	}
	return fd, nil
}

// gone hides that an entry is no longer there.
func gone(err error) error {
	if errors.Is(err, unix.ENOENT) {
		return nil
	}
	return err
}

// File attributes, from include/uapi/linux/fs.h and fs/ext4/ext4.h.
const (
	attrImmutable  = 0x10
	attrAppend     = 0x20
	attrInlineData = 0x10000000
)

// permit makes that a file or directory can be changed: without immutable and
// append-only, and, for who is not root, with the owner's right to write.
func (w *wiper) permit(fd int, dir bool) error {
	if attr, err := unix.IoctlGetInt(fd, unix.FS_IOC_GETFLAGS); err == nil && attr&(attrImmutable|attrAppend) != 0 {
		if err := unix.IoctlSetPointerInt(fd, unix.FS_IOC_SETFLAGS, attr&^(attrImmutable|attrAppend)); err != nil {
			return quoted("change attributes", "fd "+strconv.Itoa(fd), err)
		}
	}
	if os.Geteuid() == 0 {
		return nil
	}
	var st unix.Stat_t
	if err := unix.Fstat(fd, &st); err != nil {
		return quoted("stat", "fd "+strconv.Itoa(fd), err)
	}
	want := st.Mode&0o7777 | 0o600
	if dir {
		want |= 0o100
	}
	if want != st.Mode&0o7777 {
		if err := unix.Fchmod(fd, want); err != nil {
			return quoted("chmod", "fd "+strconv.Itoa(fd), err)
		}
	}
	return nil
}

// survey makes everything changeable and counts the names that files have in here.
func (w *wiper) survey(dir int, name string, st *unix.Stat_t, top bool) error {
	kind := st.Mode & unix.S_IFMT
	if (kind == unix.S_IFREG || kind == unix.S_IFLNK) && st.Nlink > 1 {
		if w.inodes[st.Ino] == nil {
			w.inodes[st.Ino] = &inode{}
		}
		w.inodes[st.Ino].inside++
		return nil // mode and attributes may be somebody else's, too
	}
	if kind != unix.S_IFREG && kind != unix.S_IFDIR {
		return nil
	}
	fd, err := w.open(dir, name, unix.O_RDONLY)
	if err != nil {
		return gone(err)
	}
	defer unix.Close(fd)
	return w.permit(fd, kind == unix.S_IFDIR)
}

func (w *wiper) sync(at *os.File, needed bool) error {
	if !needed {
		return nil
	}
	if err := retry(func() error { return unix.Syncfs(int(at.Fd())) }); err != nil {
		return quoted("syncfs", at.Name(), err)
	}
	return nil
}

// overwrite writes zeros over what a file has on the device, unless it is shared.
func (w *wiper) overwrite(dir int, name string, st *unix.Stat_t, top bool) error {
	kind, i := st.Mode&unix.S_IFMT, w.inodes[st.Ino]
	if kind != unix.S_IFREG && kind != unix.S_IFLNK || i != nil && i.done {
		return nil
	}
	// st was taken after the names in .links went and that was made durable: until
	// then Nix's optimiser may have given the file to another path.
	inside := uint64(1)
	if i != nil {
		inside = i.inside
		i.done = true
	}
	if uint64(st.Nlink) > inside {
		w.r.Shared++
		w.r.SharedBytes += st.Size
		return nil
	}
	if kind == unix.S_IFLNK {
		return nil
	}
	fd, err := w.open(dir, name, unix.O_WRONLY)
	if errors.Is(err, unix.EPERM) || errors.Is(err, unix.EACCES) { // with several names, all in here
		if fd, err = w.open(dir, name, unix.O_RDONLY); err == nil {
			err = w.permit(fd, false)
			unix.Close(fd)
		}
		if err == nil {
			fd, err = w.open(dir, name, unix.O_WRONLY)
		}
	}
	if err != nil {
		return gone(err)
	}
	defer unix.Close(fd)
	var now unix.Stat_t
	if err := unix.Fstat(fd, &now); err != nil {
		return quoted("stat", name, err)
	}
	if now.Ino != st.Ino || now.Nlink != st.Nlink || now.Mode&unix.S_IFMT != unix.S_IFREG {
		return quoted("wipe", name, unix.ESTALE) // somebody is at work in the tree
	}
	n, err := w.zero(fd, now.Size)
	w.r.Bytes += n
	if err != nil {
		return quoted("overwrite", name, err)
	}
	w.r.Files++
	return nil
}

var zeros [1 << 20]byte

// zero overwrites the blocks of a file that are written, to the end of the last one,
// and says how many bytes. What lies in the inode itself (inline_data) is overwritten
// there: a longer file would be moved to a block.
func (w *wiper) zero(fd int, size int64) (done int64, err error) {
	end := (size + w.block - 1) / w.block * w.block
	if attr, err := unix.IoctlGetInt(fd, unix.FS_IOC_GETFLAGS); err == nil && attr&attrInlineData != 0 {
		end = size
	}
	for at := int64(0); at < end; {
		from, err := seek(fd, at, unix.SEEK_DATA)
		if errors.Is(err, unix.ENXIO) { // holes from here on
			return done, nil
		}
		to := end
		switch {
		case errors.Is(err, unix.EINVAL), errors.Is(err, unix.EOPNOTSUPP): // not known here: all of it
			from = at
		case err != nil:
			return done, err
		default:
			if to, err = seek(fd, from, unix.SEEK_HOLE); err != nil {
				return done, err
			}
			if to >= size { // the end of the file counts as a hole
				to = end
			}
		}
		if to <= from {
			return done, unix.EIO // or this would not end
		}
		for at = from; at < to; {
			if err := w.ctx.Err(); err != nil {
				return done, err
			}
			n, err := unix.Pwrite(fd, zeros[:min(int64(len(zeros)), to-at)], at)
			if errors.Is(err, unix.EINTR) {
				continue
			}
			if err != nil {
				return done, err
			}
			at += int64(n)
			done += int64(n)
		}
	}
	return done, nil
}

func seek(fd int, at int64, whence int) (int64, error) {
	if at == math.MaxInt64 {
		return 0, unix.ENXIO
	}
	return unix.Seek(fd, at, whence)
}

// longLink is the least size of a target that does not fit into an inode of ext4
// (fs/ext4/namei.c, ext4_symlink).
const longLink = 60

// unlink removes what is no directory; a directory below the top gets a name that says
// nothing.
func (w *wiper) unlink(dir int, name string, st *unix.Stat_t, top bool) error {
	w.unlinked = w.unlinked || !top
	if st.Mode&unix.S_IFMT == unix.S_IFDIR {
		var n int
		if _, err := fmt.Sscanf(name, movedName, &n); top || err == nil && name == fmt.Sprintf(movedName, n) {
			return nil
		}
		_, err := w.move(dir, name, dir)
		return err
	}
	long := st.Mode&unix.S_IFMT == unix.S_IFLNK && st.Size >= longLink && w.ext4
	block := int64(0)
	if long && st.Nlink == 1 {
		block = w.locate(st.Ino)
	}
	err := retry(func() error { return unix.Unlinkat(dir, name, 0) })
	if err != nil {
		return gone(quoted("unlink", name, err))
	}
	switch st.Mode & unix.S_IFMT {
	case unix.S_IFLNK:
		w.r.Symlinks++
		if long {
			w.r.LongLinks++
		}
		if block != 0 {
			w.r.Blocks = append(w.r.Blocks, block)
		}
	case unix.S_IFREG:
	default:
		w.r.Others++
	}
	return nil
}

// locate is locator.of; 0 where the device cannot be read.
func (w *wiper) locate(ino uint64) int64 {
	if w.locator == nil && !w.lost {
		l, err := newLocator(w.parent, w.block)
		w.locator, w.lost = l, err != nil
	}
	if w.lost {
		return 0
	}
	return w.locator.of(ino)
}

// remove removes directories.
func (w *wiper) remove(dir int, name string, st *unix.Stat_t, top bool) error {
	flags := 0
	if st.Mode&unix.S_IFMT == unix.S_IFDIR {
		flags = unix.AT_REMOVEDIR
	}
	if err := retry(func() error { return unix.Unlinkat(dir, name, flags) }); err != nil {
		return gone(quoted("unlink", name, err))
	}
	if flags != 0 {
		w.r.Directories++
	}
	return nil
}
