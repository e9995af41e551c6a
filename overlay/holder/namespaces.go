package holder

import (
	"bufio"
	"cmp"
	"context"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"slices"
	"strconv"

	"golang.org/x/sys/unix"
)

// Describe computes the target from the mounts at points, absolute paths in the
// mount namespace view (an open /proc/PID/ns/mnt, or a pinned one). Give every
// mount point of the keep: the overlay, the volume, and what is bound from it.
// A mount of a whole filesystem makes that filesystem the keep's; one of a
// directory makes the directory the keep's, with its encryption key if it has
// one.
//
// outside are paths in the caller's own namespace that are the keep's, too: the
// volume image, and the encrypted directory that the image or the volume lies
// in, for whatever is open there keeps the key in use.
//
// It fails with *MountPointError, *PolicyError or *os.PathError.
func Describe(view *os.File, points []string, outside ...string) (Target, error) {
	var t Target
	ns, err := lookAtFile(view)
	if err != nil {
		return Target{}, fmt.Errorf("look at the view's namespace: %w", err)
	}
	t.Namespace = ns.ino
	proc, err := openProc()
	if err != nil {
		return Target{}, err
	}
	defer proc.Close()
	for _, name := range outside {
		if err := t.describeOutside(name, proc); err != nil {
			return Target{}, err
		}
	}
	err = onThread(func() error {
		mounts, err := mountsIn(view, proc)
		if err != nil {
			return err
		}
		for _, p := range points {
			if err := t.describe(filepath.Clean(p), mounts); err != nil {
				return err
			}
		}
		return nil
	})
	if err != nil {
		return Target{}, err
	}
	// A directory of a filesystem that turned out to be ours as a whole says
	// nothing more.
	t.Trees = slices.DeleteFunc(t.Trees, func(x Tree) bool { return slices.Contains(t.Devices, x.Dev) })
	if slices.ContainsFunc(t.Devices, func(d uint64) bool { return unix.Major(d) == loopMajor }) {
		for _, l := range loops() {
			if slices.Contains(t.Devices, l.dev) && l.file != (FileID{}) {
				t.Loops = append(t.Loops, LoopRef{l.dev, l.file})
			}
		}
	}
	return t, nil
}

// describe adds the mount at point, seen by the calling thread, to t.
func (t *Target) describe(point string, mounts []mount) error {
	f, err := openAt(unix.AT_FDCWD, point, unix.O_PATH|unix.O_NOFOLLOW)
	switch {
	case errors.Is(err, unix.ENOENT), errors.Is(err, unix.ENOTDIR), errors.Is(err, unix.ELOOP):
		return &MountPointError{point} // who owns a directory above it has moved it
	case err != nil:
		return &os.PathError{Op: "open", Path: point, Err: err}
	}
	defer f.Close()
	o, err := lookAtFile(f)
	if err != nil {
		return &os.PathError{Op: "stat", Path: point, Err: err}
	}
	// By mount id, for several mounts may lie on one point: the top one counts.
	i := slices.IndexFunc(mounts, func(m mount) bool { return m.id == o.mnt && m.point == point })
	if i < 0 {
		return &MountPointError{point}
	}
	m := mounts[i]
	t.Mounts = append(t.Mounts, MountRef{ID: m.id, Dev: m.dev, Point: point, Type: m.fstype, Layers: layers(m)})
	if m.root == "/" {
		if !slices.Contains(t.Devices, m.dev) {
			t.Devices = append(t.Devices, m.dev)
		}
		if id, overlay, err := overlayIDOf(f); err != nil {
			return &os.PathError{Op: "statfs", Path: point, Err: err}
		} else if overlay && !slices.Contains(t.Overlays, id) {
			t.Overlays = append(t.Overlays, id)
		}
		return nil
	}
	return t.addTree(Tree{Dev: m.dev, Path: m.root}, o, point)
}

// describeOutside adds a file or directory of the caller's own namespace to t.
func (t *Target) describeOutside(name string, proc *os.File) error {
	f, err := openAt(unix.AT_FDCWD, name, unix.O_PATH)
	if err != nil {
		return &os.PathError{Op: "open", Path: name, Err: err}
	}
	defer f.Close()
	o, err := lookAtFile(f)
	if err != nil {
		return &os.PathError{Op: "stat", Path: name, Err: err}
	}
	if o.kind() != unix.S_IFDIR {
		t.Files = append(t.Files, FileID{o.dev, o.ino})
		return nil
	}
	path, root := readLink(int(proc.Fd()), "self/fd/"+strconv.Itoa(int(f.Fd()))), ""
	err = readMounts(int(proc.Fd()), bufio.NewReaderSize(nil, maxLine), func(m mount) {
		if m.id == o.mnt && below(path, m.point) {
			root = rebase(path, m)
		}
	})
	if err != nil {
		return err
	}
	if root == "" {
		return &MountPointError{name}
	}
	return t.addTree(Tree{Dev: o.dev, Path: root}, o, name)
}

