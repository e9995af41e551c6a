package keep

import (
	"context"
	"fmt"
	"os"
	"path/filepath"
	"time"

	"golang.org/x/sys/unix"

	"overkeep/overlay/layout"
	"overkeep/overlay/lower"
	"overkeep/overlay/view"
)

// What a process in the view reaches of the machine outside it: two descriptors that
// the supervisor holds, taken in the host's namespace before it entered the view.

// openStore opens the system store in a mount of its own that can be written, whatever
// the one at /nix/store is: NixOS mounts it read-only over itself, and Nix makes its
// own copy writable in the same way (local-store.cc, makeStoreWritable). open_tree(2)
// and mount_setattr(2) are there since Linux 5.12; before, it is the mount as it is.
func openStore() (*os.File, error) {
	fd, err := unix.OpenTree(unix.AT_FDCWD, layout.NixStore, unix.OPEN_TREE_CLONE|unix.OPEN_TREE_CLOEXEC)
	if err != nil {
		return os.Open(layout.NixStore)
	}
	defer unix.Close(fd)
	if err := unix.MountSetattr(fd, "", unix.AT_EMPTY_PATH, &unix.MountAttr{Attr_clr: unix.MOUNT_ATTR_RDONLY}); err != nil {
		return os.Open(layout.NixStore)
	}
	// The clone lives on as long as something in it is open.
	dir, err := unix.Openat(fd, ".", unix.O_RDONLY|unix.O_DIRECTORY|unix.O_CLOEXEC, 0)
	if err != nil {
		return nil, fmt.Errorf("open %q: %w", layout.NixStore, err)
	}
	return os.NewFile(uintptr(dir), layout.NixStore), nil
}

// openRoot opens the root directory, of which whoever has it can reach what lies under
// the mounts of the view.
func openRoot() (*os.File, error) {
	fd, err := unix.Open("/", unix.O_PATH|unix.O_DIRECTORY|unix.O_CLOEXEC, 0)
	if err != nil {
		return nil, err
	}
	return os.NewFile(uintptr(fd), "/"), nil
}

// Outside is the machine as it is outside of a keep's view.
type Outside struct {
	Store *os.File // the system store, in a mount that can be written
	Root  *os.File // the root directory, O_PATH
}

// Close closes both.
func (o *Outside) Close() {
	_ = o.Store.Close()
	_ = o.Root.Close()
}

// Outside opens both through the supervisor (proc_pid_fd(5)). This process lives in
// the view.
func (k *Keep) Outside() (*Outside, error) {
	if err := requireRoot(); err != nil {
		return nil, err
	}
	if err := k.InView(); err != nil {
		return nil, err
	}
	pid := supervisorPID(k.Keep)
	if pid == 0 {
		return nil, errorf(CodeLocked, k.Name, "keep %q is not wholly unlocked: it has no supervisor", k.Name)
	}
	store, err := os.OpenFile(fmt.Sprintf("/proc/%d/fd/%d", pid, fdLowerDir), os.O_RDONLY|unix.O_DIRECTORY, 0)
	if err != nil {
		return nil, err
	}
	root, err := os.OpenFile(fmt.Sprintf("/proc/%d/fd/%d", pid, fdHostRoot), unix.O_PATH|unix.O_DIRECTORY, 0)
	if err != nil {
		store.Close()
		return nil, err
	}
	return &Outside{store, root}, nil
}

// settled is the supervisor's answer when the pins are what the keep needs.
const settled = "settled"

// settleWait bounds how long pins wait for a collection of the system to end;
// settlePause is between two attempts.
const (
	settleWait  = 5 * time.Minute
	settlePause = 200 * time.Millisecond
)

// unfinished is the supervisor's answer when the journal of moves has no end.
const unfinished = "unfinished"

// MoveUnfinished reports whether a move was interrupted in an open keep and nobody has
// set it right yet. What cannot be asked is no.
func (k *Keep) MoveUnfinished() bool {
	answer, err := control(k.Keep, "journal")
	return err == nil && answer == unfinished
}

// Pin has the supervisor pin what the keep needs of the system store now, and
// remove no pin.
func (k *Keep) Pin(context.Context) error {
	answer, err := control(k.Keep, "pin")
	if err != nil {
		return errorf(CodeInternal, k.Name, "the supervisor of keep %q: %w", k.Name, err)
	}
	if answer != settled {
		return errorf(CodeInternal, k.Name, "the supervisor of keep %q has %s", k.Name, answer)
	}
	return nil
}

// Settle has the supervisor bring the pins up to date at once: what the keep does not
// need any more is not named outside of it when this returns.
func (k *Keep) Settle(ctx context.Context) error {
	for deadline := time.Now().Add(settleWait); ; {
		answer, err := control(k.Keep, "settle")
		if err != nil {
			return errorf(CodeInternal, k.Name, "the supervisor of keep %q: %w", k.Name, err)
		}
		if answer == settled {
			return nil
		}
		if time.Now().After(deadline) {
			return errorf(CodeBusyRun, k.Name, "pins of keep %q wait for a collection to end: %s", k.Name, answer)
		}
		if err := sleep(ctx, settlePause); err != nil {
			return err
		}
	}
}

// CreateDatabase makes the personal Nix create its database, which it does when
// the first client asks for anything.
func (k *Keep) CreateDatabase(ctx context.Context) error {
	if _, err := os.Stat(filepath.Join(k.NixDB(), "db.sqlite")); err == nil {
		return nil
	}
	c, err := lower.Dial(ctx, filepath.Join(k.SocketDir(), "socket"))
	if err != nil {
		return errorf(CodeNoNix, k.Name, "the nix-daemon of keep %q: %w", k.Name, err)
	}
	defer c.Close()
	if _, err := c.ValidPaths(ctx, nil); err != nil {
		return errorf(CodeNoNix, k.Name, "the nix-daemon of keep %q: %w", k.Name, err)
	}
	return nil
}

// User is the keep's user as the view is made for.
func (k *Keep) User() (view.User, error) { return k.Header.viewUser() }

// Held are the store paths that the keep's gcroots and profiles lead to. This process
// lives in the view.
func (k *Keep) Held() []string { return gcRoots(k.NixState()) }
