package policy

import (
	"fmt"
	"os"
	"regexp"
	"slices"
	"strings"
	"testing"

	"overkeep/policy/graph"
)

var base = graph.TestBase

// store builds a graph from short lines: "name kind [-> refs] [by deriver] [out outputs] [signed] [from x] [mib n]".
func store(t testing.TB, lines string, roots map[string][]string) *graph.Graph {
	t.Helper()
	b := graph.NewBuilder("/nix/store")
	b.Keys(testKeys...)
	kinds := map[string]graph.Flags{"source": graph.Source, "drv": graph.Derivation, "out": graph.Output, "fixed": graph.FixedOutput,
		"here": graph.Output | graph.Ultimate, "broken": graph.Output | graph.Broken, "differs": graph.Output | graph.Differs}
	for line := range strings.Lines(lines) {
		w := strings.Fields(line)
		if len(w) == 0 {
			continue
		}
		p := graph.Path{Base: base(w[0]), Flags: kinds[w[1]], NarSize: 1 << 20}
		for i, mode := 2, ""; i < len(w); i++ {
			switch word := w[i]; {
			case slices.Contains([]string{"->", "by", "=>", "from", "licence"}, word):
				mode = word
			case word == "signed":
				p.SignedBy = []string{testKeys[0]}
			case mode == "->":
				p.Refs = append(p.Refs, base(word))
			case mode == "by":
				p.Deriver = base(word)
			case mode == "=>":
				p.Outputs = append(p.Outputs, base(word))
			case mode == "from":
				p.Origin = &graph.Origin{From: []string{word}, Unfree: graph.No}
			default:
				t.Fatalf("%q in %q", word, line)
			}
		}
		b.Add(p)
	}
	for name, to := range roots {
		bases := []string{}
		for _, n := range to {
			bases = append(bases, base(n))
		}
		b.Root(name, bases...)
	}
	g, err := b.Graph()
	if err != nil {
		t.Fatal(err)
	}
	return g
}

func find(t testing.TB, g *graph.Graph, name string) ID {
	t.Helper()
	id := graph.NewNames(g).Find([]byte(base(name)))
	if id == graph.NoID {
		t.Fatalf("no %s", name)
	}
	return id
}

func parsed(t testing.TB, lines string) *Policy {
	t.Helper()
	return mustParse(t, Source{"policy", []byte(benchKeys() + lines), true})
}

// A private source flows through ten builds into something that refers to nothing of
// it any more.
func TestBuiltFromThroughTenLevels(t *testing.T) {
	var b strings.Builder
	b.WriteString("payroll-acme-src source\nglibc out signed by glibc.drv\nglibc.drv drv => glibc\n")
	from := "payroll-acme-src"
	for i := range 10 {
		fmt.Fprintf(&b, "l%d.drv drv -> %s glibc.drv => l%d\nl%d out signed -> glibc by l%d.drv\n", i, from, i, i, i)
		from = fmt.Sprintf("l%d.drv", i)
	}
	b.WriteString("user out signed -> l9 by user.drv\nuser.drv drv -> glibc.drv l9.drv => user\nother out signed -> glibc by other.drv\nother.drv drv -> glibc.drv => other\n")
	g := store(t, b.String(), nil)
	p := parsed(t, "system signed-by one-1\npersonal built-from (name \"*-acme-*\")\n")
	v := mustDecide(t, g, p)
	for _, c := range []struct {
		name   string
		system bool
	}{{"glibc", true}, {"other", true}, {"l0", false}, {"l9", false}, {"user", false}} {
		if v.System.Has(find(t, g, c.name)) != c.system {
			t.Errorf("%s: system is %v", c.name, !c.system)
		}
	}
	e := v.Why(find(t, g, "l9"))
	if e.Reason != Vetoed || len(e.Lines) != 2 || e.Lines[0].Sign != '-' || e.Lines[1].Sign != '+' {
		t.Fatalf("%+v", e)
	}
	chain := e.Lines[0].Facts[0].Chain
	var said []string
	for _, s := range chain {
		said = append(said, s.Via+" "+s.Path[len("/nix/store/")+33:])
	}
	want := " l9, built by l9.drv, uses l8.drv, refers to l7.drv, refers to l6.drv, refers to l5.drv, refers to l4.drv, refers to l3.drv, refers to l2.drv, refers to l1.drv, refers to l0.drv, refers to payroll-acme-src"
	if got := strings.Join(said, ", "); got != want {
		t.Errorf("chain\n%s, not\n%s", got, want)
	}
	// If the derivations of the first levels are gone, what they made is not known to
	// be clean.
	b.Reset()
	b.WriteString("l8 out signed\nl8.drv drv => l8\nl9.drv drv -> l8.drv gone-in => l9\nl9 out signed by l9.drv\ngone-in out signed\nsub out signed\n")
	g = store(t, b.String(), nil)
	v = mustDecide(t, g, p)
	for _, c := range []struct {
		name   string
		reason Reason
	}{{"sub", VetoUnknown}, {"gone-in", VetoUnknown}, {"l9", VetoUnknown}, {"l8", Granted}} {
		if r, _ := v.Reason(find(t, g, c.name)); r != c.reason {
			t.Errorf("%s: %s, not %s", c.name, r, c.reason)
		}
	}
}

