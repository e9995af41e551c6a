package facts

import (
	"bytes"
	"context"
	"database/sql"
	"errors"
	"fmt"
	"io"
	"math/rand/v2"
	"os"
	"path/filepath"
	"strings"
	"sync"
	"testing"

	"github.com/google/go-cmp/cmp"

	"overkeep/overlay/nixdb"
	"overkeep/policy/graph"
	"overkeep/tests/storegen"
)

// template is a small database, as Nix makes it but without NOT NULL: what a
// damaged or a forged file can hold cannot be written otherwise.
var template = sync.OnceValues(func() ([]byte, error) {
	dir, err := os.MkdirTemp("", "facts-")
	if err != nil {
		return nil, err
	}
	defer os.RemoveAll(dir)
	if _, err := storegen.Write(context.Background(), dir, storegen.Options{Paths: 60, Seed: 5}); err != nil {
		return nil, err
	}
	file := filepath.Join(dir, "db.sqlite")
	db, err := sql.Open("sqlite3", file+"?_journal_mode=DELETE&_synchronous=OFF")
	if err != nil {
		return nil, err
	}
	_, err = db.Exec(`pragma writable_schema=on;
		update sqlite_master set sql = replace(replace(sql, 'not null', ''), 'primary key autoincrement', 'primary key') where type = 'table' and name <> 'sqlite_sequence';
		insert into ValidPaths (id, path, hash, registrationTime, narSize) values
			(1001, '/nix/store/00000000000000000000000000000000-victim', 'sha256:` + strings.Repeat("0", 64) + `', 1, 8),
			(1002, '/nix/store/11111111111111111111111111111111-referrer', 'sha256:` + strings.Repeat("1", 64) + `', 1, 8),
			(1003, '/nix/store/22222222222222222222222222222222-other', 'sha256:` + strings.Repeat("2", 64) + `', 1, 8);
		insert into Refs values (1002, 1001), (1003, 1003);`)
	if err := errors.Join(err, db.Close()); err != nil {
		return nil, err
	}
	return os.ReadFile(file)
})

const (
	victim   = "00000000000000000000000000000000-victim"
	referrer = "11111111111111111111111111111111-referrer"
	other    = "22222222222222222222222222222222-other"
)

// forged is the template after some statements.
func forged(t testing.TB, statements string, args ...any) string {
	t.Helper()
	b, err := template()
	if err != nil {
		t.Fatal(err)
	}
	file := filepath.Join(t.TempDir(), "db.sqlite")
	if err := os.WriteFile(file, b, 0o600); err != nil {
		t.Fatal(err)
	}
	db, err := sql.Open("sqlite3", file+"?_journal_mode=OFF&_synchronous=OFF")
	if err != nil {
		t.Fatal(err)
	}
	defer db.Close()
	if _, err := db.Exec(statements, args...); err != nil {
		t.Fatal(err)
	}
	return file
}

// try loads a file in every way. A graph that comes out of it must be sound, and
// the whole and the part must agree; an error must have a type.
func try(t testing.TB, file string) (*Loaded, error) {
	t.Helper()
	stores := []Store{{DB: file, Layer: graph.Lower}}
	snap, err := Open(t.Context(), stores, Options{Readers: 2})
	typed(t, err)
	if err != nil {
		return nil, err
	}
	defer snap.Close()
	valid(t, snap.Graph)
	if d := cmp.Diff(slowLoad(t, stores, nil), words(snap.Graph)); d != "" {
		t.Errorf("the slow loader (-) and the fast one (+):\n%.3000s", d)
	}
	typed(t, snap.WriteJSON(t.Context(), io.Discard, Listing{}))
	if _, err := ClosureSizes(t.Context(), snap.Graph); err != nil && !errors.Is(err, ErrTooLarge) {
		t.Error(err)
	}
	var all []string
	for id := range snap.Graph.Len() {
		all = append(all, snap.Graph.Path(graph.ID(id)))
	}
	part, err := LoadFor(t.Context(), stores, all, Need{Build: true}, Options{})
	typed(t, err)
	if err == nil {
		valid(t, part.Graph)
	}
	l := snap.Loaded
	return &l, nil
}

func typed(t testing.TB, err error) {
	t.Helper()
	for _, kind := range []error{nil, nixdb.ErrCorrupt, nixdb.ErrSchema, nixdb.ErrUnreadable, nixdb.ErrMissing, ErrTooLarge} {
		if errors.Is(err, kind) {
			return
		}
	}
	t.Errorf("an error without a type: %v", err)
}

