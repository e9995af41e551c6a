package keep

import (
	"bytes"
	"crypto/rand"
	"encoding/hex"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"os"
	"os/user"
	"path/filepath"
	"regexp"
	"strconv"
	"strings"
	"time"

	"golang.org/x/sys/unix"

	"overkeep/crypt/strictjson"
	"overkeep/crypt/volume"
	"overkeep/overlay/layout"
	"overkeep/overlay/view"
)

// headerVersion is the format of keep.json and of its copy inside the volume.
const headerVersion = 1

// maxHeader bounds keep.json in bytes.
const maxHeader = 16 << 10

// Header is a keep's public header: readable without a key by root, and copied
// into the volume, where it is compared at every unlock. An unknown version,
// field or feature is refused.
type Header struct {
	Version  int            `json:"version"`
	Features []string       `json:"features"`
	ID       string         `json:"id"` // 32 hex digits, random
	Name     string         `json:"name"`
	User     string         `json:"user"`
	UID      int            `json:"uid"`
	Created  time.Time      `json:"created"`
	Backend  volume.Backend `json:"backend"`
	Size     int64          `json:"size"`               // bytes of the image; 0 for dir
	FSImage  string         `json:"fs_image,omitempty"` // FILE of --on-image
	WorkDir  string         `json:"work_dir,omitempty"` // below the user's home
}

// innerHeader is the copy inside the volume, with the epoch of the slot set.
type innerHeader struct {
	Header Header `json:"header"`
	Epoch  uint64 `json:"epoch"`
}

var hexID = regexp.MustCompile(`^[0-9a-f]+$`)

func newID() string {
	var b [16]byte
	rand.Read(b[:])
	return hex.EncodeToString(b[:])
}

func (h *Header) check(name string) error {
	bad := func(format string, args ...any) error {
		return errorf(CodeDamaged, name, "header of keep %q: %s", name, fmt.Sprintf(format, args...))
	}
	if err := judgeFormat(h.Version, h.Features, name); err != nil {
		return err
	}
	switch {
	case h.Name != name:
		return errorf(CodeTampered, name, "header of keep %q is that of another one, %q", name, h.Name)
	case len(h.User) > 64 || strings.ContainsAny(h.User, "/:") || strings.ContainsFunc(h.User, func(r rune) bool { return !strconv.IsPrint(r) }):
		return bad("user %q cannot be one", h.User)
	case h.FSImage != "" && (!filepath.IsAbs(h.FSImage) || filepath.Clean(h.FSImage) != h.FSImage || strings.ContainsRune(h.FSImage, 0)):
		return bad("file %q of its file system is not a clean absolute path", h.FSImage)
	case len(h.ID) != 32 || !hexID.MatchString(h.ID):
		return bad("id %q is not 32 hex digits", h.ID)
	case h.User == "" || h.UID <= 0:
		return bad("no user")
	case h.Backend != volume.Image && h.Backend != volume.Dir:
		return bad("unknown back-end %q", h.Backend)
	case h.Size < 0:
		return bad("size %d", h.Size)
	case h.WorkDir != "" && (len(h.WorkDir) > 64 || !plainName.MatchString(h.WorkDir)):
		return bad("work directory %q is not a plain name", h.WorkDir)
	}
	return nil
}

var plainName = regexp.MustCompile(`^[A-Za-z0-9_][A-Za-z0-9_.-]*$`)

// readSmall reads a regular file of at most max bytes without following a last
// symlink or blocking on a FIFO.
func readSmall(path string, max int64) ([]byte, error) {
	f, err := os.OpenFile(path, os.O_RDONLY|unix.O_NOFOLLOW|unix.O_NONBLOCK, 0)
	if err != nil {
		return nil, err
	}
	defer f.Close()
	fi, err := f.Stat()
	if err != nil {
		return nil, err
	}
	if !fi.Mode().IsRegular() || fi.Size() > max {
		return nil, fmt.Errorf("%s is not a regular file of at most %d bytes", path, max)
	}
	return io.ReadAll(io.LimitReader(f, max+1))
}

