package policy

import (
	"slices"

	"overkeep/policy/graph"
)

// targets are the paths that a closure-of names, and whether that is all of them.
func (ix *Index) targets(n *node) (ids []graph.ID, known bool) {
	if n.root != "" {
		r := ix.g.Roots[n.root]
		return r.IDs, r.Known
	}
	set := ix.matches(n)
	set.Each(func(id graph.ID) { ids = append(ids, id) })
	return ids, true
}

// closureOf is the runtime closure of the targets of a node. If a target could not
// be resolved, or a path of the closure has references that are not believed, any
// path may be in it.
func (ix *Index) closureOf(n *node) *column {
	todo, known := ix.targets(n)
	yes := graph.NewBits(ix.g.Len())
	for _, id := range todo {
		yes.Set(id)
	}
	todo = append([]graph.ID(nil), todo...)
	for len(todo) > 0 {
		id := todo[len(todo)-1]
		todo = todo[:len(todo)-1]
		if ix.bad.Has(id) {
			known = false
			continue
		}
		for _, r := range ix.g.References(id) {
			if !yes.Has(r) {
				yes.Set(r)
				todo = append(todo, r)
			}
		}
	}
	return ix.settle(yes, yes, !known)
}

// settle makes a column of a term that looks beyond the path itself: unknown for all
// paths that are not believed, and for all others too if nothing is sure.
func (ix *Index) settle(yes, may graph.Bits, unsure bool) *column {
	c := &column{graph.NewBits(ix.g.Len()), graph.NewBits(ix.g.Len())}
	for i := range c.yes {
		c.yes[i] = yes[i] &^ ix.bad[i]
		c.may[i] = may[i] | ix.bad[i]
		if unsure {
			c.may[i] = ^uint64(0)
		}
	}
	ix.trim(0, c.yes, c.may)
	return c
}

// dependsOn says for every path whether its runtime closure, itself included, holds
// one for which the condition is yes.
func (ix *Index) dependsOn(cond *column) *column {
	yes := graph.NewBits(ix.g.Len())
	ix.spread(yes, cond.yes, ix.bad)
	may := slices.Clone(yes) // what is yes has spread
	ix.spread(may, union(cond.may, ix.bad), ix.bad)
	return ix.settle(yes, may, false)
}

// flow is the graph along which information may have come into a path. Its nodes
// are, for the n paths and k derivations of a store:
//
//	x        the path x, and all that flowed into it
//	n+i      building the i-th derivation: all that was there to be used
//	n+k+i    the i-th derivation as an input of another: its outputs are used
//
// and its arrows, where X -> Y says that what flowed into Y flowed into X:
//
//	path -> each reference
//	path -> the building of its deriver, and of every derivation that names it as an output
//	building -> each reference of the derivation: a derivation as an input, any other as a path
//	input -> its file as a path, its building, each of its outputs as a path
//
// Building holds the derivation file itself: its environment is text that a builder
// sees. A derivation is what Nix takes for one, by its name, or what has outputs or
// built something here, so that no unknown kind can cut an arrow. The references of
// a derivation do not tell an input derivation from a file that only is one; it
// counts as an input. All of this errs towards more flow.
type flow struct {
	n, k   int32
	number []int32 // of a path among the derivations, or -1
	drv    []graph.ID
	makers *graph.Reverse // the derivations that name a path as their output
	made   *graph.Reverse // the paths that name a derivation as their deriver
}

func (ix *Index) newFlow() *flow {
	g := ix.g
	f := &flow{n: int32(g.Len()), number: make([]int32, g.Len()), makers: graph.NewMakers(g), made: graph.NewMade(g)}
	for id := range f.number {
		f.number[id] = -1
		if g.OutOff[id] < g.OutOff[id+1] || g.IsDerivation(graph.ID(id)) {
			f.number[id] = 0
		}
	}
	for _, d := range g.Deriver {
		if d != graph.NoID {
			f.number[d] = 0
		}
	}
	for id := range f.number {
		if f.number[id] == 0 {
			f.number[id] = f.k
			f.k++
			f.drv = append(f.drv, graph.ID(id))
		}
	}
	return f
}

