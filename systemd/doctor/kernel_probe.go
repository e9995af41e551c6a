package doctor

import (
	"context"
	"errors"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"strconv"
	"strings"
	"sync"

	"golang.org/x/sys/unix"

	"overkeep/crypt/secret"
	"overkeep/crypt/volume"
	"overkeep/overlay/layout"
	"overkeep/overlay/view"
)

func probeKernel(ctx context.Context) kernelFacts {
	ctx, cancel := context.WithTimeout(ctx, 2*patience)
	defer cancel()
	var k kernelFacts
	var all sync.WaitGroup
	all.Go(func() { k.sandbox, k.userNS = probeSandbox(ctx) })
	k.memory, k.pidfd, k.openat2 = probeCalls()
	k.userNSLimit = userNSLimit()
	if os.Geteuid() == 0 {
		k.tryKeeps(ctx)
	}
	all.Wait()
	// After the attempts: the kernel lists what it has made, and not what it could.
	if b, err := readBounded("/proc/crypto"); err == nil {
		k.aesDriver = aesDriver(b)
	}
	k.aesCPU = Unsure
	if b, err := readBounded("/proc/cpuinfo"); err == nil {
		k.aesCPU = cpuAES(b)
	}
	return k
}

func probeCalls() (memory, pidfd, openat2 outcome) {
	if s, err := secret.New(os.Getpagesize()); err != nil {
		memory = ended(err)
	} else {
		s.Wipe()
		memory = worked(memlockLimit())
	}
	fd, err := unix.PidfdOpen(os.Getpid(), 0)
	pidfd = ended(err)
	if err == nil {
		unix.Close(fd)
	}
	fd, err = unix.Openat2(unix.AT_FDCWD, "/", &unix.OpenHow{
		Flags: unix.O_PATH | unix.O_DIRECTORY | unix.O_CLOEXEC, Resolve: unix.RESOLVE_NO_SYMLINKS | unix.RESOLVE_NO_MAGICLINKS,
	})
	openat2 = ended(err)
	if err == nil {
		var st unix.Statx_t
		err = unix.Statx(fd, "", unix.AT_EMPTY_PATH, unix.STATX_MNT_ID, &st)
		if err == nil && st.Mask&unix.STATX_MNT_ID == 0 {
			err = unix.ENOSYS
		}
		openat2 = ended(err)
		unix.Close(fd)
	}
	return memory, pidfd, openat2
}

func memlockLimit() string {
	var l unix.Rlimit
	if unix.Getrlimit(unix.RLIMIT_MEMLOCK, &l) != nil {
		return ""
	}
	if l.Cur == unix.RLIM_INFINITY {
		return "no limit"
	}
	return fmt.Sprintf("limit %d KiB", l.Cur>>10)
}

// probeSandbox has children born in the namespaces of Nix's build sandbox.
func probeSandbox(ctx context.Context) (sandbox, user outcome) {
	const most = unix.CLONE_NEWNS | unix.CLONE_NEWPID | unix.CLONE_NEWNET | unix.CLONE_NEWIPC | unix.CLONE_NEWUTS
	if fi, err := os.Stat("/bin/sh"); err != nil || fi.Mode()&0o111 == 0 {
		none := ended(errors.New("there is no /bin/sh to start")) // says nothing of the kernel
		return none, none
	}
	try := func(flags uintptr) outcome {
		cmd := exec.CommandContext(ctx, "/bin/sh", "-c", ":")
		cmd.Env, cmd.Dir = []string{}, "/"
		cmd.SysProcAttr = &unix.SysProcAttr{Cloneflags: flags}
		_, err := output(cmd)
		return ended(err)
	}
	user = try(most | unix.CLONE_NEWUSER)
	if os.Geteuid() == 0 {
		sandbox = try(most)
	}
	return sandbox, user
}

