package boundary

import (
	"bufio"
	"bytes"
	"database/sql"
	"errors"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"syscall"
	"testing"

	_ "github.com/mattn/go-sqlite3"
	"golang.org/x/sys/unix"

	"overkeep/tests/bed"
	"overkeep/tests/bed/loop"
	"overkeep/tests/need"
)

// TestMain makes the test binary the tool and the program under it as well.
func TestMain(m *testing.M) {
	switch os.Getenv("BOUNDARY_ROLE") {
	case "tool":
		os.Setenv("BOUNDARY_ROLE", "victim")
		os.Exit(Main(os.Args[1:]))
	case "victim":
		victims[os.Args[1]]()
		os.Exit(0)
	}
	os.Exit(m.Run())
}

// tool runs the tool with options over the victim, in dir.
func tool(t *testing.T, dir, victim string, options ...string) Report {
	t.Helper()
	self, err := os.Executable()
	if err != nil {
		t.Fatal(err)
	}
	return command(t, dir, append(options, "--", self, victim)...)
}

// command runs the tool in dir and returns its report.
func command(t *testing.T, dir string, args ...string) Report {
	t.Helper()
	need.Root(t)
	file := filepath.Join(t.TempDir(), "report")
	cmd := exec.Command("/proc/self/exe", append([]string{"-report", file}, args...)...)
	cmd.Dir, cmd.Env = dir, append(os.Environ(), "BOUNDARY_ROLE=tool")
	out, err := cmd.CombinedOutput()
	r, rerr := ReadReport(file)
	if rerr != nil {
		t.Fatalf("no report: %v, %v\n%s", rerr, err, out)
	}
	if code := cmd.ProcessState.ExitCode(); code != r.Code {
		t.Fatalf("the tool's exit code is %d, the command's %d\n%s", code, r.Code, out)
	}
	return r
}

// must ends a victim whose call failed, with a code of its own.
func must(err error) {
	if err != nil {
		fmt.Fprintln(os.Stderr, err)
		os.Exit(9)
	}
}

// victims are programs in their working directory.
var victims = map[string]func(){
	// Every kind of call once, in a known order. What changes nothing stands in
	// between and must not count.
	"calls": func() {
		dir, err := unix.Open(".", unix.O_RDONLY|unix.O_DIRECTORY, 0)
		must(err)
		must(unix.Mkdirat(dir, "d", 0o700))
		f, err := unix.Openat(dir, "d/f", unix.O_RDWR|unix.O_CREAT, 0o600)
		must(err)
		must(write(f, "one"))
		_, err = unix.Pwrite(f, []byte("two"), 3)
		must(err)
		must(write(1, "this is a pipe\n"))
		null, err := unix.Open("/dev/null", unix.O_WRONLY|unix.O_CREAT|unix.O_TRUNC, 0)
		must(err)
		must(write(null, "nothing"))
		m, err := unix.MemfdCreate("memory", 0)
		must(err)
		must(write(m, "forgotten"))
		must(unix.Ftruncate(m, 0))
		_, err = unix.FcntlInt(uintptr(f), unix.F_GETFL, 0)
		must(err)
		_, err = unix.IoctlGetInt(f, unix.TIOCINQ)
		must(err)
		r, err := unix.Openat2(dir, "d/f", &unix.OpenHow{Flags: unix.O_RDONLY})
		must(err)
		must(unix.Close(r))
		must(unix.Flock(f, unix.LOCK_EX))
		must(unix.Fchmod(f, 0o640))
		must(unix.Fsync(f))
		must(unix.Fallocate(f, 0, 0, 4096))
		must(unix.Ftruncate(f, 5))
		must(unix.UtimesNanoAt(dir, "d/f", make([]unix.Timespec, 2), 0))
		must(unix.Chmod(fmt.Sprintf("/proc/self/fd/%d", f), 0o600))
		must(unix.Linkat(dir, "d/f", dir, "l", 0))
		must(unix.Symlinkat("somewhere", dir, "s"))
		must(unix.Renameat2(dir, "l", dir, "m", unix.RENAME_NOREPLACE))
		must(unix.Unlinkat(dir, "m", 0))
		o, err := unix.Openat2(dir, "o", &unix.OpenHow{Flags: unix.O_WRONLY | unix.O_CREAT, Mode: 0o600})
		must(err)
		_, err = unix.CopyFileRange(f, new(int64), o, nil, 3, 0)
		must(err)
		must(unix.Syncfs(dir))
		must(unix.Unlinkat(dir, "d/f", 0))
		must(unix.Unlinkat(dir, "d", unix.AT_REMOVEDIR))
		must(unix.Flock(o, unix.LOCK_EX))
	},
	// Many threads and their children at once.
	"many": func() {
		var all sync.WaitGroup
		for i := range 8 {
			all.Go(func() {
				f, err := os.Create(fmt.Sprint("t", i)) // 1 call
				must(err)
				for range 100 {
					_, err := f.WriteString("x") // 100
					must(err)
				}
				must(exec.Command("/bin/sh", "-c", fmt.Sprintf("echo >c%d; (sleep 0.01; echo >>c%d) &", i, i)).Run()) // 4
			})
		}
		all.Wait()
	},
	"sqlite": func() {
		db, err := sql.Open("sqlite3", "db?_journal_mode=WAL&_synchronous=FULL")
		must(err)
		for _, q := range []string{
			"CREATE TABLE IF NOT EXISTS t (x, y)",
			"BEGIN", "INSERT INTO t VALUES (1, 'a')", "INSERT INTO t VALUES (2, 'b')", "COMMIT",
			"PRAGMA wal_checkpoint(TRUNCATE)",
		} {
			db.SetMaxOpenConns(1)
			_, err := db.Exec(q)
			must(err)
		}
		must(db.Close())
	},
	// Unsynced data, then a sync of another file, then a call to stop at.
	"cut": func() {
		must(os.WriteFile("lost", []byte("lost"), 0o600)) // 2 calls
		f, err := os.Create("kept")                       // 1
		must(err)
		_, err = f.WriteString("kept") // 1
		must(err)
		must(f.Sync()) // 1: takes the name "lost" along
		must(os.Rename("kept", "renamed"))
	},
}

