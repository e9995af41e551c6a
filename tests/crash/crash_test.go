// Package crash shows that a keep survives being interrupted: every command is
// killed before every one of its durable steps (overkeep/crypt/crashpoint), alone
// or with the processes around it, and the power is cut there. Afterwards no key
// is lost, nothing written before is lost, the next command works, and nothing is
// left behind.
package crash

import (
	"crypto/rand"
	"encoding/json"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"

	"overkeep/systemd/keep"
	"overkeep/tests/bed"
	"overkeep/tests/crash/inject"
	"overkeep/tests/fixture"
	"overkeep/tests/lock/proof"
)

const (
	name      = "alice"
	stateRoot = "/var/lib/overkeep"
	fsImage   = "/srv/keep.img"
	data      = "/home/alice/keep/data"

	exitNotLocked = 5
	exitWrongKey  = 4
	exitNoKeep    = 8
)

// how is a way to crash at a point.
type how string

const (
	kill      how = "kill"       // the process at that point; who waits for it unwinds
	killGroup how = "killgroup"  // with all that run the command
	powerCut  how = "shutdown:/" // and the disk stays as it is at that moment
)

var allHows = []how{kill, killGroup, powerCut}

func (h how) String() string { s, _, _ := strings.Cut(string(h), ":"); return s }

// backends are the ways in which a keep lies on the disk.
var backends = map[string][]string{
	"image":    {"--size=64M"},
	"dir":      {"--backend=dir"},
	"on-image": {"--on-image=" + fsImage, "--size=64M"},
}

// two machines at a time are enough for a small computer.
var slots = make(chan struct{}, 2)

// machine is a machine under attack, and what is known of its keep.
type machine struct {
	*fixture.Keep
	backend        string
	pass, recovery string // what opens the keep; "" when there is none
	canary         string // in content and names of the keep
	upper          string // a store path in the keep
	own            map[int]bool
	runs           int // commands that were armed: numbers their files
	madeOver       int

	crashed map[string]int // points crashed at, by command and how
}

// newMachine starts a machine whose overkeep can be armed, without a keep.
func newMachine(t *testing.T, backend string) *machine {
	t.Helper()
	slots <- struct{}{}
	t.Cleanup(func() { <-slots })
	m := &machine{Keep: &fixture.Keep{Machine: bed.Start(t, bed.Forky)}, backend: backend,
		canary: "canary-" + strings.ToLower(rand.Text()), crashed: map[string]int{}}
	m.Install(t, inject.Binary(t))
	m.Must(t, "root", "sync") // what is installed is not to be lost with the power
	m.up(t)
	t.Cleanup(func() {
		all := 0
		for _, n := range m.crashed {
			all += n
		}
		t.Logf("%s: %d crashes: %v", backend, all, m.crashed)
	})
	return m
}

// up brings up what a boot of the machine would.
func (m *machine) up(t *testing.T) {
	t.Helper()
	m.SystemNix(t)
	m.own = map[int]bool{}
	for _, p := range proof.Processes(t, m.Machine) {
		m.own[p.PID] = true
	}
}

// cut cuts the power and boots again.
func (m *machine) cut(t *testing.T) {
	t.Helper()
	m.PowerCut(t)
	m.up(t)
}

// keepFile is a file of the keep's directory on the disk, seen from outside.
func (m *machine) keepFile(elem ...string) string {
	return filepath.Join(append([]string{m.Root + stateRoot, name}, elem...)...)
}

func (m *machine) exists() bool {
	_, err := os.Lstat(m.keepFile())
	return err == nil
}

// script is something to run in the machine.
type script struct {
	text  string
	stdin string
}

// overkeep is a script that runs the command and nothing else, in its own
// process group.
func overkeep(stdin string, args ...string) script {
	return script{"exec overkeep " + fixture.Quote(args...), stdin}
}

// initScript makes the keep, with the recovery key in a file below /run.
func (m *machine) initScript(pass, recoveryFile string) script {
	return overkeep(pass, append([]string{"init", name, "--user", "alice", "--work-factor=10", "--passphrase-fd=0",
		"--recovery-out", recoveryFile, "--yes"}, backends[m.backend]...)...)
}

// recoveryFrom reads the key in a recovery file; "" when there is none.
func (m *machine) recoveryFrom(file string) string {
	b, err := os.ReadFile(m.Root + file)
	if err != nil {
		return ""
	}
	for line := range strings.Lines(string(b)) {
		if strings.HasPrefix(line, "AGE-SECRET-KEY-1") {
			return strings.TrimSpace(line)
		}
	}
	return ""
}

