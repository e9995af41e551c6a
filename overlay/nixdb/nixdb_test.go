package nixdb

import (
	"context"
	"database/sql"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"

	"github.com/google/go-cmp/cmp"
	"golang.org/x/sys/unix"
	"pgregory.net/rapid"

	"overkeep/tests/need"
)

// The tables that this package reads, as Nix makes them (schema 10).
const tables = `
create table ValidPaths (id integer primary key autoincrement not null, path text unique not null, hash text not null,
	registrationTime integer not null, deriver text, narSize integer, ultimate integer, sigs text, ca text);
create table Refs (referrer integer not null, reference integer not null, primary key (referrer, reference),
	foreign key (referrer) references ValidPaths(id) on delete cascade, foreign key (reference) references ValidPaths(id) on delete restrict);
create table DerivationOutputs (drv integer not null, id text not null, path text not null, primary key (drv, id));
`

func name(n string) string { return strings.Repeat("0", 32) + "-" + n }
func path(n string) string { return "/nix/store/" + name(n) }

// live is a database with a writer that keeps it open, as Nix does.
func live(t testing.TB, mode string, paths ...string) (file string, db *sql.DB) {
	t.Helper()
	dir := filepath.Join(t.TempDir(), "a b%20?#", "db")
	if err := os.MkdirAll(dir, 0o700); err != nil {
		t.Fatal(err)
	}
	if err := os.WriteFile(filepath.Join(dir, "schema"), []byte("10"), 0o600); err != nil {
		t.Fatal(err)
	}
	file = filepath.Join(dir, "db.sqlite")
	if err := os.WriteFile(file, nil, 0o600); err != nil {
		t.Fatal(err)
	}
	// A path with ? and # needs a URI, which the tests write another way.
	uri := "file:" + strings.NewReplacer("%", "%25", "?", "%3f", "#", "%23", " ", "%20").Replace(file)
	db, err := sql.Open("sqlite3", uri+"?_journal_mode="+mode)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { db.Close() })
	exec(t, db, tables)
	add(t, db, paths...)
	return file, db
}

func exec(t testing.TB, db *sql.DB, q string, args ...any) {
	t.Helper()
	if _, err := db.Exec(q, args...); err != nil {
		t.Fatal(err)
	}
}

func add(t testing.TB, db *sql.DB, paths ...string) {
	t.Helper()
	for _, p := range paths {
		exec(t, db, "insert into ValidPaths (path, hash, registrationTime, narSize) values (?, 'sha256:00', 1, 100)", path(p))
	}
}

func refer(t testing.TB, db *sql.DB, from, to string) {
	t.Helper()
	exec(t, db, "insert into Refs select a.id, b.id from ValidPaths a, ValidPaths b where a.path = ? and b.path = ?", path(from), path(to))
}

func names(t testing.TB, d *DB) string {
	t.Helper()
	var s []string
	for p, err := range d.ValidPaths(context.Background()) {
		if err != nil {
			t.Fatal(err)
		}
		s = append(s, strings.TrimPrefix(p.Path, path("")))
	}
	return strings.Join(s, " ")
}

// TestLive: what the writer committed is seen at once, what it did not is not,
// and no reader disturbs it. In WAL and in rollback mode.
func TestLive(t *testing.T) {
	for _, mode := range []string{"wal", "truncate"} {
		t.Run(mode, func(t *testing.T) {
			file, w := live(t, mode, "a", "b")
			d, err := Open(t.Context(), file)
			if err != nil {
				t.Fatal(err)
			}
			if got := names(t, d); got != "a b" {
				t.Errorf("%q", got)
			}
			add(t, w, "c")
			if got := names(t, d); got != "a b c" {
				t.Errorf("after a commit: %q", got)
			}
			tx, err := w.Begin()
			if err != nil {
				t.Fatal(err)
			}
			if _, err := tx.Exec("delete from ValidPaths where path = ?", path("a")); err != nil {
				t.Fatal(err)
			}
			if got := names(t, d); got != "a b c" {
				t.Errorf("before a commit: %q", got)
			}
			if err := tx.Commit(); err != nil {
				t.Fatal(err)
			}
			tot, err := d.Totals(t.Context())
			if err != nil || tot != (Totals{2, 200}) {
				t.Errorf("%+v %v", tot, err)
			}
			got, err := d.Exists(t.Context(), []string{path("c"), path("a"), path("b"), "x'y", ""})
			if diff := cmp.Diff([]string{path("c"), path("b")}, got); err != nil || diff != "" {
				t.Errorf("%v %s", err, diff)
			}
			exec(t, w, "pragma wal_checkpoint(truncate)")
			if got := names(t, d); got != "b c" {
				t.Errorf("after a checkpoint: %q", got)
			}
		})
	}
}

