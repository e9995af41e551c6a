package move

import (
	"context"
	"errors"
	"io"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"time"

	"golang.org/x/sys/unix"

	"overkeep/overlay/layout"
	"overkeep/overlay/nixdb"
	"overkeep/overlay/plan"
)

// What a client of the personal daemon works with stays where it is. A build has its
// inputs mounted in its sandbox: of either layer as it was then, and no remount changes
// what is held open; if it moved it would read an empty directory, or what the wiping
// leaves. The system's collector knows nothing of such clients when the keep had a row
// of the path before they came: then no one asks the system store.

// patience is how long a worker may take to end whose client has gone; what lasts
// longer is a build, and what it uses stays.
const patience = 3 * time.Second

// maxTempRoots bounds one file of temporary roots.
const maxTempRoots = 64 << 20

// tempRoots reads the temporary roots of living clients of a store: one file for each
// process, locked as long as that lives, of paths that end in a NUL (gc.cc,
// findTempRoots). by says whose each is.
func tempRoots(state string) (by map[string]string, err error) {
	dir := filepath.Join(state, "temproots")
	list, err := os.ReadDir(dir)
	if errors.Is(err, os.ErrNotExist) {
		return nil, nil
	}
	if err != nil {
		return nil, err
	}
	by = map[string]string{}
	for _, e := range list {
		f, err := os.OpenFile(filepath.Join(dir, e.Name()), os.O_RDWR|unix.O_NOFOLLOW|unix.O_NONBLOCK, 0)
		if errors.Is(err, os.ErrNotExist) {
			continue
		}
		if err != nil {
			return nil, err
		}
		// Who has died does not hold its lock any more. Shared: Nix's collector, which
		// removes such files, is kept out by gc.lock anyway.
		var b []byte
		if err = again(func() error { return unix.Flock(int(f.Fd()), unix.LOCK_SH|unix.LOCK_NB) }); errors.Is(err, unix.EWOULDBLOCK) {
			b, err = io.ReadAll(io.LimitReader(f, maxTempRoots))
		}
		f.Close()
		if err != nil {
			return nil, err
		}
		for p := range strings.SplitSeq(string(b), "\x00") {
			if strings.HasPrefix(p, layout.NixStore+"/") {
				by[p] = "process " + e.Name() + ", in the view"
			}
		}
	}
	return by, nil
}

// inUse are the paths that clients of the personal daemon work with, with all that these
// refer to, and by whom.
func (r *run) inUse(ctx context.Context) (by map[string]string, err error) {
	if by, err = tempRoots(r.Keep.NixState()); err != nil || len(by) == 0 {
		return nil, err
	}
	rows, err := valid(ctx, r.personalDB(), keys(by))
	if err != nil || len(rows) == 0 {
		return by, err
	}
	closure, err := nixdb.ReadClosure(ctx, r.personalDB(), keys(rows))
	if err != nil {
		return nil, err
	}
	for _, row := range slices.Backward(closure) { // referrers first
		for _, ref := range row.Refs {
			if _, known := by[ref]; !known {
				by[ref] = by[row.Path]
			}
		}
	}
	return by, nil
}

// busy are the items of a batch that are in use.
func (r *run) busy(ctx context.Context, b *batch) (left []Left, err error) {
	by, err := r.inUse(ctx)
	if err != nil {
		return nil, err
	}
	for _, it := range r.going(b) {
		if who, ok := by[it.Info.Path]; ok {
			left = append(left, Left{Path: it.Info.Path, Why: Alive, By: who})
		}
	}
	return left, nil
}

// idle are those of paths, valid in the system store, whose copies nobody works with in
// the view: no client, and no process that runs from them. The lock of the personal
// collector is held. Who has a copy open, or mounted, would find it empty when it goes,
// and with him everybody. Such a copy stays beside the system's, until the next apply.
func (r *run) idle(ctx context.Context, paths []string) (out []string, err error) {
	if len(paths) == 0 {
		return nil, nil
	}
	by, err := r.inUse(ctx)
	if err != nil {
		return nil, err
	}
	roots, err := r.Roots(ctx)
	if err != nil {
		return nil, err
	}
	if by == nil {
		by = map[string]string{}
	}
	for _, root := range roots {
		if root.Kind == plan.RootProcess {
			by[root.Path] = root.Link
		}
	}
	for _, p := range paths {
		if _, ok := by[p]; !ok {
			out = append(out, p)
		}
	}
	return out, nil
}

// awaitWorkers gives workers a moment whose clients have just gone. No lock is held that
// they wait for; whoever is left is found when there is.
func (r *run) awaitWorkers(ctx context.Context, b *batch) error {
	for end := time.Now().Add(patience); ; {
		if left, err := r.busy(ctx, b); err == nil && len(left) == 0 || time.Now().After(end) {
			return nil
		}
		select {
		case <-ctx.Done():
			return ctx.Err()
		case <-time.After(retry):
		}
	}
}

// bothLocks takes the locks of both collectors exclusively: from then on no temporary
// root appears in either store. It never waits for one while it holds the other: a
// personal collection asks the system store for temporary roots, and a build waits for
// no collection but its own store's.
func (r *run) bothLocks(ctx context.Context) (release func(), err error) {
	for end := time.Now().Add(gcWait); ; {
		if err := ctx.Err(); err != nil {
			return nil, err
		}
		if time.Now().After(end) { // somebody had one each time
			return nil, &CollectorError{r.personalGC()}
		}
		system, err := gcLock(ctx, r.systemGC(), unix.LOCK_EX)
		if err != nil {
			return nil, err
		}
		personal, err := tryLock(r.personalGC(), unix.LOCK_EX)
		if err != nil {
			system.Close()
			return nil, err
		}
		if personal != nil {
			return func() { personal.Close(); system.Close() }, nil
		}
		system.Close()
		// Wait until it can be had, let it go, and try for both.
		if personal, err = gcLock(ctx, r.personalGC(), unix.LOCK_EX); err != nil {
			return nil, err
		}
		personal.Close()
	}
}

// tryLock takes a gc.lock, or returns nil when somebody has it for longer than the
// moment in which a client registers a temporary root.
func tryLock(path string, how int) (*os.File, error) {
	f, err := os.OpenFile(path, os.O_CREATE|os.O_RDWR|unix.O_NOFOLLOW, 0o600)
	if err != nil {
		return nil, err
	}
	for range 20 {
		err = again(func() error { return unix.Flock(int(f.Fd()), how|unix.LOCK_NB) })
		if err == nil {
			return f, nil
		}
		if !errors.Is(err, unix.EWOULDBLOCK) {
			f.Close()
			return nil, err
		}
		time.Sleep(5 * time.Millisecond)
	}
	return nil, f.Close()
}
