// Package recovery runs the commands of docs/RECOVERY.md as they stand there: on
// keeps of every back-end, on an old and a new Debian, where the document says so
// with nothing but Debian's own age and fscrypt, and sees that what was written
// in the view before comes out byte for byte.
//
// A block that nobody runs fails the package, so the document cannot promise what
// was never tried. Do not look here for refusals (tests/hostile) or crashes at
// every point (tests/crash).
package recovery

import (
	"flag"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"regexp"
	"strings"
	"sync"
	"testing"

	"overkeep/tests/bed"
	"overkeep/tests/fixture"
)

// stick is where the document has the recovery key.
const stick = "/media/stick/alice.txt"

// document is docs/RECOVERY.md: its blocks by the names of their markers.
type document struct {
	blocks  map[string]string
	mu      sync.Mutex
	ran     map[string]bool
	skipped bool // some test was, for want of root or a tool
}

var (
	marker = regexp.MustCompile(`^ *<!-- run: ([a-z -]+) -->$`)
	doc    = &document{blocks: map[string]string{}, ran: map[string]bool{}}
)

func TestMain(m *testing.M) {
	if err := doc.read(); err != nil {
		fmt.Fprintln(os.Stderr, "recovery:", err)
		os.Exit(1)
	}
	code := m.Run()
	if flag.Lookup("test.run").Value.String() == "" && code == 0 && !doc.skipped {
		for name := range doc.blocks {
			if !doc.ran[name] {
				fmt.Fprintf(os.Stderr, "recovery: nobody ran the block %q\n", name)
				code = 1
			}
		}
	}
	os.Exit(code)
}

// read takes the document apart: a marker is followed by one fenced block.
func (d *document) read() error {
	root, err := bed.ModuleRoot()
	if err != nil {
		return err
	}
	b, err := os.ReadFile(filepath.Join(root, "docs", "RECOVERY.md"))
	if err != nil {
		return err
	}
	var names []string
	var body strings.Builder
	inside := false
	for n, line := range strings.Split(string(b), "\n") {
		text := strings.TrimSpace(line)
		switch m := marker.FindStringSubmatch(line); {
		case m != nil && names == nil:
			names = strings.Fields(m[1])
		case strings.Contains(line, "<!-- run:") && !strings.Contains(line, "`"):
			return fmt.Errorf("line %d: a marker that is none, or without its block: %s", n+1, line)
		case names != nil && !inside && text == "```sh":
			inside = true
		case inside && text == "```":
			for _, name := range names {
				if d.blocks[name] != "" {
					return fmt.Errorf("line %d: a second block %q", n+1, name)
				}
				d.blocks[name] = body.String()
			}
			names, inside = nil, false
			body.Reset()
		case inside:
			body.WriteString(text + "\n")
		case names != nil:
			return fmt.Errorf("line %d: no block after the marker %v", n+1, names)
		}
	}
	if len(d.blocks) == 0 || names != nil {
		return fmt.Errorf("%d blocks, open %v", len(d.blocks), names)
	}
	return nil
}

func (d *document) block(t *testing.T, name string) string {
	t.Helper()
	b := d.blocks[name]
	if b == "" {
		t.Fatalf("the document has no block %q", name)
	}
	d.mu.Lock()
	defer d.mu.Unlock()
	d.ran[name] = true
	return b
}

// laptop is a machine on which the document is followed.
type laptop struct{ *fixture.Keep }

// machines bounds how many run at a time, on however many cores.
var machines = make(chan struct{}, 2)

// ready waits for its turn.
func ready(t *testing.T) {
	t.Parallel()
	machines <- struct{}{}
	t.Cleanup(func() {
		doc.mu.Lock()
		doc.skipped = doc.skipped || t.Skipped()
		doc.mu.Unlock()
		<-machines
	})
}

// bare is a laptop without a keep.
func bare(t *testing.T, suite bed.Suite) *laptop {
	t.Helper()
	l := &laptop{fixture.Machine(t, suite)}
	l.Must(t, "root", "mkdir -p /media/stick")
	return l
}

// start is a laptop with a locked keep of alice's and the recovery key where the
// document has it.
func start(t *testing.T, suite bed.Suite, args ...string) *laptop {
	t.Helper()
	l := bare(t, suite)
	l.Init(t, args...)
	l.Must(t, "root", "mv "+fixture.RecoveryFile+" "+stick)
	return l
}

