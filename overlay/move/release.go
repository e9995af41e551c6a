package move

import (
	"context"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"slices"
	"strconv"

	"golang.org/x/sys/unix"

	"overkeep/overlay/gcroot"
	"overkeep/overlay/nixdb"
	"overkeep/overlay/tree"
)

// release carries one batch into the system store.
func (r *run) release(ctx context.Context, b *batch) error {
	// Held until the pins are there: a system collection would find no root.
	lock, err := gcLock(ctx, r.systemGC(), unix.LOCK_SH)
	if err != nil {
		return err
	}
	defer lock.Close()
	stage, err := r.openStage()
	if err != nil {
		return err
	}
	defer stage.Close()
	r.dirty = true // until it is known to be valid there
	if err := r.copyIn(ctx, b, r.upper, stage); err != nil {
		return err
	}
	if err := r.verifyKept(ctx, b, r.Lower); err != nil {
		return err
	}
	if err := syncfs(stage); err != nil {
		return err
	}
	if len(r.going(b)) == 0 {
		if err := r.emptyStage(ctx); err != nil {
			return err
		}
		return r.step(b, event{Type: evBack})
	}
	if err := r.awaitWorkers(ctx, b); err != nil {
		return err
	}
	// No client of the personal daemon comes to use a copy that goes. A personal
	// collection that we wait for needs the system's lock shared at most.
	personal, err := gcLock(ctx, r.personalGC(), unix.LOCK_EX)
	if err != nil {
		return err
	}
	defer personal.Close()
	if err := r.place(ctx, b, stage); err != nil {
		return err
	}
	if len(r.going(b)) == 0 {
		return nil
	}
	return r.dropUpper(ctx, b, pathsOf(r.going(b)))
}

// place makes a batch valid in the system store.
func (r *run) place(ctx context.Context, b *batch, stage *os.File) error {
	var locks []*pathLock
	defer func() {
		for _, l := range locks {
			l.unlock()
		}
	}()
	left, err := r.busy(ctx, b)
	if err != nil {
		return err
	}
	if err := r.leave(b, left); err != nil {
		return err
	}
	if locks, err = r.lockBatch(b); err != nil {
		return err
	}
	left = nil
	// What somebody put there meanwhile.
	now, err := valid(ctx, r.systemDB(), pathsOf(r.going(b)))
	if err != nil {
		return err
	}
	for _, it := range r.going(b) {
		_, ok := now[it.Info.Path]
		if ok != it.Duplicate {
			left = append(left, Left{Path: it.Info.Path, Why: Changed})
		}
	}
	if err := r.leave(b, left); err != nil {
		return err
	}
	if len(r.going(b)) == 0 {
		if err := r.emptyStage(ctx); err != nil {
			return err
		}
		return r.step(b, event{Type: evBack})
	}
	b.paths = pathsOf(r.going(b))
	if err := r.step(b, event{Type: evPlacing, Paths: b.paths}); err != nil {
		return err
	}
	for i, it := range r.items(b) {
		if it.Duplicate {
			continue
		}
		if err := opaque(r.upper, base(it.Info.Path)); err != nil {
			return err
		}
		// A tree without a row, under our lock: what an interrupted build left.
		ok, err := there(r.Lower, base(it.Info.Path))
		if err != nil {
			return err
		}
		if ok {
			if err := throw(r.Lower, base(it.Info.Path), stage); err != nil {
				return err
			}
		}
		if err := rename(stage, strconv.Itoa(i), r.Lower, base(it.Info.Path)); err != nil {
			return err
		}
	}
	if err := syncfs(r.Lower); err != nil {
		return err
	}
	for {
		var rows []nixdb.Info
		for _, it := range r.going(b) {
			if it.Duplicate {
				continue
			}
			row := it.Info
			if _, own := r.op.Original[row.Path]; !own {
				row.Deriver = "" // the name of a private derivation
			}
			rows = append(rows, row)
		}
		err := nixdb.Register(ctx, r.systemDB(), rows)
		var miss *nixdb.MissingRefError
		if err == nil {
			break
		}
		if !errors.As(err, &miss) {
			return err
		}
		if err := r.leave(b, []Left{{Path: miss.Path, Why: Needs, By: miss.Ref}}); err != nil {
			return err
		}
		if len(r.going(b)) == 0 {
			break
		}
	}
	// Those that could not be registered after all lie there without a row.
	if out := pathsOf(r.staying(b)); len(out) > 0 {
		if err := r.unplace(ctx, b, out); err != nil {
			return err
		}
	}
	if len(r.going(b)) == 0 {
		return r.step(b, event{Type: evBack})
	}
	if err := r.emptyStage(ctx); err != nil {
		return err
	}
	b.paths = pathsOf(r.going(b))
	return r.step(b, event{Type: evPlaced, Paths: b.paths})
}

