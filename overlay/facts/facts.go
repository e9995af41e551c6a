// Package facts brings what Nix's databases know into the graph that a policy is
// decided over: the system's database, a keep's, or both as one.
//
// It promises: one consistent state per database beside a running Nix, which
// never waits (package nixdb says how); the layer in which each path really
// lies, not the database that names it; and doubt that stays doubt: a row that
// cannot be right makes its path graph.Broken, data that the two databases do
// not agree on makes it graph.Differs, a database that is no Nix database is a
// typed error of nixdb. Memory is bounded by the size of the database: a million
// paths with seven million references take some 220 MiB and two seconds of CPU time.
//
// Start with Load for the whole of a store, LoadFor for what a question about a
// few paths needs, or Open for a listing beside the graph (WriteJSON).
//
// It knows nothing of files in the store, .drv files and signatures: packages
// drv, provenance and signature do. Do not use it to write, nor for one path of a
// database (nixdb.Open).
package facts

import (
	"context"
	"errors"
	"fmt"
	"hash/maphash"
	"runtime"

	"overkeep/overlay/nixdb"
	"overkeep/policy/graph"
)

// Store is a database to read.
type Store struct {
	DB    string      // …/db/db.sqlite
	Layer graph.Flags // graph.Lower: the system's; graph.Upper: a keep's

	// UpperDir is a keep's upper directory. A keep's database also holds rows of
	// the system's paths; with the directory, a path of it lies in the keep if
	// and only if the directory has it. Without, it does unless it is valid in
	// the system's database.
	UpperDir string
}

// Options of loading. The zero value is usable.
type Options struct {
	StoreDir string // "/nix/store" if empty
	Readers  int    // connections per database; 0: one per CPU, at most 4

	// Keys are the declared keys as in graph.Graph, at most 64, and Verifier tells
	// which of them signed a path. Without keys no signature is read.
	Keys     []string
	Verifier Verifier
}

// ErrStores: not one database, or one of each layer.
var ErrStores = errors.New("facts come from one database, or from one of each layer")

// ErrTooLarge: more paths, names or references than a graph can number.
var ErrTooLarge = errors.New("store is too large")

// Report says what was found while loading.
type Report struct {
	Paths, Refs int
	Broken      int // paths of which nothing is believed, for their row
	Differs     int // paths with other data in the other database
	Dropped     int // rows whose path is no store path: they are not in the graph
}

// Loaded is a graph with what else loading taught. The columns that the database
// does not fill (Origin, Roots) are left to others.
type Loaded struct {
	Graph  *graph.Graph
	Index  *Index
	Report Report

	beyond map[graph.ID]string // see DeriverOf
}

// DeriverOf is the valid derivation (HASH-NAME) that a path names as the one that made
// it, "" if there is none; of paths that may be fixed outputs, see graph.FixedOutput. A part of a store (LoadFor) need not hold
// it: its graph then has none.
func (l *Loaded) DeriverOf(id graph.ID) string {
	if d := l.Graph.Deriver[id]; d != graph.NoID {
		return string(l.Graph.BaseName(d))
	}
	return l.beyond[id]
}

// Load reads whole stores.
func Load(ctx context.Context, stores []Store, o Options) (*Loaded, error) {
	s, err := Open(ctx, stores, o)
	if err != nil {
		return nil, err
	}
	l := s.Loaded
	return &l, s.Close()
}

// Snapshot is a graph with the database states it was made from still open.
type Snapshot struct {
	Loaded
	o      Options
	seeds  [2]maphash.Seed
	stores []*loading // the lower first
}

// Close ends the transactions. The graph lives on.
func (s *Snapshot) Close() error {
	var errs []error
	for _, l := range s.stores {
		if l.snap != nil {
			errs = append(errs, l.snap.Close())
			l.snap = nil
		}
	}
	return errors.Join(errs...)
}

// Open is Load that keeps the database states, for a listing of the same moment.
func Open(ctx context.Context, stores []Store, o Options) (_ *Snapshot, err error) {
	s, err := newSnapshot(o)
	if err != nil {
		return nil, err
	}
	defer func() {
		if err != nil {
			err = errors.Join(err, s.Close())
		}
	}()
	if err := s.open(ctx, stores, true); err != nil {
		return nil, err
	}
	if err := s.load(ctx); err != nil {
		return nil, err
	}
	return s, s.sign(ctx)
}

func newSnapshot(o Options) (*Snapshot, error) {
	if o.StoreDir == "" {
		o.StoreDir = "/nix/store"
	}
	if o.Readers <= 0 {
		o.Readers = min(4, runtime.GOMAXPROCS(0))
	}
	if len(o.Keys) > 64 {
		return nil, fmt.Errorf("%d declared keys, more than 64", len(o.Keys))
	}
	return &Snapshot{o: o, seeds: [2]maphash.Seed{maphash.MakeSeed(), maphash.MakeSeed()}}, nil
}

// open takes the snapshots, in the order that makes the two fit: the keep's
// rows, then its directory (nixdb.ReadUpper), then the system's rows. A row that
// Nix copied into the keep's database is then seen in the system's, too.
// The lower comes first in s.stores. Without list the directory is not read: names
// are looked up in it later.
func (s *Snapshot) open(ctx context.Context, stores []Store, list bool) error {
	byLayer := map[graph.Flags]*loading{}
	for _, st := range stores {
		if st.Layer != graph.Lower && st.Layer != graph.Upper || byLayer[st.Layer] != nil {
			return ErrStores
		}
		byLayer[st.Layer] = &loading{Store: st, both: len(stores) > 1}
	}
	for _, layer := range []graph.Flags{graph.Upper, graph.Lower} {
		l := byLayer[layer]
		if l == nil {
			continue
		}
		var err error
		if l.snap, err = nixdb.OpenSnapshot(ctx, l.DB, s.o.Readers); err != nil {
			return err
		}
		s.stores = append([]*loading{l}, s.stores...)
		if list && layer == graph.Upper && l.UpperDir != "" {
			if l.upper, err = nixdb.ReadUpper(l.UpperDir); err != nil {
				return err
			}
		}
	}
	if len(s.stores) == 0 {
		return ErrStores
	}
	return nil
}
