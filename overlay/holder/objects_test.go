package holder

import (
	"context"
	"errors"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"syscall"
	"testing"

	"golang.org/x/sys/unix"

	"overkeep/tests/bed/loop"
	"overkeep/tests/need"
)

// has tells whether one of list has pid, how and a What that contains what.
func has(list []Holder, pid int, how How, what string) bool {
	return slices.ContainsFunc(list, func(h Holder) bool {
		return h.PID == pid && slices.ContainsFunc(h.Holds, func(x Hold) bool { return x.How == how && strings.Contains(x.What, what) })
	})
}

func (b *bed) want(pid int, how How, what string) {
	b.t.Helper()
	if got := b.scan(); !has(got, pid, how, what) {
		b.t.Errorf("got holders %v, want %s %q of %d", got, how, what, pid)
	}
}

func TestScanNamesLoopDevice(t *testing.T) {
	for _, k := range kinds {
		t.Run(k.name, func(t *testing.T) {
			b := newBed(t, k.kind, k.options)
			for _, name := range []string{b.keep + "/home/disk", b.merged + "/disk"} {
				var dev *loop.Device
				b.inView(func() error {
					writeFile(t, name, strings.Repeat("x", 64<<10))
					var err error
					dev, err = loop.Attach(name)
					return err
				})
				b.want(0, LoopDevice, filepath.Base(name))
				b.want(os.Getpid(), BlockDevice, dev.Path) // the device is open here
				dev.Close()
				b.wantNone("after")
			}
		})
	}
}

// A filesystem mounted from an image in the keep counts as the keep's: its
// mount and who uses it are named, and it is unmounted first.
func TestScanNamesWhatIsStacked(t *testing.T) {
	b := newBed(t, "image", ",xino=auto")
	disk, point, over := b.dir+"/disk", b.dir+"/stacked", b.dir+"/over"
	mkdirs(t, disk, point, over)
	b.inView(func() error {
		b.mountImage(b.keep+"/home/inner", point, 4)
		writeFile(t, point+"/file", "x\n")
		return unix.Mount("overlay", over, "overlay", unix.MS_RDONLY, "lowerdir="+b.merged+"/d:"+b.host+"/lower")
	})
	h1, h2 := b.start("open", point+"/file"), b.start("chdir", over)
	b.want(0, MountPoint, point)
	b.want(0, MountPoint, over)
	b.want(h1.pid, OpenFile, "file")
	b.want(h2.pid, CurrentDirectory, over)
	h1.end()
	h2.end()
	if err := UnmountIn(b.view, b.target); err != nil {
		t.Error(err)
	}
	b.wantNone("after")
}

func TestScanNamesMountOnTop(t *testing.T) {
	b := newBed(t, "dir", "")
	b.inView(func() error { return unix.Mount("tmpfs", b.keep+"/home", "tmpfs", 0, "size=1m") })
	b.want(0, MountPoint, b.keep+"/home")
	if err := UnmountIn(b.view, b.target); err != nil {
		t.Error(err)
	}
	b.wantNone("after")
}

func TestScanNamesBlockDevice(t *testing.T) {
	b := newBed(t, "image", "")
	devs, err := loop.Backed(b.dir)
	if err != nil || len(devs) != 1 {
		t.Fatalf("loop devices %v: %v", devs, err)
	}
	h := b.start("open", devs[0])
	b.wantOnly(h.pid, BlockDevice, devs[0])
	h.end()
	b.wantNone("after")
	// The image itself, opened on the host.
	h = b.start("open", b.outside[0])
	b.wantOnly(h.pid, OpenFile, "image")
	h.end()
	// A second device on it.
	second, err := loop.Attach(b.outside[0])
	if err != nil {
		t.Fatal(err)
	}
	b.want(0, LoopDevice, "image")
	second.Close()
	b.wantNone("after")
}