func (f *flow) building(drv graph.ID) int32 { return f.n + f.number[drv] }

// as is a reference of a derivation: an input.
func (f *flow) as(r graph.ID) int32 {
	if f.number[r] >= 0 {
		return f.n + f.k + f.number[r]
	}
	return r
}

// path is the path that a node is about.
func (f *flow) path(v int32) graph.ID {
	switch {
	case v < f.n:
		return v
	case v < f.n+f.k:
		return f.drv[v-f.n]
	}
	return f.drv[v-f.n-f.k]
}

// flows is the k-th arrow from a node, or -1. Nothing flows by a path that is not
// believed; that it is unknown says all.
func (ix *Index) flows(f *flow, v int32, k int) int32 {
	g, id := ix.g, f.path(v)
	switch {
	case v >= f.n+f.k: // an input
		switch k {
		case 0:
			return id
		case 1:
			return v - f.k
		}
		if outs := g.Outputs(id); k-2 < len(outs) && !ix.bad.Has(id) {
			return outs[k-2]
		}
		return -1
	case ix.bad.Has(id):
		return -1
	case v >= f.n: // building
		if refs := g.References(id); k < len(refs) {
			return f.as(refs[k])
		}
		return -1
	}
	if refs := g.References(id); k < len(refs) {
		return refs[k]
	} else {
		k -= len(refs)
	}
	return ix.built(f, id, k)
}

// built is the k-th building that made a path, or -1.
func (ix *Index) built(f *flow, id graph.ID, k int) int32 {
	if d := ix.g.Deriver[id]; d != graph.NoID {
		if k == 0 {
			return f.building(d)
		}
		k--
	}
	if makers := f.makers.To(id); k < len(makers) {
		return f.building(makers[k])
	}
	return -1
}

// origin says whether a path was built: no for a source or a derivation, yes if all
// that made it is known, else unknown. A path that names its deriver was built
// whatever its kind says. That another derivation names it as its output tells all,
// too, but for a fixed output: anyone may have made that.
func (f *flow) origin(g *graph.Graph, id graph.ID) graph.Tri {
	kind := g.Flags[id] & graph.KindMask
	built := g.Deriver[id] != graph.NoID || len(f.makers.To(id)) > 0
	switch {
	case g.Deriver[id] != graph.NoID, kind == graph.Output && built:
		return graph.Yes
	case !built && kind != 0 && kind&(graph.Output|graph.FixedOutput) == 0:
		return graph.No
	case !built && g.Flags[id]&graph.Added != 0:
		// Nix's database does not tell a source from a fixed output without its deriver,
		// and every build uses sources: were this unknown, every build would be.
		return graph.No
	}
	return graph.Unknown
}

func union(a, b graph.Bits) graph.Bits {
	out := slices.Clone(a)
	for i := range out {
		out[i] |= b[i]
	}
	return out
}

// flood adds to a set of nodes all that flow leads to from one in fresh, and fresh
// itself: the arrows of flows, the other way round.
func (ix *Index) flood(f *flow, set, fresh graph.Bits) {
	g := ix.g
	queue := admit(set, fresh)
	if len(queue) == 0 {
		return
	}
	from := ix.from()
	add := func(v int32) {
		if !set.Has(v) {
			set.Set(v)
			queue = append(queue, v)
		}
	}
	for len(queue) > 0 {
		v := queue[len(queue)-1]
		queue = queue[:len(queue)-1]
		id := f.path(v)
		isDrv := f.number[id] >= 0
		switch {
		case v < f.n: // a path: what refers to it, and what used the derivation it is an output of
			for _, r := range from.To(id) {
				if ix.bad.Has(r) {
					continue
				}
				add(r)
				if !isDrv && f.number[r] >= 0 {
					add(f.building(r))
				}
			}
			for _, d := range f.makers.To(id) {
				if !ix.bad.Has(d) {
					add(f.as(d))
				}
			}
			if isDrv {
				add(f.as(id))
			}
		case v < f.n+f.k: // a building: what was built, and the derivation as an input
			add(f.as(id))
			for _, p := range f.made.To(id) {
				if !ix.bad.Has(p) {
					add(p)
				}
			}
			for _, p := range g.Outputs(id) {
				if !ix.bad.Has(p) {
					add(p)
				}
			}
		default: // an input: the buildings that used it
			for _, r := range from.To(id) {
				if f.number[r] >= 0 && !ix.bad.Has(r) {
					add(f.building(r))
				}
			}
		}
	}
}

