package graph

import (
	"bytes"
	"sync"
)

// Names finds paths by their base name. It is an index over one graph, 8 bytes a
// path, for what joins two graphs or takes names from a person.
type Names struct {
	g    *Graph
	slot []ID // open addressing, NoID is free; a power of two
}

// NewNames indexes a valid graph. Of two paths with one base name (a graph should
// not have them) it keeps the first.
func NewNames(g *Graph) *Names {
	size := 4
	for size < 2*g.Len() {
		size *= 2
	}
	n := &Names{g, make([]ID, size)}
	for i := range n.slot {
		n.slot[i] = NoID
	}
	for id := range ID(g.Len()) {
		if at, found := n.probe(g.BaseName(id)); !found {
			n.slot[at] = id
		}
	}
	return n
}

// Find is the id of a base name (HASH-NAME), NoID if the graph does not have it.
func (n *Names) Find(base []byte) ID {
	if at, found := n.probe(base); found {
		return n.slot[at]
	}
	return NoID
}

func (n *Names) probe(base []byte) (at uint32, found bool) {
	mask := uint32(len(n.slot) - 1)
	h := uint32(2166136261) // FNV-1a
	for _, c := range base {
		h = (h ^ uint32(c)) * 16777619
	}
	for at = (h ^ h>>15) & mask; n.slot[at] != NoID; at = (at + 1) & mask {
		if bytes.Equal(n.g.BaseName(n.slot[at]), base) {
			return at, true
		}
	}
	return at, false
}

// Reverse are the arrows of a graph the other way round: who points at a path.
type Reverse struct {
	Off  []uint32
	From []ID
}

// NewReverse turns the references of a valid graph round: 4 bytes a reference.
func NewReverse(g *Graph) *Reverse { return turn(g.Len(), g.RefOff, g.Refs) }

// NewMakers turns the outputs of a valid graph round: which derivations name a
// path as their output.
func NewMakers(g *Graph) *Reverse { return turn(g.Len(), g.OutOff, g.Outs) }

// NewMade turns the derivers of a valid graph round: which paths name a derivation as
// theirs.
func NewMade(g *Graph) *Reverse {
	n := g.Len()
	r := &Reverse{Off: make([]uint32, n+1)}
	for _, d := range g.Deriver {
		if d != NoID {
			r.Off[d+1]++
		}
	}
	for i := range n {
		r.Off[i+1] += r.Off[i]
	}
	r.From = make([]ID, r.Off[n])
	for id, d := range g.Deriver {
		if d != NoID {
			r.From[r.Off[d]] = ID(id)
			r.Off[d]++
		}
	}
	r.rewind()
	return r
}

// turn works on halves of the targets side by side: the writes are scattered, and
// half of them scatter less.
func turn(n int, off []uint32, to []ID) *Reverse {
	r := &Reverse{make([]uint32, n+1), make([]ID, len(to))}
	halves(n, len(to), func(lo, hi ID) {
		for _, t := range to {
			if t >= lo && t < hi {
				r.Off[t+1]++
			}
		}
	})
	for i := range n {
		r.Off[i+1] += r.Off[i]
	}
	halves(n, len(to), func(lo, hi ID) {
		for from := range n {
			for _, t := range to[off[from]:off[from+1]] {
				if t >= lo && t < hi {
					r.From[r.Off[t]] = ID(from)
					r.Off[t]++
				}
			}
		}
	})
	r.rewind()
	return r
}

// halves calls f for each half of the ids below n, or once if there is little to do.
func halves(n, work int, f func(lo, hi ID)) {
	if work < 1<<16 {
		f(0, ID(n))
		return
	}
	var wg sync.WaitGroup
	wg.Go(func() { f(0, ID(n/2)) })
	wg.Go(func() { f(ID(n/2), ID(n)) })
	wg.Wait()
}

// rewind undoes the counting that filling did: every offset had become the next.
func (r *Reverse) rewind() {
	n := len(r.Off) - 1
	copy(r.Off[1:], r.Off[:n])
	r.Off[0] = 0
}

// To are the paths that point at one, itself included where it does.
func (r *Reverse) To(id ID) []ID { return r.From[r.Off[id]:r.Off[id+1]] }
