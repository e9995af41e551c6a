package slot

import (
	"errors"
	"fmt"
	"math"
	"reflect"
	"strings"
	"testing"
	"time"

	"pgregory.net/rapid"
)

func TestNames(t *testing.T) {
	for name, ok := range map[string]bool{
		"alice": true, "a": true, "0": true, "a.b_c-d": true, strings.Repeat("a", 63): true,
		"": false, ".": false, "..": false, "a..b": false, "a.": false, ".a": false, "-a": false, "_a": false,
		"a/b": false, "../a": false, "a\x00": false, "a\n": false, "A": false, "ä": false, "a b": false,
		strings.Repeat("a", 64): false, strings.Repeat("a", 255): false, "a\xff": false,
	} {
		if err := CheckName(name); (err == nil) != ok {
			t.Errorf("%q: %v", name, err)
		}
		s := NewSet(testBinding)
		if _, err := s.Add(Slot{Name: name, Kind: X25519, Created: testTime}); (err == nil) != ok {
			t.Errorf("add %q: %v", name, err)
		}
	}
}

func TestAddRefuses(t *testing.T) {
	good := Slot{Name: "a", Kind: X25519, Created: testTime}
	for what, change := range map[string]func(*Slot){
		"kind":         func(x *Slot) { x.Kind = "rot13" },
		"no kind":      func(x *Slot) { x.Kind = "" },
		"role":         func(x *Slot) { x.Role = "admin" },
		"no time":      func(x *Slot) { x.Created = time.Time{} },
		"far time":     func(x *Slot) { x.Created = time.Date(10000, 1, 1, 0, 0, 0, 0, time.UTC) },
		"escape label": func(x *Slot) { x.Label = "\x1b[2J" },
		"line label":   func(x *Slot) { x.Label = "a\nb" },
		"separator":    func(x *Slot) { x.Label = "a\u2028b" },
		"bidi":         func(x *Slot) { x.Label = "a\u202eb" },
		"bad utf-8":    func(x *Slot) { x.Label = "a\xff" },
		"long label":   func(x *Slot) { x.Label = strings.Repeat("a", MaxLabel+1) },
	} {
		x := good
		change(&x)
		_, err := NewSet(testBinding).Add(x)
		var s *SlotError
		var f *FormatError
		if !errors.As(err, &s) || !errors.As(err, &f) {
			t.Errorf("%s: %v", what, err)
		}
	}
}

func TestOperations(t *testing.T) {
	slot := func(name, role string) Slot {
		return Slot{Name: name, Kind: X25519, Role: role, Created: testTime}
	}
	must := func(s *Set, err error) *Set {
		t.Helper()
		if err != nil {
			t.Fatal(err)
		}
		return s
	}
	one := must(NewSet(testBinding).Add(slot("a", "")))
	two := must(one.Add(slot("r", Recovery)))
	confirmed := must(two.Confirm())
	three := must(confirmed.Add(slot("r2", Recovery)))
	full := NewSet(testBinding)
	for i := range MaxSlots {
		full = must(full.Add(slot(fmt.Sprintf("s%d", i), "")))
	}
	last := *one
	last.Epoch = math.MaxUint64

	for _, tt := range []struct {
		what string
		do   func() (*Set, error)
		want error // nil: success
	}{
		{"add twice", func() (*Set, error) { return one.Add(slot("a", "")) }, ErrExists},
		{"add to a full set", func() (*Set, error) { return full.Add(slot("x", "")) }, ErrFull},
		{"replace unknown", func() (*Set, error) { return one.Replace(slot("x", "")) }, ErrUnknownSlot},
		{"replace", func() (*Set, error) { return one.Replace(slot("a", "")) }, nil},
		{"make the last recovery ordinary", func() (*Set, error) { return two.Replace(slot("r", "")) }, ErrLastRecovery},
		{"make one recovery ordinary", func() (*Set, error) { return three.Replace(slot("r", "")) }, nil},
		{"remove unknown", func() (*Set, error) { return one.Remove("x", true) }, ErrUnknownSlot},
		{"remove last", func() (*Set, error) { return one.Remove("a", true) }, ErrLastSlot},
		{"remove last recovery", func() (*Set, error) { return two.Remove("r", false) }, ErrLastRecovery},
		{"remove last recovery by force", func() (*Set, error) { return two.Remove("r", true) }, nil},
		{"remove one recovery", func() (*Set, error) { return three.Remove("r", false) }, nil},
		{"remove last ordinary", func() (*Set, error) { return two.Remove("a", false) }, nil},
		{"confirm without recovery", func() (*Set, error) { return one.Confirm() }, ErrUnknownSlot},
	} {
		s, err := tt.do()
		if !errors.Is(err, tt.want) || (err == nil) != (s != nil) {
			t.Errorf("%s: %v, want %v", tt.what, err, tt.want)
		}
	}
	if _, err := last.Replace(slot("a", "")); err == nil {
		t.Error("the epoch wrapped around")
	}

	if !confirmed.Confirmed || three.Confirmed {
		t.Error("a new recovery slot must be confirmed again")
	}
	if s := must(confirmed.Replace(slot("r", Recovery))); s.Confirmed {
		t.Error("a replaced recovery slot must be confirmed again")
	}
	if s := must(confirmed.Remove("r", true)); s.Confirmed {
		t.Error("confirmed without recovery slot")
	}
	if s := must(confirmed.Replace(slot("a", ""))); !s.Confirmed {
		t.Error("another slot's change undid the confirmation")
	}
}

