package slot

import (
	"bytes"
	"encoding/pem"
	"errors"
	"io"
	"strings"

	"filippo.io/age"
	"filippo.io/age/agessh"
	"filippo.io/age/plugin"
	"golang.org/x/crypto/ssh"

	"overkeep/crypt/secret"
)

const (
	maxIdentities    = 64 << 10 // bytes of an identity file
	maxIdentityCount = 64
	maxBcryptRounds  = 1024 // of an encrypted SSH key; ssh-keygen's default is 24
)

// Why an identity file is refused; found in an *IdentityError.
var (
	ErrNoIdentity   = errors.New("no identity found")
	ErrRecipient    = errors.New("a public key where a private one is expected")
	ErrEncryptedAge = errors.New("an age file encrypted with a passphrase")
	ErrOldPEM       = errors.New("an encrypted SSH key in the old PEM format, which does not hold its public key")
	ErrMalformed    = errors.New("malformed private key")
	ErrUnknownKind  = errors.New("unknown kind of private key")
	ErrSlowKDF      = errors.New("encrypted SSH key asks for too many rounds")
	ErrNoPassphrase = errors.New("no passphrase")
)

// ParseIdentities reads private keys, at most 64 KiB: an age identity file
// (AGE-SECRET-KEY-1..., AGE-SECRET-KEY-PQ-1..., AGE-PLUGIN-..., one a line, # for
// comments) or one SSH private key (ed25519, rsa). It reads r to its end.
//
// ui answers a plugin's questions; nil answers none. passphrase is called for an
// encrypted SSH key, only once a slot needs it; what it returns is wiped. Errors
// are *IdentityError and never repeat the content. age keeps the keys on the heap,
// where they cannot be wiped; they end with the process.
func ParseIdentities(r io.Reader, ui *plugin.ClientUI, passphrase func() (*secret.Bytes, error)) ([]age.Identity, error) {
	s, err := secret.Read(r, maxIdentities)
	if err != nil {
		return nil, &IdentityError{Err: err}
	}
	defer s.Wipe()
	b := bytes.TrimLeft(s.Bytes(), " \t\r\n")
	switch {
	case bytes.HasPrefix(b, []byte("-----BEGIN AGE ENCRYPTED FILE")), bytes.HasPrefix(b, []byte("age-encryption.org/")):
		return nil, &IdentityError{Err: ErrEncryptedAge}
	case bytes.HasPrefix(b, []byte("-----BEGIN")):
		id, err := parseSSH(b, passphrase)
		if err != nil {
			return nil, &IdentityError{Err: err}
		}
		return []age.Identity{id}, nil
	}
	return parseLines(s.Bytes(), ui)
}

func parseLines(b []byte, ui *plugin.ClientUI) (ids []age.Identity, err error) {
	n := 0
	for line := range bytes.Lines(b) {
		n++
		line = bytes.TrimRight(line, "\r\n")
		if len(line) == 0 || line[0] == '#' {
			continue
		}
		if len(ids) == maxIdentityCount {
			return nil, &IdentityError{Line: n, Err: errors.New("too many identities")}
		}
		id, err := parseLine(line, ui)
		if err != nil {
			return nil, &IdentityError{Line: n, Err: err}
		}
		ids = append(ids, id)
	}
	if len(ids) == 0 {
		return nil, &IdentityError{Err: ErrNoIdentity}
	}
	return ids, nil
}

// parseLine drops the errors of age: they show characters of the key.
func parseLine(line []byte, ui *plugin.ClientUI) (id age.Identity, err error) {
	has := func(prefix string) bool { return bytes.HasPrefix(line, []byte(prefix)) }
	switch {
	case has("AGE-SECRET-KEY-PQ-1"):
		id, err = age.ParseHybridIdentity(string(line))
	case has("AGE-SECRET-KEY-1"):
		id, err = age.ParseX25519Identity(string(line))
	case has("AGE-PLUGIN-"):
		if err := noDebug(); err != nil {
			return nil, err
		}
		id, err = plugin.NewIdentity(string(line), orNoUI(ui))
	case has("age1"), has("ssh-"):
		return nil, ErrRecipient
	default:
		return nil, ErrUnknownKind
	}
	if err != nil {
		return nil, ErrMalformed
	}
	return id, nil
}

func parseSSH(b []byte, passphrase func() (*secret.Bytes, error)) (age.Identity, error) {
	block, rest := pem.Decode(b)
	if block == nil {
		return nil, ErrMalformed
	}
	defer clear(block.Bytes)
	if len(bytes.TrimSpace(rest)) != 0 {
		return nil, ErrMalformed
	}
	if err := checkRounds(block); err != nil {
		return nil, err
	}
	id, err := agessh.ParseIdentity(b)
	var missing *ssh.PassphraseMissingError
	switch {
	case err == nil:
		return id, nil
	case !errors.As(err, &missing):
		if strings.HasPrefix(err.Error(), "unsupported SSH identity type") {
			return nil, ErrUnknownKind
		}
		return nil, ErrMalformed
	case missing.PublicKey == nil:
		return nil, ErrOldPEM
	}
	e := &encryptedSSH{ask: passphrase}
	// A copy: the key is still encrypted, and b is about to be wiped.
	e.key, err = agessh.NewEncryptedSSHIdentity(missing.PublicKey, bytes.Clone(b), e.passphrase)
	if err != nil {
		return nil, ErrUnknownKind
	}
	return e, nil
}

// checkRounds bounds bcrypt_pbkdf, whose rounds an OpenSSH key file chooses
// freely up to 2^32 (PROTOCOL.key of OpenSSH).
func checkRounds(block *pem.Block) error {
	body, ok := bytes.CutPrefix(block.Bytes, []byte("openssh-key-v1\x00"))
	if block.Type != "OPENSSH PRIVATE KEY" || !ok {
		return nil // PKCS: no KDF, or the single MD5 of old PEM
	}
	var head struct {
		Cipher, KDF, Options string
		Rest                 []byte `ssh:"rest"`
	}
	if err := ssh.Unmarshal(body, &head); err != nil {
		return ErrMalformed
	}
	if head.KDF == "none" {
		return nil
	}
	var options struct {
		Salt   string
		Rounds uint32
	}
	if err := ssh.Unmarshal([]byte(head.Options), &options); err != nil {
		return ErrMalformed
	}
	if options.Rounds > maxBcryptRounds {
		return ErrSlowKDF
	}
	return nil
}

// encryptedSSH asks for the passphrase when a slot names the key, and wipes it.
type encryptedSSH struct {
	key *agessh.EncryptedSSHIdentity
	ask func() (*secret.Bytes, error)
	got *secret.Bytes
}

func (e *encryptedSSH) passphrase() ([]byte, error) {
	if e.ask == nil {
		return nil, ErrNoPassphrase
	}
	s, err := e.ask()
	if err != nil {
		return nil, err
	}
	if s.Len() == 0 {
		return nil, ErrNoPassphrase
	}
	e.got = s
	return s.Bytes(), nil
}

func (e *encryptedSSH) Unwrap(stanzas []*age.Stanza) ([]byte, error) {
	defer func() { e.got.Wipe(); e.got = nil }()
	return e.key.Unwrap(stanzas)
}
