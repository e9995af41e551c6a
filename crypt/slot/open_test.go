package slot

import (
	"bytes"
	"crypto/ed25519"
	"crypto/rand"
	"crypto/rsa"
	"encoding/pem"
	"errors"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"

	"filippo.io/age"
	"filippo.io/age/plugin"
	"golang.org/x/crypto/ssh"

	"overkeep/crypt/secret"
)

// sshKey makes a key with ssh's own formats; with a passphrase, encrypted.
func sshKey(t testing.TB, key any, pass string) (private []byte, public string) {
	t.Helper()
	var block *pem.Block
	var err error
	if pass == "" {
		block, err = ssh.MarshalPrivateKey(key, "")
	} else {
		block, err = ssh.MarshalPrivateKeyWithPassphrase(key, "", []byte(pass))
	}
	if err != nil {
		t.Fatal(err)
	}
	signer, err := ssh.NewSignerFromKey(key)
	if err != nil {
		t.Fatal(err)
	}
	return pem.EncodeToMemory(block), string(ssh.MarshalAuthorizedKey(signer.PublicKey()))
}

func newRSA(t testing.TB, bits int) *rsa.PrivateKey {
	t.Helper()
	key, err := rsa.GenerateKey(rand.Reader, bits)
	if err != nil {
		t.Fatal(err)
	}
	return key
}

func newEd25519(t testing.TB) ed25519.PrivateKey {
	t.Helper()
	_, key, err := ed25519.GenerateKey(rand.Reader)
	if err != nil {
		t.Fatal(err)
	}
	return key
}

// testPlugin puts this binary into PATH as age-plugin-slottest, and returns a
// recipient and an identity of it.
func testPlugin(t testing.TB) (recipient, identity string) {
	t.Helper()
	bin := t.TempDir()
	exe, err := os.Executable()
	if err != nil {
		t.Fatal(err)
	}
	if err := os.Symlink(exe, filepath.Join(bin, "age-plugin-slottest")); err != nil {
		t.Fatal(err)
	}
	t.Setenv("PATH", bin)
	return plugin.EncodeRecipient("slottest", []byte("token")), plugin.EncodeIdentity("slottest", []byte("token"))
}

// pluginMain is a token that wraps by xor with nothing secret at all.
func pluginMain() {
	p, err := plugin.New("slottest")
	if err != nil {
		panic(err)
	}
	p.HandleRecipient(func([]byte) (age.Recipient, error) { return xor{}, nil })
	p.HandleIdentity(func([]byte) (age.Identity, error) { return xor{}, nil })
	p.RegisterFlags(nil)
	os.Exit(p.Main())
}

type xor struct{}

func flip(b []byte) []byte {
	b = bytes.Clone(b)
	for i := range b {
		b[i] ^= 0x55
	}
	return b
}

func (xor) Wrap(key []byte) ([]*age.Stanza, error) {
	return []*age.Stanza{{Type: "slottest", Body: flip(key)}}, nil
}

func (xor) Unwrap(stanzas []*age.Stanza) ([]byte, error) {
	for _, s := range stanzas {
		if s.Type == "slottest" {
			return flip(s.Body), nil
		}
	}
	return nil, age.ErrIncorrectIdentity
}

