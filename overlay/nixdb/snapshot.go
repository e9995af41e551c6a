package nixdb

import (
	"context"
	"errors"
	"fmt"
	"math"
	"strings"

	"overkeep/overlay/nixdb/batch"
)

// Snapshot is a database as of one moment, for reading all of it or any part of
// it fast. It holds one read transaction, or several that see the same state so
// that as many goroutines can read at once: each uses a reader of its own,
// numbered from 0.
//
// While it is open, Nix writes and commits as ever (WAL), only the WAL cannot be
// checkpointed beyond this moment. In a database without WAL (use-sqlite-wal =
// false) Nix's commits wait until it is closed.
type Snapshot struct {
	path    string
	use     *use
	readers []*batch.Conn
	// AnyCA: the database has realisations of floating content-addressed
	// derivations, so a content address does not prove a fixed output.
	AnyCA bool
}

// OpenSnapshot opens the database file (…/db/db.sqlite), checks that its tables are
// those of schema 10, and takes a snapshot for as many readers. Errors are those
// of Open.
//
// Nix never waits for it, not even for the instant in which SQLite readers
// otherwise lock the WAL index to set it up or to mend it. The price: until the
// snapshot is closed, nothing else in this process can write to the database;
// Forget waits for that.
func OpenSnapshot(ctx context.Context, path string, readers int) (_ *Snapshot, err error) {
	abs, err := checkFile(path)
	if err != nil {
		return nil, err
	}
	s := &Snapshot{path: path}
	defer func() {
		if err != nil {
			err = errors.Join(err, s.Close())
		}
	}()
	if s.use, err = beginReading(abs); err != nil {
		return nil, err
	}
	for n, quiet := 0, s.use.quiet; ; n++ {
		err := s.begin(ctx, abs, max(1, readers), quiet)
		if err == nil {
			return s, s.check(ctx)
		}
		again, still := settle(ctx, abs, err, n)
		if !quiet || !again {
			return nil, s.wrap(err)
		}
		quiet = still
		if err := s.drop(); err != nil {
			return nil, err
		}
	}
}

// begin opens the readers and starts their transactions so that all see the same
// state: SQLite tells a connection outside of a transaction, the witness, whether
// anyone has committed since it asked last (sqlite.org/pragma.html#pragma_data_version).
// After some attempts, beside a writer that commits faster than a transaction
// begins, one reader is left.
func (s *Snapshot) begin(ctx context.Context, abs string, readers int, quiet bool) error {
	const attempts = 64
	for range readers {
		c, err := batch.Open(abs, quiet, busyTimeout)
		if err != nil {
			return err
		}
		s.readers = append(s.readers, c)
	}
	start := func() error {
		for _, c := range s.readers {
			if err := c.Exec("begin"); err != nil {
				return err
			}
			// "begin" alone takes no snapshot; the first read does.
			if _, err := scalar(c, "select count(*) from (select 1 from sqlite_master limit 1)"); err != nil {
				return err
			}
		}
		return nil
	}
	if len(s.readers) == 1 {
		return start()
	}
	witness, err := batch.Open(abs, quiet, busyTimeout)
	if err != nil {
		return err
	}
	defer witness.Close()
	for range attempts {
		if err := ctx.Err(); err != nil {
			return err
		}
		before, err := scalar(witness, "pragma data_version")
		if err != nil {
			return err
		}
		if err := start(); err != nil {
			return err
		}
		after, err := scalar(witness, "pragma data_version")
		if err != nil {
			return err
		}
		if before == after {
			return nil
		}
		for _, c := range s.readers {
			if err := c.Exec("rollback"); err != nil {
				return err
			}
		}
	}
	for _, c := range s.readers[1:] {
		if err := c.Close(); err != nil {
			return err
		}
	}
	s.readers = s.readers[:1]
	return start()
}

