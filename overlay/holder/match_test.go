package holder

import (
	"slices"
	"testing"

	"golang.org/x/sys/unix"
)

// The devices of the examples.
var (
	host    = unix.Mkdev(254, 1) // ext4 with the system store and, for the dir back-end, the volume
	disk    = unix.Mkdev(7, 3)   // ext4 of the volume image
	overlay = unix.Mkdev(0, 51)
	tmpfs   = unix.Mkdev(0, 20)
)

const key = "000102030405060708090a0b0c0d0e0f"

func imageTarget() Target {
	return Target{
		Namespace: 100, Devices: []uint64{overlay, disk}, Overlays: []FSID{{1, 2}},
		Mounts: []MountRef{{ID: 51, Dev: overlay, Point: "/nix/store", Type: "overlay", Layers: []string{"/nix/store", "/k/u", "/k/w"}},
			{ID: 50, Dev: disk, Point: "/k", Type: "ext4"}},
		Files: []FileID{{host, 900}},
	}
}

func dirTarget() Target {
	t := imageTarget()
	t.Devices, t.Files = []uint64{overlay}, nil
	t.Trees = []Tree{{host, "/var/keep/volume", key}}
	t.Mounts[1] = MountRef{ID: 50, Dev: host, Point: "/k", Type: "ext4"}
	return t
}

const overlayOptions = "rw,lowerdir=/nix/store,upperdir=/k/u,workdir=/k/w"

func imageSnapshot() snapshot {
	return snapshot{
		spaces: []space{
			{inode: 1, anon: []uint64{22}, mounts: []mount{{id: 21, parent: 1, dev: host, root: "/", point: "/", fstype: "ext4"}}},
			{inode: 100, anon: []uint64{51}, mounts: []mount{
				{id: 40, parent: 1, dev: host, root: "/", point: "/", fstype: "ext4"},
				{id: 50, parent: 40, dev: disk, root: "/", point: "/k", fstype: "ext4"},
				{id: 51, parent: 40, dev: overlay, root: "/", point: "/nix/store", fstype: "overlay", super: overlayOptions},
			}},
		},
		loops: []loopDevice{{name: "loop3", dev: disk, file: FileID{host, 900}, path: "/var/keep/volume/image"},
			{name: "loop4", dev: unix.Mkdev(7, 4), file: FileID{host, 12}, path: "/snap/x"}},
	}
}

func dirSnapshot() snapshot {
	s := imageSnapshot()
	s.spaces[1].mounts[1] = mount{id: 50, parent: 40, dev: host, root: "/var/keep/volume", point: "/k", fstype: "ext4"}
	s.loops = nil
	return s
}

