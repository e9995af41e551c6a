package slot

import (
	"bytes"
	"errors"
	"io/fs"
	"net"
	"os"
	"path/filepath"
	"strings"
	"testing"

	"filippo.io/age"
	"golang.org/x/sys/unix"

	"overkeep/tests/need"
)

// substitutes puts something that is no file in the place of path.
var substitutes = map[string]func(t *testing.T, path string, content []byte){
	"dangling link": func(t *testing.T, path string, _ []byte) {
		if err := os.Symlink("/nonexistent", path); err != nil {
			t.Fatal(err)
		}
	},
	"link to the same content": func(t *testing.T, path string, b []byte) {
		target := filepath.Join(t.TempDir(), "copy")
		overwrite(t, target, b)
		if err := os.Symlink(target, path); err != nil {
			t.Fatal(err)
		}
	},
	"fifo": func(t *testing.T, path string, _ []byte) {
		if err := unix.Mkfifo(path, 0o600); err != nil {
			t.Fatal(err)
		}
	},
	"directory": func(t *testing.T, path string, _ []byte) {
		if err := os.Mkdir(path, 0o700); err != nil {
			t.Fatal(err)
		}
	},
	"socket": func(t *testing.T, path string, _ []byte) {
		old, err := os.Getwd() // a socket's path is at most 108 bytes
		if err != nil {
			t.Fatal(err)
		}
		t.Chdir(filepath.Dir(path))
		defer t.Chdir(old)
		l, err := net.Listen("unix", filepath.Base(path))
		if err != nil {
			t.Fatal(err)
		}
		t.Cleanup(func() { l.Close() })
	},
	"device": func(t *testing.T, path string, _ []byte) {
		need.Root(t)
		if err := unix.Mknod(path, unix.S_IFCHR|0o600, int(unix.Mkdev(1, 5))); err != nil { // /dev/zero
			t.Fatal(err)
		}
	},
}

func TestLoadSubstitutes(t *testing.T) {
	for what, put := range substitutes {
		t.Run(what, func(t *testing.T) {
			for _, file := range []string{setFile, "alice.age", "extra.age"} {
				k := newKeep(t)
				var content []byte
				if file != "extra.age" {
					content = read(t, k.path(file))
					if err := os.Remove(k.path(file)); err != nil {
						t.Fatal(err)
					}
				}
				put(t, k.path(file), content)
				_, files, err := Load(k.dir)
				switch file {
				case setFile:
					tamper(t, err, "", NotRegular)
				case "alice.age":
					if err != nil || len(files.Findings) != 1 {
						t.Fatal(err, files.Findings)
					}
					tamper(t, files.Findings[0], "alice", NotRegular)
				default:
					if err != nil || len(files.Findings) != 1 {
						t.Fatal(err, files.Findings)
					}
					tamper(t, files.Findings[0], "extra", Planted)
				}
				if _, err := k.open(t, identities(k.laptop), ""); err == nil {
					t.Errorf("opened with a %s as %s", what, file)
				}
			}
		})
	}
}