// userNSLimit names a switch that keeps ordinary users from user namespaces.
func userNSLimit() string {
	for _, s := range []struct{ file, bad string }{
		{"/proc/sys/user/max_user_namespaces", "0"},
		{"/proc/sys/kernel/unprivileged_userns_clone", "0"},             // Debian's patch
		{"/proc/sys/kernel/apparmor_restrict_unprivileged_userns", "1"}, // AppArmor 4, Ubuntu
	} {
		b, err := readBounded(s.file)
		if err == nil && strings.TrimSpace(string(b)) == s.bad {
			return strings.ReplaceAll(strings.TrimPrefix(s.file, "/proc/sys/"), "/", ".") + " is " + s.bad
		}
	}
	return ""
}

// rest marks what was not reached.
func (k *kernelFacts) rest(o outcome) {
	k.pin, k.loop = o, o
	k.image = keepTrial{o, o, o, o}
	k.dir = k.image
}

// tryKeeps does in small, in a mount namespace that nobody else sees, what a keep
// does: everything lies on a tmpfs that ends with the namespace.
func (k *kernelFacts) tryKeeps(ctx context.Context) {
	k.enter = behind("mount namespaces")
	k.rest(k.enter)
	ns, err := view.NewNamespace()
	if k.namespace = ended(err); err != nil {
		return
	}
	defer ns.Close()
	trials.Lock()
	defer trials.Unlock()
	k.rest(behind("entering a namespace"))
	entered := false
	err = ns.Do(func() error {
		entered = true
		return k.inScratch(ctx)
	})
	if k.enter = ended(err); entered {
		k.enter = worked("")
	}
}

// inScratch runs on a thread of the private namespace. What of package volume and
// moby/sys/mountinfo reads the mount table does so by /proc/thread-self.
func (k *kernelFacts) inScratch(ctx context.Context) error {
	dir, done, err := scratch()
	if err != nil {
		k.rest(behind("a tmpfs in a private namespace (" + oneLine(err.Error()) + ")"))
		return err
	}
	k.pin = tryPin(filepath.Join(dir, "pin"))
	k.loop = ended(tryLoop(filepath.Join(dir, "file")))
	if k.loop.err == nil {
		probe := filepath.Join(dir, "probe")
		if err := os.Mkdir(probe, 0o700); err == nil {
			_ = patiently(func() error {
				k.encryption = volume.ProbeThrowaway(ctx, probe)
				return k.encryption.Err
			})
		}
		k.image = tryKeep(ctx, volume.Image, filepath.Join(dir, "image"))
		k.dir = tryKeep(ctx, volume.Dir, filepath.Join(dir, "dir"))
	} else {
		o := behind("loop devices")
		k.image = keepTrial{o, o, o, o}
		k.dir = k.image
	}
	_ = done()
	return nil
}

// scratchName shows in the names of the loop devices' files.
const scratchName = "overkeep-doctor"

// scratch mounts an empty tmpfs on a directory that every machine has, and makes
// dir in it; done unmounts it. Only for a private namespace.
func scratch() (dir string, done func() error, err error) {
	for _, at := range []string{"/tmp", "/mnt", "/media", "/var/tmp"} {
		if fi, serr := os.Lstat(at); serr != nil || !fi.IsDir() {
			continue
		}
		// Sparse images of some 100 MB, of which a few MB are written.
		if err = unix.Mount("tmpfs", at, "tmpfs", unix.MS_NODEV|unix.MS_NOSUID, "mode=0700,size=64m"); err != nil {
			continue
		}
		dir = filepath.Join(at, scratchName)
		done = func() error {
			err := patiently(func() error { return volume.Unmount(at) })
			if err != nil {
				// It hides nothing: the namespace is about to end, and takes it along.
				_ = unix.Unmount(at, unix.MNT_DETACH|unix.UMOUNT_NOFOLLOW)
			}
			return err
		}
		if err = os.Mkdir(dir, 0o700); err != nil {
			return "", nil, errors.Join(err, done())
		}
		return dir, done, nil
	}
	if err == nil {
		err = fmt.Errorf("none of /tmp, /mnt, /media and /var/tmp is a directory")
	}
	return "", nil, fmt.Errorf("mount a tmpfs: %w", err)
}

