package nixdb

import (
	"context"
	"database/sql"
	"errors"
	"fmt"
	"net/url"
	"slices"
	"strings"

	"github.com/mattn/go-sqlite3"
)

// Info is all that a Nix database says of one path, so that the path can be
// registered elsewhere as if it had been built or fetched there.
type Info struct {
	Path             string   `json:"path"` // /nix/store/HASH-NAME
	Deriver          string   `json:"deriver,omitempty"`
	NarHash          string   `json:"narHash"` // as stored: sha256:HEX
	NarSize          int64    `json:"narSize"` // bytes, 0 if not known
	RegistrationTime int64    `json:"registrationTime"`
	Ultimate         bool     `json:"ultimate,omitempty"`
	Sigs             []string `json:"sigs,omitempty"` // in the order of the row
	CA               string   `json:"ca,omitempty"`
	Refs             []string `json:"refs,omitempty"`    // paths, sorted; itself among them if it says so
	Outputs          []Output `json:"outputs,omitempty"` // of a .drv, by id
}

// Output is a row of DerivationOutputs: what a derivation calls an output, and
// where that is or would be.
type Output struct {
	ID   string `json:"id"`
	Path string `json:"path"`
}

// ErrInfo: an Info is not one that Nix could have written.
var ErrInfo = errors.New("not what a Nix database says of a path")

// MissingRefError: a path refers to one that is neither registered nor among those
// to register. Path is empty for one that was asked for itself.
type MissingRefError struct{ Path, Ref string }

func (e *MissingRefError) Error() string {
	if e.Path == "" {
		return fmt.Sprintf("%q is not registered", e.Ref)
	}
	return fmt.Sprintf("%q refers to %q, which is not registered", e.Path, e.Ref)
}

// ConflictError: the database knows a path with another NAR hash.
type ConflictError struct{ Path string }

func (e *ConflictError) Error() string {
	return fmt.Sprintf("%q is registered with another hash", e.Path)
}

// ReferredError: a path cannot go, for one that stays refers to it.
type ReferredError struct{ Path, By string }

func (e *ReferredError) Error() string {
	return fmt.Sprintf("%q is referred to by %q", e.Path, e.By)
}

// check refuses what Nix would not write, so that a damaged journal or archive gets
// no row into a database.
func (i *Info) check() error {
	bad := func(what string) error { return fmt.Errorf("%q: %w: %s", i.Path, ErrInfo, what) }
	if !isStorePath(i.Path) {
		return bad("no store path")
	}
	hex, ok := strings.CutPrefix(i.NarHash, "sha256:")
	if !ok || len(hex) != 64 || strings.Trim(hex, "0123456789abcdef") != "" {
		return bad("no NAR hash")
	}
	if i.NarSize < 0 || i.RegistrationTime < 0 {
		return bad("a negative number")
	}
	if i.Deriver != "" && !isStorePath(i.Deriver) {
		return bad("its deriver")
	}
	for _, s := range append(slices.Clone(i.Sigs), i.CA) {
		if strings.ContainsAny(s, " \t\r\n\x00") {
			return bad("a space in a signature or content address")
		}
	}
	if slices.Contains(i.Sigs, "") {
		return bad("an empty signature")
	}
	for _, r := range i.Refs {
		if !isStorePath(r) {
			return bad("a reference")
		}
	}
	for _, o := range i.Outputs {
		if o.ID == "" || strings.ContainsRune(o.ID, 0) || !isStorePath(o.Path) || !strings.HasSuffix(i.Path, ".drv") {
			return bad("an output")
		}
	}
	return nil
}

// isStorePath tells what can be one, in whatever store directory the database is of.
// It is laxer than storepath.IsBase, whose tests import this package.
func isStorePath(p string) bool {
	const (
		digits = "0123456789abcdfghijklmnpqrsvwxyz"
		others = "ABCDEFGHIJKLMNOPQRSTUVWXYZeotu+-._?="
	)
	n := strings.LastIndexByte(p, '/')
	base := p[n+1:]
	return n > 0 && p[0] == '/' && !strings.ContainsRune(p, 0) && len(base) >= 34 && len(base) <= 255 && base[32] == '-' &&
		strings.Trim(base[:32], digits) == "" && strings.Trim(base, digits+others) == ""
}

// writing opens a database for writing. The connections delete securely (what a row
// held is overwritten in its page), commit durably (synchronous=EXTRA, where Nix has
// NORMAL), and leave no old page in freed blocks of the disk: the WAL is not deleted
// when they are the last to close, and a rollback journal persists; Scrub
// overwrites both.
func writing(ctx context.Context, file string) (db *sql.DB, end func() error, err error) {
	abs, err := checkFile(file)
	if err != nil {
		return nil, nil, err
	}
	// Opened by the reader first: it judges file and schema.
	if _, err := Open(ctx, file); err != nil {
		return nil, nil, err
	}
	use, err := beginWriting(ctx, abs)
	if err != nil {
		return nil, nil, err
	}
	uri := url.URL{Scheme: "file", Path: abs, RawQuery: fmt.Sprintf(
		"mode=rw&_foreign_keys=1&_txlock=immediate&_secure_delete=1&_sync=EXTRA&_busy_timeout=%d", busyTimeout.Milliseconds())}
	if db, err = sql.Open("sqlite3", uri.String()); err != nil {
		use.end()
		return nil, nil, err
	}
	return db, func() error {
		err := db.Close()
		use.end()
		return wrap(file, err)
	}, nil
}

