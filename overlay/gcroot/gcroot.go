// Package gcroot finds the roots of the system's Nix store, says whose each is, and
// moves those of a keep's user into the keep.
//
// It promises: the roots are those that the system's collector itself goes by, asked
// of its daemon (worker protocol, FindRoots), running processes and clients at work
// included; what cannot be told to be the user's is somebody else's; a link that moves
// is made in the keep before the old one is taken away, each step may be repeated after
// a kill and taken back, and no link of the user's leads root anywhere: every name is
// looked up by directory descriptor, and what lies in a user's directory is touched
// with that user's rights alone.
//
// Start with Find. Classify is its pure part. Mover moves.
//
// Do not use it for what a keep needs of the system store (package pins), nor to find
// out whether a path may be deleted: a root can come up at any time, so who deletes asks
// under the collector's lock.
//
// Words: host = the root directory as it is outside of the view, where nothing of a
// keep is mounted over the user's directories; auto = an entry of gcroots/auto, the
// link that leads the collector to a link elsewhere (gc.cc, addIndirectRoot).
package gcroot

import (
	"path"
	"path/filepath"
	"strconv"
	"strings"
	"unicode/utf8"

	"overkeep/overlay/layout"
	"overkeep/overlay/plan"
	"overkeep/overlay/view"
)

const (
	profiles = "/nix/var/nix/profiles"
	autoDir  = layout.NixGCRoots + "/auto"
	pinsRoot = layout.NixGCRoots + "/overkeep"
	workSub  = "home/work"
	linksSub = workSub + "/links"
)

// Place is whose keep it is.
type Place struct {
	Keep    layout.Keep
	User    view.User
	WorkDir string // as in view.Options
}

// Fact is what is known of a root.
type Fact struct {
	Link  string // as lower.Root
	Path  string
	Owner int    // the link's uid on the host; -1: there is no link, or it is none
	Auto  string // the entry of gcroots/auto that leads to it, by name; "": none
	Comm  string // the name of the process in Link
	Taken bool   // To of Classify is taken in the keep by something else
}

// Classify says whose a root is, and where one of the user's goes. It is pure.
func Classify(p Place, f Fact) plan.Root {
	r := plan.Root{Link: f.Link, Path: f.Path, Kind: plan.RootOther}
	if pid, kind := process(f.Link); kind != "" {
		r.Kind = kind
		if r.Link = "pid " + pid; f.Comm != "" {
			r.Link += " (" + f.Comm + ")"
		}
		return r
	}
	clean := filepath.IsAbs(f.Link) && filepath.Clean(f.Link) == f.Link
	switch {
	case !clean:
		return r // censored, of lsof, or something of a Nix to come
	case below(f.Link, p.Keep.Pins()):
		r.Kind = plan.RootOwnPin
		return r
	case below(f.Link, pinsRoot):
		r.Kind = plan.RootKeepPin
		return r
	case system(f.Link):
		r.Kind = plan.RootBoot
		return r
	case f.Owner != p.User.UID || p.User.UID == 0:
		return r
	case !utf8.ValidString(f.Link) || strings.ContainsAny(f.Link, "\x00\n"):
		return r // it could not be named in a plan and found again
	}
	own := path.Join(profiles, "per-user", p.User.Name)
	direct := below(f.Link, own) || below(f.Link, path.Join(layout.NixGCRoots, "per-user", p.User.Name))
	if !direct && (f.Auto == "" || below(f.Link, layout.NixGCRoots) || below(f.Link, profiles)) {
		return r // nobody knows by what the collector finds it, so it could not be taken away
	}
	r.Kind = plan.RootUser
	if f.Auto != "" {
		r.Auto = path.Join(autoDir, f.Auto)
	}
	if r.To = p.to(f.Link); f.Taken {
		r.To = path.Join(linksSub, f.Link)
	}
	return r
}

// process tells the roots that processes are: "/proc/PID/..." and "{temp:PID}".
func process(link string) (pid string, kind plan.RootKind) {
	pid, temp := strings.CutPrefix(link, "{temp:")
	kind = plan.RootTemp
	if temp {
		pid, temp = strings.CutSuffix(pid, "}")
	}
	if !temp {
		rest, ok := strings.CutPrefix(link, "/proc/")
		if pid, _, _ = strings.Cut(rest, "/"); !ok {
			return "", ""
		}
		kind = plan.RootProcess
	}
	if n, err := strconv.ParseUint(pid, 10, 31); err != nil || n == 0 || pid[0] == '+' {
		return "", ""
	}
	return pid, kind
}

// system tells the links of the machine itself. /proc/sys names the kernel's helpers
// (gc.cc, findRuntimeRoots).
func system(link string) bool {
	for _, l := range []string{"/run/current-system", "/run/booted-system", "/run/opengl-driver", "/run/opengl-driver-32",
		layout.NixGCRoots + "/current-system", layout.NixGCRoots + "/booted-system"} {
		if link == l {
			return true
		}
	}
	if below(link, "/proc/sys") {
		return true
	}
	name, ok := strings.CutPrefix(link, profiles+"/system")
	return ok && (name == "" || name[0] == '-' || strings.HasPrefix(name, "-profiles/") || name[0] == '/')
}

// to is where a link goes in the keep, as a path below the volume. What lies in a
// directory that the view covers is looked for in its place there (view.Mounts); the
// rest cannot be seen at its own place, and gets one in the directory of links.
func (p Place) to(link string) string {
	if rest, ok := inside(link, path.Join(profiles, "per-user", p.User.Name)); ok {
		return path.Join("home/state/profiles", rest)
	}
	for _, c := range p.covers() {
		if rest, ok := inside(link, c.at); ok {
			return path.Join(c.sub, rest)
		}
	}
	return path.Join(linksSub, link)
}

type cover struct{ at, sub string } // a directory of the user's, and what the view shows there

func (p Place) covers() []cover {
	mounts, err := view.Mounts(p.Keep, p.User, view.Options{WorkDir: p.WorkDir})
	if err != nil {
		return nil
	}
	var out []cover
	for _, m := range mounts {
		if sub, ok := inside(m.Source, p.Keep.Volume()); ok && m.AsUser && m.Kind == view.Bind {
			out = append(out, cover{m.Target, sub})
		}
	}
	return out
}

// Seen is where in the view something of the volume is seen that lies at to: that is
// what the personal collector's entry names. Without a cover it is the volume's own place.
func (p Place) Seen(to string) string {
	for _, c := range p.covers() {
		if rest, ok := inside(to, c.sub); ok {
			return path.Join(c.at, rest)
		}
	}
	return path.Join(p.Keep.Volume(), to)
}

// below: link is dir or lies in it.
func below(link, dir string) bool { return link == dir || strings.HasPrefix(link, dir+"/") }

// inside is what is left of p below dir.
func inside(p, dir string) (string, bool) {
	rest, ok := strings.CutPrefix(p, dir+"/")
	return rest, ok && rest != ""
}
