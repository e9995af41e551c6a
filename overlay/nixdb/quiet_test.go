package nixdb

import (
	"bytes"
	"context"
	"errors"
	"os"
	osexec "os/exec"
	"path/filepath"
	"strings"
	"testing"

	"overkeep/overlay/nixdb/batch"
	"overkeep/tests/need"
)

// A reader that is alone takes no exclusive lock and sees all that is in the WAL,
// also one that a killed writer left without an index.
func TestQuiet(t *testing.T) {
	file, w := live(t, "wal", "a")
	exec(t, w, "pragma wal_checkpoint(truncate)")
	add(t, w, "b") // in the WAL only
	// A copy of the files is what a power cut leaves.
	dir := t.TempDir()
	cut := filepath.Join(dir, "db.sqlite")
	for _, suffix := range []string{"", "-wal"} {
		b, err := os.ReadFile(file + suffix)
		if err != nil {
			t.Fatal(err)
		}
		if err := os.WriteFile(cut+suffix, b, 0o640); err != nil {
			t.Fatal(err)
		}
	}
	s, err := OpenSnapshot(t.Context(), cut, 3)
	if err != nil {
		t.Fatal(err)
	}
	defer s.Close()
	if !s.use.quiet || s.Readers() != 3 {
		t.Errorf("quiet %v, %d readers", s.use.quiet, s.Readers())
	}
	d, err := Open(t.Context(), cut)
	if err != nil {
		t.Fatal(err)
	}
	if got := names(t, d); got != "a b" {
		t.Errorf("%q", got)
	}
	st, err := os.Stat(cut + "-shm")
	if err != nil || st.Mode().Perm() != 0o640 || st.Size() != 0 {
		t.Errorf("the index: %v %v", st, err)
	}
}

// What the traces of a system call tell: no write lock while a snapshot is taken
// and read, whether or not the index is there.
func TestQuietLocks(t *testing.T) {
	need.Tool(t, "strace")
	if os.Getenv("QUIET_DB") != "" {
		d, err := Open(t.Context(), os.Getenv("QUIET_DB"))
		if err != nil {
			t.Fatal(err)
		}
		if got := names(t, d); got != "a" {
			t.Errorf("%q", got)
		}
		return
	}
	file, w := live(t, "wal", "a")
	for _, step := range []string{"beside a writer", "alone", "alone again"} {
		if step == "alone" {
			if err := w.Close(); err != nil {
				t.Fatal(err)
			}
		}
		trace := filepath.Join(t.TempDir(), "trace")
		cmd := osexec.CommandContext(t.Context(), "strace", "-f", "-qq", "-e", "trace=fcntl", "-o", trace, os.Args[0], "-test.run", "^TestQuietLocks$")
		cmd.Env = append(os.Environ(), "QUIET_DB="+file)
		if out, err := cmd.CombinedOutput(); err != nil {
			t.Fatalf("%s: %v\n%s", step, err, out)
		}
		b, err := os.ReadFile(trace)
		if err != nil {
			t.Fatal(err)
		}
		if !bytes.Contains(b, []byte("F_RDLCK")) {
			t.Errorf("%s: no lock at all", step)
		}
		for line := range strings.Lines(string(b)) {
			// At its end SQLite tries what a descriptor for reading only cannot do (EBADF).
			if strings.Contains(line, "SETLK") && strings.Contains(line, "F_WRLCK") && !strings.Contains(line, "EBADF") {
				t.Errorf("%s: %s", step, line)
			}
		}
	}
}

// Forget waits for the readers of its own process, and they make way for it.
func TestForgetWaits(t *testing.T) {
	file, w := live(t, "wal", "a", "b")
	if err := w.Close(); err != nil {
		t.Fatal(err)
	}
	s, err := OpenSnapshot(t.Context(), file, 1)
	if err != nil {
		t.Fatal(err)
	}
	ctx, cancel := context.WithCancel(t.Context())
	cancel()
	if _, err := beginWriting(ctx, file); !errors.Is(err, context.Canceled) {
		t.Errorf("beside a reader: %v", err)
	}
	done := make(chan error)
	go func() { done <- Forget(t.Context(), file, []string{path("a")}) }()
	if err := s.Close(); err != nil {
		t.Error(err)
	}
	if err := s.Close(); err != nil { // no-op
		t.Error(err)
	}
	if err := <-done; err != nil {
		t.Error(err)
	}
	u, err := beginWriting(t.Context(), file)
	if err != nil {
		t.Fatal(err)
	}
	loud, err := OpenSnapshot(t.Context(), file, 2)
	if err != nil || loud.use.quiet {
		t.Fatalf("beside a writer: %v", err)
	}
	u.end()
	u.end()
	if err := loud.Close(); err != nil {
		t.Error(err)
	}
	uses.Lock()
	defer uses.Unlock()
	if len(uses.readers)+len(uses.writers) != 0 {
		t.Errorf("left: %v %v", uses.readers, uses.writers)
	}
}

func TestSettle(t *testing.T) {
	e := func(code int) error { return &batch.Error{Code: code} }
	dir := t.TempDir()
	file := filepath.Join(dir, "db.sqlite")
	if err := os.WriteFile(file, nil, 0o600); err != nil {
		t.Fatal(err)
	}
	for _, c := range []struct {
		err          error
		n            int
		again, quiet bool
	}{
		{errors.New("x"), 0, false, false}, {e(1), 0, false, false}, {e(11), 0, false, false}, {e(5), 0, false, false},
		{e(14), 0, true, true}, {e(14), 99, true, false}, {e(15), 0, true, false},
		{e(8 | 1<<8), 0, true, true}, {e(8 | 5<<8), 1, true, true}, {e(8 | 1<<8), 99, true, false},
	} {
		if again, quiet := settle(t.Context(), file, c.err, c.n); again != c.again || quiet != c.quiet {
			t.Errorf("%v, attempt %d: %v %v", c.err, c.n, again, quiet)
		}
	}
	if again, quiet := settle(t.Context(), filepath.Join(dir, "none"), e(14), 0); !again || quiet {
		t.Errorf("no database: %v %v", again, quiet)
	}
}

func TestWALSound(t *testing.T) {
	file, w := live(t, "wal", "a")
	good, err := os.ReadFile(file + "-wal")
	if err != nil || len(good) < 32 {
		t.Fatal(err, len(good))
	}
	_ = w
	dir := t.TempDir()
	db := filepath.Join(dir, "db.sqlite")
	if err := os.WriteFile(db, nil, 0o600); err != nil {
		t.Fatal(err)
	}
	if !walSound(db) || !walSound(filepath.Join(dir, "none")) {
		t.Error("without a WAL")
	}
	for name, c := range map[string]struct {
		wal  []byte
		want bool
	}{
		"good": {good, true}, "empty": {nil, true}, "short": {good[:31], true}, "zeros": {make([]byte, 100), false},
		"magic": {append([]byte{1}, good[1:]...), false}, "salt": {append(bytes.Clone(good[:20]), append([]byte{good[20] ^ 1}, good[21:]...)...), false},
	} {
		if err := os.WriteFile(db+"-wal", c.wal, 0o600); err != nil {
			t.Fatal(err)
		}
		if got := walSound(db); got != c.want {
			t.Errorf("%s: %v", name, got)
		}
	}
}
