package provenance

import (
	"context"
	"encoding/json"
	"errors"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"

	"github.com/google/go-cmp/cmp"
	"golang.org/x/sys/unix"
)

// sourceBase is the base name of a source, told apart by a letter.
func sourceBase(letter string) string { return strings.Repeat(letter, 32) + "-source" }

// gitLock is a lock file with one input, from url.
func gitLock(url, hash string) string {
	return lockText(`"locked":{"type":"git","url":"` + url + `","narHash":"` + hash + `"}`)
}

// flakeAt makes a source with a lock file in a store.
func flakeAt(t testing.TB, store, base, lock string) {
	t.Helper()
	d := filepath.Join(store, base)
	if err := errors.Join(os.Mkdir(d, 0o755), os.WriteFile(filepath.Join(d, "flake.lock"), []byte(lock), 0o444)); err != nil {
		t.Fatal(err)
	}
}

// look returns what one look finds, by source.
func look(t testing.TB, s *Sources) (Seen, map[string][]Record) {
	t.Helper()
	found := map[string][]Record{}
	seen, err := s.Look(t.Context(), func(base string, r []Record) error {
		found[base] = r
		return nil
	})
	if err != nil {
		t.Fatal(err)
	}
	return seen, found
}

func TestSources(t *testing.T) {
	store := t.TempDir()
	s := &Sources{Dir: store}
	if seen, found := look(t, s); seen != (Seen{}) || len(found) != 0 {
		t.Errorf("in nothing: %+v %v", seen, found)
	}
	flakeAt(t, store, sourceBase("a"), gitLock("ssh://git@acme.example/x", hashA))
	flakeAt(t, store, strings.Repeat("b", 32)+"-resource", gitLock("ssh://other", hashA))
	flakeAt(t, store, strings.Repeat("c", 32)+"-a-source", gitLock("ssh://other", hashA))
	flakeAt(t, store, "tmp-source", gitLock("ssh://other", hashA))
	if err := errors.Join(os.Mkdir(filepath.Join(store, sourceBase("d")), 0o755), // no flake
		os.WriteFile(filepath.Join(store, sourceBase("f")), nil, 0o444)); err != nil { // a source that is a file
		t.Fatal(err)
	}
	seen, found := look(t, s)
	want := map[string][]Record{sourceBase("a"): {{Path: source(t, hashA, "source"), From: []string{"git+ssh://git@acme.example/x"}, How: ByLock}}}
	if diff := cmp.Diff(want, found); diff != "" || seen != (Seen{Sources: 3, Locks: 1}) {
		t.Errorf("%+v\n%s", seen, diff)
	}
	// Only once, but what comes later is found, and what went and came again, too.
	flakeAt(t, store, sourceBase("g"), gitLock("ssh://second", hashB))
	if seen, found := look(t, s); seen.Sources != 1 || found[sourceBase("g")] == nil {
		t.Errorf("a second one: %+v %v", seen, found)
	}
	if err := os.RemoveAll(filepath.Join(store, sourceBase("a"))); err != nil {
		t.Fatal(err)
	}
	if seen, _ := look(t, s); seen != (Seen{}) || s.done[sourceBase("a")] {
		t.Errorf("one that went: %+v %v", seen, s.done)
	}
	flakeAt(t, store, sourceBase("a"), gitLock("ssh://again", hashB))
	if _, found := look(t, s); len(found) != 1 || found[sourceBase("a")][0].From[0] != "git+ssh://again" {
		t.Errorf("one that came again: %v", found)
	}
}

