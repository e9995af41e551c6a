package policy

import (
	"fmt"
	"slices"
	"strconv"
	"strings"
)

// Verb is what a line does.
type Verb byte

// The three kinds of rules.
const (
	Grant   Verb = iota // system
	Veto                // personal
	Require             // require system: moves nothing
)

var verbs = map[string]Verb{"system": Grant, "personal": Veto, "require": Require}

func (v Verb) String() string { return [...]string{"system", "personal", "require system"}[v] }

// Rule is one system, personal or require line. Lines are told apart by their
// index in Policy.Rules.
type Rule struct {
	Verb      Verb
	WhenKnown bool
	Root      bool   // from root's policy
	Pos       Pos    // of its first word
	Text      string // the line in canonical form

	cond  int32 // node of Policy.prog
	expr  *expr
	scope *scope
}

// Mentions reports whether the line holds a term ("signed-by") or uses a let, by
// name, directly or through other lets.
func (r *Rule) Mentions(word string) bool {
	seen := map[*let]bool{}
	todo, root := []*expr{r.expr}, r.Root
	for len(todo) > 0 {
		e := todo[len(todo)-1]
		todo = append(todo[:len(todo)-1], e.kids...)
		switch {
		case e.op == opLet && e.arg == word, e.op >= opSigned && e.op <= opBuiltFrom && terms[e.op-opSigned] == word:
			return true
		case e.op == opLet:
			// What a let of root's names is root's, and a user's file cannot change it.
			if l := r.scope.lookup(e.arg, root); l != nil && !seen[l] {
				seen[l] = true
				todo = append(todo, l.cond)
			}
		}
	}
	return false
}

// Policy is what Parse made of its sources. It is immutable.
type Policy struct {
	Keys  []Key
	Rules []Rule

	files []parsedFile
	scope *scope
	prog  *program
}

type parsedFile struct {
	Source
	statements []*statement
}

// let is a condition with a name.
type let struct {
	*statement
	root  bool
	uses  []*let
	text  string // of the condition, once it was compared
	state byte   // of the search for cycles
}

// means reports whether another line says the same of the name. Both texts may be as
// long as a file, and the other lines as many as there can be.
func (l *let) means(s *statement) bool {
	if l.text == "" {
		l.text = l.cond.text()
	}
	return l.text == s.cond.text()
}

// scope is what the words of a policy mean.
type scope struct {
	keys map[string]Key
	lets map[string]*let

	// own are the keys that users' files declare and root's do not. Root's lines do
	// not see them: a key more would make less unsigned.
	own map[string]bool

	// broken are the lets and keys ("key " and the name) whose own lines have errors:
	// that they are not there needs no saying.
	broken map[string]bool
}

// lookup finds a let as a file of root or of a user sees it.
func (s *scope) lookup(name string, root bool) *let {
	if l := s.lets[name]; l != nil && (l.root || !root) {
		return l
	}
	return nil
}

// sees reports whether a file of root or of a user sees a declared key.
func (s *scope) sees(key string, root bool) bool { return !root || !s.own[key] }

// Parse reads all files of a policy at once. The order of files and lines does not
// matter: a let or a key may be used before it is declared, and a line that stands
// there twice word for word is as good as once. The error is *Errors, and then there
// is no policy.
func Parse(sources ...Source) (*Policy, error) {
	errs := &Errors{}
	p := &Policy{scope: &scope{map[string]Key{}, map[string]*let{}, map[string]bool{}, map[string]bool{}}, prog: newProgram()}
	if len(sources) > MaxSources {
		errs.add(&Error{Pos: Pos{sources[MaxSources].Name, 1, 1}, Msg: "more than " + strconv.Itoa(MaxSources) + " policy files"})
		return nil, errs
	}
	lines, size, whole := 0, 0, true
	for i, s := range sources {
		if size += min(len(s.Text), MaxSource); size > MaxText {
			errs.add(&Error{Pos: Pos{s.Name, 1, 1}, file: i, Msg: fmt.Sprintf("the policy files have more than %d bytes together", MaxText)})
			whole = false
			break
		}
		f := newFile(i, s)
		parser := &parser{file: f, tokens: lex(f, errs), errs: errs, broken: p.scope.broken}
		whole = whole && parser.tokens != nil
		stmts := parser.statements()
		if lines += len(stmts); lines > MaxLines {
			over := stmts[len(stmts)-(lines-MaxLines)]
			errs.add(over.span.errorf("more than %d lines in the policy", MaxLines))
			whole = false
			break
		}
		p.files = append(p.files, parsedFile{s, stmts})
	}
	p.declare(errs)
	if whole {
		p.resolve(errs)
	}
	if err := errs.sorted(); err != nil {
		return nil, err
	}
	p.compile(errs)
	if err := errs.sorted(); err != nil {
		return nil, err
	}
	return p, nil
}