func flagsOf(l *Loaded, base string) string {
	id := l.Index.Base([]byte(base))
	if id == graph.NoID {
		return "absent"
	}
	return flagWords(l.Graph.Flags[id])
}

func TestHostileRows(t *testing.T) {
	const plain = "source output fixed lower"
	set := func(column, value string) string {
		return "update ValidPaths set " + column + " = " + value + " where id = 1001"
	}
	for _, c := range []struct{ name, sql, victim, referrer string }{
		{"nothing", "select 1", plain, plain},
		{"hash null", set("hash", "null"), plain + " broken", plain},
		{"hash empty", set("hash", "''"), plain + " broken", plain},
		{"hash short", set("hash", "'sha256:00'"), plain + " broken", plain},
		{"hash of another kind", set("hash", "'sha512:' || substr(hash, 8)"), plain + " broken", plain},
		{"hash in capitals", set("hash", "'sha256:' || replace(substr(hash, 8), '0', 'A')"), plain + " broken", plain},
		{"hash blob", set("hash", "cast(hash as blob)"), plain + " broken", plain},
		{"hash number", set("hash", "7"), plain + " broken", plain},
		{"size text", set("narSize", "'big'"), plain + " broken", plain},
		{"size negative", set("narSize", "-1"), plain + " broken", plain},
		{"size float", set("narSize", "1e300"), plain + " broken", plain},
		{"size null", set("narSize", "null"), plain, plain},
		{"size huge", set("narSize", "9223372036854775807"), plain, plain},
		{"time text", set("registrationTime", "'now'"), plain + " broken", plain},
		{"time null", set("registrationTime", "null"), plain + " broken", plain},
		{"ultimate text", set("ultimate", "'yes'"), plain + " broken", plain},
		{"ultimate 2", set("ultimate", "2"), "output ultimate lower", plain},
		{"ultimate 0", set("ultimate", "0"), plain, plain},
		{"deriver blob", set("deriver", "x'00'"), plain + " broken", plain},
		{"deriver junk", set("deriver", "'no path'"), "output fixed lower", plain},
		{"deriver no derivation", set("deriver", "'/nix/store/"+other+"'"), "output fixed lower", plain},
		{"deriver too long", set("deriver", "printf('%.*c', 70000, 'x')"), plain + " broken", plain},
		{"deriver empty", set("deriver", "''"), plain, plain},
		{"ca unknown", set("ca", "'blake:1'"), plain + " broken", plain},
		{"ca cut", set("ca", "'fixed:'"), plain + " broken", plain},
		{"ca blob", set("ca", "x'66'"), plain + " broken", plain},
		{"ca empty", set("ca", "''"), plain, plain},
		{"ca fixed", set("ca", "'fixed:r:sha256:0'"), "source fixed lower added", plain},
		{"ca text", set("ca", "'text:sha256:0'"), "source lower", plain},
		{"ca and deriver", set("ca", "'fixed:r:sha256:0', deriver = '/nix/store/"+other+".drv'"), "fixed lower", plain},
		{"sigs", set("sigs", "'a:b'"), "output lower", plain},
		{"named as output", "insert into DerivationOutputs values (1003, 'out', '/nix/store/" + victim + "')", "output fixed lower", plain},
		{"named as output by nobody", "insert into DerivationOutputs values (999999, 'out', '/nix/store/" + victim + "')", plain, plain},
		{"named as output by text", "insert into DerivationOutputs values ('x', 'out', '/nix/store/" + victim + "')", plain, plain},

		{"path null", set("path", "null"), "absent", plain + " broken"},
		{"path empty", set("path", "''"), "absent", plain + " broken"},
		{"path blob", set("path", "cast(path as blob)"), "absent", plain + " broken"},
		{"path number", set("path", "12"), "absent", plain + " broken"},
		{"path elsewhere", set("path", "'/gnu/store/"+victim+"'"), "absent", plain + " broken"},
		{"path below", set("path", "path || '/x'"), "absent", plain + " broken"},
		{"path up", set("path", "'/nix/store/../store/"+victim+"'"), "absent", plain + " broken"},
		{"path with NUL", set("path", "path || char(0)"), "absent", plain + " broken"},
		{"path with newline", set("path", "path || char(10)"), "absent", plain + " broken"},
		{"path of dots", set("path", "'/nix/store/00000000000000000000000000000000-..'"), "absent", plain + " broken"},
		{"path without name", set("path", "'/nix/store/00000000000000000000000000000000-'"), "absent", plain + " broken"},
		{"path with e", set("path", "'/nix/store/e0000000000000000000000000000000-x'"), "absent", plain + " broken"},
		{"path without dash", set("path", "'/nix/store/00000000000000000000000000000000_x'"), "absent", plain + " broken"},
		{"path long", set("path", "path || printf('%.*c', 206, 'x')"), "absent", plain + " broken"},
		{"path huge", set("path", "path || printf('%.*c', 300000, 'x')"), "absent", plain + " broken"},
		{"row gone", "delete from ValidPaths where id = 1001", "absent", plain + " broken"},
		{"id 0", "update ValidPaths set id = 0 where id = 1001; update Refs set reference = 0 where reference = 1001", plain + " broken", plain},
		{"id negative", "update ValidPaths set id = -5 where id = 1001; update Refs set reference = -5 where reference = 1001", plain + " broken", plain},
		{"id greatest", "update ValidPaths set id = 9223372036854775807 where id = 1001; update Refs set reference = 9223372036854775807 where reference = 1001", plain + " broken", plain},
		{"ids from end to end", "update ValidPaths set id = 9223372036854775807 where id = 1001; update Refs set reference = 9223372036854775807 where reference = 1001;" +
			"update ValidPaths set id = -9223372036854775807 where id = 1003", plain + " broken", plain},

		{"refers to nothing", "insert into Refs values (1001, 424242)", plain + " broken", plain},
		{"nothing refers to it", "insert into Refs values (424242, 1001), (-1, 1001), (9223372036854775807, 1001)", plain, plain},
		{"cycle", "insert into Refs values (1001, 1002), (1001, 1001)", plain, plain},
		{"reference without referrer", "insert into Refs values (null, 1001)", plain, plain},
	} {
		t.Run(c.name, func(t *testing.T) {
			l, err := try(t, forged(t, c.sql))
			if err != nil {
				t.Fatal(err)
			}
			if got := flagsOf(l, victim); got != c.victim {
				t.Errorf("victim: %s, want %s", got, c.victim)
			}
			if got := flagsOf(l, referrer); got != c.referrer {
				t.Errorf("referrer: %s, want %s", got, c.referrer)
			}
			if c.name == "ids from end to end" {
				return
			}
			if got := flagsOf(l, other); got != plain {
				t.Errorf("other: %s", got)
			}
		})
	}
}

