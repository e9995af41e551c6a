package policy

import (
	"fmt"
	"slices"
	"strings"

	"overkeep/policy/graph"
)

// Expectations are what a person expects of a policy over a store, in a file beside
// it. A line is
//
//	system   CONDITION [because WORD]
//	personal /nix/store/HASH-NAME [because WORD]
//
// and says that every path for which the condition is yes, or which the store path
// (a pattern, if it holds *, ? or a set) names, is placed so. A line that is about no
// path fails. WORD is a Reason ("vetoed", "reference"), or a term or let that the
// line which decided must mention ("signed-by"); for a path that is personal for a
// reference that is the line about the path at the end of the chain. Conditions see
// the keys and lets of the policy.
type Expectations struct {
	lines []expectation
	prog  *program
	owner *Policy
}

type expectation struct {
	system  bool
	query   *Query
	because string
	pos     Pos
	text    string
}

// Failure is an expectation that does not hold.
type Failure struct {
	Pos     Pos
	Text    string     // the line in canonical form
	Msg     string     // what is the case instead
	Matched int        // paths that the line is about
	Paths   []graph.ID // those of them that are not as expected
}

// ParseExpectations reads the expectations of a policy. The error is *Errors.
func (p *Policy) ParseExpectations(s Source) (*Expectations, error) {
	errs := &Errors{}
	f := newFile(0, s)
	f.Root = true // its words are read as a whole policy's; what grants is not in it
	parser := &parser{file: f, tokens: lex(f, errs), errs: errs, broken: map[string]bool{}}
	x := &Expectations{prog: newProgram(), owner: p}
	for len(parser.tokens) > 0 {
		t := parser.tokens[parser.at]
		if t.kind == tokenEnd {
			break
		}
		if t.kind == tokenNewline {
			parser.at++
			continue
		}
		parser.depth, parser.parens, parser.last = 0, 0, token{}
		if len(x.lines) == MaxLines {
			errs.add(t.span.errorf("more than %d expectations", MaxLines))
			break
		}
		if !x.line(parser, errs) {
			parser.recover()
		}
	}
	if err := errs.sorted(); err != nil {
		return nil, err
	}
	return x, nil
}

// line parses one expectation.
func (x *Expectations) line(p *parser, errs *Errors) bool {
	t := p.take()
	if t.kind != tokenWord || t.text != "system" && t.text != "personal" {
		hint := ""
		if n := nearest(t.text, []string{"system", "personal"}); n != "" && t.kind == tokenWord {
			hint = `; did you mean "` + n + `"?`
		}
		p.fail(t, "an expectation begins with system or personal%s", hint)
		return false
	}
	e := expectation{system: t.text == "system", pos: t.span.pos()}
	var cond *expr
	if n := p.peek(); (n.kind == tokenWord || n.kind == tokenString) && strings.HasPrefix(n.text, "/") {
		p.take()
		cond = &expr{op: opPath, arg: n.text, span: n.span}
		if !p.target(cond, n) {
			return false
		}
	} else if cond = p.or(); cond == nil {
		return false
	}
	if p.isWord("because") {
		p.take()
		w := p.peek()
		if w.kind != tokenWord || !x.owner.canDecide(w.text) {
			hint := ""
			if n := nearest(w.text, append(slices.Clone(reasonNames), terms...)); n != "" && w.kind == tokenWord {
				hint = `; did you mean "` + n + `"?`
			}
			p.fail(w, `a reason (%s), a term or a let of the policy is wanted after "because"%s`, strings.Join(reasonNames, ", "), hint)
			return false
		}
		p.take()
		e.because = w.text
	}
	if end := p.peek(); end.kind != tokenNewline && end.kind != tokenEnd {
		p.fail(end, `"because" or the end of the line is wanted here, not %s`, describe(end))
		return false
	}
	before := len(errs.List) + errs.More
	x.owner.scope.check(cond, false, errs)
	if len(errs.List)+errs.More > before {
		return true
	}
	q, err := x.owner.query(cond, x.prog)
	if err != nil {
		errs.add(err)
		return true
	}
	e.query = q
	e.text = t.text + " " + q.text
	if e.because != "" {
		e.text += " because " + e.because
	}
	x.lines = append(x.lines, e)
	return true
}

func (p *Policy) canDecide(word string) bool {
	return isOneOf(word, reasonNames) || isOneOf(word, terms) || p.scope.lets[word] != nil
}

// String is the file in canonical form, without comments.
func (x *Expectations) String() string {
	var b strings.Builder
	for _, e := range x.lines {
		b.WriteString(e.text + "\n")
	}
	return b.String()
}

// Len is the number of expectations.
func (x *Expectations) Len() int { return len(x.lines) }

// Evaluate returns the expectations that do not hold, in order.
func (x *Expectations) Evaluate(v *Verdicts) (out []Failure) {
	var causes *Causes
	for _, e := range x.lines {
		f := Failure{Pos: e.pos, Text: e.text}
		yes, _ := v.ix.Select(e.query)
		elsewhere := 0
		yes.Each(func(id graph.ID) {
			f.Matched++
			if v.System.Has(id) != e.system {
				f.Paths = append(f.Paths, id)
				elsewhere++
				return
			}
			if e.because == "" {
				return
			}
			if v.reasons[id] == Reference && causes == nil {
				causes = v.Causes()
			}
			if !v.because(id, e.because, causes) {
				f.Paths = append(f.Paths, id)
			}
		})
		wanted, other := "personal", "system"
		if e.system {
			wanted, other = other, wanted
		}
		switch {
		case f.Matched == 0:
			f.Msg = "it is about no path"
		case elsewhere > 0:
			f.Msg = fmt.Sprintf("%d of %d paths are %s", elsewhere, f.Matched, other)
		case len(f.Paths) > 0:
			f.Msg = fmt.Sprintf("%d of %d paths are %s, but not because of %s", len(f.Paths), f.Matched, wanted, e.because)
		default:
			continue
		}
		out = append(out, f)
	}
	return out
}

func (v *Verdicts) because(id graph.ID, word string, causes *Causes) bool {
	reason, rule := v.Reason(id)
	if reason.String() == word {
		return true
	}
	if reason == Reference {
		reason, rule = v.Reason(causes.Of(id).Cause)
	}
	return reason.String() == word || rule != NoRule && v.policy.Rules[rule].Mentions(word)
}
