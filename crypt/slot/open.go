package slot

import (
	"errors"
	"runtime"
	"slices"

	"filippo.io/age"

	"overkeep/crypt/secret"
)

// Keys is what the user brings to open a slot.
type Keys struct {
	Passphrase *secret.Bytes // nil or empty: none
	Identities []age.Identity

	// MaxLogN caps the scrypt work at 2^MaxLogN, 1 to 30; 0 is DefaultMaxLogN.
	MaxLogN int

	// IgnoreDamaged names the findings of Load that the user has seen and accepts:
	// the slot, or the file where there is no slot. See the package comment.
	IgnoreDamaged []string
}

func (k Keys) maxLogN() (int, error) {
	switch {
	case k.MaxLogN == 0:
		return DefaultMaxLogN, nil
	case k.MaxLogN < 1 || k.MaxLogN > 30: // age panics beyond
		return 0, formatf("limit of scrypt work 2^%d is not within 2^1 to 2^30", k.MaxLogN)
	}
	return k.MaxLogN, nil
}

// OpenFile opens one slot file: one with a scrypt stanza with the passphrase, any
// other with the identities, those that ask nothing first. It does no work before
// Inspect has accepted the header and the work factor is within MaxLogN
// (*WorkFactorError).
//
// It is ErrNoSlot when keys has nothing for this kind of file, ErrWrongKey when
// nothing fits, *IdentityError when an identity failed and none fitted, and
// *FormatError for anything that is not an age file of exactly KeySize bytes. The
// caller wipes the key, and checks whether it is the keep's: age does not say who
// encrypted.
func OpenFile(file []byte, keys Keys) (*secret.Bytes, error) {
	h, err := Inspect(file)
	if err != nil {
		return nil, err
	}
	max, err := keys.maxLogN()
	if err != nil {
		return nil, err
	}
	if h.LogN == 0 {
		if len(keys.Identities) == 0 {
			return nil, ErrNoSlot
		}
		ids := slices.Clone(keys.Identities)
		slices.SortStableFunc(ids, func(a, b age.Identity) int { return rank(a) - rank(b) })
		return decrypt(file, ids)
	}
	if keys.Passphrase.Len() == 0 {
		return nil, ErrNoSlot
	}
	if h.LogN > max {
		return nil, &WorkFactorError{LogN: h.LogN, Max: max}
	}
	id, err := age.NewScryptIdentity(string(keys.Passphrase.Bytes()))
	runtime.KeepAlive(keys.Passphrase)
	if err != nil {
		return nil, &FormatError{Err: err}
	}
	id.SetMaxWorkFactor(max)
	return decrypt(file, []age.Identity{id})
}

func rank(id age.Identity) int {
	if interactive(id) {
		return 1
	}
	return 0
}

// Open finds a slot that the keys open and returns the master key and the slot's
// name; with only, that slot alone is tried. Keys in hand are tried first, on
// every slot, then the passphrase (recovery slots last), then what may ask the
// user: encrypted key files and plugins.
//
// It refuses, before it tries anything, a set with findings that
// Keys.IgnoreDamaged does not name. A key that does not verify the MAC of the set
// is refused with the name of the slot it came from, and no other slot is tried:
// either that slot is a decoy or the list was changed.
//
// A slot that is malformed or asks for too much work does not keep the others from
// being tried. When none opens, the error holds what went wrong with each
// (*FormatError, *WorkFactorError, *IdentityError), and ErrWrongKey when a slot was
// tried in earnest; it is ErrNoSlot when the set has none for these keys. The
// caller wipes the key, compares Binding and calls CheckEpoch.
func (s *Set) Open(files Files, keys Keys, only string) (master *secret.Bytes, slot string, err error) {
	if err := files.refuse(keys.IgnoreDamaged); err != nil {
		return nil, "", err
	}
	slots := s.Slots
	if only != "" {
		x, ok := s.Lookup(only)
		if !ok {
			return nil, "", &SlotError{only, ErrUnknownSlot}
		}
		if _, ok := files.Content[only]; !ok {
			return nil, "", files.finding(only)
		}
		slots = []Slot{x}
	}

	var plain, asking []age.Identity
	for _, id := range keys.Identities {
		if interactive(id) {
			asking = append(asking, id)
		} else {
			plain = append(plain, id)
		}
	}
	rounds := []Keys{
		{Identities: plain, MaxLogN: keys.MaxLogN},
		{Passphrase: keys.Passphrase, MaxLogN: keys.MaxLogN},
		{Identities: asking, MaxLogN: keys.MaxLogN},
	}
	a := attempt{set: s, files: files, bad: map[string]error{}}
	for _, k := range rounds {
		if len(k.Identities) == 0 && k.Passphrase.Len() == 0 {
			continue
		}
		for _, x := range ordered(slots) {
			master, err := a.try(x, k)
			if err != nil {
				return nil, "", err
			}
			if master != nil {
				return master, x.Name, nil
			}
		}
	}
	return nil, "", a.failure()
}

// ordered puts the recovery slots last: the everyday key is likelier.
func ordered(slots []Slot) []Slot {
	slots = slices.Clone(slots)
	slices.SortStableFunc(slots, func(a, b Slot) int { return len(a.Role) - len(b.Role) })
	return slots
}

// attempt keeps what went wrong over the slots of one Open.
type attempt struct {
	set   *Set
	files Files
	wrong bool // a slot was tried and the key did not fit
	errs  []error
	bad   map[string]error // slots that cannot be tried at all
}

// try returns a verified key, or nil for the next slot. Its error ends the search.
func (a *attempt) try(x Slot, k Keys) (*secret.Bytes, error) {
	file, ok := a.files.Content[x.Name]
	if !ok || a.bad[x.Name] != nil || (x.Kind == Passphrase) != (k.Passphrase.Len() != 0) {
		return nil, nil
	}
	_, err := x.inspect(file)
	if err != nil {
		err = named(x.Name, err)
		a.bad[x.Name] = err
		a.errs = append(a.errs, err)
		return nil, nil
	}
	master, err := OpenFile(file, k)
	if err != nil {
		return nil, a.note(x.Name, err)
	}
	if err := a.set.VerifyMAC(master); err != nil {
		master.Wipe()
		if t, ok := err.(*TamperError); ok {
			t.Slot = x.Name
		}
		return nil, err
	}
	return master, nil
}

// note keeps an error that is about this slot; any other (no locked memory, a
// limit out of range) ends the search.
func (a *attempt) note(slot string, err error) error {
	if errors.Is(err, ErrWrongKey) {
		a.wrong = true
		return nil
	}
	err = named(slot, err)
	switch err.(type) {
	case *FormatError, *WorkFactorError, *IdentityError:
		a.errs = append(a.errs, err)
		return nil
	}
	return err
}

func (a *attempt) failure() error {
	errs := a.errs
	if a.wrong {
		errs = append([]error{ErrWrongKey}, errs...)
	}
	if len(errs) == 0 {
		return ErrNoSlot
	}
	return errors.Join(errs...)
}
