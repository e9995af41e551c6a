package nixdb

import (
	"errors"
	"os"
	"path/filepath"
	"testing"
)

// What is forgotten is gone with its references; what somebody else refers to
// stays, and then all of it does.
func TestForget(t *testing.T) {
	file, db := live(t, "wal", "app", "lib", "libc")
	refer(t, db, "app", "lib")
	refer(t, db, "lib", "libc")
	refer(t, db, "libc", "libc")
	left := func() string {
		t.Helper()
		d, err := Open(t.Context(), file)
		if err != nil {
			t.Fatal(err)
		}
		return names(t, d)
	}
	all := left()
	if err := Forget(t.Context(), file, []string{path("libc"), path("nowhere")}); err == nil {
		t.Error("a path that another refers to was forgotten")
	}
	if got := left(); got != all {
		t.Errorf("a refused call left %s of %s", got, all)
	}
	if err := Forget(t.Context(), file, []string{path("app"), path("lib"), path("nowhere")}); err != nil {
		t.Fatal(err)
	}
	only, _ := live(t, "wal", "libc")
	d, err := Open(t.Context(), only)
	if err != nil {
		t.Fatal(err)
	}
	if got, want := left(), names(t, d); got != want {
		t.Errorf("left are %s, want %s", got, want)
	}
	if err := Forget(t.Context(), file+".missing", []string{path("x")}); err == nil {
		t.Error("a missing database")
	}
}

// After a checkpoint the database file alone has everything; a short log stays.
func TestCheckpoint(t *testing.T) {
	file, _ := live(t, "wal", "app", "lib")
	size := func() int64 {
		t.Helper()
		st, err := os.Stat(file)
		if err != nil {
			t.Fatal(err)
		}
		return st.Size()
	}
	before := size()
	if err := Checkpoint(t.Context(), file, 1<<30); err != nil || size() != before {
		t.Errorf("a short log: %v, %d bytes, then %d", err, before, size())
	}
	d, err := Open(t.Context(), file)
	if err != nil {
		t.Fatal(err)
	}
	all := names(t, d)
	if err := Checkpoint(t.Context(), file, 1); err != nil {
		t.Fatal(err)
	}
	b, err := os.ReadFile(file) // at the end: it drops this process's locks
	if err != nil {
		t.Fatal(err)
	}
	alone := filepath.Join(t.TempDir(), "db.sqlite")
	if err := os.WriteFile(alone, b, 0o600); err != nil {
		t.Fatal(err)
	}
	// Another reader needs an index to exist beside a database in WAL mode.
	if d, err = Open(t.Context(), alone); err != nil {
		t.Fatal(err)
	}
	if got := names(t, d); got != all {
		t.Errorf("the file alone has %s of %s", got, all)
	}
	if err := Checkpoint(t.Context(), file+".missing", 1); !errors.Is(err, ErrMissing) {
		t.Errorf("a missing database: %v", err)
	}
	plain, _ := live(t, "delete", "app")
	if err := Checkpoint(t.Context(), plain, 1); err != nil {
		t.Errorf("a database without a log: %v", err)
	}
}
