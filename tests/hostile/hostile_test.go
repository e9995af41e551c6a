// Package hostile gives the overkeep command bad input on a real machine: wrong
// keys, damaged, exchanged and planted files, odd names, a full disk, a Nix or a
// file system that cannot, other users at work against it, two commands at once.
//
// Of every case it holds that the command ends by itself with the exit code that
// the documentation gives it, says what is wrong in words and what to do about
// it, in text and in JSON, and leaves everything as it was: the keep on disk, no
// key in the kernel, no mount, no loop device, no process, no run directory; and
// that the keep opens again once the bad thing has been put right.
//
// Start with newLaptop and a table of cases for (*laptop).try. What the parsers
// do with every byte of hostile input is shown in crypt/slot and crypt/volume;
// this package takes samples of it and sees that the command tells the truth.
// Locking against holders is in tests/lock, crashes are in tests/crash.
package hostile

import (
	"bytes"
	"crypto/sha256"
	"encoding/hex"
	"encoding/json"
	"errors"
	"fmt"
	"io/fs"
	"maps"
	"os"
	"path/filepath"
	"regexp"
	"slices"
	"strconv"
	"strings"
	"testing"
	"time"
	"unsafe"

	"golang.org/x/sys/unix"

	"overkeep/tests/bed"
	"overkeep/tests/fixture"
	"overkeep/tests/lock/proof"
)

// patience ends a hang; nothing is measured by it.
const patience = 60 * time.Second

// The keep that the cases are tried on, and what lies in it.
const (
	keepDir = "/var/lib/overkeep/alice"
	slotDir = keepDir + "/slots"
	marker  = "what alice wrote before anybody tampered with her keep"
)

// laptop is a machine with the keep of alice, locked, and a file in it.
type laptop struct {
	*fixture.Keep
	codes map[int]string  // documented exit codes
	known map[string]bool // remedies that have been looked at
	aside int
	tried int
}

// machines bounds how many run at a time, on however many cores.
var machines = make(chan struct{}, 2)

func newLaptop(t *testing.T, args ...string) *laptop {
	t.Helper()
	l := bare(t)
	l.Init(t, args...)
	l.Unlock(t)
	l.Alice(t, "echo "+fixture.Quote(marker)+" > marker")
	l.Lock(t)
	return l
}

// bare is a laptop without a keep.
func bare(t *testing.T) *laptop {
	t.Helper()
	t.Parallel()
	machines <- struct{}{}
	t.Cleanup(func() { <-machines }) // after the machine's own clean-up
	l := &laptop{Keep: fixture.Machine(t, bed.Forky), codes: map[int]string{}, known: map[string]bool{}}
	for line := range strings.Lines(l.MustOverkeep(t, 0, "", "help", "exit-codes")) {
		f := regexp.MustCompile(`^ +(\d+)  (\S.*?)  `).FindStringSubmatch(line)
		if f != nil {
			n, _ := strconv.Atoi(f[1])
			l.codes[n] = f[2]
		}
	}
	if len(l.codes) < 10 {
		t.Fatalf("exit codes in the help: %v", l.codes)
	}
	return l
}

// path is a path of the machine seen from outside.
func (l *laptop) path(p string) string { return l.Root + p }

// attempt is one thing that is tried and must be refused.
type attempt struct {
	name string
	// bad makes things bad and returns what puts them right again; nil for
	// nothing. It may use must and the laptop's helpers.
	bad func(t *testing.T) (mend func())
	// script runs the command; "overkeep" in it may be followed by "$json", which
	// is nothing or --json. Empty: unlock alice, the passphrase on standard input.
	script string
	stdin  *string // nil: the right passphrase
	user   string  // empty: root
	env    []string

	exit   []int    // one of them
	says   []string // all of them stand in the message
	remedy []string // for each a remedy's command has it
}

const unlockAlice = "exec overkeep $json unlock alice --passphrase-fd 0"