func TestJudge(t *testing.T) {
	image, dir := newMatcher(imageTarget(), imageSnapshot()), newMatcher(dirTarget(), dirSnapshot())
	plain := dirTarget()
	plain.Trees[0].Key = ""
	open := newMatcher(plain, dirSnapshot())
	gone := imageSnapshot()
	gone.spaces = gone.spaces[:1]
	detached := newMatcher(imageTarget(), gone)
	goneDir := dirSnapshot()
	goneDir.spaces = goneDir.spaces[:1]
	detachedDir := newMatcher(dirTarget(), goneDir)
	const reg, dirMode, fifo, sock, blk = unix.S_IFREG, unix.S_IFDIR, unix.S_IFIFO, unix.S_IFSOCK, unix.S_IFBLK
	pseudo := unix.Mkdev(0, 77)
	tests := []struct {
		name string
		m    *matcher
		o    object
		want verdict
	}{
		{"file of the image's filesystem", image, object{dev: disk, ino: 5, mnt: 50, mode: reg}, yes},
		{"the same through a mount unknown", image, object{dev: disk, ino: 5, mnt: 999, mode: reg}, yes},
		{"directory of the overlay", image, object{dev: overlay, ino: 5, mnt: 51, mode: dirMode}, yes},
		{"lower file without xino", image, object{dev: pseudo, ino: 5, mnt: 51, mode: reg}, yes},
		{"the same, detached", detached, object{dev: pseudo, ino: 5, mnt: 51, mode: reg}, askFS},
		{"pipe", image, object{dev: unix.Mkdev(0, 14), ino: 5, mnt: 14, mode: fifo}, askFS},
		{"tmpfs of the host", image, object{dev: tmpfs, ino: 5, mnt: 22, mode: reg}, no},
		{"file of the host", image, object{dev: host, ino: 5, mnt: 21, mode: reg}, no},
		{"encrypted file of the host", image, object{dev: host, ino: 5, mnt: 21, mode: reg, encrypted: true}, no},
		{"the image itself", image, object{dev: host, ino: 900, mnt: 21, mode: reg}, yes},
		{"same number on another device", image, object{dev: tmpfs, ino: 900, mnt: 22, mode: reg}, no},
		{"the block device", image, object{dev: unix.Mkdev(0, 6), rdev: disk, mnt: 22, mode: blk}, yes},
		{"character device of that number", image, object{dev: unix.Mkdev(0, 6), rdev: disk, mnt: 22, mode: unix.S_IFCHR}, no},
		{"another block device", image, object{dev: unix.Mkdev(0, 6), rdev: unix.Mkdev(7, 4), mnt: 22, mode: blk}, no},

		{"through the bind mount", dir, object{dev: host, ino: 5, mnt: 50, mode: reg, encrypted: true}, yes},
		{"fifo through the bind mount", dir, object{dev: host, ino: 5, mnt: 50, mode: fifo}, yes},
		{"encrypted, by the host's mount", dir, object{dev: host, ino: 5, mnt: 21, mode: reg, encrypted: true}, askPolicy},
		{"encrypted, by an unknown mount", dir, object{dev: host, ino: 5, mnt: 999, mode: dirMode, encrypted: true}, askPolicy},
		{"not encrypted", dir, object{dev: host, ino: 5, mnt: 21, mode: reg}, no},
		{"socket of the host", dir, object{dev: host, ino: 5, mnt: 21, mode: sock}, askPath},
		{"fifo of the host", dir, object{dev: host, ino: 5, mnt: 21, mode: fifo}, askPath},
		{"fifo through the detached bind", detachedDir, object{dev: host, ino: 5, mnt: 50, mode: fifo}, yes},
		{"that mount id on another filesystem", detachedDir, object{dev: tmpfs, ino: 5, mnt: 50, mode: fifo}, askFS},
		{"host file, directory not encrypted", open, object{dev: host, ino: 5, mnt: 21, mode: reg}, askPath},
		{"nothing", image, object{}, no},
	}
	for _, x := range tests {
		if got := x.m.judge(x.o); got != x.want {
			t.Errorf("%s: got %d, want %d", x.name, got, x.want)
		}
	}
}

func TestObjectInTree(t *testing.T) {
	m := newMatcher(dirTarget(), dirSnapshot())
	for _, x := range []struct {
		mnt  uint64
		path string
		want bool
	}{
		{21, "/var/keep/volume", true},
		{21, "/var/keep/volume/home/fifo", true},
		{21, "/var/keep/volume/home/fifo (deleted)", true},
		{21, "/var/keep/volume-two/fifo", false},
		{21, "/var/keep", false},
		{21, "/k/fifo", false}, // the host's own /k
		{21, "relative", false},
		{21, "?", false},
		{999, "/k/fifo", true}, // mount unknown: any place it may be seen at
		{999, "/var/keep/volume/x", true},
		{999, "/var/x", false},
	} {
		if got := m.objectInTree(object{dev: host, mnt: x.mnt}, x.path); got != x.want {
			t.Errorf("mount %d, path %q: got %v", x.mnt, x.path, got)
		}
	}
}

// A namespace whose root lies in the directory does not make every path ours.
func TestPathInTreeRoot(t *testing.T) {
	s := dirSnapshot()
	s.spaces = append(s.spaces, space{inode: 3, mounts: []mount{{id: 80, parent: 80, dev: host, root: "/var/keep/volume/build", point: "/", fstype: "ext4"}}})
	m := newMatcher(dirTarget(), s)
	for path, want := range map[string]bool{"/snap/x.img": false, "/var/keep/volume/x.img": true, "/k/x.img": true} {
		if got := m.pathInTree(host, path); got != want {
			t.Errorf("%q: got %v", path, got)
		}
	}
	for path, want := range map[string]bool{"/swapfile": false, "/k/swap": true, "/nix/store/swap": false} {
		if got := m.pathOurs(path, false); got != want {
			t.Errorf("swap %q: got %v", path, got)
		}
	}
	if !m.objectInTree(object{dev: host, mnt: 80}, "/fifo") {
		t.Error("a file through that very mount is not ours")
	}
}

