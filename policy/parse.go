package policy

import (
	"errors"
	"math"
	"path"
	"strconv"
	"strings"

	"overkeep/policy/glob"
)

// storePrefix is how a store path begins in a policy. A store somewhere else is
// named by paths that the loader resolves, like profiles.
const storePrefix = "/nix/store/"

type op byte

const (
	opAnd op = iota
	opOr
	opNot
	opLet
	opSigned
	opUnsigned
	opBuilt
	opKind
	opName
	opLicence
	opUnfree
	opFrom
	opLarger
	opClosure
	opDepends
	opBuiltFrom
	opPath // in expectations only: a store path
)

var termOps = map[string]op{"signed-by": opSigned, "unsigned": opUnsigned, "built-here": opBuilt, "kind": opKind,
	"name": opName, "licence": opLicence, "unfree": opUnfree, "from": opFrom, "larger-than": opLarger,
	"closure-of": opClosure, "depends-on": opDepends, "built-from": opBuiltFrom}

// expr is a condition as it was written.
type expr struct {
	op   op
	kids []*expr
	arg  string // a pattern, still with its escapes; a key, a kind or a let by name
	size int64
	span span
	more bool // opLet: something stands after the word as if it took an argument
}

type statement struct {
	verb      string // one of statementWords
	cond      *expr
	whenKnown bool
	name      string // of a let
	key       Key
	span      span // of its first word
	nameSpan  span
}

// parser reads the statements of one file.
type parser struct {
	file   *file
	tokens []token
	at     int
	last   token // that was taken
	depth  int   // of parentheses and nots
	parens int
	errs   *Errors
	broken map[string]bool // see scope
}

// peek is the next token. A newline within parentheses, after an operator, or before
// a line that begins with one, is none.
func (p *parser) peek() token {
	i := p.at
	for p.tokens[i].kind == tokenNewline {
		i++
	}
	t := p.tokens[i]
	if i == p.at || t.kind == tokenEnd || t.kind == tokenWord && t.head && isOneOf(t.text, statementWords) {
		return p.tokens[p.at]
	}
	joins := p.last.kind == tokenEquals || p.last.kind == tokenWord && isOneOf(p.last.text, operators[:3]) ||
		t.kind == tokenWord && isOneOf(t.text, []string{"and", "or", "when"})
	if p.parens == 0 && !joins {
		return p.tokens[p.at]
	}
	p.at = i
	return t
}

func (p *parser) take() token {
	p.last = p.peek()
	if p.last.kind != tokenEnd {
		p.at++
	}
	return p.last
}

func (p *parser) isWord(words ...string) bool {
	t := p.peek()
	return t.kind == tokenWord && isOneOf(t.text, words)
}

// fail complains at a token, unless the lexer has.
func (p *parser) fail(t token, f string, a ...any) {
	if t.kind != tokenBad {
		p.errs.addf(t.span, f, a...)
	}
}

// statements parses a whole file.
func (p *parser) statements() (out []*statement) {
	if len(p.tokens) == 0 {
		return nil
	}
	for {
		t := p.tokens[p.at]
		switch t.kind {
		case tokenEnd:
			return out
		case tokenNewline:
			p.at++
			continue
		}
		p.depth, p.parens, p.last = 0, 0, token{}
		s := p.statement()
		if s != nil {
			if end := p.peek(); end.kind != tokenNewline && end.kind != tokenEnd {
				p.unexpected(end)
				p.broken[s.name] = p.broken[s.name] || s.verb == "let"
				s = nil
			}
		}
		if s == nil {
			p.recover()
			continue
		}
		out = append(out, s)
	}
}

// recover goes to where the next statement probably begins.
func (p *parser) recover() {
	for {
		switch t := p.tokens[p.at]; {
		case t.kind == tokenEnd || t.head && t.kind == tokenWord && isOneOf(t.text, statementWords) && p.last.span != t.span:
			return
		case t.kind == tokenNewline && p.parens == 0:
			if next := p.tokens[p.at+1]; next.kind != tokenWord || !isOneOf(next.text, []string{"and", "or", "when"}) {
				return
			}
		}
		p.at++
	}
}

