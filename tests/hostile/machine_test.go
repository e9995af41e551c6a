package hostile

import (
	"fmt"
	"os"
	"regexp"
	"strings"
	"testing"

	"golang.org/x/sys/unix"

	"overkeep/tests/bed"
	"overkeep/tests/fixture"
)

// A mistake in the machine's settings stops unlock before anything is asked,
// with its place in the file; it never stops lock.
func TestSettings(t *testing.T) {
	l := newLaptop(t)
	const file = "/etc/overkeep/config.toml"
	l.Must(t, "root", "mkdir -p /etc/overkeep /root/victim; mkfifo /run/pipe; echo 'substituters = \"none\"' > /root/victim/config.toml")
	put := func(s string) func(*testing.T) func() {
		return func(t *testing.T) func() { return l.content(t, file, []byte(s)) }
	}
	place := func(make func(p string) error) func(*testing.T) func() {
		return func(t *testing.T) func() { return l.swap(t, file, make) }
	}
	for _, a := range []attempt{
		{name: "syntax", bad: put("# fine\nsubstituters = \"none\"\nnonsense here\n"), says: []string{file + ":3"}},
		{name: "no value", bad: put("substituters = \n"), says: []string{file + ":1"}},
		{name: "no end", bad: put("\n\nsubstituters = \"none\n"), says: []string{file + ":3"}},
		{name: "repeated", bad: put("substituters = \"none\"\nsubstituters = \"none\"\n"), says: []string{file + ":2", "substituters"}},
		{name: "unknown key", bad: put("colour = \"red\"\n"), says: []string{file, "colour"}},
		{name: "unknown table", bad: put("[keeps.alice]\nsubstituters = \"none\"\n"), says: []string{file, "keeps"}},
		{name: "misspelt", bad: put("subsituters = \"none\"\n"), says: []string{file, "subsituters"}},
		{name: "wrong value", bad: put("substituters = \"all\"\n"), says: []string{file, "all", "inherit"}},
		{name: "wrong type", bad: put("substituters = 3\n"), says: []string{file, "substituters"}},
		{name: "list", bad: put("substituters = [\"none\"]\n"), says: []string{file, "substituters"}},
		{name: "binary", bad: put("\xff\xfe\x00\x01"), says: []string{file}},
		{name: "escape sequence", bad: put("\"\\u001b[31m\" = 1\n"), says: []string{file}},
		{name: "large", bad: put(strings.Repeat("# a comment\n", 100000)), says: []string{file}},
		{name: "deep", bad: put("a = " + strings.Repeat("[", 30000)), says: []string{file}},
		{name: "a directory", bad: place(mkdir), says: []string{file}},
		{name: "a FIFO", bad: place(func(p string) error { return unix.Mkfifo(p, 0o600) }), says: []string{file}},
		{name: "a device", bad: place(func(p string) error { return unix.Mknod(p, unix.S_IFCHR|0o600, int(unix.Mkdev(1, 5))) }), says: []string{file}},
		{name: "a link", bad: place(func(p string) error { return os.Symlink("/root/victim/config.toml", p) }), says: []string{file}},
	} {
		a.exit = []int{2}
		l.try(t, a)
	}
	t.Run("lock works all the same", func(t *testing.T) {
		l.Unlock(t, "alice")
		defer put("nonsense\n")(t)()
		l.MustOverkeep(t, 0, "", "lock", "alice")
		l.nothingLeft(t)
	})
	l.opens(t)
}

