package plan

import "errors"

// Make decides what moves. Errors: of Input.Row; *NotPermittedError; ErrInput.
func Make(in Input) (*Plan, error) { return nil, errors.ErrUnsupported }

// Medium is what is known of the disk that the system store lies on.
type Medium struct {
	FSType  string // as in /proc/self/mountinfo
	Discard bool   // the device takes FITRIM
	Links   bool   // the store shares equal files by hard links (/nix/store/.links is not empty)
}

// NotPermittedError: a release that was asked for takes a path along that the policy
// does not permit in the system store.
type NotPermittedError struct {
	Asked string // the path that was named
	Path  string // the path that may not go: Asked itself, or one that it refers to by whatever way
	Why   Reason // why it is personal
}

func (e *NotPermittedError) Error() string { return e.Path }

// Group is the moves of one kind for one reason.
type Group struct {
	Kind   Kind   `json:"kind"`
	Reason Reason `json:"reason"`
	Paths  int    `json:"paths"`
	Bytes  int64  `json:"bytes"`
	// Of these, what follows another path.
	Following      int   `json:"following"`
	FollowingBytes int64 `json:"following_bytes"`
	Duplicates     int   `json:"duplicates"`
}

// Groups sums the moves up, seals first, the largest first.
func (p *Plan) Groups() []Group { return nil }

// Ways returns a function that gives the way from what holds Blocked[i] to its path:
// the paths in between, the last one the path itself.
func (p *Plan) Ways() func(i int) []string { return nil }

// Difference is in what two plans differ.
type Difference struct {
	Missing  []Move // in want, but nothing (or another kind) has to be done now
	New      []Move // not in want
	Changed  []Move // other data or another way to move, as it is now
	NewRoots []Root // a root that would move along and is not in want
}

// Empty: nothing differs.
func (d *Difference) Empty() bool { return true }

// Diff compares the plan that was agreed to with one made now. Paths for which done
// says true (nil: none) may be missing now: they have been moved.
func Diff(want, now *Plan, done func(path string) bool) *Difference { return nil }

// Expect is whose plan is wanted.
type Expect struct{ Machine, KeepID string }

// Encode writes a plan as a file, authenticated by key.
func Encode(p *Plan, key []byte) []byte { return nil }

// Decode reads a file. Errors are *FileError.
func Decode(b, key []byte, expect Expect) (*Plan, error) { return nil, errors.ErrUnsupported }