func write(fd int, s string) error { _, err := unix.Write(fd, []byte(s)); return err }

// calledIn are the counted calls of the victim "calls" in a directory.
func calledIn(dir string, locks bool) []string {
	in := strings.NewReplacer("@", dir)
	var out []string
	for _, c := range []string{
		"mkdirat @/d", "openat @/d/f", "write @/d/f", "pwrite64 @/d/f", "flock @/d/f", "fchmod @/d/f", "fsync @/d/f",
		"fallocate @/d/f", "ftruncate @/d/f", "utimensat @/d/f", "fchmodat @/d/f", "linkat @/d/f -> @/l", "symlinkat @/s",
		"renameat2 @/l -> @/m", "unlinkat @/m", "openat2 @/o", "copy_file_range @/o", "syncfs @", "unlinkat @/d/f", "unlinkat @/d",
		"flock @/o",
	} {
		if locks || !strings.HasPrefix(c, "flock ") {
			out = append(out, in.Replace(c))
		}
	}
	return out
}

func traceOf(t *testing.T, file string) (lines []string) {
	t.Helper()
	b, err := os.ReadFile(file)
	if err != nil {
		t.Fatal(err)
	}
	s := bufio.NewScanner(bytes.NewReader(b))
	for s.Scan() {
		_, line, _ := strings.Cut(s.Text(), " ")
		lines = append(lines, line)
	}
	return lines
}

// Every call that changes something is seen, none that does not, in order and
// with its object.
func TestSees(t *testing.T) {
	for _, locks := range []bool{false, true} {
		dir, trace := t.TempDir(), filepath.Join(t.TempDir(), "trace")
		options := []string{"-trace", trace}
		if locks {
			options = append(options, "-locks")
		}
		r := tool(t, dir, "calls", options...)
		got, want := traceOf(t, trace), calledIn(dir, locks)
		for i := range got {
			// Which of the two a libc or x/sys takes is of no matter.
			got[i] = strings.Replace(got[i], "chmod "+dir+"/d/f", "fchmodat "+dir+"/d/f", 1)
			got[i] = strings.Replace(strings.Replace(got[i], "ffchmodat", "fchmod", 1), "fchmodat2 ", "fchmodat ", 1)
		}
		if !slices.Equal(got, want) {
			t.Errorf("locks %v: seen\n%s\nwant\n%s", locks, strings.Join(got, "\n"), strings.Join(want, "\n"))
		}
		if r.Code != 0 || r.At != 0 || r.Count != len(want) {
			t.Errorf("locks %v: %+v", locks, r)
		}
	}
}

// A kill at N comes after call N-1 and before call N, at every N.
func TestKill(t *testing.T) {
	all := calledIn("", false)
	for n := 1; n <= len(all)+1; n++ {
		dir := t.TempDir()
		r := tool(t, dir, "calls", "-kill", fmt.Sprint(n))
		if n > len(all) {
			if r.At != 0 || r.Code != 0 || r.Count != len(all) {
				t.Errorf("after the last call: %+v", r)
			}
			break
		}
		if r.At != n || r.Count != n || r.Code != 128+int(syscall.SIGKILL) {
			t.Errorf("kill at %d: %+v", n, r)
		}
		for _, c := range []struct {
			file string
			from int // there after this many calls
			to   int // and gone after this many
		}{{"d", 1, 19}, {"d/f", 2, 18}, {"l", 11, 13}, {"s", 12, 99}, {"m", 13, 14}, {"o", 15, 99}} {
			_, err := os.Lstat(filepath.Join(dir, c.file))
			if there, want := err == nil, n > c.from && n <= c.to; there != want {
				t.Errorf("kill at %d, %s: %s is there: %v, want %v", n, r.Call, c.file, there, want)
			}
		}
	}
}

