package move

import (
	"context"
	"errors"
	"fmt"
	"os"
	"slices"

	"golang.org/x/sys/unix"

	"overkeep/overlay/gcroot"
	"overkeep/overlay/nixdb"
	"overkeep/overlay/plan"
	"overkeep/overlay/tree"
)

// resolve brings a batch that was interrupted, wherever that was, to an end: forward
// if the database of the system store has let go of a seal or has taken a release,
// else back. It may be interrupted itself.
func (r *run) resolve(ctx context.Context, b *batch) error {
	switch b.phase {
	case "", evGone, evDropped, evBack:
		return nil // nothing begun, or nothing left to do
	}
	if err := nixdb.Confirm(ctx, r.systemDB()); err != nil {
		return err
	}
	if b.kind == plan.Seal {
		return r.resolveSeal(ctx, b)
	}
	return r.resolveRelease(ctx, b)
}

func (r *run) resolveSeal(ctx context.Context, b *batch) error {
	unlock, err := r.bothLocks(ctx)
	if err != nil {
		return err
	}
	defer unlock()
	var out []string
	if b.phase == evDeleting {
		rows, err := valid(ctx, r.systemDB(), b.paths)
		if err != nil {
			return err
		}
		for _, p := range b.paths {
			// One transaction removed all of the rows, or none. A row that is there
			// beside others that are not was made since: somebody built it again.
			if _, ok := rows[p]; !ok {
				out = append(out, p)
			}
		}
	}
	locks, held, err := r.lockAll(pathsOf(b.items))
	defer func() {
		for _, l := range locks {
			l.unlock()
		}
	}()
	if err != nil {
		return err
	}
	if len(out) == 0 {
		if err := r.takeBack(ctx, b, b.items); err != nil {
			return err
		}
		return r.step(b, event{Type: evBack})
	}
	gone := map[string]bool{}
	for _, p := range out {
		if held[p] {
			// A builder makes it anew at this moment: what lies there now is its own.
			return &HeldError{p}
		}
		gone[p] = true
	}
	var stay []item
	for _, it := range b.items {
		if !gone[it.Info.Path] {
			stay = append(stay, it)
			r.left[it.Info.Path] = Left{Path: it.Info.Path}
		}
	}
	if err := r.takeBack(ctx, b, stay); err != nil {
		return err
	}
	return r.forget(ctx, b, out)
}

// lockBatch takes the locks of what is to move, and leaves out what somebody else has.
func (r *run) lockBatch(b *batch) ([]*pathLock, error) {
	locks, held, err := r.lockAll(pathsOf(r.going(b)))
	if err != nil {
		return locks, err
	}
	var left []Left
	for _, p := range keys(held) {
		left = append(left, Left{Path: p, Why: Locked})
	}
	return locks, r.leave(b, left)
}

// lockAll takes the locks of paths, but for those that somebody else has.
func (r *run) lockAll(paths []string) (locks []*pathLock, held map[string]bool, err error) {
	held = map[string]bool{}
	for _, p := range paths {
		l, err := lockPath(r.Lower, base(p))
		var h *HeldError
		switch {
		case errors.As(err, &h):
			held[p] = true
		case err != nil:
			return locks, held, err
		default:
			locks = append(locks, l)
		}
	}
	return locks, held, nil
}

// takeBack removes the keep's new copies of paths that stay valid in the system store.
// Their rows stay: they are rows of system paths now, which the supervisor forgets when
// nothing needs them.
func (r *run) takeBack(ctx context.Context, b *batch, items []item) error {
	var paths []string
	stay := map[string]bool{}
	hash := map[string]string{}
	for _, it := range items {
		hash[it.Info.Path] = it.Info.NarHash
		stay[it.Info.Path] = true
		if b.ours[it.Info.Path] {
			paths = append(paths, it.Info.Path)
		}
	}
	rows, err := valid(ctx, r.systemDB(), paths)
	if err != nil {
		return err
	}
	// The last copy is never removed, whatever the journal says. One that was built again
	// since, to other contents, is another: the keep's row is of ours.
	var safe []string
	for _, p := range paths {
		if rows[p].NarHash == hash[p] {
			safe = append(safe, p)
		}
	}
	if err := tree.Remove(ctx, r.store, incoming); err != nil {
		return err
	}
	// After an interruption somebody may have come to use them.
	if safe, err = r.idle(ctx, safe); err != nil {
		return err
	}
	// The keep may need them in the system store again: the lock of its collector is
	// held until they are pinned.
	if err := r.dropCopies(ctx, safe); err != nil {
		return err
	}
	for _, rec := range b.roots {
		if stay[rec.Path] {
			// A link too many in the keep does no harm.
			if err := r.Links.Drop(rec); err != nil && !gcroot.Theirs(err) && !errors.Is(err, unix.EACCES) {
				return err
			}
		}
	}
	return nil
}

