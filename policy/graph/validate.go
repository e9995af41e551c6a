package graph

import (
	"bytes"
	"errors"
	"fmt"
	"strings"
)

// ErrInvalid is what every error of Validate and of a Builder is.
var ErrInvalid = errors.New("invalid store graph")

func invalid(f string, a ...any) error {
	return fmt.Errorf("%w: %s", ErrInvalid, fmt.Sprintf(f, a...))
}

// MaxPaths bounds a graph: what is numbered over it (a derivation up to three
// times, see package policy) must fit an ID.
const MaxPaths = 1 << 29

// Validate reports whether the columns fit together: lengths, offsets and ids, so
// that whoever reads the graph needs no checks of its own, and a loader with an
// error in it cannot cause a panic. It cannot see whether they are true. It reads
// every column once and changes nothing.
func (g *Graph) Validate() error {
	n := len(g.Flags)
	if n > MaxPaths {
		return invalid("%d paths, more than %d", n, MaxPaths)
	}
	if !strings.HasPrefix(g.StoreDir, "/") || strings.HasSuffix(g.StoreDir, "/") {
		return invalid("store directory %q", g.StoreDir)
	}
	if err := offsets("Base", g.BaseOff, n, len(g.Base)); err != nil {
		return err
	}
	if err := offsets("Refs", g.RefOff, n, len(g.Refs)); err != nil {
		return err
	}
	if err := offsets("Outs", g.OutOff, n, len(g.Outs)); err != nil {
		return err
	}
	if len(g.NarSize) != n {
		return invalid("NarSize has %d entries for %d paths", len(g.NarSize), n)
	}
	if len(g.Deriver) != n {
		return invalid("Deriver has %d entries for %d paths", len(g.Deriver), n)
	}
	if err := g.names(n); err != nil {
		return err
	}
	for id, size := range g.NarSize {
		if size < 0 {
			return invalid("path %d has the size %d", id, size)
		}
	}
	for id, d := range g.Deriver {
		if d < NoID || int(d) >= n {
			return invalid("path %d has the deriver %d of %d paths", id, d, n)
		}
	}
	if err := ids("Refs", g.Refs, n); err != nil {
		return err
	}
	if err := ids("Outs", g.Outs, n); err != nil {
		return err
	}
	if err := g.origins(n); err != nil {
		return err
	}
	if len(g.Signed) != len(g.Keys) {
		return invalid("%d keys and %d columns of signatures", len(g.Keys), len(g.Signed))
	}
	for i, b := range g.Signed {
		if len(b) != (n+63)/64 {
			return invalid("the signatures by %q have %d words for %d paths", g.Keys[i], len(b), n)
		}
	}
	if g.Unsure != nil && len(g.Unsure) != (n+63)/64 {
		return invalid("Unsure has %d words for %d paths", len(g.Unsure), n)
	}
	for name, r := range g.Roots {
		if err := ids("the root "+name, r.IDs, n); err != nil {
			return err
		}
	}
	return nil
}

func (g *Graph) names(n int) error {
	for id := range n {
		b := g.Base[g.BaseOff[id]:g.BaseOff[id+1]]
		if len(b) < HashLen+2 || b[HashLen] != '-' {
			return invalid("path %d: %.80q is not HASH-NAME", id, b)
		}
	}
	if i := bytes.IndexByte(g.Base, '/'); i >= 0 {
		return invalid("a slash in a base name, at byte %d", i)
	}
	if i := bytes.IndexByte(g.Base, 0); i >= 0 {
		return invalid("a zero in a base name, at byte %d", i)
	}
	return nil
}

func (g *Graph) origins(n int) error {
	if g.Origin != nil && len(g.Origin) != n {
		return invalid("Origin has %d entries for %d paths", len(g.Origin), n)
	}
	for id, o := range g.Origin {
		if int(o) >= len(g.Origins) {
			return invalid("path %d has the origin %d of %d", id, o, len(g.Origins))
		}
	}
	for i, o := range g.Origins {
		if o.Unfree < No || o.Unfree > Yes {
			return invalid("origin %d: unfree is %d", i, o.Unfree)
		}
	}
	return nil
}

func offsets(what string, off []uint32, n, size int) error {
	if len(off) != n+1 {
		return invalid("%s has %d offsets for %d paths", what, len(off), n)
	}
	if off[0] != 0 || int64(off[n]) != int64(size) {
		return invalid("the offsets of %s go from %d to %d, not from 0 to %d", what, off[0], off[n], size)
	}
	for i := range n {
		if off[i] > off[i+1] {
			return invalid("the offsets of %s go back at path %d", what, i)
		}
	}
	return nil
}

func ids(what string, list []ID, n int) error {
	for i, id := range list {
		if id < 0 || int(id) >= n {
			return invalid("%s has the id %d of %d paths, at %d", what, id, n, i)
		}
	}
	return nil
}
