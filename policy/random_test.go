package policy

import (
	"fmt"
	"math/rand/v2"
	"slices"
	"strings"

	"overkeep/policy/graph"
)

// Two keys that a random policy declares; nobody has looked for the second one's
// signatures in some of the graphs.
var testKeys = []string{"one-1:" + strings.Repeat("C", 42) + "A=", "two-1:" + strings.Repeat("B", 42) + "A="}

var testNames = []string{"a", "b", "ab", "ba", "abc", "b-a", "a.drv", "b.drv", "ab.drv", "c.drv"}

// maker makes random graphs and policies, from a seed.
type maker struct{ *rand.Rand }

func newMaker(seed uint64) maker { return maker{rand.New(rand.NewPCG(seed, 7))} }

func (m maker) chance(percent int) bool { return m.IntN(100) < percent }
func pickOne[T any](m maker, of []T) T  { return of[m.IntN(len(of))] }

type ID = graph.ID

func (m maker) someOf(n, percent int) (out []ID) {
	for id := range ID(n) {
		if m.chance(percent) {
			out = append(out, id)
		}
	}
	return out
}

var origins = []graph.Origin{
	{From: []string{"a"}, Licences: []string{"a", "b"}, Unfree: graph.No},
	{From: []string{"b", "ab"}, Unfree: graph.Yes},
	{Licences: []string{"ba"}, Unfree: graph.Unknown},
	{},
}

// graph makes a graph with cycles, contradictions and holes in it.
func (m maker) graph() *graph.Graph {
	n := 1 + m.IntN(9)
	g := &graph.Graph{StoreDir: "/nix/store", BaseOff: []uint32{0}, RefOff: []uint32{0}, OutOff: []uint32{0},
		Origins: slices.Clone(origins), Roots: map[string]graph.Root{}, Keys: testKeys[:1+m.IntN(2)]}
	density := 5 + m.IntN(30)
	var drvs []ID
	names := make([]string, n)
	for i := range names {
		names[i] = pickOne(m, testNames)
		if strings.HasSuffix(names[i], ".drv") {
			drvs = append(drvs, ID(i))
		}
	}
	holes := m.IntN(4) * 15 // percent of facts that are not known
	for i, name := range names {
		g.Base = append(g.Base, fmt.Sprintf("%032d-%s", i, name)...)
		g.BaseOff = append(g.BaseOff, uint32(len(g.Base)))
		g.Refs = append(g.Refs, m.someOf(n, density)...)
		g.RefOff = append(g.RefOff, uint32(len(g.Refs)))
		isDrv := strings.HasSuffix(name, ".drv")
		deriver, flags := graph.NoID, pickOne(m, []graph.Flags{graph.Source, graph.Output, graph.Output, graph.FixedOutput})
		switch {
		case isDrv:
			flags = graph.Derivation
			g.Outs = append(g.Outs, m.someOf(n, 20)...)
		case flags != graph.Source && len(drvs) > 0 && !m.chance(holes):
			deriver = pickOne(m, drvs)
		case m.chance(3):
			deriver = ID(m.IntN(n)) // nonsense
		}
		if m.chance(holes) {
			flags |= graph.Flags(m.IntN(16))
		}
		if m.chance(holes / 2) {
			flags &^= graph.KindMask
		}
		if m.chance(30) {
			flags |= graph.Added
		}
		if m.chance(30) {
			flags |= graph.Ultimate
		}
		if m.chance(holes / 4) {
			flags |= pickOne(m, []graph.Flags{graph.Broken, graph.Differs})
		}
		g.Flags = append(g.Flags, flags)
		g.Deriver = append(g.Deriver, deriver)
		g.OutOff = append(g.OutOff, uint32(len(g.Outs)))
		size := int64(1+m.IntN(3)) << 10
		if m.chance(holes) {
			size = 0
		}
		g.NarSize = append(g.NarSize, size)
		origin := int32(m.IntN(len(origins)+1)) - 1
		if holes == 0 {
			origin = 0
		}
		g.Origin = append(g.Origin, origin)
	}
	if m.chance(5) {
		g.Origin = nil
	}
	for range g.Keys {
		b := graph.NewBits(n)
		for _, id := range m.someOf(n, 60) {
			b.Set(id)
		}
		g.Signed = append(g.Signed, b)
	}
	if m.chance(holes) {
		g.Unsure = graph.NewBits(n)
		for _, id := range m.someOf(n, 30) {
			g.Unsure.Set(id)
		}
	}
	for _, root := range []string{"/p/one", "/p/two"} {
		switch {
		case holes == 0 || m.chance(70):
			g.Roots[root] = graph.Root{IDs: m.someOf(n, 20), Known: true}
		case m.chance(50):
			g.Roots[root] = graph.Root{IDs: m.someOf(n, 10)}
		}
	}
	return g
}