// scalar runs a query for one integer.
func scalar(c *batch.Conn, query string) (int64, error) {
	st, err := c.Prepare(query, 1)
	if err != nil {
		return 0, err
	}
	defer st.Close()
	rows := batch.NewRows(1, 1)
	if _, err := st.Next(rows); err != nil {
		return 0, err
	}
	if rows.N == 0 {
		return 0, nil
	}
	return rows.Int(0, 0), nil
}

// Readers is how many goroutines can read at once: as many as asked for, or one.
func (s *Snapshot) Readers() int { return len(s.readers) }

// Close ends the transactions.
func (s *Snapshot) Close() error {
	err := s.drop()
	s.use.end()
	s.use = nil
	return err
}

func (s *Snapshot) drop() error {
	var errs []error
	for _, c := range s.readers {
		errs = append(errs, c.Close())
	}
	s.readers = nil
	return s.wrap(errors.Join(errs...))
}

// columns that are read here, per table.
var columns = map[string][]string{
	"ValidPaths":        {"id", "path", "hash", "registrationTime", "deriver", "narSize", "ultimate", "sigs", "ca"},
	"Refs":              {"referrer", "reference"},
	"DerivationOutputs": {"drv", "id", "path"},
}

// check refuses what is not a database of Nix: a table that is missing or is a view
// or virtual (it would run code of the file's author), one that lacks a column
// or computes it, an id that is no row id, and references without the index
// that gives them in order.
func (s *Snapshot) check(ctx context.Context) error {
	bad := func(what string) error { return fmt.Errorf("%q: %w: %s", s.path, ErrSchema, what) }
	for table, want := range columns {
		kind := ""
		err := s.query(ctx, 0, "select name, type, wr from pragma_table_list where schema = 'main' and name = '"+table+"' collate nocase", 3, few, nil,
			func(r *batch.Rows, i int) error {
				if kind = string(r.Text(i, 1)); r.Int(i, 2) != 0 {
					kind = "without row ids"
				}
				return nil
			})
		if err != nil {
			return err
		}
		if kind != "table" {
			return bad("no table " + table)
		}
		have := map[string]string{}
		err = s.query(ctx, 0, "select name, type, pk, hidden from pragma_table_xinfo('"+table+"')", 4, few, nil,
			func(r *batch.Rows, i int) error {
				name := string(r.Text(i, 0))
				have[name] = fmt.Sprintf("%s %d %d", strings.ToLower(string(r.Text(i, 1))), r.Int(i, 2), r.Int(i, 3))
				return nil
			})
		if err != nil {
			return err
		}
		for _, c := range want {
			if d, ok := have[c]; !ok || strings.HasSuffix(d, " 2") || strings.HasSuffix(d, " 3") {
				return bad("no column " + c + " in " + table)
			}
		}
		if table == "ValidPaths" && have["id"] != "integer 1 0" {
			return bad("ValidPaths.id is not the row id")
		}
	}
	n := 0
	err := s.query(ctx, 0, `select count(*) from pragma_index_list('Refs') l where not partial and
		(select group_concat(name) from (select name from pragma_index_info(l.name) order by seqno)) = 'referrer,reference'`, 1, few, nil,
		func(r *batch.Rows, i int) error { n = int(r.Int(i, 0)); return nil })
	if err != nil {
		return err
	}
	if n == 0 {
		return bad("no index on Refs (referrer, reference)")
	}
	return s.checkCA(ctx)
}

// checkCA looks for what Nix records of floating content-addressed derivations, in
// a table that was Realisations up to 2.32 and BuildTrace… since.
func (s *Snapshot) checkCA(ctx context.Context) error {
	var tables []string
	err := s.query(ctx, 0, `select name from pragma_table_list where schema = 'main' and type = 'table'
		and (name like 'Realisations%' or name like 'BuildTrace%')`, 1, few, nil, func(r *batch.Rows, i int) error {
		tables = append(tables, string(r.Text(i, 0)))
		return nil
	})
	for _, t := range tables {
		if err == nil && !s.AnyCA {
			err = s.query(ctx, 0, `select 1 from "`+strings.ReplaceAll(t, `"`, `""`)+`" limit 1`, 1, few, nil,
				func(*batch.Rows, int) error { s.AnyCA = true; return nil })
		}
	}
	return err
}