func TestStacked(t *testing.T) {
	s := imageSnapshot()
	inner, outer, over := unix.Mkdev(7, 8), unix.Mkdev(7, 9), unix.Mkdev(0, 60)
	s.loops = append([]loopDevice{
		{name: "loop9", dev: outer, file: FileID{inner, 3}}, // in a filesystem in the keep; listed first
		{name: "loop8", dev: inner, file: FileID{disk, 4}},
		{name: "loop5", dev: unix.Mkdev(7, 5), file: FileID{unix.Mkdev(0, 77), 4}, path: "/nix/store/img"}, // overlay without xino
		{name: "loop6", dev: unix.Mkdev(7, 6), file: FileID{host, 5}, path: "/nix/store/img"},              // the host's store
		{name: "loop7", dev: unix.Mkdev(7, 7), file: FileID{host, 900}, path: "/var/keep/volume/image"},    // a second one on the image
		{name: "loop10", dev: unix.Mkdev(7, 10), file: FileID{}, path: "/k/unknown"},                       // could not be asked
	}, s.loops...)
	s.spaces[1].mounts = append(s.spaces[1].mounts, mount{id: 70, parent: 40, dev: over, root: "/", point: "/o", fstype: "overlay", super: "ro,lowerdir=/nix/store/a:/b"})
	m := newMatcher(imageTarget(), s)
	for dev, want := range map[uint64]bool{inner: true, outer: true, over: true, disk: true, unix.Mkdev(7, 5): true, unix.Mkdev(7, 6): false, unix.Mkdev(7, 7): true, unix.Mkdev(7, 4): false, unix.Mkdev(7, 10): true, host: false} {
		if m.devices[dev] != want {
			t.Errorf("device %d:%d: got %v", unix.Major(dev), unix.Minor(dev), !want)
		}
	}
	// The same overlay in a namespace without our mounts has the host's layers.
	s.spaces[0].mounts = append(s.spaces[0].mounts, mount{id: 71, parent: 21, dev: unix.Mkdev(0, 61), root: "/", point: "/o", fstype: "overlay", super: "ro,lowerdir=/nix/store/a:/b"})
	if m := newMatcher(imageTarget(), s); m.devices[unix.Mkdev(0, 61)] {
		t.Error("an overlay of the host's store was taken for ours")
	}
}

// A device number that now means another filesystem blames nobody.
func TestStale(t *testing.T) {
	s := imageSnapshot()
	s.spaces = s.spaces[:1]
	s.spaces[0].mounts = append(s.spaces[0].mounts, mount{id: 90, parent: 21, dev: overlay, root: "/", point: "/docker", fstype: "overlay", super: "rw,lowerdir=/d/1,upperdir=/d/2,workdir=/d/3"})
	s.loops[0].file = FileID{host, 13} // loop3 carries something else now
	m := newMatcher(imageTarget(), s)
	if m.devices[overlay] || m.devices[disk] || m.judge(object{dev: overlay, mnt: 90, mode: unix.S_IFREG}) != no {
		t.Errorf("stale devices are still ours: %v", m.devices)
	}
	s = imageSnapshot()
	s.spaces[1].mounts[2] = mount{id: 51, parent: 40, dev: overlay, root: "/", point: "/x", fstype: "tmpfs"}
	if m := newMatcher(imageTarget(), s); m.devices[overlay] || !m.devices[disk] {
		t.Errorf("got devices %v", m.devices)
	}
	s = imageSnapshot()
	s.spaces = nil // detached: nothing contradicts, but the overlay must be asked
	m = newMatcher(imageTarget(), s)
	if m.certain(overlay) || !m.certain(disk) || m.judge(object{dev: overlay, mnt: 51}) != askFS {
		t.Errorf("got devices %v, unsure %v", m.devices, m.unsure)
	}
	// A namespace read after the snapshot shows the number in new hands, or in old.
	if m.mountOurs(mount{dev: overlay, fstype: "tmpfs", root: "/", point: "/tmp"}) || !m.mountOurs(imageSnapshot().spaces[1].mounts[2]) {
		t.Error("a mount was taken by its number alone")
	}
	s.loops = nil // unbound: the image is no longer on the device
	if m := newMatcher(imageTarget(), s); m.devices[disk] {
		t.Errorf("got devices %v", m.devices)
	}
}

