package move

import (
	"context"
	"fmt"
	"os"
	"slices"
	"time"

	"golang.org/x/sys/unix"

	"overkeep/overlay/gcroot"
	"overkeep/overlay/nixdb"
	"overkeep/overlay/plan"
	"overkeep/overlay/tree"
)

// Past is what an operation did, as far as it came.
type Past struct {
	ID       int
	Kind     Kind
	Plan     string
	Of       int // undo: of which operation
	Time     time.Time
	Ended    bool
	Whole    bool         // each path that was to move has moved, or was left with a reason
	Sealed   []nixdb.Info // rows as they were in the system store
	Released []nixdb.Info // and in the keep
	Roots    []gcroot.Record
}

// History reads the whole journal, oldest first.
func (w *World) History() ([]Past, error) { return History(w.journals()) }

// History reads the journal in a directory, without its lock: for a report.
func History(dir string) (out []Past, err error) {
	all, err := numbers(dir)
	if err != nil {
		return nil, err
	}
	for _, id := range all {
		op, err := load(dir, id, false)
		if err != nil {
			return nil, err
		}
		if op == nil {
			continue
		}
		out = append(out, op.past())
	}
	return out, nil
}

func (o *operation) past() Past {
	p := Past{ID: o.begin.ID, Kind: o.begin.Kind, Plan: o.begin.Plan, Of: o.begin.Of, Ended: o.ended()}
	if o.begin.Time != nil {
		p.Time = *o.begin.Time
	}
	var items []item
	var roots []gcroot.Record
	settled := map[string]bool{}
	for _, e := range o.events {
		for _, l := range e.Left {
			settled[l.Path] = true
		}
		switch e.Type {
		case evBatch:
			items = e.Items
		case evKept:
			roots = e.Roots
		case evGone, evDropped:
			for _, it := range items {
				if !slices.Contains(e.Paths, it.Info.Path) {
					continue
				}
				settled[it.Info.Path] = true
				if it.Kind == plan.Seal {
					p.Sealed = append(p.Sealed, it.Info)
				} else {
					p.Released = append(p.Released, it.Info)
				}
			}
			for _, rec := range roots {
				if e.Type == evGone && slices.Contains(e.Paths, rec.Path) {
					p.Roots = append(p.Roots, rec)
				}
			}
		}
	}
	p.Whole = !slices.ContainsFunc(o.begin.Moves, func(m plan.Move) bool { return !settled[m.Path] })
	return p
}

// Unfinished reports whether the last operation of the journal in a directory did not
// come to its end, and nobody is at work on it: Recover is due.
func Unfinished(dir string) bool {
	all, err := numbers(dir)
	if err != nil || len(all) == 0 {
		return false
	}
	op, err := load(dir, all[len(all)-1], false)
	if err != nil || op != nil && op.ended() {
		return false // what is damaged, the next mover says
	}
	lock, err := openJournals(dir)
	if err != nil {
		return false
	}
	return lock.Close() == nil
}

// Undoable is the last operation that moved something and was not undone, with what of it
// an undo that came to an early end has not taken back; or nil.
func Undoable(past []Past) *Past {
	undone := map[int]bool{}
	back := map[int]map[string]bool{}
	for i := len(past) - 1; i >= 0; i-- {
		p := past[i]
		switch {
		case p.Kind == Undo:
			undone[p.Of] = undone[p.Of] || p.Whole
			if back[p.Of] == nil {
				back[p.Of] = map[string]bool{}
			}
			for _, row := range append(slices.Clone(p.Sealed), p.Released...) {
				back[p.Of][row.Path] = true
			}
		case p.Kind == Wipe, undone[p.ID]:
		default:
			is := func(row nixdb.Info) bool { return back[p.ID][row.Path] }
			p.Sealed = slices.DeleteFunc(slices.Clone(p.Sealed), is)
			p.Released = slices.DeleteFunc(slices.Clone(p.Released), is)
			if len(p.Sealed)+len(p.Released) > 0 {
				return &p
			}
		}
	}
	return nil
}

// DoneOf returns what operations of one plan have moved.
func DoneOf(past []Past, planID string) map[string]bool {
	done := map[string]bool{}
	for _, p := range past {
		if p.Plan != planID || planID == "" {
			continue
		}
		for _, row := range append(slices.Clone(p.Sealed), p.Released...) {
			done[row.Path] = true
		}
	}
	return done
}

// Where there is no room, in words.
const (
	InKeep    = "the keep"
	InSystem  = "the system store"
	BelowKeep = "the disk that the keep lies on"
)

// SpaceError: there is no room for all that is to be copied.
type SpaceError struct {
	Where      string // InKeep, InSystem or BelowKeep
	Need, Free int64  // bytes
	Inodes     bool   // of inodes, and not of bytes
}

func (e *SpaceError) Error() string {
	if e.Inodes {
		return fmt.Sprintf("%s has %d free inodes, and %d are needed", e.Where, e.Free, e.Need)
	}
	return fmt.Sprintf("%s has %d bytes free, and %d are needed", e.Where, e.Free, e.Need)
}

// reserve is left free on each side, for databases and the journal.
const reserve = 8 << 20

// Room asks whether all moves fit, before the first is made. Outer, if not nil, is a
// directory of the file system that holds the keep's image.
func (w *World) Room(ctx context.Context, moves []plan.Move, outer *os.File) error {
	in, out := tree.Space{}, tree.Space{}
	for _, side := range []struct {
		kind     plan.Kind
		from, to *os.File
		sum      *tree.Space
	}{{plan.Seal, w.Lower, w.upper, &in}, {plan.Release, w.upper, w.Lower, &out}} {
		room, err := tree.Room(side.to)
		if err != nil {
			return err
		}
		for _, m := range moves {
			if m.Kind != side.kind || m.Duplicate {
				continue
			}
			u, err := tree.Usage(ctx, side.from, base(m.Path), room.BlockSize)
			if ctx.Err() != nil {
				return ctx.Err()
			}
			if err != nil {
				continue // it will be named when it is its turn
			}
			// More than its NAR could need: a damaged inode claims a size. It is not copied to its
			// end, and must not keep the others from moving.
			if u.Blocks > 4*(u.Inodes+m.NarSize/room.BlockSize+1) {
				continue
			}
			side.sum.Blocks += u.Blocks
			side.sum.Inodes += u.Inodes
		}
		side.sum.BlockSize = room.BlockSize
		where := InKeep
		if side.kind == plan.Release {
			where = InSystem
		}
		if side.sum.Blocks == 0 && side.sum.Inodes == 0 {
			continue
		}
		if need, free := side.sum.Blocks*room.BlockSize+reserve, room.Blocks*room.BlockSize; need > free {
			return &SpaceError{Where: where, Need: need, Free: free}
		}
		if room.Inodes > 0 && side.sum.Inodes > room.Inodes {
			return &SpaceError{Where: where, Need: side.sum.Inodes, Free: room.Inodes, Inodes: true}
		}
	}
	if outer == nil || in.Blocks == 0 {
		return nil
	}
	var st unix.Statfs_t
	if err := again(func() error { return unix.Fstatfs(int(outer.Fd()), &st) }); err != nil {
		return err
	}
	if need, free := in.Blocks*in.BlockSize+reserve, int64(st.Bavail)*st.Bsize; need > free {
		return &SpaceError{Where: BelowKeep, Need: need, Free: free}
	}
	return nil
}
