package keep

import (
	"errors"
	"os"
	"path/filepath"
	"strings"
	"testing"

	"overkeep/overlay/nixconf"
)

func settings(t *testing.T, text string) (Config, error) {
	t.Helper()
	// Roots are short and plain (overlay/layout); t.TempDir need not be.
	root, err := os.MkdirTemp("/tmp", "ok-")
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { os.RemoveAll(root) })
	if err := os.MkdirAll(filepath.Join(root, "etc/overkeep"), 0o755); err != nil {
		t.Fatal(err)
	}
	if err := os.WriteFile(filepath.Join(root, "etc/overkeep/config.toml"), []byte(text), 0o644); err != nil {
		t.Fatal(err)
	}
	return ReadConfig(root)
}

func TestConfig(t *testing.T) {
	if c, err := ReadConfig("/nonexistent"); err != nil || c.Substituters != nixconf.None {
		t.Errorf("no file: %+v, %v", c, err)
	}
	if c, err := settings(t, "# nothing\n"); err != nil || c.Substituters != nixconf.None {
		t.Errorf("an empty file: %+v, %v", c, err)
	}
	if c, err := settings(t, "substituters = \"inherit\"\n"); err != nil || c.Substituters != nixconf.Inherit {
		t.Errorf("inherit: %+v, %v", c, err)
	}
	for text, want := range map[string]string{
		"substituters = \"everybody\"\n":    "everybody",
		"substituter = \"none\"\n":          "substituter",
		"\n\nsubstituters = none\n":         ":3:",
		"substituters = [\"none\"]\n":       "",
		"substituters = \"none\"\n\x00\xff": "",
		strings.Repeat("#", 100<<10):        "",
	} {
		_, err := settings(t, text)
		var e *Error
		if !errors.As(err, &e) || e.Code != CodeUsage || !strings.Contains(e.Message, want) {
			t.Errorf("%.40q: error %v, want one with %q", text, err, want)
		}
	}
}

func FuzzReadConfig(f *testing.F) {
	f.Add("substituters = \"none\"\n")
	f.Add("x = [")
	f.Fuzz(func(t *testing.T, text string) {
		c, err := settings(t, text)
		if err == nil && c.Substituters != nixconf.None && c.Substituters != nixconf.Inherit {
			t.Fatalf("accepted %q as %+v", text, c)
		}
	})
}
