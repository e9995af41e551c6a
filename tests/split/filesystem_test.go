package split

import (
	"encoding/json"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"slices"
	"testing"
	"unsafe"

	"golang.org/x/sys/unix"
)

// encrypted reports whether a file is encrypted by fscrypt, and by which v2 policy.
func encrypted(t *testing.T, file string) (bool, *unix.FscryptPolicyV2) {
	t.Helper()
	var st unix.Statx_t
	if err := unix.Statx(unix.AT_FDCWD, file, unix.AT_SYMLINK_NOFOLLOW, unix.STATX_BASIC_STATS, &st); err != nil {
		t.Fatalf("statx %s: %v", file, err)
	}
	if st.Attributes_mask&unix.STATX_ATTR_ENCRYPTED == 0 {
		t.Fatalf("the file system of %s does not tell what is encrypted", file)
	}
	fd, err := unix.Open(file, unix.O_RDONLY|unix.O_NOFOLLOW|unix.O_CLOEXEC, 0)
	if err != nil {
		t.Fatalf("open %s: %v", file, err)
	}
	defer unix.Close(fd)
	arg := struct {
		size   uint64
		policy unix.FscryptPolicyV2
	}{size: uint64(unsafe.Sizeof(unix.FscryptPolicyV2{}))}
	_, _, errno := unix.Syscall(unix.SYS_IOCTL, uintptr(fd), unix.FS_IOC_GET_ENCRYPTION_POLICY_EX, uintptr(unsafe.Pointer(&arg)))
	is := st.Attributes&unix.STATX_ATTR_ENCRYPTED != 0
	if is != (errno == 0) {
		t.Fatalf("%s: encrypted %v, but its policy: %v", file, is, errno)
	}
	return is, &arg.policy
}

// visible is what a thief sees of a directory without the key: the size of
// every regular file, sorted.
func visible(t *testing.T, dir string) (sizes []int64) {
	t.Helper()
	err := filepath.WalkDir(dir, func(_ string, d fs.DirEntry, err error) error {
		if err != nil || !d.Type().IsRegular() {
			return err
		}
		fi, err := d.Info()
		sizes = append(sizes, fi.Size())
		return err
	})
	if err != nil {
		t.Fatal(err)
	}
	slices.Sort(sizes)
	return sizes
}

// The second row: the system store lies plain on its file system, the keep
// encrypted; and with the image back-end nothing of what is in it shows, not
// even how many files of what sizes.
func TestFilesystem(t *testing.T) {
	for _, b := range []struct {
		backend string
		args    []string
	}{
		{"image", []string{"--backend", "image", "--size", "512M"}},
		{"dir", []string{"--backend", "dir"}},
	} {
		t.Run(b.backend, func(t *testing.T) {
			each(t, "", func(t *testing.T, l *laptop) { filesystem(t, l, b.backend) }, b.args...)
		})
	}
}

func filesystem(t *testing.T, l *laptop, backend string) {
	system := l.build(t, rootOut, echo("system", "plain"), "-o /nix/var/nix/gcroots/system")
	volume := l.Root + "/var/lib/overkeep/alice/volume"
	for _, file := range []string{storeDir, system, "/nix/var/nix/db", "/nix/var/nix/db/db.sqlite"} {
		if is, _ := encrypted(t, l.Root+file); is {
			t.Errorf("%s is encrypted", file)
		}
	}
	is, policy := encrypted(t, volume)
	if !is {
		t.Fatal("the keep's volume is not encrypted")
	}
	if policy.Version != unix.FSCRYPT_POLICY_V2 || policy.Contents_encryption_mode != unix.FSCRYPT_MODE_AES_256_XTS ||
		policy.Filenames_encryption_mode != unix.FSCRYPT_MODE_AES_256_CTS || policy.Flags&unix.FSCRYPT_POLICY_FLAGS_PAD_MASK != unix.FSCRYPT_POLICY_FLAGS_PAD_32 {
		t.Errorf("the volume's policy is weaker than it should be: %+v", policy)
	}
	var set struct {
		Policy string `json:"policy"`
	}
	if err := json.Unmarshal([]byte(l.Read(t, "/var/lib/overkeep/alice/slots/set.json")), &set); err != nil {
		t.Fatal(err)
	}
	if key := fmt.Sprintf("%x", policy.Master_key_identifier); key != set.Policy {
		t.Errorf("the volume's key is %s, the slots' %s", key, set.Policy)
	}

	before := visible(t, volume)
	lowerBefore := l.Must(t, "root", "find "+storeDir+" -printf '%p %s %i\\n' | sort")
	l.unlockOf(t, "alice")
	const files, size = 40, 70_001
	private := l.build(t, alice, `derivation { name = "private"; system = builtins.currentSystem; builder = "/bin/sh"; args = [ "-c" ''
		mkdir $out; for n in $(seq `+fmt.Sprint(files)+`); do head -c `+fmt.Sprint(size)+` /dev/zero > $out/f$n; done'' ]; }`, "-o private")
	if n := l.at(t, alice, "find "+private+" -size -"+fmt.Sprint(size+1)+"c -type f | wc -l"); n != fmt.Sprint(files) {
		t.Fatalf("the build made %s files", n)
	}
	if after := l.Must(t, "root", "find "+storeDir+" -printf '%p %s %i\\n' | sort"); after != lowerBefore {
		t.Errorf("a personal build changed the system store:\nbefore\n%s\nafter\n%s", lowerBefore, after)
	}
	if is, _ := encrypted(t, l.Root+storeDir); is {
		t.Errorf("%s is encrypted while the keep is open", storeDir)
	}
	l.lockOf(t, "alice")

	if err := filepath.WalkDir(volume, func(p string, d fs.DirEntry, err error) error {
		if err != nil {
			return err
		}
		if d.Type().IsDir() {
			if is, pol := encrypted(t, p); !is || *pol != *policy {
				t.Errorf("%s is encrypted: %v, policy %+v", p, is, pol)
			}
		} else if _, err := os.ReadFile(p); d.Type().IsRegular() && !isNoKey(err) {
			t.Errorf("%s can be read without the key: %v", p, err)
		}
		return nil
	}); err != nil {
		t.Fatal(err)
	}
	after := visible(t, volume)
	shows := 0 // files of that size
	for _, n := range after {
		if n == size {
			shows++
		}
	}
	switch backend {
	case "image":
		if len(before) != 1 || !slices.Equal(before, after) || before[0] != 512<<20 {
			t.Errorf("a thief sees files of the sizes %v before the build and %v after, not one of 512 MiB", before, after)
		}
	case "dir": // stated, and the proof that the image's test can see
		if shows != files || len(after) < len(before)+files {
			t.Errorf("of %d files %d show; the directory back-end is expected to show sizes", files, shows)
		}
	}
	l.unlockOf(t, "alice")
	if n := l.at(t, alice, "ls "+private+" | wc -l"); n != fmt.Sprint(files) {
		t.Errorf("after lock and unlock %s files are left", n)
	}
}

// isNoKey reports whether a file could not be opened for want of its key.
func isNoKey(err error) bool {
	pe, ok := err.(*os.PathError)
	return ok && pe.Err == unix.ENOKEY
}
