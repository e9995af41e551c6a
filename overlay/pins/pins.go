// Package pins keeps garbage-collector roots in the system's Nix store for what
// a keep needs of it. A pin is a symlink
//
//	DIR/HASH-NAME -> /nix/store/HASH-NAME
//
// in a directory of its own below /nix/var/nix/gcroots, where Nix's collector
// finds it (gc.cc, findRoots) and spares the path with everything it
// references.
//
// It promises: pins are added before any is removed, both are on disk when a
// call returns nil, nothing is removed that does not look exactly like a pin of
// this package, and a directory that is a symlink, or that another user may
// write to, is refused.
//
// Start with Pinner, which asks what is needed and runs one change at a time.
// Dir, Plan and Roots are its parts. Do not give two keeps one directory.
//
// Pins are plain names on the unencrypted disk: they tell a thief which of the
// system's packages the keep uses. So want must never hold a path that the
// system store does not have (intersect with lower.Client.ValidPaths), Roots
// keeps the list short, and ModeAll hides the choice.
package pins

import (
	"errors"
	"fmt"
	"slices"
	"strings"
)

// Mode is what is pinned. There is no mode for system generations: Nix already
// roots the existing ones, and a keep also uses paths that are in none.
type Mode string

const (
	// ModeExact pins what the keep needs and reveals it.
	ModeExact Mode = "exact"
	// ModeAll pins everything valid in the system store at that time: reveals
	// nothing, frees nothing.
	ModeAll Mode = "all"
)

// ErrMode is returned by ParseMode.
var ErrMode = errors.New("unknown pin mode")

// ParseMode reads a mode from a setting.
func ParseMode(s string) (Mode, error) {
	switch m := Mode(s); m {
	case ModeExact, ModeAll:
		return m, nil
	}
	return "", fmt.Errorf("%w %q, want %q or %q", ErrMode, s, ModeExact, ModeAll)
}

// Plan compares what shall be pinned with what is. Both results are sorted and
// without duplicates.
func Plan(want, have []string) (add, remove []string) {
	w, h := sorted(want), sorted(have)
	for len(w) > 0 || len(h) > 0 {
		switch {
		case len(h) == 0 || len(w) > 0 && w[0] < h[0]:
			add, w = append(add, w[0]), w[1:]
		case len(w) == 0 || h[0] < w[0]:
			remove, h = append(remove, h[0]), h[1:]
		default:
			w, h = w[1:], h[1:]
		}
	}
	return add, remove
}

func sorted(s []string) []string {
	s = slices.Clone(s)
	slices.Sort(s)
	return slices.Compact(s)
}

// Roots returns a subset of paths from which all of them are reached by refs
// (pairs of indexes into paths: referrer, reference). It holds every path that
// no other one refers to, and of a cycle that nothing else refers to the
// first. Order is kept.
func Roots(paths []string, refs [][2]int32) []string {
	n := len(paths)
	start := make([]int32, n+1) // refs by referrer, as offsets into next
	referred := make([]bool, n)
	for _, r := range refs {
		if r[0] != r[1] {
			start[r[0]+1]++
			referred[r[1]] = true
		}
	}
	for i := range n {
		start[i+1] += start[i]
	}
	next := make([]int32, start[n])
	fill := slices.Clone(start[:n])
	for _, r := range refs {
		if r[0] != r[1] {
			next[fill[r[0]]] = r[1]
			fill[r[0]]++
		}
	}
	reached := make([]bool, n)
	root := make([]bool, n)
	var todo []int32
	visit := func(i int32) {
		root[i], reached[i] = true, true
		todo = append(todo, i)
		for len(todo) > 0 {
			k := todo[len(todo)-1]
			todo = todo[:len(todo)-1]
			for _, to := range next[start[k]:start[k+1]] {
				if !reached[to] {
					reached[to] = true
					todo = append(todo, to)
				}
			}
		}
	}
	for i := range int32(n) {
		if !referred[i] {
			visit(i)
		}
	}
	for i := range int32(n) { // what is left hangs off cycles
		if !reached[i] {
			visit(i)
		}
	}
	var out []string
	for i, p := range paths {
		if root[i] {
			out = append(out, p)
		}
	}
	return out
}

// base returns the base name of a store path below storeDir if it is a valid
// one: the name of its pin.
func base(storeDir, path string) (string, bool) {
	name, ok := strings.CutPrefix(path, storeDir+"/")
	return name, ok && pinName(name)
}

// pinName: 32 characters of Nix's base 32, a dash, and 1 to 211 characters that
// Nix allows (path.cc).
func pinName(s string) bool {
	if len(s) < 34 || len(s) > 33+211 || s[32] != '-' {
		return false
	}
	for i, c := range []byte(s) {
		lower := c >= '0' && c <= '9' || c >= 'a' && c <= 'z'
		switch {
		case i < 32:
			if !lower || strings.IndexByte("eotu", c) >= 0 {
				return false
			}
		case !lower && !(c >= 'A' && c <= 'Z') && strings.IndexByte("+-._?=", c) < 0:
			return false
		}
	}
	return true
}
