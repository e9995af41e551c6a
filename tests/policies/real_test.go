package policies

import (
	"archive/tar"
	"bytes"
	"context"
	"crypto/ed25519"
	"crypto/sha256"
	"encoding/base64"
	"encoding/binary"
	"encoding/json"
	"errors"
	"flag"
	"fmt"
	"io"
	"maps"
	"os"
	"os/exec"
	"path"
	"path/filepath"
	"regexp"
	"slices"
	"strings"
	"testing"

	"overkeep/overlay/drv"
	"overkeep/overlay/facts"
	"overkeep/overlay/verdict"
	"overkeep/policy"
	"overkeep/policy/graph"
	"overkeep/tests/need"
	"overkeep/tests/storegen"
)

var update = flag.Bool("update", false, "write the golden files anew")

// machine is the root directory of a machine with the real database, its derivation
// files and outputs for all of them:
//
//   - an output refers to those outputs of its derivation's inputs that its environment
//     names (but for what only builds: stdenv, nativeBuildInputs, sources), and to the libc
//     of its stdenv; further outputs refer to the first;
//   - what may not be substituted was built here, all else is signed by a test key;
//   - the system that is running is the NixOS-like one that the data have.
type machine struct {
	root  string
	store *storegen.Store
	drvs  map[string]*drv.Derivation // by base name
}

func (m *machine) db() string { return filepath.Join(m.root, verdict.SystemDB) }

const (
	keyName = "cache.nixos.org-1" // the test key stands in its place
	system  = "295nyz7d4521wmx3hwd1braccl586w92-ekaos-system-ekaos"
)

func realMachine(t *testing.T) *machine {
	t.Helper()
	m := &machine{root: t.TempDir(), drvs: map[string]*drv.Derivation{}}
	store := filepath.Join(m.root, storegen.StoreDir)
	must(t, os.MkdirAll(store, 0o755))
	r := tar.NewReader(bytes.NewReader(need.DataZstd(t, "real-drvs.tar.zst")))
	for {
		h, err := r.Next()
		if err == io.EOF {
			break
		}
		must(t, err)
		base := path.Base(h.Name)
		if !strings.HasSuffix(base, drv.Ext) {
			continue
		}
		b, err := io.ReadAll(r)
		must(t, err)
		d, err := drv.ParseAt(strings.TrimSuffix(storegen.StoreDir, "/"), storegen.StoreDir+base, b)
		must(t, err)
		m.drvs[base] = d
		must(t, os.WriteFile(filepath.Join(store, base), b, 0o644))
	}
	file := filepath.Join(t.TempDir(), "db.sqlite")
	must(t, os.WriteFile(file, need.DataZstd(t, "real.sqlite.zst"), 0o600))
	var err error
	m.store, err = storegen.Read(context.Background(), file)
	must(t, err)
	m.addOutputs(t)
	must(t, os.MkdirAll(filepath.Dir(m.db()), 0o755))
	must(t, m.store.Write(context.Background(), filepath.Dir(m.db())))
	for at, base := range map[string]string{"run/current-system": system, "nix/var/nix/profiles/default": "r726g1240cz8553qac0caf76lj0r4ddj-curl-8.17.0"} {
		at = filepath.Join(m.root, at)
		must(t, os.MkdirAll(filepath.Dir(at), 0o755))
		must(t, os.Symlink(storegen.StoreDir+base, at))
	}
	return m
}

func must(t testing.TB, err error) {
	t.Helper()
	if err != nil {
		t.Fatal(err)
	}
}

// buildOnly are the variables of a derivation that name what its outputs do not keep.
var buildOnly = []string{"stdenv", "nativeBuildInputs", "propagatedNativeBuildInputs", "depsBuildBuild", "depsBuildTarget", "src", "srcs", "patches",
	"nativeCheckInputs", "builder", "args"}

var storePath = regexp.MustCompile(`/nix/store/([0-9a-z]{32}-[0-9A-Za-z+._?=-]+)`)

