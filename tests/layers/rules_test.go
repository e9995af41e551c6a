package layers

import (
	"bytes"
	"fmt"
	"go/ast"
	"go/format"
	"go/token"
	"os"
	"path"
	"path/filepath"
	"regexp"
	"slices"
	"strconv"
	"strings"
	"testing"
)

const maxLines = 600 // of a file that is not a test

// topLevel is all there may be beside hidden files and bin/.
var topLevel = []string{
	"cmd", "crypt", "docs", "overlay", "policy", "systemd", "tests",
	"go.mod", "go.sum", "LICENSE", "Makefile", "README.md", "CHANGELOG.md", "SECURITY.md",
}

// library folders only return: nothing is printed, nothing exits.
var library = []string{"crypt", "overlay", "policy", "systemd"}

// exits are the library packages with the main function of a helper process.
var exits = []string{"crypt/crashpoint", "systemd/keep"}

// prints are the functions that write to the process's own outputs.
var prints = regexp.MustCompile(`^(fmt\.Print(f|ln)?|log\.(Print|Fatal|Panic)(f|ln)?)$`)

// breaches lists the house rules a file breaks.
func breaches(s *source) []string {
	var out []string
	say := func(at, f string, a ...any) { out = append(out, at+": "+fmt.Sprintf(f, a...)) }

	if n := bytes.Count(s.text, []byte("\n")); n > maxLines && !s.isTest() {
		say(s.path, "%d lines, more than %d", n, maxLines)
	}
	if formatted, err := format.Source(s.text); err != nil || !bytes.Equal(formatted, s.text) {
		say(s.path, "not as gofmt writes it (make fmt)")
	}
	s.selectors(func(x, name, at string) {
		switch {
		case x == "os" && name == "RemoveAll" && !s.isTest():
			say(at, "os.RemoveAll: a failed unmount must never become a deletion; umount and os.Remove")
		case slices.Contains([]string{"Skip", "Skipf", "SkipNow"}, name) && s.usesTesting() && s.dir() != "tests/need":
			say(at, "%s.%s: what a test needs goes through tests/need", x, name)
		case slices.Contains(library, s.top()) && !s.isTest():
			if x == "os" && name == "Exit" && !slices.Contains(exits, s.dir()) || prints.MatchString(x+"."+name) {
				say(at, "%s.%s: a library returns, it does not print or exit", x, name)
			}
		}
	})
	if !s.isTest() {
		ast.Inspect(s.file, func(n ast.Node) bool {
			if lit, ok := n.(*ast.BasicLit); ok && lit.Kind == token.STRING {
				if v, err := strconv.Unquote(lit.Value); err == nil && strings.HasPrefix(v, "failed to ") {
					say(s.at(lit), "an error that begins with %q; say what failed", "failed to")
				}
			}
			return true
		})
	}
	return out
}

// usesTesting reports whether a file can skip a test at all.
func (s *source) usesTesting() bool {
	uses := s.isTest()
	s.imports(func(p, _ string) { uses = uses || p == "testing" })
	return uses
}

func TestHouseRules(t *testing.T) {
	for _, s := range sources(t) {
		for _, b := range breaches(s) {
			t.Error(b)
		}
	}
}

// The rules catch what they are for.
func TestHouseRulesBite(t *testing.T) {
	long := "package a\n" + strings.Repeat("\nvar _ = 1\n", maxLines/2)
	for _, c := range []struct {
		path, text string
		ok         bool
	}{
		{"overlay/a.go", "package a\n\nfunc f() { os.RemoveAll(x) }\n", false},
		{"overlay/a_test.go", "package a\n\nfunc f() { os.RemoveAll(x) }\n", true},
		{"overlay/a.go", "package a\n\nfunc f() { os.Remove(x) }\n", true},
		{"overlay/a_test.go", "package a\n\nfunc f() { t.Skipf(x) }\n", false},
		{"tests/bed/a.go", "package a\n\nimport \"testing\"\n\nfunc f(t testing.TB) { t.SkipNow() }\n", false},
		{"tests/need/need.go", "package a\n\nimport \"testing\"\n\nfunc f(t testing.TB) { t.Skip() }\n", true},
		{"policy/scan.go", "package a\n\nfunc f() { s.Skip() }\n", true},
		{"policy/a.go", "package  a\n", false},
		{"policy/a.go", long, false},
		{"policy/a_test.go", long, true},
		{"policy/a.go", "package a\n\nvar e = errors.New(\"failed to read\")\n", false},
		{"policy/a.go", "package a\n\nfunc f() { fmt.Println() }\n", false},
		{"policy/a.go", "package a\n\nfunc f() { os.Exit(1) }\n", false},
		{"cmd/overkeep/a.go", "package a\n\nfunc f() { fmt.Println(); os.Exit(1) }\n", true},
	} {
		s, err := parse(c.path, []byte(c.text))
		if err != nil {
			t.Fatal(err)
		}
		if got := breaches(s); (len(got) == 0) != c.ok {
			t.Errorf("%s: %.60q: %q", c.path, c.text, got)
		}
	}
}

// Every package says what it is.
func TestPackageComments(t *testing.T) {
	said := map[string]bool{}
	for _, s := range sources(t) {
		if dir := s.dir(); !s.isTest() {
			said[dir] = said[dir] || s.file.Doc != nil
		}
	}
	for dir, ok := range said {
		if !ok {
			t.Errorf("%s: no package comment", dir)
		}
	}
}

// The top of the tree holds what was agreed and nothing else.
func TestTopLevel(t *testing.T) {
	entries, err := os.ReadDir(root(t))
	if err != nil {
		t.Fatal(err)
	}
	for _, e := range entries {
		if n := e.Name(); !strings.HasPrefix(n, ".") && n != "bin" && !slices.Contains(topLevel, n) {
			t.Errorf("%s does not belong at the top of the tree", n)
		}
	}
}

// A script may not skip itself past tests/need either.
func TestScriptsDoNotSkip(t *testing.T) {
	skip := regexp.MustCompile(`(?m)^\s*(\[[^]]*\]\s*)*skip\b`)
	for _, f := range files(t) {
		if ext := path.Ext(f); ext != ".txtar" && ext != ".txt" || !strings.Contains(f, "/testdata/") {
			continue
		}
		text, err := os.ReadFile(filepath.Join(root(t), f))
		if err != nil {
			t.Fatal(err)
		}
		if script, _, _ := bytes.Cut(text, []byte("\n-- ")); skip.Match(script) {
			t.Errorf("%s: a script that skips; use tests/need in its test", f)
		}
	}
}
