package slot

import (
	"bytes"
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/x509"
	"encoding/binary"
	"encoding/pem"
	"errors"
	"io"
	"strings"
	"testing"
	"testing/iotest"

	"filippo.io/age"
	"filippo.io/age/plugin"

	"overkeep/crypt/secret"
)

func TestParseIdentities(t *testing.T) {
	x, err := age.GenerateX25519Identity()
	if err != nil {
		t.Fatal(err)
	}
	pq, err := age.GenerateHybridIdentity()
	if err != nil {
		t.Fatal(err)
	}
	token := plugin.EncodeIdentity("slottest", []byte("x"))
	ed, edPub := sshKey(t, newEd25519(t), "")
	enc, _ := sshKey(t, newEd25519(t), "pass")
	rsaKey := newRSA(t, 2048)
	pkcs1 := pem.EncodeToMemory(&pem.Block{Type: "RSA PRIVATE KEY", Bytes: x509.MarshalPKCS1PrivateKey(rsaKey)})
	//lint:ignore SA1019 old files are what is tested
	oldBlock, err := x509.EncryptPEMBlock(rand.Reader, "RSA PRIVATE KEY", x509.MarshalPKCS1PrivateKey(rsaKey), []byte("pass"), x509.PEMCipherAES128)
	if err != nil {
		t.Fatal(err)
	}
	ec, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	if err != nil {
		t.Fatal(err)
	}
	ecPriv, _ := sshKey(t, ec, "")
	ecEnc, _ := sshKey(t, ec, "pass")
	slow := rounds(t, enc, 1<<31)
	typo := []byte(x.String())
	typo[30] ^= 1

	for what, tt := range map[string]struct {
		in   string
		n    int
		want error
		line int
	}{
		"x25519":            {x.String(), 1, nil, 0},
		"windows lines":     {"# c\r\n" + x.String() + "\r\n", 1, nil, 0},
		"three kinds":       {"# a\n\n" + x.String() + "\n" + pq.String() + "\n" + token + "\n", 3, nil, 0},
		"ssh ed25519":       {string(ed), 1, nil, 0},
		"ssh, space before": {"\n\n" + string(ed) + "\n\n", 1, nil, 0},
		"ssh encrypted":     {string(enc), 1, nil, 0},
		"ssh rsa pkcs1":     {string(pkcs1), 1, nil, 0},
		"ssh 1024 rounds":   {string(rounds(t, enc, 1024)), 1, nil, 0},
		"64":                {strings.Repeat(x.String()+"\n", 64), 64, nil, 0},

		"65":              {strings.Repeat(x.String()+"\n", 65), 0, nil, 65},
		"empty":           {"", 0, ErrNoIdentity, 0},
		"comments":        {"# a\n#b\n\n", 0, ErrNoIdentity, 0},
		"recipient":       {x.String() + "\n" + x.Recipient().String(), 0, ErrRecipient, 2},
		"ssh public":      {edPub, 0, ErrRecipient, 1},
		"typo":            {"#\n" + string(typo), 0, ErrMalformed, 2},
		"cut":             {x.String()[:40], 0, ErrMalformed, 1},
		"bad plugin":      {"AGE-PLUGIN-X-1QQQ", 0, ErrMalformed, 1},
		"plugin path":     {"AGE-PLUGIN-../../X-1QQQ", 0, ErrMalformed, 1},
		"password":        {"hunter2", 0, ErrUnknownKind, 1},
		"space before":    {" " + x.String(), 0, ErrUnknownKind, 1},
		"nul":             {"\x00", 0, ErrUnknownKind, 1},
		"encrypted age":   {"age-encryption.org/v1\n", 0, ErrEncryptedAge, 0},
		"encrypted armor": {"-----BEGIN AGE ENCRYPTED FILE-----\n", 0, ErrEncryptedAge, 0},
		"ecdsa":           {string(ecPriv), 0, ErrUnknownKind, 0},
		"ecdsa encrypted": {string(ecEnc), 0, ErrUnknownKind, 0},
		"old pem":         {string(pem.EncodeToMemory(oldBlock)), 0, ErrOldPEM, 0},
		"slow kdf":        {string(slow), 0, ErrSlowKDF, 0},
		"two keys":        {string(ed) + string(ed), 0, ErrMalformed, 0},
		"pem begin":       {"-----BEGIN OPENSSH PRIVATE KEY-----\n", 0, ErrMalformed, 0},
		"pem empty":       {"-----BEGIN OPENSSH PRIVATE KEY-----\n-----END OPENSSH PRIVATE KEY-----\n", 0, ErrMalformed, 0},
		"certificate":     {"-----BEGIN CERTIFICATE-----\nAAAA\n-----END CERTIFICATE-----\n", 0, ErrMalformed, 0},
		"large":           {strings.Repeat("#", maxIdentities+1), 0, secret.ErrTooLong, 0},
	} {
		ids, err := ParseIdentities(strings.NewReader(tt.in), nil, nil)
		if len(ids) != tt.n {
			t.Errorf("%s: %d identities, %v", what, len(ids), err)
		}
		if tt.n != 0 {
			continue
		}
		var e *IdentityError
		if !errors.As(err, &e) || e.Line != tt.line || tt.want != nil && !errors.Is(err, tt.want) {
			t.Errorf("%s: %v", what, err)
			continue
		}
		for _, s := range []string{"QQQ", "hunter2", x.String()[20:30]} {
			if strings.Contains(err.Error(), s) {
				t.Errorf("%s: the error repeats the content: %v", what, err)
			}
		}
	}
	// Cut anywhere, changed anywhere: an error or a key, no panic, no long work.
	for n := range enc {
		b := bytes.Clone(enc)
		b[n] ^= 4
		_, _ = ParseIdentities(bytes.NewReader(b), nil, nil)
		_, _ = ParseIdentities(bytes.NewReader(enc[:n]), nil, nil)
	}
	if _, err := ParseIdentities(iotest.ErrReader(io.ErrClosedPipe), nil, nil); !errors.Is(err, io.ErrClosedPipe) {
		t.Error(err)
	}
	if _, err := ParseIdentities(endless{}, nil, nil); !errors.Is(err, secret.ErrTooLong) {
		t.Error(err)
	}
}

