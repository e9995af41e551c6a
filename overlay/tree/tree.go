// Package tree copies, hashes and removes the file trees of store paths.
//
// It promises: a tree is reached through directory descriptors alone, one name at a
// time; no link is followed and no mount point crossed. What Copy writes has Nix's
// canonical form (modes 0444 and 0555, modification time 1, one owner, no extended
// attributes; libstore/posix-fs-canonicalise.cc), and the NAR hash it returns is of the
// bytes that were read and written, so nothing is read twice. Memory is a few MiB,
// and descriptors a few dozen, for each worker, whatever the size and depth of the tree; only
// the names of the directories on the way down are held beside.
//
// Start with CopyAll for a batch with the hashes of a database, Hash to check one path,
// Remove to get rid of one. Usage and Room answer beforehand whether there is room.
//
// Nothing here is made durable, nothing is renamed into place and nothing is registered:
// the caller calls syncfs(2), renames, and removes what an error left behind. Do not use it
// for trees that must keep their modes, times, hard links or attributes.
package tree

import (
	"crypto/sha256"
	"errors"
	"fmt"
)

// DefaultWorkers is how many paths CopyAll copies at a time unless told.
const DefaultWorkers = 2

var (
	// ErrChanged: a tree is not what it was a moment ago: a file has become longer or
	// shorter while it was read, or a directory was moved.
	ErrChanged = errors.New("changed while it was read")
	// ErrMount: a mount point lies in a tree.
	ErrMount = errors.New("mount point in a tree")
	// ErrDepth: directories lie more than nar.MaxDepth deep.
	ErrDepth = errors.New("tree is too deep")
	// ErrName: a name given by the caller is no single element of a path.
	ErrName = errors.New("not a name in a directory")
	// ErrACL: the target directory has a default ACL, which everything made in it would
	// inherit.
	ErrACL = errors.New("target directory has a default ACL")
)

// UnsupportedError: what no store path may hold, such as a device node.
type UnsupportedError struct {
	Name string // the last element of its path
	Kind string // "device", "fifo", "socket" or "file of an unknown kind"
}

func (e *UnsupportedError) Error() string { return fmt.Sprintf("%q is a %s", e.Name, e.Kind) }

// MismatchError: a tree does not have the hash that it should.
type MismatchError struct {
	Name      string // of the tree, in its source directory
	Want, Got [sha256.Size]byte
}

func (e *MismatchError) Error() string {
	return fmt.Sprintf("%q has NAR hash sha256:%x, not sha256:%x", e.Name, e.Got, e.Want)
}

// SizeError: a tree is larger than it should be; what hash it has was not looked for.
type SizeError struct {
	Name string // of the tree, in its source directory
	Want int64  // bytes of the NAR
}

func (e *SizeError) Error() string {
	return fmt.Sprintf("%q has a NAR of more than %d bytes", e.Name, e.Want)
}

// Error is a system call that did not work.
type Error struct {
	Op     string // such as "open"
	Name   string // the last element of what it was done to
	Target bool   // at the place that is written to, not the one that is read
	Err    error  // an errno, or one of this package's errors
}

func (e *Error) Error() string { return fmt.Sprintf("%s %q: %v", e.Op, e.Name, e.Err) }
func (e *Error) Unwrap() error { return e.Err }

// Options are those of all functions. The zero value is good for root.
type Options struct {
	// UID and GID own everything that is written.
	UID, GID int
	// Workers bounds the paths that CopyAll copies at a time; 0 is DefaultWorkers.
	Workers int
	// Progress, if not nil, is told how many NAR bytes more have been read since it was
	// last told. CopyAll makes one call at a time. It should return at once.
	Progress func(n int64)
}

// Result is what a tree was.
type Result struct {
	NarHash [sha256.Size]byte
	NarSize int64 // bytes of the archive

	Files, Dirs, Links int64
	Bytes              int64 // of the contents of all files
	// Blocks is what was written of them, in blocks of the target file system: runs
	// of zeros become holes. 0 where nothing was written.
	Blocks int64
}

// Job is one path for CopyAll.
type Job struct {
	Name    string // in the source directory
	NewName string // in the target directory; must not exist
	// Want is the NAR hash that the tree must have; it is always compared.
	Want [sha256.Size]byte
	// NarSize is how long the NAR must be, 0 if that is not known: a tree with a file that
	// makes it longer is not read to its end (*SizeError).
	NarSize int64
}

// Space is room on a file system.
type Space struct {
	BlockSize int64 // bytes
	Blocks    int64 // of BlockSize
	Inodes    int64
}
