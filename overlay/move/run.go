package move

import (
	"context"
	"fmt"
	"os"

	"overkeep/overlay/gcroot"
	"overkeep/overlay/nixdb"
	"overkeep/overlay/plan"
	"overkeep/overlay/wipe"
)

// Op is what is to be done.
type Op struct {
	Kind  Kind
	Plan  string      // the plan's id, for an apply that is gone on with
	Of    int         // undo: the operation that is reverted
	Moves []plan.Move // in a plan's order
	Roots []plan.Root // that move along

	// Original are rows as they were before an operation that is reverted: a path that
	// comes back to the system store gets its own again, deriver included.
	Original map[string]nixdb.Info
	// Restore are the roots of that operation.
	Restore []gcroot.Record
}

// Why says what kept a path where it is.
type Why string

const (
	Vanished   Why = "vanished"   // it is not valid any more where it was
	Changed    Why = "changed"    // its row says other than the plan
	Corrupt    Why = "corrupt"    // its contents are not what its hash says: By is the hash they have
	Strange    Why = "strange"    // its files cannot be copied: By says why
	Alive      Why = "alive"      // a root holds it: By
	Locked     Why = "locked"     // another Nix process works on it
	Referenced Why = "referenced" // By stays and refers to it
	Needs      Why = "needs"      // it refers to By, which stays in the keep
	Conflict   Why = "conflict"   // the other store has it with other data
)

// Left is a path that stays where it is.
type Left struct {
	Path string `json:"path"`
	Why  Why    `json:"why"`
	By   string `json:"by,omitempty"`
}

// Result is what became of an operation.
type Result struct {
	ID       int          `json:"operation"`
	Sealed   []string     `json:"sealed,omitempty"`
	Released []string     `json:"released,omitempty"`
	Left     []Left       `json:"left,omitempty"`
	Bytes    int64        `json:"bytes"` // of NARs, of what moved
	Roots    []RootMoved  `json:"roots,omitempty"`
	Clean    *CleanResult `json:"cleaned,omitempty"`
}

// RootMoved is a link that went along with a path.
type RootMoved struct {
	From string `json:"from"`
	To   string `json:"to"`
	Back bool   `json:"back,omitempty"` // out of the keep again
}

// Batches are small enough that the system's collector lock is held for a second or
// so, and large enough that what is done once for each does not count.
const (
	batchBytes = 256 << 20
	batchPaths = 512
)

// batches cuts moves where one kind ends, and between units.
func batches(moves []plan.Move) (out [][]plan.Move) {
	start, size := 0, int64(0)
	for i, m := range moves {
		if i > start && (m.Kind != moves[start].Kind || m.Unit != moves[i-1].Unit && (i-start >= batchPaths || size+m.NarSize > batchBytes)) {
			out = append(out, moves[start:i])
			start, size = i, 0
		}
		size += m.NarSize
	}
	if start < len(moves) {
		out = append(out, moves[start:])
	}
	return out
}

// run is one operation under way.
type run struct {
	*World
	op    Op
	j     *journal
	stage string
	moved map[string]bool // sealed or released by this operation
	left  map[string]Left // and what stays
	res   Result
	prog  Progress
	dirty bool // something lay in the system store that must be gone from the device

	held   map[string]string // what sealed paths would leave referred to: by which path that stays
	sealed []nixdb.Info      // rows as they were, of what left the system store
	wiped  wipe.Report       // of all stages

	recovering bool     // what was interrupted is ended
	linksLeft  []string // links outside that could not be removed
}

// Run carries out an operation: all of its moves, but for those in Result.Left, or,
// with an error, some of them. Whatever the error, each path is valid in one place
// and nothing of what was sealed is left in plaintext, unless the error says that
// recovery is still due (*UnfinishedError).
//
// Recover must have been called since Open.
func (w *World) Run(ctx context.Context, op Op) (*Result, error) {
	stage, err := newStage()
	if err != nil {
		return nil, err
	}
	j, err := create(w.journals(), event{Kind: op.Kind, Plan: op.Plan, Of: op.Of, Stage: stage, Moves: op.Moves})
	if err != nil {
		return nil, err
	}
	defer j.close()
	r := &run{World: w, op: op, j: j, stage: stage, moved: map[string]bool{}, left: map[string]Left{}, held: map[string]string{}, res: Result{ID: j.id}}
	r.prog.TotalPaths = len(op.Moves)
	for _, m := range op.Moves {
		if !m.Duplicate {
			r.prog.TotalBytes += m.NarSize
		}
	}
	var failed error
	for n, moves := range batches(op.Moves) {
		if failed = ctx.Err(); failed != nil {
			break
		}
		b := &batch{n: n + 1, kind: moves[0].Kind, ours: map[string]bool{}}
		if failed = r.batch(ctx, b, moves); failed != nil {
			// What was begun is finished or taken back at once, if that can be had.
			if err := r.resolve(context.WithoutCancel(ctx), b); err != nil {
				return &r.res, &UnfinishedError{Cause: failed, Then: err}
			}
			break
		}
	}
	if err := r.finish(context.WithoutCancel(ctx)); err != nil {
		return &r.res, &UnfinishedError{Cause: failed, Then: err}
	}
	return &r.res, failed
}

// UnfinishedError: the operation stopped half way, and so did setting it right. The
// journal knows; the next mover goes on.
type UnfinishedError struct{ Cause, Then error }

