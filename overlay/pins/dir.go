package pins

import (
	"context"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"strings"

	"golang.org/x/sys/unix"
)

var (
	// ErrUnsafeDir: the directory of pins is a symlink, not a directory,
	// another user's, or open to others' writing.
	ErrUnsafeDir = errors.New("unsafe directory for pins")
	// ErrNotStorePath: something wanted is not a path of the store. The text
	// has its position, not its name.
	ErrNotStorePath = errors.New("not a store path")
	// ErrForeign: a wanted pin's name is taken by something that is no pin.
	ErrForeign = errors.New("name of a pin is taken by something else")
)

// Dir is a directory of pins.
type Dir struct {
	// Path is absolute, such as /nix/var/nix/gcroots/overkeep/KEEP. The last
	// two elements are made if they are missing, mode 0700.
	Path string
	// GCLock is the system store's gc.lock. Pins are removed only while it is
	// held shared: a running collector may have read the directory before a
	// new pin and reach an old one after it is gone, and see neither.
	// Empty: pins are removed at any time, which only tests should do.
	GCLock string
	// StoreDir is where pins point; default /nix/store.
	StoreDir string
}

// Result counts what a call did.
type Result struct {
	Added, Removed, Kept int
	// Deferred pins are not needed any more, but a collection was running.
	Deferred int
	// Foreign entries were found and left alone.
	Foreign int
}

// Sync makes the pins exactly those of want (store paths). Where want can
// change meanwhile, use a Pinner.
func (d Dir) Sync(ctx context.Context, want []string) (Result, error) {
	return d.apply(ctx, fixed(want), true)
}

// Add makes the pins of want and removes none.
func (d Dir) Add(ctx context.Context, want []string) (Result, error) {
	return d.apply(ctx, fixed(want), false)
}

func fixed(want []string) func(context.Context) ([]string, error) {
	return func(context.Context) ([]string, error) { return want, nil }
}

// List returns the store paths that are pinned, sorted.
func (d Dir) List(ctx context.Context) ([]string, error) {
	h, err := d.open(ctx)
	if err != nil {
		return nil, err
	}
	defer h.Close()
	have, _, _, err := d.read(h)
	names, _ := Plan(have, nil)
	for i := range names {
		names[i] = d.store() + "/" + names[i]
	}
	return names, err
}

func (d Dir) store() string {
	if d.StoreDir == "" {
		return "/nix/store"
	}
	return d.StoreDir
}

// apply asks needs with the directory locked, so that of two callers, also in
// two processes, the later one has the later list.
func (d Dir) apply(ctx context.Context, needs func(context.Context) ([]string, error), exact bool) (Result, error) {
	var res Result
	if err := ctx.Err(); err != nil {
		return res, err
	}
	h, err := d.open(ctx)
	if err != nil {
		return res, err
	}
	defer h.Close()
	want, err := needs(ctx)
	if err != nil {
		return res, err
	}
	names := make([]string, len(want))
	for i, p := range want {
		var ok bool
		if names[i], ok = base(d.store(), p); !ok {
			return res, fmt.Errorf("pin %d of %d: %w", i+1, len(want), ErrNotStorePath)
		}
	}
	have, stale, foreign, err := d.read(h)
	if err != nil {
		return res, err
	}
	add, remove := Plan(names, have)
	res.Foreign = len(stale) + foreign
	res.Kept = len(have) - len(remove)
	for _, name := range add {
		if err := ctx.Err(); err != nil {
			return res, err
		}
		if stale[name] { // a symlink with our name that pins nothing of ours
			if err := unix.Unlinkat(int(h.Fd()), name, 0); err != nil {
				return res, d.failed("replace", err)
			}
			res.Foreign--
		}
		if err := unix.Symlinkat(d.store()+"/"+name, int(h.Fd()), name); err != nil {
			if errors.Is(err, unix.EEXIST) {
				err = ErrForeign
			}
			return res, d.failed("add", err)
		}
		res.Added++
	}
	// Always, not only after an addition: what a killed process left is not yet
	// known to be on disk.
	if err := h.Sync(); err != nil {
		return res, d.failed("sync", err)
	}
	if !exact {
		res.Kept += len(remove)
		return res, nil
	}
	if len(remove) == 0 {
		return res, nil
	}
	release, free, err := d.noCollection()
	if err != nil {
		return res, err
	}
	if !free {
		res.Deferred = len(remove)
		return res, nil
	}
	defer release()
	for _, name := range remove {
		if err := ctx.Err(); err != nil {
			return res, err
		}
		if err := unix.Unlinkat(int(h.Fd()), name, 0); err != nil && !errors.Is(err, unix.ENOENT) {
			return res, d.failed("remove", err)
		}
		res.Removed++
	}
	if err := h.Sync(); err != nil {
		return res, d.failed("sync", err)
	}
	return res, nil
}

