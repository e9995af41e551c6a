package keep

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"time"

	"github.com/moby/sys/mountinfo"
	"golang.org/x/sys/unix"

	"overkeep/crypt/crashpoint"
	"overkeep/crypt/volume"
	"overkeep/overlay/holder"
	"overkeep/overlay/view"
)

// LockMode says what happens to what holds a keep.
type LockMode string

const (
	LockRefuse LockMode = ""     // name the holders and give up: nothing was taken from them
	LockWait   LockMode = "wait" // refuse new work and wait until they are done
	LockKill   LockMode = "kill" // end them: SIGTERM, then SIGKILL
)

// LockResult says what Lock did.
type LockResult struct {
	Keep    string          `json:"keep"`
	Already bool            `json:"already"`         // it was locked before
	Ended   []holder.Holder `json:"ended,omitempty"` // what LockKill brought to an end
}

// Times of the lock. They bound waiting; none is a condition for success.
const (
	keyGrace    = 2 * time.Second        // for files that the kernel is still evicting after an unmount
	workerGrace = 20 * time.Second       // for a worker of the daemon's whose client has gone
	kernelGrace = 5 * time.Second        // for what no process holds
	killGrace   = 5 * time.Second        // between SIGTERM and SIGKILL
	answerGrace = 30 * time.Second       // for the system's nix-daemon
	lookAgain   = 100 * time.Millisecond // between two looks at holders that may let go without ending
)

// Lock closes the keep. It returns nil only with proof: every mount is gone in
// every namespace, the kernel says that the key is absent, and names in the
// encrypted directory are ciphertext. Else the error has CodeNotLocked and names
// the holders.
func (k *Keep) Lock(ctx context.Context, mode LockMode) (*LockResult, error) {
	if err := requireRoot(); err != nil {
		return nil, err
	}
	release, err := runLock(k.Keep)
	if err != nil {
		return nil, err
	}
	defer release()
	r, err := k.lock(ctx, mode)
	if err != nil {
		return nil, classified(err)
	}
	return r, nil
}

// lock is Lock with the run lock held.
//
// The order is that of the proof: first look who holds the keep, so that a
// refusal changes nothing; refuse new work; end or wait for holders; unmount;
// remove the key; prove; only then forget the namespace.
func (k *Keep) lock(ctx context.Context, mode LockMode) (*LockResult, error) {
	ns, err := existingNamespace(k.Keep)
	if err != nil {
		return nil, err
	}
	pinned := ns != nil
	if !pinned {
		if err := ensureRunDirs(k.Keep); err != nil {
			return nil, err
		}
		if ns, err = privateNamespace(); err != nil {
			return nil, err
		}
	}
	defer ns.Close()
	req := request{Root: k.Root, Name: k.Name, StateDir: k.StateDir(), Header: k.Header, Locking: mode}
	if u, err := k.Header.viewUser(); err == nil {
		req.User = u
	}
	result := &LockResult{Keep: k.Name}
	event := func(name string, v json.RawMessage) {
		var hs []holder.Holder
		switch {
		case name == "waiting" && json.Unmarshal(v, &hs) == nil:
			k.m.progress(fmt.Sprintf("waiting for %s and %d more", hs[0], len(hs)-1))
		case name == "ended" && json.Unmarshal(v, &hs) == nil:
			result.Ended = append(result.Ended, hs...)
		}
	}
	crashpoint.At("lock.close")
	var closed closeResult
	if _, err := k.m.child(ctx, "close", req, childOptions{ns: ns, event: event}, &closed); err != nil {
		if !pinned {
			removeRunDirs(k.Keep) // what this call made; anything in use stays
		}
		return nil, err
	}
	result.Already = closed.Already && !pinned
	crashpoint.At("lock.unpin")
	if err := k.forgetNamespace(ns); err != nil {
		return nil, err
	}
	return result, nil
}

// forgetNamespace drops the pin and the run directories, unless sessions still
// live in the namespace: the next unlock then opens the keep where they are.
func (k *Keep) forgetNamespace(ns *view.Namespace) error {
	ino, err := ns.Inode()
	if err != nil {
		return err
	}
	if inhabited(ino) {
		return nil
	}
	if err := view.Unpin(k.NamespaceDir()); err != nil {
		return err
	}
	removeRunDirs(k.Keep)
	return nil
}

type closeResult struct {
	Already bool `json:"already"`
}

