package graph

import (
	"errors"
	"fmt"
	"math/rand/v2"
	"slices"
	"testing"
)

const key = "one-1:AAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAA="

func small(t *testing.T) *Graph {
	t.Helper()
	b := NewBuilder("/nix/store")
	b.Keys(key)
	b.Add(Path{Base: TestBase("app"), Flags: Output, Refs: []string{TestBase("lib"), TestBase("app"), TestBase("lib")}, Deriver: TestBase("app.drv"), SignedBy: []string{key}})
	b.Add(Path{Base: TestBase("lib"), Flags: Output, NarSize: 7, Deriver: TestBase("gone.drv"), Origin: &Origin{Unfree: Yes}})
	b.Add(Path{Base: TestBase("app.drv"), Flags: Derivation, Outputs: []string{TestBase("app"), TestBase("gone")}})
	b.Root("/run/current-system", TestBase("app"))
	b.Root("/empty")
	b.UnknownRoot("/lost")
	g, err := b.Graph()
	if err != nil {
		t.Fatal(err)
	}
	return g
}

func TestBuilder(t *testing.T) {
	g := small(t)
	if g.Len() != 3 || g.Path(1) != "/nix/store/"+TestBase("lib") || string(g.Name(2)) != "app.drv" {
		t.Errorf("%d paths, %s, %s", g.Len(), g.Path(1), g.Name(2))
	}
	if !slices.Equal(g.References(0), []ID{1, 0}) || g.Deriver[0] != 2 || g.Deriver[1] != NoID || !slices.Equal(g.Outputs(2), []ID{0}) {
		t.Errorf("%v %v %v", g.References(0), g.Deriver, g.Outputs(2))
	}
	if !g.IsDerivation(2) || g.IsDerivation(0) || !g.Signed[0].Has(0) || g.Signed[0].Has(1) || g.Origins[g.Origin[1]].Unfree != Yes || g.Origin[0] >= 0 {
		t.Error("facts")
	}
	if !g.Roots["/empty"].Known || g.Roots["/lost"].Known || !slices.Equal(g.Roots["/run/current-system"].IDs, []ID{0}) {
		t.Errorf("%v", g.Roots)
	}
	for _, c := range []struct {
		do   func(*Builder)
		want string
	}{
		{func(b *Builder) { b.Add(Path{Base: TestBase("a")}); b.Add(Path{Base: TestBase("a")}) }, fmt.Sprintf("invalid store graph: %q twice", TestBase("a"))},
		{func(b *Builder) { b.Add(Path{Base: TestBase("a"), Refs: []string{"b"}}) }, fmt.Sprintf("invalid store graph: %q refers to \"b\", which is not in the graph", TestBase("a"))},
		{func(b *Builder) { b.Add(Path{Base: "short-x"}) }, `invalid store graph: path 0: "short-x" is not HASH-NAME`},
		{func(b *Builder) { b.Add(Path{Base: TestBase("a"), SignedBy: []string{"k"}}) }, fmt.Sprintf("invalid store graph: %q is signed by \"k\", which is not declared", TestBase("a"))},
		{func(b *Builder) { b.Root("/x", "b") }, `invalid store graph: the root "/x" is "b", which is not in the graph`},
		{func(b *Builder) { b.Add(Path{Base: TestBase("a"), NarSize: -1}) }, "invalid store graph: path 0 has the size -1"},
	} {
		b := NewBuilder("/nix/store")
		c.do(b)
		if _, err := b.Graph(); !errors.Is(err, ErrInvalid) || err.Error() != c.want {
			t.Errorf("%v, not %s", err, c.want)
		}
	}
}

func TestNames(t *testing.T) {
	b := NewBuilder("/nix/store")
	for i := range 1000 {
		b.Add(Path{Base: TestBase(fmt.Sprint("n", i))})
	}
	g, err := b.Graph()
	if err != nil {
		t.Fatal(err)
	}
	names := NewNames(g)
	for i := range 1000 {
		if got := names.Find([]byte(TestBase(fmt.Sprint("n", i)))); got != ID(i) {
			t.Fatalf("n%d is %d", i, got)
		}
	}
	if got := names.Find([]byte(TestBase("n1000"))); got != NoID {
		t.Errorf("found %d", got)
	}
	if got := NewNames(&Graph{}).Find([]byte("x")); got != NoID {
		t.Errorf("found %d in nothing", got)
	}
}

func TestReverse(t *testing.T) {
	g := small(t)
	r, m := NewReverse(g), NewMakers(g)
	if !slices.Equal(r.To(0), []ID{0}) || !slices.Equal(r.To(1), []ID{0}) || len(r.To(2)) != 0 || !slices.Equal(m.To(0), []ID{2}) || len(m.To(1)) != 0 {
		t.Errorf("%+v %+v", r, m)
	}
}

func TestBits(t *testing.T) {
	b := NewBits(130)
	for _, id := range []ID{0, 63, 64, 129} {
		b.Set(id)
	}
	var got []ID
	b.Each(func(id ID) { got = append(got, id) })
	if !slices.Equal(got, []ID{0, 63, 64, 129}) || b.Count() != 4 || b.Has(1) {
		t.Errorf("%v", got)
	}
}

