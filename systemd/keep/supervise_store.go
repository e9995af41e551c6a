package keep

import (
	"context"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"time"

	"golang.org/x/sys/unix"

	"overkeep/overlay/layout"
	"overkeep/overlay/lower"
	"overkeep/overlay/nixdb"
	"overkeep/overlay/pins"
	"overkeep/overlay/view"
)

// What the supervisor does between the two stores: pins, and what the overlay
// remembers of the system store.

// needs lists what the keep needs of the system store: what its own paths and its
// gcroots reach there, as far as the system store itself says that it has it.
//
// A row in the keep's database is no need: every look at a system path leaves one,
// and the overlay's collector leaves more (seen with Nix 2.26 and 2.34). And
// without the question to the system store a damaged personal path would be named
// in the plaintext directory of pins.
func (s *supervisor) needs(ctx context.Context) ([]string, error) {
	db := filepath.Join(s.k.NixDB(), "db.sqlite")
	if _, err := os.Stat(db); errors.Is(err, os.ErrNotExist) {
		return nil, nil // nothing was ever built
	}
	d, err := nixdb.Open(ctx, db)
	if err != nil {
		return nil, err
	}
	g, err := d.Graph(ctx, nil)
	d.Close()
	if err != nil {
		return nil, err
	}
	mine, err := upperNames(s.k.Upper())
	if err != nil {
		return nil, err
	}
	for _, p := range gcRoots(s.k.NixState()) {
		mine.roots[p] = true
	}
	wanted := mine.reach(g)
	if len(wanted) == 0 {
		return nil, nil
	}
	c, err := lower.Dial(ctx, filepath.Join(s.k.SystemSocketDir(), "socket"))
	if err != nil {
		return nil, err
	}
	defer c.Close()
	valid, err := c.ValidPaths(ctx, wanted)
	if err != nil {
		return nil, err
	}
	return minimal(g, valid), nil
}

// own says where a walk of the references begins: at store paths of the upper
// layer, and at roots.
type own struct {
	upper map[string]bool // base names
	roots map[string]bool // store paths
}

func upperNames(dir string) (own, error) {
	entries, err := os.ReadDir(dir)
	if err != nil {
		return own{}, err
	}
	o := own{upper: map[string]bool{}, roots: map[string]bool{}}
	for _, e := range entries {
		if e.Type()&os.ModeCharDevice == 0 { // a whiteout is the absence of a path
			o.upper[e.Name()] = true
		}
	}
	return o, nil
}

// reach returns the paths of g that are reached and do not lie in the upper layer.
func (o own) reach(g nixdb.Graph) []string {
	next := make(map[int32][]int32)
	for _, r := range g.Refs {
		next[r[0]] = append(next[r[0]], r[1])
	}
	seen := make([]bool, len(g.Paths))
	var stack []int32
	visit := func(i int32) {
		if !seen[i] {
			seen[i] = true
			stack = append(stack, i)
		}
	}
	for i, p := range g.Paths {
		if o.upper[filepath.Base(p)] || o.roots[p] {
			visit(int32(i))
		}
	}
	for len(stack) > 0 {
		i := stack[len(stack)-1]
		stack = stack[:len(stack)-1]
		for _, j := range next[i] {
			visit(j)
		}
	}
	var out []string
	for i, p := range g.Paths {
		if seen[i] && !o.upper[filepath.Base(p)] {
			out = append(out, p)
		}
	}
	return out
}

// gcRoots returns the store paths that the links below a state directory's
// gcroots and profiles lead to, directly or by one link elsewhere, as Nix's
// collector follows them (gc.cc, findRoots).
func gcRoots(state string) []string {
	var out []string
	add := func(target string) bool {
		rest, ok := strings.CutPrefix(target, layout.NixStore+"/")
		if ok {
			base, _, _ := strings.Cut(rest, "/")
			out = append(out, layout.NixStore+"/"+base)
		}
		return ok
	}
	for _, dir := range []string{"gcroots", "profiles"} {
		_ = filepath.WalkDir(filepath.Join(state, dir), func(p string, e os.DirEntry, err error) error {
			if err != nil || e.Type() != os.ModeSymlink {
				return nil
			}
			target, err := os.Readlink(p)
			if err != nil || add(target) {
				return nil
			}
			if second, err := os.Readlink(target); err == nil && filepath.IsAbs(target) {
				add(second)
			}
			return nil
		})
	}
	return out
}