// Every kind of key opens its slot, in a set that has all of them, and no other.
func TestOpenEveryKind(t *testing.T) {
	k := newKeep(t)
	pq, err := age.GenerateHybridIdentity()
	if err != nil {
		t.Fatal(err)
	}
	edPriv, edPub := sshKey(t, newEd25519(t), "")
	encPriv, encPub := sshKey(t, newEd25519(t), "ssh pass")
	rsaPriv, rsaPub := sshKey(t, newRSA(t, 2048), "")
	plugR, plugI := testPlugin(t)
	asked := 0
	ask := func() (*secret.Bytes, error) { asked++; return sec(t, "ssh pass"), nil }

	keys := map[string]Keys{
		"alice":    {Passphrase: k.pass},
		"laptop":   identities(k.laptop),
		"recovery": {},
	}
	rec, err := ParseRecovery(k.recovery)
	if err != nil {
		t.Fatal(err)
	}
	keys["recovery"] = identities(rec)
	for _, x := range []struct {
		name, public string
		private      []byte
		kind         Kind
	}{
		{"pq", pq.Recipient().String(), []byte("# comment\n\n" + pq.String() + "\n"), PQ},
		{"ed", edPub, edPriv, SSH},
		{"enc", encPub, encPriv, SSH},
		{"rsa", rsaPub, rsaPriv, SSH},
		{"token", plugR, []byte(plugI), Plugin},
	} {
		r, kind, err := ParseRecipient(x.public, nil)
		if err != nil || kind != x.kind {
			t.Fatalf("%s: %s %v", x.name, kind, err)
		}
		ids, err := ParseIdentities(bytes.NewReader(x.private), nil, ask)
		if err != nil {
			t.Fatalf("%s: %v", x.name, err)
		}
		k.add(t, Slot{Name: x.name, Kind: kind, Created: testTime}, r)
		keys[x.name] = identities(ids...)
	}
	k.commit(t)
	for name, key := range keys {
		if got, err := k.open(t, key, ""); err != nil || got != name {
			t.Errorf("%s: %q %v", name, got, err)
		}
		if got, err := k.open(t, key, name); err != nil || got != name {
			t.Errorf("only %s: %q %v", name, got, err)
		}
		for other := range keys {
			if other == name {
				continue
			}
			if got, err := k.open(t, key, other); got != "" || !errors.Is(err, ErrWrongKey) && !errors.Is(err, ErrNoSlot) {
				t.Errorf("%s by the key of %s: %q %v", other, name, got, err)
			}
		}
	}
	if asked != 1 {
		t.Errorf("asked %d times for the passphrase of the ssh key; the identity keeps it", asked)
	}
	all := Keys{Passphrase: k.pass}
	for _, key := range keys {
		all.Identities = append(all.Identities, key.Identities...)
	}
	if _, err := k.open(t, all, ""); err != nil {
		t.Error(err)
	}
}

func TestOpenRefusals(t *testing.T) {
	k := newKeep(t)
	stranger, err := age.GenerateX25519Identity()
	if err != nil {
		t.Fatal(err)
	}
	for _, tt := range []struct {
		what string
		keys Keys
		only string
		want error
	}{
		{"no key", Keys{}, "", ErrNoSlot},
		{"empty passphrase", Keys{Passphrase: &secret.Bytes{}}, "", ErrNoSlot},
		{"wrong passphrase", Keys{Passphrase: sec(t, "wrong")}, "", ErrWrongKey},
		{"wrong identity", identities(stranger), "", ErrWrongKey},
		{"both wrong", Keys{Passphrase: sec(t, "wrong"), Identities: []age.Identity{stranger}}, "", ErrWrongKey},
		{"passphrase for a key slot", Keys{Passphrase: k.pass}, "laptop", ErrNoSlot},
		{"identity for a passphrase slot", identities(k.laptop), "alice", ErrNoSlot},
		{"unknown slot", identities(k.laptop), "desktop", ErrUnknownSlot},
		{"path as slot", identities(k.laptop), "../slots/laptop", ErrUnknownSlot},
	} {
		if _, err := k.open(t, tt.keys, tt.only); !errors.Is(err, tt.want) {
			t.Errorf("%s: %v, want %v", tt.what, err, tt.want)
		}
	}
	for _, n := range []int{-1, 31, 64} {
		if _, err := k.open(t, Keys{Passphrase: k.pass, MaxLogN: n}, ""); err == nil || errors.Is(err, ErrWrongKey) {
			t.Errorf("limit %d: %v", n, err)
		}
	}
}

