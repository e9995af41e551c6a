package policy

import (
	"errors"
	"fmt"
	"strings"
	"testing"
	"unicode/utf8"
)

const exampleKey = "cache.nixos.org-1:6NCHdD59X431o0gWypbMrAURkbJ16ZPMQFGspcDShjY="

const example = `# A NixOS that still boots, and a client's work that stays private
key ` + exampleKey + `
let boot = closure-of /run/current-system
system   signed-by cache.nixos.org-1
system   boot
personal name "*-acme-*"
personal built-from (name "*-acme-*")
personal from "git+ssh://*acme.example/*"   when known
personal unfree                             when known
require  system boot
`

const exampleCanonical = `key ` + exampleKey + `
let boot = closure-of /run/current-system
system signed-by cache.nixos.org-1
system boot
personal name "*-acme-*"
personal built-from (name "*-acme-*")
personal from "git+ssh://*acme.example/*" when known
personal unfree when known
require system boot
`

// The canonical form of what can be said, each on a line: left as written, right as
// printed if that differs.
var canonical = []struct{ text, want string }{
	{example, exampleCanonical},
	{"", ""},
	{"# nothing", ""},
	{"personal unfree", "personal unfree\n"},
	{"system ((name a))", "system name \"a\"\n"},
	{"system (name a or name b) or name c", "system name \"a\" or name \"b\" or name \"c\"\n"},
	{"system (name a or name b) and name c", "system (name \"a\" or name \"b\") and name \"c\"\n"},
	{"system name a or (name b and name c)", "system name \"a\" or name \"b\" and name \"c\"\n"},
	{"system not(not unfree)", "system not not unfree\n"},
	{"system not (unfree and unsigned)", "system not (unfree and unsigned)\n"},
	{"system not unfree and unsigned", "system not unfree and unsigned\n"},
	{"system depends-on(built-from(unfree or built-here))", "system depends-on (built-from (unfree or built-here))\n"},
	{"system closure-of hello-*", "system closure-of \"hello-*\"\n"},
	{"system closure-of \"/nix/store/abc-x\"", "system closure-of /nix/store/abc-x\n"},
	{"system closure-of /nix/store/*-x", "system closure-of \"/nix/store/*-x\"\n"},
	{"system closure-of \"/home/a b/.nix-profile\"", "system closure-of \"/home/a b/.nix-profile\"\n"},
	{"system larger-than 1024K", "system larger-than 1M\n"},
	{"system larger-than 0", "system larger-than 0\n"},
	{"system larger-than 1025", "system larger-than 1025\n"},
	{"system licence \"unfree\" and kind fixed-output", "system licence \"unfree\" and kind fixed-output\n"},
	{`system from "a\"b\\c\*[x\]]"`, `system from "a\"b\\c\*[x\]]"` + "\n"},
	{"let a=unfree\nsystem a", "let a = unfree\nsystem a\n"},
	{"system b\r\nlet b = unfree\r\n", "system b\nlet b = unfree\n"},
	{"system (name a\n  or name b # why\n\n  or name c)\n", "system name \"a\" or name \"b\" or name \"c\"\n"},
	{"system name a or\n  name b\n  and name c\npersonal unfree\n  when known", "system name \"a\" or name \"b\" and name \"c\"\npersonal unfree when known\n"},
	{"system unfree\nsystem unfree", "system unfree\nsystem unfree\n"},
	{"let a = unfree\nlet a = (unfree)\nsystem a", "let a = unfree\nlet a = unfree\nsystem a\n"},
	{"\tpersonal unfree   ", "personal unfree\n"},
}

func TestCanonicalForm(t *testing.T) {
	for _, c := range canonical {
		p := mustParse(t, Source{"policy", []byte(c.text), true})
		if got := p.String(); got != c.want {
			t.Errorf("%q is printed as\n%s, not\n%s", c.text, got, c.want)
			continue
		}
		again := mustParse(t, p.Sources()...)
		if again.String() != c.want || !same(p, again) {
			t.Errorf("%q is another policy after printing", c.text)
		}
	}
}

// same reports whether two policies mean the same, line by line.
func same(p, q *Policy) bool {
	if len(p.Rules) != len(q.Rules) || len(p.Keys) != len(q.Keys) {
		return false
	}
	for i := range p.Keys {
		if p.Keys[i].String() != q.Keys[i].String() {
			return false
		}
	}
	for i, r := range p.Rules {
		s := q.Rules[i]
		if r.Verb != s.Verb || r.WhenKnown != s.WhenKnown || r.Root != s.Root || r.Text != s.Text ||
			p.prog.nodes[r.cond].hash != q.prog.nodes[s.cond].hash {
			return false
		}
	}
	return true
}

