package bed

import (
	"bytes"
	"errors"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"sync"
	"testing"

	"overkeep/tests/need"
)

// ModuleRoot is the directory of go.mod; "go test" runs a test in its package's
// directory, somewhere below.
func ModuleRoot() (string, error) {
	dir, err := os.Getwd()
	if err != nil {
		return "", err
	}
	for {
		if _, err := os.Stat(filepath.Join(dir, "go.mod")); err == nil {
			return dir, nil
		}
		up := filepath.Dir(dir)
		if up == dir {
			return "", errors.New("no go.mod above the working directory")
		}
		dir = up
	}
}

// image returns the path of the suite's image and builds it if there is none.
func image(t testing.TB, suite Suite) string {
	t.Helper()
	root, err := ModuleRoot()
	if err != nil {
		t.Fatalf("bed: %v", err)
	}
	script := filepath.Join(root, "tests", "bed", "rootfs")
	out, err := exec.Command(script, "-p", string(suite)).Output()
	if err != nil {
		t.Fatalf("bed: %s -p %s: %v", script, suite, err)
	}
	path := strings.TrimSpace(string(out))
	if _, err := os.Stat(path); err == nil {
		return path
	}
	need.Tool(t, "mmdebstrap", "mkfs.ext4", "flock")
	var msg bytes.Buffer
	cmd := exec.Command(script, string(suite))
	cmd.Stderr = &msg
	if out, err = cmd.Output(); err != nil {
		need.Missing(t, "a disk image of %s (%v: %s)", suite, err, msg.Bytes())
	}
	return strings.TrimSpace(string(out))
}

var build = sync.OnceValues(func() (string, error) {
	if bin := os.Getenv("OVERKEEP_BINARY"); bin != "" {
		return bin, nil
	}
	root, err := ModuleRoot()
	if err != nil {
		return "", err
	}
	bin := filepath.Join(root, "bin", "overkeep")
	if out, err := exec.Command("make", "-s", "-C", root, "build").CombinedOutput(); err != nil {
		return "", fmt.Errorf("make build: %w: %s", err, out)
	}
	return bin, nil
})

// Binary builds the overkeep binary as "make build" does, once per test process,
// and returns its path. The environment variable OVERKEEP_BINARY names one that
// is there already.
func Binary(t testing.TB) string {
	t.Helper()
	need.Tool(t, "make", "go")
	bin, err := build()
	if err != nil {
		t.Fatalf("bed: %v", err)
	}
	return bin
}
