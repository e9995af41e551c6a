package facts

import (
	"context"
	"database/sql"
	"os"
	"path/filepath"
	"regexp"
	"slices"
	"strings"
	"testing"

	"github.com/google/go-cmp/cmp"

	"overkeep/policy/graph"
	"overkeep/tests/need"
	"overkeep/tests/storegen"
)

// known is what is known of a path, in words: what the graph of a fast loader and
// the maps of a slow one both can be turned into.
type known struct {
	Flags   string
	NarSize int64
	Deriver string
	Refs    string
	Outs    string
}

// words turns a graph into words.
func words(g *graph.Graph) map[string]known {
	names := func(ids []graph.ID) string {
		var s []string
		for _, id := range ids {
			s = append(s, string(g.BaseName(id)))
		}
		slices.Sort(s)
		return strings.Join(s, " ")
	}
	all := map[string]known{}
	for i := range g.Len() {
		id := graph.ID(i)
		k := known{flagWords(g.Flags[id]), g.NarSize[id], "", names(g.References(id)), names(g.Outputs(id))}
		if d := g.Deriver[id]; d != graph.NoID {
			k.Deriver = string(g.BaseName(d))
		}
		all[string(g.BaseName(id))] = k
	}
	return all
}

var flagNames = []string{"source", "derivation", "output", "fixed", "ultimate", "lower", "upper", "differs", "broken", "added"}

func flagWords(f graph.Flags) string {
	var s []string
	for i := range 16 {
		if f&(1<<i) != 0 {
			s = append(s, append(flagNames, strings.Repeat("?", i+1))[min(i, len(flagNames))])
		}
	}
	return strings.Join(s, " ")
}

// slowRow is a row with its texts.
type slowRow struct {
	id, narSize                  int64
	path, hash, deriver, sigs, c string
	ultimate                     bool
	wrong                        bool
	refs                         []string // bases
	lacks                        bool
}

var (
	dotsFirst = regexp.MustCompile(`^.{33}\.\.?(-.*)?$`)
	narHash   = regexp.MustCompile(`^sha256:[0-9a-f]{64}$`)
	storePath = regexp.MustCompile(`^/nix/store/([0-9abcdfghijklmnpqrsvwxyz]{32}-[0-9a-zA-Z+\-._?=]{1,211})$`)
)

func slowBase(path string) string {
	m := storePath.FindStringSubmatch(path)
	if m == nil || dotsFirst.MatchString(m[1]) {
		return ""
	}
	return m[1]
}

type slowStore struct {
	rows map[string]*slowRow // by base
	outs map[string][]string // drv base -> output bases, valid here or not
}