// declare collects the keys and lets. Root's come first, so that a user's line
// cannot be the first to take a name.
func (p *Policy) declare(errs *Errors) {
	for _, root := range []bool{true, false} {
		for _, f := range p.files {
			for _, s := range f.statements {
				switch {
				case f.Root != root:
				case s.verb == "key":
					p.declareKey(s, root, errs)
				case s.verb == "let":
					p.declareLet(s, root, errs)
				}
			}
		}
	}
	slices.SortFunc(p.Keys, func(a, b Key) int { return strings.Compare(a.Name, b.Name) })
}

func (p *Policy) declareKey(s *statement, root bool, errs *Errors) {
	old, twice := p.scope.keys[s.key.Name]
	switch differs := twice && !old.Public.Equal(s.key.Public); {
	case differs && !root && !p.scope.own[s.key.Name]:
		errs.add(s.nameSpan.errorf("key %q is root's, with another value; a user's file cannot change it", s.key.Name))
	case differs:
		errs.add(s.nameSpan.errorf("key %q is declared with another value too", s.key.Name))
	}
	if !twice {
		p.scope.keys[s.key.Name] = s.key
		p.scope.own[s.key.Name] = !root
		p.Keys = append(p.Keys, s.key)
	}
}

func (p *Policy) declareLet(s *statement, root bool, errs *Errors) {
	old := p.scope.lets[s.name]
	switch {
	case old == nil:
		p.scope.lets[s.name] = &let{statement: s, root: root}
	case old.root && !root:
		errs.add(s.nameSpan.errorf("let %q is root's (%s); a user's file cannot change what it means", s.name, old.span.pos().Short()))
	case !old.means(s):
		errs.add(s.nameSpan.errorf("let %q means something else at %s", s.name, old.span.pos().Short()))
	}
}

// resolve checks every word of every condition, used or not, and orders the lets.
func (p *Policy) resolve(errs *Errors) {
	for _, f := range p.files {
		for _, s := range f.statements {
			if s.cond == nil {
				continue
			}
			uses := p.scope.check(s.cond, f.Root, errs)
			if s.verb == "let" {
				if l := p.scope.lets[s.name]; l != nil && l.statement == s {
					l.uses = uses
				}
			}
		}
	}
	p.cycles(errs)
}

// check complains of words that mean nothing, and returns the lets that are used.
func (s *scope) check(e *expr, root bool, errs *Errors) (uses []*let) {
	switch e.op {
	case opSigned:
		switch _, ok := s.keys[e.arg]; {
		case ok && s.sees(e.arg, root), s.broken["key "+e.arg]:
		case ok:
			errs.addf(e.span, "key %q is not declared; root's policy does not see the keys of a user's file", e.arg)
		default:
			errs.addf(e.span, "key %q is not declared; add a line: key %s:<base64>", e.arg, e.arg)
		}
	case opLet:
		l := s.lookup(e.arg, root)
		switch {
		case l != nil && !e.more:
			return []*let{l}
		case l != nil:
			errs.addf(e.span, "%q is a let, and nothing stands after it but and, or and )", e.arg)
		case s.broken[e.arg]:
		case s.lets[e.arg] != nil:
			errs.addf(e.span, "unknown condition %q; root's policy does not see the lets of a user's file", e.arg)
		default:
			if !errs.full() {
				errs.add(e.span.errorf("unknown condition %s%s", shown(e.arg), s.suggest(e.arg, root)))
			}
		}
	}
	for _, kid := range e.kids {
		uses = append(uses, s.check(kid, root, errs)...)
	}
	return uses
}

