package bed

import (
	"errors"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"overkeep/tests/bed/loop"
	"overkeep/tests/need"
)

// each runs f on a machine of every suite, side by side.
func each(t *testing.T, f func(t *testing.T, m *Machine)) {
	for _, s := range Suites {
		t.Run(string(s), func(t *testing.T) {
			t.Parallel()
			f(t, Start(t, s))
		})
	}
}

const expr = `derivation {
  name = "%s"; system = builtins.currentSystem; builder = "/bin/sh";
  args = [ "-c" "echo built by %s > $out; ls /home /root && exit 1; exit 0" ];
}`

// Stock Nix works: its version is the suite's, and root and a user build through
// the system's daemon, in a sandbox that sees no home directories.
func TestNix(t *testing.T) {
	versions := map[Suite]string{Trixie: "nix (Nix) 2.26.", Forky: "nix (Nix) 2.34."}
	each(t, func(t *testing.T, m *Machine) {
		if v := m.Must(t, "root", "nix --version"); !strings.HasPrefix(v, versions[m.Suite]) {
			t.Errorf("%s has %s", m.Suite, v)
		}
		m.SystemNix(t)
		for _, user := range []string{"root", "alice"} {
			m.Write(t, "/tmp/"+user+".nix", fmt.Sprintf(expr, user, user))
			out := m.Must(t, user, "cat $(nix-build --no-out-link /tmp/"+user+".nix 2>/dev/null)", "NIX_REMOTE=daemon")
			if out != "built by "+user {
				t.Errorf("%s's build says %q", user, out)
			}
		}
		conf := m.Must(t, "alice", "nix config show")
		for _, line := range []string{"sandbox = true", "sandbox-fallback = false", "build-users-group = nixbld"} {
			if !strings.Contains(conf, line+"\n") {
				t.Errorf("no %q in the configuration:\n%s", line, conf)
			}
		}
		m.Must(t, "root", "nix-store --verify --check-contents")
	})
}

// The search finds what is there to be found: contents, names, what was deleted,
// what is in /tmp; and counts what was never written as 0.
func TestSearch(t *testing.T) {
	t.Parallel()
	m := Start(t, Forky)
	m.Must(t, "alice", `
		echo CANARY-content > ~/file
		touch ~/CANARY-name
		echo CANARY-deleted > ~/gone; sync ~/gone; rm ~/gone
		echo CANARY-tmp > /tmp/file
		cat <<<CANARY-run > /dev/shm/file`)
	want := map[string]bool{"CANARY-content": true, "CANARY-name": true, "CANARY-deleted": true, "CANARY-tmp": true, "CANARY-run": false, "CANARY-never": false}
	names := []string{}
	for c := range want {
		names = append(names, c)
	}
	for c, n := range m.Search(t, names...) {
		if (n > 0) != want[c] {
			t.Errorf("%s: %d hits", c, n)
		}
	}
	need.Tool(t, "debugfs")
	if o := m.Owner(m.Find(t, "CANARY-content")["CANARY-content"][0]); !strings.HasSuffix(o, "/home/alice/file") {
		t.Errorf("owner of the content: %s", o)
	}
	m.Kill(t) // and a machine that is off can be searched as well
	if m.Search(t, "CANARY-content")["CANARY-content"] == 0 {
		t.Error("no content after the machine was switched off")
	}
}

