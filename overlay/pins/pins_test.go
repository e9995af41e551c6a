package pins

import (
	"context"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"sync/atomic"
	"testing"

	"github.com/google/go-cmp/cmp"
	"golang.org/x/sys/unix"
	"pgregory.net/rapid"
)

func name(n string) string { return strings.Repeat("0", 32) + "-" + n }
func path(n string) string { return "/nix/store/" + name(n) }

func TestPlan(t *testing.T) {
	for _, tc := range []struct{ want, have, add, remove string }{
		{"", "", "", ""},
		{"a b", "", "a b", ""},
		{"", "b a", "", "a b"},
		{"b a a", "c b", "a", "c"},
		{"a b c", "c b a", "", ""},
		{"c", "a b d e", "c", "a b d e"},
	} {
		add, remove := Plan(strings.Fields(tc.want), strings.Fields(tc.have))
		if strings.Join(add, " ") != tc.add || strings.Join(remove, " ") != tc.remove {
			t.Errorf("%q against %q: add %q, remove %q", tc.want, tc.have, add, remove)
		}
	}
	rapid.Check(t, func(r *rapid.T) {
		set := rapid.SliceOfN(rapid.SampledFrom([]string{"a", "b", "c", "d", "e"}), 0, 8)
		want, have := set.Draw(r, "want"), set.Draw(r, "have")
		add, remove := Plan(want, have)
		left := slices.DeleteFunc(slices.Clone(have), func(s string) bool { return slices.Contains(remove, s) })
		if d := cmp.Diff(sorted(want), sorted(append(left, add...))); d != "" {
			r.Fatal(d)
		}
	})
}

func TestRoots(t *testing.T) {
	for _, tc := range []struct {
		paths string
		refs  [][2]int32
		want  string
	}{
		{"", nil, ""},
		{"a b", nil, "a b"},
		{"a b c", [][2]int32{{0, 1}, {1, 2}}, "a"},
		{"a b c", [][2]int32{{2, 1}, {1, 0}}, "c"},
		{"a", [][2]int32{{0, 0}}, "a"},
		{"a b", [][2]int32{{0, 1}, {1, 0}}, "a"},
		{"a b c", [][2]int32{{0, 1}, {1, 0}, {2, 0}}, "c"},
		{"a b c", [][2]int32{{0, 1}, {1, 0}, {1, 2}}, "a"},
		{"a b c d", [][2]int32{{0, 2}, {1, 2}, {2, 3}, {2, 3}}, "a b"},
	} {
		if got := strings.Join(Roots(strings.Fields(tc.paths), tc.refs), " "); got != tc.want {
			t.Errorf("%q %v: %q, want %q", tc.paths, tc.refs, got, tc.want)
		}
	}
	// Whatever the graph, cycles included: all is reached, and no root is spare
	// unless it hangs off a cycle.
	rapid.Check(t, func(r *rapid.T) {
		n := rapid.IntRange(1, 12).Draw(r, "n")
		var paths []string
		for i := range n {
			paths = append(paths, fmt.Sprint(i))
		}
		i := rapid.Int32Range(0, int32(n-1))
		refs := rapid.SliceOfN(rapid.Custom(func(r *rapid.T) [2]int32 { return [2]int32{i.Draw(r, "from"), i.Draw(r, "to")} }), 0, 30).Draw(r, "refs")
		reached := map[int32]bool{}
		for _, p := range Roots(paths, refs) {
			reached[int32(slices.Index(paths, p))] = true
		}
		for range n {
			for _, e := range refs {
				if reached[e[0]] {
					reached[e[1]] = true
				}
			}
		}
		if len(reached) != n {
			r.Fatalf("%d of %d reached", len(reached), n)
		}
	})
}

func TestParseMode(t *testing.T) {
	for _, s := range []string{"exact", "all"} {
		if m, err := ParseMode(s); err != nil || string(m) != s {
			t.Error(m, err)
		}
	}
	for _, s := range []string{"", "generation", "Exact", "all "} {
		if _, err := ParseMode(s); !errors.Is(err, ErrMode) {
			t.Errorf("%q: %v", s, err)
		}
	}
}

func TestPinName(t *testing.T) {
	for s, want := range map[string]bool{
		name("x"): true, name("a+b-c.d_e?f=g"): true, name(""): false, "": false, "..": false, name("a/b"): false, name("a b"): false,
		strings.Repeat("e", 32) + "-x": false, strings.Repeat("A", 32) + "-x": false, name(strings.Repeat("x", 211)): true,
		name(strings.Repeat("x", 212)): false, name("x\x00"): false, name("ä"): false,
	} {
		if pinName(s) != want {
			t.Errorf("%q: want %v", s, want)
		}
	}
}

