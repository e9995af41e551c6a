package provenance

import (
	"bytes"
	"errors"
	"fmt"
	"maps"
	"os"
	"path/filepath"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"

	"overkeep/policy/graph"
)

func open(t testing.TB, dir string) *Store {
	t.Helper()
	s, err := Open(dir)
	if err != nil {
		t.Fatal(err)
	}
	s.now = func() time.Time { return time.Unix(1000, 0) }
	return s
}

func put(t testing.TB, s *Store, records ...Record) int {
	t.Helper()
	n, err := s.Add(records...)
	if err != nil {
		t.Fatal(err)
	}
	return n
}

func from(path string, urls ...string) Record {
	return Record{Path: base(path), From: urls, How: ByLock}
}

func content(t testing.TB, dir string) string {
	t.Helper()
	b, err := os.ReadFile(filepath.Join(dir, fileName))
	if err != nil {
		t.Fatal(err)
	}
	return string(b)
}

func TestStore(t *testing.T) {
	dir := filepath.Join(t.TempDir(), "provenance")
	s := open(t, dir)
	if _, err := os.Stat(dir); !errors.Is(err, os.ErrNotExist) {
		t.Errorf("Open made something: %v", err)
	}
	if _, ok := s.Origin(base("a")); ok || s.Len() != 0 {
		t.Error("something is known")
	}
	if n := put(t, s, from("a", "u1"), from("a", "u1"), from("b", "u1", "u2")); n != 2 {
		t.Errorf("%d added", n)
	}
	if n := put(t, s, from("a", "u1"), from("b", "u2")); n != 0 {
		t.Errorf("%d added again", n)
	}
	// Origins that differ stand side by side; of free and unfree, unfree stays.
	put(t, s, from("a", "u3"), Record{Path: base("a"), Licences: []string{"MIT"}, Unfree: graph.No, How: ByMeta, When: 5})
	put(t, s, Record{Path: base("a"), Licences: []string{"GPL"}, Unfree: graph.Yes, How: ByMeta})
	if n := put(t, s, Record{Path: base("a"), Unfree: graph.No, How: ByMeta}); n != 0 {
		t.Errorf("free again: %d added", n)
	}
	want := map[string]graph.Origin{
		base("a"): {From: []string{"u1", "u3"}, Licences: []string{"MIT", "GPL"}, Unfree: graph.Yes},
		base("b"): {From: []string{"u1", "u2"}},
	}
	wantFile := headerLine +
		`{"path":"` + base("a") + `","from":["u1"],"how":"flake.lock","when":1000}` + "\n" +
		`{"path":"` + base("b") + `","from":["u1","u2"],"how":"flake.lock","when":1000}` + "\n" +
		`{"path":"` + base("a") + `","from":["u3"],"how":"flake.lock","when":1000}` + "\n" +
		`{"path":"` + base("a") + `","licences":["MIT"],"unfree":false,"how":"meta","when":5}` + "\n" +
		`{"path":"` + base("a") + `","licences":["GPL"],"unfree":true,"how":"meta","when":1000}` + "\n"
	if diff := cmp.Diff(wantFile, content(t, dir)); diff != "" {
		t.Error(diff)
	}
	for _, s := range []*Store{s, open(t, dir)} {
		if diff := cmp.Diff(want, maps.Collect(s.All())); diff != "" || s.Damaged() != 0 {
			t.Errorf("%d damaged: %s", s.Damaged(), diff)
		}
	}
	for name, mode := range map[string]os.FileMode{dir: 0o700, filepath.Join(dir, fileName): 0o640} {
		if st, err := os.Stat(name); err != nil || st.Mode().Perm() != mode {
			t.Errorf("%s: %v %v", name, st.Mode(), err)
		}
	}
}

func TestBadRecords(t *testing.T) {
	dir := t.TempDir()
	s := open(t, dir)
	for name, r := range map[string]Record{
		"no path":     {Path: "x", From: []string{"u"}, How: ByLock},
		"whole path":  {Path: "/nix/store/" + base("a"), From: []string{"u"}, How: ByLock},
		"nothing":     {Path: base("a"), How: ByLock},
		"no how":      {Path: base("a"), From: []string{"u"}},
		"two lines":   from("a", "u\nv"),
		"not UTF-8":   from("a", "\xff"),
		"a password":  from("a", "https://u:p@h/"),
		"empty":       from("a", ""),
		"long":        from("a", strings.Repeat("x", maxText+1)),
		"many":        from("a", strings.Fields(strings.Repeat("x ", maxTexts+1))...),
		"bad licence": {Path: base("a"), Licences: []string{"\x7f"}, How: ByMeta},
	} {
		if n, err := s.Add(from("b", "u"), r); !errors.Is(err, ErrRecord) || n != 0 {
			t.Errorf("%s: %d %v", name, n, err)
		}
	}
	if s.Len() != 0 {
		t.Error("something of it was kept")
	}
	if entries, _ := os.ReadDir(dir); len(entries) != 0 {
		t.Errorf("written: %v", entries)
	}
}

