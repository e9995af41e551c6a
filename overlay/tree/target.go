package tree

import (
	"bytes"
	"errors"
	"io"

	"golang.org/x/sys/unix"
)

// target makes a tree in canonical form.
type target struct {
	chain
	names    []string // of the directories of the chain
	uid, gid uint32
	block    int64 // bytes of a block of the file system
	blocks   int64 // written to files

	// What new files and links lack, found on the first of each kind: umask, a set-group-ID
	// directory and the mount's options are the same for all, for we made their directories.
	files [2]lack // 0444, 0555
	links lack
}

type lack struct{ known, owner, mode bool }

// Blocks between these are looked at for zeros. Larger ones would be few holes, smaller ones many calls.
const (
	minBlock = 512
	maxBlock = 64 << 10
)

var zeros [maxBlock]byte

// newTarget is a target below the caller's directory dir.
func newTarget(dir int, name string, o Options) (*target, error) {
	fail := func(op string, err error) error { return &Error{op, name, true, err} }
	if o.UID < 0 || o.GID < 0 {
		return nil, fail("own", unix.EINVAL)
	}
	var fs unix.Statfs_t
	if err := again(func() error { return unix.Fstatfs(dir, &fs) }); err != nil {
		return nil, fail("statfs", err)
	}
	err := again(func() error { _, err := unix.Fgetxattr(dir, "system.posix_acl_default", nil); return err })
	switch {
	case err == nil:
		return nil, fail("make", ErrACL)
	case !errors.Is(err, unix.ENODATA) && !errors.Is(err, unix.EOPNOTSUPP):
		return nil, fail("getxattr", err)
	}
	block := int64(fs.Bsize)
	if block < minBlock || block > maxBlock || block&(block-1) != 0 {
		block = 4096
	}
	return &target{chain: chain{base: dir}, uid: uint32(o.UID), gid: uint32(o.GID), block: block}, nil
}

// down makes a directory and goes into it.
func (t *target) down(name string) error {
	fail := func(op string, err error) error { return &Error{op, name, true, err} }
	if err := again(func() error { return unix.Mkdirat(t.fd(), name, 0o700) }); err != nil {
		return fail("mkdir", err)
	}
	fd, err := open(t.fd(), name, openDir)
	if err != nil {
		return fail("open", err)
	}
	var st unix.Stat_t
	if err := fstat(fd, &st); err != nil {
		_ = shut(fd)
		return fail("stat", err)
	}
	t.push(fd, &st)
	t.names = append(t.names, name)
	if st.Uid != t.uid || st.Gid != t.gid {
		if err := again(func() error { return unix.Fchown(fd, int(t.uid), int(t.gid)) }); err != nil {
			return fail("chown", err)
		}
	}
	if st.Mode&0o700 != 0o700 { // an odd umask
		if err := again(func() error { return unix.Fchmod(fd, 0o700) }); err != nil {
			return fail("chmod", err)
		}
	}
	return nil
}

// up completes the directory and goes back.
func (t *target) up() error {
	name := t.names[len(t.names)-1]
	fail := func(op string, err error) error { return &Error{op, name, true, err} }
	if err := again(func() error { return unix.Fchmod(t.fd(), 0o555) }); err != nil {
		return fail("chmod", err)
	}
	if err := t.pop(); err != nil {
		return fail("leave", err)
	}
	t.names = t.names[:len(t.names)-1]
	return t.time(name)
}

// time gives name the canonical time.
func (t *target) time(name string) error {
	ts := [2]unix.Timespec{{Nsec: unix.UTIME_OMIT}, {Sec: 1}}
	if err := again(func() error { return unix.UtimesNanoAt(t.fd(), name, ts[:], unix.AT_SYMLINK_NOFOLLOW) }); err != nil {
		return &Error{"utimes", name, true, err}
	}
	return nil
}

