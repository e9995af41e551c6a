package facts

import (
	"bytes"
	"context"
	"encoding/hex"
	"errors"
	"hash/maphash"
	"math"
	"slices"

	"overkeep/overlay/nixdb"
	"overkeep/policy/graph"
)

// Need says what a question about some paths needs beside their runtime closures.
type Need struct {
	// Roots are further store paths, whose runtime closures are loaded, too: what
	// the closure-of targets of a policy resolved to.
	Roots []string
	// Build asks for where the paths come from: the derivations that made them, all
	// that those derivations need, what was built of it, and so on.
	Build bool
	// Most ends the search with ErrMany when it has found more paths than that: to
	// load all is then faster. 0: no end.
	Most int
}

// ErrMany: more paths are needed than Need.Most.
var ErrMany = errors.New("many paths are needed")

// LoadFor reads what is needed to judge the targets (whole store paths), at a cost
// that depends on the answer and not on the store. What it reads is closed: every
// reference of a path in the graph is in the graph, so verdicts over it are those
// over the whole store. Targets and roots that are not valid are not in it.
//
// With Build it is closed under deriver, derivations that list a path as output,
// and listed outputs, too. An output that only names its deriver, and that the
// derivation does not list, is not found from the derivation's side: no index
// leads there. Nix writes no such rows.
func LoadFor(ctx context.Context, stores []Store, targets []string, need Need, o Options) (_ *Loaded, err error) {
	o.Readers = 1
	s, err := newSnapshot(o)
	if err != nil {
		return nil, err
	}
	defer func() { err = errors.Join(err, s.Close()) }()
	if err := s.open(ctx, stores, false); err != nil {
		return nil, err
	}
	p := &partial{s: s, g: &graph.Graph{StoreDir: s.o.StoreDir, BaseOff: []uint32{0}}, ids: map[string]graph.ID{}, build: need.Build,
		prefix: s.o.StoreDir + "/"}
	s.Graph = p.g
	for _, l := range s.stores {
		look, err := l.snap.Lookup()
		if err != nil {
			return nil, err
		}
		defer look.Close()
		p.from = append(p.from, &source{loading: l, look: look, rows: map[int64]graph.ID{}})
	}
	for _, t := range slices.Concat(targets, need.Roots) {
		if base := baseOf([]byte(t), p.prefix); base != nil {
			if _, err := p.add(ctx, base); err != nil {
				return nil, err
			}
		}
	}
	if err := p.follow(ctx, need.Most); err != nil {
		return nil, err
	}
	p.join()
	if err := s.finish(); err != nil {
		return nil, err
	}
	if err := s.sign(ctx); err != nil {
		return nil, err
	}
	return &s.Loaded, nil
}

// partial is a graph that grows from its targets.
type partial struct {
	s      *Snapshot
	g      *graph.Graph
	from   []*source
	ids    map[string]graph.ID // by base; NoID: not valid
	refs   [][2][]graph.ID     // of an id, by database
	agree  [][2]agree
	der    [][2]string // bases of the derivers that the columns name
	build  bool
	prefix string
	path   []byte // scratch
}

// source is a database that is asked.
type source struct {
	*loading
	look *nixdb.Lookup
	rows map[int64]graph.ID // NoID: no such row, or none that can be in a graph
	row  []int64            // of an id; noRow: none here
}

const noRow = math.MinInt64

// whole is the store path of a base name, until the next call.
func (p *partial) whole(base []byte) []byte {
	p.path = append(append(p.path[:0], p.prefix...), base...)
	return p.path
}

// add returns the id of a path that is valid somewhere, else NoID.
func (p *partial) add(ctx context.Context, base []byte) (graph.ID, error) {
	if id, ok := p.ids[string(base)]; ok {
		return id, nil
	}
	return p.ask(ctx, string(base), graph.NoID, -1)
}

// ask asks the databases for a path, save the one that has told already.
func (p *partial) ask(ctx context.Context, name string, id graph.ID, told int) (graph.ID, error) {
	for k, src := range p.from {
		if k == told {
			continue
		}
		var r nixdb.Row
		found, err := src.look.ByPath(ctx, p.whole([]byte(name)), &r)
		if err != nil {
			return id, err
		}
		if !found || baseOf(r.Path, p.prefix) == nil {
			continue
		}
		if id == graph.NoID {
			id = p.newID(name)
		}
		p.learn(id, k, &r)
	}
	p.ids[name] = id
	return id, nil
}

func (p *partial) newID(name string) graph.ID {
	g := p.g
	id := graph.ID(len(g.Flags))
	g.Base = append(g.Base, name...)
	g.BaseOff = append(g.BaseOff, uint32(len(g.Base)))
	g.Flags = append(g.Flags, 0)
	g.NarSize = append(g.NarSize, 0)
	p.refs = append(p.refs, [2][]graph.ID{})
	p.agree = append(p.agree, [2]agree{})
	p.der = append(p.der, [2]string{})
	for _, src := range p.from {
		src.row = append(src.row, noRow)
	}
	return id
}

// learn takes what the row of database k says of a path.
func (p *partial) learn(id graph.ID, k int, r *nixdb.Row) {
	src := p.from[k]
	f, digits := judge(r)
	g := p.g
	size := max(0, r.NarSize)
	a := agree{ca: maphash.Bytes(p.s.seeds[0], r.CA)}
	if digits != nil {
		_, _ = hex.Decode(a.narHash[:], digits) // they have been looked at
	}
	if g.Flags[id]&graph.LayerMask == 0 {
		g.NarSize[id] = size
	} else if g.NarSize[id] != size || p.agree[id][1-k] != a {
		f |= graph.Differs
	}
	p.agree[id][k] = a
	g.Flags[id] |= f | src.Layer
	src.rows[r.ID] = id
	src.row[id] = r.ID
	if d := baseOf(r.Deriver, p.prefix); d != nil && bytes.HasSuffix(d, dotDrv) {
		p.der[id][k] = string(d)
	}
}