// do runs blocks of the document as root, one after the other.
func (l *laptop) do(t *testing.T, names ...string) {
	t.Helper()
	for _, name := range names {
		script := doc.block(t, name)
		r, err := l.Exec(bed.Command{Script: script})
		if err != nil || r.Code != 0 {
			t.Fatalf("block %q: %v, exit code %d\n%s\n%s%s", name, err, r.Code, script, r.Stdout, r.Stderr)
		}
	}
}

// typed runs a block at a terminal, at which lines are typed. What shows there is
// tested elsewhere (cmd/overkeep).
func (l *laptop) typed(t *testing.T, name string, lines ...string) {
	t.Helper()
	script := doc.block(t, name)
	l.Write(t, "/run/block", "set -e\n"+script)
	// script(1) makes the terminal. What is typed before it is asked for waits in
	// the line buffer.
	r, err := l.Exec(bed.Command{Script: "script -qec 'bash /run/block' /dev/null", Stdin: strings.Join(lines, "\n") + "\n"})
	if err != nil || r.Code != 0 {
		t.Fatalf("block %q: %v, exit code %d\n%s\n%s%s", name, err, r.Code, script, r.Stdout, r.Stderr)
	}
}

// things are what alice has in her keep.
type things struct {
	sums   string // of her files
	system string // a path of the system store
	paths  string // personal paths, the second refers to the first and to system
}

const (
	sums = "find . -type f -print0 | sort -z | xargs -0 sha256sum; find . -type l -printf '%p %l\\n' | sort"
	last = "/tmp/last.nix"
)

// fill puts things into the keep and leaves it locked.
func (l *laptop) fill(t *testing.T) (x things) {
	t.Helper()
	l.Write(t, "/tmp/system.nix", fixture.Derivation("public", "echo of the system > $out"))
	x.system = l.Must(t, "root", "nix-build --no-out-link /tmp/system.nix 2>/dev/null", "NIX_REMOTE=daemon")
	l.Unlock(t)
	l.Alice(t, `head -c 300000 /dev/urandom > blob; mkdir -p 'a dir/deep'; echo ünï > 'a dir/deep/näme'; : > empty; ln -s blob link; chmod 640 blob`)
	l.Write(t, "/tmp/first.nix", fixture.Derivation("first", "mkdir $out; echo first > $out/file; ln -s $deps $out/public", x.system))
	first := l.Alice(t, "nix-build -o first /tmp/first.nix 2>/dev/null")
	l.Write(t, last, fixture.Derivation("last", "echo $deps > $out", first))
	x.paths = first + " " + l.Alice(t, "nix-build -o last "+last+" 2>/dev/null")
	x.sums = l.Alice(t, sums)
	l.Lock(t)
	return x
}

// intact sees that the keep opens with overkeep as before and has all things.
func (l *laptop) intact(t *testing.T, x things) {
	t.Helper()
	l.MustOverkeep(t, 0, "", "unlock", "alice", "--identity", stick)
	if got := l.Alice(t, sums); got != x.sums {
		t.Errorf("her files are now:\n%s\nwere:\n%s", got, x.sums)
	}
	l.Alice(t, "nix-store --verify --check-contents && nix-store --check-validity "+x.paths)
	if got := l.Alice(t, "cat first/file first/public"); got != "first\nof the system" {
		t.Errorf("her path reads %q", got)
	}
	l.Lock(t)
}

// shut sees that nothing of the rescue is left: no mount, no raw key.
func (l *laptop) shut(t *testing.T) {
	t.Helper()
	if out, err := l.Run("root", "[ ! -e /run/rescue ] && ! grep -e /run/rescue -e overkeep /proc/self/mountinfo"); err != nil {
		t.Errorf("left behind: %v\n%s", err, out)
	}
	if out := l.MustOverkeep(t, 0, "", "status", "alice"); !strings.Contains(out, "alice  locked") {
		t.Errorf("status: %s", out)
	}
}

