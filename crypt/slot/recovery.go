package slot

import (
	"crypto/subtle"
	"fmt"
	"io"
	"runtime"
	"slices"

	"filippo.io/age"
	"rsc.io/qr"

	"overkeep/crypt/secret"
)

// A recovery key is an X25519 identity ("AGE-SECRET-KEY-1" and 58 characters),
// written down by the user and stored nowhere. X25519 and not post-quantum because
// the age of Debian 12 (1.1.1) must open it.
//
// Its recipient is stored nowhere either, and that is what protects the slot from
// a quantum computer of later years: the file holds the ephemeral public key, but
// to derive the shared secret from it an attacker also needs the recipient's
// public key, which a file encrypted to it does not contain.

const (
	recoveryPrefix = "AGE-SECRET-KEY-1"
	recoveryLen    = len(recoveryPrefix) + 58
	groupLen       = 6
)

// NewRecovery makes a recovery key and the recipient for its slot. Show the key,
// wrap the master key to the recipient, then wipe the one and forget the other. age
// makes the key as a string on the heap; that copy ends with the process.
func NewRecovery() (*secret.Bytes, age.Recipient, error) {
	id, err := age.GenerateX25519Identity()
	if err != nil {
		return nil, nil, err
	}
	key, err := secret.From([]byte(id.String()))
	if err != nil {
		return nil, nil, err
	}
	return key, id.Recipient(), nil
}

// ParseRecovery reads a recovery key as a person types it: in either case, with
// white space anywhere, with or without its prefix. The checksum finds a typing
// error. typed is not changed.
func ParseRecovery(typed *secret.Bytes) (age.Identity, error) {
	s, err := normalise(typed)
	if err != nil {
		return nil, err
	}
	defer s.Wipe()
	full, err := secret.New(recoveryLen)
	if err != nil {
		return nil, err
	}
	defer full.Wipe()
	switch s.Len() {
	case recoveryLen:
		copy(full.Bytes(), s.Bytes())
	case recoveryLen - len(recoveryPrefix):
		copy(full.Bytes(), recoveryPrefix)
		copy(full.Bytes()[len(recoveryPrefix):], s.Bytes())
	default:
		return nil, &IdentityError{Err: ErrMalformed}
	}
	id, err := age.ParseX25519Identity(string(full.Bytes()))
	if err != nil {
		return nil, &IdentityError{Err: ErrMalformed} // age's error shows characters
	}
	return id, nil
}

// normalise returns a copy without white space and in upper case.
func normalise(typed *secret.Bytes) (*secret.Bytes, error) {
	s, err := secret.New(typed.Len())
	if err != nil {
		return nil, err
	}
	n := 0
	for _, c := range typed.Bytes() {
		switch {
		case c == ' ' || c == '\t' || c == '\r' || c == '\n':
			continue
		case 'a' <= c && c <= 'z':
			c -= 'a' - 'A'
		}
		s.Bytes()[n] = c
		n++
	}
	defer s.Wipe()
	runtime.KeepAlive(typed)
	short, err := secret.New(n)
	if err != nil {
		return nil, err
	}
	copy(short.Bytes(), s.Bytes()[:n])
	return short, nil
}

// Groups splits a recovery key for display: the prefix first, then groups of up to
// six characters. The slices are the secret itself, not copies: print them, and do
// not use them once key is wiped.
func Groups(key *secret.Bytes) ([][]byte, error) {
	b := key.Bytes()
	if len(b) != recoveryLen || string(b[:len(recoveryPrefix)]) != recoveryPrefix {
		return nil, &IdentityError{Err: ErrMalformed}
	}
	groups := [][]byte{b[:len(recoveryPrefix)]}
	for g := range slices.Chunk(b[len(recoveryPrefix):], groupLen) {
		groups = append(groups, g)
	}
	return groups, nil
}

// Challenge draws a group of key that the user is to type back, as proof that the
// key was written down: an index into Groups, never that of the prefix. random is
// crypto/rand.Reader outside of tests.
func Challenge(key *secret.Bytes, random io.Reader) (int, error) {
	groups, err := Groups(key)
	if err != nil {
		return 0, err
	}
	n := len(groups) - 1
	for {
		var b [1]byte
		if _, err := io.ReadFull(random, b[:]); err != nil {
			return 0, fmt.Errorf("draw a group: %w", err)
		}
		if int(b[0]) < 256/n*n { // every group is equally likely
			return 1 + int(b[0])%n, nil
		}
	}
}

// CheckChallenge says whether typed is the group drawn, in either case and with
// white space anywhere.
func CheckChallenge(key *secret.Bytes, group int, typed *secret.Bytes) (bool, error) {
	groups, err := Groups(key)
	if err != nil {
		return false, err
	}
	if group < 1 || group >= len(groups) {
		return false, fmt.Errorf("group %d of %d", group, len(groups)-1)
	}
	s, err := normalise(typed)
	if err != nil {
		return false, err
	}
	defer s.Wipe()
	ok := subtle.ConstantTimeCompare(s.Bytes(), groups[group]) == 1
	runtime.KeepAlive(key)
	return ok, nil
}

// QR draws the key as a QR code in UTF-8 half blocks, 41 columns wide with its
// quiet zone. Light modules are drawn, as a dark terminal needs it; with inverse,
// dark ones, for a light terminal or paper. The drawing is the secret too. The qr
// package keeps heap copies that end with the process.
func QR(key *secret.Bytes, inverse bool) (*secret.Bytes, error) {
	if _, err := Groups(key); err != nil {
		return nil, err
	}
	code, err := qr.Encode(string(key.Bytes()), qr.M)
	runtime.KeepAlive(key)
	if err != nil {
		return nil, fmt.Errorf("draw a QR code: %w", err)
	}
	defer clear(code.Bitmap)
	const quiet = 4
	drawn := func(x, y int) bool {
		if y >= code.Size+quiet {
			return false // below the last line there is half a line of nothing
		}
		return code.Black(x, y) == inverse
	}
	side := code.Size + 2*quiet
	b := make([]byte, 0, (side+1)/2*(side*len("█")+1)) // grown, it would leave copies
	for y := -quiet; y < code.Size+quiet; y += 2 {
		for x := -quiet; x < code.Size+quiet; x++ {
			switch top, bottom := drawn(x, y), drawn(x, y+1); {
			case top && bottom:
				b = append(b, "█"...)
			case top:
				b = append(b, "▀"...)
			case bottom:
				b = append(b, "▄"...)
			default:
				b = append(b, ' ')
			}
		}
		b = append(b, '\n')
	}
	return secret.From(b)
}