// A loop device of the target in the hands of a stranger carries nothing of ours,
// nor does what is stacked on it: known by the file that it had, also where no
// file is named by the target itself (an image in an encrypted directory).
func TestStrangersLoop(t *testing.T) {
	outer, inner, strange := unix.Mkdev(7, 5), unix.Mkdev(7, 6), unix.Mkdev(254, 9)
	image := imageTarget() // the image lies in a tree of the host
	image.Files, image.Trees = nil, []Tree{{host, "/var/keep/volume", key}}
	image.Loops = []LoopRef{{disk, FileID{host, 900}}}
	onImage := imageTarget() // the image lies in a file system in a file of the host
	onImage.Devices = []uint64{overlay, inner, outer}
	onImage.Loops = []LoopRef{{inner, FileID{outer, 13}}, {outer, FileID{host, 900}}}
	silent := onImage
	silent.Loops = nil // the devices could not be asked when it was described
	mine := func(n string, dev uint64, f FileID) loopDevice {
		return loopDevice{name: n, dev: dev, file: f, path: "/x"}
	}
	for _, x := range []struct {
		name  string
		t     Target
		loops []loopDevice
		ours  []string
	}{
		{"image, still there", image, []loopDevice{mine("loop3", disk, FileID{host, 900})}, []string{"loop3"}},
		{"image, unbound", image, nil, nil},
		{"image, a stranger's", image, []loopDevice{mine("loop3", disk, FileID{strange, 900}), mine("loop4", unix.Mkdev(7, 4), FileID{disk, 13})}, nil},
		{"image, another file of the host", image, []loopDevice{mine("loop3", disk, FileID{host, 901})}, nil},
		{"image, could not be asked", image, []loopDevice{mine("loop3", disk, FileID{})}, []string{"loop3"}},
		{"on image, still there", onImage, []loopDevice{mine("loop5", outer, FileID{host, 900}), mine("loop6", inner, FileID{outer, 13})}, []string{"loop5", "loop6"}},
		{"on image, listed the other way round", onImage, []loopDevice{mine("loop6", inner, FileID{outer, 13}), mine("loop5", outer, FileID{host, 900})}, []string{"loop6", "loop5"}},
		{"on image, the inner one is a stranger's", onImage, []loopDevice{mine("loop5", outer, FileID{host, 900}), mine("loop6", inner, FileID{strange, 13})}, []string{"loop5"}},
		{"a volume made alike on the same devices", onImage, []loopDevice{mine("loop5", outer, FileID{strange, 900}), mine("loop6", inner, FileID{outer, 13})}, nil},
		{"the outer device is gone, the inner a stranger's", onImage, []loopDevice{mine("loop6", inner, FileID{host, 7})}, nil},
		{"not asked before, alike on the same devices", silent, []loopDevice{mine("loop5", outer, FileID{strange, 900}), mine("loop6", inner, FileID{outer, 13})}, nil},
		{"not asked before, still there", silent, []loopDevice{mine("loop5", outer, FileID{host, 900}), mine("loop6", inner, FileID{outer, 13})}, []string{"loop5", "loop6"}},
		{"a table that loops", Target{Devices: []uint64{outer, inner}, Loops: []LoopRef{{inner, FileID{outer, 1}}, {outer, FileID{inner, 1}}}},
			[]loopDevice{mine("loop5", outer, FileID{inner, 1}), mine("loop6", inner, FileID{outer, 1})}, []string{"loop5", "loop6"}},
	} {
		m := newMatcher(x.t, snapshot{loops: x.loops})
		var got []string
		for _, l := range m.loops {
			got = append(got, l.name)
		}
		if !slices.Equal(got, x.ours) {
			t.Errorf("%s: ours are %q, want %q", x.name, got, x.ours)
		}
		for _, l := range x.loops {
			if m.devices[l.dev] != slices.Contains(x.ours, l.name) {
				t.Errorf("%s: %s is taken for ours: %v", x.name, l.name, m.devices[l.dev])
			}
		}
	}
}

