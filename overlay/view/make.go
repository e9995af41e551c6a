package view

import (
	"errors"
	"fmt"
	"io"
	"os"
	"path/filepath"
	"runtime"
	"slices"
	"strings"

	"github.com/moby/sys/mountinfo"
	"golang.org/x/sys/unix"

	"overkeep/overlay/layout"
)

// BusyError is a mount that cannot be unmounted because something uses it.
type BusyError struct{ Target string }

func (e *BusyError) Error() string { return fmt.Sprintf("mount %q is busy", e.Target) }

// MountPointError is a directory that cannot serve as a mount point.
type MountPointError struct{ Path, Reason string }

func (e *MountPointError) Error() string {
	return fmt.Sprintf("mount point %q %s", e.Path, e.Reason)
}

// Make carries out list in the calling process's mount namespace. When one
// mount fails those made before it are undone, and the error names the one.
func Make(list []Mount, u User) error {
	if slices.ContainsFunc(list, func(m Mount) bool { return m.AsUser }) {
		if err := checkHome(u); err != nil {
			return err
		}
	}
	mounts, err := table()
	if err != nil {
		return err
	}
	for i, m := range list {
		if m.Stays && mounts.has(m) {
			continue // from before the last lock
		}
		if err := makeOne(m, u); err != nil {
			if uerr := Undo(list[:i]); uerr != nil {
				err = errors.Join(err, uerr)
			}
			return fmt.Errorf("mount %s: %w", m.Target, err)
		}
	}
	return nil
}

// checkHome refuses a home that is not its user's: what is made in it would be
// somebody else's.
func checkHome(u User) error {
	var st unix.Stat_t
	if err := unix.Stat(u.Home, &st); err != nil {
		return &MountPointError{u.Home, "cannot be opened: " + err.Error()}
	}
	if st.Mode&unix.S_IFMT != unix.S_IFDIR || int(st.Uid) != u.UID {
		return &MountPointError{u.Home, "is not a home directory of " + u.Name + "'s own"}
	}
	return nil
}

// Table is the mount table of a namespace.
type Table []*mountinfo.Info

// table reads the mount table of the calling thread's namespace.
func table() (Table, error) {
	f, err := os.Open("/proc/thread-self/mountinfo")
	if err != nil {
		return nil, err
	}
	defer f.Close()
	return mountinfo.GetMountsFromReader(f, nil)
}

// Mounted reports for each mount of list whether it is there, in the calling
// thread's namespace, and is the view's own and not somebody else's at the same
// place.
func Mounted(list []Mount) ([]bool, error) {
	t, err := table()
	if err != nil {
		return nil, err
	}
	out := make([]bool, len(list))
	for i, m := range list {
		out[i] = t.has(m)
	}
	return out, nil
}

// has looks at the topmost mount at m's target.
func (t Table) has(m Mount) bool {
	var top *mountinfo.Info
	for _, i := range t {
		if i.Mountpoint == m.Target {
			top = i
		}
	}
	if top == nil {
		return false
	}
	if m.Kind == Overlay {
		return top.FSType == "overlay" && slices.Contains(strings.Split(top.VFSOptions, ","), m.Options[1])
	}
	if strings.HasPrefix(m.Source, "/nix/") {
		return true // bound aside below a directory of ours; its source is covered meanwhile
	}
	source, err1 := os.Stat(m.Source)
	target, err2 := os.Stat(m.Target)
	return err1 == nil && err2 == nil && os.SameFile(source, target)
}

// Inside reports whether the calling thread lives in the view of some keep.
func Inside() (bool, error) {
	k, err := Of()
	return k != nil, err
}

// Of is the keep in whose view the calling thread lives, by the mount itself: the
// environment may be gone (sudo) or somebody's. It is nil outside of a view.
func Of() (*layout.Keep, error) {
	t, err := table()
	if err != nil {
		return nil, err
	}
	return t.keep(), nil
}

