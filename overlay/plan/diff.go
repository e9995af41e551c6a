package plan

import (
	"cmp"
	"fmt"
	"slices"
	"strings"
)

// Difference is in what two plans differ.
type Difference struct {
	Missing  []Move // in want, but not to be done any more
	New      []Move // not in want
	Changed  []Move // to another store, of other data, or of a path that now is in both: as it is now
	NewRoots []Root // a root that would move along and is not in want, or not so
}

// Empty: nothing differs.
func (d *Difference) Empty() bool {
	return len(d.Missing)+len(d.New)+len(d.Changed)+len(d.NewRoots) == 0
}

// String says in words how much differs. It names nothing.
func (d *Difference) String() string {
	var out []string
	for _, c := range []struct {
		n    int
		what string
	}{{len(d.Missing), "need not or cannot move any more"}, {len(d.New), "would move besides"},
		{len(d.Changed), "changed"}, {len(d.NewRoots), "roots would move along besides"}} {
		if c.n > 0 {
			out = append(out, fmt.Sprintf("%d %s", c.n, c.what))
		}
	}
	if len(out) == 0 {
		return "no difference"
	}
	return strings.Join(out, ", ")
}

// Diff compares the plan that was agreed to with one made now. Paths for which done
// says true (nil: none) have been moved since, or are half way: neither that they are
// missing now nor how they move is a difference. The order and the reasons are none
// either, nor is a root that has gone: nothing is moved for them that was not agreed to.
func Diff(want, now *Plan, done func(path string) bool) *Difference {
	if done == nil {
		done = func(string) bool { return false }
	}
	d := &Difference{}
	old := make(map[string]*Move, len(want.Moves))
	for i := range want.Moves {
		old[want.Moves[i].Path] = &want.Moves[i]
	}
	for _, m := range now.Moves {
		o, ok := old[m.Path]
		delete(old, m.Path)
		switch {
		case !ok:
			d.New = append(d.New, m)
		case done(m.Path) && o.Kind == m.Kind && o.NarHash == m.NarHash:
		case o.Kind != m.Kind || o.NarHash != m.NarHash || o.NarSize != m.NarSize || o.Duplicate != m.Duplicate:
			d.Changed = append(d.Changed, m)
		}
	}
	for _, m := range old {
		if !done(m.Path) {
			d.Missing = append(d.Missing, *m)
		}
	}
	slices.SortFunc(d.Missing, func(x, y Move) int { return cmp.Compare(x.Path, y.Path) })
	links := make(map[Root]bool, len(want.Roots))
	for _, r := range want.Roots {
		links[r] = true
	}
	for _, r := range now.Roots {
		if !links[r] {
			d.NewRoots = append(d.NewRoots, r)
		}
	}
	return d
}
