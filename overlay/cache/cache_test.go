package cache

import (
	"bytes"
	"context"
	"crypto/sha256"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"strings"
	"testing"

	"github.com/google/go-cmp/cmp"

	"overkeep/overlay/drv/storepath"
	"overkeep/overlay/tree"
)

func must(t testing.TB, err error) {
	t.Helper()
	if err != nil {
		t.Fatal(err)
	}
}

func open(t testing.TB, path string) *os.File {
	t.Helper()
	f, err := os.Open(path)
	must(t, err)
	t.Cleanup(func() { f.Close() })
	return f
}

func us() Options { return Options{UID: os.Getuid(), GID: os.Getgid()} }

func base(i int) string { return fmt.Sprintf("%032d-p%d", i, i) }

// world is a store directory with n paths, of which each refers to the one before, and
// two have one content.
func world(t testing.TB, n int) (dir string, store *os.File, infos []Info) {
	t.Helper()
	dir = t.TempDir()
	store = open(t, dir)
	for i := range n {
		b := base(i)
		must(t, os.Mkdir(filepath.Join(dir, b), 0o755))
		must(t, os.WriteFile(filepath.Join(dir, b, "f"), bytes.Repeat([]byte{byte(i / 2)}, i*1000), 0o644))
		if i < 2 {
			must(t, os.Remove(filepath.Join(dir, b, "f")))
		}
		r, err := tree.Hash(t.Context(), store, b, tree.Options{})
		must(t, err)
		in := Info{Path: storepath.Dir + "/" + b, NarHash: r.NarHash, NarSize: r.NarSize, Refs: []string{storepath.Dir + "/" + b}}
		if i > 0 {
			in.Refs = append(in.Refs, infos[i-1].Path)
			in.Deriver = infos[i-1].Path
			in.Sigs = []string{"key-1:QUJD", "key-2:REVG"}
		}
		infos = append(infos, in)
	}
	return dir, store, infos
}

func contents(t testing.TB, dir string) map[string]string {
	t.Helper()
	all := map[string]string{}
	must(t, filepath.WalkDir(dir, func(p string, d fs.DirEntry, err error) error {
		if err != nil || p == dir {
			return err
		}
		fi, err := d.Info()
		if err != nil {
			return err
		}
		rel, _ := filepath.Rel(dir, p)
		if d.IsDir() {
			all[rel] = fmt.Sprint(fi.Mode())
			return nil
		}
		b, err := os.ReadFile(p)
		all[rel] = fmt.Sprintf("%v %x", fi.Mode(), sha256.Sum256(b))
		return err
	}))
	return all
}

func TestWrite(t *testing.T) {
	_, store, infos := world(t, 20)
	dir := t.TempDir()
	dst := open(t, dir)
	o := us()
	var told, size int64
	done := map[int]bool{}
	o.Progress = func(n int64) { told += n }
	o.Done = func(i int, kept bool, err error) {
		if err != nil || done[i] {
			t.Errorf("%d: %v (again: %v)", i, err, done[i])
		}
		done[i] = true
		if _, err := os.Stat(filepath.Join(dir, base(i)[:32]+".narinfo")); err != nil {
			t.Error(err)
		}
	}
	must(t, Write(t.Context(), dst, store, infos, o))
	for _, in := range infos {
		size += in.NarSize
	}
	if told != size || len(done) != len(infos) {
		t.Errorf("told of %d bytes of %d, done %d", told, size, len(done))
	}
	first := contents(t, dir)
	if len(first) != 1+1+len(infos)+19 { // info, nar, narinfos; two paths have one archive
		t.Errorf("%d files", len(first))
	}
	for name, what := range first {
		if strings.HasSuffix(name, suffix) || !strings.HasPrefix(what, "-rw-------") && what != "drwx------" {
			t.Errorf("%s: %s", name, what)
		}
	}
	text, err := os.ReadFile(filepath.Join(dir, base(3)[:32]+".narinfo"))
	must(t, err)
	sum := storepath.Base32(infos[3].NarHash[:])
	if d := cmp.Diff(fmt.Sprintf(`StorePath: /nix/store/%s
URL: nar/%s.nar
Compression: none
FileHash: sha256:%s
FileSize: %d
NarHash: sha256:%s
NarSize: %d
References: %s %s
Deriver: %s
Sig: key-1:QUJD
Sig: key-2:REVG
`, base(3), sum, sum, infos[3].NarSize, sum, infos[3].NarSize, base(2), base(3), base(2)), string(text)); d != "" {
		t.Error(d)
	}

	// Again: all is kept, whatever an earlier call left or a crash tore is made anew.
	for _, c := range []struct {
		what   string
		damage func() error
		anew   int
	}{
		{"nothing", func() error { return nil }, 0},
		{"half an archive", func() error { return os.Truncate(filepath.Join(dir, narDir, sum+".nar"), 5) }, 1},
		{"no archive", func() error { return os.Remove(filepath.Join(dir, narDir, sum+".nar")) }, 1},
		{"half a narinfo", func() error { return os.Truncate(filepath.Join(dir, base(3)[:32]+".narinfo"), 5) }, 1},
		{"an empty info", func() error { return os.Truncate(filepath.Join(dir, infoName), 0) }, 0},
		{"a narinfo of other facts", func() error { infos[3].Sigs = nil; return nil }, 1},
		{"what is under way", func() error {
			infos[3].Sigs = infos[4].Sigs
			return errors.Join(os.Remove(filepath.Join(dir, base(3)[:32]+".narinfo")),
				os.WriteFile(filepath.Join(dir, base(3)[:32]+".narinfo"+suffix), []byte("x"), 0o600),
				os.Symlink("/dev/full", filepath.Join(dir, narDir, sum+".nar"+suffix)))
		}, 1},
	} {
		must(t, c.damage())
		anew := 0
		o.Done = func(i int, kept bool, err error) {
			if !kept {
				anew++
			}
			if err != nil {
				t.Errorf("%s: %v", c.what, err)
			}
		}
		must(t, Write(t.Context(), dst, store, infos, o))
		if anew != c.anew {
			t.Errorf("%s: %d paths written", c.what, anew)
		}
	}
	if d := cmp.Diff(first, contents(t, dir)); d != "" {
		t.Errorf("after repairs: %s", d)
	}
}

