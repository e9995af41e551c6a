package gcroot

import (
	"crypto/sha1"
	"errors"
	"fmt"
	"path"
	"runtime"
	"strings"

	"golang.org/x/sys/unix"

	"overkeep/overlay/drv/storepath"
	"overkeep/overlay/layout"
	"overkeep/overlay/plan"
	"overkeep/overlay/view"
)

// ErrChanged: a link is not what it was when the plan was made: it leads elsewhere, is
// another's, or has gone.
var ErrChanged = errors.New("a root has changed")

// ErrTaken: where a link has to go is something else.
var ErrTaken = errors.New("the place of a root is taken")

// LinkError is an error at a link. Links are the user's and may be private: it must
// not get into a log outside of the keep.
type LinkError struct {
	Op, Link string
	Err      error
}

func (e *LinkError) Error() string { return fmt.Sprintf("%s %q: %v", e.Op, e.Link, e.Err) }
func (e *LinkError) Unwrap() error { return e.Err }

// Record is all that moving a root and taking that back needs. It names private
// paths: it belongs into the keep's journal.
type Record struct {
	Link string `json:"link"`           // on the host
	Text string `json:"text"`           // what it says
	Path string `json:"path"`           // the store path that it holds
	Auto string `json:"auto,omitempty"` // the entry of the system's gcroots/auto
	To   string `json:"to"`             // below the keep's volume
	UID  int    `json:"uid"`
	GID  int    `json:"gid"`

	// Profile is the link beside a generation of a profile that makes it the current one
	// ("profile" beside "profile-3-link"), by name; "": it is not. It is no root, and
	// names no store path: it stays outside, and gets a like in the keep.
	Profile string `json:"profile,omitempty"`
}

// Mover moves links of a user's between the host and the keep. It runs as root in the
// keep's view. The steps of a move, each of which may be repeated:
//
//	rec := Look(root)  changes nothing
//	Make(rec)          the link and its root in the keep, on disk when it returns
//	Remove(rec)        the old link and its root
//
// Restore(rec) and then Drop(rec) take a move back, from wherever it stands.
type Mover struct {
	Place
	Host string // HostRoot if empty
}

// Look finds a root as the plan has it. Errors are *LinkError, also of ErrChanged.
func (m Mover) Look(r plan.Root) (Record, error) {
	h, err := openHost(m.Host)
	if err != nil {
		return Record{}, err
	}
	defer h.close()
	rec := Record{Link: r.Link, Path: r.Path, Auto: r.Auto, To: r.To}
	wrong := func(err error) (Record, error) { return Record{}, &LinkError{"look at", r.Link, err} }
	if r.Kind != plan.RootUser || !path.IsAbs(r.Link) || !local(r.To) {
		return wrong(fmt.Errorf("%w: it does not move along", ErrChanged))
	}
	d, err := h.dir(r.Link)
	if err != nil {
		return wrong(gone(err))
	}
	defer unix.Close(d)
	var st unix.Stat_t
	if err := unix.Fstatat(d, path.Base(r.Link), &st, unix.AT_SYMLINK_NOFOLLOW); err != nil {
		return wrong(gone(err))
	}
	if rec.Text, err = readlinkat(d, path.Base(r.Link)); err != nil {
		return wrong(gone(err))
	}
	if int(st.Uid) != m.User.UID || !below(rec.Text, r.Path) {
		return wrong(ErrChanged)
	}
	rec.UID, rec.GID = int(st.Uid), int(st.Gid)
	if name := profileOf(path.Base(r.Link)); name != "" {
		if text, err := readlinkat(d, name); err == nil && text == path.Base(r.Link) {
			rec.Profile = name
		}
	}
	if r.Auto == "" {
		return rec, nil
	}
	a, err := h.autoDir()
	if err != nil {
		return wrong(err)
	}
	defer unix.Close(a)
	if text, err := readlinkat(a, path.Base(r.Auto)); err != nil || text != r.Link {
		return wrong(ErrChanged)
	}
	return rec, nil
}

