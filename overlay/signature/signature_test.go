package signature

import (
	"context"
	"crypto/ed25519"
	"encoding/base64"
	"encoding/hex"
	"errors"
	"fmt"
	"slices"
	"strings"
	"testing"

	"overkeep/overlay/drv/storepath"
)

const dir = storepath.Dir

// known is a path of the public binary cache: its key of nix.conf's default, and
// what the cache's narinfo says.
const knownKey = "cache.nixos.org-1:6NCHdD59X431o0gWypbMrAURkbJ16ZPMQFGspcDShjY="

func known(t testing.TB) Facts {
	t.Helper()
	h, err := storepath.ParseHash("sha256:1b4sb93wp679q4zx9k1ignby1yna3z7c4c2ri3wphylbc2dwsys0")
	if err != nil {
		t.Fatal(err)
	}
	return Facts{
		Path:    "syd87l2rxw8cbsxmxl853h0r6pdwhwjr-curl-7.82.0-bin",
		NarHash: "sha256:" + hex.EncodeToString(h.Sum),
		NarSize: 196040,
		Refs: []string{"yxvjs9drzsphm9pcf42a4byzj1kb9m7k-openssl-1.1.1n", "0jqd0rlxzra1rs38rdxl43yh6rxchgc6-curl-7.82.0",
			"6w8g7njm4mck5dmjxws0z1xnrxvl81xa-glibc-2.34-115", "j5jxw3iy7bbz4a57fh9g2xm2gxmyal8h-zlib-1.2.12"},
		Sigs: "cache.nixos.org-1:TsTTb3WGTZKphvYdBHXwo6weVILmTytUjLB+vcX89fOjjRicCHmKA4RCPMVLkj6TMJ4GMX3HPVWRdD1hkeKZBQ==",
	}
}

func parse(t testing.TB, keys ...string) []Key {
	t.Helper()
	var out []Key
	for _, s := range keys {
		k, err := ParseKey(s)
		if err != nil {
			t.Fatal(err)
		}
		out = append(out, k)
	}
	return out
}

func verify(t testing.TB, keys []Key, m *Memory, paths ...Facts) ([]uint64, Stats) {
	t.Helper()
	v, err := New(dir, keys, m)
	if err != nil {
		t.Fatal(err)
	}
	got, stats, err := v.Verify(t.Context(), len(paths), func(i int, f *Facts) {
		refs := append(f.Refs, paths[i].Refs...)
		*f = paths[i]
		f.Refs = refs
	})
	if err != nil {
		t.Fatal(err)
	}
	return got, stats
}

// tester signs as "test-N", from a fixed seed.
func tester(n int) (Key, ed25519.PrivateKey) {
	seed := make([]byte, ed25519.SeedSize)
	seed[0], seed[1] = byte(n), byte(n>>8)
	priv := ed25519.NewKeyFromSeed(seed)
	return Key{Name: fmt.Sprintf("test-%d", n), Public: priv.Public().(ed25519.PublicKey)}, priv
}

func signature(name string, priv ed25519.PrivateKey, f Facts) string {
	f.Refs = slices.Clone(f.Refs)
	return name + ":" + base64.StdEncoding.EncodeToString(ed25519.Sign(priv, AppendFingerprint(nil, dir, &f)))
}

func TestKnownAnswer(t *testing.T) {
	f := known(t)
	got, stats := verify(t, parse(t, knownKey), nil, f)
	if got[0] != 1 || stats != (Stats{Verified: 1}) {
		t.Errorf("%b %+v", got, stats)
	}
	want := "1;/nix/store/syd87l2rxw8cbsxmxl853h0r6pdwhwjr-curl-7.82.0-bin;sha256:1b4sb93wp679q4zx9k1ignby1yna3z7c4c2ri3wphylbc2dwsys0;196040;" +
		"/nix/store/0jqd0rlxzra1rs38rdxl43yh6rxchgc6-curl-7.82.0,/nix/store/6w8g7njm4mck5dmjxws0z1xnrxvl81xa-glibc-2.34-115," +
		"/nix/store/j5jxw3iy7bbz4a57fh9g2xm2gxmyal8h-zlib-1.2.12,/nix/store/yxvjs9drzsphm9pcf42a4byzj1kb9m7k-openssl-1.1.1n"
	if have := string(AppendFingerprint(nil, dir, &f)); have != want {
		t.Errorf("fingerprint %q", have)
	}
}

