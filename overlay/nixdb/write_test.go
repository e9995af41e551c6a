package nixdb

import (
	"context"
	"database/sql"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"strings"
	"sync"
	"testing"

	"github.com/google/go-cmp/cmp"
	"pgregory.net/rapid"
)

func narHash(n int) string { return fmt.Sprintf("sha256:%064x", n) }

// full is a closure with everything that a row can say: a derivation, its output that
// refers to itself, a cycle, a fetched source.
func full() []Info {
	return []Info{
		{Path: path("src"), NarHash: narHash(1), NarSize: 120, RegistrationTime: 1700000000, CA: "fixed:r:sha256:0000", Sigs: []string{"b:2==", "a:1=="}},
		{Path: path("app.drv"), NarHash: narHash(2), NarSize: 1 << 40, RegistrationTime: 1700000001, CA: "text:sha256:0000", Refs: []string{path("src")},
			Outputs: []Output{{"dev", path("app-dev")}, {"out", path("app")}}},
		{Path: path("app"), Deriver: path("app.drv"), NarHash: narHash(3), RegistrationTime: 1700000002, Ultimate: true,
			Refs: []string{path("app"), path("ring"), path("src")}},
		{Path: path("ring"), NarHash: narHash(4), NarSize: 1, Refs: []string{path("ring2")}},
		{Path: path("ring2"), NarHash: narHash(5), NarSize: 1, Refs: []string{path("ring")}},
	}
}

func paths(infos []Info) (out []string) {
	for _, i := range infos {
		out = append(out, i.Path)
	}
	return out
}

func empty(t testing.TB) string {
	file, db := live(t, "wal")
	if err := db.Close(); err != nil {
		t.Fatal(err)
	}
	return file
}

// What is registered is read back as it was given, also by repeating it.
func TestRegister(t *testing.T) {
	file := empty(t)
	want := full()
	for range 2 {
		if err := Register(t.Context(), file, want); err != nil {
			t.Fatal(err)
		}
		got, missing, err := ReadInfos(t.Context(), file, append(paths(want), path("none"), path("app")))
		if err != nil {
			t.Fatal(err)
		}
		if d := cmp.Diff(want, got); d != "" || len(missing) != 1 || missing[0] != path("none") {
			t.Fatalf("missing %q; %s", missing, d)
		}
	}
	// NULL where Nix has NULL.
	db, err := sql.Open("sqlite3", "file:"+strings.NewReplacer("%", "%25", "?", "%3f", "#", "%23", " ", "%20").Replace(file)+"?mode=ro")
	if err != nil {
		t.Fatal(err)
	}
	defer db.Close()
	var nulls int
	if err := db.QueryRow("select count(*) from ValidPaths where deriver is null and ultimate is null and sigs is null and ca is null").Scan(&nulls); err != nil || nulls != 2 {
		t.Errorf("%d rows with NULLs, %v", nulls, err)
	}
}

// The closure has every path after what it refers to, but for a cycle.
func TestReadClosure(t *testing.T) {
	file := empty(t)
	if err := Register(t.Context(), file, full()); err != nil {
		t.Fatal(err)
	}
	got, err := ReadClosure(t.Context(), file, []string{path("app")})
	if err != nil {
		t.Fatal(err)
	}
	if d := cmp.Diff([]string{path("ring2"), path("ring"), path("src"), path("app")}, paths(got)); d != "" {
		t.Error(d)
	}
	var missing *MissingRefError
	if _, err := ReadClosure(t.Context(), file, []string{path("src"), path("none")}); !errors.As(err, &missing) || missing.Ref != path("none") {
		t.Errorf("%v", err)
	}
}

