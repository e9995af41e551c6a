// Package need is the one place where a test says what it needs of the machine.
//
// It promises that a missing feature is never mistaken for a passed test: where
// CI is set (to anything but "false") what is missing fails the test; elsewhere
// the test is skipped and says why. No other package calls Skip; a test in
// tests/layers holds that.
//
// Start with need.Root(t), need.Tool(t, "mkfs.ext4"), need.Encryption(t). Do not
// use it for what the test itself can make, such as a directory or a key.
//
// Kernel features are probed by trying them on something thrown away: a version
// number or a configuration file would only be a guess.
package need

import (
	"crypto/rand"
	"errors"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"runtime"
	"slices"
	"strings"
	"sync"
	"testing"
	"unsafe"

	"golang.org/x/sys/unix"

	"overkeep/tests/bed/loop"
)

// CI reports whether the tests run where nothing may be missing: the
// environment variable CI is neither empty nor "false".
func CI() bool {
	v := os.Getenv("CI")
	return v != "" && v != "false"
}

// Missing ends the test because of what: fatally in CI, else as skipped.
func Missing(t testing.TB, format string, args ...any) {
	t.Helper()
	what := fmt.Sprintf(format, args...)
	if CI() {
		t.Fatalf("CI must have what this test needs: %s", what)
		return // a recording testing.TB comes back from Fatalf
	}
	t.Skipf("not on this machine: %s", what)
}

// Root needs the test to run as the superuser.
func Root(t testing.TB) {
	t.Helper()
	if os.Geteuid() != 0 {
		Missing(t, "root")
	}
}

// sbin is where Debian keeps mkfs and its like; a user's PATH may lack it.
const sbin = "/usr/local/sbin:/usr/sbin:/sbin"

// Tool needs every named program in PATH (or in the sbin directories, which it
// appends to PATH so that a later exec finds them, too).
func Tool(t testing.TB, names ...string) {
	t.Helper()
	addSbin()
	for _, n := range names {
		if _, err := exec.LookPath(n); err != nil {
			Missing(t, "the program %q", n)
		}
	}
}

var addSbin = sync.OnceFunc(func() {
	path := filepath.SplitList(os.Getenv("PATH"))
	for _, d := range filepath.SplitList(sbin) {
		if !slices.Contains(path, d) {
			path = append(path, d)
		}
	}
	os.Setenv("PATH", strings.Join(path, string(os.PathListSeparator)))
})

// Encryption needs root, mkfs.ext4, loop devices and a kernel whose ext4 takes
// an fscrypt v2 policy. The probe makes an encrypted directory on a throw-away
// image once per test process.
func Encryption(t testing.TB) {
	t.Helper()
	Root(t)
	Tool(t, "mkfs.ext4")
	if err := encryption(); err != nil {
		Missing(t, "an ext4 with fscrypt: %v", err)
	}
}

// OverlayFS needs root and a kernel that mounts an overlay.
func OverlayFS(t testing.TB) {
	t.Helper()
	Root(t)
	if err := overlayFS(); err != nil {
		Missing(t, "overlayfs: %v", err)
	}
}

// Namespaces needs root and new mount, pid, network and user namespaces.
func Namespaces(t testing.TB) {
	t.Helper()
	Root(t)
	if err := namespaces(); err != nil {
		Missing(t, "namespaces: %v", err)
	}
}

var namespaces = sync.OnceValue(func() error {
	return private(func() error {
		return unix.Unshare(unix.CLONE_NEWPID | unix.CLONE_NEWNET | unix.CLONE_NEWUTS | unix.CLONE_NEWIPC)
	})
})

var overlayFS = sync.OnceValue(func() error {
	return inTemp(func(dir string) error {
		// A tmpfs carries the upper: an overlay refuses another overlay, which
		// is what /tmp is in a container.
		if err := unix.Mount("tmpfs", dir, "tmpfs", 0, "size=1m"); err != nil {
			return fmt.Errorf("mount a tmpfs: %w", err)
		}
		defer unix.Unmount(dir, 0)
		for _, d := range []string{"lower", "upper", "work", "merged"} {
			if err := os.Mkdir(filepath.Join(dir, d), 0o700); err != nil {
				return err
			}
		}
		opt := fmt.Sprintf("lowerdir=%[1]s/lower,upperdir=%[1]s/upper,workdir=%[1]s/work", dir)
		if err := unix.Mount("overlay", filepath.Join(dir, "merged"), "overlay", 0, opt); err != nil {
			return fmt.Errorf("mount: %w", err)
		}
		return unix.Unmount(filepath.Join(dir, "merged"), 0)
	})
})