// TestNoWAL: nobody has the database open, and a clean close removed its WAL.
func TestNoWAL(t *testing.T) {
	file, w := live(t, "wal", "a")
	if err := w.Close(); err != nil {
		t.Fatal(err)
	}
	if _, err := os.Stat(file + "-wal"); !errors.Is(err, os.ErrNotExist) {
		t.Fatalf("there is a WAL: %v", err)
	}
	before, err := os.ReadFile(file)
	if err != nil {
		t.Fatal(err)
	}
	d, err := Open(t.Context(), file)
	if err != nil {
		t.Fatal(err)
	}
	if got := names(t, d); got != "a" {
		t.Errorf("%q", got)
	}
	after, err := os.ReadFile(file)
	if err != nil || string(before) != string(after) {
		t.Errorf("the database was written to: %v", err)
	}
}

func TestRow(t *testing.T) {
	file, w := live(t, "wal")
	exec(t, w, "insert into ValidPaths values (7, ?, 'sha256:ab', 1700000000, ?, 4096, 1, 'a:1 b:2', 'fixed:r:sha256:cd')", path("full"), path("full.drv"))
	exec(t, w, "insert into ValidPaths (id, path, hash, registrationTime) values (9, ?, 'sha256:00', 0)", path("bare"))
	d, err := Open(t.Context(), file)
	if err != nil {
		t.Fatal(err)
	}
	var got []PathInfo
	for p, err := range d.ValidPaths(t.Context()) {
		if err != nil {
			t.Fatal(err)
		}
		got = append(got, p)
	}
	want := []PathInfo{
		{ID: 7, Path: path("full"), Hash: "sha256:ab", RegistrationTime: 1700000000, Deriver: path("full.drv"), NarSize: 4096, Ultimate: true,
			Sigs: []string{"a:1", "b:2"}, CA: "fixed:r:sha256:cd"},
		{ID: 9, Path: path("bare"), Hash: "sha256:00", Sigs: []string{}},
	}
	if diff := cmp.Diff(want, got); diff != "" {
		t.Error(diff)
	}
	for range d.ValidPaths(t.Context()) {
		break // leaving early closes the query
	}
	ctx, cancel := context.WithCancel(t.Context())
	cancel()
	for _, err := range d.ValidPaths(ctx) {
		if !errors.Is(err, context.Canceled) {
			t.Error(err)
		}
	}
}