// A Nix that is too old, strange, not there or not running: unlock says so, and
// what would do, before it asks for anything.
func TestNix(t *testing.T) {
	l := newLaptop(t)
	const program = "/usr/local/bin/nix-daemon"
	says := func(line string) func(*testing.T) func() {
		return func(t *testing.T) func() {
			return l.shell(t, "printf '#!/bin/sh\\n%s\\n' "+word(line)+" > "+program+"; chmod +x "+program, "rm "+program)
		}
	}
	move := func(p string) func(*testing.T) func() {
		return func(t *testing.T) func() { return l.swap(t, p, nothing) }
	}
	const socket = "/nix/var/nix/daemon-socket/socket"
	start := []string{"systemctl start nix-daemon.socket"}
	install := []string{"apt install nix-bin"}
	for _, a := range []attempt{
		{name: "too old", bad: says(`echo "nix-daemon (Nix) 2.8.0"`), says: []string{"2.8", "2.22", program}, remedy: install},
		{name: "just too old", bad: says(`echo "nix-daemon (Nix) 2.21.9"`), says: []string{"2.21", "2.22"}, remedy: install},
		{name: "very old", bad: says(`echo "nix-daemon (Nix) 1.11.16"`), says: []string{"1.11"}, remedy: install},
		{name: "no version", bad: says("echo hello"), says: []string{program}, remedy: install},
		{name: "says nothing", bad: says("exit 0"), says: []string{program}, remedy: install},
		{name: "fails", bad: says("exit 3"), says: []string{program}, remedy: install},
		{name: "escape sequences", bad: says(`printf "\\033[2J\\007"; exit 1`), says: []string{program}, remedy: install},
		{name: "no interpreter", bad: func(t *testing.T) func() {
			return l.shell(t, "printf '#!/nowhere\\n' > "+program+"; chmod +x "+program, "rm "+program)
		}, says: []string{program}, remedy: install},
		{name: "none", bad: move("/usr/bin/nix-daemon"), says: []string{"nix-daemon"}, remedy: install},
		{name: "no socket", bad: move(socket), says: []string{socket}, remedy: start},
		{name: "a file for a socket", bad: func(t *testing.T) func() {
			return l.swap(t, socket, func(p string) error { return os.WriteFile(p, nil, 0o666) })
		}, says: []string{socket}, remedy: start},
		{name: "no directory of the socket", bad: move("/nix/var/nix/daemon-socket"), says: []string{socket}, remedy: start},
		{name: "nobody at the socket", bad: func(t *testing.T) func() {
			// A socket file whose daemon is gone.
			return l.swap(t, socket, func(p string) error { return unix.Mknod(p, unix.S_IFSOCK|0o666, 0) })
		}, says: []string{socket}, remedy: start},
	} {
		a.exit = []int{7}
		l.try(t, a)
	}

	// Nix's own build users: it is Nix that needs them, and says so; the keep goes
	// on as far as it can.
	t.Run("no build users", func(t *testing.T) {
		mend := l.swap(t, "/etc/group", func(p string) error {
			var kept []string
			for line := range strings.Lines(string(l.read(t, fmt.Sprintf("/root/aside-%d", l.aside)))) {
				if !strings.HasPrefix(line, "nixbld:") {
					kept = append(kept, line)
				}
			}
			return os.WriteFile(p, []byte(strings.Join(kept, "")), 0o644)
		})
		defer mend()
		if r := l.Overkeep(t, "", "doctor"); r.Code != 7 || !strings.Contains(r.Stdout, "nixbld") {
			t.Errorf("doctor: exit code %d\n%s%s", r.Code, r.Stdout, r.Stderr)
		}
		l.Unlock(t, "alice")
		l.Write(t, "/run/x.nix", fixture.Derivation("x", "echo hi > $out"))
		out, err := l.AliceRun("nix-build --no-out-link /run/x.nix")
		if err == nil || !strings.Contains(out, "nixbld") {
			t.Errorf("a build without build users: %v\n%s", err, out)
		}
		l.Lock(t, "alice")
		l.nothingLeft(t)
	})
	l.opens(t)
	t.Run("all is well again", func(t *testing.T) {
		l.Unlock(t, "alice")
		l.Write(t, "/run/x.nix", fixture.Derivation("x", "echo hi > $out"))
		if out := l.Alice(t, "cat $(nix-build --no-out-link /run/x.nix 2>/dev/null)"); out != "hi" {
			t.Errorf("a build says %q", out)
		}
		l.Lock(t, "alice")
	})
}

// fsDisk mounts a new file system over the directory of all keeps; the function
// returned takes it away again.
func (l *laptop) fsDisk(t *testing.T, mkfs, options string) (device string, done func()) {
	t.Helper()
	const file = "/root/" + ownLoop
	device = l.Must(t, "root", "rm -f "+file+"; truncate -s 300M "+file+"; "+mkfs+" "+file+" >/dev/null; mkdir -p /var/lib/overkeep; mount -o loop"+options+" "+file+" /var/lib/overkeep; findmnt -no SOURCE /var/lib/overkeep")
	return device, sync1(func() { l.Must(t, "root", "umount /var/lib/overkeep; rm "+file) })
}

