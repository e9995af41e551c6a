package policy

import (
	"bytes"
	"runtime"
	"slices"
	"sort"
	"sync"
	"sync/atomic"

	"overkeep/policy/graph"
)

// column is a condition's value for every path: yes, and yes or unknown.
type column struct{ yes, may graph.Bits }

const (
	blockWords = 64  // 4096 paths are evaluated at a time
	maxCached  = 160 // columns that an Index keeps; 250 KB each for a million paths
)

// evaluation is a program over an index, with the columns that cannot be computed
// block by block.
type evaluation struct {
	ix   *Index
	prog *program
	cols map[int32]*column
}

// evaluate prepares the nodes below tops. The index is locked by the caller.
func (ix *Index) evaluate(prog *program, tops []int32) *evaluation {
	ev := &evaluation{ix, prog, map[int32]*column{}}
	need := prog.below(func(int32) bool { return false }, tops...)
	if len(ix.cache) > maxCached {
		clear(ix.cache)
	}
	// Nodes stand after their kids, so closures within closures come first.
	for _, n := range need {
		node := &prog.nodes[n]
		cheap := !node.beyond && node.op != opName && node.op != opPath
		if cheap || !node.beyond && len(ix.cache) >= maxCached {
			continue
		}
		c := ix.cache[node.hash]
		if c == nil {
			c = ev.compute(node)
			ix.cache[node.hash] = c
		}
		ev.cols[n] = c
	}
	return ev
}

func (ev *evaluation) compute(n *node) *column {
	switch n.op {
	case opClosure:
		return ev.ix.closureOf(n)
	case opDepends:
		return ev.ix.dependsOn(ev.column(n.kids[0]))
	case opBuiltFrom:
		return ev.ix.builtFrom(ev.column(n.kids[0]))
	}
	yes := ev.ix.matches(n)
	return &column{yes, yes}
}

// column evaluates one prepared node for all paths.
func (ev *evaluation) column(n int32) *column {
	if c := ev.cols[n]; c != nil {
		return c
	}
	c := &column{graph.NewBits(ev.ix.g.Len()), graph.NewBits(ev.ix.g.Len())}
	ev.sweep([]int32{n}, func(b *block) {
		yes, may := b.at(0)
		copy(c.yes[b.lo:b.hi], yes)
		copy(c.may[b.lo:b.hi], may)
	})
	return c
}

// block is a part of all columns: the words from lo to hi of them.
type block struct {
	lo, hi   int
	tops     []int32
	slot     map[int32]int
	yes, may [][]uint64
	store    []uint64
}

// at is the value of the i-th of the tops.
func (b *block) at(i int) (yes, may []uint64) {
	s := b.slot[b.tops[i]]
	return b.yes[s], b.may[s]
}

// sweep evaluates nodes for all paths, a block at a time, and calls f with each
// block, from several goroutines.
func (ev *evaluation) sweep(tops []int32, f func(*block)) {
	m := ev.machine(tops)
	ev.ix.parallel(func(next func() (int, int, bool)) {
		b := m.block(blockWords)
		for {
			lo, hi, ok := next()
			if !ok {
				return
			}
			m.run(b, lo, hi)
			f(b)
		}
	})
}

// machine evaluates nodes for a block of paths.
type machine struct {
	*evaluation
	tops   []int32
	nodes  []int32
	slot   map[int32]int
	leaves []leaf
	kids   [][]int
}

func (ev *evaluation) machine(tops []int32) *machine {
	m := &machine{evaluation: ev, tops: tops, slot: map[int32]int{}}
	m.nodes = ev.prog.below(func(n int32) bool { return ev.cols[n] != nil }, tops...)
	m.leaves, m.kids = make([]leaf, len(m.nodes)), make([][]int, len(m.nodes))
	for i, n := range m.nodes {
		m.slot[n] = i
		if ev.cols[n] != nil {
			continue
		}
		nd := &ev.prog.nodes[n]
		if nd.op > opNot {
			m.leaves[i] = ev.ix.leaf(nd)
			continue
		}
		for _, k := range nd.kids {
			m.kids[i] = append(m.kids[i], m.slot[k])
		}
	}
	return m
}

