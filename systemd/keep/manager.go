package keep

import (
	"errors"
	"os"
	"os/exec"
	"path/filepath"
	"regexp"
	"sort"
	"strings"
	"sync"
	"time"

	"github.com/google/renameio/v2"
	"golang.org/x/sys/unix"

	"overkeep/overlay/layout"
	"overkeep/overlay/view"
)

// Manager acts on the keeps below one root. The zero value is not usable; Exe
// must be set.
type Manager struct {
	Root string // "" means "/"
	// Exe is the program whose hidden "internal" verb calls ChildMain,
	// normally /proc/self/exe.
	Exe string
	// Progress receives one short line for a step that may take long; nil for none.
	Progress func(string)
}

func (m *Manager) progress(s string) {
	if m.Progress != nil {
		m.Progress(s)
	}
}

// Keep is one existing keep.
type Keep struct {
	layout.Keep
	Header *Header
	m      *Manager
	nix    func() nixFound
}

// Open reads the header of the keep name.
func (m *Manager) Open(name string) (*Keep, error) {
	k, err := layout.New(m.Root, name)
	if err != nil {
		return nil, classified(err)
	}
	h, err := readHeader(k.Header(), name)
	if err != nil {
		return nil, err
	}
	return &Keep{Keep: k, Header: h, m: m, nix: sync.OnceValue(findNix)}, nil
}

// List returns the names of all keeps, sorted. A directory whose header is
// damaged is listed too: Open says what is wrong with it.
func (m *Manager) List() ([]string, error) {
	root, err := layout.CheckRoot(m.Root)
	if err != nil {
		return nil, classified(err)
	}
	entries, err := os.ReadDir(layout.StateRoot(root))
	if errors.Is(err, os.ErrNotExist) {
		return nil, nil
	}
	if err != nil {
		return nil, classified(err)
	}
	var names []string
	for _, e := range entries {
		if e.IsDir() && !strings.HasPrefix(e.Name(), ".") {
			names = append(names, e.Name())
		}
	}
	sort.Strings(names)
	return names, nil
}

// Pick returns the keep called name or, when name is empty, the one keep of
// user, or the only keep there is.
func (m *Manager) Pick(name, user string) (*Keep, error) {
	if name != "" {
		return m.Open(name)
	}
	names, err := m.List()
	if err != nil {
		return nil, err
	}
	var mine []*Keep
	for _, n := range names {
		k, err := m.Open(n)
		if err != nil {
			if len(names) == 1 {
				return nil, err
			}
			continue
		}
		if len(names) == 1 || k.Header.User == user {
			mine = append(mine, k)
		}
	}
	switch len(mine) {
	case 1:
		return mine[0], nil
	case 0:
		if len(names) == 0 {
			return nil, errorf(CodeNoKeep, "", "there is no keep yet")
		}
		return nil, errorf(CodeUsage, "", "which keep? there are %s", strings.Join(names, ", "))
	}
	return nil, errorf(CodeUsage, "", "user %q has more than one keep: name one", user)
}

// runLock takes the keep's run lock, waiting for nobody: two commands at once on
// one keep is a mistake that the second is told about.
func runLock(k layout.Keep) (release func(), err error) {
	if err := guard(k); err != nil {
		return nil, err
	}
	if err := mkdirMode(layout.RunRoot(k.Root), 0o755); err != nil {
		return nil, classified(err)
	}
	return flock(k, unix.LOCK_EX)
}

// guard refuses to act from inside a view, and below a root that is not root's
// alone, before anything is made or opened there.
func guard(k layout.Keep) error {
	if err := outsideView(); err != nil {
		return err
	}
	for _, dir := range []string{k.RunDir(), k.StateDir()} {
		if err := checkParents(dir); err != nil {
			return err
		}
	}
	return nil
}

// outsideView refuses to act from inside a view: a keep that is opened there would
// be laid over another user's private store.
func outsideView() error {
	in, err := view.Inside()
	if err != nil {
		return classified(err)
	}
	if in {
		return errorf(CodeUsage, "", "this is inside the view of a keep; run it outside")
	}
	return nil
}