// changes are what must turn a good signature into none: everything signed, and
// the signature itself.
func changes(f Facts) map[string]Facts {
	out := map[string]Facts{}
	change := func(name string, how func(*Facts)) {
		c := f
		c.Refs = slices.Clone(f.Refs)
		how(&c)
		out[name] = c
	}
	change("hash part", func(c *Facts) { c.Path = "a" + c.Path[1:] })
	change("name", func(c *Facts) { c.Path += "x" })
	change("narHash", func(c *Facts) { c.NarHash = c.NarHash[:7] + "0" + c.NarHash[8:] })
	change("narHash as base 32", func(c *Facts) { c.NarHash = "sha256:" + strings.Repeat("0", 52) })
	change("narHash of another function", func(c *Facts) { c.NarHash = "sha512:" + c.NarHash[7:] })
	change("narHash without function", func(c *Facts) { c.NarHash = c.NarHash[7:] })
	change("narHash is not hex", func(c *Facts) { c.NarHash = c.NarHash[:70] + "g" })
	change("narSize", func(c *Facts) { c.NarSize++ })
	change("narSize unknown", func(c *Facts) { c.NarSize = 0 })
	change("narSize negative", func(c *Facts) { c.NarSize = -c.NarSize })
	change("one reference less", func(c *Facts) { c.Refs = c.Refs[1:] })
	change("one reference more", func(c *Facts) { c.Refs = append(c.Refs, c.Path) })
	change("no references", func(c *Facts) { c.Refs = nil })
	change("another reference", func(c *Facts) { c.Refs[0] += "x" })
	change("two references in one", func(c *Facts) {
		slices.Sort(c.Refs)
		c.Refs = append([]string{c.Refs[0] + "," + dir + "/" + c.Refs[1]}, c.Refs[2:]...)
	})
	change("a reference in the size", func(c *Facts) { c.Path += ";sha256:x" })
	change("a reference that is no name", func(c *Facts) { c.Refs = append(c.Refs, "") })
	change("no signature", func(c *Facts) { c.Sigs = "" })
	change("another name", func(c *Facts) { c.Sigs = "x" + c.Sigs })
	change("a name alone", func(c *Facts) { c.Sigs, _, _ = strings.Cut(c.Sigs, ":") })
	change("a name and nothing", func(c *Facts) { c.Sigs, _, _ = strings.Cut(c.Sigs, ":"); c.Sigs += ":" })
	change("tab before", func(c *Facts) { c.Sigs = "\t" + c.Sigs })
	change("newline behind", func(c *Facts) { c.Sigs += "\n" })
	change("more base 64", func(c *Facts) { c.Sigs += "AAAA" })
	change("not padded", func(c *Facts) { c.Sigs = strings.TrimRight(c.Sigs, "=") })
	change("bits behind the end", func(c *Facts) { c.Sigs = strings.TrimSuffix(c.Sigs, "Q==") + "R==" })
	change("short", func(c *Facts) { c.Sigs = c.Sigs[:len(c.Sigs)-4] })
	return out
}

