package keep

import (
	"context"
	"fmt"
	"io/fs"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"

	"github.com/moby/sys/mountinfo"
	"golang.org/x/sys/unix"

	"overkeep/crypt/volume"
	"overkeep/overlay/holder"
	"overkeep/overlay/layout"
	"overkeep/overlay/view"
)

// State is where a keep stands.
type State string

const (
	Locked   State = "locked"   // the key is absent and nothing is mounted
	Locking  State = "locking"  // between the two: not usable, NOT locked
	Unlocked State = "unlocked" // key, view and personal nix-daemon are there
)

// Status is the live state of a keep. What cannot be known while it is locked is
// zero.
type Status struct {
	Keep    string  `json:"keep"`
	User    string  `json:"user"`
	State   State   `json:"state"`
	Backend string  `json:"backend"`
	FSImage string  `json:"fs_image,omitempty"`
	Key     string  `json:"key"` // the kernel's word: absent, present, incompletely removed
	Split   []Row   `json:"split"`
	Mounts  []Mount `json:"mounts,omitempty"` // what is mounted where, in the view

	// ViewComplete says that every mount of the view is there.
	ViewComplete bool `json:"view_complete"`
	Supervisor   int  `json:"supervisor,omitempty"` // pid
	// Trouble says why a keep that is open does not work; empty when it does.
	Trouble string `json:"trouble,omitempty"`
	// MoveUnfinished says that a move between the stores was interrupted.
	MoveUnfinished bool `json:"move_unfinished,omitempty"`

	SizeTotal  int64  `json:"size_total,omitempty"` // bytes the volume can hold
	SizeUsed   int64  `json:"size_used,omitempty"`  // bytes used inside it
	SizeOnDisk int64  `json:"size_on_disk"`         // bytes it takes outside: what a thief can see
	Paths      int    `json:"paths,omitempty"`      // personal store paths
	Pins       int    `json:"pins"`                 // gcroots held in the system store
	Weakest    string `json:"weakest,omitempty"`    // the weakest slot and why
	Slots      int    `json:"slots"`
}

// Row is one promise of the split, as it is now.
type Row struct {
	Promise  string `json:"promise"`
	System   string `json:"system"`
	Personal string `json:"personal"`
}

// Mount is one mount of the view, and whether it is there.
type Mount struct {
	Target  string `json:"target"`
	What    string `json:"what"`
	Mounted bool   `json:"mounted"`
}

// stateInfo is what the helper process finds out inside the namespace.
type stateInfo struct {
	Key          string  `json:"key"`
	KeyAbsent    bool    `json:"key_absent"`
	KeyPresent   bool    `json:"key_present"`
	Mounts       []Mount `json:"mounts"`
	Holding      int     `json:"holding"` // mounts that hold something of the keep
	SizeTotal    int64   `json:"size_total"`
	SizeUsed     int64   `json:"size_used"`
	SizeOnDisk   int64   `json:"size_on_disk"`
	Paths        int     `json:"paths"`
	StoreFS      string  `json:"store_fs"`
	StoreCrypt   bool    `json:"store_crypt"`
	State        State   `json:"-"`
	ViewComplete bool    `json:"-"`
	Supervisor   int     `json:"-"`
}

// state asks the kernel where the keep stands.
func (k *Keep) state(ctx context.Context) (*stateInfo, error) { return k.look(ctx, false) }

// look is state, with the sizes of things if asked for: they take a walk.
func (k *Keep) look(ctx context.Context, sizes bool) (*stateInfo, error) {
	ns, err := existingNamespace(k.Keep)
	if err != nil {
		return nil, err
	}
	pinned := ns != nil
	if pinned {
		defer ns.Close()
	}
	req := request{Root: k.Root, Name: k.Name, StateDir: k.StateDir(), Header: k.Header}
	if u, err := k.Header.viewUser(); err == nil {
		req.User = u
	}
	st, err := k.lookIn(ctx, ns, req, sizes)
	if err != nil {
		return nil, err
	}
	mounted := 0
	for _, m := range st.Mounts {
		if m.Mounted {
			mounted++
		}
	}
	st.ViewComplete = pinned && st.KeyPresent && mounted == len(st.Mounts)
	st.Supervisor = supervisorPID(k.Keep)
	switch {
	case st.KeyAbsent && st.Holding == 0:
		st.State = Locked
	case st.ViewComplete && st.Supervisor != 0 && k.listening():
		st.State = Unlocked
	default:
		st.State = Locking
	}
	return st, nil
}