// symlink makes a link.
func (t *target) symlink(name, to string) error {
	fail := func(op string, err error) error { return &Error{op, name, true, err} }
	if err := again(func() error { return unix.Symlinkat(to, t.fd(), name) }); err != nil {
		return fail("symlink", err)
	}
	if !t.links.known {
		var st unix.Stat_t
		if err := lstatat(t.fd(), name, &st); err != nil {
			return fail("stat", err)
		}
		t.links = lack{true, st.Uid != t.uid || st.Gid != t.gid, false}
	}
	if t.links.owner {
		if err := again(func() error {
			return unix.Fchownat(t.fd(), name, int(t.uid), int(t.gid), unix.AT_SYMLINK_NOFOLLOW)
		}); err != nil {
			return fail("chown", err)
		}
	}
	return t.time(name)
}

// file is one that is being written.
type file struct {
	t    *target
	fd   int
	name string
	size int64
	end  int64 // of what was written
}

// create makes a file that will have size bytes. It must be closed or abandoned.
func (t *target) create(name string, exec bool, size int64) (file, error) {
	f := file{t: t, name: name, size: size}
	mode, lacks := uint32(0o444), &t.files[0]
	if exec {
		mode, lacks = 0o555, &t.files[1]
	}
	err := again(func() (err error) {
		f.fd, err = unix.Openat(t.fd(), name, unix.O_WRONLY|unix.O_CREAT|unix.O_EXCL|unix.O_NOFOLLOW|unix.O_CLOEXEC, mode)
		return err
	})
	if err != nil {
		return f, f.failed("create", err)
	}
	if !lacks.known {
		var st unix.Stat_t
		if err := fstat(f.fd, &st); err != nil {
			f.abandon()
			return f, f.failed("stat", err)
		}
		*lacks = lack{true, st.Uid != t.uid || st.Gid != t.gid, st.Mode&0o7777 != mode}
	}
	if lacks.owner {
		err = again(func() error { return unix.Fchown(f.fd, int(t.uid), int(t.gid)) })
	}
	if err == nil && lacks.mode {
		err = again(func() error { return unix.Fchmod(f.fd, mode) })
	}
	if err != nil {
		f.abandon()
		return f, f.failed("chown", err)
	}
	return f, nil
}

func (f *file) failed(op string, err error) error { return &Error{op, f.name, true, err} }

// write writes p, what the file holds from off on; zero blocks are left out, as
// nothing was ever there.
func (f *file) write(p []byte, off int64) error {
	for run := 0; run < len(p); {
		// [run, end) is written, [end, next) is zero.
		end, next := run, run
		for next < len(p) {
			piece := min(int(f.t.block-(off+int64(next))&(f.t.block-1)), len(p)-next)
			whole := (off+int64(next))&(f.t.block-1) == 0 && (int64(piece) == f.t.block || off+int64(next+piece) == f.size)
			if whole && p[next] == 0 && bytes.Equal(p[next:next+piece], zeros[:piece]) {
				next += piece
				continue
			}
			if next > end {
				break
			}
			next += piece
			end = next
		}
		if err := f.put(p[run:end], off+int64(run)); err != nil {
			return err
		}
		run = next
	}
	return nil
}

func (f *file) put(p []byte, off int64) error {
	if len(p) == 0 {
		return nil
	}
	b := f.t.block
	f.t.blocks += (off+int64(len(p))+b-1)/b - off/b
	f.end = off + int64(len(p))
	for len(p) > 0 {
		var n int
		err := again(func() (err error) { n, err = unix.Pwrite(f.fd, p, off); return err })
		if err == nil && n <= 0 {
			err = io.ErrShortWrite
		}
		if err != nil {
			return f.failed("write", err)
		}
		p, off = p[n:], off+int64(n)
	}
	return nil
}

// close completes the file.
func (f *file) close() error {
	if f.end < f.size { // a hole at the end
		if err := again(func() error { return unix.Ftruncate(f.fd, f.size) }); err != nil {
			f.abandon()
			return f.failed("truncate", err)
		}
	}
	if err := shut(f.fd); err != nil {
		return f.failed("close", err)
	}
	return f.t.time(f.name)
}

// abandon closes a file that will not be completed.
func (f *file) abandon() { _ = shut(f.fd) }
