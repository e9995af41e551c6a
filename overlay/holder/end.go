package holder

import (
	"context"
	"errors"
	"os"
	"strconv"
	"time"

	"golang.org/x/sys/unix"
)

// errKept is why End leaves process 1 and its own process alone.
var errKept = errors.New("process is never ended from here")

// End sends SIGTERM to the processes among holders, and SIGKILL to those that
// are left after grace; with grace 0, SIGKILL at once. It returns when all have
// ended, or when ctx is done, with *SurvivorsError naming those that have not.
//
// A process is only signalled if it is still the one that was found (its start
// time), and through a pidfd, so that no number given to another can be hit.
// Kernel objects (PID 0) are passed over. Process 1 and the caller are never
// signalled and count as survivors.
func End(ctx context.Context, holders []Holder, grace time.Duration) error {
	var left []victim
	var kept []Holder
	var why error
	defer func() {
		for _, v := range left {
			v.fd.Close()
		}
	}()
	for _, h := range holders {
		switch {
		case h.PID == 0:
			continue
		case h.PID == 1 || h.PID == os.Getpid() || h.PID < 0:
			kept, why = append(kept, h), errKept
			continue
		}
		fd, err := openProcess(h)
		if gone(err) {
			continue
		}
		if err != nil {
			kept, why = append(kept, h), err
			continue
		}
		left = append(left, victim{h, fd})
	}
	signal := func(sig unix.Signal) {
		for _, v := range left {
			if err := unix.PidfdSendSignal(int(v.fd.Fd()), sig, nil, 0); err != nil && !gone(err) {
				why = err
			}
		}
	}
	wake, stop, err := waker(ctx)
	if err != nil {
		return err
	}
	defer stop()
	if grace > 0 {
		signal(unix.SIGTERM)
		left, err = await(left, wake, time.Now().Add(grace))
	}
	if err == nil && len(left) > 0 && ctx.Err() == nil {
		signal(unix.SIGKILL)
		left, err = await(left, wake, time.Time{})
	}
	if err != nil {
		return err
	}
	for _, v := range left {
		kept = append(kept, v.Holder)
	}
	if len(kept) == 0 {
		return nil
	}
	if why == nil {
		why = context.Cause(ctx)
	}
	return &SurvivorsError{kept, why}
}

type victim struct {
	Holder
	fd *os.File // pidfd
}

// openProcess returns a pidfd of the very process h, ESRCH if it has ended.
func openProcess(h Holder) (*os.File, error) {
	fd, err := unix.PidfdOpen(h.PID, 0)
	if err != nil {
		return nil, err
	}
	// The pidfd is fixed now; if the start time read after it is the one found,
	// the number belonged to the same process all along.
	b, err := readAt(unix.AT_FDCWD, "/proc/"+strconv.Itoa(h.PID)+"/stat", 4096)
	if err == nil {
		var st stat
		if st, err = parseStat(b); err == nil && st.start != h.Start {
			err = unix.ESRCH
		}
	}
	if err != nil {
		unix.Close(fd)
		return nil, err
	}
	return os.NewFile(uintptr(fd), "pidfd"), nil
}

// waker returns a descriptor that becomes readable when ctx is done.
func waker(ctx context.Context) (*os.File, func(), error) {
	fd, err := unix.Eventfd(0, unix.EFD_CLOEXEC|unix.EFD_NONBLOCK)
	if err != nil {
		return nil, nil, err
	}
	f := os.NewFile(uintptr(fd), "eventfd")
	done := make(chan struct{})
	stop := context.AfterFunc(ctx, func() {
		defer close(done)
		_, _ = f.Write([]byte{1, 0, 0, 0, 0, 0, 0, 0})
	})
	return f, func() {
		if !stop() {
			<-done
		}
		f.Close()
	}, nil
}

// await waits until all of list have ended, wake is readable, or the deadline
// (if any) has passed, and returns who is left. A pidfd is readable once its
// process has ended, whether or not its parent has asked for its fate.
func await(list []victim, wake *os.File, deadline time.Time) ([]victim, error) {
	for len(list) > 0 {
		timeout := -1
		if !deadline.IsZero() {
			// Rounded up: a wait of no time at all would spin.
			timeout = int(max(0, time.Until(deadline)+time.Millisecond-1) / time.Millisecond)
		}
		fds := []unix.PollFd{{Fd: int32(wake.Fd()), Events: unix.POLLIN}}
		for _, v := range list {
			fds = append(fds, unix.PollFd{Fd: int32(v.fd.Fd()), Events: unix.POLLIN})
		}
		n, err := unix.Poll(fds, timeout)
		if err == unix.EINTR {
			continue
		}
		if err != nil {
			return list, err
		}
		var left []victim
		for i, v := range list {
			if fds[i+1].Revents == 0 {
				left = append(left, v)
				continue
			}
			v.fd.Close()
		}
		list = left
		if n == 0 || fds[0].Revents != 0 {
			return list, nil
		}
	}
	return nil, nil
}