func TestHostileDatabases(t *testing.T) {
	for _, c := range []struct {
		name, sql string
		want      error
	}{
		{"no paths", "drop table ValidPaths", nixdb.ErrSchema},
		{"no references", "drop table Refs", nixdb.ErrSchema},
		{"no outputs", "drop table DerivationOutputs", nixdb.ErrSchema},
		{"no column", "alter table ValidPaths rename column ca to cb", nixdb.ErrSchema},
		{"a view of paths", "alter table ValidPaths rename to V; create view ValidPaths as select * from V", nixdb.ErrSchema},
		{"a view of references", "drop table Refs; create view Refs as with recursive r(referrer, reference) as (select 1, 1 union all select referrer + 1, 1 from r) select * from r", nixdb.ErrSchema},
		{"virtual references", "drop table Refs; create virtual table Refs using fts3(referrer, reference)", nixdb.ErrSchema},
		{"computed column", "drop table Refs; create table Refs (referrer integer, reference integer as (abs(-9223372036854775808)), x, primary key (referrer, x))", nixdb.ErrSchema},
		{"no row ids", "drop table ValidPaths; create table ValidPaths (id integer primary key, path, hash, registrationTime, deriver, narSize, ultimate, sigs, ca) without rowid", nixdb.ErrSchema},
		{"ids of text", "drop table ValidPaths; create table ValidPaths (id text primary key, path, hash, registrationTime, deriver, narSize, ultimate, sigs, ca)", nixdb.ErrSchema},
		{"no index of references", "drop table Refs; create table Refs (referrer integer, reference integer)", nixdb.ErrSchema},
		{"index the other way", "drop table Refs; create table Refs (referrer integer, reference integer, primary key (reference, referrer))", nixdb.ErrSchema},
		{"a partial index", "drop table Refs; create table Refs (referrer integer, reference integer); create index i on Refs (referrer, reference) where referrer > 5", nixdb.ErrSchema},
		{"a reference that is text", "insert into Refs values (1001, 'x')", nixdb.ErrCorrupt},
		{"a reference that is null", "insert into Refs values (1001, null)", nixdb.ErrCorrupt},
		{"a referrer that is text", "insert into Refs values ('x', 1001)", nixdb.ErrCorrupt},
		{"a path twice", "drop table ValidPaths; create table ValidPaths (id integer primary key, path, hash, registrationTime, deriver, narSize, ultimate, sigs, ca);" +
			"insert into ValidPaths (id, path) values (1, '/nix/store/" + victim + "'), (5, '/nix/store/" + victim + "')", nixdb.ErrCorrupt},
		{"the least id", "update ValidPaths set id = -9223372036854775808 where id = 1001", nixdb.ErrCorrupt},
		{"empty", "delete from ValidPaths", nil},
	} {
		t.Run(c.name, func(t *testing.T) {
			if _, err := try(t, forged(t, c.sql)); !errors.Is(err, c.want) {
				t.Errorf("%v, want %v", err, c.want)
			}
		})
	}
}

