package storepath_test

import (
	"bytes"
	"os"
	"path/filepath"
	"strings"
	"testing"

	"overkeep/overlay/drv/storepath"
	"overkeep/overlay/nixdb"
	"overkeep/tests/need"
)

// The sources of a real store have the paths that their hashes give them.
func TestRealSources(t *testing.T) {
	file := filepath.Join(t.TempDir(), "db.sqlite")
	if err := os.WriteFile(file, need.DataZstd(t, "real.sqlite.zst"), 0o600); err != nil {
		t.Fatal(err)
	}
	db, err := nixdb.Open(t.Context(), file)
	if err != nil {
		t.Fatal(err)
	}
	n := 0
	for p, err := range db.ValidPaths(t.Context()) {
		if err != nil {
			t.Fatal(err)
		}
		ca, ok := strings.CutPrefix(p.CA, "fixed:r:")
		if !ok {
			continue
		}
		n++
		stored, err := storepath.ParseHash(p.Hash)
		if err != nil {
			t.Fatal(err)
		}
		addressed, err := storepath.ParseHash(ca)
		if err != nil || !bytes.Equal(stored.Sum, addressed.Sum) {
			t.Fatalf("%s: %s and %s: %v", p.Path, p.Hash, ca, err)
		}
		base, ok := storepath.Base(storepath.Dir, p.Path)
		if have, err := storepath.Fixed(storepath.Dir, storepath.Name(base), storepath.NAR, stored); !ok || err != nil || have != p.Path {
			t.Errorf("%s: %s %v", p.Path, have, err)
		}
	}
	if n != 644 {
		t.Errorf("%d sources", n)
	}
}
