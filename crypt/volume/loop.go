package volume

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"time"

	"golang.org/x/sys/unix"
)

// LoopDevice is a loop device whose backing file is ours.
type LoopDevice struct {
	Path string // "/dev/loopN"
	// Backing is the name of the backing file as the kernel has it; it is a path
	// of the namespace where the device was set up.
	Backing string
	// Autoclear says that the device goes with its last user. Ours do; a device
	// without it was set up by somebody else.
	Autoclear bool
	// Outer says that the backing file is Spec.FSImage, not the inner image.
	Outer bool
}

// fileKey names a file: device and inode, as stat(2) and loop(4) have them.
type fileKey struct{ dev, ino uint64 }

func keyOf(st *unix.Stat_t) fileKey { return fileKey{st.Dev, st.Ino} }

// LoopDevices lists the loop devices that have FSImage or the inner image as
// backing file, whoever set them up and in whatever namespace. It works without
// the key. Of an FSImage that is not mounted here, the inner image cannot be
// seen; then the device of FSImage itself speaks for both.
func LoopDevices(s Spec) ([]LoopDevice, error) {
	if err := s.check(false); err != nil {
		return nil, err
	}
	inner, outer := map[fileKey]bool{}, map[fileKey]bool{}
	var st unix.Stat_t
	if s.FSImage != "" && unix.Lstat(s.FSImage, &st) == nil {
		outer[keyOf(&st)] = true
	}
	if s.Backend == Image {
		if err := s.innerKeys(inner); err != nil {
			return nil, err
		}
	}
	return loopsOf(inner, outer)
}

// innerKeys collects what lies in the directory: with or without the key, the
// entries have the same inodes.
func (s Spec) innerKeys(into map[fileKey]bool) error {
	parent, err := s.openParent()
	if gone := (*NotMountedError)(nil); errors.As(err, &gone) || errors.Is(err, os.ErrNotExist) {
		return nil
	} else if err != nil {
		return err
	}
	defer parent.Close()
	d, err := s.openDir(parent)
	if gone := (*MissingError)(nil); errors.As(err, &gone) {
		return nil
	} else if err != nil {
		return err
	}
	defer d.Close()
	names, err := d.Readdirnames(-1)
	if err != nil {
		return err
	}
	for _, n := range names {
		var st unix.Stat_t
		if err := unix.Fstatat(int(d.Fd()), n, &st, unix.AT_SYMLINK_NOFOLLOW); err == nil {
			into[keyOf(&st)] = true
		}
	}
	return nil
}

// loopsOf finds the loop devices over the given files. Only attached devices
// have /sys/block/loopN/loop.
func loopsOf(inner, outer map[fileKey]bool) ([]LoopDevice, error) {
	dirs, err := filepath.Glob("/sys/block/loop*/loop")
	if err != nil {
		return nil, err
	}
	var found []LoopDevice
	for _, d := range dirs {
		dev := "/dev/" + filepath.Base(filepath.Dir(d))
		key, auto, err := loopBacking(dev)
		if errors.Is(err, unix.ENXIO) || errors.Is(err, os.ErrNotExist) {
			continue // detached while we looked
		}
		if err != nil {
			return nil, fmt.Errorf("ask %s for its backing file: %w", dev, err)
		}
		if inner[key] || outer[key] {
			name, _ := os.ReadFile(filepath.Join(d, "backing_file"))
			found = append(found, LoopDevice{Path: dev, Backing: string(bytes.TrimSpace(name)), Autoclear: auto, Outer: outer[key]})
		}
	}
	return found, nil
}

func loopBacking(dev string) (fileKey, bool, error) {
	fd, err := unix.Open(dev, unix.O_RDONLY|unix.O_CLOEXEC|unix.O_NONBLOCK, 0)
	if err != nil {
		return fileKey{}, false, err
	}
	defer unix.Close(fd)
	info, err := unix.IoctlLoopGetStatus64(fd)
	if err != nil {
		return fileKey{}, false, err
	}
	return fileKey{info.Device, info.Inode}, info.Flags&unix.LO_FLAGS_AUTOCLEAR != 0, nil
}

// attachLoop makes a loop device over f. It lives as long as the returned file
// or a mount of it (LO_FLAGS_AUTOCLEAR), so nothing is left when we are killed.
// Direct I/O stays off: encrypted files do not offer it without inline
// encryption hardware. LOOP_CONFIGURE sets all at once (Linux 5.8).
func attachLoop(f *os.File) (*os.File, error) {
	ctl, err := os.OpenFile("/dev/loop-control", unix.O_RDWR|unix.O_CLOEXEC, 0)
	if err != nil {
		return nil, err
	}
	defer ctl.Close()
	for range 64 { // another process may take the free device first
		n, err := unix.IoctlRetInt(int(ctl.Fd()), unix.LOOP_CTL_GET_FREE)
		if err != nil {
			return nil, fmt.Errorf("find a free loop device: %w", err)
		}
		dev, err := os.OpenFile("/dev/loop"+strconv.Itoa(n), unix.O_RDWR|unix.O_CLOEXEC, 0)
		if err != nil {
			return nil, err
		}
		c := unix.LoopConfig{Fd: uint32(f.Fd())}
		c.Info.Flags = unix.LO_FLAGS_AUTOCLEAR
		err = unix.IoctlLoopConfigure(int(dev.Fd()), &c)
		if err == nil {
			return dev, nil
		}
		dev.Close()
		if !errors.Is(err, unix.EBUSY) {
			return nil, fmt.Errorf("attach %q to %s: %w", f.Name(), dev.Name(), err)
		}
	}
	return nil, &BusyError{What: "every free loop device", Err: unix.EBUSY}
}

// poll calls done until it says true, fails or ctx ends. The pauses grow from 2
// to 100 ms; the kernel has no event to wait for.
func poll(ctx context.Context, done func() (bool, error)) error {
	for pause := 2 * time.Millisecond; ; pause = min(2*pause, 100*time.Millisecond) {
		if ok, err := done(); ok || err != nil {
			return err
		}
		select {
		case <-ctx.Done():
			return ctx.Err()
		case <-time.After(pause):
		}
	}
}

// noLoops waits until no loop device is left over the files: the kernel takes a
// device down with its last user, and udev may still be looking at it. When ctx
// ends first, that is a *BusyError.
func noLoops(ctx context.Context, files map[fileKey]bool) error {
	var left []LoopDevice
	err := poll(ctx, func() (bool, error) {
		var err error
		left, err = loopsOf(files, nil)
		return len(left) == 0, err
	})
	if err != nil && len(left) > 0 {
		return busyLoops(left, err)
	}
	return err
}

func busyLoops(loops []LoopDevice, err error) error {
	var names []string
	for _, l := range loops {
		names = append(names, l.Path)
	}
	return &BusyError{What: fmt.Sprintf("%q on %s", loops[0].Backing, strings.Join(names, ", ")), Err: err}
}

// unattached waits a moment for a device that is just going away over the
// files, but not for one that will stay.
func unattached(ctx context.Context, files map[fileKey]bool) error {
	loops, err := loopsOf(files, nil)
	if err != nil {
		return err
	}
	if slices.ContainsFunc(loops, func(l LoopDevice) bool { return !l.Autoclear }) {
		return busyLoops(loops, nil)
	}
	ctx, cancel := context.WithTimeout(ctx, graceLoop)
	defer cancel()
	return noLoops(ctx, files)
}