func TestRandomPoliciesPrint(t *testing.T) {
	for seed := range uint64(2000) {
		p := mustParse(t, text(newMaker(seed).lines(true)))
		if again := mustParse(t, p.Sources()...); !same(p, again) || again.String() != p.String() {
			t.Fatalf("seed %d: another policy after printing:\n%s", seed, p)
		}
	}
}

func repeat(n int, f func(i int) string) string {
	var b strings.Builder
	for i := range n {
		b.WriteString(f(i))
	}
	return b.String()
}

// What must be refused, each with all that is said.
var hostile = []struct{ name, text, want string }{
	{"misspelt term", "personal unfre", `policy:1:10: unknown condition "unfre"; did you mean "unfree"?`},
	{"misspelt verb", "perosnal unfree", `policy:1:1: a line begins with system, personal, require, let or key; did you mean "personal"?`},
	{"no verb", "unfree", `policy:1:1: a line begins with system, personal, require, let or key; a condition stands after one of them`},
	{"undeclared key", "system signed-by x-2", `policy:1:18: key "x-2" is not declared; add a line: key x-2:<base64>`},
	{"misspelt let", "let boot = unfree\nsystem boto", `policy:2:8: unknown condition "boto"; did you mean "boot"?`},
	{"a bare pattern", "personal *-acme-*", `policy:1:10: unknown condition "*-acme-*"; a pattern stands after name, licence, from or closure-of`},
	{"term that takes nothing", "personal unfree \"x\"", `policy:1:17: "and", "or" or the end of the line is wanted here, not a string`},
	{"let that takes nothing", "let a = unfree\npersonal a \"x\"", `policy:2:10: "a" is a let, and nothing stands after it but and, or and )`},
	{"unknown with an argument", "personal nmae \"x-*\"", `policy:1:10: unknown condition "nmae"; did you mean "name"?`},
	{"misspelt kind", "personal kind sorce", `policy:1:15: unknown kind "sorce"; there are source, derivation, output and fixed-output; did you mean "source"?`},
	{"all errors at once", "personal unfre\nsystem nam x\n\nlet a = b\n", `policy:1:10: unknown condition "unfre"; did you mean "unfree"?
policy:2:8: unknown condition "nam"; did you mean "name"?
policy:4:9: unknown condition "b"`},
	{"when known on a grant", "system unfree when known", `policy:1:15: "when known" belongs to personal lines; a system line never counts what is not known`},
	{"when known on a require", "require system unfree when known", `policy:1:23: "when known" belongs to personal lines; a require line never counts what is not known`},
	{"when alone", "personal unfree when", `policy:1:21: "known" is wanted after "when"`},
	{"when known twice", "personal unfree when known when known", `policy:1:28: "when known" stands once, at the end of a personal line`},
	{"when known within", "personal (unfree when known)", `policy:1:18: "and", "or" or ")" is wanted here, not "when"`},
	{"require personal", "require personal unfree", `policy:1:9: "system" is wanted after "require"`},
	{"nothing after the verb", "system", `policy:1:7: a condition is wanted here, not the end of the file`},
	{"nothing after or", "system unfree or\nsystem unfree", `policy:1:17: a condition is wanted here, not the end of the line`},
	{"no pattern", "personal name\n", `policy:1:14: a pattern such as "hello-*" is wanted after "name"`},
	{"word as a pattern", "personal licence unfree", `policy:1:18: a pattern such as "gpl*" is wanted after "licence"; "unfree" is a word of the language, put it in quotes if you mean it`},
	{"empty pattern", `personal name ""`, `policy:1:15: a pattern such as "hello-*" is wanted after "name", not an empty string`},
	{"pattern with a hole", `personal name "a[b"`, `policy:1:17: "[" without "]"; write \[ for the character itself`},
	{"escape", `personal name "a\n"`, `policy:1:17: a backslash stands before one of \ * ? [ ] "`},
	{"path as a name", "personal name /nix/store/x", `policy:1:15: a name is what follows the hash in a store path, and has no slash`},
	{"file below a store path", "system closure-of /nix/store/a/bin", `policy:1:19: a store path is wanted, and nothing below it: /nix/store/HASH-NAME`},
	{"the store", "system closure-of /nix/store", `policy:1:19: a profile is the path of a link, without dots and doubled or trailing slashes`},
	{"dots in a profile", "system closure-of /a/../b", `policy:1:19: a profile is the path of a link, without dots and doubled or trailing slashes`},
	{"pattern as a profile", "system closure-of /home/*/x", `policy:1:19: a profile is one path, not a pattern`},
	{"relative profile", "system closure-of ./result", `policy:1:19: the path of a profile begins with a slash`},
	{"pattern as a key", "system signed-by cache*", `policy:1:18: signed-by takes the name of one key, not a pattern`},
	{"sizes", "personal larger-than 10MB\npersonal larger-than 9999999999G\npersonal larger-than -1\npersonal larger-than K",
		`policy:1:22: a size is a number of bytes, or one with K, M, G or T (1024 each): 10M
policy:2:22: a size is a number of bytes, or one with K, M, G or T (1024 each): 10M
policy:3:22: a size is a number of bytes, or one with K, M, G or T (1024 each): 10M
policy:4:22: a size is a number of bytes, or one with K, M, G or T (1024 each): 10M`},
	{"no parentheses", "personal depends-on unfree", `policy:1:21: "(" is wanted after "depends-on": depends-on (name "x-*")`},
	{"open parenthesis", "personal (unfree\nsystem unsigned", `policy:1:10: "(" is not closed`},
	{"open parenthesis at the end", "personal (unfree", `policy:1:10: "(" is not closed`},
	{"closed parenthesis", "personal unfree)", `policy:1:16: ")" without "("`},
	{"open string", "personal name \"abc\nsystem unsigned", `policy:1:15: a string without its closing quote`},
	{"quote within a word", `personal name a"b"`, `policy:1:16: "\"" inside a word; put the whole word in quotes`},
	{"comment within a word", `personal from https://x#y`, `policy:1:24: "#" inside a word; put the whole word in quotes, or a space before a comment`},
	{"glued to a string", `personal name "a"b`, `policy:1:18: a space is missing after the string`},
	{"two arguments", `personal name a b`, `policy:1:17: "and", "or" or the end of the line is wanted here, not "b"`},
	{"key twice", "key " + testKeys[0] + "\nkey one-1:" + strings.Repeat("B", 42) + "A=", `policy:2:5: key "one-1" is declared with another value too`},
	{"short key", "key x-1:AAAA\nsystem signed-by x-1", `policy:1:5: not a public key as in nix.conf: NAME:BASE64, with 32 bytes in the base 64`},
	{"nameless key", "key :" + strings.Repeat("A", 43) + "=", `policy:1:5: not a public key as in nix.conf: NAME:BASE64, with 32 bytes in the base 64`},
	{"let twice", "let a = unfree\nlet a = unsigned", `policy:2:5: let "a" means something else at policy:1`},
	{"let of a word", "let name = unfree\nlet 1x = unfree\nlet = unfree\nlet x unfree", `policy:1:5: "name" is a word of the language and cannot be a name
policy:2:5: a name is made of letters, digits, - and _, begins with a letter and has at most 64 characters
policy:3:5: a name is wanted after "let"
policy:4:7: "=" is wanted after the name`},
	{"a broken let is missed once", "let a = unfre x y\npersonal a", `policy:1:17: "and", "or" or the end of the line is wanted here, not "y"`},
	{"cyclic lets", "let a = b\nlet b = not c\nlet c = unfree or a\nsystem a", `policy:1:5: let "a" is defined by itself: a -> b -> c -> a`},
	{"let of itself", "let a = a", `policy:1:5: let "a" is defined by itself: a -> a`},
	{"long cycle", repeat(500, func(i int) string { return fmt.Sprintf("let x%03d = x%03d\n", i, (i+1)%500) }),
		`policy:1:5: let "x000" is defined by itself: x000 -> x001 -> x002 -> x003 -> x004 -> x005 -> x006 -> x007 -> … -> x000`},
	{"invalid UTF-8", "personal name \"\xff\"", `policy:1:16: a byte that is not UTF-8 (0xff)`},
	{"invalid UTF-8 in a comment", "# \xc3", `policy:1:3: a byte that is not UTF-8 (0xc3)`},
	{"zero", "personal name a\x00b", `policy:1:16: a control character (U+0000)`},
	{"escape sequence", "personal name \"\x1b[31m\"", `policy:1:16: a control character (U+001B)`},
	{"carriage return", "personal unfree\rsystem unsigned", `policy:1:16: a control character (U+000D)`},
	{"right to left", "system unsigned # \u202e", `policy:1:19: a control character (U+202E)`},
	{"Arabic letter mark", "system unsigned # \u061c", `policy:1:19: a control character (U+061C)`},
	{"tag", "personal name \"a\U000e0020*\"", `policy:1:17: a control character (U+E0020)`},
	{"key of zeros", "key a-1:AAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAA=\nsystem signed-by a-1", `policy:1:5: under this key anybody can sign; zeros do not stand for no key`},
	{"byte order mark", "\ufeffpersonal unfree", `policy:1:1: a control character (U+FEFF)`},
	{"position in characters", "personal name \"é€\" unfre", `policy:1:20: "and", "or" or the end of the line is wanted here, not "unfre"`},
	{"10 MB", strings.Repeat("personal unfree\n", 10<<20/16), `policy:1:1: a policy file of 10485760 bytes; 1048576 are the most`},
	{"deep parentheses", "system " + strings.Repeat("(", 5000) + "unfree" + strings.Repeat(")", 5000), `policy:1:108: more than 100 levels of parentheses and nots`},
	{"deep nots", "system " + strings.Repeat("not ", 5000) + "unfree", `policy:1:408: more than 100 levels of parentheses and nots`},
	{"deep terms", "system " + strings.Repeat("depends-on (", 5000) + "unfree" + strings.Repeat(")", 5000), `policy:1:1219: more than 100 levels of parentheses and nots`},
	{"many lines", strings.Repeat("personal unfree\n", MaxLines+1), `policy:4097:1: more than 4096 lines in the policy`},
	{"many conditions", "system " + repeat(maxConditions+1, func(i int) string { return fmt.Sprintf("larger-than %d or ", i) }) + "unfree",
		`policy:1:332974: more than 16384 different conditions in the policy`},
	{"many closures", "system " + repeat(maxClosures, func(i int) string { return fmt.Sprintf("closure-of /p/%d or ", i) }) + "built-from (unfree)",
		`policy:1:2586: more than 128 different closure-of, depends-on and built-from in the policy`},
	{"long pattern", `personal name "` + strings.Repeat("a", 2000) + `"`, `policy:1:15: a pattern of more than 1024 bytes`},
	{"long word", `personal name ` + strings.Repeat("a", 5000), `policy:1:15: a word of 5000 bytes; 4096 are the most`},
	{"long unknown word", `personal ` + strings.Repeat("é", 500), `policy:1:10: unknown condition "` + strings.Repeat("é", 64) + `…"`},
	{"many errors", strings.Repeat("x\n", 1000), strings.TrimPrefix(repeat(MaxErrors, func(i int) string {
		return fmt.Sprintf("\npolicy:%d:1: a line begins with system, personal, require, let or key", i+1)
	})+"\nand 980 more", "\n")},
}

