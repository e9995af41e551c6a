package keep

import (
	"bytes"
	"encoding/json"
	"errors"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"overkeep/crypt/volume"
)

func sample() *Header {
	return &Header{Version: 1, Features: []string{}, ID: strings.Repeat("a1", 16), Name: "alice", User: "alice", UID: 1000,
		Created: time.Date(2026, 11, 22, 10, 0, 0, 0, time.UTC), Backend: volume.Image, Size: 1 << 30, WorkDir: "keep"}
}

// A header of version 1 as the first release wrote it stays readable.
const headerV1 = `{
  "version": 1,
  "features": [],
  "id": "c47b3af07add4dc36a400182e903ae60",
  "name": "alice",
  "user": "alice",
  "uid": 1000,
  "created": "2026-11-22T11:13:54Z",
  "backend": "image",
  "size": 536870912,
  "fs_image": "/srv/alice.img",
  "work_dir": "keep"
}
`

func TestHeaderV1(t *testing.T) {
	h, err := ParseHeader([]byte(headerV1), "alice")
	if err != nil {
		t.Fatal(err)
	}
	if h.UID != 1000 || h.FSImage != "/srv/alice.img" || h.Backend != volume.Image {
		t.Errorf("read %+v", h)
	}
	if got := encode(h); string(got) != headerV1 {
		t.Errorf("written again it reads\n%s", got)
	}
}

func TestHeaderRefused(t *testing.T) {
	change := func(f func(h *Header)) string {
		h := sample()
		f(h)
		return string(encode(h))
	}
	good := string(encode(sample()))
	for _, tt := range []struct {
		name, text string
		code       Code
	}{
		{"empty", "", CodeDamaged},
		{"not JSON", "hello", CodeDamaged},
		{"null", "null", CodeDamaged},
		{"array", "[]", CodeDamaged},
		{"key in another case", strings.Replace(good, `"user"`, `"User"`, 1), CodeDamaged},
		{"repeated key", strings.Replace(good, `"user"`, `"user": "bob", "user"`, 1), CodeDamaged},
		{"later feature with a key of its own", strings.Replace(good, `"features": []`, `"features": ["shiny"], "shine": 1`, 1), CodeVersion},
		{"cut", good[:len(good)/2], CodeDamaged},
		{"trailing data", good + "{}", CodeDamaged},
		{"unknown field", strings.Replace(good, `"id"`, `"x": 1, "id"`, 1), CodeDamaged},
		{"later version", change(func(h *Header) { h.Version = 2 }), CodeVersion},
		{"later version with unknown fields", `{"version": 2, "shape": "new"}`, CodeVersion},
		{"negative version", change(func(h *Header) { h.Version = -1 }), CodeVersion},
		{"unknown feature", change(func(h *Header) { h.Features = []string{"verity"} }), CodeVersion},
		{"another keep's", change(func(h *Header) { h.Name = "bob" }), CodeTampered},
		{"no id", change(func(h *Header) { h.ID = "" }), CodeDamaged},
		{"short id", change(func(h *Header) { h.ID = "a1" }), CodeDamaged},
		{"root's", change(func(h *Header) { h.UID = 0 }), CodeDamaged},
		{"a user with a control character", change(func(h *Header) { h.User = "\x1b[31mroot" }), CodeDamaged},
		{"relative image", change(func(h *Header) { h.FSImage = "../x" }), CodeDamaged},
		{"no version", strings.Replace(good, `"version": 1,`, "", 1), CodeDamaged},
		{"version zero", change(func(h *Header) { h.Version = 0 }), CodeDamaged},
		{"no user", change(func(h *Header) { h.User = "" }), CodeDamaged},
		{"unknown back-end", change(func(h *Header) { h.Backend = "zfs" }), CodeDamaged},
		{"negative size", change(func(h *Header) { h.Size = -1 }), CodeDamaged},
		{"work directory that climbs", change(func(h *Header) { h.WorkDir = "../x" }), CodeDamaged},
		{"hidden work directory", change(func(h *Header) { h.WorkDir = ".ssh" }), CodeDamaged},
	} {
		var e *Error
		if _, err := ParseHeader([]byte(tt.text), "alice"); !errors.As(err, &e) || e.Code != tt.code {
			t.Errorf("%s: error %v, want code %s", tt.name, err, tt.code)
		}
	}
}

func FuzzParseHeader(f *testing.F) {
	f.Add([]byte(headerV1))
	f.Add([]byte(`{"version":1}`))
	f.Add([]byte("{"))
	f.Fuzz(func(t *testing.T, b []byte) {
		h, err := ParseHeader(b, "alice")
		if err != nil {
			var e *Error
			if !errors.As(err, &e) {
				t.Fatalf("untyped error %v", err)
			}
			return
		}
		// What is accepted is what would be written.
		again, err := ParseHeader(encode(h), "alice")
		if err != nil || !bytes.Equal(encode(again), encode(h)) {
			t.Fatalf("accepted %q, which does not survive writing: %v", b, err)
		}
	})
}

// Nothing but a regular file of the right size is read, and nothing blocks.
func TestReadSmall(t *testing.T) {
	dir := t.TempDir()
	at := func(n string) string { return filepath.Join(dir, n) }
	if err := os.WriteFile(at("file"), []byte("x"), 0o600); err != nil {
		t.Fatal(err)
	}
	if err := os.WriteFile(at("big"), make([]byte, 100), 0o600); err != nil {
		t.Fatal(err)
	}
	if err := os.Symlink("file", at("link")); err != nil {
		t.Fatal(err)
	}
	if err := unix.Mkfifo(at("fifo"), 0o600); err != nil {
		t.Fatal(err)
	}
	if b, err := readSmall(at("file"), 10); err != nil || string(b) != "x" {
		t.Errorf("a file: %q, %v", b, err)
	}
	for _, n := range []string{"big", "link", "fifo", ".", "missing"} {
		if b, err := readSmall(at(n), 10); err == nil {
			t.Errorf("%s was read: %q", n, b)
		}
	}
	if _, err := readSmall("/dev/zero", 10); err == nil {
		t.Error("a device was read")
	}
}

func TestStrictJSON(t *testing.T) {
	for _, bad := range []string{"", "{", "{} {}", `{"y":1}`, "{}x"} {
		var v struct{ X int }
		if strictJSON([]byte(bad), &v) == nil {
			t.Errorf("%q accepted", bad)
		}
	}
}

func TestErrorCrossesProcesses(t *testing.T) {
	in := errorf(CodeTampered, "recovery", "slot %q: %w", "recovery", os.ErrNotExist)
	raw, err := json.Marshal(in)
	if err != nil {
		t.Fatal(err)
	}
	var e *Error
	if out := decodeError(raw); !errors.As(out, &e) || e.Code != in.Code || e.Message != in.Message || e.Name != "recovery" {
		t.Errorf("came back as %+v", e)
	}
	for _, raw := range []string{"null", ""} {
		if err := decodeError(json.RawMessage(raw)); err != nil {
			t.Errorf("%q is an error: %v", raw, err)
		}
	}
	for _, raw := range []string{"{}", "[]", "7", `{"code":""}`} {
		if err := decodeError(json.RawMessage(raw)); err == nil {
			t.Errorf("%q is no error", raw)
		}
	}
}

// nil must stay an untyped nil, or every success is a failure.
func TestClassifiedNil(t *testing.T) {
	if err := classified(nil); err != nil {
		t.Errorf("classified(nil) = %v", err)
	}
}