func entries(t *testing.T, dir string) string {
	t.Helper()
	list, err := os.ReadDir(dir)
	if err != nil {
		t.Fatal(err)
	}
	var s []string
	for _, e := range list {
		s = append(s, strings.TrimPrefix(e.Name(), name("")))
	}
	return strings.Join(s, " ")
}

func TestSync(t *testing.T) {
	ctx := t.Context()
	d := Dir{Path: filepath.Join(t.TempDir(), "overkeep", "k1"), GCLock: filepath.Join(t.TempDir(), "gc.lock")}
	step := func(what string, res Result, err error, want Result, left string) {
		t.Helper()
		if err != nil || res != want {
			t.Errorf("%s: %+v %v, want %+v", what, res, err, want)
		}
		if got := entries(t, d.Path); got != left {
			t.Errorf("%s: left %q, want %q", what, got, left)
		}
	}
	res, err := d.Sync(ctx, []string{path("b"), path("a"), path("a")})
	step("first", res, err, Result{Added: 2}, "a b")
	for _, dir := range []string{d.Path, filepath.Dir(d.Path)} {
		if st, err := os.Stat(dir); err != nil || st.Mode().Perm() != 0o700 {
			t.Errorf("%s: %v %v, want 0700", dir, st.Mode(), err)
		}
	}
	if to, err := os.Readlink(filepath.Join(d.Path, name("a"))); err != nil || to != path("a") {
		t.Errorf("%q %v", to, err)
	}
	res, err = d.Add(ctx, []string{path("c")})
	step("add", res, err, Result{Added: 1, Kept: 2}, "a b c")
	res, err = d.Sync(ctx, []string{path("c"), path("d")})
	step("exact", res, err, Result{Added: 1, Removed: 2, Kept: 1}, "c d")
	list, err := d.List(ctx)
	if diff := cmp.Diff([]string{path("c"), path("d")}, list); err != nil || diff != "" {
		t.Errorf("%v %s", err, diff)
	}

	// A collection is running: additions are made, removals wait.
	gc, err := os.OpenFile(d.GCLock, os.O_RDWR, 0)
	if err != nil {
		t.Fatal(err)
	}
	defer gc.Close()
	if err := unix.Flock(int(gc.Fd()), unix.LOCK_EX); err != nil {
		t.Fatal(err)
	}
	res, err = d.Sync(ctx, []string{path("e")})
	step("during gc", res, err, Result{Added: 1, Deferred: 2}, "c d e")
	gc.Close()
	res, err = d.Sync(ctx, []string{path("e")})
	step("after gc", res, err, Result{Removed: 2, Kept: 1}, "e")
	res, err = d.Sync(ctx, nil)
	step("nothing", res, err, Result{Removed: 1}, "")
}

// TestForeign: what is not exactly a pin is left alone.
func TestForeign(t *testing.T) {
	ctx := t.Context()
	d := Dir{Path: filepath.Join(t.TempDir(), "overkeep", "k1")}
	if _, err := d.Sync(ctx, []string{path("a")}); err != nil {
		t.Fatal(err)
	}
	in := func(s string) string { return filepath.Join(d.Path, s) }
	for _, err := range []error{
		os.WriteFile(in(name("file")), nil, 0o600),
		os.Mkdir(in(name("dir")), 0o700),
		os.Symlink("/etc/passwd", in("stranger")),
		os.Symlink("/nix/store/"+name("other"), in(name("elsewhere"))),
		os.Symlink("../../"+name("rel"), in(name("rel"))),
		os.Symlink("/nix/store/"+name("a")+"/bin", in(name("inside"))),
	} {
		if err != nil {
			t.Fatal(err)
		}
	}
	res, err := d.Sync(ctx, nil)
	if err != nil || res != (Result{Removed: 1, Foreign: 6}) {
		t.Errorf("%+v %v", res, err)
	}
	if got := entries(t, d.Path); got != "dir elsewhere file inside rel stranger" {
		t.Errorf("left %q", got)
	}
	// A wanted name under which a symlink pins something else is put right;
	// anything but a symlink is an error.
	res, err = d.Sync(ctx, []string{path("elsewhere")})
	if err != nil || res.Added != 1 || res.Foreign != 5 {
		t.Errorf("%+v %v", res, err)
	}
	if to, _ := os.Readlink(in(name("elsewhere"))); to != path("elsewhere") {
		t.Errorf("still points to %q", to)
	}
	for _, n := range []string{"file", "dir"} {
		if _, err := d.Sync(ctx, []string{path(n)}); !errors.Is(err, ErrForeign) || strings.Contains(err.Error(), name(n)) {
			t.Errorf("%s: %v", n, err)
		}
	}
}