func (m *machine) addOutputs(t *testing.T) {
	t.Helper()
	type made struct {
		by    int // index of the derivation
		first string
	}
	by := map[string]made{} // by base of the output
	var order []string
	inputs := len(m.store.Paths)
	for i := range inputs {
		d := m.drvs[m.store.Paths[i].Base]
		if d == nil {
			continue
		}
		first := path.Base(d.Outputs[0].Path)
		for _, o := range d.Outputs {
			if o.Name == "out" {
				first = path.Base(o.Path)
			}
		}
		for _, o := range d.Outputs {
			base := path.Base(o.Path)
			if _, twice := by[base]; !twice { // two derivations may fetch the same
				by[base] = made{i, first}
				order = append(order, base)
			}
		}
	}
	index := map[string]int32{}
	for k, base := range order {
		index[base] = int32(inputs + k)
	}
	for _, base := range order {
		of := by[base]
		d := m.drvs[m.store.Paths[of.by].Base]
		p := storegen.Path{ID: int64(len(m.store.Paths) + 1), Base: base, Hash: sha256.Sum256([]byte(base)), Time: 1_700_000_000, Deriver: of.by}
		p.NarSize = int64(binary.LittleEndian.Uint32(p.Hash[:])%(8<<20))&^7 + 120
		local, has := d.Var("allowSubstitutes")
		p.Ultimate = has && local == ""
		if d.Outputs[0].Kind() == drv.Fixed {
			p.CA = "fixed:r:sha256:" + strings.Repeat("0", 52)
		} else {
			for _, ref := range m.keeps(d, func(b string) bool { _, ok := by[b]; return ok }) {
				p.Refs = append(p.Refs, index[ref])
			}
			if base != of.first {
				p.Refs = append(p.Refs, index[of.first])
			}
			slices.Sort(p.Refs)
			p.Refs = slices.Compact(p.Refs)
		}
		m.store.Paths = append(m.store.Paths, p)
	}
	for i := range inputs {
		if d := m.drvs[m.store.Paths[i].Base]; d != nil {
			for _, o := range d.Outputs {
				m.store.Paths[i].Outs = append(m.store.Paths[i].Outs, index[path.Base(o.Path)])
			}
		}
	}
	for i := inputs; i < len(m.store.Paths); i++ {
		if p := &m.store.Paths[i]; !p.Ultimate {
			sig := ed25519.Sign(storegen.KeyNamed(keyName), []byte(m.store.Fingerprint(p)))
			p.Sigs = keyName + ":" + base64.StdEncoding.EncodeToString(sig)
		}
	}
}

// keeps are the outputs of the inputs of a derivation that its own outputs refer to.
func (m *machine) keeps(d *drv.Derivation, isOutput func(base string) bool) []string {
	inputs := map[string]*drv.Derivation{}
	for _, in := range d.InputDrvs {
		from := m.drvs[path.Base(in.Path)]
		for _, o := range from.Outputs {
			inputs[path.Base(o.Path)] = from
		}
	}
	out := map[string]bool{}
	for _, v := range d.Env {
		if slices.Contains(buildOnly, v.Name) {
			continue
		}
		for _, match := range storePath.FindAllStringSubmatch(v.Value, -1) {
			if inputs[match[1]] != nil {
				out[match[1]] = true
			}
		}
	}
	stdenv, _ := d.Var("stdenv")
	if from := inputs[path.Base(stdenv)]; from != nil {
		for _, in := range from.InputDrvs {
			if libc, ok := m.drvs[path.Base(in.Path)].Var("libc_lib"); ok && isOutput(path.Base(libc)) {
				out[path.Base(libc)] = true
			}
		}
	}
	return slices.Sorted(maps.Keys(out))
}

// golden compares with a file of testdata, or writes it.
func golden(t *testing.T, name, got string) {
	t.Helper()
	file := filepath.Join("testdata", name)
	if *update {
		must(t, os.MkdirAll(filepath.Dir(file), 0o755))
		must(t, os.WriteFile(file, []byte(got), 0o644))
		return
	}
	want, err := os.ReadFile(file)
	must(t, err)
	if string(want) != got {
		t.Errorf("%s is otherwise (-update writes it anew):\n%s", file, diff(string(want), got))
	}
}

