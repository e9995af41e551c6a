package keep

import (
	"context"
	"encoding/json"
	"errors"
	"os"
	"os/user"
	"path/filepath"
	"strconv"
	"syscall"
	"time"

	"golang.org/x/sys/unix"

	"overkeep/crypt/crashpoint"
	"overkeep/crypt/secret"
	"overkeep/crypt/slot"
	"overkeep/crypt/volume"
	"overkeep/overlay/layout"
	"overkeep/overlay/view"
)

// Init says how a keep is to be made.
type Init struct {
	Name        string // "" for the user's name
	User        string
	Backend     volume.Backend
	Size        int64  // bytes of the image; ignored for dir without FSImage
	FSImage     string // FILE of --on-image; made here, must not exist
	Preallocate bool
	WorkDir     string // below the user's home; "" for none
	LogN        int    // scrypt work factor of the passphrase; 0 for the default

	// Passphrase opens the first slot.
	Passphrase *secret.Bytes
	// Confirm is given the recovery key, shows it to the user and returns nil
	// once they have shown that they hold it. The keep does not exist before.
	Confirm func(recovery *secret.Bytes) error
}

// MinSize is the smallest image: ext4's journal, the overlay and one build.
const MinSize = 64 << 20

// MinPassphrase is the least number of bytes of a passphrase. It keeps out the
// empty and the absurd; the real protection is the user's choice and scrypt.
const MinPassphrase = 8

// plan checks everything that can be checked without changing anything.
func (m *Manager) plan(in *Init) (layout.Keep, *Header, view.User, error) {
	var none layout.Keep
	fail := func(err error) (layout.Keep, *Header, view.User, error) {
		return none, nil, view.User{}, classified(err)
	}
	u, err := user.Lookup(in.User)
	if err != nil {
		return fail(errorf(CodeUsage, in.User, "there is no user %q", in.User))
	}
	uid, _ := strconv.Atoi(u.Uid)
	if uid == 0 {
		return fail(errorf(CodeUsage, in.User, "a keep belongs to a person: root reads everything anyway"))
	}
	if in.Name == "" {
		in.Name = in.User
	}
	k, err := layout.New(m.Root, in.Name)
	if err != nil {
		return fail(err)
	}
	if in.FSImage != "" {
		if in.FSImage, err = filepath.Abs(in.FSImage); err != nil {
			return fail(err)
		}
		if !m.leftover(k, in.FSImage) {
			if err := checkNewFile(in.FSImage); err != nil {
				return fail(err)
			}
		}
	}
	if (in.Backend == volume.Image || in.FSImage != "") && in.Size < MinSize {
		return fail(errorf(CodeUsage, "size", "size %d is below the least, %d bytes", in.Size, MinSize))
	}
	if in.Backend == volume.Dir && in.FSImage == "" {
		in.Size = 0
	}
	if in.LogN == 0 {
		in.LogN = slot.DefaultLogN
	}
	h := &Header{
		Version: headerVersion, Features: []string{}, ID: newID(), Name: in.Name, User: in.User, UID: uid,
		Created: time.Now().UTC().Truncate(time.Second), Backend: in.Backend, Size: in.Size,
		FSImage: in.FSImage, WorkDir: in.WorkDir,
	}
	if err := h.check(in.Name); err != nil {
		err.(*Error).Code = CodeUsage
		return fail(err)
	}
	if _, err := os.Lstat(k.StateDir()); err == nil {
		return fail(errorf(CodeKeepExists, in.Name, "keep %q exists already", in.Name))
	}
	vu, err := h.viewUser()
	return k, h, vu, err
}

// checkNewFile sees that the FILE of --on-image can be made.
func checkNewFile(path string) error {
	_, err := os.Lstat(path)
	if err == nil {
		return errorf(CodeKeepExists, path, "file %q exists already; it is not overwritten", path)
	}
	if !errors.Is(err, os.ErrNotExist) {
		return errorf(CodeUsage, path, "--on-image %q: %w", path, err)
	}
	var fs unix.Statfs_t
	if unix.Statfs(filepath.Dir(path), &fs) == nil && fs.Blocks == 0 {
		return errorf(CodeUsage, path, "--on-image %q: no file can be made there", path)
	}
	if fi, err := os.Stat(filepath.Dir(path)); err != nil || !fi.IsDir() {
		return errorf(CodeUsage, path, "--on-image %q: there is no directory %q", path, filepath.Dir(path))
	}
	return nil
}

// leftover reports whether file belongs to a keep of this name that was never
// finished or is half destroyed: Init removes it first.
func (m *Manager) leftover(k layout.Keep, file string) bool {
	for _, dir := range []string{k.Building(), destroying(k)} {
		if h, err := readHeader(filepath.Join(dir, "keep.json"), k.Name); err == nil && h.FSImage == file {
			return true
		}
	}
	return false
}

// PlanInit returns the header that Init would write, and changes nothing.
func (m *Manager) PlanInit(in Init) (*Header, error) {
	k, h, _, err := m.plan(&in)
	if err != nil {
		return nil, err
	}
	if in.FSImage == "" {
		if err := m.probe(k); err != nil {
			return nil, err
		}
	}
	return h, nil
}