func text(s string) *string { return &s }

// try runs one attempt, in text and in JSON, and afterwards opens the keep in
// earnest. See the package comment for what must hold.
func (l *laptop) try(t *testing.T, a attempt) {
	t.Helper()
	t.Run(a.name, func(t *testing.T) {
		good := l.snapshot(t)
		mend := func() {}
		if a.bad != nil {
			mend = sync1(a.bad(t))
		}
		defer mend() // also when a helper ended the test
		l.refused(t, a)
		if a.bad == nil {
			return
		}
		mend()
		if diff := good.diff(l.snapshot(t)); diff != "" {
			t.Fatalf("after all was put right again the keep is another:\n%s", diff)
		}
		// Disk and kernel are as they were; that this is enough to open the keep
		// is tried now and then, and at the end of each test.
		if l.tried++; l.tried%10 == 0 {
			l.opens(t)
		}
	})
}

// sync1 makes f do something the first time only.
func sync1(f func()) func() {
	done := false
	return func() {
		if !done && f != nil {
			done = true
			f()
		}
	}
}

// refused runs the attempt twice and checks both answers and what they left.
func (l *laptop) refused(t *testing.T, a attempt) {
	t.Helper()
	before := l.snapshot(t)
	plain := l.run(t, a, "")
	said := l.answer(t, a, plain, l.run(t, a, "--json"))
	if said == nil {
		return
	}
	for _, s := range a.says {
		if !strings.Contains(said.Message, s) {
			t.Errorf("the message does not say %q:\n%s", s, said.Message)
		}
	}
	for _, want := range a.remedy {
		if !slices.ContainsFunc(said.Remedy, func(r remedy) bool { return strings.Contains(r.Command, want) }) {
			t.Errorf("no remedy has %q:\n%s", want, plain.Stderr)
		}
	}
	l.follows(t, said.Remedy)
	l.nothingLeft(t)
	if diff := before.diff(l.snapshot(t)); diff != "" {
		t.Errorf("a refused command changed the keep:\n%s", diff)
		l.clear(t)
	}
}

func (l *laptop) run(t *testing.T, a attempt, flag string) bed.Result {
	t.Helper()
	script, stdin := a.script, fixture.Passphrase
	if script == "" {
		script = unlockAlice
	}
	if a.stdin != nil {
		stdin = *a.stdin
	}
	r, err := l.Exec(bed.Command{User: a.user, Script: script, Stdin: stdin, Dir: "/", Within: patience,
		Env: append([]string{"json=" + flag}, a.env...)})
	if err != nil {
		t.Fatalf("%v", err)
	}
	return r
}

// clear takes back what should not have succeeded, for the sake of later cases.
func (l *laptop) clear(t *testing.T) {
	t.Helper()
	for _, args := range []string{"lock alice --kill --yes", "destroy second --yes"} {
		l.Overkeep(t, "", strings.Fields(args)...)
	}
	l.Must(t, "root", "rm -rf /run/new.txt /var/lib/overkeep/.init-second")
}

// problem and remedy are errors as --json documents them.
type problem struct {
	Code    string          `json:"code"`
	Exit    int             `json:"exit"`
	Message string          `json:"message"`
	Name    string          `json:"name"`
	Missing string          `json:"missing"`
	Remedy  []remedy        `json:"remedy"`
	Holders json.RawMessage `json:"holders"`
}

type remedy struct {
	Why     string `json:"why"`
	Command string `json:"command"`
}