// A million references in a row, and as many builds, are no depth that costs a stack.
func TestLongChains(t *testing.T) {
	const n = 200_000
	g := &graph.Graph{StoreDir: "/nix/store", BaseOff: []uint32{0}, RefOff: []uint32{0}, OutOff: []uint32{0}, NarSize: make([]int64, n),
		Flags: make([]graph.Flags, n), Deriver: make([]ID, n)}
	for id := range ID(n) {
		name := "out"
		g.Flags[id], g.Deriver[id] = graph.Output, graph.NoID
		if id%2 == 1 {
			name, g.Flags[id] = "x.drv", graph.Derivation
			g.Outs = append(g.Outs, id-1)
			if id+2 < n {
				g.Refs = append(g.Refs, id+2)
			}
		} else {
			g.Deriver[id] = id + 1
			if id+2 < n {
				g.Refs = append(g.Refs, id+2)
			}
		}
		g.Base = append(g.Base, fmt.Sprintf("%032d-%s", id, name)...)
		g.BaseOff = append(g.BaseOff, uint32(len(g.Base)))
		g.RefOff = append(g.RefOff, uint32(len(g.Refs)))
		g.OutOff = append(g.OutOff, uint32(len(g.Outs)))
	}
	last := fmt.Sprintf("/nix/store/%032d-out", n-2)
	p := parsed(t, "system not closure-of "+last+"\npersonal built-from (closure-of "+last+")\n")
	v := mustDecide(t, g, p)
	if r, _ := v.Reason(0); r != Vetoed {
		t.Errorf("the first is %s", r)
	}
	p = parsed(t, "system not closure-of "+last)
	v = mustDecide(t, g, p)
	e := v.Why(0)
	if e.Reason != Reference || len(e.Chain) != n/2 || e.Cause.Reason != NotGranted {
		t.Errorf("the first is %s, %d steps", e.Reason, len(e.Chain))
	}
	if c := v.Causes().Of(0); c.Next != 2 || c.Cause != n-2 {
		t.Errorf("causes %+v", c)
	}
	// The same as one cycle.
	g.Refs[len(g.Refs)-1] = 0
	g.Refs = append(g.Refs, 0)
	g.RefOff[n]++
	v = mustDecide(t, g, parsed(t, "system depends-on (name x.drv) or kind output"))
	if !v.System.Has(0) || !v.System.Has(n-1) {
		t.Error("a cycle of system paths is personal")
	}
}

const office = `
glibc out signed
payroll here -> glibc from git+ssh://git@acme.example/payroll
app out signed -> payroll glibc
tool out signed -> app glibc
unsigned out -> glibc
loop-a out signed -> loop-b
loop-b out signed -> loop-a
bad broken signed -> glibc
twice differs signed
on-bad out signed -> bad
`

