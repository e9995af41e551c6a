package slot

import (
	"errors"
	"fmt"
	"strconv"
)

var (
	// ErrWrongKey: slots were tried and the key given opens none of them.
	ErrWrongKey = errors.New("the key opens no slot")
	// ErrNoSlot: the set has no slot that this kind of key could open.
	ErrNoSlot = errors.New("no slot for this kind of key")
	// ErrLastSlot: without this slot nothing could open the keep.
	ErrLastSlot = errors.New("it is the last slot")
	// ErrLastRecovery: without this slot a forgotten passphrase is final.
	ErrLastRecovery = errors.New("it is the last recovery slot")
	// ErrExists: a slot of that name is already in the set.
	ErrExists = errors.New("a slot of that name exists")
	// ErrUnknownSlot: the set has no slot of that name.
	ErrUnknownSlot = errors.New("no slot of that name")
	// ErrFull: the set holds MaxSlots slots.
	ErrFull = errors.New("the set is full")
)

// Reasons of a TamperError.
const (
	Planted    = "planted"     // a file that the set does not list
	Removed    = "removed"     // a listed file is missing
	Changed    = "changed"     // a listed file has other content
	Swapped    = "swapped"     // a listed file has the content of another slot
	NotRegular = "not a file"  // a link, directory, pipe, socket or device instead
	TooLarge   = "too large"   // over the bound, so not read
	Unreadable = "unreadable"  // the device gave an error, in Err
	BadMAC     = "mac"         // the list was not written by a holder of the key
	RolledBack = "rolled back" // the set is older than the one the volume knows
	Moved      = "moved"       // the set belongs to another keep
)

// TamperError says that what is on disk is not what was committed. It cannot tell
// malice from a failing disk.
type TamperError struct {
	Slot   string // name of the slot; empty when it is the set as a whole
	File   string // name in the set's directory, where there is one
	Reason string // one of the constants above
	Err    error  // of the read, when Reason is Unreadable
}

func (e *TamperError) Unwrap() error { return e.Err }

// label is the name by which Keys.IgnoreDamaged accepts the finding.
func (e *TamperError) label() string {
	if e.Slot != "" {
		return e.Slot
	}
	return e.File
}

func (e *TamperError) Error() string {
	switch {
	case e.Reason == BadMAC && e.Slot != "":
		return fmt.Sprintf("slot %q opens to a key that did not write this slot set", e.Slot)
	case e.Reason == BadMAC:
		return "the slot set was not written with this key"
	case e.Reason == RolledBack:
		return "the slot set was rolled back to an older one"
	case e.Reason == Moved:
		return "the slot set belongs to another keep"
	case e.Reason == Planted:
		return fmt.Sprintf("file %q is not listed in the slot set", e.File)
	}
	what := fmt.Sprintf("file %q: %s", e.File, e.Reason)
	if e.Slot != "" {
		what = fmt.Sprintf("slot %q (file %q): %s", e.Slot, e.File, e.Reason)
	}
	if e.Err != nil {
		what += ": " + e.Err.Error()
	}
	return what
}

// VersionError: the set was written in a format this program does not know.
type VersionError struct{ Version int }

func (e *VersionError) Error() string {
	return fmt.Sprintf("slot set has version %d, known is %d", e.Version, Version)
}

// FeatureError: the set uses a feature this program does not know.
type FeatureError struct{ Feature string }

func (e *FeatureError) Error() string {
	return fmt.Sprintf("slot set needs the unknown feature %s", quote(e.Feature))
}

// FormatError: a file or a value is malformed. Slot is empty when it is set.json
// or when the caller gave no name.
type FormatError struct {
	Slot string
	Err  error
}

func (e *FormatError) Error() string {
	// age quotes whole header lines; a hostile one must not fill a log.
	if e.Slot == "" {
		return "malformed: " + clip(e.Err.Error())
	}
	return fmt.Sprintf("slot %q is malformed: %s", e.Slot, clip(e.Err.Error()))
}

func (e *FormatError) Unwrap() error { return e.Err }

// WorkFactorError: opening the slot would cost more than is allowed. No work was
// done for it.
type WorkFactorError struct {
	Slot      string
	LogN, Max int // scrypt: 2^LogN rounds asked for, 2^Max allowed
}

func (e *WorkFactorError) Error() string {
	return fmt.Sprintf("slot %q asks for scrypt work 2^%d, the limit is 2^%d", e.Slot, e.LogN, e.Max)
}

// SlotError: an operation on a slot was refused, for one of the Err values above
// or a *FormatError.
type SlotError struct {
	Slot string
	Err  error
}

func (e *SlotError) Error() string { return fmt.Sprintf("slot %s: %s", quote(e.Slot), e.Err) }
func (e *SlotError) Unwrap() error { return e.Err }

// IdentityError: an identity could not do its part (a plugin is missing, a
// passphrase was not given, a key file is malformed). Line is the line of the
// identity file, from 1, where that is known.
type IdentityError struct {
	Slot string
	Line int
	Err  error
}

func (e *IdentityError) Error() string {
	switch {
	case e.Slot != "":
		return fmt.Sprintf("slot %q: identity: %s", e.Slot, clip(e.Err.Error()))
	case e.Line != 0:
		return fmt.Sprintf("identity, line %d: %s", e.Line, clip(e.Err.Error()))
	}
	return "identity: " + clip(e.Err.Error())
}

func (e *IdentityError) Unwrap() error { return e.Err }

// UnsupportedError: the filesystem of the set cannot do what atomic replacement
// needs.
type UnsupportedError struct {
	Op   string // the renameat2(2) flag
	Path string
	Err  error
}

func (e *UnsupportedError) Error() string {
	return fmt.Sprintf("filesystem of %q does not support %s", e.Path, e.Op)
}

func (e *UnsupportedError) Unwrap() error { return e.Err }

// StaleError: the set on disk is as new as the one to be written, or newer.
// Somebody else changed it since it was loaded.
type StaleError struct{ Disk, Next uint64 }

func (e *StaleError) Error() string {
	return fmt.Sprintf("slot set on disk has epoch %d, the new one %d", e.Disk, e.Next)
}

// named puts the slot's name into the errors that carry one.
func named(slot string, err error) error {
	switch e := err.(type) {
	case *FormatError:
		return &FormatError{Slot: slot, Err: e.Err}
	case *WorkFactorError:
		return &WorkFactorError{Slot: slot, LogN: e.LogN, Max: e.Max}
	case *IdentityError:
		return &IdentityError{Slot: slot, Line: e.Line, Err: e.Err}
	}
	return err
}

func formatf(format string, a ...any) *FormatError {
	return &FormatError{Err: fmt.Errorf(format, a...)}
}

func clip(s string) string {
	const max = 300
	if len(s) > max {
		s = s[:max] + "..."
	}
	return s
}

func quote(s string) string { return clip(strconv.QuoteToASCII(s)) }