// A missing plugin or an unwilling key file neither hides a key that fits nor
// passes for a wrong key.
func TestIdentityFailure(t *testing.T) {
	k := newKeep(t)
	t.Setenv("PATH", t.TempDir())
	ids, err := ParseIdentities(strings.NewReader(
		plugin.EncodeIdentity("absent", []byte("x"))+"\n"+k.laptop.String()+"\n"), nil, nil)
	if err != nil {
		t.Fatal(err)
	}
	if name, err := k.open(t, identities(ids...), ""); err != nil || name != "laptop" {
		t.Errorf("%q %v", name, err)
	}
	_, err = k.open(t, identities(ids[0]), "")
	var e *IdentityError
	var missing *plugin.NotFoundError
	if !errors.As(err, &e) || e.Slot == "" || !errors.As(err, &missing) || missing.Name != "absent" || errors.Is(err, ErrWrongKey) {
		t.Errorf("%v", err)
	}
	if _, err := OpenFile(k.files["laptop"], identities(ids...)); err != nil {
		t.Errorf("OpenFile: %v", err)
	}

	private, public := sshKey(t, newEd25519(t), "ssh pass")
	r, kind, err := ParseRecipient(public, nil)
	if err != nil {
		t.Fatal(err)
	}
	k.add(t, Slot{Name: "enc", Kind: kind, Created: testTime}, r)
	k.commit(t)
	for what, ask := range map[string]func() (*secret.Bytes, error){
		"nil":   nil,
		"empty": func() (*secret.Bytes, error) { return &secret.Bytes{}, nil },
		"wrong": func() (*secret.Bytes, error) { return sec(t, "wrong"), nil },
		"fails": func() (*secret.Bytes, error) { return nil, errors.New("cancelled") },
	} {
		ids, err := ParseIdentities(bytes.NewReader(private), nil, ask)
		if err != nil {
			t.Fatal(err)
		}
		_, err = k.open(t, identities(ids...), "enc")
		if e := (*IdentityError)(nil); !errors.As(err, &e) || e.Slot != "enc" {
			t.Errorf("%s: %v", what, err)
		}
	}
}

// age would follow a header to 2^22 or, asked to, 2^30 (a tebibyte). That the test
// ends shows that nothing was derived.
func TestWorkFactor(t *testing.T) {
	pass := sec(t, "x")
	for _, tt := range []struct {
		logN string
		max  int
		want int // in the *WorkFactorError; 0: *FormatError
	}{
		{"21", 0, 21}, {"22", 0, 22}, {"30", 0, 30}, {"30", 29, 30}, {"11", 10, 11}, {"31", 30, 31}, {"64", 30, 64},
		{"99999999999999999999", 30, int(^uint(0) >> 1)},
		{"0", 0, 0}, {"-1", 0, 0}, {"+1", 0, 0}, {"018", 0, 0}, {"0x10", 0, 0}, {"1e1", 0, 0}, {"18 ", 0, 0}, {"", 0, 0},
		{"١٨", 0, 0}, {"18 18", 0, 0}, {"1.0", 0, 0},
	} {
		_, err := OpenFile(scryptHeader(tt.logN), Keys{Passphrase: pass, MaxLogN: tt.max})
		var w *WorkFactorError
		var f *FormatError
		switch {
		case tt.want == 0 && !errors.As(err, &f), tt.want != 0 && (!errors.As(err, &w) || w.LogN != tt.want):
			t.Errorf("%q: %v", tt.logN, err)
		}
		// Such a file cannot enter a set through this package ...
		x := Slot{Name: "a", Kind: Passphrase, Created: testTime}
		s, err := NewSet(testBinding).Add(x)
		if err != nil {
			t.Fatal(err)
		}
		if _, err := s.Seal(map[string][]byte{"a": scryptHeader(tt.logN)}, newMaster(t)); tt.want == 0 && err == nil {
			t.Errorf("%q was sealed", tt.logN)
		}
	}
	// ... and in a forged set it hides no good slot and is named.
	k := newKeep(t)
	b := scryptHeader("30")
	overwrite(t, k.path("alice.age"), b)
	x, _ := k.set.Lookup("alice")
	overwrite(t, k.path(setFile), bytes.Replace(read(t, k.path(setFile)), []byte(x.SHA256), []byte(hash(b)), 1))
	_, err := k.open(t, Keys{Passphrase: k.pass}, "")
	var w *WorkFactorError
	if !errors.As(err, &w) || w.Slot != "alice" || errors.Is(err, ErrWrongKey) {
		t.Errorf("%v", err)
	}
	_, err = k.open(t, identities(k.laptop), "")
	tamper(t, err, "laptop", BadMAC)
}