func TestWhy(t *testing.T) {
	g := store(t, office, map[string][]string{"/run/current-system": {"tool"}})
	p := parsed(t, `system signed-by one-1
personal built-here
personal from "git+ssh://*acme.example/*" when known
personal larger-than 5M and from "x"
`)
	v := mustDecide(t, g, p)
	show := func(name string) string {
		var b strings.Builder
		for e := v.Why(find(t, g, name)); e != nil; e = e.Cause {
			fmt.Fprintf(&b, "%s %s", g.Name(e.ID), e.Reason)
			for _, l := range e.Lines {
				fmt.Fprintf(&b, "; %c %s (%s)", l.Sign, l.Text, l.Pos.Short())
			}
			for _, l := range e.Silenced {
				fmt.Fprintf(&b, "; silent %s: %s", l.Text, l.Facts[0].Note)
			}
			for _, s := range e.Chain {
				fmt.Fprintf(&b, "; %s %s", s.Via, g.Name(s.ID))
			}
			b.WriteString("\n")
		}
		return b.String()
	}
	for _, c := range []struct{ name, want string }{
		{"glibc", "glibc granted; + system signed-by one-1 (policy:3); silent personal from \"git+ssh://*acme.example/*\" when known: it is not recorded\n"},
		{"payroll", "payroll vetoed; - personal built-here (policy:4); - personal from \"git+ssh://*acme.example/*\" when known (policy:5)\n"},
		{"tool", "tool reference; + system signed-by one-1 (policy:3); silent personal from \"git+ssh://*acme.example/*\" when known: it is not recorded;  tool; refers to app; refers to payroll\n" +
			"payroll vetoed; - personal built-here (policy:4); - personal from \"git+ssh://*acme.example/*\" when known (policy:5)\n"},
		{"unsigned", "unsigned not-granted; silent personal from \"git+ssh://*acme.example/*\" when known: it is not recorded\n"},
		{"loop-a", "loop-a granted; + system signed-by one-1 (policy:3); silent personal from \"git+ssh://*acme.example/*\" when known: it is not recorded\n"},
		{"twice", "twice differing; ? system signed-by one-1 (policy:3); ? personal built-here (policy:4); ? personal larger-than 5M and from \"x\" (policy:6); silent personal from \"git+ssh://*acme.example/*\" when known: nothing of this path is believed\n"},
	} {
		if got := show(c.name); got != c.want {
			t.Errorf("got\n%swant\n%s", got, c.want)
		}
	}
}

func TestCheck(t *testing.T) {
	lines := office + `
wide out -> glibc
a1 out signed -> wide from a
a2 out signed -> a1
a3 out signed -> a2 a1
maybe out signed from b
other out signed from c -> maybe
`
	g := store(t, lines, map[string][]string{"/run/current-system": {"tool"}})
	p := parsed(t, `system signed-by one-1
personal built-here
personal name "nothing-*"
personal larger-than 5M and from "x"
personal from "b" when known
personal unfree when known
require system closure-of /run/current-system
require system closure-of /gone
require system name glibc
`)
	r := mustDecide(t, g, p).Check(CheckOptions{MinReach: 2})
	names := func(ids []ID) (out []string) {
		for _, id := range ids {
			out = append(out, string(g.Name(id)))
		}
		return out
	}
	if len(r.Broken) != 2 || r.Broken[0].Rule != 6 || fmt.Sprint(names(r.Broken[0].Paths)) != "[payroll app tool]" || r.Broken[0].Holds() ||
		r.Broken[1].Rule != 7 || fmt.Sprint(r.Broken[1].Unresolved) != "[/gone]" || r.Broken[1].Holds() || r.Broken[1].Unknown == 0 {
		t.Errorf("broken %+v", r.Broken)
	}
	if fmt.Sprint(r.Unresolved) != "[/gone]" {
		t.Errorf("unresolved %v", r.Unresolved)
	}
	if fmt.Sprint(r.Idle) != "[2 3 5 7]" {
		t.Errorf("idle %v", r.Idle)
	}
	var reach []string
	for _, x := range r.Reach {
		reach = append(reach, fmt.Sprintf("%s pulls %d", g.Name(x.ID), x.Pulls.Paths))
	}
	if got := strings.Join(reach, ", "); got != "wide pulls 3, payroll pulls 2" {
		t.Errorf("reach: %s", got)
	}
	// glibc's, loop's and the like origins are not recorded.
	if len(r.Hanging) != 2 || r.Hanging[0].Rule != 4 || r.Hanging[0].Direct != 3 || r.Hanging[0].Moves.Paths != 3 {
		t.Errorf("hanging %+v", r.Hanging)
	}
	if r.OnlyFor.Paths != 0 {
		t.Errorf("only for an unknown: %+v", r.OnlyFor)
	}
	// A veto that cannot tell is what maybe and other hang on.
	p = parsed(t, "system signed-by one-1\npersonal from x or closure-of /gone and name maybe")
	r = mustDecide(t, g, p).Check(CheckOptions{})
	if r.OnlyFor.Paths == 0 {
		t.Error("nothing is personal only for an unknown")
	}
}

