package boundary

import (
	"encoding/json"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"sync"
	"testing"

	"overkeep/tests/bed"
	"overkeep/tests/need"
)

var build = sync.OnceValues(func() (string, error) {
	root, err := bed.ModuleRoot()
	if err != nil {
		return "", err
	}
	bin := filepath.Join(root, "bin", "boundary")
	// flock: test packages run side by side, and each builds it.
	cmd := exec.Command("flock", "bin/.lock", "go", "build", "-trimpath", "-buildvcs=false", "-o", bin, "./tests/boundary/tool")
	cmd.Dir, cmd.Env = root, append(os.Environ(), "CGO_ENABLED=0")
	if err := os.MkdirAll(filepath.Dir(bin), 0o755); err != nil {
		return "", err
	}
	if out, err := cmd.CombinedOutput(); err != nil {
		return "", fmt.Errorf("build the boundary tool: %w: %s", err, out)
	}
	return bin, nil
})

// Binary builds the tool, static, once per test process, and returns its path.
func Binary(t testing.TB) string {
	t.Helper()
	need.Tool(t, "go", "flock")
	bin, err := build()
	if err != nil {
		t.Fatal(err)
	}
	return bin
}

// ReadReport reads what the tool wrote with -report.
func ReadReport(file string) (Report, error) {
	var r Report
	b, err := os.ReadFile(file)
	if err != nil {
		return r, err
	}
	if err := json.Unmarshal(b, &r); err != nil {
		return r, fmt.Errorf("%s: %w", file, err)
	}
	return r, nil
}
