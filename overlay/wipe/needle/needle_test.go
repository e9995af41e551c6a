package needle

import (
	"bytes"
	"errors"
	"fmt"
	"slices"
	"strings"
	"testing"
	"testing/iotest"

	"pgregory.net/rapid"
)

type at struct {
	name int
	at   int64
}

// plain is what Set is measured against.
func plain(names [][]byte, b []byte) (found []at) {
	for i := range b {
		for n, name := range names {
			if bytes.HasPrefix(b[i:], name) {
				found = append(found, at{n, int64(i)})
			}
		}
	}
	return found
}

func sorted(a []at) []at {
	slices.SortFunc(a, func(x, y at) int {
		if x.at != y.at {
			return int(x.at - y.at)
		}
		return x.name - y.name
	})
	return a
}

// Both ways to look find what a plain search does, on few letters, so that strings
// overlap, repeat and begin with each other.
func TestAgainstPlain(t *testing.T) {
	rapid.Check(t, func(t *rapid.T) {
		letters := rapid.SampledFrom([]string{"ab", "a", "ab-", "abe\x00"}).Draw(t, "letters")
		text := func(label string, lo, hi int) []byte {
			return rapid.SliceOfN(rapid.SampledFrom([]byte(letters)), lo, hi).Draw(t, label)
		}
		var names [][]byte
		for range rapid.IntRange(1, 6).Draw(t, "names") {
			if rapid.Bool().Draw(t, "hash") {
				names = append(names, text("hash", 32, 32))
			} else {
				names = append(names, text("other", 4, 40))
			}
		}
		b := text("text", 0, 100)
		for range rapid.IntRange(0, 4).Draw(t, "plants") {
			b = append(b, rapid.SampledFrom(names).Draw(t, "plant")...)
			b = append(b, text("between", 0, 40)...)
		}
		s, err := New(names)
		if err != nil {
			t.Fatal(err)
		}
		var found []at
		s.Find(b, func(n, i int) { found = append(found, at{n, int64(i)}) })
		if want := plain(names, b); !slices.Equal(sorted(found), want) {
			t.Fatalf("%q in %q: %v, want %v", names, b, found, want)
		}
	})
}

// A string is found wherever it lies about the edge of a buffer, and once.
func TestEdges(t *testing.T) {
	hash := []byte("0c1d2f3g4h5i6j7k8l9m0n1p2q3r4s5v")
	other := []byte("EDGE-of-a-buffer")
	s, err := New([][]byte{hash, other})
	if err != nil {
		t.Fatal(err)
	}
	for n, name := range [][]byte{hash, other} {
		for d := -len(name) - 2; d <= 2; d++ {
			b := make([]byte, bufferSize+1000)
			copy(b[bufferSize+d:], name)
			var found []at
			if err := s.Stream(t.Context(), bytes.NewReader(b), func(n int, i int64) { found = append(found, at{n, i}) }); err != nil {
				t.Fatal(err)
			}
			if want := []at{{n, int64(bufferSize + d)}}; !slices.Equal(found, want) {
				t.Errorf("at %d of the edge: %v", d, found)
			}
		}
	}
	// What reads little at a time, and what breaks.
	var found []at
	text := strings.Repeat("x", 50) + string(hash) + string(other)
	if err := s.Stream(t.Context(), iotest.OneByteReader(strings.NewReader(text)), func(n int, i int64) { found = append(found, at{n, i}) }); err != nil {
		t.Fatal(err)
	}
	if want := []at{{0, 50}, {1, 82}}; !slices.Equal(found, want) {
		t.Error(found)
	}
	if err := s.Stream(t.Context(), iotest.ErrReader(fmt.Errorf("input/output error")), nil); err == nil {
		t.Error("an unreadable disk holds nothing")
	}
}

func TestLengths(t *testing.T) {
	for _, n := range []int{0, 3, Longest + 1} {
		if _, err := New([][]byte{make([]byte, n)}); !errors.Is(err, ErrLength) {
			t.Errorf("%d bytes: %v", n, err)
		}
	}
}

func FuzzFind(f *testing.F) {
	f.Add([]byte("abcdabcd"), []byte("abcd"), []byte("0123456789abcdfghijklmnpqrsvwxyz"))
	f.Add([]byte("0123456789abcdfghijklmnpqrsvwxyz0123456789abcdfghijklmnpqrsvwxyz"), []byte("xyz0"), []byte("0123456789abcdfghijklmnpqrsvwxyz"))
	f.Fuzz(func(t *testing.T, b, x, y []byte) {
		names := [][]byte{x, y}
		s, err := New(names)
		if err != nil {
			return
		}
		var found []at
		s.Find(b, func(n, i int) { found = append(found, at{n, int64(i)}) })
		if want := plain(names, b); !slices.Equal(sorted(found), want) {
			t.Fatalf("%v, want %v", found, want)
		}
	})
}

func BenchmarkFind(b *testing.B) {
	var hashes, others [][]byte
	for i := range 1000 {
		hashes = append(hashes, fmt.Appendf(nil, "%032d", i))
		others = append(others, fmt.Appendf(nil, "%d-name-of-a-package", i))
	}
	random := make([]byte, bufferSize)
	x := uint64(1)
	for i := range random {
		x = x*6364136223846793005 + 1442695040888963407
		random[i] = byte(x >> 56)
	}
	for _, c := range []struct {
		name  string
		names [][]byte
		in    []byte
	}{
		{"hashes/random", hashes, random}, {"hashes/zeros", hashes, make([]byte, bufferSize)},
		{"others/random", others, random}, {"others/zeros", others, make([]byte, bufferSize)},
	} {
		s, err := New(c.names)
		if err != nil {
			b.Fatal(err)
		}
		b.Run(c.name, func(b *testing.B) {
			b.SetBytes(int64(len(c.in)))
			for b.Loop() {
				s.Find(c.in, func(int, int) {})
			}
		})
	}
}
