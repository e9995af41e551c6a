// Package attack plays those who try to get private bytes out of a keep, or into
// the plaintext store, on one running machine: a session that outlives a lock,
// the keep's own user, another user, a careless root. Each test is an attack
// that once worked.
package attack

import (
	"strings"
	"testing"
	"time"

	"overkeep/tests/bed"
	"overkeep/tests/fixture"
)

// build is a shell command that builds a private path called name.
func build(name string) string {
	return "nix-build --no-out-link -E " + fixture.Quote(fixture.Derivation(name, "echo "+name+" > $out"))
}

// absent fails the test when the system store, as root sees it, knows name.
func absent(t *testing.T, k *fixture.Keep, name string) {
	t.Helper()
	out := k.Must(t, "root", "ls /nix/store; sqlite3 /nix/var/nix/db/db.sqlite 'select path from ValidPaths'")
	if strings.Contains(out, name) {
		t.Errorf("%s is in the system store:\n%s", name, out)
	}
}

// until waits for a condition; it is bounded only to end a hang.
func until(t *testing.T, what string, f func() bool, more ...func() string) {
	t.Helper()
	for end := time.Now().Add(15 * time.Second); time.Now().Before(end); time.Sleep(10 * time.Millisecond) {
		if f() {
			return
		}
	}
	for _, m := range more {
		what += "\n" + m()
	}
	t.Fatalf("waited in vain for %s", what)
}

// A session that outlives a lock must not reach the system's daemon where its own
// was, nor write plaintext caches; after the next unlock it works again.
func TestSessionOutlivesLock(t *testing.T) {
	k := fixture.New(t, bed.Forky)
	k.Unlock(t)
	script := "cd /; echo started; while read -r line <&3; do eval \"$line\" || echo refused; echo done; done"
	k.Must(t, "root", "mkfifo -m 0666 /run/orders")
	p, err := k.Start("root", "exec 3<>/run/orders; exec overkeep run alice -- bash -c "+fixture.Quote("exec 3<>/run/orders; "+script))
	if err != nil {
		t.Fatal(err)
	}
	until(t, "the session", func() bool { return strings.Contains(p.Output(), "started") })
	order := func(command string) string {
		t.Helper()
		before := len(p.Output())
		k.Must(t, "root", "cat >/run/orders <<'EOF'\n"+command+"\nEOF")
		until(t, "the session to obey "+command, func() bool { return strings.Contains(p.Output()[before:], "done") }, p.Output)
		return p.Output()[before:]
	}
	if out := order(build("before-private")); strings.Contains(out, "refused") {
		t.Fatalf("the session cannot build while the keep is open: %s", out)
	}
	k.Lock(t)
	if out := order(build("survivor-private")); !strings.Contains(out, "refused") {
		t.Errorf("after the lock the session built: %s", out)
	}
	if out := order("touch ~/.cache/nix/survivor-cache"); !strings.Contains(out, "refused") {
		t.Errorf("after the lock the session wrote a plain cache: %s", out)
	}
	absent(t, k, "survivor-private")
	k.Unlock(t)
	if out := order(build("after-private")); strings.Contains(out, "refused") {
		t.Errorf("after the next unlock the session cannot build: %s", out)
	}
	if out := order("touch ~/.cache/nix/again"); strings.Contains(out, "refused") {
		t.Errorf("after the next unlock the session cannot write its caches: %s", out)
	}
	p.Kill()
	until(t, "the session's end", func() bool {
		return k.Overkeep(t, "", "lock", "alice").Code == 0
	})
	absent(t, k, "private")
	if out := k.Must(t, "root", "ls -A /home/alice/.cache/nix; ls -A /run/overkeep"); out != ".alice.lock" {
		t.Errorf("left behind: %q", out)
	}
}