// runGrace is how long a command waits for others on the same keep: long enough
// for runs that are about to exec, not for another command's work.
const runGrace = 2 * time.Second

// flock takes the run lock file, which stays for good: removing a lock file lets
// two holders lock two files.
func flock(k layout.Keep, how int) (release func(), err error) {
	f, err := os.OpenFile(k.RunLock(), os.O_CREATE|os.O_RDWR|unix.O_NOFOLLOW|unix.O_NONBLOCK, 0o600)
	if err == nil {
		if fi, serr := f.Stat(); serr != nil || !fi.Mode().IsRegular() {
			f.Close()
			err = unix.EINVAL
		}
	}
	switch {
	case errors.Is(err, unix.ELOOP), errors.Is(err, unix.EISDIR), errors.Is(err, unix.EINVAL), errors.Is(err, unix.ENXIO), errors.Is(err, unix.ENODEV),
		errors.Is(err, unix.EACCES) && os.Geteuid() == 0: // a device node where devices do not count
		return nil, classified(&view.MountPointError{Path: k.RunLock(), Reason: "is no plain file"})
	case err != nil:
		return nil, classified(err)
	}
	err = unix.Flock(int(f.Fd()), how|unix.LOCK_NB)
	// A run that is just starting holds it for a moment.
	for until := time.Now().Add(runGrace); err == unix.EWOULDBLOCK && how == unix.LOCK_EX && time.Now().Before(until); {
		time.Sleep(runGrace / 200)
		err = unix.Flock(int(f.Fd()), how|unix.LOCK_NB)
	}
	if err != nil {
		f.Close()
		return nil, errorf(CodeBusyRun, k.Name, "another overkeep command is working on keep %q", k.Name)
	}
	return func() { f.Close() }, nil
}

func requireRoot() error {
	if os.Geteuid() != 0 {
		return errorf(CodeNotRoot, "", "this needs root: mounts, namespaces and kernel keys")
	}
	return nil
}

// ensureRunDirs makes the run-time directories of k, all of them root's.
func ensureRunDirs(k layout.Keep) error {
	if err := checkParents(k.RunDir()); err != nil {
		return err
	}
	for _, d := range []struct {
		path string
		mode os.FileMode
	}{
		{layout.RunRoot(k.Root), 0o755},
		{k.RunDir(), 0o755},
		{k.Volume(), 0o755},
		{k.FSMount(), 0o700},
		{k.LowerSocketDir(), 0o700},
		{k.SystemSocketDir(), 0o700},
		{k.SocketDir(), 0o755},
		{k.NixConfDir(), 0o755},
		{k.NamespaceDir(), 0o700},
		{k.Cover(), 0o555},
	} {
		if err := mkdirMode(d.path, d.mode); err != nil {
			return classified(err)
		}
	}
	return nil
}

// mkdirMode makes dir with mode, and missing parents with 0755. The modes are
// set, not asked for: the command runs with umask 077, and the user must be able
// to pass through.
func mkdirMode(dir string, mode os.FileMode) error {
	err := os.Mkdir(dir, mode)
	if errors.Is(err, os.ErrNotExist) {
		if err := mkdirMode(filepath.Dir(dir), 0o755); err != nil {
			return err
		}
		err = os.Mkdir(dir, mode)
	}
	if errors.Is(err, os.ErrExist) {
		fi, lerr := os.Lstat(dir)
		if lerr == nil && fi.IsDir() && fi.Mode().Perm() == mode {
			return nil
		}
		if lerr == nil && !fi.IsDir() {
			return &view.MountPointError{Path: dir, Reason: "is no directory"}
		}
		err = nil
	}
	if err != nil {
		return err
	}
	return os.Chmod(dir, mode)
}

