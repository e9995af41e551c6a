package policy

import (
	"strings"

	"overkeep/policy/glob"
)

// Sources is the policy in canonical form, a source for each that was parsed, with
// its name: one line for each statement, in order, no comments. Parse of it gives
// the same policy but for line numbers, and the same Sources again.
func (p *Policy) Sources() []Source {
	out := make([]Source, len(p.files))
	for i, f := range p.files {
		var b strings.Builder
		for _, s := range f.statements {
			b.WriteString(s.text())
			b.WriteByte('\n')
		}
		out[i] = Source{f.Name, []byte(b.String()), f.Root}
	}
	return out
}

// String is all lines of the policy in canonical form.
func (p *Policy) String() string {
	var b strings.Builder
	for _, s := range p.Sources() {
		b.Write(s.Text)
	}
	return b.String()
}

// text is a statement on one line.
func (s *statement) text() string {
	switch s.verb {
	case "key":
		return "key " + s.key.String()
	case "let":
		return "let " + s.name + " = " + s.cond.text()
	}
	t := verbs[s.verb].String() + " " + s.cond.text()
	if s.whenKnown {
		t += " when known"
	}
	return t
}

func (e *expr) text() string {
	var b strings.Builder
	e.write(&b, opOr)
	return b.String()
}

// write prints an expression as an operand of outer: or takes everything bare, and
// takes all but or, not takes what is one word or call.
func (e *expr) write(b *strings.Builder, outer op) {
	switch e.op {
	case opAnd, opOr:
		word, parens := " or ", outer != opOr
		if e.op == opAnd {
			word, parens = " and ", outer == opNot
		}
		if parens {
			b.WriteByte('(')
		}
		for i, kid := range e.kids {
			if i > 0 {
				b.WriteString(word)
			}
			inner := e.op
			if inner == opOr {
				inner = opAnd // an or within an or has been flattened; it cannot be here
			}
			kid.write(b, inner)
		}
		if parens {
			b.WriteByte(')')
		}
	case opNot:
		b.WriteString("not ")
		e.kids[0].write(b, opNot)
	case opLet:
		b.WriteString(e.arg)
	case opPath:
		writeArgument(b, e.arg, true)
	default:
		b.WriteString(terms[e.op-opSigned])
		switch e.op {
		case opDepends, opBuiltFrom:
			b.WriteString(" (")
			e.kids[0].write(b, opOr)
			b.WriteByte(')')
		case opSigned:
			b.WriteByte(' ')
			writeArgument(b, glob.Escape(e.arg), true)
		case opKind:
			b.WriteString(" " + e.arg)
		case opLarger:
			b.WriteString(" " + formatSize(e.size))
		case opClosure:
			b.WriteByte(' ')
			writeArgument(b, e.arg, strings.HasPrefix(e.arg, "/"))
		case opName, opLicence, opFrom:
			b.WriteByte(' ')
			writeArgument(b, e.arg, false)
		}
	}
}

// writeArgument prints a pattern; bare only if that is wanted and it reads back so.
func writeArgument(b *strings.Builder, pattern string, bare bool) {
	plain := func(r rune) bool {
		return r|0x20 >= 'a' && r|0x20 <= 'z' || r >= '0' && r <= '9' || strings.ContainsRune("-._+:/@%~", r)
	}
	if bare && pattern != "" && !isReserved(pattern) && strings.IndexFunc(pattern, func(r rune) bool { return !plain(r) }) < 0 {
		b.WriteString(pattern)
		return
	}
	b.WriteByte('"')
	for i := 0; i < len(pattern); i++ {
		// \" and \\ come with their backslash; a bare quote came from a key's name.
		switch {
		case pattern[i] == '\\' && i+1 < len(pattern):
			b.WriteString(pattern[i : i+2])
			i++
		case pattern[i] == '"':
			b.WriteString(`\"`)
		default:
			b.WriteByte(pattern[i])
		}
	}
	b.WriteByte('"')
}
