package policy

import (
	"maps"
	"slices"
	"strings"
	"testing"

	"overkeep/policy/graph"
)

// cases is how many random graphs with a random policy each are tried, beside the
// changed graphs and policies that the properties compare them with.
const cases = 60_000

func mustParse(t testing.TB, sources ...Source) *Policy {
	t.Helper()
	p, err := Parse(sources...)
	if err != nil {
		t.Fatalf("%v\n%s", err, sources[0].Text)
	}
	return p
}

func mustDecide(t testing.TB, g *graph.Graph, p *Policy) *Verdicts {
	t.Helper()
	v, err := Decide(g, p)
	if err != nil {
		t.Fatal(err)
	}
	return v
}

// describeCase prints a case that went wrong.
func describeCase(g *graph.Graph, p *Policy) string {
	var b strings.Builder
	b.WriteString(p.String())
	for id := range ID(g.Len()) {
		b.WriteString(strings.TrimLeft(string(g.BaseName(id)), "0"))
		b.WriteString(" flags=" + strings.Join(flagNames(g.Flags[id]), "|"))
		for _, r := range g.References(id) {
			b.WriteString(" ->" + string(rune('0'+r)))
		}
		for _, r := range g.Outputs(id) {
			b.WriteString(" =>" + string(rune('0'+r)))
		}
		if d := g.Deriver[id]; d >= 0 {
			b.WriteString(" by " + string(rune('0'+d)))
		}
		b.WriteString("\n")
	}
	return b.String()
}

func flagNames(f graph.Flags) (out []string) {
	for i, n := range []string{"source", "drv", "output", "fixed", "ultimate", "lower", "upper", "differs", "broken"} {
		if f&(1<<i) != 0 {
			out = append(out, n)
		}
	}
	return out
}

// TestProperties is the promises of the package over random graphs with cycles,
// random policies and facts that are partly unknown.
func TestProperties(t *testing.T) {
	system, checked, whys := 0, 0, 0
	defer func(n int) { sweeps = n }(sweeps)
	var lines []string
	var p *Policy
	var whenKnown bool
	for seed := range uint64(cases) {
		m := newMaker(seed)
		g := m.graph()
		sweeps = 1 + int(seed%3)
		if seed%3 == 0 { // each policy is tried on three graphs, for three properties
			whenKnown = m.chance(30)
			lines = m.lines(whenKnown)
			p = mustParse(t, text(lines))
		}
		v := mustDecide(t, g, p)
		checked++
		system += v.System.Count()
		fail := func(what string, of ...any) {
			t.Fatalf("seed %d: %s %v\n%s", seed, what, of, describeCase(g, p))
		}

		// Decide is what the slow reading says.
		ref := &reference{g, p}
		want := ref.decide(p.ruleStatements())
		for id := range ID(g.Len()) {
			if v.System.Has(id) != want[id] {
				fail("Decide differs from the reference at", id, v.System.Has(id))
			}
		}

		// 1. No system path refers to a personal one.
		for id := range ID(g.Len()) {
			for _, r := range g.References(id) {
				if v.System.Has(id) && !v.System.Has(r) {
					fail("a system path refers to a personal one", id, r)
				}
			}
		}

		switch seed % 3 {
		case 0:
			// 2. A system path stays so however the unknown facts turn out.
			if whenKnown {
				break
			}
			checked++
			c := m.complete(g)
			w := mustDecide(t, c, p)
			for id := range ID(g.Len()) {
				if v.System.Has(id) && !w.System.Has(id) {
					fail("system on partial facts, personal on all", id, describeCase(c, p))
				}
			}
		case 1:
			// 3. Another personal line never makes a path system, wherever it stands.
			checked++
			more := Source{"drop-in", []byte(m.personal(true, nil)), m.chance(50)}
			w := mustDecide(t, g, mustParse(t, text(lines), more))
			for id := range ID(g.Len()) {
				if w.System.Has(id) && !v.System.Has(id) {
					fail("made system by a personal line", id, string(more.Text))
				}
			}
		case 2:
			// 4. The order of lines and files does not matter, nor do the reasons change.
			checked++
			shuffled := slices.Clone(lines)
			m.Shuffle(len(shuffled), func(i, j int) { shuffled[i], shuffled[j] = shuffled[j], shuffled[i] })
			cut := m.IntN(len(shuffled) + 1)
			w := mustDecide(t, g, mustParse(t, text(shuffled[cut:]), text(shuffled[:cut])))
			for id := range ID(g.Len()) {
				a, _ := v.Reason(id)
				b, _ := w.Reason(id)
				if v.System.Has(id) != w.System.Has(id) || a != b {
					fail("the order matters", id, a, b)
				}
			}
		}
		if seed%8 == 0 {
			for id := range ID(g.Len()) {
				whys++
				checkWhy(t, v, ref, id, fail)
			}
		}
	}
	t.Logf("%d cases, %d system placements, %d explanations", checked, system, whys)
	if system < cases/10 {
		t.Errorf("only %d system placements: the cases test too little", system)
	}
}

