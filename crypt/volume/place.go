package volume

import (
	"errors"
	"fmt"
	"os"
	"path/filepath"

	"github.com/google/fscrypt/filesystem"
	"github.com/moby/sys/mountinfo"
	"golang.org/x/sys/unix"
)

// beneath is how everything below a held directory is opened: never through a
// symbolic link and never into another mount (openat2(2)).
const beneath = unix.RESOLVE_BENEATH | unix.RESOLVE_NO_SYMLINKS | unix.RESOLVE_NO_MAGICLINKS | unix.RESOLVE_NO_XDEV

func openBeneath(dir *os.File, name string, flags int) (*os.File, error) {
	how := unix.OpenHow{Flags: uint64(flags | unix.O_CLOEXEC | unix.O_NOFOLLOW), Resolve: beneath}
	for {
		fd, err := unix.Openat2(int(dir.Fd()), name, &how)
		switch {
		case err == nil:
			return os.NewFile(uintptr(fd), filepath.Join(dir.Name(), name)), nil
		case err == unix.EINTR || err == unix.EAGAIN: // EAGAIN: a rename raced with the lookup
			continue
		}
		return nil, &os.PathError{Op: "open", Path: filepath.Join(dir.Name(), name), Err: err}
	}
}

// openParent opens the directory that holds s.Dir. All ioctls on keys go
// through it: it is on the same filesystem and not encrypted itself, whereas an
// fd of the encrypted directory keeps its own key busy. With an FSImage it fails
// with *NotMountedError unless that image is what is mounted there.
func (s Spec) openParent() (*os.File, error) {
	if s.FSImage != "" {
		_, on, err := s.fsMounted()
		if err != nil {
			return nil, err
		}
		if !on {
			return nil, &NotMountedError{Path: s.FSMount}
		}
	}
	return os.OpenFile(filepath.Dir(s.Dir), unix.O_DIRECTORY|unix.O_NOFOLLOW|unix.O_CLOEXEC, 0)
}

// openDir opens s.Dir below its parent. A symbolic link, a file or a mount in
// its place is a *ForeignError; nothing at all is a *MissingError.
func (s Spec) openDir(parent *os.File) (*os.File, error) {
	d, err := openBeneath(parent, filepath.Base(s.Dir), unix.O_DIRECTORY)
	return d, explainOpen(err, s.Dir, fmt.Sprintf("%q", s.Dir), "a directory")
}

// explainOpen types the errors of opening path, which messages call what.
func explainOpen(err error, path, what, want string) error {
	switch {
	case errors.Is(err, unix.ENOENT):
		return &MissingError{What: what}
	case errors.Is(err, unix.ELOOP):
		return &ForeignError{What: what, Want: want, Got: "a symbolic link"}
	case errors.Is(err, unix.EXDEV):
		return &ForeignError{What: what, Want: want, Got: "a mount point"}
	case errors.Is(err, unix.ENOTDIR), errors.Is(err, unix.EISDIR):
		return &ForeignError{What: what, Want: want, Got: kind(path)}
	}
	return err
}

// kind says what is at path, for a message.
func kind(path string) string {
	var st unix.Stat_t
	if err := unix.Lstat(path, &st); err != nil {
		return "something else"
	}
	return kindOf(st.Mode)
}

func kindOf(mode uint32) string {
	switch mode & unix.S_IFMT {
	case unix.S_IFREG:
		return "a regular file"
	case unix.S_IFDIR:
		return "a directory"
	case unix.S_IFLNK:
		return "a symbolic link"
	}
	return "a special file"
}

// checkPolicy holds the kernel's policy of dir against the one we made.
func checkPolicy(k kernel, dir *os.File, path, descriptor string) error {
	what := fmt.Sprintf("policy of %q", path)
	p, err := k.policy(int(dir.Fd()))
	switch {
	case errors.Is(err, unix.ENODATA), errors.Is(err, unix.ENOTTY), errors.Is(err, unix.EOPNOTSUPP):
		return &ForeignError{What: what, Want: descriptor, Got: "none"}
	case err != nil:
		return step("read the policy of", path, err)
	case p.Descriptor != descriptor:
		return &ForeignError{What: what, Want: descriptor, Got: p.Descriptor}
	case p.Options != ourOptions:
		return &ForeignError{What: "options of the " + what, Want: fmt.Sprint(ourOptions), Got: fmt.Sprint(p.Options)}
	}
	return nil
}

