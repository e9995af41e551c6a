package nixdb

import (
	"context"
	"database/sql"
)

// Between yields the valid paths from (included) to (excluded) in byte order: with
// "/nix/store/HASH" and "/nix/store/HASH." those of a hash, by the index.
func (d *DB) Between(ctx context.Context, from, to string, each func(path string)) error {
	return d.paths(ctx, "select path from ValidPaths where path >= ? and path < ?", each, from, to)
}

// Holding yields the valid paths that hold a text. It reads all of them; the index
// of paths is enough for that.
func (d *DB) Holding(ctx context.Context, text string, each func(path string)) error {
	return d.paths(ctx, "select path from ValidPaths where instr(path, ?) > 0", each, text)
}

func (d *DB) paths(ctx context.Context, query string, each func(path string), args ...any) error {
	rows, err := d.db.QueryContext(ctx, query, args...)
	if err != nil {
		return d.wrap(err)
	}
	defer rows.Close()
	for rows.Next() {
		var p sql.RawBytes
		if err := rows.Scan(&p); err != nil {
			return d.badRow()
		}
		each(string(p))
	}
	return d.wrap(rows.Err())
}
