package volume

import (
	"errors"
	"os"

	"golang.org/x/sys/unix"
)

// Sizes is what a status shows, in bytes; 0 where it is not known. What is read
// without the key is what anybody with the disk can read.
type Sizes struct {
	Image, ImageAllocated     int64  // inner image: size, and blocks taken
	FSImage, FSImageAllocated int64  // Spec.FSImage likewise
	Total, Free               int64  // of the filesystem mounted at the given path
	Files, FilesFree          uint64 // inodes of it
}

// Usage collects the sizes of a volume. at is where Open mounted it; "", or
// nothing mounted there, leaves Total, Free and the files at 0. Of a Dir, Total
// and Free are those of the whole filesystem it lies on.
func Usage(s Spec, at string) (Sizes, error) {
	var u Sizes
	if err := s.check(false); err != nil {
		return u, err
	}
	var st unix.Stat_t
	if s.FSImage != "" && unix.Lstat(s.FSImage, &st) == nil {
		u.FSImage, u.FSImageAllocated = st.Size, st.Blocks*512
	}
	if s.Backend == Image {
		if err := s.imageSize(&u); err != nil {
			return u, err
		}
	}
	if at == "" {
		return u, nil
	}
	on, err := isMountRoot(at)
	if !on || err != nil {
		return u, err
	}
	var fs unix.Statfs_t
	if err := unix.Statfs(at, &fs); err != nil {
		return u, &os.PathError{Op: "statfs", Path: at, Err: err}
	}
	u.Total, u.Free = int64(fs.Blocks)*fs.Frsize, int64(fs.Bavail)*fs.Frsize
	u.Files, u.FilesFree = fs.Files, fs.Ffree
	return u, nil
}

// imageSize reads the size of the one file in the directory, under whatever
// name it is listed.
func (s Spec) imageSize(u *Sizes) error {
	parent, err := s.openParent()
	if gone := (*NotMountedError)(nil); errors.As(err, &gone) {
		return nil
	} else if err != nil {
		return err
	}
	defer parent.Close()
	d, err := s.openDir(parent)
	if err != nil {
		return err
	}
	defer d.Close()
	names, err := d.Readdirnames(-1)
	if err != nil {
		return err
	}
	for _, n := range names {
		var st unix.Stat_t
		if err := unix.Fstatat(int(d.Fd()), n, &st, unix.AT_SYMLINK_NOFOLLOW); err == nil && st.Mode&unix.S_IFMT == unix.S_IFREG {
			u.Image += st.Size
			u.ImageAllocated += st.Blocks * 512
		}
	}
	return nil
}