func (p *parser) unexpected(t token) {
	switch {
	case t.kind == tokenClose:
		p.fail(t, `")" without "("`)
	case t.kind == tokenWord && (t.text == "when" || t.text == "known"):
		p.fail(t, `"when known" stands once, at the end of a personal line`)
	default:
		p.fail(t, `"and", "or" or the end of the line is wanted here, not %s`, describe(t))
	}
}

func describe(t token) string {
	switch t.kind {
	case tokenEnd:
		return "the end of the file"
	case tokenNewline:
		return "the end of the line"
	case tokenString:
		return "a string"
	}
	if len(t.text) > maxLetName {
		return "this"
	}
	return strconv.Quote(t.text)
}

func (p *parser) statement() *statement {
	t := p.take()
	s := &statement{verb: t.text, span: t.span}
	if t.kind != tokenWord || !isOneOf(t.text, statementWords) {
		hint := ""
		if t.kind == tokenWord {
			if n := nearest(t.text, statementWords); n != "" {
				hint = `; did you mean "` + n + `"?`
			} else if isReserved(t.text) {
				hint = `; a condition stands after one of them`
			}
		}
		p.fail(t, "a line begins with system, personal, require, let or key%s", hint)
		return nil
	}
	if !p.file.Root && s.verb != "personal" && s.verb != "let" && s.verb != "key" {
		p.fail(t, `only root's policy may hold "%s" lines; a user's file may hold personal, let and key lines`, s.verb)
		return nil
	}
	switch s.verb {
	case "key":
		return p.key(s)
	case "let":
		return p.let(s)
	case "require":
		if w := p.peek(); w.kind != tokenWord || w.text != "system" {
			p.fail(w, `"system" is wanted after "require"`)
			return nil
		}
		p.take()
	}
	if s.cond = p.or(); s.cond == nil {
		return nil
	}
	if !p.isWord("when") {
		return s
	}
	when := p.take()
	if !p.isWord("known") {
		p.fail(p.peek(), `"known" is wanted after "when"`)
		return nil
	}
	p.take()
	if s.verb != "personal" {
		p.fail(when, `"when known" belongs to personal lines; a %s line never counts what is not known`, s.verb)
		return nil
	}
	s.whenKnown = true
	return s
}

func (p *parser) key(s *statement) *statement {
	t := p.peek()
	if t.kind != tokenWord {
		p.fail(t, "a key is wanted here, as in nix.conf: NAME:BASE64")
		return nil
	}
	p.take()
	k, err := ParseKey(t.text)
	if err != nil {
		name, _, _ := strings.Cut(t.text, ":")
		p.broken["key "+name] = true
		p.fail(t, "%s", err)
		return nil
	}
	s.key, s.nameSpan = k, t.span
	return s
}

func (p *parser) let(s *statement) *statement {
	t := p.peek()
	if t.kind != tokenWord {
		p.fail(t, "a name is wanted after \"let\"")
		return nil
	}
	if isReserved(t.text) {
		p.fail(t, `"%s" is a word of the language and cannot be a name`, t.text)
		return nil
	}
	if !isLetName(t.text) {
		p.fail(t, "a name is made of letters, digits, - and _, begins with a letter and has at most %d characters", maxLetName)
		return nil
	}
	p.take()
	s.name, s.nameSpan = t.text, t.span
	if eq := p.peek(); eq.kind != tokenEquals {
		p.broken[s.name] = true
		p.fail(eq, `"=" is wanted after the name`)
		return nil
	}
	p.take()
	if s.cond = p.or(); s.cond == nil {
		p.broken[s.name] = true
		return nil
	}
	return s
}

func isLetName(s string) bool {
	for i, c := range []byte(s) {
		letter := c|0x20 >= 'a' && c|0x20 <= 'z'
		if !letter && (i == 0 || (c < '0' || c > '9') && c != '-' && c != '_') {
			return false
		}
	}
	return s != "" && len(s) <= maxLetName
}