// slowRead reads a database through database/sql, row by row.
func slowRead(t testing.TB, file string) slowStore {
	t.Helper()
	db, err := sql.Open("sqlite3", file+"?_query_only=1")
	if err != nil {
		t.Fatal(err)
	}
	defer db.Close()
	s := slowStore{map[string]*slowRow{}, map[string][]string{}}
	byID := map[int64]string{}
	query := func(q string, each func(v []any)) {
		rows, err := db.Query(q)
		if err != nil {
			t.Fatal(err)
		}
		defer rows.Close()
		cols, _ := rows.Columns()
		for rows.Next() {
			v := make([]any, len(cols))
			p := make([]any, len(cols))
			for i := range v {
				p[i] = &v[i]
			}
			if err := rows.Scan(p...); err != nil {
				t.Fatal(err)
			}
			each(v)
		}
		if err := rows.Err(); err != nil {
			t.Fatal(err)
		}
	}
	query(`select id, path, typeof(path), hash, typeof(hash), registrationTime, typeof(registrationTime), deriver, typeof(deriver),
		narSize, typeof(narSize), ultimate, typeof(ultimate), sigs is not null, ca, typeof(ca) from ValidPaths`, func(v []any) {
		text := func(x any) string {
			switch x := x.(type) {
			case string:
				return x
			case []byte:
				return string(x)
			}
			return ""
		}
		typ := func(i int, ok ...string) bool { return slices.Contains(ok, text(v[i])) }
		if !typ(2, "text") {
			return
		}
		base := slowBase(text(v[1]))
		if base == "" {
			return
		}
		r := &slowRow{id: v[0].(int64), path: base}
		r.wrong = !typ(4, "text") || !typ(6, "integer") || !typ(8, "text", "null") || !typ(10, "integer", "null") ||
			!typ(12, "integer", "null") || !typ(15, "text", "null")
		for _, i := range []int{3, 7, 14} {
			if len(text(v[i])) > 64<<10 {
				r.wrong, v[i] = true, nil
			}
		}
		if typ(4, "text") {
			r.hash = text(v[3])
		}
		if typ(8, "text") {
			r.deriver = text(v[7])
		}
		if typ(10, "integer") {
			r.narSize, _ = v[9].(int64)
		}
		if n, ok := v[11].(int64); ok && typ(12, "integer") {
			r.ultimate = n != 0
		}
		if v[13].(int64) != 0 {
			r.sigs = "yes"
		}
		if typ(15, "text") {
			r.c = text(v[14])
		}
		r.wrong = r.wrong || !narHash.MatchString(r.hash) || r.narSize < 0 || r.id < 1 || r.id > 1<<40 ||
			r.c != "" && !strings.HasPrefix(r.c, "text:") && !strings.HasPrefix(r.c, "fixed:") || r.c == "text:" || r.c == "fixed:"
		r.narSize = max(0, r.narSize)
		s.rows[base], byID[r.id] = r, base
	})
	query("select referrer, reference from Refs", func(v []any) {
		if v[0] == nil { // nobody's
			return
		}
		a, ok1 := v[0].(int64)
		b, ok2 := v[1].(int64)
		if !ok1 || !ok2 {
			t.Fatal("the slow loader does not judge this")
		}
		if from := s.rows[byID[a]]; from != nil {
			if to := byID[b]; to != "" {
				from.refs = append(from.refs, to)
			} else {
				from.lacks = true
			}
		}
	})
	query("select drv, path from DerivationOutputs", func(v []any) {
		drv, ok := v[0].(int64)
		path, ok2 := v[1].(string)
		if !ok || !ok2 {
			return
		}
		if base := byID[drv]; base != "" {
			if o := slowBase(path); o != "" {
				s.outs[base] = append(s.outs[base], o)
			}
		}
	})
	for _, r := range s.rows {
		slices.Sort(r.refs)
	}
	return s
}