func TestHostile(t *testing.T) {
	for _, c := range hostile {
		_, err := Parse(Source{"policy", []byte(c.text), true})
		if err == nil {
			t.Errorf("%s: taken", c.name)
			continue
		}
		if got := err.Error(); got != c.want {
			t.Errorf("%s:\n got %s\nwant %s", c.name, got, c.want)
		}
		placed(t, c.name, err, Source{"policy", []byte(c.text), true})
	}
}

// placed checks that errors are of the right type and lie inside the sources.
func placed(t testing.TB, name string, err error, sources ...Source) {
	t.Helper()
	var errs *Errors
	if !errors.As(err, &errs) || len(errs.List) == 0 || len(errs.List) > MaxErrors {
		t.Fatalf("%s: %T", name, err)
	}
	for _, e := range errs.List {
		inside := false
		for _, s := range sources {
			lines := strings.Split(string(s.Text), "\n")
			inside = inside || e.Source == s.Name && e.Line >= 1 && e.Line <= len(lines) &&
				e.Col >= 1 && e.Col <= utf8.RuneCountInString(lines[e.Line-1])+1
		}
		if !inside {
			t.Errorf("%s: %s lies outside", name, e)
		}
		if d := e.Detail(); strings.Count(d, "\n") > 2 || !utf8.ValidString(d) || len(d) > 2000 {
			t.Errorf("%s: detail %q", name, d)
		}
	}
}

