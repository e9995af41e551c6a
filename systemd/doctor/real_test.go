package doctor

import (
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"log"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"syscall"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"overkeep/tests/bed/loop"
	"overkeep/tests/need"
)

// Environment by which the test binary calls itself.
const (
	envPrivate = "OVERKEEP_DOCTOR_PRIVATE" // in its own mount namespace already
	envRun     = "OVERKEEP_DOCTOR_RUN"     // run once below this root and print JSON
	envForever = "OVERKEEP_DOCTOR_FOREVER" // run again and again, to be killed
)

// TestMain moves the whole run into a private mount namespace, so that nothing a
// test mounts is ever seen outside and all of it goes with the last process.
func TestMain(m *testing.M) {
	log.SetOutput(io.Discard) // as every command of ours does
	if root := os.Getenv(envForever); root != "" {
		for {
			Run(context.Background(), Config{Root: root})
		}
	}
	if root := os.Getenv(envRun); root != "" {
		_ = json.NewEncoder(os.Stdout).Encode(Run(context.Background(), Config{Root: root}))
		return
	}
	if os.Geteuid() != 0 || os.Getenv(envPrivate) != "" {
		os.Exit(m.Run())
	}
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

// eventually waits for what the kernel does in its own time; a bound, no measure.
func eventually(t *testing.T, what string, done func() bool) {
	t.Helper()
	deadline := time.Now().Add(30 * time.Second)
	for !done() {
		if time.Now().After(deadline) {
			t.Fatalf("%s: not within 30 s", what)
		}
		time.Sleep(2 * time.Millisecond)
	}
}

// ourLoops lists the loop devices that some doctor has set up. Other tests, which
// run beside this one, have others.
func ourLoops(t *testing.T) []string {
	t.Helper()
	files, err := filepath.Glob("/sys/block/loop*/loop/backing_file")
	if err != nil {
		t.Fatal(err)
	}
	var out []string
	for _, f := range files {
		if b, err := os.ReadFile(f); err == nil && strings.Contains(string(b), scratchName) {
			out = append(out, strings.TrimSpace(string(b)))
		}
	}
	return out
}

// traces is all that a run could leave: mounts, loop devices, and names in the
// directories it works in.
func traces(t *testing.T, dirs ...string) string {
	t.Helper()
	b, err := os.ReadFile("/proc/self/mountinfo")
	if err != nil {
		t.Fatal(err)
	}
	out := string(b)
	for _, d := range append(dirs, "/mnt", "/media") {
		entries, err := os.ReadDir(d)
		if err != nil && !errors.Is(err, os.ErrNotExist) {
			t.Fatal(err)
		}
		for _, e := range entries {
			out += filepath.Join(d, e.Name()) + "\n"
		}
	}
	return out
}

// disk is an ext4 on a loop device of its own, with a root short enough for
// --root. It is unmounted when the test ends.
func disk(t *testing.T, mkfs ...string) (root, device string) {
	t.Helper()
	need.Root(t)
	need.Tool(t, "mkfs.ext4", "tune2fs")
	dir, err := os.MkdirTemp("", "okd-")
	if err != nil {
		t.Fatal(err)
	}
	root = filepath.Join(dir, "m")
	image := filepath.Join(dir, "image")
	if err := errors.Join(os.Mkdir(root, 0o755), os.WriteFile(image, nil, 0o600), os.Truncate(image, 64<<20)); err != nil {
		t.Fatal(err)
	}
	if out, err := exec.Command("mkfs.ext4", append(append([]string{"-q"}, mkfs...), image)...).CombinedOutput(); err != nil {
		t.Fatalf("mkfs.ext4: %v: %s", err, out)
	}
	dev, err := loop.Attach(image)
	if err != nil {
		t.Fatal(err)
	}
	defer dev.Close()
	if err := unix.Mount(dev.Path, root, "ext4", 0, ""); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		eventually(t, "unmount", func() bool { return unix.Unmount(root, 0) == nil })
		if err := errors.Join(os.Remove(image), os.Remove(root), os.Remove(dir)); err != nil {
			t.Error(err)
		}
	})
	return root, dev.Path
}