// opClose is the lock itself, run inside the namespace. It can be repeated from
// wherever an earlier one was interrupted.
func opClose(ctx context.Context, c *call) (any, error) {
	l, err := newLocker(c)
	if err != nil {
		return nil, err
	}
	// A look before anything is changed, so that a refusal changes nothing.
	if c.Locking == LockRefuse {
		hs := l.holders(ctx, l.own())
		// A worker outlives its client, on a busy machine by seconds; one that builds for
		// a client does not go.
		for began := time.Now(); len(hs) > 0 && l.workersOnly(hs) && time.Since(began) < workerGrace; {
			if time.Since(began) > keyGrace && slices.ContainsFunc(hs, hasClient) {
				break
			}
			if err := sleep(ctx, lookAgain); err != nil {
				return nil, err
			}
			hs = l.holders(ctx, l.own())
		}
		if len(hs) > 0 {
			return nil, l.notLocked("the keep is in use", hs)
		}
	}
	defer func() { l.ending.close() }()
	if c.Locking == LockKill {
		if err := l.endFirst(ctx); err != nil {
			return nil, err
		}
	}
	l.stopSupervisor(c.Locking)
	for {
		err := l.attempt(ctx)
		if err == nil {
			// Device numbers are used again, by anybody.
			return closeResult{l.already}, removeIfThere(l.targetFile())
		}
		var vb *volume.BusyError
		var wb *view.BusyError
		var ub *holder.UnmountError
		// The user may move mount points about while they are being unmounted.
		moved := errors.Is(err, fs.ErrNotExist) || errors.Is(err, unix.ENOTDIR) || errors.Is(err, unix.ELOOP)
		if !errors.As(err, &vb) && !errors.As(err, &wb) && !errors.As(err, &ub) && !errors.Is(err, errHeld) && !moved {
			return nil, err
		}
		l.ending.wait()
		hs := l.holders(ctx, nil)
		if err := l.deal(ctx, err, hs); err != nil {
			return nil, err
		}
	}
}

// opHolders looks who holds the keep.
func opHolders(ctx context.Context, c *call) (any, error) {
	l, err := newLocker(c)
	if err != nil {
		return nil, err
	}
	return l.holders(ctx, l.own()), nil
}

// errHeld says that processes hold the keep; they are looked up again.
var errHeld = errors.New("the keep is in use")

// locker is the lock in progress.
type locker struct {
	c       *call
	spec    volume.Spec
	id      volume.ID
	list    []view.Mount
	target  holder.Target
	unseen  string // what the last look for holders could not look at
	absent  bool   // the kernel had no key when this lock began
	already bool
	ending  *ending   // the supervisor, if it said that it is done and is about to end
	busy    time.Time // since when nothing but the kernel itself holds it; zero: not
}

func newLocker(c *call) (*locker, error) {
	set, _, err := loadSlots(c.slotsDir(), c.Name)
	if err != nil {
		return nil, err
	}
	l := &locker{c: c, spec: c.spec(), id: volumeID(set)}
	if l.list, err = view.Mounts(c.k, c.User, view.Options{WorkDir: c.Header.WorkDir}); err != nil {
		return nil, err
	}
	// Asked before the description: an absent key stays absent, for whoever adds it
	// waits for this lock.
	st, err := volume.KeyStatus(l.spec, l.id)
	l.absent = err == nil && st == volume.Absent
	if err := l.describe(); err != nil {
		return nil, err
	}
	l.already = l.absent && len(l.target.Mounts) == 0
	return l, nil
}

// describe is describeOnce, again when a mount point was moved meanwhile.
func (l *locker) describe() (err error) {
	var moved *holder.MountPointError
	for range 50 {
		if err = l.describeOnce(); !errors.As(err, &moved) {
			return err
		}
		time.Sleep(time.Millisecond)
	}
	return err
}

// describeOnce says what is to be freed, by the mounts of the namespace this process
// lives in. They go one by one, so the first description is kept for whoever has
// to finish the lock.
func (l *locker) describeOnce() error {
	self, err := os.Open("/proc/self/ns/mnt")
	if err != nil {
		return err
	}
	defer self.Close()
	infos, err := mountinfo.GetMounts(nil)
	if err != nil {
		return err
	}
	k := l.c.k
	there, err := view.Mounted(l.list)
	if err != nil {
		return err
	}
	// Every mount of the volume in this namespace, wherever a session has bound or
	// moved it: they go with the lock and hold nothing against it.
	points := volumePoints(infos, k.Volume())
	for i, m := range l.list {
		if m.Kind == view.Overlay && there[i] {
			points = append(points, m.Target)
		}
	}
	if mountedAt(infos, k.FSMount()) {
		points = append(points, k.FSMount())
	}
	var files []string
	if l.spec.FSImage != "" {
		files = append(files, l.spec.FSImage)
	}
	if isDir(l.spec.Dir) {
		files = append(files, l.spec.Dir) // what is open there keeps the key busy
	}
	if l.target, err = holder.Describe(self, points, files...); err != nil {
		return err
	}
	file := l.targetFile()
	var before holder.Target
	// Without a key no file of the volume is open, the image among them, so whatever
	// lay on it is gone; its device numbers are anybody's by now. What an FSImage may
	// still be held by is told by that file itself, which is part of every target.
	if b, err := readSmall(file, 1<<20); !l.absent && err == nil && strictJSON(b, &before) == nil && before.Namespace == l.target.Namespace {
		l.target = merge(before, l.target)
	}
	if len(points) == 0 {
		return nil
	}
	return writeFile(file, encode(l.target), 0o600)
}

