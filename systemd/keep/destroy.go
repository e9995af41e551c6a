package keep

import (
	"context"
	"errors"
	"os"
	"path/filepath"

	"golang.org/x/sys/unix"

	"overkeep/crypt/crashpoint"
	"overkeep/crypt/slot"
	"overkeep/crypt/volume"
	"overkeep/overlay/layout"
	"overkeep/overlay/pins"
)

// Destroying is where a keep lies while it is being destroyed.
func destroying(k layout.Keep) string {
	return filepath.Join(layout.StateRoot(k.Root), ".destroy-"+k.Name)
}

// Destroy ends a locked keep: its slots first, so that nothing opens it any more,
// then the volume, its fscrypt metadata and its pins. An interrupted Destroy is
// finished by calling it again.
//
// The slots are overwritten before they are unlinked; that speaks for the file
// system's blocks and not for the cells of a flash device.
func (m *Manager) Destroy(ctx context.Context, name string) error {
	if err := requireRoot(); err != nil {
		return err
	}
	k, err := layout.New(m.Root, name)
	if err != nil {
		return classified(err)
	}
	release, err := runLock(k)
	if err != nil {
		return err
	}
	defer release()
	_, lerr := os.Lstat(destroying(k))
	resumed := lerr == nil
	if err := m.discard(ctx, k, destroying(k)); err != nil {
		return err
	}
	kk, err := m.Open(name)
	var e *Error
	switch {
	case err == nil:
		st, err := kk.state(ctx)
		if err != nil {
			return err
		}
		if st.State != Locked {
			return errorf(CodeUnlocked, name, "keep %q is %s; lock it first", name, st.State)
		}
	case errors.As(err, &e) && e.Code == CodeNoKeep:
		if _, serr := os.Lstat(k.StateDir()); serr != nil && !resumed {
			return err
		} else if serr != nil {
			return classified(errors.Join(unpinAll(ctx, k), syncDir(layout.StateRoot(k.Root))))
		}
	default:
		// A damaged header does not keep a keep alive that its owner wants gone.
	}
	crashpoint.At("destroy.rename")
	if err := os.Rename(k.StateDir(), destroying(k)); err != nil {
		return classified(err)
	}
	if err := m.discard(ctx, k, destroying(k)); err != nil {
		return err
	}
	if err := unpinAll(ctx, k); err != nil {
		return classified(err)
	}
	return classified(syncDir(layout.StateRoot(k.Root)))
}

// unpinAll gives the keep's pins back to the system's collector.
func unpinAll(ctx context.Context, k layout.Keep) error {
	if _, err := os.Lstat(k.Pins()); errors.Is(err, os.ErrNotExist) {
		return nil
	}
	if _, err := (pins.Dir{Path: k.Pins()}).Sync(ctx, nil); err != nil {
		return err
	}
	_ = os.Remove(k.Pins())
	return nil
}

// opDestroy removes a keep's directory and everything that belongs to it. It
// needs no key and takes whatever is there, complete or not.
func opDestroy(ctx context.Context, c *call) (any, error) {
	dir := c.StateDir
	set, _, err := slot.Load(c.slotsDir())
	if err != nil {
		set = nil
	}
	if err := shredDir(c.slotsDir()); err != nil {
		return nil, err
	}
	for _, leftover := range []string{c.slotsDir() + ".new"} {
		if err := shredDir(leftover); err != nil {
			return nil, err
		}
	}
	spec := volume.Spec{Backend: volume.Image, Dir: filepath.Join(dir, "volume")}
	if c.Header != nil {
		spec = c.spec()
	}
	crashpoint.At("destroy.volume")
	if spec.FSImage != "" {
		if _, lerr := os.Lstat(spec.FSImage); lerr != nil {
			spec = volume.Spec{Backend: spec.Backend, Dir: filepath.Join(dir, "volume")} // never made, or gone
			set = nil
		}
	}
	if set != nil {
		err = volume.Destroy(ctx, spec, volumeID(set))
	} else if b, rerr := readSmall(filepath.Join(dir, "protector"), 64); rerr == nil {
		err = volume.Cleanup(ctx, spec, string(b))
	} else {
		err = nil
	}
	if err != nil {
		return nil, err
	}
	crashpoint.At("destroy.files")
	for _, f := range []string{"keep.json", "protector", "volume"} {
		if err := os.Remove(filepath.Join(dir, f)); err != nil && !errors.Is(err, os.ErrNotExist) {
			return nil, err
		}
	}
	return nil, os.Remove(dir)
}

// shredDir overwrites and unlinks the regular files of a slot directory and
// removes it. A missing one is no error.
func shredDir(dir string) error {
	d, err := os.OpenFile(dir, os.O_RDONLY|unix.O_DIRECTORY|unix.O_NOFOLLOW, 0)
	if errors.Is(err, os.ErrNotExist) {
		return nil
	}
	if err != nil {
		return err
	}
	defer d.Close()
	names, err := d.Readdirnames(-1)
	if err != nil {
		return err
	}
	for _, n := range names {
		fd, err := unix.Openat(int(d.Fd()), n, unix.O_WRONLY|unix.O_NOFOLLOW|unix.O_NONBLOCK|unix.O_CLOEXEC, 0)
		if err == nil {
			f := os.NewFile(uintptr(fd), n)
			if fi, err := f.Stat(); err == nil && fi.Mode().IsRegular() && fi.Size() <= slot.MaxSetSize {
				_, _ = f.WriteAt(make([]byte, fi.Size()), 0)
				_ = f.Sync()
			}
			f.Close()
		}
		crashpoint.At("destroy.slot")
		if err := unix.Unlinkat(int(d.Fd()), n, 0); err != nil {
			return &os.PathError{Op: "unlink", Path: filepath.Join(dir, n), Err: err}
		}
	}
	return os.Remove(dir)
}
