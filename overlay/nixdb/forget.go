package nixdb

import (
	"context"
	"database/sql"
	"errors"
	"fmt"
	"io/fs"
	"net/url"
	"os"
	"path/filepath"
)

// Forget removes the rows of paths from a database, as Nix's own invalidatePath
// does, in one transaction: all of them or none. A path that a remaining row
// refers to is refused by the database (foreign key), and then nothing is
// removed. A path without a row is no error.
//
// The caller keeps Nix from relying on these rows meanwhile: it holds gc.lock
// exclusively, as Nix's collector does.
func Forget(ctx context.Context, file string, paths []string) (err error) {
	if len(paths) == 0 {
		return nil
	}
	// Opened by the reader first: it judges file and schema.
	if _, err := Open(ctx, file); err != nil {
		return err
	}
	abs, err := filepath.Abs(file)
	if err != nil {
		return err
	}
	w, done, err := openWriter(ctx, abs)
	if err != nil {
		return err
	}
	defer func() { err = errors.Join(err, done()) }()
	tx, err := w.BeginTx(ctx, nil)
	if err != nil {
		return wrap(file, err)
	}
	defer func() { _ = tx.Rollback() }() // nothing after Commit
	// References first: a row that is referred to cannot go (schema.sql).
	for _, q := range []string{
		"delete from Refs where referrer = (select id from ValidPaths where path = ?)",
		"delete from ValidPaths where path = ?",
	} {
		for _, p := range paths {
			if _, err := tx.ExecContext(ctx, q, p); err != nil {
				return wrap(file, err)
			}
		}
	}
	return wrap(file, tx.Commit())
}

// openWriter opens the database for writing; done closes it.
func openWriter(ctx context.Context, abs string) (w *sql.DB, done func() error, err error) {
	use, err := beginWriting(ctx, abs)
	if err != nil {
		return nil, nil, err
	}
	uri := url.URL{Scheme: "file", Path: abs,
		RawQuery: fmt.Sprintf("mode=rw&_foreign_keys=1&_txlock=immediate&_busy_timeout=%d", busyTimeout.Milliseconds())}
	if w, err = sql.Open("sqlite3", uri.String()); err != nil {
		use.end()
		return nil, nil, err
	}
	return w, func() error {
		defer use.end()
		return w.Close()
	}, nil
}

// Checkpoint copies a write-ahead log of at least so many bytes into the database.
// Nix itself lets it grow to some 160 MB (sqlite.cc, wal_autocheckpoint), and nearly
// always leaves it behind; each reader that comes when no Nix runs has to read all of it.
//
// Readers and writers go on meanwhile (sqlite.org/pragma.html#pragma_wal_checkpoint,
// PASSIVE); one that comes when nobody else has the database open may have to wait
// while the log is taken stock of or removed, as it would for another Nix.
func Checkpoint(ctx context.Context, file string, least int64) (err error) {
	abs, err := checkFile(file)
	if err != nil {
		return err
	}
	real, err := filepath.EvalSymlinks(abs)
	if err != nil {
		return err
	}
	st, err := os.Stat(real + "-wal")
	if errors.Is(err, fs.ErrNotExist) || err == nil && st.Size() < least {
		return nil
	}
	if err != nil {
		return err
	}
	w, done, err := openWriter(ctx, abs)
	if err != nil {
		return err
	}
	defer func() { err = errors.Join(err, done()) }()
	_, err = w.ExecContext(ctx, "pragma wal_checkpoint(passive)")
	return wrap(file, err)
}