// innards is what no message for people has in it.
var innards = []*regexp.Regexp{
	regexp.MustCompile(`panic|goroutine \d|runtime error|SIGSEGV|\.go:\d+`),
	regexp.MustCompile(`\bGo (struct|value)\b|%!|<nil>|\{0x|&\{|\b0xc0[0-9a-f]{6,}`),
	regexp.MustCompile(`\b(slot|volume|keep|view|holder|layout|fs|os|io|json|age|toml|syscall|unix|errors|errorString|url|exec|pflag|cobra|hex|strconv|actions|metadata|filesystem|crypto)\.[A-Z]\w+`),
	regexp.MustCompile(`\b(u?int(8|16|32|64)|float64|interface|struct)\b|\[\]byte|map\[`),
	regexp.MustCompile(`(?i)helper process|internal request`),
	regexp.MustCompile(`[\x00-\x08\x0b-\x1f\x7f]`),
}

// answer checks one refusal in its two forms and returns what it says.
func (l *laptop) answer(t *testing.T, a attempt, plain, asJSON bed.Result) *problem {
	t.Helper()
	show := fmt.Sprintf("exit code %d\n%s%s", plain.Code, plain.Stdout, plain.Stderr)
	if !slices.Contains(a.exit, plain.Code) {
		t.Errorf("want exit code %v: %s", a.exit, show)
	}
	if plain.Code == 0 || asJSON.Code == 0 {
		t.Errorf("it was not refused: %s", show)
		l.clear(t)
		return nil
	}
	if l.codes[plain.Code] == "" {
		t.Errorf("the exit code is not documented: %s", show)
	}
	if plain.Stdout != "" || asJSON.Stdout != "" {
		t.Errorf("a refused command wrote to standard output: %s%s", plain.Stdout, asJSON.Stdout)
	}
	if !strings.HasPrefix(plain.Stderr, "overkeep: ") {
		t.Errorf("the message does not begin with the program's name: %s", show)
	}
	for _, re := range innards {
		if m := re.FindString(plain.Stderr); m != "" {
			t.Errorf("innards (%q): %s", m, show)
		}
	}
	var doc struct {
		Error *problem `json:"error"`
	}
	d := json.NewDecoder(strings.NewReader(asJSON.Stderr))
	d.DisallowUnknownFields()
	if err := d.Decode(&doc); err != nil || doc.Error == nil || d.More() {
		t.Errorf("the error with --json is not one object with an error: %v\n%s", err, asJSON.Stderr)
		return nil
	}
	p := doc.Error
	if asJSON.Code != plain.Code || p.Exit != plain.Code {
		t.Errorf("exit codes: text %d, JSON %d, in it %d", plain.Code, asJSON.Code, p.Exit)
	}
	if p.Message == "" || p.Code == "" || p.Code == "internal" {
		t.Errorf("JSON: code %q, message %q", p.Code, p.Message)
	}
	return p
}

// follows sees that the commands of remedies are ones that exist: overkeep knows
// the verb and the flags, anything else is a program of the machine or one that
// is said to be installed by a package.
func (l *laptop) follows(t *testing.T, rs []remedy) {
	t.Helper()
	for _, r := range rs {
		if r.Why == "" && r.Command == "" {
			t.Errorf("an empty remedy")
		}
		if strings.HasPrefix(r.Command, "overkeep ") && !l.known[r.Command] {
			l.known[r.Command] = true
			line, _, _ := strings.Cut(r.Command, " -- ")
			if out, err := l.Run("root", line+" --help"); err != nil {
				t.Errorf("the remedy %q is no command line: %s", r.Command, out)
			}
		}
	}
}

// opens unlocks the keep, reads what alice wrote, and locks it.
func (l *laptop) opens(t *testing.T) {
	t.Helper()
	l.Unlock(t, "alice")
	if got := l.Alice(t, "cat marker"); got != marker {
		t.Errorf("what alice wrote reads %q", got)
	}
	l.Lock(t, "alice")
	l.nothingLeft(t)
}

