package wipe

import (
	"context"
	"errors"
	"fmt"
	"math"
	"os"
	"runtime"
	"strings"
	"unsafe"

	"golang.org/x/sys/unix"
)

// Answer is what became of a step.
type Answer string

// What a step can have come to. The zero value: it was not tried.
const (
	Done        Answer = "done"
	Unsupported Answer = "not supported" // by the kernel, the file system or the device
	Denied      Answer = "denied"        // no right to
)

// DeviceReport says what Device did about what is no longer in any file.
type DeviceReport struct {
	Sync       Answer   `json:"sync"`       // everything was written back
	Trim       Answer   `json:"trim"`       // free blocks were discarded
	Trimmed    int64    `json:"trimmed"`    // bytes
	Checkpoint Answer   `json:"checkpoint"` // the journal was written back and its blocks cleared
	Zeroed     bool     `json:"zeroed"`     // with zeros; false: discarded, or not done
	Notes      []string `json:"notes,omitempty"`
}

// From include/uapi/linux/fs.h and ext4.h: FITRIM is _IOWR('X', 121, struct
// fstrim_range), EXT4_IOC_CHECKPOINT is _IOW('f', 43, __u32).
const (
	ioctlTrim       = 3<<30 | 24<<16 | 'X'<<8 | 121
	ioctlCheckpoint = 1<<30 | 4<<16 | 'f'<<8 | 43

	checkpointDiscard = 1
	checkpointZeroOut = 2
)

// trimRange is struct fstrim_range.
type trimRange struct{ start, length, least uint64 }

// Device clears what the file system that holds dir keeps of removed files: it writes
// everything back, has the free blocks discarded (FITRIM) and the journal checkpointed and
// overwritten with zeros (EXT4_IOC_CHECKPOINT, Linux 5.14; Documentation/filesystems/
// ext4/journal.rst). A step that is not supported or denied is an answer, not an
// error.
func Device(ctx context.Context, dir *os.File) (r DeviceReport, err error) {
	fd := int(dir.Fd())
	if err := retry(func() error { return unix.Syncfs(fd) }); err != nil {
		return r, quoted("syncfs", dir.Name(), err)
	}
	// Trimmed once before, so that what is set aside anew was.
	if _, err := trim(fd); err == nil {
		if err := spend(ctx, fd); err != nil {
			return r, quoted("use up preallocated blocks of", dir.Name(), err)
		}
	}
	if err := retry(func() error { return unix.Syncfs(fd) }); err != nil {
		return r, quoted("syncfs", dir.Name(), err)
	}
	r.Sync = Done
	if err := ctx.Err(); err != nil {
		return r, err
	}
	// The journal first: what it still holds of frees must be committed for the blocks
	// to count as free.
	discard := uint32(checkpointZeroOut)
	err = retry(func() error { return ioctl(fd, ioctlCheckpoint, unsafe.Pointer(&discard)) })
	if errors.Is(err, unix.EOPNOTSUPP) { // no writing of zeros on this device
		discard = checkpointDiscard
		err = retry(func() error { return ioctl(fd, ioctlCheckpoint, unsafe.Pointer(&discard)) })
	}
	if r.Checkpoint, err = answer(err); err != nil {
		return r, quoted("checkpoint", dir.Name(), err)
	}
	r.Zeroed = r.Checkpoint == Done && discard == checkpointZeroOut
	if r.Checkpoint != Done {
		r.Notes = note(r.Notes, noteJournal)
	}
	if err := ctx.Err(); err != nil {
		return r, err
	}
	t, err := trim(fd)
	if r.Trim, err = answer(err); err != nil {
		return r, quoted("trim", dir.Name(), err)
	}
	if r.Trim == Done {
		r.Trimmed = int64(min(t.length, math.MaxInt64))
		r.Notes = note(r.Notes, noteTrim)
	} else {
		r.Notes = note(r.Notes, noteNoTrim)
	}
	return r, nil
}

// trim discards all free blocks, also those that ext4 takes for discarded: it passes
// over a group of blocks that was trimmed before and in which nothing was freed since,
// but does not count as freed what it had only set aside for a growing file, with
// whatever old data it held (fs/ext4/mballoc.c, ext4_mb_release_inode_pa). It does
// not pass over it if shorter runs of blocks are asked for than the last time; so the
// first call asks for runs as long as a group, of which there are few.
func trim(fd int) (t trimRange, err error) {
	var fs unix.Statfs_t
	if err := retry(func() error { return unix.Fstatfs(fd, &fs) }); err != nil {
		return t, err
	}
	t = trimRange{length: math.MaxUint64, least: 8 * uint64(fs.Bsize) * uint64(fs.Bsize)}
	if err := retry(func() error { return ioctl(fd, ioctlTrim, unsafe.Pointer(&t)) }); err != nil && !errors.Is(err, unix.EINVAL) {
		return t, err // EINVAL: groups are smaller here
	}
	t = trimRange{length: math.MaxUint64}
	err = retry(func() error { return ioctl(fd, ioctlTrim, unsafe.Pointer(&t)) })
	return t, err
}