// A device left behind, bound to the image with nothing mounted, is a holder of
// the image.
func TestScanNamesLeftoverDevice(t *testing.T) {
	b := newBed(t, "image", "")
	devs, err := loop.Backed(b.dir)
	if err != nil || len(devs) != 1 {
		t.Fatalf("loop devices %v: %v", devs, err)
	}
	h := b.start("open", devs[0])
	if err := UnmountIn(b.view, b.target); err != nil {
		t.Fatal(err)
	}
	b.want(0, LoopDevice, "image")
	b.want(h.pid, BlockDevice, devs[0])
	h.end()
	b.wantNone("after")
}

func TestScanNamesSwapFile(t *testing.T) {
	need.Tool(t, "mkswap", "swapon", "swapoff")
	b := newBed(t, "image", "")
	// swapon(2) acts on the whole machine: very small, of the lowest priority.
	name := b.keep + "/home/swap"
	b.inView(func() error {
		writeFile(t, name, strings.Repeat("x", 64<<10))
		if err := os.Chmod(name, 0o600); err != nil {
			return err
		}
		if out, err := exec.Command("mkswap", "-q", name).CombinedOutput(); err != nil {
			return errors.New(string(out))
		}
		return exec.Command("swapon", name).Run()
	})
	off := func() {
		b.inView(func() error { return exec.Command("swapoff", name).Run() })
	}
	if got := b.scan(); !has(got, 0, SwapFile, "swap") {
		t.Errorf("got %v", got)
	}
	off()
	b.wantNone("after")
}

// A stray mount in the caller's namespace is reported as that, not as a hold of
// every process of the machine.
func TestScanDoesNotBlameTheMachine(t *testing.T) {
	b := newBed(t, "image", "")
	devs, err := loop.Backed(b.dir)
	if err != nil || len(devs) != 1 {
		t.Fatalf("loop devices %v: %v", devs, err)
	}
	stray := b.dir + "/stray"
	mkdirs(t, stray)
	if err := unix.Mount(devs[0], stray, "ext4", 0, ""); err != nil {
		t.Fatal(err)
	}
	got := b.scan()
	if len(got) != 1 || !has(got, 0, MountNamespace, stray) {
		t.Errorf("got %v, want only the mount at %s", got, stray)
	}
	own, err := os.Open("/proc/self/ns/mnt")
	if err != nil {
		t.Fatal(err)
	}
	defer own.Close()
	if err := UnmountIn(own, b.target); err != nil {
		t.Error(err)
	}
	b.wantNone("after")
}

// pinSpace binds a namespace that copies the view to a file. A namespace can
// only be bound in an older one; which of two counts as older depends on the
// processors they were made on since Linux 6.18, so it is tried again.
func (b *bed) pinSpace() string {
	b.t.Helper()
	file := b.dir + "/pin"
	writeFile(b.t, file, "")
	var last error
	for range 256 {
		ns, err := newSpace(b.view)
		if err != nil {
			b.t.Fatal(err)
		}
		last = unix.Mount("/proc/self/fd/"+strconv.Itoa(int(ns.Fd())), file, "", unix.MS_BIND, "")
		ns.Close()
		if last == nil {
			b.t.Cleanup(func() { unix.Unmount(file, unix.MNT_DETACH) })
			return file
		}
	}
	b.t.Fatal(last)
	return ""
}

func TestNamespaces(t *testing.T) {
	for _, k := range kinds {
		t.Run(k.name, func(t *testing.T) {
			b := newBed(t, k.kind, k.options)
			file := b.pinSpace()
			b.want(0, NamespaceFile, file)
			byFD := b.start("unshare-fd")
			cmd := unshared(exec.Command(self(t)))
			cmd.Env = roleEnv("wait")
			living := b.startCmd(b.view, cmd)
			thread := b.start("thread-ns")

			list, err := Namespaces(context.Background(), b.target)
			if err = exceptOffLimits(err); err != nil {
				t.Fatal(err)
			}
			var pids []int
			for _, ns := range list {
				defer ns.Close()
				pids = append(pids, ns.PIDs...)
				if len(ns.Points) != 2 {
					t.Errorf("namespace %d has mounts at %v, want 2", ns.Inode, ns.Points)
				}
			}
			if len(list) != 5 { // the view, the pinned, and three of processes
				t.Fatalf("got %d namespaces, want 5: %+v", len(list), list)
			}
			for _, p := range []int{byFD.pid, living.pid, thread.pid} {
				if !slices.Contains(pids, p) {
					t.Errorf("no namespace has process %d: %+v", p, list)
				}
			}
			for _, ns := range list {
				if err := UnmountIn(ns.File, b.target); err != nil {
					t.Error(err)
				}
			}
			// They all live on, with nothing of the keep in them.
			b.wantNone("unmounted")
		})
	}
}