// lookIn looks from inside the namespace; nil: from where we are. Sizes are a walk
// over the keep, for a helper process that can be ended; without them a thread of our
// own does, for it reads what the kernel says and opens nothing in the volume.
func (k *Keep) lookIn(ctx context.Context, ns *view.Namespace, req request, sizes bool) (*stateInfo, error) {
	st := new(stateInfo)
	if sizes {
		if ns == nil {
			var err error
			if ns, err = privateNamespace(); err != nil {
				return nil, err
			}
			defer ns.Close()
		}
		req.Sizes = true
		_, err := k.m.child(ctx, "state", req, childOptions{ns: ns}, st)
		return st, err
	}
	look := func() (err error) {
		st, err = (&call{request: req, k: k.Keep}).stateInfo()
		return err
	}
	var err error
	if ns == nil {
		err = look()
	} else {
		err = ns.Do(look)
	}
	if err != nil {
		return nil, classified(err)
	}
	return st, nil
}

// State reports where the keep stands, quickly.
func (k *Keep) State(ctx context.Context) (State, error) {
	if err := requireRoot(); err != nil {
		return "", err
	}
	st, err := k.state(ctx)
	if err != nil {
		return "", err
	}
	return st.State, nil
}

// Holders names what holds the keep now, without changing anything.
func (k *Keep) Holders(ctx context.Context) ([]holder.Holder, error) {
	if err := requireRoot(); err != nil {
		return nil, err
	}
	ns, err := existingNamespace(k.Keep)
	if ns == nil || err != nil {
		return nil, err
	}
	defer ns.Close()
	req := request{Root: k.Root, Name: k.Name, StateDir: k.StateDir(), Header: k.Header}
	if req.User, err = k.Header.viewUser(); err != nil {
		return nil, err
	}
	var hs []holder.Holder
	_, err = k.m.child(ctx, "holders", req, childOptions{ns: ns}, &hs)
	return hs, err
}

// listening reports whether the personal daemon's socket is there: a drained
// supervisor has removed it.
func (k *Keep) listening() bool {
	fi, err := os.Lstat(filepath.Join(k.SocketDir(), "socket"))
	return err == nil && fi.Mode()&os.ModeSocket != 0
}

// opState looks at the key, the mounts and the sizes inside the namespace.
func opState(ctx context.Context, c *call) (any, error) {
	st, err := c.stateInfo()
	if err != nil {
		return nil, err
	}
	return st, nil
}

// stateInfo looks around in the namespace of the calling thread.
func (c *call) stateInfo() (*stateInfo, error) {
	set, _, err := loadSlots(c.slotsDir(), c.Name)
	if err != nil {
		return nil, err
	}
	spec, id := c.spec(), volumeID(set)
	st := new(stateInfo)
	key, err := volume.KeyStatus(spec, id)
	if err != nil {
		st.Key = err.Error() // seen only from another namespace: not absent
	} else {
		st.Key, st.KeyAbsent, st.KeyPresent = key.String(), key == volume.Absent, key == volume.Present
	}
	list, err := view.Mounts(c.k, c.User, view.Options{WorkDir: c.Header.WorkDir})
	if err != nil {
		return nil, err
	}
	infos, err := mountinfo.GetMounts(nil)
	if err != nil {
		return nil, err
	}
	st.Mounts = append(st.Mounts, Mount{Target: c.k.Volume(), What: "the encrypted volume", Mounted: mountedAt(infos, c.k.Volume())})
	there, err := view.Mounted(list)
	if err != nil {
		return nil, err
	}
	for i, m := range list {
		st.Mounts = append(st.Mounts, Mount{Target: m.Target, What: m.Why, Mounted: there[i]})
		if there[i] && !m.Stays {
			st.Holding++
		}
	}
	if st.Mounts[0].Mounted {
		st.Holding++
	}
	if !c.Sizes {
		return st, nil
	}
	if u, err := volume.Usage(spec, c.k.Volume()); err == nil {
		st.SizeTotal, st.SizeUsed, st.SizeOnDisk = u.Total, u.Total-u.Free, u.ImageAllocated+u.FSImageAllocated
	}
	if spec.Backend == volume.Dir {
		// The blocks of the ciphertext; the file system around it is not the keep's.
		st.SizeTotal, st.SizeUsed = 0, 0
		st.SizeOnDisk += blocksBelow(spec.Dir)
	}
	if entries, err := os.ReadDir(c.k.Upper()); err == nil {
		for _, e := range entries {
			if !strings.HasPrefix(e.Name(), ".") && e.Type()&fs.ModeCharDevice == 0 {
				st.Paths++
			}
		}
	}
	return st, nil
}

