package main

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"io"
	"os"
	"strings"
	"sync"
	"testing"

	"golang.org/x/sys/unix"

	"overkeep/crypt/secret"
	"overkeep/crypt/slot"
	"overkeep/systemd/keep"
)

// console is a pseudo-terminal: the program's end is path, ours is m.
type console struct {
	m    *os.File
	path string
	mu   sync.Mutex
	cond *sync.Cond
	seen bytes.Buffer
	end  bool
}

func newConsole(t *testing.T) *console {
	t.Helper()
	fd, err := unix.Open("/dev/ptmx", unix.O_RDWR|unix.O_NOCTTY|unix.O_CLOEXEC, 0)
	if err != nil {
		t.Fatal(err)
	}
	if err := unix.IoctlSetPointerInt(fd, unix.TIOCSPTLCK, 0); err != nil {
		t.Fatal(err)
	}
	n, err := unix.IoctlGetInt(fd, unix.TIOCGPTN)
	if err != nil {
		t.Fatal(err)
	}
	if err := unix.IoctlSetWinsize(fd, unix.TIOCSWINSZ, &unix.Winsize{Row: 50, Col: 100}); err != nil {
		t.Fatal(err)
	}
	c := &console{m: os.NewFile(uintptr(fd), "ptmx"), path: fmt.Sprintf("/dev/pts/%d", n)}
	c.cond = sync.NewCond(&c.mu)
	// Held open, so that the other end does not hang up between two questions.
	hold, err := c.open()
	if err != nil {
		t.Fatal(err)
	}
	go func() {
		b := make([]byte, 4096)
		for {
			n, err := c.m.Read(b)
			c.mu.Lock()
			c.seen.Write(b[:n])
			c.end = err != nil
			c.cond.Broadcast()
			c.mu.Unlock()
			if err != nil {
				return
			}
		}
	}()
	t.Cleanup(func() { hold.Close(); c.m.Close() })
	return c
}

func (c *console) open() (*os.File, error) {
	return os.OpenFile(c.path, os.O_RDWR|unix.O_NOCTTY, 0)
}

func (c *console) ui() *ui {
	return &ui{out: io.Discard, err: io.Discard, openTTY: c.open}
}

// expect waits until text has been shown, and forgets all up to its end.
func (c *console) expect(text string) (before string) {
	c.mu.Lock()
	defer c.mu.Unlock()
	for {
		if i := strings.Index(c.seen.String(), text); i >= 0 {
			return string(c.seen.Next(i + len(text)))
		}
		if c.end {
			return ""
		}
		c.cond.Wait()
	}
}

func (c *console) typed(s string) { _, _ = io.WriteString(c.m, s) }

func (c *console) shown() string {
	c.mu.Lock()
	defer c.mu.Unlock()
	return c.seen.String()
}

func (c *console) lflag(t *testing.T) uint32 {
	t.Helper()
	tio, err := unix.IoctlGetTermios(int(c.m.Fd()), unix.TCGETS)
	if err != nil {
		t.Fatal(err)
	}
	return tio.Lflag
}

func TestAskSecret(t *testing.T) {
	for _, x := range []struct{ typed, want string }{
		{"correct horse\n", "correct horse"},
		{"slip\x7f\x7f\x7f\x7fright\n", "right"}, // backspace
		{"wrong\x15right\n", "right"},            // Ctrl-U
		{"carriage return\r", "carriage return"},
		{"\n", ""},
		{" spaces stay \n", " spaces stay "},
		{"pässwörd\n", "pässwörd"},
		{"no newline\x04\x04", "no newline"}, // Ctrl-D
	} {
		c := newConsole(t)
		before := c.lflag(t)
		got := make(chan string)
		go func() {
			s, err := c.ui().askSecret(context.Background(), "Passphrase: ", "it", "")
			if err != nil {
				got <- err.Error()
				return
			}
			defer s.Wipe()
			got <- string(s.Bytes())
		}()
		c.expect("Passphrase: ")
		c.typed(x.typed)
		if g := <-got; g != x.want {
			t.Errorf("%q: got %q, want %q", x.typed, g, x.want)
		}
		if strings.Trim(c.shown(), "\r\n") != "" {
			t.Errorf("%q: the terminal shows %q", x.typed, c.shown())
		}
		if after := c.lflag(t); after != before {
			t.Errorf("%q: the terminal was left in mode %#x, it was %#x", x.typed, after, before)
		}
	}
}

