package tree

import (
	"context"
	"errors"
	"io/fs"
	"os"
	"runtime"
	"sync"
)

// CopyAll copies the trees of jobs from src to dst, several at a time, and compares their
// hashes. done is called once for every job that was begun, one call at a time, in no
// order; err is nil, a *MismatchError, a *SizeError, or what Copy returns. What is then left
// at NewName is as with Copy, and a whole but wrong copy after a mismatch.
//
// A job that cannot be read, or whose NewName exists, does not stop the others. CopyAll
// returns early when ctx ends or the target cannot be written to (*Error with
// Target): it ends the jobs under way, begins no more, and returns that error.
func CopyAll(ctx context.Context, src, dst *os.File, jobs []Job, o Options, done func(i int, r Result, err error)) error {
	defer runtime.KeepAlive(dst)
	ctx, cancel := context.WithCancelCause(ctx)
	defer cancel(nil)
	var (
		mu   sync.Mutex // of next, done and Progress
		next int
		wait sync.WaitGroup
	)
	take := func() (int, bool) {
		mu.Lock()
		defer mu.Unlock()
		if next == len(jobs) || ctx.Err() != nil {
			return 0, false
		}
		next++
		return next - 1, true
	}
	progress := o.Progress
	if progress != nil {
		progress = func(n int64) {
			mu.Lock()
			defer mu.Unlock()
			o.Progress(n)
		}
	}
	workers := o.Workers
	if workers <= 0 {
		workers = DefaultWorkers
	}
	for range min(workers, len(jobs)) {
		wait.Go(func() {
			c := newCopier()
			for {
				i, ok := take()
				if !ok {
					return
				}
				j := &jobs[i]
				t, err := newTarget(int(dst.Fd()), j.NewName, o)
				var r Result
				c.most = j.NarSize
				if err == nil {
					r, err = c.run(ctx, src, j.Name, t, j.NewName, nil, progress)
				}
				if err == nil && r.NarHash != j.Want {
					err = &MismatchError{j.Name, j.Want, r.NarHash}
				}
				var e *Error
				if errors.As(err, &e) && e.Target && !errors.Is(err, fs.ErrExist) {
					cancel(err)
				}
				mu.Lock()
				done(i, r, err)
				mu.Unlock()
			}
		})
	}
	wait.Wait()
	return context.Cause(ctx)
}