func TestAnyChangeIsNoSignature(t *testing.T) {
	f := known(t)
	for _, m := range []*Memory{nil, empty("", 100)} {
		if got, _ := verify(t, parse(t, knownKey), m, f); got[0] != 1 { // and the memory knows it
			t.Fatal("the signature is not good to begin with")
		}
		for name, c := range changes(f) {
			if got, stats := verify(t, parse(t, knownKey), m, c); got[0] != 0 || stats.Verified+stats.Remembered != 0 {
				t.Errorf("%s: %b %+v", name, got, stats)
			}
		}
		// Every bit of the signature.
		at := strings.IndexByte(f.Sigs, ':') + 1
		sig, err := base64.StdEncoding.DecodeString(f.Sigs[at:])
		if err != nil {
			t.Fatal(err)
		}
		for bit := range len(sig) * 8 {
			b := slices.Clone(sig)
			b[bit/8] ^= 1 << (bit % 8)
			c := f
			c.Sigs = f.Sigs[:at] + base64.StdEncoding.EncodeToString(b)
			if got, _ := verify(t, parse(t, knownKey), m, c); got[0] != 0 {
				t.Errorf("bit %d of the signature flipped and good", bit)
			}
		}
		// The same name with another key.
		k, _ := tester(1)
		k.Name = "cache.nixos.org-1"
		if got, _ := verify(t, []Key{k}, m, f); got[0] != 0 {
			t.Error("another key under the same name")
		}
	}
}

func TestManyKeysAndSignatures(t *testing.T) {
	var keys []Key
	f := known(t)
	var good []string
	for i := range MaxKeys {
		k, priv := tester(i)
		keys = append(keys, k)
		if i%3 == 0 {
			good = append(good, signature(k.Name, priv, f))
		}
	}
	_, other := tester(1000)
	wrong := signature(keys[3].Name, other, f)
	f.Sigs = strings.Join([]string{"unknown:AAAA", ":", "", wrong, strings.Join(good, " "), "no-colon", wrong, "  "}, " ")
	want := uint64(0)
	for i := range MaxKeys {
		if i%3 == 0 {
			want |= 1 << i
		}
	}
	if got, stats := verify(t, keys, nil, f); got[0] != want || stats.Verified != 22 || stats.Bad != 1 {
		t.Errorf("%b, not %b, %+v", got[0], want, stats)
	}
	if got, _ := verify(t, nil, nil, f); got[0] != 0 {
		t.Errorf("without keys %b", got[0])
	}
}

// Nobody can make us verify for ever; what is behind the bound does not count.
func TestBoundOnSignatures(t *testing.T) {
	k, priv := tester(0)
	_, other := tester(1)
	f := known(t)
	wrong, right := signature(k.Name, other, f), signature(k.Name, priv, f)
	for _, c := range []struct {
		name string
		sigs string
		want uint64
	}{
		{"just within", strings.Repeat(wrong+" ", maxTries-1) + right, 1},
		{"just beyond", strings.Repeat(wrong+" ", maxTries) + right, 0},
		{"others' do not count", strings.Repeat("x:y ", 10*maxTries) + right, 1},
		{"a long column", strings.Repeat("x:y ", maxSigs) + right, 0},
	} {
		cut := false
		f.Sigs, f.Cut = c.sigs, &cut
		got, stats := verify(t, []Key{k}, nil, f)
		if got[0] != c.want || stats.Bad > maxTries || (stats.Cut == 1) != (c.want == 0) || cut != (c.want == 0) {
			t.Errorf("%s: %b %+v", c.name, got, stats)
		}
	}
}

// Every path gets its own answer, whatever worker took it.
func TestBatch(t *testing.T) {
	keys := make([]Key, 3)
	priv := make([]ed25519.PrivateKey, 3)
	for i := range keys {
		keys[i], priv[i] = tester(i)
	}
	n := 10*chunk + 7
	paths := make([]Facts, n)
	want := make([]uint64, n)
	for i := range paths {
		f := known(t)
		f.Path = fmt.Sprintf("%032d-p", i)
		f.Refs = f.Refs[:i%5]
		var sigs []string
		for k := range keys {
			if i>>k&1 == 1 {
				sigs = append(sigs, signature(keys[k].Name, priv[k], f))
				want[i] |= 1 << k
			}
		}
		f.Sigs = strings.Join(sigs, " ")
		paths[i] = f
	}
	m := empty("", 1<<20)
	for range 2 {
		if got, _ := verify(t, keys, m, paths...); !slices.Equal(got, want) {
			t.Errorf("%b\n%b", got, want)
		}
	}
	if _, stats := verify(t, keys, m, paths...); stats.Verified != 0 || int(stats.Remembered) != m.Len() {
		t.Errorf("third time %+v with %d remembered", stats, m.Len())
	}
}