// Reach is exact where it counts: against a walk for each path.
func TestReachAgainstWalks(t *testing.T) {
	for seed := range uint64(300) {
		m := newMaker(seed)
		g := m.graph()
		v := mustDecide(t, g, mustParse(t, text(m.lines(true))))
		got := map[ID]int{}
		for _, r := range v.Check(CheckOptions{MinReach: 1, MaxReach: 100}).Reach {
			got[r.ID] = r.Pulls.Paths
		}
		for id := range ID(g.Len()) {
			if v.System.Has(id) || v.reasons[id] == Reference {
				continue
			}
			want := 0
			for from := range ID(g.Len()) {
				if v.reasons[from] == Reference && leads(v, from, id, map[ID]bool{}) {
					want++
				}
			}
			if got[id] != want {
				t.Fatalf("seed %d: path %d pulls %d, not %d", seed, id, got[id], want)
			}
		}
	}
}

func leads(v *Verdicts, from, to ID, seen map[ID]bool) bool {
	for _, r := range v.ix.g.References(from) {
		if r == to {
			return true
		}
		if !seen[r] && v.reasons[r] == Reference {
			seen[r] = true
			if leads(v, r, to, seen) {
				return true
			}
		}
	}
	return false
}

func TestDiff(t *testing.T) {
	g := store(t, office, nil)
	ix, err := NewIndex(g)
	if err != nil {
		t.Fatal(err)
	}
	before := ix.Decide(parsed(t, "system signed-by one-1 or name payroll"))
	after := ix.Decide(parsed(t, "system signed-by one-1 or name \"unsigned\""))
	c := Diff(before, after)
	show := func(c *Changes, names *graph.Graph) string {
		var out []string
		for _, m := range c.Moves {
			s := string(names.Name(m.After)) + " to personal"
			if m.ToSystem {
				s = string(names.Name(m.After)) + " to system"
			}
			if m.Pull != nil {
				s += fmt.Sprintf(" for %s by %s", names.Name(m.Pull.Cause), names.Name(m.Pull.Next))
			}
			out = append(out, s)
		}
		return strings.Join(out, ", ")
	}
	want := "payroll to personal, app to personal for payroll by payroll, tool to personal for payroll by app, unsigned to system"
	if got := show(c, g); got != want {
		t.Errorf("got %s", got)
	}
	if c.ToSystem != (Total{1, 1 << 20}) || c.ToPersonal != (Total{3, 3 << 20}) || c.NewSystem.Paths+c.GonePersonal.Paths != 0 {
		t.Errorf("%+v", c)
	}
	if c := Diff(after, after); len(c.Moves) != 0 {
		t.Errorf("%+v", c)
	}
	// Another moment: ids differ, some paths are new, some gone.
	h := store(t, "new out\nunsigned out -> glibc\nglibc out signed\napp out signed", nil)
	later := mustDecide(t, h, after.Policy())
	c = Diff(after, later)
	if got := show(c, h); got != "app to system" {
		t.Errorf("got %s", got)
	}
	if c.NewPersonal.Paths != 1 || c.NewSystem.Paths != 0 || c.GoneSystem.Paths != 2 || c.GonePersonal.Paths != 5 {
		t.Errorf("%+v", c)
	}
}

func TestQuery(t *testing.T) {
	g := store(t, office, nil)
	p := parsed(t, "let mine = built-here or name app\nlet unused = unfree\nsystem signed-by one-1")
	ix, err := NewIndex(g)
	if err != nil {
		t.Fatal(err)
	}
	q, err := p.Query(Source{Name: "where", Text: []byte("\n mine and not signed-by two-1\n")})
	if err != nil {
		t.Fatal(err)
	}
	yes, unknown := ix.Select(q)
	if yes.Count() != 2 || unknown.Count() != 2 || q.Text() != "mine and not signed-by two-1" {
		t.Errorf("%d yes, %d unknown, %s", yes.Count(), unknown.Count(), q.Text())
	}
	for _, c := range []struct{ text, want string }{
		{"", "where:1:1: a condition is wanted here, not the end of the file"},
		{"unfre", `where:1:1: unknown condition "unfre"; did you mean "unfree"?`},
		{"unfree\nunfree", `where:2:1: "and", "or" or the end is wanted here, not "unfree"`},
		{"signed-by x-1", `where:1:11: key "x-1" is not declared; add a line: key x-1:<base64>`},
		{"system unfree", `where:1:1: a condition is wanted here, not "system"`},
		{"name \xff", "where:1:6: a byte that is not UTF-8 (0xff)"},
	} {
		if _, err := p.Query(Source{Name: "where", Text: []byte(c.text)}); err == nil || err.Error() != c.want {
			t.Errorf("%q: %v", c.text, err)
		}
	}
}