// builtFrom says for every path whether what it was built from holds one for which
// the condition is yes: everything that flowed into the buildings that made it or
// into what it refers to (which was there when it was built).
func (ix *Index) builtFrom(cond *column) *column {
	if ix.flow == nil {
		ix.flow = ix.newFlow()
	}
	f, g, n := ix.flow, ix.g, ix.g.Len()
	origin := func(id graph.ID) graph.Tri { return f.origin(g, id) }
	doubt := graph.NewBits(n) // of paths themselves: how they came about is not known
	for id := range graph.ID(n) {
		if origin(id) == graph.Unknown {
			doubt.Set(id)
		}
	}
	size := int(f.n + 2*f.k)
	set := graph.NewBits(size)
	// pour lets flow what is in base, as a path or a derivation that is built, and what
	// is in more as a path only. It returns the paths into which something flowed that
	// is not only themselves.
	pour := func(base, more graph.Bits) graph.Bits {
		own := union(base, more)
		fresh := graph.NewBits(size)
		copy(fresh, own)
		for _, d := range f.drv {
			if base.Has(d) {
				fresh.Set(f.building(d))
			}
		}
		ix.flood(f, set, fresh)
		out := graph.NewBits(n)
		copy(out, set)
		own.Each(func(id graph.ID) {
			held := false
			ix.sources(f, id, func(v int32) bool {
				held = set.Has(v)
				return !held
			})
			if !held {
				out[id>>6] &^= 1 << (uint(id) & 63)
			}
		})
		ix.trim(0, out, out)
		return out
	}
	yes := pour(cond.yes, graph.NewBits(n))
	may := pour(union(cond.may, ix.bad), doubt) // into what is yes already
	for id := range graph.ID(n) {
		bit := uint64(1) << (uint(id) & 63)
		switch origin(id) {
		case graph.No:
			yes[id>>6] &^= bit
			may[id>>6] &^= bit
			continue
		case graph.Unknown:
			may[id>>6] |= bit
		}
		// With no deriver and a kind that may be a source, a yes is one only if it was built.
		if yes.Has(id) && !ix.surelyBuilt(f, id) {
			yes[id>>6] &^= bit
			may[id>>6] |= bit
		}
	}
	return ix.settle(yes, may, false)
}

// surelyBuilt reports whether a path can be nothing but the output of a build.
func (ix *Index) surelyBuilt(f *flow, id graph.ID) bool {
	kind := ix.g.Flags[id] & graph.KindMask
	return ix.g.Deriver[id] != graph.NoID || len(f.makers.To(id)) > 0 ||
		kind != 0 && kind&^(graph.Output|graph.FixedOutput) == 0
}

// sources calls f with the nodes from which something came into the building of a
// path, until it returns false.
func (ix *Index) sources(f *flow, id graph.ID, visit func(v int32) bool) {
	if ix.bad.Has(id) {
		return
	}
	for k := 0; ; k++ {
		v := ix.built(f, id, k)
		if v < 0 {
			break
		}
		if !visit(v) {
			return
		}
	}
	for _, r := range ix.g.References(id) {
		if r != id && !visit(r) {
			return
		}
	}
}