// A string is found once wherever it lies: at the start and end of an extent,
// across the edge of two reads, overlapping itself, beside a hole.
func TestFind(t *testing.T) {
	f, err := os.Create(filepath.Join(t.TempDir(), "disk"))
	if err != nil {
		t.Fatal(err)
	}
	defer f.Close()
	const read = 4 << 20
	for at, s := range map[int64]string{
		0: "needle", read - 3: "needle", 2*read - 6: "needle", 2 * read: "aaa",
		64 << 20: "needle", 64<<20 + 100: "nee", 100<<20 - 6: "needle",
	} {
		if _, err := f.WriteAt([]byte(s), at); err != nil {
			t.Fatal(err)
		}
	}
	if _, err := f.WriteAt(make([]byte, 2*read-100), 10); err != nil { // one long extent, except what is before
		t.Fatal(err)
	}
	for _, at := range []int64{read - 3, 2*read - 6} {
		if _, err := f.WriteAt([]byte("needle"), at); err != nil {
			t.Fatal(err)
		}
	}
	hits, err := find(f, []string{"needle", "aa", "absent", strings.Repeat("long", 99)})
	if err != nil {
		t.Fatal(err)
	}
	if got, want := fmt.Sprint(hits["needle"]), fmt.Sprint([]int64{0, read - 3, 2*read - 6, 64 << 20, 100<<20 - 6}); got != want {
		t.Errorf("needle at %s, want %s", got, want)
	}
	if len(hits["aa"]) != 2 || len(hits["absent"]) != 0 {
		t.Errorf("aa %v, absent %v", hits["aa"], hits["absent"])
	}
	if _, err := find(f, []string{""}); err == nil {
		t.Error("an empty string was searched for")
	}
}

// A power cut leaves a filesystem that needs its journal, and the next boot has
// what was synced. A kill leaves a clean one.
func TestPowerCut(t *testing.T) {
	need.Tool(t, "dumpe2fs")
	each(t, func(t *testing.T, m *Machine) {
		dirty := func() bool {
			out, err := exec.Command("dumpe2fs", "-h", m.Disk).Output()
			if err != nil {
				t.Fatal(err)
			}
			return strings.Contains(string(out), "needs_recovery")
		}
		m.Must(t, "alice", "echo kept > ~/synced; sync ~/synced ~; echo more > ~/unsynced")
		m.Cut(t)
		if !dirty() {
			t.Error("the filesystem is clean after a power cut")
		}
		m.Boot(t)
		if got := m.Must(t, "alice", "cat ~/synced"); got != "kept" {
			t.Errorf("the synced file holds %q", got)
		}
		m.Must(t, "root", "echo again > /root/file")
		m.Kill(t)
		if dirty() {
			t.Error("the filesystem is not clean after a kill")
		}
		m.Boot(t)
		if got := m.Must(t, "root", "cat /root/file"); got != "again" {
			t.Errorf("the file written before the kill holds %q", got)
		}
		m.PowerCut(t)
		m.Must(t, "root", "cat /root/file")
	})
}

// Kill ends everything: processes in namespaces of their own, pinned mount
// namespaces, and loop devices that nobody would have detached.
func TestKillTakesAll(t *testing.T) {
	t.Parallel()
	m := Start(t, Trixie)
	p, err := m.Start("root", `
		truncate -s 8M /root/inner; mkfs.ext4 -q /root/inner
		dev=$(losetup --find --show /root/inner)
		mkdir /run/ns; mount --bind /run/ns /run/ns; mount --make-private /run/ns; touch /run/ns/pin
		unshare -m sleep infinity & mount --bind /proc/$!/ns/mnt /run/ns/pin || true
		echo $dev; exec sleep infinity`)
	if err != nil {
		t.Fatal(err)
	}
	for !strings.Contains(p.Output(), "/dev/loop") {
		select {
		case <-p.Done():
			t.Fatal(p.Output())
		case <-time.After(10 * time.Millisecond):
		}
	}
	disk := m.Disk
	m.Stop(t)
	<-p.Done()
	if devs, err := loop.Backed(disk); err != nil || len(devs) > 0 {
		t.Errorf("left behind: %v %v", devs, err)
	}
	if _, err := os.Stat(filepath.Dir(disk)); !errors.Is(err, os.ErrNotExist) {
		t.Errorf("the work directory is still there: %v", err)
	}
	if _, err := m.Run("root", "true"); err == nil {
		t.Error("a stopped machine ran a command")
	}
}

