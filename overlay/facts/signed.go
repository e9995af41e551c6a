package facts

import (
	"context"

	"overkeep/policy/graph"
)

// SignedPath is a path with signatures, as they stand in the database.
type SignedPath struct {
	ID      graph.ID
	Path    string   // the whole store path
	NarHash string   // "sha256:" and 64 hex digits
	NarSize int64    // bytes
	Refs    []string // whole store paths, sorted, itself included where Nix has it
	Sigs    string   // NAME:BASE64, separated by spaces; not checked
}

// Verifier tells which declared keys signed a path.
type Verifier interface {
	// Verify returns a mask per path of the batch: bit i is set where a signature
	// by Options.Keys[i] verifies over the path's fingerprint. It must not keep the
	// batch.
	Verify(ctx context.Context, batch []SignedPath) ([]uint64, error)
}

func (s *Snapshot) sign(ctx context.Context) error { return nil }
