package main

import (
	"context"
	"errors"
	"fmt"
	"os"
	"strings"

	"golang.org/x/sys/unix"

	"overkeep/crypt/secret"
	"overkeep/systemd/keep"
)

// maxSecret bounds what is typed or piped as a secret, in bytes. A terminal line
// cannot be longer (termios(3), canonical mode).
const maxSecret = 4096

// errNoTerminal says that something had to be asked and nobody is there.
type errNoTerminal struct {
	what string // what was to be asked
	flag string // what to give instead
}

func (e *errNoTerminal) Error() string {
	return fmt.Sprintf("there is no terminal to ask for %s on", e.what)
}

func aborted(why string) error { return &keep.Error{Code: keep.CodeAborted, Message: why} }

// tty opens the terminal for a question about what; flag is what to give where
// there is none.
func (u *ui) tty(what, flag string) (*os.File, error) {
	u.endProgress()
	f, err := u.openTTY()
	if err != nil {
		return nil, &errNoTerminal{what, flag}
	}
	return f, nil
}

// askSecret asks for a secret of the given name, without echo. The caller wipes it.
func (u *ui) askSecret(ctx context.Context, prompt, what, flag string) (*secret.Bytes, error) {
	tty, err := u.tty(what, flag)
	if err != nil {
		return nil, err
	}
	defer tty.Close()
	return readLine(ctx, tty, prompt, false)
}

// askNewPassphrase asks twice, and gives a hint about its strength.
func (u *ui) askNewPassphrase(ctx context.Context, what, flag string) (*secret.Bytes, error) {
	for try := 1; ; try++ {
		p, err := u.askSecret(ctx, "New passphrase for "+what+": ", "a new passphrase", flag)
		if err != nil {
			return nil, err
		}
		problem := ""
		if p.Len() < keep.MinPassphrase {
			problem = fmt.Sprintf("That has %d bytes; the least is %d.", p.Len(), keep.MinPassphrase)
		} else {
			if hint := strengthHint(p.Bytes()); hint != "" {
				_ = u.say(hint)
			}
			again, err := u.askSecret(ctx, "The same again: ", "a new passphrase", flag)
			if err != nil {
				p.Wipe()
				return nil, err
			}
			same := p.Equal(again)
			again.Wipe()
			if same {
				return p, nil
			}
			problem = "The two differ."
		}
		p.Wipe()
		if try == 3 {
			return nil, aborted("no passphrase was chosen in three tries")
		}
		_ = u.say(problem + " Once more.")
	}
}

// say writes a line to the terminal, next to a question.
func (u *ui) say(line string) error {
	tty, err := u.tty("anything", "")
	if err != nil {
		return err
	}
	defer tty.Close()
	_, err = fmt.Fprintln(tty, line)
	return err
}

// ask asks a question whose answer is no secret.
func (u *ui) ask(ctx context.Context, prompt, what, flag string) (string, error) {
	tty, err := u.tty(what, flag)
	if err != nil {
		return "", err
	}
	defer tty.Close()
	s, err := readLine(ctx, tty, prompt, true)
	if err != nil {
		return "", err
	}
	defer s.Wipe()
	return strings.TrimSpace(string(s.Bytes())), nil
}

// confirm asks a question that only "y" or "yes" answers with yes.
func (u *ui) confirm(ctx context.Context, question string) (bool, error) {
	a, err := u.ask(ctx, question+" [y/N] ", "a confirmation", "--yes")
	a = strings.ToLower(a)
	return a == "y" || a == "yes", err
}

// readLine asks on a terminal and reads one line straight into locked memory, a
// byte at a time, and puts the terminal back as it was. The kernel edits the line
// (canonical mode), so backspace works. It gives up when ctx ends.
func readLine(ctx context.Context, tty *os.File, prompt string, echo bool) (*secret.Bytes, error) {
	fd := int(tty.Fd())
	if !echo {
		restore, err := echoOff(fd)
		if err != nil {
			return nil, err
		}
		// The newline that was typed was not echoed either.
		defer fmt.Fprintln(tty)
		defer restore()
	}
	// Only now: who answers at once must not see the answer echoed.
	fmt.Fprint(tty, prompt)
	wake, err := unix.Eventfd(0, unix.EFD_CLOEXEC)
	if err != nil {
		return nil, err
	}
	woken := make(chan struct{})
	stop := context.AfterFunc(ctx, func() {
		defer close(woken)
		_, _ = unix.Write(wake, []byte{1, 0, 0, 0, 0, 0, 0, 0})
	})
	defer func() {
		if !stop() {
			<-woken // it still writes to the descriptor
		}
		unix.Close(wake)
	}()
	buf, err := secret.New(maxSecret)
	if err != nil {
		return nil, err
	}
	defer buf.Wipe()
	mem, n := buf.Bytes(), 0
	for {
		fds := []unix.PollFd{{Fd: int32(fd), Events: unix.POLLIN}, {Fd: int32(wake), Events: unix.POLLIN}}
		if _, err := unix.Poll(fds, -1); err != nil && err != unix.EINTR {
			return nil, err
		}
		if ctx.Err() != nil {
			return nil, aborted("interrupted")
		}
		if fds[0].Revents == 0 {
			continue
		}
		if n == len(mem) {
			return nil, errors.New("the line is too long")
		}
		got, err := unix.Read(fd, mem[n:n+1])
		switch {
		case err == unix.EINTR, err == unix.EAGAIN:
		case err != nil:
			return nil, err
		case got == 0 && n == 0:
			return nil, aborted("the terminal gave no answer")
		case got == 0, mem[n] == '\n':
			line, err := secret.New(n)
			if err != nil {
				return nil, err
			}
			copy(line.Bytes(), mem[:n])
			return line, nil
		default:
			n++
		}
	}
}

