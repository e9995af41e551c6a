package gcroot

import (
	"context"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"os"
	"path"
	"strings"

	"golang.org/x/sys/unix"

	"overkeep/overlay/lower"
	"overkeep/overlay/plan"
)

// HostRoot is the root directory as the machine's first process sees it: in a view
// the user's directories are covered, and what lies beneath is what holds roots of the
// system store.
const HostRoot = "/proc/1/root"

// Finder finds the roots.
type Finder struct {
	Place
	Socket string // of the system's nix-daemon
	Host   string // HostRoot if empty
}

// maxAuto bounds the entries of gcroots/auto that are read.
const maxAuto = 4_000_000

// Find asks the daemon for its roots and classifies them, in its order. It must run as
// root, whom the daemon tells everything. A link that goes while it is looked at is
// nobody's known. Errors are those of lower.Dial and FindRoots, and *os.PathError.
func (f Finder) Find(ctx context.Context) ([]plan.Root, error) {
	c, err := lower.Dial(ctx, f.Socket)
	if err != nil {
		return nil, err
	}
	defer c.Close()
	found, err := c.FindRoots(ctx)
	if err != nil {
		return nil, err
	}
	h, err := openHost(f.Host)
	if err != nil {
		return nil, err
	}
	defer h.close()
	// Read after the roots: an entry that comes later is of a root that is not in the list.
	auto, err := h.auto(ctx)
	if err != nil {
		return nil, err
	}
	comms := map[string]string{}
	out := make([]plan.Root, 0, len(found))
	for _, r := range found {
		fact := Fact{Link: r.Link, Path: r.Path, Owner: -1, Auto: auto[r.Link]}
		if pid, kind := process(r.Link); kind != "" {
			name, known := comms[pid]
			if !known {
				name = comm(pid)
				comms[pid] = name
			}
			fact.Comm = name
		} else if path.IsAbs(r.Link) {
			fact.Owner = h.owner(r.Link)
		}
		root := Classify(f.Place, fact)
		if root.Kind == plan.RootUser {
			taken, err := f.taken(root)
			if err != nil {
				return nil, err
			}
			if fact.Taken = taken; taken {
				root = Classify(f.Place, fact)
			}
		}
		out = append(out, root)
	}
	if err := f.fixed(h, out); err != nil {
		return nil, err
	}
	return out, ctx.Err()
}

// fixed finds the links that their owner could not take away, because the directory
// is another's: such a root stays, so it is as good as somebody else's.
func (f Finder) fixed(h *host, roots []plan.Root) error {
	return AsUser(f.User, func() error {
		for i := range roots {
			if r := &roots[i]; r.Kind == plan.RootUser {
				d, err := h.dir(r.Link)
				if err == nil {
					// AT_EACCESS: by the rights on files that this thread has now.
					_, err = retry(func() (int, error) { return 0, unix.Faccessat(d, ".", unix.W_OK|unix.X_OK, unix.AT_EACCESS) })
					unix.Close(d)
				}
				if err != nil {
					*r = plan.Root{Link: r.Link, Path: r.Path, Kind: plan.RootOther}
				}
			}
		}
		return nil
	})
}

// taken reports whether the keep has something else at a root's place.
func (f Finder) taken(r plan.Root) (bool, error) {
	dir, err := openVolume(f.Keep.Volume())
	if err != nil {
		return false, err
	}
	defer unix.Close(dir)
	text, err := readlinkBeneath(dir, r.To)
	switch {
	case errors.Is(err, unix.ENOENT):
		return false, nil
	case err != nil: // no link, or something on the way that is no directory
		return true, nil
	}
	return !below(text, r.Path), nil
}

// comm is the name that a process gave itself, made fit to be shown.
func comm(pid string) string {
	b, err := os.ReadFile("/proc/" + pid + "/comm")
	if err != nil {
		return ""
	}
	return strings.Map(func(r rune) rune {
		if r < ' ' || r == 0x7f || r == '(' || r == ')' {
			return -1
		}
		return r
	}, strings.ToValidUTF8(strings.TrimSpace(string(b)), "?"))
}