// Cut anywhere, the file gives the whole lines before the cut, and what is added
// then is there with them.
func TestTornAnywhere(t *testing.T) {
	dir := t.TempDir()
	put(t, open(t, dir), from("a", "u1"), from("b", "u2"))
	whole := content(t, dir)
	for n := range len(whole) + 1 {
		if err := os.WriteFile(filepath.Join(dir, fileName), []byte(whole[:n]), 0o600); err != nil {
			t.Fatal(err)
		}
		s := open(t, dir)
		wantLen := max(strings.Count(whole[:n], "\n")-1, 0)
		if s.Len() != wantLen || s.Damaged() != 0 {
			t.Fatalf("cut at %d: %d paths, %d damaged", n, s.Len(), s.Damaged())
		}
		put(t, s, from("c", "u3"))
		again := open(t, dir)
		if again.Len() != wantLen+1 || again.Damaged() != 0 {
			t.Fatalf("cut at %d, then added: %d paths, %d damaged\n%s", n, again.Len(), again.Damaged(), content(t, dir))
		}
	}
}

// What was torn is gone before something shorter takes its place.
func TestTornTailIsCutOff(t *testing.T) {
	dir := t.TempDir()
	put(t, open(t, dir), from("a", "u1"))
	whole := content(t, dir)
	if err := os.WriteFile(filepath.Join(dir, fileName), []byte(whole+strings.Repeat("x", 200000)), 0o600); err != nil {
		t.Fatal(err)
	}
	put(t, open(t, dir), from("b", "u2"))
	if got := content(t, dir); !strings.HasPrefix(got, whole) || strings.Contains(got, "x") || !strings.HasSuffix(got, "}\n") {
		t.Errorf("%.1000q", got)
	}
}

// A line that cannot be read is left out, told, and gone after a compaction.
func TestDamaged(t *testing.T) {
	dir := t.TempDir()
	put(t, open(t, dir), from("a", "u1"), from("b", "u2"), from("c", "u3"))
	whole := content(t, dir)
	at := strings.Index(whole, base("b"))
	for _, garbage := range []string{"\x00\x01\x02\x03\x04\x05\x06\x07\x08", "\"\"\"\"", "\xff\xfe", "/", "}\n{"} {
		b := []byte(whole)
		copy(b[at:], garbage)
		if err := os.WriteFile(filepath.Join(dir, fileName), b, 0o600); err != nil {
			t.Fatal(err)
		}
		s := open(t, dir)
		if _, ok := s.Origin(base("b")); ok || s.Len() != 2 || s.Damaged() == 0 {
			t.Errorf("%q: %d paths, %d damaged", garbage, s.Len(), s.Damaged())
		}
		if err := s.Compact(); err != nil {
			t.Fatal(err)
		}
		if s.Damaged() != 0 || open(t, dir).Damaged() != 0 || open(t, dir).Len() != 2 {
			t.Errorf("%q: still damaged", garbage)
		}
	}
}

func TestOtherVersions(t *testing.T) {
	for name, c := range map[string]struct {
		head string
		want error
	}{
		"version 2":       {`{"format":"overkeep provenance","version":2,"features":[]}`, ErrVersion},
		"a feature":       {`{"format":"overkeep provenance","version":1,"features":["x"]}`, ErrVersion},
		"another format":  {`{"format":"other","version":1,"features":[]}`, ErrInput},
		"a record":        {`{"path":"` + base("a") + `","from":["u"],"how":"x","when":1}`, ErrInput},
		"not JSON at all": {"\x7fELF", ErrInput},
	} {
		dir := t.TempDir()
		file := filepath.Join(dir, fileName)
		s := open(t, dir) // before the other one wrote
		text := c.head + "\n"
		if err := os.WriteFile(file, []byte(text), 0o600); err != nil {
			t.Fatal(err)
		}
		if _, err := Open(dir); !errors.Is(err, c.want) {
			t.Errorf("%s: %v", name, err)
		}
		if _, err := s.Add(from("a", "u")); !errors.Is(err, c.want) {
			t.Errorf("%s: added: %v", name, err)
		}
		if err := s.Compact(); !errors.Is(err, c.want) {
			t.Errorf("%s: compacted: %v", name, err)
		}
		if got := content(t, dir); got != text {
			t.Errorf("%s: changed to %q", name, got)
		}
	}
}