// mountID says in which mount fd is (statx(2), Linux 5.8).
func mountID(fd int) (uint64, error) {
	var st unix.Statx_t
	if err := unix.Statx(fd, "", unix.AT_EMPTY_PATH|unix.AT_STATX_DONT_SYNC, unix.STATX_MNT_ID, &st); err != nil {
		return 0, err
	}
	return st.Mnt_id, nil
}

// isMountRoot says whether something is mounted right at path; no if there is no
// such path.
func isMountRoot(path string) (bool, error) {
	var st unix.Statx_t
	err := unix.Statx(unix.AT_FDCWD, path, unix.AT_SYMLINK_NOFOLLOW|unix.AT_NO_AUTOMOUNT|unix.AT_STATX_DONT_SYNC, unix.STATX_TYPE, &st)
	switch {
	case errors.Is(err, unix.ENOENT):
		return false, nil
	case err != nil:
		return false, &os.PathError{Op: "statx", Path: path, Err: err}
	case st.Attributes_mask&unix.STATX_ATTR_MOUNT_ROOT == 0: // before Linux 5.8: a guess would be a lie
		return false, &os.PathError{Op: "statx", Path: path, Err: unix.ENOSYS}
	}
	return st.Attributes&unix.STATX_ATTR_MOUNT_ROOT != 0, nil
}

// mountOf finds the mount in which fd is, as a row of the mount table.
func mountOf(f *os.File) (*mountinfo.Info, error) {
	id, err := mountID(int(f.Fd()))
	if err != nil {
		return nil, &os.PathError{Op: "statx", Path: f.Name(), Err: err}
	}
	rows, err := mountinfo.GetMounts(func(m *mountinfo.Info) (skip, stop bool) { return uint64(m.ID) != id, false })
	if err != nil {
		return nil, err
	}
	if len(rows) == 0 {
		return nil, &MissingError{What: fmt.Sprintf("the mount of %q in the mount table", f.Name())}
	}
	return rows[0], nil
}

// filesystemOf describes the filesystem of f the way fscrypt's packages want
// it: by a mount of its root, where .fscrypt lies. fscrypt's own search calls
// stat(2) on every mount point of the machine, and a hung NFS server or another
// user's FUSE filesystem would hang us with it; ours looks only at mounts of the
// same device. It is asked when the root is mounted nowhere (in a container), so
// that both always agree on where the metadata is.
func filesystemOf(f *os.File) (*filesystem.Mount, error) {
	var st unix.Stat_t
	if err := unix.Fstat(int(f.Fd()), &st); err != nil {
		return nil, &os.PathError{Op: "fstat", Path: f.Name(), Err: err}
	}
	major, minor := int(unix.Major(st.Dev)), int(unix.Minor(st.Dev))
	rows, err := mountinfo.GetMounts(func(m *mountinfo.Info) (skip, stop bool) {
		return m.Major != major || m.Minor != minor || m.Root != "/", false
	})
	if err != nil {
		return nil, err
	}
	for _, m := range rows {
		if !visible(m) {
			continue
		}
		return &filesystem.Mount{
			Path: m.Mountpoint, FilesystemType: m.FSType, Device: deviceOf(m), Subtree: "/",
			DeviceNumber: filesystem.DeviceNumber(st.Dev),
		}, nil
	}
	if err := filesystem.UpdateMountInfo(); err != nil {
		return nil, err
	}
	m, err := filesystem.FindMount(f.Name())
	if err != nil {
		return nil, err
	}
	if uint64(m.DeviceNumber) != st.Dev {
		return nil, &ForeignError{What: fmt.Sprintf("filesystem at %q", m.Path), Want: fmt.Sprint(filesystem.DeviceNumber(st.Dev)), Got: m.DeviceNumber.String()}
	}
	return m, nil
}

// visible says whether the mount is what its mount point leads to, and not
// hidden beneath another.
func visible(m *mountinfo.Info) bool {
	fd, err := unix.Open(m.Mountpoint, unix.O_PATH|unix.O_DIRECTORY|unix.O_NOFOLLOW|unix.O_CLOEXEC, 0)
	if err != nil {
		return false
	}
	defer unix.Close(fd)
	id, err := mountID(fd)
	return err == nil && id == uint64(m.ID)
}

// deviceOf names the block device of a mount, "" if it has none. The number
// leads to the real name where the table says /dev/root.
func deviceOf(m *mountinfo.Info) string {
	if to, err := os.Readlink(fmt.Sprintf("/sys/dev/block/%d:%d", m.Major, m.Minor)); err == nil {
		return "/dev/" + filepath.Base(to)
	}
	if filepath.IsAbs(m.Source) {
		return m.Source
	}
	return ""
}
