package move

import (
	"context"
	"encoding/hex"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"strconv"
	"strings"

	"golang.org/x/sys/unix"

	"overkeep/overlay/gcroot"
	"overkeep/overlay/nixdb"
	"overkeep/overlay/plan"
	"overkeep/overlay/tree"
	"overkeep/overlay/wipe"
)

// seal carries one batch into the keep. Each step may be repeated, and resolve takes
// up after any of them.
//
// The copy is made beside the upper layer, where nobody sees it. What follows is done
// with the locks of both collectors, by the rules of Nix's collector: nothing moves that
// a root of the system store reaches, a client of either daemon included, nothing that
// another process works on. Nobody comes to use a copy that is taken back, nor what is
// wiped.
func (r *run) seal(ctx context.Context, b *batch) error {
	if err := r.copyKept(ctx, b); err != nil {
		return err
	}
	if err := r.awaitWorkers(ctx, b); err != nil {
		return err
	}
	unlock, err := r.bothLocks(ctx)
	if err != nil {
		return err
	}
	defer unlock()
	locks, err := r.free(ctx, b)
	defer func() {
		for _, l := range locks {
			l.unlock()
		}
	}()
	if err != nil {
		return err
	}
	if err := r.keep(ctx, b); err != nil {
		return err
	}
	return r.takeOut(ctx, b)
}

// copyKept copies a batch to beside the upper layer, and reads what the keep has already.
func (r *run) copyKept(ctx context.Context, b *batch) error {
	// What the keep has is not to be collected while it is read.
	lock, err := gcLock(ctx, r.personalGC(), unix.LOCK_SH)
	if err != nil {
		return err
	}
	defer lock.Close()
	in, err := subdir(r.store, incoming)
	if err != nil {
		return err
	}
	defer in.Close()
	if err := r.copyIn(ctx, b, r.Lower, in); err != nil {
		return err
	}
	if err := r.verifyKept(ctx, b, r.upper); err != nil {
		return err
	}
	// Before it counts as kept: bytes and names are on the device.
	return syncfs(in)
}

// free leaves out what is in use, and takes the locks of the rest.
func (r *run) free(ctx context.Context, b *batch) (locks []*pathLock, err error) {
	// Either collector may have come before our locks.
	rows, err := valid(ctx, r.personalDB(), pathsOf(r.going(b)))
	if err != nil {
		return nil, err
	}
	system, err := valid(ctx, r.systemDB(), pathsOf(r.going(b)))
	if err != nil {
		return nil, err
	}
	var left []Left
	for _, it := range r.going(b) {
		if _, ok := system[it.Info.Path]; !ok {
			left = append(left, Left{Path: it.Info.Path, Why: Vanished})
		} else if _, ok := rows[it.Info.Path]; it.Duplicate && !ok {
			left = append(left, Left{Path: it.Info.Path, Why: Changed})
		}
	}
	if err := r.leave(b, left); err != nil {
		return nil, err
	}
	if err := r.lookAtRoots(b); err != nil {
		return nil, err
	}
	roots, err := r.Roots(ctx)
	if err != nil {
		return nil, err
	}
	if err := r.leave(b, r.alive(b, roots)); err != nil {
		return nil, err
	}
	if left, err = r.busy(ctx, b); err != nil {
		return nil, err
	}
	if err := r.leave(b, left); err != nil {
		return nil, err
	}
	return r.lockBatch(b)
}

// lookAtRoots finds the user's roots that are to move along with a batch.
func (r *run) lookAtRoots(b *batch) error {
	going := map[string]bool{}
	for _, it := range r.going(b) {
		going[it.Info.Path] = true
	}
	for _, root := range r.op.Roots {
		if root.Kind != plan.RootUser || !going[root.Path] {
			continue
		}
		rec, err := r.Links.Look(root)
		if errors.Is(err, gcroot.ErrChanged) {
			continue // it holds another path now, or none; else it holds this one where it is
		}
		if err != nil {
			return err
		}
		b.roots = append(b.roots, rec)
	}
	return nil
}

