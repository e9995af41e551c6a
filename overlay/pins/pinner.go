package pins

import (
	"context"
	"errors"
	"sync"
	"time"

	"golang.org/x/sys/unix"
)

// Pinner keeps a Dir in step with what Needs says. Needs is asked with the
// directory locked: with two lists in flight, an older one could remove the pin
// that a newer one has just made.
//
// Calls that arrive while one runs wait and share the next run, so that many
// short connections cost few scans. All methods may be called concurrently. A
// Pinner must not be copied after first use.
type Pinner struct {
	Dir Dir
	// Needs returns the store paths to pin, all of them valid in the system store.
	Needs func(context.Context) ([]string, error)

	mu      sync.Mutex
	running bool
	next    *run
	work    sync.WaitGroup
}

// run is one pass over Needs and Dir, shared by those who wait for it.
type run struct {
	exact bool
	done  chan struct{}
	res   Result
	err   error
}

// Add pins everything that is needed by now. Removes nothing.
func (p *Pinner) Add(ctx context.Context) (Result, error) { return p.join(ctx, false) }

// Exact pins everything that is needed by now and removes the pins that are
// not. For after a personal garbage collection.
func (p *Pinner) Exact(ctx context.Context) (Result, error) { return p.join(ctx, true) }

// join takes part in a run that begins after the call.
func (p *Pinner) join(ctx context.Context, exact bool) (Result, error) {
	p.mu.Lock()
	if p.next == nil {
		p.next = &run{done: make(chan struct{})}
	}
	r := p.next
	r.exact = r.exact || exact
	if !p.running {
		p.running = true
		// Detached from ctx: others may join, and half a run is of no use.
		rest := context.WithoutCancel(ctx)
		p.work.Go(func() { p.serve(rest) })
	}
	p.mu.Unlock()
	select {
	case <-r.done:
		return r.res, r.err
	case <-ctx.Done():
		return Result{}, ctx.Err()
	}
}

// Wait returns when no run is under way. Needs has the personal database open:
// call it, with no further Add or Exact, before that is unmounted.
func (p *Pinner) Wait() { p.work.Wait() }

// serve does runs until nobody waits for one.
func (p *Pinner) serve(ctx context.Context) {
	for {
		p.mu.Lock()
		r := p.next
		p.next = nil
		if r == nil {
			p.running = false
			p.mu.Unlock()
			return
		}
		exact := r.exact
		p.mu.Unlock()
		r.res, r.err = p.Dir.apply(ctx, p.Needs, exact)
		close(r.done)
	}
}

// lockDir takes an exclusive flock on the directory, looking again every 20 ms.
func lockDir(ctx context.Context, fd int) error {
	for {
		err := unix.Flock(fd, unix.LOCK_EX|unix.LOCK_NB)
		if err == nil || !errors.Is(err, unix.EWOULDBLOCK) && !errors.Is(err, unix.EINTR) {
			return err
		}
		t := time.NewTimer(20 * time.Millisecond)
		select {
		case <-ctx.Done():
			t.Stop()
			return ctx.Err()
		case <-t.C:
		}
	}
}
