package churn

import (
	"encoding/json"
	"errors"
	"fmt"
	"math/rand/v2"
	"slices"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"overkeep/tests/bed"
	"overkeep/tests/fixture"
)

// bound is how long any command may take; nothing here takes a tenth of it.
const bound = 4 * time.Minute

// owner is who holds a path by a root.
type owner string

const (
	aliceIn  owner = "alice"         // built in the view, rooted in the keep
	aliceOut owner = "alice outside" // built outside, the root may move into the keep
	bobOut   owner = "bob"
	rootOut  owner = "root"
)

// held is a path that a root holds.
type held struct {
	path string
	sum  string // SHA-256 of its NAR
	by   owner
	root string // the link
	used int    // builds under way that are given it as input
}

// churn is a run of everything against everything.
type churn struct {
	*world
	t    *testing.T
	seed uint64

	quiet  sync.RWMutex // held for reading by whoever does something
	locks  atomic.Int64 // locks begun, and ended: odd while one is under way
	closed atomic.Bool  // the keep is, or was not opened again yet
	n      atomic.Int64
	counts sync.Map // what was done, and how it ended: *atomic.Int64

	mu  sync.Mutex
	all []*held
}

// TestChurn: see the package comment.
func TestChurn(t *testing.T) {
	length, err := time.ParseDuration(number(t, "OVERKEEP_CHURN", "2m"))
	if err != nil {
		t.Fatal(err)
	}
	for _, suite := range bed.Suites {
		t.Run(string(suite), func(t *testing.T) {
			t.Parallel()
			c := &churn{world: newWorld(t, suite), t: t, seed: number(t, "OVERKEEP_CHURN_SEED", rand.Uint64())}
			t.Logf("OVERKEEP_CHURN_SEED=%d", c.seed)
			c.policy(t, "priv-*")
			// Quiet points cut the time into rounds.
			const round = 30 * time.Second
			for left := length; left > 0 && !t.Failed(); left -= round {
				c.round(min(left, round), uint64(left))
				c.check()
			}
			c.counts.Range(func(k, v any) bool { t.Logf("%-40v %d", k, v.(*atomic.Int64).Load()); return true })
			t.Logf("%d paths held at the end", len(c.all))
			for _, must := range []string{"build alice: done", "build bob: done", "collect system: done", "collect alice: done", "apply: done", "lock: done", "unlock: done"} {
				if _, ok := c.counts.Load(must); !ok && length >= time.Minute {
					t.Errorf("not once: %s", must)
				}
			}
		})
	}
}

// round has everything work for a while.
func (c *churn) round(length time.Duration, salt uint64) {
	stop := make(chan struct{})
	timer := time.AfterFunc(length, func() { close(stop) })
	defer timer.Stop()
	var all sync.WaitGroup
	for i, work := range []func(*rand.Rand){
		c.buildIn, c.buildIn, func(r *rand.Rand) { c.buildOut(r, bobOut) }, func(r *rand.Rand) { c.buildOut(r, rootOut) },
		func(r *rand.Rand) { c.buildOut(r, aliceOut) }, c.collectSystem, c.collectAlice, c.move, c.move, c.lock, c.drop,
	} {
		r := rand.New(rand.NewPCG(c.seed, salt<<8|uint64(i)))
		all.Go(func() {
			for {
				select {
				case <-stop:
					return
				case <-time.After(time.Duration(r.IntN(800)) * time.Millisecond): // the random timing itself
				}
				work(r)
			}
		})
	}
	all.Wait()
}

// did counts how something ended.
func (c *churn) did(what, how string) {
	n, _ := c.counts.LoadOrStore(what+": "+how, new(atomic.Int64))
	n.(*atomic.Int64).Add(1)
}