// Theirs reports whether an error of Make, Remove, Restore or Drop is of what the link's
// user has made of its place: something else is there, or is on the way there, or has
// gone. It is the same when it is tried again.
func Theirs(err error) bool {
	for _, is := range []error{ErrChanged, ErrTaken, unix.ENOENT, unix.ENOTDIR, unix.ELOOP} {
		if errors.Is(err, is) {
			return true
		}
	}
	return false
}

func gone(err error) error {
	if errors.Is(err, unix.ENOENT) || errors.Is(err, unix.ENOTDIR) || errors.Is(err, unix.EINVAL) {
		return fmt.Errorf("%w: %w", ErrChanged, err)
	}
	return err
}

// local: a path below the volume that goes through no "..".
func local(to string) bool {
	return to != "" && path.Clean("/"+to) == "/"+to && strings.HasPrefix(to, "home/")
}

// Make makes the link in the keep and the entry by which the personal collector finds
// it. Both are on disk when it returns.
func (m Mover) Make(rec Record) error {
	k, err := openVolume(m.Keep.Volume())
	if err != nil {
		return err
	}
	defer unix.Close(k)
	home, rest, err := homeOf(k, rec.To)
	if err != nil {
		return &LinkError{"make in the keep", rec.To, err}
	}
	defer unix.Close(home)
	err = AsUser(m.User, func() error {
		d, err := makeDirs(home, path.Dir(rest))
		if err != nil {
			return err
		}
		defer unix.Close(d)
		if err := makeLink(rec.Text, d, path.Base(rec.To)); err != nil || !rec.current() {
			return err
		}
		// Another one that the keep has is its user's choice.
		if err := makeLink(path.Base(rec.To), d, rec.Profile); !errors.Is(err, ErrTaken) {
			return err
		}
		return nil
	})
	if err != nil {
		return &LinkError{"make in the keep", rec.To, err}
	}
	seen := m.Seen(rec.To)
	a, err := m.keepAuto(k, true)
	if err != nil {
		return &LinkError{"make a root of", seen, err}
	}
	defer unix.Close(a)
	if err := makeLink(seen, a, autoName(seen)); err != nil {
		return &LinkError{"make a root of", seen, err}
	}
	if _, err := retry(func() (int, error) { return 0, unix.Syncfs(a) }); err != nil {
		return &LinkError{"write out", seen, err}
	}
	return nil
}

// Remove takes the old link away, if it still is what was looked at, and its entry. The
// link's text, which names the store path, is freed on the disk and not overwritten:
// no file system offers that for links.
func (m Mover) Remove(rec Record) error {
	h, err := openHost(m.Host)
	if err != nil {
		return err
	}
	defer h.close()
	err = AsUser(m.User, func() error {
		d, err := h.dir(rec.Link)
		if errors.Is(err, unix.ENOENT) {
			return nil
		}
		if err != nil {
			return err
		}
		defer unix.Close(d)
		return removeLink(rec.Text, d, path.Base(rec.Link))
	})
	if err != nil {
		return &LinkError{"remove", rec.Link, err}
	}
	if rec.Auto == "" {
		return nil
	}
	a, err := h.autoDir()
	if err != nil {
		return err
	}
	defer unix.Close(a)
	if err := removeLink(rec.Link, a, path.Base(rec.Auto)); err != nil {
		return &LinkError{"remove the root of", rec.Link, err}
	}
	return nil
}

// Restore makes the old link again, and its entry: first the entry, so that no
// collection comes between. The directory of the link must be there.
func (m Mover) Restore(rec Record) error {
	h, err := openHost(m.Host)
	if err != nil {
		return err
	}
	defer h.close()
	if rec.Auto != "" {
		a, err := h.autoDir()
		if err != nil {
			return err
		}
		defer unix.Close(a)
		if err := makeLink(rec.Link, a, path.Base(rec.Auto)); err != nil {
			return &LinkError{"make the root of", rec.Link, err}
		}
		if _, err := retry(func() (int, error) { return 0, unix.Fsync(a) }); err != nil {
			return &LinkError{"write out the root of", rec.Link, err}
		}
	}
	err = AsUser(m.User, func() error {
		d, err := h.dir(rec.Link)
		if err != nil {
			return err
		}
		defer unix.Close(d)
		return makeLink(rec.Text, d, path.Base(rec.Link))
	})
	if err != nil {
		return &LinkError{"make", rec.Link, err}
	}
	return nil
}

