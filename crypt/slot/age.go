package slot

import (
	"bytes"
	"errors"
	"fmt"
	"io"
	"math"
	"os"
	"regexp"
	"runtime"
	"slices"
	"strconv"
	"strings"

	"filippo.io/age"
	"filippo.io/age/agessh"
	"filippo.io/age/plugin"

	"overkeep/crypt/secret"
)

const (
	// KeySize is the size of a master key in bytes.
	KeySize = 32
	// DefaultLogN is the scrypt work of a new passphrase slot, as a power of two:
	// about a second and 256 MiB.
	DefaultLogN = 18
	// DefaultMaxLogN is the most work done for a slot unless Keys says otherwise:
	// 1 GiB of memory.
	DefaultMaxLogN = 20

	minLogN      = 10 // of a new slot; less is no protection at all
	maxStanzas   = 16
	maxRecipient = 16 << 10 // bytes of a recipient string
)

func checkMaster(master *secret.Bytes) error {
	if master.Len() != KeySize {
		return formatf("master key of %d bytes, not %d", master.Len(), KeySize)
	}
	return nil
}

// Wrap encrypts the master key to the recipients: any one of them opens the file.
// A passphrase stands alone, post-quantum recipients only among themselves; age
// refuses the mix. The age library encrypts in a heap buffer in place, so no
// plaintext copy stays behind here.
func Wrap(master *secret.Bytes, to ...age.Recipient) ([]byte, error) {
	if err := checkMaster(master); err != nil {
		return nil, err
	}
	if len(to) == 0 || len(to) > maxStanzas {
		return nil, formatf("%d recipients", len(to))
	}
	var b bytes.Buffer
	w, err := age.Encrypt(&b, to...)
	var missing *plugin.NotFoundError
	if errors.As(err, &missing) {
		return nil, &IdentityError{Err: fmt.Errorf("the plugin age-plugin-%s is not installed", missing.Name)}
	}
	if err != nil {
		return nil, err
	}
	_, err = w.Write(master.Bytes())
	runtime.KeepAlive(master)
	if err != nil {
		return nil, err
	}
	if err := w.Close(); err != nil {
		return nil, err
	}
	if _, err := Inspect(b.Bytes()); err != nil {
		return nil, err // never hand out a slot that cannot be opened again
	}
	return b.Bytes(), nil
}

// NewPassphraseRecipient returns the recipient for a passphrase slot with scrypt
// work 2^logN; 0 means DefaultLogN, others are 10 to DefaultMaxLogN. The
// passphrase is taken byte for byte: trim a newline before. age keeps a copy of it
// on the heap that cannot be wiped; it ends with the process.
func NewPassphraseRecipient(pass *secret.Bytes, logN int) (age.Recipient, error) {
	if logN == 0 {
		logN = DefaultLogN
	}
	if logN < minLogN || logN > DefaultMaxLogN {
		return nil, formatf("scrypt work 2^%d is not within 2^%d to 2^%d", logN, minLogN, DefaultMaxLogN)
	}
	if pass.Len() == 0 {
		return nil, formatf("empty passphrase")
	}
	r, err := age.NewScryptRecipient(string(pass.Bytes()))
	runtime.KeepAlive(pass)
	if err != nil {
		return nil, err
	}
	r.SetWorkFactor(logN)
	return r, nil
}

// ParseRecipient reads a public key: age1..., age1pq1..., ssh-ed25519 or ssh-rsa
// as in authorized_keys, or a plugin's age1NAME1.... It returns the kind of slot
// that it makes. ui answers a plugin's questions; nil answers none. Errors do not
// repeat what was given: it may be a private key in the wrong place.
func ParseRecipient(s string, ui *plugin.ClientUI) (r age.Recipient, kind Kind, err error) {
	if len(s) > maxRecipient {
		return nil, "", formatf("recipient of more than %d bytes", maxRecipient)
	}
	s = strings.TrimSpace(s)
	switch {
	case strings.HasPrefix(s, "age1pq1"):
		kind = PQ
		r, err = age.ParseHybridRecipient(s)
	case strings.HasPrefix(s, "age1") && strings.Count(s, "1") > 1:
		kind = Plugin
		if err := noDebug(); err != nil {
			return nil, "", err
		}
		r, err = plugin.NewRecipient(s, orNoUI(ui))
	case strings.HasPrefix(s, "age1"):
		kind = X25519
		r, err = age.ParseX25519Recipient(s)
	case strings.HasPrefix(s, "ssh-") && !strings.ContainsAny(s, "\r\n"):
		kind = SSH
		r, err = agessh.ParseRecipient(s)
	default:
		return nil, "", formatf("unknown kind of recipient")
	}
	if err != nil {
		return nil, "", formatf("malformed %s recipient", kind)
	}
	return r, kind, nil
}

// ErrDebug: AGEDEBUG=plugin is set. age would write file keys to standard error.
var ErrDebug = errors.New("AGEDEBUG is set: plugins would show keys")

func noDebug() error {
	if os.Getenv("AGEDEBUG") != "" {
		return ErrDebug
	}
	return nil
}

// orNoUI keeps age's plugin client from dereferencing nil.
func orNoUI(ui *plugin.ClientUI) *plugin.ClientUI {
	if ui == nil {
		return &plugin.ClientUI{}
	}
	return ui
}

// Header is what a slot file says before any key is tried.
type Header struct {
	Stanzas []string // types, in order: "scrypt", "X25519", "ssh-rsa", ...
	LogN    int      // scrypt work as a power of two; 0 without a scrypt stanza
}

