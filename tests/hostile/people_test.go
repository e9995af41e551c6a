package hostile

import (
	"fmt"
	"os"
	"strings"
	"testing"

	"golang.org/x/sys/unix"

	"overkeep/tests/bed"
	"overkeep/tests/fixture"
)

// Without root nothing is done and nothing is told but that root is needed, and
// how to say the same as root.
func TestNotRoot(t *testing.T) {
	l := newLaptop(t)
	l.Must(t, "root", "install -m 644 "+fixture.RecoveryFile+" /tmp/recovery.txt")
	home := l.snapshot(t, "/home", "/etc", "/srv")
	for _, line := range []string{
		"init --user alice --size 64M --passphrase-fd 0 --recovery-out /home/alice/r.txt", "init second --user alice --passphrase-fd 0 --recovery-out /home/alice/r.txt",
		"unlock", "unlock alice --passphrase-fd 0", "unlock alice --identity /tmp/recovery.txt", "lock", "lock alice", "lock alice --kill --yes", "status", "status alice",
		"run -- true", "run alice -- true", "run alice --as-root -- true", "shell alice", "destroy alice --yes", "key list", "key list alice", "key verify alice --passphrase-fd 0",
		"key add alice --passphrase --name x --passphrase-fd 0 --new-passphrase-fd 3", "key remove alice recovery --passphrase-fd 0", "key change alice --passphrase-fd 0 --new-passphrase-fd 3",
		"key recovery alice --passphrase-fd 0 --recovery-out /home/alice/r.txt", "render alice", "unlock --dry-run", "lock --dry-run", "init --dry-run --user alice",
	} {
		for _, user := range []string{"alice", "bob"} {
			a := attempt{name: user + "/" + line, user: user, script: "exec overkeep $json " + line, exit: []int{10}, remedy: []string{"sudo overkeep"}}
			if line == "init --dry-run --user alice" { // looks only, and cannot look everywhere
				a.exit = []int{7, 10}
				a.remedy = nil
			}
			l.try(t, a)
		}
	}
	for _, line := range []string{"version", "help", "help concepts", "init --help"} {
		if r := l.run(t, attempt{user: "alice", script: "exec overkeep " + line}, ""); r.Code != 0 {
			t.Errorf("%s: exit code %d: %s", line, r.Code, r.Stderr)
		}
	}
	if diff := home.diff(l.snapshot(t, "/home", "/etc", "/srv")); diff != "" {
		t.Error(diff)
	}
	l.opens(t)
}

// What alice has around her when root's command runs, or leaves in its way, does
// not lead it.
func TestInfluence(t *testing.T) {
	l := newLaptop(t)
	l.Must(t, "root", "mkdir -m 700 /root/victim && echo untouched > /root/victim/file")
	// A tree of her own that looks like one with a keep, and links out of it.
	l.Must(t, "alice", `mkdir -p fake/var/lib/overkeep/alice/slots fake/etc/overkeep trap/etc/overkeep trap/var/lib trap/bin
		echo '{"version":1,"features":[],"id":"00000000000000000000000000000000","name":"alice","user":"bob","uid":1001,"created":"2020-01-01T00:00:00Z","backend":"dir","size":0}' > fake/var/lib/overkeep/alice/keep.json
		ln -s /root/victim fake/run; ln -s /root/victim/file fake/var/lib/overkeep/alice/volume
		mkfifo trap/etc/overkeep/config.toml; ln -s ~/fake/var/lib/overkeep trap/var/lib/overkeep
		for p in nix-daemon mkfs.ext4 e2fsck fscrypt getent age-plugin-x; do printf '#!/bin/sh\ntouch /root/victim/ran-%s\n' $p > trap/bin/$p; chmod +x trap/bin/$p; done`)
	const env = "OVERKEEP_ROOT=/home/alice/fake"
	for _, line := range []string{"init second --user alice --size 64M --work-factor 12 --passphrase-fd 0 --recovery-out /run/new.txt", "unlock alice --passphrase-fd 0", "lock alice", "destroy alice --yes",
		"run alice -- true", "status alice", "key list alice", "key verify alice --passphrase-fd 0"} {
		l.try(t, attempt{name: "variable/" + line, script: "exec overkeep $json " + line, env: []string{env}, exit: []int{2, 3, 6, 12}})
	}
	l.noRecoveryFile(t)

	before := l.snapshot(t, "/home/alice/fake", "/home/alice/trap")
	for name, c := range map[string]bed.Command{
		"in her directory":    {Script: unlockAlice, Dir: "/home/alice/trap"},
		"with her home":       {Script: unlockAlice, Env: []string{"HOME=/home/alice/trap", "XDG_CONFIG_HOME=/home/alice/trap/etc", "XDG_RUNTIME_DIR=/home/alice/trap", "TMPDIR=/home/alice/trap"}},
		"in a directory gone": {Script: "mkdir /run/gone; cd /run/gone; rmdir /run/gone; " + unlockAlice},
		"with Nix's own":      {Script: unlockAlice, Env: []string{"NIX_CONF_DIR=/home/alice/trap", "NIX_STATE_DIR=/home/alice/trap", "NIX_REMOTE=unix:///home/alice/trap/x", "NIX_STORE_DIR=/home/alice/trap"}},
		"with a bad locale":   {Script: unlockAlice, Env: []string{"LC_ALL=../../../home/alice/trap", "TERM=../../home/alice/trap", "LD_PRELOAD=/home/alice/trap/x.so", "AGEDEBUG=plugin", "GODEBUG=x"}},
	} {
		t.Run(name, func(t *testing.T) {
			c.Env, c.Stdin, c.Within = append(c.Env, "json="), fixture.Passphrase, patience
			r, err := l.Exec(c)
			if err != nil || r.Code != 0 || !strings.Contains(r.Stdout, "is open") {
				t.Fatalf("%v, exit code %d\n%s%s", err, r.Code, r.Stdout, r.Stderr)
			}
			if got := l.Alice(t, "cat marker"); got != marker {
				t.Errorf("it reads %q", got)
			}
			l.Lock(t, "alice")
			l.nothingLeft(t)
		})
	}
	if diff := before.diff(l.snapshot(t, "/home/alice/fake", "/home/alice/trap")); diff != "" {
		t.Error(diff)
	}
	if got := l.Must(t, "root", "ls /root/victim; cat /root/victim/file; stat -c %a /root/victim"); got != "file\nuntouched\n700" {
		t.Errorf("the victim is now: %s", got)
	}
	l.opens(t)
}

