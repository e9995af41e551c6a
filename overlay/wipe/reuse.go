package wipe

import (
	"context"
	"errors"
	"os"

	"golang.org/x/sys/unix"
)

// locator says where the targets of long symbolic links lie, which no call tells.
type locator struct {
	disk  *Disk
	block int64
	inode int64 // bytes of one on the disk
	group uint64
	desc  int64 // bytes of a group's descriptor
	descs int64 // where they begin
}

const (
	incompatMetaBG = 0x10
	incompat64bit  = 0x80
)

// newLocator reads the superblock and knows the plain layout of ext4
// (Documentation/filesystems/ext4/super.rst, group_descr.rst).
func newLocator(dir *os.File, block int64) (l *locator, err error) {
	dev, err := DeviceOf(dir)
	if err != nil {
		return nil, err
	}
	l = &locator{block: block, desc: 32}
	if l.disk, err = OpenDisk(dev); err != nil {
		return nil, err
	}
	super := make([]byte, 1024)
	_, err = l.disk.ReadAt(super, 1024)
	incompat := le.Uint32(super[0x60:])
	if err == nil && (le.Uint16(super[0x38:]) != 0xef53 || int64(1024)<<le.Uint32(super[0x18:]) != block || incompat&incompatMetaBG != 0) {
		err = errLayout
	}
	if incompat&incompat64bit != 0 {
		l.desc = int64(le.Uint16(super[0xfe:]))
	}
	l.inode, l.group = int64(le.Uint16(super[0x58:])), uint64(le.Uint32(super[0x28:]))
	l.descs = (int64(le.Uint32(super[0x14:])) + 1) * block
	if err == nil && (l.inode < 128 || l.group == 0 || l.desc < 32) {
		err = errLayout
	}
	if err != nil {
		return nil, errors.Join(err, l.disk.Close())
	}
	return l, nil
}

// of is the block of the device that holds the target of a long symbolic link, 0 if it
// cannot be told.
func (l *locator) of(ino uint64) int64 {
	d := make([]byte, l.desc)
	if ino == 0 {
		return 0
	}
	if _, err := l.disk.ReadAt(d, l.descs+int64((ino-1)/l.group)*l.desc); err != nil {
		return 0
	}
	table := int64(le.Uint32(d[8:]))
	if l.desc >= 64 {
		table |= int64(le.Uint32(d[0x28:])) << 32
	}
	b := make([]byte, 128)
	if _, err := l.disk.ReadAt(b, table*l.block+int64((ino-1)%l.group)*l.inode); err != nil {
		return 0
	}
	if le.Uint16(b)&unix.S_IFMT != unix.S_IFLNK {
		return 0
	}
	i := b[0x28:]
	if le.Uint32(b[0x20:])&0x80000 == 0 { // no extents: the number of the first block
		return int64(le.Uint32(i))
	}
	if le.Uint16(i) != 0xf30a || le.Uint16(i[2:]) != 1 || le.Uint16(i[6:]) != 0 {
		return 0
	}
	return int64(le.Uint16(i[12+6:]))<<32 | int64(le.Uint32(i[12+8:]))
}

const (
	reuseMiddle = 1 << 29 // of the file, in blocks: nothing below or above is out of reach
	reuseTries  = 128     // for one block,
	reuseBatch  = 256     // of so many blocks each: all that a group has
)