// keep makes a batch valid in the keep, and seen there.
func (r *run) keep(ctx context.Context, b *batch) error {
	in, err := subdir(r.store, incoming)
	if err != nil {
		return err
	}
	defer in.Close()
	if err := r.registerKept(ctx, b); err != nil {
		return err
	}
	if len(r.going(b)) == 0 {
		return nil // takeOut takes it back
	}
	for i, it := range b.items {
		if _, stays := r.left[it.Info.Path]; stays {
			continue
		}
		if it.Duplicate { // both had it for a while: now it is the keep's
			if err := opaque(r.upper, base(it.Info.Path)); err != nil {
				return err
			}
			continue
		}
		if err := r.clearName(r.upper, base(it.Info.Path)); err != nil {
			return err
		}
		b.ours[it.Info.Path] = true
		if err := opaque(in, strconv.Itoa(i)); err != nil {
			return err
		}
		if err := rename(in, strconv.Itoa(i), r.upper, base(it.Info.Path)); err != nil {
			return err
		}
	}
	if err := syncfs(r.upper); err != nil {
		return err
	}
	if err := r.step(b, event{Type: evKept, Paths: pathsOf(r.going(b)), Roots: b.roots}); err != nil {
		return err
	}
	if err := r.Remount(); err != nil {
		return fmt.Errorf("remount the store: %w", err)
	}
	return nil
}

// copyIn copies what is no duplicate into a directory, under the items' numbers, and
// leaves out what does not match its hash.
func (r *run) copyIn(ctx context.Context, b *batch, from, to *os.File) error {
	var jobs []tree.Job
	var index []int
	for i, it := range r.items(b) {
		if it.Duplicate {
			continue
		}
		want, err := narHash(it.Info.NarHash)
		if err != nil {
			return err
		}
		jobs = append(jobs, tree.Job{Name: base(it.Info.Path), NewName: strconv.Itoa(i), Want: want, NarSize: it.Info.NarSize})
		index = append(index, i)
	}
	var left []Left
	o := tree.Options{Progress: func(n int64) { r.prog.Bytes += n; r.tell(r.prog) }}
	r.prog.Doing = "copying"
	err := tree.CopyAll(ctx, from, to, jobs, o, func(n int, _ tree.Result, err error) {
		if err != nil {
			left = append(left, notCopied(b.items[index[n]].Info.Path, err))
		} else {
			r.prog.Paths++
		}
	})
	if err != nil {
		return err
	}
	return r.leave(b, left)
}

// items are all items of a batch, by their number.
func (r *run) items(b *batch) func(yield func(int, item) bool) {
	return func(yield func(int, item) bool) {
		for i, it := range b.items {
			if _, stays := r.left[it.Info.Path]; !stays && !yield(i, it) {
				return
			}
		}
	}
}

func notCopied(path string, err error) Left {
	var m *tree.MismatchError
	var size *tree.SizeError
	switch {
	case errors.As(err, &size):
		return Left{Path: path, Why: Corrupt, By: fmt.Sprintf("more than %d bytes", size.Want)}
	case errors.As(err, &m):
		return Left{Path: path, Why: Corrupt, By: "sha256:" + hex.EncodeToString(m.Got[:])}
	case errors.Is(err, fs.ErrNotExist):
		return Left{Path: path, Why: Vanished}
	}
	return Left{Path: path, Why: Strange, By: err.Error()}
}

func narHash(s string) (out [32]byte, err error) {
	digits, ok := strings.CutPrefix(s, "sha256:")
	b, err := hex.DecodeString(digits)
	if !ok || err != nil || len(b) != len(out) {
		return out, fmt.Errorf("%q is not a NAR hash", s)
	}
	return [32]byte(b), nil
}

// verifyKept reads the duplicates where they are already: the other copy is about to
// go.
func (r *run) verifyKept(ctx context.Context, b *batch, dir *os.File) error {
	var left []Left
	for _, it := range r.items(b) {
		if !it.Duplicate {
			continue
		}
		res, err := tree.Hash(ctx, dir, base(it.Info.Path), tree.Options{})
		if ctx.Err() != nil {
			return ctx.Err()
		}
		want, herr := narHash(it.Info.NarHash)
		if herr != nil {
			return herr
		}
		if err == nil && res.NarHash != want {
			err = &tree.MismatchError{Name: base(it.Info.Path), Want: want, Got: res.NarHash}
		}
		if err != nil {
			left = append(left, notCopied(it.Info.Path, err))
		} else {
			r.prog.Paths++
		}
	}
	return r.leave(b, left)
}