// A keep of each kind is opened, read, and closed without overkeep, its files and
// store paths are used with stock tools, and it is as good as before.
func TestByHand(t *testing.T) {
	for _, suite := range bed.Suites {
		for kind, args := range map[string][]string{"image": nil, "dir": {"--backend=dir"}, "on-image": {"--on-image", "/srv/alice.img"}} {
			t.Run(string(suite)+"/"+kind, func(t *testing.T) {
				ready(t)
				l := start(t, suite, args...)
				x := l.fill(t)
				hidden := "/root/hidden"
				l.Must(t, "root", "mv /usr/local/bin/overkeep "+hidden)
				l.do(t, "begin", "raw", "conf", "open-"+kind, "copy", "export", "close-"+kind)
				if got := l.Must(t, "root", "cd /root/rescued/work; "+sums); got != x.sums {
					t.Errorf("rescued:\n%s\nwas:\n%s", got, x.sums)
				}
				for p := range strings.FieldsSeq(x.paths) {
					l.Must(t, "root", "test -e /root/rescued/store/"+filepath.Base(p)+" && test ! -e "+p)
				}
				if size := l.Must(t, "root", "stat -c %s /run/rescue/raw"); size != "32" {
					t.Errorf("the raw key has %s bytes", size)
				}
				l.do(t, "end", "import")
				if got := l.Must(t, "root", "nix-store --check-validity "+x.paths+"; nix-store --verify --check-contents; cat $(cat "+strings.Fields(x.paths)[1]+")/public"); !strings.HasSuffix(got, "of the system") {
					t.Errorf("an imported path reads %q", got)
				}
				// Out of the plain store again: the keep must stand by itself.
				l.Must(t, "root", "nix-store --delete "+x.paths)
				l.Must(t, "root", "mv "+hidden+" /usr/local/bin/overkeep")
				l.shut(t)
				l.intact(t, x)
			})
		}
	}
}

// Every slot has the same raw key: out of the file, typed from paper, and with
// the passphrase.
func TestRawKey(t *testing.T) {
	ready(t)
	l := start(t, bed.Forky)
	x := l.fill(t)
	raw := func() string { return l.Must(t, "root", "sha256sum < /run/rescue/raw; rm /run/rescue/raw") }
	l.do(t, "begin", "raw")
	want := raw()
	key := l.Must(t, "root", "grep -v '^#' "+stick)
	r, err := l.Exec(bed.Command{Script: doc.block(t, "raw-typed"), Stdin: onPaper(key)})
	if err != nil || r.Code != 0 {
		t.Fatalf("%v, exit code %d: %s", err, r.Code, r.Stderr)
	}
	if got := raw(); got != want {
		t.Error("typed from paper it gives another raw key")
	}
	l.typed(t, "raw-passphrase", fixture.Passphrase)
	if got := raw(); got != want {
		t.Error("the passphrase gives another raw key")
	}
	l.do(t, "raw", "end")
	l.shut(t)
	l.intact(t, x)
}

// onPaper is the recovery key as a person types it off a sheet.
func onPaper(key string) string {
	var b strings.Builder
	for i, c := range strings.ToLower(key) {
		if i >= 16 && (i-16)%4 == 0 {
			b.WriteByte(' ')
		}
		b.WriteRune(c)
	}
	return b.String() + "\n"
}

// The recovery key opens the keep and sets a new passphrase, from paper and from
// a file; the old passphrase is of no use any more.
func TestForgotten(t *testing.T) {
	ready(t)
	l := start(t, bed.Trixie)
	x := l.fill(t)
	key := strings.TrimSpace(onPaper(l.Must(t, "root", "grep -v '^#' "+stick)))
	l.typed(t, "paper", key)
	const first, second = "a passphrase that is new", "and yet another new one"
	l.typed(t, "paper-change", key, first, first)
	l.Lock(t)
	opens := func(pass string, code int) {
		t.Helper()
		l.MustOverkeep(t, code, pass, "unlock", "alice", "--passphrase-fd", "0")
		if code == 0 {
			l.Lock(t)
		}
	}
	opens(fixture.Passphrase, 4)
	opens(first, 0)
	l.typed(t, "file", second, second)
	l.Lock(t)
	opens(first, 4)
	opens(second, 0)
	l.intact(t, x)
}

