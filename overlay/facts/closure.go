package facts

import (
	"context"
	"math"
	"math/bits"
	"runtime"
	"sync"
	"sync/atomic"

	"overkeep/policy/graph"
)

// ClosureSizes returns for every path the NAR bytes of all paths that it refers to,
// directly or not, itself included: exact, cycles or not, each path counted
// once. ErrTooLarge if all sizes together are no int64.
//
// Time is quadratic in the number of paths with a small factor (30,000 paths take
// a tenth of a second, a million some minutes), memory 64 bytes a path and CPU.
func ClosureSizes(ctx context.Context, g *graph.Graph) ([]int64, error) {
	total := int64(0)
	for _, n := range g.NarSize {
		if n < 0 || total > math.MaxInt64-n {
			return nil, ErrTooLarge
		}
		total += n
	}
	d := condense(g)
	sums := d.sums(ctx)
	if err := ctx.Err(); err != nil {
		return nil, err
	}
	sizes := make([]int64, g.Len())
	for id := range sizes {
		sizes[id] = sums[d.of[id]]
	}
	return sizes, nil
}

// dag is a graph with its cycles shrunk to a node each. A node's successors have
// smaller numbers.
type dag struct {
	of     []int32 // node of a path
	weight []int64 // NAR bytes of a node
	off    []uint32
	succ   []int32 // without duplicates and without itself
}

// condense finds the strongly connected components (Tarjan 1972, without
// recursion: a chain of references may be as long as the store).
func condense(g *graph.Graph) *dag {
	n := g.Len()
	const unseen = -1
	d := &dag{of: make([]int32, n)}
	index := make([]int32, n) // order of discovery
	low := make([]int32, n)
	for i := range index {
		index[i], d.of[i] = unseen, unseen
	}
	next := make([]uint32, n) // the reference to look at next
	var path, open []int32    // being visited; visited and without a component
	count := int32(0)
	for start := range int32(n) {
		if index[start] != unseen {
			continue
		}
		path = append(path, start)
		for len(path) > 0 {
			v := path[len(path)-1]
			if index[v] == unseen {
				index[v], low[v] = count, count
				count++
				open = append(open, v)
				next[v] = g.RefOff[v]
			}
			deeper := false
			for next[v] < g.RefOff[v+1] {
				w := g.Refs[next[v]]
				if index[w] == unseen {
					path = append(path, w) // and look at it again on return
					deeper = true
					break
				}
				next[v]++
				if d.of[w] == unseen {
					low[v] = min(low[v], low[w])
				}
			}
			if deeper {
				continue
			}
			path = path[:len(path)-1]
			if low[v] < index[v] {
				continue
			}
			c := int32(len(d.weight))
			d.weight = append(d.weight, 0)
			for {
				w := open[len(open)-1]
				open = open[:len(open)-1]
				d.of[w] = c
				d.weight[c] += g.NarSize[w]
				if w == v {
					break
				}
			}
		}
	}
	d.edges(g)
	return d
}

// edges fills the successors.
func (d *dag) edges(g *graph.Graph) {
	// Paths by node: counting sort.
	nodes := len(d.weight)
	start := make([]uint32, nodes+1)
	for _, c := range d.of {
		start[c+1]++
	}
	for c := range nodes {
		start[c+1] += start[c]
	}
	members := make([]int32, len(d.of))
	fill := append([]uint32(nil), start...)
	for id, c := range d.of {
		members[fill[c]] = int32(id)
		fill[c]++
	}
	d.off = make([]uint32, nodes+1)
	seen := make([]int32, nodes) // by which node + 1
	for c := range nodes {
		for _, id := range members[start[c]:start[c+1]] {
			for _, r := range g.References(id) {
				if to := d.of[r]; int(to) != c && seen[to] != int32(c+1) {
					seen[to] = int32(c + 1)
					d.succ = append(d.succ, to)
				}
			}
		}
		d.off[c+1] = uint32(len(d.succ))
	}
}

// block is how many nodes are sought at a time: bits of a mask.
const (
	maskWords = 8
	block     = maskWords * 64
)

type mask [maskWords]uint64

// sums adds up, for every node, the weights of the nodes that it reaches. For a
// block of nodes at a time it finds which of them each node reaches, as bits:
// successors first, so in one pass.
func (d *dag) sums(ctx context.Context) []int64 {
	nodes := len(d.weight)
	sums := make([]int64, nodes)
	blocks := (nodes + block - 1) / block
	var last atomic.Int64
	var mu sync.Mutex
	var wg sync.WaitGroup
	for range max(1, min(runtime.GOMAXPROCS(0), 4, blocks)) {
		wg.Go(func() {
			own := make([]int64, nodes)
			reach := make([]mask, nodes)
			table := new([block / 8][256]int64)
			for ctx.Err() == nil {
				b := int(last.Add(1)) - 1
				if b >= blocks {
					break
				}
				d.sumBlock(b*block, reach, table, own)
			}
			mu.Lock()
			defer mu.Unlock()
			for c, s := range own {
				sums[c] += s
			}
		})
	}
	wg.Wait()
	return sums
}

// sumBlock adds to sums what each node reaches of the block from first on. No node
// before first reaches any of it.
func (d *dag) sumBlock(first int, reach []mask, table *[block / 8][256]int64, sums []int64) {
	end := min(first+block, len(d.weight))
	for lane := range table { // the weight of every combination of eight nodes
		t := &table[lane]
		for v := 1; v < 256; v++ {
			bit := bits.TrailingZeros8(uint8(v))
			w := int64(0)
			if c := first + lane*8 + bit; c < end {
				w = d.weight[c]
			}
			t[v] = t[v&(v-1)] + w
		}
	}
	for c := first; c < len(d.weight); c++ {
		var m mask
		if c < end {
			m[(c-first)/64] = 1 << ((c - first) % 64)
		}
		for _, s := range d.succ[d.off[c]:d.off[c+1]] {
			if int(s) < first {
				continue
			}
			r := &reach[s]
			for i := range m {
				m[i] |= r[i]
			}
		}
		reach[c] = m
		sum := int64(0)
		for i, w := range m {
			for lane := i * 8; w != 0; lane++ {
				sum += table[lane][w&0xff]
				w >>= 8
			}
		}
		sums[c] += sum
	}
}
