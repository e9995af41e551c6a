package nixdb

import (
	"context"
	"database/sql"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"os"
	"path/filepath"
	"strings"
	"time"

	"overkeep/overlay/nixdb/batch"
	"overkeep/overlay/wipe/needle"
)

// ScrubResult says what Scrub found and did. Numbers are of occurrences.
type ScrubResult struct {
	Hits      int   `json:"hits"`      // in the database file outside of live rows, before
	Live      int   `json:"live"`      // in live rows, with their indexes: nothing is done about these
	Vacuumed  bool  `json:"vacuumed"`  // the file was written anew
	Left      int   `json:"left"`      // in the database file outside of live rows, after
	WALBytes  int64 `json:"walBytes"`  // of the WAL or rollback journal that were overwritten
	Truncated bool  `json:"truncated"` // the WAL is empty now; false: someone uses it, but it holds none of the names
}

// Scrub makes that none of names (hash parts, base names) stands in the bytes of the
// database file outside of live rows, in its WAL or in its journal, also while Nix has
// it open. ErrBusy: someone kept it in use for longer than busyTimeout; nothing is
// broken, try again. It may be killed at any point and repeated.
//
// A page keeps what was deleted from it if the deleting SQLite was built without
// secure_delete, and copies of what was moved out of it when it was split. Only if
// there is such a copy the file is written anew, by VACUUM: that takes memory of
// about the size of the file (its temporary file must not lie in plaintext), and
// Nix's writers wait meanwhile. The file does not get smaller by it: the blocks
// given back would keep what they held.
//
// The WAL is started anew and all behind its first frames, which nobody reads until
// they are written again, is overwritten with zeros under the writer's lock
// (sqlite.org/walformat.html). In a database without WAL the journal is overwritten,
// but VACUUM gives blocks back: those are left to a trim.
func Scrub(ctx context.Context, file string, names [][]byte) (res ScrubResult, err error) {
	if len(names) == 0 {
		return res, nil
	}
	set, err := needle.New(names)
	if err != nil {
		return res, err
	}
	db, end, err := writing(ctx, file)
	if err != nil {
		return res, err
	}
	defer func() { err = errors.Join(err, end()) }()
	s := &scrubber{file: file, set: set, res: &res, deadline: time.Now().Add(busyTimeout)}
	if s.abs, err = filepath.Abs(file); err != nil {
		return res, err
	}
	if s.a, s.mode, err = connect(ctx, db); err != nil {
		return res, wrap(file, err)
	}
	defer func() { err = errors.Join(err, s.a.Close()) }()
	if s.b, _, err = connect(ctx, db); err != nil {
		return res, wrap(file, err)
	}
	defer func() { err = errors.Join(err, s.b.Close()) }()
	if s.raw, err = batch.Open(s.abs, false, busyTimeout); err != nil {
		return res, s.wrap(err)
	}
	defer func() { err = errors.Join(err, s.raw.Close()) }()
	return res, s.wrap(s.run(ctx))
}

// scrubber works with two connections: a writes, b looks on from outside of a's
// transactions.
type scrubber struct {
	file, abs, mode string
	set             *needle.Set
	res             *ScrubResult
	a, b            *sql.Conn
	raw             *batch.Conn
	deadline        time.Time // for starting over, beside the busy timeout of each lock
}

func (s *scrubber) wrap(err error) error {
	var se *batch.Error
	if errors.As(err, &se) {
		return wrapCode(s.file, se.Code, err)
	}
	return wrap(s.file, err)
}

func (s *scrubber) busy() error { return fmt.Errorf("%q: %w", s.file, ErrBusy) }

func (s *scrubber) run(ctx context.Context) error {
	hits, err := s.look(ctx)
	if err != nil {
		return err
	}
	s.res.Hits, s.res.Left = hits, hits
	if hits > 0 {
		if err := s.vacuum(ctx); err != nil {
			return err
		}
		s.res.Vacuumed = true
		if s.res.Left, err = s.look(ctx); err != nil {
			return err
		}
	}
	if s.mode != "wal" {
		return s.locked(ctx, "exclusive", func() error { return s.blank(ctx, s.abs+"-journal", 0) })
	}
	return s.wal(ctx)
}

// locked runs f in a transaction of a that changes nothing.
func (s *scrubber) locked(ctx context.Context, kind string, f func() error) (err error) {
	if _, err := s.a.ExecContext(ctx, "begin "+kind); err != nil {
		return err
	}
	defer func() {
		// Not by ctx: it must end even if that has.
		_, e := s.a.ExecContext(context.WithoutCancel(ctx), "rollback")
		err = errors.Join(err, e)
	}()
	return f()
}

