package keep

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io/fs"
	"slices"
	"syscall"

	"overkeep/crypt/slot"
	"overkeep/crypt/volume"
	"overkeep/overlay/holder"
	"overkeep/overlay/layout"
	"overkeep/overlay/view"
)

// Code names what went wrong; a remedy and an exit code hang on it. The values
// are part of the JSON output and never change their meaning.
type Code string

const (
	CodeInternal    Code = "internal"
	CodeUsage       Code = "usage"
	CodeNotRoot     Code = "not-root"
	CodeNoKeep      Code = "no-such-keep"
	CodeKeepExists  Code = "keep-exists"
	CodeWrongKey    Code = "wrong-key"
	CodeTampered    Code = "tampered"
	CodeDamaged     Code = "damaged"
	CodeVersion     Code = "unknown-format"
	CodeWorkFactor  Code = "work-factor"
	CodeForeign     Code = "foreign"
	CodeUnsupported Code = "unsupported"
	CodeNoNix       Code = "no-nix"
	CodeLocked      Code = "locked"
	CodeUnlocked    Code = "unlocked"
	CodeNotLocked   Code = "not-locked"
	CodeNoSpace     Code = "no-space"
	CodeMountPoint  Code = "mount-point"
	CodeAborted     Code = "aborted"
	CodeBusyRun     Code = "in-use"
	CodePlugin      Code = "plugin"
	CodeUnconfirmed Code = "unconfirmed"
)

// Error is what every function of this package returns: a code, a sentence, and
// what it is about. It crosses process borders as JSON.
type Error struct {
	Code    Code            `json:"code"`
	Message string          `json:"message"`
	Name    string          `json:"name,omitempty"`    // the keep, slot, path or user it is about
	Missing string          `json:"missing,omitempty"` // unsupported: what is missing
	Remedy  string          `json:"remedy,omitempty"`  // unsupported: the command that mends it
	Holders []holder.Holder `json:"holders,omitempty"` // not-locked: who holds it
	// InForce says that what failed came after the new keys had taken the place of
	// the old, or may have: whoever was given one must keep it.
	InForce bool `json:"in_force,omitempty"`
	cause   error
}

func (e *Error) Error() string { return e.Message }
func (e *Error) Unwrap() error { return e.cause }

func errorf(code Code, name, format string, args ...any) *Error {
	err := fmt.Errorf(format, args...)
	return &Error{Code: code, Message: err.Error(), Name: name, cause: errors.Unwrap(err)}
}

// inForce is err as one that came after the new keys had taken effect.
func inForce(err error) *Error {
	e := *Classify(err)
	e.Message += "; the new keys are in force all the same"
	e.InForce = true
	return &e
}

