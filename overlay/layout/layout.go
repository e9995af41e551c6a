// Package layout says where everything of a keep lies: on disk, at run time,
// and inside the volume. It is pure: names in, paths out.
//
// Every path hangs below one root, "/" unless --root or OVERKEEP_ROOT moves it,
// so that several installations (and tests) live side by side. The Nix store
// itself is not moved: a view must be at /nix/store to run what it builds.
package layout

import (
	"fmt"
	"path/filepath"
	"regexp"
)

// The places of stock Nix that a view covers. They are not configurable in
// stock Nix builds of any distribution, and a relocated store cannot run
// binaries built for /nix/store.
const (
	NixStore        = "/nix/store"
	NixDaemonSocket = "/nix/var/nix/daemon-socket"
	NixLog          = "/nix/var/log/nix"
	NixGCRoots      = "/nix/var/nix/gcroots"
	NixDB           = "/nix/var/nix/db"
	SystemNixConf   = "/etc/nix/nix.conf"
)

// NameError is a keep name or root that cannot be used.
type NameError struct {
	What, Name, Reason string
}

func (e *NameError) Error() string { return fmt.Sprintf("%s %q %s", e.What, e.Name, e.Reason) }

// A keep's name becomes a path component, an overlay mount option and part of a
// store URL; Nix checks the mount options by regular expression
// (local-overlay-store.cc, "check-mount"), so both are kept to letters that
// mean themselves everywhere.
var (
	keepName = regexp.MustCompile(`^[a-z0-9_][a-z0-9_.-]*$`)
	rootPath = regexp.MustCompile(`^/[A-Za-z0-9/_.-]*$`)
)

// maxRoot bounds the root: mount(2) takes one page of options, and the overlay
// options hold three paths below it; a Unix socket path holds 107 bytes.
const maxRoot = 36

// Keep is one keep's place in the file system.
type Keep struct {
	Root string // absolute, clean
	Name string
}

// New checks name and root. The root must be absolute and plain: letters,
// digits and "/_.-", at most 36 bytes.
func New(root, name string) (Keep, error) {
	root, err := CheckRoot(root)
	if err != nil {
		return Keep{}, err
	}
	if len(name) > 32 || !keepName.MatchString(name) || name == "." || name == ".." {
		return Keep{}, &NameError{"keep", name, "is not a name: up to 32 of a-z 0-9 _ . -, not beginning with . or -"}
	}
	return Keep{Root: root, Name: name}, nil
}

// CheckRoot returns root cleaned, "" meaning "/".
func CheckRoot(root string) (string, error) {
	if root == "" {
		return "/", nil
	}
	c := filepath.Clean(root)
	switch {
	case !rootPath.MatchString(c):
		return "", &NameError{"root", root, "must be an absolute path of letters, digits and /_.-"}
	case len(c) > maxRoot:
		return "", &NameError{"root", root, fmt.Sprintf("is longer than %d bytes", maxRoot)}
	}
	return c, nil
}

// Of these three, a root of "" is "/", never the working directory.

// ConfigFile is the machine's settings, public.
func ConfigFile(root string) string { return filepath.Join("/", root, "etc/overkeep/config.toml") }

// PolicyFile is root's policy, public.
func PolicyFile(root string) string { return filepath.Join("/", root, "etc/overkeep/policy") }

// PolicyDir holds root's drop-ins, *.policy.
func PolicyDir(root string) string { return PolicyFile(root) + ".d" }

// StateRoot holds one directory for every keep.
func StateRoot(root string) string { return filepath.Join("/", root, "var/lib/overkeep") }

// RunRoot holds sockets and namespaces; gone at reboot.
func RunRoot(root string) string { return filepath.Join("/", root, "run/overkeep") }

// On disk, readable without a key.

func (k Keep) StateDir() string { return filepath.Join(StateRoot(k.Root), k.Name) }
func (k Keep) Header() string   { return filepath.Join(k.StateDir(), "keep.json") }
func (k Keep) Slots() string    { return filepath.Join(k.StateDir(), "slots") }

