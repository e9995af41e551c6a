package glob

import (
	"math/rand/v2"
	"strings"
	"testing"
	"unicode/utf8"
)

// chars splits a text into what a pattern calls characters.
func chars(s string) (out []string) {
	for len(s) > 0 {
		_, n := utf8.DecodeRuneInString(s)
		out = append(out, s[:n])
		s = s[n:]
	}
	return out
}

// naive matches by trying everything; it shares no code with Match. ok is false if
// the pattern is none.
func naive(pattern, text string) (matched, ok bool) {
	type token struct {
		star    bool
		accepts func(string) bool
	}
	var tokens []token
	p := chars(pattern)
	for i := 0; i < len(p); i++ {
		switch p[i] {
		case "*":
			tokens = append(tokens, token{star: true})
		case "?":
			tokens = append(tokens, token{accepts: func(string) bool { return true }})
		case "]":
			return false, false
		case "\\":
			if i++; i == len(p) || !strings.Contains("\\*?[]\"", p[i]) {
				return false, false
			}
			c := p[i]
			tokens = append(tokens, token{accepts: func(s string) bool { return s == c }})
		case "[":
			i++
			not := i < len(p) && (p[i] == "!" || p[i] == "^")
			if not {
				i++
			}
			members, empty := map[string]bool{}, true
			for ; i < len(p) && p[i] != "]"; i++ {
				next := func() (string, bool) {
					if i < len(p) && p[i] == "\\" {
						if i++; i == len(p) || !strings.Contains("\\*?[]\"-!^", p[i]) {
							return "", false
						}
					} else if i < len(p) && p[i] == "[" {
						return "", false
					}
					return p[min(i, len(p)-1)], i < len(p) && p[i][0] < 128
				}
				low, fine := next()
				if !fine {
					return false, false
				}
				high := low
				if i+2 < len(p) && p[i+1] == "-" && p[i+2] != "]" {
					i += 2
					if high, fine = next(); !fine || high[0] < low[0] {
						return false, false
					}
				}
				for c := int(low[0]); c <= int(high[0]); c++ {
					members[string(rune(c))] = true
				}
				empty = false
			}
			if i >= len(p) || empty {
				return false, false
			}
			tokens = append(tokens, token{accepts: func(s string) bool { return members[s] != not }})
		default:
			c := p[i]
			tokens = append(tokens, token{accepts: func(s string) bool { return s == c }})
		}
	}
	t := chars(text)
	// reach[j]: the tokens so far can match t[:j].
	reach := make([]bool, len(t)+1)
	reach[0] = true
	for _, tok := range tokens {
		next := make([]bool, len(t)+1)
		for j, r := range reach {
			if !r {
				continue
			}
			if tok.star {
				for k := j; k <= len(t); k++ {
					next[k] = true
				}
			} else if j < len(t) && tok.accepts(t[j]) {
				next[j+1] = true
			}
		}
		reach = next
	}
	return reach[len(t)], true
}

func check(t *testing.T, pattern, text string) {
	t.Helper()
	want, ok := naive(pattern, text)
	g, err := Compile(pattern)
	if (err == nil) != ok {
		t.Fatalf("Compile(%q): %v, and the slow matcher says %v", pattern, err, ok)
	}
	if err != nil {
		if e, is := err.(*Error); !is || e.Offset < 0 || e.Offset > len(pattern) {
			t.Fatalf("Compile(%q): %#v is not placed inside", pattern, err)
		}
		return
	}
	if got := g.Match([]byte(text)); got != want {
		t.Fatalf("%q matches %q: %v, want %v", pattern, text, got, want)
	}
	if want && !strings.Contains(text, string(g.Literal())) {
		t.Fatalf("%q matches %q without its literal %q", pattern, text, g.Literal())
	}
	prefix, suffix := g.Anchored()
	if want && (!strings.HasPrefix(text, string(prefix)) || !strings.HasSuffix(text, string(suffix))) {
		t.Fatalf("%q matches %q without %q and %q at its ends", pattern, text, prefix, suffix)
	}
}