// exceptOffLimits drops the report that says no more than that there are
// processes off limits, or that were and have ended.
func exceptOffLimits(err error) error {
	e := (*IncompleteError)(nil)
	if !errors.As(err, &e) || len(e.Other) > 0 || e.Count > len(e.PIDs) {
		return err
	}
	for _, pid := range e.PIDs {
		if _, serr := os.Stat("/proc/" + strconv.Itoa(pid)); serr == nil && !offLimits(pid) {
			return err
		}
	}
	return nil
}

func TestUnmountInBusy(t *testing.T) {
	b := newBed(t, "image", "")
	ns, err := newSpace(b.view)
	if err != nil {
		t.Fatal(err)
	}
	defer ns.Close()
	h := b.startIn(ns, self(t), "chdir", b.keep)
	err = UnmountIn(ns, b.target)
	var ue *UnmountError
	if !errors.As(err, &ue) || ue.Point != b.keep || !errors.Is(err, unix.EBUSY) {
		t.Fatalf("got error %v, want EBUSY at %s", err, b.keep)
	}
	h.end()
	if err := UnmountIn(ns, b.target); err != nil {
		t.Error(err)
	}
}

// A mount that something covers is reported; what covers it is not unmounted in
// its place.
func TestUnmountInCovered(t *testing.T) {
	b := newBed(t, "image", "")
	ns, err := newSpace(b.view)
	if err != nil {
		t.Fatal(err)
	}
	defer ns.Close()
	in := func(f func() error) {
		t.Helper()
		if err := onThread(func() error { return errors.Join(enter(ns), f()) }); err != nil {
			t.Fatal(err)
		}
	}
	in(func() error {
		if err := unix.Mount("tmpfs", b.dir, "tmpfs", 0, "size=1m"); err != nil {
			return err
		}
		mkdirs(t, b.keep)
		return unix.Mount("tmpfs", b.keep, "tmpfs", 0, "size=1m")
	})
	if err := UnmountIn(ns, b.target); !errors.Is(err, errCovered) {
		t.Errorf("got %v, want %v", err, errCovered)
	}
	in(func() error { return errors.Join(unix.Unmount(b.keep, 0), unix.Unmount(b.dir, 0)) })
	if err := UnmountIn(ns, b.target); err != nil {
		t.Error(err)
	}
}

// A namespace that lives on the keep, as a build sandbox does, is not taken apart.
func TestUnmountInRoot(t *testing.T) {
	b := newBed(t, "dir", "")
	ns, err := newSpace(b.view)
	if err != nil {
		t.Fatal(err)
	}
	defer ns.Close()
	in := func(f func() error) {
		t.Helper()
		if err := onThread(func() error { return errors.Join(enter(ns), f()) }); err != nil {
			t.Fatal(err)
		}
	}
	root := b.keep + "/home"
	in(func() error {
		mkdirs(t, root+"/old", root+"/t")
		return errors.Join(unix.Mount(root, root, "", unix.MS_BIND, ""), unix.PivotRoot(root, root+"/old"), unix.Chdir("/"),
			unix.Unmount("/old", unix.MNT_DETACH), unix.Mount("tmpfs", "/t", "tmpfs", 0, "size=1m"))
	})
	err = UnmountIn(ns, b.target)
	var ue *UnmountError
	if !errors.As(err, &ue) || ue.Point != "/" || !errors.Is(err, unix.EBUSY) {
		t.Errorf("got %v, want EBUSY at /", err)
	}
	in(func() error { return unix.Unmount("/t", 0) }) // still there
	b.wantOnly(os.Getpid(), NamespaceFile, "with /")
	ns.Close()
	b.wantNone("after")
}