// blocksBelow adds up what the files of a tree take on the disk, in bytes.
func blocksBelow(dir string) (sum int64) {
	_ = filepath.WalkDir(dir, func(p string, _ fs.DirEntry, err error) error {
		var st unix.Stat_t
		if err == nil && unix.Lstat(p, &st) == nil {
			sum += st.Blocks * 512
		}
		return nil
	})
	return sum
}

// mountedAt reports whether something is mounted at a place of ours below /run.
func mountedAt(infos []*mountinfo.Info, target string) bool {
	return slices.ContainsFunc(infos, func(i *mountinfo.Info) bool { return i.Mountpoint == target })
}

// Status reports the live state of the keep.
func (k *Keep) Status(ctx context.Context) (*Status, error) {
	if err := requireRoot(); err != nil {
		return nil, err
	}
	st, err := k.look(ctx, true)
	if err != nil {
		return nil, err
	}
	keys, err := k.Keys()
	if err != nil {
		return nil, err
	}
	out := &Status{
		Keep: k.Name, User: k.Header.User, State: st.State, Backend: string(k.Header.Backend), FSImage: k.Header.FSImage,
		Key: st.Key, ViewComplete: st.ViewComplete, Supervisor: st.Supervisor,
		SizeTotal: st.SizeTotal, SizeUsed: st.SizeUsed, SizeOnDisk: st.SizeOnDisk, Paths: st.Paths, Slots: len(keys.Slots),
	}
	out.MoveUnfinished = k.MoveUnfinished()
	if st.State != Locked {
		out.Mounts = st.Mounts
	}
	if entries, err := os.ReadDir(k.Pins()); err == nil {
		out.Pins = len(entries)
	}
	for _, s := range keys.Slots {
		if len(s.Weak) > 0 {
			out.Weakest = fmt.Sprintf("%s: %s", s.Name, s.Weak[0])
			break
		}
	}
	if answer, err := control(k.Keep, "status"); err == nil && answer == gaveUp {
		out.Trouble = "its nix-daemon ended again and again; the reason is at the end of " + filepath.Join(k.Log(), "daemon.log") + ", which root sees in the view"
	}
	out.Split = k.split(ctx, st, out)
	return out, nil
}

// split fills in the four rows from what is there now, not from what was meant.
func (k *Keep) split(ctx context.Context, st *stateInfo, s *Status) []Row {
	const unknown = "unknown"
	sysFS, sysCrypt := filesystem(layout.NixStore)
	readers := unknown
	if fi, err := os.Stat(layout.NixStore); err == nil {
		if readers = "restricted"; fi.Mode().Perm()&0o005 == 0o005 {
			readers = "everyone"
		}
	}
	mine := "nobody: " + string(st.State)
	switch st.State {
	case Unlocked:
		mine = k.Header.User + " alone, in their view"
	case Locking:
		mine = "NOT LOCKED: whoever holds it"
	}
	systemFS := sysFS + ", plain"
	if sysCrypt {
		systemFS = sysFS + ", encrypted"
	}
	personalFS := "fscrypt v2 directory"
	if k.Header.Backend == volume.Image {
		personalFS = "ext4 image in an fscrypt v2 directory"
	}
	personalFS += ", key " + st.Key
	system := nixSettings(ctx, "")
	personal := map[string]string{}
	for _, l := range nixConfig(k.Keep, k.Header, k.Root).Lines() {
		personal[l.Key] = l.Value
	}
	systemGC := schedule(ctx, system)
	if s.Pins > 0 {
		systemGC += fmt.Sprintf("; %d paths pinned for this keep", s.Pins)
	}
	return []Row{
		{"readable by", readers, mine},
		{"filesystem", systemFS, personalFS},
		{"garbage collection", systemGC, fmt.Sprintf("by hand, as %s in the view; %d personal paths", k.Header.User, st.Paths)},
		{"keep-outputs / keep-derivations", orUnknown(system["keep-outputs"]) + " / " + orUnknown(system["keep-derivations"]),
			personal["keep-outputs"] + " / " + personal["keep-derivations"]},
	}
}