// What a user's file may not do, and what it may.
func TestUsersFile(t *testing.T) {
	root := Source{"policy", []byte("key " + testKeys[0] + "\nlet public = signed-by one-1\nsystem public\nlet other = unfree"), true}
	for _, c := range []struct{ text, want string }{
		{"system unfree", `alice:1:1: only root's policy may hold "system" lines; a user's file may hold personal, let and key lines`},
		{"require system unfree", `alice:1:1: only root's policy may hold "require" lines; a user's file may hold personal, let and key lines`},
		{"key one-1" + strings.TrimPrefix(testKeys[1], "two-1"), `alice:1:5: key "one-1" is root's, with another value; a user's file cannot change it`},
		{"let public = unsigned", `alice:1:5: let "public" is root's (policy:2); a user's file cannot change what it means`},
		{"let public = signed-by one-1", `alice:1:5: let "public" is root's (policy:2); a user's file cannot change what it means`},
		{"personal signed-by two-1", `alice:1:20: key "two-1" is not declared; add a line: key two-1:<base64>`},
		{"personal unfre\nsystem x", "alice:1:10: unknown condition \"unfre\"; did you mean \"unfree\"?\n" +
			`alice:2:1: only root's policy may hold "system" lines; a user's file may hold personal, let and key lines`},
	} {
		for _, order := range [][]Source{{root, {"alice", []byte(c.text), false}}, {{"alice", []byte(c.text), false}, root}} {
			if _, err := Parse(order...); err == nil || err.Error() != c.want {
				t.Errorf("%q:\n got %v\nwant %s", c.text, err, c.want)
			}
		}
	}
	_, err := Parse(Source{"policy", []byte("system mine"), true}, Source{"alice", []byte("let mine = unfree"), false})
	if want := `policy:1:8: unknown condition "mine"; root's policy does not see the lets of a user's file`; err == nil || err.Error() != want {
		t.Errorf("got %v\nwant %s", err, want)
	}
	_, err = Parse(Source{"policy", []byte("system signed-by two-1"), true}, Source{"alice", []byte("key " + testKeys[1]), false})
	if want := `policy:1:18: key "two-1" is not declared; root's policy does not see the keys of a user's file`; err == nil || err.Error() != want {
		t.Errorf("got %v\nwant %s", err, want)
	}
	p := mustParse(t, root, Source{"alice", []byte("personal mine and not public\nlet mine = name a or other"), false})
	if r := p.Rules[1]; r.Root || r.Verb != Veto || r.Pos.String() != "alice:1:1" {
		t.Errorf("%+v", r)
	}
	if r := p.Rules[1]; !r.Mentions("mine") || !r.Mentions("unfree") || !r.Mentions("signed-by") || r.Mentions("from") {
		t.Error("what the line mentions")
	}
}

