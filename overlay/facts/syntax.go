package facts

import (
	"bytes"

	"overkeep/policy/graph"
)

// The bounds of a store path's base name, HASH-NAME (path.cc, store-dir-config.cc of Nix).
const (
	hashLen    = 32
	maxNameLen = 211
	maxBase    = hashLen + 1 + maxNameLen
)

// Classes of characters.
const (
	isBase32 = 1 << iota
	isName
	isHex
)

var class = func() (t [256]uint8) {
	for _, c := range "0123456789abcdfghijklmnpqrsvwxyz" { // no e o u t
		t[c] |= isBase32
	}
	for c := '0'; c <= '9'; c++ {
		t[c] |= isName | isHex
	}
	for c := 'a'; c <= 'z'; c++ {
		t[c] |= isName
	}
	for c := 'A'; c <= 'Z'; c++ {
		t[c] |= isName
	}
	for c := 'a'; c <= 'f'; c++ {
		t[c] |= isHex
	}
	for _, c := range "+-._?=" {
		t[c] |= isName
	}
	return t
}()

// all reports whether every character is of a class.
func all(s []byte, want uint8) bool {
	and := want
	for _, c := range s {
		and &= class[c]
	}
	return and == want
}

// validBase reports whether Nix would take HASH-NAME for the base name of a store path.
func validBase(b []byte) bool {
	if len(b) <= hashLen+1 || len(b) > maxBase || b[hashLen] != '-' || !all(b[:hashLen], isBase32) {
		return false
	}
	name := b[hashLen+1:]
	if name[0] == '.' { // not "." or "..", nor these before a dash
		if rest := bytes.TrimPrefix(name[1:], []byte(".")); len(rest) == 0 || rest[0] == '-' {
			return false
		}
	}
	return all(name, isName)
}

// baseOf is the base name of a store path with the prefix "/nix/store/"; nil if it is none.
func baseOf(path []byte, prefix string) []byte {
	if len(path) < len(prefix) || string(path[:len(prefix)]) != prefix {
		return nil
	}
	if b := path[len(prefix):]; validBase(b) {
		return b
	}
	return nil
}

var sha256Prefix = []byte("sha256:")

// hashDigits are the 64 digits of a NAR hash as Nix stores it; nil if it is none.
func hashDigits(h []byte) []byte {
	if len(h) != len(sha256Prefix)+64 || !bytes.HasPrefix(h, sha256Prefix) {
		return nil
	}
	if d := h[len(sha256Prefix):]; all(d, isHex) {
		return d
	}
	return nil
}

// What a row says, kept in the flags of a path until its kind is known.
const (
	saysDeriver graph.Flags = 1 << (15 - iota) // the column names one
	saysSigned                                 // it has signatures, verified or not
	saysText                                   // ca "text:"
	saysFixed                                  // ca "fixed:"
	saysOutput                                 // a derivation has it among its outputs

	saysMask = saysDeriver | saysSigned | saysText | saysFixed | saysOutput
)

var dotDrv = []byte(".drv")

// added reports whether a row is that of a path that was added with a known content,
// as far as anybody can tell. A path that refers to others was not added by its content
// alone: `nix store make-content-addressed` turns what was built into such a path.
func (s *Snapshot) added(id graph.ID, says graph.Flags, anyCA bool) bool {
	if says&saysFixed == 0 || says&(saysDeriver|saysOutput|graph.Ultimate) != 0 || anyCA || s.Graph.IsDerivation(id) {
		return false
	}
	for _, r := range s.Graph.References(id) {
		if r != id {
			return false
		}
	}
	return true
}

// kind is what a path can be, by its row. Several kinds, where the rows do not
// tell them apart.
//
// A fixed output that was built or substituted has ca "fixed:" and a deriver; a
// source that was added has the same ca and no deriver. But a fixed output can
// lose its deriver, and `nix-store --load-db` loses every ca: then the row has
// neither signatures nor "ultimate".
func kind(f graph.Flags, base []byte, anyCA bool) graph.Flags {
	made := f&(saysDeriver|saysOutput) != 0
	switch drv := bytes.HasSuffix(base, dotDrv); {
	case drv && f&saysFixed == 0:
		return graph.Derivation
	case drv: // Nix calls it a derivation; its content address says that it was added, or is an output
		return graph.Derivation | graph.Source | graph.FixedOutput
	case f&(saysText|saysFixed) != 0 && made && anyCA:
		return graph.Output | graph.FixedOutput
	case f&(saysText|saysFixed) != 0 && made:
		return graph.FixedOutput
	case f&saysText != 0: // builtins.toFile
		return graph.Source
	case f&saysFixed != 0:
		return graph.Source | graph.FixedOutput
	case f&(graph.Ultimate|saysSigned) != 0:
		return graph.Output
	case made:
		return graph.Output | graph.FixedOutput
	}
	return graph.Source | graph.Output | graph.FixedOutput
}
