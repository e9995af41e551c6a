package policy

import (
	"slices"

	"overkeep/policy/graph"
)

// Explanation is why one path is where it is.
type Explanation struct {
	ID     graph.ID
	Path   string
	System bool
	Reason Reason

	// Rule is the line that decided, as Verdicts.Reason has it.
	Rule int

	// Lines are all lines that spoke of the path, the one that decided first: system
	// lines that say yes (+) or could not tell (?), personal lines that say yes (-) or
	// could not tell (?).
	Lines []Line

	// Silenced are the personal lines that could not tell and do not count, for they
	// end in "when known".
	Silenced []Line

	// Chain is the shortest way along references to the path that decides, if that is
	// another; the path itself is its first step. Cause explains its last.
	Chain []Step
	Cause *Explanation
}

// Line is what a line of the policy says of a path.
type Line struct {
	Rule  int  // in Policy.Rules
	Sign  byte // '+', '-' or '?'
	Pos   Pos
	Text  string
	Facts []Fact
}

// Fact is a term that made a line say what it says.
type Fact struct {
	Term  string // as it stands in the policy
	Value graph.Tri
	Note  string // why it is unknown, or ""

	// Chain is a shortest way that shows it: for depends-on and built-from from the
	// path to one that decides, for closure-of from the target to the path.
	Chain []Step
}

// Step is one path of a chain.
type Step struct {
	ID   graph.ID
	Path string
	Via  string // how the step before leads here: "refers to", "built by", "uses", "has the output"; "" at the first
}

// maxFacts bounds what is told of one line.
const maxFacts = 32

// Why explains a path. It costs up to one walk over the graph for each term that
// looks beyond the path.
func (v *Verdicts) Why(id graph.ID) *Explanation {
	e := v.direct(id)
	if e.Reason != Reference {
		return e
	}
	parent := search(v.ix.g.Len(), []int32{id}, func(p int32, visit func(int32)) {
		for _, r := range v.ix.g.References(p) {
			if !v.System.Has(r) {
				visit(r)
			}
		}
	}, func(p int32) bool { return p != id && v.reasons[p] != Reference })
	for i, p := range parent {
		e.Chain = append(e.Chain, v.ix.step(p, map[bool]string{true: "refers to"}[i > 0]))
	}
	e.Cause = v.direct(parent[len(parent)-1])
	return e
}

func (ix *Index) step(id graph.ID, via string) Step { return Step{id, ix.g.Path(id), via} }

// direct explains a path without its references.
func (v *Verdicts) direct(id graph.ID) *Explanation {
	reason, rule := v.Reason(id)
	e := &Explanation{ID: id, Path: v.ix.g.Path(id), System: v.System.Has(id), Reason: reason, Rule: rule}

	v.ix.mu.Lock()
	defer v.ix.mu.Unlock()
	one := v.ix.evaluate(v.policy.prog, v.policy.conditions()).single(v.policy.conditions(), id)
	for i := range v.policy.Rules {
		r := &v.policy.Rules[i]
		value := one.value(r.cond)
		if r.Verb == Require || value == graph.No {
			continue
		}
		l := Line{Rule: i, Sign: '?', Pos: r.Pos, Text: r.Text, Facts: one.facts(r.cond)}
		switch {
		case value == graph.Yes && r.Verb == Grant:
			l.Sign = '+'
		case value == graph.Yes:
			l.Sign = '-'
		case r.WhenKnown:
			e.Silenced = append(e.Silenced, l)
			continue
		}
		if i == rule {
			e.Lines = slices.Insert(e.Lines, 0, l)
		} else {
			e.Lines = append(e.Lines, l)
		}
	}
	return e
}

// single is an evaluation for one path.
type single struct {
	*machine
	b  *block
	id graph.ID
}

func (ev *evaluation) single(tops []int32, id graph.ID) *single {
	m := ev.machine(tops)
	b := m.block(1)
	m.run(b, int(id)/64, int(id)/64+1)
	return &single{m, b, id}
}

func (s *single) value(n int32) graph.Tri {
	i, bit := s.slot[n], uint64(1)<<(uint(s.id)&63)
	switch {
	case s.b.yes[i][0]&bit != 0:
		return graph.Yes
	case s.b.may[i][0]&bit != 0:
		return graph.Unknown
	}
	return graph.No
}

// facts lists the terms that gave a condition its value.
func (s *single) facts(top int32) (out []Fact) {
	seen := map[int32]bool{}
	todo := []int32{top}
	for len(todo) > 0 && len(out) < maxFacts {
		n := todo[0]
		todo = todo[1:]
		if seen[n] {
			continue
		}
		seen[n] = true
		node, value := &s.prog.nodes[n], s.value(n)
		if node.op > opNot {
			out = append(out, s.fact(node, value))
			continue
		}
		all := node.op == opNot || node.op == opAnd && value == graph.Yes || node.op == opOr && value == graph.No
		for _, kid := range node.kids {
			if all || s.value(kid) == value {
				todo = append(todo, kid)
			}
		}
	}
	return out
}

