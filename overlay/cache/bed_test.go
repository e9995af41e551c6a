package cache_test

import (
	"bytes"
	"crypto/sha256"
	"encoding/json"
	"fmt"
	"os"
	"path/filepath"
	"strings"
	"testing"

	"overkeep/overlay/cache"
	"overkeep/overlay/drv/storepath"
	"overkeep/overlay/tree"
	"overkeep/tests/bed"
)

// nasty makes a tree with what a store path may hold, and what it may not keep.
const nasty = `mkdir -p /run/n/sub/sub /run/n/empty; cd /run/n
printf x > "$(printf 'n%.0s' {1..255})"
for n in a a.b a-b 'a b' B Z z é $'\x01' $'\xff\xfe' '~nix~case~hack~1' $'new\nline'; do echo "$n" > "order-$n"; done
for s in 0 1 7 8 9 4095 4096 4097 262143 262144 262145 3000000; do head -c $s /dev/urandom > size-$s; done
echo '#!/bin/sh' > exec; chmod 755 exec; ln exec hard; chmod 4654 size-1
ln -s loop-b loop-a; ln -s loop-a loop-b; ln -s . self; ln -s /etc/passwd out; ln -s "$(printf 'x/%.0s' {1..2000})" far
truncate -s 5M hole; truncate -s 1000077 hole-data; printf data | dd of=hole-data bs=1 seek=700001 conv=notrunc status=none
head -c 1000000 /dev/zero > zeros; echo deep > sub/sub/file
for i in {1..3000}; do echo $i > sub/many-$i; done`

func out(t *testing.T, m *bed.Machine, script string) string {
	t.Helper()
	r, err := m.Exec(bed.Command{Script: script, Env: []string{"NIX_CONFIG=experimental-features = nix-command"}})
	if err != nil || r.Code != 0 {
		t.Fatalf("%s: code %d, %v\n%s%s", script, r.Code, err, r.Stdout, r.Stderr)
	}
	return strings.TrimSpace(r.Stdout)
}

func open(t *testing.T, path string) *os.File {
	t.Helper()
	f, err := os.Open(path)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { f.Close() })
	return f
}

