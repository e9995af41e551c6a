package slot

import (
	"encoding/hex"
	"errors"
	"fmt"
	"io/fs"
	"math"
	"os"
	"os/exec"
	"path/filepath"
	"reflect"
	"runtime"
	"slices"
	"strconv"
	"strings"
	"sync"
	"syscall"
	"testing"

	"golang.org/x/sys/unix"

	"overkeep/crypt/crashpoint"
	"overkeep/crypt/secret"
	"overkeep/tests/bed/loop"
	"overkeep/tests/need"
)

// commitMain commits the set of SLOT_JOB to SLOT_COMMIT and dies on the way, as
// the OVERKEEP_CRASH_ variables say. Built with the tag inject it is crashpoint
// itself that obeys them.
func commitMain() {
	raw, err := hex.DecodeString(os.Getenv("SLOT_MASTER"))
	orDie(err)
	master, err := secret.From(raw)
	orDie(err)
	s, files, err := Load(os.Getenv("SLOT_JOB"))
	orDie(err)
	if !crashpoint.Enabled {
		step = crashStep
	}
	orDie(Commit(os.Getenv("SLOT_COMMIT"), s, files.Content, master))
}

func orDie(err error) {
	if err != nil {
		fmt.Fprintln(os.Stderr, err)
		os.Exit(1)
	}
}

var crashSteps int

// crashStep does what crashpoint.At does in a build with the tag inject.
func crashStep(name string) {
	log, err := os.OpenFile(os.Getenv("OVERKEEP_CRASH_LOG"), os.O_WRONLY|os.O_APPEND|os.O_CREATE, 0o600)
	orDie(err)
	_, err = fmt.Fprintln(log, name)
	orDie(err)
	log.Close()
	if crashSteps++; strconv.Itoa(crashSteps) != os.Getenv("OVERKEEP_CRASH_AT") {
		return
	}
	if path, ok := strings.CutPrefix(os.Getenv("OVERKEEP_CRASH_HOW"), "shutdown:"); ok {
		d, err := os.Open(path)
		orDie(err)
		// EXT4_IOC_SHUTDOWN with EXT4_GOING_FLAGS_NOLOGFLUSH (fs/ext4/ext4.h).
		orDie(unix.IoctlSetPointerInt(int(d.Fd()), 2<<30|4<<16|'X'<<8|125, 2))
	}
	syscall.Kill(os.Getpid(), syscall.SIGKILL)
	select {}
}

// crash runs commitMain. It returns the steps that were begun and whether it died.
func crash(t *testing.T, k *keep, job, dir string, at int, power bool) (steps []string, died bool) {
	t.Helper()
	log, how := filepath.Join(t.TempDir(), "log"), "kill"
	if power {
		how = "shutdown:" + filepath.Dir(dir)
	}
	cmd := exec.Command(os.Args[0])
	cmd.Env = append(os.Environ(), "SLOT_COMMIT="+dir, "SLOT_JOB="+job,
		"SLOT_MASTER="+hex.EncodeToString(k.master.Bytes()),
		"OVERKEEP_CRASH_LOG="+log, "OVERKEEP_CRASH_HOW="+how, fmt.Sprintf("OVERKEEP_CRASH_AT=%d", at))
	out, err := cmd.CombinedOutput()
	steps = strings.Split(strings.TrimSpace(string(read(t, log))), "\n")
	if err == nil {
		return steps, false
	}
	status := cmd.ProcessState.Sys().(syscall.WaitStatus)
	if !status.Signaled() || status.Signal() != syscall.SIGKILL {
		t.Fatalf("step %d: %v %s", at, err, out)
	}
	return steps, true
}