// checkpoint runs one and returns how many frames the WAL has and whether all of them are
// in the database file and, by what the mode asks for, nobody was in the way.
func (s *scrubber) checkpoint(ctx context.Context, c *sql.Conn, mode string) (frames int64, all bool, err error) {
	var busy, done int64
	err = c.QueryRowContext(ctx, "pragma wal_checkpoint("+mode+")").Scan(&busy, &frames, &done)
	return frames, busy == 0 && frames == done, err
}

// look counts the occurrences in the file outside of live rows at a moment when all
// that was committed is in the file and nothing is written.
func (s *scrubber) look(ctx context.Context) (hits int, err error) {
	for again := true; again; {
		again = false
		kind := "exclusive"
		if s.mode == "wal" {
			kind = "immediate"
			if _, all, err := s.checkpoint(ctx, s.a, "restart"); err != nil {
				return 0, err
			} else if !all {
				return 0, s.busy()
			}
		}
		err := s.locked(ctx, kind, func() error {
			if s.mode == "wal" {
				// Nobody writes now; what came in between gets into the file here.
				if _, all, err := s.checkpoint(ctx, s.b, "passive"); err != nil || !all {
					again = err == nil
					return err
				}
			}
			r, err := s.raw.Raw()
			if err != nil {
				return err
			}
			hits = 0
			if err := s.set.Stream(ctx, r, func(int, int64) { hits++ }); err != nil || hits == 0 {
				s.res.Live = 0
				return err
			}
			s.res.Live, err = s.live(ctx)
			hits = max(0, hits-s.res.Live)
			return err
		})
		if err != nil {
			return 0, err
		}
		if again && time.Now().After(s.deadline) {
			return 0, s.busy()
		}
	}
	return hits, nil
}

// live counts the occurrences in the values of all rows of all tables, once more for
// each index that has the column. No row of Nix is so long that a name in it would
// be cut by the end of a page.
func (s *scrubber) live(ctx context.Context) (n int, err error) {
	tables, err := s.texts(ctx, "select name from sqlite_master where type = 'table' and rootpage > 0 union all select 'sqlite_master'")
	if err != nil {
		return 0, err
	}
	for _, t := range tables {
		columns, err := s.texts(ctx, "select name from pragma_table_info(?)", t)
		if err != nil {
			return 0, err
		}
		for _, c := range columns {
			times := 1
			if err := s.a.QueryRowContext(ctx, `select 1 + count(*) from pragma_index_list(?) l, pragma_index_info(l.name) i where i.name = ?`, t, c).Scan(&times); err != nil {
				return 0, err
			}
			if err := s.values(ctx, t, c, func(v []byte) { s.set.Find(v, func(int, int) { n += times }) }); err != nil {
				return 0, err
			}
		}
	}
	return n, nil
}

func (s *scrubber) texts(ctx context.Context, query string, args ...any) (out []string, err error) {
	rows, err := s.a.QueryContext(ctx, query, args...)
	if err != nil {
		return nil, err
	}
	defer rows.Close()
	for rows.Next() {
		var t string
		if err := rows.Scan(&t); err != nil {
			return nil, err
		}
		out = append(out, t)
	}
	return out, rows.Err()
}

func (s *scrubber) values(ctx context.Context, table, column string, each func([]byte)) error {
	quote := func(name string) string { return `"` + strings.ReplaceAll(name, `"`, `""`) + `"` }
	rows, err := s.a.QueryContext(ctx, "select "+quote(column)+" from "+quote(table)+" where typeof("+quote(column)+") in ('text', 'blob')")
	if err != nil {
		return err
	}
	defer rows.Close()
	for rows.Next() {
		var v sql.RawBytes
		if err := rows.Scan(&v); err != nil {
			return err
		}
		each(v)
	}
	return rows.Err()
}

