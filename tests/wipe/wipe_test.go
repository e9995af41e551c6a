package wipe

import (
	"bytes"
	"errors"
	"fmt"
	"math"
	"os"
	"os/exec"
	"path/filepath"
	"runtime"
	"slices"
	"strings"
	"syscall"
	"testing"

	"golang.org/x/sys/unix"

	"overkeep/overlay/nixdb"
	"overkeep/overlay/wipe"
	"overkeep/tests/bed"
	"overkeep/tests/fixture"
	"overkeep/tests/need"
)

const (
	planted = 200      // by the command
	fewer   = 60       // by the library
	largest = 10 << 20 // bytes of a file
	stock   = 40       // of these, removed by Nix's own means
)

const envPrivate = "OVERKEEP_WIPE_PRIVATE" // in its own mount namespace already

// TestMain moves the whole run into a private mount namespace: the machine's disk is
// mounted there once more, for paths through /proc/PID/root are no files to SQLite.
func TestMain(m *testing.M) {
	if os.Geteuid() != 0 || os.Getenv(envPrivate) != "" {
		os.Exit(m.Run())
	}
	runtime.LockOSThread() // Pdeathsig goes by the thread
	cmd := exec.Command("/proc/self/exe", os.Args[1:]...)
	cmd.Env = append(os.Environ(), envPrivate+"=1")
	cmd.Stdin, cmd.Stdout, cmd.Stderr = os.Stdin, os.Stdout, os.Stderr
	cmd.SysProcAttr = &syscall.SysProcAttr{Unshareflags: syscall.CLONE_NEWNS, Pdeathsig: syscall.SIGKILL}
	err := cmd.Run()
	if exit := (*exec.ExitError)(nil); errors.As(err, &exit) {
		os.Exit(exit.ExitCode())
	}
	if err != nil {
		fmt.Fprintln(os.Stderr, err)
		os.Exit(1)
	}
}

// A canary says whose it is and where it stood.
func canary(whose, where string) string { return "CANARY-" + whose + "-in-" + where }

// plant adds files of sizes from 0 to largest to the system store, and returns their
// paths. They are made in memory and come to the disk by Nix alone.
func plant(t *testing.T, m *bed.Machine, whose string, n int) []string {
	t.Helper()
	dir := "/dev/shm/" + whose
	if err := os.Mkdir(m.Root+dir, 0o755); err != nil {
		t.Fatal(err)
	}
	for i := range n {
		// Mostly small, as in a store; the last one is the largest.
		size := int(largest*math.Pow(float64(i)/float64(n-1), 20)) + 40
		if i == 0 {
			size = 0
		}
		line := fmt.Sprintf("%s-%04d\n", canary(whose, "content"), i)
		content := bytes.Repeat([]byte(line), size/len(line)+1)[:size]
		if err := os.WriteFile(fmt.Sprintf("%s%s/%s-%04d", m.Root, dir, canary(whose, "name"), i), content, 0o644); err != nil {
			t.Fatal(err)
		}
	}
	paths := strings.Fields(m.Must(t, "root", "nix-store --add "+dir+"/*; rm -r "+dir))
	if len(paths) != n {
		t.Fatalf("%d paths", len(paths))
	}
	return paths
}

// hits looks on the raw disk for what names and contents have in common and for the
// hash parts of the paths.
func hits(t *testing.T, m *bed.Machine, whose string, paths []string) (sum map[string]int) {
	t.Helper()
	var names [][]byte
	for _, where := range []string{"content", "name", "log"} {
		names = append(names, []byte(canary(whose, where)))
	}
	for _, p := range paths {
		names = append(names, []byte(filepath.Base(p)[:32]))
	}
	root, err := os.Open(m.Root)
	if err != nil {
		t.Fatal(err)
	}
	defer root.Close()
	// Everything is on the device first.
	found := m.Search(t, string(names[0]), string(names[1]), string(names[2]))
	disk, err := wipe.OpenDisk(m.Disk)
	if err != nil {
		t.Fatal(err)
	}
	defer disk.Close()
	sum = map[string]int{}
	if err := wipe.Search(t.Context(), disk, names, func(n int, _ int64) {
		if n < 3 {
			sum[string(names[n])]++
		} else {
			sum["hash parts"]++
		}
	}); err != nil {
		t.Fatal(err)
	}
	// Two searches that share no code.
	for n, c := range found {
		if c != sum[n] {
			t.Errorf("%s: %d and %d hits", n, c, sum[n])
		}
	}
	return sum
}