// complete makes a graph in which everything is known that was not in g, somehow.
func (m maker) complete(g *graph.Graph) *graph.Graph {
	n := g.Len()
	c := *g
	c.Flags, c.Deriver, c.NarSize = slices.Clone(g.Flags), slices.Clone(g.Deriver), slices.Clone(g.NarSize)
	c.Refs, c.RefOff = nil, []uint32{0}
	c.Origin, c.Origins = make([]int32, n), nil
	c.Keys, c.Signed, c.Unsure = testKeys, nil, nil
	for _, b := range g.Signed {
		b := slices.Clone(b)
		for id := range ID(n) {
			if g.Unsure != nil && g.Unsure.Has(id) && m.chance(50) {
				b.Set(id)
			}
		}
		c.Signed = append(c.Signed, b)
	}
	for len(c.Signed) < len(testKeys) {
		b := graph.NewBits(n)
		for _, id := range m.someOf(n, 50) {
			b.Set(id)
		}
		c.Signed = append(c.Signed, b)
	}
	var drvs []ID
	for id := range ID(n) {
		if g.IsDerivation(id) {
			drvs = append(drvs, id)
		}
	}
	r := &reference{g: g}
	for id := range ID(n) {
		bad := r.bad(id)
		possible := g.Flags[id] & graph.KindMask
		if bad || possible == 0 {
			possible = graph.KindMask
		}
		var kinds []graph.Flags
		for k := graph.Source; k <= graph.FixedOutput; k <<= 1 {
			if possible&k != 0 {
				kinds = append(kinds, k)
			}
		}
		kind := pickOne(m, kinds)
		c.Flags[id] = kind | g.Flags[id]&(graph.Ultimate|graph.Added)
		refs := g.References(id)
		if bad {
			c.Flags[id] = kind | pickOne(m, []graph.Flags{0, graph.Ultimate})
			refs = m.someOf(n, 30)
		}
		c.Refs = append(c.Refs, refs...)
		c.RefOff = append(c.RefOff, uint32(len(c.Refs)))
		if bad || g.Deriver[id] == graph.NoID && r.wasBuilt(id) == graph.Unknown && kind != graph.Source && kind != graph.Derivation {
			if c.Deriver[id] = graph.NoID; len(drvs) > 0 && m.chance(80) {
				c.Deriver[id] = pickOne(m, drvs)
			}
		}
		if bad || c.NarSize[id] == 0 {
			c.NarSize[id] = int64(1+m.IntN(3)) << 10
		}
		var o graph.Origin
		if g.Origin != nil && g.Origin[id] >= 0 && !bad {
			o = g.Origins[g.Origin[id]]
		}
		if len(o.From) == 0 {
			o.From = []string{pickOne(m, testNames)}
		}
		if len(o.Licences) == 0 {
			o.Licences = []string{pickOne(m, testNames)}
		}
		if o.Unfree == graph.Unknown {
			o.Unfree = pickOne(m, []graph.Tri{graph.Yes, graph.No})
		}
		c.Origin[id] = int32(id)
		c.Origins = append(c.Origins, o)
	}
	c.Roots = map[string]graph.Root{}
	for _, root := range []string{"/p/one", "/p/two"} {
		if c.Roots[root] = g.Roots[root]; !c.Roots[root].Known {
			c.Roots[root] = graph.Root{IDs: append(slices.Clone(g.Roots[root].IDs), m.someOf(n, 30)...), Known: true}
		}
	}
	return &c
}

var testPatterns = []string{"a", "*a", "a*", "*b*", "b", "*", "*-*", "*.drv", "ab*c"}

// term makes a condition that is no and, or or not.
func (m maker) term(depth int, lets []string) string {
	if len(lets) > 0 && m.chance(15) {
		return pickOne(m, lets)
	}
	switch m.IntN(15) {
	case 0, 1:
		return "signed-by " + pickOne(m, []string{"one-1", "two-1"})
	case 2:
		return "unsigned"
	case 3:
		return "built-here"
	case 4:
		return "kind " + pickOne(m, kindNames)
	case 5, 6:
		return `name "` + pickOne(m, testPatterns) + `"`
	case 7:
		return `licence "` + pickOne(m, testPatterns) + `"`
	case 8:
		return "unfree"
	case 9:
		return `from "` + pickOne(m, testPatterns) + `"`
	case 10:
		return "larger-than " + pickOne(m, []string{"1K", "2K", "0"})
	case 11:
		return "closure-of " + pickOne(m, []string{"/p/one", "/p/two", "a", "b*", "/nix/store/*-a", "/nix/store/00000000000000000000000000000001-a"})
	case 12:
		if depth > 0 {
			return "depends-on (" + m.cond(depth-1, lets) + ")"
		}
		return "depends-on (name b)"
	case 13, 14:
		if depth > 0 {
			return "built-from (" + m.cond(depth-1, lets) + ")"
		}
		return "built-from (name a)"
	}
	panic("no such term")
}

func (m maker) cond(depth int, lets []string) string {
	if depth == 0 || m.chance(45) {
		return m.term(depth, lets)
	}
	switch m.IntN(4) {
	case 0:
		return "not (" + m.cond(depth-1, lets) + ")"
	case 1:
		return "not " + m.term(depth-1, lets)
	case 2:
		return "(" + m.cond(depth-1, lets) + ") and " + m.cond(depth-1, lets)
	}
	return "(" + m.cond(depth-1, lets) + ") or (" + m.cond(depth-1, lets) + ")"
}

// personal makes a line that only takes away.
func (m maker) personal(whenKnown bool, lets []string) string {
	line := "personal " + m.cond(2, lets)
	if whenKnown && m.chance(50) {
		line += " when known"
	}
	return line
}

// lines makes a policy: its keys, lets and rules in any order.
func (m maker) lines(whenKnown bool) []string {
	out := []string{"key " + testKeys[0], "key " + testKeys[1]}
	var lets []string
	for i := range m.IntN(3) {
		name := fmt.Sprintf("l%d", i)
		out = append(out, "let "+name+" = "+m.cond(2, lets))
		lets = append(lets, name)
	}
	for range 1 + m.IntN(3) {
		out = append(out, "system "+m.cond(2, lets))
	}
	for range m.IntN(3) {
		out = append(out, m.personal(whenKnown, lets))
	}
	if m.chance(30) {
		out = append(out, "require system "+m.cond(1, lets))
	}
	m.Shuffle(len(out), func(i, j int) { out[i], out[j] = out[j], out[i] })
	return out
}

func text(lines []string) Source {
	return Source{"policy", []byte(strings.Join(lines, "\n") + "\n"), true}
}
