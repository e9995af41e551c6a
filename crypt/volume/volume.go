package volume

import (
	"errors"
	"fmt"
	"path/filepath"
	"strings"

	"overkeep/crypt/crashpoint"
)

// Backend says how the encrypted directory is used.
type Backend string

const (
	// Image is an ext4 image file in the encrypted directory.
	Image Backend = "image"
	// Dir is the encrypted directory itself.
	Dir Backend = "dir"
)

// ImageName is the plaintext name of the image file in the directory, the only
// name there.
const ImageName = "image"

// MinSize is the least Spec.Size, in bytes.
const MinSize = 16 << 20

// MasterLen is the length of a master key in bytes.
const MasterLen = 32

// Spec says where a volume is. It holds no secret.
type Spec struct {
	Backend Backend `json:"backend"`
	// Dir is the absolute path of the encrypted directory as seen in the
	// current mount namespace. Its parent exists.
	Dir string `json:"dir"`
	// FSImage, if any, is the absolute path of an image file of ours that holds
	// the ext4 on which Dir lies.
	FSImage string `json:"fs_image,omitempty"`
	// FSMount is where FSImage is mounted while in use: Dir's parent.
	FSMount string `json:"fs_mount,omitempty"`
	// Size in bytes: of the inner image (Image), and of what an FSImage made by
	// Create can hold. Only Create reads it.
	Size int64 `json:"size,omitempty"`
	// Preallocate makes Create take all blocks of the inner image (and of the
	// FSImage) at once. The package comment says what that hides.
	Preallocate bool `json:"preallocate,omitempty"`
}

// ID names the fscrypt objects of a volume. Both are public: they stand in
// file names below .fscrypt at the root of the filesystem.
type ID struct {
	Protector string `json:"protector"` // 16 hex digits
	Policy    string `json:"policy"`    // 32 hex digits
}

// Status is the kernel's word on a policy key.
type Status uint8

// The states of a key (FS_IOC_GET_ENCRYPTION_KEY_STATUS, fscrypt.rst).
const (
	Unknown    Status = iota
	Absent            // not in the kernel
	Present           // added, by us or by someone else
	Incomplete        // removed, but files that use it are still in use
)

func (s Status) String() string {
	return [...]string{"unknown", "absent", "present", "incompletely removed"}[min(int(s), 3)]
}

// Removal is the outcome of RemoveKey. Only the zero value means that no file
// is left that still has the key.
type Removal struct {
	FilesBusy  bool // some file is in use and keeps its key: repeat
	OtherUsers bool // other users have added the key, too
}

// crash is crashpoint.At; the crash tests of this package replace it.
var crash = crashpoint.At

// check reports what is wrong with s for use, and with its size for creation.
func (s Spec) check(create bool) error {
	bad := func(format string, a ...any) error { return fmt.Errorf("volume: "+format, a...) }
	clean := func(p string) bool {
		return filepath.IsAbs(p) && filepath.Clean(p) == p && p != "/" && !strings.ContainsRune(p, 0)
	}
	switch {
	case s.Backend != Image && s.Backend != Dir:
		return bad("unknown back-end %q", s.Backend)
	case !clean(s.Dir):
		return bad("directory %q is not a clean absolute path", s.Dir)
	case (s.FSImage == "") != (s.FSMount == ""):
		return bad("an image file needs a mount point, and the other way round")
	case s.FSImage != "" && !clean(s.FSImage):
		return bad("image file %q is not a clean absolute path", s.FSImage)
	case s.FSImage != "" && !clean(s.FSMount):
		return bad("mount point %q is not a clean absolute path", s.FSMount)
	case s.FSImage != "" && filepath.Dir(s.Dir) != s.FSMount:
		return bad("directory %q does not lie directly in %q", s.Dir, s.FSMount)
	case s.FSImage != "" && (s.FSImage == s.FSMount || strings.HasPrefix(s.FSImage, s.FSMount+"/")):
		return bad("image file %q lies below its own mount point", s.FSImage)
	}
	if create && (s.Backend == Image || s.FSImage != "") {
		if s.Size < MinSize || s.Size > 1<<60 {
			return bad("size %d is not between %d and 2^60 bytes", s.Size, int64(MinSize))
		}
	}
	return nil
}

func (id ID) check() error {
	if !isHex(id.Protector, 16) {
		return fmt.Errorf("volume: protector %q is not 16 hex digits", id.Protector)
	}
	if !isHex(id.Policy, 32) {
		return fmt.Errorf("volume: policy %q is not 32 hex digits", id.Policy)
	}
	return nil
}

func isHex(s string, n int) bool {
	return len(s) == n && strings.Trim(s, "0123456789abcdef") == ""
}

// undo is a stack of steps that take back what was done.
type undo []func() error

func (u *undo) add(f func() error) { *u = append(*u, f) }

// run takes everything back, last step first, and goes on after an error: one
// thing that cannot be taken back must not keep the rest.
func (u undo) run() error {
	var all error
	for i := len(u) - 1; i >= 0; i-- {
		all = errors.Join(all, u[i]())
	}
	return all
}
