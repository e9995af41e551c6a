package split

import (
	"path"
	"strings"
	"testing"
)

// Two keeps of two users are open at once over the one system store: each sees
// the system's and its own, nothing of the other's, and what one does with it,
// up to the lock, is nothing to the other.
func TestTwoKeeps(t *testing.T) {
	each(t, "", func(t *testing.T, l *laptop) {
		bob := place{"bob", "bob"}
		l.initKeep(t, "bob")
		shared := l.build(t, rootOut, echo("shared", "s"), "")
		l.unlockOf(t, "alice")
		l.unlockOf(t, "bob")
		users := []place{alice, bob}
		own, both := map[place]string{}, map[place]string{}
		for _, p := range users {
			own[p] = l.build(t, p, echo("of-"+p.user, p.user, shared), "-o own")
			both[p] = l.build(t, p, echo("both", "b", shared), "-o both")
		}
		if both[alice] != both[bob] {
			t.Fatalf("the same derivation made %v", both)
		}
		check := func(when string, open ...place) {
			t.Helper()
			for _, p := range open {
				if got := l.at(t, p, "cat own $(tail -n 1 own)"); got != p.user+"\n"+shared+"\ns" {
					t.Errorf("%s: %s reads %q", when, p, got)
				}
				for _, other := range users {
					l.have(t, p, p == other, map[string]string{"path of " + other.user + " " + when: own[other]})
				}
				l.verify(t, p)
			}
			for _, p := range append([]string{own[alice], own[bob]}, both[alice]) {
				l.have(t, rootOut, false, map[string]string{p + " " + when: p})
			}
			l.have(t, rootOut, true, map[string]string{"shared " + when: shared})
			l.verify(t, rootOut)
		}
		check("both open", users...)
		const connect = `perl -MSocket -e 'socket(my $s, AF_UNIX, SOCK_STREAM, 0) or die; connect($s, sockaddr_un($ARGV[0])) or die' `
		for _, p := range users {
			for _, other := range users {
				_, err := l.try(p, connect+"/run/overkeep/"+other.user+"/socket/socket")
				if (err == nil) != (p == other) {
					t.Errorf("%s connects to the daemon of %s: %v", p, other.user, err == nil)
				}
			}
			if out, err := l.Run(p.user, "overkeep run "+p.user+" -- true"); err == nil {
				t.Errorf("%s, who is not root, ran a command through overkeep: %s", p.user, out)
			}
		}

		// One collects everything, the other's copy of the same path is untouched;
		// one is locked, the other goes on; each has its own pins.
		l.at(t, alice, "rm both; nix-store --gc")
		if l.exists(alice, both[alice]) || !l.exists(bob, both[bob]) {
			t.Errorf("alice's collection: her path there %v, bob's %v", l.exists(alice, both[alice]), l.exists(bob, both[bob]))
		}
		l.lockOf(t, "alice")
		l.systemGC(t)
		check("alice's locked", bob)
		again := l.build(t, bob, echo("again", "a", shared), "")
		if _, err := l.try(alice, "true"); err == nil {
			t.Error("alice's keep is open")
		}
		l.unlockOf(t, "alice")
		l.lockOf(t, "bob")
		l.systemGC(t)
		check("bob's locked", alice)
		if l.exists(alice, again) {
			t.Error("alice sees what bob built")
		}
		// What only bob needs is held by bob's pins alone, locked as he is.
		l.at(t, alice, "rm own; nix-store --gc")
		eventually(t, "alice's last pin", func() bool { return len(l.pins()) == 0 })
		l.systemGC(t)
		l.have(t, rootOut, true, map[string]string{"what bob needs": shared})
		if out := l.Must(t, "root", "ls /nix/var/nix/gcroots/overkeep/bob"); !strings.Contains(out, path.Base(shared)) {
			t.Errorf("bob's pins: %s", out)
		}
	})
}

// Root in the view asks alice's daemon like everybody else: what root builds
// there is alice's, and nothing of it reaches the system store.
func TestRootInView(t *testing.T) {
	each(t, "", func(t *testing.T, l *laptop) {
		l.unlockOf(t, "alice")
		if got := l.at(t, rootInView, "id -u; echo $NIX_REMOTE; nix store info 2>&1 | grep -i '^Store URL'"); got != "0\ndaemon\nStore URL: daemon" {
			t.Errorf("root in the view: %q", got)
		}
		before := l.Must(t, "root", "find /nix/store /nix/var/nix/gcroots /nix/var/nix/profiles /nix/var/log/nix | sort; sqlite3 /nix/var/nix/db/db.sqlite .dump")
		out := l.build(t, rootInView, echo("roots", "r"), "-o roots")
		l.at(t, rootInView, "nix-store --add /etc/hostname; nix store gc; nix-store --verify")
		if after := l.Must(t, "root", "find /nix/store /nix/var/nix/gcroots /nix/var/nix/profiles /nix/var/log/nix | sort; sqlite3 /nix/var/nix/db/db.sqlite .dump"); after != before {
			t.Errorf("root's build in the view changed the system's state:\nbefore\n%s\nafter\n%s", before, after)
		}
		if !l.inUpper(t, out) || !l.valid(alice, out) {
			t.Errorf("%s: in the upper %v, valid for alice %v", out, l.inUpper(t, out), l.valid(alice, out))
		}
		l.have(t, rootOut, false, map[string]string{"root's path in the view": out})
		l.verify(t)
	})
}
