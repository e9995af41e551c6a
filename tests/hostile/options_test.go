package hostile

import (
	"errors"
	"io/fs"
	"os"
	"strings"
	"testing"

	"overkeep/tests/fixture"
)

// initLine is an init of a keep that is not there, with more flags.
func initLine(more string) string {
	if !strings.Contains(more, "--work-factor") {
		more = "--work-factor 12 " + more
	}
	return "exec overkeep $json init --passphrase-fd 0 --recovery-out /run/new.txt " + more
}

// word quotes for the shell what may hold anything but NUL, which no argument can.
func word(s string) string { return fixture.Quote(s) }

// noRecoveryFile sees that a refused init wrote none.
func (l *laptop) noRecoveryFile(t *testing.T) {
	t.Helper()
	if _, err := os.Lstat(l.path("/run/new.txt")); !errors.Is(err, fs.ErrNotExist) {
		t.Errorf("a recovery file of a keep that was not made: %v", err)
	}
}

// Names that are none, for a keep: they are refused for what they are wherever
// one is given, and lead nowhere.
func TestKeepNames(t *testing.T) {
	l := newLaptop(t)
	names := map[string]string{
		"dot": ".", "dots": "..", "slash": "a/b", "absolute": "/etc", "up": "../alice", "trailing slash": "alice/",
		"empty": "", "space": " ", "with space": "a b", "colon": "a:b", "comma": "a,b", "equals": "a=b", "newline": "alice\n",
		"escape sequence": "\x1b[31mred", "capitals": "Alice", "unicode": "ключ", "invalid UTF-8": "a\xff",
		"right-to-left": "\u202ealice", "33 bytes": strings.Repeat("a", 33), "255 bytes": strings.Repeat("a", 255), "long": strings.Repeat("a", 100000),
		"dash": "-alice", "hidden": ".alice", "format": "%s%n%d", "glob": "*", "variable": "$HOME", "the lock": ".alice.lock", "being built": ".init-alice",
	}
	for what, n := range names {
		for verb, line := range map[string]string{
			"init":    initLine("--user alice --size 64M -- "),
			"unlock":  "exec overkeep $json unlock --passphrase-fd 0 -- ",
			"destroy": "exec overkeep $json destroy --yes -- ",
		} {
			l.try(t, attempt{name: what + "/" + verb, script: line + word(n), exit: []int{2}})
			l.noRecoveryFile(t)
		}
	}
	for _, verb := range []string{"lock", "status", "run", "shell", "render", "key list", "key verify", "key add --passphrase", "key remove", "key change", "key recovery"} {
		more := ""
		switch verb {
		case "run":
			more = " -- true"
		case "key remove":
			more = " passphrase --passphrase-fd 0"
		case "key verify", "key change":
			more = " --passphrase-fd 0"
		}
		l.try(t, attempt{name: "up/" + verb, script: "exec overkeep $json " + verb + " ../alice" + more, exit: []int{2}, says: []string{"../alice"}})
		l.try(t, attempt{name: "none of that name/" + verb, script: "exec overkeep $json " + verb + " nobodys" + more, exit: []int{8}, says: []string{"nobodys"}})
	}
	l.try(t, attempt{name: "one letter off", script: "exec overkeep $json unlock alcie --passphrase-fd 0", exit: []int{8}, remedy: []string{"unlock alice"}})
	l.try(t, attempt{name: "a flag", script: "exec overkeep $json unlock -alice --passphrase-fd 0", exit: []int{2}})
	l.opens(t)
}