var encryption = sync.OnceValue(func() error {
	return inTemp(func(dir string) error {
		image, mnt := filepath.Join(dir, "image"), filepath.Join(dir, "mnt")
		defer os.Remove(image)
		defer os.Remove(mnt)
		if err := errors.Join(os.WriteFile(image, nil, 0o600), os.Truncate(image, 16<<20), os.Mkdir(mnt, 0o700)); err != nil {
			return err
		}
		if out, err := exec.Command("mkfs.ext4", "-q", "-O", "encrypt", image).CombinedOutput(); err != nil {
			return fmt.Errorf("mkfs.ext4 -O encrypt: %w: %s", err, out)
		}
		dev, err := loop.Attach(image)
		if err != nil {
			return err
		}
		defer dev.Close()
		if err := unix.Mount(dev.Path, mnt, "ext4", 0, ""); err != nil {
			return fmt.Errorf("mount %s: %w", dev.Path, err)
		}
		defer unix.Unmount(mnt, 0)
		return encryptedFile(mnt)
	})
})

// encryptedFile adds a random key to the filesystem at mnt, and makes an
// encrypted directory with a file in it (fscrypt.rst of the kernel).
func encryptedFile(mnt string) error {
	key := make([]byte, 64)
	rand.Read(key)
	var arg struct {
		unix.FscryptAddKeyArg
		raw [64]byte
	}
	arg.Key_spec.Type = unix.FSCRYPT_KEY_SPEC_TYPE_IDENTIFIER
	arg.Raw_size = uint32(copy(arg.raw[:], key))
	pol := unix.FscryptPolicyV2{
		Version:                   unix.FSCRYPT_POLICY_V2,
		Contents_encryption_mode:  unix.FSCRYPT_MODE_AES_256_XTS,
		Filenames_encryption_mode: unix.FSCRYPT_MODE_AES_256_CTS,
		Flags:                     unix.FSCRYPT_POLICY_FLAGS_PAD_32,
	}
	secret := filepath.Join(mnt, "secret")
	if err := os.Mkdir(secret, 0o700); err != nil {
		return err
	}
	for _, call := range []struct {
		name, path string
		req        uint
		arg        unsafe.Pointer
	}{
		{"FS_IOC_ADD_ENCRYPTION_KEY", mnt, unix.FS_IOC_ADD_ENCRYPTION_KEY, unsafe.Pointer(&arg)},
		{"FS_IOC_SET_ENCRYPTION_POLICY", secret, unix.FS_IOC_SET_ENCRYPTION_POLICY, unsafe.Pointer(&pol)},
	} {
		d, err := os.Open(call.path)
		if err != nil {
			return err
		}
		if call.req == unix.FS_IOC_SET_ENCRYPTION_POLICY { // the kernel named the key
			pol.Master_key_identifier = *(*[16]byte)(unsafe.Pointer(&arg.Key_spec.U))
		}
		_, _, errno := unix.Syscall(unix.SYS_IOCTL, d.Fd(), uintptr(call.req), uintptr(call.arg))
		d.Close()
		if errno != 0 {
			return fmt.Errorf("%s: %w", call.name, errno)
		}
	}
	return os.WriteFile(filepath.Join(secret, "file"), []byte("probe"), 0o600)
}

// inTemp runs f in a new mount namespace, with a new directory that is gone
// afterwards. The directory is removed, never recursively: what f failed to
// unmount must not become a deletion.
func inTemp(f func(dir string) error) error {
	dir, err := os.MkdirTemp("", "need-")
	if err != nil {
		return err
	}
	err = private(func() error { return f(dir) })
	return errors.Join(err, os.Remove(dir))
}

// private runs f on a thread of its own with private mounts. The thread is never
// given back to the Go scheduler, so its namespace, and every mount f left in
// it, ends with it.
func private(f func() error) error {
	done := make(chan error)
	go func() {
		runtime.LockOSThread()
		done <- func() error {
			if err := unix.Unshare(unix.CLONE_FS | unix.CLONE_NEWNS); err != nil {
				return fmt.Errorf("unshare: %w", err)
			}
			if err := unix.Mount("", "/", "", unix.MS_REC|unix.MS_PRIVATE, ""); err != nil {
				return fmt.Errorf("make mounts private: %w", err)
			}
			return f()
		}()
	}()
	return <-done
}
