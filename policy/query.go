package policy

import (
	"slices"

	"overkeep/policy/graph"
)

// Query is a condition outside a policy, for listings and expectations: it sees the
// keys and lets of a policy.
type Query struct {
	prog *program
	node int32
	text string
}

// Query parses one condition, as a user's file would see the policy. The error is
// *Errors.
func (p *Policy) Query(s Source) (*Query, error) {
	errs := &Errors{}
	f := newFile(0, s)
	parser := &parser{file: f, tokens: lex(f, errs), errs: errs, broken: map[string]bool{}}
	if parser.tokens == nil {
		return nil, errs.sorted()
	}
	for parser.tokens[parser.at].kind == tokenNewline {
		parser.at++
	}
	e := parser.or()
	if e != nil {
		for parser.peek().kind == tokenNewline {
			parser.at++
		}
		if end := parser.peek(); end.kind != tokenEnd {
			parser.fail(end, `"and", "or" or the end is wanted here, not %s`, describe(end))
		}
		p.scope.check(e, false, errs)
	}
	if err := errs.sorted(); err != nil {
		return nil, err
	}
	q, err := p.query(e, newProgram())
	if err != nil {
		errs.add(err)
		return nil, errs
	}
	return q, nil
}

// query compiles a checked condition into a program.
func (p *Policy) query(e *expr, prog *program) (*Query, *Error) {
	c := &compiler{program: prog, scope: p.scope, keys: p.Keys, node: map[*let]int32{}}
	c.lets(p.prog.order, p.scope.check(e, false, &Errors{}))
	q := &Query{prog, c.expr(e, false), e.text()}
	return q, c.err
}

// Text is the condition in canonical form.
func (q *Query) Text() string { return q.text }

// Select evaluates a condition for every path: where it is yes, and where it is
// unknown.
func (ix *Index) Select(q *Query) (yes, unknown graph.Bits) {
	ix.mu.Lock()
	defer ix.mu.Unlock()
	c := ix.evaluate(q.prog, []int32{q.node}).column(q.node)
	unknown = graph.NewBits(ix.g.Len())
	for i := range unknown {
		unknown[i] = c.may[i] &^ c.yes[i]
	}
	return slices.Clone(c.yes), unknown
}