// query calls each for every row of a statement, reading n at a time.
func (s *Snapshot) query(ctx context.Context, reader int, query string, columns, n int, bind []any, each func(r *batch.Rows, row int) error) error {
	st, err := s.readers[reader].Prepare(query, columns)
	if err != nil {
		return s.wrap(err)
	}
	defer st.Close()
	return s.run(ctx, st, batch.NewRows(columns, n), bind, each)
}

// few rows are expected.
const few = 8

// run binds, steps through and resets a statement.
func (s *Snapshot) run(ctx context.Context, st *batch.Stmt, rows *batch.Rows, bind []any, each func(r *batch.Rows, row int) error) error {
	defer st.Reset()
	for n, b := range bind {
		var err error
		switch b := b.(type) {
		case int64:
			err = st.BindInt(n+1, b)
		case []byte:
			err = st.BindText(n+1, b)
		default:
			err = fmt.Errorf("bind %T", b)
		}
		if err != nil {
			return s.wrap(err)
		}
	}
	for more := true; more; {
		if err := ctx.Err(); err != nil {
			return err
		}
		var err error
		if more, err = st.Next(rows); err != nil {
			return s.wrap(err)
		}
		for i := range rows.N {
			if err := each(rows, i); err != nil {
				return err
			}
		}
	}
	return nil
}

func (s *Snapshot) wrap(err error) error {
	var se *batch.Error
	if err == nil || !errors.As(err, &se) {
		return err
	}
	return wrapCode(s.path, se.Code, err)
}

// Row is a row of ValidPaths as it stands in the database: no value has been
// checked. Texts are valid until the function that got the row returns.
type Row struct {
	ID               int64
	Path             []byte
	Hash             []byte
	RegistrationTime int64
	Deriver          []byte // nil: NULL
	NarSize          int64
	Ultimate         bool
	HasSigs          bool
	Sigs             []byte // only where asked for
	CA               []byte // nil: NULL
	Wrong            bool   // a value has a type that Nix does not write, or is beyond any bound
}

// Paths calls each for the rows of ValidPaths with lo <= id < hi, ascending by id;
// hi = math.MaxInt64 is no upper bound. Sigs are only read where asked for.
func (s *Snapshot) Paths(ctx context.Context, reader int, lo, hi int64, sigs bool, each func(*Row) error) error {
	if hi == math.MaxInt64 {
		return s.paths(ctx, reader, "where id >= ? order by id", []any{lo}, sigs, each)
	}
	return s.paths(ctx, reader, "where id >= ? and id < ? order by id", []any{lo, hi}, sigs, each)
}

// Signed calls each for at most n rows of ValidPaths with signatures and an id
// above after, ascending.
func (s *Snapshot) Signed(ctx context.Context, after int64, n int, each func(*Row) error) error {
	return s.paths(ctx, 0, "where id > ? and sigs is not null order by id limit ?", []any{after, int64(n)}, true, each)
}

const pathColumns = 9

func selectPaths(sigs bool) string {
	col := "sigs is not null"
	if sigs {
		col = "sigs"
	}
	return "select id, path, hash, deriver, narSize, ultimate, " + col + ", ca, registrationTime from ValidPaths "
}

func (s *Snapshot) paths(ctx context.Context, reader int, where string, bind []any, sigs bool, each func(*Row) error) error {
	var row Row
	return s.query(ctx, reader, selectPaths(sigs)+where, pathColumns, batch.ManyRows, bind, func(r *batch.Rows, i int) error {
		row.fill(r, i, sigs)
		return each(&row)
	})
}

