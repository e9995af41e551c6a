package tree

import (
	"context"
	"math"
	"os"
	"runtime"

	"golang.org/x/sys/unix"
)

// Usage is what a copy of the tree name of dir needs on a file system with blocks of
// blockSize bytes, such as Room tells of the target. It is at least what ext4 uses, with or
// without fscrypt, and reads no content: what is a hole only after copying counts whole.
func Usage(ctx context.Context, dir *os.File, name string, blockSize int64) (Space, error) {
	defer runtime.KeepAlive(dir)
	if err := single(name); err != nil {
		return Space{}, err
	}
	if blockSize <= 0 {
		return Space{}, &Error{"measure", name, true, unix.EINVAL}
	}
	u := usage{walker: newWalker(), sum: Space{BlockSize: blockSize}}
	u.begin(ctx, int(dir.Fd()))
	defer u.src.close()
	if err := ctx.Err(); err != nil {
		return Space{}, err
	}
	if err := u.node(name, unix.DT_UNKNOWN); err != nil {
		return Space{}, err
	}
	for len(u.frames) > 0 {
		name, typ, left, err := u.next()
		if err == nil && !left {
			err = u.node(name, typ)
		}
		if err != nil {
			return Space{}, err
		}
	}
	return u.sum, nil
}

type usage struct {
	walker
	sum Space
}

// add counts bytes that begin a block of their own.
func (u *usage) add(bytes int64) {
	u.sum.Blocks += (bytes + u.sum.BlockSize - 1) / u.sum.BlockSize
}

func (u *usage) node(name string, typ uint8) error {
	mode, err := u.mode(name, typ)
	if err != nil {
		return err
	}
	u.sum.Inodes++
	switch mode {
	case unix.S_IFREG:
		return u.file(name)
	case unix.S_IFLNK:
		var st unix.Stat_t
		if err := lstatat(u.src.fd(), name, &st); err != nil {
			return u.lost("stat", name, err)
		}
		// Up to 59 bytes lie in the inode; encryption pads to 32 and adds 2 (fscrypt.rst).
		if st.Size > 32 {
			u.add(st.Size)
		}
		return nil
	case unix.S_IFDIR:
		if err := u.enter(name, false); err != nil {
			return err
		}
		// Of ext4_dir_entry_2: 8 bytes and the name, which encryption pads to 32, beside ".",
		// ".." and a checksum. A directory of several blocks is a tree of half-full ones, at worst.
		size := int64(64)
		for _, s := range u.frames[len(u.frames)-1].spans {
			size += 8 + (int64(s.length)+31)&^31
		}
		if size > u.sum.BlockSize {
			size = 2*size + u.sum.BlockSize
		}
		u.add(size)
		return nil
	}
	return &UnsupportedError{name, kind(mode)}
}

// extentBytes: a block that lists extents comes with, at the very least, that much of a
// file that was written in one go.
const extentBytes = 16 << 20

func (u *usage) file(name string) error {
	var st unix.Stat_t
	if err := lstatat(u.src.fd(), name, &st); err != nil {
		return u.lost("stat", name, err)
	}
	if st.Size > minSparse {
		u.sum.Blocks += 1 + st.Size/extentBytes
	}
	if st.Size < minSparse || st.Blocks*512 >= st.Size {
		u.add(st.Size)
		return nil
	}
	fd, err := u.open(name, unix.O_RDONLY, &st)
	if err != nil {
		return err
	}
	defer func() { _ = shut(fd) }()
	b, end := u.sum.BlockSize, int64(0) // end of the last block that is counted
	for off := int64(0); off < st.Size; {
		from, to, err := extent(fd, off, st.Size)
		if err != nil { // not every file system knows
			from, to = off, st.Size
		}
		if from < to {
			first, last := max(from/b*b, end), (to+b-1)/b*b
			if last > first {
				u.sum.Blocks += (last - first) / b
				end = last
			}
		}
		off = to
	}
	return nil
}

// Room is what is free, for root, on the file system of dir.
func Room(dir *os.File) (Space, error) {
	defer runtime.KeepAlive(dir)
	var fs unix.Statfs_t
	if err := again(func() error { return unix.Fstatfs(int(dir.Fd()), &fs) }); err != nil {
		return Space{}, &Error{"statfs", dir.Name(), true, err}
	}
	// ext4 counts as free what it keeps for itself and gives not even to root
	// (fs/ext4/super.c, ext4_calculate_resv_clusters: a fiftieth, at most 4096 clusters).
	kept := min(fs.Blocks/50, 4096)
	s := Space{BlockSize: int64(fs.Bsize), Blocks: max(0, int64(fs.Bfree)-int64(kept)), Inodes: int64(fs.Ffree)}
	if fs.Files == 0 { // such as btrfs: as many as there is space for
		s.Inodes = math.MaxInt64
	}
	return s, nil
}