var digitsRE = regexp.MustCompile(`^[1-9][0-9]*$`)

// Inspect parses the header of an age file (c2sp.org/age), without a key and
// without work. It takes binary files of at most MaxFileSize bytes with at most 16
// stanzas; a scrypt stanza must be the only one and its work factor well formed.
// Whether that factor is acceptable is the caller's decision. Errors are
// *FormatError.
func Inspect(file []byte) (Header, error) {
	var h Header
	if len(file) > MaxFileSize {
		return h, formatf("file of more than %d bytes", MaxFileSize)
	}
	// age's own parser checks and returns the header in canonical form, in which
	// a line that begins with "-> " is a stanza: '>' is not in its base64.
	head, err := age.ExtractHeader(bytes.NewReader(file))
	if err != nil {
		return h, &FormatError{Err: err}
	}
	for line := range strings.Lines(string(head)) {
		rest, ok := strings.CutPrefix(line, "-> ")
		if !ok {
			continue
		}
		args := strings.Fields(rest)
		h.Stanzas = append(h.Stanzas, args[0])
		if len(h.Stanzas) > maxStanzas {
			return Header{}, formatf("more than %d stanzas", maxStanzas)
		}
		if args[0] != "scrypt" {
			continue
		}
		if len(args) != 3 {
			return Header{}, formatf("scrypt stanza with %d arguments", len(args)-1)
		}
		if !digitsRE.MatchString(args[2]) {
			return Header{}, formatf("scrypt work factor %s", quote(args[2]))
		}
		if h.LogN, err = strconv.Atoi(args[2]); err != nil {
			h.LogN = math.MaxInt // out of range: more than any limit
		}
	}
	if h.LogN != 0 && len(h.Stanzas) != 1 {
		return Header{}, formatf("scrypt stanza among %d others", len(h.Stanzas)-1)
	}
	return h, nil
}

// inspect is Inspect for the file of the slot x: it must fit the kind, and a
// passphrase must be within what is opened by default.
func (x *Slot) inspect(file []byte) (Header, error) {
	h, err := Inspect(file)
	if err != nil {
		return h, err
	}
	has := func(types ...string) bool {
		return slices.ContainsFunc(h.Stanzas, func(t string) bool { return slices.Contains(types, t) })
	}
	fits := h.LogN == 0
	switch x.Kind {
	case Passphrase:
		fits = h.LogN != 0
	case X25519:
		fits = fits && has("X25519")
	case PQ:
		fits = fits && has("mlkem768x25519")
	case SSH:
		fits = fits && has("ssh-ed25519", "ssh-rsa")
	}
	if !fits {
		return h, formatf("it is called %s but holds %s", x.Kind, clip(strings.Join(h.Stanzas, " ")))
	}
	return h, nil
}

// interactive says whether an identity may ask the user something, or start a
// program. Those are tried last.
func interactive(id age.Identity) bool {
	switch id.(type) {
	case *age.X25519Identity, *age.HybridIdentity, *age.ScryptIdentity, *agessh.Ed25519Identity, *agessh.RSAIdentity:
		return false
	}
	return true
}

// probe lets age try the next identity when one of them fails, and keeps why. age
// itself gives up at the first failure that is not a plain mismatch: one missing
// plugin would hide a key that fits.
type probe struct {
	age.Identity
	err error
}

func (p *probe) Unwrap(stanzas []*age.Stanza) ([]byte, error) {
	key, err := p.Identity.Unwrap(stanzas)
	if err != nil && !errors.Is(err, age.ErrIncorrectIdentity) {
		p.err = err
		return nil, age.ErrIncorrectIdentity
	}
	return key, err
}

// decrypt opens the file with the identities in order. age's reader keeps copies
// of the plaintext on the heap; they end with the process.
func decrypt(file []byte, ids []age.Identity) (*secret.Bytes, error) {
	probes := make([]age.Identity, len(ids))
	for i, id := range ids {
		probes[i] = &probe{Identity: id}
	}
	r, err := age.Decrypt(bytes.NewReader(file), probes...)
	var mismatch *age.NoIdentityMatchError
	if errors.As(err, &mismatch) {
		for i, id := range ids {
			p := probes[i].(*probe)
			switch {
			case p.err == nil:
			case interactive(id):
				return nil, &IdentityError{Err: p.err}
			default: // a plain key fails only on a malformed stanza
				return nil, &FormatError{Err: p.err}
			}
		}
		return nil, ErrWrongKey
	}
	if err != nil {
		return nil, &FormatError{Err: err}
	}
	// Tell a damaged file from memory that could not be locked.
	source := &faultReader{r: r}
	key, err := secret.Read(source, KeySize)
	switch {
	case errors.Is(err, secret.ErrTooLong):
		return nil, formatf("content of more than %d bytes", KeySize)
	case err != nil && source.err != nil:
		return nil, &FormatError{Err: source.err}
	case err != nil:
		return nil, err
	case key.Len() != KeySize:
		n := key.Len()
		key.Wipe()
		return nil, formatf("content of %d bytes, not %d", n, KeySize)
	}
	return key, nil
}

type faultReader struct {
	r   io.Reader
	err error
}

func (f *faultReader) Read(p []byte) (int, error) {
	n, err := f.r.Read(p)
	if err != nil && err != io.EOF {
		f.err = err
	}
	return n, err
}
