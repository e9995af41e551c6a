package move

import (
	"context"
	"crypto/rand"
	"errors"
	"fmt"
	"os"
	"path/filepath"

	"golang.org/x/sys/unix"

	"overkeep/overlay/drv/storepath"
	"overkeep/overlay/gcroot"
	"overkeep/overlay/layout"
	"overkeep/overlay/nixdb"
	"overkeep/overlay/plan"
)

// Places is where a mover finds the two stores, seen from the keep's view.
type Places struct {
	Keep   layout.Keep
	Lower  *os.File // the system store below the overlay, in a mount that can be written
	Host   *os.File // the machine's root directory outside the view
	System string   // directory of the system's Nix, "/nix/var/nix"
	Links  gcroot.Mover
}

// Hooks are what a mover asks of others.
type Hooks struct {
	// Roots are all roots of the system store, as its own collector sees them now.
	Roots func(context.Context) ([]plan.Root, error)
	// Pin makes this keep's pins those that it needs now, and removes none.
	Pin func(context.Context) error
	// Settle makes this keep's pins exactly those that it needs now. It waits for a
	// collection of either store to end.
	Settle func(context.Context) error
	// Held are the store paths that the keep's gcroots and profiles lead to.
	Held func() []string
	// Remount makes the overlay forget what it remembers of both layers.
	Remount func() error
	// Progress, if not nil, is told now and then; it must not block.
	Progress func(Progress)
}

// Progress is how far an operation has come.
type Progress struct {
	Doing      string // in words
	Bytes      int64  // of NARs, verified and carried over
	TotalBytes int64
	Paths      int
	TotalPaths int
}

// World is both stores of one keep, open for one mover at a time.
type World struct {
	Places
	Hooks
	lock  *os.File
	upper *os.File
	store *os.File // parent of upper
}

// Open takes the journal's lock (ErrBusy) and opens the keep's directories. Close it.
func Open(p Places, h Hooks) (_ *World, err error) {
	w := &World{Places: p, Hooks: h}
	defer func() {
		if err != nil {
			w.Close()
		}
	}()
	// First what a lock that is under way has unmounted, or now cannot: the journal's
	// directory is made where there is none, and may not be made beneath the volume.
	if w.store, err = openDir(p.Keep.StoreDir()); err != nil {
		return nil, err
	}
	if w.lock, err = openJournals(w.journals()); err != nil {
		return nil, err
	}
	if w.upper, err = openDir(p.Keep.Upper()); err != nil {
		return nil, err
	}
	var st, un unix.Stat_t
	if err := unix.Fstat(int(w.upper.Fd()), &st); err != nil {
		return nil, err
	}
	if err := unix.Fstat(int(w.store.Fd()), &un); err != nil {
		return nil, err
	}
	if st.Dev != un.Dev {
		return nil, fmt.Errorf("%q is a mount of its own", p.Keep.Upper())
	}
	return w, nil
}

// Close lets another mover in.
func (w *World) Close() error {
	var errs []error
	for _, f := range []*os.File{w.upper, w.store, w.lock} {
		if f != nil {
			errs = append(errs, f.Close())
		}
	}
	return errors.Join(errs...)
}

func openDir(path string) (*os.File, error) {
	return os.OpenFile(path, os.O_RDONLY|unix.O_DIRECTORY|unix.O_NOFOLLOW, 0)
}

func (w *World) journals() string   { return w.Keep.Journal() }
func (w *World) systemDB() string   { return filepath.Join(w.System, "db/db.sqlite") }
func (w *World) personalDB() string { return filepath.Join(w.Keep.NixDB(), "db.sqlite") }
func (w *World) systemGC() string   { return filepath.Join(w.System, "gc.lock") }
func (w *World) personalGC() string { return filepath.Join(w.Keep.NixState(), "gc.lock") }

func (w *World) tell(p Progress) {
	if w.Progress != nil {
		w.Progress(p)
	}
}

// Names of directories that exist while a batch is under way.
const (
	incoming = "incoming" // beside the upper layer: being copied into the keep
	trash    = "trash"    // beside the upper layer: out of the store, being removed
)