// host is the root directory outside of the view.
type host struct{ fd int }

func openHost(at string) (*host, error) {
	if at == "" {
		at = HostRoot
	}
	fd, err := retry(func() (int, error) { return unix.Open(at, unix.O_PATH|unix.O_DIRECTORY|unix.O_CLOEXEC, 0) })
	if err != nil {
		return nil, &os.PathError{Op: "open", Path: at, Err: err}
	}
	return &host{fd}, nil
}

func (h *host) close() { _ = unix.Close(h.fd) }

// dir opens the directory that a link lies in. Links on the way are the user's
// business and lead nowhere outside of the host's root; magic ones nowhere at all.
func (h *host) dir(link string) (int, error) {
	how := &unix.OpenHow{Flags: unix.O_PATH | unix.O_DIRECTORY | unix.O_CLOEXEC, Resolve: unix.RESOLVE_IN_ROOT | unix.RESOLVE_NO_MAGICLINKS}
	return retry(func() (int, error) { return unix.Openat2(h.fd, path.Dir(link), how) })
}

// owner is the owner of a link, -1 if it is none.
func (h *host) owner(link string) int {
	d, err := h.dir(link)
	if err != nil {
		return -1
	}
	defer unix.Close(d)
	var st unix.Stat_t
	if err := unix.Fstatat(d, path.Base(link), &st, unix.AT_SYMLINK_NOFOLLOW); err != nil || st.Mode&unix.S_IFMT != unix.S_IFLNK {
		return -1
	}
	return int(st.Uid)
}

// auto maps links to the entry of gcroots/auto that leads to them. The directory is
// root's.
func (h *host) auto(ctx context.Context) (map[string]string, error) {
	fd, err := h.autoDir()
	if err != nil {
		if errors.Is(err, fs.ErrNotExist) {
			return nil, nil
		}
		return nil, err
	}
	d := os.NewFile(uintptr(fd), autoDir)
	defer d.Close()
	out := map[string]string{}
	for {
		names, err := d.Readdirnames(4096)
		for _, name := range names {
			target, err := readlinkat(fd, name)
			if err != nil {
				continue // gone, or no link
			}
			if old, twice := out[target]; !twice || name == autoName(target) && old != name {
				out[target] = name
			}
		}
		switch {
		case errors.Is(err, io.EOF):
			return out, nil
		case err != nil:
			return nil, err
		case len(out) > maxAuto:
			return nil, fmt.Errorf("%q: more than %d entries", autoDir, maxAuto)
		case ctx.Err() != nil:
			return nil, ctx.Err()
		}
	}
}

func (h *host) autoDir() (int, error) {
	how := &unix.OpenHow{Flags: unix.O_RDONLY | unix.O_DIRECTORY | unix.O_CLOEXEC, Resolve: unix.RESOLVE_IN_ROOT | unix.RESOLVE_NO_SYMLINKS}
	fd, err := retry(func() (int, error) { return unix.Openat2(h.fd, autoDir, how) })
	if err != nil {
		return -1, &os.PathError{Op: "open", Path: autoDir, Err: err}
	}
	return fd, nil
}

// readlinkat reads a link of at most PATH_MAX bytes.
func readlinkat(dir int, name string) (string, error) {
	b := make([]byte, unix.PathMax+1)
	n, err := retry(func() (int, error) { return unix.Readlinkat(dir, name, b) })
	if err != nil {
		return "", err
	}
	return string(b[:n]), nil
}

// retry calls f again where a signal came between. openat2(2) also says EAGAIN when
// somebody renamed on the way; a few times are enough for anybody but an attacker.
func retry[T any](f func() (T, error)) (T, error) {
	for again := 0; ; {
		v, err := f()
		switch {
		case errors.Is(err, unix.EINTR):
		case errors.Is(err, unix.EAGAIN) && again < 100:
			again++
		default:
			return v, err
		}
	}
}
