// Package nar is the Nix archive format: one encoding for a tree of files,
// symbolic links and directories, which Nix hashes and transfers (libutil/archive.cc; the
// manual's "Nix Archive (NAR) format").
//
// It promises: Reader takes exactly the archives that Nix writes, each tree having one, and
// refuses everything else with a *FormatError and no more memory than the bounds below
// allow; the Append functions make the pieces of such an archive. It is pure: it opens no file.
//
// Start with NewReader. To archive or unpack a tree on disk use package tree. There are no
// executable directories, owners, times or hard links in a NAR; do not use it to keep them.
package nar

import "fmt"

// Bounds of what is read.
const (
	MaxName   = 255     // bytes of a name
	MaxTarget = 4095    // bytes of a symbolic link's target
	MaxDepth  = 1 << 14 // directories in each other
)

// FormatError: not a NAR, at that byte of it.
type FormatError struct {
	Offset int64
	Reason string
}

func (e *FormatError) Error() string {
	return fmt.Sprintf("not a NAR: %s at byte %d", e.Reason, e.Offset)
}
