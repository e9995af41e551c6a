package keep

import (
	"context"
	"errors"
	"os"
	"path/filepath"

	"golang.org/x/sys/unix"

	"overkeep/crypt/crashpoint"
	"overkeep/crypt/slot"
	"overkeep/crypt/strictjson"
	"overkeep/crypt/volume"
	"overkeep/overlay/layout"
	"overkeep/overlay/pins"
	"overkeep/overlay/view"
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
		// An interrupted lock, or sessions that outlive it, leave a namespace. It is
		// not for another keep of this name, who may be somebody else's.
		crashpoint.At("destroy.unpin")
		if err := view.Unpin(k.NamespaceDir()); err != nil {
			return classified(err)
		}
	case errors.As(err, &e) && e.Code == CodeNoKeep:
		if _, serr := os.Lstat(k.StateDir()); serr != nil && !resumed {
			return err
		} else if serr != nil {
			return classified(errors.Join(unpinAll(ctx, k), syncDir(layout.StateRoot(k.Root))))
		}
	default:
		// A damaged header does not keep a keep alive that its owner wants gone; but
		// an open one is not pulled away.
		ns, nerr := existingNamespace(k)
		if ns != nil {
			ns.Close()
		}
		if ns != nil || nerr != nil || supervisorPID(k) != 0 {
			return errorf(CodeUnlocked, name, "keep %q is open, and its header is damaged: %w", name, err)
		}
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
// needs no key and takes whatever is there, complete or not; a killed one is
// finished by the next.
func opDestroy(ctx context.Context, c *call) (any, error) {
	dir := c.StateDir
	spec := volume.Spec{Backend: volume.Image, Dir: filepath.Join(dir, "volume")}
	if c.Header != nil {
		spec = c.spec()
	}
	remove, err := c.planDestroy(ctx, spec)
	if err != nil {
		return nil, err
	}
	for _, d := range []string{c.slotsDir(), c.slotsDir() + ".new"} {
		if err := shredDir(d); err != nil {
			return nil, err
		}
	}
	crashpoint.At("destroy.volume")
	if err := remove(); err != nil {
		return nil, err
	}
	crashpoint.At("destroy.files")
	// The header last: without it nobody knows of a file elsewhere.
	for _, f := range []string{"protector", "volume", destroyNote, "keep.json"} {
		if err := removeIfThere(filepath.Join(dir, f)); err != nil {
			return nil, err
		}
	}
	sweepTemps(dir)
	return nil, os.Remove(dir)
}

// destroyNote keeps the names of the volume's fscrypt objects from the moment the
// slots go, which else told them, to the end.
const destroyNote = "destroying"

// planDestroy finds out how the volume goes, before anything does.
func (c *call) planDestroy(ctx context.Context, spec volume.Spec) (remove func() error, err error) {
	at := func(f string) string { return filepath.Join(c.StateDir, f) }
	if spec.FSImage != "" {
		if _, err := os.Lstat(spec.FSImage); err != nil { // never made, or gone
			return func() error { return nil }, nil
		}
	}
	// Of a keep that init has not finished, only the protector is known for sure.
	if b, err := readSmall(at("protector"), 64); err == nil {
		return func() error { return volume.Cleanup(ctx, spec, string(b)) }, nil
	}
	var id volume.ID
	if b, err := readSmall(at(destroyNote), 1<<10); err == nil {
		if err := strictjson.Decode(b, &id); err != nil {
			return nil, errorf(CodeDamaged, c.Name, "note %q: %w", at(destroyNote), err)
		}
	} else if set, _, err := slot.Load(c.slotsDir()); err == nil {
		id = volumeID(set)
		crashpoint.At("destroy.note")
		if err := writeFile(at(destroyNote), encode(id), 0o600); err != nil {
			return nil, err
		}
	}
	if id == (volume.ID{}) {
		return func() error { return nil }, nil
	}
	return func() error { return volume.Destroy(ctx, spec, id) }, nil
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
