package graph

import (
	"slices"
	"strings"
)

// Path is one path as a Builder takes it. The zero value of everything but Base is
// "not known".
type Path struct {
	Base     string // HASH-NAME
	NarSize  int64  // bytes; 0: unknown
	Flags    Flags
	Refs     []string // base names
	Deriver  string   // base name; one that the graph does not get is not known
	Outputs  []string // of a derivation: base names; those that the graph does not get are left out
	SignedBy []string // keys in full, NAME:BASE64, that Keys declared
	Origin   *Origin
}

// Builder makes a small graph, for tests and for a hand full of paths. The order
// in which paths are added does not matter, but for their ids, which count up from
// 0 in it. A loader of a whole store fills the columns of a Graph itself.
type Builder struct {
	storeDir string
	keys     []string
	paths    []Path
	ids      map[string]ID
	roots    map[string][]string
	unknown  []string
}

// NewBuilder begins a graph of the store at storeDir ("/nix/store").
func NewBuilder(storeDir string) *Builder {
	return &Builder{storeDir: storeDir, ids: map[string]ID{}, roots: map[string][]string{}}
}

// Keys declares keys, as NAME:BASE64: without it, signed-by of one is unknown.
func (b *Builder) Keys(keys ...string) { b.keys = append(b.keys, keys...) }

// Root says to which paths a closure-of target of the policy resolved.
func (b *Builder) Root(target string, bases ...string) { b.roots[target] = bases }

// UnknownRoot says that a closure-of target could not be resolved.
func (b *Builder) UnknownRoot(target string) { b.unknown = append(b.unknown, target) }

// Add adds a path and returns its id. A base name that is added twice is an error
// of Graph.
func (b *Builder) Add(p Path) ID {
	id := ID(len(b.paths))
	if _, twice := b.ids[p.Base]; !twice {
		b.ids[p.Base] = id
	}
	b.paths = append(b.paths, p)
	return id
}

// Graph checks what was added and makes the graph: a reference to a path that was
// not added, a base name that is added twice or is none, an undeclared key are
// errors that are ErrInvalid.
func (b *Builder) Graph() (*Graph, error) {
	n := len(b.paths)
	g := &Graph{
		StoreDir: b.storeDir, Keys: slices.Clone(b.keys), Roots: map[string]Root{},
		BaseOff: make([]uint32, 1, n+1), RefOff: make([]uint32, 1, n+1), OutOff: make([]uint32, 1, n+1),
		NarSize: make([]int64, n), Flags: make([]Flags, n), Deriver: make([]ID, n), Origin: make([]int32, n),
	}
	for range g.Keys {
		g.Signed = append(g.Signed, NewBits(n))
	}
	for i, p := range b.paths {
		if b.ids[p.Base] != ID(i) {
			return nil, invalid("%q twice", p.Base)
		}
		if err := b.add(g, ID(i), p); err != nil {
			return nil, err
		}
	}
	for target, bases := range b.roots {
		r := Root{Known: true}
		for _, base := range bases {
			id, ok := b.ids[base]
			if !ok {
				return nil, invalid("the root %q is %q, which is not in the graph", target, base)
			}
			r.IDs = append(r.IDs, id)
		}
		g.Roots[target] = r
	}
	for _, target := range b.unknown {
		g.Roots[target] = Root{}
	}
	if err := g.Validate(); err != nil {
		return nil, err
	}
	return g, nil
}

func (b *Builder) add(g *Graph, id ID, p Path) error {
	g.Base = append(g.Base, p.Base...)
	g.BaseOff = append(g.BaseOff, uint32(len(g.Base)))
	g.NarSize[id], g.Flags[id] = p.NarSize, p.Flags

	from := len(g.Refs)
	for _, r := range p.Refs {
		to, ok := b.ids[r]
		if !ok {
			return invalid("%q refers to %q, which is not in the graph", p.Base, r)
		}
		if !slices.Contains(g.Refs[from:], to) {
			g.Refs = append(g.Refs, to)
		}
	}
	g.RefOff = append(g.RefOff, uint32(len(g.Refs)))

	for _, o := range p.Outputs {
		if to, ok := b.ids[o]; ok {
			g.Outs = append(g.Outs, to)
		}
	}
	g.OutOff = append(g.OutOff, uint32(len(g.Outs)))

	g.Deriver[id] = NoID
	if d, ok := b.ids[p.Deriver]; ok {
		g.Deriver[id] = d
	}
	g.Origin[id] = -1
	if p.Origin != nil {
		g.Origin[id] = int32(len(g.Origins))
		g.Origins = append(g.Origins, *p.Origin)
	}
	for _, k := range p.SignedBy {
		i := slices.Index(g.Keys, k)
		if i < 0 {
			return invalid("%q is signed by %q, which is not declared", p.Base, k)
		}
		g.Signed[i].Set(id)
	}
	return nil
}

// TestBase makes a base name out of a name, for tests: its hash is one
// of the name, in the letters that Nix's base 32 has, and of no other use.
func TestBase(name string) string {
	const letters = "0123456789abcdfghijklmnpqrsvwxyz"
	h := uint64(14695981039346656037)
	var hash strings.Builder
	for i := range HashLen {
		for _, c := range []byte(name) {
			h = (h ^ uint64(c) ^ uint64(i)) * 1099511628211
		}
		hash.WriteByte(letters[h>>40&31])
	}
	return hash.String() + "-" + name
}
