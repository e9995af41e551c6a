package storegen

import (
	"context"
	"database/sql"
	"encoding/hex"
	"errors"
	"fmt"
	"net/url"
	"os"
	"path/filepath"
	"strings"

	_ "github.com/mattn/go-sqlite3" // the driver
)

// Tables, Indexes: the statements of Nix (schema.sql), in the form in which a
// database of Nix 2.34 holds them.
const (
	Tables = `CREATE TABLE ValidPaths (
    id               integer primary key autoincrement not null,
    path             text unique not null,
    hash             text not null, -- base16 representation
    registrationTime integer not null,
    deriver          text,
    narSize          integer,
    ultimate         integer, -- null implies "false"
    sigs             text, -- space-separated
    ca               text -- if not null, an assertion that the path is content-addressed; see ValidPathInfo
);
CREATE TABLE Refs (
    referrer  integer not null,
    reference integer not null,
    primary key (referrer, reference),
    foreign key (referrer) references ValidPaths(id) on delete cascade,
    foreign key (reference) references ValidPaths(id) on delete restrict
);
CREATE TABLE DerivationOutputs (
    drv  integer not null,
    id   text not null, -- symbolic output id, usually "out"
    path text not null,
    primary key (drv, id),
    foreign key (drv) references ValidPaths(id) on delete cascade
);
CREATE TABLE SchemaMigrations (migration text primary key not null);`
	Indexes = `CREATE INDEX IndexReferrer on Refs(referrer);
CREATE INDEX IndexReference on Refs(reference);
CREATE TRIGGER DeleteSelfRefs before delete on ValidPaths
  begin
    delete from Refs where referrer = old.id and reference = old.id;
  end;
CREATE INDEX IndexDerivationOutputs on DerivationOutputs(path);`
)

// Write makes dir/db.sqlite and dir/schema, in WAL mode and with an empty WAL, and
// returns what they hold. dir must exist and hold no database.
func Write(ctx context.Context, dir string, o Options) (*Store, error) {
	s := Model(o)
	return s, s.Write(ctx, dir)
}

// Write makes the database of a store.
func (s *Store) Write(ctx context.Context, dir string) (err error) {
	if dir, err = filepath.Abs(dir); err != nil { // an URI wants it
		return err
	}
	file := filepath.Join(dir, "db.sqlite")
	if _, err := os.Stat(file); !errors.Is(err, os.ErrNotExist) {
		return fmt.Errorf("%q is in the way", file)
	}
	if err := os.WriteFile(filepath.Join(dir, "schema"), []byte("10"), 0o644); err != nil {
		return err
	}
	// Nothing of it survives a crash, and nothing needs to.
	uri := url.URL{Scheme: "file", Path: file, RawQuery: "_journal_mode=OFF&_synchronous=OFF&_locking_mode=EXCLUSIVE&_cache_size=-65536"}
	db, err := sql.Open("sqlite3", uri.String())
	if err != nil {
		return err
	}
	defer func() { err = errors.Join(err, db.Close()) }()
	c, err := db.Conn(ctx)
	if err != nil {
		return err
	}
	defer c.Close()
	w := writer{ctx: ctx, c: c}
	w.exec(Tables + "begin;")
	s.rows(&w)
	w.exec(Indexes + "insert into SchemaMigrations values ('20170203'); commit;")
	w.exec("pragma locking_mode=normal; pragma journal_mode=wal; pragma wal_checkpoint(truncate);")
	return w.err
}

func (s *Store) rows(w *writer) {
	valid := w.table("ValidPaths", 9)
	for i := range s.Paths {
		p := &s.Paths[i]
		var deriver, ultimate, sigs, ca any
		switch {
		case p.Deriver >= 0:
			deriver = StoreDir + s.Paths[p.Deriver].Base
		case p.Orphan != "":
			deriver = StoreDir + p.Orphan
		}
		if p.Ultimate {
			ultimate = 1
		}
		if p.Sigs != "" {
			sigs = p.Sigs
		}
		if p.CA != "" {
			ca = p.CA
		}
		valid.add(p.ID, StoreDir+p.Base, "sha256:"+hex.EncodeToString(p.Hash[:]), p.Time, deriver, p.NarSize, ultimate, sigs, ca)
	}
	valid.flush()
	refs := w.table("Refs", 2)
	for i := range s.Paths {
		for _, r := range s.Paths[i].Refs {
			refs.add(s.Paths[i].ID, s.Paths[r].ID)
		}
	}
	refs.flush()
	outs := w.table("DerivationOutputs", 3)
	for i := range s.Paths {
		for k, o := range s.Paths[i].Outs {
			id := "out"
			if k > 0 {
				id = fmt.Sprintf("out%d", k)
			}
			outs.add(s.Paths[i].ID, id, StoreDir+s.Paths[o].Base)
		}
	}
	outs.flush()
}

// writer remembers the first error.
type writer struct {
	ctx context.Context
	c   *sql.Conn
	err error
}

func (w *writer) exec(q string) {
	if w.err == nil {
		_, w.err = w.c.ExecContext(w.ctx, q)
	}
}

// table inserts many rows a statement.
type table struct {
	w       *writer
	name    string
	columns int
	stmt    *sql.Stmt
	args    []any
}

const rowsPerInsert = 200

func (w *writer) table(name string, columns int) *table {
	t := &table{w: w, name: name, columns: columns}
	if w.err == nil {
		t.stmt, w.err = w.c.PrepareContext(w.ctx, t.insert(rowsPerInsert))
	}
	return t
}

func (t *table) insert(rows int) string {
	row := "(" + strings.Repeat("?,", t.columns-1) + "?)"
	return "insert into " + t.name + " values " + strings.Repeat(row+",", rows-1) + row
}

func (t *table) add(values ...any) {
	t.args = append(t.args, values...)
	if len(t.args) == rowsPerInsert*t.columns {
		if t.w.err == nil {
			_, t.w.err = t.stmt.ExecContext(t.w.ctx, t.args...)
		}
		t.args = t.args[:0]
	}
}

func (t *table) flush() {
	if t.w.err == nil {
		t.w.err = t.stmt.Close()
	}
	if rows := len(t.args) / t.columns; rows > 0 && t.w.err == nil {
		_, t.w.err = t.w.c.ExecContext(t.w.ctx, t.insert(rows), t.args...)
	}
}