// vacuum writes the file anew, at least as long as it was.
func (s *scrubber) vacuum(ctx context.Context) error {
	pages := func() (n, size int64, err error) {
		err = errors.Join(s.a.QueryRowContext(ctx, "pragma page_count").Scan(&n), s.a.QueryRowContext(ctx, "pragma page_size").Scan(&size))
		return n, size, err
	}
	before, _, err := pages()
	if err != nil {
		return err
	}
	if s.mode != "wal" {
		_, err := s.a.ExecContext(ctx, "vacuum")
		return err
	}
	// As long as b reads the state before, no checkpoint, of whomever, gets beyond it,
	// and so none shortens the file.
	if _, err := s.b.ExecContext(ctx, "begin"); err != nil {
		return err
	}
	defer func() { _, _ = s.b.ExecContext(context.WithoutCancel(ctx), "rollback") }()
	var n int64
	if err := s.b.QueryRowContext(ctx, "select count(*) from (select 1 from sqlite_master limit 1)").Scan(&n); err != nil {
		return err
	}
	if _, err := s.a.ExecContext(ctx, "vacuum"); err != nil {
		return err
	}
	// Pages of zeros at the end, which are then free. The table is there within the
	// transaction only.
	if _, err := s.a.ExecContext(ctx, "begin immediate"); err != nil {
		return err
	}
	err = func() error {
		if _, err := s.a.ExecContext(ctx, "create table overkeep_scrub (zeros blob)"); err != nil {
			return err
		}
		for {
			now, size, err := pages()
			if err != nil || now >= before {
				return err
			}
			if _, err := s.a.ExecContext(ctx, "insert into overkeep_scrub values (zeroblob(?))", min((before-now)*size, 64<<20)); err != nil {
				return err
			}
		}
	}()
	if err == nil {
		_, err = s.a.ExecContext(ctx, "drop table overkeep_scrub")
	}
	if err == nil {
		_, err = s.a.ExecContext(ctx, "commit")
	}
	if err != nil {
		_, _ = s.a.ExecContext(context.WithoutCancel(ctx), "rollback")
	}
	return err
}

// wal overwrites what the WAL holds of before.
func (s *scrubber) wal(ctx context.Context) error {
	for {
		if err := ctx.Err(); err != nil {
			return err
		}
		if _, all, err := s.checkpoint(ctx, s.a, "restart"); err != nil {
			return err
		} else if !all {
			return s.busy()
		}
		// The first to write after that begins at the front of the WAL, with other
		// salts in its header: no frame of before counts any more.
		before, err := s.salts()
		if err != nil {
			return err
		}
		if err := s.touch(ctx); err != nil {
			return err
		}
		anew := false
		err = s.locked(ctx, "immediate", func() error {
			after, err := s.salts()
			if err != nil || after == before {
				return err
			}
			frames, _, err := s.checkpoint(ctx, s.b, "passive")
			if err != nil {
				return err
			}
			anew = true
			var size int64
			if err := s.a.QueryRowContext(ctx, "pragma page_size").Scan(&size); err != nil {
				return err
			}
			const header, frameHeader = 32, 24
			return s.blank(ctx, s.abs+"-wal", header+max(0, frames)*(frameHeader+size))
		})
		if err != nil {
			return err
		}
		if anew {
			break
		}
		if time.Now().After(s.deadline) {
			return s.busy() // someone writes all the time, or reads what was before
		}
	}
	_, all, err := s.checkpoint(ctx, s.a, "truncate")
	s.res.Truncated = all
	return err
}

// touch commits a page without changing anything in it that has a meaning: SQLite
// writes the first one for a version that is set to what it was.
func (s *scrubber) touch(ctx context.Context) error {
	var version int64
	if _, err := s.a.ExecContext(ctx, "begin immediate"); err != nil {
		return err
	}
	err := s.a.QueryRowContext(ctx, "pragma user_version").Scan(&version)
	if err == nil {
		_, err = s.a.ExecContext(ctx, fmt.Sprintf("pragma user_version = %d", version))
	}
	if err == nil {
		_, err = s.a.ExecContext(ctx, "commit")
	}
	if err != nil {
		_, _ = s.a.ExecContext(context.WithoutCancel(ctx), "rollback")
	}
	return err
}

// salts are what tells the frames of a WAL from those of before. Files beside the
// database have no locks that closing them could drop.
func (s *scrubber) salts() (salts [8]byte, err error) {
	f, err := os.Open(s.abs + "-wal")
	if err != nil {
		return salts, ignore(err, fs.ErrNotExist)
	}
	defer f.Close()
	if _, err = f.ReadAt(salts[:], 16); errors.Is(err, io.EOF) {
		return [8]byte{}, nil // empty
	}
	return salts, err
}

func ignore(err, what error) error {
	if errors.Is(err, what) {
		return nil
	}
	return err
}

// blank overwrites a file from an offset to its end with zeros, durably.
func (s *scrubber) blank(ctx context.Context, name string, from int64) (err error) {
	f, err := os.OpenFile(name, os.O_WRONLY, 0)
	if err != nil {
		return ignore(err, fs.ErrNotExist)
	}
	defer func() { err = errors.Join(err, f.Close()) }()
	st, err := f.Stat()
	if err != nil {
		return err
	}
	zeros := make([]byte, 1<<20)
	for at := from; at < st.Size(); {
		if err := ctx.Err(); err != nil {
			return err
		}
		n, err := f.WriteAt(zeros[:min(int64(len(zeros)), st.Size()-at)], at)
		at += int64(n)
		s.res.WALBytes += int64(n)
		if err != nil {
			return err
		}
	}
	return f.Sync()
}