func TestInspect(t *testing.T) {
	const body = "AAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAA"
	lines := func(n int, first ...string) []string {
		for range n {
			first = append(first, "-> X25519 a", body)
		}
		return first
	}
	for what, tt := range map[string]struct {
		file  []byte
		types []string
		logN  int
	}{
		"scrypt":      {scryptHeader("18"), []string{"scrypt"}, 18},
		"x25519":      {header(lines(1)...), []string{"X25519"}, 0},
		"unknown":     {header("-> piv-p256 a b c d", body), []string{"piv-p256"}, 0},
		"16":          {header(lines(16)...), slices.Repeat([]string{"X25519"}, 16), 0},
		"17":          {header(lines(17)...), nil, 0},
		"mixed":       {header(lines(1, "-> scrypt a 10", body)...), nil, 0},
		"two scrypt":  {header("-> scrypt a 10", body, "-> scrypt a 10", body), nil, 0},
		"no argument": {header("-> scrypt", body), nil, 0},
		"armor":       {[]byte("-----BEGIN AGE ENCRYPTED FILE-----\n"), nil, 0},
		"a key":       {[]byte("AGE-SECRET-KEY-1QQQQ\n"), nil, 0},
		"long line":   {header("-> X25519 " + strings.Repeat("a", MaxFileSize)), nil, 0},
		"no stanza":   {header(), nil, 0},
		"empty":       {nil, nil, 0},
		"huge":        {make([]byte, MaxFileSize+1), nil, 0},
	} {
		h, err := Inspect(tt.file)
		if !slices.Equal(h.Stanzas, tt.types) || h.LogN != tt.logN || (err == nil) != (tt.types != nil) {
			t.Errorf("%s: %v %v", what, h, err)
		}
		if err != nil && (len(err.Error()) > 400 || strings.Contains(err.Error(), "QQQQ")) {
			t.Errorf("%s: %v", what, err)
		}
	}
}

func FuzzInspect(f *testing.F) {
	f.Add(scryptHeader("18"))
	f.Add(header("-> X25519 a", "", "-> ssh-rsa b", "AAAA"))
	f.Fuzz(func(t *testing.T, b []byte) {
		h, err := Inspect(b)
		if err != nil {
			if e := (*FormatError)(nil); !errors.As(err, &e) {
				t.Fatalf("untyped %v", err)
			}
			return
		}
		if len(h.Stanzas) == 0 || len(h.Stanzas) > maxStanzas || (h.LogN != 0) != slices.Contains(h.Stanzas, "scrypt") {
			t.Fatalf("%+v", h)
		}
		// age reads the same stanzas from it.
		_, err = age.Decrypt(bytes.NewReader(b), never{})
		var e *age.NoIdentityMatchError
		if !errors.As(err, &e) || !slices.Equal(e.StanzaTypes, h.Stanzas) {
			t.Fatalf("age reads %v, we %v", err, h.Stanzas)
		}
	})
}

type never struct{}

func (never) Unwrap([]*age.Stanza) ([]byte, error) { return nil, age.ErrIncorrectIdentity }