// file is a name in /run that was not used before.
func (m *machine) file(what string) string {
	m.runs++
	return fmt.Sprintf("/run/%s.%d", what, m.runs)
}

// make makes the keep in peace and puts the canary into it.
func (m *machine) make(t *testing.T) {
	t.Helper()
	file := m.file("recovery")
	m.pass, m.upper = "pass "+rand.Text(), ""
	m.must(t, m.initScript(m.pass, file))
	if m.recovery = m.recoveryFrom(file); m.recovery == "" {
		t.Fatalf("no recovery key in %s", file)
	}
}

// fill puts data into the keep: a file and a store path.
func (m *machine) fill(t *testing.T) {
	t.Helper()
	m.unlock(t)
	m.upper = m.Alice(t, "cat >data <<<"+fixture.Quote(m.canary)+"; sync data .; nix-build --no-out-link -E "+
		fixture.Quote(fixture.Derivation(m.canary, "echo "+m.canary+" > $out"))+" 2>/dev/null")
	m.lockSoon(t)
}

// run runs a script to its end.
func (m *machine) run(t *testing.T, s script, env ...string) bed.Result {
	t.Helper()
	r, err := m.Exec(bed.Command{Script: s.text, Stdin: s.stdin, Env: env})
	if err != nil {
		t.Fatalf("%s: %v", s.text, err)
	}
	return r
}

func (m *machine) must(t *testing.T, s script) string {
	t.Helper()
	r := m.run(t, s)
	if r.Code != 0 {
		t.Fatalf("%s: exit code %d\n%s%s", s.text, r.Code, r.Stdout, r.Stderr)
	}
	return r.Stdout
}

func (m *machine) unlock(t *testing.T) {
	t.Helper()
	m.must(t, overkeep(m.pass, "unlock", name, "--passphrase-fd=0"))
}

func (m *machine) lock(t *testing.T) { t.Helper(); m.must(t, overkeep("", "lock", name)) }

// lockSoon locks once the daemon's worker of a client that has just ended is gone
// as well: until then lock refuses.
func (m *machine) lockSoon(t *testing.T) {
	t.Helper()
	proof.Await(t, func() string {
		switch r := m.run(t, overkeep("", "lock", name)); r.Code {
		case 0:
			return ""
		case exitNotLocked:
			return r.Stderr
		default:
			t.Fatalf("lock: exit code %d\n%s%s", r.Code, r.Stdout, r.Stderr)
			return ""
		}
	})
}

// opens tells whether the passphrase, or the recovery key, opens a slot. Any
// answer but yes and "wrong key" fails the test.
func (m *machine) opens(t *testing.T, key string) bool {
	t.Helper()
	args := []string{"key", "verify", name, "--passphrase-fd=0"}
	if strings.HasPrefix(key, "AGE-SECRET-KEY-1") {
		args = append(args, "--recovery")
	}
	r := m.run(t, overkeep(key, args...))
	if r.Code != 0 && r.Code != exitWrongKey {
		t.Errorf("key verify: exit code %d\n%s%s", r.Code, r.Stdout, r.Stderr)
	}
	return r.Code == 0
}

// armed runs a script that is to crash at its point number at. It returns the
// points passed; the last of them is where it crashed, if it did.
func (m *machine) armed(t *testing.T, s script, at int, h how) (points []string, fired bool, r bed.Result) {
	t.Helper()
	count, log := m.file("count"), m.file("log")
	r = m.run(t, s, "OVERKEEP_CRASH_COUNT="+count, "OVERKEEP_CRASH_LOG="+log,
		fmt.Sprint("OVERKEEP_CRASH_AT=", at), "OVERKEEP_CRASH_HOW="+string(h))
	b, err := os.ReadFile(m.Root + log)
	if err != nil && !os.IsNotExist(err) {
		t.Fatal(err)
	}
	points = strings.Split(strings.TrimSpace(string(b)), "\n")
	fired = len(points) >= at && points[0] != ""
	if fired {
		// A parent that unwinds may pass more points.
		points = points[:at]
	}
	return points, fired, r
}

// attack is a command under attack.
type attack struct {
	name   string
	least  int                                        // points that it passes at the very least
	before func(t *testing.T, m *machine)             // makes the state in which it is given
	script func(m *machine) script                    // the command; called once for a crash
	saw    func(m *machine)                           // looks at /run before a power cut takes it
	after  func(t *testing.T, m *machine, fired bool) // what must hold now; leaves a state for before
}