// follow adds, from every path on, what is needed of it.
func (p *partial) follow(ctx context.Context, most int) error {
	for id := graph.ID(0); int(id) < len(p.g.Flags); id++ {
		if most > 0 && len(p.g.Flags) > most {
			return ErrMany
		}
		for k, src := range p.from {
			if src.row[id] == noRow {
				continue
			}
			if err := p.references(ctx, id, k); err != nil {
				return err
			}
			if p.build {
				if err := p.origin(ctx, id, k); err != nil {
					return err
				}
				continue
			}
			if p.g.Flags[id]&saysDeriver != 0 || bytes.HasSuffix(p.g.BaseName(id), dotDrv) {
				continue // its kind is the same, whoever has it as output
			}
			drvs, err := p.makers(ctx, id, k)
			if err != nil {
				return err
			}
			for _, d := range drvs {
				var r nixdb.Row
				found, err := src.look.ByID(ctx, d, &r)
				if err != nil {
					return err
				}
				if found && baseOf(r.Path, p.prefix) != nil {
					p.g.Flags[id] |= saysOutput
				}
			}
		}
	}
	return nil
}

// byRow adds the path of a row; NoID: there is no such row, or its path is none.
func (p *partial) byRow(ctx context.Context, k int, row int64) (graph.ID, error) {
	src := p.from[k]
	if id, ok := src.rows[row]; ok {
		return id, nil
	}
	var r nixdb.Row
	found, err := src.look.ByID(ctx, row, &r)
	if err != nil {
		return graph.NoID, err
	}
	src.rows[row] = graph.NoID
	base := baseOf(r.Path, p.prefix)
	if !found || base == nil {
		return graph.NoID, nil
	}
	if _, twice := p.ids[string(base)]; twice { // by its name, another row or none was found
		return graph.NoID, nil
	}
	name := string(base)
	id := p.newID(name)
	p.learn(id, k, &r)
	return p.ask(ctx, name, id, k)
}

func (p *partial) references(ctx context.Context, id graph.ID, k int) error {
	src := p.from[k]
	var to []int64
	sane := true
	err := src.look.Refs(ctx, src.row[id], func(r int64, ok bool) {
		sane = sane && ok
		to = append(to, r)
	})
	if err != nil {
		return err
	}
	for _, r := range to {
		ref, err := p.byRow(ctx, k, r)
		if err != nil {
			return err
		}
		if ref == graph.NoID {
			sane = false
			continue
		}
		p.refs[id][k] = append(p.refs[id][k], ref)
	}
	if !sane {
		p.g.Flags[id] |= graph.Broken
	}
	return nil
}

func (p *partial) makers(ctx context.Context, id graph.ID, k int) (drvs []int64, err error) {
	err = p.from[k].look.Makers(ctx, p.whole(p.g.BaseName(id)), func(d int64) { drvs = append(drvs, d) })
	return drvs, err
}

// origin adds the derivations that made a path, and the outputs of a derivation.
func (p *partial) origin(ctx context.Context, id graph.ID, k int) error {
	if d := p.der[id][k]; d != "" {
		if _, err := p.add(ctx, []byte(d)); err != nil {
			return err
		}
	}
	drvs, err := p.makers(ctx, id, k)
	if err != nil {
		return err
	}
	for _, d := range drvs {
		if _, err := p.byRow(ctx, k, d); err != nil {
			return err
		}
	}
	src := p.from[k]
	var outs [][]byte
	err = src.look.Outputs(ctx, src.row[id], func(path []byte) {
		if base := baseOf(path, p.prefix); base != nil {
			outs = append(outs, bytes.Clone(base))
		}
	})
	if err != nil {
		return err
	}
	for _, base := range outs {
		out, err := p.add(ctx, base)
		if err != nil {
			return err
		}
		if out != graph.NoID {
			src.outputs = append(src.outputs, output{id, out})
		}
	}
	return nil
}

// join makes the columns that need all paths.
func (p *partial) join() {
	g := p.g
	g.RefOff = make([]uint32, g.Len()+1)
	g.Deriver = make([]graph.ID, g.Len())
	for id := range g.Flags {
		lists := p.refs[id]
		for k := range lists {
			slices.Sort(lists[k])
			lists[k] = slices.Compact(lists[k])
		}
		refs := lists[0]
		switch both := g.Flags[id]&graph.LayerMask == graph.LayerMask; {
		case !both && len(p.from) > 1 && len(refs) == 0:
			refs = lists[1]
		case both && !slices.Equal(lists[0], lists[1]):
			g.Flags[id] |= graph.Differs
			refs = slices.Concat(lists[0], lists[1])
			slices.Sort(refs)
			refs = slices.Compact(refs)
		}
		g.Refs = append(g.Refs, refs...)
		g.RefOff[id+1] = uint32(len(g.Refs))
		g.Deriver[id] = graph.NoID
		for _, d := range p.der[id] {
			if drv, ok := p.ids[d]; ok && drv != graph.NoID && g.Deriver[id] == graph.NoID {
				g.Deriver[id] = drv
			}
		}
	}
	p.s.Index = NewIndex(g)
}