func TestHostileFiles(t *testing.T) {
	b, err := template()
	if err != nil {
		t.Fatal(err)
	}
	dir := t.TempDir()
	file := filepath.Join(dir, "db.sqlite")
	write := func(b []byte) {
		if err := os.WriteFile(file, b, 0o600); err != nil {
			t.Fatal(err)
		}
	}
	check := func(name string, want error) {
		t.Helper()
		if _, err := try(t, file); !errors.Is(err, want) {
			t.Errorf("%s: %v, want %v", name, err, want)
		}
	}
	check("missing", nixdb.ErrMissing)
	write(nil)
	check("empty", nixdb.ErrSchema)
	write(bytes.Repeat([]byte("no database "), 1000))
	check("junk", nixdb.ErrCorrupt)
	write(b)
	if err := os.WriteFile(filepath.Join(dir, "schema"), []byte("11\n"), 0o600); err != nil {
		t.Fatal(err)
	}
	check("schema 11", nixdb.ErrSchema)
	if err := os.WriteFile(filepath.Join(dir, "schema"), []byte("10\n"), 0o600); err != nil {
		t.Fatal(err)
	}
	check("schema 10", nil)
	if err := os.WriteFile(file+"-wal", bytes.Repeat([]byte("junk"), 5000), 0o600); err != nil {
		t.Fatal(err)
	}
	check("a WAL of junk", nil)
	file = dir
	check("directory", nixdb.ErrCorrupt)
}

// Cut at every page and around its edges: all is read, or none.
func TestTruncated(t *testing.T) {
	b, err := template()
	if err != nil {
		t.Fatal(err)
	}
	file := filepath.Join(t.TempDir(), "db.sqlite")
	if err := os.WriteFile(file, b, 0o600); err != nil {
		t.Fatal(err)
	}
	whole, err := try(t, file)
	if err != nil {
		t.Fatal(err)
	}
	cuts := []int{1, 15, 16, 99, 100, 101, 511, 2000, len(b) - 1}
	for p := 4096; p < len(b); p += 4096 {
		cuts = append(cuts, p-1, p, p+1, p+2048)
	}
	for _, n := range cuts {
		if err := os.Truncate(file, 0); err != nil {
			t.Fatal(err)
		}
		if err := os.WriteFile(file, b[:n], 0o600); err != nil {
			t.Fatal(err)
		}
		l, err := try(t, file)
		if err == nil && l.Report != whole.Report {
			t.Errorf("%d of %d bytes: %+v of %+v", n, len(b), l.Report, whole.Report)
		}
	}
}

// A bit flipped anywhere: an error, or a sound graph. The slow loader may stumble
// over what the fast one never looks at, so it is not asked.
func TestFlipped(t *testing.T) {
	b, err := template()
	if err != nil {
		t.Fatal(err)
	}
	file := filepath.Join(t.TempDir(), "db.sqlite")
	rng := rand.New(rand.NewPCG(6, 6))
	for range 400 {
		at := rng.IntN(len(b))
		if rng.IntN(2) == 0 {
			at = at / 4096 * 4096 // a page's header is where it hurts
			at += rng.IntN(24)
		}
		flipped := bytes.Clone(b)
		flipped[at] ^= 1 << rng.IntN(8)
		if err := os.WriteFile(file, flipped, 0o600); err != nil {
			t.Fatal(err)
		}
		l, err := Load(t.Context(), []Store{{DB: file, Layer: graph.Upper}}, Options{})
		if typed(t, err); err == nil {
			valid(t, l.Graph)
		}
		if t.Failed() {
			t.Fatalf("byte %d", at)
		}
	}
}