// slowLoad is Load, slow and obvious.
func slowLoad(t testing.TB, stores []Store, own map[string]bool) map[string]known {
	t.Helper()
	both := map[graph.Flags]slowStore{}
	names := map[string]bool{}
	for _, st := range stores {
		both[st.Layer] = slowRead(t, st.DB)
		for n := range both[st.Layer].rows {
			names[n] = true
		}
	}
	drvs := map[string]map[string]bool{} // output -> derivations that list it
	for _, s := range both {
		for d, outs := range s.outs {
			for _, o := range outs {
				if names[o] {
					if drvs[o] == nil {
						drvs[o] = map[string]bool{}
					}
					drvs[o][d] = true
				}
			}
		}
	}
	all := map[string]known{}
	outs := map[string][]string{}
	for n := range names {
		lo, up := both[graph.Lower].rows[n], both[graph.Upper].rows[n]
		var f graph.Flags
		var k known
		var hasDeriver, signed bool
		refs := map[string]bool{}
		ca := ""
		for _, r := range []*slowRow{lo, up} {
			if r == nil {
				continue
			}
			if r.wrong || r.lacks {
				f |= graph.Broken
			}
			if r.ultimate {
				f |= graph.Ultimate
			}
			hasDeriver = hasDeriver || r.deriver != ""
			signed = signed || r.sigs != ""
			if d := slowBase(r.deriver); k.Deriver == "" && names[d] && strings.HasSuffix(d, ".drv") {
				k.Deriver = d
			}
			if r.c != "" {
				ca = r.c
			}
			for _, x := range r.refs {
				refs[x] = true
			}
			if k.NarSize == 0 {
				k.NarSize = r.narSize
			}
		}
		if lo != nil && up != nil && (lo.hash != up.hash || lo.narSize != up.narSize || lo.c != up.c || !slices.Equal(lo.refs, up.refs)) {
			f |= graph.Differs
		}
		var rs []string
		for r := range refs {
			rs = append(rs, r)
		}
		slices.Sort(rs)
		k.Refs = strings.Join(rs, " ")
		// Layers.
		_, haveLower := both[graph.Lower]
		switch {
		case up == nil:
			f |= graph.Lower
		case own == nil && lo != nil:
			f |= graph.Lower
		case own == nil:
			f |= graph.Upper
		case lo != nil && own[n]:
			f |= graph.Lower | graph.Upper
		case own[n]:
			f |= graph.Upper
		case lo == nil && haveLower:
			f |= graph.Lower | graph.Broken
		default:
			f |= graph.Lower
		}
		// Kinds.
		made := hasDeriver || len(drvs[n]) > 0
		text, fixed := strings.HasPrefix(ca, "text:") && ca != "text:", strings.HasPrefix(ca, "fixed:") && ca != "fixed:"
		switch {
		case strings.HasSuffix(n, ".drv") && fixed:
			f |= graph.Derivation | graph.Source | graph.FixedOutput
		case strings.HasSuffix(n, ".drv"):
			f |= graph.Derivation
		case (text || fixed) && made:
			f |= graph.FixedOutput
		case text:
			f |= graph.Source
		case fixed:
			f |= graph.Source | graph.FixedOutput
			if delete(refs, n); len(refs) == 0 && f&graph.Ultimate == 0 {
				f |= graph.Added
			}
		case signed || f&graph.Ultimate != 0:
			f |= graph.Output
		case made:
			f |= graph.Output | graph.FixedOutput
		default:
			f |= graph.Source | graph.Output | graph.FixedOutput
		}
		k.Flags = flagWords(f)
		all[n] = k
		for d := range drvs[n] {
			outs[d] = append(outs[d], n)
		}
		if k.Deriver != "" && !slices.Contains(outs[k.Deriver], n) {
			outs[k.Deriver] = append(outs[k.Deriver], n)
		}
	}
	for d, o := range outs {
		slices.Sort(o)
		k := all[d]
		k.Outs = strings.Join(o, " ")
		all[d] = k
	}
	return all
}

func generate(t testing.TB, o storegen.Options) (file string, s *storegen.Store) {
	t.Helper()
	dir := t.TempDir()
	s, err := storegen.Write(context.Background(), dir, o)
	if err != nil {
		t.Fatal(err)
	}
	return filepath.Join(dir, "db.sqlite"), s
}

func same(t testing.TB, stores []Store, own map[string]bool) *Loaded {
	t.Helper()
	l, err := Load(t.Context(), stores, Options{})
	if err != nil {
		t.Fatal(err)
	}
	valid(t, l.Graph)
	if d := cmp.Diff(slowLoad(t, stores, own), words(l.Graph)); d != "" {
		t.Fatalf("the slow loader (-) and the fast one (+):\n%.3000s", d)
	}
	return l
}

// valid checks that nothing in a graph points beyond its end.
func valid(t testing.TB, g *graph.Graph) {
	t.Helper()
	n := g.Len()
	if len(g.BaseOff) != n+1 || len(g.RefOff) != n+1 || len(g.OutOff) != n+1 || len(g.NarSize) != n || len(g.Deriver) != n {
		t.Fatalf("columns of %d paths: %d %d %d %d %d", n, len(g.BaseOff), len(g.RefOff), len(g.OutOff), len(g.NarSize), len(g.Deriver))
	}
	if int(g.RefOff[n]) != len(g.Refs) || int(g.OutOff[n]) != len(g.Outs) || int(g.BaseOff[n]) != len(g.Base) {
		t.Fatal("the last offsets are not the ends")
	}
	for i := range n {
		id := graph.ID(i)
		if g.RefOff[i] > g.RefOff[i+1] || g.OutOff[i] > g.OutOff[i+1] || g.BaseOff[i] > g.BaseOff[i+1] {
			t.Fatalf("path %d: offsets go down", i)
		}
		if slowBase(g.Path(id)) == "" {
			t.Fatalf("path %d: %q", i, g.BaseName(id))
		}
		for _, list := range [][]graph.ID{g.References(id), g.Outputs(id), {max(0, g.Deriver[id])}} {
			for j, x := range list {
				if x < 0 || int(x) >= n || j > 0 && list[j-1] >= x {
					t.Fatalf("path %d: %v", i, list)
				}
			}
		}
		if g.Flags[id]&graph.KindMask == 0 || g.Flags[id]&graph.LayerMask == 0 || g.Flags[id]>>10 != 0 {
			t.Fatalf("path %d: flags %#x", i, g.Flags[id])
		}
	}
}