// VolumeDir is the fscrypt directory when it lies on the machine's own file system.
func (k Keep) VolumeDir() string { return filepath.Join(k.StateDir(), "volume") }

// Building is where init makes a keep before it is renamed into place.
func (k Keep) Building() string {
	return filepath.Join(StateRoot(k.Root), ".init-"+k.Name)
}

// At run time.

func (k Keep) RunDir() string  { return filepath.Join(RunRoot(k.Root), k.Name) }
func (k Keep) RunLock() string { return filepath.Join(RunRoot(k.Root), "."+k.Name+".lock") }

// NamespaceDir is a private mount of its own: a mount namespace file can only be
// bound where the mount is not shared with that namespace (mount_namespaces(7)).
func (k Keep) NamespaceDir() string { return filepath.Join(k.RunDir(), "ns") }
func (k Keep) Namespace() string    { return filepath.Join(k.NamespaceDir(), "mnt") }

// Volume is where the plaintext of the volume is mounted, in the view only: "K".
func (k Keep) Volume() string { return filepath.Join(k.RunDir(), "k") }

// FSMount is where the file system of --on-image is mounted, in the view only.
func (k Keep) FSMount() string { return filepath.Join(k.RunDir(), "fs") }

// LowerSocketDir holds the socket of our proxy to the system daemon; root only.
func (k Keep) LowerSocketDir() string { return filepath.Join(k.RunDir(), "lower") }

// SystemSocketDir is the system daemon's socket directory, bound aside in the
// view. It lies below a directory that is root's alone: the bound directory brings
// its own, open mode along.
func (k Keep) SystemSocketDir() string { return filepath.Join(k.LowerSocketDir(), "sys") }

// Cover is an empty directory that nobody can write, mounted over what would
// otherwise be plaintext in a session that outlives a lock.
func (k Keep) Cover() string { return filepath.Join(k.RunDir(), "cover") }

// SocketDir holds the personal daemon's socket. The directory is root's, so that
// nobody can put another socket in its place; the socket is its user's only.
func (k Keep) SocketDir() string { return filepath.Join(k.RunDir(), "socket") }

// NixConfDir holds the rendered nix.conf of the personal daemon.
func (k Keep) NixConfDir() string { return filepath.Join(k.RunDir(), "nix") }

// RemountHook is what the personal Nix calls after it dropped an upper duplicate.
func (k Keep) RemountHook() string { return filepath.Join(k.RunDir(), "overkeep-remount") }

// Pins are the gcroots in the system store that keep what this keep needs.
func (k Keep) Pins() string {
	name := k.Name
	if k.Root != "/" {
		name += "@" + fmt.Sprintf("%x", k.Root)
	}
	return filepath.Join(NixGCRoots, "overkeep", name)
}

// Inside the volume.

func (k Keep) in(elem ...string) string {
	return filepath.Join(append([]string{k.Volume()}, elem...)...)
}

func (k Keep) InnerHeader() string { return k.in("keep.json") }
func (k Keep) StoreDir() string    { return k.in("store") }
func (k Keep) Upper() string       { return k.in("store/upper") }
func (k Keep) Work() string        { return k.in("store/work") }
func (k Keep) NixState() string    { return k.in("nix") }
func (k Keep) NixDB() string       { return k.in("nix/db") }

// Leaving holds a link for each path whose copy a mover is about to take out of the
// upper layer, for it is valid in the system store: the keep's pins hold it there already.
func (k Keep) Leaving() string    { return k.in("nix/gcroots/overkeep-moving") }
func (k Keep) Log() string        { return k.in("log") }
func (k Keep) Policy() string     { return k.in("policy") }     // the user's drop-ins, *.policy
func (k Keep) Provenance() string { return k.in("provenance") } // recorded origins
func (k Keep) Facts() string      { return k.in("facts") }      // what was found out and may be found out again
func (k Keep) Journal() string    { return k.in("journal") }    // moves between the stores, under way and done
func (k Keep) Builds() string     { return k.in("builds") }
func (k Keep) DaemonHome() string { return k.in("daemon") }
func (k Keep) Tmp() string        { return k.in("tmp") }
func (k Keep) Home(sub string) string {
	return k.in("home", sub)
}