const (
	noteJournal = "the journal was not cleared: it may hold names and directory blocks until it has gone round"
	noteTrim    = "the device was told which blocks are free; whether it then clears them is up to it"
	noteNoTrim  = "this device takes no trim: free blocks keep what they held, which is what was overwritten before, but for blocks of directories and of long symbolic links"
)

// answer sorts the errors of an ioctl.
func answer(err error) (Answer, error) {
	switch {
	case err == nil:
		return Done, nil
	case errors.Is(err, unix.EOPNOTSUPP), errors.Is(err, unix.ENOTTY), errors.Is(err, unix.ENOSYS), errors.Is(err, unix.EINVAL),
		errors.Is(err, unix.ENODEV): // ext4 without a journal
		return Unsupported, nil
	case errors.Is(err, unix.EPERM), errors.Is(err, unix.EACCES), errors.Is(err, unix.EROFS):
		return Denied, nil
	}
	return "", err
}

func ioctl(fd int, request uintptr, arg unsafe.Pointer) error {
	_, _, e := unix.Syscall(unix.SYS_IOCTL, uintptr(fd), request, uintptr(arg))
	runtime.KeepAlive(arg)
	if e != 0 {
		return e
	}
	return nil
}

// ErrNoDevice: what holds a directory is not one block device that could be read.
var ErrNoDevice = errors.New("could not tell the device")

// DeviceOf returns the block device (/dev/NAME) that holds the file system of dir, by
// the kernel's own name for it. btrfs, zfs, overlay, network file systems and memory
// have none: ErrNoDevice.
func DeviceOf(dir *os.File) (dev string, err error) {
	var st unix.Stat_t
	if err := unix.Fstat(int(dir.Fd()), &st); err != nil {
		return "", quoted("stat", dir.Name(), err)
	}
	number := fmt.Sprintf("%d:%d", unix.Major(st.Dev), unix.Minor(st.Dev))
	if unix.Major(st.Dev) == 0 {
		return "", fmt.Errorf("%w: the file system's number is %s", ErrNoDevice, number)
	}
	text, err := os.ReadFile("/sys/dev/block/" + number + "/uevent")
	if err != nil {
		return "", fmt.Errorf("%w: %w", ErrNoDevice, err)
	}
	for line := range strings.Lines(string(text)) {
		if name, ok := strings.CutPrefix(strings.TrimSpace(line), "DEVNAME="); ok && name != "" && !strings.Contains(name, "..") {
			dev = "/dev/" + name
		}
	}
	var node unix.Stat_t
	if err := unix.Stat(dev, &node); dev == "" || err != nil || node.Mode&unix.S_IFMT != unix.S_IFBLK || node.Rdev != st.Dev {
		return "", fmt.Errorf("%w: no device file for %s", ErrNoDevice, number)
	}
	return dev, nil
}

// Disk is a device that is open for reading what really lies on it.
type Disk struct{ f *os.File }

// OpenDisk opens a device (see DeviceOf) or the file of an image. What the kernel kept
// of earlier reads of the device is dropped: it knows nothing of what file systems
// have written since.
func OpenDisk(path string) (*Disk, error) {
	f, err := os.OpenFile(path, os.O_RDONLY|unix.O_NONBLOCK|unix.O_NOCTTY, 0)
	if err != nil {
		return nil, err
	}
	var st unix.Stat_t
	if err := unix.Fstat(int(f.Fd()), &st); err != nil {
		return nil, errors.Join(err, f.Close())
	}
	if k := st.Mode & unix.S_IFMT; k != unix.S_IFBLK && k != unix.S_IFREG {
		return nil, errors.Join(quoted("open", path, unix.ENOTBLK), f.Close())
	}
	if err := unix.Fadvise(int(f.Fd()), 0, 0, unix.FADV_DONTNEED); err != nil {
		return nil, errors.Join(quoted("drop what is cached of", path, err), f.Close())
	}
	return &Disk{f}, nil
}

// Read and ReadAt read, Close closes.
func (d *Disk) Read(b []byte) (int, error) { return d.f.Read(b) }

// ReadAt is of io.ReaderAt.
func (d *Disk) ReadAt(b []byte, at int64) (int, error) { return d.f.ReadAt(b, at) }

// Close closes it.
func (d *Disk) Close() error { return d.f.Close() }