func TestGenerated(t *testing.T) {
	for _, n := range []int{1, 7, 500, 20_000} {
		file, s := generate(t, storegen.Options{Paths: n, Seed: uint64(n)})
		for _, layer := range []graph.Flags{graph.Lower, graph.Upper} {
			l := same(t, []Store{{DB: file, Layer: layer}}, nil)
			if l.Report.Paths != n || l.Report.Broken+l.Report.Differs+l.Report.Dropped != 0 {
				t.Errorf("%d paths: %+v", n, l.Report)
			}
			for _, p := range s.Paths {
				if id := l.Index.Path(storegen.StoreDir + p.Base); id == graph.NoID || string(l.Graph.BaseName(id)) != p.Base {
					t.Fatalf("index: %s is %d", p.Base, id)
				}
			}
			if l.Index.Path("/nix/store/"+strings.Repeat("0", 32)+"-x") != graph.NoID || l.Index.Path("x") != graph.NoID {
				t.Error("the index finds what is not there")
			}
		}
	}
}

// mixedStore is what a keep's database holds: its own paths, and the first half of
// the lower's under other ids, some of them changed.
func mixedStore(ls *storegen.Store) (mixed *storegen.Store, shift int) {
	own := storegen.Model(storegen.Options{Paths: 2000, Seed: 2, Prefix: "own-"})
	mixed = &storegen.Store{}
	for i, p := range own.Paths {
		p.ID = int64(3*i + 10)
		mixed.Paths = append(mixed.Paths, p)
	}
	shift = len(mixed.Paths)
	for i, p := range ls.Paths[:len(ls.Paths)/2] {
		p.ID = int64(20_000 + 2*i)
		p.Refs = slices.Clone(p.Refs)
		for j := range p.Refs {
			p.Refs[j] += int32(shift)
		}
		p.Outs = nil
		if p.Deriver >= 0 {
			p.Deriver += shift
		}
		switch i % 100 {
		case 1:
			p.NarSize++
		case 2:
			p.Hash[3]++
		case 3:
			p.CA += "x"
		case 4:
			p.Refs = append(p.Refs, 7)
			slices.Sort(p.Refs)
		case 5:
			p.Refs = p.Refs[:len(p.Refs)/2]
		case 6:
			p.Sigs, p.Ultimate = "", !p.Ultimate
		}
		mixed.Paths = append(mixed.Paths, p)
	}
	return mixed, shift
}

func TestTwoStores(t *testing.T) {
	stores, own := twoStores(t)
	l := same(t, stores, own)
	if l.Report.Differs < 50 || l.Report.Paths != 5000 {
		t.Errorf("%+v", l.Report)
	}
	same(t, stores[:1], own)
	stores[0].UpperDir = ""
	same(t, stores, nil)
	same(t, stores[:1], nil)
}

// realDB is the database of real packages that lies beside the repository.
func realDB(t testing.TB) string {
	t.Helper()
	file := filepath.Join(t.TempDir(), "db.sqlite")
	if err := os.WriteFile(file, need.DataZstd(t, "real.sqlite.zst"), 0o600); err != nil {
		t.Fatal(err)
	}
	return file
}

func TestReal(t *testing.T) {
	l := same(t, []Store{{DB: realDB(t), Layer: graph.Lower}}, nil)
	if want := (Report{Paths: 3904, Refs: 27647}); l.Report != want {
		t.Errorf("%+v, want %+v", l.Report, want)
	}
}
