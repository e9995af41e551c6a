// Package glob matches names, licences and URLs against patterns in time bounded
// by the length of the text times the length of the pattern, whatever the pattern.
//
//   - any run of characters, none and slashes included
//     ?        one character
//     [a-z_]   one character of a set; [!a-z] or [^a-z] one that is not in it
//     \x       the character x itself, where x is one of \ * ? [ ] "
//
// A pattern matches the whole text, and case matters. A character is a UTF-8
// sequence, or one byte where the text is not UTF-8. Sets hold ASCII only.
//
// Do not use it for files: a slash is a character like any other.
package glob

import (
	"bytes"
	"strings"
	"unicode/utf8"
)

// MaxLen bounds a pattern, in bytes.
const MaxLen = 1024

// Error is what is wrong with a pattern, and where.
type Error struct {
	Offset int // bytes into the pattern
	Msg    string
}

func (e *Error) Error() string { return e.Msg }

// Glob is a compiled pattern. It is immutable.
type Glob struct {
	text     string
	segments []segment // between the stars; at least one
	literal  []byte    // the longest run of bytes that every match holds
}

type segment struct {
	bytes []byte // if elems is nil: exactly this
	elems []elem
}

// elem matches one character: itself, any, or one of a set.
type elem struct {
	kind byte // 'c', '?' or '['
	char rune
	set  *[128]bool
	not  bool
}

const special = `\*?[]"`

// Escape is the pattern that matches text and nothing else.
func Escape(text string) string {
	var b strings.Builder
	for i := range len(text) {
		if strings.IndexByte(`\*?[]`, text[i]) >= 0 {
			b.WriteByte('\\')
		}
		b.WriteByte(text[i])
	}
	return b.String()
}

// Unescape is the text that a pattern without *, ? and sets stands for, and whether
// it is one.
func Unescape(pattern string) (string, bool) {
	g, err := Compile(pattern)
	if err != nil || len(g.segments) != 1 || g.segments[0].elems != nil {
		return "", false
	}
	return string(g.segments[0].bytes), true
}

// Compile parses a pattern. Its errors are *Error.
func Compile(pattern string) (*Glob, error) {
	if len(pattern) > MaxLen {
		return nil, &Error{0, "a pattern of more than 1024 bytes"}
	}
	if !utf8.ValidString(pattern) {
		return nil, &Error{0, "a pattern that is not UTF-8"}
	}
	g := &Glob{text: pattern}
	var elems []elem
	end := func() {
		g.segments = append(g.segments, newSegment(elems))
		elems = nil
	}
	for i := 0; i < len(pattern); {
		switch c := pattern[i]; c {
		case '*':
			end()
			i++
		case '?':
			elems = append(elems, elem{kind: '?'})
			i++
		case '[':
			e, n, err := parseSet(pattern[i:])
			if err != nil {
				err.Offset += i
				return nil, err
			}
			elems = append(elems, e)
			i += n
		case ']':
			return nil, &Error{i, `"]" without "["; write \] for the character itself`}
		case '\\':
			if i+1 == len(pattern) || strings.IndexByte(special, pattern[i+1]) < 0 {
				return nil, &Error{i, `a backslash stands before one of \ * ? [ ] "`}
			}
			i++
			fallthrough
		default:
			char, n := utf8.DecodeRuneInString(pattern[i:])
			elems = append(elems, elem{kind: 'c', char: char})
			i += n
		}
	}
	end()
	g.literal = g.longest()
	return g, nil
}

func parseSet(s string) (elem, int, *Error) {
	e := elem{kind: '[', set: new([128]bool)}
	i, any := 1, false
	if i < len(s) && (s[i] == '!' || s[i] == '^') {
		e.not = true
		i++
	}
	// member reads one character, escaped or not.
	member := func() (byte, *Error) {
		if i < len(s) && s[i] == '\\' {
			i++
			if i == len(s) || strings.IndexByte(special+"-!^", s[i]) < 0 {
				return 0, &Error{i - 1, `in a set a backslash stands before one of \ * ? [ ] " - ! ^`}
			}
		} else if i < len(s) && s[i] == '[' {
			return 0, &Error{i, `"[" in a set; write \[ for the character itself`}
		}
		if i == len(s) {
			return 0, &Error{0, `"[" without "]"; write \[ for the character itself`}
		}
		if s[i] >= utf8.RuneSelf {
			return 0, &Error{i, "a set holds ASCII characters only"}
		}
		i++
		return s[i-1], nil
	}
	for i < len(s) && s[i] != ']' {
		at := i
		low, err := member()
		if err != nil {
			return e, 0, err
		}
		high := low
		if i+1 < len(s) && s[i] == '-' && s[i+1] != ']' {
			i++
			if high, err = member(); err != nil {
				return e, 0, err
			}
		}
		if high < low {
			return e, 0, &Error{at, "a range that goes backwards"}
		}
		for c := int(low); c <= int(high); c++ {
			e.set[c] = true
		}
		any = true
	}
	if i == len(s) {
		return e, 0, &Error{0, `"[" without "]"; write \[ for the character itself`}
	}
	if !any {
		return e, 0, &Error{0, "an empty set"}
	}
	return e, i + 1, nil
}