// registerKept registers the batch and all that it refers to in the keep, as Nix's own
// look at a system path would (local-overlay-store.cc, isValidPathUncached).
func (r *run) registerKept(ctx context.Context, b *batch) error {
	for {
		paths := pathsOf(r.going(b))
		if len(paths) == 0 {
			return nil
		}
		rows, err := nixdb.ReadClosure(ctx, r.systemDB(), paths)
		if err != nil {
			return err
		}
		for i, row := range rows {
			if o, ok := r.op.Original[row.Path]; ok && o.NarHash == row.NarHash {
				rows[i].Deriver = o.Deriver
			}
		}
		err = nixdb.Register(ctx, r.personalDB(), rows)
		var c *nixdb.ConflictError
		if !errors.As(err, &c) {
			return err
		}
		// What the keep knows with other data: whatever leads there stays.
		var left []Left
		for _, p := range reaching(rows, c.Path, paths) {
			left = append(left, Left{Path: p, Why: Conflict, By: c.Path})
		}
		if len(left) == 0 {
			return err
		}
		if err := r.leave(b, left); err != nil {
			return err
		}
	}
}

// reaching lists which of paths are target or refer to it, by whatever way.
func reaching(rows []nixdb.Info, target string, paths []string) (out []string) {
	by := map[string][]string{}
	for _, row := range rows {
		for _, ref := range row.Refs {
			by[ref] = append(by[ref], row.Path)
		}
	}
	seen := map[string]bool{target: true}
	for todo := []string{target}; len(todo) > 0; {
		p := todo[len(todo)-1]
		todo = todo[:len(todo)-1]
		for _, q := range by[p] {
			if !seen[q] {
				seen[q] = true
				todo = append(todo, q)
			}
		}
	}
	for _, p := range paths {
		if seen[p] {
			out = append(out, p)
		}
	}
	return out
}

// clearName makes room for a path in the upper layer: a whiteout that a collector left,
// or a tree that no row speaks of.
func (r *run) clearName(dir *os.File, name string) error {
	var st unix.Stat_t
	err := unix.Fstatat(int(dir.Fd()), name, &st, unix.AT_SYMLINK_NOFOLLOW)
	if errors.Is(err, unix.ENOENT) {
		return nil
	}
	if err != nil {
		return err
	}
	if st.Mode&unix.S_IFMT == unix.S_IFCHR {
		return again(func() error { return unix.Unlinkat(int(dir.Fd()), name, 0) })
	}
	bin, err := subdir(r.store, trash)
	if err != nil {
		return err
	}
	defer bin.Close()
	return throw(dir, name, bin)
}

// throw moves an entry into a trash directory, under a name that is free.
func throw(dir *os.File, name string, bin *os.File) error {
	for n := 0; ; n++ {
		err := renameNew(dir, name, bin, strconv.Itoa(n))
		if !errors.Is(err, unix.EEXIST) {
			return err
		}
	}
}

// throwAll throws those of paths that lie in dir.
func throwAll(dir *os.File, paths []string, bin *os.File) error {
	for _, p := range paths {
		ok, err := there(dir, base(p))
		if err != nil {
			return err
		}
		if ok {
			if err := throw(dir, base(p), bin); err != nil {
				return err
			}
		}
	}
	return nil
}

// takeOut removes a batch that is valid in the keep from the system store.
func (r *run) takeOut(ctx context.Context, b *batch) (err error) {
	var left []Left
	for _, rec := range b.roots {
		if _, stays := r.left[rec.Path]; stays {
			continue
		}
		// Where it cannot come along, it holds what it holds.
		if err := r.Links.Make(rec); gcroot.Theirs(err) || errors.Is(err, unix.EACCES) {
			left = append(left, Left{Path: rec.Path, Why: Alive, By: rec.Link})
		} else if err != nil {
			return err
		}
	}
	if err := r.leave(b, left); err != nil {
		return err
	}
	if err := syncfs(r.upper); err != nil {
		return err
	}
	for {
		going := r.going(b)
		if err := r.takeBack(ctx, b, r.staying(b)); err != nil {
			return err
		}
		if len(going) == 0 {
			return r.step(b, event{Type: evBack})
		}
		b.paths = pathsOf(going)
		if err := r.step(b, event{Type: evDeleting, Paths: b.paths}); err != nil {
			return err
		}
		expect := map[string]string{}
		for _, it := range going {
			expect[it.Info.Path] = it.Info.NarHash
		}
		err := nixdb.Invalidate(ctx, r.systemDB(), b.paths, expect)
		var ref *nixdb.ReferredError
		var con *nixdb.ConflictError
		switch {
		case errors.As(err, &ref):
			err = r.leave(b, []Left{{Path: ref.Path, Why: Referenced, By: ref.By}})
		case errors.As(err, &con):
			err = r.leave(b, []Left{{Path: con.Path, Why: Changed}})
		case err == nil:
			return r.forget(ctx, b, b.paths)
		}
		if err != nil {
			return err
		}
	}
}