func tryPin(dir string) outcome {
	if err := os.Mkdir(dir, 0o700); err != nil {
		return ended(err)
	}
	ns, err := view.NewPinned(dir)
	if err != nil {
		return ended(err)
	}
	defer ns.Close()
	err = func() error {
		want, err := ns.Inode()
		if err != nil {
			return err
		}
		again, err := view.OpenNamespace(filepath.Join(dir, "mnt"))
		if err != nil {
			return wrong("what was pinned is not a namespace")
		}
		defer again.Close()
		if got, err := again.Inode(); err != nil || got != want {
			return wrong("another namespace came back")
		}
		return nil
	}()
	return ended(errors.Join(err, view.Unpin(dir)))
}

// tryLoop attaches a small file, without a mount, to a loop device that goes when
// it is closed.
func tryLoop(file string) error {
	f, err := os.OpenFile(file, os.O_RDWR|os.O_CREATE|os.O_EXCL|unix.O_CLOEXEC, 0o600)
	if err != nil {
		return err
	}
	defer f.Close()
	if err := errors.Join(os.Remove(file), f.Truncate(1<<20)); err != nil {
		return err
	}
	ctl, err := os.OpenFile("/dev/loop-control", os.O_RDWR|unix.O_CLOEXEC, 0)
	if err != nil {
		return err
	}
	defer ctl.Close()
	for range 64 { // another process may take the free device first
		n, err := unix.IoctlRetInt(int(ctl.Fd()), unix.LOOP_CTL_GET_FREE)
		if err != nil {
			return fmt.Errorf("find a free loop device: %w", err)
		}
		dev, err := os.OpenFile("/dev/loop"+strconv.Itoa(n), os.O_RDWR|unix.O_CLOEXEC, 0)
		if err != nil {
			return err
		}
		c := unix.LoopConfig{Fd: uint32(f.Fd())}
		c.Info.Flags = unix.LO_FLAGS_AUTOCLEAR
		err = unix.IoctlLoopConfigure(int(dev.Fd()), &c)
		dev.Close()
		if !errors.Is(err, unix.EBUSY) {
			return err
		}
	}
	return unix.EBUSY
}

// overlayMount is the overlay of a view, with the very options, over other layers.
func overlayMount(lower, upper, work, target string) (view.Mount, error) {
	k, err := layout.New("/", "doctor")
	if err != nil {
		return view.Mount{}, err
	}
	list, err := view.Mounts(k, view.User{Name: "doctor", Home: "/"}, view.Options{})
	if err != nil {
		return view.Mount{}, err
	}
	layers := map[string]string{"lowerdir": lower, "upperdir": upper, "workdir": work}
	for _, m := range list {
		if m.Kind != view.Overlay {
			continue
		}
		for i, o := range m.Options {
			name, _, _ := strings.Cut(o, "=")
			if dir, ok := layers[name]; ok {
				m.Options[i] = name + "=" + dir
				delete(layers, name)
			}
		}
		if len(layers) > 0 {
			break
		}
		m.Target = target
		return m, nil
	}
	return view.Mount{}, errors.New("the view has no overlay with three layers")
}

