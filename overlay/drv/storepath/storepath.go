// Package storepath computes and checks Nix store paths: HASH-NAME below a store
// directory, where HASH commits to what made the path.
//
// It promises to agree with Nix (libstore/path.cc, store-dir-config.cc, and the
// manual's "Store Path Specification") on every path it makes, and to accept as a
// base name exactly what Nix accepts. It is pure.
//
// Start with Text for a .drv or a builtins.toFile, Fixed for a fetched source,
// and Base to take a path apart. Do not use it for output paths of ordinary
// derivations: those need the hash modulo fixed outputs, which it does not know.
package storepath

import (
	"crypto/sha256"
	"encoding/base64"
	"encoding/hex"
	"errors"
	"fmt"
	"slices"
	"strings"
)

// Dir is where stock Nix has its store.
const Dir = "/nix/store"

const (
	hashLen = 32  // characters of a base name before the dash
	maxName = 211 // bytes of a name (StorePath::MaxPathLen)
)

var (
	// ErrName: it cannot be the name of a store path.
	ErrName = errors.New("not a name of a store path")
	// ErrHash: it is not a hash in a form that Nix writes.
	ErrHash = errors.New("not a hash")
)

// The digits of Nix's base 32: no e, o, u, t.
const digits = "0123456789abcdfghijklmnpqrsvwxyz"

// values is the inverse of digits; 0xff is no digit.
var values = func() (v [256]byte) {
	for i := range v {
		v[i] = 0xff
	}
	for i := range len(digits) {
		v[digits[i]] = byte(i)
	}
	return v
}()

// AppendBase32 appends b in Nix's base 32: little-endian, the last digit first.
func AppendBase32(dst, b []byte) []byte {
	for n := (len(b)*8+4)/5 - 1; n >= 0; n-- {
		i, j := n*5/8, uint(n*5%8)
		c := b[i] >> j
		if i+1 < len(b) {
			c |= b[i+1] << (8 - j)
		}
		dst = append(dst, digits[c&31])
	}
	return dst
}

// Base32 is b in Nix's base 32.
func Base32(b []byte) string { return string(AppendBase32(nil, b)) }

// FromBase32 is the inverse of Base32 for a value of size bytes.
func FromBase32(s string, size int) ([]byte, error) {
	if len(s) != (size*8+4)/5 {
		return nil, fmt.Errorf("%w: %d digits of base 32 for %d bytes", ErrHash, len(s), size)
	}
	b := make([]byte, size)
	for k := range len(s) {
		v := values[s[len(s)-1-k]]
		if v == 0xff {
			return nil, fmt.Errorf("%w: %q is no digit of base 32", ErrHash, s[len(s)-1-k])
		}
		i, j := k*5/8, uint(k*5%8)
		b[i] |= v << j
		if over := v >> (8 - j); i+1 < size {
			b[i+1] |= over
		} else if over != 0 {
			return nil, fmt.Errorf("%w: bits beyond %d bytes", ErrHash, size)
		}
	}
	return b, nil
}

// CheckName reports whether name can follow the hash of a store path.
func CheckName(name string) error {
	switch {
	case name == "":
		return fmt.Errorf("%w: it is empty", ErrName)
	case len(name) > maxName:
		return fmt.Errorf("%w: %d bytes are more than %d", ErrName, len(name), maxName)
	case name[0] == '.':
		if first, _, _ := strings.Cut(name, "-"); first == "." || first == ".." {
			return fmt.Errorf("%w: %q begins with %q", ErrName, name, first)
		}
	}
	for i := range len(name) {
		switch c := name[i]; {
		case 'a' <= c && c <= 'z', 'A' <= c && c <= 'Z', '0' <= c && c <= '9':
		case c == '+', c == '-', c == '.', c == '_', c == '?', c == '=':
		default:
			return fmt.Errorf("%w: %q in %q", ErrName, c, name)
		}
	}
	return nil
}

// IsBase reports whether s is HASH-NAME as Nix takes it.
func IsBase(s string) bool {
	if len(s) < hashLen+2 || s[hashLen] != '-' {
		return false
	}
	for i := range hashLen {
		if values[s[i]] == 0xff {
			return false
		}
	}
	return CheckName(s[hashLen+1:]) == nil
}