// TestHostileDatabases: each is a typed error that shows no row.
func TestHostileDatabases(t *testing.T) {
	page := func(file string, at int64, b string) error {
		f, err := os.OpenFile(file, os.O_RDWR, 0)
		if err != nil {
			return err
		}
		defer f.Close()
		_, err = f.WriteAt([]byte(b), at)
		return err
	}
	for name, tc := range map[string]struct {
		spoil func(file string, w *sql.DB) error
		want  error
	}{
		"missing":     {func(f string, _ *sql.DB) error { return os.Remove(f) }, ErrMissing},
		"a directory": {func(f string, _ *sql.DB) error { return errors.Join(os.Remove(f), os.Mkdir(f, 0o700)) }, ErrCorrupt},
		"a fifo":      {func(f string, _ *sql.DB) error { return errors.Join(os.Remove(f), unix.Mkfifo(f, 0o600)) }, ErrCorrupt},
		"empty":       {func(f string, _ *sql.DB) error { return os.Truncate(f, 0) }, ErrSchema},
		"text":        {func(f string, _ *sql.DB) error { return os.WriteFile(f, []byte(strings.Repeat("hello ", 1000)), 0o600) }, ErrCorrupt},
		"magic gone":  {func(f string, _ *sql.DB) error { return page(f, 0, "SQLite format 4") }, ErrCorrupt},
		"cut off":     {func(f string, _ *sql.DB) error { return os.Truncate(f, 5000) }, ErrCorrupt},
		"root page":   {func(f string, _ *sql.DB) error { return page(f, 100, strings.Repeat("\xff", 300)) }, ErrCorrupt},
		"table page":  {func(f string, _ *sql.DB) error { return page(f, 4096, strings.Repeat("\xff", 4096)) }, ErrCorrupt},
		"old schema": {func(f string, _ *sql.DB) error {
			return os.WriteFile(filepath.Join(filepath.Dir(f), "schema"), []byte("9"), 0o600)
		}, ErrSchema},
		"new schema": {func(f string, _ *sql.DB) error {
			return os.WriteFile(filepath.Join(filepath.Dir(f), "schema"), []byte("11\n"), 0o600)
		}, ErrSchema},
		"another table": {func(_ string, w *sql.DB) error { _, err := w.Exec("drop table Refs"); return err }, ErrSchema},
		"another column": {func(_ string, w *sql.DB) error {
			_, err := w.Exec("alter table ValidPaths rename ca to xx")
			return err
		}, ErrSchema},
	} {
		t.Run(name, func(t *testing.T) {
			file, w := live(t, "wal", "SECRET")
			if tc.want == ErrSchema {
				if err := tc.spoil(file, w); err != nil {
					t.Fatal(err)
				}
			}
			w.Close() // checkpoints
			if tc.want != ErrSchema || name == "empty" {
				if err := tc.spoil(file, w); err != nil {
					t.Fatal(err)
				}
			}
			d, err := Open(t.Context(), file)
			if err == nil { // damage may lie where Open does not look
				for _, e := range d.ValidPaths(t.Context()) {
					err = e
				}
			}
			if !errors.Is(err, tc.want) || strings.Contains(fmt.Sprint(err), "SECRET") {
				t.Errorf("%v, want %v", err, tc.want)
			}
		})
	}
	t.Run("wrong type", func(t *testing.T) {
		file, w := live(t, "wal")
		exec(t, w, "insert into ValidPaths (path, hash, registrationTime) values (?, 'x', 'SECRET')", path("a"))
		d, err := Open(t.Context(), file)
		if err != nil {
			t.Fatal(err)
		}
		for _, err := range d.ValidPaths(t.Context()) {
			if !errors.Is(err, ErrCorrupt) || strings.Contains(err.Error(), "SECRET") {
				t.Error(err)
			}
		}
	})
}

func TestGraph(t *testing.T) {
	file, w := live(t, "wal", "a", "b", "c", "d")
	for _, r := range []string{"a b", "b c", "c c", "d a"} {
		from, to, _ := strings.Cut(r, " ")
		refer(t, w, from, to)
	}
	d, err := Open(t.Context(), file)
	if err != nil {
		t.Fatal(err)
	}
	g, err := d.Graph(t.Context(), func(p string) bool { return p != path("b") })
	want := Graph{Paths: []string{path("a"), path("c"), path("d")}, Refs: [][2]int32{{1, 1}, {2, 0}}}
	if diff := cmp.Diff(want, g); err != nil || diff != "" {
		t.Errorf("%v %s", err, diff)
	}
}

