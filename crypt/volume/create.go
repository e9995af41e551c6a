package volume

import (
	"context"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"strings"

	"github.com/google/fscrypt/actions"
	"github.com/google/fscrypt/crypto"
	"github.com/google/fscrypt/filesystem"
	"github.com/google/fscrypt/metadata"
	"golang.org/x/sys/unix"

	"overkeep/crypt/secret"
)

// Create makes a volume and leaves it closed: no key in the kernel, nothing
// mounted. Neither Dir nor FSImage may exist. On the filesystem of Dir it sets
// up fscrypt's metadata if there is none (writable by root alone), a raw_key
// protector of the given name whose raw key is the master key, and a v2 policy.
//
// A failure takes back all that was made; what could not be taken back is in
// the error. A Create that was killed leaves its pieces to Cleanup: write down
// ProtectorDescriptor(master) before you call. A filesystem that cannot encrypt
// is an *UnsupportedError.
func Create(ctx context.Context, s Spec, master *secret.Bytes, name string) (_ ID, err error) {
	if err := s.check(true); err != nil {
		return ID{}, err
	}
	if name == "" || len(name) > 255 || strings.ContainsFunc(name, func(r rune) bool { return r < ' ' || r == 0x7f }) {
		return ID{}, fmt.Errorf("volume: protector name %q", name)
	}
	protector, err := ProtectorDescriptor(master)
	if err != nil {
		return ID{}, err
	}
	var back undo
	defer func() {
		if err != nil {
			err = errors.Join(err, back.run())
		}
	}()
	if s.FSImage != "" {
		if on, err := isMountRoot(s.FSMount); err != nil {
			return ID{}, err
		} else if on {
			return ID{}, &ExistsError{What: fmt.Sprintf("a mount at %q", s.FSMount)}
		}
		crash("volume.create.fsimage")
		if err := createFSImage(ctx, s, protector); err != nil {
			return ID{}, err
		}
		back.add(func() error { return removeFSImage(s, protector) })
		crash("volume.create.attach")
		_, existed := os.Lstat(s.FSMount)
		if _, err := attachFS(ctx, s, protector); err != nil {
			return ID{}, err
		}
		back.add(func() error {
			err := detachForUndo(ctx, s)
			if existed != nil {
				err = errors.Join(err, os.Remove(s.FSMount))
			}
			return err
		})
	}
	policy, err := createIn(ctx, s, protector, master, name, &back)
	if err != nil {
		return ID{}, err
	}
	id := ID{Protector: protector, Policy: policy}
	if err := ProveLocked(s, id); err != nil {
		return ID{}, err
	}
	if err := DetachFS(ctx, s); err != nil {
		return ID{}, err
	}
	return id, nil
}

func detachForUndo(ctx context.Context, s Spec) error {
	ctx, cancel := context.WithTimeout(context.WithoutCancel(ctx), graceUndo)
	defer cancel()
	return DetachFS(ctx, s)
}

// createIn makes metadata, directory and image, and returns the policy. Its fds
// are closed before the caller runs back.
func createIn(ctx context.Context, s Spec, protector string, master *secret.Bytes, name string, back *undo) (string, error) {
	parent, err := s.openParent()
	if err != nil {
		return "", err
	}
	defer parent.Close()
	if err := unix.Fstatat(int(parent.Fd()), filepath.Base(s.Dir), new(unix.Stat_t), unix.AT_SYMLINK_NOFOLLOW); err == nil {
		return "", &ExistsError{What: fmt.Sprintf("%q", s.Dir)}
	}
	m, err := filesystemOf(parent)
	if err != nil {
		return "", err
	}
	if err := supported(parent); err != nil {
		return "", err
	}
	if err := setup(m, back); err != nil {
		return "", err
	}
	policy, err := createMetadata(m, protector, master, name, back)
	if err != nil {
		return "", err
	}
	if err := ctx.Err(); err != nil {
		return "", err
	}
	id := ID{Protector: protector, Policy: policy}
	crash("volume.create.directory")
	if err := unix.Mkdirat(int(parent.Fd()), filepath.Base(s.Dir), 0o700); err != nil {
		return "", step("make", s.Dir, err)
	}
	back.add(func() error { return removeTreeAt(s) })
	if err := encrypt(live, s, parent, id); err != nil {
		return "", err
	}
	if s.Backend == Dir {
		return policy, nil
	}
	back.add(func() error {
		ctx, cancel := context.WithTimeout(context.WithoutCancel(ctx), graceKey)
		defer cancel()
		return RemoveKeyWait(ctx, s, id)
	})
	if err := addKey(live, parent, id, master); err != nil {
		return "", err
	}
	if err := createImage(ctx, s, parent); err != nil {
		return "", err
	}
	ctx, cancel := context.WithTimeout(ctx, graceKey)
	defer cancel()
	return policy, removeKeyWait(ctx, live, parent, id)
}

// supported asks, without writing anything, whether the filesystem of dir takes
// policies.
func supported(dir *os.File) error {
	var errno unix.Errno
	err := metadata.CheckSupport(procFD(int(dir.Fd())))
	switch {
	case errors.Is(err, metadata.ErrEncryptionNotSupported):
		errno = unix.ENOTTY
	case errors.Is(err, metadata.ErrEncryptionNotEnabled):
		errno = unix.EOPNOTSUPP
	default:
		return err
	}
	return unsupported(dir, errno)
}