// addTree adds a directory, asking for its key by its name in the namespace of
// the calling thread.
func (t *Target) addTree(tree Tree, o object, name string) error {
	if o.encrypted {
		key, version, err := policyKey(unix.AT_FDCWD, name)
		if err != nil {
			return &os.PathError{Op: "get encryption policy", Path: name, Err: err}
		}
		if key == "" {
			return &PolicyError{name, version}
		}
		tree.Key = key
	}
	if !slices.Contains(t.Trees, tree) {
		t.Trees = append(t.Trees, tree)
	}
	return nil
}

// mountsIn enters ns on the calling thread, one of onThread, and lists its
// mounts. proc is the caller's /proc, opened before.
func mountsIn(ns, proc *os.File) ([]mount, error) {
	if err := enter(ns); err != nil {
		return nil, err
	}
	var all []mount
	err := readMounts(int(proc.Fd()), bufio.NewReaderSize(nil, maxLine), func(m mount) {
		if len(all) <= maxMounts {
			all = append(all, m)
		}
	})
	if err == nil && len(all) > maxMounts {
		err = fmt.Errorf("more than %d mounts", maxMounts)
	}
	return all, err
}

// NS is a mount namespace that has mounts of the target, the view included. Its
// open File keeps the namespace, and with it the mounts, alive: Close it.
type NS struct {
	Inode  uint64
	PIDs   []int    // processes with a thread in it; none when only a file keeps it alive
	Points []string // mount points of the target in it, as seen from its root
	File   *os.File
}

// Close releases the handle.
func (n NS) Close() error { return n.File.Close() }

// Namespaces returns every mount namespace that has mounts of the target: those
// of processes and threads, those kept by an open descriptor and those bound to
// a file. The caller closes each. With *IncompleteError come those found.
func Namespaces(ctx context.Context, t Target) ([]NS, error) {
	s, err := newScanner(t, nil, true)
	if err != nil {
		return nil, err
	}
	defer s.close()
	if err := s.run(ctx); err != nil {
		return nil, err
	}
	var out []NS
	for inode, u := range s.spaces {
		if len(u.points) == 0 {
			continue
		}
		slices.Sort(u.pids)
		out = append(out, NS{inode, slices.Compact(u.pids), u.points, s.survey.files[inode]})
		delete(s.survey.files, inode) // now the caller's
	}
	slices.SortFunc(out, func(a, b NS) int { return cmp.Compare(a.Inode, b.Inode) })
	return out, s.incomplete()
}

// UnmountIn unmounts in namespace ns every mount of the target, and whatever is
// mounted on top of one, children before parents. It never detaches: a mount in
// use stays and is reported; a namespace whose root is the target's is left as it
// is, with EBUSY. The errors are *UnmountError, joined; mounts that
// are gone already are none.
//
// Where the mounts are shared, copies in receiving namespaces go with them.
func UnmountIn(ns *os.File, t Target) error {
	o, err := lookAtFile(ns)
	if err != nil {
		return fmt.Errorf("look at the namespace: %w", err)
	}
	proc, err := openProc()
	if err != nil {
		return err
	}
	defer proc.Close()
	devices := loops()
	return onThread(func() error {
		all, err := mountsIn(ns, proc)
		if err != nil {
			return err
		}
		sp := space{inode: o.ino, mounts: all}
		m := newMatcher(t, snapshot{spaces: []space{sp}, loops: devices})
		list := m.ours(all)
		if i := slices.IndexFunc(list, func(x mount) bool { return x.point == "/" }); i >= 0 {
			// The root, as of a build sandbox, goes with its processes only; to take
			// away what is mounted on it would break them and free nothing.
			return &UnmountError{o.ino, "/", unix.EBUSY}
		}
		stayed := map[uint64]error{}
		for _, mt := range list {
			if err := unmountOne(mt); err != nil {
				stayed[mt.id] = err
			}
		}
		if len(stayed) == 0 {
			return nil
		}
		// Some may be gone all the same: with another mount that they received
		// their own from, or by somebody else's hand.
		if all, err = mountsIn(ns, proc); err != nil {
			return err
		}
		var errs []error
		for _, mt := range list {
			if slices.ContainsFunc(all, func(x mount) bool { return x.id == mt.id }) && stayed[mt.id] != nil {
				errs = append(errs, &UnmountError{o.ino, mt.point, stayed[mt.id]})
			}
		}
		return errors.Join(errs...)
	})
}

// errCovered is a mount that no path leads to.
var errCovered = errors.New("covered by another mount")

func unmountOne(m mount) error {
	// In a namespace of others the names may have changed since: unmount only
	// what was found. The window that remains is theirs alone to be hurt by.
	o, err := lookAtNoFollow(m.point)
	if err != nil || o.mnt != m.id {
		return errCovered
	}
	return unix.Unmount(m.point, unix.UMOUNT_NOFOLLOW)
}

func lookAtNoFollow(path string) (object, error) {
	return statx(unix.AT_FDCWD, path, unix.AT_SYMLINK_NOFOLLOW)
}
