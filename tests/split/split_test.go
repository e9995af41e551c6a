// Package split proves the four promises of the split on a real Nix, old and
// new: who can read, what lies encrypted, whose garbage collection takes what,
// and whose build inputs stay; and that everyday work with stock Nix goes on
// over both stores as over one.
//
// Every test makes throw-away laptops of its own (tests/fixture), with alice,
// who has a keep, and bob, who has none unless the test makes him one. It uses
// stock Nix and the overkeep command, nothing of the library. Do not look here
// for traces on the disk (tests/traces) or for locking.
package split

import (
	"fmt"
	"path"
	"strings"
	"testing"
	"time"

	"overkeep/tests/bed"
	"overkeep/tests/fixture"
)

// patience ends a wait for what never comes; nothing is measured by it.
const patience = 60 * time.Second

// laptop is a machine with the keep of alice.
type laptop struct{ *fixture.Keep }

// machines bounds how many run at a time, on however many cores.
var machines = make(chan struct{}, 2)

// each runs f on a laptop of every suite with alice's keep made but locked.
// settings are added to the system's nix.conf before its daemon starts.
func each(t *testing.T, settings string, f func(t *testing.T, l *laptop), args ...string) {
	for _, suite := range bed.Suites {
		t.Run(string(suite), func(t *testing.T) {
			t.Parallel()
			machines <- struct{}{}
			t.Cleanup(func() { <-machines }) // after the machine's own clean-up
			m := bed.Start(t, suite)
			conf := m.Read(t, "/etc/nix/nix.conf")
			m.Write(t, "/etc/nix/nix.conf", conf+settings)
			m.Install(t, bed.Binary(t))
			m.SystemNix(t)
			l := &laptop{&fixture.Keep{Machine: m}}
			l.initKeep(t, "alice", args...)
			f(t, l)
		})
	}
}

// initKeep makes a keep for user. Where the recovery key goes is of no matter
// here: below /run.
func (l *laptop) initKeep(t *testing.T, user string, args ...string) {
	t.Helper()
	argv := []string{"init", "--user", user, "--work-factor", "12", "--passphrase-fd", "0",
		"--recovery-out", "/run/" + user + ".recovery", "--yes"}
	l.MustOverkeep(t, 0, fixture.Passphrase, append(argv, args...)...)
}

// unlockOf opens the keep of user, lockOf closes it.
func (l *laptop) unlockOf(t *testing.T, user string) {
	t.Helper()
	l.MustOverkeep(t, 0, fixture.Passphrase, "unlock", user, "--passphrase-fd", "0")
}

func (l *laptop) lockOf(t *testing.T, user string) {
	t.Helper()
	l.MustOverkeep(t, 0, "", "lock", user, "--yes")
}

// A place is where and as whom a script runs.
type place struct {
	user string
	view string // whose view; empty is outside of any
}

func (p place) String() string {
	if p.view == "" {
		return p.user + " outside the view"
	}
	return p.user + " in " + p.view + "'s view"
}

var (
	alice       = place{"alice", "alice"}
	rootInView  = place{"root", "alice"}
	aliceOut    = place{"alice", ""}
	bobOut      = place{"bob", ""}
	rootOut     = place{"root", ""}
	rootDaemon  = "NIX_REMOTE=daemon" // root outside, through the system's daemon
	workDir     = "cd ~/keep 2>/dev/null || cd; "
	offline     = "warning: you don't have Internet access; disabling some network-dependent features\n"
	storeDir    = "/nix/store"
	pinsOfAlice = "/nix/var/nix/gcroots/overkeep/alice"
)

// command is a shell line, for root, that runs a script at p.
func (p place) command(script string) string {
	script = workDir + script
	switch {
	case p.view == "":
		return "exec bash -euo pipefail -c " + fixture.Quote(script)
	case p.user == "root":
		return "cd /; exec overkeep run " + p.view + " --as-root -- bash -euo pipefail -c " + fixture.Quote(script)
	}
	return "cd /; exec overkeep run " + p.view + " -- bash -euo pipefail -c " + fixture.Quote(script)
}