func TestAgainstNaive(t *testing.T) {
	r := rand.New(rand.NewPCG(1, 2))
	pick := func(of []string, n int) string {
		var b strings.Builder
		for range r.IntN(n) {
			b.WriteString(of[r.IntN(len(of))])
		}
		return b.String()
	}
	pattern := []string{"a", "b", "-", "é", "*", "*", "?", "[ab]", "[!a]", "[^b-]", "[a-c]", "\\*", "[", "]", "\\", "\xff"}
	text := []string{"a", "b", "c", "-", "é", "*", "/", "\xff", "\xc3", "\xa9"}
	for range 100_000 {
		p := pick(pattern, 8)
		if !utf8.ValidString(p) {
			if _, err := Compile(p); err == nil {
				t.Fatalf("Compile(%q) took what is not UTF-8", p)
			}
			continue
		}
		check(t, p, pick(text, 10))
	}
}

func TestMatch(t *testing.T) {
	for _, c := range []struct {
		pattern, text string
		want          bool
	}{
		{"", "", true},
		{"", "a", false},
		{"*", "", true},
		{"a*a", "a", false},
		{"*-acme-*", "payroll-acme-1.0", true},
		{"*-acme-*", "acme-1.0", false},
		{"tor-browser-*", "tor-browser-13", true},
		{"tor-browser-*", "xtor-browser-13", false},
		{"git+ssh://*acme.example/*", "git+ssh://git@acme.example/a/b", true},
		{"lib?-[0-9]*.drv", "libz-1.drv", true},
		{`\[x\]\"`, `[x]"`, true},
		{"A", "a", false},
	} {
		g, err := Compile(c.pattern)
		if err != nil {
			t.Fatalf("%q: %v", c.pattern, err)
		}
		if got := g.Match([]byte(c.text)); got != c.want {
			t.Errorf("%q on %q: %v", c.pattern, c.text, got)
		}
	}
}

func TestErrors(t *testing.T) {
	for _, c := range []struct {
		pattern string
		offset  int
		msg     string
	}{
		{"a[", 1, `"[" without "]"; write \[ for the character itself`},
		{"a[]b", 1, "an empty set"},
		{"ab]", 2, `"]" without "["; write \] for the character itself`},
		{"[z-a]", 1, "a range that goes backwards"},
		{"[é]", 1, "a set holds ASCII characters only"},
		{`a\n`, 1, `a backslash stands before one of \ * ? [ ] "`},
		{`a\`, 1, `a backslash stands before one of \ * ? [ ] "`},
		{"[[]", 1, `"[" in a set; write \[ for the character itself`},
		{"\xff", 0, "a pattern that is not UTF-8"},
		{strings.Repeat("a", MaxLen+1), 0, "a pattern of more than 1024 bytes"},
	} {
		_, err := Compile(c.pattern)
		e, ok := err.(*Error)
		if !ok || e.Offset != c.offset || e.Msg != c.msg {
			t.Errorf("%.20q: %#v", c.pattern, err)
		}
	}
}

// A pattern made to blow up takes steps of its length times the text's, no more:
// the biggest allowed one over a long text ends at once.
func TestNoBlowUp(t *testing.T) {
	text := []byte(strings.Repeat("a", 100_000))
	for _, p := range []string{
		strings.Repeat("*a", MaxLen/2-1) + "*b",
		strings.Repeat("*?", MaxLen/2-1) + "*b",
		"*" + strings.Repeat("?", MaxLen-3) + "b*",
	} {
		g, err := Compile(p)
		if err != nil {
			t.Fatal(err)
		}
		if g.Match(text) {
			t.Errorf("%.20q... matched", p)
		}
	}
}

func TestEscape(t *testing.T) {
	for _, s := range []string{"", "a", `*?[]\`, `é"-`} {
		if got, ok := Unescape(Escape(s)); !ok || got != s {
			t.Errorf("%q came back as %q, %v", s, got, ok)
		}
	}
	for _, p := range []string{"*", "a?", "[a]", "["} {
		if _, ok := Unescape(p); ok {
			t.Errorf("%q is no plain text", p)
		}
	}
}

func FuzzGlob(f *testing.F) {
	for _, s := range [][2]string{
		{"*-acme-*", "x-acme-1"}, {"*a*a*a*a*b", "aaaaaaaaaaaaaaaa"}, {"[!a-c]?", "zé"}, {`\*[\]]`, "*]"}, {"[", ""},
	} {
		f.Add(s[0], s[1])
	}
	f.Fuzz(func(t *testing.T, pattern, text string) {
		if len(pattern) > 64 || len(text) > 256 {
			return
		}
		if !utf8.ValidString(pattern) {
			if _, err := Compile(pattern); err == nil {
				t.Fatalf("Compile(%q) took what is not UTF-8", pattern)
			}
			return
		}
		check(t, pattern, text)
	})
}