// Root reads what users made to harm: nothing is followed, nothing waits, nothing
// large is read, and the sources beside it are read all the same.
func TestHostileSources(t *testing.T) {
	secret := filepath.Join(t.TempDir(), "flake.lock")
	if err := os.WriteFile(secret, []byte(gitLock("ssh://secret", hashA)), 0o600); err != nil {
		t.Fatal(err)
	}
	good := gitLock("ssh://good", hashB)
	var many strings.Builder
	many.WriteString(`{"version":7,"root":"r","nodes":{"r":{}`)
	for i := range maxLockInputs + 1 {
		b, _ := json.Marshal(i)
		many.WriteString(`,"` + string(b) + `":{"locked":{"type":"path","path":"/` + string(b) + `","narHash":"` + hashA + `"}}`)
	}
	many.WriteString("}}")
	for name, make := range map[string]func(dir string) error{
		"a link to a lock file": func(d string) error { return os.Symlink(secret, filepath.Join(d, "flake.lock")) },
		"a link within": func(d string) error {
			return errors.Join(os.WriteFile(filepath.Join(d, "x"), []byte(good), 0o644), os.Symlink("x", filepath.Join(d, "flake.lock")))
		},
		"a link to itself": func(d string) error { return os.Symlink("flake.lock", filepath.Join(d, "flake.lock")) },
		"a source that is a link": func(d string) error {
			return errors.Join(os.Remove(d), os.Symlink(filepath.Dir(secret), d))
		},
		"a pipe":      func(d string) error { return unix.Mkfifo(filepath.Join(d, "flake.lock"), 0o600) },
		"a directory": func(d string) error { return os.Mkdir(filepath.Join(d, "flake.lock"), 0o755) },
		"a device":    func(d string) error { return mknod(filepath.Join(d, "flake.lock")) },
		"a huge file": func(d string) error { // sparse: reading all of it would take long, and much memory
			f := filepath.Join(d, "flake.lock")
			return errors.Join(os.WriteFile(f, []byte(good), 0o644), os.Truncate(f, 1<<40))
		},
		"one byte too many": func(d string) error {
			return os.WriteFile(filepath.Join(d, "flake.lock"), []byte(good+strings.Repeat(" ", maxLockFile+1-len(good))), 0o644)
		},
		"too many inputs": func(d string) error {
			return os.WriteFile(filepath.Join(d, "flake.lock"), []byte(many.String()), 0o644)
		},
		"deep": func(d string) error {
			return os.WriteFile(filepath.Join(d, "flake.lock"), []byte(strings.Repeat("[", 1<<20)), 0o644)
		},
		"torn": func(d string) error {
			return os.WriteFile(filepath.Join(d, "flake.lock"), []byte(good[:len(good)/2]), 0o644)
		},
		"empty": func(d string) error { return os.WriteFile(filepath.Join(d, "flake.lock"), nil, 0o644) },
		"no UTF-8": func(d string) error {
			return os.WriteFile(filepath.Join(d, "flake.lock"), []byte("{\"\xff\":1}"), 0o644)
		},
	} {
		t.Run(name, func(t *testing.T) {
			store := t.TempDir()
			d := filepath.Join(store, sourceBase("a"))
			if err := errors.Join(os.Mkdir(d, 0o755), make(d)); err != nil {
				t.Fatal(err)
			}
			flakeAt(t, store, sourceBase("b"), good)
			s := &Sources{Dir: store}
			seen, found := look(t, s)
			if seen != (Seen{Sources: 2, Locks: 1, Bad: 1}) || found[sourceBase("a")] != nil || len(found[sourceBase("b")]) != 1 {
				t.Errorf("%+v %v", seen, found)
			}
			if seen, _ := look(t, s); seen != (Seen{}) {
				t.Errorf("looked at again: %+v", seen)
			}
		})
	}
	t.Run("just within", func(t *testing.T) {
		store := t.TempDir()
		flakeAt(t, store, sourceBase("a"), good+strings.Repeat(" ", maxLockFile-len(good)))
		if seen, found := look(t, &Sources{Dir: store}); seen.Locks != 1 || len(found) != 1 {
			t.Errorf("%+v %v", seen, found)
		}
	})
	t.Run("the directory is a link", func(t *testing.T) {
		link := filepath.Join(t.TempDir(), "link")
		if err := os.Symlink(t.TempDir(), link); err != nil {
			t.Fatal(err)
		}
		if _, err := (&Sources{Dir: link}).Look(t.Context(), nil); !errors.Is(err, unix.ENOTDIR) && !errors.Is(err, unix.ELOOP) {
			t.Errorf("%v", err)
		}
	})
}

// mknod makes /dev/zero, which only root can; for others a socket stands for it.
func mknod(file string) error {
	if os.Geteuid() == 0 {
		return unix.Mknod(file, unix.S_IFCHR|0o666, int(unix.Mkdev(1, 5)))
	}
	return unix.Mknod(file, unix.S_IFSOCK|0o600, 0)
}

// What is not valid yet is looked at when it is, and what goes between the listing and
// the reading does no harm.
func TestSourcesValid(t *testing.T) {
	store := t.TempDir()
	a, b := sourceBase("a"), sourceBase("b")
	flakeAt(t, store, a, gitLock("ssh://a", hashA))
	flakeAt(t, store, b, gitLock("ssh://b", hashB))
	valid := map[string]bool{}
	asked := 0
	s := &Sources{Dir: store, StoreDir: "/nix/store", Valid: func(_ context.Context, paths []string) ([]string, error) {
		asked++
		return slices.DeleteFunc(slices.Clone(paths), func(p string) bool { return !valid[filepath.Base(p)] }), nil
	}}
	if seen, _ := look(t, s); seen != (Seen{}) || asked != 1 {
		t.Errorf("nothing is valid: %+v, asked %d times", seen, asked)
	}
	valid[a] = true
	if seen, found := look(t, s); seen.Locks != 1 || found[a] == nil {
		t.Errorf("one is: %+v %v", seen, found)
	}
	valid[b] = true
	s.Valid = func(_ context.Context, paths []string) ([]string, error) {
		return paths, os.RemoveAll(filepath.Join(store, b))
	}
	if seen, found := look(t, s); seen != (Seen{Sources: 1}) || len(found) != 0 {
		t.Errorf("one that goes: %+v %v", seen, found)
	}
	s.Valid = func(context.Context, []string) ([]string, error) { return nil, os.ErrDeadlineExceeded }
	if seen, _ := look(t, s); seen != (Seen{}) {
		t.Errorf("with nothing new it asks: %+v", seen)
	}
	flakeAt(t, store, b, gitLock("ssh://b", hashB))
	if _, err := s.Look(t.Context(), nil); !errors.Is(err, os.ErrDeadlineExceeded) {
		t.Errorf("%v", err)
	}
	s.Valid = nil
	full := errors.New("the disk is full")
	if _, err := s.Look(t.Context(), func(string, []Record) error { return full }); !errors.Is(err, full) {
		t.Errorf("%v", err)
	}
	if seen, _ := look(t, s); seen.Locks != 1 {
		t.Errorf("what could not be kept is not looked at again: %+v", seen)
	}
	ctx, cancel := context.WithCancel(t.Context())
	cancel()
	flakeAt(t, store, sourceBase("c"), "")
	if _, err := s.Look(ctx, nil); !errors.Is(err, context.Canceled) {
		t.Errorf("%v", err)
	}
}

