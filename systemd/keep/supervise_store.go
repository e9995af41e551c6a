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

// needs lists what the keep needs of the system store: rows of its database that
// do not lie in its upper layer, as far as the system store itself says that it
// has them. Without that question a damaged personal path would be named in the
// plaintext directory of pins.
func (s *supervisor) needs(ctx context.Context) ([]string, error) {
	db := filepath.Join(s.k.NixDB(), "db.sqlite")
	if _, err := os.Stat(db); errors.Is(err, os.ErrNotExist) {
		return nil, nil // nothing was ever built
	}
	rows, err := nixdb.LowerGraph(ctx, db, s.k.Upper())
	if err != nil || len(rows.Paths) == 0 {
		return nil, err
	}
	c, err := lower.Dial(ctx, filepath.Join(s.k.SystemSocketDir(), "socket"))
	if err != nil {
		return nil, err
	}
	defer c.Close()
	valid, err := c.ValidPaths(ctx, rows.Paths)
	if err != nil {
		return nil, err
	}
	return minimal(rows, valid), nil
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