// A call that fails is not carried out, fails once, and as told.
func TestFail(t *testing.T) {
	for name, errno := range Errnos {
		all := calledIn("", true)
		for n := 1; n <= len(all); n++ {
			if n%len(Errnos) != len(name)%len(Errnos) && name != "EIO" { // each call with some, all with one
				continue
			}
			dir := t.TempDir()
			file := filepath.Join(t.TempDir(), "report")
			self, err := os.Executable()
			if err != nil {
				t.Fatal(err)
			}
			need.Root(t)
			cmd := exec.Command(self, "-locks", "-report", file, "-fail", fmt.Sprintf("%d:%s", n, name), "--", self, "calls")
			cmd.Dir, cmd.Env = dir, append(os.Environ(), "BOUNDARY_ROLE=tool")
			out, _ := cmd.CombinedOutput()
			r, err := ReadReport(file)
			if err != nil {
				t.Fatalf("%v\n%s", err, out)
			}
			// The wrapper of fchmodat tries an older call when a newer one fails.
			said := strings.HasSuffix(strings.TrimSpace(string(out)), errno.Error())
			if r.At != n || r.Code != 9 || r.Count != n || !said {
				t.Errorf("%s at %d: %+v\n%s", name, n, r, out)
			}
		}
	}
}

// All threads and children count, also those in the background when the command
// has ended; a kill leaves none.
func TestMany(t *testing.T) {
	const total = 8 * (1 + 100 + 4)
	for range 3 {
		dir := t.TempDir()
		if r := tool(t, dir, "many"); r.Count != total || r.Code != 0 {
			t.Errorf("%+v, want %d calls", r, total)
		}
	}
	for n := 1; n < total; n += 83 {
		dir := t.TempDir()
		r := tool(t, dir, "many", "-kill", fmt.Sprint(n))
		if r.At != n || r.Count != n {
			t.Errorf("kill at %d: %+v", n, r)
		}
		for _, p := range processesIn(dir) {
			t.Errorf("kill at %d: process %s is left", n, p)
		}
		bytes := 0
		for i := range 8 {
			b, err := os.ReadFile(filepath.Join(dir, fmt.Sprint("t", i)))
			if err == nil {
				bytes += len(b)
			}
		}
		if bytes >= n {
			t.Errorf("kill at %d: %d writes were done", n, bytes)
		}
	}
}

// processesIn are the living processes whose working directory is dir.
func processesIn(dir string) (out []string) {
	links, _ := filepath.Glob("/proc/[0-9]*/cwd")
	for _, l := range links {
		if to, err := os.Readlink(l); err == nil && to == dir {
			out = append(out, l)
		}
	}
	return out
}

// SQLite through cgo: its calls are the same every time, and a kill at each of
// them leaves all of a transaction or nothing.
func TestSQLite(t *testing.T) {
	whole := tool(t, t.TempDir(), "sqlite")
	if again := tool(t, t.TempDir(), "sqlite"); again != whole || whole.Count < 10 || whole.Code != 0 {
		t.Fatalf("once %+v, then %+v", whole, again)
	}
	rows := map[int]int{}
	for n := 1; n <= whole.Count; n++ {
		dir := t.TempDir()
		if r := tool(t, dir, "sqlite", "-kill", fmt.Sprint(n)); r.At != n {
			t.Errorf("kill at %d: %+v", n, r)
		}
		rows[count(t, dir, n)]++
	}
	if len(rows) != 2 || rows[0] == 0 || rows[2] == 0 {
		t.Errorf("rows after a kill, and how often: %v", rows)
	}
}

func count(t *testing.T, dir string, n int) (rows int) {
	t.Helper()
	db, err := sql.Open("sqlite3", filepath.Join(dir, "db"))
	if err != nil {
		t.Fatal(err)
	}
	defer db.Close()
	var sound string
	err = errors.Join(db.QueryRow("PRAGMA integrity_check").Scan(&sound), db.QueryRow("SELECT count(*) FROM sqlite_master").Scan(&rows))
	if err == nil && rows == 1 {
		err = db.QueryRow("SELECT count(*) FROM t").Scan(&rows)
	}
	if err != nil || sound != "ok" {
		t.Errorf("kill at %d: %q, %v", n, sound, err)
	}
	return rows
}