// host is the user as whom the machine runs p's command.
func (p place) host() string {
	if p.view == "" {
		return p.user
	}
	return "root"
}

// try runs a script at p and returns both outputs, without what every Nix
// without a network says.
func (l *laptop) try(p place, script string, env ...string) (string, error) {
	out, err := l.Run(p.host(), p.command(script), env...)
	return strings.TrimSpace(strings.ReplaceAll(out, offline, "")), err
}

// at is try that fails the test on an error.
func (l *laptop) at(t *testing.T, p place, script string, env ...string) string {
	t.Helper()
	out, err := l.try(p, script, env...)
	if err != nil {
		t.Fatalf("%s: %v", p, err)
	}
	return out
}

// start is try in the background.
func (l *laptop) start(t *testing.T, p place, script string, env ...string) *bed.Proc {
	t.Helper()
	proc, err := l.Start(p.host(), p.command(script), env...)
	if err != nil {
		t.Fatalf("%s: %v", p, err)
	}
	return proc
}

// expression writes an expression to a file of its own and returns its name. It
// lies in /run: nothing here asks what the disk shows.
func (l *laptop) expression(t *testing.T, expr string) string {
	t.Helper()
	file := fmt.Sprintf("/run/expr-%d.nix", time.Now().UnixNano())
	l.Write(t, file, expr)
	return file
}

// build builds an expression at p and returns its output path. Flags go to
// nix-build; without "-o LINK" nothing roots the result.
func (l *laptop) build(t *testing.T, p place, expr, flags string) string {
	t.Helper()
	if !strings.Contains(flags, "-o ") {
		flags += " --no-out-link"
	}
	c := bed.Command{User: p.host(), Script: p.command("nix-build " + flags + " " + l.expression(t, expr))}
	if p == rootOut {
		c.Env = append(c.Env, rootDaemon)
	}
	r, err := l.Exec(c)
	if err != nil || r.Code != 0 {
		t.Fatalf("%s: build %s: %v %+v", p, expr, err, r)
	}
	out := strings.TrimSpace(r.Stdout)
	if !strings.HasPrefix(out, storeDir+"/") || strings.ContainsAny(out, "\n ") {
		t.Fatalf("%s: nix-build says %q", p, out)
	}
	return out
}

// echo is an expression for a path with the given name that holds text and the
// names of deps, and so refers to them.
func echo(name, text string, deps ...string) string {
	return fixture.Derivation(name, `{ echo "`+text+`"; for d in $deps; do echo $d; done; } > $out`, deps...)
}

// hash is the hash part of a store path.
func hash(p string) string { h, _, _ := strings.Cut(path.Base(p), "-"); return h }

// eventually waits until cond holds: for what follows an event that shows
// nowhere, such as an inotify watch of another process.
func eventually(t *testing.T, what string, cond func() bool) {
	t.Helper()
	for deadline := time.Now().Add(patience); !cond(); time.Sleep(10 * time.Millisecond) {
		if time.Now().After(deadline) {
			t.Fatalf("it never happens: %s", what)
		}
	}
}

// exists reports whether a path is there at p.
func (l *laptop) exists(p place, file string) bool {
	_, err := l.try(p, "test -e "+file)
	return err == nil
}

// valid reports whether the Nix at p calls a path valid.
func (l *laptop) valid(p place, file string) bool {
	_, err := l.try(p, "nix-store --check-validity "+file)
	return err == nil
}

// have fails the test unless every path is (want) or is not (!want) both valid
// and there at p.
func (l *laptop) have(t *testing.T, p place, want bool, paths map[string]string) {
	t.Helper()
	for name, file := range paths {
		if valid, there := l.valid(p, file), l.exists(p, file); valid != want || there != want {
			t.Errorf("%s: %s: valid %v, there %v; want %v", p, name, valid, there, want)
		}
	}
}