// Classify turns any error of the layers below into an *Error; nil stays nil.
func Classify(err error) *Error {
	if err == nil {
		return nil
	}
	var e *Error
	if errors.As(err, &e) {
		return e
	}
	out := &Error{Code: CodeInternal, Message: err.Error(), cause: err}
	var (
		tamper  *slot.TamperError
		format  *slot.FormatError
		version *slot.VersionError
		feature *slot.FeatureError
		work    *slot.WorkFactorError
		foreign *volume.ForeignError
		unsup   *volume.UnsupportedError
		notLock *volume.NotLockedError
		vbusy   *volume.BusyError
		vcbusy  *view.BusyError
		mp      *view.MountPointError
		name    *layout.NameError
		hpolicy *holder.PolicyError
		hpoint  *holder.MountPointError
		option  *view.OptionError
		slotErr *slot.SlotError
		ident   *slot.IdentityError
		noSwap  *slot.UnsupportedError
		stale   *slot.StaleError
		exists  *volume.ExistsError
		missing *volume.MissingError
		damaged *volume.DamagedError
	)
	switch {
	case errors.Is(err, context.Canceled):
		out.Code = CodeAborted
	// What points to tampering first: it must not hide behind a wrong key.
	case errors.As(err, &tamper):
		out.Code, out.Name = CodeTampered, tamper.Slot
		if out.Name == "" {
			out.Name = tamper.File
		}
	case errors.As(err, &work):
		out.Code, out.Name = CodeWorkFactor, work.Slot
	case errors.Is(err, slot.ErrWrongKey), errors.Is(err, slot.ErrNoSlot):
		out.Code = CodeWrongKey
	case errors.As(err, &ident):
		// A key file that cannot be read as one is the caller's mistake; what is
		// left are tokens and plugins that did not do their part.
		out.Code, out.Name = CodePlugin, ident.Slot
		if badIdentity(err) {
			out.Code, out.Name = CodeUsage, "identity"
		}
	case errors.As(err, &slotErr):
		out.Code, out.Name = CodeUsage, slotErr.Slot
	case errors.As(err, &noSwap):
		out.Code, out.Missing = CodeUnsupported, noSwap.Op
	case errors.As(err, &stale):
		out.Code = CodeBusyRun
	case errors.As(err, &format):
		out.Code, out.Name = CodeDamaged, format.Slot
	case errors.As(err, &version), errors.As(err, &feature):
		out.Code = CodeVersion
	case errors.As(err, &foreign):
		out.Code = CodeForeign
	case errors.As(err, &unsup):
		out.Code, out.Missing, out.Remedy = CodeUnsupported, unsup.Missing, unsup.Remedy
	case errors.As(err, &notLock), errors.As(err, &vbusy), errors.As(err, &vcbusy):
		out.Code = CodeNotLocked
	case errors.As(err, &exists):
		out.Code, out.Name = CodeKeepExists, exists.What
	case errors.As(err, &missing), errors.As(err, &damaged):
		out.Code = CodeDamaged
	case errors.As(err, &option):
		out.Code, out.Name = CodeUsage, option.Path
	case errors.As(err, &mp):
		out.Code, out.Name = CodeMountPoint, mp.Path
	case errors.As(err, &name):
		out.Code, out.Name = CodeUsage, name.Name
	case errors.Is(err, syscall.ENOTTY), errors.Is(err, syscall.EOPNOTSUPP):
		out.Code, out.Missing = CodeUnsupported, "a call of the kernel (encryption keys came with Linux 5.4)"
	case errors.As(err, &hpolicy):
		out.Code, out.Missing = CodeUnsupported, "encryption policies of version 2 in the kernel"
		out.Message = "the kernel does not know the encryption of the keep: " + out.Message
	case errors.As(err, &hpoint):
		out.Code, out.Name = CodeMountPoint, hpoint.Path
	case errors.Is(err, syscall.EFBIG):
		out.Code, out.Name = CodeUsage, "size"
		out.Message = "the size is more than a file can have: " + out.Message
	case errors.Is(err, syscall.ENOSPC), errors.Is(err, syscall.EDQUOT):
		out.Code = CodeNoSpace
	case errors.Is(err, fs.ErrPermission) && syscall.Geteuid() != 0:
		out.Code = CodeNotRoot
	}
	return out
}

func badIdentity(err error) bool {
	return slices.ContainsFunc([]error{slot.ErrNoIdentity, slot.ErrRecipient, slot.ErrEncryptedAge, slot.ErrOldPEM,
		slot.ErrMalformed, slot.ErrUnknownKind, slot.ErrSlowKDF}, func(e error) bool { return errors.Is(err, e) })
}

// loadSlots is slot.Load with errors that name the keep.
func loadSlots(dir, name string) (*slot.Set, slot.Files, error) {
	set, files, err := slot.Load(dir)
	var format *slot.FormatError
	switch {
	case err == nil:
		return set, files, nil
	case errors.Is(err, fs.ErrNotExist):
		err = errorf(CodeDamaged, name, "the slots of keep %q are missing: there is no %q", name, dir)
	case errors.Is(err, syscall.ENOTDIR), errors.Is(err, syscall.ELOOP):
		err = errorf(CodeTampered, name, "the slots of keep %q: %q is no directory", name, dir)
	case errors.As(err, &format) && format.Slot == "":
		err = errorf(CodeDamaged, name, "the list of slots of keep %q (set.json) is %w", name, err)
	}
	return nil, slot.Files{}, err
}

// classified is Classify for a result of type error: nil stays an untyped nil.
func classified(err error) error {
	if err == nil {
		return nil
	}
	return Classify(err)
}

// decodeError reads an *Error that a child wrote; nil for "null" or nothing.
func decodeError(raw json.RawMessage) error {
	if len(raw) == 0 || string(raw) == "null" {
		return nil
	}
	e := new(Error)
	if err := json.Unmarshal(raw, e); err != nil || e.Code == "" {
		return errorf(CodeInternal, "", "helper process answered %.80q", raw)
	}
	return e
}