// A power cut loses what was not synced: the file system stops before the call.
func TestCut(t *testing.T) {
	need.Encryption(t) // root, ext4, loop devices
	image, mnt := filepath.Join(t.TempDir(), "image"), t.TempDir()
	if err := errors.Join(os.WriteFile(image, nil, 0o600), os.Truncate(image, 32<<20)); err != nil {
		t.Fatal(err)
	}
	if out, err := exec.Command("mkfs.ext4", "-q", image).CombinedOutput(); err != nil {
		t.Fatalf("%v\n%s", err, out)
	}
	mount := func() {
		t.Helper()
		dev, err := loop.Attach(image)
		if err != nil {
			t.Fatal(err)
		}
		defer dev.Close()
		if err := unix.Mount(dev.Path, mnt, "ext4", 0, ""); err != nil {
			t.Fatal(err)
		}
	}
	mount()
	t.Cleanup(func() { _ = unix.Unmount(mnt, 0) })
	if r := tool(t, mnt, "cut", "-cut", "6:"+mnt); r.At != 6 || !strings.HasPrefix(r.Call, "rename") {
		t.Errorf("%+v", r)
	}
	if _, err := os.Create(filepath.Join(mnt, "later")); err == nil {
		t.Error("the file system goes on after a power cut")
	}
	if err := unix.Unmount(mnt, 0); err != nil {
		t.Fatal(err)
	}
	mount()
	if b, err := os.ReadFile(filepath.Join(mnt, "kept")); err != nil || string(b) != "kept" {
		t.Errorf("what was synced is %q, %v", b, err)
	}
	if b, err := os.ReadFile(filepath.Join(mnt, "lost")); err != nil || len(b) != 0 {
		t.Errorf("what was not synced is %q, %v", b, err)
	}
	if _, err := os.Lstat(filepath.Join(mnt, "renamed")); err == nil {
		t.Error("the call was carried out")
	}
}

// It works in the namespaces of a machine, over a sandboxed Nix build there.
func TestInMachine(t *testing.T) {
	m := bed.Start(t, bed.Forky)
	m.Put(t, Binary(t), "/usr/local/bin/boundary", 0o755)
	m.Must(t, "root", "cd /run; boundary -report /run/sees -- sh -c 'echo x >f; mv f g'")
	if r, err := ReadReport(m.Root + "/run/sees"); err != nil || r.Count != 3 {
		t.Errorf("%+v, %v", r, err)
	}
	const build = `nix-build --no-out-link -E 'derivation { name = "x"; system = builtins.currentSystem; builder = "/bin/sh"; args = [ "-c" "echo hello > $out" ]; }'`
	script := func(options string) string {
		return "set +e; boundary -report /run/r " + options + " -- " + build + " >/run/out 2>/run/err; echo $?"
	}
	if code := m.Must(t, "root", script("-kill 100")); code != "137" {
		t.Errorf("exit code %s: %s", code, m.Read(t, "/run/err"))
	}
	if code := m.Must(t, "root", script("")); code != "0" {
		t.Errorf("exit code %s: %s", code, m.Read(t, "/run/err"))
	}
	r, err := ReadReport(m.Root + "/run/r")
	if err != nil || r.Count < 50 {
		t.Errorf("%+v, %v", r, err)
	}
	t.Logf("a build: %d calls", r.Count)
	m.Must(t, "root", "nix-store --verify --check-contents; test \"$(cat $(cat /run/out))\" = hello")
}

// What lasts and what does not.
func TestStateless(t *testing.T) {
	for p, want := range map[string]bool{
		"pipe:[1]": true, "socket:[1]": true, "anon_inode:[eventfd]": true, "/memfd:x (deleted)": true, "": true,
		"/dev/null": true, "/dev/pts/3": true, "/proc/self/uid_map": true, "/sys/x": true, "/dev/tty": true,
		"/dev/shm/x": false, "/dev/loop3": false, "/nix/store/x": false, "/run/x": false, "/tmp/x (deleted)": false, "/process": false,
	} {
		if stateless(p) != want {
			t.Errorf("%q: %v", p, !want)
		}
	}
}

// A wrong command line does nothing.
func TestUsage(t *testing.T) {
	for _, args := range [][]string{
		{}, {"--"}, {"true"}, {"-kill", "0", "--", "true"}, {"-kill", "x", "--", "true"}, {"-kill"}, {"-fail", "1:EFOO", "--", "true"},
		{"-cut", "1", "--", "true"}, {"-what", "1", "--", "true"}, {"--", "no-such-program"},
	} {
		if r, err := run(args); err == nil {
			t.Errorf("%q: %+v", args, r)
		}
	}
}
