package volume

import (
	"encoding/base64"
	"encoding/binary"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"

	"github.com/google/fscrypt/crypto"
	"golang.org/x/sys/unix"
)

func TestSpecCheck(t *testing.T) {
	good := Spec{Backend: Image, Dir: "/a/volume", Size: MinSize}
	onImage := Spec{Backend: Dir, Dir: "/a/fs/volume", FSImage: "/b/keep.img", FSMount: "/a/fs", Size: MinSize}
	for _, tt := range []struct {
		name string
		spec Spec
		edit func(*Spec)
		bad  string // "" is good
	}{
		{"image", good, func(*Spec) {}, ""},
		{"on image", onImage, func(*Spec) {}, ""},
		{"dir needs no size", good, func(s *Spec) { s.Backend, s.Size = Dir, 0 }, ""},
		{"no back-end", good, func(s *Spec) { s.Backend = "" }, "back-end"},
		{"unknown back-end", good, func(s *Spec) { s.Backend = "luks" }, "back-end"},
		{"no directory", good, func(s *Spec) { s.Dir = "" }, "directory"},
		{"root", good, func(s *Spec) { s.Dir = "/" }, "directory"},
		{"relative", good, func(s *Spec) { s.Dir = "volume" }, "directory"},
		{"unclean", good, func(s *Spec) { s.Dir = "/a/../volume" }, "directory"},
		{"nul", good, func(s *Spec) { s.Dir = "/a/vol\x00ume" }, "directory"},
		{"too small", good, func(s *Spec) { s.Size = MinSize - 1 }, "size"},
		{"negative", good, func(s *Spec) { s.Size = -1 }, "size"},
		{"overflow", good, func(s *Spec) { s.Size = 1<<63 - 1 }, "size"},
		{"mount point without file", onImage, func(s *Spec) { s.FSImage = "" }, "mount point"},
		{"file without mount point", onImage, func(s *Spec) { s.FSMount = "" }, "mount point"},
		{"file not clean", onImage, func(s *Spec) { s.FSImage = "keep.img" }, "image file"},
		{"mount point not clean", onImage, func(s *Spec) { s.FSMount = "/a/fs/" }, "mount point"},
		{"directory elsewhere", onImage, func(s *Spec) { s.Dir = "/a/volume" }, "directly"},
		{"directory too deep", onImage, func(s *Spec) { s.Dir = "/a/fs/b/volume" }, "directly"},
		{"file on itself", onImage, func(s *Spec) { s.FSImage = "/a/fs/keep.img" }, "below"},
		{"size of on image", onImage, func(s *Spec) { s.Size = 0 }, "size"},
	} {
		s := tt.spec
		tt.edit(&s)
		err := s.check(true)
		if (err == nil) != (tt.bad == "") || err != nil && !strings.Contains(err.Error(), tt.bad) {
			t.Errorf("%s: %v, want %q", tt.name, err, tt.bad)
		}
	}
}

func TestIDCheck(t *testing.T) {
	p, q := strings.Repeat("a", 16), strings.Repeat("0", 32)
	for _, tt := range []struct {
		id ID
		ok bool
	}{
		{ID{p, q}, true}, {ID{}, false}, {ID{q, p}, false}, {ID{strings.ToUpper(p), q}, false},
		{ID{"../../../etc/pas", q}, false}, {ID{p, q + "0"}, false}, {ID{p, q[:31] + "\n"}, false},
	} {
		if err := tt.id.check(); (err == nil) != tt.ok {
			t.Errorf("%+v: %v", tt.id, err)
		}
	}
}

func TestIsNoKeyName(t *testing.T) {
	enc := func(n int) string { return base64.RawURLEncoding.EncodeToString(make([]byte, n)) }
	for _, tt := range []struct {
		name string
		want bool
	}{
		{enc(8 + 32), true}, {enc(8 + 64), true}, {enc(8 + 128), true}, {enc(8 + 149 + 32), true},
		// Seen from a kernel 6.18: a directory with the name "image" in it.
		{"NDGY3gAAAABDLgtIYU8WMDPIKfi_tVTF4KqaqBZ6TAx1qHYt4MmvyQ", true},
		{"", false}, {"image", false}, {"store", false}, {"..", false}, {"keep.json", false},
		{enc(8), false}, {enc(8 + 31), false}, {enc(8 + 33), false}, {enc(8 + 160), false}, {enc(8 + 149 + 33), false},
		{enc(8+32) + "=", false}, {"+" + enc(8 + 32)[1:], false}, {enc(8+32) + "\n", false},
		{strings.Repeat("a", 54)[:53] + "B", false}, // stray bits at the end
		{strings.Repeat("é", 27), false},
		// A store path is 32 base-32 characters and a name.
		{"1b9p07z77phvv2hf6gm9f28syp39f1ag-hello-2.12.1", false},
	} {
		if got := isNoKeyName(tt.name); got != tt.want {
			t.Errorf("%q: %v", tt.name, got)
		}
	}
}

