package holder

import (
	"bufio"
	"errors"
	"fmt"
	"io"
	"os"
	"os/exec"
	"path/filepath"
	"runtime"
	"strings"
	"testing"
	"unsafe"

	"golang.org/x/sys/unix"

	"overkeep/tests/bed/loop"
	"overkeep/tests/need"
)

// The first thread is kept for the main goroutine: what another would change of
// it, such as its namespace, would stay, and /proc shows it as the process's.
func init() { runtime.LockOSThread() }

// The kernel tests run in a private mount namespace: as root the test binary
// starts itself again in one. It is also its own helper process, see roles.
func TestMain(m *testing.M) {
	if role := os.Getenv("HOLDER_ROLE"); role != "" {
		os.Exit(play(role, strings.Split(os.Getenv("HOLDER_ARGS"), "\n")))
	}
	fuzzing := strings.Contains(strings.Join(os.Args, " "), "-test.fuzz")
	if os.Geteuid() != 0 || os.Getenv("HOLDER_PRIVATE") != "" || fuzzing {
		os.Exit(m.Run())
	}
	cmd := exec.Command(os.Args[0], os.Args[1:]...)
	cmd.Env = append(os.Environ(), "HOLDER_PRIVATE=1")
	cmd.Stdin, cmd.Stdout, cmd.Stderr = os.Stdin, os.Stdout, os.Stderr
	// Unsharing the mount namespace makes all mounts private (os/exec).
	cmd.SysProcAttr = &unix.SysProcAttr{Unshareflags: unix.CLONE_NEWNS}
	err := cmd.Run()
	if exit := (*exec.ExitError)(nil); errors.As(err, &exit) {
		os.Exit(exit.ExitCode())
	} else if err != nil {
		fmt.Fprintln(os.Stderr, err)
		os.Exit(1)
	}
	os.Exit(0)
}

// bed is an unlocked keep in a view of its own, seen from outside.
type bed struct {
	t       testing.TB
	dir     string
	view    *os.File
	keep    string // K, in the view
	merged  string // the overlay, in the view
	volume  string // dir back-end: the directory, on the "host"
	host    string // a directory of the filesystem that the lower store is on
	points  []string
	outside []string
	target  Target
	atExit  []func()
	viewEnd func()
}

// start runs a helper in the view; its arguments are paths there.
func (b *bed) start(role string, args ...string) *helper {
	b.t.Helper()
	return b.startIn(b.view, self(b.t), role, args...)
}

func self(t testing.TB) string {
	t.Helper()
	p, err := os.Executable()
	if err != nil {
		t.Fatal(err)
	}
	return p
}

// helper is a child process that holds something until it is told to end.
type helper struct {
	t    testing.TB
	cmd  *exec.Cmd
	in   io.WriteCloser
	pid  int
	done bool
}

func (b *bed) startIn(ns *os.File, binary, role string, args ...string) *helper {
	b.t.Helper()
	cmd := exec.Command(binary)
	cmd.Env = roleEnv(role, args...)
	return b.startCmd(ns, cmd)
}

// roleEnv is the environment that makes the test binary a helper. The race
// detector would sleep a second at the end of each (GORACE, atexit_sleep_ms).
func roleEnv(role string, args ...string) []string {
	return append(os.Environ(), "HOLDER_ROLE="+role, "HOLDER_ARGS="+strings.Join(args, "\n"), "GORACE=atexit_sleep_ms=0")
}

// startCmd starts cmd in ns and waits until it says that it is ready.
func (b *bed) startCmd(ns *os.File, cmd *exec.Cmd) *helper {
	b.t.Helper()
	in, err := cmd.StdinPipe()
	if err != nil {
		b.t.Fatal(err)
	}
	out, err := cmd.StdoutPipe()
	if err != nil {
		b.t.Fatal(err)
	}
	cmd.Stderr = os.Stderr
	cmd.Dir = "/"
	err = onThread(func() error {
		if err := enter(ns); err != nil {
			return err
		}
		return cmd.Start()
	})
	if err != nil {
		b.t.Fatal(err)
	}
	h := &helper{t: b.t, cmd: cmd, in: in, pid: cmd.Process.Pid}
	b.t.Cleanup(h.kill)
	if !wantsReady(cmd) {
		return h
	}
	line, err := bufio.NewReader(out).ReadString('\n')
	if err != nil || strings.TrimSpace(line) != "ready" {
		b.t.Fatalf("helper %v said %q: %v", cmd.Args, line, err)
	}
	return h
}