// Users that cannot have a keep, sizes that are none, files that are in the way:
// nothing is made.
func TestInitOptions(t *testing.T) {
	l := newLaptop(t)
	l.Must(t, "root", `mkdir /srv/full /srv/dir; echo mine > /srv/file; ln -s /srv/nowhere /srv/dangling; mkfifo /srv/pipe; echo old > /run/old.txt`)
	var cases []attempt
	add := func(name, flags string, exit int, says ...string) {
		cases = append(cases, attempt{name: name, script: initLine(flags), exit: []int{exit}, says: says})
	}
	for what, u := range map[string]string{
		"unknown": "mallory", "root": "root", "empty": "", "with colon": "alice:x", "uid": "1000", "zero": "0", "newline": "alice\n",
		"path": "../alice", "escape sequence": "\x1b[31malice", "long": strings.Repeat("a", 5000),
	} {
		add("user/"+what, "second --size 64M --user "+word(u), 2)
	}
	for what, s := range map[string]string{
		"zero": "0", "negative": "-1", "small": "63M", "tiny": "1", "exa": "1E", "two exa": "2048P", "word": "big", "empty": "", "decimal": "20GB",
		"fraction": "1.5G", "overflow": "99999999999999999999", "NaN": "NaN", "hex": "0x40000000", "exponent": "1e9", "space": "1 G", "plus": "+1G",
	} {
		add("size/"+what, "second --user alice --size="+word(s), 2, "--size")
	}
	add("size/more than a file can have", "second --user alice --size 1P", 2, "size")
	add("size/more than the disk, now", "second --user alice --size 100G --preallocate", 13)
	add("size/of a directory", "second --user alice --backend dir --size 1G", 2)

	for what, f := range map[string]string{
		"a file": "/srv/file", "a directory": "/srv/dir", "dangling link": "/srv/dangling", "a FIFO": "/srv/pipe", "a device": "/dev/null", "with a dot": "/srv/./file",
	} {
		add("image/there is "+what, "second --user alice --size 64M --on-image "+f, 9)
	}
	for what, f := range map[string]string{
		"missing directory": "/srv/nowhere/x.img", "below a file": "/srv/file/x.img", "in proc": "/proc/x.img", "empty": "",
		"below a dangling link": "/srv/dangling/x.img", "long": "/srv/" + strings.Repeat("x", 300),
	} {
		add("image/"+what, "second --user alice --size 64M --on-image "+word(f), 2, "image")
	}
	for what, w := range map[string]string{
		"path": "a/b", "dots": "..", "absolute": "/etc", "space": "a b", "newline": "a\n", "dash": "-x", "long": strings.Repeat("a", 65), "hidden": ".ssh",
	} {
		add("work-dir/"+what, "second --user alice --size 64M --work-dir="+word(w), 2)
	}
	for what, w := range map[string]string{"little": "9", "much": "31", "more than is opened": "23", "negative": "-1", "word": "strong", "zero": "0"} {
		add("work-factor/"+what, "second --user alice --size 64M --work-factor="+w, 2, "work-factor")
	}
	add("backend", "second --user alice --backend cloud", 2, "cloud")
	add("the keep there is", "alice --user alice --size 64M", 9, `"alice"`)
	cases = append(cases, attempt{name: "the default name there is", script: initLine("--user alice --size 64M"), exit: []int{9}, says: []string{`"alice"`}, remedy: []string{"--user alice "}})
	add("too many words", "second third --user alice", 2, "third")
	for _, a := range cases {
		l.try(t, a)
		l.noRecoveryFile(t)
	}

	const to = "exec overkeep $json init second --user alice --size 64M --work-factor 12 --passphrase-fd 0 --recovery-out "
	for _, a := range []attempt{
		{name: "recovery/there is a file", script: to + "/run/old.txt", exit: []int{9}, says: []string{"/run/old.txt"}},
		{name: "recovery/there is a link", script: to + "/srv/dangling", exit: []int{9}},
		{name: "recovery/a directory", script: to + "/srv/dir", exit: []int{9}},
		{name: "recovery/no such directory", script: to + "/srv/nowhere/x", exit: []int{2}, says: []string{"/srv/nowhere"}},
		{name: "recovery/below a file", script: to + "/srv/file/x", exit: []int{2}},
		{name: "recovery/to a read-only place", script: to + "/proc/x", exit: []int{2}},
		{name: "recovery/to a full disk", bad: func(t *testing.T) func() {
			return l.shell(t, "mount -t tmpfs -o size=4k tmpfs /srv/full && head -c 4096 /dev/zero > /srv/full/x", "umount /srv/full")
		}, script: to + "/srv/full/r.txt", exit: []int{13}},
		{name: "passphrase/short", script: initLine("second --user alice --size 64M"), stdin: text("1234567"), exit: []int{2}},
		{name: "passphrase/empty", script: initLine("second --user alice --size 64M"), stdin: text(""), exit: []int{2}},
		{name: "passphrase/two lines", script: initLine("second --user alice --size 64M"), stdin: text("correct horse\nbattery"), exit: []int{2}},
		{name: "nobody to show the key to", script: "exec setsid -w overkeep $json init second --user alice --size 64M --passphrase-fd 0", exit: []int{2}, says: []string{"terminal"}, remedy: []string{"--recovery-out"}},
	} {
		l.try(t, a)
		l.noRecoveryFile(t)
	}
	if got := l.Must(t, "root", "cat /srv/file /run/old.txt; find /srv -mindepth 1 | sort | tr '\\n' ' '"); got != "mine\nold\n/srv/dangling /srv/dir /srv/file /srv/full /srv/pipe" {
		t.Errorf("in /srv there is now: %s", got)
	}
	l.opens(t)
}

