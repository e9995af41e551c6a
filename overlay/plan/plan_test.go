package plan

import (
	"errors"
	"fmt"
	"slices"
	"strings"
	"testing"

	"github.com/google/go-cmp/cmp"

	"overkeep/policy"
	"overkeep/policy/graph"
)

const (
	lo = graph.Lower
	up = graph.Upper
	lu = graph.Lower | graph.Upper
)

// node is a path of a test: pub-... is granted by the policy of the tests.
type node struct {
	name  string
	flags graph.Flags
	refs  string // names
}

const grant = "system name \"pub*\"\npersonal name \"*secret*\"\n"

// world is an Input over nodes, whose rows are all there.
func world(t testing.TB, nodes ...node) (Input, map[string]graph.ID) {
	t.Helper()
	b, ids := graph.NewBuilder("/nix/store"), map[string]graph.ID{}
	for i, n := range nodes {
		p := graph.Path{Base: graph.TestBase(n.name), Flags: n.flags, NarSize: int64(i + 1)}
		for r := range strings.FieldsSeq(n.refs) {
			p.Refs = append(p.Refs, graph.TestBase(r))
		}
		ids[n.name] = b.Add(p)
	}
	g, err := b.Graph()
	if err != nil {
		t.Fatal(err)
	}
	return Input{Verdicts: decide(t, g), Row: rowsOf(g), Machine: "m", Keep: "alice", KeepID: "k", Policy: "d", Created: "2026-01-01T00:00:00Z"}, ids
}

func decide(t testing.TB, g *graph.Graph) *policy.Verdicts {
	t.Helper()
	p, err := policy.Parse(policy.Source{Name: "/etc/overkeep/policy", Text: []byte(grant), Root: true})
	if err != nil {
		t.Fatal(err)
	}
	v, err := policy.Decide(g, p)
	if err != nil {
		t.Fatal(err)
	}
	return v
}

func rowsOf(g *graph.Graph) func(Kind, graph.ID) (string, int64, error) {
	return func(_ Kind, id graph.ID) (string, int64, error) {
		if strings.Contains(string(g.Name(id)), "rowless") {
			return "", 0, nil
		}
		return fmt.Sprintf("sha256:%064x", id), g.NarSize[id], nil
	}
}

func store(name string) string { return "/nix/store/" + graph.TestBase(name) }

func nameOf(path string) string {
	if path == "" {
		return ""
	}
	return path[len("/nix/store/")+33:]
}

// shown is a plan in short: "seal a", units in parentheses, "!" marks what is blocked.
func shown(p *Plan) []string {
	var out []string
	for i, m := range p.Moves {
		s := string(m.Kind) + " " + nameOf(m.Path)
		if m.Duplicate {
			s += " dup"
		}
		if m.Follows != "" {
			s += " <" + nameOf(m.Follows)
		}
		if i > 0 && p.Moves[i-1].Unit == m.Unit {
			out[len(out)-1] += " + " + s
			continue
		}
		out = append(out, s)
	}
	for _, r := range p.Roots {
		out = append(out, "root "+r.Link)
	}
	for _, b := range p.Blocked {
		by := b.By
		if strings.HasPrefix(by, "/nix/store/") {
			by = nameOf(by)
		}
		s := fmt.Sprintf("! %s %s: %s", b.Kind, nameOf(b.Path), b.Why)
		if by != "" {
			s += " " + by
		}
		if b.Via != "" {
			s += " via " + nameOf(b.Via)
		}
		out = append(out, s)
	}
	return out
}