// genSlot draws a valid slot.
func genSlot(name string) *rapid.Generator[Slot] {
	return rapid.Custom(func(t *rapid.T) Slot {
		return Slot{
			Name:    name,
			Kind:    rapid.SampledFrom(kinds).Draw(t, "kind"),
			Role:    rapid.SampledFrom([]string{"", Recovery}).Draw(t, "role"),
			Created: time.Unix(rapid.Int64Range(0, 253402300799).Draw(t, "created"), 0).UTC(),
			Label:   rapid.StringOfN(rapid.RuneFrom([]rune(`ab"\<>&/é€😀 ,:{}[]`)), 0, 40, MaxLabel).Draw(t, "label"),
		}
	})
}

// Whatever is done to a set: the old one stays as it was, the new one is one epoch
// later and valid, the last slot stays, and set.json holds all of it.
func TestOperationsProperty(t *testing.T) {
	rapid.Check(t, func(t *rapid.T) {
		s := NewSet(testBinding)
		names := []string{"a", "b", "c.d", "e-f", "g_h"}
		for range rapid.IntRange(1, 25).Draw(t, "steps") {
			name := rapid.SampledFrom(names).Draw(t, "name")
			x := genSlot(name).Draw(t, "slot")
			before := *s
			before.Slots = append([]Slot(nil), s.Slots...)
			var n *Set
			var err error
			switch rapid.IntRange(0, 3).Draw(t, "op") {
			case 0:
				n, err = s.Add(x)
			case 1:
				n, err = s.Replace(x)
			case 2:
				n, err = s.Remove(name, rapid.Bool().Draw(t, "force"))
			case 3:
				n, err = s.Confirm()
			}
			if len(before.Slots) != len(s.Slots) || len(s.Slots) > 0 && !reflect.DeepEqual(before.Slots, s.Slots) ||
				before.Epoch != s.Epoch || before.Confirmed != s.Confirmed {
				t.Fatal("the old set was changed")
			}
			if err != nil {
				var e *SlotError
				if !errors.As(err, &e) {
					t.Fatalf("untyped: %v", err)
				}
				continue
			}
			if n.Epoch != s.Epoch+1 {
				t.Fatalf("epoch %d after %d", n.Epoch, s.Epoch)
			}
			if err := n.check(); err != nil {
				t.Fatal(err)
			}
			s = n
		}
		if len(s.Slots) == 0 {
			return
		}
		for i := range s.Slots {
			s.Slots[i].SHA256 = hash([]byte{byte(i)})
		}
		s.MAC = make([]byte, 32)
		b, err := s.marshal()
		if err != nil {
			t.Fatal(err)
		}
		back, err := parse(b)
		if err != nil {
			t.Fatalf("%v\n%s", err, b)
		}
		back.Features = nil
		if !reflect.DeepEqual(back, s) {
			t.Fatalf("read %+v, written %+v", back, s)
		}
	})
}

func TestWeakest(t *testing.T) {
	k := newKeep(t)
	s, files := k.load(t)
	var got []string
	for _, w := range Weakest(s, files) {
		got = append(got, w.String())
	}
	want := []string{"slot alice: " + WeakWork, WeakUnconfirmed, "slot laptop: " + WeakQuantum}
	if !reflect.DeepEqual(got, want) {
		t.Errorf("got %q, want %q", got, want)
	}
	overwrite(t, k.path("laptop.age"), []byte("x"))
	s, files = k.load(t)
	if w := Weakest(s, files); w[0] != (Weakness{"laptop", WeakDamaged}) {
		t.Errorf("worst is %v", w[0])
	}
}
