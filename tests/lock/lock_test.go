// Package lock shows that "locked" is never said of a keep that can be read:
// whoever holds it, in whatever way, is named, and after a success neither a
// byte nor a name of it is within anybody's reach, nor its key in any memory.
package lock

import (
	"crypto/rand"
	"encoding/json"
	"os"
	"regexp"
	"slices"
	"strconv"
	"strings"
	"testing"

	"overkeep/overlay/holder"
	"overkeep/systemd/keep"
	"overkeep/tests/bed"
	"overkeep/tests/fixture"
	"overkeep/tests/lock/proof"
)

const (
	exitLocked    = 3
	exitNotLocked = 5
	exitInUse     = 14
	name          = "alice"
	inView        = "/home/alice/keep/" // where alice's work directory shows
	volume        = "/run/overkeep/alice/k"
	secretFile    = inView + "secret"
)

// backends are the ways in which a keep lies on the disk.
var backends = []struct {
	name string
	args []string
}{
	{"image", []string{"--size=128M"}},
	{"dir", []string{"--backend=dir"}},
	{"on-image", []string{"--on-image=/var/lib/keep.img", "--size=128M"}},
}

// each runs f on a machine with a keep of every back-end.
func each(t *testing.T, f func(t *testing.T, k *locked)) { on(t, len(backends), f) }

// both is each without the last back-end, which for a holder is like the first.
func both(t *testing.T, f func(t *testing.T, k *locked)) { on(t, 2, f) }

func on(t *testing.T, n int, f func(t *testing.T, k *locked)) {
	for _, b := range backends[:n] {
		t.Run(b.name, func(t *testing.T) {
			t.Parallel()
			f(t, newKeep(t, bed.Forky, b.args...))
		})
	}
}

// locked is a machine with a keep that is locked, and what lies in it.
type locked struct {
	*fixture.Keep
	pass     string // random: the machine's PID 1 is this test binary, constants included
	recovery string // an age identity; nowhere in the machine
	secret   string // content of secretFile
	upper    string // a store path in the keep: a copy of busybox
	lower    string // a store path of the system
}

// newKeep makes the keep and fills it.
func newKeep(t *testing.T, suite bed.Suite, args ...string) *locked {
	t.Helper()
	k := &locked{Keep: fixture.Machine(t, suite), pass: "pass " + rand.Text(), secret: "secret " + rand.Text()}
	const recoveryFile = "/run/recovery"
	k.MustOverkeep(t, 0, k.pass, append([]string{"init", "--user", "alice", "--work-factor=10",
		"--passphrase-fd=0", "--recovery-out", recoveryFile, "--yes"}, args...)...)
	for line := range strings.Lines(k.Read(t, recoveryFile)) {
		if strings.HasPrefix(line, "AGE-SECRET-KEY-1") {
			k.recovery = strings.TrimSpace(line)
		}
	}
	if k.recovery == "" {
		t.Fatal("no recovery key in the recovery file")
	}
	k.Must(t, "root", "rm "+recoveryFile)

	k.lower = k.Must(t, "root", nixBuild("lower", "echo of the system > $out"), "NIX_REMOTE=daemon")
	k.unlock(t)
	k.Alice(t, "cat >secret <<<"+fixture.Quote(k.secret)+"; mkdir dir; cp $(ldd /bin/bash | sed -n 's/.*=> \\(.*tinfo[^ ]*\\).*/\\1/p') lib.so")
	k.upper = k.Alice(t, nixBuild("upper", "cp /bin/sh $out"))
	k.mustLock(t)
	return k
}

// nixBuild is a shell command that builds a derivation and prints its path.
func nixBuild(name, script string) string {
	return "nix-build --no-out-link -E " + fixture.Quote(fixture.Derivation(name, script)) + " 2>/dev/null"
}

// unlock opens the keep.
func (k *locked) unlock(t *testing.T) {
	t.Helper()
	k.MustOverkeep(t, 0, k.pass, "unlock", name, "--passphrase-fd=0")
}

// open is unlock, with the evidence gathered by which it will be recognised.
func (k *locked) open(t *testing.T) *proof.Evidence {
	t.Helper()
	if s := k.status(t); s.State != keep.Locked { // a test before this one has failed
		k.kill(t)
	}
	k.unlock(t)
	return proof.Gather(t, k.Machine, name, secretFile, k.upper)
}

// mustLock locks the keep and fails the test if that fails.
func (k *locked) mustLock(t *testing.T, args ...string) {
	t.Helper()
	k.MustOverkeep(t, 0, "", append([]string{"lock", name}, args...)...)
}

// status asks the command for the state.
func (k *locked) status(t *testing.T) keep.Status {
	t.Helper()
	var r struct{ Keeps []keep.Status }
	out := k.MustOverkeep(t, 0, "", "status", name, "--json")
	if err := json.Unmarshal([]byte(out), &r); err != nil || len(r.Keeps) != 1 {
		t.Fatalf("status: %v\n%s", err, out)
	}
	return r.Keeps[0]
}

