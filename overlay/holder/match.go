package holder

import (
	"cmp"
	"slices"
	"strings"

	"golang.org/x/sys/unix"
)

// This file decides, as pure functions over values, what belongs to a keep.

// snapshot is the part of the system's state that matching needs beside the
// object at hand.
type snapshot struct {
	spaces []space
	loops  []loopDevice
}

// space is a mount namespace. Of its mounts only those that may matter are
// kept, see interesting.
type space struct {
	inode  uint64
	mounts []mount
	anon   []uint64 // ids of all mounts with a device number of no device (major 0)
}

// loopDevice is a bound loop device.
type loopDevice struct {
	name  string // "loop0"
	dev   uint64
	file  FileID   // backing file, as it was when bound; zero when unknown
	path  string   // of the backing file, as the kernel prints it
	stack []string // block devices built on it: "dm-0"
}

// loopMajor is the device number of loop devices (devices.txt of the kernel).
const loopMajor = 7

// object is an inode as reached through one link below /proc/PID.
type object struct {
	dev, rdev, ino uint64
	mnt            uint64 // mount id, 0 when unknown
	mode           uint16
	encrypted      bool
}

func (o object) kind() uint16 { return o.mode & unix.S_IFMT }

// verdict says whether an object belongs to the keep, or how to find out.
type verdict int

const (
	no verdict = iota
	yes
	askPolicy // of a shared filesystem and encrypted: whose key is it?
	askPath   // of a shared filesystem and never encrypted (a socket, a fifo): where is it?
	askFS     // has the device number of no visible mount: is its filesystem ours?
)

type matcher struct {
	target   Target
	devices  map[uint64]bool // Target.Devices, and what lies on them
	unsure   map[uint64]bool // those of devices that no mount shows any more
	trees    map[uint64][]Tree
	files    map[FileID]bool
	mounts   map[uint64]mountClass
	detached map[uint64]MountRef // mounts of the target that are visible nowhere
	loops    []loopDevice        // those that hold the keep, or carry it
}

type mountClass struct {
	ours  bool
	mount mount
}

// interesting tells which mounts a snapshot must keep.
func (t *Target) interesting(m mount) bool {
	if m.fstype == "overlay" || m.fstype == "nsfs" || unix.Major(m.dev) == loopMajor {
		return true
	}
	for _, d := range t.Devices {
		if d == m.dev {
			return true
		}
	}
	for _, x := range t.Trees {
		if x.Dev == m.dev {
			return true
		}
	}
	return false
}

// newMatcher derives from the target and the system's state what belongs to the
// keep: also filesystems mounted from an image that lies in it, and overlays
// with a layer in it.
func newMatcher(t Target, s snapshot) *matcher {
	m := &matcher{
		target: t, devices: map[uint64]bool{}, unsure: map[uint64]bool{}, trees: map[uint64][]Tree{}, files: map[FileID]bool{},
		mounts: map[uint64]mountClass{}, detached: map[uint64]MountRef{},
	}
	for _, d := range t.Devices {
		switch stale(t, s, d) {
		case yes:
			continue
		case askFS:
			m.unsure[d] = true
		}
		m.devices[d] = true
	}
	for _, x := range t.Trees {
		m.trees[x.Dev] = append(m.trees[x.Dev], x)
	}
	for _, f := range t.Files {
		m.files[f] = true
	}
	for _, sp := range s.spaces {
		for _, id := range sp.anon {
			m.mounts[id] = mountClass{}
		}
		for _, mt := range sp.mounts {
			m.mounts[mt.id] = mountClass{mount: mt}
		}
	}
	for _, r := range t.Mounts {
		if _, visible := m.mounts[r.ID]; !visible {
			m.detached[r.ID] = r
		}
	}
	// What is stacked on the keep may carry the next: repeat until nothing is new.
	for known := -1; known != len(m.devices)+len(m.loops); {
		known = len(m.devices) + len(m.loops)
		m.loops = m.loops[:0]
		for _, l := range s.loops {
			if m.devices[l.dev] || m.loopOurs(l) {
				m.loops = append(m.loops, l)
				m.devices[l.dev] = true
			}
		}
		for _, sp := range s.spaces {
			for _, mt := range sp.mounts {
				if mt.fstype == "overlay" && !m.devices[mt.dev] && m.layered(mt, sp) {
					m.devices[mt.dev] = true
				}
			}
		}
	}
	for id, c := range m.mounts {
		if m.mountOurs(c.mount) {
			c.ours = true
			m.mounts[id] = c
		}
	}
	return m
}

