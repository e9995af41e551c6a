package slot

import (
	"errors"
	"fmt"
	"io"
	"io/fs"
	"os"
	"strings"

	"golang.org/x/sys/unix"
)

const (
	setFile    = "set.json"
	newSuffix  = ".new" // of the sibling in which Commit builds the next set
	maxEntries = 1024   // in a set's directory; more is not looked at
)

const dirFlags = unix.O_RDONLY | unix.O_DIRECTORY | unix.O_NOFOLLOW | unix.O_CLOEXEC

var errNotRegular = errors.New(NotRegular)

// openDir opens name below the directory at, never through a symbolic link.
func openDir(at int, name string) (*os.File, error) {
	fd, err := unix.Openat(at, name, dirFlags, 0)
	if err != nil {
		return nil, &fs.PathError{Op: "open directory", Path: name, Err: err}
	}
	return os.NewFile(uintptr(fd), name), nil
}

// openLocked opens the directory name with a flock(2) on it, and makes sure that
// the name still means the locked directory: it may have been exchanged while we
// waited.
func openLocked(at int, name string, how int) (*os.File, error) {
	for {
		d, err := openDir(at, name)
		if err != nil {
			return nil, err
		}
		if err := flock(d, how); err != nil {
			d.Close()
			return nil, &fs.PathError{Op: "lock", Path: name, Err: err}
		}
		var here, there unix.Stat_t
		if err := unix.Fstat(int(d.Fd()), &here); err != nil {
			d.Close()
			return nil, &fs.PathError{Op: "stat", Path: name, Err: err}
		}
		err = unix.Fstatat(at, name, &there, unix.AT_SYMLINK_NOFOLLOW)
		if err == nil && here.Dev == there.Dev && here.Ino == there.Ino {
			return d, nil
		}
		d.Close()
		if err != nil {
			return nil, &fs.PathError{Op: "stat", Path: name, Err: err}
		}
	}
}

func flock(d *os.File, how int) error {
	for {
		if err := unix.Flock(int(d.Fd()), how); err != unix.EINTR {
			return err
		}
	}
}

// entries lists the directory, at most maxEntries names.
func entries(d *os.File) ([]string, error) {
	if _, err := d.Seek(0, io.SeekStart); err != nil {
		return nil, err
	}
	names, err := d.Readdirnames(maxEntries + 1)
	if err != nil && !errors.Is(err, io.EOF) {
		return nil, err
	}
	if len(names) > maxEntries {
		return nil, &TamperError{File: names[maxEntries], Reason: Planted}
	}
	return names, nil
}

// readAt reads one regular file of at most max bytes. What it is is asked before
// it is opened, since opening a device can have an effect, and again after, since
// only that answer is about the thing read. Other kinds are errNotRegular.
func readAt(d *os.File, name string, max int) ([]byte, error) {
	var st unix.Stat_t
	if err := unix.Fstatat(int(d.Fd()), name, &st, unix.AT_SYMLINK_NOFOLLOW); err != nil {
		return nil, err
	}
	if st.Mode&unix.S_IFMT != unix.S_IFREG {
		return nil, errNotRegular
	}
	fd, err := unix.Openat(int(d.Fd()), name, unix.O_RDONLY|unix.O_NOFOLLOW|unix.O_NONBLOCK|unix.O_NOCTTY|unix.O_CLOEXEC, 0)
	if err == unix.ELOOP {
		return nil, errNotRegular
	}
	if err != nil {
		return nil, err
	}
	f := os.NewFile(uintptr(fd), name)
	defer f.Close()
	if err := unix.Fstat(fd, &st); err != nil {
		return nil, err
	}
	if st.Mode&unix.S_IFMT != unix.S_IFREG {
		return nil, errNotRegular
	}
	if st.Size > int64(max) {
		return nil, errTooLarge
	}
	b, err := io.ReadAll(io.LimitReader(f, int64(max)+1))
	if err != nil {
		return nil, err
	}
	if len(b) > max {
		return nil, errTooLarge
	}
	return b, nil
}

var errTooLarge = errors.New(TooLarge)

// finding turns an error of readAt into one.
func finding(slot, file string, err error) *TamperError {
	e := &TamperError{Slot: slot, File: file}
	switch {
	case errors.Is(err, fs.ErrNotExist):
		e.Reason = Removed
	case errors.Is(err, errNotRegular):
		e.Reason = NotRegular
	case errors.Is(err, errTooLarge):
		e.Reason = TooLarge
	default:
		e.Reason, e.Err = Unreadable, err
	}
	return e
}

// ours says whether a file of this name can belong to a set.
func ours(file string) bool {
	name, ok := strings.CutSuffix(file, suffix)
	return file == setFile || ok && CheckName(name) == nil
}

// removable says whether remove would empty the directory: it holds nothing but
// files that can belong to a set.
func removable(d *os.File) error {
	names, err := entries(d)
	if err != nil {
		return err
	}
	for _, name := range names {
		var st unix.Stat_t
		if err := unix.Fstatat(int(d.Fd()), name, &st, unix.AT_SYMLINK_NOFOLLOW); err != nil {
			return &fs.PathError{Op: "stat", Path: name, Err: err}
		}
		if !ours(name) || st.Mode&unix.S_IFMT == unix.S_IFDIR {
			return &TamperError{File: name, Reason: Planted}
		}
	}
	return nil
}

// empty unlinks the files of a set one by one, by name. It touches nothing unless
// it can unlink everything, and never descends.
func empty(d *os.File) error {
	if err := removable(d); err != nil {
		return err
	}
	names, err := entries(d)
	if err != nil {
		return err
	}
	for _, name := range names {
		step("slot: unlink " + name)
		if err := unix.Unlinkat(int(d.Fd()), name, 0); err != nil {
			return &fs.PathError{Op: "unlink", Path: name, Err: err}
		}
	}
	return nil
}

// remove empties d, which is at/name, and removes it.
func remove(at int, name string, d *os.File) error {
	if err := empty(d); err != nil {
		return err
	}
	step("slot: rmdir")
	if err := unix.Unlinkat(at, name, unix.AT_REMOVEDIR); err != nil {
		return &fs.PathError{Op: "rmdir", Path: name, Err: err}
	}
	return nil
}

// write creates one file durably; it must not exist.
func write(d *os.File, name string, content []byte) error {
	step("slot: create " + name)
	fd, err := unix.Openat(int(d.Fd()), name, unix.O_WRONLY|unix.O_CREAT|unix.O_EXCL|unix.O_NOFOLLOW|unix.O_CLOEXEC, 0o600)
	if err != nil {
		return &fs.PathError{Op: "create", Path: name, Err: err}
	}
	f := os.NewFile(uintptr(fd), name)
	defer f.Close()
	step("slot: write " + name)
	if _, err := f.Write(content); err != nil {
		return fmt.Errorf("write %q: %w", name, err)
	}
	step("slot: fsync " + name)
	if err := f.Sync(); err != nil {
		return fmt.Errorf("sync %q: %w", name, err)
	}
	return f.Close()
}
