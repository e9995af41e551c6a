package lower

import (
	"context"
	"errors"
	"fmt"
	"time"

	"golang.org/x/sys/unix"
)

// gcPoll is how often a wait for the collector looks again; Nix's own
// addTempRoot uses the same 100 ms.
const gcPoll = 100 * time.Millisecond

// shareGCLock takes Nix's gc.lock (flock(2), STATE/gc.lock) shared, which
// means that no collection runs and none starts before release. If it has to
// wait it calls waiting once. An empty path means no lock.
//
// Nix before 2.35 has a hole (NixOS/nix#15992): a temp root handed to a running
// collector is acknowledged although the path may already be in the set about
// to be deleted. With the lock held our temp roots never take that way.
func shareGCLock(ctx context.Context, path string, waiting func()) (release func(), err error) {
	if path == "" {
		return func() {}, nil
	}
	// As Nix opens it (openGCLock): made if absent, so that both lock one file.
	fd, err := unix.Open(path, unix.O_RDWR|unix.O_CREAT|unix.O_CLOEXEC|unix.O_NOFOLLOW, 0o600)
	if err != nil {
		return nil, fmt.Errorf("open the collector's lock: %w", err)
	}
	var tick *time.Ticker
	for {
		err := unix.Flock(fd, unix.LOCK_SH|unix.LOCK_NB)
		switch {
		case err == nil:
			return func() { _ = unix.Close(fd) }, nil
		case errors.Is(err, unix.EINTR):
			continue
		case !errors.Is(err, unix.EWOULDBLOCK):
			_ = unix.Close(fd)
			return nil, fmt.Errorf("share the collector's lock: %w", err)
		}
		if tick == nil {
			tick = time.NewTicker(gcPoll)
			defer tick.Stop()
			waiting()
		}
		select {
		case <-ctx.Done():
			_ = unix.Close(fd)
			return nil, ctx.Err()
		case <-tick.C:
		}
	}
}
