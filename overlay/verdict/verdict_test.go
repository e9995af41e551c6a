package verdict

import (
	"context"
	"crypto/ed25519"
	"encoding/base64"
	"errors"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"

	"overkeep/overlay/facts"
	"overkeep/overlay/layout"
	"overkeep/overlay/signature"
	"overkeep/policy"
	"overkeep/policy/graph"
	"overkeep/tests/storegen"
)

const testKey = "test.example.org-1"

func publicKey() string {
	return testKey + ":" + base64.StdEncoding.EncodeToString(storegen.Key().Public().(ed25519.PublicKey))
}

// generated is a store with signatures, as an Input without a keep.
func generated(t *testing.T, o storegen.Options) (Input, *storegen.Store) {
	t.Helper()
	dir := t.TempDir()
	s, err := storegen.Write(t.Context(), dir, o)
	if err != nil {
		t.Fatal(err)
	}
	return Input{Root: t.TempDir(), Stores: []facts.Store{{DB: filepath.Join(dir, "db.sqlite"), Layer: graph.Lower}}}, s
}

func parse(t *testing.T, text string) *policy.Policy {
	t.Helper()
	p, err := policy.Parse(policy.Source{Name: "policy", Text: []byte(text), Root: true})
	if err != nil {
		t.Fatal(err)
	}
	return p
}

// The graph knows who signed what, by verification: a signature over other facts, or
// under another key of the same name, counts for nothing.
func TestSignatures(t *testing.T) {
	in, s := generated(t, storegen.Options{Paths: 400, Signed: 0.5})
	in.Memory = filepath.Join(t.TempDir(), "signatures")
	if err := os.Chmod(filepath.Dir(in.Memory), 0o700); err != nil {
		t.Fatal(err)
	}
	other, _, err := ed25519.GenerateKey(nil)
	if err != nil {
		t.Fatal(err)
	}
	right := parse(t, "key "+publicKey()+"\nsystem signed-by "+testKey)
	wrong := parse(t, "key "+testKey+":"+base64.StdEncoding.EncodeToString(other)+"\nsystem signed-by "+testKey)
	signed := map[string]bool{}
	for i := range s.Paths {
		if strings.Contains(s.Paths[i].Sigs, testKey+":") {
			signed[s.Paths[i].Base] = true
		}
	}
	if len(signed) < 20 {
		t.Fatalf("only %d paths are signed", len(signed))
	}
	for round, want := range []signature.Stats{{Verified: int64(len(signed)), Bad: int64(len(signed))}, {Remembered: int64(len(signed)), Bad: int64(len(signed))}} {
		w, err := Load(t.Context(), in, right, wrong)
		if err != nil {
			t.Fatal(err)
		}
		if w.Signatures != want {
			t.Errorf("round %d: %+v, want %+v", round, w.Signatures, want)
		}
		query := func(p *policy.Policy) graph.Bits {
			q, err := p.Query(policy.Source{Name: "q", Text: []byte("signed-by " + testKey)})
			if err != nil {
				t.Fatal(err)
			}
			yes, unknown := w.Engine.Select(q)
			if unknown.Count() != 0 {
				t.Errorf("round %d: unknown for %d", round, unknown.Count())
			}
			return yes
		}
		yes, no := query(right), query(wrong)
		for i := range w.Graph.Len() {
			id := graph.ID(i)
			if yes.Has(id) != signed[string(w.Graph.BaseName(id))] {
				t.Errorf("round %d: %s: signed %v", round, w.Graph.BaseName(id), yes.Has(id))
			}
		}
		if no.Count() != 0 {
			t.Errorf("round %d: another key of that name signed %d paths", round, no.Count())
		}
		if err := w.Close(); err != nil {
			t.Error(err)
		}
	}
	// What is damaged is verified anew, and said.
	if err := os.WriteFile(in.Memory, []byte("no memory of signatures, but long enough to be looked at for a while"), 0o600); err != nil {
		t.Fatal(err)
	}
	w, err := Load(t.Context(), in, right)
	if err != nil {
		t.Fatal(err)
	}
	defer w.Close()
	if w.Signatures.Remembered != 0 || len(w.Notes) == 0 {
		t.Errorf("a damaged memory: %+v, notes %q", w.Signatures, w.Notes)
	}
}