// A call that is refused changes nothing.
func TestRegisterRefuses(t *testing.T) {
	file := empty(t)
	if err := Register(t.Context(), file, full()); err != nil {
		t.Fatal(err)
	}
	state := func() string {
		c, err := ReadClosure(t.Context(), file, paths(full()))
		tot, err2 := mustOpen(t, file).Totals(t.Context())
		return fmt.Sprint(c, tot, err, err2)
	}
	before := state()
	fresh := Info{Path: path("new"), NarHash: narHash(9)}
	for _, c := range []struct {
		name string
		with func(i *Info)
		err  any
	}{
		{"reference", func(i *Info) { i.Refs = []string{path("none")} }, new(*MissingRefError)},
		{"conflict", func(i *Info) { i.Path = path("src") }, new(*ConflictError)},
		{"no store path", func(i *Info) { i.Path = "/nix/store/x" }, nil},
		{"relative", func(i *Info) { i.Path = "nix/store/" + name("x") }, nil},
		{"short hash", func(i *Info) { i.NarHash = "sha256:00" }, nil},
		{"base 32", func(i *Info) { i.NarHash = "sha256:" + strings.Repeat("z", 64) }, nil},
		{"size", func(i *Info) { i.NarSize = -1 }, nil},
		{"time", func(i *Info) { i.RegistrationTime = -1 }, nil},
		{"deriver", func(i *Info) { i.Deriver = "x.drv" }, nil},
		{"signature", func(i *Info) { i.Sigs = []string{"a:b c:d"} }, nil},
		{"empty signature", func(i *Info) { i.Sigs = []string{""} }, nil},
		{"content address", func(i *Info) { i.CA = "a\nb" }, nil},
		{"odd reference", func(i *Info) { i.Refs = []string{""} }, nil},
		{"outputs of no derivation", func(i *Info) { i.Outputs = []Output{{"out", path("x")}} }, nil},
		{"odd output", func(i *Info) { i.Path, i.Outputs = path("new.drv"), []Output{{"", path("x")}} }, nil},
	} {
		i := fresh
		c.with(&i)
		// Behind one that could be registered.
		err := Register(t.Context(), file, []Info{{Path: path("good"), NarHash: narHash(8)}, i})
		if c.err == nil && !errors.Is(err, ErrInfo) || c.err != nil && !errors.As(err, c.err) {
			t.Errorf("%s: %v", c.name, err)
		}
		if got := state(); got != before {
			t.Errorf("%s: now %s", c.name, got)
		}
	}
	if err := os.WriteFile(filepath.Join(filepath.Dir(file), "schema"), []byte("11"), 0o600); err != nil {
		t.Fatal(err)
	}
	for what, err := range map[string]error{
		"register": Register(t.Context(), file, []Info{fresh}), "invalidate": Invalidate(t.Context(), file, []string{path("app")}, nil),
		"scrub": func() error { _, err := Scrub(t.Context(), file, [][]byte{[]byte("name")}); return err }(),
	} {
		if !errors.Is(err, ErrSchema) {
			t.Errorf("%s in another schema: %v", what, err)
		}
	}
}

func mustOpen(t testing.TB, file string) *DB {
	t.Helper()
	d, err := Open(t.Context(), file)
	if err != nil {
		t.Fatal(err)
	}
	return d
}

// A row that is there is completed, not replaced.
func TestRegisterCompletes(t *testing.T) {
	file := empty(t)
	all := full()
	bare := all[1]
	bare.Refs, bare.Outputs = nil, bare.Outputs[:1]
	if err := Register(t.Context(), file, []Info{all[0], bare}); err != nil {
		t.Fatal(err)
	}
	again := all[1]
	again.RegistrationTime = 5 // the row's own stays
	if err := Register(t.Context(), file, []Info{again}); err != nil {
		t.Fatal(err)
	}
	got, _, err := ReadInfos(t.Context(), file, []string{bare.Path})
	if d := cmp.Diff(all[1:2], got); d != "" || err != nil {
		t.Errorf("%v %s", err, d)
	}
}

func TestInvalidate(t *testing.T) {
	for _, mode := range []string{"wal", "truncate"} {
		t.Run(mode, func(t *testing.T) {
			file, _ := live(t, mode) // open meanwhile
			if err := Register(t.Context(), file, full()); err != nil {
				t.Fatal(err)
			}
			var referred *ReferredError
			if err := Invalidate(t.Context(), file, []string{path("app.drv"), path("src")}, nil); !errors.As(err, &referred) ||
				*referred != (ReferredError{path("src"), path("app")}) {
				t.Errorf("%v", err)
			}
			var conflict *ConflictError
			if err := Invalidate(t.Context(), file, []string{path("app")}, map[string]string{path("app"): narHash(7)}); !errors.As(err, &conflict) {
				t.Errorf("%v", err)
			}
			if got := len(readable(t, file)); got != 5 {
				t.Fatalf("%d paths after refusals", got)
			}
			if n, err := ClearDeriver(t.Context(), file, []string{path("none.drv")}); n != 0 || err != nil {
				t.Errorf("%d, %v", n, err)
			}
			if by, err := Derived(t.Context(), file, []string{path("app.drv")}); err != nil || cmp.Diff(by, []string{path("app")}) != "" {
				t.Errorf("%q, %v", by, err)
			}
			for range 2 {
				if err := Invalidate(t.Context(), file, []string{path("app.drv"), path("none")}, map[string]string{path("app.drv"): narHash(2), path("none"): ""}); err != nil {
					t.Fatal(err)
				}
			}
			for _, want := range []int{1, 0} {
				if n, err := ClearDeriver(t.Context(), file, []string{path("app.drv")}); n != want || err != nil {
					t.Errorf("%d rows, %v", n, err)
				}
			}
			if err := Invalidate(t.Context(), file, []string{path("ring"), path("ring2"), path("app")}, nil); err != nil {
				t.Fatal(err)
			}
			if got := readable(t, file); len(got) != 1 || got[0] != path("src") {
				t.Errorf("left are %q", got)
			}
			n := 0
			s, err := OpenSnapshot(t.Context(), file, 1)
			if err != nil {
				t.Fatal(err)
			}
			defer s.Close()
			if err := errors.Join(s.Outputs(t.Context(), 0, func(int64, []byte) error { n++; return nil }),
				s.Refs(t.Context(), 0, -1, 1<<62, func(r []Ref) error { n += len(r); return nil })); err != nil || n != 0 {
				t.Errorf("%d rows left, %v", n, err)
			}
		})
	}
}

