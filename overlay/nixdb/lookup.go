package nixdb

import (
	"context"

	"overkeep/overlay/nixdb/batch"
)

// Lookup asks a snapshot for single rows, by statements that use Nix's indexes: a
// question costs as much as its answer, whatever the size of the store. It uses the
// first reader, and is for one goroutine.
type Lookup struct {
	s                        *Snapshot
	byPath, byID, refs, outs *question
	makers                   *question
}

type question struct {
	st   *batch.Stmt
	rows *batch.Rows
}

// Lookup prepares the statements. It must be closed before the snapshot.
func (s *Snapshot) Lookup() (*Lookup, error) {
	l := &Lookup{s: s}
	// Rows and index entries of one closure lie all over a large database.
	if err := s.readers[0].Exec("pragma cache_size=-32768"); err != nil {
		return nil, s.wrap(err)
	}
	paths := batch.NewRows(pathColumns, 1)
	one := batch.NewRows(1, 16)
	for _, q := range []struct {
		to   **question
		text string
		rows *batch.Rows
		n    int
	}{
		{&l.byPath, selectPaths(false) + "where path = ?", paths, pathColumns},
		{&l.byID, selectPaths(false) + "where id = ?", paths, pathColumns},
		{&l.refs, "select reference from Refs where referrer = ? order by reference", one, 1},
		{&l.outs, "select path from DerivationOutputs where drv = ?", one, 1},
		{&l.makers, "select drv from DerivationOutputs where path = ?", one, 1},
	} {
		st, err := s.readers[0].Prepare(q.text, q.n)
		if err != nil {
			l.Close()
			return nil, s.wrap(err)
		}
		*q.to = &question{st, q.rows}
	}
	return l, nil
}

// Close frees the statements.
func (l *Lookup) Close() {
	for _, q := range []*question{l.byPath, l.byID, l.refs, l.outs, l.makers} {
		if q != nil {
			q.st.Close()
		}
	}
}

func (l *Lookup) ask(ctx context.Context, q *question, bind any, each func(r *batch.Rows, i int) error) error {
	return l.s.run(ctx, q.st, q.rows, []any{bind}, each)
}

func (l *Lookup) row(ctx context.Context, q *question, bind any, row *Row) (found bool, err error) {
	err = l.ask(ctx, q, bind, func(r *batch.Rows, i int) error {
		found = true
		row.fill(r, i, false)
		return nil
	})
	return found, err
}

// ByPath fills row, as Snapshot.Paths without signatures, for a whole store path.
// Its texts are valid until the next question.
func (l *Lookup) ByPath(ctx context.Context, path []byte, row *Row) (found bool, err error) {
	return l.row(ctx, l.byPath, path, row)
}

// ByID is ByPath for an id.
func (l *Lookup) ByID(ctx context.Context, id int64, row *Row) (found bool, err error) {
	return l.row(ctx, l.byID, id, row)
}

// Refs calls each with the ids that a path refers to, ascending; ok is false for what
// is no number. No question may be asked meanwhile.
func (l *Lookup) Refs(ctx context.Context, id int64, each func(id int64, ok bool)) error {
	return l.ask(ctx, l.refs, id, func(r *batch.Rows, i int) error {
		each(r.Int(i, 0), r.Type(i, 0) == batch.Integer)
		return nil
	})
}

// Outputs calls each with the output paths of a derivation, valid or not, under the
// same rule.
func (l *Lookup) Outputs(ctx context.Context, drv int64, each func(path []byte)) error {
	return l.ask(ctx, l.outs, drv, func(r *batch.Rows, i int) error {
		if r.Type(i, 0) == batch.Text {
			each(r.Text(i, 0))
		}
		return nil
	})
}

// Makers calls each with the ids of derivations that have a path among their outputs,
// under the same rule.
func (l *Lookup) Makers(ctx context.Context, path []byte, each func(drv int64)) error {
	return l.ask(ctx, l.makers, path, func(r *batch.Rows, i int) error {
		if r.Type(i, 0) == batch.Integer {
			each(r.Int(i, 0))
		}
		return nil
	})
}
