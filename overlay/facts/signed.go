package facts

import (
	"context"
	"errors"
	"fmt"
	"strings"

	"overkeep/overlay/nixdb"
	"overkeep/policy/graph"
)

// SignedPath is a path with signatures, as they stand in the database. Names are
// base names (HASH-NAME).
type SignedPath struct {
	ID      graph.ID
	Path    string
	NarHash string   // "sha256:" and 64 hex digits
	NarSize int64    // bytes
	Refs    []string // each once, itself included where Nix has it, in no order
	Sigs    string   // NAME:BASE64, separated by spaces; nothing of it is checked

	// Cut is set by a Verifier that did not look at all of Sigs: that a key did not
	// sign the path is then not known.
	Cut bool
}

// Verifier tells which declared keys signed a path.
type Verifier interface {
	// Verify returns a mask per path of the batch: bit i is set where a signature
	// by Options.Keys[i] verifies over the path's fingerprint. It must not keep the
	// batch, but may sort the references in it and set Cut.
	Verify(ctx context.Context, batch []SignedPath) ([]uint64, error)
}

// signedPerBatch bounds what is in memory of signatures, and for how long a
// transaction is open: none is while signatures are verified, which can take a
// minute in a store that is seen for the first time.
const signedPerBatch = 4096

// sign fills the Signed columns. Rows may have changed since the graph was read:
// what is verified is the row's hash and size with the graph's references, so a
// bit is set only if exactly these were signed.
func (s *Snapshot) sign(ctx context.Context) error {
	if len(s.o.Keys) == 0 {
		return nil
	}
	g := s.Graph
	g.Keys = s.o.Keys
	for range g.Keys {
		g.Signed = append(g.Signed, graph.NewBits(g.Len()))
	}
	if s.o.Verifier == nil {
		return errors.New("keys are declared and nothing verifies")
	}
	for _, l := range s.stores {
		after := int64(0)
		for more := true; more; {
			batch, last, err := s.signedRows(ctx, l, after)
			if err != nil {
				return err
			}
			more, after = last > after, last
			masks, err := s.o.Verifier.Verify(ctx, batch)
			if err != nil {
				return err
			}
			if len(masks) != len(batch) {
				return fmt.Errorf("%d answers for %d signed paths", len(masks), len(batch))
			}
			for i, m := range masks {
				if batch[i].Cut {
					s.unsure(batch[i].ID)
				}
				for k := range g.Keys {
					if m>>k&1 != 0 {
						g.Signed[k].Set(batch[i].ID)
					}
				}
			}
		}
	}
	return nil
}

// unsure notes that not all signatures of a path were looked at.
func (s *Snapshot) unsure(id graph.ID) {
	if s.Graph.Unsure == nil {
		s.Graph.Unsure = graph.NewBits(s.Graph.Len())
	}
	s.Graph.Unsure.Set(id)
}

// signedRows reads the next rows with signatures, of paths of which anything is believed.
func (s *Snapshot) signedRows(ctx context.Context, l *loading, after int64) (batch []SignedPath, last int64, err error) {
	last = after
	snap, err := nixdb.OpenSnapshot(ctx, l.DB, 1)
	if err != nil {
		return nil, last, err
	}
	defer func() { err = errors.Join(err, snap.Close()) }()
	g := s.Graph
	prefix := g.StoreDir + "/"
	var names strings.Builder // of the references, in one piece
	type part struct{ path, from, to int }
	var parts []part
	err = snap.Signed(ctx, after, signedPerBatch, func(r *nixdb.Row) error {
		if r.ID <= last {
			return fmt.Errorf("%q: %w: rows are out of order", l.DB, nixdb.ErrCorrupt)
		}
		last = r.ID
		base := baseOf(r.Path, prefix)
		if base == nil {
			return nil
		}
		id := s.Index.Base(base)
		if id == graph.NoID || g.Flags[id]&(graph.Broken|graph.Differs) != 0 {
			return nil
		}
		if r.Wrong { // the signatures, for the rest was judged: they are no text, or too long a one
			s.unsure(id)
			return nil
		}
		if len(r.Sigs) == 0 || hashDigits(r.Hash) == nil || g.NarSize[id] != r.NarSize {
			return nil
		}
		for _, ref := range g.References(id) {
			from := names.Len()
			names.Write(g.BaseName(ref))
			parts = append(parts, part{len(batch), from, names.Len()})
		}
		batch = append(batch, SignedPath{ID: id, Path: string(base), NarHash: string(r.Hash), NarSize: r.NarSize, Sigs: string(r.Sigs)})
		return nil
	})
	all := names.String()
	refs := make([]string, len(parts))
	for i, p := range parts {
		refs[i] = all[p.from:p.to]
	}
	for i, j := 0, 0; i < len(batch); i++ {
		from := j
		for j < len(parts) && parts[j].path == i {
			j++
		}
		batch[i].Refs = refs[from:j:j]
	}
	return batch, last, err
}