// schedule says when the system's collector runs: what systemd and Nix's own
// settings tell, not what is usual.
func schedule(ctx context.Context, settings map[string]string) string {
	var when []string
	if systemctl, err := exec.LookPath("systemctl"); err == nil {
		out, _ := exec.CommandContext(ctx, systemctl, "is-active", "nix-gc.timer").Output()
		if strings.TrimSpace(string(out)) == "active" {
			when = append(when, "by nix-gc.timer")
		}
	}
	if f := settings["min-free"]; f != "" && f != "0" {
		when = append(when, "below "+f+" free bytes")
	}
	if len(when) == 0 {
		return "by hand, as root"
	}
	return strings.Join(when, ", ")
}

func orUnknown(s string) string {
	if s == "" {
		return "unknown"
	}
	return s
}

// filesystem names the type of the file system of dir, and whether dir itself is
// encrypted (fscrypt).
func filesystem(dir string) (kind string, encrypted bool) {
	kind = "unknown"
	infos, err := mountinfo.GetMounts(mountinfo.ParentsFilter(dir))
	if err == nil && len(infos) > 0 {
		best := infos[0]
		for _, i := range infos {
			if len(i.Mountpoint) >= len(best.Mountpoint) {
				best = i
			}
		}
		kind = best.FSType
	}
	var st unix.Statx_t
	if unix.Statx(unix.AT_FDCWD, dir, 0, unix.STATX_BASIC_STATS, &st) == nil {
		encrypted = st.Attributes&unix.STATX_ATTR_ENCRYPTED != 0
	}
	return kind, encrypted
}

// nixSettings asks the real Nix for the settings in force under confDir, or the
// system's own.
func nixSettings(ctx context.Context, confDir string) map[string]string {
	out := map[string]string{}
	nix, err := FindProgram("nix")
	if err != nil {
		return out
	}
	cmd := exec.CommandContext(ctx, nix, "--extra-experimental-features", "nix-command", "config", "show")
	cmd.Env = append(childEnv(os.Environ()), "NIX_USER_CONF_FILES=/dev/null")
	if confDir != "" {
		cmd.Env = append(cmd.Env, "NIX_CONF_DIR="+confDir)
	}
	b, err := cmd.Output()
	if err != nil {
		return out
	}
	for _, line := range strings.Split(string(b), "\n") {
		if k, v, ok := strings.Cut(line, " = "); ok {
			out[strings.TrimSpace(k)] = strings.TrimSpace(v)
		}
	}
	return out
}

// Rendered is the configuration of a keep, explained.
type Rendered struct {
	Store   string       `json:"store"` // the store URL, which nobody needs to write
	NixConf string       `json:"nix_conf"`
	Mounts  []view.Mount `json:"mounts"`
	Env     []string     `json:"env"`
}

// Render returns what unlock writes and mounts, without doing it.
func (k *Keep) Render() (*Rendered, error) {
	u, err := k.Header.viewUser()
	if err != nil {
		return nil, err
	}
	list, err := view.Mounts(k.Keep, u, view.Options{WorkDir: k.Header.WorkDir})
	if err != nil {
		return nil, classified(err)
	}
	conf := nixConfig(k.Keep, k.Header, k.Root)
	return &Rendered{Store: conf.StoreURL(), NixConf: conf.Render(), Mounts: list, Env: view.Environment(k.Keep)}, nil
}
