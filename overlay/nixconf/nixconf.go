// Package nixconf renders the settings of a keep's personal nix-daemon. It is
// pure: values in, text out, each line with the reason a person can read.
//
// Nobody writes a store URL by hand; this package does, and `overkeep render
// --explain` shows the result.
package nixconf

import (
	"fmt"
	"net/url"
	"strings"

	"overkeep/overlay/layout"
)

// Substituters says from where the personal daemon may fetch.
type Substituters string

const (
	// None asks nobody: a look-up of a private path's hash at a public cache
	// tells that cache the hash. Public software is fetched by the system's daemon.
	None Substituters = "none"
	// Inherit uses what the system's nix.conf names, hashes of private paths
	// included in what is asked.
	Inherit Substituters = "inherit"
)

// Config is what a personal daemon's settings depend on.
type Config struct {
	Keep         layout.Keep
	User         string
	Substituters Substituters
	// OldNix says that the daemon is older than 2.27 and would complain to its
	// clients about settings that it does not know.
	OldNix bool
	// LowerSocket is the socket that answers for the system store.
	LowerSocket string
}

// Line is one setting with the reason for it.
type Line struct {
	Key, Value, Why string
}

// LowerURL is the lower store: the system's own daemon, asked anew every time,
// for a store object that remembers a missing path would not see the system
// store grow.
func (c Config) LowerURL() string {
	return "unix://" + c.LowerSocket + "?path-info-cache-size=0"
}

// StoreURL is the local-overlay store of the keep (nix 2.22 and later).
func (c Config) StoreURL() string {
	k := c.Keep
	q := []string{
		"state=" + url.QueryEscape(k.NixState()),
		"log=" + url.QueryEscape(k.Log()),
		"upper-layer=" + url.QueryEscape(k.Upper()),
		"lower-store=" + url.QueryEscape(c.LowerURL()),
		"remount-hook=" + url.QueryEscape(k.RemountHook()),
	}
	return "local-overlay://?" + strings.Join(q, "&")
}

// Lines returns the settings in order. They follow an include of the system's
// own nix.conf and so override it.
func (c Config) Lines() []Line {
	k := c.Keep
	lines := []Line{
		{"store", c.StoreURL(), "this keep's upper store over the system's store"},
		{"extra-experimental-features", "nix-command flakes local-overlay-store", "local-overlay is experimental in Nix itself"},
		{"build-dir", k.Builds(), "build directories hold private sources: inside the keep, also after a failed build"},
		{"sandbox", "true", "a build sees only its declared inputs, never the user's files"},
		{"sandbox-fallback", "false", "no sandbox, no build"},
		{"keep-outputs", "true", "your own build tools stay: collecting is your decision"},
		{"keep-derivations", "true", "and so do the derivations that made them"},
		{"allowed-users", c.User + " root", "nobody else may ask this daemon for anything"},
		{"trusted-users", "root", "a client cannot turn these settings off"},
		{"auto-optimise-store", "false", "linking would turn the system's .links into whiteouts (nix#16269)"},
		{"min-free", "0", "the overlay's collector miscounts and would stop early (nix#16269)"},
		{"max-free", "0", "as above"},
		{"builders", "", "no remote machine gets private sources"},
		{"post-build-hook", "", "the system's hook may upload what it is given"},
		{"pre-build-hook", "", "the system's hook is told what is built"},
		{"hashed-mirrors", "", "a mirror would be asked for private hashes"},
		{"plugin-files", "", "the system's plugins see everything"},
		{"secret-key-files", "", "private paths are not signed with the machine's key"},
		{"diff-hook", "", "the system's hook may log what it is given"},
		{"run-diff-hook", "false", "the system's hook may log what it is given"},
		{"use-xdg-base-directories", "true", "profiles live where the keep is bound"},
	}
	if !c.OldNix {
		lines = append(lines, Line{"json-log-path", "", "the system's log would name private paths"})
	}
	if c.Substituters != Inherit {
		lines = append(lines,
			Line{"substituters", "", "asking a public cache for a private hash would tell it; fetch public software with the system's daemon"},
			Line{"extra-substituters", "", "as above"},
			Line{"trusted-substituters", "", "as above"},
		)
	}
	return lines
}

// Render returns the nix.conf text, comments included.
func (c Config) Render() string {
	var b strings.Builder
	fmt.Fprintf(&b, "# written by overkeep for keep %q; changes here are lost at the next unlock\n", c.Keep.Name)
	fmt.Fprintf(&b, "!include %s\n", layout.SystemNixConf)
	for _, l := range c.Lines() {
		fmt.Fprintf(&b, "\n# %s\n%s = %s\n", l.Why, l.Key, l.Value)
	}
	return b.String()
}

// Environment is the personal daemon's whole environment, beside the socket
// that is passed to it. NIX_STATE_DIR is not set: the lock files of the build
// users lie there, and both daemons must take them from one place, or two
// builds would run as one user.
func (c Config) Environment(path string) []string {
	k := c.Keep
	return []string{
		"PATH=" + path,
		"HOME=" + k.DaemonHome(),
		"XDG_CACHE_HOME=" + k.DaemonHome() + "/.cache",
		"TMPDIR=" + k.Builds(),
		"NIX_CONF_DIR=" + k.NixConfDir(),
		"NIX_USER_CONF_FILES=/dev/null",
		"OVERKEEP_KEEP=" + k.Name,
		"LANG=C.UTF-8",
	}
}
