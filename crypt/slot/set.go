package slot

import (
	"fmt"
	"math"
	"regexp"
	"slices"
	"strings"
	"time"
	"unicode"
	"unicode/utf8"
)

// Version is the format this package writes, and the only one it reads.
const Version = 1

// Bounds of a set.
const (
	MaxSlots    = 64
	MaxSetSize  = 256 << 10 // bytes of set.json
	MaxFileSize = 64 << 10  // bytes of one slot file
	MaxLabel    = 256       // bytes
	maxFeatures = 16
)

// features this package knows. A set that names another is refused.
var features = []string{}

// Kind says what opens a slot.
type Kind string

const (
	Passphrase Kind = "passphrase" // scrypt
	X25519     Kind = "x25519"     // age1...
	PQ         Kind = "pq"         // age1pq1..., ML-KEM-768 with X25519
	SSH        Kind = "ssh"        // ssh-ed25519 or ssh-rsa
	Plugin     Kind = "plugin"     // age1NAME1..., a token
)

var kinds = []Kind{Passphrase, X25519, PQ, SSH, Plugin}

// Recovery is the Role of the slot that is kept for a bad day.
const Recovery = "recovery"

// Slot describes one slot file. All of it is public.
type Slot struct {
	Name    string // [a-z0-9][a-z0-9._-]{0,62} without ".."; the file is NAME.age
	Kind    Kind
	Role    string    // "" or Recovery
	Created time.Time // UTC, whole seconds
	Label   string    // a hint for people; may be empty
	SHA256  string    // of the file, lower-case hex; filled in by Commit
}

// Binding ties a set to its keep.
type Binding struct {
	KeepID    string // the keep's store id
	Protector string // fscrypt protector descriptor, 16 hex digits
	Policy    string // fscrypt policy key identifier, 32 hex digits
}

// Set is the list of a keep's slots. Treat it as a value: Add, Replace, Remove and
// Confirm return a new one, one epoch later, and leave theirs alone.
type Set struct {
	Version  int
	Features []string
	Binding
	Epoch     uint64 // grows by one with every change
	Confirmed bool   // the user has shown that they hold the recovery key
	Slots     []Slot // sorted by name
	MAC       []byte // filled in by Commit
}

// NewSet returns an empty set at epoch 0. It can be committed once it has a slot.
func NewSet(b Binding) *Set {
	return &Set{Version: Version, Binding: b}
}

// Lookup returns the slot of that name.
func (s *Set) Lookup(name string) (Slot, bool) {
	i := slices.IndexFunc(s.Slots, func(x Slot) bool { return x.Name == name })
	if i < 0 {
		return Slot{}, false
	}
	return s.Slots[i], true
}

func (s *Set) recoveries() (n int) {
	for _, x := range s.Slots {
		if x.Role == Recovery {
			n++
		}
	}
	return n
}

// next copies the set, one epoch later and without a MAC.
func (s *Set) next() (*Set, error) {
	if s.Epoch == math.MaxUint64 {
		return nil, formatf("epoch %d is the last", s.Epoch)
	}
	n := *s
	n.Features = slices.Clone(s.Features)
	n.Slots = slices.Clone(s.Slots)
	n.MAC = nil
	n.Epoch++
	return &n, nil
}

func (s *Set) put(x Slot) {
	x.Created = x.Created.UTC().Truncate(time.Second)
	x.SHA256 = ""
	s.Slots = append(s.Slots, x)
	slices.SortFunc(s.Slots, func(a, b Slot) int { return strings.Compare(a.Name, b.Name) })
	if x.Role == Recovery {
		s.Confirmed = false
	}
}

// Add returns the set with one slot more. A new recovery slot is not confirmed.
func (s *Set) Add(x Slot) (*Set, error) {
	if _, ok := s.Lookup(x.Name); ok {
		return nil, &SlotError{x.Name, ErrExists}
	}
	if len(s.Slots) >= MaxSlots {
		return nil, &SlotError{x.Name, ErrFull}
	}
	if err := x.check(); err != nil {
		return nil, &SlotError{x.Name, err}
	}
	n, err := s.next()
	if err != nil {
		return nil, err
	}
	n.put(x)
	return n, nil
}

