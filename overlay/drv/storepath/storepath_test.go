package storepath

import (
	"bytes"
	"crypto/rand"
	"errors"
	"strings"
	"testing"

	"pgregory.net/rapid"
)

// Of the Nix manual and of nix-hash(1): the SHA-256 of the empty text.
const emptyHex = "e3b0c44298fc1c149afbf4c8996fb92427ae41e4649b934ca495991b7852b855"

func TestParseHash(t *testing.T) {
	same := []string{
		"sha256:" + emptyHex,
		"sha256:0mdqa9w1p6cmli6976v4wi0sw9r4p5prkj7lzfd1877wk11c9c73",
		"sha256-47DEQpj8HBSa+/TImW+5JCeuQeRkm5NMpJWZG3hSuFU=",
		"sha256:47DEQpj8HBSa+/TImW+5JCeuQeRkm5NMpJWZG3hSuFU=",
		"sha256:" + strings.ToUpper(emptyHex), // Nix reads it
	}
	for _, s := range same {
		h, err := ParseHash(s)
		if err != nil || h.Algo != "sha256" || Base32(h.Sum) != "0mdqa9w1p6cmli6976v4wi0sw9r4p5prkj7lzfd1877wk11c9c73" {
			t.Errorf("%s: %x %v", s, h.Sum, err)
		}
	}
	for _, s := range []string{
		"", ":", "-", "sha256", "sha256:", "sha256-", emptyHex, "sha3-" + emptyHex, "sha256-" + emptyHex,
		"sha256:" + emptyHex[1:], "sha256:g" + emptyHex[1:],
		"sha256:zzzzzzzzzzzzzzzzzzzzzzzzzzzzzzzzzzzzzzzzzzzzzzzzzzzz", // more than 256 bits
		"sha256:0mdqa9w1p6cmli6976v4wi0sw9r4p5prkj7lzfd1877wk11c9c7e", // e is no digit
		"sha256-47DEQpj8HBSa+/TImW+5JCeuQeRkm5NMpJWZG3hSuFV=",         // bits behind the end
		"sha256-47DEQpj8HBSa+/TImW+5JCeuQeRkm5NMpJWZG3hSuFU=\n",
		"SHA256:" + emptyHex, "sha256:" + strings.Repeat("0", 1<<20),
	} {
		if h, err := ParseHash(s); !errors.Is(err, ErrHash) || len(err.Error()) > 400 {
			t.Errorf("%.80q: %x %.500v", s, h, err)
		}
	}
}

func TestBase32RoundTrip(t *testing.T) {
	for size := range 70 {
		b := make([]byte, size)
		rand.Read(b)
		back, err := FromBase32(Base32(b), size)
		if err != nil || !bytes.Equal(b, back) {
			t.Errorf("%x: %x %v", b, back, err)
		}
	}
	rapid.Check(t, func(t *rapid.T) {
		size := rapid.IntRange(0, 40).Draw(t, "size")
		s := rapid.StringMatching(`[0-9a-z]{0,64}`).Draw(t, "s")
		if b, err := FromBase32(s, size); err == nil && Base32(b) != s {
			t.Fatalf("%q and %q are one value", s, Base32(b))
		}
	})
}

func TestNames(t *testing.T) {
	h := strings.Repeat("0", 32)
	for s, want := range map[string]bool{
		h + "-a": true, h + "-A+b.c_d?e=f-9": true, h + "-.a": true, h + "-..a": true, h + "-...": true, h + "-" + strings.Repeat("x", 211): true,
		"": false, h: false, h + "-": false, h + "a": false, h + "-.": false, h + "-..": false, h + "-.-a": false, h + "-..-a": false,
		h + "-a/b": false, h + "-a b": false, h + "-ä": false, h + "-a\x00": false, h + "-a\n": false, h + "-" + strings.Repeat("x", 212): false,
		"e" + h[1:] + "-a": false, "o" + h[1:] + "-a": false, "A" + h[1:] + "-a": false, h + "_a": false,
	} {
		if IsBase(s) != want {
			t.Errorf("%q: %v", s, !want)
		}
		if b, ok := Base(Dir, Dir+"/"+s); ok != want || ok && b != s {
			t.Errorf("%s/%q: %q %v", Dir, s, b, ok)
		}
	}
	for _, s := range []string{"", "/", Dir, Dir + "/", Dir + "//" + h + "-a", "/nix/storex/" + h + "-a", Dir + "/" + h + "-a/", Dir + "/" + h + "-a/b", h + "-a", "/nix/store" + h + "-a"} {
		if b, ok := Base(Dir, s); ok {
			t.Errorf("%q: %q", s, b)
		}
	}
}

// Bad lengths of a hash are errors, not panics.
func TestFixedChecks(t *testing.T) {
	for _, h := range []Hash{{}, {"sha256", nil}, {"sha256", make([]byte, 31)}, {"md4", make([]byte, 16)}} {
		if p, err := Fixed(Dir, "x", NAR, h); !errors.Is(err, ErrHash) {
			t.Errorf("%v: %q %v", h, p, err)
		}
	}
	if p, err := Fixed(Dir, "a/b", NAR, Hash{"sha256", make([]byte, 32)}); !errors.Is(err, ErrName) {
		t.Errorf("%q %v", p, err)
	}
}