// setup makes .fscrypt at the root of the filesystem, as "fscrypt setup" does.
// It is taken back by rmdir: another volume may have begun to use it.
func setup(m *filesystem.Mount, back *undo) error {
	err := m.CheckSetup(nil)
	if missing := (*filesystem.ErrNotSetup)(nil); !errors.As(err, &missing) {
		return err
	}
	crash("volume.create.setup")
	if err := m.Setup(filesystem.SingleUserWritable); err != nil {
		return step("set up fscrypt on", m.Path, err)
	}
	back.add(func() error {
		return errors.Join(os.Remove(m.ProtectorDir()), os.Remove(m.PolicyDir()), os.Remove(m.BaseDir()))
	})
	return syncDir(m.Path)
}

// createMetadata writes protector and policy, and returns the policy.
func createMetadata(m *filesystem.Mount, protector string, master *secret.Bytes, name string, back *undo) (string, error) {
	if err := freeProtector(m, protector, name); err != nil {
		return "", err
	}
	wk, err := wrappingKey(master)
	if err != nil {
		return "", err
	}
	defer wk.Wipe()
	pk, err := protectorKey(master)
	if err != nil {
		return "", err
	}
	defer pk.Wipe()
	wrapped, err := crypto.Wrap(wk, pk)
	if err != nil {
		return "", err
	}
	crash("volume.create.protector")
	err = m.AddProtector(&metadata.ProtectorData{
		ProtectorDescriptor: protector, Source: metadata.SourceType_raw_key, Name: name, WrappedKey: wrapped,
	}, nil)
	if err != nil {
		return "", step("write a protector on", m.Path, err)
	}
	back.add(func() error { return removeProtector(m, protector) })

	crash("volume.create.policy")
	ctx := actionsContext(m)
	p, err := actions.GetProtector(ctx, protector)
	if err != nil {
		return "", err
	}
	defer p.Lock()
	if err := p.Unlock(once(master)); err != nil {
		return "", err
	}
	policy, err := actions.CreatePolicy(ctx, p)
	if err != nil {
		return "", step("write a policy on", m.Path, err)
	}
	defer policy.Lock()
	back.add(policy.Destroy)
	return policy.Descriptor(), nil
}

// actionsContext is what fscrypt reads from /etc/fscrypt.conf, without it.
func actionsContext(m *filesystem.Mount) *actions.Context {
	return &actions.Context{
		Config: &metadata.Config{
			Source: metadata.SourceType_raw_key,
			Options: &metadata.EncryptionOptions{
				Padding:       32,
				Contents:      metadata.EncryptionOptions_AES_256_XTS,
				Filenames:     metadata.EncryptionOptions_AES_256_CTS,
				PolicyVersion: 2,
			},
		},
		Mount:      m,
		TargetUser: rootUser,
	}
}

// once hands out the master key. fscrypt asks again for as long as the key is
// wrong, so a second question is answered with an error.
func once(master *secret.Bytes) actions.KeyFunc {
	return func(_ actions.ProtectorInfo, retry bool) (*crypto.Key, error) {
		if retry {
			return nil, crypto.ErrBadAuth
		}
		return wrappingKey(master)
	}
}

// freeProtector sees that neither the protector nor its name is in use; the
// stock tool lists protectors by name.
func freeProtector(m *filesystem.Mount, protector, name string) error {
	all, err := m.ListProtectors(nil)
	if err != nil {
		return err
	}
	for _, d := range all {
		p, err := m.GetRegularProtector(d, nil)
		if d == protector || err == nil && p.Name == name {
			return &ExistsError{What: fmt.Sprintf("protector %s (%q) on %q", d, p.GetName(), m.Path)}
		}
	}
	return nil
}

// encrypt gives the new directory its policy, and makes that durable.
func encrypt(k kernel, s Spec, parent *os.File, id ID) error {
	d, err := s.openDir(parent)
	if err != nil {
		return err
	}
	defer d.Close()
	crash("volume.create.encrypt")
	if err := k.setPolicy(int(d.Fd()), id.Policy); err != nil {
		switch errnoOf(err) {
		case unix.ENOTTY, unix.EOPNOTSUPP, unix.EINVAL:
			return unsupported(parent, errnoOf(err))
		}
		return step("encrypt", s.Dir, err)
	}
	return errors.Join(d.Sync(), parent.Sync())
}

func createImage(ctx context.Context, s Spec, parent *os.File) error {
	d, err := s.openDir(parent)
	if err != nil {
		return err
	}
	defer d.Close()
	crash("volume.create.image")
	fd, err := unix.Openat(int(d.Fd()), ImageName, unix.O_CREAT|unix.O_EXCL|unix.O_RDWR|unix.O_NOFOLLOW|unix.O_CLOEXEC, 0o600)
	if err != nil {
		return step("make an image in", s.Dir, err)
	}
	f := os.NewFile(uintptr(fd), filepath.Join(s.Dir, ImageName))
	defer f.Close()
	crash("volume.create.mkfs")
	if err := newImage(ctx, f, s.Size, s.Preallocate, "-O", features); err != nil {
		return step("make an image in", s.Dir, err)
	}
	return d.Sync()
}

func syncDir(path string) error {
	d, err := os.Open(path)
	if err != nil {
		return err
	}
	return errors.Join(d.Sync(), d.Close())
}
