package doctor

import (
	"errors"
	"fmt"
	"io/fs"
	"strings"

	"golang.org/x/sys/unix"

	"overkeep/overlay/layout"
	"overkeep/overlay/lower"
	"overkeep/overlay/nixconf"
	"overkeep/systemd/keep"
)

// nixFacts is what was found of the system's Nix.
type nixFacts struct {
	inView bool // this runs where a keep's overlay hides the system store

	daemon, client string // paths; "" if not found
	searched       []string
	debian         bool
	version        string // what the daemon's program prints
	versionErr     error
	settings       map[string]string // in force for the system; nil if unknown
	settingsErr    error

	answers outcome // the system daemon's socket; found: the version it says
	trial   outcome // a throw-away local-overlay store

	buildGroup string // "" where the setting is empty
	groupFound bool
	buildUsers []string

	store     pathFacts // /nix/store; path "" if it is not there
	storeErr  error
	storeType string // of its filesystem
	encrypted bool   // with fscrypt
	asLower   outcome

	substituters nixconf.Substituters // of the keeps; "" with configErr
	configErr    error
}

const (
	overlayFeature = "local-overlay-store"
	nixInstaller   = "sh <(curl -L https://nixos.org/nix/install) --daemon"
)

func (n nixFacts) checks(m machine, systemd bool) []Check {
	if n.inView {
		return []Check{{
			Name: "system store", Group: Nix, Answer: Unsure, Needed: true,
			Missing: "the system's own /nix/store: this runs inside a view", Remedy: "exit",
			Or: "run it again outside of `overkeep run`",
		}}
	}
	out := []Check{n.daemonCheck(), n.versionCheck(), n.featureCheck()}
	trial := m.judge(feature{
		name: "local-overlay store", needed: true,
		what:   "a Nix that opens a local-overlay store over a lower one",
		remedy: n.install(),
	}, n.trial)
	answers := n.answersCheck(systemd)
	asLower := m.judge(feature{
		name: "store as lower layer", needed: true,
		what: "an overlay over the filesystem of /nix/store (" + n.storeType + ")",
		or:   "move /nix to ext4, xfs or btrfs",
	}, n.asLower)
	out = append(out, trial, answers, n.buildUsersCheck(), n.storeCheck(), asLower, n.encryptedCheck(), n.sandboxCheck(), n.substitutersCheck())
	for i := range out {
		out[i].Group = Nix
	}
	return out
}

// install is the command that installs or renews Nix.
func (n nixFacts) install() string {
	if n.debian {
		return "apt install nix-setup-systemd"
	}
	return nixInstaller
}

func (n nixFacts) daemonCheck() Check {
	c := Check{Name: "nix-daemon", Answer: Yes, Needed: true, Found: n.daemon}
	switch {
	case n.daemon == "":
		c.Answer, c.Missing, c.Remedy = No, "nix-daemon in any of "+strings.Join(n.searched, ", "), n.install()
	case n.client == "":
		c.Answer, c.Missing, c.Remedy = No, "the program nix in any of "+strings.Join(n.searched, ", "), n.install()
	}
	return c
}

func (n nixFacts) versionCheck() Check {
	c := Check{Name: "Nix 2.22", Answer: Yes, Needed: true}
	major, minor, ok := keep.NixVersion(n.version)
	switch {
	case n.daemon == "":
		c.Answer, c.Missing = Unsure, "a nix-daemon"
	case !ok:
		c.Answer, c.Missing = Unsure, "a version: "+quote(n.daemon)+" --version did not tell"
		if n.versionErr != nil {
			c.Missing += " (" + oneLine(n.versionErr.Error()) + ")"
		}
	case !keep.NixSupports(major, minor):
		c.Answer, c.Found = No, fmt.Sprintf("Nix %d.%d", major, minor)
		c.Missing, c.Remedy = "Nix 2.22 or newer: the local-overlay store came with it", nixInstaller
		if n.debian {
			c.Remedy, c.Or = n.install(), "with Debian 13 or newer as its source; or "+nixInstaller
		}
	default:
		c.Found = fmt.Sprintf("Nix %d.%d", major, minor)
	}
	return c
}