// keep finds the topmost view.
func (t Table) keep() (found *layout.Keep) {
	for _, i := range t {
		if i.Mountpoint != layout.NixStore || i.FSType != "overlay" {
			continue
		}
		for _, o := range strings.Split(i.VFSOptions, ",") {
			upper, _ := strings.CutPrefix(o, "upperdir=")
			run, ok := strings.CutSuffix(upper, "/k/store/upper")
			root, under := strings.CutSuffix(filepath.Dir(run), "/run/overkeep")
			if !ok || !under {
				continue
			}
			if k, err := layout.New(root, filepath.Base(run)); err == nil && k.Upper() == upper {
				found = &k
			}
		}
	}
	return found
}

// Cover hides what the homes' mounts of list hid, in a namespace whose sessions
// outlive a lock, behind the empty directory at dir. Uncover takes it back. Both
// may be repeated.
func Cover(list []Mount, u User, dir string) error {
	t, err := table()
	if err != nil {
		return err
	}
	for _, m := range list {
		c := Mount{Kind: Bind, Source: dir, Target: m.Target, AsUser: true}
		if !m.AsUser || m.Sealed || t.has(c) {
			continue
		}
		if err := makeOne(c, u); err != nil {
			return fmt.Errorf("cover %s: %w", m.Target, err)
		}
	}
	return nil
}

// Uncover removes the covers that Cover made.
func Uncover(list []Mount, dir string) error {
	t, err := table()
	if err != nil {
		return err
	}
	for _, m := range list {
		if m.AsUser && !m.Sealed && t.has(Mount{Kind: Bind, Source: dir, Target: m.Target}) {
			if err := unix.Unmount(m.Target, unix.UMOUNT_NOFOLLOW); err != nil {
				return fmt.Errorf("uncover %s: %w", m.Target, err)
			}
		}
	}
	return nil
}

func makeOne(m Mount, u User) error {
	target, err := mountPoint(m, u)
	if err != nil {
		return err
	}
	defer unix.Close(target)
	if m.Kind == Overlay {
		return unix.Mount(m.Source, fmt.Sprintf("/proc/self/fd/%d", target), "overlay", m.Flags, strings.Join(m.Options, ","))
	}
	return bind(m, target)
}

// bind makes the mount complete before it appears, on the very directory that was
// checked: a second call by path (for the flags, mount(2)) would be led by whoever
// owns a directory on the way (open_tree(2), mount_setattr(2), Linux 5.12).
func bind(m Mount, target int) error {
	tree, err := unix.OpenTree(unix.AT_FDCWD, m.Source, unix.OPEN_TREE_CLONE|unix.OPEN_TREE_CLOEXEC|unix.AT_SYMLINK_NOFOLLOW)
	if err != nil {
		return err
	}
	defer unix.Close(tree)
	// Private: a bind is a peer of what it was made from, and what is mounted on the
	// source later, as the personal daemon's socket is, would appear in it, too.
	attr := unix.MountAttr{Propagation: unix.MS_PRIVATE}
	if m.Flags&unix.MS_NOSUID != 0 {
		attr.Attr_set |= unix.MOUNT_ATTR_NOSUID
	}
	if m.Flags&unix.MS_NODEV != 0 {
		attr.Attr_set |= unix.MOUNT_ATTR_NODEV
	}
	if err := unix.MountSetattr(tree, "", unix.AT_EMPTY_PATH, &attr); err != nil {
		return err
	}
	return unix.MoveMount(tree, "", target, "", unix.MOVE_MOUNT_F_EMPTY_PATH|unix.MOVE_MOUNT_T_EMPTY_PATH)
}

// mountPoint opens the directory that is to be mounted on, and checks it.
func mountPoint(m Mount, u User) (fd int, err error) {
	if m.AsUser {
		fd, err = userDir(m, u)
	} else {
		fd, err = unix.Open(m.Target, unix.O_PATH|unix.O_DIRECTORY|unix.O_NOFOLLOW|unix.O_CLOEXEC, 0)
	}
	if err != nil {
		var pe *MountPointError
		if errors.As(err, &pe) {
			return -1, err
		}
		return -1, &MountPointError{m.Target, "cannot be opened: " + err.Error()}
	}
	return fd, nil
}