func TestMake(t *testing.T) {
	chain := []node{{"top", lo, "mid"}, {"mid", lo, "low"}, {"low", lo, "pub"}, {"pub", lo, ""}}
	root := func(k RootKind, link, name string) Root { return Root{Link: link, Path: store(name), Kind: k} }
	for _, c := range []struct {
		about string
		nodes []node
		roots []Root
		want  []string
	}{
		{"nothing to do", []node{{"a", up, "pub"}, {"pub", lo, ""}}, nil, nil},
		{"seals go referrers first", chain, nil, []string{"seal top", "seal mid", "seal low"}},
		{"what follows says whom", []node{{"pub-a", lo, "pub-b"}, {"pub-b", lo, "secret"}, {"secret", lo, ""}}, nil,
			[]string{"seal pub-a <secret", "seal pub-b <secret", "seal secret"}},
		{"releases go references first", []node{{"pub-a", up, "pub-b"}, {"pub-b", up, "pub-c pub-d"}, {"pub-c", up, ""}, {"pub-d", lo, ""}}, nil,
			[]string{"release pub-c", "release pub-b", "release pub-a"}},
		{"a circle is one unit", []node{{"a", lo, "b"}, {"b", lo, "a c"}, {"c", lo, "c"}}, nil, []string{"seal a + seal b", "seal c"}},
		{"in both stores", []node{{"a", lu, ""}, {"pub", lu, ""}}, nil, []string{"seal a dup", "release pub dup"}},
		{"a keep's row of a path of the system's", []node{{"pub", lo, ""}, {"gone", 0, ""}}, nil, nil},
		{"boot holds its closure", chain, []Root{root(RootBoot, "/run/current-system", "mid")},
			[]string{"seal top", "! seal mid: boot /run/current-system", "! seal low: boot /run/current-system via mid"}},
		{"the user's roots move along", chain, []Root{root(RootUser, "/home/a/result", "top"), root(RootUser, "/home/a/pub", "pub"), root(RootOwnPin, "/pins/low", "low")},
			[]string{"seal top", "seal mid", "seal low", "root /home/a/result"}},
		{"the user's root stays where its path does", chain, []Root{root(RootUser, "/home/a/result", "top"), root(RootOther, "/home/b/result", "top")},
			[]string{"! seal top: other /home/b/result", "! seal mid: other /home/b/result via top", "! seal low: other /home/b/result via mid"}},
		{"the more lasting obstacle is named", chain, []Root{root(RootTemp, "temp", "mid"), root(RootProcess, "pid 1 (x)", "low"), root(RootKeepPin, "/pins/b", "low")},
			[]string{"seal top", "! seal mid: temp temp", "! seal low: keep-pin /pins/b"}},
		{"a root of nothing known", chain[3:], []Root{root(RootBoot, "/x", "nowhere"), {Link: "/y", Path: "/elsewhere", Kind: RootBoot}}, nil},
		{"no hash", []node{{"a", lo, "rowless"}, {"rowless", lo, "b"}, {"b", lo, ""}}, nil,
			[]string{"seal a", "! seal rowless: row", "! seal b: referenced rowless via rowless"}},
		{"a broken row", []node{{"a", lo | graph.Broken, ""}, {"pub", up | graph.Broken, ""}}, nil, []string{"! seal a: row"}},
		{"other data in the two", []node{{"a", lu, "b"}, {"b", lu | graph.Differs, "c"}, {"c", lo, ""}}, nil,
			[]string{"seal a dup", "! seal b: differs", "! seal c: referenced b via b"}},
		{"a release needs its references", []node{{"pub-a", up, "pub-b"}, {"pub-b", up, "pub-c"}, {"pub-c", 0, ""}, {"pub-d", up, ""}}, nil,
			[]string{"release pub-d", "! release pub-a: needs pub-c via pub-b", "! release pub-b: needs pub-c"}},
		{"the keep's copy goes, whatever refers to it", []node{{"pub-a", lu, "pub-b"}, {"pub-b", lu, ""}, {"c", up, "pub-a"}}, nil,
			[]string{"release pub-b dup", "release pub-a dup"}},
	} {
		in, _ := world(t, c.nodes...)
		in.Roots = c.roots
		p, err := Make(in)
		if err != nil {
			t.Errorf("%s: %v", c.about, err)
			continue
		}
		if got := shown(p); !slices.Equal(got, c.want) {
			t.Errorf("%s:\n%s", c.about, cmp.Diff(c.want, got))
		}
	}
}

