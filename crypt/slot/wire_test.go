package slot

import (
	"bytes"
	"encoding/hex"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"reflect"
	"strings"
	"testing"
	"time"

	"pgregory.net/rapid"
)

const (
	slotJSON = `{"name":"a","kind":"x25519","role":"","created":"2026-11-22T10:00:00Z","label":"","sha256":"SHA"}`
	setJSON  = `{"version":1,"features":[],"keep_id":"k","protector":"0123456789abcdef",` +
		`"policy":"00112233445566778899aabbccddeeff","epoch":1,"confirmed":false,"slots":[SLOT],"mac":"SHA"}`
)

// document fills the templates above and applies replacements old, new, ...
func document(edits ...string) []byte {
	s := strings.ReplaceAll(setJSON, "SLOT", slotJSON)
	s = strings.ReplaceAll(s, "SHA", strings.Repeat("ab", 32))
	for i := 0; i < len(edits); i += 2 {
		n := strings.Replace(s, edits[i], edits[i+1], 1)
		if n == s {
			panic("nothing to replace: " + edits[i])
		}
		s = n
	}
	return []byte(s)
}

func TestParse(t *testing.T) {
	if _, err := parse(document()); err != nil {
		t.Fatal(err)
	}
	many := func(n int) string {
		var s []string
		for i := range n {
			s = append(s, strings.Replace(slotJSON, `"a"`, fmt.Sprintf(`"a%03d"`, i), 1))
		}
		return strings.ReplaceAll(strings.Join(s, ","), "SHA", strings.Repeat("ab", 32))
	}
	one := strings.ReplaceAll(slotJSON, "SHA", strings.Repeat("ab", 32))
	if _, err := parse(document(one, many(MaxSlots))); err != nil {
		t.Errorf("%d slots: %v", MaxSlots, err)
	}
	name := func(s string) []byte { return document(`"name":"a"`, `"name":"`+s+`"`) }
	for what, b := range map[string][]byte{
		"empty":               nil,
		"null":                []byte("null"),
		"array":               []byte("[]"),
		"number":              []byte("1"),
		"open":                []byte("{"),
		"deep":                bytes.Repeat([]byte("["), MaxSetSize),
		"deep objects":        bytes.Repeat([]byte(`{"a":`), MaxSetSize/5),
		"too large":           append(document(), bytes.Repeat([]byte(" "), MaxSetSize)...),
		"trailing brace":      append(document(), '}'),
		"trailing value":      append(document(), " 1"...),
		"trailing document":   append(document(), document()...),
		"trailing nul":        append(document(), 0),
		"byte order mark":     append([]byte("\xef\xbb\xbf"), document()...),
		"unknown key":         document(`"epoch"`, `"x":1,"epoch"`),
		"unknown slot key":    document(`"kind"`, `"x":1,"kind"`),
		"repeated key":        document(`"epoch":1`, `"epoch":1,"epoch":2`),
		"repeated version":    document(`"version":1`, `"version":2,"version":1`),
		"repeated slots":      document(`"slots"`, `"slots":[],"slots"`),
		"repeated slot key":   document(`"kind":"x25519"`, `"kind":"x25519","kind":"pq"`),
		"escaped repeat":      document(`"epoch":1`, `"epoch":1,"\u0065poch":2`),
		"other case":          document(`"epoch"`, `"Epoch"`),
		"other case twice":    document(`"epoch":1`, `"epoch":1,"EPOCH":2`),
		"long s":              document(`"slots"`, `"ſlots"`),
		"no epoch":            document(`"epoch":1,`, ``),
		"no confirmed":        document(`"confirmed":false,`, ``),
		"no slots":            document(`"slots":[`+one+`],`, ``),
		"no mac":              document(`,"mac"`, `,"features":[],"mac"`),
		"no slot role":        document(`"role":"",`, ``),
		"empty slots":         document(one, ``),
		"null slots":          document(`[`+one+`]`, `null`),
		"null slot":           document(one, `null`),
		"null label":          document(`"label":""`, `"label":null`),
		"null epoch":          document(`"epoch":1`, `"epoch":null`),
		"null confirmed":      document(`false`, `null`),
		"object label":        document(`"label":""`, `"label":{}`),
		"slots object":        document(`[`+one+`]`, `{}`),
		"features object":     document(`"features":[]`, `"features":{}`),
		"nested feature":      document(`"features":[]`, `"features":[["a"]]`),
		"bad feature":         document(`"features":[]`, `"features":["A b"]`),
		"null feature":        document(`"features":[]`, `"features":[null]`),
		"version string":      document(`"version":1`, `"version":"1"`),
		"version float":       document(`"version":1`, `"version":1.0`),
		"version null":        document(`"version":1`, `"version":null`),
		"version huge":        document(`"version":1`, `"version":99999999999999999999`),
		"epoch negative":      document(`"epoch":1`, `"epoch":-1`),
		"epoch exponent":      document(`"epoch":1`, `"epoch":1e1`),
		"epoch overflow":      document(`"epoch":1`, `"epoch":18446744073709551616`),
		"confirmed alone":     document(`false`, `true`),
		"keep id":             document(`"keep_id":"k"`, `"keep_id":"../k"`),
		"no keep id":          document(`"keep_id":"k"`, `"keep_id":""`),
		"protector short":     document(`0123456789abcdef`, `0123456789abcde`),
		"protector case":      document(`0123456789abcdef`, `0123456789ABCDEF`),
		"policy":              document(`00112233445566778899aabbccddeeff`, `0011`),
		"mac short":           document(`"mac":"ab`, `"mac":"`),
		"sha short":           document(`"sha256":"ab`, `"sha256":"`),
		"sha case":            document(`"sha256":"ab`, `"sha256":"AB`),
		"time zone":           document(`10:00:00Z`, `10:00:00+01:00`),
		"time fraction":       document(`10:00:00Z`, `10:00:00.5Z`),
		"time nonsense":       document(`2026-11-22`, `2026-13-22`),
		"time one digit":      document(`T10:00`, `T1:00`),
		"time before 1970":    document(`2026`, `1969`),
		"kind":                document(`x25519`, `x448`),
		"role":                document(`"role":""`, `"role":"root"`),
		"label escape":        document(`"label":""`, `"label":"\u001b[2J"`),
		"label nul":           document(`"label":""`, `"label":"\u0000"`),
		"label surrogate":     document(`"label":""`, `"label":"\ud800"`),
		"label utf-8":         document(`"label":""`, "\"label\":\"\xff\""),
		"label replacement":   document(`"label":""`, `"label":"`+"\uFFFD"+`"`),
		"name empty":          name(``),
		"name dots":           name(`..`),
		"name with dots":      name(`a..b`),
		"name ends in dot":    name(`a.`),
		"name up":             name(`../a`),
		"name slash":          name(`a/b`),
		"name escaped slash":  name(`a\u002fb`),
		"name nul":            name(`a\u0000`),
		"name upper":          name(`A`),
		"name 64":             name(strings.Repeat("a", 64)),
		"name 255":            name(strings.Repeat("a", 255)),
		"65 slots":            document(one, many(MaxSlots+1)),
		"same name twice":     document(one, one+","+one),
		"slots not sorted":    document(one, strings.Replace(one, `"a"`, `"b"`, 1)+","+one),
		"single quotes":       bytes.ReplaceAll(document(), []byte(`"`), []byte(`'`)),
		"comment":             document(`{"version"`, `{/**/"version"`),
		"trailing comma":      document(`"}`, `",}`),
		"seventeen features":  document(`"features":[]`, `"features":["A"`+strings.Repeat(`,"A"`, 16)+`]`),
		"slot is an array":    document(one, `[]`),
		"key without a value": document(`"epoch":1,`, `"epoch",`),
	} {
		s, err := parse(b)
		var f *FormatError
		if s != nil || !errors.As(err, &f) {
			t.Errorf("%s: %v", what, err)
		}
		if err != nil && len(err.Error()) > 400 {
			t.Errorf("%s: error of %d bytes", what, len(err.Error()))
		}
	}

	// What is newer is called newer, whatever else it holds.
	for _, v := range []int{-1, 0, 2, 1000} {
		_, err := parse(document(`"version":1`, fmt.Sprintf(`"version":%d,"new":{}`, v)))
		var e *VersionError
		if !errors.As(err, &e) || e.Version != v {
			t.Errorf("version %d: %v", v, err)
		}
	}
	_, err := parse(document(`"features":[]`, `"features":["tpm-seal"],"new":{}`))
	var e *FeatureError
	if !errors.As(err, &e) || e.Feature != "tpm-seal" {
		t.Errorf("feature: %v", err)
	}
}

