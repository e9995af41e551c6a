package volume

import (
	"context"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"strings"

	"golang.org/x/sys/unix"
)

// createFSImage makes Spec.FSImage, an ext4 with the encrypt feature. The file
// gets its name only when it is complete (O_TMPFILE, linkat(2)), so whoever
// finds it can tell by its UUID whose it is. Where the filesystem has no
// O_TMPFILE it is made under its name, and a killed Create may leave a file
// that Cleanup does not dare to remove.
func createFSImage(ctx context.Context, s Spec, protector string) error {
	what := fmt.Sprintf("image file %q", s.FSImage)
	if _, err := os.Lstat(s.FSImage); err == nil {
		return &ExistsError{What: what}
	}
	dir, err := os.OpenFile(filepath.Dir(s.FSImage), unix.O_DIRECTORY|unix.O_CLOEXEC, 0)
	if err != nil {
		return err
	}
	defer dir.Close()
	// A sparse file may outgrow the disk, but then the loop device turns "no
	// space" into an I/O error deep inside; say it while it can still be said.
	var fs unix.Statfs_t
	if err := unix.Fstatfs(int(dir.Fd()), &fs); err == nil && int64(fs.Bavail)*fs.Bsize < MinSize {
		return step("make image file", s.FSImage, unix.ENOSPC)
	}
	base := filepath.Base(s.FSImage)
	named := false
	fd, err := unix.Openat(int(dir.Fd()), ".", unix.O_TMPFILE|unix.O_RDWR|unix.O_CLOEXEC, 0o600)
	if errors.Is(err, unix.EOPNOTSUPP) || errors.Is(err, unix.EISDIR) {
		named = true
		fd, err = unix.Openat(int(dir.Fd()), base, unix.O_CREAT|unix.O_EXCL|unix.O_NOFOLLOW|unix.O_RDWR|unix.O_CLOEXEC, 0o600)
	}
	if errors.Is(err, unix.EEXIST) {
		return &ExistsError{What: what}
	}
	if err != nil {
		return &os.PathError{Op: "create", Path: s.FSImage, Err: err}
	}
	f := os.NewFile(uintptr(fd), s.FSImage)
	defer f.Close()
	err = newImage(ctx, f, s.Size+overhead(s.Size), s.Preallocate,
		"-O", features+",encrypt", "-L", fsLabel, "-U", dashed(fsUUID(protector)))
	if err == nil && !named {
		crash("volume.create.fsimage.link")
		err = unix.Linkat(unix.AT_FDCWD, procFD(fd), int(dir.Fd()), base, unix.AT_SYMLINK_FOLLOW)
		if errors.Is(err, unix.EEXIST) {
			return &ExistsError{What: what}
		}
		named = err == nil
	}
	if err == nil {
		err = dir.Sync()
	}
	if err != nil && named {
		err = errors.Join(err, unix.Unlinkat(int(dir.Fd()), base, 0))
	}
	return step("make image file", s.FSImage, err)
}

// openFSImage opens the image file and sees that it is ours: a regular file
// that nobody but root can have written to (root is about to mount it), with
// the UUID that belongs to the protector.
func openFSImage(s Spec, protector string) (*os.File, error) {
	what := fmt.Sprintf("image file %q", s.FSImage)
	f, err := os.OpenFile(s.FSImage, unix.O_RDWR|unix.O_NOFOLLOW|unix.O_NONBLOCK|unix.O_CLOEXEC, 0)
	if err != nil {
		return nil, explainOpen(err, s.FSImage, what, "a regular file")
	}
	err = func() error {
		var st unix.Stat_t
		if err := unix.Fstat(int(f.Fd()), &st); err != nil {
			return err
		}
		if st.Mode&unix.S_IFMT != unix.S_IFREG {
			return &ForeignError{What: what, Want: "a regular file", Got: kindOf(st.Mode)}
		}
		if st.Uid != 0 || st.Mode&0o022 != 0 {
			return &ForeignError{What: what, Want: "owned and writable by root alone", Got: fmt.Sprintf("owned by %d, mode %o", st.Uid, st.Mode&0o7777)}
		}
		sb, err := readSuperblock(f)
		if err != nil {
			return &DamagedError{What: what, Err: err}
		}
		if want := fsUUID(protector); sb.UUID != want {
			return &ForeignError{What: "filesystem in " + what, Want: dashed(want), Got: dashed(sb.UUID)}
		}
		return nil
	}()
	if err != nil {
		f.Close()
		return nil, err
	}
	return f, nil
}

