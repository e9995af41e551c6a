// Package cache writes store paths out as a stock binary cache: a directory that
// `nix copy --from file://DIR` reads (the manual's "Local Binary Cache Store").
//
// It promises: every file in it is whole or absent, also after a crash; a path is announced
// (HASH.narinfo) only when its archive is on disk and had the hash that was asked for; and
// what an earlier, interrupted call finished is not done again. Archives are not
// compressed, so whoever can read the directory can read the files.
//
// Start with Write. It is for taking everything out of a keep; it is no server, signs
// nothing, and removes no path.
package cache

import (
	"context"
	"crypto/sha256"
	"errors"
	"os"
)

// ErrInfo: what is said of a path cannot be written in a narinfo.
var ErrInfo = errors.New("not the facts of a store path")

// Info is what a Nix database says of a path.
type Info struct {
	Path    string // absolute, in /nix/store
	NarHash [sha256.Size]byte
	NarSize int64
	Refs    []string // absolute; in any order
	Deriver string   // absolute or empty
	Sigs    []string // "KEY:BASE64"
	CA      string   // content address or empty
}

// Options of Write.
type Options struct {
	UID, GID int // own all that is made; files have mode 0600, directories 0700
	Workers  int // archives written at a time; 0 is 2
	// Progress is as in tree.Options; what is kept counts as well.
	Progress func(n int64)
	// Done, if not nil, is called for every path, one call at a time, in no order: kept if
	// an earlier call had written it.
	Done func(i int, kept bool, err error)
}

// Write writes infos, whose trees lie by their base names in store, to the directory dst.
// Other files there are left alone. A path whose tree does not have its hash is not
// announced: Done gets a *tree.MismatchError, the others are written, and the error returned joins all.
func Write(ctx context.Context, dst, store *os.File, infos []Info, o Options) error {
	return errors.New("not there yet")
}
