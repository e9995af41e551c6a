// Command demo shows the whole idea on a throw-away laptop (tests/bed): a keep
// is made, opened, used by a real Nix beside the system store, collected from
// both sides, closed with proof, and then the raw disk is searched as a thief
// would. Every line it prints is a real command or its real output; what does
// not come out as promised ends it with an error.
//
// `make demo` runs it. It is not a test of details: those are in the packages
// beside it.
package main

import (
	"crypto/rand"
	"fmt"
	"os"
	"os/exec"
	"os/signal"
	"regexp"
	"strings"
	"syscall"
	"testing"

	"overkeep/tests/bed"
	"overkeep/tests/fixture"
)

const passphrase = "correct horse battery staple"

func main() {
	t := &stage{}
	defer t.close()
	sig := make(chan os.Signal, 1)
	signal.Notify(sig, syscall.SIGINT, syscall.SIGTERM)
	go func() { <-sig; t.close(); os.Exit(130) }()
	play(t)
	say("Done. Nothing is left mounted, nothing is left running.")
}

func play(t *stage) {
	suite := bed.Forky
	say("A throw-away laptop starts: Debian %s with stock Nix on a disk of its own.", suite)
	m := bed.Start(t, suite)
	m.Install(t, os.Getenv("OVERKEEP_BINARY"))
	m.SystemNix(t)
	d := &demo{t: t, m: m}
	d.as("root", "nix --version; uname -r; overkeep version", "")

	say("1. The system store has public software in it, readable by everyone.")
	m.Write(t, "/srv/system.nix", fixture.Derivation("payroll-lib-1.0", "echo public library > $out")+"\n")
	lib := lastLine(d.as("root", "nix-build --no-out-link /srv/system.nix", ""))

	say("2. Alice gets a keep: an encrypted personal store. Here on a loop image of its own.")
	d.as("root", "overkeep init --user alice --on-image /srv/alice.img --size 512M --passphrase-fd 0 --recovery-out /run/recovery.txt", passphrase)
	d.as("root", "overkeep unlock alice --passphrase-fd 0", passphrase)

	say("3. She builds a private project with the stock nix; it uses the system's library.")
	name, content := "canary-"+word(), "contents-"+word()
	d.show("root", "alice$ cat project.nix; nix-build project.nix", fixture.ViewCommand(
		"cat > project.nix <<'EOF'\n"+fixture.Derivation("acme-"+name, "echo "+content+" with $(cat $deps) > $out", lib)+"\nEOF\ncat project.nix; nix-build project.nix"), "")
	path := d.quiet("root", fixture.ViewCommand("readlink -f result"))
	d.view("cat " + path)

	say("4. It is there for alice in her view, and for nobody else.")
	d.view("ls /nix/store")
	for _, who := range []string{"alice", "bob", "root"} {
		d.show(who, who+", outside the view$ ls /nix/store", "ls /nix/store", "")
		if out, err := m.Run(who, "cat "+path); err == nil {
			t.Fatalf("%s read the private path: %s", who, out)
		}
	}

	say("5. Both garbage collectors run, in both orders. Neither takes what the other needs.")
	const gc = "nix-store --gc 2>&1 | tail -n 1"
	system := func() { d.as("root", gc, "") }
	personal := func() { d.view(gc + "; cat " + path) }
	for round, order := range [][]func(){{system, personal}, {personal, system}} {
		// Something to collect on both sides.
		rubbish := fixture.Quote(fixture.Derivation(fmt.Sprintf("rubbish-%d", round), "echo > $out"))
		d.quiet("root", "nix-build --no-out-link -E "+rubbish)
		d.quiet("root", fixture.ViewCommand("nix-build --no-out-link -E "+strings.Replace(rubbish, "rubbish", "private-rubbish", 1)))
		for _, collect := range order {
			collect()
		}
	}
	d.view("nix-store --verify --check-contents 2>&1; cat " + path)
	d.as("root", "nix-store --verify --check-contents 2>&1", "")

	say("6. How it stands.")
	d.as("root", "overkeep status alice", "")

	say("7. Why is it private? A policy says which paths are public; a line of the keep's own hides even the name.")
	d.quiet("root", "nix-store --generate-binary-cache-key cache.example.org-1 /run/cache.sec /run/cache.pub; "+
		"nix --extra-experimental-features nix-command store sign --key-file /run/cache.sec "+lib)
	d.as("root", `overkeep policy init --kind linux --key "$(cat /run/cache.pub)"`, "")
	d.view("echo 'personal name \"acme-*\"' >/run/overkeep/alice/k/policy/own.policy")
	d.as("root", "overkeep why "+path+" payroll-lib", "")
	if verdicts := d.as("root", "overkeep list", ""); !strings.Contains(verdicts, path[11:]+"  vetoed") || !strings.Contains(verdicts, lib[11:]+"  granted") {
		t.Fatalf("the verdicts are not as they should be")
	}

	say("8. A project of last year lies in the plaintext store. What belongs into the keep moves there, and is wiped outside.")
	oldName, oldContent := "acme-old-"+word(), "old-secret-"+word()
	d.quiet("alice", "cd; nix-build -o result -E "+fixture.Quote(fixture.Derivation(oldName, "echo "+oldContent+" > $out")))
	if n := m.Search(t, oldContent)[oldContent]; n == 0 {
		t.Fatalf("the search does not find what lies in plaintext")
	}
	d.as("root", "overkeep plan", "")
	d.as("root", "overkeep apply --yes", "")
	d.view("cat ~/keep/links/home/alice/result")
	d.as("alice", "ls; ls /nix/store | grep "+oldName+" || echo nothing of it", "")

	say("9. Locking takes proof. While something holds the keep, it says so and names it.")
	p, err := m.Start("root", "exec "+fixture.ViewCommand("echo in; exec sleep 1000"))
	if err != nil {
		t.Fatalf("%v", err)
	}
	t.until(func() bool { return strings.Contains(p.Output(), "in") }, "the holder to start")
	if out, err := m.Run("root", "overkeep lock alice"); fixture.Code(err) != 5 {
		t.Fatalf("lock with a holder: %v %s", err, out)
	} else {
		d.print("root# overkeep lock alice", failedOutput(err))
	}
	d.as("root", "overkeep lock alice --kill --yes", "")

	say("10. A thief takes the disk. This is what lies on it.")
	m.Write(t, "/home/bob/notes", "plain-"+name+"\n") // shows that the search finds what is there
	hits := m.Search(t, name, content, "plain-"+name, passphrase, oldName, oldContent)
	private := hits[name] - hits["plain-"+name] // the control holds the name, too
	fmt.Printf("    searched for in all blocks of the disk           hits\n")
	fmt.Printf("    the project's name                               %d\n", private)
	fmt.Printf("    its contents                                     %d\n", hits[content])
	fmt.Printf("    the project that lay in plaintext: its name      %d\n", hits[oldName])
	fmt.Printf("    and its contents                                 %d\n", hits[oldContent])
	fmt.Printf("    the passphrase                                   %d\n", hits[passphrase])
	fmt.Printf("    a plain file, to show that the search finds      %d\n\n", hits["plain-"+name])
	if private != 0 || hits[content] != 0 || hits[oldName] != 0 || hits[oldContent] != 0 || hits[passphrase] != 0 || hits["plain-"+name] == 0 {
		t.Fatalf("the search of the disk is not as promised")
	}
	d.as("root", "find /var/lib/overkeep; cat /var/lib/overkeep/alice/keep.json; head -n 2 /var/lib/overkeep/alice/slots/passphrase.age; "+
		"mount -o loop,ro /srv/alice.img /mnt; ls -l /mnt/volume; umount /mnt", "")
	fmt.Println("    They see that alice has a keep, when it was made, how large it may grow and\n" +
		"    how much of it was ever written. Not which paths, how many, or what they are called.")
	fmt.Println()

	say("11. With the recovery key (and no passphrase) it opens again; all is there.")
	d.as("root", "overkeep unlock alice --identity /run/recovery.txt", "")
	if got := d.view("cat " + path); !strings.Contains(got, content) {
		t.Fatalf("the private path reads %q", got)
	}
	d.as("root", "overkeep lock alice", "")
}

