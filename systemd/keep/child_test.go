package keep

import (
	"bytes"
	"encoding/json"
	"errors"
	"io"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"

	"overkeep/crypt/secret"
	"overkeep/overlay/nixdb"
)

func TestSecretPipe(t *testing.T) {
	var pipe bytes.Buffer
	for _, s := range []string{"", "a", strings.Repeat("x", maxSecret)} {
		in, err := secret.From([]byte(s))
		if err != nil {
			t.Fatal(err)
		}
		if err := writeSecret(&pipe, in); err != nil {
			t.Fatal(err)
		}
		out, err := readSecret(&pipe)
		if err != nil || string(out.Bytes()) != s {
			t.Errorf("%d bytes came back as %d: %v", len(s), out.Len(), err)
		}
		in.Wipe()
		out.Wipe()
	}
	long, err := secret.New(maxSecret + 1)
	if err != nil {
		t.Fatal(err)
	}
	defer long.Wipe()
	if err := writeSecret(io.Discard, long); !errors.Is(err, secret.ErrTooLong) {
		t.Errorf("a long secret: %v", err)
	}
	for _, bad := range []string{"", "\x00", "\x00\x00\x00\x05abc", "\xff\xff\xff\xff", "\x00\x01\x00\x01"} {
		if _, err := readSecret(strings.NewReader(bad)); err == nil {
			t.Errorf("%q read as a secret", bad)
		}
	}
}

// A helper's environment holds nothing that could lead it, or a secret.
func TestChildEnv(t *testing.T) {
	got := childEnv([]string{"PATH=/bin", "LD_PRELOAD=x", "OVERKEEP_ROOT=/x", "OVERKEEP_CRASH_AT=1", "PASSPHRASE=x", "AGEDEBUG=plugin", "HOME=/root", "GODEBUG=x"})
	if want := []string{"PATH=/bin", "OVERKEEP_CRASH_AT=1", "HOME=/root"}; !slices.Equal(got, want) {
		t.Errorf("got %q, want %q", got, want)
	}
}

func TestReplies(t *testing.T) {
	var events []string
	in := `{"event":"a","result":1}` + "\n" + `{"done":true,"result":2}` + "\n" + `{"event":"late"}` + "\n"
	r := readReplies(strings.NewReader(in), func(n string, _ json.RawMessage) { events = append(events, n) })
	if r == nil || string(r.Result) != "2" || !slices.Equal(events, []string{"a"}) {
		t.Errorf("read %+v and %q", r, events)
	}
	for _, bad := range []string{"", "{}", "x\n", `{"event":"a"}` + "\n" + "garbage\n"} {
		if r := readReplies(strings.NewReader(bad), nil); r != nil {
			t.Errorf("%q read as an answer: %+v", bad, r)
		}
	}
}

func TestLimitedWriter(t *testing.T) {
	var b bytes.Buffer
	w := &limitedWriter{w: &b, n: 5}
	for _, s := range []string{"abc", "def", "ghi"} {
		if n, err := io.WriteString(w, s); n != 3 || err != nil {
			t.Errorf("wrote %d, %v", n, err)
		}
	}
	if b.String() != "abcde" {
		t.Errorf("kept %q", b.String())
	}
}

func TestNixVersion(t *testing.T) {
	for out, want := range map[string]struct {
		major, minor int
		ok, supports bool
	}{
		"nix-daemon (Nix) 2.34.8":            {2, 34, true, true},
		"nix-daemon (Nix) 2.26.3":            {2, 26, true, true},
		"nix-daemon (Nix) 2.22.0":            {2, 22, true, true},
		"nix-daemon (Nix) 2.21.4":            {2, 21, true, false},
		"nix-daemon (Nix) 2.8.0":             {2, 8, true, false},
		"nix (Nix) 3.0":                      {3, 0, true, true},
		"nix-daemon (Lix, like Nix) 2.93.0":  {2, 93, true, true},
		"nix-daemon (Nix) 2.35.0pre20260101": {2, 35, true, true},
		"":                                   {},
		"command not found":                  {},
		"99999999999999999999.1":             {},
	} {
		major, minor, ok := NixVersion(out)
		if ok != want.ok || ok && (major != want.major || minor != want.minor || NixSupports(major, minor) != want.supports) {
			t.Errorf("%q: %d.%d, %v", out, major, minor, ok)
		}
	}
}

func event(name string, pad int) string {
	b := make([]byte, 16)
	b[12] = byte(len(name) + pad)
	return string(b) + name + strings.Repeat("\x00", pad)
}

