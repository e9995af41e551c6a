// Package loop attaches files to loop devices for tests.
//
// It promises that a device is released by the kernel once its last user is
// gone (LO_FLAGS_AUTOCLEAR): a filesystem mounted from it, or the returned
// file. A test that is killed therefore leaves no device behind.
//
// Start with Attach; mount Device.Path; then Close. Not for production code:
// it makes device nodes where the machine has none.
package loop

import (
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"strings"

	"golang.org/x/sys/unix"
)

// Device is an attached loop device, held open.
type Device struct {
	Path string // "/dev/loopN"
	f    *os.File
}

// Attach finds a free loop device and attaches the file image to it, read and
// write. It needs root. The device stays until Close and, if it was mounted
// meanwhile, until the last unmount (loop(4), LO_FLAGS_AUTOCLEAR).
func Attach(image string) (*Device, error) {
	img, err := os.OpenFile(image, os.O_RDWR|unix.O_CLOEXEC, 0)
	if err != nil {
		return nil, err
	}
	defer img.Close()
	ctl, err := os.OpenFile("/dev/loop-control", os.O_RDWR|unix.O_CLOEXEC, 0)
	if err != nil {
		return nil, err
	}
	defer ctl.Close()
	var last error
	for range 64 {
		n, err := unix.IoctlRetInt(int(ctl.Fd()), unix.LOOP_CTL_GET_FREE)
		if err != nil {
			return nil, fmt.Errorf("free loop device: %w", err)
		}
		dev, err := open(n)
		if err != nil {
			return nil, err
		}
		cfg := unix.LoopConfig{Fd: uint32(img.Fd())}
		cfg.Info.Flags = unix.LO_FLAGS_AUTOCLEAR
		copy(cfg.Info.File_name[:len(cfg.Info.File_name)-1], image)
		if err := unix.IoctlLoopConfigure(int(dev.Fd()), &cfg); err == nil {
			return &Device{Path: dev.Name(), f: dev}, nil
		} else if last = err; !errors.Is(err, unix.EBUSY) {
			dev.Close()
			break
		}
		dev.Close() // another process took it between the two ioctls
	}
	return nil, fmt.Errorf("attach %q to a loop device: %w", image, last)
}

// open opens /dev/loopN and makes the node where /dev is not a devtmpfs.
func open(n int) (*os.File, error) {
	path := fmt.Sprintf("/dev/loop%d", n)
	f, err := os.OpenFile(path, os.O_RDWR|unix.O_CLOEXEC, 0)
	if !errors.Is(err, os.ErrNotExist) {
		return f, err
	}
	if err := unix.Mknod(path, unix.S_IFBLK|0o600, int(unix.Mkdev(7, uint32(n)))); err != nil && !errors.Is(err, os.ErrExist) {
		return nil, &os.PathError{Op: "mknod", Path: path, Err: err}
	}
	return os.OpenFile(path, os.O_RDWR|unix.O_CLOEXEC, 0)
}

// Close drops our hold. A device that is still mounted lives on until then.
func (d *Device) Close() error { return d.f.Close() }

// Backed lists the loop devices whose backing file lies in dir or is dir
// itself. The kernel appends " (deleted)" to the name of an unlinked file.
func Backed(dir string) ([]string, error) {
	files, err := filepath.Glob("/sys/block/loop*/loop/backing_file")
	if err != nil {
		return nil, err
	}
	var devs []string
	for _, f := range files {
		b, err := os.ReadFile(f)
		if err != nil {
			continue // detached while we looked
		}
		name := strings.TrimSuffix(strings.TrimSpace(string(b)), " (deleted)")
		if name == dir || strings.HasPrefix(name, strings.TrimSuffix(dir, "/")+"/") {
			devs = append(devs, "/dev/"+strings.Split(f, "/")[3])
		}
	}
	return devs, nil
}

// DetachOn detaches the loop devices whose backing files lie on a filesystem
// that the device path carries. Devices in use go when their last user does.
func DetachOn(path string) {
	var st unix.Stat_t
	if unix.Stat(path, &st) != nil {
		return
	}
	files, _ := filepath.Glob("/dev/loop[0-9]*")
	for _, name := range files {
		f, err := os.Open(name)
		if err != nil {
			continue
		}
		if info, err := unix.IoctlLoopGetStatus64(int(f.Fd())); err == nil && info.Device == st.Rdev {
			_ = unix.IoctlSetInt(int(f.Fd()), unix.LOOP_CLR_FD, 0)
		}
		f.Close()
	}
}
