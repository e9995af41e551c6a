package wipe

import (
	"context"
	"crypto/rand"
	"errors"
	"fmt"
	"io"
	"math"
	"os"
	"strings"
	"unsafe"

	"golang.org/x/sys/unix"

	"overkeep/overlay/drv/storepath"
	"overkeep/overlay/wipe/needle"
)

// SlackReport says what Slack found and did.
type SlackReport struct {
	Looked  Answer   `json:"looked"`  // whether the directory's blocks could be read
	Before  int      `json:"before"`  // occurrences in the directory's blocks outside of entries
	After   int      `json:"after"`   // the same at the end
	Fillers int      `json:"fillers"` // entries created and removed
	Notes   []string `json:"notes,omitempty"`
}

// Slack removes old copies of names that stand in the blocks of directory dir itself
// (not below), beside its entries.
//
// The kernel clears an entry when it is removed (since 5.13), but not what it leaves
// when it moves entries together in a block that was split (fs/ext4/namei.c,
// dx_pack_dirents): of 400 names removed from a directory of 20,000, 42 were still
// there on Linux 6.18. Slack reads the blocks from the device, and where it finds such
// a copy puts entries of its own (.overkeep-slack-…, links of one empty file) there
// until one has taken the room, and removes them: the kernel clears all of it.
//
// The directory does not grow by it. It needs ext4, a device that can be read and, for
// a large directory, the hash that mke2fs sets; else the report says Unsupported or
// Denied. It may be killed at any point and repeated: what it left then goes first.
func Slack(ctx context.Context, dir *os.File, names [][]byte) (r SlackReport, err error) {
	set, err := needle.New(names)
	if err != nil || len(names) == 0 {
		return r, err
	}
	s, err := openSlack(dir, set)
	switch {
	case errors.Is(err, ErrNoDevice), errors.Is(err, errLayout), errors.Is(err, unix.ENOENT), errors.Is(err, unix.EOPNOTSUPP):
		r.Looked = Unsupported
	case errors.Is(err, unix.EACCES), errors.Is(err, unix.EPERM):
		r.Looked = Denied
	}
	if r.Looked != "" {
		r.Notes = note(r.Notes, noteSlack)
		return r, nil
	}
	if err != nil {
		return r, err
	}
	defer func() { err = errors.Join(err, s.disk.Close()) }()
	s.r = &r
	return r, s.run(ctx)
}

const (
	noteSlack = "the blocks of the directory could not be read: old copies of names may stand in them"
	noteGap   = "copies of names stand in room of a directory's blocks that is too small for an entry"

	fillerPrefix = ".overkeep-slack-"
	fillerRandom = 8                                // digits of base 32 behind it
	fillerLeast  = len(fillerPrefix) + fillerRandom // bytes of a name
	slackRounds  = 16                               // beside a Nix that adds paths
	slackTries   = 1 << 26                          // names to try for a block, at most
)

type slack struct {
	dir   *os.File
	disk  *Disk
	set   *needle.Set
	r     *SlackReport
	block int64
	seed  [4]uint32
	blank string // where the empty file is that fillers are links of
}

func openSlack(dir *os.File, set *needle.Set) (_ *slack, err error) {
	var fs unix.Statfs_t
	if err := unix.Fstatfs(int(dir.Fd()), &fs); err != nil {
		return nil, quoted("statfs", dir.Name(), err)
	}
	if uint32(fs.Type) != unix.EXT4_SUPER_MAGIC {
		return nil, errLayout
	}
	dev, err := DeviceOf(dir)
	if err != nil {
		return nil, err
	}
	s := &slack{dir: dir, set: set, block: fs.Bsize}
	if s.disk, err = OpenDisk(dev); err != nil {
		return nil, err
	}
	defer func() {
		if err != nil {
			err = errors.Join(err, s.disk.Close())
		}
	}()
	// The superblock, see Documentation/filesystems/ext4/super.rst.
	super := make([]byte, 1024)
	if _, err := s.disk.ReadAt(super, 1024); err != nil {
		return nil, err
	}
	if le.Uint16(super[0x38:]) != 0xef53 || int64(1024)<<le.Uint32(super[0x18:]) != s.block {
		return nil, errLayout
	}
	for i := range s.seed {
		s.seed[i] = le.Uint32(super[0xec+4*i:])
	}
	return s, nil
}

// hit is an old copy of a name.
type hit struct{ block, from, to int }