// A path that is not what it should be is named, not announced, and stops no other.
func TestMismatch(t *testing.T) {
	where, store, infos := world(t, 6)
	dir := t.TempDir()
	must(t, os.WriteFile(filepath.Join(where, base(4), "f"), []byte("changed"), 0o644))
	must(t, os.RemoveAll(filepath.Join(where, base(2))))
	infos[5].NarSize++
	errs := map[int]error{}
	o := us()
	o.Done = func(i int, _ bool, err error) { errs[i] = err }
	err := Write(t.Context(), open(t, dir), store, infos, o)
	var bad *tree.MismatchError
	if !errors.As(err, &bad) || bad.Name != base(4) || !errors.Is(err, fs.ErrNotExist) || !errors.Is(err, ErrInfo) {
		t.Errorf("%v", err)
	}
	for i := range infos {
		_, err := os.Stat(filepath.Join(dir, base(i)[:32]+".narinfo"))
		if wrong := i == 2 || i == 4 || i == 5; (err == nil) == wrong || (errs[i] != nil) != wrong {
			t.Errorf("%d: %v %v", i, err, errs[i])
		}
	}
	left, err := filepath.Glob(filepath.Join(dir, narDir, "*"+suffix))
	if err != nil || len(left) != 0 {
		t.Errorf("%v %v", left, err)
	}
	if e, err := os.ReadDir(filepath.Join(dir, narDir)); err != nil || len(e) != 2 { // 0 and 1 are one, 3
		t.Errorf("%v %v", e, err)
	}
}

func TestCancelled(t *testing.T) {
	_, store, infos := world(t, 30)
	dir := t.TempDir()
	dst := open(t, dir)
	for n := range 4 {
		ctx, cancel := context.WithCancel(t.Context())
		o := us()
		calls := 0
		o.Progress = func(int64) {
			if calls++; calls > n*5 {
				cancel()
			}
		}
		if err := Write(ctx, dst, store, infos, o); !errors.Is(err, context.Canceled) {
			t.Errorf("%v", err)
		}
		for name := range contents(t, dir) {
			if hash, ok := strings.CutSuffix(name, ".narinfo"); ok {
				for i := range infos {
					if base(i)[:32] == hash {
						fi, err := os.Stat(filepath.Join(dir, narDir, narName(&infos[i])))
						if err != nil || fi.Size() != infos[i].NarSize {
							t.Errorf("%s is announced: %v", base(i), err)
						}
					}
				}
			}
		}
		cancel()
	}
	must(t, Write(t.Context(), dst, store, infos, us()))
}

func TestRefused(t *testing.T) {
	_, store, infos := world(t, 2)
	good := infos[1]
	for what, change := range map[string]func(*Info){
		"no path":            func(i *Info) { i.Path = "" },
		"another store":      func(i *Info) { i.Path = "/gnu" + i.Path[4:] },
		"a path inside":      func(i *Info) { i.Path += "/f" },
		"a line in a path":   func(i *Info) { i.Path += "\nSig: x:y" },
		"a reference":        func(i *Info) { i.Refs = []string{base(0)} },
		"a deriver":          func(i *Info) { i.Deriver = "unknown-deriver" },
		"a line in a sig":    func(i *Info) { i.Sigs = []string{"k:a\nCA: x"} },
		"a space in a sig":   func(i *Info) { i.Sigs = []string{"k:a b"} },
		"an empty sig":       func(i *Info) { i.Sigs = []string{""} },
		"a sig without key":  func(i *Info) { i.Sigs = []string{"QUJD"} },
		"a line in a CA":     func(i *Info) { i.CA = "text:\n" },
		"a CA without end":   func(i *Info) { i.CA = strings.Repeat("x", maxField+1) },
		"no size":            func(i *Info) { i.NarSize = 0 },
		"a size below zero":  func(i *Info) { i.NarSize = -1 },
		"the same one twice": func(i *Info) { *i = infos[0] },
	} {
		dir := t.TempDir()
		in := good
		change(&in)
		if err := Write(t.Context(), open(t, dir), store, []Info{infos[0], in}, us()); !errors.Is(err, ErrInfo) {
			t.Errorf("%s: %v", what, err)
		}
		if left := contents(t, dir); len(left) != 0 {
			t.Errorf("%s: %v was written", what, left)
		}
	}
	for what, make := range map[string]func(dir string) error{
		"another store's cache": func(d string) error {
			return os.WriteFile(filepath.Join(d, infoName), []byte("StoreDir: /gnu/store\n"), 0o600)
		},
		"no cache":         func(d string) error { return os.WriteFile(filepath.Join(d, infoName), []byte("x"), 0o600) },
		"a link for nar":   func(d string) error { return os.Symlink(t.TempDir(), filepath.Join(d, narDir)) },
		"a file for nar":   func(d string) error { return os.WriteFile(filepath.Join(d, narDir), nil, 0o600) },
		"a directory info": func(d string) error { return os.Mkdir(filepath.Join(d, infoName), 0o700) },
	} {
		dir := t.TempDir()
		must(t, make(dir))
		if err := Write(t.Context(), open(t, dir), store, infos, us()); !errors.Is(err, ErrForeign) {
			t.Errorf("%s: %v", what, err)
		}
	}
}