func FuzzIsNoKeyName(f *testing.F) {
	f.Add("image")
	f.Fuzz(func(t *testing.T, name string) {
		if !isNoKeyName(name) {
			return
		}
		b, err := base64.RawURLEncoding.DecodeString(name)
		if err != nil || base64.RawURLEncoding.EncodeToString(b) != name {
			t.Errorf("%q is no canonical base64url", name)
		}
		if len(b) < 40 || len(name) > 252 { // FSCRYPT_NOKEY_NAME_MAX_ENCODED
			t.Errorf("%q has %d bytes", name, len(b))
		}
	})
}

// super makes a superblock with the given fields.
func super(state uint16, compat, incompat uint32) []byte {
	b := make([]byte, 1024)
	le := binary.LittleEndian
	le.PutUint16(b[0x38:], 0xEF53)
	le.PutUint16(b[0x3A:], state)
	le.PutUint32(b[0x5C:], compat)
	le.PutUint32(b[0x60:], incompat)
	le.PutUint32(b[0x4:], 7)
	le.PutUint32(b[0x150:], 1)
	copy(b[0x68:], "0123456789abcdef")
	copy(b[0x78:], "label")
	return b
}

func TestParseSuperblock(t *testing.T) {
	for _, tt := range []struct {
		name                  string
		b                     []byte
		fails, errors, cipher bool
		blocks                uint64
	}{
		{name: "clean", b: super(1, 4, 0x10000|0x80), cipher: true, blocks: 1<<32 + 7},
		{name: "no 64bit", b: super(1, 4, 0), blocks: 7},
		{name: "not unmounted, journal", b: super(0, 4, 0), blocks: 7},
		{name: "not unmounted, no journal", b: super(0, 0, 0), errors: true, blocks: 7},
		{name: "errors", b: super(3, 4, 0), errors: true, blocks: 7},
		{name: "empty", b: nil, fails: true},
		{name: "zeros", b: make([]byte, 1024), fails: true},
		{name: "short", b: super(1, 4, 0)[:1023], fails: true},
		{name: "long", b: append(super(1, 4, 0), 0), fails: true},
	} {
		s, err := parseSuperblock(tt.b)
		if (err != nil) != tt.fails {
			t.Errorf("%s: %v", tt.name, err)
			continue
		}
		if err == nil && (s.Errors != tt.errors || s.Encrypt != tt.cipher || s.Blocks != tt.blocks || s.Label != "label" || len(s.UUID) != 32) {
			t.Errorf("%s: %+v", tt.name, s)
		}
	}
}

func FuzzParseSuperblock(f *testing.F) {
	f.Add(super(1, 4, 0x10080))
	f.Fuzz(func(t *testing.T, b []byte) {
		s, err := parseSuperblock(b)
		if err == nil && (len(b) != 1024 || len(s.UUID) != 32 || len(s.Label) > 16 || strings.ContainsRune(s.Label, 0)) {
			t.Errorf("%+v", s)
		}
	})
}

func TestUUID(t *testing.T) {
	u := dashed(fsUUID("0123456789abcdef"))
	if len(u) != 36 || u[14] != '8' || !strings.ContainsRune("89ab", rune(u[19])) {
		t.Errorf("%s is no UUID of version 8", u)
	}
	if fsUUID("0123456789abcdef") == fsUUID("0123456789abcdee") {
		t.Error("two protectors, one UUID")
	}
}

func TestTail(t *testing.T) {
	for in, want := range map[string]string{"": "", " a\n\tb ": "a b", "abcdef": "…cdef", "abécd": "…écd"} {
		if got := tail([]byte(in), 4); got != want {
			t.Errorf("%q: %q, want %q", in, got, want)
		}
	}
}

// The explanation of every error that the kernel documents.
func TestExplain(t *testing.T) {
	ext4 := facts{Type: "ext4", Device: "/dev/sda2", Kernel: Yes}
	for _, tt := range []struct {
		err     error
		f       facts
		answer  Answer
		missing string
		remedy  string
	}{
		{unix.EOPNOTSUPP, ext4, No, "feature flag", "tune2fs -O encrypt /dev/sda2"},
		{unix.EOPNOTSUPP, facts{Type: "ext4", Device: "/dev/sda2", Kernel: Unsure}, No, "feature flag", "tune2fs -O encrypt /dev/sda2"},
		{unix.EOPNOTSUPP, facts{Type: "ext4", Device: "/dev/sda2", Kernel: No}, No, "CONFIG_FS_ENCRYPTION", ""},
		{unix.EOPNOTSUPP, facts{Type: "ext4", Kernel: Yes}, No, "feature flag", onImage},
		{unix.EOPNOTSUPP, facts{Type: "f2fs", Device: "/dev/sdb", Kernel: Yes}, No, "feature flag", "fsck.f2fs -O encrypt /dev/sdb"},
		{unix.ENOTTY, ext4, No, "Linux 5.4", ""},
		{unix.ENOTTY, facts{Type: "xfs", Device: "/dev/sda2", Kernel: Unsure}, No, `type "xfs"`, onImage},
		{unix.ENOTTY, facts{Type: "tmpfs", Kernel: Unsure}, No, `type "tmpfs"`, onImage},
		{unix.ENOTTY, facts{Type: "overlay", Kernel: No}, No, `type "overlay"`, ""},
		{unix.EINVAL, ext4, No, "v2 encryption policies", ""},
		{unix.ENOPKG, ext4, No, "CONFIG_CRYPTO_XTS", ""},
		{unix.EEXIST, ext4, No, "not encrypted already", onImage},
		{unix.ENOSPC, ext4, Unsure, "space", ""},
		{unix.EDQUOT, ext4, Unsure, "space", ""},
		{unix.EROFS, ext4, Unsure, "writable", ""},
		{unix.EPERM, ext4, Unsure, "root", ""},
		{unix.EACCES, ext4, Unsure, "root", ""},
		{unix.ENOENT, ext4, Unsure, "directory", ""},
		{&BusyError{What: "a file"}, ext4, Unsure, "a file", ""},
		{errors.New("odd"), ext4, Unsure, "odd", ""},
	} {
		r := explain(fmt.Errorf("wrapped: %w", tt.err), tt.f)
		if r.Answer != tt.answer || !strings.Contains(r.Missing, tt.missing) || r.Remedy != tt.remedy || r.Err == nil {
			t.Errorf("%v on %+v: %+v", tt.err, tt.f, r)
		}
	}
}