func TestUnsafe(t *testing.T) {
	ctx := t.Context()
	tmp := t.TempDir()
	in := func(s string) string { return filepath.Join(tmp, s) }
	for _, err := range []error{
		os.MkdirAll(in("real/k"), 0o700), os.Symlink("real", in("link")), os.Symlink("k", in("real/klink")),
		os.MkdirAll(in("open/k"), 0o700), os.Chmod(in("open"), 0o777), os.MkdirAll(in("group/k"), 0o700), os.Chmod(in("group/k"), 0o770),
		os.WriteFile(in("file"), nil, 0o600), os.MkdirAll(in("sticky/k"), 0o700), os.Chmod(in("sticky"), 0o777|os.ModeSticky),
	} {
		if err != nil {
			t.Fatal(err)
		}
	}
	for _, dir := range []string{
		"", "k", "/k", "/nix/..", in("real") + "/", in("link/k"), in("real/klink"), in("open/k"), in("group/k"), in("file"), in("file/k"),
		in("sticky/k"), tmp + "/real/../real/k",
	} {
		_, err := Dir{Path: dir}.Sync(ctx, []string{path("a")})
		if !errors.Is(err, ErrUnsafeDir) && !errors.Is(err, unix.ENOTDIR) {
			t.Errorf("%q: %v", dir, err)
		}
	}
	if _, err := (Dir{Path: in("none/overkeep/k")}).Sync(ctx, nil); !errors.Is(err, os.ErrNotExist) {
		t.Errorf("more than two elements are missing: %v", err)
	}
	for _, p := range []string{"", "/nix/store", "/nix/store/..", "/etc/passwd", path("a/b"), "/nix/store/x", path("a") + "\n"} {
		_, err := Dir{Path: in("real/k")}.Sync(ctx, []string{path("fine"), p})
		if !errors.Is(err, ErrNotStorePath) || p != "" && strings.Contains(err.Error(), p) {
			t.Errorf("%q: %v", p, err)
		}
	}
	if got := entries(t, in("real/k")); got != "" {
		t.Errorf("a bad list was half done: %q", got)
	}
	ctx, cancel := context.WithCancel(ctx)
	cancel()
	if _, err := (Dir{Path: in("real/k")}).Sync(ctx, []string{path("a")}); !errors.Is(err, context.Canceled) {
		t.Error(err)
	}
}

// TestLocked: two users of one directory take turns; waiting ends with ctx.
func TestLocked(t *testing.T) {
	d := Dir{Path: filepath.Join(t.TempDir(), "overkeep", "k1")}
	h, err := d.open(t.Context())
	if err != nil {
		t.Fatal(err)
	}
	ctx, cancel := context.WithCancel(t.Context())
	done := make(chan error)
	go func() { _, err := d.Sync(ctx, nil); done <- err }()
	cancel()
	if err := <-done; !errors.Is(err, context.Canceled) {
		t.Error(err)
	}
	h.Close()
	if _, err := d.Sync(t.Context(), nil); err != nil {
		t.Error(err)
	}
}

// TestPinner: every call sees a list made after it began, many calls share few
// lists, and lists are never asked for at the same time.
func TestPinner(t *testing.T) {
	var current atomic.Int64
	var asked, at atomic.Int64
	gate, begun := make(chan struct{}, 100), make(chan struct{})
	first := sync.OnceFunc(func() { close(begun) })
	p := &Pinner{
		Dir: Dir{Path: filepath.Join(t.TempDir(), "overkeep", "k1")},
		Needs: func(context.Context) ([]string, error) {
			if at.Add(1) != 1 {
				t.Error("asked twice at a time")
			}
			defer at.Add(-1)
			asked.Add(1)
			n := current.Load()
			first()
			<-gate
			return []string{path(fmt.Sprint(n))}, nil
		},
	}
	var wg sync.WaitGroup
	wg.Go(func() {
		if _, err := p.Add(t.Context()); err != nil {
			t.Error(err)
		}
	})
	<-begun // the first run is under way, and its list is 0
	current.Store(1)
	for range 20 {
		wg.Go(func() {
			if _, err := p.Exact(t.Context()); err != nil {
				t.Error(err)
			}
			if got := entries(t, p.Dir.Path); got != "1" {
				t.Errorf("left %q after a call that began with list 1", got)
			}
		})
	}
	for range 100 {
		gate <- struct{}{}
	}
	wg.Wait()
	p.Wait()
	if n := asked.Load(); n < 2 || n > 21 {
		t.Errorf("asked %d times", n)
	}
	fail := errors.New("no list")
	p.Needs = func(context.Context) ([]string, error) { return nil, fail }
	if _, err := p.Exact(t.Context()); err != fail {
		t.Error(err)
	}
	if got := entries(t, p.Dir.Path); got != "1" {
		t.Errorf("no list, and pins went: %q", got)
	}
}
