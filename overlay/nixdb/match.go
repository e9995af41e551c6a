package nixdb

import (
	"context"

	"overkeep/overlay/nixdb/batch"
)

// Between yields the valid paths from (included) to (excluded) in byte order: with
// "/nix/store/HASH" and "/nix/store/HASH." those of a hash, by the index.
func (d *DB) Between(ctx context.Context, from, to string, each func(path string)) error {
	return d.paths(ctx, "select path from ValidPaths where path >= ? and path < ?", each, []byte(from), []byte(to))
}

// Holding yields the valid paths that hold a text. It reads all of them; the index
// of paths is enough for that.
func (d *DB) Holding(ctx context.Context, text string, each func(path string)) error {
	return d.paths(ctx, "select path from ValidPaths where instr(path, ?) > 0", each, []byte(text))
}

// pathsPerBatch is how many paths are taken from SQLite at a time.
const pathsPerBatch = 512

func (d *DB) paths(ctx context.Context, query string, each func(path string), bind ...any) error {
	return d.with(ctx, func(s *Snapshot) error {
		return s.query(ctx, 0, query, 1, pathsPerBatch, bind, func(r *batch.Rows, row int) error {
			each(string(r.Text(row, 0)))
			return nil
		})
	})
}
