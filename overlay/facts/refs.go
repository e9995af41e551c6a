package facts

import (
	"bytes"
	"context"
	"fmt"
	"math"
	"slices"

	"overkeep/overlay/nixdb"
	"overkeep/policy/graph"
)

// refsPerBlock: blocks are joined once their number is known, and never grown.
const refsPerBlock = 1 << 14

// readRefs reads the references of the referrers in a chunk, as rows.
func (l *loading) readRefs(ctx context.Context, reader int, c *chunk) error {
	last := nixdb.Ref{math.MinInt64, math.MinInt64}
	lo := c.lo
	if lo == l.lo {
		lo = math.MinInt64 // the first chunk sees what is below all ids, too
	}
	row := int32(-1)
	var block []int32
	err := l.snap.Refs(ctx, reader, lo, c.hi, func(refs []nixdb.Ref) error {
		for _, r := range refs {
			if r[0] != last[0] {
				if r[0] < last[0] {
					return fmt.Errorf("%q: %w: references are out of order", l.DB, nixdb.ErrCorrupt)
				}
				if row = l.rows.row(r[0]); row >= 0 {
					c.runs = append(c.runs, run{row: row})
				}
			} else if r[1] <= last[1] {
				return fmt.Errorf("%q: %w: references are out of order", l.DB, nixdb.ErrCorrupt)
			}
			last = r
			if row < 0 {
				continue // of a path that there is not
			}
			to := l.rows.row(r[1])
			if to < 0 {
				c.lacks = append(c.lacks, row)
				continue
			}
			if len(block) == cap(block) {
				if len(block) > 0 {
					c.refs = append(c.refs, block)
				}
				block = make([]int32, 0, refsPerBlock)
			}
			block = append(block, to)
			c.runs[len(c.runs)-1].n++
		}
		return nil
	})
	c.refs = append(c.refs, block)
	return err
}

// readOutputs reads which derivations have which outputs, where both are in the graph.
func (s *Snapshot) readOutputs(ctx context.Context, reader int, l *loading) error {
	prefix := []byte(s.o.StoreDir + "/")
	return l.snap.Outputs(ctx, reader, func(drv int64, path []byte) error {
		row := l.rows.row(drv)
		base, ok := bytes.CutPrefix(path, prefix)
		if row < 0 || !ok {
			return nil
		}
		if out := s.Index.Base(base); out != graph.NoID {
			l.outputs = append(l.outputs, output{l.id(row), out})
		}
		return nil
	})
}

// references makes the reference columns of the graph.
func (s *Snapshot) references() error {
	g := s.Graph
	g.RefOff = make([]uint32, g.Len()+1)
	total := 0
	for _, l := range s.stores {
		for _, c := range l.chunks {
			for _, b := range c.refs {
				total += len(b)
			}
			for _, row := range c.lacks {
				g.Flags[l.id(row)] |= graph.Broken
			}
		}
	}
	if total > math.MaxUint32 {
		return ErrTooLarge
	}
	if len(s.stores) == 1 {
		// Rows are ids, and the chunks are in their order.
		g.Refs = make([]graph.ID, 0, total)
		for _, c := range s.stores[0].chunks {
			for _, r := range c.runs {
				g.RefOff[r.row+1] = r.n
			}
			for _, b := range c.refs {
				g.Refs = append(g.Refs, b...)
			}
			c.refs, c.runs = nil, nil
		}
		for i := range g.Len() {
			g.RefOff[i+1] += g.RefOff[i]
		}
		return nil
	}
	s.merge()
	return nil
}

// merge joins the references of two databases; a path that is in both with other
// references gets those of both, and Differs.
func (s *Snapshot) merge() {
	g := s.Graph
	n := g.Len()
	var off [2][]uint32
	var refs [2][]graph.ID
	for k, l := range s.stores {
		off[k] = make([]uint32, n+1)
		for _, c := range l.chunks {
			for _, r := range c.runs {
				off[k][l.id(r.row)+1] = r.n
			}
		}
		for i := range n {
			off[k][i+1] += off[k][i]
		}
		refs[k] = make([]graph.ID, off[k][n])
		for _, c := range l.chunks {
			from := slices.Concat(c.refs...)
			for _, r := range c.runs {
				id := l.id(r.row)
				to := refs[k][off[k][id]:off[k][id+1]]
				for i := range to {
					to[i] = l.id(from[i])
				}
				slices.Sort(to)
				from = from[r.n:]
			}
			c.refs, c.runs = nil, nil
		}
	}
	g.Refs = make([]graph.ID, 0, max(len(refs[0]), len(refs[1])))
	for id := range n {
		a, b := refs[0][off[0][id]:off[0][id+1]], refs[1][off[1][id]:off[1][id+1]]
		start := len(g.Refs)
		g.Refs = append(g.Refs, a...)
		both := graph.Lower | graph.Upper
		switch {
		case g.Flags[id]&both != both:
			g.Refs = append(g.Refs, b...) // one of the two is empty
		case !slices.Equal(a, b):
			g.Flags[id] |= graph.Differs
			g.Refs = append(g.Refs, b...)
			slices.Sort(g.Refs[start:])
			g.Refs = g.Refs[:start+len(slices.Compact(g.Refs[start:]))]
		}
		g.RefOff[id+1] = uint32(len(g.Refs))
	}
}