func wantsReady(cmd *exec.Cmd) bool { return cmd.Path != "" }

// end lets the helper end and waits for it.
func (h *helper) end() {
	h.t.Helper()
	if h.done {
		return
	}
	h.done = true
	h.in.Close()
	if err := h.cmd.Wait(); err != nil {
		h.t.Errorf("helper %v: %v", h.cmd.Args, err)
	}
}

func (h *helper) kill() {
	if !h.done {
		h.done = true
		h.cmd.Process.Kill()
		h.cmd.Wait()
	}
}

// inView runs f on a thread in the view.
func (b *bed) inView(f func() error) {
	b.t.Helper()
	err := onThread(func() error {
		if err := enter(b.view); err != nil {
			return err
		}
		return f()
	})
	if err != nil {
		b.t.Fatal(err)
	}
}

// newSpace makes a slave copy of namespace from (nil: the caller's).
func newSpace(from *os.File) (*os.File, error) {
	var f *os.File
	err := onThread(func() error {
		proc, err := openProc()
		if err != nil {
			return err
		}
		defer proc.Close()
		if from != nil {
			if err := enter(from); err != nil {
				return err
			}
		}
		if err := unix.Unshare(unix.CLONE_NEWNS); err != nil {
			return err
		}
		if err := unix.Mount("", "/", "", unix.MS_SLAVE|unix.MS_REC, ""); err != nil {
			return err
		}
		f, err = openAt(int(proc.Fd()), "thread-self/ns/mnt", unix.O_RDONLY)
		return err
	})
	return f, err
}

// newBed makes a keep whose volume is an encrypted directory ("dir") of a
// filesystem shared with the lower store, an ext4 image ("image"), or an image in
// an encrypted directory ("sealed"). options are added to the overlay's.
func newBed(t testing.TB, kind, options string) *bed {
	t.Helper()
	need.OverlayFS(t)
	need.Tool(t, "mkfs.ext4")
	dir, err := filepath.EvalSymlinks(t.TempDir())
	if err != nil {
		t.Fatal(err)
	}
	b := &bed{t: t, dir: dir, keep: dir + "/k", merged: dir + "/store", host: dir + "/host"}
	mkdirs(t, b.keep, b.merged, b.host)
	image := dir + "/image"
	if kind != "image" {
		need.Encryption(t)
		b.mountImage(dir+"/disk", b.host, 64)
		t.Cleanup(func() { b.unmount(b.host) })
		b.volume = b.host + "/volume"
		mkdirs(t, b.volume)
		encrypt(t, b.host, b.volume)
		image = b.volume + "/image"
		mkdirs(t, b.volume+"/home")
		writeFile(t, b.volume+"/home/note", strings.Repeat("note\n", 2000))
	}
	if kind == "dir" {
		mkdirs(t, b.volume+"/upper", b.volume+"/work")
	}
	mkdirs(t, b.host+"/lower/pkg")
	writeFile(t, b.host+"/lower/pkg/lib", strings.Repeat("lower\n", 2000))
	writeFile(t, b.host+"/lower/file", "lower\n")
	if b.view, err = newSpace(nil); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { b.view.Close() })
	b.inView(func() error {
		if kind == "dir" {
			if err := unix.Mount(b.volume, b.keep, "", unix.MS_BIND, ""); err != nil {
				return err
			}
		} else {
			b.mountImage(image, b.keep, 16)
			mkdirs(t, b.keep+"/upper", b.keep+"/work", b.keep+"/home")
			b.outside = []string{image}
			if kind == "sealed" {
				b.outside = append(b.outside, b.volume)
			}
		}
		writeFile(t, b.keep+"/home/note", strings.Repeat("note\n", 2000))
		opt := fmt.Sprintf("lowerdir=%s/lower,upperdir=%s/upper,workdir=%s/work,index=off,metacopy=off", b.host, b.keep, b.keep)
		if err := unix.Mount("overlay", b.merged, "overlay", 0, opt+options); err != nil {
			return fmt.Errorf("overlay %s: %w", opt, err)
		}
		writeFile(t, b.merged+"/upper-file", "upper\n")
		mkdirs(t, b.merged+"/d")
		return nil
	})
	b.points = []string{b.merged, b.keep}
	if b.target, err = Describe(b.view, b.points, b.outside...); err != nil {
		t.Fatal(err)
	}
	return b
}