func TestAskSecretEnds(t *testing.T) {
	c := newConsole(t)
	before := c.lflag(t)
	ctx, cancel := context.WithCancel(context.Background())
	done := make(chan error)
	go func() {
		_, err := c.ui().askSecret(ctx, "Passphrase: ", "it", "")
		done <- err
	}()
	c.expect("Passphrase: ")
	c.typed("half")
	cancel()
	if err := <-done; keep.Classify(err).Code != keep.CodeAborted {
		t.Errorf("interrupted: %v", err)
	}
	if c.lflag(t) != before {
		t.Error("the terminal was left without echo")
	}

	c = newConsole(t)
	go func() {
		_, err := c.ui().askSecret(context.Background(), "Passphrase: ", "it", "")
		done <- err
	}()
	c.expect("Passphrase: ")
	c.typed("\x04") // nobody wants to answer
	if err := <-done; keep.Classify(err).Code != keep.CodeAborted {
		t.Errorf("end of file: %v", err)
	}
}

func TestNoTerminal(t *testing.T) {
	u := &ui{err: io.Discard, openTTY: func() (*os.File, error) { return nil, unix.ENXIO }}
	_, err := u.askSecret(context.Background(), "x", "the passphrase", "--passphrase-fd 0")
	var no *errNoTerminal
	if !errors.As(err, &no) {
		t.Fatal(err)
	}
	p := explain(err, here{line: []string{"unlock", "alice"}})
	if p.Exit != exitUsage || p.Remedy[0].Command != "overkeep unlock alice --passphrase-fd 0" {
		t.Errorf("%+v", p)
	}
}

func TestNewPassphrase(t *testing.T) {
	for _, x := range []struct {
		name  string
		typed []string // before each, a prompt is awaited
		want  string
		code  keep.Code
	}{
		{"twice the same", []string{"correct horse battery staple\n", "correct horse battery staple\n"}, "correct horse battery staple", ""},
		{"a slip", []string{"correct horse battery staple\n", "other\n", "second thoughts are best\n", "second thoughts are best\n"}, "second thoughts are best", ""},
		{"too short thrice", []string{"a\n", "b\n", "\n"}, "", keep.CodeAborted},
	} {
		c := newConsole(t)
		type result struct {
			s   string
			err error
		}
		got := make(chan result)
		go func() {
			s, err := c.ui().askNewPassphrase(context.Background(), "keep", "")
			got <- result{string(s.Bytes()), err}
			s.Wipe()
		}()
		for _, s := range x.typed {
			c.expect(": ")
			c.typed(s)
		}
		r := <-got
		if r.s != x.want || (x.code != "") != (r.err != nil) || r.err != nil && keep.Classify(r.err).Code != x.code {
			t.Errorf("%s: %q, %v", x.name, r.s, r.err)
		}
	}
}

func TestConfirm(t *testing.T) {
	for typed, want := range map[string]bool{"y\n": true, "yes\n": true, "YES \n": true, "\n": false, "n\n": false, "yess\n": false, "j\n": false} {
		c := newConsole(t)
		got := make(chan bool)
		go func() {
			ok, err := c.ui().confirm(context.Background(), "Sure?")
			got <- ok && err == nil
		}()
		c.expect("[y/N] ")
		c.typed(typed)
		if g := <-got; g != want {
			t.Errorf("%q: %v", typed, g)
		}
	}
}

func recoveryKey(t *testing.T) *secret.Bytes {
	t.Helper()
	key, _, err := slot.NewRecovery()
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(key.Wipe)
	return key
}

