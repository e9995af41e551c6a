package realinput

import (
	"bytes"
	"crypto/sha256"
	"fmt"
	"io/fs"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"testing"

	"overkeep/overlay/drv/storepath"
	"overkeep/tests/fixture"
	"overkeep/tests/need"
)

// pkg is a package of the Debian archive.
type pkg struct {
	name, version string
	provides      []string
	wants         [][]string // each a list of alternatives
	needs         []string   // packages that are here, without circles
}

// path is one store path as it was made: part of a package, or of our own.
type path struct {
	path string
	name string // what follows the hash
	refs []string
}

// store is what was put into the machine's system store.
type store struct {
	paths  []path
	byPath map[string]*path
	main   map[string]string // of a package, or of what we added
	boot   string            // a system profile
	key    string            // that all is signed by but what is unsigned
	signed func(name string) bool
}

// archive is the tar of packages, made if need be.
func archive(t *testing.T) string {
	t.Helper()
	need.Tool(t, "mmdebstrap", "dpkg-deb", "flock", "tar")
	var msg bytes.Buffer
	cmd := exec.Command("./archive")
	cmd.Stderr = &msg
	out, err := cmd.Output()
	if err != nil {
		need.Missing(t, "packages of the Debian archive (%v: %s)", err, msg.Bytes())
	}
	return strings.TrimSpace(string(out))
}

// control reads the stanzas of packages.
func control(text string) map[string]*pkg {
	all := map[string]*pkg{}
	for stanza := range strings.SplitSeq(text, "\n\n") {
		field := map[string]string{}
		for line := range strings.SplitSeq(stanza, "\n") {
			if k, v, ok := strings.Cut(line, ": "); ok {
				field[k] = v
			}
		}
		if field["Package"] == "" {
			continue
		}
		p := &pkg{name: field["Package"], version: field["Version"]}
		names := func(list string, sep string) (out []string) {
			for word := range strings.SplitSeq(list, sep) {
				name, _, _ := strings.Cut(strings.TrimSpace(word), " ") // "(>= 1)"
				name, _, _ = strings.Cut(name, ":")                     // ":any"
				if name != "" {
					out = append(out, name)
				}
			}
			return out
		}
		p.provides = names(field["Provides"], ",")
		for _, f := range []string{"Pre-Depends", "Depends"} {
			for word := range strings.SplitSeq(field[f], ",") {
				if alt := names(word, "|"); len(alt) > 0 {
					p.wants = append(p.wants, alt)
				}
			}
		}
		all[p.name] = p
	}
	return all
}

// resolve finds the packages that dependencies mean; where they go in a circle, the
// edge that closes it is left out, for Nix's database has no circles.
func resolve(all map[string]*pkg) {
	of := map[string]string{}
	for _, name := range sorted(all) {
		for _, v := range all[name].provides {
			of[v] = name
		}
	}
	for name := range all {
		of[name] = name
	}
	state := map[string]int{} // 1 under way, 2 done
	var visit func(p *pkg)
	visit = func(p *pkg) {
		state[p.name] = 1
		for _, alternatives := range p.wants {
			for _, a := range alternatives {
				q := all[of[a]]
				if q == nil {
					continue
				}
				if state[q.name] == 0 {
					visit(q)
				}
				if state[q.name] == 2 && !slices.Contains(p.needs, q.name) {
					p.needs = append(p.needs, q.name)
				}
				break
			}
		}
		state[p.name] = 2
	}
	for _, name := range sorted(all) {
		if state[name] == 0 {
			visit(all[name])
		}
	}
}

func sorted[V any](m map[string]V) (keys []string) {
	for k := range m {
		keys = append(keys, k)
	}
	slices.Sort(keys)
	return keys
}

// storePath makes a store path of a name; the hash is nobody's but ours.
func storePath(name string) string {
	name = strings.Map(func(r rune) rune {
		if r >= 'a' && r <= 'z' || r >= 'A' && r <= 'Z' || r >= '0' && r <= '9' || strings.ContainsRune("+-._?=", r) {
			return r
		}
		return '-'
	}, name)
	const alphabet = "0123456789abcdfghijklmnpqrsvwxyz"
	sum := sha256.Sum256([]byte(name))
	hash := make([]byte, 32)
	for i := range hash {
		hash[i] = alphabet[sum[i]%32]
	}
	return storepath.Dir + "/" + string(hash) + "-" + name
}

// most is how many files a path has before its directories become paths of their own.
const most = 8