func TestCancelled(t *testing.T) {
	k, _ := tester(0)
	v, err := New(dir, []Key{k}, nil)
	if err != nil {
		t.Fatal(err)
	}
	ctx, cancel := context.WithCancel(t.Context())
	cancel()
	if got, _, err := v.Verify(ctx, 1000, func(int, *Facts) { t.Error("asked") }); !errors.Is(err, context.Canceled) || got != nil {
		t.Errorf("%v %v", got, err)
	}
}

func TestParseKey(t *testing.T) {
	k := parse(t, knownKey)[0]
	if k.Name != "cache.nixos.org-1" || k.String() != knownKey {
		t.Errorf("%q", k)
	}
	b64 := knownKey[strings.IndexByte(knownKey, ':')+1:]
	for _, s := range []string{
		"", ":", "x", "x:", ":" + b64, "x y:" + b64, "x\n:" + b64, "x:" + b64 + "\n", "x:\n" + b64, "x: " + b64, "x:" + b64[1:], "x:" + b64 + "A",
		"x:" + strings.TrimRight(b64, "="), "x:" + b64[:42] + "Z=", "x:" + strings.Repeat("A", 1<<20),
		strings.Repeat("x", maxKeyName+1) + ":" + b64,
		"x:" + base64.StdEncoding.EncodeToString(make([]byte, 64)), // secret
		"x:" + base64.StdEncoding.EncodeToString(make([]byte, 32)), // the placeholder
	} {
		if k, err := ParseKey(s); !errors.Is(err, ErrKey) || len(err.Error()) > 2000 {
			t.Errorf("%.100q: %v %v", s, k, err)
		}
	}
}

// small are the points whose order divides 8; package policy has the reasons.
var small = []string{
	"0000000000000000000000000000000000000000000000000000000000000000",
	"0100000000000000000000000000000000000000000000000000000000000000",
	"26e8958fc2b227b045c3f489f2ef98f0d5dfac05d3c63339b13802886d53fc05",
	"c7176a703d4dd84fba3c0b760d10670f2a2053fa2c39ccc64ec7fd7792ac037a",
	"ecffffffffffffffffffffffffffffffffffffffffffffffffffffffffffff7f",
	"edffffffffffffffffffffffffffffffffffffffffffffffffffffffffffff7f",
	"eeffffffffffffffffffffffffffffffffffffffffffffffffffffffffffff7f",
}

// Each key of small order lets anybody sign: with S = 0 and R one of these points
// some message verifies. ParseKey and New refuse it.
func TestSmallOrder(t *testing.T) {
	forgeable := 0
	for _, h := range small {
		for _, sign := range []byte{0, 0x80} {
			key, err := hex.DecodeString(h)
			if err != nil {
				t.Fatal(err)
			}
			key[31] |= sign
			if forged(key) {
				forgeable++
			}
			if _, err := ParseKey("x:" + base64.StdEncoding.EncodeToString(key)); !errors.Is(err, ErrKey) {
				t.Errorf("%x: %v", key, err)
			}
			if _, err := New(dir, []Key{{Name: "x", Public: key}}, nil); !errors.Is(err, ErrKey) {
				t.Errorf("%x: %v", key, err)
			}
		}
	}
	// crypto/ed25519 decodes some encodings that are not reduced, not all.
	if forgeable < 8 {
		t.Errorf("only %d keys of the table were of any use to a forger", forgeable)
	}
	good, _ := tester(0)
	if forged(good.Public) {
		t.Error("an ordinary key is forgeable")
	}
}

