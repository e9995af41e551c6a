package plan

import (
	"slices"

	"overkeep/policy/graph"
)

// permanence is the order in which a seal's obstacles are named, if a path has
// several: first what no patience removes.
var permanence = []BlockWhy{BlockedBoot, BlockedOther, BlockedKeepPin, BlockedReferenced, BlockedProcess, BlockedTemp}

// blockSeals finds what must stay in the system store: what a root holds that does
// not move along, what a path refers to that stays, and all they refer to.
//
// One flood for each kind of obstacle, in the order of permanence, each breadth
// first; what one has reached no later one enters, for all it refers to has been
// reached as well. So the ways are the shortest of their kind and all is linear.
func (m *maker) blockSeals() {
	for _, why := range permanence {
		var queue []graph.ID
		hold := func(id graph.ID, b block) {
			if _, blocked := m.blocks[id]; !blocked && m.seal.Has(id) {
				m.blocks[id] = b
				queue = append(queue, id)
			}
		}
		if why == BlockedReferenced {
			m.stay(hold)
		} else {
			m.seal.Each(func(id graph.ID) {
				for _, i := range m.held[id] {
					if r := &m.in.Roots[i]; r.Kind != RootUser && r.Kind != RootOwnPin && BlockWhy(r.Kind) == why {
						hold(id, block{why, r.Link, graph.NoID})
						break
					}
				}
			})
		}
		for i := 0; i < len(queue); i++ {
			id := queue[i]
			for _, r := range m.g.References(id) {
				hold(r, block{why, m.blocks[id].by, id})
			}
		}
	}
	m.sealed = slices.Clone(m.seal)
	for id := range m.blocks {
		m.sealed[id>>6] &^= 1 << (uint(id) & 63)
	}
}

// stay holds what the paths refer to that stay in the system store for themselves:
// those that should not move, and those whose row or data forbids it.
func (m *maker) stay(hold func(graph.ID, block)) {
	for id := range graph.ID(m.g.Len()) {
		if !m.lies(id, graph.Lower) {
			continue
		}
		via := graph.NoID
		if m.seal.Has(id) {
			if b, ok := m.blocks[id]; !ok || b.why != BlockedRow && b.why != BlockedDiffers {
				continue
			}
			via = id
		}
		for _, r := range m.g.References(id) {
			if r != id && m.seal.Has(r) {
				hold(r, block{BlockedReferenced, m.path(id), via})
			}
		}
	}
}

// blockReleases finds what cannot come to the system store, because of its own row
// or because something that it refers to will not be there; and all that refer to
// such. Call it after blockSeals.
func (m *maker) blockReleases() {
	var queue []graph.ID
	m.release.Each(func(id graph.ID) {
		if b, ok := m.blocks[id]; ok {
			if b.why == BlockedRow || b.why == BlockedDiffers || b.why == BlockedGone {
				queue = append(queue, id)
			}
			return
		}
		if m.both(id) {
			return
		}
		for _, r := range m.g.References(id) {
			if r == id || m.release.Has(r) || m.lies(r, graph.Lower) && !m.sealed.Has(r) {
				continue
			}
			m.blocks[id] = block{BlockedNeeds, m.path(r), graph.NoID}
			queue = append(queue, id)
			break
		}
	})
	for i := 0; i < len(queue); i++ {
		id := queue[i]
		if m.both(id) {
			continue // the system store has it, whatever becomes of the keep's copy
		}
		by := m.blocks[id].by
		if by == "" {
			by = m.path(id)
		}
		for _, r := range m.referrers(id) {
			if _, blocked := m.blocks[r]; !blocked && m.release.Has(r) && !m.both(r) {
				m.blocks[r] = block{BlockedNeeds, by, id}
				queue = append(queue, r)
			}
		}
	}
	m.released = slices.Clone(m.release)
	for id := range m.blocks {
		m.released[id>>6] &^= 1 << (uint(id) & 63)
	}
}