func readable(t testing.TB, file string) (out []string) {
	t.Helper()
	for p, err := range mustOpen(t, file).ValidPaths(context.Background()) {
		if err != nil {
			t.Fatal(err)
		}
		out = append(out, p.Path)
	}
	return out
}

// Whatever rows there are, to read a closure, register it elsewhere and read it there
// gives the same.
func TestMoveProperty(t *testing.T) {
	rapid.Check(t, func(rt *rapid.T) {
		n := rapid.IntRange(1, 8).Draw(rt, "paths")
		var infos []Info
		for i := range n {
			p := Info{Path: path(fmt.Sprint(i, ".drv")), NarHash: narHash(i), NarSize: rapid.Int64Range(0, 1<<50).Draw(rt, "size"),
				RegistrationTime: rapid.Int64Range(0, 1<<33).Draw(rt, "time"), Ultimate: rapid.Bool().Draw(rt, "ultimate"),
				CA: rapid.StringMatching("(text:[a-z0-9]{1,9})?").Draw(rt, "ca"), Sigs: rapid.SliceOfN(rapid.StringMatching("[!-~]{1,9}"), 0, 3).Draw(rt, "sigs")}
			if len(p.Sigs) == 0 {
				p.Sigs = nil
			}
			for j := range n {
				if rapid.IntRange(0, 2).Draw(rt, "ref") == 0 {
					p.Refs = append(p.Refs, path(fmt.Sprint(j, ".drv")))
				}
			}
			for _, o := range []string{"a", "out"}[:rapid.IntRange(0, 2).Draw(rt, "outputs")] {
				p.Outputs = append(p.Outputs, Output{o, path(o)})
			}
			infos = append(infos, p)
		}
		from, to := empty(t), empty(t)
		if err := Register(t.Context(), from, infos); err != nil {
			rt.Fatal(err)
		}
		closure, err := ReadClosure(t.Context(), from, paths(infos[:1]))
		if err != nil {
			rt.Fatal(err)
		}
		if err := Register(t.Context(), to, closure); err != nil {
			rt.Fatal(err)
		}
		got, missing, err := ReadInfos(t.Context(), to, paths(closure))
		if d := cmp.Diff(closure, got); d != "" || err != nil || len(missing) != 0 {
			rt.Fatal(d, err, missing)
		}
		if err := Invalidate(t.Context(), to, paths(closure), nil); err != nil || len(readable(t, to)) != 0 {
			rt.Fatal("not invalidated", err)
		}
	})
}

// Writers of one process and readers beside them, all at once.
func TestWritersAtOnce(t *testing.T) {
	file, _ := live(t, "wal")
	var wg sync.WaitGroup
	for n := range 4 {
		wg.Go(func() {
			for i := range 5 {
				in := []Info{{Path: path(fmt.Sprintf("%d-%d", n, i)), NarHash: narHash(n)}}
				if err := Register(t.Context(), file, in); err != nil {
					t.Error(err)
				}
				if _, _, err := ReadInfos(t.Context(), file, paths(in)); err != nil {
					t.Error(err)
				}
			}
		})
	}
	wg.Wait()
	if got := len(readable(t, file)); got != 20 {
		t.Errorf("%d paths", got)
	}
}