// diff are the lines that only one of two texts has.
func diff(a, b string) string {
	var out []string
	x, y := strings.Split(a, "\n"), strings.Split(b, "\n")
	for _, l := range x {
		if !slices.Contains(y, l) {
			out = append(out, "- "+l)
		}
	}
	for _, l := range y {
		if !slices.Contains(x, l) {
			out = append(out, "+ "+l)
		}
	}
	return strings.Join(out, "\n")
}

// declared are the keys of a policy's text; the test key of the same name takes the
// place of each.
var declared = regexp.MustCompile(`(?m)^key ([^:\s]+):\S+$`)

func withTestKeys(s policy.Source) policy.Source {
	s.Text = declared.ReplaceAllFunc(s.Text, func(line []byte) []byte {
		return []byte("key " + storegen.PublicKey(string(declared.FindSubmatch(line)[1])))
	})
	return s
}

// onReal are the policies that real data are decided by: some of the ten people's, and
// others in testdata/real that speak of names that are there. For each, paths whose
// reasons are told.
var onReal = []struct {
	name string // in docs/policies, or in testdata/real
	why  []string
}{
	{"student", []string{"r726g1240cz8553qac0caf76lj0r4ddj", storegen.StoreDir + "m1mz5c22l426jrws24spih7zxv0qjxa7-etc.drv"}},
	{"gamer", []string{storegen.StoreDir + system + "/init", "vhpbli29sh2vi38xy59wiwwxvdmkd84q"}},
	{"ci", []string{"1g8110xbmxz6kkgkp8kivq9xksb5hf5z-system-path"}},
	{"company", []string{"5jb9na2c6rk6ycsqaf9h2vriskkjb56r"}},
	{"hidden", []string{"csyvif4bk9dk7ajr6jdanj0pwi55awlp", system}},
	{"flow", []string{"j8bli1d742w2apl375bwy1hiwr4770fd", "g1gkywblr4gdw04kdip4k47cmgg9zhgc"}},
	{"fetched", []string{"13vkic2v8zac4m6p38asdhasb3xylv07", "73g7rnzq9ca43iy81d83h7w8v5fhn5xs"}},
	{"strict", []string{"21ga1i6b0q0vb0dq0rr7zn809crr7xaf", "00fgymr1pcbs58v3nb6i67a8rgrh815n"}},
	{"reach", []string{"45iq73bz4fa7g3jkyhg6bqggprdsh253"}},
}

// The verdicts of nine policies over the database and the derivations of real
// packages, through the loader, with signatures that really verify.
func TestReal(t *testing.T) {
	m := realMachine(t)
	bin := command(t)
	for _, c := range onReal {
		t.Run(c.name, func(t *testing.T) {
			sources := realSources(t, c.name)
			p := parse(t, sources)
			w, err := verdict.Load(context.Background(), verdict.Input{Root: m.root,
				Stores: []facts.Store{{DB: m.db(), Layer: graph.Lower}}}, p)
			must(t, err)
			defer w.Close()
			v := w.Decide(p)
			golden(t, "real/"+c.name+".counts", counts(w, v))

			args := []string{"why", "--db", m.db()}
			for _, s := range sources {
				file := filepath.Join(t.TempDir(), filepath.Base(s.Name))
				must(t, os.WriteFile(file, s.Text, 0o644))
				args = append(args, "--policy", file)
			}
			args = append(args, c.why...)
			golden(t, "real/"+c.name+".why", run(t, bin, args...))
			// The command loads what it needs to know of these paths, and comes to the same.
			told := whyJSON(t, run(t, bin, append(args, "--json")...))
			if len(told) != len(c.why) {
				t.Errorf("%d paths for %q", len(told), c.why)
			}
			for path, got := range told {
				id := w.Index.Path(path)
				if reason, _ := v.Reason(id); got != [2]string{place(v, id), reason.String()} {
					t.Errorf("%s: why says %q, of the whole store it is %s, %s", path, got, place(v, id), reason)
				}
			}
		})
	}
}