// TestLowerNeeds: a row is the keep's own if the upper directory has it.
func TestLowerNeeds(t *testing.T) {
	need.Root(t) // device nodes and trusted attributes
	file, w := live(t, "wal", "own", "own-file", "lower", "whiteout", "copied", "lower-drv")
	refer(t, w, "own", "lower")
	refer(t, w, "lower", "lower-drv")
	upper := t.TempDir()
	in := func(n string) string { return filepath.Join(upper, n) }
	for _, err := range []error{
		os.Mkdir(in(name("own")), 0o555), os.WriteFile(in(name("own-file")), nil, 0o444), os.Mkdir(in(".links"), 0o700),
		os.Mkdir(in(name("not-valid")), 0o555), os.Mkdir(in(name("copied")), 0o555),
		unix.Mknod(in(name("whiteout")), unix.S_IFCHR, 0), unix.Setxattr(in(name("copied")), originAttr, []byte("x"), 0),
	} {
		if errors.Is(err, unix.ENOTSUP) || errors.Is(err, unix.EPERM) {
			need.Missing(t, "device nodes and trusted attributes in a temporary directory: %v", err)
		}
		if err != nil {
			t.Fatal(err)
		}
	}
	got, err := LowerNeeds(t.Context(), file, upper)
	if diff := cmp.Diff([]string{path("lower"), path("whiteout"), path("copied"), path("lower-drv")}, got); err != nil || diff != "" {
		t.Errorf("%v %s", err, diff)
	}
	g, err := LowerGraph(t.Context(), file, upper)
	if diff := cmp.Diff([][2]int32{{0, 3}}, g.Refs); err != nil || diff != "" {
		t.Errorf("%v %s", err, diff)
	}
	if _, err := LowerNeeds(t.Context(), file, in("none")); !errors.Is(err, os.ErrNotExist) {
		t.Error(err)
	}
	if _, err := LowerNeeds(t.Context(), file+"x", upper); !errors.Is(err, ErrMissing) {
		t.Error(err)
	}
}

// TestWatch: no commit is missed, and the channel ends with ctx or the directory.
func TestWatch(t *testing.T) {
	file, w := live(t, "wal")
	ctx, cancel := context.WithCancel(t.Context())
	defer cancel()
	ch, err := Watch(ctx, filepath.Dir(file))
	if err != nil {
		t.Fatal(err)
	}
	<-ch // the first comes at once
	d, err := Open(ctx, file)
	if err != nil {
		t.Fatal(err)
	}
	for i := range 20 {
		want := fmt.Sprintf("p%d", i)
		add(t, w, want)
		for range ch {
			if got := strings.Fields(names(t, d)); slices.Contains(got, want) {
				break
			}
		}
	}
	cancel()
	for range ch {
	}

	dir := filepath.Join(t.TempDir(), "db")
	if err := os.Mkdir(dir, 0o700); err != nil {
		t.Fatal(err)
	}
	ch, err = Watch(t.Context(), dir)
	if err != nil {
		t.Fatal(err)
	}
	if err := os.Remove(dir); err != nil {
		t.Fatal(err)
	}
	for range ch {
	}
	if _, err := Watch(t.Context(), dir); !errors.Is(err, os.ErrNotExist) {
		t.Error(err)
	}
	if _, err := Watch(t.Context(), file); !errors.Is(err, unix.ENOTDIR) {
		t.Error(err)
	}
}

func TestEvents(t *testing.T) {
	rapid.Check(t, func(r *rapid.T) { events(rapid.SliceOf(rapid.Byte()).Draw(r, "b")) })
}

func FuzzOpen(f *testing.F) {
	file, w := live(f, "truncate", "a", "b")
	refer(f, w, "a", "b")
	w.Close()
	b, err := os.ReadFile(file)
	if err != nil {
		f.Fatal(err)
	}
	f.Add(uint16(0), []byte("x"))
	f.Add(uint16(4096), []byte{0xff, 0xff, 0xff})
	f.Add(uint16(110), []byte{0, 0, 0, 1})
	f.Fuzz(func(t *testing.T, at uint16, patch []byte) {
		spoilt := slices.Clone(b)
		copy(spoilt[min(int(at), len(spoilt)):], patch)
		file := filepath.Join(t.TempDir(), "db.sqlite")
		if err := os.WriteFile(file, spoilt, 0o600); err != nil {
			t.Fatal(err)
		}
		d, err := Open(t.Context(), file)
		if err == nil {
			_, err = d.Graph(t.Context(), nil)
		}
		if err != nil && !errors.Is(err, ErrCorrupt) && !errors.Is(err, ErrSchema) && !errors.Is(err, ErrUnreadable) {
			t.Fatalf("untyped: %v", err)
		}
	})
}
