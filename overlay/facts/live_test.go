package facts

import (
	"context"
	"database/sql"
	"errors"
	"fmt"
	"strings"
	"sync"
	"sync/atomic"
	"testing"

	"overkeep/policy/graph"
	"overkeep/tests/storegen"
)

// pair i is two paths that refer to each other and are the outputs of a
// derivation: one transaction adds all of it, another removes it. So whoever sees
// one path without the other, without its reference or without its
// derivation, has seen half a transaction.
func pairNames(i int) [3]string {
	h := fmt.Sprintf("%031d", i)
	return [3]string{h + "a-left", h + "b-right", h + "c-pair.drv"}
}

func addPair(tx *sql.Tx, i int) error {
	var ids [3]int64
	names := pairNames(i)
	for k, n := range names {
		r, err := tx.Exec("insert into ValidPaths (path, hash, registrationTime, narSize) values (?, ?, 1, ?)",
			storegen.StoreDir+n, "sha256:"+strings.Repeat("0", 64), i+1)
		if err != nil {
			return err
		}
		ids[k], _ = r.LastInsertId()
	}
	for _, ref := range [][2]int{{0, 1}, {1, 0}, {0, 2}} {
		if _, err := tx.Exec("insert into Refs values (?, ?)", ids[ref[0]], ids[ref[1]]); err != nil {
			return err
		}
	}
	for k, n := range names[:2] {
		if _, err := tx.Exec("insert into DerivationOutputs values (?, ?, ?)", ids[2], fmt.Sprint(k), storegen.StoreDir+n); err != nil {
			return err
		}
	}
	return nil
}

func removePair(tx *sql.Tx, i int) error {
	names := pairNames(i)
	for _, n := range names {
		if _, err := tx.Exec("delete from Refs where referrer = (select id from ValidPaths where path = ?)", storegen.StoreDir+n); err != nil {
			return err
		}
	}
	for _, n := range names {
		if _, err := tx.Exec("delete from ValidPaths where path = ?", storegen.StoreDir+n); err != nil {
			return err
		}
	}
	return nil
}

// torn says what is wrong with the pairs in a graph.
func torn(l *Loaded, pairs int) error {
	g := l.Graph
	for i := range pairs {
		var id [3]graph.ID
		for k, n := range pairNames(i) {
			id[k] = l.Index.Base([]byte(n))
		}
		if (id[0] == graph.NoID) != (id[1] == graph.NoID) || (id[0] == graph.NoID) != (id[2] == graph.NoID) {
			return fmt.Errorf("pair %d: %v", i, id)
		}
		if id[0] == graph.NoID {
			continue
		}
		if len(g.References(id[0])) != 2 || len(g.References(id[1])) != 1 || len(g.References(id[2])) != 0 || len(g.Outputs(id[2])) != 2 {
			return fmt.Errorf("pair %d: %v %v %v", i, g.References(id[0]), g.References(id[1]), g.Outputs(id[2]))
		}
	}
	if l.Report.Broken+l.Report.Dropped > 0 {
		return fmt.Errorf("%+v", l.Report)
	}
	return nil
}

// TestLive: beside a writer that adds and removes in transactions, ten thousand reads
// give no error and no torn view, and the writer, which waits for no lock at
// all, is never refused one.
func TestLive(t *testing.T) {
	file, _ := generate(t, storegen.Options{Paths: 400, Seed: 8})
	// _busy_timeout=0: a lock that is held is an error at once.
	w, err := sql.Open("sqlite3", file+"?_journal_mode=WAL&_synchronous=OFF&_foreign_keys=1&_busy_timeout=0&_txlock=immediate")
	if err != nil {
		t.Fatal(err)
	}
	defer w.Close()
	w.SetMaxOpenConns(1)
	w.SetConnMaxLifetime(0)
	// Before the first reader: after it, nothing in this process could write.
	if err := w.Ping(); err != nil {
		t.Fatal(err)
	}
	const pairs = 20
	ctx, stop := context.WithCancel(t.Context())
	defer stop()
	var commits atomic.Int64
	var writer sync.WaitGroup
	writer.Go(func() {
		have := [pairs]bool{}
		for i := 0; ctx.Err() == nil; i = (i*7 + 3) % (pairs * 3) {
			k := i % pairs
			err := func() error {
				tx, err := w.Begin()
				if err != nil {
					return err
				}
				defer tx.Rollback()
				if have[k] {
					err = removePair(tx, k)
				} else {
					err = addPair(tx, k)
				}
				if err != nil {
					return err
				}
				return tx.Commit()
			}()
			if err != nil {
				t.Errorf("the writer: %v", err)
				return
			}
			have[k] = !have[k]
			commits.Add(1)
		}
	})
	stores := []Store{{DB: file, Layer: graph.Upper}}
	const reads, whole = 10_000, 300
	var next atomic.Int64
	var readers sync.WaitGroup
	for range 2 {
		readers.Go(func() {
			for !t.Failed() {
				i := int(next.Add(1)) - 1
				if i >= reads {
					return
				}
				var l *Loaded
				var err error
				if i%(reads/whole) == 0 {
					l, err = Load(t.Context(), stores, Options{Readers: 2})
				} else {
					n := pairNames(i % pairs)
					l, err = LoadFor(t.Context(), stores, []string{storegen.StoreDir + n[i%3]}, Need{Build: true}, Options{})
				}
				if err == nil {
					err = torn(l, pairs)
				}
				if err != nil {
					t.Errorf("read %d: %v", i, err)
				}
			}
		})
	}
	readers.Wait()
	stop()
	writer.Wait()
	if commits.Load() < 1000 {
		t.Errorf("only %d commits beside %d reads: nothing was tried", commits.Load(), reads)
	}
	t.Logf("%d commits", commits.Load())
}

// A reader that takes its time delays no commit, and sees the moment it began with.
func TestSnapshotStays(t *testing.T) {
	file, _ := generate(t, storegen.Options{Paths: 200, Seed: 8})
	w, err := sql.Open("sqlite3", file+"?_foreign_keys=1&_busy_timeout=0")
	if err != nil {
		t.Fatal(err)
	}
	defer w.Close()
	if err := w.QueryRow("select count(*) from ValidPaths").Err(); err != nil { // before the first reader
		t.Fatal(err)
	}
	s, err := Open(t.Context(), []Store{{DB: file, Layer: graph.Lower}}, Options{Readers: 3})
	if err != nil {
		t.Fatal(err)
	}
	defer s.Close()
	tx, err := w.Begin()
	if err != nil {
		t.Fatal(err)
	}
	if err := errors.Join(addPair(tx, 1), tx.Commit()); err != nil {
		t.Fatal(err)
	}
	n := 0
	err = s.WriteJSON(t.Context(), &counter{&n}, Listing{})
	if err != nil || n != 200 {
		t.Errorf("%d paths, %v", n, err)
	}
	l, err := Load(t.Context(), []Store{{DB: file, Layer: graph.Lower}}, Options{})
	if err != nil || l.Graph.Len() != 203 {
		t.Errorf("after the commit: %v", err)
	}
}

// counter counts objects.
type counter struct{ n *int }

func (c *counter) Write(b []byte) (int, error) {
	*c.n += strings.Count(string(b), `"narHash"`)
	return len(b), nil
}
