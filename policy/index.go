package policy

import (
	"sync"

	"overkeep/policy/graph"
)

// Index is a graph with what every policy needs of it and no policy changes: the
// order of its references, and the values of costly conditions that were asked for
// before. It is safe for concurrent use.
type Index struct {
	g   *graph.Graph
	all int        // words of a set of paths
	bad graph.Bits // paths of which nothing is believed

	refs order

	mu      sync.Mutex // guards what is below
	cache   map[hash]*column
	flow    *flow
	reverse *graph.Reverse
}

// NewIndex checks the graph (graph.Validate) and orders it. The graph must not
// change afterwards.
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
	ix.refs = ordered(g.Len(), func(v int32, k int) int32 {
		// What is not believed leads nowhere: it may close no cycle either.
		if at := g.RefOff[v] + uint32(k); at < g.RefOff[v+1] && !ix.bad.Has(v) {
			return g.Refs[at]
		}
		return -1
	})
	return ix, nil
}

// Graph is the graph that was indexed.
func (ix *Index) Graph() *graph.Graph { return ix.g }

func (ix *Index) referrers() *graph.Reverse {
	ix.mu.Lock()
	defer ix.mu.Unlock()
	if ix.reverse == nil {
		ix.reverse = graph.NewReverse(ix.g)
	}
	return ix.reverse
}

// order lists the nodes of a graph so that each stands after all it points at, but
// for cycles: the nodes of a cycle stand together.
type order struct {
	list []int32
	same graph.Bits // positions that belong to the cycle of the position before
}

// each calls f with every node or cycle of nodes, in order.
func (o *order) each(f func(scc []int32)) {
	for i := 0; i < len(o.list); {
		j := i + 1
		for j < len(o.list) && o.same.Has(int32(j)) {
			j++
		}
		f(o.list[i:j])
		i = j
	}
}

// ordered finds the strongly connected components of a graph of n nodes, in reverse
// topological order (Tarjan's algorithm, in the form of Pearce, "A space-efficient
// algorithm for finding strongly connected components", 2016), without recursion.
// succ returns the k-th successor of v, or less than 0 if there are no more.
func ordered(n int, succ func(v int32, k int) int32) order {
	const done = int32(1<<31 - 1)
	type frame struct {
		v, index int32
		k        int32
	}
	o := order{make([]int32, 0, n), graph.NewBits(n)}
	low := make([]int32, n) // 0: not seen; done: its component is complete
	var calls []frame
	var stack []int32 // seen, not the first of their component, component not complete
	index := int32(1)
	for start := range int32(n) {
		if low[start] != 0 {
			continue
		}
		low[start] = index
		calls = append(calls, frame{v: start, index: index})
		index++
		for len(calls) > 0 {
			f := &calls[len(calls)-1]
			if w := succ(f.v, int(f.k)); w >= 0 {
				switch {
				case low[w] == 0: // the edge is looked at again when w is done
					low[w] = index
					calls = append(calls, frame{v: w, index: index})
					index++
				default:
					low[f.v] = min(low[f.v], low[w])
					f.k++
				}
				continue
			}
			v := f.v
			if low[v] == f.index {
				low[v] = done
				o.list = append(o.list, v)
				for len(stack) > 0 && low[stack[len(stack)-1]] >= f.index {
					w := stack[len(stack)-1]
					stack = stack[:len(stack)-1]
					low[w] = done
					o.same.Set(int32(len(o.list)))
					o.list = append(o.list, w)
				}
			} else {
				stack = append(stack, v)
			}
			calls = calls[:len(calls)-1]
		}
	}
	return o
}