// The real thing: every kernel check says yes on a kernel that has it all, and
// nothing is left.
func TestReal(t *testing.T) {
	need.Encryption(t)
	need.OverlayFS(t)
	need.Namespaces(t)
	root, dev := disk(t, "-O", "encrypt")
	before := traces(t, root, filepath.Dir(root))
	for range 3 {
		checks := Run(t.Context(), Config{Root: root, User: "nobody"})
		sane(t, checks)
		for _, c := range checks {
			if (c.Group == Kernel || c.Group == Filesystem) && c.Needed && c.Answer != Yes && c.Name != "parent directories" {
				t.Errorf("%+v", c)
			}
		}
		if c := find(t, checks, "keep in a directory"); c.Answer != Yes {
			t.Errorf("%+v", c)
		}
		if c := find(t, checks, "encryption"); !strings.Contains(c.Found, "ext4 "+dev+",") {
			t.Errorf("found %q, want %s in it", c.Found, dev)
		}
		// The root lies below the temporary directory, which everybody may write to.
		if c := find(t, checks, "parent directories"); c.Answer != No || !strings.Contains(c.Missing, "can be changed by others") {
			t.Errorf("%+v", c)
		}
	}
	if after := traces(t, root, filepath.Dir(root)); after != before {
		t.Errorf("before:\n%s\nafter:\n%s", before, after)
	}
	eventually(t, "loop devices go", func() bool { return len(ourLoops(t)) == 0 })
}

// An ext4 without the feature says no, names the very command that mends it, and
// that command mends it.
func TestRemedyOfExt4(t *testing.T) {
	need.Encryption(t)
	root, dev := disk(t, "-O", "^encrypt")
	ask := func() Check {
		return find(t, Run(t.Context(), Config{Root: root}), "encryption")
	}
	c := ask()
	if want := "tune2fs -O encrypt " + dev; c.Answer != No || c.Remedy != want {
		t.Fatalf("%+v, want the remedy %q", c, want)
	}
	if !strings.Contains(c.Or, "overkeep init --on-image FILE") {
		t.Errorf("no other way: %+v", c)
	}
	if out, err := exec.Command("/bin/sh", "-c", c.Remedy).CombinedOutput(); err != nil {
		t.Fatalf("%s: %v: %s", c.Remedy, err, out)
	}
	if c := ask(); c.Answer != Yes || c.Remedy != "" {
		t.Errorf("after the remedy: %+v", c)
	}
}

// A filesystem that knows no encryption, and that a keep's own image mends.
func TestTmpfs(t *testing.T) {
	need.Encryption(t)
	root := filepath.Join(os.TempDir(), fmt.Sprintf("okd-tmpfs-%d", os.Getpid()))
	if err := os.Mkdir(root, 0o755); err != nil {
		t.Fatal(err)
	}
	if err := unix.Mount("tmpfs", root, "tmpfs", 0, "size=16m"); err != nil {
		t.Fatal(err)
	}
	defer func() {
		if err := errors.Join(unix.Unmount(root, 0), os.Remove(root)); err != nil {
			t.Error(err)
		}
	}()
	checks := Run(t.Context(), Config{Root: root, Sudo: true})
	c := find(t, checks, "encryption")
	if want := "sudo overkeep --root " + root + " init --on-image FILE"; c.Answer != No || c.Remedy != want || !strings.Contains(c.Missing, "tmpfs") {
		t.Errorf("%+v, want %q", c, want)
	}
	if c := find(t, checks, "free space"); c.Answer != No {
		t.Errorf("%+v", c)
	}
}

