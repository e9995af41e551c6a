package hostile

import (
	"bytes"
	"compress/zlib"
	"fmt"
	"io"
	"io/fs"
	"os"
	"path/filepath"
	"strings"
	"testing"

	agetest "c2sp.org/CCTV/age"
	"filippo.io/age"
	"filippo.io/age/plugin"
	"golang.org/x/sys/unix"

	"overkeep/crypt/volume"
	"overkeep/tests/fixture"
)

// Parts of another keep, made with the same passphrase on the same machine, are
// not parts of this one.
func TestForeign(t *testing.T) {
	l := newLaptop(t)
	const other = "/var/lib/overkeep/other"
	l.MustOverkeep(t, 0, fixture.Passphrase, "init", "other", "--user", "alice", "--work-factor", "12", "--size", "64M",
		"--passphrase-fd", "0", "--recovery-out", "/run/other.txt")
	bob := func(p string) string { return "/var/lib/overkeep/bob" + strings.TrimPrefix(p, keepDir) }
	l.MustOverkeep(t, 0, fixture.Passphrase, "init", "--user", "bob", "--work-factor", "12", "--size", "64M",
		"--passphrase-fd", "0", "--recovery-out", "/run/bob.txt")

	// copied puts a part of another keep in place of the same part.
	copied := func(from string, parts ...string) func(*testing.T) func() {
		return func(t *testing.T) func() {
			var mends []func()
			for _, p := range parts {
				mends = append(mends, l.swap(t, keepDir+"/"+p, func(to string) error {
					if fi, err := os.Stat(l.path(from + "/" + p)); err != nil || fi.IsDir() {
						return os.CopyFS(to, os.DirFS(l.path(from+"/"+p)))
					}
					return os.WriteFile(to, l.read(t, from+"/"+p), 0o600)
				}))
			}
			return func() {
				for _, f := range mends {
					f()
				}
			}
		}
	}
	volumes := func(t *testing.T) func() {
		exchange(t, l.path(keepDir+"/volume"), l.path(other+"/volume"))
		return func() { exchange(t, l.path(keepDir+"/volume"), l.path(other+"/volume")) }
	}
	both := func(a, b func(*testing.T) func()) func(*testing.T) func() {
		return func(t *testing.T) func() {
			x, y := a(t), b(t)
			return func() { y(); x() }
		}
	}
	// As bob's, but with the name that the place asks for.
	named := func(t *testing.T) func() {
		return l.content(t, keepDir+"/keep.json", bytes.Replace(l.read(t, other+"/keep.json"), []byte(`"name": "other"`), []byte(`"name": "alice"`), 1))
	}
	for _, a := range []attempt{
		{name: "slots", bad: copied(other, "slots"), exit: tampered, says: []string{"another keep"}},
		{name: "slots of another user", bad: copied(bob(keepDir), "slots"), exit: tampered, says: []string{"another keep"}},
		{name: "one slot file", bad: copied(other, "slots/passphrase.age"), exit: tampered, says: []string{"passphrase.age"}},
		{name: "the list", bad: copied(other, "slots/set.json"), exit: tampered},
		{name: "volume", bad: volumes, exit: tampered, says: []string{"policy"}},
		{name: "header", bad: copied(other, "keep.json"), exit: tampered, says: []string{`"other"`}},
		{name: "header with the name mended", bad: named, exit: tampered},
		{name: "header and slots", bad: both(named, copied(other, "slots")), exit: tampered, says: []string{"policy"}},
		{name: "volume and slots", bad: both(volumes, copied(other, "slots")), exit: tampered, says: []string{"another keep"}},
		{name: "everything, with the name mended", bad: both(named, both(volumes, copied(other, "slots"))), exit: tampered, says: []string{"pinned inside"}},
	} {
		l.try(t, a)
	}
	l.opens(t)
}

// vector is one of the public test vectors of age: c2sp.org/CCTV/age.
type vector struct {
	name, expect, passphrase, identity string
	file                               []byte
}

func vectors(t *testing.T) []vector {
	t.Helper()
	names, err := fs.ReadDir(agetest.Vectors, ".")
	if err != nil {
		t.Fatal(err)
	}
	var out []vector
	for _, n := range names {
		b, err := fs.ReadFile(agetest.Vectors, n.Name())
		if err != nil {
			t.Fatal(err)
		}
		v, zipped := vector{name: n.Name()}, false
		for line := ""; ; {
			head, rest, ok := bytes.Cut(b, []byte("\n"))
			if line, b = string(head), rest; !ok || line == "" {
				break
			}
			switch key, value, _ := strings.Cut(line, ": "); key {
			case "expect":
				v.expect = value
			case "passphrase":
				v.passphrase = value
			case "identity":
				v.identity += value + "\n"
			case "compressed":
				zipped = true
			}
		}
		if v.file = b; zipped {
			r, err := zlib.NewReader(bytes.NewReader(b))
			if err == nil {
				v.file, err = io.ReadAll(r)
			}
			if err != nil {
				t.Fatal(err)
			}
		}
		out = append(out, v)
	}
	return out
}