// What looks odd and is none the worse: it works, to the end.
func TestOddButGood(t *testing.T) {
	l := bare(t)
	l.Must(t, "root", "mkdir '/srv/a dir'")
	for name, flags := range map[string]string{
		"spaces":             "--on-image '/srv/a dir/the keep.img' --size 64M",
		"colon and comma":    "--on-image '/srv/a:b,c=d.img' --size 64M",
		"newline":            "--on-image $'/srv/new\\nline.img' --size 64M",
		"quotes and unicode": `--on-image "/srv/ü'\"\\\\.img" --size 64M`,
		"a relative path":    "--on-image srv/relative.img --size 64M",
		"larger than disk":   "--size 500G",
		"image on tmpfs":     "--on-image /dev/shm/keep.img --size 64M",
		"directory in image": "--on-image /srv/dir.img --size 64M --backend dir",
		"no work directory":  "--size 64M --work-dir none",
		"other root":         "--size 64M --root /srv/other",
	} {
		t.Run(name, func(t *testing.T) {
			root := ""
			if strings.Contains(flags, "--root") {
				root = "--root /srv/other "
			}
			const look = "find /srv /dev/shm $(ls -d /.fscrypt/*/ 2>/dev/null) -mindepth 1 -not -path '/srv/other*' | sort"
			before := l.Must(t, "root", look)
			l.Must(t, "root", "cd /; printf %s "+word(fixture.Passphrase)+" | "+strings.TrimPrefix(initLine("--user alice "+flags), "exec ")+"; overkeep "+root+"unlock alice --identity /run/new.txt; cd /; overkeep "+root+"run alice -- sh -c 'nix --version; echo $TMPDIR; test -w $TMPDIR'; overkeep "+root+"status --json >/dev/null; overkeep "+root+"lock alice",
				"json=")
			l.nothingLeft(t)
			l.MustOverkeep(t, 0, "", append(strings.Fields(root), "destroy", "alice", "--yes")...)
			l.Must(t, "root", "rm /run/new.txt")
			if after := l.Must(t, "root", look); before == "" || after != before {
				t.Errorf("left after destroy:\n%s\nbefore:\n%s", after, before)
			}
		})
	}
}

// Roots below which no keep can be: the command says so before it has made or
// followed anything.
func TestRoots(t *testing.T) {
	l := newLaptop(t)
	l.Must(t, "root", `mkdir -p /srv/real /srv/writable/in /root/victim; chmod 0777 /srv/writable; ln -s /srv/real /srv/link
		install -d -o alice /srv/alices /srv/alices/in; echo x > /srv/file; chmod 0700 /root/victim
		install -d -o alice /tmp/planted; su alice -c 'ln -s /root/victim /tmp/planted/run; mkdir -p /tmp/planted/var/lib; ln -s /root/victim /tmp/planted/var/lib/overkeep; ln -s /root/victim /tmp/planted/etc'`)
	before := l.snapshot(t, "/srv", "/tmp")
	for what, root := range map[string]string{
		"relative": "keeps", "relative with dot": "./keeps", "up": "..", "space": "/srv/a b", "comma": "/srv/a,b", "colon": "/srv/a:b", "unicode": "/srv/é",
		"newline": "/srv/a\nb", "quote": "/srv/a'b", "long": "/srv/" + strings.Repeat("x", 40), "link": "/srv/link", "below a link": "/srv/link/in",
		"world-writable": "/srv/writable", "below world-writable": "/srv/writable/in", "in tmp": "/tmp/keeps", "tmp itself": "/tmp",
		"of alice": "/srv/alices", "below one of alice": "/srv/alices/in", "home": "/home/alice", "planted": "/tmp/planted", "a file": "/srv/file", "missing in tmp": "/tmp/a/b/c",
	} {
		l.try(t, attempt{name: what + "/init", script: "exec overkeep $json --root " + word(root) + " init --user alice --size 64M --work-factor 12 --passphrase-fd 0 --recovery-out /run/new.txt", exit: []int{2}})
		l.noRecoveryFile(t)
		l.try(t, attempt{name: what + "/unlock", script: "exec overkeep $json --root " + word(root) + " unlock alice --passphrase-fd 0", exit: []int{2, 8}})
		l.try(t, attempt{name: what + "/variable", script: "exec overkeep $json lock alice", env: []string{"OVERKEEP_ROOT=" + root}, exit: []int{2, 8}})
	}
	if diff := before.diff(l.snapshot(t, "/srv", "/tmp")); diff != "" {
		t.Errorf("refused, but:\n%s", diff)
	}
	l.opens(t)
}