// unmount unmounts point in the caller's namespace, lazily if it must: what is
// left over must not fail the removal of the test's directory.
func (b *bed) unmount(point string) {
	if err := unix.Unmount(point, 0); err != nil {
		b.t.Errorf("unmount %s: %v", point, err)
		_ = unix.Unmount(point, unix.MNT_DETACH)
	}
}

func (b *bed) mountImage(image, point string, mib int64) {
	b.t.Helper()
	writeFile(b.t, image, "")
	if err := os.Truncate(image, mib<<20); err != nil {
		b.t.Fatal(err)
	}
	if out, err := exec.Command("mkfs.ext4", "-q", "-O", "encrypt", image).CombinedOutput(); err != nil {
		b.t.Fatalf("mkfs.ext4: %v: %s", err, out)
	}
	dev, err := loop.Attach(image)
	if err != nil {
		b.t.Fatal(err)
	}
	defer dev.Close()
	if err := unix.Mount(dev.Path, point, "ext4", 0, ""); err != nil {
		b.t.Fatal(err)
	}
}

func mkdirs(t testing.TB, dirs ...string) {
	t.Helper()
	for _, d := range dirs {
		if err := os.MkdirAll(d, 0o755); err != nil {
			t.Fatal(err)
		}
	}
}

func writeFile(t testing.TB, name, text string) {
	t.Helper()
	if err := os.WriteFile(name, []byte(text), 0o755); err != nil {
		t.Fatal(err)
	}
}

// encrypt adds a key to the filesystem at mnt and gives dir an fscrypt v2 policy.
func encrypt(t testing.TB, mnt, dir string) {
	t.Helper()
	var arg struct {
		unix.FscryptAddKeyArg
		raw [64]byte
	}
	copy(arg.raw[:], dir) // a key that protects nothing
	arg.Key_spec.Type = unix.FSCRYPT_KEY_SPEC_TYPE_IDENTIFIER
	arg.Raw_size = uint32(len(arg.raw))
	ioctl(t, mnt, unix.FS_IOC_ADD_ENCRYPTION_KEY, unsafe.Pointer(&arg))
	pol := unix.FscryptPolicyV2{
		Version:                   unix.FSCRYPT_POLICY_V2,
		Contents_encryption_mode:  unix.FSCRYPT_MODE_AES_256_XTS,
		Filenames_encryption_mode: unix.FSCRYPT_MODE_AES_256_CTS,
		Flags:                     unix.FSCRYPT_POLICY_FLAGS_PAD_32,
		Master_key_identifier:     [16]byte(arg.Key_spec.U[:16]),
	}
	ioctl(t, dir, unix.FS_IOC_SET_ENCRYPTION_POLICY, unsafe.Pointer(&pol))
}

func ioctl(t testing.TB, path string, req uint, arg unsafe.Pointer) {
	t.Helper()
	f, err := os.Open(path)
	if err != nil {
		t.Fatal(err)
	}
	defer f.Close()
	if _, _, e := unix.Syscall(unix.SYS_IOCTL, f.Fd(), uintptr(req), uintptr(arg)); e != 0 {
		t.Fatalf("ioctl %#x on %s: %v", req, path, e)
	}
	runtime.KeepAlive(f)
}
