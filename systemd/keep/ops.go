package keep

import (
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"time"

	"filippo.io/age"
	"filippo.io/age/plugin"
	"golang.org/x/sys/unix"
	"golang.org/x/term"

	"overkeep/crypt/crashpoint"
	"overkeep/crypt/secret"
	"overkeep/crypt/slot"
	"overkeep/crypt/strictjson"
	"overkeep/crypt/volume"
	"overkeep/overlay/layout"
	"overkeep/overlay/view"
)

// Names of the secrets on the pipe.
const (
	secretPassphrase    = "passphrase"
	secretIdentity      = "identity" // the text of an identity file
	secretNewPassphrase = "new-passphrase"
)

// spec is the volume of the keep in hand.
func (c *call) spec() volume.Spec { return c.Header.spec(c.k, c.StateDir) }

func (c *call) slotsDir() string { return filepath.Join(c.StateDir, "slots") }

// keys are what the caller gave to open a slot with.
func (c *call) keys() (slot.Keys, error) {
	keys := slot.Keys{Passphrase: c.secrets[secretPassphrase], MaxLogN: slot.DefaultMaxLogN}
	if c.Salvage != "" {
		keys.IgnoreDamaged = []string{c.Salvage}
	}
	id := c.secrets[secretIdentity]
	if id.Len() == 0 {
		return keys, nil
	}
	ids, err := slot.ParseIdentities(bytes.NewReader(id.Bytes()), terminalUI(), askSSHPassphrase)
	if err != nil {
		return keys, err
	}
	keys.Identities = ids
	return keys, nil
}

func terminalUI() *plugin.ClientUI {
	say := func(format string, v ...any) { fmt.Fprintf(os.Stderr, "overkeep: "+format+"\n", v...) }
	return plugin.NewTerminalUI(say, say)
}

func askSSHPassphrase() (*secret.Bytes, error) {
	tty, err := os.OpenFile("/dev/tty", os.O_RDWR, 0)
	if err != nil {
		return nil, err
	}
	defer tty.Close()
	fmt.Fprint(tty, "Passphrase of the SSH key: ")
	defer fmt.Fprintln(tty)
	b, err := term.ReadPassword(int(tty.Fd()))
	if err != nil {
		return nil, err
	}
	return secret.From(b)
}

// openSlots loads the set and opens the master key with what the caller gave.
func (c *call) openSlots() (set *slot.Set, files slot.Files, master *secret.Bytes, name string, err error) {
	if set, files, err = loadSlots(c.slotsDir(), c.Name); err != nil {
		return
	}
	if set.KeepID != c.Header.ID {
		err = &slot.TamperError{Reason: slot.Moved}
		return
	}
	keys, err := c.keys()
	if err != nil {
		return
	}
	master, name, err = set.Open(files, keys, c.Slot)
	return
}

func volumeID(set *slot.Set) volume.ID {
	return volume.ID{Protector: set.Protector, Policy: set.Policy}
}

