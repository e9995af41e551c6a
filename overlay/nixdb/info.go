package nixdb

import (
	"context"
	"errors"
	"fmt"
	"math"
	"strings"

	"overkeep/overlay/nixdb/batch"
)

// infoReader asks a snapshot for whole rows.
type infoReader struct {
	s                  *Snapshot
	byPath, refs, outs *question
}

func (s *Snapshot) infoReader() (*infoReader, error) {
	r := &infoReader{s: s}
	for _, q := range []struct {
		to      **question
		text    string
		columns int
	}{
		{&r.byPath, selectPaths(true) + "where path = ?", pathColumns},
		// The join from the left: a reference to no row is damage, not nothing.
		{&r.refs, "select path from Refs left join ValidPaths on id = reference where referrer = ? order by path", 1},
		{&r.outs, "select id, path from DerivationOutputs where drv = ? order by id", 2},
	} {
		st, err := s.readers[0].Prepare(q.text, q.columns)
		if err != nil {
			r.close()
			return nil, s.wrap(err)
		}
		*q.to = &question{st, batch.NewRows(q.columns, 16)}
	}
	return r, nil
}

func (r *infoReader) close() {
	for _, q := range []*question{r.byPath, r.refs, r.outs} {
		if q != nil {
			q.st.Close()
		}
	}
}

func (r *infoReader) read(ctx context.Context, path string) (i Info, found bool, err error) {
	corrupt := func() error { return fmt.Errorf("%q: %w: a column has the wrong type", r.s.path, ErrCorrupt) }
	var id int64
	err = r.s.run(ctx, r.byPath.st, r.byPath.rows, []any{[]byte(path)}, func(rows *batch.Rows, n int) error {
		var row Row
		if row.fill(rows, n, true); row.Wrong {
			return corrupt()
		}
		id, found = row.ID, true
		i = Info{Path: string(row.Path), Deriver: string(row.Deriver), NarHash: string(row.Hash), NarSize: row.NarSize,
			RegistrationTime: row.RegistrationTime, Ultimate: row.Ultimate, CA: string(row.CA)}
		if row.HasSigs {
			i.Sigs = strings.Fields(string(row.Sigs))
		}
		return nil
	})
	if err != nil || !found {
		return Info{}, false, err
	}
	err = r.s.run(ctx, r.refs.st, r.refs.rows, []any{id}, func(rows *batch.Rows, n int) error {
		if rows.Type(n, 0) != batch.Text {
			return corrupt()
		}
		i.Refs = append(i.Refs, string(rows.Text(n, 0)))
		return nil
	})
	if err != nil {
		return Info{}, false, err
	}
	err = r.s.run(ctx, r.outs.st, r.outs.rows, []any{id}, func(rows *batch.Rows, n int) error {
		if rows.Type(n, 0) != batch.Text || rows.Type(n, 1) != batch.Text {
			return corrupt()
		}
		i.Outputs = append(i.Outputs, Output{string(rows.Text(n, 0)), string(rows.Text(n, 1))})
		return nil
	})
	return i, err == nil, err
}

// reading runs f on the state of this moment.
func reading(ctx context.Context, file string, f func(*infoReader) error) (err error) {
	s, err := OpenSnapshot(ctx, file, 1)
	if err != nil {
		return err
	}
	defer func() { err = errors.Join(err, s.Close()) }()
	r, err := s.infoReader()
	if err != nil {
		return err
	}
	defer r.close()
	return f(r)
}

// ReadInfos reads what a database says of paths, as of one moment, in their order;
// missing are those that it does not know. A path that is given twice is read once.
func ReadInfos(ctx context.Context, file string, paths []string) (infos []Info, missing []string, err error) {
	err = reading(ctx, file, func(r *infoReader) error {
		seen := map[string]bool{}
		for _, p := range paths {
			if seen[p] {
				continue
			}
			seen[p] = true
			i, found, err := r.read(ctx, p)
			if err != nil {
				return err
			}
			if found {
				infos = append(infos, i)
			} else {
				missing = append(missing, p)
			}
		}
		return nil
	})
	if err != nil {
		return nil, nil, err
	}
	return infos, missing, nil
}

// ReadClosure reads paths and all that they refer to, directly or not, as of one
// moment: references before their referrers, but for cycles. A path of paths that is
// not registered is a *MissingRefError.
func ReadClosure(ctx context.Context, file string, paths []string) (closure []Info, err error) {
	err = reading(ctx, file, func(r *infoReader) error {
		seen := map[string]bool{}
		// A path is on the stack with how many of its references were followed: a
		// chain of references may be longer than a stack of calls should be.
		type step struct {
			info Info
			next int
		}
		var stack []step
		push := func(p, by string) error {
			if seen[p] {
				return nil
			}
			seen[p] = true
			i, found, err := r.read(ctx, p)
			if err == nil && !found {
				err = &MissingRefError{by, p}
			}
			if err == nil {
				stack = append(stack, step{info: i})
			}
			return err
		}
		for _, p := range paths {
			if err := push(p, ""); err != nil {
				return err
			}
			for len(stack) > 0 {
				top := &stack[len(stack)-1]
				if top.next == len(top.info.Refs) {
					closure = append(closure, top.info)
					stack = stack[:len(stack)-1]
					continue
				}
				top.next++
				if err := push(top.info.Refs[top.next-1], top.info.Path); err != nil {
					return err
				}
			}
		}
		return nil
	})
	if err != nil {
		return nil, err
	}
	return closure, nil
}

// Derived returns the registered paths that name one of drvs as their deriver. It reads
// the whole table: Nix has no index for that.
func Derived(ctx context.Context, file string, drvs []string) (paths []string, err error) {
	if len(drvs) == 0 {
		return nil, nil
	}
	is := map[string]bool{}
	for _, d := range drvs {
		is[d] = true
	}
	s, err := OpenSnapshot(ctx, file, 1)
	if err != nil {
		return nil, err
	}
	defer func() { err = errors.Join(err, s.Close()) }()
	err = s.Paths(ctx, 0, math.MinInt64, math.MaxInt64, false, func(r *Row) error {
		if is[string(r.Deriver)] {
			paths = append(paths, string(r.Path))
		}
		return nil
	})
	return paths, err
}