// run runs a command to its end, and says whether a lock was under way at any time
// of it. One that does not end fails the test with what it waits for.
func (c *churn) run(cmd bed.Command) (r bed.Result, disturbed bool) {
	before := c.locks.Load()
	closed := c.closed.Load()
	cmd.Within = -1
	begun := make(chan struct{})
	late := time.AfterFunc(bound, func() {
		<-begun
		c.t.Errorf("deadlock? (%s) %s does not end\n%s", cmd.User, cmd.Script, c.stuck())
	})
	defer late.Stop()
	cmd.Within = bound + 30*time.Second
	close(begun)
	r, err := c.Exec(cmd)
	var f *bed.Failed
	if err != nil && !errors.As(err, &f) {
		c.t.Errorf("%v", err)
	}
	return r, closed || before%2 == 1 || c.locks.Load() != before
}

// inView runs a script as alice in her view.
func (c *churn) inView(script string) (bed.Result, bool) {
	return c.run(bed.Command{Script: "cd /; exec " + fixture.ViewCommand(script)})
}

// pick takes up to n paths that are held, and sees that they are until release.
func (c *churn) pick(r *rand.Rand, n int, by ...owner) (paths []string, release func()) {
	c.mu.Lock()
	defer c.mu.Unlock()
	var some []*held
	for _, i := range r.Perm(len(c.all)) {
		if h := c.all[i]; slices.Contains(by, h.by) && len(some) < n {
			h.used++
			some = append(some, h)
			paths = append(paths, h.path)
		}
	}
	return paths, func() {
		c.mu.Lock()
		defer c.mu.Unlock()
		for _, h := range some {
			h.used--
		}
	}
}

func (c *churn) hold(h *held) {
	c.mu.Lock()
	defer c.mu.Unlock()
	c.all = append(c.all, h)
}

// script is of a build that reads all that it is given, twice, a while apart, with all
// that this refers to, and fails if that was not the same. It is no matter of waiting: it
// is what makes a build overlap with others.
const script = `
	read2() { for d in $deps; do cat $d/needs $d/data $(cat $d/needs | while read x; do echo $x/data; done); done; }
	mkdir $out; for d in $deps; do echo $d; done > $out/needs
	a=$(read2 | md5sum); i=0
	while [ $i -lt %d ]; do
		b=$(read2 | md5sum); [ "$a" = "$b" ] || { echo "CHANGED: $deps"; exit 1; }
		usleep 100000; i=$((i+1))
	done
	n=0; while [ $n -lt %d ]; do echo "%s $a"; n=$((n+1)); done > $out/data`

// named makes a name that policies tell apart.
func (c *churn) named(r *rand.Rand, who owner) (name, text string) {
	n := c.n.Add(1)
	kind := []string{"priv", "some", "pub"}[r.IntN(3)]
	name = fmt.Sprintf("%s-%d-%c", kind, n, "ab"[n%2])
	return name, fmt.Sprintf(script, r.IntN(20), 1+r.IntN(3000), name)
}

// made reads what a build script printed: the path and its sum.
func made(out string) (path, sum string) {
	f := strings.Fields(out)
	if len(f) != 2 || !strings.HasPrefix(f[0], storeDir) || len(f[1]) != 64 {
		return "", ""
	}
	return f[0], f[1]
}

// buildIn is a build of alice's in the view, of whatever is anywhere.
func (c *churn) buildIn(r *rand.Rand) {
	c.quiet.RLock()
	defer c.quiet.RUnlock()
	deps, release := c.pick(r, r.IntN(4), aliceIn, aliceOut, bobOut, rootOut)
	defer release()
	name, text := c.named(r, aliceIn)
	file := c.expression(c.t, name, text, deps...)
	build := "mkdir -p roots; out=$(nix-build -o roots/" + name + " " + file + "); " + fmt.Sprintf(sums, "$out")
	res, disturbed := c.inView(build)
	for range 5 {
		if res.Code == 0 || disturbed || !strings.Contains(res.Stderr, "is not valid") {
			break
		}
		// Nix asks the keep's database for a path and then, for as long as a seal of it
		// may take, the system store: in one it was not yet, in the other it is no more.
		// It is refused, and nothing else; asked again it is there.
		c.did("build alice", "asked while it moved")
		res, disturbed = c.inView(build)
	}
	path, sum := made(res.Stdout)
	switch {
	case res.Code == 0 && path != "":
		c.did("build alice", "done")
		c.hold(&held{path: path, sum: sum, by: aliceIn, root: "roots/" + name})
	case disturbed && !strings.Contains(res.Stderr, "CHANGED"):
		c.did("build alice", "ended by a lock")
	default:
		c.t.Errorf("build in the view of %q: exit code %d\n%s%s", deps, res.Code, res.Stdout, res.Stderr)
	}
}

