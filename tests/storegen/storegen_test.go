package storegen

import (
	"crypto/ed25519"
	"database/sql"
	"encoding/base64"
	"os"
	"path/filepath"
	"strings"
	"testing"

	"github.com/google/go-cmp/cmp"

	"overkeep/tests/need"
)

func TestModel(t *testing.T) {
	o := Options{Paths: 20_000, Seed: 7, Signed: 0.05, Prefix: "x-"}
	s := Model(o)
	if d := cmp.Diff(s, Model(o)); d != "" {
		t.Errorf("not the same twice: %.500s", d)
	}
	if len(s.Paths) != o.Paths {
		t.Errorf("%d paths", len(s.Paths))
	}
	refs, drvs, self, fixed, gone := 0, 0, 0, 0, 0
	pub := Key().Public().(ed25519.PublicKey)
	signed := 0
	for i, p := range s.Paths {
		refs += len(p.Refs)
		for _, r := range p.Refs {
			if int(r) > i {
				t.Fatalf("path %d refers to %d", i, r)
			}
			if int(r) == i {
				self++
			}
		}
		switch {
		case strings.HasSuffix(p.Base, ".drv"):
			drvs++
		case p.Orphan != "":
			gone++
		case strings.HasPrefix(p.CA, "fixed:") && p.Deriver >= 0:
			fixed++
		}
		for _, o := range p.Outs {
			if s.Paths[o].Deriver != i {
				t.Fatalf("output %d of %d has deriver %d", o, i, s.Paths[o].Deriver)
			}
		}
		if _, b64, ok := strings.Cut(p.Sigs, KeyName+":"); ok {
			signed++
			sig, err := base64.StdEncoding.DecodeString(b64)
			if err != nil || !ed25519.Verify(pub, []byte(s.Fingerprint(&p)), sig) {
				t.Fatalf("%s: bad signature", p.Base)
			}
		}
	}
	mean := float64(refs) / float64(len(s.Paths))
	t.Logf("%.1f references a path; %d derivations, %d self references, %d fixed outputs, %d orphans, %d signed", mean, drvs, self, fixed, gone, signed)
	if mean < 5 || mean > 10 || min(drvs, self, fixed, gone, signed) < 300 {
		t.Error("not the store that was promised")
	}
}

// Base 32 as Nix's manual has it, for the SHA-256 of nothing.
func TestBase32(t *testing.T) {
	empty := []byte("\xe3\xb0\xc4\x42\x98\xfc\x1c\x14\x9a\xfb\xf4\xc8\x99\x6f\xb9\x24\x27\xae\x41\xe4\x64\x9b\x93\x4c\xa4\x95\x99\x1b\x78\x52\xb8\x55")
	if got := Base32(empty); got != "0mdqa9w1p6cmli6976v4wi0sw9r4p5prkj7lzfd1877wk11c9c73" {
		t.Error(got)
	}
}

func schema(t *testing.T, file string) map[string]string {
	t.Helper()
	db, err := sql.Open("sqlite3", file+"?_query_only=1")
	if err != nil {
		t.Fatal(err)
	}
	defer db.Close()
	rows, err := db.Query("select name, ifnull(sql, '') from sqlite_master")
	if err != nil {
		t.Fatal(err)
	}
	defer rows.Close()
	m := map[string]string{}
	for rows.Next() {
		var n, s string
		if err := rows.Scan(&n, &s); err != nil {
			t.Fatal(err)
		}
		m[n] = s
	}
	return m
}

// The database is sound by SQLite's own checks, and its tables, indexes and trigger
// are to the letter those of a database that Nix made.
func TestWrite(t *testing.T) {
	dir := t.TempDir()
	s, err := Write(t.Context(), dir, Options{Paths: 2000})
	if err != nil {
		t.Fatal(err)
	}
	file := filepath.Join(dir, "db.sqlite")
	db, err := sql.Open("sqlite3", file)
	if err != nil {
		t.Fatal(err)
	}
	defer db.Close()
	for q, want := range map[string]string{
		"pragma integrity_check":                                  "ok",
		"pragma journal_mode":                                     "wal",
		"select count(*) from ValidPaths":                         "2000",
		"select count(*) from pragma_foreign_key_check":           "0",
		"select count(distinct path) from ValidPaths":             "2000",
		"select seq from sqlite_sequence where name='ValidPaths'": "2000",
	} {
		var got string
		if err := db.QueryRow(q).Scan(&got); err != nil || got != want {
			t.Errorf("%s: %q, %v", q, got, err)
		}
	}
	refs, n := 0, 0
	for _, p := range s.Paths {
		refs += len(p.Refs)
	}
	if err := db.QueryRow("select count(*) from Refs").Scan(&n); err != nil || n != refs {
		t.Errorf("%d references of %d, %v", n, refs, err)
	}
	if _, err := Write(t.Context(), dir, Options{Paths: 1}); err == nil {
		t.Error("over another database")
	}
	real := filepath.Join(t.TempDir(), "real.sqlite")
	if err := os.WriteFile(real, need.DataZstd(t, "real.sqlite.zst"), 0o600); err != nil {
		t.Fatal(err)
	}
	if d := cmp.Diff(schema(t, real), schema(t, file)); d != "" {
		t.Errorf("Nix's schema (-) and ours (+):\n%s", d)
	}
}