func FuzzParse(f *testing.F) {
	f.Add(document())
	f.Add(document(`false`, `true`, `"role":""`, `"role":"recovery"`))
	f.Add(document(`"version":1`, `"version":2`))
	f.Add(document(`"epoch":1`, `"epoch":1,"epoch":2`))
	f.Fuzz(func(t *testing.T, b []byte) {
		s, err := parse(b)
		if err != nil {
			switch err.(type) {
			case *FormatError, *VersionError, *FeatureError:
			default:
				t.Fatalf("untyped error %T %v", err, err)
			}
			return
		}
		again, err := s.marshal()
		if err != nil {
			t.Fatal(err)
		}
		back, err := parse(again)
		if err != nil || !reflect.DeepEqual(s, back) {
			t.Fatalf("%v: %+v, %+v", err, s, back)
		}
	})
}

// A sample of version 1 as it was first written. It must open for ever; if the
// encoding under the MAC changes, or the JSON, this fails.
func TestVersion1Sample(t *testing.T) {
	const dir = "testdata/v1"
	s, files, err := Load(dir)
	if err != nil {
		t.Fatal(err)
	}
	pass := Keys{Passphrase: sec(t, "password")}
	id, err := ParseRecovery(sec(t, strings.TrimSpace(string(read(t, "testdata/v1-recovery.txt")))))
	if err != nil {
		t.Fatal(err)
	}
	for name, keys := range map[string]Keys{"alice": pass, "recovery": identities(id)} {
		m, got, err := s.Open(files, keys, "")
		if err != nil || got != name {
			t.Fatalf("%s: %q %v", name, got, err)
		}
		if hex.EncodeToString(m.Bytes()) != strings.Repeat("a5", 32) {
			t.Errorf("%s: another key", name)
		}
	}
	b, err := s.marshal()
	if err != nil {
		t.Fatal(err)
	}
	if want := read(t, filepath.Join(dir, setFile)); !bytes.Equal(b, want) {
		t.Errorf("written anew it is\n%s", b)
	}
}