// Base returns HASH-NAME of a path that lies directly in the store dir.
func Base(dir, path string) (string, bool) {
	rest, ok := strings.CutPrefix(path, dir)
	if !ok || !strings.HasPrefix(rest, "/") || !IsBase(rest[1:]) {
		return "", false
	}
	return rest[1:], true
}

// Name is NAME of a base name that IsBase accepts.
func Name(base string) string { return base[hashLen+1:] }

// Make is the path for a type ("source", "text:…", "output:out"), the SHA-256 of
// what the type says, and a name.
func Make(dir, typ string, sum [sha256.Size]byte, name string) (string, error) {
	if err := CheckName(name); err != nil {
		return "", err
	}
	whole := sha256.Sum256([]byte(typ + ":sha256:" + hex.EncodeToString(sum[:]) + ":" + dir + ":" + name))
	var short [20]byte
	for i, c := range whole {
		short[i%len(short)] ^= c
	}
	return dir + "/" + Base32(short[:]) + "-" + name, nil
}

// Text is the path of a text file with the given references (whole paths, in any
// order): every .drv, and what builtins.toFile makes.
func Text(dir, name string, content []byte, refs []string) (string, error) {
	return Make(dir, withRefs("text", refs), sha256.Sum256(content), name)
}

// withRefs is a type with its references sorted, each once.
func withRefs(typ string, refs []string) string {
	sorted := slices.Compact(slices.Sorted(slices.Values(refs)))
	return strings.Join(append([]string{typ}, sorted...), ":")
}

// Method is how the content of a path was hashed.
type Method string

// The methods that have a path of their own kind.
const (
	Flat Method = ""   // the bytes of a file
	NAR  Method = "r:" // the archive of a tree
)

// Fixed is the path of content known by its hash, without references: a flake
// input, the output of fetchurl.
func Fixed(dir, name string, m Method, h Hash) (string, error) {
	if size, ok := Sizes[h.Algo]; !ok || len(h.Sum) != size {
		return "", fmt.Errorf("%w: %d bytes of %q", ErrHash, len(h.Sum), h.Algo)
	}
	if m == NAR && h.Algo == "sha256" {
		return Make(dir, "source", [sha256.Size]byte(h.Sum), name)
	}
	sum := sha256.Sum256([]byte("fixed:out:" + string(m) + h.Algo + ":" + hex.EncodeToString(h.Sum) + ":"))
	return Make(dir, "output:out", sum, name)
}

// Hash is a hash with the name of its function. Sum has the right length.
type Hash struct {
	Algo string // one of Sizes
	Sum  []byte
}

// Sizes are the hash functions of Nix with their lengths in bytes.
var Sizes = map[string]int{"md5": 16, "sha1": 20, "sha256": 32, "sha512": 64, "blake3": 32}

// ParseHash reads "sha256-BASE64" (SRI) or "sha256:" with hex, base 32 or base 64.
func ParseHash(s string) (Hash, error) {
	i := strings.IndexAny(s, ":-")
	if i < 0 {
		return Hash{}, fmt.Errorf("%w: %.100q names no function", ErrHash, s)
	}
	h := Hash{Algo: s[:i]}
	size, ok := Sizes[h.Algo]
	if !ok {
		return Hash{}, fmt.Errorf("%w: function %.20q is not known", ErrHash, h.Algo)
	}
	text := s[i+1:]
	var err error
	switch {
	case len(text) == base64.StdEncoding.EncodedLen(size):
		h.Sum, err = base64.StdEncoding.Strict().DecodeString(text)
	case s[i] == '-':
		err = errors.New("wrong length")
	case len(text) == 2*size:
		h.Sum, err = hex.DecodeString(text)
	default:
		h.Sum, err = FromBase32(text, size)
	}
	if err == nil && len(h.Sum) != size {
		err = errors.New("wrong length")
	}
	if err != nil {
		return Hash{}, fmt.Errorf("%w: %.200q: %w", ErrHash, s, err)
	}
	return h, nil
}
