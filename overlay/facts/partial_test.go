package facts

import (
	"errors"
	"math/rand/v2"
	"os"
	"path/filepath"
	"testing"

	"github.com/google/go-cmp/cmp"

	"overkeep/policy/graph"
	"overkeep/tests/storegen"
)

// closed is what LoadFor must hold, by the whole graph.
func closed(g *graph.Graph, start []graph.ID, build bool) map[graph.ID]bool {
	in := map[graph.ID]bool{}
	makers := map[graph.ID][]graph.ID{}
	for d := range g.Len() {
		for _, o := range g.Outputs(graph.ID(d)) {
			makers[o] = append(makers[o], graph.ID(d))
		}
	}
	for len(start) > 0 {
		id := start[len(start)-1]
		start = start[:len(start)-1]
		if id == graph.NoID || in[id] {
			continue
		}
		in[id] = true
		start = append(start, g.References(id)...)
		if build {
			start = append(append(append(start, makers[id]...), g.Outputs(id)...), g.Deriver[id])
		}
	}
	return in
}

func comparePartial(t *testing.T, whole *Loaded, stores []Store, targets []graph.ID, build bool) {
	t.Helper()
	var paths []string
	for _, id := range targets {
		paths = append(paths, whole.Graph.Path(id))
	}
	half := len(paths) / 2
	l, err := LoadFor(t.Context(), stores, paths[:half], Need{Roots: paths[half:], Build: build}, Options{})
	if err != nil {
		t.Fatal(err)
	}
	valid(t, l.Graph)
	all, got := words(whole.Graph), words(l.Graph)
	want := map[string]known{}
	for id := range closed(whole.Graph, targets, build) {
		n := string(whole.Graph.BaseName(id))
		want[n] = all[n]
	}
	if !build { // what is not in the part is not known of it
		for _, m := range []map[string]known{want, got} {
			for n, k := range m {
				k.Deriver, k.Outs = "", ""
				m[n] = k
			}
		}
	}
	if d := cmp.Diff(want, got); d != "" {
		t.Fatalf("build %v: the whole graph (-) and the part (+):\n%.3000s", build, d)
	}
	for n := range want {
		if l.Index.Base([]byte(n)) == graph.NoID {
			t.Errorf("%s is not in the index", n)
		}
	}
}

func TestLoadFor(t *testing.T) {
	file, _ := generate(t, storegen.Options{Paths: 3000, Seed: 4})
	stores := []Store{{DB: file, Layer: graph.Lower}}
	whole, err := Load(t.Context(), stores, Options{})
	if err != nil {
		t.Fatal(err)
	}
	rng := rand.New(rand.NewPCG(1, 1))
	for i := range 20 {
		var targets []graph.ID
		for range i % 4 {
			targets = append(targets, graph.ID(rng.IntN(3000)))
		}
		comparePartial(t, whole, stores, targets, i%2 == 0)
	}
	all := make([]string, whole.Graph.Len())
	for i := range all {
		all[i] = whole.Graph.Path(graph.ID(i))
	}
	if _, err := LoadFor(t.Context(), stores, all, Need{Most: len(all) - 1}, Options{}); !errors.Is(err, ErrMany) {
		t.Errorf("all paths, and one less allowed: %v", err)
	}
	if _, err := LoadFor(t.Context(), stores, all, Need{Most: len(all)}, Options{}); err != nil {
		t.Errorf("all paths, and as many allowed: %v", err)
	}
	l, err := LoadFor(t.Context(), stores, []string{"", "/", "/nix/store/x", "/nix/store/00000000000000000000000000000000-x"}, Need{Build: true}, Options{})
	if err != nil || l.Graph.Len() != 0 {
		t.Errorf("of nothing: %v, %v", l, err)
	}
}

func TestLoadForTwoStores(t *testing.T) {
	stores, _ := twoStores(t)
	whole, err := Load(t.Context(), stores, Options{})
	if err != nil {
		t.Fatal(err)
	}
	rng := rand.New(rand.NewPCG(2, 2))
	for i := range 20 {
		comparePartial(t, whole, stores, []graph.ID{graph.ID(rng.IntN(whole.Graph.Len())), graph.ID(rng.IntN(whole.Graph.Len()))}, i%2 == 0)
	}
}

func TestRealPart(t *testing.T) {
	file := realDB(t)
	stores := []Store{{DB: file, Layer: graph.Lower}}
	whole := same(t, stores, nil)
	comparePartial(t, whole, stores, []graph.ID{graph.ID(whole.Graph.Len() - 1)}, true)
	comparePartial(t, whole, stores, []graph.ID{graph.ID(whole.Graph.Len() - 1), 2000}, false)
}

// twoStores are a lower and an upper database that share rows, and the upper
// directory; own is what lies there.
func twoStores(t *testing.T) (stores []Store, own map[string]bool) {
	t.Helper()
	lower, ls := generate(t, storegen.Options{Paths: 3000, Seed: 1})
	mixed, shift := mixedStore(ls)
	dir := t.TempDir()
	if err := mixed.Write(t.Context(), dir); err != nil {
		t.Fatal(err)
	}
	stores = []Store{{DB: filepath.Join(dir, "db.sqlite"), Layer: graph.Upper}, {DB: lower, Layer: graph.Lower}}
	// Most of its own, some of the lower's (a duplicate), some missing, and what is no
	// store path.
	dir = t.TempDir()
	own = map[string]bool{}
	for i, p := range mixed.Paths {
		if i < shift && i%50 != 0 || i >= shift && i%40 == 0 {
			own[p.Base] = true
			if err := os.Mkdir(filepath.Join(dir, p.Base), 0o700); err != nil {
				t.Fatal(err)
			}
		}
	}
	if err := os.Mkdir(filepath.Join(dir, ".links"), 0o700); err != nil {
		t.Fatal(err)
	}
	stores[0].UpperDir = dir
	return stores, own
}