// stageName ends the name of every stage.
const stageName = "-overkeep-moving"

// newStage names a directory in the system store for what is on its way in or out. It
// is a name as of a store path that is not valid, and tells nothing. Each collector
// knows what to do with such: the system's would remove it, but while we work we hold its
// lock; the personal one leaves alone what lies in the lower layer only. At any other
// name in the view it gives up, with "too short to be a valid store path"
// (local-overlay-store.cc, deleteStorePath).
func newStage() (string, error) {
	var b [20]byte
	if _, err := rand.Read(b[:]); err != nil {
		return "", err
	}
	return storepath.Base32(b[:]) + stageName, nil
}

// subdir opens a directory below dir, made if need be, of root's alone.
func subdir(dir *os.File, name string) (*os.File, error) {
	if err := again(func() error { return unix.Mkdirat(int(dir.Fd()), name, 0o700) }); err != nil && !errors.Is(err, unix.EEXIST) {
		return nil, err
	}
	return openAt(dir, name)
}

func openAt(dir *os.File, name string) (*os.File, error) {
	var fd int
	err := again(func() (err error) {
		fd, err = unix.Openat(int(dir.Fd()), name, unix.O_RDONLY|unix.O_DIRECTORY|unix.O_NOFOLLOW|unix.O_CLOEXEC, 0)
		return err
	})
	if err != nil {
		return nil, err
	}
	return os.NewFile(uintptr(fd), name), nil
}

// there reports whether dir has an entry of that name, of whatever kind.
func there(dir *os.File, name string) (bool, error) {
	var st unix.Stat_t
	err := unix.Fstatat(int(dir.Fd()), name, &st, unix.AT_SYMLINK_NOFOLLOW)
	if errors.Is(err, unix.ENOENT) {
		return false, nil
	}
	return err == nil, err
}

// opaque makes that the overlay takes a directory of the upper layer for itself alone
// (overlayfs.rst, "whiteouts and opaque directories"). While both layers have a path, it
// would else merge them, and note in the upper one that it was copied up (ovl_fix_origin):
// from then on it would not count as the keep's own.
func opaque(dir *os.File, name string) error {
	d, err := openAt(dir, name)
	if errors.Is(err, unix.ENOTDIR) || errors.Is(err, unix.ELOOP) || errors.Is(err, unix.ENOENT) {
		return nil // a file or link is never merged
	}
	if err != nil {
		return err
	}
	defer d.Close()
	if err := again(func() error { return unix.Fsetxattr(int(d.Fd()), "trusted.overlay.opaque", []byte("y"), 0) }); err != nil {
		return err
	}
	err = again(func() error { return unix.Fremovexattr(int(d.Fd()), "trusted.overlay.origin") })
	if errors.Is(err, unix.ENODATA) {
		return nil
	}
	return err
}

// rename moves an entry between two directories of one file system; with nothing
// there any more it has been done before.
func rename(from *os.File, name string, to *os.File, newName string) error {
	return again(func() error { return unix.Renameat(int(from.Fd()), name, int(to.Fd()), newName) })
}

// renameNew is rename to a name that must be free (EEXIST).
func renameNew(from *os.File, name string, to *os.File, newName string) error {
	return again(func() error {
		return unix.Renameat2(int(from.Fd()), name, int(to.Fd()), newName, unix.RENAME_NOREPLACE)
	})
}

func syncfs(f *os.File) error { return again(func() error { return unix.Syncfs(int(f.Fd())) }) }

func fsync(f *os.File) error { return again(func() error { return f.Sync() }) }

func base(path string) string { return filepath.Base(path) }

// valid tells which of paths have a row in a database that may not exist yet.
func valid(ctx context.Context, db string, paths []string) (map[string]nixdb.Info, error) {
	out := make(map[string]nixdb.Info, len(paths))
	if len(paths) == 0 {
		return out, nil
	}
	infos, _, err := nixdb.ReadInfos(ctx, db, paths)
	if errors.Is(err, nixdb.ErrMissing) {
		return out, nil
	}
	for _, i := range infos {
		out[i.Path] = i
	}
	return out, err
}
