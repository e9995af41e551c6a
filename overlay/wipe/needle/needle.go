// Package needle looks for many byte strings at once in raw bytes, such as those of a
// disk or of a database file.
//
// It promises every occurrence of every string, overlapping ones included, at a cost
// per byte that does not grow with the number of strings. Start with New, then Find for
// a buffer or Stream for more than fits into one.
//
// Hash parts of Nix (32 digits of its base 32) are the fast case: of other bytes most
// are stepped over, as Nix's own reference scanner does (libutil/references.cc).
// It is pure. Do not use it for strings of less than four bytes: they are everywhere.
package needle

import (
	"cmp"
	"context"
	"encoding/binary"
	"errors"
	"fmt"
	"io"
	"slices"
)

// Bounds of a string in bytes.
const (
	Shortest = 4
	Longest  = 4096
)

// ErrLength: a string is shorter than Shortest or longer than Longest.
var ErrLength = errors.New("cannot be looked for: too short or too long")

const hashLen = 32

// digit tells the digits of Nix's base 32: no e, o, u, t.
var digit = func() (is [256]bool) {
	for _, c := range "0123456789abcdfghijklmnpqrsvwxyz" {
		is[c] = true
	}
	return is
}()

// Set is a set of strings to look for. It is safe for concurrent use.
type Set struct {
	hashes  map[[hashLen]byte][]int
	others  map[uint32][]int // by the first four bytes
	shift   [1 << 16]uint16  // by the last two bytes of a window: how far no other can begin
	window  int              // length of the shortest of others
	names   [][]byte
	longest int
}

// New makes a set; a string is known by its index later.
func New(names [][]byte) (*Set, error) {
	s := &Set{hashes: map[[hashLen]byte][]int{}, others: map[uint32][]int{}}
	for i, n := range names {
		if len(n) < Shortest || len(n) > Longest {
			return nil, fmt.Errorf("a string of %d bytes: %w", len(n), ErrLength)
		}
		n = slices.Clone(n)
		s.names, s.longest = append(s.names, n), max(s.longest, len(n))
		if len(n) == hashLen && !slices.ContainsFunc(n, func(c byte) bool { return !digit[c] }) {
			k := [hashLen]byte(n)
			s.hashes[k] = append(s.hashes[k], i)
			continue
		}
		k := binary.LittleEndian.Uint32(n)
		s.others[k] = append(s.others[k], i)
	}
	s.shifts()
	return s, nil
}

// shifts fills the table of Wu and Manber, "A fast algorithm for multi-pattern
// searching" (1994), with blocks of two bytes.
func (s *Set) shifts() {
	s.window = Longest
	for _, of := range s.others {
		for _, n := range of {
			s.window = min(s.window, len(s.names[n]))
		}
	}
	for i := range s.shift {
		s.shift[i] = uint16(s.window - 1)
	}
	for _, of := range s.others {
		for _, n := range of {
			for i := range s.window - 1 {
				p := &s.shift[binary.LittleEndian.Uint16(s.names[n][i:])]
				*p = min(*p, uint16(s.window-2-i))
			}
		}
	}
}

// Size is the length of a string in bytes.
func (s *Set) Size(name int) int { return len(s.names[name]) }

// Len is how many strings there are.
func (s *Set) Len() int { return len(s.names) }

// Find calls each for every occurrence in b, ascending by its offset.
func (s *Set) Find(b []byte, each func(name, at int)) {
	type hit struct{ name, at int }
	var hits []hit
	for i := 0; len(s.hashes) > 0 && i+hashLen <= len(b); {
		// From the end: the first byte that is no digit rules out all before it.
		j := hashLen - 1
		for j >= 0 && digit[b[i+j]] {
			j--
		}
		if j >= 0 {
			i += j + 1
			continue
		}
		// A run of digits: each further one makes one more candidate.
		for {
			for _, n := range s.hashes[[hashLen]byte(b[i:])] {
				hits = append(hits, hit{n, i})
			}
			i++
			if i+hashLen > len(b) || !digit[b[i+hashLen-1]] {
				break
			}
		}
	}
	for i := 0; len(s.others) > 0 && i+s.window <= len(b); {
		if far := s.shift[binary.LittleEndian.Uint16(b[i+s.window-2:])]; far > 0 {
			i += int(far)
			continue
		}
		for _, n := range s.others[binary.LittleEndian.Uint32(b[i:])] {
			if name := s.names[n]; len(b)-i >= len(name) && string(b[i:i+len(name)]) == string(name) {
				hits = append(hits, hit{n, i})
			}
		}
		i++
	}
	slices.SortStableFunc(hits, func(a, b hit) int { return cmp.Compare(a.at, b.at) })
	for _, h := range hits {
		each(h.name, h.at)
	}
}

// bufferSize is large enough that what is kept of a buffer for the next is nothing.
const bufferSize = 4 << 20

// Stream is Find for all that r has, with offsets from where it begins.
func (s *Set) Stream(ctx context.Context, r io.Reader, each func(name int, at int64)) error {
	buf := make([]byte, bufferSize)
	base, kept := int64(0), 0
	for {
		if err := ctx.Err(); err != nil {
			return err
		}
		n, err := io.ReadFull(r, buf[kept:])
		have := buf[:kept+n]
		s.Find(have, func(name, at int) {
			if at+len(s.names[name]) > kept { // else it was found before
				each(name, base+int64(at))
			}
		})
		switch {
		case errors.Is(err, io.EOF), errors.Is(err, io.ErrUnexpectedEOF):
			return nil
		case err != nil:
			return err
		}
		kept = copy(buf, have[max(0, len(have)-s.longest+1):])
		base += int64(len(have) - kept)
	}
}