// finish fills what needs everything else: outputs, layers, kinds.
func (s *Snapshot) finish() error {
	g := s.Graph
	anyCA := false
	for _, l := range s.stores {
		anyCA = anyCA || l.snap.AnyCA
		for _, o := range l.outputs {
			g.Flags[o.out] |= saysOutput
		}
	}
	s.outs()
	if err := s.layers(); err != nil {
		return err
	}
	for id, f := range g.Flags {
		g.Flags[id] = f&^saysMask | kind(f, g.BaseName(graph.ID(id)), anyCA)
		if s.added(graph.ID(id), f, anyCA) {
			g.Flags[id] |= graph.Added
		}
		if f&graph.Broken != 0 {
			s.Report.Broken++
		}
		if f&graph.Differs != 0 {
			s.Report.Differs++
		}
	}
	s.Report.Paths, s.Report.Refs = g.Len(), len(g.Refs)
	for _, l := range s.stores {
		l.chunks, l.outputs = nil, nil
	}
	return nil
}

// outs joins what derivations say of their outputs and outputs of their deriver.
func (s *Snapshot) outs() {
	g := s.Graph
	each := func(f func(drv, out graph.ID)) {
		for id, drv := range g.Deriver {
			if drv != graph.NoID {
				f(drv, graph.ID(id))
			}
		}
		for _, l := range s.stores {
			for _, o := range l.outputs {
				if g.Deriver[o.out] != o.drv {
					f(o.drv, o.out)
				}
			}
		}
	}
	off := make([]uint32, g.Len()+1)
	each(func(drv, _ graph.ID) { off[drv+1]++ })
	for i := range g.Len() {
		off[i+1] += off[i]
	}
	outs := make([]graph.ID, off[g.Len()])
	next := slices.Clone(off[:g.Len()])
	each(func(drv, out graph.ID) {
		outs[next[drv]] = out
		next[drv]++
	})
	// The two databases may say the same.
	n := uint32(0)
	start := uint32(0)
	for id := range g.Len() {
		end := off[id+1]
		part := outs[start:end]
		slices.Sort(part)
		n += uint32(copy(outs[n:], slices.Compact(part)))
		start, off[id+1] = end, n
	}
	g.OutOff, g.Outs = off, outs[:n:n]
}

// layers says where each path really lies. So far, the layers are those of the
// databases that have a row.
func (s *Snapshot) layers() error {
	g := s.Graph
	dir, lower := "", false
	there := func(id graph.ID) (bool, error) { return nixdb.InUpper(dir, string(g.BaseName(id))) }
	for _, l := range s.stores {
		lower = lower || l.Layer == graph.Lower
		if l.Layer == graph.Upper {
			dir = l.UpperDir
		}
		if l.upper != nil {
			set := graph.NewBits(g.Len())
			for name := range l.upper.Names() {
				if id := s.Index.Base(name); id != graph.NoID {
					set.Set(id)
				}
			}
			there = func(id graph.ID) (bool, error) { return set.Has(id), nil }
		}
	}
	for i, f := range g.Flags {
		id := graph.ID(i)
		both := f&graph.LayerMask == graph.LayerMask
		if f&graph.Upper == 0 || dir == "" {
			if both {
				g.Flags[id] &^= graph.Upper
			}
			continue
		}
		own, err := there(id)
		if err == nil && own && both {
			own, err = nixdb.OwnEntry(dir, string(g.BaseName(id)))
		}
		switch {
		case err != nil:
			return err
		case own:
		case both || !lower:
			g.Flags[id] = f&^graph.Upper | graph.Lower
		default: // valid for the keep's Nix, and its files are nowhere
			g.Flags[id] = f&^graph.Upper | graph.Lower | graph.Broken
		}
	}
	return nil
}