func TestOursOrder(t *testing.T) {
	m := newMatcher(imageTarget(), imageSnapshot())
	all := []mount{
		{id: 5, parent: 51, dev: tmpfs, root: "/", point: "/nix/store/tmp"}, // moved: listed before its parent
		{id: 40, parent: 1, dev: host, root: "/", point: "/"},
		{id: 50, parent: 40, dev: disk, root: "/", point: "/k"},
		{id: 51, parent: 40, dev: overlay, root: "/", point: "/nix/store"},
		{id: 52, parent: 40, dev: tmpfs, root: "/", point: "/tmp"},
		{id: 53, parent: 5, dev: tmpfs, root: "/", point: "/nix/store/tmp/x"},
		{id: 54, parent: 52, dev: disk, root: "/home", point: "/tmp/h"},
		{id: 55, parent: 50, dev: disk, root: "/", point: "/k"}, // stacked on the same point
	}
	var ids []uint64
	for _, x := range m.ours(all) {
		ids = append(ids, x.id)
	}
	if want := []uint64{53, 55, 54, 5, 51, 50}; !slices.Equal(ids, want) {
		t.Errorf("got %v, want %v", ids, want)
	}
	// Tables no kernel prints: loops, a mount on itself.
	for _, all := range [][]mount{
		{{id: 1, parent: 2, dev: disk}, {id: 2, parent: 1, dev: tmpfs}},
		{{id: 1, parent: 1, dev: disk}},
		{{id: 1, parent: 2}, {id: 2, parent: 3}, {id: 3, parent: 1}},
		{{id: 1, parent: 9, dev: disk}, {id: 1, parent: 9, dev: disk}},
	} {
		m.ours(all)
	}
}

func FuzzMatch(f *testing.F) {
	f.Add("21 1 254:1 / / rw - ext4 a rw\n50 40 7:3 / /k rw - ext4 a rw\n51 40 0:51 / /nix/store rw - overlay overlay "+overlayOptions, uint64(51), uint64(50))
	f.Add("1 2 7:3 / / rw - ext4 a rw\n2 1 254:1 /var/keep/volume/x / rw - ext4 a rw", uint64(1), uint64(2))
	f.Fuzz(func(t *testing.T, table string, mnt, dev uint64) {
		sp := space{inode: 1}
		for _, line := range splitEscaped(table, '\n') {
			if m, err := parseMount([]byte(line), true); err == nil {
				sp.mounts = append(sp.mounts, m)
			}
		}
		for _, target := range []Target{imageTarget(), dirTarget()} {
			m := newMatcher(target, snapshot{spaces: []space{sp}})
			m.judge(object{dev: dev, mnt: mnt})
			m.objectInTree(object{dev: host, mnt: mnt}, table)
			list := m.ours(sp.mounts)
			seen := map[uint64]int{}
			for i, x := range list {
				if _, twice := seen[x.id]; !twice {
					seen[x.id] = i
				}
			}
			if len(list) > len(sp.mounts) {
				t.Errorf("%d mounts of %d", len(list), len(sp.mounts))
			}
		}
	})
}

func TestBelow(t *testing.T) {
	for _, x := range []struct {
		path, dir string
		want      bool
	}{
		{"/k", "/k", true}, {"/k/a", "/k", true}, {"/kk", "/k", false}, {"/", "/k", false}, {"/k", "/", true}, {"", "/", false},
		{"/k", "", false}, {"k/a", "k", true}, {"", "", false},
	} {
		if got := below(x.path, x.dir); got != x.want {
			t.Errorf("below(%q, %q) = %v", x.path, x.dir, got)
		}
	}
}
