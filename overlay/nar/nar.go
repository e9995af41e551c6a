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

import (
	"encoding/binary"
	"fmt"
)

// Bounds of what is read. Nix has none but those of the file system.
const (
	MaxName   = 255     // bytes of a name
	MaxTarget = 4095    // bytes of a symbolic link's target
	MaxDepth  = 1 << 14 // directories in each other
)

// MaxPiece is more than any one call of an Append function appends.
const MaxPiece = MaxTarget + 512

// FormatError: not a NAR, at that byte of it.
type FormatError struct {
	Offset int64
	Reason string
}

func (e *FormatError) Error() string {
	return fmt.Sprintf("not a NAR: %s at byte %d", e.Reason, e.Offset)
}

// The fixed pieces. Every token is a string: its length as eight bytes, little-endian,
// then its bytes, then zeros up to a multiple of eight.
var (
	magic      = tokens("nix-archive-1")
	regular    = tokens("(", "type", "regular", "contents")
	executable = tokens("(", "type", "regular", "executable", "", "contents")
	symlink    = tokens("(", "type", "symlink", "target")
	directory  = tokens("(", "type", "directory")
	entry      = tokens("entry", "(", "name")
	node       = tokens("node")
	end        = tokens(")")
)

func tokens(s ...string) string {
	var b []byte
	for _, t := range s {
		b = appendString(b, t)
	}
	return string(b)
}

func appendString(b []byte, s string) []byte {
	b = binary.LittleEndian.AppendUint64(b, uint64(len(s)))
	return AppendPadding(append(b, s...), int64(len(s)))
}

// AppendMagic appends what every archive begins with; one node follows.
func AppendMagic(b []byte) []byte { return append(b, magic...) }

// AppendRegular appends the beginning of a file: size bytes of contents, AppendPadding
// and AppendEnd follow.
func AppendRegular(b []byte, exec bool, size int64) []byte {
	if exec {
		b = append(b, executable...)
	} else {
		b = append(b, regular...)
	}
	return binary.LittleEndian.AppendUint64(b, uint64(size))
}

// AppendPadding appends the zeros that follow size bytes.
func AppendPadding(b []byte, size int64) []byte {
	const zeros = "\x00\x00\x00\x00\x00\x00\x00"
	return append(b, zeros[:-size&7]...)
}

// AppendSymlink appends a whole symbolic link.
func AppendSymlink(b []byte, target string) []byte {
	return AppendEnd(appendString(append(b, symlink...), target))
}

// AppendDirectory appends the beginning of a directory: its entries, in ascending order
// of their names' bytes, and AppendEnd follow.
func AppendDirectory(b []byte) []byte { return append(b, directory...) }

// AppendEntry appends the beginning of a directory's entry: a node and AppendEnd follow.
func AppendEntry(b []byte, name string) []byte {
	return append(appendString(append(b, entry...), name), node...)
}

// AppendEnd appends the end of a file, a directory or an entry.
func AppendEnd(b []byte) []byte { return append(b, end...) }