// log builds a derivation whose log has a canary in its name, and returns its path
// and that of its output.
func log(t *testing.T, m *bed.Machine, whose string) (drv, out string) {
	t.Helper()
	expr := "/dev/shm/" + whose + ".nix"
	if err := os.WriteFile(m.Root+expr, []byte(fixture.Derivation(canary(whose, "log"), "echo built; echo "+canary(whose, "content")+" > $out")), 0o644); err != nil {
		t.Fatal(err)
	}
	drv = strings.TrimSpace(m.Must(t, "root", "nix-instantiate "+expr+" 2>/dev/null"))
	out = strings.TrimSpace(m.Must(t, "root", "nix-store --realise "+drv+" 2>/dev/null; rm "+expr))
	return drv, out
}

// TestNothingLeft: of files of 0 to 10 MB in the system store, one build and its
// log, nothing is found on the raw disk once they were wiped one by one beside a
// running nix-daemon: no content, no name, no hash part, in no block of any file,
// database, journal or free space. Nix's own way leaves all kinds of them.
func TestNothingLeft(t *testing.T) {
	t.Parallel()
	need.Tool(t, "fstrim")
	m := bed.Start(t, bed.Forky)
	daemon := m.SystemNix(t)
	// Some more, so that the store's directory is one that has been split.
	if err := os.Mkdir(m.Root+"/dev/shm/many", 0o755); err != nil {
		t.Fatal(err)
	}
	for i := range 1000 {
		if err := os.WriteFile(fmt.Sprintf("%s/dev/shm/many/public-%d", m.Root, i), []byte(fmt.Sprint(i)), 0o644); err != nil {
			t.Fatal(err)
		}
	}
	m.Must(t, "root", "nix-store --add /dev/shm/many/* >/dev/null; rm -r /dev/shm/many")
	theirs := plant(t, m, "stock", stock)
	ours := plant(t, m, "ours", fewer)
	m.Must(t, "root", "nix-store --optimise")
	theirDrv, theirOut := log(t, m, "stock")
	drv, out := log(t, m, "ours")
	theirs, ours = append(theirs, theirOut, theirDrv), append(ours, out, drv)

	for _, h := range []map[string]int{hits(t, m, "stock", theirs), hits(t, m, "ours", ours)} {
		t.Logf("planted: %v", h)
		for n, c := range h {
			if c == 0 {
				t.Fatalf("%s is not found where it is", n)
			}
		}
	}

	// The stock procedure.
	m.Must(t, "root", "nix-store --delete "+strings.Join(theirs, " ")+" >/dev/null 2>&1; rm /nix/var/log/nix/drvs/*/*stock*; sync; fstrim /")
	left := hits(t, m, "stock", theirs)
	t.Logf("nix-store --delete, rm of the log, sync, fstrim leave: %v", left)
	if left[canary("stock", "name")] == 0 || left["hash parts"] == 0 {
		t.Error("nothing is left by stock means: this machine cannot tell")
	}

	// Ours.
	root := t.TempDir()
	if err := unix.Mount(m.Device, root, "ext4", 0, ""); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		if err := unix.Unmount(root, 0); err != nil {
			t.Error(err)
			_ = unix.Unmount(root, unix.MNT_DETACH)
		}
	})
	db := root + "/nix/var/nix/db/db.sqlite"
	open := func(path string) *os.File {
		f, err := os.Open(root + path)
		if err != nil {
			t.Fatal(err)
		}
		t.Cleanup(func() { f.Close() })
		return f
	}
	store, links := open("/nix/store"), open("/nix/store/.links")
	infos, missing, err := nixdb.ReadInfos(t.Context(), db, ours)
	if err != nil || len(missing) != 0 {
		t.Fatalf("%q, %v", missing, err)
	}
	if i := infos[len(infos)-1]; len(i.Outputs) != 1 || i.Outputs[0].Path != out || i.CA == "" {
		t.Errorf("%+v", i)
	}
	expect := map[string]string{}
	for _, i := range infos {
		expect[i.Path] = i.NarHash
	}
	if n, err := nixdb.ClearDeriver(t.Context(), db, []string{drv}); n != 1 || err != nil {
		t.Errorf("%d rows named the derivation, %v", n, err)
	}
	var total wipe.Report
	var names [][]byte
	for _, p := range ours {
		if err := nixdb.Invalidate(t.Context(), db, []string{p}, expect); err != nil {
			t.Fatal(err)
		}
		r, err := wipe.Tree(t.Context(), store, filepath.Base(p), wipe.Options{Links: links})
		if err != nil {
			t.Fatal(err)
		}
		total.Add(r)
		names = append(names, []byte(filepath.Base(p)[:32]), []byte(filepath.Base(p)[32:]))
	}
	t.Logf("%+v", withoutNames(total))
	// Each has a name in .links, as Nix named it, but what was built after that and
	// the empty file, whose content others may have.
	if total.Files+total.Shared != len(ours) || total.Shared > 1 || total.Links < fewer-1 {
		t.Errorf("%+v", withoutNames(total))
	}
	logs, err := wipe.Logs(t.Context(), open("/nix/var/log/nix"), []string{filepath.Base(drv)})
	if err != nil || logs.Files != 1 {
		t.Errorf("%+v, %v", logs, err)
	}
	scrub, err := nixdb.Scrub(t.Context(), db, names)
	t.Logf("%+v", scrub)
	if err != nil || scrub.Left != 0 {
		t.Errorf("%+v, %v", scrub, err)
	}
	for _, dir := range []*os.File{store, links, open("/nix/var/log/nix/drvs/" + filepath.Base(drv)[:2])} {
		looked := names
		if dir == links {
			looked = nil
			for _, l := range total.LinkNames {
				looked = append(looked, []byte(l))
			}
		}
		slack, err := wipe.Slack(t.Context(), dir, looked)
		t.Logf("%s: %+v", filepath.Base(dir.Name()), slack)
		if err != nil || slack.Looked != wipe.Done || slack.After != 0 {
			t.Errorf("%s: %+v, %v", dir.Name(), slack, err)
		}
	}
	device, err := wipe.Device(t.Context(), store)
	t.Logf("%+v", device)
	if err != nil || device.Sync != wipe.Done || device.Checkpoint != wipe.Done {
		t.Errorf("%+v, %v", device, err)
	}
	after := hits(t, m, "ours", ours)
	t.Logf("wiped: %v", after)
	if len(after) != 0 {
		t.Errorf("left: %v", after)
		for n, at := range m.Find(t, canary("ours", "content"), canary("ours", "name")) {
			for _, o := range at[:min(3, len(at))] {
				t.Errorf("%s: %s", n, m.Owner(o))
			}
		}
	}
	// Nix finds its store as it left it.
	select {
	case <-daemon.Done():
		t.Error("the daemon has ended")
	default:
	}
	m.Must(t, "alice", "NIX_REMOTE=daemon nix-store --verify")
	if got := m.Must(t, "root", "nix-store --verify --check-contents 2>&1"); strings.Contains(got, "error") || strings.Contains(got, "modified") {
		t.Error(got)
	}
	if left := strings.Fields(m.Must(t, "root", "ls -A /nix/store")); slices.ContainsFunc(left, func(n string) bool { return strings.Contains(n, "overkeep") }) {
		t.Errorf("%q", left)
	}
}

func withoutNames(r wipe.Report) wipe.Report { r.LinkNames = nil; return r }