// checkWhy holds an explanation against the reference, and against what happens when
// the lines it names are gone.
func checkWhy(t *testing.T, v *Verdicts, ref *reference, id ID, fail func(string, ...any)) {
	e := v.Why(id)
	rules := v.policy.ruleStatements()
	if e.System != v.System.Has(id) || e.System != (e.Reason == Granted) {
		fail("Why and Decide differ", id)
	}
	// Every line that is named spoke, as it is said; every line that spoke is named.
	said := map[int]byte{}
	for _, l := range e.Lines {
		said[l.Rule] = l.Sign
		if len(l.Facts) == 0 {
			fail("a line without facts", id, l.Text)
		}
	}
	for i, s := range rules {
		want := byte(0)
		switch value := ref.eval(s.cond, id); {
		case s.verb == "require" || value == graph.No || value == graph.Unknown && s.whenKnown:
		case value == graph.Unknown:
			want = '?'
		case s.verb == "system":
			want = '+'
		default:
			want = '-'
		}
		if said[i] != want {
			fail("Why says of a line", id, s.text(), string(rune(said[i])), "and not", string(rune(want)))
		}
	}
	// The line that decided comes first, and decides: without it and the others of its
	// sign, the reason is another.
	if e.Rule != NoRule {
		if len(e.Lines) == 0 || e.Lines[0].Rule != e.Rule {
			fail("the line that decided is not first", id)
		}
		sign := e.Lines[0].Sign
		gone := slices.Clone(rules)
		for i := len(gone) - 1; i >= 0; i-- {
			if said[i] == sign || sign == '-' && gone[i].verb == "personal" && said[i] == '?' {
				gone = slices.Delete(gone, i, i+1)
			}
		}
		if ownReason(ref, gone, id) == ownReason(ref, rules, id) {
			fail("the line that decided did not", id, e.Reason, string(rune(sign)))
		}
	}
	// Lines that are not named decide nothing: without them it is the same.
	var named []*statement
	for i, s := range rules {
		if said[i] != 0 {
			named = append(named, s)
		}
	}
	if ownReason(ref, named, id) != ownReason(ref, rules, id) {
		fail("a line decided that Why does not name", id)
	}
	checkChain(v, e, fail)
	for _, l := range append(e.Lines, e.Silenced...) {
		for _, f := range l.Facts {
			shown := f.Note != "" && f.Value == graph.Unknown
			switch {
			case strings.HasPrefix(f.Term, "depends-on"):
				shown = shown || len(f.Chain) > 0 && f.Chain[0].ID == id
			case strings.HasPrefix(f.Term, "built-from"):
				shown = shown || len(f.Chain) > 1 && f.Chain[0].ID == id
			case strings.HasPrefix(f.Term, "closure-of"):
				shown = shown || len(f.Chain) > 0 && f.Chain[len(f.Chain)-1].ID == id
			default:
				shown = shown || f.Value != graph.Unknown
			}
			if !shown && f.Value != graph.No {
				fail("a fact that nothing shows", id, f.Term, f.Value, f.Chain)
			}
			for i, s := range f.Chain {
				if i > 0 && s.Via == "refers to" && !slices.Contains(ref.g.References(f.Chain[i-1].ID), s.ID) {
					fail("a chain without a reference", id, f.Term, f.Chain)
				}
			}
		}
	}
}

// checkChain: it begins at the path, goes along references, ends at a path with a
// reason of its own, and there is no shorter one.
func checkChain(v *Verdicts, e *Explanation, fail func(string, ...any)) {
	if e.Reason != Reference {
		if e.Chain != nil || e.Cause != nil {
			fail("a chain that nothing needs", e.ID)
		}
		return
	}
	g := v.ix.g
	last := e.Chain[len(e.Chain)-1]
	if e.Chain[0].ID != e.ID || e.Cause.ID != last.ID || e.Cause.Reason == Reference || e.Cause.System {
		fail("a chain from or to somewhere else", e.ID)
	}
	for i := 1; i < len(e.Chain); i++ {
		if !slices.Contains(g.References(e.Chain[i-1].ID), e.Chain[i].ID) {
			fail("a chain that is none", e.ID)
		}
	}
	within := map[ID]bool{e.ID: true}
	for range len(e.Chain) - 2 {
		for id := range maps.Clone(within) {
			for _, r := range g.References(id) {
				if !v.System.Has(r) {
					within[r] = true
				}
			}
		}
	}
	for id := range within {
		if v.reasons[id] != Reference {
			fail("a chain that is not the shortest", e.ID, e.Chain)
		}
	}
	c := v.Causes().Of(e.ID)
	if c.Next == graph.NoID || v.reasons[c.Cause] == Reference || v.System.Has(c.Cause) {
		fail("Causes knows no cause", e.ID, c)
	}
}

// ownReason is the reason that lies in a path itself, read off the reference.
func ownReason(r *reference, rules []*statement, id ID) Reason {
	switch {
	case r.g.Flags[id]&graph.Broken != 0:
		return Unreadable
	case r.g.Flags[id]&graph.Differs != 0:
		return Differing
	}
	best := NotGranted
	granted, hoped, vetoed, doubted := false, false, false, false
	for _, s := range rules {
		v := r.eval(s.cond, id)
		switch {
		case s.verb == "system":
			granted, hoped = granted || v == graph.Yes, hoped || v == graph.Unknown
		case s.verb == "personal":
			vetoed, doubted = vetoed || v == graph.Yes, doubted || v == graph.Unknown && !s.whenKnown
		}
	}
	switch {
	case vetoed:
		best = Vetoed
	case doubted:
		best = VetoUnknown
	case granted:
		best = Granted
	case hoped:
		best = GrantUnknown
	}
	return best
}