// A damaged slot is let pass by name, and then mended.
func TestDamagedSlot(t *testing.T) {
	ready(t)
	l := start(t, bed.Forky)
	x := l.fill(t)
	l.Must(t, "root", "echo damaged > /var/lib/overkeep/alice/slots/passphrase.age")
	l.MustOverkeep(t, 6, "", "unlock", "alice", "--identity", stick)
	if out := l.MustOverkeep(t, 0, "", "key", "list", "alice"); !strings.Contains(out, "DAMAGED") {
		t.Errorf("key list does not say that it is damaged:\n%s", out)
	}
	l.do(t, "damaged-slot")
	const pass = "a passphrase that is new"
	l.typed(t, "damaged-slot-mend", pass, pass)
	l.Lock(t)
	l.MustOverkeep(t, 0, pass, "unlock", "alice", "--passphrase-fd", "0")
	l.Lock(t)
	l.intact(t, x)
}

// Without any of the public files the keep does not open; with the backup it does.
func TestBackup(t *testing.T) {
	ready(t)
	l := start(t, bed.Trixie)
	x := l.fill(t)
	l.do(t, "backup")
	for what, wreck := range map[string]string{
		"header": "rm /var/lib/overkeep/alice/keep.json", "list": "echo '{}' > /var/lib/overkeep/alice/slots/set.json", "slots": "rm -r /var/lib/overkeep/alice/slots",
		"policy": "rm /.fscrypt/policies/*", "protector": "rm /.fscrypt/protectors/*", "metadata": "rm -r /.fscrypt/*",
		"policy cut off": "truncate -s 20 /.fscrypt/policies/*",
	} {
		t.Run(what, func(t *testing.T) {
			l.Must(t, "root", wreck)
			r := l.Overkeep(t, "", "unlock", "alice", "--identity", stick)
			// The protector names the key for the stock tool; overkeep derives it.
			if r.Code == 0 && what == "protector" {
				l.Lock(t)
			} else if r.Code == 0 {
				t.Errorf("it opens without: %s", r.Stdout)
			}
			l.do(t, "restore")
			l.intact(t, x)
		})
	}
}

// The machine is gone, its disk is in another one, whose system store has nothing
// of the old.
func TestMoved(t *testing.T) {
	ready(t)
	old := start(t, bed.Forky)
	x := old.fill(t)
	key := old.Must(t, "root", "cat "+stick)
	old.Kill(t)
	l := bare(t, bed.Forky)
	l.copied(t, old.Disk, "/root/old.img")
	l.Write(t, stick, key)
	l.Must(t, "root", "loop=$(losetup -f --show /root/old.img); mknod /dev/sdb1 b $(stat -c '%Hr %Lr' $loop)")
	l.Must(t, "root", "test ! -e "+x.system)
	l.do(t, "moved-mount", "moved-store")
	l.Must(t, "root", "test -e "+x.system)
	l.do(t, "moved-unlock")
	in := func(script string) string {
		return l.Must(t, "root", "overkeep --root /mnt/old run alice -- bash -euo pipefail -c "+fixture.Quote("cd ~/keep; "+script))
	}
	if got := in(sums); got != x.sums {
		t.Errorf("her files are now:\n%s\nwere:\n%s", got, x.sums)
	}
	if got := in("cat first/file first/public; nix-store --check-validity " + x.paths); got != "first\nof the system" {
		t.Errorf("her path reads %q", got)
	}
	l.MustOverkeep(t, 0, "", "--root", "/mnt/old", "lock", "alice")
	l.Must(t, "root", "umount /mnt/old && losetup -D")
}

// copied puts a file from outside of the machine into it, with owner and mode.
func (l *laptop) copied(t *testing.T, from, to string) {
	t.Helper()
	out, err := exec.Command("cp", "--sparse=always", "--preserve=mode,ownership,timestamps", from, l.Root+to).CombinedOutput()
	if err != nil {
		t.Fatalf("copy %s: %v: %s", from, err, out)
	}
}