// nothingLeft sees that no keep is open or half open.
func (l *laptop) nothingLeft(t *testing.T) {
	t.Helper()
	for _, p := range l.ours(t) {
		t.Errorf("process %s is left", p)
	}
	b, err := os.ReadFile(fmt.Sprintf("/proc/%d/mountinfo", l.PID()))
	if err != nil {
		t.Fatal(err)
	}
	for line := range strings.Lines(string(b)) {
		if f := strings.Fields(line); strings.Contains(f[4], "/run/overkeep") || strings.HasPrefix(f[4], "/nix") {
			t.Errorf("a mount is left: %s", line)
		}
	}
	for _, loop := range proof.Loops(t, l.Machine) {
		if !strings.Contains(loop, ownLoop) {
			t.Errorf("a loop device is left: %s", loop)
		}
	}
	entries, err := os.ReadDir(l.path("/run/overkeep"))
	if err != nil && !errors.Is(err, fs.ErrNotExist) {
		t.Error(err)
	}
	for _, e := range entries {
		if !strings.HasPrefix(e.Name(), ".") {
			t.Errorf("/run/overkeep/%s is left", e.Name())
		}
	}
	// The name of a policy is that of its key.
	policies, err := os.ReadDir(l.path("/.fscrypt/policies"))
	if err != nil && !errors.Is(err, fs.ErrNotExist) {
		t.Error(err)
	}
	for _, p := range policies {
		if st := keyStatus(t, l.Root, p.Name()); st != unix.FSCRYPT_KEY_STATUS_ABSENT {
			t.Errorf("the kernel has the key of policy %s (status %d)", p.Name(), st)
		}
	}
}

// ours are the processes of the command; the name of one is no matter.
func (l *laptop) ours(t *testing.T) (ps []proof.Process) {
	t.Helper()
	for _, p := range proof.Processes(t, l.Machine) {
		exe, err := os.Readlink(fmt.Sprintf("/proc/%d/exe", p.PID))
		if err == nil && strings.HasPrefix(exe, "/usr/local/bin/overkeep") {
			ps = append(ps, p)
		}
	}
	return ps
}

// ownLoop is in the name of files that a test itself attaches to a loop device.
const ownLoop = "hostile-disk"

// keyStatus asks the file system of dir for a key (fscrypt.rst,
// FS_IOC_GET_ENCRYPTION_KEY_STATUS).
func keyStatus(t *testing.T, dir, policy string) uint32 {
	t.Helper()
	f, err := os.Open(dir)
	if err != nil {
		t.Fatal(err)
	}
	defer f.Close()
	var arg unix.FscryptGetKeyStatusArg
	arg.Key_spec.Type = unix.FSCRYPT_KEY_SPEC_TYPE_IDENTIFIER
	id, err := hex.DecodeString(policy)
	if err != nil || copy(arg.Key_spec.U[:], id) != unix.FSCRYPT_KEY_IDENTIFIER_SIZE {
		t.Fatalf("policy %q: %v", policy, err)
	}
	if _, _, errno := unix.Syscall(unix.SYS_IOCTL, f.Fd(), unix.FS_IOC_GET_ENCRYPTION_KEY_STATUS, uintptr(unsafe.Pointer(&arg))); errno != 0 {
		t.Fatalf("key status on %s: %v", dir, errno)
	}
	return arg.Status
}

// state is what lies on the disk of every keep and of fscrypt: a line for each
// name. Encrypted files cannot be read and are known by inode and size.
type state map[string]string

func (l *laptop) snapshot(t *testing.T, more ...string) state {
	t.Helper()
	s := state{}
	for _, root := range append([]string{"/var/lib/overkeep", "/.fscrypt", "/root/victim"}, more...) {
		err := filepath.WalkDir(l.path(root), func(p string, d fs.DirEntry, err error) error {
			if errors.Is(err, fs.ErrNotExist) && p == l.path(root) {
				return nil
			}
			if err != nil {
				return err
			}
			line, err := describe(p)
			s[strings.TrimPrefix(p, l.Root)] = line
			return err
		})
		if err != nil {
			t.Fatal(err)
		}
	}
	return s
}