// Each column that does not fit is refused, with what does not fit.
func TestValidate(t *testing.T) {
	for _, c := range []struct {
		harm func(g *Graph)
		want string
	}{
		{func(g *Graph) { g.StoreDir = "" }, `store directory ""`},
		{func(g *Graph) { g.BaseOff = nil }, "Base has 0 offsets for 3 paths"},
		{func(g *Graph) { g.BaseOff[1] = 1 << 30 }, "the offsets of Base go back at path 1"},
		{func(g *Graph) { g.BaseOff[3]-- }, "the offsets of Base go from 0 to 111, not from 0 to 112"},
		{func(g *Graph) { g.RefOff = g.RefOff[:3] }, "Refs has 3 offsets for 3 paths"},
		{func(g *Graph) { g.RefOff[0] = 1 }, "the offsets of Refs go from 1 to 2, not from 0 to 2"},
		{func(g *Graph) { g.Refs = g.Refs[:1] }, "the offsets of Refs go from 0 to 2, not from 0 to 1"},
		{func(g *Graph) { g.Refs[1] = 3 }, "Refs has the id 3 of 3 paths, at 1"},
		{func(g *Graph) { g.Refs[1] = NoID }, "Refs has the id -1 of 3 paths, at 1"},
		{func(g *Graph) { g.OutOff[2] = 9 }, "the offsets of Outs go back at path 2"},
		{func(g *Graph) { g.Outs[0] = 77 }, "Outs has the id 77 of 3 paths, at 0"},
		{func(g *Graph) { g.NarSize = nil }, "NarSize has 0 entries for 3 paths"},
		{func(g *Graph) { g.NarSize[2] = -1 << 63 }, "path 2 has the size -9223372036854775808"},
		{func(g *Graph) { g.Deriver = append(g.Deriver, 0) }, "Deriver has 4 entries for 3 paths"},
		{func(g *Graph) { g.Deriver[0] = 3 }, "path 0 has the deriver 3 of 3 paths"},
		{func(g *Graph) { g.Deriver[0] = -2 }, "path 0 has the deriver -2 of 3 paths"},
		{func(g *Graph) { g.Base[40-8] = 'x' }, "path 0: " + fmt.Sprintf("%q", TestBase("app")[:32]+"xapp") + " is not HASH-NAME"},
		{func(g *Graph) { g.Base[34] = '/' }, "a slash in a base name, at byte 34"},
		{func(g *Graph) { g.Base[34] = 0 }, "a zero in a base name, at byte 34"},
		{func(g *Graph) { g.Keys = nil }, "0 keys and 1 columns of signatures"},
		{func(g *Graph) { g.Signed[0] = nil }, "the signatures by \"" + key + "\" have 0 words for 3 paths"},
		{func(g *Graph) { g.Origin = g.Origin[:1] }, "Origin has 1 entries for 3 paths"},
		{func(g *Graph) { g.Origin[0] = 1 }, "path 0 has the origin 1 of 1"},
		{func(g *Graph) { g.Origins[0].Unfree = 2 }, "origin 0: unfree is 2"},
		{func(g *Graph) { g.Roots["/run/current-system"].IDs[0] = 3 }, "the root /run/current-system has the id 3 of 3 paths, at 0"},
	} {
		g := small(t)
		c.harm(g)
		if err := g.Validate(); !errors.Is(err, ErrInvalid) || err.Error() != "invalid store graph: "+c.want {
			t.Errorf("%v, not %s", err, c.want)
		}
	}
	if err := (&Graph{StoreDir: "/nix/store", BaseOff: []uint32{0}, RefOff: []uint32{0}, OutOff: []uint32{0}}).Validate(); err != nil {
		t.Errorf("an empty graph: %v", err)
	}
}

// Whatever passes Validate can be read without a panic.
func TestValidGraphsAreReadable(t *testing.T) {
	r := rand.New(rand.NewPCG(3, 4))
	passed := 0
	for range 20_000 {
		g := small(t)
		for range 1 + r.IntN(3) {
			n := uint32(r.IntN(8)) - 2
			switch r.IntN(9) {
			case 0:
				g.RefOff[r.IntN(4)] = n
			case 1:
				g.BaseOff[r.IntN(4)] += n
			case 2:
				g.OutOff[r.IntN(4)] = n
			case 3:
				g.Refs[r.IntN(2)] = ID(n)
			case 4:
				g.Outs[0] = ID(n)
			case 5:
				g.Deriver[r.IntN(3)] = ID(n)
			case 6:
				g.Origin[r.IntN(3)] = int32(n)
			case 7:
				g.Refs = append(g.Refs, ID(n))
			case 8:
				g.Flags[r.IntN(3)] = Flags(r.Uint32())
			}
		}
		if g.Validate() != nil {
			continue
		}
		passed++
		for id := range ID(g.Len()) {
			_ = g.Path(id) + string(g.Name(id))
			g.IsDerivation(id)
			for _, ref := range append(slices.Clone(g.References(id)), g.Outputs(id)...) {
				g.BaseName(ref)
			}
		}
		NewReverse(g)
		NewMakers(g)
		NewNames(g)
	}
	if passed < 100 {
		t.Errorf("only %d graphs passed", passed)
	}
}
