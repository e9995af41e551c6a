package main

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"io/fs"
	"os"

	"github.com/spf13/cobra"

	"overkeep/crypt/secret"
	"overkeep/crypt/slot"
	"overkeep/systemd/keep"
)

// maxIdentity bounds an identity file in bytes (crypt/slot has the same bound).
const maxIdentity = 64 << 10

// authFlags say with what a keep's slot is opened. The zero value with fd -1
// asks for the passphrase.
type authFlags struct {
	fd            descriptor
	identity      string
	recovery      bool
	slot          string
	ignoreDamaged string
}

func (f *authFlags) add(a *app, cmd *cobra.Command) {
	fl := cmd.Flags()
	f.fd.add(fl, "passphrase-fd", "read the passphrase (with --recovery, the recovery key) from descriptor `N` instead of asking")
	fl.StringVar(&f.identity, "identity", "", "open with the key in `FILE`: age identity, plugin identity, or SSH private key")
	fl.BoolVar(&f.recovery, "recovery", false, "ask for the recovery key instead of the passphrase")
	fl.StringVar(&f.slot, "slot", "", "try only the slot `NAME`")
	fl.StringVar(&f.ignoreDamaged, "ignore-damaged-slot", "", "go on although the file of slot `NAME` is damaged, which you have looked into")
	a.exclusive(cmd, "identity", "passphrase-fd")
	a.exclusive(cmd, "identity", "recovery")
}

// asks reports whether the terminal will be needed.
func (f *authFlags) asks() bool { return f.fd < 0 && f.identity == "" }

// read gets the secret. The caller wipes it with the function returned.
func (f *authFlags) read(ctx context.Context, u *ui, keepName string) (keep.Auth, func(), error) {
	auth := keep.Auth{Slot: f.slot, IgnoreDamaged: f.ignoreDamaged}
	var s *secret.Bytes
	var err error
	switch {
	case f.identity != "":
		s, err = readIdentity(ctx, f.identity)
		auth.Identity = s
	case f.recovery:
		s, err = f.readRecovery(ctx, u, keepName)
		auth.Identity = s
	case f.fd >= 0:
		s, err = readFD(ctx, int(f.fd), "passphrase-fd")
		auth.Passphrase = s
	default:
		what := fmt.Sprintf("keep %q", keepName)
		if f.slot != "" {
			what = fmt.Sprintf("slot %q of keep %q", f.slot, keepName)
		}
		s, err = u.askSecret(ctx, "Passphrase for "+what+": ", "the passphrase", "--passphrase-fd 0")
		auth.Passphrase = s
	}
	return auth, func() { s.Wipe() }, err
}

func (f *authFlags) readRecovery(ctx context.Context, u *ui, keepName string) (*secret.Bytes, error) {
	typed, err := func() (*secret.Bytes, error) {
		if f.fd >= 0 {
			return readFD(ctx, int(f.fd), "passphrase-fd")
		}
		_ = u.say("The groups may be typed with or without spaces, in either case.")
		return u.askSecret(ctx, fmt.Sprintf("Recovery key of keep %q (not shown): ", keepName), "the recovery key", "--passphrase-fd 0")
	}()
	if err != nil {
		return nil, err
	}
	defer typed.Wipe()
	// The checksum finds a typing error before anything is tried.
	if _, err := slot.ParseRecovery(typed); err != nil {
		return nil, &keep.Error{Code: keep.CodeWrongKey, Message: "that is not a recovery key: its checksum does not fit, or letters are missing"}
	}
	return recoveryIdentity(typed)
}

// readIdentity reads an identity file. A pipe is fine.
func readIdentity(ctx context.Context, path string) (*secret.Bytes, error) {
	s, err := interruptible(ctx, func() (*secret.Bytes, error) {
		f, err := os.Open(path) // waits for the other end of a pipe
		if err != nil {
			return nil, err
		}
		defer f.Close()
		return secret.Read(f, maxIdentity)
	})
	var pe *fs.PathError
	switch {
	case ctx.Err() != nil:
		return nil, err
	case errors.As(err, &pe) && pe.Op == "open":
		return nil, usagef("--identity: %s", err)
	case errors.Is(err, secret.ErrTooLong):
		return nil, usagef("--identity: %q is no private key: it is longer than %d bytes", path, maxIdentity)
	case err != nil:
		return nil, usagef("--identity: %q: %s", path, errors.Unwrap(err))
	case s.Len() == 0:
		return nil, usagef("--identity: %q is empty", path)
	}
	// A file that holds no private key is a mistake of the command line, told before
	// anything is tried. What needs a question or a plugin is left to the helper.
	_, err = slot.ParseIdentities(bytes.NewReader(s.Bytes()), nil, nil)
	var ident *slot.IdentityError
	if errors.As(err, &ident) && keep.Classify(err).Code == keep.CodeUsage {
		s.Wipe()
		return nil, usagef("%q: %s", path, err)
	}
	return s, nil
}

// tries is how often a key that was typed may be wrong.
const tries = 3

// with calls use with what opens the keep, and asks again when that was typed
// wrongly.
func (f *authFlags) with(ctx context.Context, u *ui, keepName string, use func(keep.Auth) error) error {
	for try := 1; ; try++ {
		auth, wipe, err := f.read(ctx, u, keepName)
		if err == nil {
			err = use(auth)
			wipe()
		}
		if err == nil || !f.asks() || try == tries || ctx.Err() != nil || keep.Classify(err).Code != keep.CodeWrongKey {
			return err
		}
		_ = u.say("Wrong: " + keep.Classify(err).Message + ". Once more.")
	}
}

// newPassphrase gets the passphrase of a slot that is made or changed.
func (a *app) newPassphrase(ctx context.Context, what string, fd descriptor, flag string) (*secret.Bytes, error) {
	if fd < 0 {
		return a.ui.askNewPassphrase(ctx, what, "--"+flag+" 0")
	}
	p, err := readFD(ctx, int(fd), flag)
	if err != nil {
		return nil, err
	}
	if p.Len() < keep.MinPassphrase {
		n := p.Len()
		p.Wipe()
		return nil, usagef("the passphrase has %d bytes; the least is %d", n, keep.MinPassphrase)
	}
	return p, nil
}
