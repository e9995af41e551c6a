package volume

import (
	"context"
	"errors"
	"fmt"
	"os"
	"path/filepath"

	"golang.org/x/sys/unix"

	"overkeep/crypt/secret"
)

// Open makes the content of the volume appear at the directory path at: it
// mounts FSImage if there is one, checks that the master key, the protector,
// the policy and the directory belong together, adds the key, and mounts. The
// mount has nodev, nosuid and noatime. The directory at is made (0700) if only
// its last element is missing; nothing may be mounted on it.
//
// What does not belong together is a *ForeignError, and no key was added. If a
// later step fails, the key is removed again, unless it was there before. The
// caller's master key is left as it is; all other copies are wiped.
func Open(ctx context.Context, s Spec, id ID, master *secret.Bytes, at string) (err error) {
	if err := errors.Join(s.check(false), id.check()); err != nil {
		return err
	}
	// The cheapest check first: a wrong key does not even mount FSImage.
	if got, err := ProtectorDescriptor(master); err != nil {
		return err
	} else if got != id.Protector {
		return &ForeignError{What: "protector of the master key", Want: id.Protector, Got: got}
	}
	var back undo
	defer func() {
		if err != nil {
			err = errors.Join(err, back.run())
		}
	}()
	attached, err := attachFS(ctx, s, id.Protector)
	if err != nil {
		return err
	}
	if attached {
		back.add(func() error { return detachForUndo(ctx, s) })
	}
	return openIn(ctx, s, id, master, at, &back)
}

// openIn is Open once the filesystem is there. Its fds are closed before the
// caller runs back: an fd of the directory would keep the key busy.
func openIn(ctx context.Context, s Spec, id ID, master *secret.Bytes, at string, back *undo) error {
	parent, err := s.openParent()
	if err != nil {
		return err
	}
	defer parent.Close()
	dir, err := s.openDir(parent)
	if err != nil {
		return err
	}
	defer dir.Close()
	if err := checkPolicy(live, dir, s.Dir, id.Policy); err != nil {
		return err
	}
	target, made, err := mountpoint(at)
	if made {
		back.add(func() error { return os.Remove(at) })
	}
	if err != nil {
		return err
	}
	defer target.Close()
	if s.Backend == Image { // its inode is known without the key
		inner := map[fileKey]bool{}
		if err := s.innerKeys(inner); err != nil {
			return err
		}
		if err := unattached(ctx, inner); err != nil {
			return err
		}
	}
	before, err := live.keyStatus(int(parent.Fd()), id.Policy)
	if err != nil {
		return step("ask for a key on the filesystem of", parent.Name(), err)
	}
	if err := ctx.Err(); err != nil {
		return err
	}
	if err := addKey(live, parent, id, master); err != nil {
		return err
	}
	if before != Present {
		back.add(func() error {
			ctx, cancel := context.WithTimeout(context.WithoutCancel(ctx), graceKey)
			defer cancel()
			return RemoveKeyWait(ctx, s, id)
		})
	}
	if s.Backend == Dir {
		return bind(dir, target)
	}
	img, err := openImage(dir)
	if err != nil {
		return err
	}
	defer img.Close()
	return mountImage(ctx, img, target)
}

// openImage opens the inner image: a regular file with one name.
func openImage(dir *os.File) (*os.File, error) {
	what := fmt.Sprintf("image in %q", dir.Name())
	f, err := openBeneath(dir, ImageName, unix.O_RDWR|unix.O_NONBLOCK)
	if err != nil {
		return nil, explainOpen(err, filepath.Join(dir.Name(), ImageName), what, "a regular file")
	}
	var st unix.Stat_t
	if err := unix.Fstat(int(f.Fd()), &st); err != nil {
		f.Close()
		return nil, err
	}
	if st.Mode&unix.S_IFMT != unix.S_IFREG || st.Nlink != 1 {
		f.Close()
		return nil, &ForeignError{What: what, Want: "a regular file with one name", Got: fmt.Sprintf("%s with %d names", kindOf(st.Mode), st.Nlink)}
	}
	return f, nil
}

// bind mounts the directory itself. A bind mount takes its flags only in a
// second call (mount(2), MS_BIND).
func bind(dir, target *os.File) error {
	crash("volume.open.mount")
	if err := unix.Mount(procFD(int(dir.Fd())), procFD(int(target.Fd())), "", unix.MS_BIND, ""); err != nil {
		return step("mount at", target.Name(), err)
	}
	err := unix.Mount("", target.Name(), "", unix.MS_BIND|unix.MS_REMOUNT|mountFlags, "")
	if err != nil {
		err = errors.Join(err, unix.Unmount(target.Name(), unix.UMOUNT_NOFOLLOW))
	}
	return step("mount at", target.Name(), err)
}