// stale tells whether device number d, ours when the target was described, has
// since been given to another filesystem: the kernel uses both anonymous numbers
// and loop devices again, and a stranger must not be taken for a holder. The
// answer is yes, no, or askFS: an overlay that no mount shows any more may be
// detached, or gone and its number another's by the time it is met.
func stale(t Target, s snapshot, d uint64) verdict {
	if unix.Major(d) == loopMajor {
		if v, known := staleLoop(t, s, d, 0); known {
			return v
		}
	}
	seen := false
	for _, sp := range s.spaces {
		for _, mt := range sp.mounts {
			if mt.dev == d {
				if t.described(mt) {
					return no
				}
				seen = true
			}
		}
	}
	switch {
	case seen:
		return yes
	case unix.Major(d) == 0 && len(t.Overlays) > 0:
		return askFS
	}
	return no
}

// staleLoop is stale for a loop device, by its backing file. It is not known
// where the target names no file to hold it against.
func staleLoop(t Target, s snapshot, d uint64, depth int) (v verdict, known bool) {
	ours := slices.Clone(t.Files)
	for _, r := range t.Loops {
		if r.Dev == d {
			ours = append(ours, r.File)
		}
	}
	if len(ours) == 0 {
		return no, false
	}
	for _, l := range s.loops {
		if l.dev != d {
			continue
		}
		if l.file == (FileID{}) { // it could not be asked: the benefit of the doubt
			return no, true
		}
		if !slices.Contains(ours, l.file) {
			return yes, true
		}
		// A file is told by its device in turn: two volumes made alike have the same
		// inode numbers. A table that loops (no kernel has one) ends here.
		if on := l.file.Dev; unix.Major(on) == loopMajor && slices.Contains(t.Devices, on) && depth < len(t.Devices) {
			if v, known := staleLoop(t, s, on, depth+1); known && v == yes {
				return yes, true
			}
		}
		return no, true
	}
	return yes, true // unbound
}

// described tells whether mt is of a filesystem that was described, by more than
// its number.
func (t *Target) described(mt mount) bool {
	for _, r := range t.Mounts {
		if r.Dev == mt.dev && r.Type == mt.fstype && slices.Equal(r.Layers, layers(mt)) {
			return true
		}
	}
	return false
}

func (m *matcher) mountOurs(mt mount) bool {
	if m.devices[mt.dev] {
		// A namespace read later may show the number in new hands.
		return !m.unsure[mt.dev] || m.target.described(mt)
	}
	return m.inTree(mt.dev, mt.root)
}

// inTree tells whether path, from the root of the filesystem dev, is or lies
// below one of the target's directories.
func (m *matcher) inTree(dev uint64, path string) bool {
	for _, t := range m.trees[dev] {
		if below(path, t.Path) {
			return true
		}
	}
	return false
}

// layered tells whether overlay mt has a layer on a mount of ours in its own
// namespace. mountinfo gives layers as text only.
func (m *matcher) layered(mt mount, sp space) bool {
	for _, l := range layers(mt) {
		for _, other := range sp.mounts {
			if other.id != mt.id && below(l, other.point) && m.mountOurs(other) {
				return true
			}
		}
	}
	return false
}

func (m *matcher) loopOurs(l loopDevice) bool {
	if m.devices[l.file.Dev] || m.files[l.file] {
		return true
	}
	if len(m.trees[l.file.Dev]) > 0 {
		return m.pathInTree(l.file.Dev, l.path)
	}
	// The device number of an overlay's file without xino is that of no mount;
	// the path is printed from the root of the mount's namespace.
	if unix.Major(l.file.Dev) == 0 {
		if _, shown := m.devices[l.file.Dev]; !shown {
			for _, r := range m.target.Mounts {
				if m.devices[r.Dev] && below(l.path, r.Point) {
					return true
				}
			}
		}
	}
	return false
}

// judge decides about o. A yes by device, mount or file number is certain; what
// it leaves open only the kernel can answer.
func (m *matcher) judge(o object) verdict {
	if m.certain(o.dev) || m.files[FileID{o.dev, o.ino}] {
		return yes
	}
	if o.kind() == unix.S_IFBLK && m.devices[o.rdev] {
		return yes
	}
	c, visible := m.mounts[o.mnt]
	if c.ours {
		return yes
	}
	if len(m.trees[o.dev]) > 0 {
		if r, ok := m.detached[o.mnt]; ok && r.Dev == o.dev {
			return yes
		}
		if o.encrypted && m.hasKey(o.dev) {
			return askPolicy
		}
		switch o.kind() {
		case unix.S_IFREG, unix.S_IFDIR, unix.S_IFLNK:
			// Whatever lies in an encrypted directory is encrypted.
			if m.hasKey(o.dev) {
				return no
			}
		}
		return askPath
	}
	if unix.Major(o.dev) == 0 && !visible && o.mnt != 0 && len(m.target.Overlays) > 0 {
		return askFS
	}
	return no
}

