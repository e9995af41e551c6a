package plan

import (
	"slices"

	"overkeep/policy/graph"
)

// units splits a set into the strongly connected parts of the references among it,
// such that a part comes after those that it refers to. It is Tarjan's algorithm with
// a stack of its own: stores have chains of references as long as themselves.
func units(g *graph.Graph, set graph.Bits) (order []graph.ID, ends []int) {
	type frame struct {
		id   graph.ID
		next int32 // of its references
	}
	const done = int32(-1)
	var (
		number = make([]int32, g.Len()) // when it was first seen, from 1; done: its part is written
		low    = make([]int32, g.Len())
		open   []graph.ID // seen, and not yet in a part
		stack  []frame
		count  int32
	)
	enter := func(id graph.ID) {
		count++
		number[id], low[id] = count, count
		open = append(open, id)
		stack = append(stack, frame{id: id})
	}
	set.Each(func(start graph.ID) {
		if number[start] != 0 {
			return
		}
		enter(start)
		for len(stack) > 0 {
			f := &stack[len(stack)-1]
			refs := g.References(f.id)
			if int(f.next) < len(refs) {
				r := refs[f.next]
				f.next++
				switch {
				case !set.Has(r):
				case number[r] == 0:
					enter(r)
				case number[r] != done:
					low[f.id] = min(low[f.id], number[r])
				}
				continue
			}
			id := f.id
			stack = stack[:len(stack)-1]
			if len(stack) > 0 {
				up := stack[len(stack)-1].id
				low[up] = min(low[up], low[id])
			}
			if low[id] != number[id] {
				continue
			}
			at := len(open) - 1
			for open[at] != id {
				at--
			}
			for _, member := range open[at:] {
				number[member] = done
			}
			order = append(order, open[at:]...)
			ends = append(ends, len(order))
			open = open[:at]
		}
	})
	return order, ends
}

// write puts the moves in order, and down as text.
func (m *maker) write() {
	unit := 0
	for _, d := range []struct {
		kind Kind
		set  graph.Bits
	}{{Seal, m.sealed}, {Release, m.released}} {
		order, ends := units(m.g, d.set)
		parts := make([][]graph.ID, len(ends))
		for i, end := range ends {
			begin := 0
			if i > 0 {
				begin = ends[i-1]
			}
			parts[i] = order[begin:end]
			slices.Sort(parts[i])
		}
		if d.kind == Seal { // referrers first
			slices.Reverse(parts)
		}
		for _, part := range parts {
			for _, id := range part {
				m.plan.Moves = append(m.plan.Moves, m.move(d.kind, id, unit))
			}
			unit++
		}
	}
	for id := range graph.ID(m.g.Len()) {
		b, ok := m.blocks[id]
		if !ok {
			continue
		}
		kind := Seal
		if m.release.Has(id) {
			kind = Release
		}
		out := Blocked{Move: m.move(kind, id, NoUnit), Why: b.why, By: b.by}
		if b.via != graph.NoID {
			out.Via = m.path(b.via)
		}
		m.plan.Blocked = append(m.plan.Blocked, out)
	}
	m.writeRoots()
}

// NoUnit is the Unit of a path that does not move.
const NoUnit = -1

// writeRoots notes the user's roots of what is sealed, in the order of the input.
func (m *maker) writeRoots() {
	var at []int
	for id, list := range m.held {
		if m.sealed.Has(id) {
			for _, i := range list {
				if m.in.Roots[i].Kind == RootUser {
					at = append(at, i)
				}
			}
		}
	}
	slices.Sort(at)
	for _, i := range at {
		m.plan.Roots = append(m.plan.Roots, m.in.Roots[i])
	}
}

func (m *maker) move(k Kind, id graph.ID, unit int) Move {
	r := m.rows[id]
	out := Move{Kind: k, Path: m.path(id), NarHash: r.hash, NarSize: r.size, Unit: unit, Duplicate: m.both(id)}
	leader := id
	if asked, ok := m.follows[id]; ok {
		leader = asked
		out.Follows = m.path(asked)
	}
	out.Reason = m.reason(k, leader, &out)
	return out
}

// reason is the number of the reason why a path moves. A path that is personal for
// what it refers to follows that.
func (m *maker) reason(k Kind, id graph.ID, out *Move) int {
	why := Reason{Reason: Asked}
	switch system := m.v != nil && m.v.System.Has(id); {
	case m.in.Mode == Exact:
	case k == Seal && system: // it was asked for, and the policy has no say in that
	case k == Seal:
		cause := m.cause(id)
		if cause != id && out.Follows == "" {
			out.Follows = m.path(cause)
		}
		why = m.verdict(cause)
	default:
		why = m.verdict(id)
	}
	n, ok := m.reasons[why]
	if !ok {
		n = len(m.plan.Reasons)
		m.reasons[why] = n
		m.plan.Reasons = append(m.plan.Reasons, why)
	}
	return n
}