// Replace returns the set with x in the place of the slot of the same name, as for
// a changed passphrase. A replaced recovery slot has to be confirmed again; a
// recovery slot does not become an ordinary one this way while it is the last.
func (s *Set) Replace(x Slot) (*Set, error) {
	old, ok := s.Lookup(x.Name)
	switch {
	case !ok:
		return nil, &SlotError{x.Name, ErrUnknownSlot}
	case old.Role == Recovery && x.Role != Recovery && s.recoveries() == 1:
		return nil, &SlotError{x.Name, ErrLastRecovery}
	}
	if err := x.check(); err != nil {
		return nil, &SlotError{x.Name, err}
	}
	n, err := s.next()
	if err != nil {
		return nil, err
	}
	n.drop(x.Name)
	n.put(x)
	return n, nil
}

// Remove returns the set without that slot. The last slot is never removed, the
// last recovery slot only with force.
func (s *Set) Remove(name string, force bool) (*Set, error) {
	old, ok := s.Lookup(name)
	switch {
	case !ok:
		return nil, &SlotError{name, ErrUnknownSlot}
	case len(s.Slots) == 1:
		return nil, &SlotError{name, ErrLastSlot}
	case old.Role == Recovery && s.recoveries() == 1 && !force:
		return nil, &SlotError{name, ErrLastRecovery}
	}
	n, err := s.next()
	if err != nil {
		return nil, err
	}
	n.drop(name)
	return n, nil
}

func (s *Set) drop(name string) {
	s.Slots = slices.DeleteFunc(s.Slots, func(x Slot) bool { return x.Name == name })
	if s.recoveries() == 0 {
		s.Confirmed = false
	}
}

// Confirm returns the set with the recovery key marked as confirmed: the user has
// answered a Challenge. Without a recovery slot it is ErrUnknownSlot.
func (s *Set) Confirm() (*Set, error) {
	if s.recoveries() == 0 {
		return nil, &SlotError{Recovery, ErrUnknownSlot}
	}
	n, err := s.next()
	if err != nil {
		return nil, err
	}
	n.Confirmed = true
	return n, nil
}

// Lengths are checked beside them: a counted repetition is compiled to as many
// copies, at every start of the program.
var (
	nameRE    = regexp.MustCompile(`^[a-z0-9][a-z0-9._-]*$`)
	featureRE = regexp.MustCompile(`^[a-z0-9][a-z0-9-]*$`)
	keepIDRE  = regexp.MustCompile(`^[A-Za-z0-9][A-Za-z0-9._-]*$`)
	hexRE     = regexp.MustCompile(`^[0-9a-f]+$`)
)

const (
	maxName       = 63 // bytes, of slots and of features
	maxKeepID     = 128
	protectorSize = 16 // hexadecimal digits
	policySize    = 32
	sha256Size    = 64
)

func isName(s string) bool          { return len(s) <= maxName && nameRE.MatchString(s) }
func isFeature(s string) bool       { return len(s) <= maxName && featureRE.MatchString(s) }
func isKeepID(s string) bool        { return len(s) <= maxKeepID && keepIDRE.MatchString(s) }
func isHex(s string, size int) bool { return len(s) == size && hexRE.MatchString(s) }

const suffix = ".age"

// CheckName says whether name may name a slot.
func CheckName(name string) error {
	// With the suffix, so that "a." is refused as well.
	if !isName(name) || strings.Contains(name+suffix, "..") {
		return formatf("slot name %s", quote(name))
	}
	return nil
}

func (x *Slot) check() error {
	if err := CheckName(x.Name); err != nil {
		return err
	}
	if !slices.Contains(kinds, x.Kind) {
		return formatf("slot kind %s", quote(string(x.Kind)))
	}
	if x.Role != "" && x.Role != Recovery {
		return formatf("slot role %s", quote(x.Role))
	}
	if y := x.Created.UTC().Year(); y < 1970 || y > 9999 {
		return formatf("slot created in the year %d", y)
	}
	if len(x.Label) > MaxLabel || !utf8.ValidString(x.Label) ||
		strings.ContainsFunc(x.Label, func(r rune) bool { return !unicode.IsPrint(r) || r == utf8.RuneError }) {
		// Labels are shown on terminals: no control characters, no escapes.
		return formatf("slot label %s", quote(x.Label))
	}
	return nil
}

