package need

import (
	"fmt"
	"os"
	"path/filepath"
	"strings"
	"testing"

	"overkeep/tests/bed/loop"
)

// fake records how a test would have ended.
type fake struct {
	testing.TB
	fatal, skip string
}

func (f *fake) Helper()                   {}
func (f *fake) Fatalf(s string, a ...any) { f.fatal = fmt.Sprintf(s, a...) }
func (f *fake) Skipf(s string, a ...any)  { f.skip = fmt.Sprintf(s, a...) }

// What is missing fails in CI and skips elsewhere, and says what it was.
func TestMissing(t *testing.T) {
	for _, c := range []struct {
		ci    string
		fatal bool
	}{{"", false}, {"false", false}, {"true", true}, {"1", true}} {
		t.Setenv("CI", c.ci)
		f := &fake{TB: t}
		Tool(f, "no-such-program-anywhere")
		if got := f.fatal != ""; got != c.fatal || (f.skip != "") == c.fatal {
			t.Errorf("CI=%q: fatal %q, skip %q", c.ci, f.fatal, f.skip)
		}
		if !strings.Contains(f.fatal+f.skip, "no-such-program-anywhere") {
			t.Errorf("CI=%q: reason does not name the program: %q", c.ci, f.fatal+f.skip)
		}
	}
}

// The probes leave no loop device and no file behind, whatever they say.
func TestProbesLeaveNothing(t *testing.T) {
	tmp := t.TempDir()
	t.Setenv("TMPDIR", tmp)
	Encryption(t)
	OverlayFS(t)
	Namespaces(t)
	devs, err := loop.Backed(tmp)
	if err != nil || len(devs) > 0 {
		t.Errorf("loop devices: %v, %v", devs, err)
	}
	left, err := os.ReadDir(tmp)
	if err != nil || len(left) > 0 {
		t.Errorf("files: %v, %v", left, err)
	}
}

func TestData(t *testing.T) {
	dir := t.TempDir()
	t.Setenv("OVERKEEP_DATA", dir)
	t.Setenv("CI", "true")
	f := &fake{TB: t}
	Data(f, "x")
	if !strings.Contains(f.fatal, `"x"`) || f.skip != "" {
		t.Errorf("missing in CI: %q %q", f.fatal, f.skip)
	}
	t.Setenv("CI", "false")
	f = &fake{TB: t}
	Data(f, "x")
	if f.fatal != "" || f.skip == "" {
		t.Errorf("missing elsewhere: %q %q", f.fatal, f.skip)
	}
	if err := os.WriteFile(filepath.Join(dir, "x"), nil, 0o600); err != nil {
		t.Fatal(err)
	}
	if got := Data(t, "x"); got != filepath.Join(dir, "x") {
		t.Errorf("found %q", got)
	}
}
