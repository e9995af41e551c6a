package policy

import (
	"crypto/ed25519"
	"encoding/base64"
	"encoding/hex"
	"errors"
	"slices"
	"strings"
)

// Key is a public key whose signatures a policy may believe.
type Key struct {
	Name   string
	Public ed25519.PublicKey
}

// String is the key as in nix.conf's trusted-public-keys; graph.Graph.Keys has it so.
func (k Key) String() string { return k.Name + ":" + base64.StdEncoding.EncodeToString(k.Public) }

var (
	errKey  = errors.New("not a public key as in nix.conf: NAME:BASE64, with 32 bytes in the base 64")
	errWeak = errors.New("under this key anybody can sign; zeros do not stand for no key")
)

// ParseKey reads NAME:BASE64.
func ParseKey(text string) (Key, error) {
	name, b64, _ := strings.Cut(text, ":")
	pub, err := base64.StdEncoding.Strict().DecodeString(b64)
	if err != nil || name == "" || len(name) > 256 || len(pub) != ed25519.PublicKeySize || strings.ContainsAny(name, "*?[]\"'#()\\ \t\r\n") {
		return Key{}, errKey
	}
	if WeakKey(pub) {
		return Key{}, errWeak
	}
	return Key{name, pub}, nil
}

// weak are the encodings of the points whose order divides 8, with the sign bit
// cleared; the last two are not reduced (RFC 8032, 5.1.3 forbids them, decoders differ).
var weak = [...]string{
	"0000000000000000000000000000000000000000000000000000000000000000",
	"0100000000000000000000000000000000000000000000000000000000000000",
	"26e8958fc2b227b045c3f489f2ef98f0d5dfac05d3c63339b13802886d53fc05",
	"c7176a703d4dd84fba3c0b760d10670f2a2053fa2c39ccc64ec7fd7792ac037a",
	"ecffffffffffffffffffffffffffffffffffffffffffffffffffffffffffff7f",
	"edffffffffffffffffffffffffffffffffffffffffffffffffffffffffffff7f",
	"eeffffffffffffffffffffffffffffffffffffffffffffffffffffffffffff7f",
}

// WeakKey reports whether anybody can sign under a key of 32 bytes: it is of small order
// (all zeros is one). libsodium refuses such keys, and with it Nix.
func WeakKey(key ed25519.PublicKey) bool {
	k := slices.Clone(key)
	k[ed25519.PublicKeySize-1] &= 0x7f
	return slices.Contains(weak[:], hex.EncodeToString(k))
}