// build lays the packages into the machine's store and registers them with the real
// Nix, which makes the hashes.
func build(t *testing.T, k *fixture.Keep) *store {
	t.Helper()
	tar := archive(t)
	top := filepath.Join(k.Root, "nix", "real")
	if err := os.Mkdir(top, 0o700); err != nil {
		t.Fatal(err)
	}
	if out, err := exec.Command("tar", "-C", top, "-xf", tar).CombinedOutput(); err != nil {
		t.Fatalf("tar: %v: %s", err, out)
	}
	text, err := os.ReadFile(filepath.Join(top, "control"))
	if err != nil {
		t.Fatal(err)
	}
	all := control(string(text))
	resolve(all)
	s := &store{byPath: map[string]*path{}, main: map[string]string{}}
	for _, name := range sorted(all) {
		p := all[name]
		s.main[name] = storePath(name + "-" + p.version)
	}
	for _, name := range sorted(all) {
		p := all[name]
		b := &splitter{t: t, k: k, s: s, label: name + "-" + p.version}
		tree := filepath.Join(top, "tree", name)
		b.split(tree, nil)
		refs := append(b.pieces, s.main[name]) // itself, as programs do that know where they lie
		for _, n := range p.needs {
			refs = append(refs, s.main[n])
		}
		b.put(tree, s.main[name], refs)
	}
	s.own(t, k, "nixos-system-bed", "echo bed >nixos-version", []string{"dpkg", "perl-base", "openssl", "ca-certificates", "tar"})
	s.boot = s.main["nixos-system-bed"]
	s.own(t, k, "thesis-2026", "seq 1 100000 >text", []string{"libmoose-perl", "libdatetime-perl"})
	s.own(t, k, "acme-env", "mkdir bin; echo run >bin/run", []string{"npm", "eslint"})

	var reg strings.Builder
	for i := range s.paths {
		p := &s.paths[i]
		s.byPath[p.path] = p
		slices.Sort(p.refs)
		p.refs = slices.Compact(p.refs)
		fmt.Fprintf(&reg, "%s\n\n%d\n", p.path, len(p.refs))
		for _, r := range p.refs {
			reg.WriteString(r + "\n")
		}
	}
	k.Write(t, "/run/registration", reg.String())
	// What came from a cache is signed, what was built here is not.
	s.signed = func(name string) bool { return !strings.HasPrefix(name, "node-") && !strings.HasPrefix(name, "acme-") }
	s.key = k.Must(t, "root", `
		nix-store --register-validity --reregister </run/registration
		nix-store --generate-binary-cache-key real-1 /run/secret /run/public
		nix store sign --all --key-file /run/secret 2>/dev/null
		sqlite3 /nix/var/nix/db/db.sqlite "update ValidPaths set sigs = null, ultimate = 1 where substr(path, 45) like 'node-%' or substr(path, 45) like 'acme-%'"
		rm -r /nix/real
		cat /run/public`)
	return s
}

// own adds a path that is no package: a few files, and references to packages.
func (s *store) own(t *testing.T, k *fixture.Keep, name, script string, needs []string) {
	t.Helper()
	p := storePath(name)
	refs := make([]string, len(needs))
	for i, n := range needs {
		if refs[i] = s.main[n]; refs[i] == "" {
			t.Fatalf("no package %q", n)
		}
		script += "\nln -s " + refs[i] + " " + n
	}
	k.Must(t, "root", "mkdir "+p+"; cd "+p+"\n"+script)
	s.main[name] = p
	s.paths = append(s.paths, path{p, name, refs})
}

// splitter cuts one package into paths.
type splitter struct {
	t      *testing.T
	k      *fixture.Keep
	s      *store
	label  string
	pieces []string
}

// split makes paths of large directories, and takes them out of the tree. It returns
// how many files are left in it.
func (b *splitter) split(dir string, rel []string) (files int) {
	list, err := os.ReadDir(dir)
	if err != nil {
		b.t.Fatal(err)
	}
	for _, e := range list {
		if !e.IsDir() {
			files++
			continue
		}
		sub, below := filepath.Join(dir, e.Name()), append(slices.Clone(rel), e.Name())
		n := b.split(sub, below)
		documents := len(below) == 3 && slices.Contains([]string{"doc", "man", "locale"}, below[2])
		if n == 0 || len(below) < 3 || n < most && !documents {
			files += n
			continue
		}
		p := storePath(b.label + "-" + strings.Join(below[1:], "-"))
		if b.s.byPath[p] != nil { // another directory of nearly the same name
			files += n
			continue
		}
		b.put(sub, p, nil)
		if !documents {
			b.pieces = append(b.pieces, p)
		}
	}
	return files
}

// put moves a tree into the store.
func (b *splitter) put(tree, p string, refs []string) {
	if err := os.Rename(tree, b.k.Root+p); err != nil {
		b.t.Fatal(err)
	}
	_, name, _ := strings.Cut(filepath.Base(p), "-")
	b.s.paths = append(b.s.paths, path{p, name, refs})
	b.s.byPath[p] = &path{}
}

// closure is the runtime closure of paths.
func (s *store) closure(of ...string) map[string]bool {
	seen := map[string]bool{}
	for todo := of; len(todo) > 0; {
		p := todo[len(todo)-1]
		todo = todo[:len(todo)-1]
		if !seen[p] {
			seen[p] = true
			todo = append(todo, s.byPath[p].refs...)
		}
	}
	return seen
}

// files counts what the trees of the store hold; for the record.
func files(root string) (n int) {
	_ = filepath.WalkDir(root+storepath.Dir, func(_ string, d fs.DirEntry, err error) error {
		if err == nil && d.Type().IsRegular() {
			n++
		}
		return nil
	})
	return n
}