// demo runs commands on the machine and prints them with their output.
type demo struct {
	t *stage
	m *bed.Machine
}

func (d *demo) as(user, script, stdin string) string {
	prompt := user + "$ "
	if user == "root" {
		prompt = "root# "
	}
	return d.show(user, prompt+script, script, stdin)
}

// view runs a script as alice in her view.
func (d *demo) view(script string) string {
	return d.show("root", "alice, in her view$ "+script, fixture.ViewCommand(script), "")
}

func (d *demo) show(user, title, script, stdin string) string {
	r, err := d.m.Exec(bed.Command{User: user, Script: script, Stdin: stdin})
	if err != nil {
		d.t.Fatalf("%s: %v", title, err)
	}
	d.print(title, r.Stderr+r.Stdout)
	if r.Code != 0 {
		d.t.Fatalf("%s: exit code %d", title, r.Code)
	}
	return r.Stdout
}

func (d *demo) quiet(user, script string) string { return d.m.Must(d.t, user, script) }

var noise = regexp.MustCompile(`(?m)^(warning: you don't have Internet access.*|note: hard linking.*)\n`)

func (d *demo) print(title, out string) {
	fmt.Println("    " + title)
	out = strings.TrimRight(noise.ReplaceAllString(out, ""), "\n")
	if out != "" {
		fmt.Println("        " + strings.ReplaceAll(out, "\n", "\n        "))
	}
	fmt.Println()
}