// isLocked holds the command's word and the proof from outside together.
func (k *locked) isLocked(t *testing.T, e *proof.Evidence) {
	t.Helper()
	if s := k.status(t); s.State != keep.Locked || s.Key != "absent" {
		t.Errorf("after a lock the state is %q, the key %q", s.State, s.Key)
	}
	e.Locked(t)
}

// refused runs lock, which must say NOT locked and name the holders.
func (k *locked) refused(t *testing.T, args ...string) []holder.Holder {
	t.Helper()
	r := k.Overkeep(t, "", append([]string{"lock", name, "--json"}, args...)...)
	if r.Code != exitNotLocked || r.Stdout != "" {
		t.Fatalf("lock of a keep that is held: exit code %d, want %d\n%s%s", r.Code, exitNotLocked, r.Stdout, r.Stderr)
	}
	var e struct {
		Error struct {
			Code    keep.Code
			Message string
			Holders []holder.Holder
		}
	}
	if err := json.Unmarshal([]byte(r.Stderr), &e); err != nil {
		t.Fatalf("lock --json: %v\n%s", err, r.Stderr)
	}
	if e.Error.Code != keep.CodeNotLocked || !strings.Contains(e.Error.Message, "NOT locked") {
		t.Errorf("lock says code %q, %q", e.Error.Code, e.Error.Message)
	}
	return e.Error.Holders
}

// named sees that the holders name the process in the given way; inside 0 is a
// holder that is no process.
func named(t *testing.T, hs []holder.Holder, inside int, how holder.How) {
	t.Helper()
	for _, h := range hs {
		if h.PID == inside && slices.ContainsFunc(h.Holds, func(x holder.Hold) bool { return x.How == how }) {
			return
		}
	}
	t.Errorf("lock does not name pid %d as %q; it names %v", inside, how, hs)
}

// holding is something that holds the keep in a machine.
type holding struct {
	*bed.Proc
	pid     int // as the machine knows it, 0 when it is no process
	release func(t *testing.T)
}

var pidLine = regexp.MustCompile(`(?m)^pid (\d+)$`)

// hold starts a holder, and waits until it has said "pid N" and, if it has more
// to say than that, until what it said matches ready.
func (k *locked) hold(t *testing.T, script, ready string) *holding {
	t.Helper()
	p, err := k.Start("root", script)
	if err != nil {
		t.Fatal(err)
	}
	h := &holding{Proc: p}
	h.release = func(*testing.T) { p.Kill(); <-p.Done() }
	t.Cleanup(p.Kill)
	want := regexp.MustCompile(ready)
	proof.Await(t, func() string {
		select {
		case <-p.Done():
			t.Fatalf("the holder ended:\n%s\n%s", script, p.Output())
		default:
		}
		m := pidLine.FindStringSubmatch(p.Output())
		if m == nil || !want.MatchString(p.Output()) {
			return "the holder is not ready: " + p.Output()
		}
		h.pid, _ = strconv.Atoi(m[1])
		return ""
	})
	return h
}

// asAlice and asRoot are shell commands that run a script in the view, from "/",
// so that the work directory is no hold.
func asAlice(script string) string { return "cd /; exec overkeep run alice -- " + inBash(script) }
func asRoot(script string) string {
	return "cd /; exec overkeep run alice --as-root -- " + inBash(script)
}
func inBash(script string) string { return "bash -euo pipefail -c " + fixture.Quote(script) }

// stay ends a holder's script: it says who it is and stays.
const stay = "; echo pid $$; exec sleep infinity"

// wait is stay for a shell that must not be replaced: it holds by being what it is.
const wait = "'sleep infinity & echo pid $$; wait'"