// Reuse overwrites free blocks of the device (Report.Blocks) that no trim clears: it
// takes room for a file without a name until that has those blocks, writes zeros
// there, and gives all of it back. The room is taken one block at a time where the
// wanted one lies, for ext4 looks first in the group of the block that would be in
// line with what the file has (fs/ext4/extents.c, ext4_ext_find_goal); that is a
// group's worth, 128 MiB, at most, for a moment, and not the last quarter of what is
// free. left is how many it did not get: somebody else has them, or they are out of
// reach. It needs ext4 with extents; else all are left.
func Reuse(ctx context.Context, dir *os.File, blocks []int64) (left int, err error) {
	want := map[int64]bool{}
	for _, b := range blocks {
		want[b] = true
	}
	var fs unix.Statfs_t
	if err := unix.Fstatfs(int(dir.Fd()), &fs); err != nil {
		return len(want), quoted("statfs", dir.Name(), err)
	}
	if len(want) == 0 || uint32(fs.Type) != unix.EXT4_SUPER_MAGIC {
		return len(want), nil
	}
	// Blocks that a transaction has freed can be had once it is committed.
	if err := retry(func() error { return unix.Syncfs(int(dir.Fd())) }); err != nil {
		return len(want), quoted("syncfs", dir.Name(), err)
	}
	var fd int
	err = retry(func() (err error) {
		fd, err = unix.Openat(int(dir.Fd()), ".", unix.O_TMPFILE|unix.O_RDWR|unix.O_CLOEXEC, 0o600)
		return err
	})
	if errors.Is(err, unix.EOPNOTSUPP) {
		return len(want), nil
	}
	if err != nil {
		return len(want), quoted("create a file in", dir.Name(), err)
	}
	f := os.NewFile(uintptr(fd), dir.Name())
	defer func() { err = errors.Join(err, f.Close()) }()
	r := &reuser{fd: fd, block: fs.Bsize, want: want, most: int64(fs.Bavail) / 4 * 3}
	if err := r.run(ctx); err != nil {
		return len(want), quoted("take room in", dir.Name(), err)
	}
	return len(want), r.zero(f)
}

// reuser takes room for a file.
type reuser struct {
	fd    int
	block int64
	want  map[int64]bool
	got   []extent // that hold wanted ones, each of one block
	most  int64    // blocks that may be taken yet
}

// take takes a block of the file; no is that there is none to be had.
func (r *reuser) take(logical int64) (no bool, err error) {
	if r.most--; r.most < 0 {
		return true, nil
	}
	err = retry(func() error { return unix.Fallocate(r.fd, 0, logical*r.block, r.block) })
	switch {
	case errors.Is(err, unix.ENOSPC), errors.Is(err, unix.EDQUOT), errors.Is(err, unix.EOPNOTSUPP), errors.Is(err, unix.EFBIG):
		return true, nil
	}
	return false, err
}

// look moves what the file has now from want to got.
func (r *reuser) look() (all []extent, err error) {
	if all, err = fiemap(r.fd); err != nil {
		return nil, err
	}
	for _, e := range all {
		for at := int64(0); at < int64(e.length); at += r.block {
			if b := (int64(e.physical) + at) / r.block; r.want[b] {
				delete(r.want, b)
				r.got = append(r.got, extent{e.logical + uint64(at), e.physical + uint64(at), uint64(r.block)})
			}
		}
	}
	return all, nil
}

func (r *reuser) run(ctx context.Context) error {
	if no, err := r.take(reuseMiddle); no || err != nil {
		return err
	}
	all, err := r.look()
	if err != nil || len(all) == 0 {
		return err
	}
	// All that lie in line first: most are had by that.
	line := reuseMiddle - int64(all[0].physical)/r.block
	for b := range r.want {
		if at := b + line; at >= 0 && at < 2*reuseMiddle {
			if no, err := r.take(at); no || err != nil {
				return err
			}
		}
	}
	if _, err := r.look(); err != nil {
		return err
	}
	for b := range r.want {
		at := b + line
		if at < 0 || at >= 2*reuseMiddle {
			continue
		}
		for n := 0; n < reuseTries && r.want[b]; n++ {
			if err := ctx.Err(); err != nil {
				return err
			}
			for range reuseBatch {
				at++
				if no, err := r.take(at); no || err != nil {
					return err
				}
			}
			if _, err := r.look(); err != nil {
				return err
			}
		}
	}
	return nil
}

func (r *reuser) zero(f *os.File) error {
	for _, e := range r.got {
		if _, err := f.WriteAt(zeros[:r.block], int64(e.logical)); err != nil {
			return err
		}
	}
	if len(r.got) == 0 {
		return nil
	}
	return f.Sync()
}
