package layers

import (
	"bytes"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"

	"overkeep/tests/need"
)

// tags are those of "make build".
const tags = "osusergo,netgo,sqlite_omit_load_extension"

// docs/dependencies.txt names every module of others with what it is for: the
// ones linked into the commands as "linked", the ones only tests use as "test".
func TestDependencies(t *testing.T) {
	need.Tool(t, "go")
	linked := modules(t, "./cmd/...")
	tested := modules(t, "-test", "./...")
	want := map[string]string{}
	for m := range tested {
		want[m] = "test"
	}
	for m := range linked {
		want[m] = "linked"
	}

	text, err := os.ReadFile(filepath.Join(root(t), "docs", "dependencies.txt"))
	if err != nil {
		t.Fatal(err)
	}
	got, problems := listed(string(text))
	for _, p := range problems {
		t.Errorf("docs/dependencies.txt: %s", p)
	}
	for m, kind := range want {
		switch got[m] {
		case kind:
		case "":
			t.Errorf("docs/dependencies.txt: %s (%s) is missing", m, kind)
		default:
			t.Errorf("docs/dependencies.txt: %s is %q, not %q", m, kind, got[m])
		}
	}
	for m := range got {
		if want[m] == "" {
			t.Errorf("docs/dependencies.txt: %s is not used", m)
		}
	}
}

// listed reads lines of "linked|test MODULE REASON..."; # begins a comment.
func listed(text string) (kinds map[string]string, problems []string) {
	kinds = map[string]string{}
	for line := range strings.Lines(text) {
		f := strings.Fields(line)
		switch {
		case len(f) == 0 || strings.HasPrefix(f[0], "#"):
		case f[0] != "linked" && f[0] != "test" || len(f) < 3:
			problems = append(problems, "not \"linked|test MODULE REASON\": "+strings.TrimSpace(line))
		case kinds[f[1]] != "":
			problems = append(problems, f[1]+" twice")
		default:
			kinds[f[1]] = f[0]
		}
	}
	return kinds, problems
}

// modules are those of others that the packages, with all they import, come from.
func modules(t *testing.T, args ...string) map[string]bool {
	t.Helper()
	cmd := exec.Command("go", append([]string{"list", "-deps", "-tags", tags,
		"-f", "{{with .Module}}{{if not .Main}}{{.Path}}{{end}}{{end}}"}, args...)...)
	cmd.Dir = root(t)
	var msg bytes.Buffer
	cmd.Stderr = &msg
	out, err := cmd.Output()
	if err != nil {
		t.Fatalf("go list %v: %v\n%s", args, err, msg.Bytes())
	}
	set := map[string]bool{}
	for m := range strings.FieldsSeq(string(out)) {
		set[m] = true
	}
	return set
}
