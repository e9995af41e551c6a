package holder

import (
	"context"
	"errors"
	"os"
	"os/exec"
	"reflect"
	"slices"
	"strconv"
	"strings"
	"testing"

	"golang.org/x/sys/unix"

	"overkeep/tests/need"
)

// scan returns the holders, and fails on everything else.
func (b *bed) scan() []Holder {
	b.t.Helper()
	got, err := Scan(context.Background(), b.target, offLimits)
	if err != nil {
		b.t.Fatal(err)
	}
	return got
}

// offLimits tells of a process that even root may not look into, such as one
// outside of the sandbox that the tests run in. It is none of a test's.
func offLimits(pid int) bool {
	_, err := os.Readlink("/proc/" + strconv.Itoa(pid) + "/root")
	return errors.Is(err, os.ErrPermission)
}

func (b *bed) wantNone(when string) {
	b.t.Helper()
	for _, h := range b.scan() {
		b.t.Errorf("%s: still held by %v", when, h)
	}
}

// wantOnly fails unless process pid alone holds the keep, with how and a What
// that contains what.
func (b *bed) wantOnly(pid int, how How, what string) Holder {
	b.t.Helper()
	got := b.scan()
	if len(got) != 1 || got[0].PID != pid {
		b.t.Fatalf("got holders %v, want only process %d", got, pid)
	}
	if !slices.ContainsFunc(got[0].Holds, func(h Hold) bool { return h.How == how && strings.Contains(h.What, what) }) {
		b.t.Errorf("got holder %v, want %s %s", got[0], how, what)
	}
	return got[0]
}

var kinds = []struct{ name, kind, options string }{
	{"image xino", "image", ",xino=auto"},
	{"image without xino", "image", ",xino=off"},
	{"dir", "dir", ",xino=auto"},
	{"image in dir", "sealed", ",xino=auto"},
}

// Every way in which a process holds the keep is named with its process id, and
// nobody is named once it has gone.
func TestScanNamesProcess(t *testing.T) {
	for _, k := range kinds {
		t.Run(k.name, func(t *testing.T) {
			b := newBed(t, k.kind, k.options)
			b.wantNone("before")
			type holding struct {
				role, arg string
				how       How
				what      string
			}
			tests := []holding{
				{"open", b.merged + "/upper-file", OpenFile, "upper-file"},
				{"open", b.merged + "/file", OpenFile, "/file"}, // lower, through the overlay
				{"open", b.keep + "/home/note", OpenFile, "note"},
				{"open", b.merged, OpenFile, b.merged},
				{"path", b.merged + "/pkg/lib", OpenFile, "lib"},
				{"path", b.keep, OpenFile, b.keep},
				{"deleted", b.keep + "/home/gone", OpenFile, "gone (deleted)"},
				{"deleted", b.merged + "/gone", OpenFile, "gone"},
				{"fifo", b.keep + "/home/fifo", OpenFile, "fifo"},
				{"chdir", b.merged + "/pkg", CurrentDirectory, "pkg"},
				{"chdir", b.keep + "/home", CurrentDirectory, "home"},
				{"chroot", b.merged + "/d", RootDirectory, "/d"},
				{"mmap", b.merged + "/pkg/lib", MappedFile, "lib"},
				{"mmap", b.keep + "/home/note", MappedFile, "note"},
				{"socket", b.keep + "/home/socket", UnixSocket, "socket"},
				{"socket", b.merged + "/socket", UnixSocket, "socket"},
				{"thread-cwd", b.merged + "/pkg", CurrentDirectory, "pkg"},
				{"thread-fd", b.keep + "/home/note", OpenFile, "note"},
				{"unshare-fd", "", NamespaceFile, b.merged},
				{"thread-ns", "", MountNamespace, b.keep},
				{"io_uring", b.merged + "/pkg/lib", OpenFile, "lib (registered"},
			}
			if k.kind != "image" {
				// The volume's own place on the host leads to the same inodes.
				tests = append(tests,
					holding{"open", b.volume + "/home/note", OpenFile, "note"},
					holding{"path", b.volume + "/home/note", OpenFile, "note"},
					holding{"mmap", b.volume + "/home/note", MappedFile, "note"},
					holding{"chdir", b.volume, CurrentDirectory, "volume"},
					holding{"fifo", b.volume + "/home/fifo2", OpenFile, "fifo2"},
					holding{"socket", b.volume + "/home/socket2", UnixSocket, "socket2"},
					holding{"deleted", b.volume + "/home/gone2", OpenFile, "gone2"},
					holding{"inotify", b.volume + "/home", WatchedFile, "inode"},
					holding{"fanotify", b.volume + "/home/note", WatchedFile, "fanotify"},
					holding{"inotify", b.volume + "/home/note", WatchedFile, "inode"},
				)
			}
			for _, x := range tests {
				t.Run(x.role+" "+x.what, func(t *testing.T) {
					b.t = t
					h := b.start(x.role, x.arg)
					b.wantOnly(h.pid, x.how, x.what)
					h.end()
					b.wantNone("after")
				})
			}
			b.t = t
			t.Run("running binary", func(t *testing.T) {
				b.t = t
				b.inView(func() error { return exec.Command("cp", self(t), b.merged+"/d/prog").Run() })
				h := b.startIn(b.view, b.merged+"/d/prog", "wait")
				got := b.wantOnly(h.pid, RunningBinary, "prog")
				if !strings.Contains(got.Command, "prog") {
					t.Errorf("got command %q", got.Command)
				}
				h.end()
				b.wantNone("after")
			})
			b.t = t
			t.Run("second namespace", func(t *testing.T) {
				b.t = t
				cmd := unshared(exec.Command(self(t)))
				cmd.Env = roleEnv("wait")
				h := b.startCmd(b.view, cmd)
				b.wantOnly(h.pid, MountNamespace, b.merged)
				h.end()
				b.wantNone("after")
			})
			b.t = t
			t.Run("database", func(t *testing.T) {
				need.Tool(t, "sqlite3")
				b.t = t
				cmd := exec.Command("sqlite3", b.keep+"/home/db.sqlite")
				h := b.startSQLite(cmd)
				got := b.wantOnly(h.pid, OpenFile, "db.sqlite-wal")
				for _, want := range []Hold{{OpenFile, b.keep + "/home/db.sqlite"}, {MappedFile, b.keep + "/home/db.sqlite-shm"}} {
					if !slices.Contains(got.Holds, want) {
						t.Errorf("got %v, want also %v", got, want)
					}
				}
				h.end()
				b.wantNone("after")
			})
		})
	}
}