// verify checks both stores whole, by contents. What it reads is the only thing
// a clean one says.
func (l *laptop) verify(t *testing.T, places ...place) {
	t.Helper()
	if len(places) == 0 {
		places = []place{rootOut, alice, rootInView}
	}
	for _, p := range places {
		out, err := l.try(p, "nix-store --verify --check-contents")
		if bad := complaints(out); err != nil || bad != "" {
			t.Errorf("%s: the store is not clean: %v\n%s", p, err, bad)
		}
	}
}

// complaints are the lines of a verification that are not about its progress.
func complaints(out string) string {
	var bad []string
	for line := range strings.Lines(out) {
		line = strings.TrimSpace(line)
		switch {
		case line == "", strings.HasPrefix(line, "waiting for the big garbage collector lock"),
			strings.HasPrefix(line, "reading the Nix store"), strings.HasPrefix(line, "checking path existence"),
			strings.HasPrefix(line, "checking hashes"), strings.HasPrefix(line, "checking store hashes"), strings.HasPrefix(line, "checking link hashes"):
		default:
			bad = append(bad, line)
		}
	}
	return strings.Join(bad, "\n")
}

// upper lists what lies in alice's upper layer: names, without the collector's
// own, and what is no personal path and must not be there: whiteouts, and
// entries of names that the system store has.
func (l *laptop) upper(t *testing.T) (names []string, whiteouts string) {
	t.Helper()
	const dir = "/run/overkeep/alice/k/store/upper"
	out := l.at(t, rootInView, "find "+dir+" -mindepth 1 -maxdepth 1 -printf '%f\\n'")
	for _, n := range strings.Fields(out) {
		if !strings.HasPrefix(n, ".") {
			names = append(names, n)
		}
	}
	return names, l.at(t, rootInView, "find "+dir+" -type c -printf '%P '")
}

// noWhiteouts fails the test when the upper layer hides or copies something of
// the system store.
func (l *laptop) noWhiteouts(t *testing.T) {
	t.Helper()
	names, whiteouts := l.upper(t)
	if whiteouts != "" {
		t.Errorf("whiteouts in the upper layer: %s", whiteouts)
	}
	for _, n := range names {
		if l.exists(rootOut, storeDir+"/"+n) {
			t.Errorf("%s is in both layers", n)
		}
	}
}

// inUpper reports whether a store path lies in alice's upper layer.
func (l *laptop) inUpper(t *testing.T, p string) bool {
	t.Helper()
	names, _ := l.upper(t)
	for _, n := range names {
		if n == path.Base(p) {
			return true
		}
	}
	return false
}

// pins are the paths pinned for alice, as base names.
func (l *laptop) pins() []string {
	out, _ := l.Run("root", "ls "+pinsOfAlice+" 2>/dev/null || true")
	return strings.Fields(out)
}

// systemGC collects in the system store, once nothing holds the paths in gone any
// more: pins for what alice does not need any longer vanish a moment after her
// own collection. Both commands are meant to be the same.
func (l *laptop) systemGC(t *testing.T, gone ...string) {
	t.Helper()
	for _, p := range gone {
		eventually(t, "no root holds "+p, func() bool {
			out, err := l.try(rootOut, "nix-store --query --roots "+p+" 2>/dev/null", rootDaemon)
			return err == nil && out == ""
		})
	}
	l.at(t, rootOut, "nix-store --gc; nix-collect-garbage", rootDaemon)
}

// personalGC collects in alice's store.
func (l *laptop) personalGC(t *testing.T) {
	t.Helper()
	l.at(t, alice, "nix-store --gc; nix-collect-garbage")
}

// deadline bounds a loop that looks again and again.
type deadline struct{ end time.Time }

func newDeadline() deadline   { return deadline{time.Now().Add(patience)} }
func (d deadline) over() bool { return time.Now().After(d.end) }
func (d deadline) wait()      { time.Sleep(10 * time.Millisecond) }