// volumePoints are the mount points of the file system (or, of a directory, the
// part of it) that is mounted at volume.
func volumePoints(infos []*mountinfo.Info, volume string) []string {
	i := slices.IndexFunc(infos, func(i *mountinfo.Info) bool { return i.Mountpoint == volume })
	if i < 0 {
		return nil
	}
	v := infos[i]
	below := strings.TrimSuffix(v.Root, "/") + "/"
	var out []string
	for _, i := range infos {
		if i.Major == v.Major && i.Minor == v.Minor && (i.Root == v.Root || strings.HasPrefix(i.Root, below)) {
			out = append(out, i.Mountpoint)
		}
	}
	return out
}

// targetFile is where the description is kept from the first step of a lock to
// its proof.
func (l *locker) targetFile() string { return filepath.Join(l.c.k.RunDir(), "target.json") }

// merge joins what an interrupted lock had described with what is there now.
func merge(a, b holder.Target) holder.Target {
	a.Devices = union(a.Devices, b.Devices)
	a.Overlays = union(a.Overlays, b.Overlays)
	a.Trees = union(a.Trees, b.Trees)
	a.Mounts = append(a.Mounts, b.Mounts...)
	a.Files = union(a.Files, b.Files)
	a.Loops = union(a.Loops, b.Loops)
	return a
}

func union[T comparable](a, b []T) []T {
	for _, x := range b {
		if !slices.Contains(a, x) {
			a = append(a, x)
		}
	}
	return a
}

// notLocked is the error that names the holders.
func (l *locker) notLocked(why string, hs []holder.Holder) error {
	return &Error{Code: CodeNotLocked, Name: l.c.Name, Holders: hs,
		Message: fmt.Sprintf("keep %q is NOT locked: %s%s", l.c.Name, why, l.unseen)}
}

// deal applies the lock mode to what holds the keep: nil means try again.
func (l *locker) deal(ctx context.Context, why error, hs []holder.Holder) error {
	if !slices.ContainsFunc(hs, func(h holder.Holder) bool { return h.PID > 0 }) {
		// Something let go between the attempt and the look; or a device is on its
		// way out, which whoever looks at it (udev, another lock) delays; or it is
		// one of the few things that show nowhere in /proc.
		if l.busy.IsZero() {
			l.busy = time.Now()
		}
		if time.Since(l.busy) < kernelGrace || l.c.Locking == LockWait {
			if sleep(ctx, lookAgain) != nil {
				return l.notLocked("interrupted while waiting", hs)
			}
			return nil
		}
		if len(hs) == 0 {
			return l.notLocked(why.Error()+", and nothing in /proc shows who", nil)
		}
		return l.notLocked("held by what is no process", hs)
	}
	l.busy = time.Time{}
	switch l.c.Locking {
	case LockKill:
		var procs []holder.Holder
		for _, h := range hs {
			if h.PID > 0 {
				procs = append(procs, h)
			}
		}
		ctx, cancel := context.WithTimeout(ctx, 2*killGrace)
		defer cancel()
		if err := holder.End(ctx, procs, killGrace); err != nil {
			return l.notLocked(err.Error(), hs)
		}
		l.c.event("ended", procs)
		return nil
	case LockWait:
		l.c.event("waiting", hs)
		if err := sleep(ctx, lookAgain); err != nil {
			return l.notLocked("interrupted while waiting", hs)
		}
		return nil
	}
	return l.notLocked("the keep is in use", hs)
}

func sleep(ctx context.Context, d time.Duration) error {
	t := time.NewTimer(d)
	defer t.Stop()
	select {
	case <-ctx.Done():
		return ctx.Err()
	case <-t.C:
		return nil
	}
}