// startSQLite starts the command-line shell in the view and opens a database
// with a write-ahead log.
func (b *bed) startSQLite(cmd *exec.Cmd) *helper {
	b.t.Helper()
	cmd.Args = append(cmd.Args, "-batch", "-cmd", "CREATE TABLE t(x);", "-cmd", ".output /dev/null",
		"-cmd", "PRAGMA journal_mode=wal;", "-cmd", "INSERT INTO t VALUES(1);", "-cmd", ".output stdout", "-cmd", ".print ready")
	return b.startCmd(b.view, cmd)
}

// Processes that hold nothing are not named, however close they are.
func TestScanPassesOver(t *testing.T) {
	for _, k := range kinds {
		t.Run(k.name, func(t *testing.T) {
			b := newBed(t, k.kind, k.options)
			mkdirs(t, b.host+"/volume-two")
			writeFile(t, b.host+"/volume-two/file", "x\n")
			b.start("wait")
			b.start("open", b.host+"/lower/file")
			b.start("chdir", b.host)
			b.start("mmap", b.host+"/lower/pkg/lib")
			b.start("open", b.host+"/volume-two/file")
			b.start("inotify", b.host+"/lower")
			b.start("socket", b.host+"/lower/socket")
			b.start("fifo", b.host+"/lower/fifo")
			if k.kind != "image" {
				// Another user's encrypted directory on the same filesystem.
				other := b.host + "/other"
				mkdirs(t, other)
				encrypt(t, b.host, other)
				writeFile(t, other+"/file", "x\n")
				b.start("open", other+"/file")
				b.start("mmap", other+"/file")
				b.start("inotify", other)
				b.start("socket", other+"/socket")
			}
			b.wantNone("bystanders")
		})
	}
}

// Another overlay, detached while a file of it is open, is not ours.
func TestScanPassesOverDetachedOverlay(t *testing.T) {
	b := newBed(t, "image", ",xino=off")
	other, upper := b.dir+"/other", b.dir+"/upper"
	mkdirs(t, other, upper)
	b.inView(func() error {
		// A filesystem of its own below, or the overlay would number it as its own.
		if err := unix.Mount("tmpfs", upper, "tmpfs", 0, "size=1m"); err != nil {
			return err
		}
		mkdirs(t, upper+"/u", upper+"/w")
		return unix.Mount("overlay", other, "overlay", 0, "xino=off,index=off,lowerdir="+b.host+"/lower,upperdir="+upper+"/u,workdir="+upper+"/w")
	})
	b.start("open", other+"/file")
	b.inView(func() error {
		return errors.Join(unix.Unmount(other, unix.MNT_DETACH), unix.Unmount(upper, unix.MNT_DETACH))
	})
	b.wantNone("another overlay")
}