// nextOf makes the set that is to follow k's, with one slot changed, one removed
// and one added, in a directory of its own.
func nextOf(t *testing.T, k *keep) (job string, next *keep) {
	t.Helper()
	n := *k
	n.dir = filepath.Join(t.TempDir(), "job")
	n.files = map[string][]byte{}
	for name, b := range k.files {
		n.files[name] = b
	}
	var err error
	for _, do := range []func() (*Set, error){
		func() (*Set, error) { return n.set.Confirm() },
		func() (*Set, error) { x, _ := n.set.Lookup("alice"); return n.set.Replace(x) },
		func() (*Set, error) { return n.set.Remove("laptop", false) },
	} {
		if n.set, err = do(); err != nil {
			t.Fatal(err)
		}
	}
	delete(n.files, "laptop")
	n.pass = sec(t, "battery staple")
	p, err := NewPassphraseRecipient(n.pass, testLogN)
	if err != nil {
		t.Fatal(err)
	}
	if n.files["alice"], err = Wrap(n.master, p); err != nil {
		t.Fatal(err)
	}
	n.add(t, Slot{Name: "desktop", Kind: X25519, Created: testTime}, k.laptop.Recipient())
	n.commit(t)
	return n.dir, &n
}

// state says which complete set is in dir: "old", "new", or "none".
func state(t *testing.T, dir string, old, next *keep) string {
	t.Helper()
	s, files, err := Load(dir)
	if errors.Is(err, fs.ErrNotExist) {
		return "none"
	}
	if err != nil {
		t.Fatal(err)
	}
	if len(files.Findings) != 0 {
		t.Fatal(files.Findings)
	}
	if err := s.VerifyMAC(old.master); err != nil {
		t.Fatal(err)
	}
	for name, k := range map[string]*keep{"old": old, "new": next} {
		if s.Epoch == k.set.Epoch && reflect.DeepEqual(files.Content, k.files) {
			if m, _, err := s.Open(files, Keys{Passphrase: k.pass}, "alice"); err != nil || !m.Equal(old.master) {
				t.Fatal(name, err)
			}
			return name
		}
	}
	t.Fatalf("neither the old nor the new set, but epoch %d", s.Epoch)
	return ""
}

// crashEverywhere kills a Commit before every one of its steps, and after each
// checks what is left with reopen (which may remount). With fresh, dir does not
// exist before.
func crashEverywhere(t *testing.T, dir string, fresh, power bool, reopen func()) {
	old := newKeep(t)
	job, next := nextOf(t, old)
	renamed := false
	for at := 1; ; at++ {
		os.RemoveAll(dir)
		os.RemoveAll(dir + newSuffix)
		if !fresh {
			s := *old.set
			if err := Commit(dir, &s, old.files, old.master); err != nil {
				t.Fatal(err)
			}
		}
		unix.Sync()
		steps, died := crash(t, old, job, dir, at, power)
		reopen()
		got := state(t, dir, old, next)
		if !died {
			if got != "new" || at < 15 {
				t.Fatalf("%s set after %d steps", got, at-1)
			}
			t.Logf("crashed before each of %d steps: %q", len(steps), steps)
			return
		}
		last := steps[len(steps)-1]
		if len(steps) != at {
			t.Fatalf("died at step %d, not %d", len(steps), at)
		}
		want := []string{"old"}
		if fresh {
			want = []string{"none"}
		}
		switch {
		case renamed && last == "slot: fsync parent":
			want = append(want, "new") // renamed, but not durable yet
		case renamed:
			want = []string{"new"}
		}
		if !slices.Contains(want, got) {
			t.Errorf("before step %d (%s): the set is %s, want %s", at, last, got, want)
		}
		renamed = renamed || last == "slot: rename"

		// The next Commit works, whatever lies about, and leaves nothing.
		again := *next.set
		again.Epoch = 1000
		if at%2 == 0 {
			if err := Sweep(dir); err != nil {
				t.Errorf("after step %d: sweep: %v", at, err)
			}
		}
		if err := Commit(dir, &again, next.files, next.master); err != nil {
			t.Errorf("after step %d: %v", at, err)
		}
		if s, files, err := Load(dir); err != nil || s.Epoch != 1000 || len(files.Findings) != 0 {
			t.Errorf("after step %d: %v", at, err)
		}
		alone(t, dir)
	}
}

// alone asserts that nothing lies beside dir.
func alone(t *testing.T, dir string) {
	t.Helper()
	list, err := os.ReadDir(filepath.Dir(dir))
	if err != nil {
		t.Fatal(err)
	}
	for _, e := range list {
		if e.Name() != filepath.Base(dir) && e.Name() != "lost+found" {
			t.Errorf("left over: %s", e.Name())
		}
	}
}