// probe says whether the file system of the state directory can encrypt, by
// trying it on something thrown away.
func (m *Manager) probe(k layout.Keep) error {
	dir := layout.StateRoot(k.Root)
	for {
		if fi, err := os.Stat(dir); err == nil && fi.IsDir() {
			break
		}
		dir = filepath.Dir(dir)
	}
	r := volume.Probe(dir)
	if r.Answer == volume.Yes {
		return nil
	}
	if errors.Is(r.Err, syscall.ENOSPC) || errors.Is(r.Err, syscall.EDQUOT) {
		return errorf(CodeNoSpace, dir, "no space left on the file system of %q", dir)
	}
	if r.Answer == volume.Unsure {
		if os.Geteuid() != 0 {
			return requireRoot()
		}
		return errorf(CodeUnsupported, dir, "could not tell whether the file system of %q can encrypt: %s", dir, r.Missing)
	}
	e := errorf(CodeUnsupported, dir, "the file system of %q cannot encrypt: %s", dir, r.Missing)
	e.Missing, e.Remedy = r.Missing, r.Remedy
	return e
}

// Init makes a keep: volume, slots, layout. The keep appears under its name only
// when all of it is there and the recovery key has been confirmed; a crash before
// leaves a directory that the next Init of the name removes. With an *Error that
// is InForce the keep is there, and the recovery key opens it.
func (m *Manager) Init(ctx context.Context, in Init) (*Keep, error) {
	if err := requireRoot(); err != nil {
		return nil, err
	}
	k, h, u, err := m.plan(&in)
	if err != nil {
		return nil, err
	}
	if in.Passphrase.Len() < MinPassphrase {
		return nil, errorf(CodeUsage, "passphrase", "the passphrase has %d bytes; the least is %d", in.Passphrase.Len(), MinPassphrase)
	}
	release, err := runLock(k)
	if err != nil {
		return nil, err
	}
	defer release()
	if err := os.MkdirAll(layout.StateRoot(k.Root), 0o700); err != nil {
		return nil, classified(err)
	}
	if in.FSImage == "" {
		volume.SweepProbes(filepath.Dir(layout.StateRoot(k.Root))) // plan had to try there before
		if err := m.probe(k); err != nil {
			return nil, err
		}
	}
	for _, dir := range []string{k.Building(), destroying(k)} {
		if err := m.discard(ctx, k, dir); err != nil {
			return nil, err
		}
	}
	if err := unpinAll(ctx, k); err != nil { // of one that was half destroyed
		return nil, classified(err)
	}
	if in.FSImage != "" { // again: a leftover of that name is gone now
		if err := checkNewFile(in.FSImage); err != nil {
			return nil, err
		}
	}
	crashpoint.At("init.dir")
	if err := os.Mkdir(k.Building(), 0o700); err != nil {
		return nil, classified(err)
	}
	if err := m.build(ctx, k, h, u, in); err != nil {
		err = classified(errors.Join(err, m.discard(context.WithoutCancel(ctx), k, k.Building())))
		if _, serr := os.Lstat(k.StateDir()); serr == nil {
			err = inForce(err)
		}
		return nil, err
	}
	kk, err := m.Open(in.Name)
	if err != nil {
		return nil, inForce(err)
	}
	return kk, nil
}

func (m *Manager) build(ctx context.Context, k layout.Keep, h *Header, u view.User, in Init) error {
	if err := ensureRunDirs(k); err != nil {
		return err
	}
	defer removeRunDirs(k)
	ns, err := privateNamespace()
	if err != nil {
		return err
	}
	defer ns.Close()
	req := request{Root: k.Root, Name: k.Name, StateDir: k.Building(), Header: h, User: u, LogN: in.LogN, Prealloc: in.Preallocate}

	m.progress("making the encrypted volume and its slots")
	create := req
	create.Secrets = []string{secretNewPassphrase}
	recovery, err := m.child(ctx, "create", create, childOptions{ns: ns, secrets: []*secret.Bytes{in.Passphrase}, want: true, event: m.stepEvent}, nil)
	if err != nil {
		return err
	}
	defer recovery.Wipe()
	if err := in.Confirm(recovery); err != nil {
		return err
	}
	// The recovery key itself opens the slot that the confirmation is written with.
	confirm := req
	confirm.Secrets = []string{secretIdentity}
	confirm.NewSlot = &NewSlot{Action: ActionConfirm}
	if _, err := m.child(ctx, "keys", confirm, childOptions{ns: ns, secrets: []*secret.Bytes{recovery}}, nil); err != nil {
		return err
	}
	_ = os.Remove(filepath.Join(k.Building(), "protector")) // of use to a clean-up only
	crashpoint.At("init.rename")
	if err := os.Rename(k.Building(), k.StateDir()); err != nil {
		return err
	}
	crashpoint.At("init.sync")
	return syncDir(layout.StateRoot(k.Root))
}

func (m *Manager) stepEvent(name string, v json.RawMessage) {
	var s string
	if name == "step" && json.Unmarshal(v, &s) == nil {
		m.progress(s)
	}
}

// discard removes what is left in dir of a keep that was never finished or is to
// be destroyed. Nothing there is no error.
func (m *Manager) discard(ctx context.Context, k layout.Keep, dir string) error {
	if _, err := os.Lstat(dir); errors.Is(err, os.ErrNotExist) {
		return nil
	}
	h, err := readHeader(filepath.Join(dir, "keep.json"), k.Name)
	if err != nil {
		h = nil // killed before the header was written: only the directory is there
	}
	ns, err := privateNamespace()
	if err != nil {
		return err
	}
	defer ns.Close()
	if h != nil {
		if err := ensureRunDirs(k); err != nil {
			return err
		}
		defer removeRunDirs(k)
	}
	_, err = m.child(ctx, "destroy", request{Root: k.Root, Name: k.Name, StateDir: dir, Header: h}, childOptions{ns: ns}, nil)
	return err
}