func (p *parser) or() *expr  { return p.chain(opOr, "or", p.and) }
func (p *parser) and() *expr { return p.chain(opAnd, "and", p.unary) }

// chain parses A or B or C as one expression: parentheses around the same operator
// make no difference.
func (p *parser) chain(o op, word string, operand func() *expr) *expr {
	e := operand()
	if e == nil || !p.isWord(word) {
		return e
	}
	all := &expr{op: o, span: e.span}
	for {
		if e.op == o {
			all.kids = append(all.kids, e.kids...)
		} else {
			all.kids = append(all.kids, e)
		}
		if !p.isWord(word) {
			return all
		}
		p.take()
		if e = operand(); e == nil {
			return nil
		}
	}
}

// nest counts a level, and complains of one too many.
func (p *parser) nest(t token) bool {
	if p.depth++; p.depth > MaxNesting {
		p.fail(t, "more than %d levels of parentheses and nots", MaxNesting)
		return false
	}
	return true
}

func (p *parser) unary() *expr {
	t := p.peek()
	if !p.isWord("not") {
		return p.primary()
	}
	p.take()
	if !p.nest(t) {
		return nil
	}
	kid := p.unary()
	p.depth--
	if kid == nil {
		return nil
	}
	return &expr{op: opNot, kids: []*expr{kid}, span: t.span}
}

func (p *parser) group() *expr {
	open := p.take()
	if !p.nest(open) {
		return nil
	}
	p.parens++
	e := p.or()
	if e == nil {
		return nil
	}
	if end := p.peek(); end.kind != tokenClose {
		if end.kind == tokenEnd || end.kind == tokenNewline {
			p.fail(open, `"(" is not closed`)
		} else {
			p.fail(end, `"and", "or" or ")" is wanted here, not %s`, describe(end))
		}
		return nil
	}
	p.take()
	p.parens--
	p.depth--
	return e
}

func (p *parser) primary() *expr {
	t := p.peek()
	switch {
	case t.kind == tokenOpen:
		return p.group()
	case t.kind == tokenBad:
		return nil
	case t.kind != tokenWord || isOneOf(t.text, operators) || isOneOf(t.text, statementWords):
		p.fail(t, "a condition is wanted here, not %s", describe(t))
		return nil
	}
	p.take()
	e := &expr{span: t.span}
	o, ok := termOps[t.text]
	if !ok {
		e.op, e.arg = opLet, t.text
		if n := p.peek(); n.kind == tokenString || n.kind == tokenWord && !isReserved(n.text) || n.kind == tokenOpen {
			e.more = true
			if n.kind != tokenOpen {
				p.take()
			} else if p.group() == nil {
				return nil
			}
		}
		return e
	}
	switch e.op = o; o {
	case opUnsigned, opBuilt, opUnfree:
	case opDepends, opBuiltFrom:
		if n := p.peek(); n.kind != tokenOpen {
			p.fail(n, `"(" is wanted after "%s": %s (name "x-*")`, t.text, t.text)
			return nil
		}
		kid := p.group()
		if kid == nil {
			return nil
		}
		e.kids = []*expr{kid}
	default:
		return p.argument(e, t.text)
	}
	return e
}

var examples = map[op]string{opSigned: "the name of a key", opKind: "source, derivation, output or fixed-output",
	opName: `a pattern such as "hello-*"`, opLicence: `a pattern such as "gpl*"`, opFrom: `a pattern such as "github:NixOS/*"`,
	opLarger: "a size such as 10M", opClosure: `a store path, a profile or a pattern such as "hello-*"`}