// Drop removes the link in the keep, if it still is what was made, and its entry.
func (m Mover) Drop(rec Record) error {
	k, err := openVolume(m.Keep.Volume())
	if err != nil {
		return err
	}
	defer unix.Close(k)
	home, rest, err := homeOf(k, rec.To)
	if err != nil {
		return &LinkError{"remove from the keep", rec.To, err}
	}
	defer unix.Close(home)
	err = AsUser(m.User, func() error {
		d, err := openBeneath(home, path.Dir(rest))
		if errors.Is(err, unix.ENOENT) {
			return nil
		}
		if err != nil {
			return err
		}
		defer unix.Close(d)
		if rec.current() {
			if err := removeLink(path.Base(rec.To), d, rec.Profile); err != nil && !errors.Is(err, ErrChanged) {
				return err
			}
		}
		return removeLink(rec.Text, d, path.Base(rec.To))
	})
	if err != nil {
		return &LinkError{"remove from the keep", rec.To, err}
	}
	seen := m.Seen(rec.To)
	a, err := m.keepAuto(k, false)
	if errors.Is(err, unix.ENOENT) {
		return nil
	}
	if err == nil {
		defer unix.Close(a)
		err = removeLink(seen, a, autoName(seen))
	}
	if err != nil {
		return &LinkError{"remove the root of", seen, err}
	}
	return nil
}

// profileOf is the name of the profile that a link is a generation of (profiles.cc,
// makeName), or "".
func profileOf(link string) string {
	name, ok := strings.CutSuffix(link, "-link")
	at := strings.LastIndexByte(name, '-')
	if !ok || at <= 0 || at == len(name)-1 || strings.Trim(name[at+1:], "0123456789") != "" {
		return ""
	}
	return name[:at]
}

// current: the generation is the profile's, and goes to a place of that name.
func (r *Record) current() bool { return r.Profile != "" && profileOf(path.Base(r.To)) == r.Profile }

// makeLink makes a link, or finds it made.
func makeLink(text string, dir int, name string) error {
	_, err := retry(func() (int, error) { return 0, unix.Symlinkat(text, dir, name) })
	if !errors.Is(err, unix.EEXIST) {
		return err
	}
	if have, err := readlinkat(dir, name); err != nil || have != text {
		return ErrTaken
	}
	return nil
}

// removeLink removes a link that says text, or finds it gone.
func removeLink(text string, dir int, name string) error {
	have, err := readlinkat(dir, name)
	switch {
	case errors.Is(err, unix.ENOENT):
		return nil
	case errors.Is(err, unix.EINVAL) || err == nil && have != text:
		return ErrChanged
	case err != nil:
		return err
	}
	_, err = retry(func() (int, error) { return 0, unix.Unlinkat(dir, name, 0) })
	if errors.Is(err, unix.ENOENT) {
		return nil
	}
	return err
}

// autoName is the name that Nix gives the entry of a link in gcroots/auto
// (local-store/gc.cc, addIndirectRoot): the SHA-1 of its path in Nix's base 32.
func autoName(link string) string {
	sum := sha1.Sum([]byte(link))
	return storepath.Base32(sum[:])
}

// openVolume opens the keep's volume, which root mounted where root alone may go.
func openVolume(at string) (int, error) {
	fd, err := retry(func() (int, error) {
		return unix.Open(at, unix.O_PATH|unix.O_DIRECTORY|unix.O_CLOEXEC|unix.O_NOFOLLOW, 0)
	})
	if err != nil {
		return -1, &LinkError{"open the keep", at, err}
	}
	return fd, nil
}