// minimal are the paths among valid that no other of them refers to: a root
// keeps what it refers to, and fewer roots tell less.
func minimal(g nixdb.Graph, valid []string) []string {
	old := make(map[string]int32, len(g.Paths))
	for i, p := range g.Paths {
		old[p] = int32(i)
	}
	now := make(map[int32]int32, len(valid)) // index in g to index in valid
	for i, p := range valid {
		now[old[p]] = int32(i)
	}
	var refs [][2]int32
	for _, r := range g.Refs {
		from, ok1 := now[r[0]]
		to, ok2 := now[r[1]]
		if ok1 && ok2 {
			refs = append(refs, [2]int32{from, to})
		}
	}
	return pins.Roots(valid, refs)
}

// settle is how long the database is left alone after a change, pinAgain when
// pins that could not be brought up to date are tried again.
const (
	settle   = time.Second
	pinAgain = 3 * time.Second
)

// watchPins brings the pins up to date after every change of the keep's database.
func (s *supervisor) watchPins(ctx context.Context) {
	if err := os.Mkdir(s.k.NixDB(), 0o755); err != nil && !errors.Is(err, os.ErrExist) {
		return
	}
	changes, err := nixdb.Watch(ctx, s.k.NixDB())
	if err != nil {
		return
	}
	var again <-chan time.Time
	for {
		select {
		case _, ok := <-changes:
			if !ok {
				return
			}
			// A build writes many times. Its connection holds temporary roots until the
			// pins are written anyway; this is for what outlives it by a power cut.
			if sleep(ctx, settle) != nil {
				continue // to the end of the channel, which the watch itself closes
			}
		case <-again:
		}
		again = nil
		s.whileNotCollecting(func() {
			// Removals wait while the system's collector runs.
			if r, err := s.pinner.Exact(ctx); err != nil || r.Deferred > 0 {
				again = time.After(pinAgain)
			}
		})
	}
}

// whileNotCollecting runs f while the personal collector is kept out, as Nix's
// own processes keep it out (gc.lock, shared): it copies the rows of the whole
// system store for its time, and all of it would be pinned.
func (s *supervisor) whileNotCollecting(f func()) {
	lock, err := os.OpenFile(filepath.Join(s.k.NixState(), "gc.lock"), os.O_RDWR|unix.O_NOFOLLOW, 0)
	if err == nil {
		defer lock.Close()
		for unix.Flock(int(lock.Fd()), unix.LOCK_SH) == unix.EINTR {
		}
	}
	f()
}

// watchLower remounts the overlay when it remembers of a name what is not true
// any more: missing, though the system store grew by it, or there, though the
// system's collector took it.
func (s *supervisor) watchLower(ctx context.Context) {
	fd, err := unix.InotifyInit1(unix.IN_CLOEXEC | unix.IN_NONBLOCK)
	if err != nil {
		return
	}
	f := os.NewFile(uintptr(fd), "inotify")
	defer f.Close()
	dir := fmt.Sprintf("/proc/self/fd/%d", s.lowerDir.Fd())
	if _, err := unix.InotifyAddWatch(fd, dir, unix.IN_CREATE|unix.IN_MOVED_TO|unix.IN_DELETE|unix.IN_MOVED_FROM|unix.IN_ONLYDIR); err != nil {
		return
	}
	go func() { <-ctx.Done(); f.Close() }()
	buf := make([]byte, 64<<10)
	for {
		n, err := f.Read(buf)
		if err != nil {
			return
		}
		if slices.ContainsFunc(inotifyNames(buf[:n]), func(name string) bool { return s.outdated(dir, name) }) {
			_ = view.Remount() // forgets them all
		}
	}
}

// outdated reports whether the merged store shows a name of the system store
// other than it is there now. What the upper layer has, it decides.
func (s *supervisor) outdated(lower, name string) bool {
	there := func(dir string) bool {
		_, err := os.Lstat(filepath.Join(dir, name))
		return err == nil
	}
	return !there(s.k.Upper()) && there(layout.NixStore) != there(lower)
}

// inotifyNames reads the names out of inotify(7) events.
func inotifyNames(b []byte) []string {
	var out []string
	for len(b) >= unix.SizeofInotifyEvent {
		n := int(uint32(b[12]) | uint32(b[13])<<8 | uint32(b[14])<<16 | uint32(b[15])<<24)
		if len(b) < unix.SizeofInotifyEvent+n {
			break
		}
		name := string(b[unix.SizeofInotifyEvent : unix.SizeofInotifyEvent+n])
		out = append(out, strings.TrimRight(name, "\x00"))
		b = b[unix.SizeofInotifyEvent+n:]
	}
	return out
}