// fcntlPersistWAL is SQLITE_FCNTL_PERSIST_WAL (sqlite.org/c3ref/c_fcntl_begin_atomic_write.html).
const fcntlPersistWAL = 10

// connect takes one connection and sets it up as writing says.
func connect(ctx context.Context, db *sql.DB) (c *sql.Conn, mode string, err error) {
	if c, err = db.Conn(ctx); err != nil {
		return nil, "", err
	}
	defer func() {
		if err != nil {
			err = errors.Join(err, c.Close())
			c = nil
		}
	}()
	if err := c.Raw(func(d any) error {
		return d.(*sqlite3.SQLiteConn).SetFileControlInt("main", fcntlPersistWAL, 1)
	}); err != nil {
		return nil, "", err
	}
	for _, q := range []string{"pragma temp_store=memory", "pragma wal_autocheckpoint=0", "pragma trusted_schema=0", "pragma cell_size_check=1"} {
		if _, err := c.ExecContext(ctx, q); err != nil {
			return nil, "", err
		}
	}
	if err := c.QueryRowContext(ctx, "pragma journal_mode").Scan(&mode); err != nil {
		return nil, "", err
	}
	if mode != "wal" { // asked for on a WAL database, it would leave WAL
		if err := c.QueryRowContext(ctx, "pragma journal_mode=persist").Scan(&mode); err != nil {
			return nil, "", err
		}
	}
	return c, mode, nil
}

// inTx runs f in one transaction that has the writer's lock from the beginning.
func inTx(ctx context.Context, file string, f func(tx *sql.Tx) error) (err error) {
	db, end, err := writing(ctx, file)
	if err != nil {
		return err
	}
	defer func() { err = errors.Join(err, end()) }()
	c, _, err := connect(ctx, db)
	if err != nil {
		return wrap(file, err)
	}
	defer func() { err = errors.Join(err, c.Close()) }()
	tx, err := c.BeginTx(ctx, nil)
	if err != nil {
		return wrap(file, err)
	}
	defer func() { _ = tx.Rollback() }() // nothing after Commit
	if err := f(tx); err != nil {
		return wrap(file, err)
	}
	return wrap(file, tx.Commit())
}

// row is what decides about a path: its id, 0 if it has none, and its NAR hash.
func row(ctx context.Context, tx *sql.Tx, path string) (id int64, hash string, err error) {
	err = tx.QueryRowContext(ctx, "select id, hash from ValidPaths where path = ?", path).Scan(&id, &hash)
	if errors.Is(err, sql.ErrNoRows) {
		return 0, "", nil
	}
	return id, hash, err
}

// Confirm makes what readers see now what stays, durably, by one transaction more that
// changes no row. Call it before deciding by a read after a crash, or after Register or
// Invalidate failed: a transaction whose last sync fails is rolled back for everybody
// who looks, but its frames, with the mark of the commit, stay at the end of the WAL,
// and the next to open the database alone would take them for committed
// (sqlite.org/walformat.html); and one that a killed process wrote may be seen and not
// yet be on disk. The transaction is written over the former and synced with the latter.
func Confirm(ctx context.Context, file string) error {
	return inTx(ctx, file, func(tx *sql.Tx) error {
		var version int64
		if err := tx.QueryRowContext(ctx, "pragma user_version").Scan(&version); err != nil {
			return err
		}
		// Also the same number is a page that is written.
		_, err := tx.ExecContext(ctx, fmt.Sprintf("pragma user_version = %d", version))
		return err
	})
}