func TestExpectations(t *testing.T) {
	g := store(t, office, nil)
	p := parsed(t, "let ours = built-here\nsystem signed-by one-1\npersonal ours")
	v := mustDecide(t, g, p)
	x, err := p.ParseExpectations(Source{"policy.test", []byte(`# what should be so
system name "glibc" because signed-by
system /nix/store/*-glibc because granted
personal ours because ours
personal name app because reference
personal name tool because built-here

system name "loop-*" and not built-here
personal name glibc
personal name "nobody-*"
personal name tool because signed-by
system signed-by one-1
`), false})
	if err != nil {
		t.Fatal(err)
	}
	var got []string
	for _, f := range x.Evaluate(v) {
		got = append(got, fmt.Sprintf("%s: %s: %s", f.Pos, f.Text, f.Msg))
	}
	want := []string{
		`policy.test:9:1: personal name "glibc": 1 of 1 paths are system`,
		`policy.test:10:1: personal name "nobody-*": it is about no path`,
		`policy.test:11:1: personal name "tool" because signed-by: 1 of 1 paths are personal, but not because of signed-by`,
		`policy.test:12:1: system signed-by one-1: 3 of 6 paths are personal`,
	}
	if !slices.Equal(got, want) {
		t.Errorf("got\n%s", strings.Join(got, "\n"))
	}
	again, err := p.ParseExpectations(Source{"again", []byte(x.String()), false})
	if err != nil || again.String() != x.String() || again.Len() != 10 {
		t.Errorf("%v\n%s", err, x)
	}
	for _, c := range []struct{ text, want string }{
		{"sytem unfree", `x:1:1: an expectation begins with system or personal; did you mean "system"?`},
		{"let a = unfree", `x:1:1: an expectation begins with system or personal`},
		{"system unfre\npersonal", "x:1:8: unknown condition \"unfre\"; did you mean \"unfree\"?\nx:2:9: a condition is wanted here, not the end of the file"},
		{"system unfree when known", `x:1:15: "because" or the end of the line is wanted here, not "when"`},
		{"system unfree because", `x:1:22: a reason (granted, not-granted, grant-unknown, vetoed, veto-unknown, unreadable, differing, reference), a term or a let of the policy is wanted after "because"`},
		{"system unfree because vetod", `x:1:23: a reason (granted, not-granted, grant-unknown, vetoed, veto-unknown, unreadable, differing, reference), a term or a let of the policy is wanted after "because"; did you mean "vetoed"?`},
		{"system /run/x", `x:1:8: a store path is wanted: /nix/store/HASH-NAME`},
		{"system /nix/store/a/b", `x:1:8: a store path is wanted, and nothing below it: /nix/store/HASH-NAME`},
		{"system /nix/store/[", `x:1:19: "[" without "]"; write \[ for the character itself`},
		{"system name \"\x00\"", `x:1:14: a control character (U+0000)`},
		{strings.Repeat("system unfree\n", MaxLines+1), "x:4097:1: more than 4096 expectations"},
		{strings.Repeat("#", MaxSource+1), "x:1:1: a policy file of 1048577 bytes; 1048576 are the most"},
	} {
		_, err := p.ParseExpectations(Source{"x", []byte(c.text), false})
		if err == nil || err.Error() != c.want {
			t.Errorf("%.40q: %v", c.text, err)
			continue
		}
		placed(t, c.text, err, Source{"x", []byte(c.text), false})
	}
}

// The same key name with another value reads none of the old one's signatures.
func TestKeysAreTheirValues(t *testing.T) {
	g := store(t, "a out signed", nil)
	other := "one-1:" + strings.Repeat("D", 42) + "A="
	v := mustDecide(t, g, mustParse(t, Source{"policy", []byte("key " + other + "\nsystem signed-by one-1"), true}))
	if r, _ := v.Reason(0); r != GrantUnknown {
		t.Error(r)
	}
	v = mustDecide(t, g, mustParse(t, Source{"policy", []byte("key " + other + "\nsystem unsigned"), true}))
	if r, _ := v.Reason(0); r != GrantUnknown {
		t.Error(r)
	}
}

