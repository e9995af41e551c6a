package move

import (
	"context"
	"errors"
	"fmt"
	"os"
	"time"

	"golang.org/x/sys/unix"
)

// CollectorError: a collector, or another mover, held a store's gc.lock for longer
// than we wait.
type CollectorError struct{ Lock string }

func (e *CollectorError) Error() string {
	return fmt.Sprintf("%q is held: a garbage collection runs", e.Lock)
}

// HeldError: a builder or substituter works on the path right now.
type HeldError struct{ Path string }

func (e *HeldError) Error() string { return fmt.Sprintf("%q is locked by another Nix process", e.Path) }

// gcWait bounds the waiting for a collector; a collection takes minutes at most on
// stores of any size, but for ones of very slow disks.
const gcWait = 10 * time.Minute

// retry is the pause between two attempts to take a lock: flock(2) cannot be waited for
// together with a context.
const retry = 50 * time.Millisecond

// gcLock takes a store's gc.lock as Nix does (gc.cc: a collector holds it exclusively,
// who registers a temporary root holds it shared for that moment), how being
// LOCK_SH or LOCK_EX. While we hold it exclusively, no temporary root appears.
func gcLock(ctx context.Context, path string, how int) (*os.File, error) {
	f, err := os.OpenFile(path, os.O_CREATE|os.O_RDWR|unix.O_NOFOLLOW, 0o600)
	if err != nil {
		return nil, err
	}
	deadline := time.Now().Add(gcWait)
	for {
		err := again(func() error { return unix.Flock(int(f.Fd()), how|unix.LOCK_NB) })
		if err == nil {
			return f, nil
		}
		if !errors.Is(err, unix.EWOULDBLOCK) {
			f.Close()
			return nil, err
		}
		if time.Now().After(deadline) {
			f.Close()
			return nil, &CollectorError{path}
		}
		select {
		case <-ctx.Done():
			f.Close()
			return nil, ctx.Err()
		case <-time.After(retry):
		}
	}
}

// pathLock is Nix's lock of one store path (pathlocks.cc): a file beside the path,
// locked, and marked stale by a byte in it when it is removed.
type pathLock struct {
	dir  *os.File
	name string
	f    *os.File
}

// lockPath takes the lock of the path with this base name, or says who has it.
func lockPath(dir *os.File, base string) (*pathLock, error) {
	name := base + ".lock"
	for {
		var fd int
		err := again(func() (err error) {
			fd, err = unix.Openat(int(dir.Fd()), name, unix.O_CREAT|unix.O_RDWR|unix.O_NOFOLLOW|unix.O_CLOEXEC, 0o600)
			return err
		})
		if err != nil {
			return nil, err
		}
		f := os.NewFile(uintptr(fd), "path lock")
		if err := again(func() error { return unix.Flock(fd, unix.LOCK_EX|unix.LOCK_NB) }); err != nil {
			f.Close()
			if errors.Is(err, unix.EWOULDBLOCK) {
				return nil, &HeldError{base}
			}
			return nil, err
		}
		var st unix.Stat_t
		if err := unix.Fstat(fd, &st); err != nil {
			f.Close()
			return nil, err
		}
		if st.Size == 0 {
			return &pathLock{dir, name, f}, nil
		}
		f.Close() // the one before us removed it meanwhile
	}
}

// unlock removes the lock file and tells those who opened it before that it is gone.
func (l *pathLock) unlock() {
	if again(func() error { return unix.Unlinkat(int(l.dir.Fd()), l.name, 0) }) == nil {
		_, _ = l.f.Write([]byte("d"))
	}
	_ = l.f.Close()
}

// sweepLocks removes the locks of this operation's paths that a mover left, who was
// killed or could not remove them: nobody else would, and they carry the paths' names.
func (r *run) sweepLocks() error {
	for _, m := range r.op.Moves {
		ok, err := there(r.Lower, base(m.Path)+".lock")
		if err != nil {
			return err
		}
		if !ok {
			continue
		}
		l, err := lockPath(r.Lower, base(m.Path))
		var held *HeldError
		if errors.As(err, &held) {
			continue // its holder will
		}
		if err != nil {
			return err
		}
		l.unlock()
	}
	return nil
}