// buildOut is a build outside the view.
func (c *churn) buildOut(r *rand.Rand, by owner) {
	c.quiet.RLock()
	defer c.quiet.RUnlock()
	c.mu.Lock()
	n := 0
	for _, h := range c.all {
		if h.by == by {
			n++
		}
	}
	c.mu.Unlock()
	if n >= 12 { // what alice has outside is never dropped
		return
	}
	who := []owner{bobOut, rootOut}
	deps, release := c.pick(r, r.IntN(3), who...)
	defer release()
	name, text := c.named(r, by)
	file := c.expression(c.t, name, text, deps...)
	user := map[owner]string{aliceOut: "alice", bobOut: "bob", rootOut: "root"}[by]
	res, _ := c.run(bed.Command{User: user, Env: []string{"NIX_REMOTE=daemon"}, Script: "mkdir -p ~/out; out=$(nix-build -o ~/out/" + name + " " + file + "); " + fmt.Sprintf(sums, "$out")})
	path, sum := made(res.Stdout)
	if res.Code == 0 && path == "" && by == aliceOut {
		// Its root may have moved into the keep, and it with it, before the last command.
		res, disturbed := c.inView("readlink out/" + name + " || readlink ~/keep/out/" + name)
		c.did("build "+string(by), fmt.Sprintf("went at once %d %v", res.Code, disturbed))
		return
	}
	if res.Code != 0 || path == "" {
		if by == aliceOut && strings.Contains(res.Stderr, "getting status of") {
			c.did("build "+string(by), "sealed before it was looked at")
			return
		}
		c.t.Errorf("build of %s outside of %q: exit code %d\n%s%s", by, deps, res.Code, res.Stdout, res.Stderr)
		return
	}
	c.did("build "+string(by), "done")
	c.hold(&held{path: path, sum: sum, by: by, root: "~/out/" + name})
}

// drop takes a root away: what it held may go.
func (c *churn) drop(r *rand.Rand) {
	c.quiet.RLock()
	defer c.quiet.RUnlock()
	c.mu.Lock()
	var h *held
	for _, i := range r.Perm(len(c.all)) {
		if x := c.all[i]; x.used == 0 && x.by != aliceOut && len(c.all) > 6 {
			h = x
			c.all = slices.Delete(c.all, i, i+1)
			break
		}
	}
	c.mu.Unlock()
	if h == nil {
		return
	}
	switch h.by {
	case aliceIn:
		c.inView("rm " + h.root)
	case bobOut:
		c.Run("bob", "rm "+h.root)
	case rootOut:
		c.Run("root", "rm "+h.root)
	}
	c.did("drop", string(h.by))
}

func (c *churn) collectSystem(r *rand.Rand) {
	c.quiet.RLock()
	defer c.quiet.RUnlock()
	res, _ := c.run(bed.Command{Env: []string{"NIX_REMOTE=daemon"}, Script: "nix-collect-garbage"})
	c.collected("system", res, false)
}

func (c *churn) collectAlice(r *rand.Rand) {
	c.quiet.RLock()
	defer c.quiet.RUnlock()
	res, disturbed := c.inView("nix-collect-garbage")
	c.collected("alice", res, disturbed)
}

// collected: Nix's collector finds a path dead that a build registers a reference to at
// that moment, and its database refuses to drop it: nothing is lost.
func (c *churn) collected(who string, res bed.Result, disturbed bool) {
	switch {
	case res.Code == 0:
		c.did("collect "+who, "done")
	case disturbed:
		c.did("collect "+who, "ended by a lock")
	case strings.Contains(res.Stderr, "cannot delete path"):
		c.did("collect "+who, "stopped by a build")
	default:
		c.t.Errorf("collection of %s: exit code %d\n%s%s", who, res.Code, res.Stdout, res.Stderr)
	}
}