func TestChosen(t *testing.T) {
	nodes := []node{
		{"top", lo, "low pub"}, {"low", lo, ""}, {"pub", lo, ""}, {"pub-user", lo, "pub"}, {"mine", up, "low pub-x"},
		{"pub-x", up, "pub-y pub"}, {"pub-y", up, ""}, {"pub-z", up, "secret"}, {"secret", up, ""}, {"gone", 0, ""},
	}
	for _, c := range []struct {
		about, seal, release string
		want                 []string
		err                  string
	}{
		{"with what refers to it", "low", "", []string{"seal top <low", "seal low"}, ""},
		{"also a public one", "pub", "", []string{"seal pub-user <pub", "seal top <pub", "seal pub"}, ""},
		{"with what it refers to", "", "pub-x", []string{"release pub-y <pub-x", "release pub-x"}, ""},
		{"both, and one twice", "low low", "pub-y", []string{"seal top <low", "seal low", "release pub-y"}, ""},
		{"personal", "", "mine", nil, `"MINE" may not be released: that is personal (not-granted)`},
		{"refers to a personal one", "", "pub-z", nil, `"PUB-Z" may not be released: that refers to "SECRET", which is personal (vetoed) by "personal name \"*secret*\"" (/etc/overkeep/policy:2)`},
		{"there already", "mine", "", nil, `"MINE" does not lie in the system store: it is in the keep already`},
		{"there already", "", "pub", nil, `"PUB" does not lie in the keep: it is in the system store already`},
		{"nowhere", "gone", "", nil, `"GONE" lies in neither store`},
	} {
		in, ids := world(t, nodes...)
		in.Mode, in.Seal, in.Release = Chosen, some(ids, c.seal), some(ids, c.release)
		p, err := Make(in)
		if c.err != "" {
			want := c.err
			for n := range ids {
				want = strings.ReplaceAll(want, `"`+strings.ToUpper(n)+`"`, `"`+store(n)+`"`)
			}
			if err == nil || err.Error() != strings.ReplaceAll(want, `\"`, `"`) {
				t.Errorf("%s: %v, want %s", c.about, err, want)
			}
			continue
		}
		if err != nil {
			t.Errorf("%s: %v", c.about, err)
		} else if got := shown(p); !slices.Equal(got, c.want) {
			t.Errorf("%s:\n%s", c.about, cmp.Diff(c.want, got))
		}
	}
}

func some(ids map[string]graph.ID, names string) (out []graph.ID) {
	for n := range strings.FieldsSeq(names) {
		out = append(out, ids[n])
	}
	return out
}

// Exact asks no policy, and takes nothing along.
func TestExact(t *testing.T) {
	in, ids := world(t, node{"pub-a", lo, "pub-b"}, node{"pub-b", lo, ""}, node{"mine", up, "pub-b"}, node{"other", up, "mine"}, node{"pub-c", lo, ""})
	in.Mode = Exact
	for _, c := range []struct {
		seal, release string
		want          []string
	}{
		{"pub-b", "", []string{"! seal pub-b: referenced pub-a"}},
		{"pub-b pub-a", "", []string{"seal pub-a", "seal pub-b"}},
		{"", "mine", []string{"release mine"}},
		{"", "other", []string{"! release other: needs mine"}},
		{"", "other mine", []string{"release mine", "release other"}},
		{"pub-a pub-b", "other mine", []string{"seal pub-a", "seal pub-b", "! release mine: needs pub-b", "! release other: needs pub-b via mine"}},
		{"pub-b", "mine", []string{"release mine", "! seal pub-b: referenced pub-a"}},
		{"mine pub-a", "pub-c other", []string{"seal pub-a", "! seal mine: gone", "! release other: needs mine", "! release pub-c: gone"}},
	} {
		in.Seal, in.Release = some(ids, c.seal), some(ids, c.release)
		p, err := Make(in)
		if err != nil {
			t.Fatal(err)
		}
		if got := shown(p); !slices.Equal(got, c.want) {
			t.Errorf("seal %s, release %s:\n%s", c.seal, c.release, cmp.Diff(c.want, got))
		}
	}
	p := &Plan{Reasons: []Reason{{Reason: "granted"}}}
	p.Gone(Seal)
	p.Gone(Seal, store("a"), store("b"))
	p.Gone(Release, store("c"))
	if got := shown(p); !slices.Equal(got, []string{"! seal a: gone", "! seal b: gone", "! release c: gone"}) || len(p.Reasons) != 2 || p.Blocked[2].Reason != 1 {
		t.Errorf("%q %+v", got, p)
	}
	in.Verdicts, in.Graph = nil, in.Verdicts.Index().Graph()
	if _, err := Make(in); err != nil {
		t.Errorf("without verdicts: %v", err)
	}
	in.Mode = Misplaced
	if _, err := Make(in); !errors.Is(err, ErrInput) {
		t.Errorf("without verdicts: %v", err)
	}
}