func failedOutput(err error) string {
	if f, ok := err.(*bed.Failed); ok {
		return f.Stderr + f.Stdout
	}
	return fmt.Sprint(err)
}

func lastLine(s string) string {
	lines := strings.Split(strings.TrimSpace(s), "\n")
	return lines[len(lines)-1]
}

// word is a random word, so that a hit on the disk can only come from this run.
func word() string { return strings.ToLower(rand.Text()[:12]) }

func say(format string, args ...any) { fmt.Printf(format+"\n\n", args...) }

// stage is the part of testing.TB that the bed needs: a failure ends the demo,
// after everything has been taken down.
type stage struct {
	testing.TB
	cleanups []func()
}

func (s *stage) Helper()                 {}
func (s *stage) Name() string            { return "demo" }
func (s *stage) Cleanup(f func())        { s.cleanups = append(s.cleanups, f) }
func (s *stage) Logf(f string, a ...any) { fmt.Fprintf(os.Stderr, f+"\n", a...) }
func (s *stage) Log(a ...any)            { fmt.Fprintln(os.Stderr, a...) }
func (s *stage) Failed() bool            { return false }
func (s *stage) Errorf(f string, a ...any) {
	s.Fatalf(f, a...)
}
func (s *stage) Error(a ...any) { s.Fatal(a...) }
func (s *stage) Fatal(a ...any) { s.Fatalf("%s", fmt.Sprint(a...)) }
func (s *stage) Fatalf(f string, a ...any) {
	fmt.Fprintf(os.Stderr, "demo: "+f+"\n", a...)
	s.close()
	os.Exit(1)
}
func (s *stage) Skip(a ...any)            { s.Fatal(a...) }
func (s *stage) Skipf(f string, a ...any) { s.Fatalf(f, a...) }
func (s *stage) TempDir() string          { s.Fatal("no temporary directory here"); return "" }
func (s *stage) Setenv(key, value string) { _ = os.Setenv(key, value) }
func (s *stage) SkipNow()                 { s.Fatal("skipped") }
func (s *stage) FailNow()                 { s.Fatal("failed") }
func (s *stage) until(f func() bool, what string) {
	for range 1000 {
		if f() {
			return
		}
		_ = exec.Command("sleep", "0.01").Run()
	}
	s.Fatalf("waited in vain for %s", what)
}

func (s *stage) close() {
	for len(s.cleanups) > 0 {
		f := s.cleanups[len(s.cleanups)-1]
		s.cleanups = s.cleanups[:len(s.cleanups)-1]
		f()
	}
}