// Exit codes of overkeep (cmd/overkeep/exitcodes.go).
var (
	usual = map[int]string{0: "done", 14: "another works", 22: "no such path", 24: "the stores changed", 25: "some left", 26: "not permitted", 28: "blocked", 29: "residue"}
	cut   = map[int]string{3: "locked", 5: "not locked", 11: "interrupted", 27: "unfinished", 130: "interrupted", 137: "killed", 143: "ended"}
)

// move is one of the commands that move paths.
func (c *churn) move(r *rand.Rand) {
	c.quiet.RLock()
	defer c.quiet.RUnlock()
	var args []string
	switch n := r.IntN(10); {
	case n < 5:
		// Policies change under everybody's hands.
		all := []string{"priv-*", "pub-*", "some-*", "*-a", "*-b"}
		r.Shuffle(len(all), func(i, j int) { all[i], all[j] = all[j], all[i] })
		c.policy(c.t, all[:r.IntN(3)]...)
		args = []string{"apply"}
	case n < 7:
		args = []string{"seal"}
		paths, release := c.pick(r, 1+r.IntN(4), bobOut, rootOut, aliceOut)
		defer release()
		args = append(args, paths...)
	case n < 9:
		args = []string{"release"}
		paths, release := c.pick(r, 1+r.IntN(4), aliceIn, aliceOut)
		defer release()
		args = append(args, paths...)
	default:
		args = []string{"undo"}
	}
	if args[0] != "apply" && args[0] != "undo" && len(args) == 1 {
		return
	}
	res, disturbed := c.run(bed.Command{Script: "exec overkeep " + fixture.Quote(append(args, "--keep", "alice", "--yes")...)})
	if how, ok := usual[res.Code]; ok {
		c.did(args[0], how)
		return
	}
	if args[0] == "undo" && strings.Contains(res.Stderr, "nothing to undo") {
		c.did("undo", "nothing")
		return
	}
	if how, ok := cut[res.Code]; ok && disturbed {
		c.did(args[0], how)
		return
	}
	if disturbed {
		c.did(args[0], fmt.Sprintf("exit code %d beside a lock", res.Code))
		c.t.Logf("%q beside a lock: exit code %d\n%s%s", args, res.Code, res.Stdout, res.Stderr)
		return
	}
	c.t.Errorf("%q: exit code %d\n%s%s", args, res.Code, res.Stdout, res.Stderr)
}

// lock locks the keep, sometimes with force, and opens it again.
func (c *churn) lock(r *rand.Rand) {
	if r.IntN(12) != 0 {
		return
	}
	c.quiet.RLock()
	defer c.quiet.RUnlock()
	args, what := "lock alice --yes", "lock"
	if r.IntN(3) == 0 {
		args, what = args+" --kill", "lock --kill"
	}
	c.locks.Add(1)
	defer c.locks.Add(1)
	res, _ := c.run(bed.Command{Script: "exec overkeep " + args})
	switch res.Code {
	case 0:
		c.closed.Store(true)
		c.did(what, "done")
	case 5:
		c.did(what, "in use")
		if what != "lock" {
			c.t.Logf("lock --kill: %s", res.Stderr)
		}
	case 14:
		c.did(what, "another works")
	default:
		c.t.Errorf("%s: exit code %d\n%s%s", what, res.Code, res.Stdout, res.Stderr)
	}
	c.open()
}

// open opens the keep, whatever state it is in.
func (c *churn) open() {
	for range 50 {
		res, _ := c.run(bed.Command{Script: "exec overkeep unlock alice --passphrase-fd 0", Stdin: fixture.Passphrase})
		switch res.Code {
		case 0:
			c.did("unlock", "done")
			c.closed.Store(false)
			return
		case 14:
			c.did("unlock", "another works")
		default:
			c.t.Errorf("unlock: exit code %d\n%s%s\n%s", res.Code, res.Stdout, res.Stderr, c.stuck())
			return
		}
	}
	c.t.Errorf("unlock: another works, and works")
}

