package policy

import (
	"fmt"
	"strings"
	"unicode"
	"unicode/utf8"
)

type tokenKind byte

const (
	tokenEnd tokenKind = iota // of the file
	tokenNewline
	tokenWord
	tokenString
	tokenOpen
	tokenClose
	tokenEquals
	tokenBad // what is wrong has been said
)

type token struct {
	kind tokenKind
	text string // a word as written, a string without its quotes but with its escapes
	span span
	head bool // the first of its line
}

// statementWords begin a statement, and only that: a line that begins with one ends
// whatever came before, so that one open parenthesis cannot swallow a file.
var statementWords = []string{"system", "personal", "require", "let", "key"}

// operators and the rest of the words that mean something. None of them can be the
// name of a let or stand bare where a pattern is wanted.
var operators = []string{"and", "or", "not", "when", "known", "because"}

// terms are the conditions, in the order of docs/POLICY.md.
var terms = []string{"signed-by", "unsigned", "built-here", "kind", "name", "licence", "unfree", "from", "larger-than",
	"closure-of", "depends-on", "built-from"}

func isOneOf(word string, list []string) bool {
	for _, w := range list {
		if w == word {
			return true
		}
	}
	return false
}

func isReserved(word string) bool {
	return isOneOf(word, statementWords) || isOneOf(word, operators) || isOneOf(word, terms)
}

// lex splits a file into tokens, comments left out. It adds errors and goes on
// after them with the next line.
func lex(f *file, errs *Errors) []token {
	if len(f.Text) > MaxSource {
		errs.add(&Error{Pos: Pos{f.Name, 1, 1}, file: f.index,
			Msg: fmt.Sprintf("a policy file of %d bytes; %d are the most", len(f.Text), MaxSource)})
		return nil
	}
	l := &lexer{file: f, text: string(f.Text), errs: errs}
	for l.at < len(l.text) {
		l.line()
	}
	l.push(tokenEnd, len(l.text), len(l.text), "")
	return l.out
}

type lexer struct {
	file *file
	text string
	at   int
	out  []token
	errs *Errors
	n    int // tokens in this line
	let  bool
}

func (l *lexer) push(kind tokenKind, from, to int, text string) {
	l.out = append(l.out, token{kind, text, span{l.file, from, to}, l.n == 0})
	l.n++
}

func (l *lexer) fail(from, to int, f string, a ...any) {
	l.errs.add(span{l.file, from, to}.errorf(f, a...))
	l.push(tokenBad, from, to, "")
	for l.at < len(l.text) && l.text[l.at] != '\n' {
		l.at++
	}
}

// line lexes up to and including a newline.
func (l *lexer) line() {
	l.n, l.let = 0, false
	for l.at < len(l.text) {
		from := l.at
		switch c := l.text[l.at]; {
		case c == '\n':
			l.at++
			l.push(tokenNewline, from, l.at, "")
			return
		case c == ' ' || c == '\t':
			l.at++
		case c == '\r' && l.at+1 < len(l.text) && l.text[l.at+1] == '\n':
			l.at++
		case c == '#':
			if !l.comment() {
				return
			}
		case c == '(':
			l.at++
			l.push(tokenOpen, from, l.at, "(")
		case c == ')':
			l.at++
			l.push(tokenClose, from, l.at, ")")
		case c == '"':
			l.quoted()
		case c == '=' && l.let && l.n == 2:
			l.at++
			l.push(tokenEquals, from, l.at, "=")
		default:
			l.word()
		}
	}
}

func (l *lexer) comment() bool {
	for l.at < len(l.text) && l.text[l.at] != '\n' {
		if !l.plain() {
			return false
		}
	}
	return true
}

// plain steps over one character, and complains of one that no file may hold.
func (l *lexer) plain() bool {
	r, n := utf8.DecodeRuneInString(l.text[l.at:])
	switch {
	case r == utf8.RuneError && n == 1:
		l.fail(l.at, l.at+1, "a byte that is not UTF-8 (0x%02x)", l.text[l.at])
		return false
	case r == '\r' && strings.HasPrefix(l.text[l.at:], "\r\n"):
	case r < ' ' && r != '\t' || r >= 0x7f && r < 0xa0 || hidden(r):
		l.fail(l.at, l.at+n, "a control character (U+%04X)", r)
		return false
	}
	l.at += n
	return true
}

// hidden characters change how a line looks without changing what it says:
// directions and zero widths (see CVE-2021-42574), tags, and other ends of lines.
func hidden(r rune) bool {
	return r >= utf8.RuneSelf && unicode.In(r, unicode.Cf, unicode.Zl, unicode.Zp)
}

func (l *lexer) quoted() {
	from := l.at
	var b strings.Builder
	for l.at++; ; {
		if l.at == len(l.text) || l.text[l.at] == '\n' {
			l.fail(from, l.at, "a string without its closing quote")
			return
		}
		switch c := l.text[l.at]; c {
		case '"':
			l.at++
			if b.Len() > maxWord {
				l.fail(from, from+1, "a string of %d bytes; %d are the most", b.Len(), maxWord)
				return
			}
			l.push(tokenString, from, l.at, b.String())
			l.space(from)
			return
		case '\\':
			// What the escape means is the pattern's to say; here it only hides a quote.
			if l.at+1 < len(l.text) && (l.text[l.at+1] == '"' || l.text[l.at+1] == '\\') {
				b.WriteString(l.text[l.at : l.at+2])
				l.at += 2
				continue
			}
			fallthrough
		default:
			i := l.at
			if !l.plain() {
				return
			}
			b.WriteString(l.text[i:l.at])
		}
	}
}

// space refuses what is glued to the end of a string.
func (l *lexer) space(from int) {
	if l.at < len(l.text) && strings.IndexByte(" \t\r\n()", l.text[l.at]) < 0 {
		l.fail(l.at, l.at+1, "a space is missing after the string")
	}
}

func (l *lexer) word() {
	from := l.at
	for l.at < len(l.text) && strings.IndexByte(" \t\n()", l.text[l.at]) < 0 {
		switch c := l.text[l.at]; {
		case c == '"' || c == '#' || c == '\\':
			l.fail(l.at, l.at+1, "%q inside a word; put the whole word in quotes%s", string(c),
				map[bool]string{true: ", or a space before a comment"}[c == '#'])
			return
		case c == '\r' && strings.HasPrefix(l.text[l.at:], "\r\n"):
			l.endWord(from)
			return
		case c == '=' && l.let && l.n == 1:
			l.endWord(from)
			return
		}
		if !l.plain() {
			return
		}
	}
	l.endWord(from)
}

func (l *lexer) endWord(from int) {
	word := l.text[from:l.at]
	if len(word) > maxWord {
		l.fail(from, from+1, "a word of %d bytes; %d are the most", len(word), maxWord)
		return
	}
	if word == "" { // "let = x"
		l.n = 2
		return
	}
	l.let = l.let || l.n == 0 && word == "let"
	l.push(tokenWord, from, l.at, word)
}