// The key is shown with its code, asked for, and after three wrong answers given up.
func TestConfirmRecovery(t *testing.T) {
	t.Setenv("TERM", "xterm")
	key := recoveryKey(t)
	groups, err := slot.Groups(key)
	if err != nil {
		t.Fatal(err)
	}
	start := func() (*console, chan error) {
		c, done := newConsole(t), make(chan error, 1)
		go func() { done <- c.ui().confirmRecovery(context.Background(), key, "alice") }()
		return c, done
	}
	// asked goes on to the question and returns the group it is about.
	asked := func(c *console) (n int) {
		screen := c.expect("Press Enter when")
		if !strings.Contains(screen, string(groups[3])) || !strings.Contains(screen, "█") {
			t.Errorf("the key is not shown: %q", screen)
		}
		c.typed("\n")
		after := c.expect(" of the recovery key: ")
		if !strings.Contains(after, "\x1b[?1049l") {
			t.Error("the key stays on the screen while it is asked for")
		}
		fmt.Sscanf(after[strings.LastIndex(after, "group ")+6:], "%d", &n)
		return n
	}
	c, done := start()
	c.typed(strings.ToLower(string(groups[asked(c)])) + "\n")
	if err := <-done; err != nil {
		t.Errorf("the right group: %v", err)
	}

	c, done = start()
	for try := 1; try <= tries; try++ {
		asked(c)
		c.typed("wrong\n")
		if try < tries {
			c.expect("Press Enter. ")
			c.typed("\n")
		}
	}
	if err := <-done; keep.Classify(err).Code != keep.CodeUnconfirmed {
		t.Errorf("wrong groups: %v", err)
	}
}

func TestReadFD(t *testing.T) {
	for _, x := range []struct{ in, want, err string }{
		{"correct horse\n", "correct horse", ""},
		{"correct horse", "correct horse", ""},
		{"correct horse\r\n", "correct horse", ""},
		{" spaces stay \n", " spaces stay ", ""},
		{"", "", "nothing came"},
		{"\n", "", "nothing came"},
		{"a\nb\n", "", "more than one line"},
		{"a\n\n", "", "more than one line"},
		{"a\x00b", "", "NUL"},
		{strings.Repeat("x", maxSecret+1), "", "more than 4096 bytes"},
		{strings.Repeat("x", maxSecret), strings.Repeat("x", maxSecret), ""},
	} {
		r, w, err := os.Pipe()
		if err != nil {
			t.Fatal(err)
		}
		go func() { _, _ = io.WriteString(w, x.in); w.Close() }()
		fd, err := unix.Dup(int(r.Fd()))
		if err != nil {
			t.Fatal(err)
		}
		r.Close()
		s, err := readFD(t.Context(), fd, "passphrase-fd")
		if x.err == "" && (err != nil || string(s.Bytes()) != x.want) {
			t.Errorf("%.20q: %v", x.in, err)
		}
		if x.err != "" && (err == nil || !strings.Contains(err.Error(), x.err) || strings.Contains(err.Error(), "a\nb")) {
			t.Errorf("%.20q: %v, want %q", x.in, err, x.err)
		}
		s.Wipe()
	}
	for _, fd := range []int{-1, 1, 2, 900} {
		if _, err := readFD(t.Context(), fd, "passphrase-fd"); err == nil {
			t.Errorf("descriptor %d was taken", fd)
		}
	}
	// A terminal would echo.
	c := newConsole(t)
	tty, err := c.open()
	if err != nil {
		t.Fatal(err)
	}
	defer tty.Close()
	if _, err := readFD(t.Context(), int(tty.Fd()), "passphrase-fd"); err == nil || !strings.Contains(err.Error(), "terminal") {
		t.Errorf("a terminal: %v", err)
	}
}

func TestStrengthHint(t *testing.T) {
	for in, weak := range map[string]bool{
		"short1!": true, "password": true, "alllowercase": true, "Mixed1two!three": false,
		"correct horse battery staple": false, "abcdefghijklmnopqrst": false,
	} {
		hint := strengthHint([]byte(in))
		if (hint != "") != weak || strings.Contains(hint, in) {
			t.Errorf("%q: %q", in, hint)
		}
	}
}