// block has room for so many words.
func (m *machine) block(words int) *block {
	return &block{tops: m.tops, slot: m.slot, yes: make([][]uint64, len(m.nodes)), may: make([][]uint64, len(m.nodes)),
		store: make([]uint64, 2*words*len(m.nodes))}
}

func (m *machine) run(b *block, lo, hi int) {
	b.lo, b.hi = lo, hi
	size := hi - lo
	for i, n := range m.nodes {
		if c := m.cols[n]; c != nil {
			b.yes[i], b.may[i] = c.yes[lo:hi], c.may[lo:hi]
			continue
		}
		yes, may := b.store[2*i*size:][:size], b.store[(2*i+1)*size:][:size]
		b.yes[i], b.may[i] = yes, may
		if l := m.leaves[i]; l != nil {
			l(lo, yes, may)
			m.ix.doubt(m.prog.nodes[n].op, lo, yes, may)
		} else {
			combine(m.prog.nodes[n].op, b, m.kids[i], yes, may)
		}
		m.ix.trim(lo, yes, may)
	}
}

// parallel lets two goroutines or more take blocks until none is left.
func (ix *Index) parallel(work func(next func() (lo, hi int, ok bool))) {
	var at atomic.Int64
	next := func() (int, int, bool) {
		lo := int(at.Add(blockWords)) - blockWords
		return lo, min(lo+blockWords, ix.all), lo < ix.all
	}
	var wg sync.WaitGroup
	for range min(runtime.GOMAXPROCS(0), 4, 1+ix.all/blockWords) {
		wg.Go(func() { work(next) })
	}
	wg.Wait()
}

// trim clears what lies beyond the last path.
func (ix *Index) trim(lo int, yes, may []uint64) {
	if rest := uint(ix.g.Len() % 64); rest != 0 && lo+len(yes) == ix.all {
		yes[len(yes)-1] &= 1<<rest - 1
		may[len(may)-1] &= 1<<rest - 1
	}
}

// doubt makes every fact of a path unknown of which nothing is believed. Only its
// name stays known.
func (ix *Index) doubt(o op, lo int, yes, may []uint64) {
	if o == opName || o == opPath {
		return
	}
	for i, bad := range ix.bad[lo : lo+len(yes)] {
		yes[i] &^= bad
		may[i] |= bad
	}
}

// combine is Kleene's and, or and not.
func combine(o op, b *block, kids []int, yes, may []uint64) {
	if o == opNot {
		y, m := b.yes[kids[0]], b.may[kids[0]]
		for i := range yes {
			yes[i], may[i] = ^m[i], ^y[i]
		}
		return
	}
	copy(yes, b.yes[kids[0]])
	copy(may, b.may[kids[0]])
	for _, k := range kids[1:] {
		y, m := b.yes[k], b.may[k]
		for i := range yes {
			if o == opAnd {
				yes[i] &= y[i]
				may[i] &= m[i]
			} else {
				yes[i] |= y[i]
				may[i] |= m[i]
			}
		}
	}
}

// leaf fills the words from lo on with the value of a term.
type leaf func(lo int, yes, may []uint64)

// each makes a leaf of a function of one path.
func (ix *Index) each(value func(id graph.ID) graph.Tri) leaf {
	n := ix.g.Len()
	return func(lo int, yes, may []uint64) {
		for w := range yes {
			var y, m uint64
			from := (lo + w) * 64
			for id := from; id < min(from+64, n); id++ {
				switch value(graph.ID(id)) {
				case graph.Yes:
					y |= 1 << (id - from)
					m |= 1 << (id - from)
				case graph.Unknown:
					m |= 1 << (id - from)
				}
			}
			yes[w], may[w] = y, m
		}
	}
}

func tri(yes bool) graph.Tri {
	if yes {
		return graph.Yes
	}
	return graph.No
}

