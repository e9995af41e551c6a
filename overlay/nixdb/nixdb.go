// Package nixdb reads a Nix database (SQLite, schema 10) beside a live Nix.
//
// It promises: nothing is ever written to the database, what Nix committed
// before a call is seen by it (the WAL is read, the file is never opened as
// immutable), and a database that is missing, damaged or of another schema is a
// typed error, not an empty list.
//
// Start with Open for a store's db.sqlite, or LowerNeeds for what a keep needs
// of the system store. Watch tells when Nix wrote. It is a reader for thousands
// of paths at a time, not the fast loader for a policy's graph, and not for
// databases on a read-only file system (WAL needs to write its index, -shm).
//
// Never open db.sqlite by other means in the same process: closing any
// descriptor of it drops SQLite's POSIX locks (sqlite.org/howtocorrupt.html, 2.2).
package nixdb

import (
	"context"
	"database/sql"
	"errors"
	"fmt"
	"io/fs"
	"iter"
	"net/url"
	"os"
	"path/filepath"
	"strings"
	"time"

	"github.com/mattn/go-sqlite3"
)

var (
	// ErrMissing: there is no database at the path.
	ErrMissing = errors.New("no Nix database")
	// ErrCorrupt: SQLite says that the file is damaged or is no database.
	ErrCorrupt = errors.New("damaged Nix database")
	// ErrSchema: not a Nix database of schema 10.
	ErrSchema = errors.New("Nix database of another schema")
	// ErrBusy: a lock was held for longer than busyTimeout.
	ErrBusy = errors.New("Nix database is locked")
	// ErrUnreadable: it exists but cannot be opened, such as in WAL mode on a
	// read-only file system or without permission.
	ErrUnreadable = errors.New("Nix database cannot be opened")
)

// schema is the version in the file "schema" beside the database since Nix 2.0.
const schema = "10"

const busyTimeout = 5 * time.Second

// DB is an open database. It is safe for concurrent use.
type DB struct {
	db   *sql.DB
	path string
}

// PathInfo is a row of ValidPaths.
type PathInfo struct {
	ID               int64
	Path             string // /nix/store/HASH-NAME
	Hash             string // as stored: sha256:HEX
	RegistrationTime int64  // seconds since 1970
	Deriver          string // store path or empty
	NarSize          int64  // bytes, 0 if not known
	Ultimate         bool   // built here
	Sigs             []string
	CA               string // content address or empty
}

// Open opens the database file (…/db/db.sqlite) for reading.
func Open(ctx context.Context, path string) (*DB, error) {
	abs, err := checkFile(path)
	if err != nil {
		return nil, err
	}
	uri := url.URL{Scheme: "file", Path: abs, RawQuery: fmt.Sprintf("mode=ro&_query_only=1&_busy_timeout=%d", busyTimeout.Milliseconds())}
	db, err := sql.Open("sqlite3", uri.String())
	if err != nil {
		return nil, err
	}
	d := &DB{db: db, path: path}
	if err := d.check(ctx); err != nil {
		_ = db.Close()
		return nil, err
	}
	return d, nil
}

// checkFile judges the file and the schema file beside it, if there is one, and
// returns the absolute path. It opens no database.
func checkFile(path string) (abs string, err error) {
	st, err := os.Stat(path)
	switch {
	case errors.Is(err, fs.ErrNotExist):
		return "", fmt.Errorf("%q: %w", path, ErrMissing)
	case err != nil:
		return "", fmt.Errorf("%w: %w", ErrUnreadable, err)
	case !st.Mode().IsRegular():
		return "", fmt.Errorf("%q is not a regular file: %w", path, ErrCorrupt)
	}
	b, err := os.ReadFile(filepath.Join(filepath.Dir(path), "schema"))
	if err == nil && strings.TrimSpace(string(b)) != schema {
		return "", fmt.Errorf("%q: %w", path, ErrSchema)
	}
	return filepath.Abs(path)
}

// Close closes the database.
func (d *DB) Close() error { return d.db.Close() }

// check compares the tables used here.
func (d *DB) check(ctx context.Context) error {
	for _, q := range []string{
		"select id, path, hash, registrationTime, deriver, narSize, ultimate, sigs, ca from ValidPaths limit 1",
		"select referrer, reference from Refs limit 1",
	} {
		rows, err := d.db.QueryContext(ctx, q)
		if err == nil {
			rows.Next()
			err = errors.Join(rows.Err(), rows.Close())
		}
		if err != nil {
			return d.wrap(err)
		}
	}
	return nil
}

// wrap gives an error of SQLite its type. No text of a row gets in.
func (d *DB) wrap(err error) error {
	var se sqlite3.Error
	if err == nil || !errors.As(err, &se) {
		return err
	}
	return wrapCode(d.path, int(se.Code), err)
}