// check waits until nobody does anything, and sees that all is in order.
func (c *churn) check() {
	t := c.t
	c.quiet.Lock()
	defer c.quiet.Unlock()
	c.open()
	if t.Failed() {
		t.Logf("holders:\n%s", c.stuck())
	}
	// Before anything is set right: what is rooted is there.
	c.whole("at once")
	// Nobody is at work, so it locks, whatever a mover that was ended has left to do.
	if res, _ := c.run(bed.Command{Script: "exec overkeep lock alice --yes"}); res.Code != 0 {
		t.Errorf("lock at a quiet moment: exit code %d\n%s%s", res.Code, res.Stdout, res.Stderr)
	} else {
		c.did("lock", "done")
	}
	c.collectOutside()
	c.open()
	res, _ := c.inView("nix-build --no-out-link " + c.expression(t, fmt.Sprintf("probe-%d", c.n.Add(1)), "echo > $out"))
	if res.Code != 0 {
		t.Errorf("a build at a quiet moment: exit code %d\n%s", res.Code, res.Stderr)
	}
	if res, _ = c.run(bed.Command{Script: "exec overkeep apply --keep alice --yes"}); res.Code != 0 && res.Code != 25 && res.Code != 29 {
		t.Errorf("apply at a quiet moment: exit code %d\n%s%s", res.Code, res.Stdout, res.Stderr)
	}
	c.whole("after an apply")
	c.collectNow()
	c.whole("after both collectors")
	for _, l := range c.state(t) {
		t.Errorf("at a quiet moment: %s", l)
	}
	var s struct {
		Keeps []struct {
			State        string
			ViewComplete bool `json:"view_complete"`
			Supervisor   int
			Trouble      string
		}
	}
	out := c.MustOverkeep(t, 0, "", "status", "alice", "--json")
	if err := json.Unmarshal([]byte(out), &s); err != nil || len(s.Keeps) != 1 || s.Keeps[0].State != "unlocked" ||
		!s.Keeps[0].ViewComplete || s.Keeps[0].Supervisor == 0 || s.Keeps[0].Trouble != "" {
		t.Errorf("status: %v\n%s", err, out)
	}
}

func (c *churn) collectNow() {
	if r, _ := c.inView("nix-collect-garbage"); r.Code != 0 {
		c.t.Errorf("a personal collection at a quiet moment: exit code %d\n%s%s", r.Code, r.Stdout, r.Stderr)
	}
	c.collectOutside()
}

func (c *churn) collectOutside() {
	r, _ := c.run(bed.Command{Env: []string{"NIX_REMOTE=daemon"}, Script: "nix-collect-garbage"})
	if r.Code != 0 {
		c.t.Errorf("a collection at a quiet moment: exit code %d\n%s%s", r.Code, r.Stdout, r.Stderr)
	}
}

// whole fails the test unless everything that is held is there, to the byte, and valid.
func (c *churn) whole(when string) {
	c.mu.Lock()
	defer c.mu.Unlock()
	var all, outside []string
	for _, h := range c.all {
		all = append(all, h.path)
		if h.by == bobOut || h.by == rootOut {
			outside = append(outside, h.path)
		}
	}
	look := func(where string, paths []string, run func(script string) bed.Result) {
		if len(paths) == 0 {
			return
		}
		list := strings.Join(paths, " ")
		res := run("for p in " + list + "; do nix-store --check-validity $p || :; done; " + fmt.Sprintf(sums, list) + "")
		got := map[string]string{}
		for line := range strings.Lines(res.Stdout) {
			if p, sum := made(line); p != "" {
				got[p] = sum
			}
		}
		if res.Code != 0 || res.Stderr != "" {
			c.t.Errorf("%s, %s: exit code %d\n%s", when, where, res.Code, res.Stderr)
		}
		for _, h := range c.all {
			if slices.Contains(paths, h.path) && got[h.path] != h.sum {
				c.t.Errorf("%s, %s: %s, which %s holds by %s, is lost or not what it was: %s, want %s", when, where, h.path, h.by, h.root, got[h.path], h.sum)
			}
		}
	}
	look("in the view", all, func(s string) bed.Result { r, _ := c.inView(s); return r })
	look("outside", outside, func(s string) bed.Result {
		r, _ := c.run(bed.Command{Env: []string{"NIX_REMOTE=daemon"}, Script: s})
		return r
	})
}