func TestInputs(t *testing.T) {
	base, _ := world(t, node{"both", lu, ""})
	broken := errors.New("no database")
	for name, c := range map[string]struct {
		change func(*Input)
		want   error
	}{
		"no graph":           {func(in *Input) { in.Verdicts = nil }, ErrInput},
		"no rows":            {func(in *Input) { in.Row = nil }, ErrInput},
		"another mode":       {func(in *Input) { in.Mode = 7 }, ErrInput},
		"another graph":      {func(in *Input) { in.Graph = &graph.Graph{} }, ErrInput},
		"no such path":       {func(in *Input) { in.Mode, in.Seal = Chosen, []graph.ID{1} }, ErrInput},
		"below zero":         {func(in *Input) { in.Mode, in.Seal = Chosen, []graph.ID{-1} }, ErrInput},
		"named and all":      {func(in *Input) { in.Seal = []graph.ID{0} }, ErrInput},
		"there and back":     {func(in *Input) { in.Mode, in.Seal, in.Release = Exact, []graph.ID{0}, []graph.ID{0} }, ErrInput},
		"no database":        {func(in *Input) { in.Row = func(Kind, graph.ID) (string, int64, error) { return "", 0, broken } }, broken},
		"nothing the matter": {func(*Input) {}, nil},
	} {
		in := base
		c.change(&in)
		if _, err := Make(in); !errors.Is(err, c.want) {
			t.Errorf("%s: %v", name, err)
		}
	}
}

// Everything that a plan shows comes from the moves.
func TestShow(t *testing.T) {
	in, _ := world(t, node{"pub-a", lo, "secret"}, node{"secret", lo, ""}, node{"x", lu, ""}, node{"boot", lo, "mid"}, node{"mid", lo, "low"}, node{"low", lo, ""}, node{"pub-r", up, ""})
	in.Roots = []Root{{Link: "/run/booted-system", Path: store("boot"), Kind: RootBoot}}
	in.Medium = Medium{FSType: "btrfs", Links: true}
	p, err := Make(in)
	if err != nil {
		t.Fatal(err)
	}
	veto := Reason{"vetoed", `personal name "*secret*"`, "/etc/overkeep/policy", 2}
	want := []Group{
		{Kind: Seal, Reason: veto, Paths: 2, Bytes: 3, Following: 1, FollowingBytes: 1},
		{Kind: Seal, Reason: Reason{Reason: "not-granted"}, Paths: 1, Bytes: 3, Duplicates: 1, DuplicateBytes: 3},
		{Kind: Release, Reason: Reason{"granted", `system name "pub*"`, "/etc/overkeep/policy", 1}, Paths: 1, Bytes: 7},
	}
	if d := cmp.Diff(want, p.Groups()); d != "" {
		t.Error(d)
	}
	holds := p.Holds()
	if d := cmp.Diff([]Hold{{Kind: Seal, Why: BlockedBoot, By: "/run/booted-system", Paths: 3, Bytes: 4 + 5 + 6, First: 0}}, holds); d != "" {
		t.Error(d)
	}
	ways := p.Ways()
	for i, b := range p.Blocked {
		full := []string{store("boot"), store("mid"), store("low")}
		if got, want := ways(i, 10), full[:slices.Index(full, b.Path)+1]; !slices.Equal(got, want) {
			t.Errorf("way to %s: %q", b.Path, got)
		}
	}
	if got := ways(len(p.Blocked)-1, 2); len(got) != 2 {
		t.Errorf("bounded way: %q", got)
	}
	var codes []string
	for _, r := range p.Residue {
		codes = append(codes, r.Code)
	}
	if !slices.Equal(codes, []string{"flash", "file-system", "no-discard", "hard-links", "copies", "logs"}) {
		t.Errorf("%q", codes)
	}
	if (Medium{}).residue(false) != nil {
		t.Error("residue without a seal")
	}
}