func TestStores(t *testing.T) {
	file := forged(t, "select 1")
	for _, stores := range [][]Store{
		nil, {{DB: file}}, {{DB: file, Layer: graph.LayerMask}},
		{{DB: file, Layer: graph.Lower}, {DB: file, Layer: graph.Lower}},
	} {
		if _, err := Load(t.Context(), stores, Options{}); !errors.Is(err, ErrStores) {
			t.Errorf("%v: %v", stores, err)
		}
	}
	if _, err := Load(t.Context(), []Store{{DB: file, Layer: graph.Upper, UpperDir: filepath.Join(t.TempDir(), "none")}}, Options{}); !errors.Is(err, os.ErrNotExist) {
		t.Errorf("no upper directory: %v", err)
	}
	ctx, cancel := context.WithCancel(t.Context())
	cancel()
	if _, err := Load(ctx, []Store{{DB: file, Layer: graph.Lower}}, Options{}); !errors.Is(err, context.Canceled) {
		t.Errorf("ended: %v", err)
	}
}

// Realisations make a content address ambiguous.
func TestAnyCA(t *testing.T) {
	fixed := "update ValidPaths set ca = 'fixed:r:sha256:0', deriver = '/nix/store/" + other + ".drv' where id = 1001;"
	for sql, want := range map[string]string{
		"create table Realisations (id integer)":                                                  "fixed lower",
		"create table Realisations (id integer); insert into Realisations values (1)":             "output fixed lower",
		"create table BuildTraceV9 (id integer); insert into BuildTraceV9 values (1)":             "output fixed lower",
		`create table "Realisations"" x" (id integer); insert into "Realisations"" x" values (1)`: "output fixed lower",
	} {
		l, err := Load(t.Context(), []Store{{DB: forged(t, fixed+sql), Layer: graph.Lower}}, Options{})
		if err != nil {
			t.Fatal(err)
		}
		if got := flagsOf(l, victim); got != want {
			t.Errorf("%s: %s", sql, got)
		}
	}
}

// FuzzRows: whatever stands in the rows, loading gives a typed error or a sound graph.
func FuzzRows(f *testing.F) {
	f.Add([]byte("\x00\x01\x05hello\x02\x03"))
	f.Add([]byte{0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15, 1, 1, 1, 1, 2, 2, 2, 2})
	f.Add(bytes.Repeat([]byte{1, 0, 3, 233, 0, 3, 234}, 5))
	f.Fuzz(func(t *testing.T, data []byte) {
		take := func() byte {
			if len(data) == 0 {
				return 0
			}
			c := data[0]
			data = data[1:]
			return c
		}
		value := func(usual any) any {
			switch take() % 12 {
			case 0:
				return nil
			case 1:
				return int64(take())
			case 2:
				return 1001 + int64(take()%3)
			case 3:
				return -int64(take()) << (take() % 64)
			case 4:
				return float64(take()) / 3
			case 5:
				n := min(int(take()), len(data))
				b := data[:n]
				data = data[n:]
				return string(b)
			case 6:
				return []byte{take()}
			case 7:
				return fmt.Sprintf("/nix/store/%032d-x%c", take()%4, rune(take()))
			case 8:
				return "/nix/store/" + strings.Repeat("0", 32) + "-" + strings.Repeat("y", int(take()))
			}
			return usual
		}
		b, err := template()
		if err != nil {
			t.Fatal(err)
		}
		file := filepath.Join(t.TempDir(), "db.sqlite")
		if err := os.WriteFile(file, b, 0o600); err != nil {
			t.Fatal(err)
		}
		db, err := sql.Open("sqlite3", file+"?_journal_mode=OFF&_synchronous=OFF")
		if err != nil {
			t.Fatal(err)
		}
		for i := 0; len(data) > 0 && i < 50; i++ {
			// What SQLite itself refuses is not in the file, which is fine.
			switch take() % 4 {
			case 0:
				_, _ = db.Exec("insert or ignore into ValidPaths values (?, ?, ?, ?, ?, ?, ?, ?, ?)", value(int64(2000+i)), value("/nix/store/33333333333333333333333333333333-z"),
					value("sha256:"+strings.Repeat("ab", 32)), value(int64(1)), value(nil), value(int64(1)), value(int64(1)), value("k:s"), value("text:sha256:0"))
			case 1:
				_, _ = db.Exec("insert or ignore into Refs values (?, ?)", value(int64(1001)), value(int64(1002)))
			case 2:
				_, _ = db.Exec("insert or ignore into DerivationOutputs values (?, ?, ?)", value(int64(1003)), value("out"), value("/nix/store/"+victim))
			case 3:
				_, _ = db.Exec("delete from ValidPaths where id = ?", int64(take()))
			}
		}
		if err := db.Close(); err != nil {
			t.Fatal(err)
		}
		try(t, file)
	})
}
