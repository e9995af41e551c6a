package policies

import (
	"fmt"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"

	"overkeep/overlay/verdict"
	"overkeep/policy"
	"overkeep/policy/graph"
	"overkeep/tests/storegen"
)

// docs are the policies of ten people.
const docs = "../../docs/policies"

// person is one of them: what stands in docs/policies.
type person struct {
	name    string
	sources []policy.Source // by the paths of their files below docs
	tests   []policy.Source
}

// people reads docs/policies: NAME.policy, or NAME/policy with policy.d/ and keep/.
func people(t testing.TB) (out []person) {
	t.Helper()
	names := map[string]bool{}
	for _, pattern := range []string{"*.policy", "*/policy"} {
		files, err := filepath.Glob(filepath.Join(docs, pattern))
		if err != nil {
			t.Fatal(err)
		}
		for _, f := range files {
			rel, err := filepath.Rel(docs, f)
			if err != nil {
				t.Fatal(err)
			}
			name, _, _ := strings.Cut(rel, "/")
			names[strings.TrimSuffix(name, ".policy")] = true
		}
	}
	for name := range names {
		p := person{name: name}
		for _, pattern := range []string{name + ".policy", name + "/policy", name + "/policy.d/*.policy", name + "/keep/*.policy"} {
			files, err := filepath.Glob(filepath.Join(docs, pattern))
			if err != nil {
				t.Fatal(err)
			}
			for _, f := range files {
				p.sources = append(p.sources, read(t, f, filepath.Base(filepath.Dir(f)) != "keep"))
				p.tests = append(p.tests, read(t, strings.TrimSuffix(f, verdict.Suffix)+".test", false))
			}
		}
		out = append(out, p)
	}
	slices.SortFunc(out, func(a, b person) int { return strings.Compare(a.name, b.name) })
	return out
}

func read(t testing.TB, file string, root bool) policy.Source {
	t.Helper()
	b, err := os.ReadFile(file)
	if err != nil {
		t.Fatal(err)
	}
	rel, err := filepath.Rel(docs, file)
	if err != nil {
		t.Fatal(err)
	}
	return policy.Source{Name: rel, Text: b, Root: root}
}

func parse(t testing.TB, sources []policy.Source) *policy.Policy {
	t.Helper()
	p, err := policy.Parse(sources...)
	if err != nil {
		t.Fatal(detail(err))
	}
	return p
}

func detail(err error) string {
	if e, ok := err.(*policy.Errors); ok {
		return e.Detail()
	}
	return err.Error()
}

func world(t testing.TB, name string) *storegen.World {
	t.Helper()
	w, err := storegen.ParseWorld(worlds[name])
	if err != nil {
		t.Fatal(err)
	}
	return w
}

func decide(t testing.TB, w *storegen.World, p *policy.Policy) *policy.Verdicts {
	t.Helper()
	var keys []string
	for _, k := range p.Keys {
		keys = append(keys, k.String())
	}
	g, err := w.Graph(keys)
	if err != nil {
		t.Fatal(err)
	}
	v, err := policy.Decide(g, p)
	if err != nil {
		t.Fatal(err)
	}
	return v
}

// failures are the expectations of all files that do not hold. An error is one of
// words that are no longer there.
func failures(p *policy.Policy, v *policy.Verdicts, tests []policy.Source) (out []policy.Failure, n int, err error) {
	for _, s := range tests {
		x, err := p.ParseExpectations(s)
		if err != nil {
			return nil, 0, err
		}
		out, n = append(out, x.Evaluate(v)...), n+x.Len()
	}
	return out, n, nil
}

func names(g *graph.Graph, ids []graph.ID) (out []string) {
	for _, id := range ids {
		out = append(out, string(g.Name(id)))
	}
	return out
}

// Ten people; what they expect holds in their world, every line of their policies
// speaks of something, and what they require holds.
func TestPeople(t *testing.T) {
	all := people(t)
	if len(all) != 10 || len(worlds) != len(all) {
		t.Errorf("%d people and %d worlds", len(all), len(worlds))
	}
	for _, one := range all {
		t.Run(one.name, func(t *testing.T) {
			p := parse(t, one.sources)
			v := decide(t, world(t, one.name), p)
			g := v.Index().Graph()
			failed, n, err := failures(p, v, one.tests)
			if err != nil {
				t.Fatal(detail(err))
			}
			for _, f := range failed {
				t.Errorf("%s: %s: %s: %q", f.Pos, f.Text, f.Msg, names(g, f.Paths))
			}
			if n < len(p.Rules) {
				t.Errorf("%d expectations for %d rules", n, len(p.Rules))
			}
			r := v.Check(policy.CheckOptions{})
			for _, rule := range r.Idle {
				t.Errorf("%s: %s: it speaks of nothing", p.Rules[rule].Pos, p.Rules[rule].Text)
			}
			for _, b := range r.Broken {
				t.Errorf("%s: broken by %q, unknown for %d", p.Rules[b.Rule].Text, names(g, b.Paths), b.Unknown)
			}
			if t.Failed() {
				t.Log("\n" + table(v))
			}
		})
	}
}