func TestDecideRefusesABadGraph(t *testing.T) {
	g := store(t, office, nil)
	g.Refs[0] = 1 << 20
	if _, err := Decide(g, parsed(t, "system unsigned")); err == nil {
		t.Error("taken")
	}
}

// Many columns: the cache is emptied, and the answers stay.
func TestManyPolicies(t *testing.T) {
	g := bigGraph(3000)
	ix, err := NewIndex(g)
	if err != nil {
		t.Fatal(err)
	}
	var want int
	for i := range 3 * maxCached {
		p := parsed(t, fmt.Sprintf("system name \"*-lib-*\" and not name \"%d-*\" and not depends-on (name \"x%d\")", i, i))
		n := ix.Decide(p).Stats[0].Yes
		if i == 0 {
			want = n
		}
		if n != want || n == 0 {
			t.Fatalf("policy %d: %d, not %d", i, n, want)
		}
	}
	if len(ix.cache) > 2*maxCached {
		t.Errorf("%d columns are kept", len(ix.cache))
	}
}

// Blocks and cycles over more than a few words: a big graph against the reference's
// fixpoint for rules that look at one path only.
func TestBigAgainstFixpoint(t *testing.T) {
	g := bigGraph(20_000)
	p := parsed(t, benchPolicy+"system name \"*-python3-*\" or name \"perl-*\"\npersonal name \"*x*\" or larger-than 1000K when known")
	v := mustDecide(t, g, p)
	want := (&reference{g, p}).decide(p.ruleStatements())
	for id := range ID(g.Len()) {
		if v.System.Has(id) != want[id] {
			t.Fatalf("path %d: %v", id, v.System.Has(id))
		}
	}
	if n := v.System.Count(); n < 100 || n > 19_900 {
		t.Errorf("%d system paths show nothing", n)
	}
}

// What docs/POLICY.md shows can be said, as it stands there.
func TestDocumentation(t *testing.T) {
	doc, err := os.ReadFile("../docs/POLICY.md")
	if err != nil {
		t.Fatal(err)
	}
	policy, expect, _ := strings.Cut(string(doc), "\n## Expectations\n")
	blocks := func(text string) string {
		return regexp.MustCompile(`(?m)^ {0,3}\S.*$`).ReplaceAllString(text, "")
	}
	p := mustParse(t, Source{"docs/POLICY.md", []byte(blocks(policy)), true})
	if len(p.Rules) < 8 {
		t.Errorf("only %d rules found; has its form changed?", len(p.Rules))
	}
	x, err := p.ParseExpectations(Source{"docs/POLICY.md", []byte(blocks(expect)), false})
	if err != nil || x.Len() < 3 {
		t.Errorf("%v", err)
	}
	// The first column of the table of terms.
	terms := regexp.MustCompile("(?m)^\\| `([^`]+)` \\| ").FindAllStringSubmatch(policy[strings.Index(policy, "\n## Terms"):], -1)
	if len(terms) < 14 {
		t.Errorf("only %d terms found", len(terms))
	}
	for _, m := range terms {
		if _, err := p.Query(Source{"docs/POLICY.md", []byte(m[1]), false}); err != nil {
			t.Error(err)
		}
	}
	for _, bare := range regexp.MustCompile("`((?:personal|system) [a-z-]+ [^`]*\"[^`]*|personal built-here)`").FindAllStringSubmatch(policy, -1) {
		if _, err := Parse(Source{"docs/POLICY.md", []byte(bare[1]), true}); err != nil {
			t.Error(err)
		}
	}
}

// No paths at all, and a path whose number ends a word.
func TestEdgesOfTheGraph(t *testing.T) {
	for _, n := range []int{0, 1, 63, 64, 65, 128, 4095, 4096, 4097} {
		b := graph.NewBuilder("/nix/store")
		for i := range n {
			b.Add(graph.Path{Base: base(fmt.Sprintf("x%d", i)), Flags: graph.Output})
		}
		g, err := b.Graph()
		if err != nil {
			t.Fatal(err)
		}
		v := mustDecide(t, g, parsed(t, "system not built-from (unfree) or not name \"y*\"\npersonal not name \"x*\"\nrequire system not unsigned"))
		if v.System.Count() != n || v.Stats[0].Yes != n {
			t.Errorf("%d of %d are system, %+v", v.System.Count(), n, v.Stats)
		}
		v.Check(CheckOptions{})
		Diff(v, v)
	}
}