// staying are the items that were copied and do not move after all.
func (r *run) staying(b *batch) (out []item) {
	for _, it := range b.items {
		if _, stays := r.left[it.Info.Path]; stays {
			out = append(out, it)
		}
	}
	return out
}

// alive tells what of a batch a root holds. The batch is closed under referrers, so
// what reaches into it from outside is a root itself.
func (r *run) alive(b *batch, roots []plan.Root) (left []Left) {
	// Only those that were found as they should be: another one, though it was to move
	// along, is not, and would be left leading nowhere.
	moving := map[plan.Root]bool{}
	for _, rec := range b.roots {
		moving[plan.Root{Link: rec.Link, Path: rec.Path}] = true
	}
	going := map[string]bool{}
	for _, it := range r.going(b) {
		going[it.Info.Path] = true
	}
	for _, root := range roots {
		if !going[root.Path] || root.Kind == plan.RootOwnPin ||
			root.Kind == plan.RootUser && moving[plan.Root{Link: root.Link, Path: root.Path}] {
			continue
		}
		left = append(left, Left{Path: root.Path, Why: Alive, By: root.Link})
	}
	return left
}

// forget destroys what lies in the system store of paths that are not valid there any
// more. The collector's lock and those of the paths are held.
func (r *run) forget(ctx context.Context, b *batch, paths []string) error {
	r.dirty = true
	if err := r.destroy(ctx, paths); err != nil {
		return err
	}
	for _, rec := range b.roots {
		if _, stays := r.left[rec.Path]; stays {
			continue
		}
		// One that its user changed meanwhile is not ours to take away.
		if err := r.Links.Remove(rec); err != nil && !gcroot.Theirs(err) {
			// A second time is enough: what cannot be taken away is told of.
			if !r.recovering || !errors.Is(err, unix.EACCES) && !errors.Is(err, unix.EROFS) {
				return err
			}
			r.linksLeft = append(r.linksLeft, "a link that names what was sealed: "+err.Error())
		}
		r.res.Roots = append(r.res.Roots, RootMoved{From: rec.Link, To: rec.To})
	}
	if err := r.Remount(); err != nil {
		return fmt.Errorf("remount the store: %w", err)
	}
	if err := r.step(b, event{Type: evGone, Paths: paths}); err != nil {
		return err
	}
	for _, it := range b.items {
		for _, p := range paths {
			if p == it.Info.Path {
				r.sealedOne(it.Info)
			}
		}
	}
	return nil
}

// sealedOne counts a path as sealed.
func (r *run) sealedOne(row nixdb.Info) {
	r.moved[row.Path] = true
	r.sealed = append(r.sealed, row)
	r.res.Sealed = append(r.res.Sealed, row.Path)
	r.res.Bytes += row.NarSize
}

// destroy overwrites and removes trees of the system store, whatever is left of them,
// and the stage.
func (r *run) destroy(ctx context.Context, paths []string) error {
	stage, err := r.openStage()
	if err != nil {
		return err
	}
	defer stage.Close()
	if err := throwAll(r.Lower, paths, stage); err != nil {
		return err
	}
	if err := fsync(r.Lower); err != nil {
		return err
	}
	// Before they are emptied: a directory that the view has looked up in both layers
	// goes on reading both, wherever the lower one is now, until the overlay forgets it.
	if err := r.Remount(); err != nil {
		return fmt.Errorf("remount the store: %w", err)
	}
	return r.emptyStage(ctx)
}

// emptyStage wipes all that lies in the stage, and the stage.
func (r *run) emptyStage(ctx context.Context) error {
	o := wipe.Options{}
	if links, err := openAt(r.Lower, ".links"); err == nil {
		defer links.Close()
		o.Links = links
	} else if !errors.Is(err, unix.ENOENT) {
		return err
	}
	rep, err := wipe.Tree(ctx, r.Lower, r.stage, o)
	r.wiped.Add(rep)
	return err
}