// What Load and Open make of damage: the finding, whether another slot opens when
// the user accepts the finding, and what the damaged slot does.
func TestDamage(t *testing.T) {
	for what, tt := range map[string]struct {
		damage       func(t *testing.T, k *keep)
		slot, reason string
		ignore       string
	}{
		"removed": {func(t *testing.T, k *keep) { os.Remove(k.path("alice.age")) }, "alice", Removed, "alice"},
		"emptied": {func(t *testing.T, k *keep) { overwrite(t, k.path("alice.age"), nil) }, "alice", Changed, "alice"},
		"changed": {func(t *testing.T, k *keep) {
			b := read(t, k.path("alice.age"))
			b[len(b)/2] ^= 1
			overwrite(t, k.path("alice.age"), b)
		}, "alice", Changed, "alice"},
		"swapped": {func(t *testing.T, k *keep) {
			overwrite(t, k.path("alice.age"), read(t, k.path("recovery.age")))
		}, "alice", Swapped, "alice"},
		"an older file": {func(t *testing.T, k *keep) {
			b, err := Wrap(k.master, k.laptop.Recipient())
			if err != nil {
				t.Fatal(err)
			}
			overwrite(t, k.path("alice.age"), b)
		}, "alice", Changed, "alice"},
		"too large": {func(t *testing.T, k *keep) {
			overwrite(t, k.path("alice.age"), make([]byte, MaxFileSize+1))
		}, "alice", TooLarge, "alice"},
		"huge and sparse": {func(t *testing.T, k *keep) {
			if err := os.Truncate(k.path("alice.age"), 1<<40); err != nil {
				t.Fatal(err)
			}
		}, "alice", TooLarge, "alice"},
		"planted slot": {func(t *testing.T, k *keep) {
			overwrite(t, k.path("mallory.age"), read(t, k.path("alice.age")))
		}, "mallory", Planted, "mallory"},
		"planted file":   {func(t *testing.T, k *keep) { overwrite(t, k.path("set.json~"), nil) }, "", Planted, "set.json~"},
		"planted hidden": {func(t *testing.T, k *keep) { overwrite(t, k.path(".alice.age"), nil) }, "", Planted, ".alice.age"},
		"planted 255": {func(t *testing.T, k *keep) {
			overwrite(t, k.path(strings.Repeat("a", 255)), nil)
		}, "", Planted, strings.Repeat("a", 255)},
		"planted newline": {func(t *testing.T, k *keep) { overwrite(t, k.path("a\n\x1b[2J"), nil) }, "", Planted, "a\n\x1b[2J"},
	} {
		t.Run(what, func(t *testing.T) {
			k := newKeep(t)
			tt.damage(t, k)
			_, files := k.load(t)
			if len(files.Findings) != 1 {
				t.Fatalf("findings %v", files.Findings)
			}
			if strings.ContainsAny(files.Findings[0].Error(), "\n\x1b") {
				t.Errorf("a name goes raw to the terminal: %q", files.Findings[0].Error())
			}
			_, err := k.open(t, identities(k.laptop), "")
			tamper(t, err, tt.slot, tt.reason)
			_, err = k.open(t, identities(k.laptop), "laptop")
			tamper(t, err, tt.slot, tt.reason)

			keys := identities(k.laptop)
			keys.IgnoreDamaged = []string{"laptop", "recovery", "*", ""}
			_, err = k.open(t, keys, "")
			tamper(t, err, tt.slot, tt.reason)
			keys.IgnoreDamaged = []string{tt.ignore}
			if name, err := k.open(t, keys, ""); err != nil || name != "laptop" {
				t.Errorf("with the finding accepted: %q %v", name, err)
			}
			if tt.ignore == "alice" {
				pass := Keys{Passphrase: k.pass, IgnoreDamaged: keys.IgnoreDamaged}
				if _, err := k.open(t, pass, ""); !errors.Is(err, ErrNoSlot) {
					t.Errorf("the damaged slot: %v", err)
				}
				_, err := k.open(t, pass, "alice")
				tamper(t, err, "alice", tt.reason)
			}
			// The MAC of the list is never ignored.
			b := read(t, k.path(setFile))
			overwrite(t, k.path(setFile), bytes.Replace(b, []byte(`"confirmed": false`), []byte(`"confirmed": true`), 1))
			_, err = k.open(t, keys, "")
			tamper(t, err, "laptop", BadMAC)
		})
	}
}