func describe(p string) (string, error) {
	var st unix.Stat_t
	if err := unix.Lstat(p, &st); err != nil {
		return "", err
	}
	line := fmt.Sprintf("%o %d:%d", st.Mode, st.Uid, st.Gid)
	switch st.Mode & unix.S_IFMT {
	case unix.S_IFLNK:
		to, err := os.Readlink(p)
		return line + " -> " + to, err
	case unix.S_IFREG:
		b, err := readBounded(p)
		if errors.Is(err, unix.ENOKEY) {
			return fmt.Sprintf("%s inode %d, %d bytes, encrypted", line, st.Ino, st.Size), nil
		}
		return fmt.Sprintf("%s mtime %d %x", line, st.Mtim.Nano(), sha256.Sum256(b)), err
	}
	return line, nil
}

// readBounded leaves out the content of big files: images that a case made.
func readBounded(p string) ([]byte, error) {
	f, err := os.Open(p)
	if err != nil {
		return nil, err
	}
	defer f.Close()
	b := make([]byte, 1<<20)
	n, err := f.Read(b)
	if n == 0 && err != nil && err.Error() == "EOF" {
		err = nil
	}
	return b[:n], err
}

// diff says how now differs from s.
func (s state) diff(now state) string {
	var b strings.Builder
	for _, p := range slices.Sorted(maps.Keys(s)) {
		if now[p] == "" {
			fmt.Fprintf(&b, "gone: %s\n", p)
		} else if now[p] != s[p] {
			fmt.Fprintf(&b, "%s was %s\n   is now %s\n", p, s[p], now[p])
		}
	}
	for _, p := range slices.Sorted(maps.Keys(now)) {
		if s[p] == "" {
			fmt.Fprintf(&b, "new:  %s %s\n", p, now[p])
		}
	}
	return b.String()
}

// swap puts something else in the place of path: what was there is moved aside,
// on the same file system, make makes the other thing (or nothing at all), and
// the function returned puts the old one back.
func (l *laptop) swap(t *testing.T, path string, make func(p string) error) (mend func()) {
	t.Helper()
	l.aside++
	real, away := l.path(path), l.path(fmt.Sprintf("/root/aside-%d", l.aside))
	err := unix.Rename(real, away)
	if errors.Is(err, unix.EXDEV) {
		away = fmt.Sprintf("%s.aside-%d", real, l.aside)
		err = unix.Rename(real, away)
	}
	missing := errors.Is(err, unix.ENOENT)
	if err != nil && !missing {
		t.Fatal(err)
	}
	if err := make(real); err != nil {
		t.Fatal(err)
	}
	return func() {
		if err := os.RemoveAll(real); err != nil {
			t.Fatal(err)
		}
		if missing {
			return
		}
		if err := unix.Rename(away, real); err != nil {
			t.Fatal(err)
		}
	}
}

// content puts b in the place of the file at path, with its owner and mode.
func (l *laptop) content(t *testing.T, path string, b []byte) (mend func()) {
	t.Helper()
	return l.swap(t, path, func(p string) error { return os.WriteFile(p, b, 0o600) })
}

// read returns a file of the machine.
func (l *laptop) read(t *testing.T, path string) []byte {
	t.Helper()
	b, err := os.ReadFile(l.path(path))
	if err != nil {
		t.Fatal(err)
	}
	return b
}

// edit replaces old, which must be there, by new in the file at path.
func (l *laptop) edit(t *testing.T, path, old, new string) (mend func()) {
	t.Helper()
	b := l.read(t, path)
	if !bytes.Contains(b, []byte(old)) {
		t.Fatalf("%s has no %q:\n%s", path, old, b)
	}
	return l.content(t, path, bytes.Replace(b, []byte(old), []byte(new), 1))
}

// shell runs a script of the test's own as root, and another to put it right.
func (l *laptop) shell(t *testing.T, bad, mend string) func() {
	t.Helper()
	l.Must(t, "root", bad)
	return func() { l.Must(t, "root", mend) }
}