// check validates everything but hashes and MAC.
func (s *Set) check() error {
	if s.Version != Version {
		return &VersionError{s.Version}
	}
	if len(s.Features) > maxFeatures {
		return formatf("%d features, at most %d are allowed", len(s.Features), maxFeatures)
	}
	for i, f := range s.Features {
		if !isFeature(f) {
			return formatf("feature %s", quote(f))
		}
		if i > 0 && s.Features[i-1] >= f {
			return formatf("features are not sorted at %q", f)
		}
		if !slices.Contains(features, f) {
			return &FeatureError{f}
		}
	}
	switch {
	case !isKeepID(s.KeepID):
		return formatf("keep id %s", quote(s.KeepID))
	case !isHex(s.Protector, protectorSize):
		return formatf("protector %s is not 16 hex digits", quote(s.Protector))
	case !isHex(s.Policy, policySize):
		return formatf("policy %s is not 32 hex digits", quote(s.Policy))
	case len(s.Slots) == 0:
		return formatf("no slot")
	case len(s.Slots) > MaxSlots:
		return formatf("%d slots, at most %d are allowed", len(s.Slots), MaxSlots)
	case s.Confirmed && s.recoveries() == 0:
		return formatf("a recovery key is confirmed but there is none")
	}
	for i := range s.Slots {
		if err := s.Slots[i].check(); err != nil {
			return err
		}
		if i > 0 && s.Slots[i-1].Name >= s.Slots[i].Name {
			return formatf("slots are not sorted, or not unique, at %q", s.Slots[i].Name)
		}
	}
	return nil
}

// Weakness is one thing that makes a set easier to attack, or to lose.
type Weakness struct {
	Slot   string // empty: the set as a whole
	Reason string
}

func (w Weakness) String() string {
	if w.Slot == "" {
		return w.Reason
	}
	return fmt.Sprintf("slot %s: %s", w.Slot, w.Reason)
}

// Reasons of a Weakness, the worst first.
const (
	WeakDamaged     = "damaged"
	WeakWork        = "passphrase with little work against guessing"
	WeakNoRecovery  = "no recovery slot"
	WeakUnconfirmed = "recovery key not confirmed"
	WeakSingle      = "only one slot"
	WeakRSA         = "ssh rsa key"
	WeakQuantum     = "public key known to others: open to a future quantum computer"
)

var weaknesses = []string{WeakDamaged, WeakWork, WeakNoRecovery, WeakUnconfirmed, WeakSingle, WeakRSA, WeakQuantum}

// MinGoodLogN is the scrypt work, as a power of two, under which Weakest complains.
const MinGoodLogN = 16

// Weakest lists what is weak about the set, the worst first. It reads headers only
// and needs no key, so it believes set.json: use it for status, not for decisions.
func Weakest(s *Set, files Files) []Weakness {
	var ws []Weakness
	for _, f := range files.Findings {
		ws = append(ws, Weakness{f.label(), WeakDamaged})
	}
	for _, x := range s.Slots {
		file, ok := files.Content[x.Name]
		if !ok {
			continue
		}
		h, err := Inspect(file)
		if err != nil {
			ws = append(ws, Weakness{x.Name, WeakDamaged})
			continue
		}
		switch {
		case h.LogN != 0 && h.LogN < MinGoodLogN:
			ws = append(ws, Weakness{x.Name, WeakWork})
		case slices.Contains(h.Stanzas, "ssh-rsa"):
			ws = append(ws, Weakness{x.Name, WeakRSA})
		case x.Role != Recovery && (slices.Contains(h.Stanzas, "X25519") || slices.Contains(h.Stanzas, "ssh-ed25519")):
			ws = append(ws, Weakness{x.Name, WeakQuantum})
		}
	}
	switch {
	case s.recoveries() == 0:
		ws = append(ws, Weakness{"", WeakNoRecovery})
	case !s.Confirmed:
		ws = append(ws, Weakness{"", WeakUnconfirmed})
	}
	if len(s.Slots) == 1 {
		ws = append(ws, Weakness{"", WeakSingle})
	}
	slices.SortStableFunc(ws, func(a, b Weakness) int {
		return slices.Index(weaknesses, a.Reason) - slices.Index(weaknesses, b.Reason)
	})
	return ws
}
