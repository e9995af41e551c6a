package layers

import (
	"fmt"
	"slices"
	"strings"
	"testing"
)

// arrows says which top folders a folder's packages may import, beside their own
// neighbours: cmd -> systemd -> overlay -> policy, and systemd -> crypt. The
// tests may import anything.
var arrows = map[string][]string{
	"policy":  {},
	"crypt":   {},
	"overlay": {"policy"},
	"systemd": {"overlay", "policy", "crypt"},
	"cmd":     {"systemd", "overlay", "policy", "crypt"},
}

// guarded are packages with sharp edges, and who may hold them. An entry "x"
// is the package x alone, "x/..." also what lies below.
var guarded = map[string][]string{
	"golang.org/x/sys/unix": {
		"cmd/...", "crypt/crashpoint", "crypt/secret", "crypt/slot", "crypt/volume",
		"overlay/cache", "overlay/gcroot", "overlay/holder", "overlay/lower", "overlay/move", "overlay/nixdb", "overlay/pins",
		"overlay/provenance", "overlay/roots", "overlay/signature", "overlay/tree", "overlay/verdict", "overlay/view", "overlay/wipe",
		"systemd/doctor", "systemd/keep", "tests/...",
	},
	"syscall":                     {"cmd/...", "crypt/crashpoint", "systemd/keep", "tests/..."},
	"os/exec":                     {"cmd/...", "crypt/volume", "overlay/view", "systemd/doctor", "systemd/keep", "tests/..."},
	"unsafe":                      {"crypt/volume", "overlay/holder", "overlay/nixdb/batch", "overlay/wipe", "tests/..."},
	"C":                           {"overlay/nixdb/batch"}, // many rows of SQLite a call
	"github.com/mattn/go-sqlite3": {"overlay/nixdb/...", "tests/storegen"},
	"database/sql":                {"overlay/nixdb", "tests/storegen"},
	"filippo.io/age":              {"crypt/secret", "crypt/slot", "systemd/keep", "cmd/..."},
	"github.com/google/fscrypt":   {"crypt/volume"},
	"github.com/spf13/cobra":      {"cmd/..."},
	"net/http":                    {"systemd/...", "tests/..."},
}

// impure may not be imported by policy: it decides, it does not act.
var impure = []string{"os", "io/fs", "io/ioutil", "net", "syscall", "unsafe", "C", "log", "plugin", "time",
	"database", "golang.org/x/sys", "github.com"}

// under reports whether path is prefix or lies below it.
func under(path, prefix string) bool {
	return path == prefix || strings.HasPrefix(path, prefix+"/")
}

// broken lists what a file imports against the rules. Only what is linked into
// the product counts; a test may import what it needs.
func broken(s *source) []string {
	if s.isTest() {
		return nil
	}
	var out []string
	s.imports(func(imp, at string) {
		if ours, ok := strings.CutPrefix(imp, module+"/"); ok {
			top, _, _ := strings.Cut(ours, "/")
			if allowed, is := arrows[s.top()]; is && top != s.top() && !slices.Contains(allowed, top) {
				out = append(out, fmt.Sprintf("%s: %s may not import %s", at, s.top(), top))
			}
		}
		if s.top() == "policy" {
			for _, p := range impure {
				if under(imp, p) {
					out = append(out, fmt.Sprintf("%s: policy is pure and may not import %s", at, imp))
				}
			}
		}
		for pkg, holders := range guarded {
			if under(imp, pkg) && !slices.ContainsFunc(holders, func(h string) bool {
				dir, deep := strings.CutSuffix(h, "/...")
				return s.dir() == dir || deep && under(s.dir(), dir)
			}) {
				out = append(out, fmt.Sprintf("%s: %s is not one of those that may import %s", at, s.dir(), pkg))
			}
		}
	})
	return out
}

func TestImports(t *testing.T) {
	for _, s := range sources(t) {
		for _, b := range broken(s) {
			t.Error(b)
		}
	}
}

// The rules catch what they are for.
func TestImportsBite(t *testing.T) {
	for _, c := range []struct {
		path, imp string
		ok        bool
	}{
		{"policy/lang/a.go", "overkeep/policy/graph", true},
		{"policy/a.go", "overkeep/overlay", false},
		{"policy/a.go", "overkeep/crypt/secret", false},
		{"policy/a.go", "os", false},
		{"policy/a.go", "os/exec", false},
		{"policy/a.go", "database/sql", false},
		{"policy/a.go", "golang.org/x/sys/unix", false},
		{"policy/a.go", "strings", true},
		{"policy/a_test.go", "os", true},
		{"crypt/volume/a.go", "overkeep/crypt/secret", true},
		{"crypt/volume/a.go", "overkeep/overlay/view", false},
		{"crypt/volume/a.go", "github.com/mattn/go-sqlite3", false},
		{"overlay/a.go", "overkeep/policy", true},
		{"overlay/a.go", "overkeep/crypt/secret", false},
		{"overlay/a.go", "overkeep/systemd", false},
		{"systemd/a.go", "overkeep/crypt/slot", true},
		{"systemd/a.go", "overkeep/cmd/overkeep/ui", false},
		{"cmd/overkeep/a.go", "overkeep/overlay", true},
		{"cmd/overkeep/a.go", "overkeep/tests/bed", false},
		{"overlay/a.go", "filippo.io/age/plugin", false},
		{"overlay/a.go", "github.com/spf13/cobra/doc", false},
		{"tests/bed/a.go", "overkeep/overlay", true},
	} {
		s, err := parse(c.path, fmt.Appendf(nil, "package a\n\nimport %q\n", c.imp))
		if err != nil {
			t.Fatal(err)
		}
		if got := broken(s); (len(got) == 0) != c.ok {
			t.Errorf("%s imports %s: %q", c.path, c.imp, got)
		}
	}
}