func TestInotifyNames(t *testing.T) {
	got, lost := inotifyNames([]byte(event("abc", 5) + event("", 0) + event("d", 1)))
	if want := []string{"abc", "", "d"}; !slices.Equal(got, want) || lost {
		t.Errorf("got %q, %v", got, lost)
	}
	overflow := []byte(event("", 0))
	overflow[5] = 0x40 // IN_Q_OVERFLOW, 0x4000
	if _, lost := inotifyNames(overflow); !lost {
		t.Error("lost events are not noticed")
	}
}

func FuzzInotifyNames(f *testing.F) {
	f.Add([]byte(event("abc", 5)))
	f.Add([]byte("short"))
	f.Add(bytes.Repeat([]byte{0xff}, 16))
	f.Fuzz(func(t *testing.T, b []byte) { inotifyNames(b) })
}

// What the keep needs is what its own paths and its roots reach; a row that
// nothing reaches is left over.
func TestWalk(t *testing.T) {
	const s = "/nix/store/"
	g := nixdb.Layered{Graph: nixdb.Graph{
		Paths: []string{s + "mine", s + "lib", s + "libc", s + "rooted", s + "looked-at", s + "loop"},
		Refs:  [][2]int32{{0, 1}, {1, 2}, {3, 2}, {4, 2}, {5, 5}, {5, 0}}}, Own: []bool{true, false, false, false, false, false}}
	want := []bool{true, true, true, true, false, false}
	if got := walk(g, map[string]bool{s + "rooted": true}); !slices.Equal(got, want) {
		t.Errorf("reached %v, want %v", got, want)
	}
	if got := walk(nixdb.Layered{}, nil); len(got) != 0 {
		t.Errorf("an empty keep reaches %v", got)
	}
}

func TestTempRoots(t *testing.T) {
	dir := t.TempDir()
	if err := os.MkdirAll(filepath.Join(dir, "temproots"), 0o700); err != nil {
		t.Fatal(err)
	}
	if err := os.WriteFile(filepath.Join(dir, "temproots/17"), []byte("/nix/store/a\x00/nix/store/b\x00junk\x00/nix/store/cut"), 0o600); err != nil {
		t.Fatal(err)
	}
	if got, want := tempRoots(dir), []string{"/nix/store/a", "/nix/store/b", "/nix/store/cut"}; !slices.Equal(got, want) {
		t.Errorf("got %q, want %q", got, want)
	}
}

func TestGCRoots(t *testing.T) {
	dir := t.TempDir()
	link := func(target, name string) {
		t.Helper()
		p := filepath.Join(dir, name)
		if err := os.MkdirAll(filepath.Dir(p), 0o700); err != nil {
			t.Fatal(err)
		}
		if err := os.Symlink(target, p); err != nil {
			t.Fatal(err)
		}
	}
	link("/nix/store/a-direct", "gcroots/direct")
	link("/nix/store/b-indirect/bin/x", "elsewhere/result")
	link(filepath.Join(dir, "elsewhere/result"), "gcroots/auto/x")
	link("/nix/store/c-profile", "profiles/p-1-link")
	link("p-1-link", "profiles/p")
	link("/nonexistent", "gcroots/auto/stale")
	link("/nix/storage/x", "gcroots/auto/other")
	got := gcRoots(dir)
	if want := []string{"/nix/store/b-indirect", "/nix/store/a-direct", "/nix/store/c-profile"}; !slices.Equal(got, want) {
		t.Errorf("got %q, want %q", got, want)
	}
}

// The roots are those among the valid paths that no other valid one refers to; a
// path that only an invalid one refers to needs a root of its own.
func TestMinimal(t *testing.T) {
	g := nixdb.Graph{Paths: []string{"a", "b", "c", "d"}, Refs: [][2]int32{{0, 1}, {1, 2}, {3, 2}}}
	for _, tt := range []struct{ valid, want []string }{
		{[]string{"a", "b", "c", "d"}, []string{"a", "d"}},
		{[]string{"b", "c"}, []string{"b"}},
		{[]string{"a", "c"}, []string{"a", "c"}},
		{[]string{"c"}, []string{"c"}},
		{nil, nil},
	} {
		got := slices.Sorted(slices.Values(minimal(g, tt.valid)))
		if !slices.Equal(got, tt.want) {
			t.Errorf("valid %q: roots %q, want %q", tt.valid, got, tt.want)
		}
	}
}