// What we copy, hash and write out is, to a real Nix, what it was.
func TestWithNix(t *testing.T) {
	for _, suite := range bed.Suites {
		t.Run(string(suite), func(t *testing.T) {
			m := bed.Start(t, suite)
			out(t, m, nasty)
			run, store := open(t, filepath.Join(m.Root, "run")), open(t, filepath.Join(m.Root, "nix/store"))

			// One NAR, by Nix and by us, of the source and of our copy; and what Nix unpacks.
			r, err := tree.Copy(t.Context(), run, "n", run, "copy", tree.Options{})
			if err != nil {
				t.Fatal(err)
			}
			out(t, m, "nix-store --dump /run/n > /run/nar; nix-store --restore /run/theirs < /run/nar")
			for _, name := range []string{"n", "copy"} {
				if got := out(t, m, "nix-store --dump /run/"+name+" | sha256sum"); got != fmt.Sprintf("%x  -", r.NarHash) {
					t.Errorf("%s: Nix says %s, we %x", name, got, r.NarHash)
				}
			}
			theirs := []byte(m.Read(t, "/run/nar"))
			var ours bytes.Buffer
			if _, err := tree.Dump(t.Context(), &ours, run, "copy", tree.Options{}); err != nil || !bytes.Equal(ours.Bytes(), theirs) {
				t.Errorf("our dump (%v) is not that of Nix", err)
			}
			if back, err := tree.Restore(t.Context(), bytes.NewReader(theirs), run, "restored", tree.Options{}); err != nil || back.NarHash != r.NarHash {
				t.Errorf("restored: %v, %x", err, back.NarHash)
			}
			out(t, m, "diff -r --no-dereference /run/theirs /run/restored && diff -r --no-dereference /run/theirs /run/copy")

			// A copy put in the place of a path is as Nix makes it: nothing to repair, in modes and
			// times as well.
			path := out(t, m, "nix-store --add /run/n")
			name := filepath.Base(path)
			list := "cd " + path + "; find . -printf '%p %y %m %U:%G %T@ %n\\n' | sort"
			was := out(t, m, list)
			if _, err := tree.Copy(t.Context(), store, name, store, "again", tree.Options{}); err != nil {
				t.Fatal(err)
			}
			if err := tree.Remove(t.Context(), store, name); err != nil {
				t.Fatal(err)
			}
			out(t, m, "mv /nix/store/again "+path)
			// A directory's size, and so nothing of this listing, may differ.
			if is := out(t, m, list); is != was {
				t.Errorf("Nix's path (-) and ours (+) differ:\n%.2000s\n%.2000s", was, is)
			}

			// Out as a cache, and back by nix copy into another store.
			refers := out(t, m, fmt.Sprintf(`nix-build --no-out-link -E 'derivation { name = "refers"; system = builtins.currentSystem; builder = "/bin/sh";
				args = [ "-c" "echo $out ${builtins.storePath "%s"} > $out" ]; }' && nix-store --generate-binary-cache-key k-1 /run/secret /run/public && nix store sign --key-file /run/secret %[1]s`, path))
			infos := []cache.Info{info(t, m, path), info(t, m, refers), info(t, m, out(t, m, "nix-store --query --deriver "+refers))}
			to := filepath.Join(m.Root, "srv/cache")
			if err := os.Mkdir(to, 0o700); err != nil {
				t.Fatal(err)
			}
			if err := cache.Write(t.Context(), open(t, to), store, infos, cache.Options{}); err != nil {
				t.Fatal(err)
			}
			copyBack := "nix copy --no-check-sigs --from file:///srv/cache --to 'local?root=/srv/other' " + path + " " + refers + " && NIX_REMOTE='local?root=/srv/other' nix-store --verify --check-contents"
			out(t, m, copyBack)
			jsons := []string{"nix path-info --json " + path + " " + refers, "nix path-info --store 'local?root=/srv/other' --json " + path + " " + refers}
			var both [2]map[string]map[string]any
			for i, script := range jsons {
				if err := json.Unmarshal([]byte(out(t, m, script)), &both[i]); err != nil {
					t.Fatal(err)
				}
				for _, p := range both[i] {
					delete(p, "registrationTime")
					delete(p, "ultimate")
				}
			}
			if a, b := fmt.Sprint(both[0]), fmt.Sprint(both[1]); a != b || len(both[0]) != 2 {
				t.Errorf("before: %s\nafter: %s", a, b)
			}

			// Of our files Nix itself reads the damage of one.
			nar := filepath.Join(to, "nar", storepath.Base32(infos[0].NarHash[:])+".nar")
			b, err := os.ReadFile(nar)
			if err != nil {
				t.Fatal(err)
			}
			if sha256.Sum256(b) != infos[0].NarHash {
				t.Error("an archive has another hash")
			}
			b[len(b)/2] ^= 1
			if err := os.WriteFile(nar, b, 0o600); err != nil {
				t.Fatal(err)
			}
			r2, err := m.Exec(bed.Command{Script: strings.ReplaceAll(copyBack, "/srv/other", "/srv/third"), Env: []string{"NIX_CONFIG=experimental-features = nix-command"}})
			if err != nil || r2.Code == 0 {
				t.Errorf("a damaged archive is taken: %v %s", err, r2.Stderr)
			}
		})
	}
}

// info asks Nix for the facts of a path.
func info(t *testing.T, m *bed.Machine, path string) cache.Info {
	t.Helper()
	var all map[string]struct {
		NarHash    json.RawMessage
		NarSize    int64
		References []string
		Signatures []string
		Deriver    string
		CA         json.RawMessage
	}
	text := out(t, m, "nix path-info --json "+path)
	if err := json.Unmarshal([]byte(text), &all); err != nil {
		t.Fatalf("%v\n%s", err, text)
	}
	i, ok := all[path]
	if !ok {
		t.Fatalf("%s is not in %s", path, text)
	}
	word := func(raw json.RawMessage) (s string) {
		if len(raw) > 0 && string(raw) != "null" {
			if err := json.Unmarshal(raw, &s); err != nil {
				t.Fatalf("%v\n%s", err, text)
			}
		}
		return s
	}
	h, err := storepath.ParseHash(word(i.NarHash))
	if err != nil {
		t.Fatal(err)
	}
	return cache.Info{Path: path, NarHash: [32]byte(h.Sum), NarSize: i.NarSize, Refs: i.References, Deriver: i.Deriver, Sigs: i.Signatures, CA: word(i.CA)}
}
