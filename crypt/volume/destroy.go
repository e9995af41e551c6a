package volume

import (
	"context"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"strings"

	"github.com/google/fscrypt/filesystem"
	"golang.org/x/sys/unix"
)

// Destroy removes a closed volume; it needs no key. First the wrapped policy
// key goes, after which no slot opens the content any more, then the ciphertext
// and the protector; with an FSImage, that file. A directory with another policy
// and an image file with another UUID are a *ForeignError and stay. A volume
// that is in use is a *BusyError. It may be repeated after a failure.
//
// This is no erasure of the device: old blocks keep ciphertext and, in the
// journal, the wrapped key, which the master key would still open.
func Destroy(ctx context.Context, s Spec, id ID) error {
	if err := errors.Join(s.check(false), id.check()); err != nil {
		return err
	}
	if s.FSImage != "" {
		if err := DetachFS(ctx, s); err != nil {
			return err
		}
		return removeFSImage(s, id.Protector)
	}
	parent, err := s.openParent()
	if err != nil {
		return err
	}
	defer parent.Close()
	if err := s.ours(parent, id.Policy); err != nil {
		return err
	}
	// An open volume is not pulled away under its user; one that is only half
	// locked is locked first.
	st, err := live.keyStatus(int(parent.Fd()), id.Policy)
	if err == nil && st == Present {
		return &BusyError{What: fmt.Sprintf("%q (its key is present)", s.Dir)}
	}
	if err == nil {
		err = removeKeyWait(ctx, live, parent, id)
	}
	if err != nil {
		return err
	}
	m, err := filesystemOf(parent)
	if err != nil {
		return err
	}
	return errors.Join(removePolicy(m, id.Policy), removeTreeAt(s), removeProtector(m, id.Protector))
}

// ours sees that the directory has the policy, or does not exist.
func (s Spec) ours(parent *os.File, policies ...string) error {
	d, err := s.openDir(parent)
	if gone := (*MissingError)(nil); errors.As(err, &gone) {
		return nil
	} else if err != nil {
		return err
	}
	defer d.Close()
	for _, p := range policies {
		if err = checkPolicy(live, d, s.Dir, p); err == nil {
			return nil
		}
	}
	return err
}

// Cleanup removes what a killed Create left, told only by the protector that it
// would have used. It undoes a finished Create just as well: call it only for
// one of which it is known that it did not return. The directory goes if its
// policy is wrapped by this protector alone, or if it has no policy yet and is
// empty; the image file if its UUID says that it is ours. Nothing left is success.
func Cleanup(ctx context.Context, s Spec, protector string) error {
	if err := s.check(false); err != nil {
		return err
	}
	if !isHex(protector, 16) {
		return fmt.Errorf("volume: protector %q is not 16 hex digits", protector)
	}
	if s.FSImage != "" {
		if err := DetachFS(ctx, s); err != nil {
			return err
		}
		return removeFSImage(s, protector)
	}
	parent, err := s.openParent()
	if errors.Is(err, os.ErrNotExist) {
		return nil
	}
	if err != nil {
		return err
	}
	defer parent.Close()
	m, err := filesystemOf(parent)
	if err != nil {
		return err
	}
	if missing := (*filesystem.ErrNotSetup)(nil); errors.As(m.CheckSetup(nil), &missing) {
		return s.removeUnencrypted(parent)
	}
	policies, err := policiesOf(m, protector)
	if err != nil {
		return err
	}
	for _, p := range policies {
		if err := removeKeyWait(ctx, live, parent, ID{protector, p}); err != nil {
			return err
		}
	}
	// The directory first: as long as it is there, the metadata says whose it is.
	if len(policies) == 0 || s.ours(parent, policies...) != nil {
		err = s.removeUnencrypted(parent)
	} else {
		err = removeTreeAt(s)
	}
	if err != nil {
		return err
	}
	for _, p := range policies {
		err = errors.Join(err, removePolicy(m, p))
	}
	return errors.Join(err, removeProtector(m, protector))
}

// policiesOf finds the policies that only this protector opens, and removes the
// temporary files of metadata writes that were cut off, if they are of it, too.
func policiesOf(m *filesystem.Mount, protector string) ([]string, error) {
	names, err := m.ListPolicies(nil)
	if err != nil {
		return nil, err
	}
	var found []string
	for _, n := range names {
		data, err := m.GetPolicy(n, nil)
		if err != nil || len(data.WrappedPolicyKeys) != 1 || data.WrappedPolicyKeys[0].ProtectorDescriptor != protector {
			continue
		}
		if strings.HasPrefix(n, ".tmp") {
			if err := m.RemovePolicy(n); err != nil {
				return nil, err
			}
			continue
		}
		found = append(found, n)
	}
	return found, nil
}

