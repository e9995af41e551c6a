package slot

import (
	"bytes"
	"crypto/rand"
	"errors"
	"strings"
	"testing"

	"filippo.io/age"
	"pgregory.net/rapid"
	"rsc.io/qr"
)

func TestGroups(t *testing.T) {
	key, _, err := NewRecovery()
	if err != nil {
		t.Fatal(err)
	}
	groups, err := Groups(key)
	if err != nil {
		t.Fatal(err)
	}
	if len(groups) != 11 || string(groups[0]) != recoveryPrefix || len(groups[10]) != 4 {
		t.Errorf("%d groups", len(groups))
	}
	if !bytes.Equal(bytes.Join(groups, nil), key.Bytes()) {
		t.Error("the groups are not the key")
	}
	for _, s := range []string{"", "x", strings.Repeat("A", recoveryLen), recoveryPrefix, string(key.Bytes()) + "Q"} {
		if _, err := Groups(sec(t, s)); err == nil {
			t.Errorf("groups of %d characters", len(s))
		}
		if _, err := Challenge(sec(t, s), rand.Reader); err == nil {
			t.Errorf("challenge of %d characters", len(s))
		}
		if _, err := QR(sec(t, s), false); err == nil {
			t.Errorf("QR code of %d characters", len(s))
		}
	}
}

// However a person types the key, it is read; with one character wrong, it is not.
func TestParseRecoveryProperty(t *testing.T) {
	k := newKeep(t)
	s, files := k.load(t)
	rapid.Check(t, func(rt *rapid.T) {
		text := string(k.recovery.Bytes())
		if rapid.Bool().Draw(rt, "without prefix") {
			text = text[len(recoveryPrefix):]
		}
		var typed []byte
		for i := range len(text) {
			c := text[i : i+1]
			if rapid.Bool().Draw(rt, "lower") {
				c = strings.ToLower(c)
			}
			typed = append(typed, rapid.SampledFrom([]string{"", "", "", " ", "\n", "\r\n", "\t "}).Draw(rt, "space")+c...)
		}
		in := sec(t, string(typed))
		id, err := ParseRecovery(in)
		if err != nil {
			rt.Fatalf("%q: %v", typed, err)
		}
		if string(in.Bytes()) != string(typed) {
			rt.Fatal("the input was changed")
		}
		m, name, err := s.Open(files, identities(id), "")
		if err != nil || name != "recovery" || !m.Equal(k.master) {
			rt.Fatal(name, err)
		}
		wrong := []byte(text)
		i := rapid.IntRange(0, len(wrong)-1).Draw(rt, "at")
		c := rapid.SampledFrom([]byte("QPZRY9X8GF2TVDW0S3JN54KHCE6MUA7L1BIO-\x00")).Draw(rt, "wrong")
		if wrong[i] == c {
			return
		}
		wrong[i] = c
		_, err = ParseRecovery(sec(t, string(wrong)))
		if e := (*IdentityError)(nil); !errors.As(err, &e) || strings.Contains(err.Error(), text[:5]) {
			rt.Fatalf("%q: %v", wrong, err)
		}
	})
	for _, s := range []string{"", " ", "\xff", strings.Repeat("Q", 1000)} {
		if _, err := ParseRecovery(sec(t, s)); err == nil {
			t.Errorf("read %q", s)
		}
	}
}

func TestChallenge(t *testing.T) {
	key, _, err := NewRecovery()
	if err != nil {
		t.Fatal(err)
	}
	groups, _ := Groups(key)
	// Every byte once: each group as often as any other, what is over is refused.
	all := make([]byte, 256)
	for i := range all {
		all[i] = byte(i)
	}
	drawn := map[int]int{}
	r := bytes.NewReader(all)
	for {
		g, err := Challenge(key, r)
		if err != nil {
			break
		}
		drawn[g]++
	}
	for g := range groups {
		if want := map[bool]int{false: 25, true: 0}[g == 0]; drawn[g] != want {
			t.Errorf("group %d was drawn %d times, want %d", g, drawn[g], want)
		}
	}
	for i, g := range groups {
		for _, tt := range []struct {
			typed string
			want  bool
		}{
			{string(g), true}, {" " + strings.ToLower(string(g)) + "\n", true},
			{"", false}, {string(g) + "Q", false}, {string(g[:len(g)-1]), false}, {"B" + string(g[1:]), false},
		} {
			ok, err := CheckChallenge(key, i, sec(t, tt.typed))
			if ok != (tt.want && i > 0) || (err != nil) != (i == 0) {
				t.Errorf("group %d, typed %q: %v %v", i, tt.typed, ok, err)
			}
		}
	}
	for _, g := range []int{-1, 0, 11, 1 << 40} {
		if ok, err := CheckChallenge(key, g, sec(t, "")); ok || err == nil {
			t.Errorf("group %d", g)
		}
	}
}

// The drawing, read back, is the code.
func TestQR(t *testing.T) {
	key, _, err := NewRecovery()
	if err != nil {
		t.Fatal(err)
	}
	code, err := qr.Encode(string(key.Bytes()), qr.M)
	if err != nil {
		t.Fatal(err)
	}
	for _, inverse := range []bool{false, true} {
		art, err := QR(key, inverse)
		if err != nil {
			t.Fatal(err)
		}
		lines := strings.Split(strings.TrimSuffix(string(art.Bytes()), "\n"), "\n")
		for row, line := range lines {
			cells := []rune(line)
			if len(cells) != code.Size+8 || len(cells) != 41 {
				t.Fatalf("line of %d columns", len(cells))
			}
			for col, c := range cells {
				for half, drawn := range []bool{c == '█' || c == '▀', c == '█' || c == '▄'} {
					y := 2*row + half - 4
					if y >= code.Size+4 {
						continue
					}
					if black := drawn == inverse; black != code.Black(col-4, y) {
						t.Fatalf("module %d,%d", col-4, y)
					}
				}
			}
		}
		if 2*len(lines) < code.Size+8 {
			t.Errorf("%d lines", len(lines))
		}
	}
}

// Nothing on disk holds a secret, nor the recovery slot's public key.
func TestNothingOnDisk(t *testing.T) {
	k := newKeep(t)
	id, err := age.ParseX25519Identity(string(k.recovery.Bytes()))
	if err != nil {
		t.Fatal(err)
	}
	k.files[setFile] = read(t, k.path(setFile))
	for name, b := range k.files {
		for what, s := range map[string][]byte{
			"master key": k.master.Bytes(), "recovery key": k.recovery.Bytes(), "passphrase": k.pass.Bytes(),
			"recovery recipient": []byte(id.Recipient().String()),
		} {
			if bytes.Contains(b, s) {
				t.Errorf("%s holds the %s", name, what)
			}
		}
	}
}