// fake is a kernel that fails where it is told to, and encrypts nothing.
type fake struct {
	set, add, remove, status error
	state                    Status
	added                    int
}

func (k *fake) setPolicy(int, string) error            { return k.set }
func (k *fake) policy(int) (policyInfo, error)         { return policyInfo{}, unix.ENODATA }
func (k *fake) addKey(int, string, *crypto.Key) error  { k.added++; return k.add }
func (k *fake) removeKey(int, string) (Removal, error) { return Removal{}, k.remove }
func (k *fake) keyStatus(int, string) (Status, error)  { return k.state, k.status }

// Whatever step of the probe fails, the answer is never yes, and nothing stays.
// A kernel that accepts everything and hides nothing is found out.
func TestProbeFailures(t *testing.T) {
	f := facts{Type: "ext4", Device: "/dev/sda2", Kernel: Yes}
	for _, tt := range []struct {
		name    string
		k       *fake
		answer  Answer
		missing string
	}{
		{"old kernel", &fake{set: unix.ENOTTY}, No, "Linux 5.4"},
		{"no v2", &fake{set: unix.EINVAL}, No, "v2"},
		{"flag off", &fake{set: unix.EOPNOTSUPP}, No, "feature flag"},
		{"full", &fake{set: unix.ENOSPC}, Unsure, "space"},
		{"no keys", &fake{add: unix.ENOTTY}, No, "Linux 5.4"},
		{"no algorithm", &fake{add: unix.ENOPKG}, No, "XTS"},
		{"no removal", &fake{remove: unix.EACCES}, Unsure, "root"},
		{"no status", &fake{status: unix.EIO}, Unsure, "input/output"},
		{"hides nothing", &fake{state: Absent}, No, "hides"},
	} {
		t.Run(tt.name, func(t *testing.T) {
			dir, err := os.Open(t.TempDir())
			if err != nil {
				t.Fatal(err)
			}
			defer dir.Close()
			r := probe(tt.k, dir, f)
			if r.Answer != tt.answer || !strings.Contains(r.Missing, tt.missing) {
				t.Errorf("%+v", r)
			}
			if tt.k.set != nil && tt.k.added > 0 {
				t.Error("a key was added after the policy failed")
			}
			if left, _ := os.ReadDir(dir.Name()); len(left) != 0 {
				t.Errorf("left: %v", left)
			}
		})
	}
	if r := Probe("/nonexistent/directory"); r.Answer != Unsure {
		t.Errorf("no directory: %+v", r)
	}
}

// The next probe removes what a killed one left, however young, and nothing of one
// that is still under way.
func TestProbeSweeps(t *testing.T) {
	dir, err := os.Open(t.TempDir())
	if err != nil {
		t.Fatal(err)
	}
	defer dir.Close()
	live, err := makeProbe(dir)
	if err != nil {
		t.Fatal(err)
	}
	defer live.Close()
	for _, d := range []string{filepath.Join(dir.Name(), probePrefix+"killed/dir"), filepath.Join(dir.Name(), "other")} {
		if err := os.MkdirAll(d, 0o700); err != nil {
			t.Fatal(err)
		}
		if err := os.WriteFile(filepath.Join(d, "probe"), nil, 0o600); err != nil {
			t.Fatal(err)
		}
	}
	names := func() (out []string) {
		all, _ := os.ReadDir(dir.Name())
		for _, e := range all {
			out = append(out, e.Name())
		}
		return out
	}
	probe(&fake{set: unix.ENOTTY}, dir, facts{})
	if got, want := names(), []string{filepath.Base(live.Name()), "other"}; !slices.Equal(got, want) {
		t.Errorf("left: %q, want %q", got, want)
	}
	live.Close()
	SweepProbes(dir.Name())
	if got := names(); !slices.Equal(got, []string{"other"}) {
		t.Errorf("left: %q", got)
	}
}