// removeUnencrypted removes a directory that did not get its policy; only an
// empty one of root's.
func (s Spec) removeUnencrypted(parent *os.File) error {
	d, err := s.openDir(parent)
	if gone := (*MissingError)(nil); errors.As(err, &gone) {
		return nil
	} else if err != nil {
		return err
	}
	defer d.Close()
	what := fmt.Sprintf("directory %q", s.Dir)
	if p, err := live.policy(int(d.Fd())); err == nil {
		return &ForeignError{What: "policy of " + what, Want: "ours", Got: p.Descriptor}
	}
	if st, err := d.Stat(); err != nil {
		return err
	} else if st.Mode().Perm() != 0o700 || st.Sys() == nil {
		return &ForeignError{What: "mode of " + what, Want: "0700", Got: fmt.Sprintf("%#o", st.Mode().Perm())}
	}
	err = unix.Unlinkat(int(parent.Fd()), filepath.Base(s.Dir), unix.AT_REMOVEDIR)
	if errors.Is(err, unix.ENOTEMPTY) {
		return &ForeignError{What: what, Want: "empty", Got: "not empty"}
	}
	return errors.Join(step("remove", s.Dir, err), parent.Sync())
}

func removePolicy(m *filesystem.Mount, policy string) error {
	crash("volume.destroy.policy")
	err := m.RemovePolicy(policy)
	if gone := (*filesystem.ErrPolicyNotFound)(nil); err == nil || errors.As(err, &gone) {
		return syncDir(m.PolicyDir())
	}
	return explainMetadata(err, "fscrypt policy "+policy, m)
}

// removeProtector removes the protector unless some policy still needs it.
func removeProtector(m *filesystem.Mount, protector string) error {
	names, err := m.ListPolicies(nil)
	if err != nil {
		return explainMetadata(err, "fscrypt metadata", m)
	}
	for _, n := range names {
		data, err := m.GetPolicy(n, nil)
		if err != nil {
			continue
		}
		for _, w := range data.WrappedPolicyKeys {
			if w.ProtectorDescriptor == protector {
				return &BusyError{What: fmt.Sprintf("protector %s of policy %s", protector, n)}
			}
		}
	}
	crash("volume.destroy.protector")
	err = m.RemoveProtector(protector)
	if gone := (*filesystem.ErrProtectorNotFound)(nil); err == nil || errors.As(err, &gone) {
		return syncDir(m.ProtectorDir())
	}
	return err
}

// removeFSImage unlinks the image file, if it is ours. No file is success.
func removeFSImage(s Spec, protector string) error {
	f, err := openFSImage(s, protector)
	if gone := (*MissingError)(nil); errors.As(err, &gone) {
		return nil
	} else if err != nil {
		return err
	}
	defer f.Close()
	crash("volume.destroy.fsimage")
	if err := os.Remove(s.FSImage); err != nil {
		return err
	}
	return syncDir(filepath.Dir(s.FSImage))
}

// removeTreeAt removes Dir and everything below it, encrypted or not: an
// encrypted directory without its key lists no-key names, and unlink(2) takes
// them.
func removeTreeAt(s Spec) error {
	parent, err := s.openParent()
	if err != nil {
		return err
	}
	defer parent.Close()
	crash("volume.destroy.tree")
	if err := removeTree(parent, filepath.Base(s.Dir), 0); err != nil {
		return err
	}
	return parent.Sync()
}

// maxDepth bounds the recursion of removeTree, which holds one fd per level.
const maxDepth = 512

// removeTree removes name in dir, bottom up. It holds a directory by its fd,
// follows no symbolic link and enters no other mount: what is mounted inside
// must not be deleted because an unmount failed. Then it stops with *BusyError.
func removeTree(dir *os.File, name string, depth int) error {
	if depth > maxDepth {
		return fmt.Errorf("%q is more than %d directories deep", dir.Name(), maxDepth)
	}
	path := filepath.Join(dir.Name(), name)
	err := unix.Unlinkat(int(dir.Fd()), name, 0)
	switch err {
	case nil, unix.ENOENT:
		return nil
	case unix.EISDIR:
	default:
		return removeError(path, err)
	}
	d, err := openBeneath(dir, name, unix.O_DIRECTORY)
	switch {
	case errors.Is(err, unix.ENOENT):
		return nil
	case errors.Is(err, unix.EXDEV):
		return &BusyError{What: fmt.Sprintf("%q (a mount point)", path), Err: unix.EXDEV}
	case err != nil:
		return err
	}
	defer d.Close()
	names, err := d.Readdirnames(-1) // all of them first: unlinking moves the position
	if err != nil {
		return err
	}
	for _, n := range names {
		if err := removeTree(d, n, depth+1); err != nil {
			return err
		}
	}
	return removeError(path, unix.Unlinkat(int(dir.Fd()), name, unix.AT_REMOVEDIR))
}

// removeError types what unlink(2) and rmdir(2) say.
func removeError(path string, err error) error {
	if errors.Is(err, unix.EBUSY) {
		return &BusyError{What: fmt.Sprintf("%q", path), Err: err}
	}
	return step("remove", path, err)
}