// The file of --on-image and the small directory beside it are copied to another
// machine, the file to another place.
func TestMovedFile(t *testing.T) {
	ready(t)
	old := start(t, bed.Forky, "--on-image", "/srv/alice.img", "--size", "64M")
	old.Unlock(t)
	old.Alice(t, "echo carried over > note")
	old.Lock(t)
	l := bare(t, bed.Forky)
	l.Must(t, "root", "mkdir -p -m 700 /var/lib/overkeep/alice/slots")
	for from, to := range map[string]string{"/srv/alice.img": "/srv/new-place.img", stick: stick} {
		l.copied(t, old.Root+from, to)
	}
	for _, f := range []string{"keep.json", "slots/set.json", "slots/passphrase.age", "slots/recovery.age"} {
		l.copied(t, old.Root+"/var/lib/overkeep/alice/"+f, "/var/lib/overkeep/alice/"+f)
	}
	l.do(t, "moved-file")
	l.MustOverkeep(t, 0, "", "unlock", "alice", "--identity", stick)
	if got := l.Alice(t, "cat note"); got != "carried over" {
		t.Errorf("it reads %q", got)
	}
	l.Lock(t)
}

// The account comes back, or gets its number back.
func TestAccount(t *testing.T) {
	ready(t)
	l := start(t, bed.Forky)
	x := l.fill(t)
	refused := func() {
		t.Helper()
		if r := l.Overkeep(t, "", "unlock", "alice", "--identity", stick); r.Code == 0 {
			t.Error("it opens for an account that is not the keep's")
		}
	}
	l.Must(t, "root", "usermod --uid 1234 alice")
	refused()
	l.do(t, "user-renumbered")
	l.intact(t, x)
	l.Must(t, "root", "userdel alice; rm -r /home/alice")
	refused()
	l.do(t, "user-gone")
	l.intact(t, x)
}

// Killed at one system call after another, init and destroy come to a good end
// when they are called again.
func TestInterrupted(t *testing.T) {
	ready(t)
	l := bare(t, bed.Trixie)
	const line = "init alice --user alice --size 64M --work-factor 12 --passphrase-fd 3 --recovery-out " + stick
	const pass = "exec 3<<<" + "'" + fixture.Passphrase + "'; "
	killed := func(command, call string, n int) bool {
		t.Helper()
		r, err := l.Exec(bed.Command{Script: fmt.Sprintf("%sexec strace -f -qq -o /dev/null -e trace=%s -e inject=%s:signal=KILL:when=%d overkeep %s", pass, call, call, n, command)})
		if err != nil {
			t.Fatal(err)
		}
		return r.Code != 0
	}
	gone := func() {
		t.Helper()
		if out := l.Must(t, "root", "ls -A /var/lib/overkeep; ls -A /.fscrypt/policies /.fscrypt/protectors 2>/dev/null | grep -v : || true"); strings.TrimSpace(out) != "" {
			t.Errorf("left behind: %s", out)
		}
	}
	for _, call := range []string{"mkdirat", "renameat,renameat2", "mount"} {
		for n := 1; ; n += 1 + n/2 {
			l.Must(t, "root", "rm -f "+stick)
			if !killed(line, call, n) {
				if n < 2 {
					t.Errorf("init calls no %s", call)
				}
				break
			}
			l.typed(t, "init-again", fixture.Passphrase, fixture.Passphrase)
			l.MustOverkeep(t, 0, "", "unlock", "alice", "--identity", stick)
			l.Lock(t)
			l.do(t, "destroy-again")
			gone()
			if t.Failed() || n > 40 {
				t.Fatalf("killed at %s %d", call, n)
			}
		}
		l.do(t, "destroy-again")
		l.Must(t, "root", "rm -f "+stick)
	}
	for _, call := range []string{"unlinkat", "renameat,renameat2"} {
		for n := 1; ; n += 1 + n/2 {
			l.Must(t, "root", "rm -f "+stick)
			l.Must(t, "root", pass+"overkeep "+line)
			if !killed("destroy alice --yes", call, n) {
				if n < 2 {
					t.Errorf("destroy calls no %s", call)
				}
				gone()
				break
			}
			// Killed when all was gone, there is no keep to be destroyed.
			if _, err := l.Run("root", "[ -z \"$(ls -A /var/lib/overkeep)\" ]"); err != nil {
				l.do(t, "destroy-again")
			}
			gone()
			if t.Failed() || n > 40 {
				t.Fatalf("killed at %s %d", call, n)
			}
		}
	}
}