// After the user has accepted the damage, the next Commit heals the set.
func TestHeal(t *testing.T) {
	k := newKeep(t)
	overwrite(t, k.path("alice.age"), []byte("rot"))
	overwrite(t, k.path("mallory.age"), []byte("planted"))
	s, files := k.load(t)
	m, _, err := s.Open(files, Keys{Identities: []age.Identity{k.laptop}, IgnoreDamaged: []string{"alice", "mallory"}}, "")
	if err != nil {
		t.Fatal(err)
	}
	next, err := s.Remove("alice", false)
	if err != nil {
		t.Fatal(err)
	}
	if err := Commit(k.dir, next, files.Content, m); err != nil {
		t.Fatal(err)
	}
	if name, err := k.open(t, identities(k.laptop), ""); err != nil || name != "laptop" {
		t.Errorf("%q %v", name, err)
	}
}

func TestLoadRefuses(t *testing.T) {
	k := newKeep(t)
	if _, _, err := Load(k.dir + ".none"); !errors.Is(err, fs.ErrNotExist) {
		t.Errorf("no directory: %v", err)
	}
	link := k.dir + ".link"
	if err := os.Symlink(k.dir, link); err != nil {
		t.Fatal(err)
	}
	if _, _, err := Load(link); err == nil {
		t.Error("followed a link to the directory")
	}
	if _, _, err := Load(k.path(setFile)); err == nil {
		t.Error("loaded a file as a directory")
	}
	empty := t.TempDir()
	_, _, err := Load(empty)
	tamper(t, err, "", Removed)
	overwrite(t, filepath.Join(empty, setFile), make([]byte, MaxSetSize+1))
	_, _, err = Load(empty)
	tamper(t, err, "", TooLarge)
	for i := range maxEntries {
		overwrite(t, k.path("x"+strings.Repeat("y", i%200)+string(rune('a'+i/200))), nil)
	}
	var e *TamperError
	if _, _, err := Load(k.dir); !errors.As(err, &e) || e.Reason != Planted {
		t.Errorf("a directory of %d files: %v", maxEntries+4, err)
	}
}

// A slot that opens to another key is refused by name: a decoy, listed and hashed
// properly, encrypted to the user's own public key.
func TestDecoy(t *testing.T) {
	k := newKeep(t)
	decoy, err := Wrap(newMaster(t), k.laptop.Recipient())
	if err != nil {
		t.Fatal(err)
	}
	x, _ := k.set.Lookup("laptop")
	overwrite(t, k.path("laptop.age"), decoy)
	overwrite(t, k.path(setFile), bytes.Replace(read(t, k.path(setFile)), []byte(x.SHA256), []byte(hash(decoy)), 1))
	_, err = k.open(t, identities(k.laptop), "")
	tamper(t, err, "laptop", BadMAC)
	_, err = k.open(t, Keys{Passphrase: k.pass}, "")
	tamper(t, err, "alice", BadMAC)
}

// Whatever single bit of set.json is flipped, wherever it is cut: the set does not
// open.
func TestDamagedSet(t *testing.T) {
	k := newKeep(t)
	good := read(t, k.path(setFile))
	try := func(what string, n int, b []byte) {
		os.Remove(k.path(setFile)) // ext4 flushes a file that is truncated and rewritten
		overwrite(t, k.path(setFile), b)
		name, err := k.open(t, identities(k.laptop), "")
		if err == nil {
			t.Errorf("%s at %d (%q): slot %q opened", what, n, good[max(0, n-5):min(len(good), n+5)], name)
		}
	}
	// The final newline may go: JSON allows white space, and no field changes.
	for n := range len(good) - 1 {
		try("truncation", n, good[:n])
	}
	for bit := range 8 * len(good) {
		b := bytes.Clone(good)
		c := b[bit/8] ^ 1<<(bit%8)
		if strings.ContainsRune(" \n", rune(b[bit/8])) && strings.ContainsRune(" \n\t\r", rune(c)) {
			continue // white space for white space
		}
		b[bit/8] = c
		try("flipped bit", bit/8, b)
	}
	overwrite(t, k.path(setFile), good)
	if _, err := k.open(t, identities(k.laptop), ""); err != nil {
		t.Error(err)
	}
}