// A copy in a namespace of a user namespace cannot be unmounted alone: the
// process is the holder, and the copy goes with it. A view with shared mounts
// takes it along instead.
func TestUnmountInLocked(t *testing.T) {
	for _, shared := range []bool{false, true} {
		t.Run(map[bool]string{false: "private view", true: "shared view"}[shared], func(t *testing.T) {
			need.Namespaces(t)
			b := newBed(t, "image", "")
			if shared {
				b.inView(func() error {
					return errors.Join(unix.Mount("", b.keep, "", unix.MS_SHARED, ""), unix.Mount("", b.merged, "", unix.MS_SHARED, ""),
						unix.Mount("", "/", "", unix.MS_SHARED|unix.MS_REC, ""))
				})
			}
			cmd := exec.Command(self(t))
			cmd.Env = roleEnv("wait")
			ids := []syscall.SysProcIDMap{{ContainerID: 0, HostID: 0, Size: 1}}
			cmd.SysProcAttr = &syscall.SysProcAttr{Cloneflags: unix.CLONE_NEWUSER | unix.CLONE_NEWNS, UidMappings: ids, GidMappings: ids}
			h := b.startCmd(b.view, cmd)
			b.wantOnly(h.pid, MountNamespace, b.keep)
			list, err := Namespaces(context.Background(), b.target)
			if err = exceptOffLimits(err); err != nil {
				t.Fatal(err)
			}
			for _, ns := range list {
				if ns.Inode == b.target.Namespace {
					continue
				}
				err := UnmountIn(ns.File, b.target)
				if !errors.Is(err, unix.EINVAL) {
					t.Errorf("got %v, want EINVAL", err)
				}
			}
			err = UnmountIn(b.view, b.target)
			if err != nil {
				t.Error(err)
			}
			if shared {
				b.wantNone("shared")
				return
			}
			b.want(h.pid, MountNamespace, b.keep)
			b.want(os.Getpid(), NamespaceFile, b.keep) // by the handles of list
			for _, ns := range list {
				ns.Close()
			}
			b.wantOnly(h.pid, MountNamespace, b.keep)
			h.end()
			b.wantNone("after")
		})
	}
}

func TestDescribe(t *testing.T) {
	b := newBed(t, "dir", "")
	if len(b.target.Trees) != 1 || b.target.Trees[0].Path != "/volume" || len(b.target.Trees[0].Key) != 32 || len(b.target.Devices) != 1 || len(b.target.Overlays) != 1 {
		t.Errorf("got %+v", b.target)
	}
	var me *MountPointError
	if _, err := Describe(b.view, []string{b.keep + "/home"}); !errors.As(err, &me) || me.Path != b.keep+"/home" {
		t.Errorf("got %v, want *MountPointError", err)
	}
	for _, point := range []string{b.dir + "/none", b.dir + "/none/deeper"} { // moved away: the caller looks again
		if _, err := Describe(b.view, []string{point}); !errors.As(err, &me) || me.Path != point {
			t.Errorf("got %v, want *MountPointError", err)
		}
	}
	if _, err := Describe(b.view, nil, b.dir+"/none"); !errors.Is(err, os.ErrNotExist) {
		t.Errorf("got %v, want not exist", err)
	}
	key := b.target.Trees[0].Key
	b = newBed(t, "sealed", "")
	if len(b.target.Trees) != 1 || b.target.Trees[0].Path != "/volume" || b.target.Trees[0].Key == key || len(b.target.Devices) != 2 || len(b.target.Files) != 1 {
		t.Errorf("got %+v", b.target)
	}
	b = newBed(t, "image", "")
	if len(b.target.Trees) != 0 || len(b.target.Devices) != 2 || len(b.target.Files) != 1 {
		t.Errorf("got %+v", b.target)
	}
}
