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
// roots reach there, as far as the system store itself says that it has it.
// Without that question a damaged personal path would be named in the plaintext
// directory of pins.
//
// On the way it forgets the rows of system paths that nothing of the keep reaches:
// every look at a system path leaves one, and the overlay's collector leaves more
// (seen with Nix 2.26 and 2.34). As long as there is a row, Nix calls the path
// valid without asking the system store, so it may neither stay unpinned nor be
// pinned for ever. One reading serves both: where Nix left a long log, reading is dear.
func (s *supervisor) needs(ctx context.Context) ([]string, error) {
	// A small garbage collection, by its rules: gc.lock is held exclusively, and
	// temporary roots count. While Nix holds the lock, nothing is forgotten.
	lock, err := os.OpenFile(filepath.Join(s.k.NixState(), "gc.lock"), os.O_RDWR|unix.O_NOFOLLOW, 0)
	none := errors.Is(err, os.ErrNotExist) // no Nix was here yet
	if err == nil {
		defer lock.Close()
		err = unix.Flock(int(lock.Fd()), unix.LOCK_EX|unix.LOCK_NB)
	}
	leaving := leavingKeep(s.k)
	g, reached, rerr := s.reach(ctx)
	if rerr != nil {
		return nil, rerr
	}
	var wanted, left []string
	for i, p := range g.Paths {
		switch {
		case g.Own[i] && !leaving[p]:
		case reached[i]:
			wanted = append(wanted, p)
		default:
			left = append(left, p)
		}
	}
	if err == nil {
		err = nixdb.Forget(ctx, filepath.Join(s.k.NixDB(), "db.sqlite"), left)
		lock.Close()
	}
	s.unforgotten.Store(err != nil && !none) // then it is done after the next change
	if len(wanted) == 0 {
		return nil, nil
	}
	// Pinned ones stay valid: only for others, and ones that are gone all the same,
	// is the system's daemon asked. Runs of the pinner follow one another.
	if !slices.Equal(wanted, s.pinned) || slices.ContainsFunc(wanted, func(p string) bool { return s.absent(filepath.Base(p)) }) {
		s.pinned = nil
		valid, err := s.valid(ctx, wanted)
		if err != nil {
			return nil, err
		}
		if len(valid) < len(wanted) {
			return minimal(g.Graph, valid), nil
		}
		s.pinned = wanted
	}
	return minimal(g.Graph, wanted), nil
}

// valid asks the system store which of the paths it has.
func (s *supervisor) valid(ctx context.Context, paths []string) ([]string, error) {
	c, err := lower.Dial(ctx, filepath.Join(s.k.SystemSocketDir(), "socket"))
	if err != nil {
		return nil, err
	}
	defer c.Close()
	return c.ValidPaths(ctx, paths)
}

// leavingKeep are the paths that a mover is about to take out of the upper layer. They
// are pinned before: a mover that is killed right after must not leave them to the
// system's collector.
func leavingKeep(k layout.Keep) map[string]bool {
	list, _ := os.ReadDir(k.Leaving())
	out := make(map[string]bool, len(list))
	for _, e := range list {
		out[filepath.Join(layout.NixStore, e.Name())] = true
	}
	return out
}

// reach reads the keep's graph and walks it from the keep's own paths, its
// gcroots and the temporary roots of running clients.
func (s *supervisor) reach(ctx context.Context) (g nixdb.Layered, reached []bool, err error) {
	db := filepath.Join(s.k.NixDB(), "db.sqlite")
	if _, err := os.Stat(db); errors.Is(err, os.ErrNotExist) {
		return g, nil, nil // nothing was ever built
	}
	// Roots before rows: a client roots a path first and asks for it then.
	roots := map[string]bool{}
	for _, p := range append(gcRoots(s.k.NixState()), tempRoots(s.k.NixState())...) {
		roots[p] = true
	}
	if g, err = nixdb.ReadLayered(ctx, db, s.k.Upper()); err != nil {
		return g, nil, err
	}
	return g, walk(g, roots), nil
}