// opCreate makes the volume and the slots in the directory that init builds. The
// recovery key goes back to the caller and is written nowhere.
func opCreate(ctx context.Context, c *call) (any, error) {
	master, err := secret.Random(32)
	if err != nil {
		return nil, err
	}
	defer master.Wipe()
	protector, err := volume.ProtectorDescriptor(master)
	if err != nil {
		return nil, err
	}
	// Recorded first: a later init finds by it what a killed one left behind.
	crashpoint.At("init.protector")
	if err := writeFile(filepath.Join(c.StateDir, "protector"), []byte(protector), 0o600); err != nil {
		return nil, err
	}
	crashpoint.At("init.header")
	if err := writeFile(filepath.Join(c.StateDir, "keep.json"), encode(c.Header), 0o600); err != nil {
		return nil, err
	}
	spec := c.spec()
	spec.Preallocate = c.Prealloc
	id, err := volume.Create(ctx, spec, master, "overkeep-"+c.Name)
	if err != nil {
		return nil, err
	}
	undo := func(err error) (any, error) {
		return nil, errors.Join(err, volume.Destroy(ctx, spec, id))
	}
	c.event("step", "volume made")

	set := slot.NewSet(slot.Binding{KeepID: c.Header.ID, Protector: id.Protector, Policy: id.Policy})
	files := map[string][]byte{}
	now := time.Now().UTC().Truncate(time.Second)
	pass, err := slot.NewPassphraseRecipient(c.secrets[secretNewPassphrase], c.LogN)
	if err != nil {
		return undo(err)
	}
	recovery, recoveryTo, err := slot.NewRecovery()
	if err != nil {
		return undo(err)
	}
	defer recovery.Wipe()
	for _, s := range []struct {
		slot slot.Slot
		to   age.Recipient
	}{
		{slot.Slot{Name: "passphrase", Kind: slot.Passphrase, Created: now}, pass},
		{slot.Slot{Name: "recovery", Kind: slot.X25519, Role: slot.Recovery, Created: now}, recoveryTo},
	} {
		if files[s.slot.Name], err = slot.Wrap(master, s.to); err != nil {
			return undo(err)
		}
		if set, err = set.Add(s.slot); err != nil {
			return undo(err)
		}
	}
	if err := slot.Commit(c.slotsDir(), set, files, master); err != nil {
		return undo(err)
	}
	c.event("step", "slots made")

	err = withVolume(ctx, spec, id, master, c.k.Volume(), func() error {
		return c.populate(set.Epoch)
	})
	if err != nil {
		return undo(err)
	}
	return nil, c.give(recovery)
}

// withVolume opens the volume for f in this process's own namespace and locks
// it again, with proof.
func withVolume(ctx context.Context, spec volume.Spec, id volume.ID, master *secret.Bytes, at string, f func() error) error {
	if err := volume.Open(ctx, spec, id, master, at); err != nil {
		return err
	}
	err := f()
	return errors.Join(err, closeVolume(ctx, spec, id, at))
}

// closeVolume unmounts and removes the key; nil only with proof.
func closeVolume(ctx context.Context, spec volume.Spec, id volume.ID, at string) error {
	if err := unmountSoon(ctx, at); err != nil {
		return err
	}
	if err := removeKey(ctx, spec, id); err != nil {
		return err
	}
	return volume.DetachFS(ctx, spec)
}

// unmountSoon unmounts what only this process used. A look into /proc by somebody
// else can make it busy for a moment.
func unmountSoon(ctx context.Context, at string) error {
	for try := 0; ; try++ {
		err := volume.Unmount(at)
		var busy *volume.BusyError
		if err == nil || !errors.As(err, &busy) || try == 20 {
			return err
		}
		if sleep(ctx, lookAgain) != nil {
			return err
		}
	}
}

// outerFull turns an input-output error of a sparse image into what it is when the
// disk around it is full: the loop device knows no better word.
func (c *call) outerFull(err error) error {
	if !errors.Is(err, unix.EIO) && !errors.Is(err, unix.EROFS) {
		return err
	}
	for _, p := range []string{c.spec().FSImage, c.StateDir} {
		var st unix.Statfs_t
		if p != "" && unix.Statfs(p, &st) == nil && st.Bavail*uint64(st.Bsize) < 1<<20 {
			return errorf(CodeNoSpace, p, "no space left on the file system of %q: %w", p, err)
		}
	}
	return err
}

// innerNames are the top-level names of a volume's plaintext.
var innerNames = []string{"keep.json", "store", "nix", "log", "builds", "daemon", "tmp", "home", "policy", "provenance", "facts"}