func (r *run) resolveRelease(ctx context.Context, b *batch) error {
	lock, err := gcLock(ctx, r.systemGC(), unix.LOCK_SH)
	if err != nil {
		return err
	}
	defer lock.Close()
	personal, err := gcLock(ctx, r.personalGC(), unix.LOCK_EX)
	if err != nil {
		return err
	}
	defer personal.Close()
	r.dirty = true
	hash := map[string]string{}
	for _, it := range b.items {
		hash[it.Info.Path] = it.Info.NarHash
	}
	if b.phase == evPlaced {
		// Nothing held them since: the system's collector may have run.
		rows, err := valid(ctx, r.systemDB(), b.paths)
		if err != nil {
			return err
		}
		var in []string
		for _, p := range b.paths {
			if rows[p].NarHash == hash[p] {
				in = append(in, p)
			}
		}
		if len(in) == 0 {
			return r.step(b, event{Type: evBack})
		}
		return r.dropUpper(ctx, b, in)
	}
	if b.phase != evPlacing {
		if err := r.emptyStage(ctx); err != nil {
			return err
		}
		return r.step(b, event{Type: evBack})
	}
	locks, held, err := r.lockAll(b.paths)
	defer func() {
		for _, l := range locks {
			l.unlock()
		}
	}()
	if err != nil {
		return err
	}
	rows, err := valid(ctx, r.systemDB(), b.paths)
	if err != nil {
		return err
	}
	var in, out []string
	for _, p := range b.paths {
		switch row, ok := rows[p]; {
		case ok && row.NarHash == hash[p]:
			in = append(in, p)
		case ok: // somebody built it since, to other contents: theirs there, ours in the keep
		case held[p]:
			return &HeldError{p}
		default:
			out = append(out, p)
		}
	}
	dup := map[string]bool{}
	for _, it := range b.items {
		dup[it.Info.Path] = it.Duplicate
	}
	// Duplicates were there before: they say nothing of our transaction.
	committed := false
	for _, p := range in {
		committed = committed || !dup[p]
	}
	if err := r.destroy(ctx, out); err != nil {
		return err
	}
	if !committed {
		return r.step(b, event{Type: evBack})
	}
	b.paths = in
	if err := r.step(b, event{Type: evPlaced, Paths: in}); err != nil {
		return err
	}
	return r.dropUpper(ctx, b, in)
}

// Recovered is what Recover found and did.
type Recovered struct {
	ID     int    `json:"operation"` // 0: there was nothing to recover
	Kind   Kind   `json:"kind,omitempty"`
	Plan   string `json:"plan,omitempty"`
	Result Result `json:"result"`
}

// Recover ends what was interrupted: the batch under way is finished or taken back,
// what was sealed is wiped. Call it after Open, before anything else. Without an
// interruption it costs a look at the last file of the journal.
func (w *World) Recover(ctx context.Context) (*Recovered, error) {
	all, err := numbers(w.journals())
	if err != nil || len(all) == 0 {
		return &Recovered{}, err
	}
	id := all[len(all)-1]
	op, err := load(w.journals(), id, true)
	if err != nil {
		return nil, err
	}
	if op == nil { // the file was made and its first line was not written
		if err := os.Remove(fileOf(w.journals(), id)); err != nil {
			return nil, err
		}
		return &Recovered{}, syncDir(w.journals())
	}
	if op.ended() {
		return &Recovered{}, nil
	}
	j, err := reopen(w.journals(), id)
	if err != nil {
		return nil, err
	}
	defer j.close()
	r, b := w.replay(op, j)
	if b != nil {
		if err := r.resolve(ctx, b); err != nil {
			return nil, &UnfinishedError{Then: fmt.Errorf("operation %d: %w", id, err)}
		}
	}
	// Without a batch event there may still be an empty stage.
	if err := r.emptyStage(ctx); err != nil {
		return nil, &UnfinishedError{Then: err}
	}
	if err := tree.Remove(ctx, w.store, incoming); err != nil {
		return nil, &UnfinishedError{Then: err}
	}
	if err := tree.Remove(ctx, w.store, trash); err != nil {
		return nil, &UnfinishedError{Then: err}
	}
	if err := r.finish(ctx); err != nil {
		return nil, &UnfinishedError{Then: err}
	}
	return &Recovered{ID: id, Kind: op.begin.Kind, Plan: op.begin.Plan, Result: r.res}, nil
}

// replay builds the state of an interrupted operation; b is the batch under way.
func (w *World) replay(op *operation, j *journal) (r *run, b *batch) {
	r = &run{World: w, j: j, stage: op.begin.Stage, moved: map[string]bool{}, left: map[string]Left{}, held: map[string]string{},
		op: Op{Kind: op.begin.Kind, Plan: op.begin.Plan, Of: op.begin.Of, Moves: op.begin.Moves}, res: Result{ID: op.begin.ID}}
	cleaned := false
	for _, e := range op.events {
		cleaned = e.Type == evCleaned
		switch e.Type {
		case evBatch:
			b = &batch{n: e.Batch, items: e.Items, roots: e.Roots, phase: e.Type, ours: map[string]bool{}}
			for _, it := range e.Items {
				b.kind = it.Kind
				b.ours[it.Info.Path] = !it.Duplicate
			}
			r.dirty = true
		case evKept:
			b.roots, b.phase = e.Roots, e.Type
			clear(b.ours)
			for _, it := range b.items {
				b.ours[it.Info.Path] = !it.Duplicate && slices.Contains(e.Paths, it.Info.Path)
			}
		case evDeleting, evPlacing, evPlaced:
			b.paths, b.phase = e.Paths, e.Type
		case evGone, evDropped:
			b.phase = e.Type
			for _, it := range b.items {
				switch {
				case !slices.Contains(e.Paths, it.Info.Path):
				case e.Type == evGone:
					r.sealedOne(it.Info)
					for _, rec := range b.roots {
						if rec.Path == it.Info.Path { // clean looks at where they were
							r.res.Roots = append(r.res.Roots, RootMoved{From: rec.Link, To: rec.To})
						}
					}
				default:
					r.releasedOne(it.Info)
				}
			}
		case evBack:
			b.phase = e.Type
		case evLeft:
			for _, l := range e.Left {
				r.left[l.Path] = l
				if b != nil && b.phase == evBatch {
					delete(b.ours, l.Path)
				}
			}
			r.res.Left = append(r.res.Left, e.Left...)
		}
	}
	if cleaned {
		r.dirty = false
	}
	return r, b
}