// fill reads a row of selectPaths.
func (p *Row) fill(r *batch.Rows, i int, sigs bool) {
	text := func(col int, null bool) []byte {
		switch r.Type(i, col) {
		case batch.Text:
			return r.Text(i, col)
		case batch.Null:
			p.Wrong = p.Wrong || !null
		default:
			p.Wrong = true
		}
		return nil
	}
	number := func(col int, null bool) int64 {
		if t := r.Type(i, col); t != batch.Integer && !(null && t == batch.Null) {
			p.Wrong = true
		}
		return r.Int(i, col)
	}
	p.Wrong = false
	p.ID = number(0, false)
	p.Path = text(1, false)
	p.Hash = text(2, false)
	p.Deriver = text(3, true)
	p.NarSize = number(4, true)
	p.Ultimate = number(5, true) != 0
	if p.Sigs = nil; sigs {
		p.Sigs = text(6, true)
		p.HasSigs = len(p.Sigs) > 0
	} else {
		p.HasSigs = r.Int(i, 6) != 0
	}
	p.CA = text(7, true)
	p.RegistrationTime = number(8, false)
}

// Bounds are the least and the greatest id, or 1, 0 where there are no paths.
func (s *Snapshot) Bounds(ctx context.Context) (lo, hi int64, err error) {
	lo, hi = 1, 0
	err = s.query(ctx, 0, "select (select min(id) from ValidPaths), (select max(id) from ValidPaths)", 2, few, nil, func(r *batch.Rows, i int) error {
		if r.Type(i, 0) == batch.Integer && r.Type(i, 1) == batch.Integer {
			lo, hi = r.Int(i, 0), r.Int(i, 1)
		}
		return nil
	})
	return lo, hi, err
}

// Ref is a row of Refs: the ids of a path and of one that it refers to.
type Ref = [2]int64

// Refs calls each with the references of referrers lo <= id < hi, ascending by
// referrer, then reference; hi = math.MaxInt64 is no upper bound, and with
// it what is no number is seen, too. A row with what is no number is ErrCorrupt:
// nobody knows whose reference it is. The slice is valid until each returns.
func (s *Snapshot) Refs(ctx context.Context, reader int, lo, hi int64, each func([]Ref) error) error {
	q, bind := "select referrer, reference from Refs where referrer >= ? and referrer < ? order by referrer, reference", []int64{lo, hi}
	if hi == math.MaxInt64 {
		q, bind = "select referrer, reference from Refs where referrer >= ? order by referrer, reference", bind[:1]
	}
	st, err := s.readers[reader].Prepare(q, 2)
	if err != nil {
		return s.wrap(err)
	}
	defer st.Close()
	for n, b := range bind {
		if err := st.BindInt(n+1, b); err != nil {
			return s.wrap(err)
		}
	}
	pairs := make([]Ref, batch.PairsPerCall)
	for more := true; more; {
		if err := ctx.Err(); err != nil {
			return err
		}
		var n, wrong int
		if n, wrong, more, err = st.NextPairs(pairs); err != nil {
			return s.wrap(err)
		}
		if wrong > 0 {
			return fmt.Errorf("%q: %w: a reference is not a number", s.path, ErrCorrupt)
		}
		if err := each(pairs[:n]); err != nil {
			return err
		}
	}
	return nil
}

// Outputs calls each for the rows of DerivationOutputs: the id of a derivation and
// the path of an output, valid or not. A row of wrong type is left out.
func (s *Snapshot) Outputs(ctx context.Context, reader int, each func(drv int64, path []byte) error) error {
	return s.query(ctx, reader, "select drv, path from DerivationOutputs", 2, batch.ManyRows, nil, func(r *batch.Rows, i int) error {
		if r.Type(i, 0) != batch.Integer || r.Type(i, 1) != batch.Text {
			return nil
		}
		return each(r.Int(i, 0), r.Text(i, 1))
	})
}
