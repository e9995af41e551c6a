package nixdb

import (
	"bytes"
	"database/sql"
	"errors"
	"fmt"
	"math/rand/v2"
	osexec "os/exec"
	"slices"
	"strings"
	"testing"

	"overkeep/tests/need"
)

// bytesOf reads the file by another process: to close it in this one would drop SQLite's
// locks.
func bytesOf(t *testing.T, file string) []byte {
	t.Helper()
	need.Tool(t, "cat")
	out, err := osexec.Command("cat", "--", file).Output()
	if err != nil && strings.HasSuffix(file, ".sqlite") {
		t.Fatal(err)
	}
	return out
}

func occurrences(t *testing.T, file string, names [][]byte) (n int) {
	b := bytesOf(t, file)
	for _, name := range names {
		n += bytes.Count(b, name)
	}
	return n
}

// hashed is a path whose hash part says its number.
func hashed(n int) string { return fmt.Sprintf("/nix/store/%032d-package-%d", n, n) }

// fill adds rows in no order, so that pages split, by an SQLite that deletes carelessly.
func fill(t *testing.T, db *sql.DB, n int) {
	t.Helper()
	exec(t, db, "pragma secure_delete=0")
	exec(t, db, "begin")
	defer exec(t, db, "commit")
	for _, i := range rand.New(rand.NewPCG(1, 2)).Perm(n) {
		exec(t, db, "insert into ValidPaths (path, hash, registrationTime, deriver) values (?, 'sha256:00', 1, ?)", hashed(i), hashed(i)+".drv")
		exec(t, db, "insert into DerivationOutputs (drv, id, path) values (?, 'out', ?)", i, hashed(i))
	}
}

// What was deleted without care is found in the file and in the WAL, and after Scrub
// nowhere, while the database is open elsewhere, in use before and after; the
// remaining rows are as they were, and the file has not given blocks back.
func TestScrub(t *testing.T) {
	const rows, every = 4000, 7
	for _, mode := range []string{"wal", "persist"} {
		t.Run(mode, func(t *testing.T) {
			file, db := live(t, mode)
			db.SetMaxOpenConns(1) // the pragma is the connection's
			fill(t, db, rows)
			var names [][]byte
			exec(t, db, "begin")
			for i := 0; i < rows; i += every {
				names = append(names, []byte(fmt.Sprintf("%032d", i)))
				exec(t, db, "delete from ValidPaths where path = ?", hashed(i))
				exec(t, db, "delete from DerivationOutputs where path = ?", hashed(i))
			}
			exec(t, db, "commit")
			if mode == "wal" {
				exec(t, db, "pragma wal_checkpoint(restart)")
			}
			before := readable(t, file)
			beside := map[string]string{"wal": "-wal", "persist": "-journal"}[mode]
			if a, b := occurrences(t, file, names), occurrences(t, file+beside, names); a == 0 || b == 0 {
				t.Fatalf("nothing to scrub: %d in the file, %d beside it", a, b)
			}
			size := len(bytesOf(t, file))
			res, err := Scrub(t.Context(), file, names)
			if err != nil {
				t.Fatal(err)
			}
			if a, b := occurrences(t, file, names), occurrences(t, file+beside, names); a != 0 || b != 0 {
				t.Errorf("after %+v: %d in the file, %d beside it", res, a, b)
			}
			if res.Hits == 0 || res.Left != 0 || res.Live != 0 || !res.Vacuumed || res.WALBytes == 0 || res.Truncated != (mode == "wal") {
				t.Errorf("%+v", res)
			}
			if now := len(bytesOf(t, file)); mode == "wal" && now < size {
				t.Errorf("%d bytes of %d were given back", size-now, size)
			}
			if !slices.Equal(readable(t, file), before) {
				t.Error("rows have changed")
			}
			var check string
			if err := db.QueryRow("pragma integrity_check").Scan(&check); err != nil || check != "ok" {
				t.Errorf("%s, %v", check, err)
			}
			add(t, db, "after")
			if got := readable(t, file); len(got) != len(before)+1 {
				t.Errorf("%d rows", len(got))
			}
			// Again: nothing to do.
			if res, err := Scrub(t.Context(), file, names); err != nil || res.Hits != 0 || res.Vacuumed {
				t.Errorf("%+v, %v", res, err)
			}
		})
	}
}