// Register adds rows, with their references and outputs, in one transaction: all or
// none, and durably when it returns. A reference is to a path of infos or to one
// that is registered; else it is a *MissingRefError. A path that is registered with
// the same NAR hash keeps its row, to which missing references and outputs are
// added; with another hash it is a *ConflictError. Repeating it changes nothing.
//
// The caller holds what Nix asks for (gc.lock, the path's lock). Values are written
// as Nix does (libstore/local-store.cc, addValidPath): NULL for what is not known.
func Register(ctx context.Context, file string, infos []Info) error {
	if len(infos) == 0 {
		return nil
	}
	for i := range infos {
		if err := infos[i].check(); err != nil {
			return err
		}
	}
	return inTx(ctx, file, func(tx *sql.Tx) error {
		ids := map[string]int64{}
		for _, i := range infos {
			id, hash, err := row(ctx, tx, i.Path)
			if err != nil {
				return err
			}
			if id != 0 && hash != i.NarHash {
				return &ConflictError{i.Path}
			}
			if id == 0 {
				r, err := tx.ExecContext(ctx, `insert into ValidPaths (path, hash, registrationTime, deriver, narSize, ultimate, sigs, ca)
					values (?, ?, ?, nullif(?, ''), nullif(?, 0), nullif(?, 0), nullif(?, ''), nullif(?, ''))`,
					i.Path, i.NarHash, i.RegistrationTime, i.Deriver, i.NarSize, i.Ultimate, strings.Join(i.Sigs, " "), i.CA)
				if err != nil {
					return err
				}
				if id, err = r.LastInsertId(); err != nil {
					return err
				}
			}
			ids[i.Path] = id
		}
		for _, i := range infos {
			for _, ref := range i.Refs {
				to, ok := ids[ref]
				if !ok {
					var err error
					if to, _, err = row(ctx, tx, ref); err != nil {
						return err
					}
					if to == 0 {
						return &MissingRefError{i.Path, ref}
					}
					ids[ref] = to
				}
				if _, err := tx.ExecContext(ctx, "insert or ignore into Refs (referrer, reference) values (?, ?)", ids[i.Path], to); err != nil {
					return err
				}
			}
			for _, o := range i.Outputs {
				if _, err := tx.ExecContext(ctx, "insert or ignore into DerivationOutputs (drv, id, path) values (?, ?, ?)", ids[i.Path], o.ID, o.Path); err != nil {
					return err
				}
			}
		}
		return nil
	})
}

// Invalidate removes the rows of paths, their references and the outputs of
// derivations in one transaction, with secure_delete: all or none, and durably when
// it returns. A path to which a remaining row refers is a *ReferredError; one of expect
// (path to NAR hash, may be nil) that is registered with another hash a
// *ConflictError. A path without a row is no error, so it may be repeated.
//
// What names a removed path still: see ClearDeriver. What stands in free pages and in
// the WAL: see Scrub.
func Invalidate(ctx context.Context, file string, paths []string, expect map[string]string) error {
	if len(paths) == 0 {
		return nil
	}
	return inTx(ctx, file, func(tx *sql.Tx) error {
		ids, going := map[string]int64{}, map[int64]bool{}
		for _, p := range paths {
			id, hash, err := row(ctx, tx, p)
			if err != nil {
				return err
			}
			if id == 0 {
				continue
			}
			if want, ok := expect[p]; ok && want != hash {
				return &ConflictError{p}
			}
			ids[p], going[id] = id, true
		}
		for p, id := range ids {
			if err := referrers(ctx, tx, id, func(by int64, path string) error {
				if going[by] {
					return nil
				}
				return &ReferredError{p, path}
			}); err != nil {
				return err
			}
		}
		// References first: a row that is referred to cannot go (schema.sql).
		for _, q := range []string{
			"delete from Refs where referrer = ?",
			"delete from DerivationOutputs where drv = ?",
			"delete from ValidPaths where id = ?",
		} {
			for id := range going {
				if _, err := tx.ExecContext(ctx, q, id); err != nil {
					return err
				}
			}
		}
		return nil
	})
}

func referrers(ctx context.Context, tx *sql.Tx, id int64, each func(by int64, path string) error) error {
	rows, err := tx.QueryContext(ctx, "select referrer, ifnull((select path from ValidPaths where id = referrer), '?') from Refs where reference = ?", id)
	if err != nil {
		return err
	}
	defer rows.Close()
	for rows.Next() {
		var by int64
		var path string
		if err := rows.Scan(&by, &path); err != nil {
			return err
		}
		if err := each(by, path); err != nil {
			return err
		}
	}
	return rows.Err()
}

// ClearDeriver makes that no row names one of drvs as its deriver, and says how many
// did. Nix takes such a path as one whose deriver is not known. It reads the whole table.
func ClearDeriver(ctx context.Context, file string, drvs []string) (n int, err error) {
	named, err := Derived(ctx, file, drvs)
	if err != nil || len(named) == 0 {
		return 0, err
	}
	is := map[string]bool{}
	for _, d := range drvs {
		is[d] = true
	}
	err = inTx(ctx, file, func(tx *sql.Tx) error {
		n = 0
		for _, p := range named {
			var deriver sql.NullString
			err := tx.QueryRowContext(ctx, "select deriver from ValidPaths where path = ?", p).Scan(&deriver)
			if errors.Is(err, sql.ErrNoRows) || err == nil && !is[deriver.String] {
				continue // changed meanwhile
			}
			if err == nil {
				_, err = tx.ExecContext(ctx, "update ValidPaths set deriver = null where path = ?", p)
			}
			if err != nil {
				return err
			}
			n++
		}
		return nil
	})
	if err != nil {
		return 0, err
	}
	return n, nil
}
