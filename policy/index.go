package policy

import (
	"sync"

	"overkeep/policy/graph"
)

// Index is a graph with what policies need of it and do not change: its references
// turned round, and the values of costly conditions that were asked for before. It
// is safe for concurrent use.
type Index struct {
	g    *graph.Graph
	all  int        // words of a set of paths
	bad  graph.Bits // paths of which nothing is believed
	back graph.Bits // paths that refer to one with a greater id

	// from are the references turned round, once they are needed: 4 bytes for each.
	from func() *graph.Reverse

	mu    sync.Mutex // guards what is below
	cache map[hash]*column
	flow  *flow
}

// NewIndex checks the graph (graph.Validate), which must not change afterwards.
func NewIndex(g *graph.Graph) (*Index, error) {
	if err := g.Validate(); err != nil {
		return nil, err
	}
	ix := &Index{g: g, bad: graph.NewBits(g.Len()), cache: map[hash]*column{}}
	ix.all = len(ix.bad)
	for id, f := range g.Flags {
		if f&(graph.Broken|graph.Differs) != 0 {
			ix.bad.Set(graph.ID(id))
		}
	}
	ix.back = graph.NewBits(g.Len())
	for id := range graph.ID(g.Len()) {
		for _, r := range g.References(id) {
			if r > id {
				ix.back.Set(id)
				break
			}
		}
	}
	ix.from = sync.OnceValue(func() *graph.Reverse { return graph.NewReverse(g) })
	return ix, nil
}

// Graph is the graph that was indexed.
func (ix *Index) Graph() *graph.Graph { return ix.g }

// spread adds to a set all paths that refer to one in fresh, and so on, and fresh
// itself. What is in the set already has been there. What refers to one and is in
// deaf takes nothing on. Every path is looked at once, whatever the cycles.
func (ix *Index) spread(set, fresh, deaf graph.Bits) {
	queue := admit(set, fresh)
	if len(queue) == 0 {
		return
	}
	from := ix.from()
	for len(queue) > 0 {
		id := queue[len(queue)-1]
		queue = queue[:len(queue)-1]
		for _, r := range from.To(id) {
			if !set.Has(r) && !deaf.Has(r) {
				set.Set(r)
				queue = append(queue, r)
			}
		}
	}
}

// admit adds to a set what is fresh, and returns what it did not have. The set may
// be of more than fresh.
func admit(set, fresh graph.Bits) (queue []int32) {
	for i, w := range fresh {
		w &^= set[i]
		set[i] |= w
		graph.Bits{w}.Each(func(bit int32) { queue = append(queue, int32(i*64)+bit) })
	}
	return queue
}
