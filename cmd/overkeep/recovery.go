package main

import (
	"bytes"
	"context"
	"crypto/rand"
	"errors"
	"fmt"
	"io"
	"os"
	"path/filepath"
	"time"

	"golang.org/x/sys/unix"
	"golang.org/x/term"

	"overkeep/crypt/secret"
	"overkeep/crypt/slot"
	"overkeep/systemd/keep"
)

// recoveryPrefix is how an X25519 identity of age begins.
const recoveryPrefix = "AGE-SECRET-KEY-1"

// recoveryIdentity turns a recovery key, as a person types it, into the line of
// an identity file. typed has been checked by slot.ParseRecovery.
func recoveryIdentity(typed *secret.Bytes) (*secret.Bytes, error) {
	buf, err := secret.New(len(recoveryPrefix) + typed.Len())
	if err != nil {
		return nil, err
	}
	defer buf.Wipe()
	b := buf.Bytes()
	n := copy(b, recoveryPrefix)
	for _, c := range typed.Bytes() {
		switch {
		case c == ' ' || c == '\t' || c == '\r' || c == '\n':
			continue
		case 'a' <= c && c <= 'z':
			c -= 'a' - 'A'
		}
		b[n] = c
		n++
	}
	if bytes.HasPrefix(b[len(recoveryPrefix):n], []byte(recoveryPrefix)) {
		b, n = b[len(recoveryPrefix):], n-len(recoveryPrefix)
	}
	out, err := secret.New(n)
	if err != nil {
		return nil, err
	}
	copy(out.Bytes(), b[:n])
	return out, nil
}

// confirmer shows a new recovery key and finds out whether the user holds it.
// undo takes back what it wrote, for when the key does not come to be used.
type confirmer struct {
	confirm func(*secret.Bytes) error
	undo    func()
}

// failed takes back what was written, unless the key has come to be used before
// err: the file may be the only place that has it.
func (c *confirmer) failed(err error) {
	var e *keep.Error
	if errors.As(err, &e) && e.InForce {
		return
	}
	c.undo()
}

// newConfirmer is by file when one is named, else by the terminal.
func (a *app) newConfirmer(ctx context.Context, file, keepName string) (*confirmer, error) {
	if file == "" {
		tty, err := a.ui.tty("the recovery key to be shown", "--recovery-out FILE")
		if err != nil {
			return nil, err
		}
		tty.Close()
		return &confirmer{func(key *secret.Bytes) error { return a.ui.confirmRecovery(ctx, key, keepName) }, func() {}}, nil
	}
	path, err := filepath.Abs(file)
	if err != nil {
		return nil, err
	}
	if _, err := os.Lstat(path); err == nil {
		return nil, &keep.Error{Code: keep.CodeKeepExists, Name: path, Message: fmt.Sprintf("recovery file %q exists already; it is not overwritten", path)}
	}
	dir, err := os.OpenFile(filepath.Dir(path), unix.O_DIRECTORY|unix.O_CLOEXEC, 0)
	if err != nil {
		return nil, usagef("--recovery-out: %s", err)
	}
	c := &confirmer{undo: func() {}}
	c.confirm = func(key *secret.Bytes) error {
		use := a.here().command("unlock", keepName, "--identity", "FILE")
		err := writeRecovery(dir, filepath.Base(path), keepName, use, key)
		if err == nil {
			c.undo = func() { _ = unix.Unlinkat(int(dir.Fd()), filepath.Base(path), 0) }
		}
		return err
	}
	return c, nil
}