func forged(key []byte) bool {
	for i := range 64 {
		for _, r := range small {
			for _, sign := range []byte{0, 0x80} {
				sig := make([]byte, ed25519.SignatureSize)
				hex.Decode(sig, []byte(r))
				sig[31] |= sign
				if ed25519.Verify(key, []byte{byte(i)}, sig) {
					return true
				}
			}
		}
	}
	return false
}

func TestNewRefuses(t *testing.T) {
	k, _ := tester(0)
	twice := k
	if _, err := New(dir, []Key{k, twice}, nil); !errors.Is(err, ErrKey) {
		t.Error(err)
	}
	if _, err := New(dir, make([]Key, MaxKeys+1), nil); err == nil {
		t.Error("too many keys")
	}
	if _, err := New(dir, []Key{{Name: "short", Public: k.Public[1:]}}, nil); !errors.Is(err, ErrKey) {
		t.Error(err)
	}
}

func FuzzVerify(f *testing.F) {
	k, priv := tester(0)
	v, err := New(dir, []Key{k}, empty("", 1000))
	if err != nil {
		f.Fatal(err)
	}
	good := known(f)
	good.Sigs = ""
	f.Add(good.Path, good.NarHash, good.NarSize, strings.Join(good.Refs, " "), "test-0:x")
	f.Fuzz(func(t *testing.T, path, hash string, size int64, refs, sigs string) {
		facts := Facts{Path: path, NarHash: hash, NarSize: size, Refs: strings.Fields(refs), Sigs: sigs}
		ask := func(sigs string) uint64 {
			got, _, err := v.Verify(t.Context(), 1, func(_ int, f *Facts) { *f = facts; f.Sigs = sigs })
			if err != nil {
				t.Fatal(err)
			}
			return got[0]
		}
		if ask(sigs) != 0 {
			t.Fatal("verified what nobody signed")
		}
		if print := AppendFingerprint(nil, dir, &facts); print != nil {
			if strings.Count(string(print), ";") != 4 {
				t.Fatalf("ambiguous: %q", print)
			}
			if ask(signature(k.Name, priv, facts)) != 1 {
				t.Fatalf("a good signature of %q", print)
			}
		}
	})
}

func FuzzParseKey(f *testing.F) {
	f.Add(knownKey)
	f.Fuzz(func(t *testing.T, s string) {
		k, err := ParseKey(s)
		if err == nil && k.String() != s {
			t.Fatalf("%q is not %q", k, s)
		}
	})
}

func BenchmarkVerify(b *testing.B) {
	k, priv := tester(0)
	f := known(b)
	const n = 2000
	var sigs []string
	for i := range n {
		f.Path = fmt.Sprintf("%032d-p", i)
		sigs = append(sigs, signature(k.Name, priv, f))
	}
	for _, warm := range []bool{false, true} {
		b.Run(fmt.Sprintf("remembered=%v", warm), func(b *testing.B) {
			m := empty(b.TempDir()+"/signatures", n)
			run := func() {
				v, err := New(dir, []Key{k}, m)
				if err != nil {
					b.Fatal(err)
				}
				v.Verify(b.Context(), n, func(i int, o *Facts) {
					refs := append(o.Refs, f.Refs...)
					*o = f
					o.Path = fmt.Sprintf("%032d-p", i)
					o.Sigs = sigs[i]
					o.Refs = refs
				})
			}
			if warm {
				run()
				if err := m.Save(); err != nil {
					b.Fatal(err)
				}
			}
			for b.Loop() {
				if !warm {
					m = empty("", n)
				}
				run()
			}
			b.ReportMetric(float64(b.Elapsed().Nanoseconds())/float64(b.N)/n, "ns/path")
		})
	}
}