// failed names the directory and the step, never the pin.
func (d Dir) failed(step string, err error) error {
	return fmt.Errorf("%s pins in %q: %w", step, d.Path, err)
}

// open returns the directory, made if need be, checked, and locked against
// other users of this package (flock on the directory itself).
func (d Dir) open(ctx context.Context) (*os.File, error) {
	if !filepath.IsAbs(d.Path) || filepath.Clean(d.Path) != d.Path || strings.Count(d.Path, "/") < 3 {
		return nil, fmt.Errorf("%w: %q is not a clean absolute path", ErrUnsafeDir, d.Path)
	}
	parent, name := filepath.Split(d.Path)
	top, mid := filepath.Split(filepath.Clean(parent))
	fd, err := unix.Open(top, unix.O_DIRECTORY|unix.O_RDONLY|unix.O_CLOEXEC, 0)
	if err != nil {
		return nil, fmt.Errorf("open %q: %w", top, err)
	}
	for _, elem := range []string{mid, name} {
		sub, err := openSub(fd, elem)
		_ = unix.Close(fd)
		if err != nil {
			if errors.Is(err, unix.ELOOP) || errors.Is(err, unix.ENOTDIR) {
				err = fmt.Errorf("%w: %q", ErrUnsafeDir, elem)
			}
			return nil, fmt.Errorf("open %q: %w", d.Path, err)
		}
		fd = sub
	}
	h := os.NewFile(uintptr(fd), d.Path)
	if err := lockDir(ctx, fd); err != nil {
		_ = h.Close()
		return nil, d.failed("lock", err)
	}
	return h, nil
}

// openSub opens elem in the directory dir, making it if it is missing.
func openSub(dir int, elem string) (int, error) {
	made := unix.Mkdirat(dir, elem, 0o700)
	if made != nil && !errors.Is(made, unix.EEXIST) {
		return -1, made
	}
	if made == nil {
		if err := unix.Fsync(dir); err != nil {
			return -1, err
		}
	}
	fd, err := unix.Openat(dir, elem, unix.O_DIRECTORY|unix.O_NOFOLLOW|unix.O_RDONLY|unix.O_CLOEXEC, 0)
	if err != nil {
		return -1, err
	}
	var st unix.Stat_t
	if err := unix.Fstat(fd, &st); err != nil {
		_ = unix.Close(fd)
		return -1, err
	}
	if st.Mode&0o022 != 0 || st.Uid != uint32(os.Geteuid()) {
		_ = unix.Close(fd)
		return -1, fmt.Errorf("%w: %q belongs to uid %d with mode %#o", ErrUnsafeDir, elem, st.Uid, st.Mode&0o7777)
	}
	return fd, nil
}

// read sorts the entries: pins; symlinks named like a pin that point
// elsewhere; how many others.
func (d Dir) read(h *os.File) (have []string, stale map[string]bool, foreign int, err error) {
	entries, err := h.ReadDir(-1)
	if err != nil {
		return nil, nil, 0, d.failed("read", err)
	}
	stale = map[string]bool{}
	buf := make([]byte, 4096)
	for _, e := range entries {
		if e.Type() != os.ModeSymlink || !pinName(e.Name()) {
			foreign++
			continue
		}
		n, err := unix.Readlinkat(int(h.Fd()), e.Name(), buf)
		switch {
		case err != nil:
			return nil, nil, 0, d.failed("read", err)
		case string(buf[:n]) == d.store()+"/"+e.Name():
			have = append(have, e.Name())
		default:
			stale[e.Name()] = true
		}
	}
	return have, stale, foreign, nil
}

// noCollection takes gc.lock shared if no collector holds it (flock(2), as
// Nix's pathlocks.cc). It does not wait: a pin more does no harm.
func (d Dir) noCollection() (release func(), free bool, err error) {
	if d.GCLock == "" {
		return func() {}, true, nil
	}
	fd, err := unix.Open(d.GCLock, unix.O_RDWR|unix.O_CREAT|unix.O_CLOEXEC|unix.O_NOFOLLOW, 0o600)
	if err != nil {
		return nil, false, fmt.Errorf("open the collector's lock: %w", err)
	}
	release = func() { _ = unix.Close(fd) }
	if err := unix.Flock(fd, unix.LOCK_SH|unix.LOCK_NB); err != nil {
		release()
		if errors.Is(err, unix.EWOULDBLOCK) {
			return nil, false, nil
		}
		return nil, false, fmt.Errorf("share the collector's lock: %w", err)
	}
	return release, true, nil
}