// holders are the ways to hold a keep. In scripts @upper and @lower stand for
// store paths.
var holders = []struct {
	name   string
	how    holder.How
	script string // of a process in the view that says "pid N" and stays
	ready  string // a pattern of what else it says
	// For what outlives its script: make prints what undo gets as $x.
	make, undo string
	pidless    bool
}{
	{name: "open file", how: holder.OpenFile, script: asAlice("exec 3<" + secretFile + stay)},
	{name: "open file without a name", how: holder.OpenFile, script: asAlice("echo x >" + inView + "gone; exec 3<" + inView + "gone; rm " + inView + "gone" + stay)},
	{name: "open directory", how: holder.OpenFile, script: asAlice("exec 3<" + inView + "dir" + stay)},
	{name: "open store path", how: holder.OpenFile, script: asAlice("exec 3<@upper" + stay)},
	{name: "open lower file through the overlay", how: holder.OpenFile, script: asAlice("exec 3<@lower" + stay)},
	{name: "current directory", how: holder.CurrentDirectory, script: asAlice("cd " + inView + "dir" + stay)},
	{name: "current directory in the store", how: holder.CurrentDirectory, script: asAlice("cd /nix/store" + stay)},
	{name: "mapped library", how: holder.MappedFile, script: asAlice("export LD_PRELOAD=" + inView + "lib.so; exec bash -c " + wait)},
	{name: "running binary", how: holder.RunningBinary, script: asAlice("exec -a sh @upper -c " + wait)},
	{name: "root directory", how: holder.RootDirectory, script: asRoot("exec perl -e 'chroot \"" + inView + "\" or die $!; chdir \"/\"; $| = 1; print \"pid $$\\n\"; sleep 1 while 1'")},
	{name: "unix socket", how: holder.UnixSocket, script: asAlice("exec perl -MSocket -e 'socket(S, PF_UNIX, SOCK_STREAM, 0) && bind(S, sockaddr_un(\"" + inView + "socket\")) or die $!; unlink \"" + inView + "socket\"; $| = 1; print \"pid $$\\n\"; sleep 1 while 1'")},
	{name: "open database", how: holder.OpenFile, ready: `(?m)^\d+$`,
		script: asRoot("echo pid $$; mkfifo -m 600 /run/sql; exec 3<>/run/sql; rm /run/sql; echo 'begin; select count(*) from ValidPaths;' >&3; exec sqlite3 " + volume + "/nix/db/db.sqlite <&3")},
	{name: "second namespace with nothing open", how: holder.MountNamespace, script: asRoot("exec unshare -m " + inBash("echo pid $$; exec sleep infinity"))},
	{name: "descriptor of a copied namespace", how: holder.NamespaceFile, script: copied + "exec 3</proc/$copy/ns/mnt; kill $copy; wait $copy || true" + stay},
	{name: "bind mount of a copied namespace", how: holder.NamespaceFile, pidless: true,
		make: copied + "touch /run/copy; mount --bind /proc/$copy/ns/mnt /run/copy; kill $copy; wait $copy || true; echo /run/copy", undo: "umount $x; rm $x"},
	{name: "loop device on a file", how: holder.LoopDevice, pidless: true,
		make: asRoot("truncate -s 1M " + inView + "img; losetup --find --show " + inView + "img"), undo: "losetup -d $x"},
	{name: "foreign mount in the keep", how: holder.MountPoint, pidless: true,
		make: asRoot("mount -t tmpfs none " + inView + "dir; echo " + inView + "dir"), undo: "nsenter --mount=/run/overkeep/alice/ns/mnt umount $x"},
}

// copied makes a mount namespace with a copy of the view's mounts; $copy lives in
// it.
const copied = `cd /; coproc c { exec nsenter --mount=/run/overkeep/alice/ns/mnt unshare -m sh -c 'echo; exec sleep infinity'; }
	read -u ${c[0]} x; copy=$c_PID; `

// take starts the holder.
func (k *locked) take(t *testing.T, i int) *holding {
	t.Helper()
	h := holders[i]
	fill := strings.NewReplacer("@upper", k.upper, "@lower", k.lower).Replace
	if !h.pidless {
		return k.hold(t, fill(h.script), h.ready)
	}
	x := k.Must(t, "root", fill(h.make))
	return &holding{release: func(t *testing.T) { t.Helper(); k.Must(t, "root", "x="+fixture.Quote(x)+"; "+h.undo) }}
}

// Whoever holds the keep is named, in the right way, and nothing is taken from
// anybody by a lock that is refused. When the holder goes, the keep locks.
func TestHolders(t *testing.T) {
	each(t, func(t *testing.T, k *locked) {
		for i, h := range holders {
			t.Run(h.name, func(t *testing.T) {
				e := k.open(t)
				held := k.take(t, i)
				named(t, k.refused(t), held.pid, h.how)
				if s := k.status(t); s.State != keep.Unlocked || s.Key != "present" {
					t.Errorf("after a refusal the state is %q, the key %q", s.State, s.Key)
				}
				e.Readable(t)
				if got := k.Alice(t, "cat secret"); got != k.secret {
					t.Errorf("after a refusal alice reads %q", got)
				}
				held.release(t)
				k.mustLock(t)
				k.isLocked(t, e)
			})
		}
	})
}

// TestWait: lock --wait lets nothing new in, waits, and completes by itself.
func TestWait(t *testing.T) {
	both(t, func(t *testing.T, k *locked) {
		for i, h := range holders {
			if h.how == holder.MountNamespace || h.how == holder.NamespaceFile {
				continue // unmounted in their namespace, without waiting
			}
			t.Run(h.name, func(t *testing.T) {
				e := k.open(t)
				held := k.take(t, i)
				p := k.waiting(t)
				e.Readable(t)
				held.release(t)
				if r, err := p.Wait(); err != nil || r.Code != 0 {
					t.Fatalf("lock --wait: %v, exit code %d\n%s", err, r.Code, r.Stdout)
				}
				k.isLocked(t, e)
			})
		}
	})
}