func (e *UnfinishedError) Error() string {
	if e.Cause == nil {
		return fmt.Sprintf("not finished: %v", e.Then)
	}
	return fmt.Sprintf("%v; and it could not be set right at once: %v", e.Cause, e.Then)
}

func (e *UnfinishedError) Unwrap() []error {
	if e.Cause == nil {
		return []error{e.Then}
	}
	return []error{e.Cause, e.Then}
}

// batch is a part of an operation that goes through all steps together.
type batch struct {
	n     int
	kind  plan.Kind
	items []item
	roots []gcroot.Record
	phase string   // the last event of it
	paths []string // deleting: those whose rows leave; placing, placed: those that come

	// ours are the paths whose copy in the upper layer this batch put there, or may have.
	ours map[string]bool
}

// step records an event of a batch, and that it has come so far.
func (r *run) step(b *batch, e event) error {
	e.Batch = b.n
	if err := r.j.add(e); err != nil {
		return err
	}
	b.phase = e.Type
	return nil
}

func (r *run) batch(ctx context.Context, b *batch, moves []plan.Move) error {
	var paths []string
	for _, m := range moves {
		paths = append(paths, m.Path)
	}
	db := r.systemDB()
	if b.kind == plan.Release {
		db = r.personalDB()
	}
	rows, err := valid(ctx, db, paths)
	if err != nil {
		return err
	}
	var left []Left
	for _, m := range moves {
		info, ok := rows[m.Path]
		switch {
		case !ok:
			left = append(left, Left{Path: m.Path, Why: Vanished})
		case info.NarHash != m.NarHash:
			left = append(left, Left{Path: m.Path, Why: Changed})
		default:
			if o, ok := r.op.Original[m.Path]; ok && o.NarHash == info.NarHash {
				info = o
			}
			b.items = append(b.items, item{Info: info, Kind: m.Kind, Duplicate: m.Duplicate})
		}
	}
	if err := r.leave(b, left); err != nil {
		return err
	}
	if len(b.items) == 0 {
		return nil
	}
	for _, rec := range r.op.Restore {
		if _, ok := rows[rec.Path]; ok && b.kind == plan.Release {
			b.roots = append(b.roots, rec)
		}
	}
	if err := r.step(b, event{Type: evBatch, Items: b.items, Roots: b.roots}); err != nil {
		return err
	}
	if b.kind == plan.Seal {
		return r.seal(ctx, b)
	}
	return r.release(ctx, b)
}

// leave takes paths out of a batch, and with them those that have to stay for them:
// of a seal what they refer to, of a release what refers to them.
func (r *run) leave(b *batch, left []Left) error {
	var all []Left
	add := func(l Left) {
		if _, ok := r.left[l.Path]; !ok {
			r.left[l.Path] = l
			all = append(all, l)
		}
	}
	for _, l := range left {
		add(l)
	}
	for changed := true; changed; {
		changed = false
		r.hold(b)
		for _, it := range b.items {
			if _, known := r.left[it.Info.Path]; known {
				continue
			}
			if by, ok := r.held[it.Info.Path]; ok && b.kind == plan.Seal {
				add(Left{Path: it.Info.Path, Why: Referenced, By: by})
				changed = true
			} else if ref := r.needsLeft(it); ref != "" && b.kind == plan.Release {
				add(Left{Path: it.Info.Path, Why: Needs, By: ref})
				changed = true
			}
		}
	}
	if len(all) == 0 {
		return nil
	}
	r.res.Left = append(r.res.Left, all...)
	return r.j.add(event{Type: evLeft, Batch: b.n, Left: all})
}

// hold notes what the items that stay refer to, also for the batches that follow. What a
// path that vanished refers to is not known, and it refers to nothing any more.
func (r *run) hold(b *batch) {
	for _, it := range r.staying(b) {
		for _, ref := range it.Info.Refs {
			if ref != it.Info.Path {
				r.held[ref] = it.Info.Path
			}
		}
	}
}

// needsLeft is a path that an item refers to and that stays, or "".
func (r *run) needsLeft(it item) string {
	for _, ref := range it.Info.Refs {
		if _, stays := r.left[ref]; stays && ref != it.Info.Path {
			return ref
		}
	}
	return ""
}

// going are the items that are still to move.
func (r *run) going(b *batch) (out []item) {
	for _, it := range b.items {
		if _, stays := r.left[it.Info.Path]; !stays {
			out = append(out, it)
		}
	}
	return out
}

func pathsOf(items []item) (out []string) {
	for _, it := range items {
		out = append(out, it.Info.Path)
	}
	return out
}

// finish wipes what is left of an operation and ends its journal.
func (r *run) finish(ctx context.Context) error {
	if err := r.sweepLocks(); err != nil {
		return err
	}
	if err := r.unmark(); err != nil {
		return err
	}
	if r.op.Kind == Undo {
		if err := r.letGo(r.res.Sealed); err != nil {
			return err
		}
	}
	if err := r.Settle(ctx); err != nil {
		return fmt.Errorf("bring the pins up to date: %w", err)
	}
	if r.dirty {
		r.tell(Progress{Doing: "wiping the system store's device"})
		c, err := r.clean(ctx)
		r.res.Clean = c
		if err != nil {
			return err
		}
		if err := r.j.add(event{Type: evCleaned, Result: c}); err != nil {
			return err
		}
	}
	return r.j.add(event{Type: evEnd})
}

// openStage opens this operation's directory in the system store.
func (r *run) openStage() (*os.File, error) { return subdir(r.Lower, r.stage) }