// removeRunDirs takes ensureRunDirs back, file by known file: what something
// unexpected still lies in or is mounted on stays, and is seen. While a namespace is
// pinned all of it stays: mounts there are of these directories, and rmdir(2) of a
// mount point takes the mount from every other namespace.
func removeRunDirs(k layout.Keep) {
	ns, err := existingNamespace(k)
	if ns != nil {
		ns.Close()
	}
	if ns != nil || err != nil {
		return
	}
	for _, f := range []string{
		filepath.Join(k.RunDir(), "target.json"), k.RemountHook(), filepath.Join(k.NixConfDir(), "nix.conf"),
		filepath.Join(k.SocketDir(), "socket"), filepath.Join(k.LowerSocketDir(), "socket"),
		filepath.Join(k.LowerSocketDir(), "control"), supervisorLock(k),
	} {
		_ = os.Remove(f)
	}
	sweepTemps(k.RunDir())
	sweepTemps(k.NixConfDir())
	for _, d := range []string{
		k.Volume(), k.FSMount(), k.SystemSocketDir(), k.LowerSocketDir(), k.Cover(),
		k.SocketDir(), k.NixConfDir(), k.NamespaceDir(), k.RunDir(),
	} {
		_ = os.Remove(d)
	}
}

// checkParents refuses a run directory below a world-writable one or a symlink:
// Nix refuses to build there, and another user could swap a component.
func checkParents(dir string) error {
	for p := filepath.Dir(dir); ; p = filepath.Dir(p) {
		var st unix.Stat_t
		if err := unix.Lstat(p, &st); err == nil {
			if st.Mode&unix.S_IFMT == unix.S_IFLNK {
				return errorf(CodeUsage, p, "%q is a symlink: Nix does not build below one; give the real path with --root", p)
			}
			if st.Mode&unix.S_IFMT != unix.S_IFDIR {
				return errorf(CodeUsage, p, "%q is no directory", p)
			}
			// A sticky directory is not enough: others may plant names in it. A group
			// that may write is trusted as root only if it is root's.
			if st.Mode&0o002 != 0 || st.Uid != 0 || st.Mode&0o020 != 0 && st.Gid != 0 {
				return errorf(CodeUsage, p, "%q can be changed by others than root: a keep cannot be opened below it", p)
			}
		}
		if p == "/" {
			return nil
		}
	}
}

// writeFile replaces path atomically and durably. What a crash leaves of it lies
// beside it, under the name ".BASE" and digits: nothing is written elsewhere.
func writeFile(path string, data []byte, mode os.FileMode) error {
	dir := filepath.Dir(path)
	if err := renameio.WriteFile(path, data, mode, renameio.IgnoreUmask(), renameio.WithTempDir(dir)); err != nil {
		return err
	}
	return syncDir(dir)
}

var tempName = regexp.MustCompile(`^\.(keep\.json|protector|destroying|nix\.conf|target\.json)[0-9]+$`)

// sweepTemps removes what a killed writeFile left in dir.
func sweepTemps(dir string) {
	entries, _ := os.ReadDir(dir)
	for _, e := range entries {
		if e.Type().IsRegular() && tempName.MatchString(e.Name()) {
			_ = os.Remove(filepath.Join(dir, e.Name()))
		}
	}
}

// removeIfThere is os.Remove for what may be gone already.
func removeIfThere(path string) error {
	if err := os.Remove(path); err != nil && !errors.Is(err, os.ErrNotExist) {
		return err
	}
	return nil
}

// syncDir makes renames and unlinks in dir durable.
func syncDir(dir string) error {
	d, err := os.Open(dir)
	if err != nil {
		return err
	}
	defer d.Close()
	return d.Sync()
}

// NixPath is where stock Nix is looked for, in this order.
var NixPath = []string{
	"/run/current-system/sw/bin", "/nix/var/nix/profiles/default/bin",
	"/usr/local/bin", "/usr/bin", "/bin",
}

// FindProgram looks name up in NixPath.
func FindProgram(name string) (string, error) {
	for _, d := range NixPath {
		p := filepath.Join(d, name)
		if fi, err := os.Stat(p); err == nil && fi.Mode().IsRegular() && fi.Mode()&0o111 != 0 {
			return p, nil
		}
	}
	return "", &exec.Error{Name: name, Err: exec.ErrNotFound}
}