// shown quotes a word, and cuts a long one.
func shown(word string) string {
	if r := []rune(word); len(r) > maxLetName {
		word = string(r[:maxLetName]) + "…"
	}
	return strconv.Quote(word)
}

func (s *scope) suggest(word string, root bool) string {
	candidates := append(slices.Clone(terms), "not")
	for name := range s.lets {
		if s.lookup(name, root) != nil {
			candidates = append(candidates, name)
		}
	}
	slices.Sort(candidates)
	if n := nearest(word, candidates); n != "" {
		return `; did you mean "` + n + `"?`
	}
	if strings.ContainsAny(word, "*?[") {
		return "; a pattern stands after name, licence, from or closure-of"
	}
	return ""
}

// order returns the lets so that each stands after those it uses, and complains of
// those that use themselves. It does not recurse: a chain of lets may be as long as
// the policy.
func (p *Policy) cycles(errs *Errors) {
	const open, done = 1, 2
	names := make([]string, 0, len(p.scope.lets))
	for name := range p.scope.lets {
		names = append(names, name)
	}
	slices.Sort(names)
	type frame struct {
		let  *let
		next int
	}
	for _, name := range names {
		if p.scope.lets[name].state != 0 {
			continue
		}
		stack := []frame{{p.scope.lets[name], 0}}
		stack[0].let.state = open
		for len(stack) > 0 {
			f := &stack[len(stack)-1]
			if f.next == len(f.let.uses) {
				f.let.state = done
				p.prog.order = append(p.prog.order, f.let)
				stack = stack[:len(stack)-1]
				continue
			}
			use := f.let.uses[f.next]
			f.next++
			switch use.state {
			case 0:
				use.state = open
				stack = append(stack, frame{use, 0})
			case open:
				var cycle []string
				for i := range stack {
					if stack[i].let == use || cycle != nil {
						cycle = append(cycle, stack[i].let.name)
					}
				}
				if len(cycle) > 8 {
					cycle = append(cycle[:8], "…")
				}
				errs.add(use.nameSpan.errorf("let %q is defined by itself: %s", use.name, strings.Join(append(cycle, use.name), " -> ")))
			}
		}
	}
}

// compile makes the conditions of all rules into one program.
func (p *Policy) compile(errs *Errors) {
	var uses []*let
	for _, f := range p.files {
		for _, s := range f.statements {
			if _, rule := verbs[s.verb]; rule {
				uses = append(uses, p.scope.check(s.cond, f.Root, errs)...)
			}
		}
	}
	c := &compiler{program: p.prog, scope: p.scope, keys: p.Keys, node: map[*let]int32{}}
	c.lets(p.prog.order, uses)
	for _, f := range p.files {
		for _, s := range f.statements {
			if verb, rule := verbs[s.verb]; rule && c.err == nil {
				p.Rules = append(p.Rules, Rule{Verb: verb, WhenKnown: s.whenKnown, Root: f.Root, Pos: s.span.pos(), Text: s.text(),
					cond: c.expr(s.cond, f.Root), expr: s.cond, scope: p.scope})
			}
		}
	}
	if c.err != nil {
		errs.add(c.err)
	}
}

// Roots are the closure-of targets that only files can resolve: profiles and other
// links, sorted, each once. Whoever loads the graph puts what they lead to into
// Graph.Roots; what is missing there is unknown.
func (p *Policy) Roots() []string { return p.prog.roots() }

// Needs are the facts that a policy asks for. What it does not need may stay unknown
// in the graph without a change of any verdict.
type Needs struct {
	Signatures bool
	Origins    bool // licence, unfree, from
	Sizes      bool
	BuildInput bool // derivers, outputs and the closures of derivations: built-from
	ClosureOf  bool // whole closures of other paths than the one that is asked about
}

// Needs tells what the rules ask for.
func (p *Policy) Needs() Needs { return p.prog.needs() }
