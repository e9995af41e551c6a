package volume

import (
	"bytes"
	"context"
	"crypto/hkdf"
	"crypto/sha256"
	"errors"
	"fmt"
	"os"
	"time"

	"github.com/google/fscrypt/crypto"
	"github.com/google/fscrypt/filesystem"
	"github.com/google/fscrypt/metadata"
	"golang.org/x/sys/unix"

	"overkeep/crypt/secret"
)

// Bounds on what is waited for without a deadline from the caller.
const (
	graceLoop = 2 * time.Second  // a loop device that goes away
	graceKey  = 5 * time.Second  // files that were closed, but are not evicted yet
	graceUndo = 20 * time.Second // a filesystem that is unmounted to take back what failed
)

// protectorInfo separates the protector key from every other key derived from a
// master key (RFC 5869, info).
const protectorInfo = "overkeep v1 fscrypt protector key"

// wrappingKey copies the master key to the form fscrypt wants. Wipe it.
func wrappingKey(master *secret.Bytes) (*crypto.Key, error) {
	if master.Len() != MasterLen {
		return nil, fmt.Errorf("master key of %d bytes, want %d", master.Len(), MasterLen)
	}
	return crypto.NewFixedLengthKeyFromReader(bytes.NewReader(master.Bytes()), MasterLen)
}

// protectorKey derives the key of our protector from the master key. fscrypt
// itself would take a random one; a derived one is no weaker, opens with the
// stock tool just the same, and gives the protector a name that is known before
// anything is written, by which a killed Create is found and cleaned up.
func protectorKey(master *secret.Bytes) (*crypto.Key, error) {
	if master.Len() != MasterLen {
		return nil, fmt.Errorf("master key of %d bytes, want %d", master.Len(), MasterLen)
	}
	k, err := hkdf.Key(sha256.New, master.Bytes(), nil, protectorInfo, metadata.InternalKeyLen)
	if err != nil {
		return nil, err
	}
	defer clear(k)
	return crypto.NewFixedLengthKeyFromReader(bytes.NewReader(k), len(k))
}

// ProtectorDescriptor returns the ID.Protector that Create will use for this
// master key. It is public and says nothing about the key.
func ProtectorDescriptor(master *secret.Bytes) (string, error) {
	k, err := protectorKey(master)
	if err != nil {
		return "", err
	}
	defer k.Wipe()
	return crypto.ComputeKeyDescriptor(k, 1) // 1 is the form for protectors
}

// unwrapPolicy gets the policy key with the master key and nothing but reading.
// Any mismatch between master key, id and metadata ends here.
func unwrapPolicy(m *filesystem.Mount, id ID, master *secret.Bytes) (*crypto.Key, error) {
	got, err := ProtectorDescriptor(master)
	if err != nil {
		return nil, err
	}
	if got != id.Protector {
		return nil, &ForeignError{What: "protector of the master key", Want: id.Protector, Got: got}
	}
	what := fmt.Sprintf("fscrypt policy %s on %q", id.Policy, m.Path)
	data, err := m.GetPolicy(id.Policy, nil)
	if err != nil {
		return nil, explainMetadata(err, what, m)
	}
	var wrapped *metadata.WrappedKeyData
	for _, w := range data.WrappedPolicyKeys {
		if w.ProtectorDescriptor == id.Protector {
			wrapped = w.WrappedKey
		}
	}
	if wrapped == nil {
		return nil, &ForeignError{What: "protector of " + what, Want: id.Protector, Got: "another"}
	}
	pk, err := protectorKey(master)
	if err != nil {
		return nil, err
	}
	defer pk.Wipe()
	key, err := crypto.Unwrap(pk, wrapped)
	if errors.Is(err, crypto.ErrBadAuth) {
		return nil, &DamagedError{What: what, Err: err}
	}
	if err != nil {
		return nil, err
	}
	// The name of a v2 policy is a hash of its key, so this proves that it is
	// the key of our policy, and not an older one put in its place.
	if got, err := crypto.ComputeKeyDescriptor(key, 2); err != nil || got != id.Policy {
		key.Wipe()
		return nil, errors.Join(err, &ForeignError{What: "key in " + what, Want: id.Policy, Got: got})
	}
	return key, nil
}