func TestKillDuringCommit(t *testing.T) {
	for name, fresh := range map[string]bool{"replace": false, "create": true} {
		t.Run(name, func(t *testing.T) {
			crashEverywhere(t, filepath.Join(t.TempDir(), "slots"), fresh, false, func() {})
		})
	}
}

// TestPowerCut drops everything ext4 has not been told to keep, before every step
// of a Commit. It runs itself once more in a mount namespace of its own, which
// takes the mounts with it.
func TestPowerCut(t *testing.T) {
	need.Root(t)
	need.Tool(t, "mkfs.ext4")
	cmd := exec.Command(os.Args[0], "-test.run=^TestPowerCutInside$", "-test.v")
	cmd.Env = append(os.Environ(), "SLOT_INSIDE=1")
	cmd.SysProcAttr = &syscall.SysProcAttr{Unshareflags: syscall.CLONE_NEWNS}
	out, err := cmd.CombinedOutput()
	t.Logf("%s", out)
	if err != nil || strings.Count(string(out), "crashed before each of") != 2 {
		t.Error(err)
	}
}

func TestPowerCutInside(t *testing.T) {
	if os.Getenv("SLOT_INSIDE") == "" {
		return // TestPowerCut runs it
	}
	tmp := t.TempDir()
	image, mnt := filepath.Join(tmp, "image"), filepath.Join(tmp, "mnt")
	for _, err := range []error{os.WriteFile(image, nil, 0o600), os.Truncate(image, 16<<20), os.Mkdir(mnt, 0o700)} {
		if err != nil {
			t.Fatal(err)
		}
	}
	if out, err := exec.Command("mkfs.ext4", "-q", image).CombinedOutput(); err != nil {
		t.Fatalf("mkfs.ext4: %v %s", err, out)
	}
	dev, err := loop.Attach(image)
	if err != nil {
		t.Fatal(err)
	}
	defer dev.Close()
	mount := func() {
		if err := unix.Mount(dev.Path, mnt, "ext4", 0, ""); err != nil {
			t.Fatal(err)
		}
	}
	umount := func() {
		if err := unix.Unmount(mnt, 0); err != nil {
			t.Fatal(err)
		}
	}
	mount()
	defer umount()
	for name, fresh := range map[string]bool{"replace": false, "create": true} {
		t.Run(name, func(t *testing.T) {
			crashEverywhere(t, filepath.Join(mnt, "slots"), fresh, true, func() { umount(); mount() })
		})
	}
}

func TestCommitRefuses(t *testing.T) {
	k := newKeep(t)
	before, _ := k.load(t)
	bump := func(change func(*Set)) *Set {
		s := *k.set
		s.Slots = slices.Clone(k.set.Slots)
		s.Epoch++
		change(&s)
		return &s
	}
	rsaFile := func() map[string][]byte {
		m := map[string][]byte{}
		for name, b := range k.files {
			m[name] = b
		}
		m["laptop"] = k.files["alice"]
		return m
	}
	for what, tt := range map[string]struct {
		next   *Set
		files  map[string][]byte
		master *secret.Bytes
		want   any
	}{
		"another master":   {bump(func(*Set) {}), k.files, newMaster(t), new(*TamperError)},
		"no master":        {bump(func(*Set) {}), k.files, nil, new(*FormatError)},
		"same epoch":       {bump(func(s *Set) { s.Epoch-- }), k.files, k.master, new(*StaleError)},
		"older epoch":      {bump(func(s *Set) { s.Epoch = 0 }), k.files, k.master, new(*StaleError)},
		"another keep":     {bump(func(s *Set) { s.KeepID = "other" }), k.files, k.master, new(*TamperError)},
		"another policy":   {bump(func(s *Set) { s.Policy = strings.Repeat("0", 32) }), k.files, k.master, new(*TamperError)},
		"version":          {bump(func(s *Set) { s.Version = 2 }), k.files, k.master, new(*VersionError)},
		"feature":          {bump(func(s *Set) { s.Features = []string{"x"} }), k.files, k.master, new(*FeatureError)},
		"no slot":          {bump(func(s *Set) { s.Slots = nil }), nil, k.master, new(*FormatError)},
		"no file":          {bump(func(*Set) {}), map[string][]byte{}, k.master, new(*SlotError)},
		"file of no slot":  {bump(func(s *Set) { s.Slots = s.Slots[:2]; s.Confirmed = false }), k.files, k.master, new(*SlotError)},
		"kind of the file": {bump(func(*Set) {}), rsaFile(), k.master, new(*FormatError)},
	} {
		err := Commit(k.dir, tt.next, tt.files, tt.master)
		if err == nil || !errors.As(err, tt.want) {
			t.Errorf("%s: %v", what, err)
		}
		alone(t, k.dir)
	}
	after, files := k.load(t)
	if !reflect.DeepEqual(before, after) || len(files.Findings) != 0 {
		t.Error("a refused commit changed the set")
	}
	for _, dir := range []string{"/", ".", "..", "", k.dir + "/.."} {
		if err := Commit(dir, bump(func(*Set) {}), k.files, k.master); err == nil {
			t.Errorf("committed to %q", dir)
		}
	}
	if err := Commit(filepath.Join(k.dir, "none", "slots"), bump(func(*Set) {}), k.files, k.master); !errors.Is(err, fs.ErrNotExist) {
		t.Errorf("no parent: %v", err)
	}
}

