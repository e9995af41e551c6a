package gcroot

import (
	"fmt"
	"net"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"

	"overkeep/overlay/lower"
	"overkeep/overlay/plan"
	"overkeep/tests/bed"
)

// TestRealNix finds every kind of root that a real Nix reports, and moves one so that
// Nix sees that it has moved. The machine is another mount namespace: its first
// process's root is the host.
func TestRealNix(t *testing.T) {
	for _, suite := range bed.Suites {
		t.Run(string(suite), func(t *testing.T) { realNix(t, suite) })
	}
}

func realNix(t *testing.T, suite bed.Suite) {
	m := bed.Start(t, suite)
	m.SystemNix(t)
	const daemon = "NIX_REMOTE=daemon"
	at := fmt.Sprintf("/proc/%d/root", m.PID())
	var uid, gid int
	if _, err := fmt.Sscan(m.Must(t, "alice", "id -u; id -g"), &uid, &gid); err != nil {
		t.Fatal(err)
	}
	build := func(user, name, args string) string {
		t.Helper()
		return strings.TrimSpace(m.Must(t, user, fmt.Sprintf(`cd ~ && nix-build -Q %s -E 'derivation { name = "%s"; system = builtins.currentSystem;
			builder = "/bin/sh"; args = [ "-c" "echo %s > $out" ]; }' 2>/dev/null`, args, name, name), daemon))
	}
	result := build("alice", "result", "-o result")
	elsewhere := build("alice", "elsewhere", "-o /home/alice/fixed")
	m.Must(t, "root", "mkdir /srv/fixed && cd /srv/fixed && ln -s "+elsewhere+" link && chown -h alice link && ln -s /srv/fixed/link /nix/var/nix/gcroots/auto/zzz && rm /home/alice/fixed")
	profile := build("alice", "profile", "--no-out-link")
	m.Must(t, "alice", "cd ~ && nix-env -Q -p ~/prof --set "+profile, daemon)
	roots := build("root", "roots", "-o /root/result")
	system := build("root", "system", "--no-out-link")
	m.Must(t, "root", "nix-env -p /nix/var/nix/profiles/system --set "+system+" && ln -s "+system+" /run/current-system && ln -s /run/current-system /nix/var/nix/gcroots/current-system")
	pin := build("root", "pin", "--no-out-link")
	m.Must(t, "root", "for k in alice bob; do mkdir -p /nix/var/nix/gcroots/overkeep/$k && ln -s "+pin+" /nix/var/nix/gcroots/overkeep/$k/; done")
	used := build("alice", "used", "--no-out-link")
	sleeper, err := m.Start("alice", "exec 7<"+used+"; echo ready; exec sleep 100000")
	if err != nil {
		t.Fatal(err)
	}
	defer sleeper.Kill()
	m.Must(t, "root", "until ls -l /proc/*/fd/7 2>/dev/null | grep -q "+used+"; do :; done")

	// A client of the daemon at work: it has a temporary root.
	temp := build("alice", "temp", "--no-out-link")
	socket := at + "/nix/var/nix/daemon-socket/socket"
	holder := filepath.Join(t.TempDir(), "s")
	l, err := net.Listen("unix", holder)
	if err != nil {
		t.Fatal(err)
	}
	go func() { _ = (&lower.Proxy{Upstream: socket}).Serve(t.Context(), l) }()
	c, err := lower.Dial(t.Context(), holder)
	if err != nil {
		t.Fatal(err)
	}
	defer c.Close()
	if v, err := c.ValidPaths(t.Context(), []string{temp}); err != nil || len(v) != 1 {
		t.Fatal(v, err)
	}

	p := place(t)
	p.User.UID, p.User.GID = uid, gid
	p.Keep.Root = t.TempDir()
	pins := p
	pins.Keep.Root = "/" // the pins are named as in the machine
	f := Finder{Place: pins, Socket: socket, Host: at}
	volume := p.Keep.Volume()
	for _, d := range []string{"nix/gcroots", "home/work", "home/state"} {
		if err := os.MkdirAll(filepath.Join(volume, d), 0o755); err != nil {
			t.Fatal(err)
		}
	}
	if err := os.Chown(filepath.Join(volume, "home/work"), uid, gid); err != nil {
		t.Fatal(err)
	}
	// Find looks into the keep's volume whether a place is taken.
	f.Keep = p.Keep
	found := func() (out []string, all []plan.Root) {
		t.Helper()
		all, err := f.Find(t.Context())
		if err != nil {
			t.Fatal(err)
		}
		names := map[string]string{result: "result", elsewhere: "elsewhere", profile: "profile", roots: "roots", system: "system", pin: "pin", used: "used", temp: "temp"}
		for _, r := range all {
			if names[r.Path] == "" {
				t.Errorf("a root of something else: %+v", r)
			}
			link := r.Link
			if r.Kind == plan.RootProcess || r.Kind == plan.RootTemp {
				link, _, _ = strings.Cut(link, " ")
			}
			s := fmt.Sprintf("%s: %s %s", names[r.Path], r.Kind, link)
			if r.To != "" {
				s += " to " + r.To
			}
			if !slices.Contains(out, s) { // a process may hold a path by several means
				out = append(out, s)
			}
		}
		slices.Sort(out)
		return out, all
	}
	got, all := found()
	want := []string{
		"elsewhere: other /srv/fixed/link",
		// With another root than "/" the keep's pins have another name, so both are others'.
		"pin: keep-pin /nix/var/nix/gcroots/overkeep/alice/" + filepath.Base(pin),
		"pin: keep-pin /nix/var/nix/gcroots/overkeep/bob/" + filepath.Base(pin),
		"profile: user /home/alice/prof-1-link to home/work/links/home/alice/prof-1-link",
		"result: user /home/alice/result to home/work/links/home/alice/result",
		"roots: other /root/result",
		"system: boot /nix/var/nix/profiles/system-1-link",
		"system: boot /run/current-system",
		"temp: temp pid",
		"used: process pid",
	}
	if !slices.Equal(got, want) {
		t.Errorf("found\n%s\nwant\n%s", strings.Join(got, "\n"), strings.Join(want, "\n"))
	}

	mv := Mover{Place: p, Host: at}
	i := slices.IndexFunc(all, func(r plan.Root) bool { return r.Path == result })
	if i < 0 {
		t.Fatal("no root of the result")
	}
	if name := filepath.Base(all[i].Auto); name != autoName(all[i].Link) {
		t.Errorf("Nix calls the entry %s, we %s", name, autoName(all[i].Link))
	}
	rec, err := mv.Look(all[i])
	if err != nil {
		t.Fatal(err)
	}
	for _, step := range []struct {
		name string
		do   func(Record) error
		held bool
	}{{"make", mv.Make, true}, {"remove", mv.Remove, false}, {"restore", mv.Restore, true}, {"drop", mv.Drop, true}, {"remove", mv.Remove, false}} {
		if err := step.do(rec); err != nil {
			t.Fatalf("%s: %v", step.name, err)
		}
		held := strings.Contains(m.Must(t, "root", "nix-store --gc --print-roots"), result)
		if held != step.held {
			t.Errorf("after %s Nix holds the path: %v", step.name, held)
		}
	}
	m.Must(t, "root", "nix-store --delete "+result+" && test ! -e "+result)
}