// Without root nothing that needs it is called missing, and the remedy is sudo.
func TestWithoutRoot(t *testing.T) {
	need.Root(t)
	root, _ := disk(t, "-O", "encrypt")
	cmd := exec.Command("/proc/self/exe")
	cmd.Env = []string{envRun + "=" + root, "PATH=" + os.Getenv("PATH")}
	cmd.Dir = "/"
	var complaint bytes.Buffer
	cmd.Stderr = &complaint
	cmd.SysProcAttr = &syscall.SysProcAttr{Credential: &syscall.Credential{Uid: 65534, Gid: 65534}}
	out, err := cmd.Output()
	var checks []Check
	if err != nil || json.Unmarshal(out, &checks) != nil {
		t.Fatalf("%v: %s%s", err, out, complaint.Bytes())
	}
	sane(t, checks)
	if Verdict(checks) == Yes {
		t.Error("all is well without having tried")
	}
	sudo := "sudo overkeep --root " + root + " doctor"
	for _, name := range []string{
		"mount namespaces", "loop devices", "ext4 encryption", "keep in an image", "overlay store", "remount while busy",
		"lock with proof", "pinned namespace", "build sandbox", "encryption", "exchange of directories",
	} {
		if c := find(t, checks, name); c.Answer != Unsure || c.Remedy != sudo {
			t.Errorf("%+v", c)
		}
	}
	if c := find(t, checks, "root"); c.Answer != No || c.Remedy != sudo {
		t.Errorf("%+v", c)
	}
}

// Killed in the midst of its work it leaves no mount and no loop device.
func TestKilled(t *testing.T) {
	need.Encryption(t)
	root, _ := disk(t, "-O", "encrypt")
	before, err := os.ReadFile("/proc/self/mountinfo")
	if err != nil {
		t.Fatal(err)
	}
	eventually(t, "no loop devices at first", func() bool { return len(ourLoops(t)) == 0 })
	for i := range 10 {
		cmd := exec.Command("/proc/self/exe")
		cmd.Env = []string{envForever + "=" + root, "PATH=" + os.Getenv("PATH")}
		cmd.SysProcAttr = &syscall.SysProcAttr{Pdeathsig: syscall.SIGKILL}
		if err := cmd.Start(); err != nil {
			t.Fatal(err)
		}
		// One more device before each kill, so that it is hit at different points.
		seen := map[string]bool{}
		eventually(t, "work to interrupt", func() bool {
			for _, l := range ourLoops(t) {
				seen[l] = true
			}
			return len(seen) > i%4
		})
		_ = cmd.Process.Kill()
		_ = cmd.Wait()
		eventually(t, "loop devices go", func() bool { return len(ourLoops(t)) == 0 })
	}
	after, err := os.ReadFile("/proc/self/mountinfo")
	if err != nil || !bytes.Equal(before, after) {
		t.Errorf("mounts before:\n%s\nafter:\n%s", before, after)
	}
	// What may be left are empty directories beside the state, by their names.
	for _, e := range leftovers(t, root) {
		if !strings.HasPrefix(e, ".overkeep-") {
			t.Errorf("%q is left", e)
		}
	}
}

func leftovers(t *testing.T, root string) []string {
	t.Helper()
	entries, err := os.ReadDir(root)
	if err != nil {
		t.Fatal(err)
	}
	var out []string
	for _, e := range entries {
		if e.Name() != "lost+found" {
			out = append(out, e.Name())
		}
	}
	slices.Sort(out)
	return out
}

// A symbolic link or a file where the state would lie is told, not followed into.
func TestHostileState(t *testing.T) {
	root, _ := disk(t, "-O", "encrypt")
	if err := errors.Join(os.MkdirAll(filepath.Join(root, "var"), 0o755), os.Symlink("/nowhere", filepath.Join(root, "var/lib"))); err != nil {
		t.Fatal(err)
	}
	if c := find(t, probeFS(t.Context(), Config{Root: root}).checks(machine{root: true, at: root}, true), "parent directories"); c.Answer != No {
		t.Errorf("%+v", c)
	}
	if err := errors.Join(os.Remove(filepath.Join(root, "var/lib")), os.WriteFile(filepath.Join(root, "var/lib"), nil, 0o600)); err != nil {
		t.Fatal(err)
	}
	f := probeFS(t.Context(), Config{Root: root})
	sane(t, f.checks(machine{root: true, at: root}, true))
	if c := find(t, f.checks(machine{root: true, at: root}, true), "parent directories"); c.Answer != No {
		t.Errorf("%+v", c)
	}
}