// A lazy unmount hides the mounts; the holders stay known.
func TestScanAfterDetach(t *testing.T) {
	for _, k := range kinds {
		t.Run(k.name, func(t *testing.T) {
			b := newBed(t, k.kind, k.options)
			want := map[int]How{
				b.start("open", b.merged+"/upper-file").pid: OpenFile,
				b.start("open", b.merged+"/pkg/lib").pid:    OpenFile,
				b.start("chdir", b.merged+"/pkg").pid:       CurrentDirectory,
				b.start("mmap", b.merged+"/pkg/lib").pid:    MappedFile,
				b.start("open", b.keep+"/home/note").pid:    OpenFile,
				b.start("mmap", b.keep+"/home/note").pid:    MappedFile,
				b.start("fifo", b.keep+"/home/fifo").pid:    OpenFile,
				b.start("socket", b.keep+"/home/s").pid:     UnixSocket,
			}
			b.inView(func() error {
				return errors.Join(unix.Unmount(b.merged, unix.MNT_DETACH), unix.Unmount(b.keep, unix.MNT_DETACH))
			})
			for _, h := range b.scan() {
				if h.PID == 0 { // the loop device that the detached filesystem keeps
					continue
				}
				if len(h.Holds) != 1 || h.Holds[0].How != want[h.PID] {
					t.Errorf("got %v, want %s", h, want[h.PID])
				}
				delete(want, h.PID)
			}
			for pid, how := range want {
				t.Errorf("process %d is not named (%s)", pid, how)
			}
		})
	}
}

// What a process calls itself, and its files, reaches nobody's terminal as it is.
func TestScanHostileNames(t *testing.T) {
	b := newBed(t, "image", "")
	name := b.keep + "/home/a\nb\x1b[2J\u202e"
	b.inView(func() error {
		writeFile(t, name, "x")
		return nil
	})
	cmd := exec.Command(self(t), "\x1b]0;title\a", "1 (uid 0) innocent\n2 (uid 0) other")
	cmd.Env = roleEnv("open", b.keep+"/home/note")
	h := b.startCmd(b.view, cmd)
	got := b.wantOnly(h.pid, OpenFile, "note")
	if !strings.Contains(got.Command, `\x1b]0;title\a 1 (uid 0) innocent\n2 (uid 0) other`) {
		t.Errorf("got command %q", got.Command)
	}
	h.end()
	// A newline would end the argument of a role: this one is opened by a shell.
	cmd = exec.Command("/bin/sh", "-c", `exec 5<"$1"; echo ready; read x || true`, "sh", name)
	h = b.startCmd(b.view, cmd)
	got = b.wantOnly(h.pid, OpenFile, `a\nb\x1b[2J\u202e`)
	if strings.ContainsAny(got.String(), "\n\x1b\u202e") {
		t.Errorf("got %q", got.String())
	}
	h.end()
	b.wantNone("after")
}

func TestScanManyHolds(t *testing.T) {
	b := newBed(t, "dir", "")
	h := b.start("many", b.keep+"/home/note")
	got := b.wantOnly(h.pid, OpenFile, "note")
	if len(got.Holds) != maxHolds || got.More == 0 {
		t.Errorf("got %d holds and %d more", len(got.Holds), got.More)
	}
	h.end()
}

func TestScanFirstThreadEnded(t *testing.T) {
	b := newBed(t, "image", ",xino=off")
	h := b.start("no-leader", b.merged+"/file", b.merged+"/pkg/lib", b.keep+"/home")
	got := b.wantOnly(h.pid, OpenFile, "/file")
	if !has([]Holder{got}, h.pid, MappedFile, "lib") || !has([]Holder{got}, h.pid, CurrentDirectory, "home") {
		t.Errorf("got %v", got)
	}
	h.end()
	b.wantNone("after")
}