func TestWords(t *testing.T) {
	in, s := generated(t, storegen.Options{Paths: 500, Seed: 3})
	base := s.Paths[100].Base
	name := base[graph.HashLen+1:]
	dir := t.TempDir()
	if err := os.Symlink(storegen.StoreDir+base+"/bin", filepath.Join(dir, "result")); err != nil {
		t.Fatal(err)
	}
	t.Chdir(dir)
	named := func(match func(string) bool) (out []string) {
		for i := range s.Paths {
			if match(s.Paths[i].Base[graph.HashLen+1:]) {
				out = append(out, s.Paths[i].Base)
			}
		}
		slices.Sort(out)
		return out
	}
	stem, _, _ := strings.Cut(name, "-")
	for word, want := range map[string][]string{
		storegen.StoreDir + base:               {base},
		storegen.StoreDir + base + "/share/x":  {base},
		base:                                   {base},
		base[:graph.HashLen]:                   {base},
		"./result":                             {base},
		filepath.Join(dir, "result"):           {base},
		name:                                   named(func(n string) bool { return n == name || strings.HasPrefix(n, name+"-") }),
		stem:                                   named(func(n string) bool { return n == stem || strings.HasPrefix(n, stem+"-") }),
		stem + "*":                             named(func(n string) bool { return strings.HasPrefix(n, stem) }),
		"nothing-is-called-so":                 nil,
		"/etc/passwd":                          nil,
		"./missing":                            nil,
		storegen.StoreDir:                      nil,
		"00000000000000000000000000000000":     nil,
		storegen.StoreDir + "../../etc/passwd": nil,
		"%' or 1=1 --":                         nil,
		storegen.StoreDir + strings.Repeat("x", 9): nil,
	} {
		w, ids, err := LoadFor(t.Context(), in, parse(t, `system name "*"`), []string{word})
		if err != nil {
			t.Errorf("%q: %v", word, err)
			continue
		}
		var got []string
		for _, id := range ids[0] {
			got = append(got, string(w.Graph.BaseName(id)))
		}
		slices.Sort(got)
		if !slices.Equal(got, want) {
			t.Errorf("%q: %q, want %q", word, got, want)
		}
		w.Close()
	}
	if _, _, err := LoadFor(t.Context(), in, parse(t, `system name "*"`), []string{"x[a"}); !errors.Is(err, ErrWord) {
		t.Errorf("a broken pattern: %v", err)
	}
}

// A part of the store gives the verdicts of the whole, whatever the policy asks.
func TestPartIsWhole(t *testing.T) {
	in, s := generated(t, storegen.Options{Paths: 600, Seed: 5, Signed: 0.6})
	stem, _, _ := strings.Cut(s.Paths[50].Base[graph.HashLen+1:], "-")
	profile := filepath.Join(in.Root, "profile")
	if err := os.Symlink(storegen.StoreDir+s.Paths[599].Base, profile); err != nil {
		t.Fatal(err)
	}
	for _, text := range []string{
		`system name "*"` + "\n" + `personal name "` + stem + `*"`,
		"key " + publicKey() + "\nsystem signed-by " + testKey + "\npersonal built-from (name \"" + stem + "*\")",
		`system closure-of "` + stem + `*"`,
		"system closure-of /profile\npersonal depends-on (kind source and larger-than 10K)",
		"system kind output or kind source\npersonal from \"https:*\" when known\npersonal unfree",
	} {
		p := parse(t, text)
		w, err := Load(t.Context(), in, p)
		if err != nil {
			t.Fatal(err)
		}
		whole := w.Decide(p)
		for i := 0; i < w.Graph.Len(); i += 23 {
			id := graph.ID(i)
			part, ids, err := LoadFor(t.Context(), in, p, []string{w.Graph.Path(id)})
			if err != nil || len(ids[0]) != 1 {
				t.Fatalf("%s: %v, %v", w.Graph.Path(id), ids, err)
			}
			v := part.Decide(p)
			want, line := whole.Reason(id)
			if got, l := v.Reason(ids[0][0]); got != want || l != line || v.System.Has(ids[0][0]) != whole.System.Has(id) {
				t.Errorf("%s: %v by line %d in a part, %v by line %d in the whole; policy:\n%s", w.Graph.Path(id), got, l, want, line, text)
			}
			part.Close()
		}
		w.Close()
	}
}

