package nixdb

import (
	"context"
	"database/sql"
	"errors"
	"fmt"
	"net/url"
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
	use, err := beginWriting(ctx, abs)
	if err != nil {
		return err
	}
	defer use.end()
	uri := url.URL{Scheme: "file", Path: abs,
		RawQuery: fmt.Sprintf("mode=rw&_foreign_keys=1&_txlock=immediate&_busy_timeout=%d", busyTimeout.Milliseconds())}
	w, err := sql.Open("sqlite3", uri.String())
	if err != nil {
		return err
	}
	defer func() { err = errors.Join(err, w.Close()) }()
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
