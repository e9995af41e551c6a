package nixdb

import (
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