// attachFS mounts FSImage at FSMount and says whether it was it that did. An
// image that is attached in some other namespace is a *BusyError: two loop
// devices over one ext4 would destroy it.
func attachFS(ctx context.Context, s Spec, protector string) (mounted bool, err error) {
	if s.FSImage == "" {
		return false, nil
	}
	f, err := openFSImage(s, protector)
	if err != nil {
		return false, err
	}
	defer f.Close()
	if _, on, err := s.fsMounted(); on || err != nil {
		return false, err
	}
	var st unix.Stat_t
	if err := unix.Fstat(int(f.Fd()), &st); err != nil {
		return false, err
	}
	if err := unattached(ctx, map[fileKey]bool{keyOf(&st): true}); err != nil {
		return false, err
	}
	target, made, err := mountpoint(s.FSMount)
	if err != nil {
		return false, err
	}
	defer target.Close()
	if err := mountImage(ctx, f, target); err != nil {
		if made {
			err = errors.Join(err, os.Remove(s.FSMount))
		}
		return false, err
	}
	return true, nil
}

// fsMounted says whether FSImage is mounted at FSMount, and names the file that
// is. Anything else mounted there is a *ForeignError.
func (s Spec) fsMounted() (fileKey, bool, error) {
	on, err := isMountRoot(s.FSMount)
	if !on || err != nil {
		return fileKey{}, false, err
	}
	foreign := func(got string) error {
		return &ForeignError{What: fmt.Sprintf("filesystem at %q", s.FSMount), Want: fmt.Sprintf("image file %q", s.FSImage), Got: got}
	}
	var at, img unix.Stat_t
	if err := unix.Lstat(s.FSMount, &at); err != nil {
		return fileKey{}, false, err
	}
	to, err := os.Readlink(fmt.Sprintf("/sys/dev/block/%d:%d", unix.Major(at.Dev), unix.Minor(at.Dev)))
	dev := filepath.Base(to)
	if err != nil || !strings.HasPrefix(dev, "loop") {
		return fileKey{}, false, foreign("not on a loop device")
	}
	key, _, err := loopBacking("/dev/" + dev)
	if err != nil {
		return fileKey{}, false, fmt.Errorf("ask /dev/%s for its backing file: %w", dev, err)
	}
	err = unix.Lstat(s.FSImage, &img)
	if errors.Is(err, unix.ENOENT) {
		// Somebody removed the file while in use. It must still be possible to
		// lock, so go by the name that the kernel remembers.
		name, _ := os.ReadFile(filepath.Join("/sys/block", dev, "loop/backing_file"))
		if strings.TrimSpace(string(name)) == s.FSImage+" (deleted)" {
			return key, true, nil
		}
	}
	if err != nil || keyOf(&img) != key {
		return fileKey{}, false, foreign("/dev/" + dev)
	}
	return key, true, nil
}

// DetachFS unmounts FSImage and waits until its loop device is gone in every
// namespace; then, and not before, the file is closed. Of a volume without
// FSImage, and of one already detached, it is a no-op. Still in use is a
// *BusyError, also when ctx ends first.
func DetachFS(ctx context.Context, s Spec) error {
	if err := s.check(false); err != nil || s.FSImage == "" {
		return err
	}
	key, on, err := s.fsMounted()
	if err != nil {
		return err
	}
	if on {
		if err := Unmount(s.FSMount); err != nil {
			return err
		}
	} else {
		var st unix.Stat_t
		if err := unix.Lstat(s.FSImage, &st); err != nil {
			return nil
		}
		key = keyOf(&st)
	}
	return noLoops(ctx, map[fileKey]bool{key: true})
}

// mountpoint opens the directory at path, which it makes (0700) if only the last
// element is missing, and refuses one that has something mounted on it.
func mountpoint(path string) (f *os.File, made bool, err error) {
	if err := os.Mkdir(path, 0o700); err == nil {
		made = true
	} else if !errors.Is(err, os.ErrExist) {
		return nil, false, err
	}
	on, err := isMountRoot(path)
	if err != nil {
		return nil, made, err
	}
	if on {
		return nil, made, &ExistsError{What: fmt.Sprintf("a mount at %q", path)}
	}
	f, err = os.OpenFile(path, unix.O_PATH|unix.O_DIRECTORY|unix.O_NOFOLLOW|unix.O_CLOEXEC, 0)
	return f, made, explainOpen(err, path, fmt.Sprintf("mount point %q", path), "a directory")
}

// Unmount unmounts what is mounted at path: really, not lazily, for a lazy
// unmount hides a volume and locks nothing. Nothing mounted there is success.
// In use is a *BusyError.
func Unmount(path string) error {
	on, err := isMountRoot(path)
	if !on || err != nil {
		return err
	}
	crash("volume.unmount")
	err = unix.Unmount(path, unix.UMOUNT_NOFOLLOW)
	if errors.Is(err, unix.EBUSY) {
		return &BusyError{What: fmt.Sprintf("%q", path), Err: err}
	}
	return step("unmount", path, err)
}
