package nixdb

import (
	"context"
	"database/sql"
	"os"
	"path/filepath"
	"testing"
)

// A transaction whose frames are in the WAL beyond what readers know, as after a sync
// that failed, comes to life when the database is next opened; after Confirm it does
// not.
func TestConfirm(t *testing.T) {
	for _, confirm := range []bool{false, true} {
		file := filepath.Join(t.TempDir(), "db.sqlite")
		db, err := sql.Open("sqlite3", "file:"+file+"?_journal_mode=WAL&_sync=EXTRA")
		if err != nil {
			t.Fatal(err)
		}
		db.SetMaxOpenConns(1)
		must := func(db *sql.DB, q string) {
			t.Helper()
			if _, err := db.Exec(q); err != nil {
				t.Fatal(err)
			}
		}
		must(db, "create table ValidPaths (id integer primary key autoincrement not null, path text unique not null, hash text not null, registrationTime integer not null, deriver text, narSize integer, ultimate integer, sigs text, ca text)")
		must(db, "create table Refs (referrer integer not null, reference integer not null, primary key (referrer, reference))")
		must(db, "create table DerivationOutputs (drv integer not null, id text not null, path text not null, primary key (drv, id))")
		must(db, "pragma wal_checkpoint(truncate)")
		must(db, "insert into ValidPaths (path, hash, registrationTime) values ('/nix/store/a', 'sha256:0', 1)")
		// The index stays as it is before the second transaction, of which the WAL has
		// all. As long as db is open, nobody makes the index anew.
		index := read(t, file+"-shm")
		must(db, "insert into ValidPaths (path, hash, registrationTime) values ('/nix/store/b', 'sha256:0', 1)")
		shm, err := os.OpenFile(file+"-shm", os.O_WRONLY, 0)
		if err == nil {
			_, err = shm.WriteAt(index, 0)
			defer shm.Close() // no sooner: closing it would drop SQLite's own locks
		}
		if err != nil {
			t.Fatal(err)
		}
		if n := countPaths(t, db); n != 1 {
			t.Fatalf("%d rows are seen before", n)
		}
		if confirm {
			if err := Confirm(context.Background(), file); err != nil {
				t.Fatal(err)
			}
		}
		// The computer stops here: the next one finds the files without an index.
		crashed := filepath.Join(t.TempDir(), "db.sqlite")
		for _, name := range []string{"", "-wal"} {
			if err := os.WriteFile(crashed+name, read(t, file+name), 0o644); err != nil {
				t.Fatal(err)
			}
		}
		next, err := sql.Open("sqlite3", "file:"+crashed)
		if err != nil {
			t.Fatal(err)
		}
		defer next.Close()
		defer db.Close()
		if n, want := countPaths(t, next), map[bool]int{false: 2, true: 1}[confirm]; n != want {
			t.Errorf("confirm %v: %d rows are seen afterwards, want %d", confirm, n, want)
		}
	}
}

func countPaths(t *testing.T, db *sql.DB) (n int) {
	t.Helper()
	if err := db.QueryRow("select count(*) from ValidPaths").Scan(&n); err != nil {
		t.Fatal(err)
	}
	return n
}

func read(t *testing.T, file string) []byte {
	t.Helper()
	b, err := os.ReadFile(file)
	if err != nil {
		t.Fatal(err)
	}
	return b
}
