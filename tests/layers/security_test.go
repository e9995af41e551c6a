package layers

import (
	"os"
	"path/filepath"
	"regexp"
	"strings"
	"testing"
)

// A reference to a test in SECURITY.md: `path/of/package TestName`.
var testReference = regexp.MustCompile("`([a-z0-9/]+) ((?:Test|Fuzz)[A-Za-z0-9_]+)`")

// TestPromisesNameTests: every promise in SECURITY.md names a test, and every test
// it names exists.
func TestPromisesNameTests(t *testing.T) {
	root := root(t)
	b, err := os.ReadFile(filepath.Join(root, "SECURITY.md"))
	if err != nil {
		t.Fatal(err)
	}
	_, promises, ok := strings.Cut(string(b), "\n## Promised\n")
	if !ok {
		t.Fatal(`SECURITY.md has no section "Promised"`)
	}
	promises, _, _ = strings.Cut(promises, "\n## ")
	rows := 0
	for line := range strings.Lines(promises) {
		if !strings.HasPrefix(line, "| ") || strings.HasPrefix(line, "| ---") || strings.HasPrefix(line, "| promise") {
			continue
		}
		rows++
		if !testReference.MatchString(line) {
			t.Errorf("SECURITY.md: no test is named for %.80q", line)
		}
	}
	if rows < 10 {
		t.Errorf("SECURITY.md: only %d promises found; has its form changed?", rows)
	}
	for _, m := range testReference.FindAllStringSubmatch(string(b), -1) {
		if !defines(t, filepath.Join(root, m[1]), m[2]) {
			t.Errorf("SECURITY.md names %s in %s, which does not exist", m[2], m[1])
		}
	}
}

func defines(t *testing.T, dir, test string) bool {
	t.Helper()
	files, err := filepath.Glob(filepath.Join(dir, "*_test.go"))
	if err != nil {
		t.Fatal(err)
	}
	for _, f := range files {
		b, err := os.ReadFile(f)
		if err != nil {
			t.Fatal(err)
		}
		if strings.Contains(string(b), "\nfunc "+test+"(") {
			return true
		}
	}
	return false
}
