// Package graph holds the store graph that a policy is decided over: which paths
// there are, what they refer to, and what is known of each.
//
// It promises: plain columns indexed by dense ids, nothing that points anywhere
// (one million paths with ten million references are some 150 MiB), and no
// knowledge of files, SQLite or the kernel. Whoever has the facts fills the
// columns, or has a Builder do it for a small graph; package policy reads them,
// after Validate has found nothing that could make it read past an end.
//
// A path may refer to itself, and references may form cycles: Nix registers both
// (nix-store --register-validity), so nothing here assumes an acyclic graph.
//
// Do not use it for what only a listing needs (NAR hashes, registration times,
// signatures as text): that stays in the database.
package graph

import (
	"bytes"
	"math/bits"
)

// ID is the dense number of a path: 0 to Graph.Len()-1.
type ID = int32

// NoID stands for a path that there is not, or that is not known.
const NoID ID = -1

// Flags of a path.
type Flags uint16

// What a path can be: exactly one of these if it is known, several if the
// database does not tell them apart.
const (
	Source Flags = 1 << iota
	Derivation
	Output // of a derivation, not fixed
	FixedOutput

	Ultimate // built here: the column of that name, "the nix-daemon built it itself"
	Lower    // it lies in the system store
	Upper    // it lies in the personal store
	Differs  // both stores have it, with other data: nothing of it is believed
	Broken   // its row or its .drv cannot be read: nothing of it is believed

	// Added: its content was fixed by a hash, it refers to nothing, and nobody tells of
	// a build. It may be a source or a fixed output that came without its deriver
	// (that is not known: see the kind); built-from takes it for a source.
	Added

	KindMask  = Source | Derivation | Output | FixedOutput
	LayerMask = Lower | Upper
)

// Tri is an answer in three values. The zero value is Unknown, so that what was
// never filled in is not known.
type Tri int8

// The three answers.
const (
	No      Tri = -1
	Unknown Tri = 0
	Yes     Tri = 1
)

// Origin is what was recorded of a path as it passed by.
type Origin struct {
	From     []string // flake inputs as URLs (locked or original); nil: unknown
	Licences []string // SPDX ids or nixpkgs short names; nil: unknown
	Unfree   Tri
}

// Root is what a closure-of target of a policy resolved to.
type Root struct {
	IDs   []ID // empty and Known: it is there and holds no store path
	Known bool // false: it could not be resolved, so membership is unknown
}

// Graph is a store, or two at once. It is read-only once built, and safe for
// concurrent readers. All per-path columns have Len entries, or none where the
// comment says so.
type Graph struct {
	StoreDir string // "/nix/store"

	Base    []byte   // all HASH-NAME in one piece
	BaseOff []uint32 // Len+1 offsets into Base

	RefOff []uint32 // Len+1 offsets into Refs
	Refs   []ID     // references, each at most once per path, itself included where Nix has it

	NarSize []int64 // bytes; 0: unknown
	Flags   []Flags

	// Deriver is the derivation in this graph that made the path, NoID if there
	// was none (a source, a derivation) or if it is not known: Kind tells which.
	Deriver []ID

	// OutOff and Outs are the valid outputs of each derivation (Len+1 offsets).
	OutOff []uint32
	Outs   []ID

	// Keys are the declared keys in full, NAME:BASE64 as in nix.conf's
	// trusted-public-keys (policy.Key.String): a name alone would let a policy with
	// another key of the same name use these answers. Signed has a bit set per key,
	// set where a signature by that key was verified.
	Keys   []string
	Signed []Bits

	// Unsure are the paths with more signatures than anybody looks at: a key that is not
	// known to have signed one may have. nil: none.
	Unsure Bits

	// Origin is an index into Origins per path, or negative; nil: none is known.
	Origin  []int32
	Origins []Origin

	// Roots are the resolved closure-of targets, under the text of the policy.
	// A target that is missing here is unknown.
	Roots map[string]Root
}

// Bits is a set of ids.
type Bits []uint64

// NewBits returns an empty set for n ids.
func NewBits(n int) Bits { return make(Bits, (n+63)/64) }

// Has reports whether id is in the set.
func (b Bits) Has(id ID) bool { return b[id>>6]&(1<<(uint(id)&63)) != 0 }

// Set puts id in the set.
func (b Bits) Set(id ID) { b[id>>6] |= 1 << (uint(id) & 63) }

// Len is the number of paths.
func (g *Graph) Len() int { return len(g.Flags) }

// BaseName is HASH-NAME of a path; it is part of the graph and must not be changed.
func (g *Graph) BaseName(id ID) []byte { return g.Base[g.BaseOff[id]:g.BaseOff[id+1]] }

// HashLen is the length of the hash in a base name; a dash and the name follow.
const HashLen = 32

// Name is a base name without its hash; part of the graph.
func (g *Graph) Name(id ID) []byte { return g.Base[g.BaseOff[id]+HashLen+1 : g.BaseOff[id+1]] }

// IsDerivation reports whether a path is a derivation, by its name: for Nix that
// is what makes one (StorePath::isDerivation).
func (g *Graph) IsDerivation(id ID) bool { return bytes.HasSuffix(g.Name(id), []byte(".drv")) }

// Path is the whole store path.
func (g *Graph) Path(id ID) string { return g.StoreDir + "/" + string(g.BaseName(id)) }

// References are the direct references of a path; part of the graph.
func (g *Graph) References(id ID) []ID { return g.Refs[g.RefOff[id]:g.RefOff[id+1]] }

// Outputs are the outputs of a derivation that the graph has; part of the graph.
func (g *Graph) Outputs(id ID) []ID { return g.Outs[g.OutOff[id]:g.OutOff[id+1]] }

// Each calls f with every id of the set, in order.
func (b Bits) Each(f func(ID)) {
	for i, w := range b {
		for ; w != 0; w &= w - 1 {
			f(ID(i*64 + bits.TrailingZeros64(w)))
		}
	}
}

// Count is the number of ids in the set.
func (b Bits) Count() int {
	n := 0
	for _, w := range b {
		n += bits.OnesCount64(w)
	}
	return n
}