func (s *slack) run(ctx context.Context) error {
	if err := s.sweep(); err != nil {
		return err
	}
	for n := range slackRounds {
		if err := ctx.Err(); err != nil {
			return err
		}
		blocks, indexed, err := s.read()
		if err != nil {
			return err
		}
		hits, err := s.look(blocks)
		if err != nil {
			return err
		}
		s.r.Looked, s.r.After = Done, len(hits)
		if n == 0 {
			s.r.Before = len(hits)
		}
		if len(hits) == 0 {
			return nil
		}
		before := s.r.Fillers
		err = s.fill(ctx, blocks, indexed, hits)
		if err = errors.Join(err, s.sweep()); errors.Is(err, errLayout) {
			s.r.Looked = Unsupported
			s.r.Notes = note(s.r.Notes, noteSlack)
			return nil
		} else if err != nil {
			return err
		}
		if s.r.Fillers == before { // nothing fits
			break
		}
	}
	s.r.Notes = note(s.r.Notes, noteGap)
	return nil
}

// sweep removes our fillers.
func (s *slack) sweep() error {
	w := &wiper{}
	fd, err := w.open(int(s.dir.Fd()), ".", unix.O_RDONLY|unix.O_DIRECTORY)
	if err != nil {
		return err
	}
	defer unix.Close(fd)
	names, err := list(fd)
	if err != nil {
		return err
	}
	s.blank = ""
	for _, n := range names {
		if !strings.HasPrefix(n, fillerPrefix) {
			continue
		}
		if err := retry(func() error { return unix.Unlinkat(fd, n, 0) }); err != nil && !errors.Is(err, unix.ENOENT) {
			return quoted("unlink", n, err)
		}
	}
	return nil
}

// read reads the directory's blocks from the device: what the file system has changed
// in them is seen there, for both use the same pages.
func (s *slack) read() (blocks [][]byte, indexed bool, err error) {
	attr, err := unix.IoctlGetInt(int(s.dir.Fd()), unix.FS_IOC_GETFLAGS)
	if err != nil {
		return nil, false, quoted("read attributes", s.dir.Name(), err)
	}
	const attrIndexed, attrEncrypted, attrCasefold = 0x1000, 0x800, 0x40000000
	if attr&(attrEncrypted|attrCasefold) != 0 {
		return nil, false, errLayout
	}
	if attr&attrInlineData != 0 {
		return nil, false, nil // a few entries in the inode, never split
	}
	var st unix.Stat_t
	if err := unix.Fstat(int(s.dir.Fd()), &st); err != nil {
		return nil, false, quoted("stat", s.dir.Name(), err)
	}
	extents, err := fiemap(int(s.dir.Fd()))
	if err != nil {
		return nil, false, quoted("find the blocks of", s.dir.Name(), err)
	}
	blocks = make([][]byte, st.Size/s.block)
	for _, e := range extents {
		for at := uint64(0); at < e.length; at += uint64(s.block) {
			n := (e.logical + at) / uint64(s.block)
			if n >= uint64(len(blocks)) {
				break
			}
			blocks[n] = make([]byte, s.block)
			if _, err := s.disk.ReadAt(blocks[n], int64(e.physical+at)); err != nil {
				return nil, false, err
			}
		}
	}
	for _, b := range blocks {
		if b == nil {
			return nil, false, errLayout // it has a hole
		}
	}
	return blocks, attr&attrIndexed != 0, nil
}

func (s *slack) look(blocks [][]byte) (hits []hit, err error) {
	for n, b := range blocks {
		_, live, err := gaps(b)
		if err != nil {
			return nil, err
		}
		var found [][2]int
		s.set.Find(b, func(name, at int) { found = append(found, [2]int{at, at + s.set.Size(name)}) })
		for _, f := range found {
			if !live(f[0], f[1]) {
				hits = append(hits, hit{n, f[0], f[1]})
			}
		}
	}
	return hits, nil
}

// fill puts entries where the hits are.
func (s *slack) fill(ctx context.Context, blocks [][]byte, indexed bool, hits []hit) error {
	all := []leaf{{}}
	if indexed {
		var err error
		all, err = leaves(func(n uint32) ([]byte, error) {
			if int64(n) >= int64(len(blocks)) {
				return nil, errLayout
			}
			return blocks[n], nil
		})
		if err != nil {
			return err
		}
	} else if len(blocks) > 1 {
		return errLayout // without an index the kernel looks for room from the first block on
	}
	at := map[int]int{} // leaf by its block
	for i, l := range all {
		at[int(l.block)] = i
	}
	todo := map[int][]hit{}
	for _, h := range hits {
		if i, ok := at[h.block]; ok {
			todo[i] = append(todo[i], h)
		}
	}
	for i, hits := range todo {
		if err := ctx.Err(); err != nil {
			return err
		}
		room, _, err := gaps(blocks[all[i].block])
		if err != nil {
			return err
		}
		for _, h := range hits {
			if err := s.fillGap(all, i, room, h); err != nil {
				return err
			}
		}
	}
	return nil
}

