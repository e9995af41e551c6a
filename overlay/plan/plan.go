// Package plan says which paths move between the system store and a keep, in which
// order, and which cannot and why.
//
// It is pure: plain values in, plain values out, no files, no clock, no Nix. It
// promises, of every plan that Make returns:
//
//   - After any prefix of the moves that ends between two units the system store is
//     closed under references: no path that stays in it refers to a sealed one, and
//     everything a released one refers to is there.
//   - Every path that lies where the policy does not want it is moved or blocked, and
//     what is blocked names what holds it.
//   - Work and memory are linear in the graph.
//
// Start with Make; Groups and Ways are for showing it, Diff for whether a plan still
// holds, Encode and Decode for a plan in a file. A plan names private paths: it may
// be written inside its keep only.
//
// Do not use it to find out what is valid on disk at the moment of a move: roots and
// referrers can come up after a plan was made, and who moves looks again under the
// collector's lock.
//
// Words: seal = system store to keep, release = keep to system store, unit = paths
// that refer to each other in a circle and move together.
package plan

import (
	"slices"

	"overkeep/policy"
	"overkeep/policy/graph"
)

// Kind is the direction of a move.
type Kind string

const (
	Seal    Kind = "seal"    // system store to keep
	Release Kind = "release" // keep to system store
)

// Move is one path that changes its store.
type Move struct {
	Kind    Kind   `json:"kind"`
	Path    string `json:"path"`     // /nix/store/HASH-NAME
	NarHash string `json:"nar_hash"` // sha256:HEX, as in the database
	NarSize int64  `json:"nar_size"` // bytes

	// Unit numbers the units of a plan from 0, in the order of the moves. The moves of
	// a unit are neighbours; who carries a plan out must not stop between them. A
	// blocked path has NoUnit.
	Unit int `json:"unit"`

	// Duplicate: both stores have the path, with the same data. Sealing it removes the
	// system store's copy, releasing it the keep's; nothing is copied.
	Duplicate bool `json:"duplicate,omitempty"`

	// Reason is the index in Plan.Reasons of why it moves.
	Reason int `json:"reason"`

	// Follows is the path for whose sake this one moves, "" if it is for its own: of a
	// seal one that it refers to, of a release one that refers to it, by whatever way.
	Follows string `json:"follows,omitempty"`
}

// Reason is why paths move: the verdict's reason and the line of the policy that
// decided, for a path that follows those of the path it follows. Moves that nobody
// asked the policy about have Reason "asked" and no line.
type Reason struct {
	Reason string `json:"reason"`         // as policy.Reason, or Asked
	Line   string `json:"line,omitempty"` // text of the line
	File   string `json:"file,omitempty"` // its file
	Row    int    `json:"row,omitempty"`  // and the line's number in it, from 1
}

// Asked is the Reason of what moves because the caller says so.
const Asked = "asked"

// RootKind says whose a root of the system store is.
type RootKind string

const (
	RootBoot    RootKind = "boot"     // the running or the booted system, or a system profile
	RootUser    RootKind = "user"     // the keep's user's: it moves along
	RootOther   RootKind = "other"    // somebody else's, or nobody knows whose
	RootKeepPin RootKind = "keep-pin" // another keep's pin
	RootProcess RootKind = "process"  // a running process has it open, mapped or in its environment
	RootTemp    RootKind = "temp"     // a client of the nix-daemon is at work with it
	RootOwnPin  RootKind = "own-pin"  // this keep's pin: the supervisor takes it away by itself
)

// Root is a root of the system store as its collector sees it.
type Root struct {
	Link string   `json:"link"` // the link as Nix names it; "pid 123 (comm)" of a process
	Path string   `json:"path"` // the store path it holds
	Kind RootKind `json:"kind"`

	// Of a root that moves along: the indirect root that leads to Link ("" where Link
	// lies in a directory that the collector reads itself), and the link's place in the
	// keep, as a path below the keep's volume.
	Auto string `json:"auto,omitempty"`
	To   string `json:"to,omitempty"`
}

// BlockWhy is what keeps a path where it is. Those of roots are the RootKind's words.
type BlockWhy string