func newSegment(elems []elem) segment {
	lit := make([]byte, 0, len(elems))
	for _, e := range elems {
		if e.kind != 'c' {
			return segment{elems: elems}
		}
		lit = utf8.AppendRune(lit, e.char)
	}
	return segment{bytes: lit}
}

func (g *Glob) longest() []byte {
	var best, run []byte
	for _, s := range g.segments {
		if s.elems == nil && len(s.bytes) > len(best) {
			best = s.bytes
		}
		run = nil
		for _, e := range s.elems {
			if e.kind != 'c' {
				run = nil
				continue
			}
			if run = utf8.AppendRune(run, e.char); len(run) > len(best) {
				best = bytes.Clone(run)
			}
		}
	}
	return best
}

// String is the pattern as it was given.
func (g *Glob) String() string { return g.text }

// Literal is the longest run of bytes that stands in everything the pattern
// matches, for a search that comes before Match; part of the Glob.
func (g *Glob) Literal() []byte { return g.literal }

// Anchored reports how a match must begin and end; parts of the Glob.
func (g *Glob) Anchored() (prefix, suffix []byte) {
	return g.segments[0].bytes, g.segments[len(g.segments)-1].bytes
}

// Match reports whether the pattern matches the whole text.
func (g *Glob) Match(text []byte) bool {
	first, last := &g.segments[0], &g.segments[len(g.segments)-1]
	n, ok := first.here(text)
	if len(g.segments) == 1 {
		return ok && n == len(text)
	}
	if !ok {
		return false
	}
	text = text[n:]
	// The leftmost place for each middle segment is as good as any other: what
	// follows only has more left. So nothing is ever tried twice.
	for i := 1; i < len(g.segments)-1; i++ {
		if text, ok = g.segments[i].find(text); !ok {
			return false
		}
	}
	return last.ends(text)
}

// here matches the segment at the beginning of text and returns its length there.
func (s *segment) here(text []byte) (int, bool) {
	if s.elems == nil {
		return len(s.bytes), bytes.HasPrefix(text, s.bytes)
	}
	i := 0
	for _, e := range s.elems {
		if i == len(text) {
			return 0, false
		}
		char, n := rune(text[i]), 1
		if char >= utf8.RuneSelf {
			char, n = utf8.DecodeRune(text[i:])
		}
		switch {
		case e.kind == 'c' && (char != e.char || char == utf8.RuneError && n == 1),
			e.kind == '[' && (char < utf8.RuneSelf && e.set[char]) == e.not:
			return 0, false
		}
		i += n
	}
	return i, true
}

// find returns what is left after the first place where the segment matches.
func (s *segment) find(text []byte) ([]byte, bool) {
	if s.elems == nil {
		i := bytes.Index(text, s.bytes)
		if i < 0 {
			return nil, false
		}
		return text[i+len(s.bytes):], true
	}
	for len(text) > 0 {
		if n, ok := s.here(text); ok {
			return text[n:], true
		}
		_, n := utf8.DecodeRune(text)
		text = text[n:]
	}
	return nil, false
}

// ends reports whether the segment matches at the end of text, which is as many
// characters before it as the segment has.
func (s *segment) ends(text []byte) bool {
	if s.elems == nil {
		return bytes.HasSuffix(text, s.bytes)
	}
	start := len(text)
	for range s.elems {
		if start == 0 {
			return false
		}
		_, n := utf8.DecodeLastRune(text[:start])
		start -= n
	}
	_, ok := s.here(text[start:])
	return ok
}
