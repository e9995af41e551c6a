package policies

import (
	"context"
	"os"
	"path/filepath"
	"testing"

	"overkeep/overlay/facts"
	"overkeep/overlay/provenance"
	"overkeep/overlay/verdict"
	"overkeep/policy"
	"overkeep/policy/graph"
	"overkeep/tests/storegen"
)

// The same worlds as a database with signatures that verify, links on disk and recorded
// origins: through the loader every path is placed as in the graph made by hand, and for
// the same reason. So what the worlds take for a fact is what a real store would tell.
func TestPeopleThroughTheLoader(t *testing.T) {
	for _, one := range people(t) {
		t.Run(one.name, func(t *testing.T) {
			var sources []policy.Source
			for _, s := range one.sources {
				sources = append(sources, withTestKeys(s))
			}
			p := parse(t, sources)
			w := world(t, one.name)
			want := decide(t, w, p)

			root, origins := t.TempDir(), filepath.Join(t.TempDir(), "origins")
			db := filepath.Join(root, verdict.SystemDB)
			must(t, os.MkdirAll(filepath.Dir(db), 0o755))
			must(t, w.Store().Write(context.Background(), filepath.Dir(db)))
			must(t, w.Links(root))
			must(t, os.Mkdir(origins, 0o700))
			record(t, origins, w)
			loaded, err := verdict.Load(context.Background(), verdict.Input{Root: root, Origins: origins,
				Stores: []facts.Store{{DB: db, Layer: graph.Lower}}}, p)
			must(t, err)
			defer loaded.Close()
			for _, n := range loaded.Notes {
				t.Errorf("the loader notes: %s", n)
			}
			got := loaded.Decide(p)
			g := want.Index().Graph()
			if loaded.Graph.Len() != g.Len() {
				t.Fatalf("%d paths, want %d", loaded.Graph.Len(), g.Len())
			}
			for id := range graph.ID(g.Len()) {
				there := loaded.Index.Path(g.Path(id))
				if there == graph.NoID {
					t.Errorf("%s is not there", g.Name(id))
					continue
				}
				r, line := want.Reason(id)
				s, other := got.Reason(there)
				if r != s || line != other || want.System.Has(id) != got.System.Has(there) {
					t.Errorf("%s: %s, %s (line %d); by hand %s, %s (line %d)", g.Name(id), place(got, there), s, other, place(want, id), r, line)
				}
				if a, b := loaded.Graph.Flags[there], g.Flags[id]; a != b {
					t.Errorf("%s: flags %#x, by hand %#x", g.Name(id), a, b)
				}
			}
		})
	}
}

func record(t *testing.T, dir string, w *storegen.World) {
	t.Helper()
	s, err := provenance.Open(dir)
	must(t, err)
	for _, x := range w.Paths {
		if len(x.From)+len(x.Licences) == 0 && x.Unfree == graph.Unknown {
			continue
		}
		_, err := s.Add(provenance.Record{Path: storegen.Base(x.Name), From: x.From, Licences: x.Licences, Unfree: x.Unfree, How: provenance.ByMeta})
		must(t, err)
	}
}