// whyJSON is placement and reason of each path that "why" explains.
func whyJSON(t *testing.T, text string) map[string][2]string {
	t.Helper()
	var r struct {
		Paths []struct{ Path, Placement, Reason string }
	}
	must(t, json.Unmarshal([]byte(text), &r))
	out := map[string][2]string{}
	for _, p := range r.Paths {
		out[p.Path] = [2]string{p.Placement, p.Reason}
	}
	return out
}

func realSources(t *testing.T, name string) []policy.Source {
	for _, one := range people(t) {
		if one.name != name {
			continue
		}
		var out []policy.Source
		for _, s := range one.sources {
			out = append(out, withTestKeys(s))
		}
		return out
	}
	b, err := os.ReadFile(filepath.Join("testdata", "real", name+".policy"))
	must(t, err)
	return []policy.Source{withTestKeys(policy.Source{Name: name + ".policy", Text: b, Root: true})}
}

// counts tells what a policy does to a store, in numbers.
func counts(w *verdict.World, v *policy.Verdicts) string {
	var b strings.Builder
	g, p := w.Graph, v.Policy()
	type total struct {
		paths int
		bytes int64
	}
	of := map[policy.Reason]total{}
	lines := make([]int, len(p.Rules))
	for id := range graph.ID(g.Len()) {
		reason, rule := v.Reason(id)
		t := of[reason]
		of[reason] = total{t.paths + 1, t.bytes + g.NarSize[id]}
		if rule != policy.NoRule {
			lines[rule]++
		}
	}
	fmt.Fprintf(&b, "%d paths, %d signatures verified, %d bad\n", g.Len(), w.Signatures.Verified, w.Signatures.Bad)
	for r := policy.Granted; r <= policy.Reference; r++ {
		if t := of[r]; t.paths > 0 {
			fmt.Fprintf(&b, "%-13s %5d paths %12d bytes\n", r, t.paths, t.bytes)
		}
	}
	fmt.Fprintf(&b, "\ndecided  yes unknown  line\n")
	for i, r := range p.Rules {
		fmt.Fprintf(&b, "%7d %4d %7d  %s\n", lines[i], v.Stats[i].Yes, v.Stats[i].Unknown, r.Text)
	}
	r := v.Check(policy.CheckOptions{})
	for _, x := range r.Broken {
		fmt.Fprintf(&b, "\nbroken: %s: %d paths, %d unknown, %d unresolved\n", p.Rules[x.Rule].Text, len(x.Paths), x.Unknown, len(x.Unresolved))
	}
	for _, x := range r.Reach[:min(3, len(r.Reach))] {
		fmt.Fprintf(&b, "\nreach: %s pulls %d paths, %d bytes\n", g.Name(x.ID), x.Pulls.Paths, x.Pulls.Bytes)
	}
	for _, x := range r.Hanging {
		fmt.Fprintf(&b, "\nwhen known: %s: %d direct, %d would move\n", p.Rules[x.Rule].Text, x.Direct, x.Moves.Paths)
	}
	fmt.Fprintf(&b, "\npersonal for the unknown: %d paths\n", r.OnlyFor.Paths)
	return b.String()
}

// command builds overkeep as "make build" does, but for its being static.
func command(t *testing.T) string {
	t.Helper()
	need.Tool(t, "go")
	bin := filepath.Join(t.TempDir(), "overkeep")
	cmd := exec.Command("go", "build", "-tags", "osusergo,netgo,sqlite_omit_load_extension", "-o", bin, "overkeep/cmd/overkeep")
	if out, err := cmd.CombinedOutput(); err != nil {
		t.Fatalf("%v\n%s", err, out)
	}
	return bin
}

func run(t *testing.T, bin string, args ...string) string {
	t.Helper()
	out, err := exec.Command(bin, args...).Output()
	var exit *exec.ExitError
	if errors.As(err, &exit) {
		t.Fatalf("%q: %v\n%s", args, err, exit.Stderr)
	}
	must(t, err)
	return string(out)
}
