// Package view computes and carries out the mounts by which one user sees both
// stores as one /nix/store.
//
// Mounts is pure: from a keep's place and its user it returns a list of plain
// values, in the order in which they are made. Make carries such a list out in
// the mount namespace of the calling process, Undo takes it back. Nothing is
// ever mounted outside the user's own mount namespace.
//
// Do not call Make in a process that shares the host's mount namespace.
package view

import (
	"fmt"
	"path/filepath"
	"strings"

	"golang.org/x/sys/unix"

	"overkeep/overlay/layout"
)

// Kind is how a mount is made.
type Kind string

const (
	Bind    Kind = "bind"
	Overlay Kind = "overlay"
)

// Owner is who must own a directory that is made as a mount point.
type Owner struct {
	UID, GID int
}

// Mount is one mount of a view.
type Mount struct {
	Kind    Kind     `json:"kind"`
	Source  string   `json:"source"`
	Target  string   `json:"target"`
	Options []string `json:"options,omitempty"` // file system options, in order
	Flags   uintptr  `json:"-"`                 // mount(2) flags beside MS_BIND
	Why     string   `json:"why"`               // one line for people

	// AsUser makes the mount point inside the user's home, with the user's own
	// rights, so that no symlink of theirs leads root elsewhere.
	AsUser bool `json:"-"`
	// Stays says that a lock leaves the mount in a namespace in which sessions
	// live: it holds nothing of the keep, and without it what goes on there would
	// reach the system's daemon.
	Stays bool `json:"-"`
	// Sealed makes a missing mount point root-owned and unwritable (0555), so
	// that nothing lands in plaintext beneath it while the keep is locked.
	Sealed bool `json:"-"`
}

// User is whose view it is.
type User struct {
	Name string `json:"name"`
	UID  int    `json:"uid"`
	GID  int    `json:"gid"`
	Home string `json:"home"`
}

// OptionError is a path that overlayfs or Nix cannot take as an option.
type OptionError struct{ Path string }

func (e *OptionError) Error() string {
	return fmt.Sprintf("path %q cannot be an overlay option: letters, digits and /_.- only", e.Path)
}

// storeFlags keep device nodes and setuid bits of the merged store without
// effect; Nix allows neither in a store path. They are repeated on every
// remount, which would clear them otherwise (mount(2), MS_REMOUNT).
const storeFlags = unix.MS_NODEV | unix.MS_NOSUID

// WorkDir is the directory in the user's home behind which sources, result
// links and checkouts lie encrypted, when the keep has one.
const WorkDir = "keep"

// Options are the choices a keep's header makes about its view.
type Options struct {
	WorkDir string // name below the home; "" for none
}

// Mounts returns the view of user on keep k: the system daemon's socket bound
// aside, the overlay over /nix/store, the personal daemon's socket in its
// place, the build logs, and what would leave traces in the home.
//
// The volume itself is mounted before (crypt/volume); its own mount is not part
// of the list. The overlay is made by mount(2) with one option string, "overlay"
// as its source and one lowerdir, because Nix's check-mount compares the text of
// /proc/self/mounts (nix local-overlay-store.cc).
func Mounts(k layout.Keep, u User, o Options) ([]Mount, error) {
	for _, p := range []string{k.Upper(), k.Work()} {
		if !plain(p) {
			return nil, &OptionError{p}
		}
	}
	list := []Mount{
		{Kind: Bind, Source: layout.NixDaemonSocket, Target: k.SystemSocketDir(), Stays: true,
			Why: "the system's nix-daemon, kept reachable as the lower store"},
		{Kind: Overlay, Source: "overlay", Target: layout.NixStore, Flags: storeFlags,
			Options: []string{
				"lowerdir=" + layout.NixStore,
				"upperdir=" + k.Upper(),
				"workdir=" + k.Work(),
				// Stated, not inherited from the kernel's build: redirect_dir=on
				// would write a plaintext name into an unencrypted xattr, the others
				// bind the upper to one lower (overlayfs.rst).
				"xino=auto", "index=off", "metacopy=off", "redirect_dir=nofollow",
			},
			Why: "both stores as one"},
		{Kind: Bind, Source: k.SocketDir(), Target: layout.NixDaemonSocket, Stays: true,
			Why: "stock nix finds the personal nix-daemon with no environment"},
		{Kind: Bind, Source: k.Log(), Target: layout.NixLog, Flags: unix.MS_NODEV | unix.MS_NOSUID,
			Why: "`nix log` reads build logs from the keep"},
	}
	for _, h := range []struct{ sub, dir, why string }{
		{"cache", ".cache/nix", "evaluation and fetcher caches name what was evaluated"},
		{"state", ".local/state/nix", "profiles link to store paths"},
		{"share", ".local/share/nix", "trust decisions and the repl history"},
	} {
		list = append(list, Mount{Kind: Bind, Source: k.Home(h.sub), Target: filepath.Join(u.Home, h.dir),
			Flags: unix.MS_NODEV | unix.MS_NOSUID, Why: h.why, AsUser: true})
	}
	if o.WorkDir != "" {
		list = append(list, Mount{Kind: Bind, Source: k.Home("work"), Target: filepath.Join(u.Home, o.WorkDir),
			Flags: unix.MS_NODEV | unix.MS_NOSUID, AsUser: true, Sealed: true,
			Why: "sources, checkouts and result links, encrypted"})
	}
	return list, nil
}

// Environment is what a session in the view should have: temporary files of
// every program go into the keep.
func Environment(k layout.Keep) []string {
	return []string{"TMPDIR=" + k.Tmp(), "OVERKEEP_KEEP=" + k.Name}
}

// Command renders m as the mount(8) command a person would type.
func (m Mount) Command() string {
	switch m.Kind {
	case Overlay:
		return "mount -t overlay overlay -o " + strings.Join(append(flagNames(m.Flags), m.Options...), ",") + " " + m.Target
	default:
		s := "mount --bind " + m.Source + " " + m.Target
		if f := flagNames(m.Flags); len(f) > 0 {
			s += " -o " + strings.Join(f, ",")
		}
		return s
	}
}

func flagNames(f uintptr) []string {
	var out []string
	if f&unix.MS_NOSUID != 0 {
		out = append(out, "nosuid")
	}
	if f&unix.MS_NODEV != 0 {
		out = append(out, "nodev")
	}
	return out
}

func plain(p string) bool {
	for _, c := range []byte(p) {
		if !(c >= 'a' && c <= 'z' || c >= 'A' && c <= 'Z' || c >= '0' && c <= '9' || strings.IndexByte("/_.-", c) >= 0) {
			return false
		}
	}
	return strings.HasPrefix(p, "/")
}