// userDir opens (making it when missing) a directory in the user's home with
// the user's own rights, on a thread of its own that never runs anything else.
func userDir(m Mount, u User) (int, error) {
	type result struct {
		fd  int
		err error
	}
	ch := make(chan result, 1)
	go func() {
		runtime.LockOSThread() // not unlocked: the thread dies with its changed identity
		fd, err := openAsUser(m.Target, u)
		ch <- result{fd, err}
	}()
	r := <-ch
	if r.err != nil {
		return -1, r.err
	}
	if err := checkUserDir(r.fd, m, u); err != nil {
		unix.Close(r.fd)
		return -1, err
	}
	return r.fd, nil
}

func openAsUser(dir string, u User) (int, error) {
	// Per thread, by raw call: the C library's setgroups would change the whole
	// process (nptl(7)).
	if _, _, e := unix.RawSyscall(unix.SYS_SETGROUPS, 0, 0, 0); e != 0 {
		return -1, e
	}
	_ = unix.Setfsgid(u.GID)
	_ = unix.Setfsuid(u.UID)
	// setfsuid(2) has no error: ask again what is in force.
	if uid, _ := unix.SetfsuidRetUid(-1); uid != u.UID {
		return -1, fmt.Errorf("cannot take on uid %d", u.UID)
	}
	if err := mkdirAll(dir); err != nil {
		return -1, err
	}
	return unix.Open(dir, unix.O_PATH|unix.O_DIRECTORY|unix.O_CLOEXEC, 0)
}

// mkdirAll is os.MkdirAll with 0700 for what is made.
func mkdirAll(dir string) error {
	if fi, err := os.Stat(dir); err == nil {
		if !fi.IsDir() {
			return unix.ENOTDIR
		}
		return nil
	}
	if err := mkdirAll(filepath.Dir(dir)); err != nil {
		return err
	}
	if err := unix.Mkdir(dir, 0o700); err != nil && err != unix.EEXIST {
		return err
	}
	return nil
}

// checkUserDir refuses a directory that a symlink of the user's may have led
// to: it must be the user's own, or, where sealed, root's and empty.
func checkUserDir(fd int, m Mount, u User) error {
	var st unix.Stat_t
	if err := unix.Fstat(fd, &st); err != nil {
		return err
	}
	sealedAlready := m.Sealed && st.Uid == 0 && st.Mode&0o222 == 0
	if int(st.Uid) != u.UID && !sealedAlready {
		return &MountPointError{m.Target, fmt.Sprintf("belongs to uid %d, not to %s", st.Uid, u.Name)}
	}
	if !m.Sealed {
		return nil
	}
	self := fmt.Sprintf("/proc/self/fd/%d", fd)
	d, err := os.Open(self)
	if err != nil {
		return err
	}
	defer d.Close()
	if names, err := d.Readdirnames(1); err == nil && len(names) > 0 {
		return &MountPointError{m.Target, "is not empty: it would be hidden while the keep is open"}
	} else if err != nil && err != io.EOF {
		return err
	}
	if sealedAlready {
		return nil
	}
	if err := unix.Fchown(int(d.Fd()), 0, 0); err != nil {
		return err
	}
	return unix.Fchmod(int(d.Fd()), 0o555)
}

// Undo unmounts list in reverse order, but for what stays. What is not mounted, or
// is not the view's, is passed over; the first mount that is busy stops it with *BusyError, and the mounts below it
// stay: a view is never half torn from under a process that uses it.
func Undo(list []Mount) error {
	mounts, err := table()
	if err != nil {
		return err
	}
	for i := len(list) - 1; i >= 0; i-- {
		if list[i].Stays || !mounts.has(list[i]) {
			continue
		}
		err := unix.Unmount(list[i].Target, unix.UMOUNT_NOFOLLOW)
		switch {
		case err == nil, err == unix.EINVAL, err == unix.ENOENT:
		case err == unix.EBUSY:
			return &BusyError{list[i].Target}
		default:
			return fmt.Errorf("unmount %s: %w", list[i].Target, err)
		}
	}
	return nil
}

// Remount drops what the overlay remembers of names that were missing before
// the lower store grew. The new mount API refuses this for overlayfs; the old
// call with an empty source and no data works, also when busy.
func Remount() error {
	return unix.Mount("", "/nix/store", "", unix.MS_REMOUNT|storeFlags, "")
}