// A newer format is never replaced, a damaged set.json is.
func TestCommitOverDamage(t *testing.T) {
	for what, tt := range map[string]struct {
		content []byte
		ok      bool
	}{
		"newer":   {document(`"version":1`, `"version":2`), false},
		"feature": {document(`"features":[]`, `"features":["x"]`), false},
		"garbage": {[]byte("garbage"), true},
		"empty":   {nil, true},
	} {
		k := newKeep(t)
		overwrite(t, k.path(setFile), tt.content)
		next := *k.set
		next.Epoch++
		if err := Commit(k.dir, &next, k.files, k.master); (err == nil) != tt.ok {
			t.Errorf("%s: %v", what, err)
		}
		if _, err := k.open(t, identities(k.laptop), ""); (err == nil) != tt.ok {
			t.Errorf("%s: %v", what, err)
		}
		alone(t, k.dir)
	}
}

// What is not ours is never deleted: it stops Commit before it changes anything.
func TestCommitForeign(t *testing.T) {
	for what, put := range map[string]func(t *testing.T, k *keep) string{
		"file in the set": func(t *testing.T, k *keep) string {
			overwrite(t, k.path("notes.txt"), []byte("x"))
			return k.path("notes.txt")
		},
		"directory in the set": func(t *testing.T, k *keep) string {
			if err := os.MkdirAll(k.path("a.age/b"), 0o700); err != nil {
				t.Fatal(err)
			}
			return k.path("a.age/b")
		},
		"file in the leftover": func(t *testing.T, k *keep) string {
			if err := os.Mkdir(k.dir+newSuffix, 0o700); err != nil {
				t.Fatal(err)
			}
			overwrite(t, k.dir+newSuffix+"/notes.txt", []byte("x"))
			return k.dir + newSuffix + "/notes.txt"
		},
		"leftover is a link": func(t *testing.T, k *keep) string {
			target := filepath.Join(t.TempDir(), "set.json")
			overwrite(t, target, []byte("x"))
			if err := os.Symlink(filepath.Dir(target), k.dir+newSuffix); err != nil {
				t.Fatal(err)
			}
			return target
		},
		"leftover is a file": func(t *testing.T, k *keep) string {
			overwrite(t, k.dir+newSuffix, []byte("x"))
			return k.dir + newSuffix
		},
	} {
		k := newKeep(t)
		path := put(t, k)
		next := *k.set
		next.Epoch++
		if err := Commit(k.dir, &next, k.files, k.master); err == nil {
			t.Errorf("%s: committed", what)
		}
		if _, err := os.Stat(path); err != nil {
			t.Errorf("%s: %v", what, err)
		}
		if s, _ := k.load(t); s.Epoch != k.set.Epoch {
			t.Errorf("%s: the set was replaced", what)
		}
	}
	// A link in the place of a slot file is unlinked, not followed.
	k := newKeep(t)
	target := filepath.Join(t.TempDir(), "precious")
	overwrite(t, target, []byte("x"))
	os.Remove(k.path("alice.age"))
	if err := os.Symlink(target, k.path("alice.age")); err != nil {
		t.Fatal(err)
	}
	next := *k.set
	next.Epoch++
	if err := Commit(k.dir, &next, k.files, k.master); err != nil {
		t.Fatal(err)
	}
	if string(read(t, target)) != "x" {
		t.Error("followed a link")
	}
	if fi, err := os.Stat(k.dir); err != nil || fi.Mode().Perm() != 0o700 {
		t.Error(fi.Mode(), err)
	}
	if fi, err := os.Stat(k.path("alice.age")); err != nil || fi.Mode().Perm() != 0o600 {
		t.Error(fi.Mode(), err)
	}
}

