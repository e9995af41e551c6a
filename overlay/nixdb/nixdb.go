// Package nixdb reads a Nix database (SQLite, schema 10) beside a live Nix.
//
// It promises: nothing is ever written to the database, what Nix committed
// before a call is seen by it (the WAL is read, the file is never opened as
// immutable), and a database that is missing, damaged or of another schema is a
// typed error, not an empty list.
//
// Start with OpenSnapshot for many rows at a time, Open for single questions, or
// LowerNeeds for what a keep needs of the system store. Watch tells when Nix
// wrote. For a policy's graph use package facts. It is not for a WAL database on a
// read-only file system (its index, -shm, must exist).
//
// Reading does not disturb Nix: no lock is taken that makes it wait. In turn, a
// process that has a snapshot open cannot write to that database by another
// connection of its own; Forget waits.
//
// Never open db.sqlite by other means in the same process: closing any
// descriptor of it drops SQLite's POSIX locks (sqlite.org/howtocorrupt.html, 2.2).
package nixdb

import (
	"context"
	"errors"
	"fmt"
	"io/fs"
	"iter"
	"math"
	"os"
	"path/filepath"
	"strings"
	"time"

	"github.com/mattn/go-sqlite3"

	"overkeep/overlay/nixdb/batch"
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

// DB is a database that was there and sound when it was opened. Every method looks
// at it anew, by a Snapshot of its own. It is safe for concurrent use.
type DB struct{ path string }

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

// Open checks the database file (…/db/db.sqlite).
func Open(ctx context.Context, path string) (*DB, error) {
	s, err := OpenSnapshot(ctx, path, 1)
	if err != nil {
		return nil, err
	}
	return &DB{path}, s.Close()
}

// with runs f on the state of this moment.
func (d *DB) with(ctx context.Context, f func(*Snapshot) error) error {
	s, err := OpenSnapshot(ctx, d.path, 1)
	if err != nil {
		return err
	}
	return errors.Join(f(s), s.Close())
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

// wrap gives an error of SQLite its type. No text of a row gets in.
func wrap(path string, err error) error {
	var se sqlite3.Error
	if err == nil || !errors.As(err, &se) {
		return err
	}
	return wrapCode(path, int(se.Code), err)
}

// wrapCode gives an error its type by SQLite's result code, primary or extended.
func wrapCode(path string, code int, err error) error {
	kind := error(nil)
	switch sqlite3.ErrNo(code & 0xff) {
	case sqlite3.ErrCorrupt, sqlite3.ErrNotADB, sqlite3.ErrTooBig:
		kind = ErrCorrupt
	case sqlite3.ErrError: // no such table, no such column
		kind = ErrSchema
	case sqlite3.ErrBusy, sqlite3.ErrLocked, sqlite3.ErrProtocol:
		kind = ErrBusy
	case sqlite3.ErrCantOpen, sqlite3.ErrReadonly, sqlite3.ErrPerm, sqlite3.ErrIoErr, sqlite3.ErrAuth:
		kind = ErrUnreadable
	default:
		return fmt.Errorf("%q: %w", path, err)
	}
	return fmt.Errorf("%q: %w: %w", path, kind, err)
}

// errStop ends an iteration that its consumer left.
var errStop = errors.New("stop")

// ValidPaths yields every row of ValidPaths as of one moment, by id. An error
// is the last thing yielded.
func (d *DB) ValidPaths(ctx context.Context) iter.Seq2[PathInfo, error] {
	return func(yield func(PathInfo, error) bool) {
		err := d.with(ctx, func(s *Snapshot) error {
			return s.Paths(ctx, 0, math.MinInt64, math.MaxInt64, true, func(r *Row) error {
				if r.Wrong {
					return d.badRow()
				}
				p := PathInfo{r.ID, string(r.Path), string(r.Hash), r.RegistrationTime, string(r.Deriver), r.NarSize, r.Ultimate,
					strings.Fields(string(r.Sigs)), string(r.CA)}
				if !yield(p, nil) {
					return errStop
				}
				return nil
			})
		})
		if err != nil && !errors.Is(err, errStop) {
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
	err := d.with(ctx, func(s *Snapshot) error {
		return s.query(ctx, 0, "select count(*), ifnull(sum(narSize),0) from ValidPaths", 2, 1, nil, func(r *batch.Rows, i int) error {
			t = Totals{r.Int(i, 0), r.Int(i, 1)}
			return nil
		})
	})
	return t, err
}

// Exists returns those of paths that are valid, in their order.
func (d *DB) Exists(ctx context.Context, paths []string) ([]string, error) {
	var valid []string
	err := d.with(ctx, func(s *Snapshot) error {
		l, err := s.Lookup()
		if err != nil {
			return err
		}
		defer l.Close()
		var row Row
		for _, p := range paths {
			found, err := l.ByPath(ctx, []byte(p), &row)
			if err != nil {
				return err
			}
			if found {
				valid = append(valid, p)
			}
		}
		return nil
	})
	if err != nil {
		return nil, err
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
	index := map[int64]int32{}
	err := d.with(ctx, func(s *Snapshot) error {
		err := s.Paths(ctx, 0, math.MinInt64, math.MaxInt64, false, func(r *Row) error {
			if r.Path == nil {
				return d.badRow()
			}
			if path := string(r.Path); keep == nil || keep(path) {
				index[r.ID] = int32(len(g.Paths))
				g.Paths = append(g.Paths, path)
			}
			return nil
		})
		if err != nil {
			return err
		}
		return s.Refs(ctx, 0, math.MinInt64, math.MaxInt64, func(refs []Ref) error {
			for _, r := range refs {
				a, ok1 := index[r[0]]
				b, ok2 := index[r[1]]
				if ok1 && ok2 {
					g.Refs = append(g.Refs, [2]int32{a, b})
				}
			}
			return nil
		})
	})
	if err != nil {
		return Graph{}, err
	}
	return g, nil
}