// Kernels whose maps show the inode below the overlay are handled by a look at
// every mapped file: the same answer comes that way on any kernel.
func TestScanOldMaps(t *testing.T) {
	b := newBed(t, "image", ",xino=off")
	h := b.start("mmap", b.merged+"/pkg/lib")
	b.start("mmap", b.host+"/lower/pkg/lib")
	s, err := newScanner(b.target, offLimits, false)
	if err != nil {
		t.Fatal(err)
	}
	defer s.close()
	s.old, s.text = true, true
	if err := s.run(context.Background()); err != nil {
		t.Fatal(err)
	}
	if got := s.found(); len(got) != 1 || !has(got, h.pid, MappedFile, "lib") {
		t.Errorf("got %v", got)
	}
	// What such a kernel prints for the file: the numbers of the lower one.
	lower, err := lookAt(unix.AT_FDCWD, b.host+"/lower/pkg/lib")
	if err != nil {
		t.Fatal(err)
	}
	w := newWorker(s)
	proc, err := openAt(unix.AT_FDCWD, "/proc/"+strconv.Itoa(h.pid), unix.O_PATH)
	if err != nil {
		t.Fatal(err)
	}
	defer proc.Close()
	maps, err := os.ReadFile("/proc/" + strconv.Itoa(h.pid) + "/maps")
	if err != nil {
		t.Fatal(err)
	}
	for line := range strings.Lines(string(maps)) {
		m, err := parseMapping([]byte(strings.TrimSuffix(line, "\n")))
		if err != nil {
			t.Fatal(err)
		}
		if !strings.HasSuffix(line, "/pkg/lib\n") {
			continue
		}
		m.dev, m.ino = lower.dev, lower.ino
		if !w.mappedOurs(int(proc.Fd()), m) {
			t.Errorf("a lower file mapped through the overlay is not known: %s", line)
		}
		return
	}
	t.Error("no mapping found")
}

// Where the kernel cannot be asked for mappings their text gives the same.
func TestScanMapsText(t *testing.T) {
	for _, k := range kinds {
		t.Run(k.name, func(t *testing.T) {
			b := newBed(t, k.kind, k.options)
			b.start("mmap", b.merged+"/pkg/lib")
			b.start("mmap", b.keep+"/home/note")
			b.start("mmap", b.host+"/lower/pkg/lib")
			var found [2][]Holder
			for i := range found {
				s, err := newScanner(b.target, offLimits, false)
				if err != nil {
					t.Fatal(err)
				}
				s.text = i == 0
				if err := s.run(context.Background()); err != nil {
					t.Fatal(err)
				}
				found[i] = s.found()
				s.close()
			}
			if len(found[0]) != 2 || !reflect.DeepEqual(found[0], found[1]) {
				t.Errorf("by text %v, by query %v", found[0], found[1])
			}
		})
	}
}

// Processes that end while they are looked at are no error and no holders.
func TestScanVanishing(t *testing.T) {
	b := newBed(t, "dir", "")
	stop := make(chan struct{})
	done := make(chan struct{})
	go func() {
		defer close(done)
		for {
			select {
			case <-stop:
				return
			default:
				_ = exec.Command("true").Run()
			}
		}
	}()
	for range 50 {
		b.wantNone("processes come and go")
	}
	close(stop)
	<-done
}

func TestScanIncomplete(t *testing.T) {
	need.Root(t)
	own, err := os.Open("/proc/self/ns/mnt")
	if err != nil {
		t.Fatal(err)
	}
	defer own.Close()
	b := &bed{t: t, view: own}
	b.start("scan-as-nobody").end() // the role fails unless the error is right
}

func TestScanContext(t *testing.T) {
	need.Root(t)
	ctx, cancel := context.WithCancel(context.Background())
	cancel()
	if got, err := Scan(ctx, Target{}, nil); !errors.Is(err, context.Canceled) || got != nil {
		t.Errorf("got %v, %v", got, err)
	}
}

// The caller is looked at like any other process, and skip spares it.
func TestScanSelf(t *testing.T) {
	b := newBed(t, "dir", "")
	f, err := os.Open(b.volume + "/home/note")
	if err != nil {
		t.Fatal(err)
	}
	b.wantOnly(os.Getpid(), OpenFile, "note")
	got, err := Scan(context.Background(), b.target, func(pid int) bool { return pid == os.Getpid() || offLimits(pid) })
	if err != nil || len(got) != 0 {
		t.Errorf("got %v, %v", got, err)
	}
	f.Close()
	b.wantNone("after")
}

// End ends what Scan found, and then nothing holds.
func TestScanAndEnd(t *testing.T) {
	b := newBed(t, "image", "")
	b.start("open", b.merged+"/file")
	b.start("mmap", b.keep+"/home/note")
	found := b.scan()
	if len(found) != 2 {
		t.Fatalf("got %v", found)
	}
	if err := End(context.Background(), found, forever); err != nil {
		t.Fatal(err)
	}
	b.wantNone("ended")
	if err := UnmountIn(b.view, b.target); err != nil {
		t.Error(err)
	}
}