// argument parses the one word or string that a term takes.
func (p *parser) argument(e *expr, term string) *expr {
	t := p.peek()
	switch {
	case t.kind != tokenWord && t.kind != tokenString:
		p.fail(t, `%s is wanted after "%s"`, examples[e.op], term)
		return nil
	case t.kind == tokenWord && isReserved(t.text) && !(e.op == opKind):
		p.fail(t, `%s is wanted after "%s"; "%s" is a word of the language, put it in quotes if you mean it`, examples[e.op], term, t.text)
		return nil
	case t.text == "":
		p.fail(t, `%s is wanted after "%s", not an empty string`, examples[e.op], term)
		return nil
	}
	p.take()
	e.arg, e.span = t.text, t.span
	ok := true
	switch e.op {
	case opSigned:
		e.arg, ok = p.literal(t, "signed-by takes the name of one key, not a pattern")
	case opKind:
		e.arg, ok = p.literal(t, "kind takes "+examples[opKind])
		if _, is := kinds[e.arg]; ok && !is {
			hint := ""
			if n := nearest(e.arg, kindNames); n != "" {
				hint = `; did you mean "` + n + `"?`
			}
			p.fail(t, `unknown kind %q; there are source, derivation, output and fixed-output%s`, e.arg, hint)
			ok = false
		}
	case opLarger:
		e.size, ok = parseSize(t.text)
		if !ok {
			p.fail(t, "a size is a number of bytes, or one with K, M, G or T (1024 each): 10M")
		}
	case opClosure:
		ok = p.target(e, t)
	default:
		ok = p.pattern(e, t)
	}
	if !ok {
		return nil
	}
	return e
}

func (p *parser) literal(t token, msg string) (string, bool) {
	s, ok := glob.Unescape(t.text)
	if !ok {
		p.fail(t, "%s", msg)
	}
	return s, ok
}

// pattern checks a pattern and places its error within it.
func (p *parser) pattern(e *expr, t token) bool {
	if _, err := glob.Compile(e.arg); err != nil {
		at := t.span
		var ge *glob.Error
		if errors.As(err, &ge) && len(t.text) <= glob.MaxLen {
			at.from += ge.Offset
			if t.kind == tokenString {
				at.from++
			}
			at.to = at.from + 1
		}
		p.errs.add(at.errorf("%s", err))
		return false
	}
	if e.op == opName && strings.Contains(e.arg, "/") {
		p.fail(t, "a name is what follows the hash in a store path, and has no slash")
		return false
	}
	return true
}

// target checks what stands after closure-of, or a store path in an expectation.
func (p *parser) target(e *expr, t token) bool {
	base, store := strings.CutPrefix(e.arg, storePrefix)
	switch {
	case store && (base == "" || strings.Contains(base, "/")):
		p.fail(t, "a store path is wanted, and nothing below it: /nix/store/HASH-NAME")
		return false
	case store:
		return p.pattern(e, t)
	case e.op == opPath:
		p.fail(t, "a store path is wanted: /nix/store/HASH-NAME")
		return false
	case strings.HasPrefix(e.arg, "/"):
		s, ok := p.literal(t, "a profile is one path, not a pattern")
		if ok && (path.Clean(s) != s || s == "/" || s+"/" == storePrefix) {
			p.fail(t, "a profile is the path of a link, without dots and doubled or trailing slashes")
			return false
		}
		return ok
	case strings.Contains(e.arg, "/"):
		p.fail(t, "the path of a profile begins with a slash")
		return false
	}
	return p.pattern(e, t)
}

const sizeUnits = "KMGT"

func parseSize(s string) (int64, bool) {
	shift := 0
	if i := strings.IndexByte(sizeUnits, s[len(s)-1]); i >= 0 {
		s, shift = s[:len(s)-1], 10*(i+1)
	}
	n, err := strconv.ParseUint(s, 10, 63)
	if err != nil || s[0] == '+' || n > math.MaxInt64>>shift {
		return 0, false
	}
	return int64(n) << shift, true
}

func formatSize(n int64) string {
	unit := ""
	for i := 0; i < len(sizeUnits) && n > 0 && n%1024 == 0; i++ {
		n, unit = n/1024, sizeUnits[i:i+1]
	}
	return strconv.FormatInt(n, 10) + unit
}