const (
	BlockedBoot       BlockWhy = BlockWhy(RootBoot)
	BlockedOther      BlockWhy = BlockWhy(RootOther)
	BlockedKeepPin    BlockWhy = BlockWhy(RootKeepPin)
	BlockedProcess    BlockWhy = BlockWhy(RootProcess)
	BlockedTemp       BlockWhy = BlockWhy(RootTemp)
	BlockedReferenced BlockWhy = "referenced" // By is a path that stays in the system store and refers to it
	BlockedNeeds      BlockWhy = "needs"      // it refers to By, which does not come to the system store
	BlockedDiffers    BlockWhy = "differs"    // the two stores have it with other data
	BlockedGone       BlockWhy = "gone"       // Exact: it is not, or no more, in the store that it should leave
	BlockedRow        BlockWhy = "row"        // its row cannot be read, or has no NAR hash
)

// Blocked is a path that should move and cannot.
type Blocked struct {
	Move
	Why BlockWhy `json:"why"`
	By  string   `json:"by,omitempty"` // the root's Link, or a path; "" where it is the path itself

	// Via is the path that passes it on, itself blocked by the same: of a seal one that
	// refers to this one, of a release one that this one refers to. "": directly. Ways
	// follows it.
	Via string `json:"via,omitempty"`
}

// Residue is something that stays readable and that no move can take away.
type Residue struct {
	Code  string `json:"code"`
	Words string `json:"words"`
}

// Version is the version of a plan in a file.
const Version = 1

// Plan is what is to be done. It is plain: equal inputs make equal plans.
type Plan struct {
	Version int    `json:"version"`
	Machine string `json:"machine"` // machine-id(5)
	Keep    string `json:"keep"`
	KeepID  string `json:"keep_id"`
	Policy  string `json:"policy"`  // digest of the policies that decided, "" if none was asked
	Created string `json:"created"` // RFC 3339

	Reasons []Reason `json:"-"`
	// Moves in the order in which they are to be done: first all seals, referrers before
	// what they refer to; then all releases, the other way round.
	Moves   []Move    `json:"-"`
	Roots   []Root    `json:"-"` // the user's roots that move along with a sealed path
	Blocked []Blocked `json:"-"`
	Residue []Residue `json:"-"`
}

// Gone adds paths that should have been moved and that no graph has any more.
func (p *Plan) Gone(k Kind, paths ...string) {
	if len(paths) == 0 {
		return
	}
	why := slices.Index(p.Reasons, Reason{Reason: Asked})
	if why < 0 {
		why = len(p.Reasons)
		p.Reasons = append(p.Reasons, Reason{Reason: Asked})
	}
	for _, path := range paths {
		p.Blocked = append(p.Blocked, Blocked{Move: Move{Kind: k, Path: path, Unit: NoUnit, Reason: why}, Why: BlockedGone})
	}
}

// ReasonOf is why a move is made.
func (p *Plan) ReasonOf(m *Move) Reason { return p.Reasons[m.Reason] }

// Mode is how much a plan may decide by itself.
type Mode int

const (
	// Misplaced moves every path that lies where the policy does not want it.
	Misplaced Mode = iota
	// Chosen moves Input.Seal with everything in the system store that refers to it, and
	// Input.Release with everything it refers to, which the policy must permit.
	Chosen
	// Exact moves Input.Seal and Input.Release and nothing else, whatever the policy
	// says; what would leave a reference open is blocked. For undo and eject.
	Exact
)

// Input is what a plan is made from.
type Input struct {
	// Graph is both stores as a whole (facts.Load, never facts.LoadFor: referrers count).
	// May be nil if Verdicts is there.
	Graph *graph.Graph
	// Verdicts over that graph. May be nil for Exact.
	Verdicts *policy.Verdicts

	Mode          Mode
	Seal, Release []graph.ID // for Chosen and Exact; any order, repetitions do no harm

	Roots []Root // of the system store, all of them

	// Row returns a path's NAR hash (sha256:HEX) and size from the database of the store
	// that it leaves; "" if there is no such row. It is called once for each path that
	// might move. Its error ends Make.
	Row func(k Kind, id graph.ID) (narHash string, narSize int64, err error)

	Medium Medium

	Machine, Keep, KeepID, Policy, Created string // as in Plan
}