// waiting starts lock --wait and returns once it refuses new work and holds the
// run lock: another lock is told that a command is working on the keep.
func (k *locked) waiting(t *testing.T) *bed.Proc {
	t.Helper()
	p, err := k.Start("root", "exec overkeep lock alice --wait")
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(p.Kill)
	proof.Await(t, func() string {
		select {
		case <-p.Done():
			t.Fatalf("lock --wait did not wait:\n%s", p.Output())
		default:
		}
		if k.status(t).State == keep.Unlocked {
			return "lock --wait still lets new work in"
		}
		return ""
	})
	r := k.Overkeep(t, "", "run", name, "--", "true")
	if r.Code != exitLocked && r.Code != exitInUse {
		t.Errorf("run while lock waits: exit code %d\n%s%s", r.Code, r.Stdout, r.Stderr)
	}
	r = k.Overkeep(t, "", "lock", name)
	if r.Code != exitInUse {
		t.Errorf("a second lock: exit code %d, want %d\n%s%s", r.Code, exitInUse, r.Stdout, r.Stderr)
	}
	if s := k.status(t); s.State == keep.Locked {
		t.Errorf("while lock waits the state is %q", s.State)
	}
	return p
}

// TestInterruptedWait: a wait that is given up says NOT locked, and the next lock
// completes.
func TestInterruptedWait(t *testing.T) {
	both(t, func(t *testing.T, k *locked) {
		e := k.open(t)
		held := k.hold(t, asAlice("exec 3<"+secretFile+stay), "")
		p := k.waiting(t)
		if err := p.Signal(os.Interrupt); err != nil {
			t.Fatal(err)
		}
		if r, err := p.Wait(); err != nil || r.Code == 0 {
			t.Fatalf("an interrupted wait: %v, exit code %d\n%s", err, r.Code, r.Stdout)
		}
		if s := k.status(t); s.State == keep.Locked {
			t.Errorf("after an interrupted wait the state is %q", s.State)
		}
		e.Readable(t)
		named(t, k.refused(t), held.pid, holder.OpenFile)
		held.release(t)
		k.mustLock(t)
		k.isLocked(t, e)
	})
}

// TestKill: lock --kill ends what holds the keep and says what it ended.
func TestKill(t *testing.T) {
	both(t, func(t *testing.T, k *locked) {
		for i, h := range holders {
			t.Run(h.name, func(t *testing.T) {
				e := k.open(t)
				held := k.take(t, i)
				if h.pidless && h.how != holder.NamespaceFile {
					named(t, k.refused(t, "--kill", "--yes"), 0, h.how)
					if s := k.status(t); s.State == keep.Locked {
						t.Errorf("after a refusal the state is %q", s.State)
					}
					k.Must(t, "root", "nsenter --mount=/run/overkeep/alice/ns/mnt test -e "+volume+"/keep.json")
					held.release(t)
					k.mustLock(t)
					k.isLocked(t, e)
					return
				}
				ended := k.kill(t)
				if h.how != holder.NamespaceFile && h.how != holder.MountNamespace {
					// What is only a copy of the mounts is unmounted; nobody need die.
					named(t, ended, held.pid, h.how)
					<-held.Done()
				}
				k.isLocked(t, e)
				if h.pidless {
					held.release(t)
				}
			})
		}
		t.Run("one that ignores SIGTERM", func(t *testing.T) {
			e := k.open(t)
			held := k.hold(t, asAlice("trap '' TERM; exec 3<"+secretFile+stay), "")
			named(t, k.kill(t), held.pid, holder.OpenFile)
			<-held.Done()
			k.isLocked(t, e)
		})
		t.Run("many", func(t *testing.T) {
			e := k.open(t)
			var all []*holding
			for range 5 {
				all = append(all, k.hold(t, asAlice("exec 3<"+secretFile+stay), ""))
			}
			ended := k.kill(t)
			for _, held := range all {
				named(t, ended, held.pid, holder.OpenFile)
				<-held.Done()
			}
			k.isLocked(t, e)
		})
	})
}

// kill is lock --kill, which must succeed; it returns what it says that it ended.
func (k *locked) kill(t *testing.T) []holder.Holder {
	t.Helper()
	var r keep.LockResult
	out := k.MustOverkeep(t, 0, "", "lock", name, "--kill", "--yes", "--json")
	if err := json.Unmarshal([]byte(out), &r); err != nil {
		t.Fatalf("lock --kill --json: %v\n%s", err, out)
	}
	return r.Ended
}

func itoa(n int) string { return strconv.Itoa(n) }