// File systems that cannot encrypt, or not yet: init changes nothing and names
// what to do, and what it names works when it is done to the letter.
func TestFileSystems(t *testing.T) {
	l := bare(t)
	const dir = "--user alice --backend dir"
	const image = "--user alice --size 64M"
	// remedies runs init until it is refused, and returns the commands it names.
	remedies := func(t *testing.T, flags string, want ...string) []string {
		t.Helper()
		a := attempt{script: initLine(flags), exit: []int{7}, remedy: want}
		l.refused(t, a)
		l.noRecoveryFile(t)
		if left := l.Must(t, "root", "ls -A /var/lib/overkeep | grep -v lost+found || true"); left != "" {
			t.Errorf("in the directory of keeps: %s", left)
		}
		var out []string
		for line := range strings.Lines(l.run(t, a, "").Stderr) {
			if line = strings.TrimSpace(line); strings.HasPrefix(line, "overkeep init") || strings.HasPrefix(line, "tune2fs") {
				out = append(out, line)
			}
		}
		return out
	}
	use := func(t *testing.T) {
		t.Helper()
		l.MustOverkeep(t, 0, "", "unlock", "alice", "--identity", "/run/new.txt")
		l.Alice(t, "echo x > x; nix-store --query --requisites /nix/store/none 2>/dev/null || true")
		l.Lock(t, "alice")
		l.MustOverkeep(t, 0, "", "destroy", "alice", "--yes")
		l.Must(t, "root", "rm -f /run/new.txt")
		l.nothingLeft(t)
	}

	for name, flags := range map[string]string{"dir": dir, "image": image} {
		t.Run("ext4 without the flag/"+name, func(t *testing.T) {
			device, done := l.fsDisk(t, "mkfs.ext4 -q -O ^encrypt", "")
			defer done()
			rs := remedies(t, flags, "tune2fs -O encrypt "+device, "--on-image")
			for _, r := range rs {
				if strings.HasPrefix(r, "tune2fs") {
					l.Must(t, "root", r)
				}
			}
			l.MustOverkeep(t, 0, fixture.Passphrase, strings.Fields(strings.TrimPrefix(initLine(flags), "exec overkeep $json "))...)
			use(t)
		})
		t.Run("tmpfs/"+name, func(t *testing.T) {
			l.Must(t, "root", "mkdir -p /var/lib/overkeep; mount -t tmpfs -o mode=0755 tmpfs /var/lib/overkeep")
			defer l.Must(t, "root", "umount /var/lib/overkeep")
			rs := remedies(t, flags, "--on-image")
			if len(rs) != 1 || strings.Contains(rs[0], "tune2fs") {
				t.Fatalf("remedies: %q", rs)
			}
			l.Must(t, "root", "printf %s "+word(fixture.Passphrase)+" | "+rs[0])
			use(t)
		})
	}
	t.Run("read-only", func(t *testing.T) {
		_, done := l.fsDisk(t, "mkfs.ext4 -q -O encrypt", ",ro")
		defer done()
		l.refused(t, attempt{script: initLine(dir), exit: []int{7}, says: []string{"writ"}})
	})
	t.Run("1 KiB blocks", func(t *testing.T) {
		_, done := l.fsDisk(t, "mkfs.ext4 -q -b 1024 -O encrypt", "")
		defer done()
		// The kernel takes it or does not (before 5.5 it did not); no third way.
		r := l.Overkeep(t, fixture.Passphrase, strings.Fields(strings.TrimPrefix(initLine(dir), "exec overkeep $json "))...)
		if r.Code == 0 {
			use(t)
		} else if r.Code != 7 {
			t.Errorf("exit code %d: %s", r.Code, r.Stderr)
		}
	})
	// A kernel that does not know the calls answers ENOTTY to all of them.
	const old = "exec strace -f -qq -o /dev/null -e trace=ioctl -e inject=ioctl:error=ENOTTY "
	t.Run("kernel without the calls", func(t *testing.T) {
		l.refused(t, attempt{script: old + strings.TrimPrefix(initLine(dir), "exec "), exit: []int{7}, says: []string{"kernel"}})
		l.noRecoveryFile(t)
		l.refused(t, attempt{script: old + strings.TrimPrefix(initLine(image), "exec "), exit: []int{7}, says: []string{"kernel"}})
	})
	t.Run("an older kernel than the keep was made with", func(t *testing.T) {
		l.Init(t)
		// Only the calls of fscrypt: the ones of loop devices and namespaces are older.
		l.refused(t, attempt{script: old + strings.TrimPrefix(unlockAlice, "exec "), exit: []int{7}, says: []string{"kernel"}})
		l.MustOverkeep(t, 0, fixture.Passphrase, "unlock", "alice", "--passphrase-fd", "0")
		l.Lock(t, "alice")
	})
}

// The remedy for a file system says the device by the name that it has in the
// machine, also where the mount table has another.
func TestRemedyNamesTheDevice(t *testing.T) {
	l := bare(t)
	device, done := l.fsDisk(t, "mkfs.ext4 -q -O ^encrypt", "")
	defer done()
	l.Must(t, "root", "mkdir /srv/bound; mkdir /var/lib/overkeep/x; mount --bind /var/lib/overkeep/x /srv/bound; mkdir -p /srv/root/var/lib/overkeep; mount --bind /srv/bound /srv/root/var/lib/overkeep")
	defer l.Must(t, "root", "umount /srv/root/var/lib/overkeep /srv/bound")
	r, err := l.Exec(bed.Command{Script: "overkeep --root /srv/root init --user alice --backend dir --passphrase-fd 0 --recovery-out /run/new.txt", Stdin: fixture.Passphrase})
	if err != nil {
		t.Fatal(err)
	}
	if m := regexp.MustCompile(`tune2fs -O encrypt (\S+)`).FindStringSubmatch(r.Stderr); r.Code != 7 || m == nil || m[1] != device {
		t.Errorf("exit code %d, want 7 and %s:\n%s", r.Code, device, r.Stderr)
	}
}