func (n nixFacts) featureCheck() Check {
	c := Check{Name: "experimental feature", Answer: Yes, Needed: true, Found: overlayFeature}
	known, told := n.settings["experimental-features"]
	switch {
	case n.client == "":
		c.Answer, c.Found, c.Missing = Unsure, "", "the program nix"
	case !told:
		c.Answer, c.Found, c.Missing = Unsure, "", "the settings of Nix"
		if n.settingsErr != nil {
			c.Missing += ": " + oneLine(n.settingsErr.Error())
		}
	case !hasWord(known, overlayFeature):
		c.Answer, c.Found = No, ""
		c.Missing, c.Remedy = overlayFeature+": this Nix does not know of it", n.install()
	}
	return c
}

func hasWord(list, word string) bool {
	for w := range strings.FieldsSeq(list) {
		if w == word {
			return true
		}
	}
	return false
}

// answersCheck: the system's own daemon is the lower store of every keep.
func (n nixFacts) answersCheck(systemd bool) Check {
	c := Check{Name: "system daemon answers", Answer: Yes, Needed: true, Found: n.answers.found}
	const sock = layout.NixDaemonSocket + "/socket"
	remedy := "nix-daemon &"
	if systemd {
		remedy = "systemctl enable --now nix-daemon.socket"
	}
	var (
		old  *lower.VersionError
		told *lower.DaemonError
	)
	err := n.answers.err
	switch {
	case !n.answers.tried:
		c.Answer, c.Missing = Unsure, "an attempt"
	case err == nil:
	case errors.Is(err, fs.ErrNotExist):
		c.Answer, c.Missing, c.Remedy = No, "a socket at "+sock, remedy
	case errors.Is(err, unix.ECONNREFUSED):
		c.Answer, c.Missing, c.Remedy = No, "somebody who listens at "+sock, remedy
	case errors.As(err, &old):
		c.Answer, c.Missing, c.Remedy = No, "a daemon that speaks a known protocol: "+oneLine(old.Error()), n.install()
	case errors.As(err, &told):
		c.Answer, c.Missing = No, "a willing daemon: it refuses this user"
		c.Or = "allowed-users in " + layout.SystemNixConf
	case errors.Is(err, fs.ErrPermission):
		c.Answer, c.Missing, c.Or = Unsure, "permission to connect to "+sock, "run it as root"
	default:
		c.Answer, c.Missing, c.Remedy = Unsure, oneLine(err.Error()), remedy
	}
	return c
}

func (n nixFacts) buildUsersCheck() Check {
	c := Check{Name: "build users", Answer: Yes, Needed: true}
	g := n.buildGroup
	switch {
	case n.settings["auto-allocate-uids"] == "true":
		c.Found = "allocated by Nix (auto-allocate-uids)"
	case g == "":
		c.Answer, c.Missing = No, "a build-users-group: builds would run as root"
		c.Remedy = "sed -i '/^build-users-group/d' " + layout.SystemNixConf
		c.Or = "that makes it nixbld, the default"
	case !n.groupFound:
		c.Answer, c.Missing, c.Remedy = No, "the group "+quote(g)+", as whose members builds run", makeUsers(g, true)
	case len(n.buildUsers) == 0:
		c.Answer, c.Missing, c.Remedy = No, "a member of the group "+quote(g)+": no build can run", makeUsers(g, false)
	default:
		c.Found = fmt.Sprintf("%d in the group %s", len(n.buildUsers), g)
	}
	return c
}

// makeUsers is the recipe of Nix's manual for a multi-user installation.
func makeUsers(group string, withGroup bool) string {
	g := quote(group)
	s := "for n in $(seq 1 10); do useradd -r -M -N -g " + g + " -G " + g +
		" -d /var/empty -s /usr/sbin/nologin -c \"Nix build user $n\" " + g + "$n; done"
	if withGroup {
		s = "groupadd -r " + g + "; " + s
	}
	return s
}

