package split

import (
	"strings"
	"testing"
)

// The first row: the system store is readable by everyone, the personal store
// by its user alone, while unlocked.
func TestReadableBy(t *testing.T) {
	each(t, "", func(t *testing.T, l *laptop) {
		public := l.build(t, rootOut, echo("public", "for everybody"), "")
		l.at(t, rootOut, "nix-store --realise --add-root /nix/var/nix/gcroots/public "+public)
		l.unlockOf(t, "alice")
		private := l.build(t, alice, echo("private", "for alice", public), "-o private")
		drv := l.at(t, alice, "nix-store --query --deriver "+private)

		// Every way to read a path that stock tools have. Each is seen to work on
		// the public path before it counts that it fails on the private one.
		ways := map[string]string{
			"file":       "cat $P",
			"listing":    "ls " + storeDir + " | grep -F $H",
			"path-info":  "nix path-info $P | grep -F $H",
			"hash":       "nix-store --query --hash $P",
			"references": "nix-store --query --references $P",
			"requisites": "nix-store --query --requisites $P | grep -F $H",
			"validity":   "nix-store --check-validity $P",
			"dump":       "nix-store --dump $P | grep -ac nix-archive",
			"all":        "nix path-info --all | grep -F $H",
		}
		// Root outside has the database itself as well, as tables and as bytes.
		tables := map[string]string{
			"sqlite":  "sqlite3 /nix/var/nix/db/db.sqlite .dump | grep -F $H",
			"dump-db": "nix-store --dump-db | grep -F $H",
			"bytes":   "grep -raF $H /nix/var/nix/db /nix/var/nix/gcroots /nix/var/nix/temproots /nix/var/log/nix | wc -l | grep -vx 0",
		}
		// working runs every way on a file at p and returns those that read it.
		working := func(p place, ways map[string]string, file string, env ...string) map[string]bool {
			t.Helper()
			script := "P=" + file + "; H=" + hash(file) + "\n"
			for way, s := range ways {
				script += "if ( " + s + " ) >/dev/null 2>&1; then echo " + way + "; fi\n"
			}
			out := map[string]bool{}
			for _, way := range strings.Fields(l.at(t, p, script, env...)) {
				out[way] = true
			}
			return out
		}
		check := func(p place, ways map[string]string, secret bool, env ...string) {
			t.Helper()
			open, path, deriver := working(p, ways, public, env...), working(p, ways, private, env...), working(p, ways, drv, env...)
			for way := range ways {
				if !open[way] {
					t.Errorf("%s %v cannot read the public path by %s", p, env, way)
				}
				if path[way] == secret {
					t.Errorf("%s %v reads the private path by %s: %v, want %v", p, env, way, path[way], !secret)
				}
				if deriver[way] == secret {
					t.Errorf("%s %v reads the private derivation by %s: %v, want %v", p, env, way, deriver[way], !secret)
				}
			}
		}
		outside := func() {
			t.Helper()
			for _, p := range []place{aliceOut, bobOut, rootOut} {
				check(p, ways, true)
			}
			check(rootOut, ways, true, rootDaemon)
			check(rootOut, tables, true)
		}

		check(alice, ways, false)
		check(rootInView, ways, false)
		outside()
		t.Run("doors", func(t *testing.T) { doors(t, l, private) })

		l.lockOf(t, "alice")
		outside()
		if out, err := l.try(alice, "cat "+private); err == nil {
			t.Errorf("a command ran in the view of a locked keep: %s", out)
		}
	})
}

// doors tries the ways into an open keep that bypass Nix: sockets, the mounted
// volume, the view of a process.
func doors(t *testing.T, l *laptop, private string) {
	const connect = `perl -MSocket -e 'socket(my $s, AF_UNIX, SOCK_STREAM, 0) or die; connect($s, sockaddr_un($ARGV[0])) or die "connect: $!\n"; print "in\n"' `
	const run = "/run/overkeep/alice/"
	sockets := []struct {
		file string
		open map[place]bool // who gets in; nobody else of those asked does
	}{
		// alice's own daemon is hers wherever she is.
		{run + "socket/socket", map[place]bool{alice: true, aliceOut: true, rootOut: true, rootInView: true}},
		// What speaks for the system's daemon to her own, what ends that, and the system's
		// daemon itself, bound aside in the view, are root's.
		{run + "lower/sys/socket", map[place]bool{rootInView: true}},
		{run + "lower/socket", map[place]bool{rootOut: true, rootInView: true}},
		{run + "lower/control", map[place]bool{rootOut: true, rootInView: true}},
		// The system's own daemon is bob's as before; in the view its place is taken by alice's.
		{"/nix/var/nix/daemon-socket/socket", map[place]bool{alice: true, aliceOut: true, bobOut: true, rootOut: true, rootInView: true}},
	}
	for _, s := range sockets {
		for _, p := range []place{alice, rootInView, aliceOut, bobOut, rootOut} {
			out, err := l.try(p, connect+s.file)
			if (err == nil) != s.open[p] {
				t.Errorf("%s connects to %s: %v, want %v\n%s", p, s.file, err == nil, s.open[p], out)
			}
		}
	}

	// bob may name the view of a process of alice's, but not enter it.
	p := l.start(t, alice, "echo here $$; exec sleep infinity")
	defer func() { p.Kill(); <-p.Done() }()
	eventually(t, "a process in the view", func() bool { return strings.Contains(p.Output(), "here") })
	pid := strings.Fields(p.Output())[1]
	supervisor := l.Must(t, "root", "pgrep -f '^overkeep internal supervise'")
	for _, pid := range []string{pid, supervisor} {
		for who, want := range map[string]bool{"root": true, "bob": false} {
			file := "/proc/" + pid + "/root" + private
			if _, err := l.Run(who, "cat "+file); (err == nil) != want {
				t.Errorf("%s reads %s: %v, want %v", who, file, err == nil, want)
			}
		}
	}
	for _, dir := range []string{"/var/lib/overkeep", "/var/lib/overkeep/alice", "/home/alice/keep", run + "lower"} {
		if out, err := l.Run("bob", "ls -A "+dir); err == nil && dir != "/var/lib/overkeep" || strings.Contains(out, "volume") {
			t.Errorf("bob lists %s: %s", dir, out)
		}
	}
	if out := l.Must(t, "bob", "ls -A "+run+"k 2>/dev/null || true"); out != "" {
		t.Errorf("bob sees the volume: %s", out)
	}
}