func TestTooManyFiles(t *testing.T) {
	_, err := Parse(make([]Source, MaxSources+1)...)
	if err == nil || !strings.Contains(err.Error(), "more than 256 policy files") {
		t.Error(err)
	}
}

func TestCaret(t *testing.T) {
	_, err := Parse(Source{"p", []byte("\tpersonal\tnmae\t\"x\"  # é\n"), true})
	want := "p:1:11: unknown condition \"nmae\"; did you mean \"name\"?\n    \tpersonal\tnmae\t\"x\"  # é\n    \t        \t^~~~"
	if got := err.(*Errors).Detail(); got != want {
		t.Errorf("got\n%s\nwant\n%s", got, want)
	}
	_, err = Parse(Source{"p", []byte("personal name \"" + strings.Repeat("a", 900) + "\" and unfre # " + strings.Repeat("b", 900)), true})
	if got := err.(*Errors).Detail(); len(got) > 500 || !strings.Contains(got, "unfre") {
		t.Errorf("got\n%s", got)
	}
}

// Lets that double a hundred times are as small as they are written.
func TestLetsDoNotBlowUp(t *testing.T) {
	text := "let x0 = unfree or name a\nsystem x4000\n" + repeat(4000, func(i int) string {
		return fmt.Sprintf("let x%d = x%d and not (not x%d or x%d)\n", i+1, i, i, i)
	})
	p := mustParse(t, Source{"policy", []byte(text), true})
	if len(p.prog.nodes) > 20_000 {
		t.Errorf("%d nodes", len(p.prog.nodes))
	}
	g := newMaker(1).graph()
	v := mustDecide(t, g, p)
	for id := range ID(g.Len()) {
		v.Why(id)
	}
}

func TestRootsAndNeeds(t *testing.T) {
	p := mustParse(t, Source{"policy", []byte(example), true})
	if got := fmt.Sprint(p.Roots()); got != "[/run/current-system]" {
		t.Error(got)
	}
	if got := p.Needs(); got != (Needs{true, true, false, true, true}) {
		t.Errorf("%+v", got)
	}
	// A let that no rule uses asks for nothing.
	p = mustParse(t, Source{"policy", []byte("let a = closure-of /x\nlet b = a\npersonal name x"), true})
	if p.Roots() != nil || p.Needs() != (Needs{}) {
		t.Error(p.Roots(), p.Needs())
	}
}