func TestUnsafeFile(t *testing.T) {
	dir := t.TempDir()
	s := open(t, dir)
	put(t, s, from("a", "u"))
	file := filepath.Join(dir, fileName)
	refused := func(name string) {
		t.Helper()
		if _, err := Open(dir); !errors.Is(err, ErrUnsafe) {
			t.Errorf("%s: %v", name, err)
		}
		if _, err := s.Add(from(fmt.Sprint("x", len(name)), "u")); !errors.Is(err, ErrUnsafe) {
			t.Errorf("%s: added: %v", name, err)
		}
	}
	if err := os.Chmod(file, 0o666); err != nil {
		t.Fatal(err)
	}
	refused("everybody can write")
	if os.Geteuid() == 0 {
		if err := errors.Join(os.Chmod(file, 0o600), os.Chown(file, 4242, 4242)); err != nil {
			t.Fatal(err)
		}
		refused("another user's")
	}
	if err := errors.Join(os.Chmod(file, 0o600), os.Rename(file, file+"2"), os.Symlink(file+"2", file)); err != nil {
		t.Fatal(err)
	}
	refused("symbolic link")
	if err := errors.Join(os.Remove(file), os.Mkdir(file, 0o700)); err != nil {
		t.Fatal(err)
	}
	if _, err := Open(dir); !errors.Is(err, ErrUnsafe) {
		t.Errorf("directory: %v", err)
	}
}

func TestCompact(t *testing.T) {
	dir := t.TempDir()
	// Two processes that do not know of each other say the same.
	a, b := open(t, dir), open(t, dir)
	for i := range 50 {
		r := from(fmt.Sprint("p", i), "u")
		r.When = int64(i + 1)
		put(t, a, r)
		r.When = 9999
		put(t, b, r)
	}
	put(t, b, from("only-b", "u"))
	before := strings.Count(content(t, dir), "\n")
	if err := a.Compact(); err != nil {
		t.Fatal(err)
	}
	after := content(t, dir)
	if n := strings.Count(after, "\n"); before != 102 || n != 52 || strings.Contains(after, "9999") {
		t.Errorf("%d lines, then %d:\n%s", before, n, after)
	}
	if _, ok := a.Origin(base("only-b")); !ok {
		t.Error("what the other one added is not seen")
	}
	// b holds no old file: what it adds next is in the new one.
	put(t, b, from("later", "u"))
	if got := open(t, dir); got.Len() != 52 {
		t.Errorf("%d paths", got.Len())
	}
	if entries, _ := os.ReadDir(dir); len(entries) != 1 {
		t.Errorf("left behind: %v", entries)
	}
}

func TestBounded(t *testing.T) {
	dir := t.TempDir()
	s := open(t, dir)
	s.maxFile = 500
	put(t, s, from("a", "u"))
	if _, err := s.Add(from("b", strings.Repeat("x", 500))); !errors.Is(err, ErrSize) {
		t.Errorf("%v", err)
	}
	if _, ok := s.Origin(base("b")); ok {
		t.Error("known, but not kept")
	}
	put(t, s, from("c", "u"))
	if open(t, dir).Len() != 2 {
		t.Error("what fits is not kept")
	}
	if err := os.Truncate(filepath.Join(dir, fileName), maxFile+1); err != nil {
		t.Fatal(err)
	}
	if _, err := Open(dir); !errors.Is(err, ErrSize) {
		t.Errorf("%v", err)
	}
}

// Many writers, each with a Store of its own, lose nothing.
func TestWritersBesideEachOther(t *testing.T) {
	dir := t.TempDir()
	var wg sync.WaitGroup
	errs := make([]error, 8)
	for w := range errs {
		wg.Go(func() {
			s, err := Open(dir)
			for i := 0; i < 20 && err == nil; i++ {
				_, err = s.Add(from(fmt.Sprintf("w%d-%d", w, i), "u"))
				if err == nil && i%7 == w%7 {
					err = s.Compact()
				}
			}
			errs[w] = err
		})
	}
	wg.Wait()
	if err := errors.Join(errs...); err != nil {
		t.Fatal(err)
	}
	if s := open(t, dir); s.Len() != 160 || s.Damaged() != 0 {
		t.Errorf("%d paths, %d damaged", s.Len(), s.Damaged())
	}
}

func FuzzStore(f *testing.F) {
	f.Add([]byte(headerLine + `{"path":"` + base("a") + `","from":["u"],"how":"x","when":1}` + "\n"))
	f.Fuzz(func(t *testing.T, b []byte) {
		s := &Store{known: map[string]*graph.Origin{}}
		if s.load(b) != nil {
			if s.Len() != 0 {
				t.Fatal("something of a refused file is known")
			}
			return
		}
		// What was read can be written, and reads the same.
		out := []byte(headerLine)
		for path, o := range s.All() {
			r := Record{Path: path, From: o.From, Licences: o.Licences, Unfree: o.Unfree, How: "x"}
			text, err := r.encode()
			if err != nil || r.check() != nil || bytes.Count(text, []byte("\n")) != 1 {
				t.Fatalf("%+v: %v %v", r, err, r.check())
			}
			out = append(out, text...)
		}
		again := &Store{known: map[string]*graph.Origin{}}
		if err := again.load(out); err != nil || again.Damaged() != 0 {
			t.Fatalf("%v\n%s", err, out)
		}
		if diff := cmp.Diff(maps.Collect(s.All()), maps.Collect(again.All())); diff != "" {
			t.Fatal(diff)
		}
	})
}