// leaf is a term whose value for a path does not depend on other paths.
func (ix *Index) leaf(n *node) leaf {
	g := ix.g
	switch n.op {
	case opSigned, opUnsigned:
		return ix.signed(n)
	case opBuilt:
		return ix.each(func(id graph.ID) graph.Tri { return tri(g.Flags[id]&graph.Ultimate != 0) })
	case opKind:
		return ix.each(func(id graph.ID) graph.Tri {
			switch k := g.Flags[id] & graph.KindMask; {
			case k == n.kind:
				return graph.Yes
			case k != 0 && k&n.kind == 0:
				return graph.No
			}
			return graph.Unknown
		})
	case opLarger:
		return ix.each(func(id graph.ID) graph.Tri {
			if g.NarSize[id] == 0 {
				return graph.Unknown
			}
			return tri(g.NarSize[id] > n.size)
		})
	case opName:
		return ix.each(func(id graph.ID) graph.Tri { return tri(n.glob.Match(g.Name(id))) })
	case opPath:
		return ix.each(func(id graph.ID) graph.Tri { return tri(n.glob.Match(g.BaseName(id))) })
	}
	return ix.origin(n)
}

func (ix *Index) signed(n *node) leaf {
	var columns []graph.Bits
	missing := false
	for _, k := range n.keys {
		if i := slices.Index(ix.g.Keys, k); i >= 0 {
			columns = append(columns, ix.g.Signed[i])
		} else {
			missing = true // nobody has looked for its signatures
		}
	}
	return func(lo int, yes, may []uint64) {
		for w := range yes {
			var signed, unknown uint64
			for _, c := range columns {
				signed |= c[lo+w]
			}
			if missing {
				unknown = ^signed
			} else if ix.g.Unsure != nil {
				unknown = ix.g.Unsure[lo+w] &^ signed
			}
			if n.op == opUnsigned {
				signed = ^(signed | unknown)
			}
			yes[w], may[w] = signed, signed|unknown
		}
	}
}

// origin evaluates a term for each recorded origin, and the paths by theirs.
func (ix *Index) origin(n *node) leaf {
	any := func(values []string) graph.Tri {
		if len(values) == 0 {
			return graph.Unknown
		}
		return tri(slices.ContainsFunc(values, func(v string) bool { return n.glob.Match([]byte(v)) }))
	}
	table := make([]graph.Tri, len(ix.g.Origins))
	for i, o := range ix.g.Origins {
		switch n.op {
		case opUnfree:
			table[i] = o.Unfree
		case opLicence:
			table[i] = any(o.Licences)
		case opFrom:
			table[i] = any(o.From)
		}
	}
	return ix.each(func(id graph.ID) graph.Tri {
		if ix.g.Origin == nil || ix.g.Origin[id] < 0 {
			return graph.Unknown
		}
		return table[ix.g.Origin[id]]
	})
}

// matches finds the paths whose names a pattern matches. What every match holds is
// searched for in all names at once, which lie one after the other.
func (ix *Index) matches(n *node) graph.Bits {
	g := ix.g
	out := graph.NewBits(g.Len())
	text := g.Name
	if n.base {
		text = g.BaseName
	}
	prefix, _ := n.glob.Anchored()
	literal := n.glob.Literal()
	ix.parallel(func(next func() (int, int, bool)) {
		for {
			lo, hi, ok := next()
			if !ok {
				return
			}
			id, end := graph.ID(lo*64), graph.ID(min(hi*64, g.Len()))
			if len(prefix) > 0 || len(literal) < 3 {
				for ; id < end; id++ {
					if t := text(id); bytes.HasPrefix(t, prefix) && n.glob.Match(t) {
						out.Set(id)
					}
				}
				continue
			}
			for id < end {
				at := bytes.Index(g.Base[g.BaseOff[id]:g.BaseOff[end]], literal)
				if at < 0 {
					break
				}
				// The literal begins in one path's name, its hash, or across the end; the
				// pattern decides, and the search goes on with the path after it.
				off := g.BaseOff[id] + uint32(at)
				id += graph.ID(sort.Search(int(end-id), func(i int) bool { return g.BaseOff[id+graph.ID(i)+1] > off }))
				if n.glob.Match(text(id)) {
					out.Set(id)
				}
				id++
			}
		}
	})
	return out
}