// tryKeep makes a volume below dir, opens it, mounts the overlay with its upper
// layer in it, uses it, and locks it with proof.
func tryKeep(ctx context.Context, b volume.Backend, dir string) (t keepTrial) {
	// What is not reached stays behind what failed.
	t.overlay, t.remount, t.proof = behind("the volume"), behind("the overlay"), behind("the volume")
	lower, at := filepath.Join(dir, "lower"), filepath.Join(dir, "k")
	upper, work, merged := filepath.Join(at, "upper"), filepath.Join(at, "work"), filepath.Join(dir, "merged")
	s := volume.Spec{
		Backend: b, Size: volume.MinSize, Dir: filepath.Join(dir, "fs", "volume"),
		FSImage: filepath.Join(dir, "image"), FSMount: filepath.Join(dir, "fs"),
	}
	key, err := secret.Random(volume.MasterLen)
	if err != nil {
		t.volume = ended(err)
		return t
	}
	defer key.Wipe()
	if t.volume = ended(mkdirs(dir, lower, merged)); t.volume.err != nil {
		return t
	}
	id, err := volume.Create(ctx, s, key, "overkeep doctor")
	if err == nil {
		err = volume.Open(ctx, s, id, key, at)
	}
	if t.volume = ended(err); err != nil {
		return t
	}
	t.overlay = ended(func() error {
		if err := mkdirs(upper, work); err != nil {
			return err
		}
		m, err := overlayMount(lower, upper, work, merged)
		if err != nil {
			return err
		}
		if err := errors.Join(writeFile(filepath.Join(lower, "kept"), "lower"), writeFile(filepath.Join(lower, "gone"), "lower")); err != nil {
			return err
		}
		if err := view.Make([]view.Mount{m}, view.User{}); err != nil {
			return err
		}
		err = useOverlay(lower, upper, merged)
		t.remount = ended(remountBusy(lower, merged, m.Flags))
		return errors.Join(err, undo(m))
	}())
	t.proof = ended(func() error {
		if err := patiently(func() error { return volume.Unmount(at) }); err != nil {
			return err
		}
		err := volume.RemoveKeyWait(ctx, s, id)
		if err == nil {
			err = volume.ProveLocked(s, id, "upper", "work")
		}
		return errors.Join(err, patiently(func() error { return volume.DetachFS(ctx, s) }))
	}())
	var open *volume.NotLockedError
	if errors.As(t.proof.err, &open) {
		t.proof = ended(wrong("%s", open.Reason))
	}
	return t
}

// useOverlay does what Nix does to a store: reads, adds, changes and deletes.
func useOverlay(lower, upper, merged string) error {
	in := func(name string) string { return filepath.Join(merged, name) }
	for _, f := range []func() error{
		func() error { return writeFile(in("new"), "upper") },
		func() error { return os.Chmod(in("kept"), 0o400) }, // copies it up
		func() error { return os.Remove(in("gone")) },       // whiteout
		func() error { return os.Rename(in("new"), in("newer")) },
	} {
		if err := f(); err != nil {
			return fmt.Errorf("use the overlay: %w", err)
		}
	}
	for path, want := range map[string]string{
		in("kept"): "lower", in("newer"): "upper", filepath.Join(upper, "kept"): "lower",
		filepath.Join(upper, "newer"): "upper", filepath.Join(lower, "gone"): "lower",
	} {
		if got, err := os.ReadFile(path); err != nil || string(got) != want {
			return wrong("a file came back changed")
		}
	}
	if _, err := os.Lstat(in("gone")); !errors.Is(err, os.ErrNotExist) {
		return wrong("a deleted file is still there")
	}
	if _, err := os.Lstat(filepath.Join(lower, "newer")); !errors.Is(err, os.ErrNotExist) {
		return wrong("the lower layer was written to")
	}
	return nil
}

// remountBusy looks a name up in vain, lets it appear in the lower layer, and
// sees whether a remount makes the overlay forget that it was missing, although
// a file of it is open.
func remountBusy(lower, merged string, flags uintptr) error {
	busy, err := os.Open(filepath.Join(merged, "kept"))
	if err != nil {
		return err
	}
	defer busy.Close()
	late := filepath.Join(merged, "late")
	if _, err := os.Lstat(late); !errors.Is(err, os.ErrNotExist) {
		return wrong("a name is there that nobody made")
	}
	if err := writeFile(filepath.Join(lower, "late"), "lower"); err != nil {
		return err
	}
	if err := unix.Mount("", merged, "", unix.MS_REMOUNT|flags, ""); err != nil {
		return fmt.Errorf("remount: %w", err)
	}
	if _, err := os.Lstat(late); err != nil {
		return wrong("a name that came later stays missing")
	}
	return nil
}

func mkdirs(dirs ...string) error {
	for _, d := range dirs {
		if err := os.Mkdir(d, 0o700); err != nil {
			return err
		}
	}
	return nil
}

func writeFile(path, content string) error { return os.WriteFile(path, []byte(content), 0o600) }