// walk marks what is reached from the keep's own paths and from roots.
func walk(g nixdb.Layered, roots map[string]bool) []bool {
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
		if g.Own[i] || roots[p] {
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
	return seen
}

// tempRoots reads the temporary roots that clients of the personal daemon hold
// (gc.cc: one file a process, paths that end in a NUL). A file of a dead process
// counts, too: that keeps a row a little longer.
func tempRoots(state string) []string {
	files, _ := filepath.Glob(filepath.Join(state, "temproots", "*"))
	var out []string
	for _, f := range files {
		b, err := readSmall(f, 64<<20)
		if err != nil {
			continue
		}
		for _, p := range strings.Split(string(b), "\x00") {
			if strings.HasPrefix(p, layout.NixStore+"/") {
				out = append(out, p)
			}
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

// settle brings the pins up to date now, for whoever moved paths, and says "settled" or
// what it waits for.
func (s *supervisor) settle() string {
	ctx, done := context.WithTimeout(context.Background(), killGrace)
	defer done()
	switch r, err := s.pinner.Exact(ctx); {
	case err != nil:
		return "pins that could not be written"
	case r.Deferred > 0:
		return "a system collection"
	case s.unforgotten.Load():
		return "a personal collection"
	}
	return settled
}

// longLog is, in bytes, the write-ahead log that is worth a checkpoint: to read it takes
// some 20 ms, each time that somebody looks at the keep's database.
const longLog = 16 << 20

// pinPause is how long the database is left alone after a change, pinAgain when
// pins that could not be brought up to date are tried again.
const (
	pinPause = time.Second
	pinAgain = 3 * time.Second
)

// watchPins brings the pins up to date after every change of the keep's database,
// and records the origins of what is new.
func (s *supervisor) watchPins(ctx context.Context) {
	if err := os.Mkdir(s.k.NixDB(), 0o755); err != nil && !errors.Is(err, os.ErrExist) {
		return
	}
	_ = os.Chmod(s.k.NixDB(), 0o755) // whatever our umask, as Nix itself would have made it
	changes, err := nixdb.Watch(ctx, s.k.NixDB())
	if err != nil {
		return
	}
	<-changes // comes at once; start has done what it asks for
	var again <-chan time.Time
	origins := newOrigins(s.k)
	for {
		select {
		case _, ok := <-changes:
			if !ok {
				return
			}
			s.changed.Store(true)
			// A build writes many times. Its connection holds temporary roots until the
			// pins are written anyway; this is for what outlives it by a power cut.
			if sleep(ctx, pinPause) != nil {
				continue // to the end of the channel, which the watch itself closes
			}
		case <-again:
		}
		again = nil
		s.changed.Store(false)
		// Removals wait while the system's collector runs.
		if r, err := s.pinner.Exact(ctx); err != nil || r.Deferred > 0 || s.unforgotten.Load() {
			s.changed.Store(true)
			again = time.After(pinAgain)
		}
		origins.record(ctx)
		_ = nixdb.Checkpoint(ctx, filepath.Join(s.k.NixDB(), "db.sqlite"), longLog)
	}
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
	defer func() { go f.Close() }() // takes the kernel a while, see nixdb.Watch
	dir := fmt.Sprintf("/proc/self/fd/%d", s.lowerDir.Fd())
	wd, err := unix.InotifyAddWatch(fd, dir, unix.IN_CREATE|unix.IN_MOVED_TO|unix.IN_DELETE|unix.IN_MOVED_FROM|unix.IN_ONLYDIR)
	if err != nil {
		return
	}
	defer unix.InotifyRmWatch(fd, uint32(wd))
	stop := context.AfterFunc(ctx, func() { _ = f.SetReadDeadline(time.Unix(1, 0)) })
	defer stop()
	buf := make([]byte, 64<<10)
	for {
		n, err := f.Read(buf)
		if err != nil {
			return
		}
		names, lost := inotifyNames(buf[:n])
		if ctx.Err() != nil {
			return // the view is about to go, and with it the mount to be remounted
		}
		if lost || slices.ContainsFunc(names, func(name string) bool { return s.outdated(dir, name) }) {
			_ = view.Remount() // forgets them all
		}
	}
}

// outdated reports whether the merged store may show a name of the system store other
// than it is there now. What the upper layer has may have come there behind the
// overlay's back, by a mover that was killed before it could remount: then the overlay
// still shows what the system store had, and now has not.
func (s *supervisor) outdated(lower, name string) bool {
	there := func(dir string) bool {
		_, err := os.Lstat(filepath.Join(dir, name))
		return err == nil
	}
	return there(s.k.Upper()) || there(layout.NixStore) != there(lower)
}

// absent reports whether the system store, below the overlay, has nothing of that
// name: what its database knows of such a path is not worth asking for.
func (s *supervisor) absent(name string) bool {
	var st unix.Stat_t
	return unix.Fstatat(int(s.lowerDir.Fd()), name, &st, unix.AT_SYMLINK_NOFOLLOW) == unix.ENOENT
}

// inotifyNames reads the names out of inotify(7) events, and whether events were
// lost.
func inotifyNames(b []byte) (out []string, lost bool) {
	for len(b) >= unix.SizeofInotifyEvent {
		mask := uint32(b[4]) | uint32(b[5])<<8 | uint32(b[6])<<16 | uint32(b[7])<<24
		lost = lost || mask&unix.IN_Q_OVERFLOW != 0
		n := int(uint32(b[12]) | uint32(b[13])<<8 | uint32(b[14])<<16 | uint32(b[15])<<24)
		if len(b) < unix.SizeofInotifyEvent+n {
			break
		}
		name := string(b[unix.SizeofInotifyEvent : unix.SizeofInotifyEvent+n])
		out = append(out, strings.TrimRight(name, "\x00"))
		b = b[unix.SizeofInotifyEvent+n:]
	}
	return out, lost
}