func TestDiff(t *testing.T) {
	mv := func(k Kind, name, hash string) Move {
		return Move{Kind: k, Path: store(name), NarHash: hash, NarSize: 1}
	}
	r1, r2 := Root{Link: "/r1", Path: store("a"), Kind: RootUser}, Root{Link: "/r2", Path: store("a"), Kind: RootUser}
	want := &Plan{Moves: []Move{mv(Seal, "a", "h"), mv(Seal, "b", "h"), mv(Release, "c", "h")}, Roots: []Root{r1}}
	dup := mv(Seal, "a", "h")
	dup.Duplicate = true
	for name, c := range map[string]struct {
		now   Plan
		done  string
		words string
	}{
		"the same in another order":  {Plan{Moves: []Move{want.Moves[2], want.Moves[1], want.Moves[0]}, Roots: want.Roots}, "", "no difference"},
		"a root has gone":            {Plan{Moves: want.Moves}, "", "no difference"},
		"a root has come":            {Plan{Moves: want.Moves, Roots: []Root{r1, r2}}, "", "1 roots would move along besides"},
		"one has gone":               {Plan{Moves: want.Moves[1:]}, "", "1 need not or cannot move any more"},
		"one has been moved":         {Plan{Moves: want.Moves[1:]}, "a", "no difference"},
		"one is half way":            {Plan{Moves: []Move{dup, want.Moves[1], want.Moves[2]}}, "a", "no difference"},
		"one is in both all at once": {Plan{Moves: []Move{dup, want.Moves[1], want.Moves[2]}}, "", "1 changed"},
		"one has come":               {Plan{Moves: append(slices.Clone(want.Moves), mv(Seal, "d", "h"))}, "", "1 would move besides"},
		"other data":                 {Plan{Moves: []Move{want.Moves[0], mv(Seal, "b", "g"), want.Moves[2]}}, "", "1 changed"},
		"other data, though done":    {Plan{Moves: []Move{mv(Seal, "a", "g"), want.Moves[1], want.Moves[2]}}, "a", "1 changed"},
		"the other way":              {Plan{Moves: []Move{want.Moves[0], want.Moves[1], mv(Seal, "c", "h")}}, "", "1 changed"},
		"nothing left":               {Plan{}, "", "3 need not or cannot move any more"},
	} {
		d := Diff(want, &c.now, func(p string) bool { return nameOf(p) == c.done })
		if d.String() != c.words || d.Empty() != (c.words == "no difference") {
			t.Errorf("%s: %s", name, d)
		}
	}
	if !Diff(want, want, nil).Empty() {
		t.Error("a plan differs from itself")
	}
}

// TestLarge: a store of a million paths in one chain, the deepest there is.
func TestLarge(t *testing.T) {
	const n = 1_000_000
	g := &graph.Graph{StoreDir: "/nix/store", BaseOff: []uint32{0}, RefOff: []uint32{0}, OutOff: make([]uint32, n+1),
		NarSize: make([]int64, n), Flags: make([]graph.Flags, n), Deriver: make([]graph.ID, n), Roots: map[string]graph.Root{}}
	for i := range graph.ID(n) {
		g.Base = fmt.Appendf(g.Base, "%032d-p", i)
		g.BaseOff = append(g.BaseOff, uint32(len(g.Base)))
		if i > 0 {
			g.Refs = append(g.Refs, i-1)
		}
		g.RefOff = append(g.RefOff, uint32(len(g.Refs)))
		g.Flags[i], g.Deriver[i] = graph.Lower, graph.NoID
	}
	in := Input{Verdicts: decide(t, g), Row: rowsOf(g), Roots: []Root{{Link: "/boot", Path: g.Path(n / 2), Kind: RootBoot}}}
	p, err := Make(in)
	if err != nil {
		t.Fatal(err)
	}
	if len(p.Moves) != n/2-1 || len(p.Blocked) != n/2+1 || p.Moves[0].Path != g.Path(n-1) {
		t.Errorf("%d moves, %d blocked", len(p.Moves), len(p.Blocked))
	}
	if w := p.Ways()(0, 5); len(w) != 5 || w[4] != g.Path(0) {
		t.Errorf("%q", w)
	}
}