// stopSupervisor refuses new work and ends the supervisor. With workers left it
// stays to answer them for the system store, unless everything is to be killed.
func (l *locker) stopSupervisor(mode LockMode) {
	pid := supervisorPID(l.c.k)
	if pid == 0 {
		return
	}
	crashpoint.At("lock.drain")
	answer, err := control(l.c.k, "drain")
	if err == nil && mode != LockKill && answer != "workers 0" {
		return
	}
	e := expectEnd(pid)
	if err == nil {
		_, err = control(l.c.k, "stop")
	}
	if err != nil {
		e.signal(unix.SIGTERM)
		e.wait()
		e.close()
		return
	}
	// It has let go of the keep and does nothing more. The kernel takes some 20 ms to
	// end it (it had inotify watches); meanwhile the unmounting begins, and is done only
	// when it is gone.
	l.ending = e
}

// attempt goes through the lock once, from the mounts to the proof.
func (l *locker) attempt(ctx context.Context) error {
	if l.ending == nil && supervisorPID(l.c.k) != 0 {
		// Workers were left; are they done now?
		if answer, err := control(l.c.k, "drain"); err == nil && answer != "workers 0" {
			return errHeld
		}
		l.stopSupervisor(LockKill)
	}
	crashpoint.At("lock.copies")
	if err := l.unmountCopies(ctx); err != nil {
		return err
	}
	crashpoint.At("lock.view")
	if err := errors.Join(view.Undo(l.list), l.coverSessions()); err != nil {
		return err
	}
	// And whatever else of the keep is mounted here: binds that a session made,
	// or mount points that the user has moved since.
	if err := unmountOwn(l.target); err != nil {
		return err
	}
	if err := volume.Unmount(l.c.k.Volume()); err != nil {
		return err
	}
	crashpoint.At("lock.key")
	if err := removeKey(ctx, l.spec, l.id); err != nil {
		return err
	}
	// An absent key means that the kernel has evicted every file that had it. Should
	// a name be left all the same, the caches go, and then it counts.
	if err := volume.ProveLocked(l.spec, l.id, innerNames...); err != nil {
		if err := errors.Join(volume.DropCaches(), volume.ProveLocked(l.spec, l.id, innerNames...)); err != nil {
			return err
		}
	}
	crashpoint.At("lock.detach")
	ctx, cancel := context.WithTimeout(ctx, keyGrace)
	defer cancel()
	if err := volume.DetachFS(ctx, l.spec); err != nil {
		return err
	}
	if !l.ending.wait() {
		return errHeld // it knows names of the keep
	}
	return nil
}

// coverSessions sees to it that a session which outlives the lock cannot fall back
// to plaintext: the personal daemon's directory stays where the system's would
// appear, and the caches in the home are covered.
func (l *locker) coverSessions() error {
	var st unix.Stat_t
	if err := unix.Stat("/proc/self/ns/mnt", &st); err != nil {
		return err
	}
	if !inhabited(st.Ino, l.ending.process()) {
		return nil
	}
	return view.Cover(l.list, l.c.User, l.c.k.Cover())
}

func unmountOwn(t holder.Target) error {
	self, err := os.Open("/proc/self/ns/mnt")
	if err != nil {
		return err
	}
	defer self.Close()
	return holder.UnmountIn(self, t)
}

// removeKey repeats until the kernel says that no file has the key any more.
func removeKey(ctx context.Context, spec volume.Spec, id volume.ID) error {
	ctx, cancel := context.WithTimeout(ctx, keyGrace)
	defer cancel()
	return volume.RemoveKeyWait(ctx, spec, id)
}

// unmountCopies unmounts the keep in every other namespace that inherited it.
func (l *locker) unmountCopies(ctx context.Context) error {
	copies, err := holder.Namespaces(ctx, l.target)
	var incomplete *holder.IncompleteError
	if err != nil && !errors.As(err, &incomplete) {
		return err // what could not be looked at is left to the kernel's word on the key
	}
	defer func() {
		for _, n := range copies {
			n.Close()
		}
	}()
	for _, n := range copies {
		if n.Inode == l.target.Namespace {
			continue
		}
		if err := holder.UnmountIn(n.File, l.target); err != nil {
			return err
		}
	}
	return nil
}

// holders names what holds the keep; incomplete looks are as good as none.
func (l *locker) holders(ctx context.Context, skip map[int]bool) []holder.Holder {
	hs, err := holder.Scan(ctx, l.target, func(pid int) bool { return pid == os.Getpid() || skip[pid] })
	var incomplete *holder.IncompleteError
	if l.unseen = ""; errors.As(err, &incomplete) {
		l.unseen = "; " + incomplete.Error()
	}
	return hs
}