// TestWriteSample wrote testdata/v1; run with SLOT_SAMPLE=1 for a new version.
func TestWriteSample(t *testing.T) {
	const dir = "testdata/v1"
	if _, err := os.Stat(dir); os.Getenv("SLOT_SAMPLE") == "" || !errors.Is(err, fs.ErrNotExist) {
		return
	}
	k := &keep{dir: dir, master: sec(t, strings.Repeat("\xa5", 32)), set: NewSet(testBinding), files: map[string][]byte{}}
	p, err := NewPassphraseRecipient(sec(t, "password"), testLogN)
	if err != nil {
		t.Fatal(err)
	}
	key, r, err := NewRecovery()
	if err != nil {
		t.Fatal(err)
	}
	k.add(t, Slot{Name: "alice", Kind: Passphrase, Created: testTime, Label: `"login" <Grüße> & 😀`}, p)
	k.add(t, Slot{Name: "recovery", Kind: X25519, Role: Recovery, Created: testTime}, r)
	if k.set, err = k.set.Confirm(); err != nil {
		t.Fatal(err)
	}
	k.commit(t)
	overwrite(t, "testdata/v1-recovery.txt", append(key.Bytes(), '\n'))
}

func TestMAC(t *testing.T) {
	k := newKeep(t)
	if err := k.set.VerifyMAC(k.master); err != nil {
		t.Fatal(err)
	}
	other := newMaster(t)
	tamper(t, k.set.VerifyMAC(other), "", BadMAC)
	if err := k.set.VerifyMAC(sec(t, "short")); err == nil {
		t.Error("a short master key was taken")
	}
	if err := k.set.VerifyMAC(nil); err == nil {
		t.Error("no master key was taken")
	}
	for what, change := range map[string]func(*Set){
		"version":    func(s *Set) { s.Version++ },
		"features":   func(s *Set) { s.Features = []string{"x"} },
		"keep":       func(s *Set) { s.KeepID += "x" },
		"protector":  func(s *Set) { s.Protector = "1123456789abcdef" },
		"policy":     func(s *Set) { s.Policy = "10112233445566778899aabbccddeeff" },
		"shift":      func(s *Set) { s.KeepID += s.Protector[:1]; s.Protector = s.Protector[1:] },
		"epoch":      func(s *Set) { s.Epoch++ },
		"confirmed":  func(s *Set) { s.Confirmed = !s.Confirmed },
		"slot less":  func(s *Set) { s.Slots = s.Slots[:len(s.Slots)-1] },
		"order":      func(s *Set) { s.Slots[0], s.Slots[1] = s.Slots[1], s.Slots[0] },
		"name":       func(s *Set) { s.Slots[0].Name = "bob" },
		"kind":       func(s *Set) { s.Slots[0].Kind = PQ },
		"role":       func(s *Set) { s.Slots[0].Role = Recovery },
		"created":    func(s *Set) { s.Slots[0].Created = s.Slots[0].Created.Add(time.Second) },
		"label":      func(s *Set) { s.Slots[0].Label += "." },
		"sha256":     func(s *Set) { s.Slots[0].SHA256 = hash(nil) },
		"mac":        func(s *Set) { s.MAC[0] ^= 1 },
		"mac short":  func(s *Set) { s.MAC = s.MAC[:31] },
		"no mac":     func(s *Set) { s.MAC = nil },
		"mac longer": func(s *Set) { s.MAC = append(s.MAC, 0) },
	} {
		s := *k.set
		s.Slots = append([]Slot(nil), k.set.Slots...)
		s.MAC = bytes.Clone(k.set.MAC)
		change(&s)
		err := s.VerifyMAC(k.master)
		var e *TamperError
		if !errors.As(err, &e) || e.Reason != BadMAC {
			t.Errorf("%s: %v", what, err)
		}
	}
}