// campaign crashes the command at every point in every given way, until it gets
// through without reaching another one.
func (m *machine) campaign(t *testing.T, a attack, hows ...how) {
	for _, h := range hows {
		t.Run(a.name+"/"+h.String(), func(t *testing.T) {
			for at := 1; ; at++ {
				a.before(t, m)
				points, fired, r := m.armed(t, a.script(m), at, h)
				last := points[len(points)-1]
				what := fmt.Sprintf("%s at point %d, %q, by %s", a.name, at, last, h)
				if !fired {
					what = fmt.Sprintf("%s after %d points", a.name, len(points))
					if r.Code != 0 {
						t.Fatalf("%s: exit code %d\n%s%s", what, r.Code, r.Stdout, r.Stderr)
					}
				} else if r.Code == 0 {
					t.Errorf("%s: it crashed and said that all is well\n%s%s", what, r.Stdout, r.Stderr)
				}
				if a.saw != nil {
					a.saw(m)
				}
				if h == powerCut { // also after the success: it must last
					m.cut(t)
				}
				ok := t.Run(fmt.Sprintf("%d %s", at, last), func(t *testing.T) {
					a.after(t, m, fired)
				})
				if !ok {
					t.Logf("failed: %s; the command said (%d):\n%s%s", what, r.Code, r.Stdout, r.Stderr)
					m.again(t)
				}
				if !fired {
					if len(points) < a.least {
						t.Errorf("%s has %d points, which must be at least %d: %q", a.name, len(points), a.least, points)
					}
					break
				}
				m.crashed[a.name+"/"+h.String()]++
			}
		})
	}
}

// again makes a keep anew after a failure, so that the other points are still
// tried.
func (m *machine) again(t *testing.T) {
	t.Helper()
	m.Kill(t)
	m.Boot(t)
	m.up(t)
	m.run(t, overkeep("", "destroy", name, "--yes"))
	m.Must(t, "root", "rm -rf "+stateRoot+" "+fsImage+"; rm -f /.fscrypt/*/*")
	m.make(t)
	m.fill(t)
}

// whole holds what must be true of a keep after anything: it can be looked at,
// both keys open it, it unlocks with its data and locks, and nothing is left.
// With lockFirst it is locked before it is unlocked.
func (m *machine) whole(t *testing.T, lockFirst bool) {
	t.Helper()
	m.status(t)
	if !m.opens(t, m.recovery) {
		t.Error("the recovery key does not open the keep any more")
	}
	if lockFirst {
		m.lock(t)
		m.idle(t)
	}
	m.unlock(t) // with the passphrase
	if m.upper != "" {
		if got := m.Alice(t, "cat data "+m.upper); got != m.canary+"\n"+m.canary {
			t.Errorf("the data are %q", got)
		}
	}
	m.lock(t)
	m.clean(t)
}

// makeOver makes a keep in peace over what a crash has left of another. Disk, /run
// and kernel must then look as they do where there was no crash, so that the keep
// works as any other does; every fourth is tried as well.
func (m *machine) makeOver(t *testing.T) {
	t.Helper()
	m.make(t)
	m.clean(t)
	if m.madeOver++; m.madeOver%4 == 1 {
		m.whole(t, false)
	}
}

// sound sees at the end of a campaign that Nix's own check finds no fault with
// the keep, and that nothing that must not be is on the disk.
func (m *machine) sound(t *testing.T) {
	t.Helper()
	if m.exists() {
		m.unlock(t)
		if out, err := m.AliceRun("nix-store --verify --check-contents 2>&1"); err != nil {
			t.Errorf("the store is not sound: %v\n%s", err, out)
		}
		m.lockSoon(t)
	}
	m.nothingOnDisk(t)
}

// status asks for the state, which must work at any time. "" when there is no keep.
func (m *machine) status(t *testing.T) keep.State {
	t.Helper()
	if all := m.keeps(t); len(all) > 0 {
		return all[0].State
	}
	return ""
}

// keeps is the status of all keeps, which is at most one.
func (m *machine) keeps(t *testing.T) []keep.Status {
	t.Helper()
	r := m.run(t, overkeep("", "status", "--json"))
	var s struct{ Keeps []keep.Status }
	if err := json.Unmarshal([]byte(r.Stdout), &s); r.Code != 0 || err != nil || len(s.Keeps) > 1 {
		t.Errorf("status: exit code %d, %v\n%s%s", r.Code, err, r.Stdout, r.Stderr)
		return nil
	}
	return s.Keeps
}