func place(v *policy.Verdicts, id graph.ID) string {
	if v.System.Has(id) {
		return "system"
	}
	return "personal"
}

// table shows all verdicts.
func table(v *policy.Verdicts) string {
	var b strings.Builder
	g := v.Index().Graph()
	for id := range graph.ID(g.Len()) {
		reason, rule := v.Reason(id)
		line := ""
		if rule != policy.NoRule {
			line = v.Policy().Rules[rule].Text
		}
		fmt.Fprintf(&b, "%-28s %-8s %-13s %s\n", g.Name(id), place(v, id), reason, line)
	}
	return b.String()
}

// mutant is a policy with one thing changed.
type mutant struct {
	what    string
	sources []policy.Source
}

// mutants leave out one line each, one side of an "and" or "or", or one "when known",
// or let all be granted.
func mutants(p *policy.Policy) (out []mutant) {
	sources := p.Sources()
	with := func(i int, what string, lines []string) {
		m := mutant{what, slices.Clone(sources)}
		m.sources[i].Text = []byte(strings.Join(lines, "\n"))
		out = append(out, m)
	}
	for i, s := range sources {
		lines := strings.Split(strings.TrimSuffix(string(s.Text), "\n"), "\n")
		for k, line := range lines {
			with(i, "without "+line, slices.Delete(slices.Clone(lines), k, k+1))
			for _, side := range operands(line) {
				with(i, "with "+side, append(slices.Delete(slices.Clone(lines), k, k+1), side))
			}
			if strict, ok := strings.CutSuffix(line, " when known"); ok {
				with(i, "with "+strict, append(slices.Delete(slices.Clone(lines), k, k+1), strict))
			}
		}
	}
	with(0, "with all granted", []string{string(sources[0].Text), `system name "*"`})
	return out
}

// operands are a line with one side less of its outermost and or or.
func operands(line string) (out []string) {
	head, cond := "", line
	for _, verb := range []string{"system ", "personal "} {
		if rest, ok := strings.CutPrefix(line, verb); ok {
			head, cond = verb, rest
		}
	}
	if strings.HasPrefix(line, "let ") {
		i := strings.Index(line, " = ") + len(" = ")
		head, cond = line[:i], line[i:]
	}
	cond, known := strings.CutSuffix(cond, " when known")
	if head == "" {
		return nil
	}
	for _, word := range []string{" or ", " and "} {
		sides := outermost(cond, word)
		if len(sides) == 1 {
			continue
		}
		for i := range sides {
			s := head + strings.Join(slices.Delete(slices.Clone(sides), i, i+1), word)
			if known {
				s += " when known"
			}
			out = append(out, s)
		}
		return out
	}
	return nil
}

// outermost splits a condition in canonical form, not within parentheses or quotes.
func outermost(cond, word string) (out []string) {
	depth, from, quoted := 0, 0, false
	for i := range cond {
		switch cond[i] {
		case '"':
			quoted = !quoted
		case '(':
			depth++
		case ')':
			depth--
		}
		if depth == 0 && !quoted && i >= from && strings.HasPrefix(cond[i:], word) {
			out, from = append(out, cond[from:i]), i+len(word)
		}
	}
	return append(out, cond[from:])
}

// No line can be left out without something that a person expects, or requires, being
// lost; no expectation holds whatever the policy says.
func TestEveryLineCounts(t *testing.T) {
	for _, one := range people(t) {
		t.Run(one.name, func(t *testing.T) {
			p := parse(t, one.sources)
			w := world(t, one.name)
			failed := map[policy.Pos]bool{}
			broken := map[string]bool{}
			for _, m := range mutants(p) {
				q, err := policy.Parse(m.sources...)
				if err != nil {
					continue // a let or a key that is used
				}
				v := decide(t, w, q)
				lost, _, err := failures(q, v, one.tests)
				if err != nil {
					continue // a let or a key that the expectations speak of
				}
				for _, f := range lost {
					failed[f.Pos] = true
				}
				for _, b := range v.Check(policy.CheckOptions{}).Broken {
					broken[q.Rules[b.Rule].Text] = true
				}
				if len(lost) == 0 && !strings.HasPrefix(m.what, "without require ") {
					t.Errorf("%s: all that is expected holds", m.what)
				}
			}
			for _, r := range p.Rules {
				if r.Verb == policy.Require && !broken[r.Text] {
					t.Errorf("%s: nothing breaks it", r.Text)
				}
			}
			for _, s := range one.tests {
				for i, line := range strings.Split(string(s.Text), "\n") {
					if line == "" || line[0] == '#' {
						continue
					}
					if pos := (policy.Pos{Source: s.Name, Line: i + 1, Col: 1}); !failed[pos] {
						t.Errorf("%s: %s: it holds whatever is changed", pos, line)
					}
				}
			}
		})
	}
}