// Two sets have the same encoding only if they are the same.
func TestMACEncodingProperty(t *testing.T) {
	short := rapid.StringOfN(rapid.RuneFrom([]rune("a\x00\x01")), 0, 2, -1)
	gen := rapid.Custom(func(t *rapid.T) Set {
		s := Set{
			Version:  rapid.IntRange(0, 1).Draw(t, "version"),
			Features: rapid.SliceOfN(short, 0, 2).Draw(t, "features"),
			Binding:  Binding{short.Draw(t, "keep"), short.Draw(t, "protector"), short.Draw(t, "policy")},
			Epoch:    rapid.Uint64Range(0, 1).Draw(t, "epoch"), Confirmed: rapid.Bool().Draw(t, "confirmed"),
		}
		for range rapid.IntRange(0, 2).Draw(t, "slots") {
			s.Slots = append(s.Slots, Slot{short.Draw(t, "name"), Kind(short.Draw(t, "kind")), short.Draw(t, "role"),
				time.Unix(0, 0).UTC(), short.Draw(t, "label"), short.Draw(t, "sha")})
		}
		return s
	})
	rapid.Check(t, func(t *rapid.T) {
		a, b := gen.Draw(t, "a"), gen.Draw(t, "b")
		if bytes.Equal(a.encodeMAC(), b.encodeMAC()) != reflect.DeepEqual(a, b) {
			t.Fatalf("%+v and %+v", a, b)
		}
	})
}

func TestCheckEpoch(t *testing.T) {
	for _, tt := range []struct {
		public, inside uint64
		forward, fails bool
	}{
		{1, 1, false, false}, {2, 1, true, false}, {1, 2, false, true}, {0, 1 << 63, false, true}, {1 << 63, 0, true, false},
	} {
		forward, err := CheckEpoch(tt.public, tt.inside)
		if forward != tt.forward || (err != nil) != tt.fails {
			t.Errorf("%d, %d: %v %v", tt.public, tt.inside, forward, err)
		}
		if err != nil {
			tamper(t, err, "", RolledBack)
		}
	}
}