func TestCommitUnsupported(t *testing.T) {
	k := newKeep(t)
	defer func(f func(int, string, int, string, uint) error) { renameat2 = f }(renameat2)
	for _, errno := range []error{unix.EINVAL, unix.ENOSYS, unix.EOPNOTSUPP, unix.EIO} {
		renameat2 = func(int, string, int, string, uint) error { return errno }
		next := *k.set
		next.Epoch++
		for _, dir := range []string{k.dir, filepath.Join(t.TempDir(), "slots")} {
			err := Commit(dir, &next, k.files, k.master)
			var e *UnsupportedError
			if errors.As(err, &e) != (errno != unix.EIO) || !errors.Is(err, errno) {
				t.Errorf("%v: %v", errno, err)
			}
			alone(t, dir)
		}
	}
	if s, files := k.load(t); s.Epoch != k.set.Epoch || len(files.Findings) != 0 {
		t.Error("the set was changed")
	}
}

// Of changes made from one Load, one wins and the others are told; readers see
// complete sets only.
func TestConcurrentCommit(t *testing.T) {
	k := newKeep(t)
	var writers, readers sync.WaitGroup
	var won, stale int
	var mu sync.Mutex
	stop := make(chan struct{})
	for range 2 {
		readers.Go(func() {
			for {
				select {
				case <-stop:
					return
				default:
				}
				s, files, err := Load(k.dir)
				if err != nil || len(files.Findings) != 0 || s.VerifyMAC(k.master) != nil {
					t.Errorf("%v %v", err, files.Findings)
					return
				}
				runtime.Gosched() // flock(2) lets eager readers starve a writer
			}
		})
	}
	const rounds, rivals = 5, 4
	for round := range rounds {
		for range rivals {
			writers.Go(func() {
				next := *k.set
				next.Epoch += uint64(round) + 1
				err := Commit(k.dir, &next, k.files, k.master)
				mu.Lock()
				defer mu.Unlock()
				if err == nil {
					won++
				} else if e := (*StaleError)(nil); errors.As(err, &e) {
					stale++
				} else {
					t.Error(err)
				}
			})
		}
		writers.Go(func() {
			if err := Sweep(k.dir); err != nil {
				t.Error(err)
			}
		})
		writers.Wait()
	}
	close(stop)
	readers.Wait()
	if won != rounds || stale != rounds*(rivals-1) {
		t.Errorf("%d won, %d stale", won, stale)
	}
	alone(t, k.dir)
}

func TestSweep(t *testing.T) {
	k := newKeep(t)
	if err := Sweep(k.dir); err != nil {
		t.Error(err)
	}
	if err := Sweep(filepath.Join(t.TempDir(), "none")); err != nil {
		t.Error(err)
	}
	_, next := nextOf(t, k)
	if err := os.Rename(next.dir, k.dir+newSuffix); err != nil {
		t.Fatal(err)
	}
	if err := Sweep(k.dir); err != nil {
		t.Error(err)
	}
	alone(t, k.dir)
	if s, _ := k.load(t); s.Epoch != k.set.Epoch {
		t.Error("swept the set itself")
	}
	last := *k.set
	last.Epoch = math.MaxUint64
	if err := Commit(k.dir, &last, k.files, k.master); err != nil {
		t.Errorf("the last epoch: %v", err)
	}
}