// certain tells whether whatever has this device number is ours.
func (m *matcher) certain(dev uint64) bool { return m.devices[dev] && !m.unsure[dev] }

// hasKey tells whether every tree on dev is encrypted.
func (m *matcher) hasKey(dev uint64) bool {
	for _, t := range m.trees[dev] {
		if t.Key == "" {
			return false
		}
	}
	return true
}

// keyOurs tells whether key is that of a tree on dev.
func (m *matcher) keyOurs(dev uint64, key string) bool {
	for _, t := range m.trees[dev] {
		if t.Key != "" && t.Key == key {
			return true
		}
	}
	return false
}

// objectInTree decides askPath: path is what the kernel prints for o, from the
// root of the namespace that its mount is in.
func (m *matcher) objectInTree(o object, path string) bool {
	path = strings.TrimSuffix(path, " (deleted)")
	if c, ok := m.mounts[o.mnt]; ok && c.mount.dev == o.dev {
		return below(path, c.mount.point) && m.inTree(o.dev, rebase(path, c.mount))
	}
	return m.pathInTree(o.dev, path)
}

// pathInTree tells whether path lies in a tree of dev, seen through any mount
// of that filesystem in any namespace. A namespace whose root is ours would make
// every path one of ours and is left out.
func (m *matcher) pathInTree(dev uint64, path string) bool {
	for _, c := range m.mounts {
		if c.mount.dev != dev || c.ours && c.mount.point == "/" {
			continue
		}
		if below(path, c.mount.point) && m.inTree(dev, rebase(path, c.mount)) {
			return true
		}
	}
	return false
}

// pathOurs tells whether path, from the root of a namespace that has mounts of
// ours, lies on one of them: by text alone, for what the kernel shows in no
// other way. Overlays count only where overlay is set.
func (m *matcher) pathOurs(path string, overlay bool) bool {
	for _, c := range m.mounts {
		if c.ours && c.mount.point != "/" && (overlay || c.mount.fstype != "overlay") && below(path, c.mount.point) {
			return true
		}
	}
	for _, r := range m.target.Mounts {
		if (overlay || r.Type != "overlay") && below(path, r.Point) {
			return true
		}
	}
	for dev := range m.trees {
		if m.pathInTree(dev, path) {
			return true
		}
	}
	return false
}

// watchable tells whether a watch on an inode of dev can outlive an unmount.
// Unmounting a whole filesystem drops its watches (fsnotify_unmount_inodes); on
// a filesystem that stays mounted a watch pins the inode and with it the key.
func (m *matcher) watchable(dev uint64) bool { return len(m.trees[dev]) > 0 }

// ours returns the mounts of sp that must go, children before parents: ours,
// and whatever is mounted on top of them.
func (m *matcher) ours(all []mount) []mount {
	index := make(map[uint64]int, len(all))
	for i, x := range all {
		index[x.id] = i
	}
	const unknown, in, notIn = 0, 1, 2
	state := make([]byte, len(all))
	depth := make([]int, len(all))
	for i := range all {
		// Up to the first ancestor that is decided, then back down. A table that
		// loops (no kernel prints one) ends at the length of the path.
		var path []int
		for j := i; state[j] == unknown && len(path) <= len(all); {
			path = append(path, j)
			p, ok := index[all[j].parent]
			if !ok || p == j {
				break
			}
			j = p
		}
		for k := len(path) - 1; k >= 0; k-- {
			j := path[k]
			state[j] = notIn
			p, ok := index[all[j].parent]
			if ok && p != j {
				depth[j] = depth[p] + 1
			}
			if m.mountOurs(all[j]) || ok && p != j && state[p] == in {
				state[j] = in
			}
		}
	}
	var list []int
	for i := len(all) - 1; i >= 0; i-- { // the latest first among equals
		if state[i] == in {
			list = append(list, i)
		}
	}
	slices.SortStableFunc(list, func(a, b int) int { return cmp.Compare(depth[b], depth[a]) })
	out := make([]mount, len(list))
	for i, j := range list {
		out[i] = all[j]
	}
	return out
}

// below tells whether path is dir or lies below it. Both are absolute.
func below(path, dir string) bool {
	if dir == "/" {
		return strings.HasPrefix(path, "/")
	}
	rest, ok := strings.CutPrefix(path, dir)
	return ok && dir != "" && (rest == "" || rest[0] == '/')
}

// rebase turns a path below the mount point of m into one from the root of its
// filesystem.
func rebase(path string, m mount) string {
	rest := strings.TrimPrefix(path, strings.TrimSuffix(m.point, "/"))
	return strings.TrimSuffix(m.root, "/") + rest
}