// clean sees that nothing is left of what was interrupted: the keep, if there is
// one, is locked.
func (m *machine) clean(t *testing.T) {
	t.Helper()
	var set struct{ Protector, Policy string }
	want := []string{}
	if m.exists() {
		b, err := os.ReadFile(m.keepFile("slots/set.json"))
		if err == nil {
			err = json.Unmarshal(b, &set)
		}
		if err != nil {
			t.Errorf("set.json: %v", err)
		}
		want = []string{name, name + "/keep.json", name + "/slots", name + "/slots/set.json"}
		for _, s := range m.slotNames(t) {
			want = append(want, name+"/slots/"+s+".age")
		}
		if m.backend != "on-image" {
			want = append(want, name+"/volume")
		}
	}
	same := func(dir string, want []string) {
		t.Helper()
		got := m.files(t, dir)
		slices.Sort(want)
		if !slices.Equal(got, want) {
			t.Errorf("in %s there is %q, want %q", dir, got, want)
		}
	}
	same(stateRoot, want)
	policies, protectors, images := []string{}, []string{}, []string{}
	switch {
	case m.exists() && m.backend == "on-image":
		images = append(images, filepath.Base(fsImage))
	case m.exists():
		policies, protectors = append(policies, set.Policy), append(protectors, set.Protector)
	}
	same("/.fscrypt/policies", policies)
	same("/.fscrypt/protectors", protectors)
	same(filepath.Dir(fsImage), images)
	if !m.exists() {
		same("/nix/var/nix/gcroots/overkeep", []string{})
	}
	// The first init of a machine tries the file system where there is no state
	// directory yet.
	if left, _ := filepath.Glob(m.Root + filepath.Dir(stateRoot) + "/.overkeep*"); len(left) > 0 {
		t.Errorf("there is %q", left)
	}
	m.idle(t)
}

// files lists what is below a directory, sorted; a missing one is empty. It does
// not go into encrypted volumes.
func (m *machine) files(t *testing.T, dir string) []string {
	t.Helper()
	out := []string{}
	err := filepath.WalkDir(m.Root+dir, func(path string, d fs.DirEntry, err error) error {
		name, _ := filepath.Rel(m.Root+dir, path)
		switch {
		case err != nil && !os.IsNotExist(err):
			return err
		case err != nil || name == ".":
			return nil
		}
		out = append(out, name)
		if d.IsDir() && d.Name() == "volume" {
			return fs.SkipDir
		}
		return nil
	})
	if err != nil {
		t.Fatal(err)
	}
	slices.Sort(out)
	return out
}

// idle sees that nothing of a locked keep is at work: no mount, no loop device, no
// process, nothing in /run but the file that serialises commands.
func (m *machine) idle(t *testing.T) {
	t.Helper()
	for _, f := range m.files(t, "/run/overkeep") {
		if !strings.HasPrefix(f, ".") || !strings.HasSuffix(f, ".lock") {
			t.Errorf("in /run/overkeep there is %q", f)
		}
	}
	// A process that was told to end is some time in ending, and a loop device
	// that somebody just looks at is kept by that look.
	proof.Await(t, func() string {
		if l := proof.Loops(t, m.Machine); len(l) > 0 {
			return fmt.Sprint("loop devices are left: ", l)
		}
		for _, p := range proof.Processes(t, m.Machine) {
			if !m.own[p.PID] {
				return "a process is left: " + p.String()
			}
		}
		return ""
	})
	if b, err := os.ReadFile(fmt.Sprintf("/proc/%d/mountinfo", m.PID())); err != nil || strings.Contains(string(b), "overkeep/"+name) {
		t.Errorf("mounts are left (%v):\n%s", err, b)
	}
}

// slotNames are the slots in set.json.
func (m *machine) slotNames(t *testing.T) []string {
	t.Helper()
	var set struct{ Slots []struct{ Name string } }
	b, err := os.ReadFile(m.keepFile("slots/set.json"))
	if err == nil {
		err = json.Unmarshal(b, &set)
	}
	if err != nil {
		t.Errorf("set.json: %v", err)
	}
	var out []string
	for _, s := range set.Slots {
		out = append(out, s.Name)
	}
	return out
}

// nothingOnDisk searches the raw disk for everything that must never get there:
// all that any crash has left behind lies on it.
func (m *machine) nothingOnDisk(t *testing.T) {
	t.Helper()
	control := "control-" + rand.Text()
	m.Must(t, "root", "cat >/root/control <<<"+fixture.Quote(control))
	secrets := map[string]string{m.canary: "the canary", m.pass: "the passphrase"}
	if m.recovery != "" {
		secrets[m.recovery] = "the recovery key"
	}
	all := []string{control}
	for s := range secrets {
		all = append(all, s)
	}
	hits := m.Find(t, all...)
	if len(hits[control]) == 0 {
		t.Error("the search of the disk does not find what is there")
	}
	for s, what := range secrets {
		for _, at := range hits[s] {
			t.Errorf("%s is on the disk: %s", what, m.Owner(at))
		}
	}
}