// While root unlocks, alice exchanges directories of her home for links to others'
// as fast as she can. Whatever comes of it, nothing is mounted, made or given
// away outside of her own.
func TestLinkRaces(t *testing.T) {
	l := newLaptop(t)
	l.Must(t, "root", `install -d -o bob -m 0777 /home/shared; install -d -o bob -m 0755 /home/shared/nix; chmod 0755 /home/bob; install -d -o bob -m 0777 /home/bob/open /home/bob/open/nix; mkdir -p /etc/nix`)
	others := func() state { return l.snapshot(t, "/etc", "/home/bob", "/home/shared", "/usr/local", "/srv") }
	before := others()
	l.Must(t, "alice", `mkdir -p race .cache/nix .local/share/nix .local/state; ln -sfn /etc race/etc; ln -sfn /home/shared race/shared; ln -sfn /home/bob/open race/open`)
	// The exchanges are made from outside, with one system call each: much faster
	// than any shell of hers, and with no moment at which a name is missing.
	stop, stopped := make(chan struct{}), make(chan int)
	go func() {
		swaps := 0
		defer func() { stopped <- swaps }()
		for {
			for _, name := range []string{".cache", ".local/share", ".local/state", "keep"} {
				for _, link := range []string{"etc", "shared", "open"} {
					select {
					case <-stop:
						return
					default:
					}
					from, to := l.path("/home/alice/"+name), l.path("/home/alice/race/"+link)
					for range 2 { // there and back
						if unix.Renameat2(unix.AT_FDCWD, from, unix.AT_FDCWD, to, unix.RENAME_EXCHANGE) == nil {
							swaps++
						}
					}
				}
			}
		}
	}()
	opened, refused := 0, 0
	for range 20 {
		r := l.run(t, attempt{}, "")
		switch r.Code {
		case 0:
			opened++
			l.onlyOwnMounts(t)
		case 17:
			refused++
		default:
			t.Errorf("exit code %d: %s", r.Code, r.Stderr)
		}
		for _, re := range innards {
			if m := re.FindString(r.Stderr); m != "" {
				t.Errorf("innards (%q): %s", m, r.Stderr)
			}
		}
		if r := l.Overkeep(t, "", "lock", "alice", "--kill", "--yes"); r.Code != 0 {
			t.Errorf("lock: exit code %d: %s", r.Code, r.Stderr)
		}
		l.nothingLeft(t)
		if diff := before.diff(others()); diff != "" {
			t.Errorf("another's files:\n%s", diff)
		}
		if t.Failed() {
			break
		}
	}
	close(stop)
	if swaps := <-stopped; swaps < 1000 {
		t.Errorf("only %d exchanges were made", swaps)
	}
	t.Logf("%d opened, %d refused", opened, refused)
	if opened+refused < 20 && !t.Failed() {
		t.Errorf("%d opened, %d refused", opened, refused)
	}
	l.Must(t, "alice", "rm -r race")
	l.opens(t)
}

// onlyOwnMounts sees that every mount point of the open view that the host does
// not have lies where it should.
func (l *laptop) onlyOwnMounts(t *testing.T) {
	t.Helper()
	points := func(pid int) map[string]int {
		b, err := os.ReadFile(fmt.Sprintf("/proc/%d/mountinfo", pid))
		if err != nil {
			t.Fatal(err)
		}
		m := map[string]int{}
		for line := range strings.Lines(string(b)) {
			m[strings.Fields(line)[4]]++
		}
		return m
	}
	host, looked := points(l.PID()), false
	for _, p := range l.ours(t) {
		looked = true
		for at, n := range points(p.PID) {
			own := strings.HasPrefix(at, "/run/overkeep/alice/") || strings.HasPrefix(at, "/nix/") || strings.HasPrefix(at, "/home/alice/")
			if n > host[at] && !own {
				t.Errorf("mounted in the view: %s", at)
			}
		}
	}
	if !looked {
		t.Error("no process in the view")
	}
}