func TestPolicySources(t *testing.T) {
	root := t.TempDir()
	write := func(mode os.FileMode, path, text string) {
		t.Helper()
		if err := os.MkdirAll(filepath.Dir(path), 0o755); err != nil {
			t.Fatal(err)
		}
		if err := os.WriteFile(path, []byte(text), 0o600); err != nil {
			t.Fatal(err)
		}
		if err := os.Chmod(path, mode); err != nil {
			t.Fatal(err)
		}
	}
	if src, err := PolicySources(root, nil); err != nil || len(src) != 0 {
		t.Fatalf("of nothing: %v, %v", src, err)
	}
	write(0o644, layout.PolicyFile(root), "a")
	write(0o644, layout.PolicyDir(root)+"/z.policy", "z")
	write(0o644, layout.PolicyDir(root)+"/b.policy", "b")
	write(0o644, layout.PolicyDir(root)+"/b.policy~", "an editor's")
	write(0o644, layout.PolicyDir(root)+"/.edit-1-b.policy", "half")
	write(0o644, layout.PolicyDir(root)+"/README", "text")
	keep := layout.Keep{Root: root, Name: "alice"}
	write(0o600, keep.Policy()+"/own.policy", "own")
	src, err := PolicySources(root, &keep)
	var got []string
	for _, s := range src {
		got = append(got, string(s.Text)+map[bool]string{true: "+", false: "-"}[s.Root])
	}
	if want := []string{"a+", "b+", "z+", "own-"}; err != nil || !slices.Equal(got, want) {
		t.Errorf("%q, %v; want %q", got, err, want)
	}

	var bad *SourceError
	write(0o666, layout.PolicyDir(root)+"/b.policy", "b")
	if _, err := PolicySources(root, nil); !errors.As(err, &bad) || bad.Path != layout.PolicyDir(root)+"/b.policy" {
		t.Errorf("a file that others can write: %v", err)
	}
	if err := os.Remove(layout.PolicyDir(root) + "/b.policy"); err != nil {
		t.Fatal(err)
	}
	if err := os.Symlink("/etc/shadow", keep.Policy()+"/link.policy"); err != nil {
		t.Fatal(err)
	}
	if _, err := PolicySources(root, &keep); !errors.As(err, &bad) || !strings.Contains(err.Error(), "link") {
		t.Errorf("a user's symbolic link: %v", err)
	}
	if err := errors.Join(os.Remove(keep.Policy()+"/link.policy"), os.Mkdir(keep.Policy()+"/dir.policy", 0o700)); err != nil {
		t.Fatal(err)
	}
	if _, err := PolicySources(root, &keep); !errors.As(err, &bad) {
		t.Errorf("a directory: %v", err)
	}
	if err := os.Remove(keep.Policy() + "/dir.policy"); err != nil {
		t.Fatal(err)
	}
	write(0o600, keep.Policy()+"/large.policy", strings.Repeat("#", policy.MaxSource+100))
	src, err = PolicySources(root, &keep)
	if err != nil {
		t.Fatal(err)
	}
	var wrong *policy.Errors
	if _, err := policy.Parse(src[2:]...); !errors.As(err, &wrong) {
		t.Errorf("a file of more than the parser takes: %v", err)
	}
}

// A derivation that is not what its name says tells nothing about its output.
func TestBadDerivation(t *testing.T) {
	in, s := generated(t, storegen.Options{Paths: 300, Seed: 8})
	p := parse(t, `system name "*"`+"\n"+`personal from "https://secret.example/*" when known`)
	w, err := Load(context.Background(), in, p)
	if err != nil {
		t.Fatal(err)
	}
	fixed := slices.IndexFunc(s.Paths, func(x storegen.Path) bool {
		id := w.Index.Base([]byte(x.Base))
		return w.Graph.Flags[id]&graph.KindMask == graph.FixedOutput && w.Graph.Deriver[id] != graph.NoID
	})
	if fixed < 0 {
		t.Fatal("no fixed output in the generated store")
	}
	id := w.Index.Base([]byte(s.Paths[fixed].Base))
	drv := filepath.Join(in.Root, w.Graph.Path(w.Graph.Deriver[id]))
	w.Close()
	if err := errors.Join(os.MkdirAll(filepath.Dir(drv), 0o755), os.WriteFile(drv, []byte("Derive("), 0o444)); err != nil {
		t.Fatal(err)
	}
	if w, err = Load(context.Background(), in, p); err != nil {
		t.Fatal(err)
	}
	defer w.Close()
	if reason, _ := w.Decide(p).Reason(id); reason != policy.Unreadable || len(w.Notes) == 0 {
		t.Errorf("its output is %v, notes %q", reason, w.Notes)
	}
}