// writeRecovery writes the key to a new file in dir, durably, and reads it back.
// A file that could not be finished is removed again.
func writeRecovery(dir *os.File, name, keepName, use string, key *secret.Bytes) (err error) {
	fd, err := unix.Openat(int(dir.Fd()), name, unix.O_RDWR|unix.O_CREAT|unix.O_EXCL|unix.O_NOFOLLOW|unix.O_CLOEXEC, 0o600)
	if err != nil {
		if errors.Is(err, unix.ENOSPC) || errors.Is(err, unix.EDQUOT) {
			return &os.PathError{Op: "create", Path: filepath.Join(dir.Name(), name), Err: err}
		}
		return usagef("--recovery-out: %q cannot be made: %s", filepath.Join(dir.Name(), name), err)
	}
	f := os.NewFile(uintptr(fd), filepath.Join(dir.Name(), name))
	defer func() {
		f.Close()
		if err != nil {
			_ = unix.Unlinkat(int(dir.Fd()), name, 0)
		}
	}()
	// Written in pieces: a joined text would be one more copy of the key.
	_, err = fmt.Fprintf(f, "# Recovery key of the overkeep keep %q, made %s.\n"+
		"# Whoever has this file opens the keep. Keep it away from the machine: print it,\n"+
		"# or put it on a stick in a drawer. It works as an age identity file:\n"+
		"#     %s\n",
		keepName, time.Now().UTC().Format(time.DateOnly), use)
	for _, b := range [][]byte{key.Bytes(), []byte("\n")} {
		if err == nil {
			_, err = f.Write(b)
		}
	}
	if err = errors.Join(err, f.Sync(), dir.Sync()); err != nil {
		return err
	}
	// Read back, as the confirmation that the file holds the key.
	if _, err = f.Seek(0, io.SeekStart); err != nil {
		return err
	}
	if _, err = slot.ParseIdentities(f, nil, nil); err != nil {
		return err
	}
	if _, err = f.Seek(int64(-key.Len()-1), io.SeekEnd); err != nil {
		return err
	}
	back, err := secret.Read(f, maxIdentity)
	if err != nil {
		return err
	}
	defer back.Wipe()
	back.TrimNewline()
	if !back.Equal(key) {
		return fmt.Errorf("recovery file %q does not hold what was written to it", f.Name())
	}
	return nil
}

// confirmRecovery shows the key on the terminal, and asks for one group of it.
// The key is shown on the alternate screen, so that it does not stay in the
// scrollback.
func (u *ui) confirmRecovery(ctx context.Context, key *secret.Bytes, keepName string) error {
	for try := 1; try <= tries; try++ {
		if err := u.showRecovery(ctx, key, keepName); err != nil {
			return err
		}
		n, err := slot.Challenge(key, rand.Reader)
		if err != nil {
			return err
		}
		typed, err := u.askSecret(ctx, fmt.Sprintf("Type group %d of the recovery key: ", n), "the recovery key", "--recovery-out FILE")
		if err != nil {
			return err
		}
		ok, err := slot.CheckChallenge(key, n, typed)
		typed.Wipe()
		if err != nil {
			return err
		}
		if ok {
			return nil
		}
		if try < tries {
			_ = u.say("That is not group " + fmt.Sprint(n) + ". The key is shown again.")
			if _, err := u.ask(ctx, "Press Enter. ", "to go on", ""); err != nil {
				return err
			}
		}
	}
	return &keep.Error{Code: keep.CodeUnconfirmed, Name: keepName, Message: "the recovery key was not confirmed in three tries"}
}

// showRecovery shows the key until Enter is pressed.
func (u *ui) showRecovery(ctx context.Context, key *secret.Bytes, keepName string) error {
	groups, err := slot.Groups(key)
	if err != nil {
		return err
	}
	qr, err := slot.QR(key, false)
	if err != nil {
		return err
	}
	defer qr.Wipe()
	tty, err := u.tty("the recovery key to be shown", "--recovery-out FILE")
	if err != nil {
		return err
	}
	defer tty.Close()
	// The key must not scroll off the top on its way past the code below it.
	_, rows, err := term.GetSize(int(tty.Fd()))
	withQR := err == nil && rows >= bytes.Count(qr.Bytes(), []byte("\n"))+10
	if !dumb() {
		// xterm's 1049: another screen, without scrollback, and back.
		fmt.Fprint(tty, "\x1b[?1049h\x1b[H\x1b[2J")
		defer fmt.Fprint(tty, "\x1b[2J\x1b[?1049l")
	}
	fmt.Fprintf(tty, "The recovery key of keep %q. It opens the keep when the passphrase is lost,\n"+
		"and it is shown only now. Write it down, or photograph it with a device you trust.\n\n  ", keepName)
	tty.Write(groups[0])
	for i, g := range groups[1:] {
		if i%5 == 0 {
			fmt.Fprint(tty, "\n")
		}
		fmt.Fprintf(tty, "  %2d ", i+1)
		tty.Write(g)
	}
	fmt.Fprint(tty, "\n\n")
	if withQR {
		tty.Write(qr.Bytes())
	} else {
		fmt.Fprintln(tty, "  (A taller terminal would also show it as a QR code.)")
	}
	line, err := readLine(ctx, tty, "\nPress Enter when you have it; one group will be asked. ", true)
	line.Wipe()
	return err
}