func TestFlake(t *testing.T) {
	self, in := base("source"), source(t, hashA, "source")
	lock := gitLock("ssh://git@acme.example/x", hashA)
	metadata := `{"url":"git+file:///home/alice/keep/f","path":"/nix/store/` + self + `","locks":` + lock + `}`
	archive := `{"path":"/nix/store/` + self + `","inputs":{"in":{"path":"/nix/store/` + in + `","inputs":{}}}}`
	got, err := Flake(dir, []byte(metadata), []byte(archive))
	want := []Record{
		{Path: in, From: []string{"git+ssh://git@acme.example/x"}, How: ByLock},
		{Path: self, From: []string{"git+file:///home/alice/keep/f"}, How: ByArchive},
		{Path: in, From: []string{"git+ssh://git@acme.example/x"}, How: ByArchive},
	}
	if diff := cmp.Diff(want, got); diff != "" || err != nil {
		t.Errorf("%v\n%s", err, diff)
	}
	for _, bad := range []string{``, `[]`, `{}`, `{"locks":1}`, `{"locks":{}}`, `{"locks":{"version":8}}`, metadata[:len(metadata)-2]} {
		if r, err := Flake(dir, []byte(bad), []byte(archive)); err == nil {
			t.Errorf("metadata %q: %v", bad, r)
		}
	}
	for _, bad := range []string{``, `[]`, `{"path":1,"inputs":1}`, `{"path":"/etc/shadow"}`} {
		if _, err := Flake(dir, []byte(metadata), []byte(bad)); err == nil {
			t.Errorf("archive %q is read", bad)
		}
	}
}

func FuzzFlake(f *testing.F) {
	f.Add([]byte(`{"url":"path:/x","locks":`+gitLock("ssh://x", hashA)+`}`), []byte(`{"path":"/nix/store/`+base("source")+`","inputs":{"in":{}}}`))
	f.Add([]byte(`{"locks":{"version":7,"root":"r","nodes":{"r":{}}}}`), []byte(`{}`))
	f.Fuzz(func(t *testing.T, metadata, archive []byte) {
		if r, err := Flake(dir, metadata, archive); err == nil {
			storable(t, r)
		}
	})
}

func TestForget(t *testing.T) {
	d := t.TempDir()
	s := open(t, d)
	if n, err := s.Forget(func(string) bool { return true }); n != 0 || err != nil {
		t.Errorf("of nothing: %d %v", n, err)
	}
	put(t, s, from("a", "https://a"), from("a", "https://a2"), from("b", "https://b"))
	other := open(t, d)
	put(t, other, from("c", "https://c"))
	n, err := s.Forget(func(b string) bool { return b == base("a") })
	if n != 1 || err != nil {
		t.Errorf("%d %v", n, err)
	}
	for _, s := range []*Store{s, open(t, d)} {
		if _, ok := s.Origin(base("a")); ok || s.Len() != 2 {
			t.Errorf("%d are left", s.Len())
		}
	}
	records, err := s.Records()
	if err != nil || len(records) != 2 || records[0].Path != base("b") || records[1].Path != base("c") || records[0].When == 0 {
		t.Errorf("%+v %v", records, err)
	}
}

func TestNews(t *testing.T) {
	s := open(t, t.TempDir())
	put(t, s, from("a", "https://a"))
	news, err := s.News(from("a", "https://a"), from("b", "https://b"), from("b", "https://b"))
	if err != nil || len(news) != 1 || news[0].Path != base("b") || s.Len() != 1 {
		t.Errorf("%+v %v, %d known", news, err, s.Len())
	}
	if _, err := s.News(Record{}); !errors.Is(err, ErrRecord) {
		t.Errorf("%v", err)
	}
}

// OpenWithin neither reads nor makes a file that is larger than its bound.
func TestOpenWithin(t *testing.T) {
	d := t.TempDir()
	s, err := OpenWithin(d, 200)
	if err != nil {
		t.Fatal(err)
	}
	put(t, s, from("a", "https://a"))
	if _, err := s.Add(from("b", "https://b")); !errors.Is(err, ErrSize) {
		t.Errorf("%v", err)
	}
	put(t, open(t, d), from("b", "https://b"))
	if _, err := OpenWithin(d, 200); !errors.Is(err, ErrSize) {
		t.Errorf("%v", err)
	}
}