// Live rows are told from what is left of dead ones.
func TestScrubLive(t *testing.T) {
	file, db := live(t, "wal")
	db.SetMaxOpenConns(1)
	fill(t, db, 100)
	name := []byte(fmt.Sprintf("%032d", 42))
	exec(t, db, "delete from ValidPaths where path = ?", hashed(42)) // its output stays
	res, err := Scrub(t.Context(), file, [][]byte{name})
	if err != nil || res.Live != 1 || res.Left != 0 {
		t.Errorf("%+v, %v", res, err)
	}
	if n := occurrences(t, file, [][]byte{name}); n != 1 {
		t.Errorf("%d times in the file", n)
	}
	// A table and an index have it.
	res, err = Scrub(t.Context(), file, [][]byte{[]byte(fmt.Sprintf("%032d", 43))})
	if err != nil || res.Live != 4 || res.Hits != 0 || res.Vacuumed {
		t.Errorf("%+v, %v", res, err)
	}
}

// By Invalidate alone nothing is left in the file but what splits had left before.
func TestInvalidateScrubs(t *testing.T) {
	file, db := live(t, "wal")
	var infos []Info
	var names [][]byte
	for i := range 20 {
		infos = append(infos, Info{Path: hashed(i), NarHash: narHash(i)})
		names = append(names, []byte(fmt.Sprintf("%032d", i)))
	}
	if err := errors.Join(Register(t.Context(), file, infos), Invalidate(t.Context(), file, paths(infos), nil)); err != nil {
		t.Fatal(err)
	}
	exec(t, db, "pragma wal_checkpoint(restart)")
	if n := occurrences(t, file, names); n != 0 {
		t.Errorf("%d in the file", n)
	}
	if n := occurrences(t, file+"-wal", names); n == 0 {
		t.Error("nothing in the WAL")
	}
	res, err := Scrub(t.Context(), file, names)
	if err != nil || res.Vacuumed || res.WALBytes == 0 {
		t.Errorf("%+v, %v", res, err)
	}
	if n := occurrences(t, file+"-wal", names); n != 0 {
		t.Errorf("%d in the WAL", n)
	}
}

// The WAL stays for Scrub when we are the last to close it.
func TestWALStays(t *testing.T) {
	file := empty(t)
	info := []Info{{Path: hashed(1), NarHash: narHash(1)}}
	if err := errors.Join(Register(t.Context(), file, info), Invalidate(t.Context(), file, paths(info), nil)); err != nil {
		t.Fatal(err)
	}
	names := [][]byte{[]byte(fmt.Sprintf("%032d", 1))}
	if n := occurrences(t, file+"-wal", names); n == 0 {
		t.Error("it was deleted, and its blocks hold the name")
	}
	if _, err := Scrub(t.Context(), file, names); err != nil {
		t.Fatal(err)
	}
	if n := occurrences(t, file+"-wal", names); n != 0 {
		t.Errorf("%d in the WAL", n)
	}
}

// Who reads what was before keeps the WAL in use: that is an error, and nothing breaks.
func TestScrubBusy(t *testing.T) {
	file, db := live(t, "wal", "a")
	tx, err := db.Begin()
	if err != nil {
		t.Fatal(err)
	}
	var n int
	if err := tx.QueryRow("select count(*) from ValidPaths").Scan(&n); err != nil {
		t.Fatal(err)
	}
	if err := Register(t.Context(), file, []Info{{Path: path("b"), NarHash: narHash(1)}}); err != nil {
		t.Fatal(err)
	}
	if _, err := Scrub(t.Context(), file, [][]byte{[]byte("name")}); !errors.Is(err, ErrBusy) {
		t.Errorf("%v", err)
	}
	if err := tx.QueryRow("select count(*) from ValidPaths").Scan(&n); err != nil || n != 1 {
		t.Errorf("the reader sees %d, %v", n, err)
	}
	if err := tx.Rollback(); err != nil {
		t.Fatal(err)
	}
	if res, err := Scrub(t.Context(), file, [][]byte{[]byte("name")}); err != nil || !res.Truncated {
		t.Errorf("%+v, %v", res, err)
	}
	if got := len(readable(t, file)); got != 2 {
		t.Errorf("%d rows", got)
	}
}
