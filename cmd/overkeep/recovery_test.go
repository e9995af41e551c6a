package main

import (
	"bytes"
	"context"
	"os"
	"path/filepath"
	"strings"
	"testing"

	"overkeep/crypt/secret"
	"overkeep/crypt/slot"
	"overkeep/systemd/keep"
)

func bytesOf(t *testing.T, s string) *secret.Bytes {
	t.Helper()
	b, err := secret.From([]byte(s))
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(b.Wipe)
	return b
}

// However the key is typed, the identity is the same.
func TestRecoveryIdentity(t *testing.T) {
	key := recoveryKey(t)
	full := string(key.Bytes())
	body := strings.TrimPrefix(full, recoveryPrefix)
	grouped := ""
	for i, c := range body {
		if i > 0 && i%6 == 0 {
			grouped += " "
		}
		grouped += string(c)
	}
	for _, typed := range []string{full, body, grouped, strings.ToLower(grouped), strings.ToLower(full), " " + full + "\t", recoveryPrefix + " " + grouped} {
		in := bytesOf(t, typed)
		if _, err := slot.ParseRecovery(in); err != nil {
			t.Errorf("%q: %v", typed, err)
			continue
		}
		got, err := recoveryIdentity(in)
		if err != nil || string(got.Bytes()) != full {
			t.Errorf("%q: %v", typed, err)
		}
		got.Wipe()
	}
}

func confirmerFor(t *testing.T, file string) (*confirmer, error) {
	t.Helper()
	a := &app{ui: &ui{}}
	return a.newConfirmer(context.Background(), file, "alice")
}

func TestRecoveryFile(t *testing.T) {
	file := filepath.Join(t.TempDir(), "r.txt")
	key := recoveryKey(t)
	c, err := confirmerFor(t, file)
	if err != nil {
		t.Fatal(err)
	}
	if err := c.confirm(key); err != nil {
		t.Fatal(err)
	}
	fi, err := os.Stat(file)
	if err != nil || fi.Mode() != 0o600 {
		t.Errorf("%v, %v", fi.Mode(), err)
	}
	b, err := os.ReadFile(file)
	if err != nil {
		t.Fatal(err)
	}
	if !bytes.HasSuffix(b, append(bytes.Clone(key.Bytes()), '\n')) || !bytes.Contains(b, []byte(`# Recovery key of the overkeep keep "alice"`)) {
		t.Errorf("the file is %d bytes of something else", len(b))
	}
	if ids, err := slot.ParseIdentities(bytes.NewReader(b), nil, nil); err != nil || len(ids) != 1 {
		t.Errorf("%d identities, %v", len(ids), err)
	}
	// The keep did not come to be: nothing stays.
	c.undo()
	if _, err := os.Lstat(file); !os.IsNotExist(err) {
		t.Errorf("the file is still there: %v", err)
	}
}

// A file, a link or a pipe of that name is never written to.
func TestRecoveryFileRefuses(t *testing.T) {
	dir := t.TempDir()
	precious := filepath.Join(dir, "precious")
	if err := os.WriteFile(precious, []byte("precious"), 0o600); err != nil {
		t.Fatal(err)
	}
	link, dangling := filepath.Join(dir, "link"), filepath.Join(dir, "dangling")
	if err := os.Symlink(precious, link); err != nil {
		t.Fatal(err)
	}
	if err := os.Symlink(filepath.Join(dir, "nowhere"), dangling); err != nil {
		t.Fatal(err)
	}
	for _, f := range []string{precious, link, dangling, dir} {
		if _, err := confirmerFor(t, f); keep.Classify(err).Code != keep.CodeKeepExists {
			t.Errorf("%s: %v", f, err)
		}
	}
	// Put there after the look.
	late := filepath.Join(dir, "late")
	c, err := confirmerFor(t, late)
	if err != nil {
		t.Fatal(err)
	}
	if err := os.Symlink(precious, late); err != nil {
		t.Fatal(err)
	}
	if err := c.confirm(recoveryKey(t)); err == nil {
		t.Error("written through a link")
	}
	c.undo()
	if _, err := os.Lstat(late); err != nil {
		t.Errorf("what was not ours was removed: %v", err)
	}
	if b, _ := os.ReadFile(precious); string(b) != "precious" {
		t.Errorf("overwritten: %q", b)
	}
	if _, err := confirmerFor(t, filepath.Join(dir, "no/such/dir/r.txt")); keep.Classify(err) == nil {
		t.Error("a directory that is not there")
	}
}
