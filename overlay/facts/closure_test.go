package facts

import (
	"context"
	"errors"
	"math"
	"slices"
	"testing"

	"pgregory.net/rapid"

	"overkeep/policy/graph"
	"overkeep/tests/storegen"
)

// slowSizes walks from every path.
func slowSizes(g *graph.Graph) []int64 {
	sizes := make([]int64, g.Len())
	seen := make([]int, g.Len())
	for id := range g.Len() {
		todo := []graph.ID{graph.ID(id)}
		for len(todo) > 0 {
			v := todo[len(todo)-1]
			todo = todo[:len(todo)-1]
			if seen[v] == id+1 {
				continue
			}
			seen[v] = id + 1
			sizes[id] += g.NarSize[v]
			todo = append(todo, g.References(v)...)
		}
	}
	return sizes
}

// made builds the columns that closures need.
func made(refs [][]graph.ID, size func(i int) int64) *graph.Graph {
	g := &graph.Graph{RefOff: []uint32{0}}
	for i, r := range refs {
		g.Refs = append(g.Refs, r...)
		g.RefOff = append(g.RefOff, uint32(len(g.Refs)))
		g.NarSize = append(g.NarSize, size(i))
		g.Flags = append(g.Flags, 0)
	}
	return g
}

func TestClosureSizes(t *testing.T) {
	file, _ := generate(t, storegen.Options{Paths: 6000, Seed: 3})
	for _, db := range []string{file, realDB(t)} {
		l, err := Load(t.Context(), []Store{{DB: db, Layer: graph.Lower}}, Options{})
		if err != nil {
			t.Fatal(err)
		}
		got, err := ClosureSizes(t.Context(), l.Graph)
		if err != nil || !slices.Equal(got, slowSizes(l.Graph)) {
			t.Errorf("%s: not as the slow walk (%v)", db, err)
		}
	}
}

// Random graphs, cycles and self references among them.
func TestClosureSizesRandom(t *testing.T) {
	rapid.Check(t, func(t *rapid.T) {
		n := rapid.SampledFrom([]int{1, 2, 5, 60, 64, 65, 511, 512, 513, 1100}).Draw(t, "n")
		degree := rapid.IntRange(0, 3).Draw(t, "degree")
		back := rapid.Bool().Draw(t, "only back")
		refs := make([][]graph.ID, n)
		rng := rapid.Uint64().Draw(t, "seed")
		for i := range refs {
			for range degree {
				rng = rng*6364136223846793005 + 1442695040888963407
				to := int(rng>>33) % n
				if back {
					to %= i + 1
				}
				refs[i] = append(refs[i], graph.ID(to))
			}
		}
		g := made(refs, func(i int) int64 { return int64(i*i + 1) })
		got, err := ClosureSizes(context.Background(), g)
		if err != nil || !slices.Equal(got, slowSizes(g)) {
			t.Fatalf("%v: %v, not %v", err, got, slowSizes(g))
		}
	})
}

func TestClosureSizesExtremes(t *testing.T) {
	// A chain as long as a store, once as a cycle.
	const n = 100_000
	refs := make([][]graph.ID, n)
	for i := range refs {
		refs[i] = []graph.ID{graph.ID((i + 1) % n)}
	}
	got, err := ClosureSizes(t.Context(), made(refs, func(int) int64 { return 1 }))
	if err != nil || slices.Min(got) != n || slices.Max(got) != n {
		t.Error("cycle:", err)
	}
	if _, err := ClosureSizes(t.Context(), made(make([][]graph.ID, 2), func(int) int64 { return math.MaxInt64 })); !errors.Is(err, ErrTooLarge) {
		t.Error("overflow:", err)
	}
	if got, err := ClosureSizes(t.Context(), made(nil, nil)); err != nil || len(got) != 0 {
		t.Error("empty:", got, err)
	}
	ctx, cancel := context.WithCancel(t.Context())
	cancel()
	if _, err := ClosureSizes(ctx, made(refs, func(int) int64 { return 1 })); !errors.Is(err, context.Canceled) {
		t.Error("ended:", err)
	}
}