// fillGap adds entries to a leaf, of a size that only the largest room takes, until
// one has come to where the hit is. room is kept as the kernel has it.
func (s *slack) fillGap(all []leaf, i int, room []gap, h hit) error {
	target := -1
	for n, g := range room {
		if g.at < h.to && h.from < g.at+g.spare {
			target = n
		}
	}
	if target < 0 {
		return nil // taken by one of ours
	}
	size := min(recLen(unix.NAME_MAX), room[target].spare&^3)
	for size >= recLen(fillerLeast) && room[target].spare >= size {
		first := 0
		for room[first].spare < size {
			first++
		}
		name, ok := s.name(all, i, min(unix.NAME_MAX, size-8))
		if !ok {
			return nil
		}
		if err := s.link(name); err != nil {
			return err
		}
		room[first].at += size
		room[first].spare -= size
		if first == target {
			// It has the rest of the room, too: all of that goes with it.
			return nil
		}
	}
	return nil
}

// name makes a name whose entry goes to a leaf.
func (s *slack) name(all []leaf, i, length int) (string, bool) {
	tail := strings.Repeat("_", length-fillerLeast)
	for range min(slackTries, 64*len(all)+64) {
		var b [fillerRandom * 5 / 8]byte
		_, _ = rand.Read(b[:]) // never fails
		name := fillerPrefix + storepath.Base32(b[:]) + tail
		if len(all) == 1 || leafOf(all, nameHash(s.seed, name)) == i {
			return name, true
		}
	}
	return "", false
}

func (s *slack) link(name string) error {
	at := int(s.dir.Fd())
	if s.blank != "" {
		err := retry(func() error { return unix.Linkat(at, s.blank, at, name, 0) })
		if err == nil {
			s.r.Fillers++
			return nil
		}
		if !errors.Is(err, unix.EMLINK) && !errors.Is(err, unix.ENOENT) { // 65,000 in ext4; swept by another
			return quoted("link", name, err)
		}
	}
	var fd int
	err := retry(func() (err error) {
		fd, err = unix.Openat(at, name, unix.O_CREAT|unix.O_EXCL|unix.O_WRONLY|unix.O_NOFOLLOW|unix.O_CLOEXEC, 0o400)
		return err
	})
	if err != nil {
		return quoted("create", name, err)
	}
	s.blank = name
	s.r.Fillers++
	return unix.Close(fd)
}

// extent is a part of struct fiemap_extent.
type extent struct{ logical, physical, length uint64 }

// fiemap returns where the blocks of a file or directory lie on the device
// (Documentation/filesystems/fiemap.rst).
func fiemap(fd int) (out []extent, err error) {
	const (
		request = 3<<30 | 32<<16 | 'f'<<8 | 11 // FS_IOC_FIEMAP
		perCall = 256
		last    = 1
		unclear = 2 | 4 | 8 | 0x80 | 0x200 // unknown, not yet allocated, encoded, encrypted, in the inode
	)
	type mapped struct {
		extent
		_     [2]uint64
		flags uint32
		_     [3]uint32
	}
	var m struct {
		start, length               uint64
		flags, mapped, count, spare uint32
		extents                     [perCall]mapped
	}
	for {
		m.length, m.count, m.mapped = math.MaxUint64-m.start, perCall, 0
		if err := retry(func() error { return ioctl(fd, request, unsafe.Pointer(&m)) }); err != nil {
			return nil, err
		}
		if m.mapped == 0 {
			return out, nil
		}
		for _, e := range m.extents[:min(m.mapped, perCall)] {
			if e.flags&unclear != 0 {
				return nil, fmt.Errorf("an extent with flags %#x: %w", e.flags, errLayout)
			}
			out = append(out, e.extent)
			if m.start = e.logical + e.length; e.flags&last != 0 {
				return out, nil
			}
		}
	}
}

var _ io.ReaderAt = (*Disk)(nil)