func (n nixFacts) storeCheck() Check {
	c := Check{Name: "system store", Answer: Yes, Needed: true}
	p := n.store
	switch {
	case p.path == "" && (n.storeErr == nil || errors.Is(n.storeErr, fs.ErrNotExist)):
		c.Answer, c.Missing, c.Remedy = No, layout.NixStore, n.install()
	case p.path == "":
		c.Answer, c.Missing = Unsure, oneLine(n.storeErr.Error())
	case p.mode&fs.ModeSymlink != 0:
		c.Answer, c.Missing = No, "a real directory: "+layout.NixStore+" is a symbolic link, and the view is mounted on it"
		c.Or = "bind-mount the place it leads to on " + layout.NixStore
	case !p.mode.IsDir():
		c.Answer, c.Missing, c.Remedy = No, "a directory at "+layout.NixStore, n.install()
	case p.uid != 0:
		c.Answer, c.Missing = No, fmt.Sprintf("a store of root: %s belongs to uid %d, as in a single-user installation", layout.NixStore, p.uid)
		c.Or = "install Nix for many users; the single-user store cannot be shared safely"
	case p.mode.Perm()&0o002 != 0:
		c.Answer, c.Missing, c.Remedy = No, layout.NixStore+" can be written by everybody", "chmod o-w "+layout.NixStore
	case p.mode.Perm()&0o005 != 0o005:
		c.Answer, c.Missing, c.Remedy = No, layout.NixStore+" cannot be read by everybody", "chmod o+rx "+layout.NixStore
	default:
		c.Found = fmt.Sprintf("mode %o on %s", unixMode(p.mode), n.storeType)
	}
	return c
}

func unixMode(m fs.FileMode) uint32 {
	o := uint32(m.Perm())
	if m&fs.ModeSticky != 0 {
		o |= unix.S_ISVTX
	}
	if m&fs.ModeSetgid != 0 {
		o |= unix.S_ISGID
	}
	if m&fs.ModeSetuid != 0 {
		o |= unix.S_ISUID
	}
	return o
}

func (n nixFacts) encryptedCheck() Check {
	c := Check{Name: "system store is plain", Answer: Yes}
	switch {
	case n.store.path == "":
		c.Answer, c.Missing = Unsure, layout.NixStore
	case n.encrypted:
		c.Answer = No
		c.Missing = "a plain system store: " + layout.NixStore + " is itself in an fscrypt directory, and must be unlocked before every keep"
		c.Or = "move " + layout.NixStore + " to a directory that is not encrypted"
	}
	return c
}

// sandboxCheck is advice: the personal daemon has its sandbox on whatever the
// system's nix.conf says (nixconf.Lines).
func (n nixFacts) sandboxCheck() Check {
	c := Check{Name: "sandbox of the system's builds", Answer: Yes}
	switch v := n.settings["sandbox"]; v {
	case "true":
		c.Found = "on"
	case "false", "relaxed":
		c.Answer, c.Found = No, v
		c.Missing = "sandbox = true: the system's builds see the machine's files; those of a keep are always in a sandbox"
		c.Remedy = "echo 'sandbox = true' >>" + layout.SystemNixConf
	default:
		c.Answer, c.Missing = Unsure, "the settings of Nix"
	}
	return c
}

func (n nixFacts) substitutersCheck() Check {
	c := Check{Name: "nobody is asked for private hashes", Answer: Yes}
	switch {
	case n.configErr != nil:
		c.Answer, c.Needed, c.Missing = No, true, "settings that can be read: "+oneLine(n.configErr.Error())
		c.Or = "mend the line, or remove the file: every setting has a safe default"
	case n.substituters == nixconf.Inherit:
		c.Answer, c.Found = No, `substituters = "inherit"`
		c.Missing = "a keep that asks no public cache: a look-up tells the cache the hash of a private path"
		c.Or = `substituters = "none" in the settings; fetch public software with the system's daemon`
	default:
		c.Found = `substituters = "none"`
	}
	return c
}