// strictJSON decodes exactly one value without unknown fields.
func strictJSON(b []byte, v any) error {
	d := json.NewDecoder(bytes.NewReader(b))
	d.DisallowUnknownFields()
	if err := d.Decode(v); err != nil {
		return err
	}
	if _, err := d.Token(); !errors.Is(err, io.EOF) {
		return errors.New("data after the value")
	}
	return nil
}

// ParseHeader checks b as the header of the keep name. Version and features are
// judged first: a later format may have other keys.
func ParseHeader(b []byte, name string) (*Header, error) {
	var first struct {
		Version  int      `json:"version"`
		Features []string `json:"features"`
	}
	if json.Unmarshal(b, &first) == nil && first.Version != 0 {
		if err := judgeFormat(first.Version, first.Features, name); err != nil {
			return nil, err
		}
	}
	h := new(Header)
	if err := strictjson.Decode(b, h); err != nil {
		return nil, errorf(CodeDamaged, name, "header of keep %q: %w", name, err)
	}
	if err := h.check(name); err != nil {
		return nil, err
	}
	return h, nil
}

func judgeFormat(version int, features []string, name string) error {
	if version == 0 {
		return errorf(CodeDamaged, name, "header of keep %q has no version", name)
	}
	if version != headerVersion {
		return errorf(CodeVersion, name, "header of keep %q has version %d; this program knows %d", name, version, headerVersion)
	}
	if len(features) > 0 {
		return errorf(CodeVersion, name, "keep %q needs feature %q, which this program does not know", name, features[0])
	}
	return nil
}

func readHeader(path, name string) (*Header, error) {
	b, err := readSmall(path, maxHeader)
	if errors.Is(err, os.ErrNotExist) {
		if _, derr := os.Lstat(filepath.Dir(path)); derr == nil {
			return nil, errorf(CodeDamaged, name, "keep %q has no header", name)
		}
		return nil, errorf(CodeNoKeep, name, "there is no keep %q", name)
	}
	if errors.Is(err, unix.ENOTDIR) {
		return nil, errorf(CodeUsage, path, "%q is not below a directory", path)
	}
	if errors.Is(err, os.ErrPermission) && os.Geteuid() != 0 {
		return nil, errorf(CodeNotRoot, name, "keep %q can be looked at by root alone", name)
	}
	if err != nil {
		return nil, errorf(CodeDamaged, name, "header of keep %q: %w", name, err)
	}
	return ParseHeader(b, name)
}

func encode(v any) []byte {
	b, err := json.MarshalIndent(v, "", "  ")
	if err != nil {
		panic(err) // plain values only
	}
	return append(b, '\n')
}

// spec is the volume as it is reached from inside the view (or, for a keep
// being built, from below dir).
func (h *Header) spec(k layout.Keep, stateDir string) volume.Spec {
	s := volume.Spec{Backend: h.Backend, Size: h.Size, Dir: stateDir + "/volume"}
	if h.FSImage != "" {
		s.FSImage, s.FSMount = h.FSImage, k.FSMount()
		s.Dir = k.FSMount() + "/volume"
	}
	return s
}

// viewUser looks the keep's user up; a name that now means another uid is refused.
func (h *Header) viewUser() (view.User, error) {
	u, err := user.Lookup(h.User)
	if err != nil {
		return view.User{}, errorf(CodeForeign, h.User, "keep %q belongs to user %q (uid %d), who does not exist here", h.Name, h.User, h.UID)
	}
	uid, _ := strconv.Atoi(u.Uid)
	gid, _ := strconv.Atoi(u.Gid)
	if uid != h.UID {
		return view.User{}, errorf(CodeForeign, h.User, "keep %q was made for user %q with uid %d, who now has uid %d", h.Name, h.User, h.UID, uid)
	}
	// As the mount table will have it: a home, or /home, may be a link of root's.
	home, err := filepath.EvalSymlinks(u.HomeDir)
	if err != nil {
		home = u.HomeDir // missing: Make says so
	}
	return view.User{Name: h.User, UID: uid, GID: gid, Home: home}, nil
}