// What is done in the view while the keep is open.
func TestOpenKeep(t *testing.T) {
	k := fixture.New(t, bed.Forky)
	// Descriptors of whoever unlocks must not live on in what stays.
	k.Must(t, "root", "exec 9>/run/mylock; flock 9; overkeep unlock alice --passphrase-fd 0 <<<"+fixture.Quote(fixture.Passphrase)+"; exec 9>&-; flock -n /run/mylock true")

	t.Run("system daemon", func(t *testing.T) {
		for _, dir := range []string{"lower/sys", "sys", "lower"} {
			out, err := k.AliceRun("nix-build --no-out-link --store unix:///run/overkeep/alice/" + dir + "/socket -E " +
				fixture.Quote(fixture.Derivation("leak-private", "echo > $out")))
			if err == nil {
				t.Errorf("alice reached a daemon at %s: %s", dir, out)
			}
		}
		absent(t, k, "leak-private")
	})
	t.Run("socket in place of ours", func(t *testing.T) {
		for _, user := range []string{"alice", "bob"} {
			if out, err := k.Run(user, "rm -f /run/overkeep/alice/socket/socket || mv /run/overkeep/alice/socket/socket /tmp/x || touch /run/overkeep/alice/socket/y"); err == nil {
				t.Errorf("%s changed the socket's directory: %s", user, out)
			}
		}
		if out, err := k.AliceRun("rm -f /nix/var/nix/daemon-socket/socket"); err == nil {
			t.Errorf("alice removed the socket in her view: %s", out)
		}
	})
	t.Run("another user", func(t *testing.T) {
		for _, s := range []string{
			"NIX_REMOTE=unix:///run/overkeep/alice/socket/socket nix-store --query --requisites /nix/store/x",
			"ls /run/overkeep/alice/k/store /run/overkeep/alice/k/nix",
			"ls /run/overkeep/alice/lower",
			"ls /proc/$(pgrep -f 'internal supervise')/root/run/overkeep/alice/k/nix",
			"nsenter --mount=/run/overkeep/alice/ns/mnt true",
			"ls /nix/var/nix/gcroots/overkeep/alice",
		} {
			if out, err := k.Run("bob", s); err == nil {
				t.Errorf("bob: %s: %s", s, out)
			}
		}
	})
	t.Run("descriptors of root", func(t *testing.T) {
		out, err := k.Run("root", "exec 7</etc/shadow; overkeep run alice -- bash -c 'cat <&7'")
		if err == nil || strings.Contains(out, "root:") {
			t.Errorf("alice read root's descriptor: %s", out)
		}
	})
	t.Run("from inside the view", func(t *testing.T) {
		k.MustOverkeep(t, 0, fixture.Passphrase, "init", "--user", "bob", "--size", "64M", "--work-factor", "12",
			"--passphrase-fd", "0", "--recovery-out", "/run/bob.txt", "--yes")
		for _, c := range []string{"unlock bob --identity /run/bob.txt", "lock alice", "run alice -- true", "init third --user bob"} {
			out, err := k.Run("root", "overkeep run alice --as-root -- overkeep "+c+" </dev/null")
			if fixture.Code(err) != 2 {
				t.Errorf("overkeep %s inside a view: %v %s", c, err, out)
			}
		}
	})
	t.Run("upstream is the system", func(t *testing.T) {
		host := k.Must(t, "root", "stat -c %i /nix/var/nix/daemon-socket/socket")
		if got := k.Must(t, "root", "nsenter --mount=/run/overkeep/alice/ns/mnt stat -c %i /run/overkeep/alice/lower/sys/socket"); got != host {
			t.Errorf("the socket bound aside has inode %s, the system daemon's has %s", got, host)
		}
	})
	t.Run("run while a lock is under way", func(t *testing.T) {
		out, err := k.Run("root", "flock /run/overkeep/.alice.lock overkeep run alice -- true")
		if fixture.Code(err) != 14 {
			t.Errorf("run beside another command: %v %s", err, out)
		}
	})
	t.Run("run in a torn view", func(t *testing.T) {
		k.Must(t, "root", "nsenter --mount=/run/overkeep/alice/ns/mnt umount -l /nix/store")
		out, err := k.AliceRun(build("torn-private"))
		if fixture.Code(err) != 3 {
			t.Errorf("run without the overlay: %v %s", err, out)
		}
		absent(t, k, "torn-private")
	})
	k.Lock(t, "alice")
	absent(t, k, "private")
}

// Settings of the system's nix.conf that would tell others what is built.
func TestSystemSettings(t *testing.T) {
	k := fixture.Machine(t, bed.Forky)
	k.Must(t, "root", `printf '#!/bin/sh\necho "$@" >>/var/tmp/hook\n' >/var/tmp/hook.sh; chmod 755 /var/tmp/hook.sh
printf 'pre-build-hook = /var/tmp/hook.sh\npost-build-hook = /var/tmp/hook.sh\njson-log-path = /var/tmp/log\n' >>/etc/nix/nix.conf`)
	k.Init(t)
	k.Unlock(t)
	k.Alice(t, build("told-private"))
	if out := k.Must(t, "root", "cat /var/tmp/hook /var/tmp/log 2>/dev/null || true"); strings.Contains(out, "told-private") {
		t.Errorf("the system was told: %s", out)
	}
	k.Lock(t)
}
