package wipe

import (
	"context"
	"errors"
	"runtime"

	"golang.org/x/sys/unix"
)

// ext4 sets blocks aside for small files, some 512 for each CPU at a time
// (fs/ext4/mballoc.c, locality groups). They count as free in every figure, hold
// whatever was freed there before, and FITRIM passes them over. A program cannot ask
// for them to be given back; it can use them up: they are written by files without a
// name, and what is set aside next was trimmed before or is trimmed when its turn
// comes.
const (
	groupBlocks = 512 // mb_group_prealloc, as ext4 sets it
	smallFile   = 15  // blocks; from 16 on (mb_stream_req) a file has blocks of its own
)

// spend uses up what an ext4 has set aside for small files on the CPUs that this
// process may run on. Elsewhere, and on a file system that is full or cannot make
// files without a name, it does nothing.
func spend(ctx context.Context, dir int) error {
	var fs unix.Statfs_t
	if err := retry(func() error { return unix.Fstatfs(dir, &fs) }); err != nil {
		return err
	}
	var cpus unix.CPUSet
	if fs.Type != unix.EXT4_SUPER_MAGIC || unix.SchedGetaffinity(0, &cpus) != nil {
		return nil
	}
	zeros := make([]byte, smallFile*fs.Bsize)
	for cpu, left := 0, cpus.Count(); left > 0; cpu++ {
		if !cpus.IsSet(cpu) {
			continue
		}
		left--
		if err := ctx.Err(); err != nil {
			return err
		}
		done := make(chan error)
		go func() {
			runtime.LockOSThread() // and never unlocked: the thread ends with its one CPU
			var one unix.CPUSet
			one.Set(cpu)
			if unix.SchedSetaffinity(0, &one) != nil {
				done <- nil
				return
			}
			done <- spendHere(dir, zeros, int(fs.Bsize))
		}()
		err := <-done
		switch {
		case errors.Is(err, unix.ENOSPC), errors.Is(err, unix.EDQUOT): // then ext4 gives them back by itself
			return nil
		case errors.Is(err, unix.EOPNOTSUPP), errors.Is(err, unix.EISDIR), errors.Is(err, unix.EROFS), errors.Is(err, unix.EACCES):
			return nil
		case err != nil:
			return err
		}
	}
	return nil
}

// spendHere does it on the CPU of the calling thread: large pieces first, then what
// is too short for them.
func spendHere(dir int, zeros []byte, block int) error {
	for blocks := smallFile; blocks > 0; blocks /= 2 {
		n := 4
		if blocks == smallFile {
			n += groupBlocks / smallFile
		}
		for range n {
			if err := spendOne(dir, zeros[:blocks*block]); err != nil {
				return err
			}
		}
	}
	return nil
}

// spendOne writes a file without a name. Its blocks are chosen when it is written back,
// here and now; freed, they cannot be chosen again before the journal is committed.
func spendOne(dir int, b []byte) error {
	var fd int
	err := retry(func() (err error) {
		fd, err = unix.Openat(dir, ".", unix.O_WRONLY|unix.O_TMPFILE|unix.O_CLOEXEC, 0o600)
		return err
	})
	if err != nil {
		return err
	}
	defer unix.Close(fd)
	if err := retry(func() error { _, err := unix.Pwrite(fd, b, 0); return err }); err != nil {
		return err
	}
	const all = unix.SYNC_FILE_RANGE_WAIT_BEFORE | unix.SYNC_FILE_RANGE_WRITE | unix.SYNC_FILE_RANGE_WAIT_AFTER
	return retry(func() error { return unix.SyncFileRange(fd, 0, int64(len(b)), all) })
}