// wrapCode gives an error its type by SQLite's result code, primary or extended.
func wrapCode(path string, code int, err error) error {
	kind := error(nil)
	switch sqlite3.ErrNo(code & 0xff) {
	case sqlite3.ErrCorrupt, sqlite3.ErrNotADB, sqlite3.ErrTooBig:
		kind = ErrCorrupt
	case sqlite3.ErrError: // no such table, no such column
		kind = ErrSchema
	case sqlite3.ErrBusy, sqlite3.ErrLocked:
		kind = ErrBusy
	case sqlite3.ErrCantOpen, sqlite3.ErrReadonly, sqlite3.ErrPerm, sqlite3.ErrIoErr, sqlite3.ErrAuth:
		kind = ErrUnreadable
	default:
		return fmt.Errorf("%q: %w", path, err)
	}
	return fmt.Errorf("%q: %w: %w", path, kind, err)
}

// rows calls each for every row of a query.
func (d *DB) rows(ctx context.Context, q querier, query string, each func(*sql.Rows) error) error {
	rows, err := q.QueryContext(ctx, query)
	if err != nil {
		return d.wrap(err)
	}
	defer rows.Close()
	for rows.Next() {
		if err := each(rows); err != nil {
			return err
		}
	}
	return d.wrap(rows.Err())
}

type querier interface {
	QueryContext(ctx context.Context, query string, args ...any) (*sql.Rows, error)
}

// errStop ends an iteration that its consumer left.
var errStop = errors.New("stop")

// ValidPaths yields every row of ValidPaths as of one moment, by id. An error
// is the last thing yielded.
func (d *DB) ValidPaths(ctx context.Context) iter.Seq2[PathInfo, error] {
	return func(yield func(PathInfo, error) bool) {
		err := d.rows(ctx, d.db, `select id, path, hash, registrationTime, ifnull(deriver,''), ifnull(narSize,0),
			ifnull(ultimate,0), ifnull(sigs,''), ifnull(ca,'') from ValidPaths order by id`, func(r *sql.Rows) error {
			var p PathInfo
			var sigs string
			if err := r.Scan(&p.ID, &p.Path, &p.Hash, &p.RegistrationTime, &p.Deriver, &p.NarSize, &p.Ultimate, &sigs, &p.CA); err != nil {
				return d.badRow()
			}
			p.Sigs = strings.Fields(sigs)
			if !yield(p, nil) {
				return errStop
			}
			return nil
		})
		if err != nil && err != errStop {
			yield(PathInfo{}, err)
		}
	}
}

// badRow hides what a column of the wrong type holds: it may be a name.
func (d *DB) badRow() error {
	return fmt.Errorf("%q: %w: a column has the wrong type", d.path, ErrCorrupt)
}

// Totals says how much a store holds.
type Totals struct {
	Paths    int64
	NarBytes int64 // sum of the NAR sizes that are known
}

// Totals counts the valid paths.
func (d *DB) Totals(ctx context.Context) (Totals, error) {
	var t Totals
	err := d.db.QueryRowContext(ctx, "select count(*), ifnull(sum(narSize),0) from ValidPaths").Scan(&t.Paths, &t.NarBytes)
	return t, d.wrap(err)
}

// Exists returns those of paths that are valid, in their order.
func (d *DB) Exists(ctx context.Context, paths []string) ([]string, error) {
	tx, err := d.db.BeginTx(ctx, nil)
	if err != nil {
		return nil, d.wrap(err)
	}
	defer tx.Rollback()
	stmt, err := tx.PrepareContext(ctx, "select 1 from ValidPaths where path = ?")
	if err != nil {
		return nil, d.wrap(err)
	}
	defer stmt.Close()
	var valid []string
	for _, p := range paths {
		var one int
		switch err := stmt.QueryRowContext(ctx, p).Scan(&one); {
		case err == nil:
			valid = append(valid, p)
		case !errors.Is(err, sql.ErrNoRows):
			return nil, d.wrap(err)
		}
	}
	return valid, nil
}

// Graph is the paths of a database, or a part of them, with the references
// between them as pairs of indexes: referrer, reference.
type Graph struct {
	Paths []string
	Refs  [][2]int32
}

// Graph reads all paths for which keep says true (nil: all) and the references
// among them, as of one moment.
func (d *DB) Graph(ctx context.Context, keep func(path string) bool) (Graph, error) {
	var g Graph
	tx, err := d.db.BeginTx(ctx, nil)
	if err != nil {
		return g, d.wrap(err)
	}
	defer tx.Rollback()
	index := map[int64]int32{}
	var id int64
	var path string
	err = d.rows(ctx, tx, "select id, path from ValidPaths order by id", func(r *sql.Rows) error {
		if err := r.Scan(&id, &path); err != nil {
			return d.badRow()
		}
		if keep == nil || keep(path) {
			index[id] = int32(len(g.Paths))
			g.Paths = append(g.Paths, path)
		}
		return nil
	})
	if err != nil {
		return Graph{}, err
	}
	err = d.rows(ctx, tx, "select referrer, reference from Refs", func(r *sql.Rows) error {
		var from, to int64
		if err := r.Scan(&from, &to); err != nil {
			return d.badRow()
		}
		a, ok1 := index[from]
		b, ok2 := index[to]
		if ok1 && ok2 {
			g.Refs = append(g.Refs, [2]int32{a, b})
		}
		return nil
	})
	if err != nil {
		return Graph{}, err
	}
	return g, nil
}