// unplace destroys those of paths that lie in the system store without a row. Their
// locks are held.
func (r *run) unplace(ctx context.Context, b *batch, paths []string) error {
	rows, err := valid(ctx, r.systemDB(), paths)
	if err != nil {
		return err
	}
	var out []string
	for _, p := range paths {
		if _, ok := rows[p]; !ok {
			out = append(out, p)
		}
	}
	return r.destroy(ctx, out)
}

// dropUpper removes the keep's copies of what is valid in the system store, after it
// has been seen to that the keep holds on to it there.
func (r *run) dropUpper(ctx context.Context, b *batch, paths []string) error {
	var err error
	switch r.op.Kind {
	case Undo: // what comes back has the roots that it had
	case Eject:
		err = r.RootEjected(ctx)
	default:
		err = r.holdReleased(b, paths)
	}
	if err != nil {
		return err
	}
	for _, rec := range b.roots {
		if slices.Contains(paths, rec.Path) {
			if err := r.restoreRoot(rec); err != nil {
				return err
			}
		}
	}
	idle, err := r.idle(ctx, paths)
	if err != nil {
		return err
	}
	if err := r.dropCopies(ctx, idle); err != nil {
		return err
	}
	if err := r.step(b, event{Type: evDropped, Paths: paths}); err != nil {
		return err
	}
	for _, it := range b.items {
		for _, p := range paths {
			if p == it.Info.Path {
				r.releasedOne(it.Info)
			}
		}
	}
	return nil
}

// restoreRoot puts a link back where it was before it went along with a seal. Where its
// user has made something else there, or removed the directory, it stays in the keep.
func (r *run) restoreRoot(rec gcroot.Record) error {
	err := r.Links.Restore(rec)
	if gcroot.Theirs(err) {
		return nil
	}
	if err != nil {
		return err
	}
	if err := r.Links.Drop(rec); err != nil && !gcroot.Theirs(err) {
		return err
	}
	r.res.Roots = append(r.res.Roots, RootMoved{From: rec.To, To: rec.Link, Back: true})
	return nil
}

// releasedOne counts a path as released.
func (r *run) releasedOne(row nixdb.Info) {
	r.moved[row.Path] = true
	r.res.Released = append(r.res.Released, row.Path)
	r.res.Bytes += row.NarSize
}

// dropCopies takes the keep's copies of paths out of the upper layer that are valid in
// the system store. From then on nothing but the keep's pins may hold them there, and
// our lock of the collector goes with us if we are killed: so they are pinned before.
func (r *run) dropCopies(ctx context.Context, paths []string) error {
	if len(paths) > 0 {
		if err := r.mark(paths); err != nil {
			return err
		}
		if err := r.Pin(ctx); err != nil {
			return fmt.Errorf("pin what the system store has: %w", err)
		}
	}
	if err := r.throwUpper(ctx, paths); err != nil {
		return err
	}
	if err := r.Pin(ctx); err != nil { // and what is needed only now
		return fmt.Errorf("pin what the system store has: %w", err)
	}
	return r.unmark()
}

// mark names paths to the supervisor as leaving the upper layer.
func (r *run) mark(paths []string) error {
	if len(paths) == 0 {
		return nil
	}
	dir := r.Keep.Leaving()
	if err := os.Mkdir(dir, 0o755); err != nil && !errors.Is(err, os.ErrExist) {
		return err
	}
	for _, p := range paths {
		if err := os.Symlink(p, filepath.Join(dir, base(p))); err != nil && !errors.Is(err, os.ErrExist) {
			return err
		}
	}
	return syncDir(dir)
}