// echoOff stops the echo of a terminal and returns what puts it back.
func echoOff(fd int) (restore func(), err error) {
	old, err := unix.IoctlGetTermios(fd, unix.TCGETS)
	if err != nil {
		return nil, fmt.Errorf("terminal: %w", err)
	}
	t := *old
	t.Lflag &^= unix.ECHO
	t.Lflag |= unix.ICANON | unix.ISIG
	t.Iflag |= unix.ICRNL
	if err := unix.IoctlSetTermios(fd, unix.TCSETS, &t); err != nil {
		return nil, fmt.Errorf("terminal: %w", err)
	}
	return func() { _ = unix.IoctlSetTermios(fd, unix.TCSETS, old) }, nil
}

// readFD reads a secret from an inherited descriptor to its end. One newline at
// the end is not part of it.
func readFD(ctx context.Context, fd int, flag string) (*secret.Bytes, error) {
	usage := func(format string, a ...any) error {
		return &usageError{msg: fmt.Sprintf("--%s %d: ", flag, fd) + fmt.Sprintf(format, a...)}
	}
	if fd < 0 || fd == 1 || fd == 2 {
		return nil, usage("give 0 for standard input, or 3 and above")
	}
	if _, err := unix.FcntlInt(uintptr(fd), unix.F_GETFD, 0); err != nil {
		return nil, usage("that descriptor is not open; with a shell: %d<FILE", fd)
	}
	if _, err := unix.IoctlGetTermios(fd, unix.TCGETS); err == nil {
		return nil, usage("that is a terminal, which would show what you type; leave --%s away to be asked", flag)
	}
	// A helper process must not inherit what may still stand in it.
	unix.CloseOnExec(fd)
	f := os.NewFile(uintptr(fd), flag)
	if fd > 2 {
		defer f.Close()
	}
	s, err := interruptible(ctx, func() (*secret.Bytes, error) { return secret.Read(f, maxSecret) })
	switch {
	case ctx.Err() != nil:
		return nil, err
	case errors.Is(err, secret.ErrTooLong):
		return nil, usage("more than %d bytes", maxSecret)
	case err != nil:
		return nil, usage("%v", err)
	}
	s.TrimNewline()
	for _, c := range s.Bytes() {
		// It could never be typed at a prompt.
		if c == '\n' || c == 0 {
			s.Wipe()
			if c == 0 {
				return nil, usage("a NUL byte, which nobody can type")
			}
			return nil, usage("more than one line")
		}
	}
	if s.Len() == 0 {
		s.Wipe()
		return nil, usage("nothing came")
	}
	return s, nil
}

// strengthHint says what is weak about a new passphrase; "" when nothing is.
// It is a hint and stops nobody. What it returns does not depend on the
// passphrase but for the kind of weakness.
func strengthHint(p []byte) string {
	var lower, upper, digit, other, kinds int
	seen := map[byte]bool{}
	for _, c := range p {
		seen[c] = true
		switch {
		case c >= 'a' && c <= 'z':
			lower = 1
		case c >= 'A' && c <= 'Z':
			upper = 1
		case c >= '0' && c <= '9':
			digit = 1
		default:
			other = 1
		}
	}
	kinds = lower + upper + digit + other
	clear(seen)
	const advice = " A thief has the disk and years: five or six words drawn at random are easy to type and hard to guess."
	switch {
	case len(p) < 12:
		return "Short." + advice
	case len(p) < 16 && kinds == 1:
		return "One kind of character only, and not long." + advice
	}
	return ""
}

// interruptible runs read and returns its secret, or aborts when ctx ends: a read
// of a pipe that nobody writes to cannot be woken, but the program is about to
// end, and the goroutine with it.
func interruptible(ctx context.Context, read func() (*secret.Bytes, error)) (*secret.Bytes, error) {
	type result struct {
		s   *secret.Bytes
		err error
	}
	done := make(chan result, 1)
	go func() {
		s, err := read()
		done <- result{s, err}
	}()
	select {
	case r := <-done:
		return r.s, r.err
	case <-ctx.Done():
		return nil, aborted("interrupted")
	}
}
