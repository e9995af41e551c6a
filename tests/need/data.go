package need

import (
	"bytes"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"
)

// Data needs a file of the real data that is kept beside the repository, in
// ../shared/data of the checkout (of the main one, if this is a worktree of it),
// or in the directory OVERKEEP_DATA. A user's clone does not have it.
func Data(t testing.TB, name string) string {
	t.Helper()
	dirs := []string{os.Getenv("OVERKEEP_DATA")}
	if dirs[0] == "" {
		dirs = nil
		if top, err := moduleRoot(); err == nil {
			dirs = append(dirs, filepath.Join(top, "..", "shared", "data"))
			out, err := exec.Command("git", "-C", top, "rev-parse", "--path-format=absolute", "--git-common-dir").Output()
			if err == nil {
				main := filepath.Dir(strings.TrimSpace(string(out)))
				dirs = append(dirs, filepath.Join(main, "..", "shared", "data"))
			}
		}
	}
	for _, d := range dirs {
		if file := filepath.Join(d, name); readable(file) {
			return file
		}
	}
	Missing(t, "the real data %q (looked in %q)", name, dirs)
	return ""
}

// DataZstd is the content of a file of the real data that zstd compressed.
func DataZstd(t testing.TB, name string) []byte {
	t.Helper()
	file := Data(t, name)
	Tool(t, "zstd")
	cmd := exec.Command("zstd", "-dcq", file)
	var stderr bytes.Buffer
	cmd.Stderr = &stderr
	out, err := cmd.Output()
	if err != nil {
		t.Fatalf("zstd -d %s: %v: %s", file, err, stderr.Bytes())
	}
	return out
}

func readable(file string) bool {
	f, err := os.Open(file)
	if err == nil {
		f.Close()
	}
	return err == nil
}

// moduleRoot is the directory of go.mod, at or above the working directory.
func moduleRoot() (string, error) {
	dir, err := os.Getwd()
	for err == nil && dir != filepath.Dir(dir) {
		if _, err := os.Stat(filepath.Join(dir, "go.mod")); err == nil {
			return dir, nil
		}
		dir = filepath.Dir(dir)
	}
	return "", os.ErrNotExist
}
