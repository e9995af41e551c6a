package volume

import (
	"encoding/base64"
	"errors"
	"fmt"
	"os"
	"slices"

	"golang.org/x/sys/unix"
)

// ProveLocked returns nil only when it saw that the volume is locked: the kernel
// says that the key is absent; no loop device is over the image; every name in
// the directory is a no-key name; the expected plaintext names lead nowhere; and
// files refuse to open with ENOKEY. Names are ImageName for an Image, for a Dir
// those that the caller knows to be at the top. Anything else is a
// *NotLockedError, which names no entry of the directory but those given.
//
// With an FSImage that is attached nowhere nothing is left to look at, and that
// is proof: keys belong to a mounted filesystem.
func ProveLocked(s Spec, id ID, names ...string) error {
	parent, err := s.open(id)
	if busy := (*BusyError)(nil); errors.As(err, &busy) {
		return &NotLockedError{Reason: busy.Error()}
	}
	if parent == nil || err != nil {
		return err
	}
	defer parent.Close()
	st, err := live.keyStatus(int(parent.Fd()), id.Policy)
	if err != nil {
		return step("ask for a key on the filesystem of", parent.Name(), err)
	}
	if st != Absent {
		return &NotLockedError{Reason: "the key is " + st.String()}
	}
	loops, err := LoopDevices(s)
	if err != nil {
		return err
	}
	for _, l := range loops {
		if !l.Outer { // the outer one only carries ciphertext
			return &NotLockedError{Reason: fmt.Sprintf("%s is still over the image", l.Path)}
		}
	}
	dir, err := s.openDir(parent)
	if err != nil {
		return err
	}
	defer dir.Close()
	if err := checkPolicy(live, dir, s.Dir, id.Policy); err != nil {
		return err
	}
	if s.Backend == Image {
		names = append(slices.Clip(names), ImageName)
	}
	return proveCiphertext(dir, s.Dir, names)
}

// proveCiphertext looks at the entries of dir.
func proveCiphertext(dir *os.File, path string, expected []string) error {
	for _, n := range expected {
		err := unix.Fstatat(int(dir.Fd()), n, new(unix.Stat_t), unix.AT_SYMLINK_NOFOLLOW)
		if !errors.Is(err, unix.ENOENT) && !errors.Is(err, unix.ENOKEY) {
			return &NotLockedError{Reason: fmt.Sprintf("%q can still be looked up in %q", n, path)}
		}
	}
	entries, err := dir.ReadDir(-1)
	if err != nil {
		return err
	}
	for _, e := range entries {
		if slices.Contains(expected, e.Name()) || !isNoKeyName(e.Name()) {
			return &NotLockedError{Reason: fmt.Sprintf("%q lists plaintext names", path)}
		}
		if !e.Type().IsRegular() {
			continue
		}
		f, err := openBeneath(dir, e.Name(), unix.O_RDONLY|unix.O_NONBLOCK)
		if err == nil {
			f.Close()
			return &NotLockedError{Reason: fmt.Sprintf("a file in %q opens without a key", path)}
		}
		if !errors.Is(err, unix.ENOKEY) && !errors.Is(err, unix.ENOENT) {
			return &NotLockedError{Reason: fmt.Sprintf("a file in %q: %v, want %v", path, errnoOf(err), unix.ENOKEY)}
		}
	}
	return nil
}

// isNoKeyName says whether name has the form in which the kernel lists an
// encrypted name whose key it lacks (struct fscrypt_nokey_name in fs/crypto/
// fname.c): base64url of an 8-byte hash of the directory index and either the
// ciphertext, of at most 149 bytes, or 149 bytes of it and a SHA-256. With our
// policy, ciphertext is padded to 32 bytes.
func isNoKeyName(name string) bool {
	b, err := base64.RawURLEncoding.DecodeString(name)
	if err != nil || base64.RawURLEncoding.EncodeToString(b) != name { // the decoder skips line ends
		return false
	}
	const hash, cut, sum = 8, 149, 32
	n := len(b) - hash
	return n == cut+sum || n >= 32 && n <= cut && n%32 == 0
}

// DropCaches writes what is dirty and makes the kernel forget unused pages,
// names and inodes (proc(5), /proc/sys/vm/drop_caches). Memory so freed is not
// overwritten unless the kernel was started with init_on_free=1.
func DropCaches() error {
	unix.Sync()
	crash("volume.dropcaches")
	f, err := os.OpenFile("/proc/sys/vm/drop_caches", unix.O_WRONLY|unix.O_CLOEXEC, 0)
	if err != nil {
		return err
	}
	_, err = f.WriteString("3\n")
	return errors.Join(err, f.Close())
}
