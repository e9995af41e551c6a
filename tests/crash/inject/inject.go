// Package inject builds the overkeep command with its crash points armed (build
// tag "inject", see overkeep/crypt/crashpoint), for tests that stop or kill it
// exactly between two steps.
//
// Start with m.Install(t, inject.Binary(t)). Do not use it where the plain
// command will do: that is bed.Binary.
package inject

import (
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"sync"
	"testing"

	"overkeep/tests/bed"
	"overkeep/tests/need"
)

// tags are the Makefile's, and ours.
const tags = "osusergo,netgo,sqlite_omit_load_extension,inject"

var build = sync.OnceValues(func() (string, error) {
	if bin := os.Getenv("OVERKEEP_INJECT_BINARY"); bin != "" {
		return bin, nil
	}
	root, err := bed.ModuleRoot()
	if err != nil {
		return "", err
	}
	const bin = "bin/overkeep-inject"
	if out, err := exec.Command("make", "-s", "-C", root, "build", "BIN="+bin, "TAGS="+tags).CombinedOutput(); err != nil {
		return "", fmt.Errorf("make build TAGS=%s: %w: %s", tags, err, out)
	}
	return filepath.Join(root, bin), nil
})

// Binary builds the command, once per test process, and returns its path. The
// environment variable OVERKEEP_INJECT_BINARY names one that is there already.
func Binary(t testing.TB) string {
	t.Helper()
	need.Tool(t, "make", "go")
	bin, err := build()
	if err != nil {
		t.Fatalf("inject: %v", err)
	}
	return bin
}