// openBeneath opens a directory below another one, through no link.
func openBeneath(dir int, rel string) (int, error) {
	how := &unix.OpenHow{Flags: unix.O_PATH | unix.O_DIRECTORY | unix.O_CLOEXEC, Resolve: unix.RESOLVE_BENEATH | unix.RESOLVE_NO_SYMLINKS}
	return retry(func() (int, error) { return unix.Openat2(dir, rel, how) })
}

// homeOf opens the part of the volume in which the user's directories lie: the volume
// itself is root's. rest is where a link goes from there.
func homeOf(k int, to string) (fd int, rest string, err error) {
	if !local(to) {
		return -1, "", ErrTaken
	}
	fd, err = openBeneath(k, "home")
	return fd, strings.TrimPrefix(to, "home/"), err
}

func readlinkBeneath(dir int, rel string) (string, error) {
	d, err := openBeneath(dir, path.Dir(rel))
	if err != nil {
		return "", err
	}
	defer unix.Close(d)
	return readlinkat(d, path.Base(rel))
}

// makeDirs opens a directory below another one and makes what is missing of it.
func makeDirs(dir int, rel string) (int, error) {
	at, err := retry(func() (int, error) { return unix.Openat(dir, ".", unix.O_PATH|unix.O_DIRECTORY|unix.O_CLOEXEC, 0) })
	if err != nil {
		return -1, err
	}
	for name := range strings.SplitSeq(rel, "/") {
		next, err := openBeneath(at, name)
		if errors.Is(err, unix.ENOENT) {
			_, err = retry(func() (int, error) { return 0, unix.Mkdirat(at, name, 0o700) })
			if err == nil || errors.Is(err, unix.EEXIST) {
				next, err = openBeneath(at, name)
			}
		}
		unix.Close(at)
		if err != nil {
			return -1, err
		}
		at = next
	}
	return at, nil
}

// keepAuto opens the gcroots/auto of the keep, which is root's. Nix makes it with the
// first indirect root.
func (m Mover) keepAuto(k int, create bool) (int, error) {
	rel, _ := inside(m.Keep.NixState(), m.Keep.Volume())
	roots, err := openBeneath(k, path.Join(rel, path.Base(layout.NixGCRoots)))
	if err != nil {
		return -1, err
	}
	defer unix.Close(roots)
	if create {
		_, err := retry(func() (int, error) { return 0, unix.Mkdirat(roots, "auto", 0o755) })
		if err != nil && !errors.Is(err, unix.EEXIST) {
			return -1, err
		}
	}
	how := &unix.OpenHow{Flags: unix.O_RDONLY | unix.O_DIRECTORY | unix.O_CLOEXEC, Resolve: unix.RESOLVE_BENEATH | unix.RESOLVE_NO_SYMLINKS}
	return retry(func() (int, error) { return unix.Openat2(roots, "auto", how) })
}

// AsUser runs f with a user's rights on files, on a thread that runs nothing else and
// dies with them. Only files that f opens itself are opened with these rights.
func AsUser(u view.User, f func() error) error {
	done := make(chan error, 1)
	go func() {
		runtime.LockOSThread() // never unlocked
		if err := become(u); err != nil {
			done <- err
			return
		}
		done <- f()
	}()
	return <-done
}

// become takes on the user's rights for this thread. setfsuid(2) drops root's right to
// pass over permissions with it (capabilities(7)).
func become(u view.User) error {
	// Per thread, by raw call: the C library's setgroups would change the whole process
	// (nptl(7)).
	if _, _, e := unix.RawSyscall(unix.SYS_SETGROUPS, 0, 0, 0); e != 0 {
		return e
	}
	_ = unix.Setfsgid(u.GID)
	_ = unix.Setfsuid(u.UID)
	// setfsuid has no error: ask again what is in force.
	if uid, _ := unix.SetfsuidRetUid(-1); uid != u.UID {
		return fmt.Errorf("cannot take on uid %d", u.UID)
	}
	return nil
}