// Slot files made by others, good ones of age and bad ones, with their own keys:
// as they are they are not what the list says; with the list changed to fit,
// none opens anything, nor costs more than is allowed.
func TestForeignSlotFiles(t *testing.T) {
	l := newLaptop(t)
	const (
		first    = slotDir + "/passphrase.age"
		recovery = slotDir + "/recovery.age"
	)
	// fits puts file in place of a slot, and its hash into the list.
	fits := func(slot string, file []byte) func(*testing.T) func() {
		return func(t *testing.T) func() {
			a := l.edit(t, list, hash(l.read(t, slot)), hash(file))
			b := l.content(t, slot, file)
			return func() { b(); a() }
		}
	}
	all := vectors(t)
	if len(all) < 100 {
		t.Fatalf("%d vectors", len(all))
	}
	seen := map[string]int{}
	for i, v := range all {
		scrypt := v.passphrase != ""
		if !scrypt && i%12 != 0 {
			continue
		}
		seen[v.expect]++
		slot, script, stdin := first, unlockAlice, v.passphrase
		if !scrypt {
			slot, script = recovery, "exec overkeep $json unlock alice --identity /run/vector.txt"
			l.Write(t, "/run/vector.txt", v.identity)
			if v.identity == "" {
				l.Write(t, "/run/vector.txt", "AGE-SECRET-KEY-1XMWWC06LY3EE5RYTXM9MFLAZ2U56JJJ36S0MYPDRWSVLUL66MV4QX3S7F6\n")
			}
		}
		base := strings.TrimSuffix(filepath.Base(slot), ".age")
		l.try(t, attempt{name: v.name, bad: fits(slot, v.file), script: script, stdin: &stdin, exit: []int{4, 6, 12, 16}})
		if i%5 == 0 {
			l.try(t, attempt{name: v.name + " not listed", bad: func(t *testing.T) func() { return l.content(t, slot, v.file) },
				script: script, stdin: &stdin, exit: tampered, says: []string{base}})
		}
	}
	if len(seen) < 3 || seen["success"] == 0 {
		t.Errorf("a poor sample of the vectors: %v", seen)
	}

	file := l.read(t, first)
	for _, n := range []string{"21", "22", "30", "31", "63", "64", "99", "1000000000000000000000"} {
		heavy := bytes.Replace(file, []byte(" 12\n"), []byte(" "+n+"\n"), 1)
		if bytes.Equal(heavy, file) {
			t.Fatalf("no work factor in %q", file)
		}
		l.try(t, attempt{name: "work/2^" + n, bad: fits(first, heavy), exit: []int{16}, says: []string{`"passphrase"`}, remedy: []string{"--recovery"}})
	}
	l.try(t, attempt{name: "work/not listed", bad: func(t *testing.T) func() {
		return l.content(t, first, bytes.Replace(file, []byte(" 12\n"), []byte(" 30\n"), 1))
	}, exit: tampered})
	for _, n := range []string{"0", "-1", "012", "1e1", " ", "x"} {
		l.try(t, attempt{name: "work/malformed " + n, bad: fits(first, bytes.Replace(file, []byte(" 12\n"), []byte(" "+n+"\n"), 1)),
			exit: damaged, says: []string{`"passphrase"`}})
	}

	// A slot of the right form, for the right kind, that somebody else's key opens.
	stranger, err := age.GenerateX25519Identity()
	if err != nil {
		t.Fatal(err)
	}
	var decoy bytes.Buffer
	w, err := age.Encrypt(&decoy, stranger.Recipient())
	if err == nil {
		_, err = w.Write(make([]byte, 32))
	}
	if err == nil {
		err = w.Close()
	}
	if err != nil {
		t.Fatal(err)
	}
	l.Write(t, "/run/stranger.txt", stranger.String()+"\n")
	l.try(t, attempt{name: "decoy", bad: fits(recovery, decoy.Bytes()), script: "exec overkeep $json unlock alice --identity /run/stranger.txt",
		exit: tampered, says: []string{`"recovery"`}})

	token := plugin.EncodeRecipient("nosuchtoken", []byte("serial number"))
	l.try(t, attempt{name: "plugin that is not installed", script: "exec overkeep $json key add alice --passphrase-fd 0 --recipient " + token,
		exit: []int{18}, says: []string{"age-plugin-nosuchtoken"}, remedy: []string{"age-plugin-"}})
	l.Write(t, "/run/token.txt", plugin.EncodeIdentity("nosuchtoken", []byte("serial number"))+"\n")
	plug := []byte("age-encryption.org/v1\n-> nosuchtoken abc\n" + strings.Repeat("A", 43) + "\n--- " + strings.Repeat("A", 43) + "\n" + strings.Repeat("x", 64))
	l.try(t, attempt{name: "plugin that a slot asks for", bad: fits(recovery, plug), script: "exec overkeep $json unlock alice --identity /run/token.txt",
		exit: []int{6, 12, 18}})
	l.opens(t)
}

