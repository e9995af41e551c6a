package policy

import (
	"overkeep/policy/graph"
)

// Total is a number of paths and their size.
type Total struct {
	Paths int
	Bytes int64 // of those whose size is known
}

func (t *Total) add(bytes int64) {
	t.Paths++
	t.Bytes += bytes
}

// Move is a path that both have, placed otherwise.
type Move struct {
	Before, After graph.ID // in the graph of either
	Path          string
	Bytes         int64
	ToSystem      bool
	Pull          *Pull // what drags it into the personal store, if not a line itself
}

// Pull is why a path is personal that no line keeps from the system store: it refers
// to Next, and by way of that, on a shortest way, to Cause, whose own reason is not
// Reference.
type Pull struct{ Next, Cause graph.ID }

// Changes is what one set of verdicts moves against another.
type Changes struct {
	Moves                []Move // by their id afterwards
	ToSystem, ToPersonal Total

	// What only one of the two graphs has.
	NewSystem, NewPersonal, GoneSystem, GonePersonal Total
}

// Diff compares two policies over one Index, or two moments of a store with a graph
// each; paths are the same if their base names are.
func Diff(before, after *Verdicts) *Changes {
	c := &Changes{}
	was := func(id graph.ID) graph.ID { return id }
	if before.ix != after.ix {
		names := graph.NewNames(before.ix.g)
		was = func(id graph.ID) graph.ID { return names.Find(after.ix.g.BaseName(id)) }
	}
	kept := graph.NewBits(before.ix.g.Len())
	var causes *Causes
	for id := range graph.ID(after.ix.g.Len()) {
		system, bytes := after.System.Has(id), after.ix.g.NarSize[id]
		old := was(id)
		if old == graph.NoID {
			pick(system, &c.NewSystem, &c.NewPersonal).add(bytes)
			continue
		}
		kept.Set(old)
		if system == before.System.Has(old) {
			continue
		}
		pick(system, &c.ToSystem, &c.ToPersonal).add(bytes)
		m := Move{Before: old, After: id, Path: after.ix.g.Path(id), Bytes: bytes, ToSystem: system}
		if after.reasons[id] == Reference {
			if causes == nil {
				causes = after.Causes()
			}
			p := causes.Of(id)
			m.Pull = &p
		}
		c.Moves = append(c.Moves, m)
	}
	for id := range graph.ID(before.ix.g.Len()) {
		if !kept.Has(id) {
			pick(before.System.Has(id), &c.GoneSystem, &c.GonePersonal).add(before.ix.g.NarSize[id])
		}
	}
	return c
}

func pick(system bool, a, b *Total) *Total {
	if system {
		return a
	}
	return b
}

// Causes tells for every path that is personal for a reference which path decides.
// It is 8 bytes a path.
type Causes struct{ next, cause []graph.ID }

// Causes finds them all in one walk.
func (v *Verdicts) Causes() *Causes {
	n := v.ix.g.Len()
	c := &Causes{make([]graph.ID, n), make([]graph.ID, n)}
	var queue []graph.ID
	for id := range graph.ID(n) {
		c.next[id], c.cause[id] = graph.NoID, graph.NoID
		if !v.System.Has(id) && v.reasons[id] != Reference {
			c.cause[id] = id
			queue = append(queue, id)
		}
	}
	from := v.ix.from()
	for i := 0; i < len(queue); i++ {
		id := queue[i]
		for _, r := range from.To(id) {
			if v.reasons[r] == Reference && c.cause[r] == graph.NoID {
				c.next[r], c.cause[r] = id, c.cause[id]
				queue = append(queue, r)
			}
		}
	}
	return c
}

// Of is the pull on a path whose reason is Reference; for any other personal path
// Next is graph.NoID and Cause the path, and for a system path both are graph.NoID.
func (c *Causes) Of(id graph.ID) Pull { return Pull{c.next[id], c.cause[id]} }