// populate lays out an empty volume.
func (c *call) populate(epoch uint64) error {
	k, u := c.k, c.User
	for _, d := range []struct {
		path     string
		mode     os.FileMode
		uid, gid int
	}{
		{k.Volume(), 0o755, 0, 0},
		{k.StoreDir(), 0o700, 0, 0},
		{k.Upper(), 0o1775, 0, 0},
		{k.Work(), 0o700, 0, 0},
		{k.NixState(), 0o755, 0, 0},
		// Readable, as Nix makes its own: the user asks it for verdicts.
		{k.NixDB(), 0o755, 0, 0},
		// Made now, so that a full keep can still be collected.
		{k.NixState() + "/gc-socket", 0o755, 0, 0},
		{k.NixState() + "/temproots", 0o755, 0, 0},
		{k.NixState() + "/gcroots", 0o755, 0, 0},
		{k.Log(), 0o755, 0, 0},
		{k.Builds(), 0o755, 0, 0},
		{k.DaemonHome(), 0o700, 0, 0},
		{k.Policy(), 0o700, u.UID, u.GID},
		// Root alone writes what the user reads: its files have the directory's group.
		{k.Provenance(), 0o2750, 0, u.GID},
		{k.Facts(), 0o700, 0, 0},
		{k.Tmp(), 0o700, u.UID, u.GID},
		{k.Home(""), 0o755, 0, 0},
		{k.Home("cache"), 0o700, u.UID, u.GID},
		{k.Home("state"), 0o700, u.UID, u.GID},
		{k.Home("share"), 0o700, u.UID, u.GID},
		{k.Home("work"), 0o700, u.UID, u.GID},
	} {
		if err := os.Mkdir(d.path, 0o700); err != nil && !errors.Is(err, os.ErrExist) {
			return err
		}
		if err := os.Lchown(d.path, d.uid, d.gid); err != nil {
			return err
		}
		if err := unix.Chmod(d.path, uint32(d.mode.Perm())|specialBits(d.mode)); err != nil {
			return err
		}
	}
	// Nix makes this link when it finds no gcroots, and fails when two of its processes
	// do so at once (local-store.cc): the first two commands in a new keep would.
	profiles := k.NixState() + "/gcroots/profiles"
	if err := os.Symlink(k.NixState()+"/profiles", profiles); err != nil && !errors.Is(err, os.ErrExist) {
		return err
	}
	return c.writeInner(epoch)
}

// specialBits are those above the permissions: written in octal above, as chmod(2)
// reads them, and not as os.FileMode has them.
func specialBits(m os.FileMode) uint32 { return uint32(m) & (unix.S_ISVTX | unix.S_ISGID) }

// writeInner pins the header and the epoch inside the volume, durably.
func (c *call) writeInner(epoch uint64) error {
	crashpoint.At("keep.inner-header")
	return writeFile(c.k.InnerHeader(), encode(innerHeader{*c.Header, epoch}), 0o600)
}

// checkInner compares the public header and the set's epoch with what is pinned
// inside, and rolls the inner epoch forward after an interrupted key change.
func (c *call) checkInner(epoch uint64) error {
	b, err := readSmall(c.k.InnerHeader(), maxHeader)
	if err != nil {
		return errorf(CodeDamaged, c.Name, "the header inside keep %q: %w", c.Name, err)
	}
	var in innerHeader
	if err := strictjson.Decode(b, &in); err != nil {
		return errorf(CodeDamaged, c.Name, "the header inside keep %q: %w", c.Name, err)
	}
	a, b2 := in.Header, *c.Header
	a.FSImage, b2.FSImage = "", "" // the file may be moved
	x, _ := json.Marshal(a)
	y, _ := json.Marshal(b2)
	if !bytes.Equal(x, y) {
		return errorf(CodeTampered, c.Name, "the public header of keep %q is not the one pinned inside the volume", c.Name)
	}
	forward, err := slot.CheckEpoch(epoch, in.Epoch)
	if err != nil {
		return err
	}
	if forward {
		return c.writeInner(epoch)
	}
	return nil
}

// openResult says what opened the keep.
type openResult struct {
	Slot string `json:"slot"`
}