// unmark takes all marks back.
func (r *run) unmark() error {
	dir := r.Keep.Leaving()
	list, err := os.ReadDir(dir)
	if errors.Is(err, os.ErrNotExist) {
		return nil
	}
	if err != nil {
		return err
	}
	for _, e := range list {
		if err := os.Remove(filepath.Join(dir, e.Name())); err != nil && !errors.Is(err, os.ErrNotExist) {
			return err
		}
	}
	return rmdirPath(dir)
}

// throwUpper takes paths out of the upper layer, and removes them.
func (r *run) throwUpper(ctx context.Context, paths []string) error {
	bin, err := subdir(r.store, trash)
	if err != nil {
		return err
	}
	defer bin.Close()
	if err := throwAll(r.upper, paths, bin); err != nil {
		return err
	}
	if err := fsync(r.upper); err != nil {
		return err
	}
	if err := r.Remount(); err != nil {
		return fmt.Errorf("remount the store: %w", err)
	}
	return tree.Remove(ctx, r.store, trash)
}

// released is where a keep's roots for what it released lie: nothing else may hold on
// to it there, and the system's next collection would take it.
const released = "gcroots/overkeep-released"

// holdReleased gives the keep a root for each path that nothing of the batch refers to;
// the keep's pins follow from it.
func (r *run) holdReleased(b *batch, paths []string) error {
	dir := filepath.Join(r.Keep.NixState(), released)
	if err := os.Mkdir(dir, 0o755); err != nil && !errors.Is(err, os.ErrExist) {
		return err
	}
	referred := map[string]bool{}
	for _, it := range b.items {
		for _, ref := range it.Info.Refs {
			if ref != it.Info.Path {
				referred[ref] = true
			}
		}
	}
	for _, p := range paths {
		if referred[p] {
			continue
		}
		if err := os.Symlink(p, filepath.Join(dir, base(p))); err != nil && !errors.Is(err, os.ErrExist) {
			return err
		}
	}
	return syncDir(dir)
}

// letGo removes the roots that holdReleased made.
func (r *run) letGo(paths []string) error {
	dir := filepath.Join(r.Keep.NixState(), released)
	for _, p := range paths {
		if err := os.Remove(filepath.Join(dir, base(p))); err != nil && !errors.Is(err, os.ErrNotExist) {
			return err
		}
	}
	return nil
}

// ejectedRoots is where what a keep's roots held is rooted in the system store after an
// eject. It is not among the pins, which go with the keep.
const ejectedRoots = "gcroots/overkeep-ejected"

// RootEjected gives what the keep's gcroots and profiles hold, as far as it is in the
// system store by now, a root there that outlives the keep. What is still private it does
// not name.
func (w *World) RootEjected(ctx context.Context) error {
	held, err := valid(ctx, w.systemDB(), w.Held())
	if err != nil || len(held) == 0 {
		return err
	}
	top := filepath.Join(w.System, ejectedRoots)
	dir := filepath.Join(top, w.Keep.Name)
	for _, d := range []string{top, dir} {
		if err := os.Mkdir(d, 0o755); err != nil && !errors.Is(err, os.ErrExist) {
			return err
		}
	}
	for p := range held {
		if err := os.Symlink(p, filepath.Join(dir, base(p))); err != nil && !errors.Is(err, os.ErrExist) {
			return err
		}
	}
	return syncDir(dir)
}

// UnrootEjected removes what RootEjected made.
func (w *World) UnrootEjected() error {
	dir := filepath.Join(w.System, ejectedRoots, w.Keep.Name)
	list, err := os.ReadDir(dir)
	if errors.Is(err, os.ErrNotExist) {
		return nil
	}
	if err != nil {
		return err
	}
	for _, e := range list {
		if err := os.Remove(filepath.Join(dir, e.Name())); err != nil && !errors.Is(err, os.ErrNotExist) {
			return err
		}
	}
	return rmdirPath(dir)
}

func rmdirPath(dir string) error {
	if err := os.Remove(dir); err != nil && !errors.Is(err, os.ErrNotExist) {
		return err
	}
	return nil
}
