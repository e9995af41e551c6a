package tree

import (
	"context"
	"errors"
	"os"
	"runtime"

	"golang.org/x/sys/unix"
)

// Remove removes the tree name of dir. It makes directories writable for their owner first
// where it must. Links are removed, not followed; a mount point in the tree is ErrMount,
// with a part of the tree possibly gone. A name that does not exist is no error, so it can be
// repeated after a crash at any point.
func Remove(ctx context.Context, dir *os.File, name string) error {
	defer runtime.KeepAlive(dir)
	if err := single(name); err != nil {
		return err
	}
	w := newWalker()
	w.begin(ctx, int(dir.Fd()))
	defer w.src.close()
	if err := w.remove(name, unix.DT_UNKNOWN); err != nil {
		return err
	}
	for len(w.frames) > 0 {
		worked := w.frames[len(w.frames)-1].removed
		name, typ, left, err := w.next()
		if err != nil {
			return err
		}
		if left {
			err = w.removeDir(name, worked)
		} else {
			err = w.remove(name, typ)
		}
		if err != nil {
			return err
		}
	}
	return nil
}

// unlink removes name; errors that say what it is come back bare.
func (w *walker) unlink(name string, flags int) error {
	err := again(func() error { return unix.Unlinkat(w.src.fd(), name, flags) })
	switch {
	case err == nil:
		if len(w.frames) > 0 {
			w.frames[len(w.frames)-1].removed = true
		}
		return nil
	case errors.Is(err, unix.ENOENT):
		return nil
	case errors.Is(err, unix.EISDIR), errors.Is(err, unix.ENOTEMPTY):
		return err
	case errors.Is(err, unix.EBUSY):
		err = ErrMount
	}
	return &Error{"remove", name, true, err}
}

// remove removes name, or enters it if it is a directory.
func (w *walker) remove(name string, typ uint8) error {
	if typ != unix.DT_DIR {
		if err := w.unlink(name, 0); !errors.Is(err, unix.EISDIR) {
			return err
		}
	}
	if err := w.enter(name, false); err != nil {
		if errors.Is(err, unix.ENOENT) {
			return nil
		}
		return err
	}
	var st unix.Stat_t
	err := fstat(w.src.fd(), &st)
	if err == nil && st.Mode&0o700 != 0o700 {
		err = again(func() error { return unix.Fchmod(w.src.fd(), 0o700) })
		if errors.Is(err, unix.EPERM) { // another's: who may remove from it needs no permission
			err = nil
		}
	}
	if err != nil {
		return &Error{"chmod", name, true, err}
	}
	return nil
}

// removeDir removes a directory that was emptied. If it was filled meanwhile, or a listing does
// not show what is added and removed while it is read, another turn is taken, as long as
// turns remove something.
func (w *walker) removeDir(name string, worked bool) error {
	err := w.unlink(name, unix.AT_REMOVEDIR)
	if !errors.Is(err, unix.ENOTEMPTY) {
		return err
	}
	if !worked {
		return &Error{"remove", name, true, err}
	}
	return w.remove(name, unix.DT_DIR)
}
