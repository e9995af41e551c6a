package slot

import (
	"bytes"
	"crypto/rand"
	"errors"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"filippo.io/age"

	"overkeep/crypt/secret"
)

// TestMain makes the binary play other parts: a process to be killed within
// Commit, an age plugin.
func TestMain(m *testing.M) {
	switch {
	case strings.HasPrefix(filepath.Base(os.Args[0]), "age-plugin-"):
		pluginMain()
	case os.Getenv("SLOT_COMMIT") != "":
		commitMain()
	default:
		os.Exit(m.Run())
	}
}

const testLogN = 10 // quick; no promise about guessing is tested

var (
	testBinding = Binding{
		KeepID:    "6f1c5d0e-2f9b-4c86-9c3c-0d1a2b3c4d5e",
		Protector: "0123456789abcdef",
		Policy:    "00112233445566778899aabbccddeeff",
	}
	testTime = time.Date(2026, 11, 22, 10, 0, 0, 0, time.UTC)
)

func sec(t testing.TB, s string) *secret.Bytes {
	t.Helper()
	b, err := secret.From([]byte(s))
	if err != nil {
		t.Fatal(err)
	}
	return b
}

func newMaster(t testing.TB) *secret.Bytes {
	t.Helper()
	m, err := secret.Random(KeySize)
	if err != nil {
		t.Fatal(err)
	}
	return m
}

// keep is a committed set with a passphrase slot "alice", a key slot "laptop" and
// a recovery slot.
type keep struct {
	dir      string
	master   *secret.Bytes
	set      *Set
	files    map[string][]byte
	pass     *secret.Bytes
	laptop   *age.X25519Identity
	recovery *secret.Bytes
}

func newKeep(t testing.TB) *keep {
	t.Helper()
	k := &keep{
		dir:    filepath.Join(t.TempDir(), "slots"),
		master: newMaster(t),
		pass:   sec(t, "correct horse"),
		files:  map[string][]byte{},
		set:    NewSet(testBinding),
	}
	var err error
	if k.laptop, err = age.GenerateX25519Identity(); err != nil {
		t.Fatal(err)
	}
	var rec age.Recipient
	if k.recovery, rec, err = NewRecovery(); err != nil {
		t.Fatal(err)
	}
	pass, err := NewPassphraseRecipient(k.pass, testLogN)
	if err != nil {
		t.Fatal(err)
	}
	k.add(t, Slot{Name: "alice", Kind: Passphrase, Created: testTime, Label: "login, Grüße"}, pass)
	k.add(t, Slot{Name: "laptop", Kind: X25519, Created: testTime}, k.laptop.Recipient())
	k.add(t, Slot{Name: "recovery", Kind: X25519, Role: Recovery, Created: testTime}, rec)
	k.commit(t)
	return k
}

func (k *keep) add(t testing.TB, x Slot, to ...age.Recipient) {
	t.Helper()
	var err error
	if k.files[x.Name], err = Wrap(k.master, to...); err != nil {
		t.Fatal(err)
	}
	if k.set, err = k.set.Add(x); err != nil {
		t.Fatal(err)
	}
}

func (k *keep) commit(t testing.TB) {
	t.Helper()
	if err := Commit(k.dir, k.set, k.files, k.master); err != nil {
		t.Fatal(err)
	}
}

func (k *keep) path(file string) string { return filepath.Join(k.dir, file) }

func (k *keep) load(t testing.TB) (*Set, Files) {
	t.Helper()
	s, files, err := Load(k.dir)
	if err != nil {
		t.Fatal(err)
	}
	return s, files
}

// open loads and opens; the key must be the master key when there is no error.
func (k *keep) open(t testing.TB, keys Keys, only string) (string, error) {
	t.Helper()
	s, files, err := Load(k.dir)
	if err != nil {
		return "", err
	}
	m, name, err := s.Open(files, keys, only)
	if err != nil {
		if m != nil || name != "" {
			t.Errorf("an error with a key or a name %q", name)
		}
		return "", err
	}
	defer m.Wipe()
	if !m.Equal(k.master) {
		t.Errorf("slot %q opened to another key", name)
	}
	return name, nil
}

func identities(ids ...age.Identity) Keys { return Keys{Identities: ids} }

func read(t testing.TB, path string) []byte {
	t.Helper()
	b, err := os.ReadFile(path)
	if err != nil {
		t.Fatal(err)
	}
	return b
}

func overwrite(t testing.TB, path string, b []byte) {
	t.Helper()
	if err := os.WriteFile(path, b, 0o600); err != nil {
		t.Fatal(err)
	}
}

// tamper asserts a *TamperError and returns it.
func tamper(t testing.TB, err error, slot, reason string) {
	t.Helper()
	var e *TamperError
	if !errors.As(err, &e) || e.Slot != slot || e.Reason != reason {
		t.Errorf("got %v, want slot %q %s", err, slot, reason)
	}
}

// header makes an age header with the lines given and a random MAC and payload: it
// parses, and no key opens it.
func header(lines ...string) []byte {
	var b bytes.Buffer
	b.WriteString("age-encryption.org/v1\n")
	for _, l := range lines {
		b.WriteString(l + "\n")
	}
	b.WriteString("--- AAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAA\n")
	tail := make([]byte, 16+32+16)
	rand.Read(tail)
	b.Write(tail)
	return b.Bytes()
}

func scryptHeader(logN string) []byte {
	return header("-> scrypt AAAAAAAAAAAAAAAAAAAAAA "+logN, "AAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAA")
}
