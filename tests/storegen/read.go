package storegen

import (
	"context"
	"database/sql"
	"encoding/hex"
	"errors"
	"fmt"
	"net/url"
	"path/filepath"
	"slices"
	"strings"
)

// Read reads the paths of a small database and their references; what derivations
// name as their outputs is only read where it is a path of the database. It is for
// tests that go on from real rows; package nixdb reads a store in use.
func Read(ctx context.Context, file string) (_ *Store, err error) {
	if file, err = filepath.Abs(file); err != nil {
		return nil, err
	}
	uri := url.URL{Scheme: "file", Path: file, RawQuery: "mode=ro"}
	db, err := sql.Open("sqlite3", uri.String())
	if err != nil {
		return nil, err
	}
	defer func() { err = errors.Join(err, db.Close()) }()
	s := &Store{}
	index, byPath, derivers := map[int64]int32{}, map[string]int32{}, []string{}
	err = each(ctx, db, `select id, path, hash, registrationTime, coalesce(deriver, ''), coalesce(narSize, 0), coalesce(ultimate, 0),
		coalesce(sigs, ''), coalesce(ca, '') from ValidPaths order by id`, func(r *sql.Rows) error {
		var p Path
		var path, hash, deriver string
		if err := r.Scan(&p.ID, &path, &hash, &p.Time, &deriver, &p.NarSize, &p.Ultimate, &p.Sigs, &p.CA); err != nil {
			return err
		}
		raw, err := hex.DecodeString(strings.TrimPrefix(hash, "sha256:"))
		if err != nil || len(raw) != len(p.Hash) {
			return fmt.Errorf("%q has the hash %q", path, hash)
		}
		copy(p.Hash[:], raw)
		p.Base, p.Deriver = strings.TrimPrefix(path, StoreDir), -1
		index[p.ID], byPath[path] = int32(len(s.Paths)), int32(len(s.Paths))
		s.Paths, derivers = append(s.Paths, p), append(derivers, deriver)
		return nil
	})
	if err != nil {
		return nil, err
	}
	for i, d := range derivers {
		if j, ok := byPath[d]; ok {
			s.Paths[i].Deriver = int(j)
		} else {
			s.Paths[i].Orphan = strings.TrimPrefix(d, StoreDir)
		}
	}
	pair := func(q string, add func(from, to int32)) error {
		return each(ctx, db, q, func(r *sql.Rows) error {
			var from, to int64
			if err := r.Scan(&from, &to); err != nil {
				return err
			}
			i, ok := index[from]
			j, there := index[to]
			if !ok || !there {
				return fmt.Errorf("%d refers to %d, and one of them is not there", from, to)
			}
			add(i, j)
			return nil
		})
	}
	err = errors.Join(pair("select referrer, reference from Refs", func(from, to int32) {
		s.Paths[from].Refs = append(s.Paths[from].Refs, to)
	}), pair("select o.drv, v.id from DerivationOutputs o join ValidPaths v on v.path = o.path", func(from, to int32) {
		s.Paths[from].Outs = append(s.Paths[from].Outs, to)
	}))
	for i := range s.Paths {
		slices.Sort(s.Paths[i].Refs)
		slices.Sort(s.Paths[i].Outs)
	}
	return s, err
}

func each(ctx context.Context, db *sql.DB, query string, row func(*sql.Rows) error) error {
	rows, err := db.QueryContext(ctx, query)
	if err != nil {
		return err
	}
	defer rows.Close()
	for rows.Next() {
		if err := row(rows); err != nil {
			return err
		}
	}
	return rows.Err()
}