// Exactly 32 bytes, whoever encrypted them.
func TestPlaintextSize(t *testing.T) {
	id, err := age.GenerateX25519Identity()
	if err != nil {
		t.Fatal(err)
	}
	for _, n := range []int{0, 1, 31, 32, 33, 64, 1000} {
		var b bytes.Buffer
		w, err := age.Encrypt(&b, id.Recipient())
		if err != nil {
			t.Fatal(err)
		}
		w.Write(make([]byte, n))
		w.Close()
		m, err := OpenFile(b.Bytes(), identities(id))
		if e := (*FormatError)(nil); (err == nil) != (n == 32) || err != nil && !errors.As(err, &e) {
			t.Errorf("%d bytes: %v", n, err)
		}
		if err == nil && m.Len() != 32 {
			t.Errorf("%d bytes: %d", n, m.Len())
		}
		if n != KeySize {
			if _, err := Wrap(sec(t, strings.Repeat("x", n)), id.Recipient()); err == nil {
				t.Errorf("wrapped a key of %d bytes", n)
			}
		}
	}
	master := newMaster(t)
	if _, err := Wrap(master); err == nil {
		t.Error("wrapped to nobody")
	}
	p, err := NewPassphraseRecipient(sec(t, "x"), testLogN)
	if err != nil {
		t.Fatal(err)
	}
	if _, err := Wrap(master, p, id.Recipient()); err == nil {
		t.Error("a passphrase was mixed with a key")
	}
	for _, n := range []int{-1, 1, 9, 21, 30} {
		if _, err := NewPassphraseRecipient(sec(t, "x"), n); err == nil {
			t.Errorf("scrypt work 2^%d was taken", n)
		}
	}
	if _, err := NewPassphraseRecipient(&secret.Bytes{}, 0); err == nil {
		t.Error("an empty passphrase was taken")
	}
}

// No truncation and no flipped bit of a slot file opens, and none panics.
func TestDamagedFile(t *testing.T) {
	k := newKeep(t)
	rsaPriv, rsaPub := sshKey(t, newRSA(t, 2048), "")
	pq, err := age.GenerateHybridIdentity()
	if err != nil {
		t.Fatal(err)
	}
	r, _, err := ParseRecipient(rsaPub, nil)
	if err != nil {
		t.Fatal(err)
	}
	rsaID, err := ParseIdentities(bytes.NewReader(rsaPriv), nil, nil)
	if err != nil {
		t.Fatal(err)
	}
	wrap := func(r age.Recipient) []byte {
		b, err := Wrap(k.master, r)
		if err != nil {
			t.Fatal(err)
		}
		return b
	}
	for name, tt := range map[string]struct {
		file   []byte
		keys   Keys
		stride int // of the bits flipped
	}{
		"x25519":     {k.files["laptop"], identities(k.laptop), 1},
		"passphrase": {k.files["alice"], Keys{Passphrase: k.pass, MaxLogN: testLogN}, 7},
		"pq":         {wrap(pq.Recipient()), identities(pq), 13},
		"rsa":        {wrap(r), identities(rsaID...), 11},
	} {
		check := func(what string, n int, b []byte) {
			if m, err := OpenFile(b, tt.keys); err == nil || m != nil {
				t.Fatalf("%s: %s at %d opened", name, what, n)
			}
		}
		if _, err := OpenFile(tt.file, tt.keys); err != nil {
			t.Fatal(err)
		}
		for n := range tt.file {
			if n%((tt.stride+3)/4) == 0 {
				check("truncation", n, tt.file[:n])
			}
		}
		for bit := 0; bit < 8*len(tt.file); bit += tt.stride {
			b := bytes.Clone(tt.file)
			b[bit/8] ^= 1 << (bit % 8)
			check("flipped bit", bit, b)
		}
		check("byte more", 0, append(bytes.Clone(tt.file), 0))
		check("second file", 0, append(bytes.Clone(tt.file), tt.file...))
	}
}
