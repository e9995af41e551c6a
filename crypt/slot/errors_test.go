package slot

import (
	"errors"
	"io"
	"strings"
	"testing"
)

// What users read: it names the slot, quotes what is foreign, is short, and has
// no line break whatever the file held.
func TestErrorText(t *testing.T) {
	long := strings.Repeat("x", 5000)
	for _, tt := range []struct {
		err  error
		want string
	}{
		{&TamperError{Slot: "a", Reason: BadMAC}, `slot "a" opens to a key that did not write this slot set`},
		{&TamperError{Reason: BadMAC}, "the slot set was not written with this key"},
		{&TamperError{Reason: RolledBack}, "the slot set was rolled back to an older one"},
		{&TamperError{Reason: Moved}, "the slot set belongs to another keep"},
		{&TamperError{Slot: "b", File: "b.age", Reason: Planted}, `file "b.age" is not listed in the slot set`},
		{&TamperError{Slot: "a", File: "a.age", Reason: Swapped}, `slot "a" (file "a.age"): swapped`},
		{&TamperError{File: setFile, Reason: Removed}, `file "set.json": removed`},
		{finding("a", "a.age", io.ErrNoProgress), `slot "a" (file "a.age"): unreadable: multiple Read calls return no data or error`},
		{&VersionError{2}, "slot set has version 2, known is 1"},
		{&FeatureError{"tpm\n"}, `slot set needs the unknown feature "tpm\n"`},
		{&FormatError{"a", errors.New("bad")}, `slot "a" is malformed: bad`},
		{&FormatError{"", errors.New("bad")}, "malformed: bad"},
		{&WorkFactorError{"a", 30, 20}, `slot "a" asks for scrypt work 2^30, the limit is 2^20`},
		{&SlotError{"a", ErrLastSlot}, `slot "a": it is the last slot`},
		{&IdentityError{Line: 3, Err: ErrMalformed}, "identity, line 3: malformed private key"},
		{&IdentityError{Slot: "a", Err: ErrNoPassphrase}, `slot "a": identity: no passphrase`},
		{&IdentityError{Err: ErrOldPEM}, "identity: " + ErrOldPEM.Error()},
		{&UnsupportedError{"RENAME_EXCHANGE", "slots", nil}, `filesystem of "slots" does not support RENAME_EXCHANGE`},
		{&StaleError{3, 3}, "slot set on disk has epoch 3, the new one 3"},
		{&FormatError{"a", errors.New(long)}, ""},
		{&IdentityError{Slot: "a", Err: errors.New(long)}, ""},
		{&SlotError{long, ErrExists}, ""},
		{&FeatureError{long}, ""},
		{CheckName(long), ""},
	} {
		got := tt.err.Error()
		if tt.want != "" && got != tt.want || len(got) > 400 || strings.Contains(got, "\n") {
			t.Errorf("%T: %q, want %q", tt.err, got, tt.want)
		}
	}
}