// opOpen opens the volume with one of the slots and makes the view around it.
// Nothing is left behind when a step fails.
func opOpen(ctx context.Context, c *call) (any, error) {
	set, _, master, name, err := c.openSlots()
	if err != nil {
		return nil, err
	}
	defer master.Wipe()
	// A crash in a key change may have left the old slots beside the new ones.
	if err := slot.Sweep(c.slotsDir()); err != nil {
		return nil, err
	}
	sweepTemps(c.StateDir)
	c.event("key", openResult{name})
	if c.Restart {
		return openResult{name}, nil
	}
	spec, id := c.spec(), volumeID(set)
	if spec.Backend == volume.Dir {
		// Whoever looked over the locked directory left names without the key in the
		// kernel's cache; they would pin deleted files until the next lock.
		_ = os.WriteFile("/proc/sys/vm/drop_caches", []byte("2\n"), 0)
	}
	crashpoint.At("unlock.key")
	if err := volume.Open(ctx, spec, id, master, c.k.Volume()); err != nil {
		return nil, err
	}
	master.Wipe()
	list, err := c.arrange(set.Epoch)
	if err == nil {
		crashpoint.At("unlock.view")
		if err = view.Uncover(list, c.k.Cover()); err == nil {
			err = view.Make(list, c.User)
		}
	}
	if err == nil {
		// While everything is mounted: what a later lock has to find.
		err = (&locker{c: c, spec: spec, id: id, list: list}).describe()
	}
	if err != nil {
		return nil, errors.Join(err, c.takeBack(context.WithoutCancel(ctx), &locker{c: c, spec: spec, id: id, list: list}))
	}
	crashpoint.At("unlock.made")
	return openResult{name}, nil
}

// takeBack locks what opOpen has opened so far. The user may be moving the mount
// points about meanwhile, so it looks again a few times.
func (c *call) takeBack(ctx context.Context, l *locker) (err error) {
	for range 50 {
		if err = l.describe(); err == nil {
			if err = l.attempt(ctx); err == nil {
				return removeIfThere(l.targetFile())
			}
		}
		if sleep(ctx, lookAgain/2) != nil {
			break
		}
	}
	return err
}

// arrange checks what is pinned inside the volume, gives the upper store the
// owner and mode of the system store, and writes the daemon's settings.
func (c *call) arrange(epoch uint64) ([]view.Mount, error) {
	if err := c.checkInner(epoch); err != nil {
		return nil, err
	}
	var st unix.Stat_t
	if err := unix.Stat(layout.NixStore, &st); err != nil {
		return nil, errorf(CodeNoNix, layout.NixStore, "system store %q: %w", layout.NixStore, err)
	}
	// The merged directory shows the upper's owner and mode (overlayfs.rst).
	if err := unix.Lchown(c.k.Upper(), int(st.Uid), int(st.Gid)); err != nil {
		return nil, err
	}
	if err := unix.Chmod(c.k.Upper(), st.Mode&0o7777); err != nil {
		return nil, err
	}
	if fi, err := os.Stat(layout.NixDaemonSocket); err != nil || !fi.IsDir() {
		return nil, errorf(CodeNoNix, layout.NixDaemonSocket, "directory %q of the system's nix-daemon is missing", layout.NixDaemonSocket)
	}
	// Nix makes it with its first build; the view needs something to cover.
	if err := os.MkdirAll(layout.NixLog, 0o755); err != nil {
		return nil, err
	}
	conf := nixConfig(c.k, c.Header, c.Root)
	conf.OldNix = c.OldNix
	if err := writeFile(filepath.Join(c.k.NixConfDir(), "nix.conf"), []byte(conf.Render()), 0o644); err != nil {
		return nil, err
	}
	return view.Mounts(c.k, c.User, view.Options{WorkDir: c.Header.WorkDir})
}

// opVerify opens one slot, or proves that the given key opens one.
func opVerify(ctx context.Context, c *call) (any, error) {
	_, _, master, name, err := c.openSlots()
	if err != nil {
		return nil, err
	}
	defer master.Wipe()
	return openResult{name}, nil
}