// A mount namespace made in the machine can be pinned there, whichever CPU it was
// made on, as on a real computer (see nsid.go).
func TestPin(t *testing.T) {
	t.Parallel()
	m := Start(t, Forky)
	m.Must(t, "root", `
		mkdir /run/p; mount --bind /run/p /run/p; mount --make-private /run/p; touch /run/p/ns
		for cpu in $(seq 0 $(($(nproc) - 1))); do
			coproc view { exec taskset -c $cpu unshare -m sh -c 'echo; read x'; }
			read -u ${view[0]} x
			mount --bind /proc/$view_PID/ns/mnt /run/p/ns
			nsenter --mount=/run/p/ns true
			umount /run/p/ns
			kill $view_PID; wait $view_PID || true
		done`)
}

// Commands: users, groups, environment, codes, streams, time, what is left running.
func TestExec(t *testing.T) {
	t.Parallel()
	m := Start(t, Trixie)
	for _, c := range []struct {
		name string
		c    Command
		want Result
	}{
		{"root is the default", Command{Script: "id -u; pwd"}, Result{Stdout: "0\n/root\n"}},
		{"a user", Command{User: "alice", Script: "id -un; id -Gn; pwd; echo $HOME $USER"}, Result{Stdout: "alice\nalice\n/home/alice\n/home/alice alice\n"}},
		{"streams", Command{User: "bob", Script: "cat; echo e >&2", Stdin: "in"}, Result{Stdout: "in", Stderr: "e\n"}},
		{"code", Command{Script: "exit 7"}, Result{Code: 7}},
		{"signal", Command{Script: "kill -TERM $$"}, Result{Code: 143}},
		{"environment and directory", Command{Script: "echo $X; pwd", Env: []string{"X=y"}, Dir: "/tmp"}, Result{Stdout: "y\n/tmp\n"}},
		{"first failure ends it", Command{Script: "false; echo no"}, Result{Code: 1}},
		{"a daemon left behind does not hold it", Command{Script: "sleep 1000 & echo x"}, Result{Stdout: "x\n"}},
		{"host name, network, PID 1", Command{Script: "hostname; ls /sys/class/net; ip -br link show lo | cut -c1-20; cat /proc/1/cmdline | tr '\\0' ' ' | cut -d' ' -f1"},
			Result{Stdout: "bed\nlo\nlo               UNK\n" + initName + "\n"}},
		{"sysfs is read only", Command{Script: "echo 1 2>/dev/null > /sys/kernel/profiling"}, Result{Code: 1}},
	} {
		r, err := m.Exec(c.c)
		if err != nil || (r.Code != c.want.Code || r.Stdout != c.want.Stdout || (c.want.Stderr != "" && r.Stderr != c.want.Stderr)) {
			t.Errorf("%s: %+v, %v, want %+v", c.name, r, err, c.want)
		}
	}
	var failed *Failed
	if _, err := m.Run("alice", "echo why; exit 3"); !errors.As(err, &failed) || failed.Code != 3 || !strings.Contains(err.Error(), "why") {
		t.Errorf("Run: %v", err)
	}
	if _, err := m.Run("mallory", "true"); err == nil {
		t.Error("an unknown user ran a command")
	}
	if _, err := m.Exec(Command{Script: "exec sleep 1000", Within: time.Millisecond}); err == nil {
		t.Error("an endless command was not ended")
	}
}

// What a killed test process left behind is swept by the next start; what a
// living one holds is not.
func TestSweep(t *testing.T) {
	run := t.TempDir()
	old := time.Now().Add(-time.Hour)
	for _, name := range []string{"dead", "held"} {
		dir := filepath.Join(run, name)
		if err := errors.Join(os.MkdirAll(filepath.Join(dir, "mnt"), 0o700), os.WriteFile(filepath.Join(dir, "disk"), nil, 0o600), os.Chtimes(dir, old, old)); err != nil {
			t.Fatal(err)
		}
	}
	lock, err := lockDir(filepath.Join(run, "held"))
	if err != nil {
		t.Fatal(err)
	}
	defer lock.Close()
	if err := os.Mkdir(filepath.Join(run, "new"), 0o700); err != nil {
		t.Fatal(err)
	}
	sweep(run)
	left, _ := filepath.Glob(run + "/*")
	if got := fmt.Sprint(left); got != fmt.Sprintf("[%[1]s/held %[1]s/new]", run) {
		t.Errorf("left: %s", got)
	}
}