func (s *single) fact(n *node, value graph.Tri) Fact {
	f := Fact{Term: n.text, Value: value}
	if s.ix.bad.Has(s.id) && value == graph.Unknown {
		f.Note = "nothing of this path is believed"
		return f
	}
	switch {
	case n.op == opClosure && value != graph.No:
		f.Chain, f.Note = s.ix.showClosure(n, s.id, value)
	case n.op == opDepends && value != graph.No:
		f.Chain = s.ix.showDepends(s.column(n.kids[0]), s.id, value)
	case n.op == opBuiltFrom && value != graph.No:
		f.Chain, f.Note = s.ix.showBuilt(s.column(n.kids[0]), s.id, value)
	case value != graph.Unknown:
	case n.op == opSigned || n.op == opUnsigned:
		f.Note = "not all of its signatures were checked"
	case n.op == opKind:
		f.Note = "the database does not tell its kind"
	case n.op == opLarger:
		f.Note = "its size is not recorded"
	case n.op == opLicence || n.op == opUnfree || n.op == opFrom:
		f.Note = "it is not recorded"
	}
	return f
}

// search walks breadth first from the starts to the first node that is found, and
// returns the way there, or nil.
func search(n int, starts []int32, next func(v int32, visit func(int32)), found func(int32) bool) []int32 {
	parent := make([]int32, n) // plus one; 0: not seen, its own number: a start
	queue := make([]int32, 0, len(starts))
	for _, s := range starts {
		if parent[s] == 0 {
			parent[s] = s + 1
			queue = append(queue, s)
		}
	}
	for i := 0; i < len(queue); i++ {
		v := queue[i]
		if found(v) {
			way := []int32{v}
			for parent[v] != v+1 {
				v = parent[v] - 1
				way = append(way, v)
			}
			slices.Reverse(way)
			return way
		}
		next(v, func(w int32) {
			if parent[w] == 0 {
				parent[w] = v + 1
				queue = append(queue, w)
			}
		})
	}
	return nil
}

// refer visits the references of a path that are believed.
func (ix *Index) refer(p int32, visit func(int32)) {
	if ix.bad.Has(p) {
		return
	}
	for _, r := range ix.g.References(p) {
		visit(r)
	}
}

func (ix *Index) steps(way []int32, via string) (out []Step) {
	for i, p := range way {
		if i == 0 {
			out = append(out, ix.step(p, ""))
		} else {
			out = append(out, ix.step(p, via))
		}
	}
	return out
}

func (ix *Index) showClosure(n *node, id graph.ID, value graph.Tri) ([]Step, string) {
	targets, known := ix.targets(n)
	if value == graph.Yes {
		return ix.steps(search(ix.g.Len(), targets, ix.refer, func(p int32) bool { return p == id }), "refers to"), ""
	}
	if !known {
		return nil, n.root + " could not be resolved"
	}
	way := search(ix.g.Len(), targets, ix.refer, func(p int32) bool { return ix.bad.Has(p) })
	return ix.steps(way, "refers to"), "nothing of the last path is believed: it may refer to any"
}

func (ix *Index) showDepends(cond *column, id graph.ID, value graph.Tri) []Step {
	way := search(ix.g.Len(), []int32{id}, ix.refer, func(p int32) bool {
		return cond.yes.Has(p) || value == graph.Unknown && (cond.may.Has(p) || ix.bad.Has(p))
	})
	return ix.steps(way, "refers to")
}

func (ix *Index) showBuilt(cond *column, id graph.ID, value graph.Tri) ([]Step, string) {
	f := ix.flow
	var starts []int32
	ix.sources(f, id, func(v int32) bool {
		starts = append(starts, v)
		return true
	})
	next := func(v int32, visit func(int32)) {
		for k := 0; ; k++ {
			w := ix.flows(f, v, k)
			if w < 0 {
				return
			}
			visit(w)
		}
	}
	decides := func(v int32) bool {
		p := f.path(v)
		if v >= f.n+f.k {
			return false
		}
		return cond.yes.Has(p) || value == graph.Unknown && (cond.may.Has(p) || ix.bad.Has(p) || v < f.n && f.origin(ix.g, p) == graph.Unknown)
	}
	if value == graph.Unknown && f.origin(ix.g, id) == graph.Unknown {
		return nil, "what built it is not in the store"
	}
	way := search(int(f.n+2*f.k), starts, next, decides)
	out := []Step{ix.step(id, "")}
	for i, v := range way {
		p := f.path(v)
		if p == out[len(out)-1].ID && i > 0 {
			continue // a derivation as an input, its building, its file
		}
		via := "refers to"
		switch {
		case v >= f.n && v < f.n+f.k:
			via = "built by"
		case i > 0 && way[i-1] >= f.n+f.k:
			via = "has the output"
		case i > 0 && way[i-1] >= f.n:
			via = "uses"
		}
		out = append(out, ix.step(p, via))
	}
	note := ""
	if last := out[len(out)-1].ID; value == graph.Unknown && !cond.may.Has(last) {
		note = "what built the last path is not in the store"
		if ix.bad.Has(last) {
			note = "nothing of the last path is believed"
		}
	}
	return out, note
}