// Something else than what belongs there, in the place of every file and
// directory of a keep: it is not followed and nothing hangs on it.
func TestPlaces(t *testing.T) {
	l := newLaptop(t)
	l.Must(t, "root", "mkdir -m 700 /root/victim && echo untouched > /root/victim/file && ln /root/victim/file /root/victim/linked")
	kinds := map[string]func(good string) func(p string) error{
		"symlink to the real one": func(good string) func(string) error {
			return func(p string) error { return os.Symlink(good, p) }
		},
		"symlink to a victim": func(string) func(string) error {
			return func(p string) error { return os.Symlink("/root/victim/file", p) }
		},
		"dangling symlink": func(string) func(string) error {
			return func(p string) error { return os.Symlink("/root/victim/new", p) }
		},
		"symlink to a directory": func(string) func(string) error {
			return func(p string) error { return os.Symlink("/root/victim", p) }
		},
		"directory": func(string) func(string) error { return mkdir },
		"file": func(string) func(string) error {
			return func(p string) error { return os.WriteFile(p, []byte("x"), 0o600) }
		},
		"FIFO": func(string) func(string) error { return func(p string) error { return unix.Mkfifo(p, 0o600) } },
		"zero device": func(string) func(string) error {
			return func(p string) error { return unix.Mknod(p, unix.S_IFCHR|0o600, int(unix.Mkdev(1, 5))) }
		},
		"nothing": func(string) func(string) error { return nothing },
	}
	for _, place := range []string{"", "/keep.json", "/slots", "/slots/set.json", "/slots/passphrase.age", "/slots/recovery.age", "/volume"} {
		for kind, make := range kinds {
			if place == "" && kind == "symlink to the real one" {
				continue // a keep may be moved to another disk that way
			}
			exit := notWhatItWas
			if place == "" {
				exit = []int{2, 6, 8, 12}
			}
			l.try(t, attempt{name: "keep" + place + "/" + kind, exit: exit, bad: func(t *testing.T) func() {
				// swap moves the real one there.
				return l.swap(t, keepDir+place, make(fmt.Sprintf("/root/aside-%d", l.aside+1)))
			}})
		}
	}

	// What lies inside the volume: with the key, by stock fscrypt, as an attacker
	// could have done it who had the keep open once.
	unlocked := func(t *testing.T, script string) {
		l.Must(t, "root", `age -d -i `+fixture.RecoveryFile+` `+slotDir+`/recovery.age > /run/raw
			[ -e /etc/fscrypt.conf ] || fscrypt setup --quiet </dev/null >/dev/null
			fscrypt unlock `+keepDir+`/volume --key=/run/raw --quiet; rm /run/raw
			cd `+keepDir+`/volume; `+script+`
			cd /; fscrypt lock `+keepDir+`/volume --quiet`)
	}
	inside := func(script string) func(*testing.T) func() {
		return func(t *testing.T) func() {
			unlocked(t, "mv "+volume.ImageName+" good; "+script)
			return func() { unlocked(t, "rm -rf "+volume.ImageName+"; mv good "+volume.ImageName) }
		}
	}
	for name, script := range map[string]string{
		"symlink":        "ln -s good " + volume.ImageName,
		"symlink out":    "ln -s /root/victim/file " + volume.ImageName,
		"hard link":      "ln good " + volume.ImageName,
		"directory":      "mkdir " + volume.ImageName,
		"FIFO":           "mkfifo " + volume.ImageName,
		"device":         "mknod " + volume.ImageName + " b 7 200",
		"nothing":        "true",
		"empty file":     "touch " + volume.ImageName,
		"no file system": "truncate -s 64M " + volume.ImageName,
		"another one":    "truncate -s 64M " + volume.ImageName + "; mkfs.ext4 -q " + volume.ImageName,
		"xfs magic":      "truncate -s 64M " + volume.ImageName + "; printf XFSB | dd of=" + volume.ImageName + " conv=notrunc status=none",
		"half of it":     "cp --sparse=always good " + volume.ImageName + "; truncate -s 100M " + volume.ImageName,
	} {
		l.try(t, attempt{name: "image/" + name, bad: inside(script), exit: notWhatItWas})
	}
	l.opens(t)
}