// explainMetadata types the errors of fscrypt's metadata look-ups.
func explainMetadata(err error, what string, m *filesystem.Mount) error {
	var (
		noPolicy    *filesystem.ErrPolicyNotFound
		noProtector *filesystem.ErrProtectorNotFound
		noSetup     *filesystem.ErrNotSetup
		corrupt     *filesystem.ErrCorruptMetadata
	)
	switch {
	case errors.As(err, &noPolicy), errors.As(err, &noProtector):
		return &MissingError{What: what}
	case errors.As(err, &noSetup):
		return &MissingError{What: fmt.Sprintf("fscrypt metadata on %q", m.Path)}
	case errors.As(err, &corrupt):
		return &DamagedError{What: what, Err: err}
	}
	return err
}

// addKey gives the policy key to the kernel; every copy of ours is wiped when
// it returns. Policy and protector have been checked, the directory not.
func addKey(k kernel, parent *os.File, id ID, master *secret.Bytes) error {
	m, err := filesystemOf(parent)
	if err != nil {
		return err
	}
	key, err := unwrapPolicy(m, id, master)
	if err != nil {
		return err
	}
	defer key.Wipe()
	crash("volume.key.add")
	return step("add the key to the filesystem of", parent.Name(), k.addKey(int(parent.Fd()), id.Policy, key))
}

// RemoveKey asks the kernel once to forget the key, for all users, and to evict
// every file that has it. Files in use keep it; then FilesBusy is set, and the
// call is to be repeated once they are closed. Right after an unmount this can
// go on for about a second. A key that is absent, or whose FSImage is detached,
// is success.
func RemoveKey(s Spec, id ID) (Removal, error) {
	parent, err := s.open(id)
	if parent == nil || err != nil {
		return Removal{}, err
	}
	defer parent.Close()
	return removeKey(live, parent, id)
}

func removeKey(k kernel, parent *os.File, id ID) (Removal, error) {
	crash("volume.key.remove")
	r, err := k.removeKey(int(parent.Fd()), id.Policy)
	if errors.Is(err, unix.ENOKEY) {
		return Removal{}, nil
	}
	return r, step("remove the key from the filesystem of", parent.Name(), err)
}

// RemoveKeyWait repeats RemoveKey until no file is busy and the kernel says
// Absent. When ctx ends first, that is a *BusyError, and the key may be in any
// state.
func RemoveKeyWait(ctx context.Context, s Spec, id ID) error {
	parent, err := s.open(id)
	if parent == nil || err != nil {
		return err
	}
	defer parent.Close()
	return removeKeyWait(ctx, live, parent, id)
}

func removeKeyWait(ctx context.Context, k kernel, parent *os.File, id ID) error {
	err := poll(ctx, func() (bool, error) {
		r, err := removeKey(k, parent, id)
		if err != nil || r != (Removal{}) {
			return false, err
		}
		st, err := k.keyStatus(int(parent.Fd()), id.Policy)
		return st == Absent, err
	})
	if err != nil && ctx.Err() != nil && errors.Is(err, ctx.Err()) {
		return &BusyError{What: fmt.Sprintf("a file with the key of policy %s", id.Policy), Err: err}
	}
	return err
}

// KeyStatus asks the kernel for the key. Of an FSImage that is attached nowhere
// the key is Absent: keys belong to a mounted filesystem. Of one that is mounted
// only in another namespace it is Unknown, with a *BusyError.
func KeyStatus(s Spec, id ID) (Status, error) {
	parent, err := s.open(id)
	if err != nil {
		return Unknown, err
	}
	if parent == nil {
		return Absent, nil
	}
	defer parent.Close()
	st, err := live.keyStatus(int(parent.Fd()), id.Policy)
	return st, step("ask for a key on the filesystem of", parent.Name(), err)
}

// open checks s and id and opens the parent; nil without an error says that the
// filesystem is attached nowhere, so that no key of it can be in the kernel.
func (s Spec) open(id ID) (*os.File, error) {
	if err := errors.Join(s.check(false), id.check()); err != nil {
		return nil, err
	}
	parent, err := s.openParent()
	if gone := (*NotMountedError)(nil); !errors.As(err, &gone) {
		return parent, err
	}
	loops, err := LoopDevices(s)
	if err != nil {
		return nil, err
	}
	if len(loops) > 0 {
		return nil, &BusyError{What: fmt.Sprintf("%q on %s in another namespace", loops[0].Backing, loops[0].Path)}
	}
	return nil, nil
}