type endless struct{}

func (endless) Read(p []byte) (int, error) { return len(p), nil }

// rounds returns the encrypted OpenSSH key with another number of bcrypt rounds.
func rounds(t *testing.T, key []byte, n uint32) []byte {
	t.Helper()
	block, _ := pem.Decode(key)
	i := bytes.Index(block.Bytes, []byte("bcrypt"))
	at := i + len("bcrypt") + 4 + 4 + 16 // length of the options, of the salt, the salt
	if i < 0 {
		t.Fatal("no bcrypt in the key")
	}
	binary.BigEndian.PutUint32(block.Bytes[at:], n)
	return pem.EncodeToMemory(block)
}

func FuzzParseIdentities(f *testing.F) {
	f.Add([]byte("# c\nAGE-SECRET-KEY-1QQQQ\n"))
	f.Add([]byte("-----BEGIN OPENSSH PRIVATE KEY-----\nb3BlbnNzaC1rZXktdjEA\n-----END OPENSSH PRIVATE KEY-----\n"))
	f.Fuzz(func(t *testing.T, b []byte) {
		ids, err := ParseIdentities(bytes.NewReader(b), nil, nil)
		var e *IdentityError
		if (err == nil) != (len(ids) > 0) || err != nil && !errors.As(err, &e) {
			t.Fatalf("%d identities, %v", len(ids), err)
		}
	})
}

func TestParseRecipient(t *testing.T) {
	x, err := age.GenerateX25519Identity()
	if err != nil {
		t.Fatal(err)
	}
	_, ed := sshKey(t, newEd25519(t), "")
	_, short := sshKey(t, newRSA(t, 1024), "")
	good := x.Recipient().String()
	for what, s := range map[string]string{
		"empty": "", "private": x.String(), "typo": good[:20] + "b" + good[21:], "cut": good[:30], "upper": strings.ToUpper(good),
		"github": "github:octocat", "pq cut": "age1pq1qqqq", "plugin": "age1x1qqqq", "plugin path": "age1../x1qqqq",
		"two lines": ed + ed, "ssh cut": ed[:40], "ssh dss": "ssh-dss AAAAB3NzaC1kc3M=", "rsa 1024": short,
		"huge": "age1" + strings.Repeat("q", maxRecipient), "options": `command="x" ` + ed,
	} {
		_, _, err := ParseRecipient(s, nil)
		if e := (*FormatError)(nil); !errors.As(err, &e) || s != "" && strings.Contains(err.Error(), s) {
			t.Errorf("%s: %v", what, err)
		}
	}
	if _, kind, err := ParseRecipient(" "+ed+"\n", nil); err != nil || kind != SSH {
		t.Error(kind, err)
	}
}

// age's debugging aid would write file keys to standard error.
func TestPluginDebug(t *testing.T) {
	recipient, identity := testPlugin(t)
	t.Setenv("AGEDEBUG", "plugin")
	if _, _, err := ParseRecipient(recipient, nil); !errors.Is(err, ErrDebug) {
		t.Error(err)
	}
	if _, err := ParseIdentities(strings.NewReader(identity), nil, nil); !errors.Is(err, ErrDebug) {
		t.Error(err)
	}
}
