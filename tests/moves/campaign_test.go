package moves

import (
	"fmt"
	"math/rand/v2"
	"os"
	"slices"
	"strings"
	"testing"

	"overkeep/tests/boundary"
)

// How much is tried. Each run takes another third of the kill points, which are all calls of
// all commands but for the middle of long rows of the same kind (see thin); one error for
// one in 24 of the calls that can fail; and a power cut at one in eight of the calls that
// write the journal. With OVERKEEP_MOVES=kills it is every kill point (some 1,900, half an
// hour), with OVERKEEP_MOVES=all nothing is left out: every call, every error, every power
// cut. That takes hours.
var (
	exhaustive = os.Getenv("OVERKEEP_MOVES") == "all"
	everyKill  = exhaustive || os.Getenv("OVERKEEP_MOVES") == "kills"
)

// seed makes a run repeatable: OVERKEEP_MOVES_SEED, else it is chosen and logged.
func seed(t *testing.T) *rand.Rand {
	n := rand.Uint64()
	if s := os.Getenv("OVERKEEP_MOVES_SEED"); s != "" {
		if _, err := fmt.Sscan(s, &n); err != nil {
			t.Fatal(err)
		}
	}
	t.Logf("OVERKEEP_MOVES_SEED=%d", n)
	return rand.New(rand.NewPCG(n, 1))
}

// command is one that moves paths.
type command struct {
	name     string
	from, to home // where the private paths are before and after
	before   func(t *testing.T, w *world)
	args     func(w *world) []string
}

// commands, in an order in which each leaves what the next begins with.
var commands = []command{
	{name: "seal", from: inSystem, to: inKeep, before: asBuiltOutside,
		args: func(w *world) []string { return []string{"seal", "--keep", "alice", "--yes", w.first, w.drvs[0]} }},
	{name: "release", from: inKeep, to: inSystem, before: permit,
		args: func(w *world) []string {
			return append([]string{"release", "--keep", "alice", "--yes", w.top}, w.drvs...)
		}},
	{name: "apply that seals", from: inSystem, to: inKeep, before: asBuiltOutside, args: apply},
	{name: "apply that releases", from: inKeep, to: inSystem, before: permit, args: apply},
	{name: "undo of a release", from: inSystem, to: inKeep, before: nothing, args: undo},
	{name: "undo of a seal", from: inKeep, to: inSystem, before: nothing, args: undo},
	{name: "eject", from: inKeep, to: inSystem, before: permit,
		args: func(*world) []string { return []string{"eject", "--keep", "alice", "--yes"} }},
	{name: "wipe", from: inKeep, to: inKeep, before: nothing,
		args: func(*world) []string { return []string{"wipe", "--keep", "alice"} }},
}

func apply(*world) []string         { return []string{"apply", "--keep", "alice", "--yes"} }
func undo(*world) []string          { return []string{"undo", "--keep", "alice", "--yes"} }
func permit(t *testing.T, w *world) { t.Helper(); w.policy(t, inSystem) }
func nothing(*testing.T, *world)    {}
func named(name string) (found *command) { // panics when there is none
	i := slices.IndexFunc(commands, func(c command) bool { return c.name == name })
	return &commands[i]
}

// asBuiltOutside makes the paths in the system store look as if they had been built
// there: with a root of alice's and a build log; the policy wants them in the keep.
func asBuiltOutside(t *testing.T, w *world) {
	t.Helper()
	w.policy(t, inKeep)
	w.outside(t)
}

// overkeepOK runs a command undisturbed, which must succeed.
func (w *world) overkeepOK(t *testing.T, args ...string) {
	t.Helper()
	if r := w.Overkeep(t, "", args...); r.Code != 0 {
		t.Fatalf("overkeep %s: exit code %d\n%s%s", strings.Join(args, " "), r.Code, r.Stdout, r.Stderr)
	}
}

// bring moves all private paths home, undisturbed.
func (w *world) bring(t *testing.T, to home) {
	t.Helper()
	w.policy(t, to)
	w.overkeepOK(t, apply(w)...)
}

// prepare makes the state in which a command is given.
func (s *shard) prepare(t *testing.T, c *command) {
	t.Helper()
	if c.undoes() && s.at == c.from && !s.undoable { // what is undone is the last operation
		s.w.bring(t, c.to)
		s.w.bring(t, c.from)
	} else if s.at != c.from {
		s.w.bring(t, c.from)
	}
	s.at, s.undoable = c.from, false
	c.before(t, s.w)
}

func (c *command) undoes() bool { return strings.HasPrefix(c.name, "undo") }

// uneject takes an eject back: its roots would hold the paths in the system store.
func (s *shard) uneject(t *testing.T) {
	t.Helper()
	s.w.overkeepOK(t, undo(s.w)...)
	s.at = inKeep
	st := s.w.look(t, false)
	st.sound(t, s.w)
	st.at(t, s.w, inKeep)
}

// recovery is what is done after a disturbance.
type recovery struct {
	name string
	args func(c *command, w *world) []string
	want func(c *command) home
}

// again is the same command once more; through and backout are an apply by a policy
// that wants what the command wanted, or what was before it.
var (
	again = recovery{"the same again",
		func(c *command, w *world) []string { return c.args(w) }, func(c *command) home { return c.to }}
	through = recovery{"an apply",
		func(c *command, w *world) []string { return apply(w) }, func(c *command) home { return c.to }}
	backout = recovery{"an apply of the opposite",
		func(c *command, w *world) []string { return apply(w) }, func(c *command) home { return c.from }}
)

// recoveries are those that fit a command.
func recoveries(c *command) []recovery {
	switch {
	case c.name == "wipe":
		return []recovery{again, through}
	case c.name == "eject": // what holds what was ejected goes with an undo only
		return []recovery{again}
	case c.undoes(): // once more would undo what came before
		return []recovery{through, backout, backout, backout}
	case c.name == "seal", c.name == "release":
		return []recovery{again, through, again, backout}
	}
	return []recovery{again, again, again, backout}
}

// shard is one machine's part of a campaign.
type shard struct {
	w    *world
	rand *rand.Rand
	at   home
	// undoable: the last operation has brought the paths to where they are.
	undoable bool
	tried, twice,
	verified int
	by   map[string]int
	cuts bool // the power goes: what lies in free blocks is another matter
}

func newShard(t *testing.T) *shard {
	s := &shard{w: newWorld(t), rand: seed(t), at: inKeep, by: map[string]int{}}
	s.w.script(t)
	s.w.look(t, true).sound(t, s.w)
	return s
}

// trace runs a command unharmed and returns what each of its calls was, by class.
func (s *shard) trace(t *testing.T, c *command) (classes []string) {
	t.Helper()
	s.prepare(t, c)
	rep, r := s.w.disturb(t, "-trace /run/trace", c.args(s.w)...)
	if r.Code != 0 {
		t.Fatalf("%s: exit code %d\n%s%s", c.name, r.Code, r.Stdout, r.Stderr)
	}
	for line := range strings.Lines(s.w.Read(t, "/run/trace")) {
		f := strings.SplitN(strings.TrimSuffix(line, "\n"), " ", 3)
		classes = append(classes, s.w.class(boundary.Report{Call: f[1], Object: f[2]}))
	}
	if len(classes) != rep.Count || rep.Count == 0 {
		t.Fatalf("%s: %d calls counted, %d traced", c.name, rep.Count, len(classes))
	}
	if c.to == inSystem { // what hidden finds nothing of later, it would find
		s.w.shown(t)
	}
	s.settle(t, c, c.to)
	return classes
}

// thin leaves out the middle of long rows of calls where one is like another: of one
// kind on one kind of object, or of two kinds in turns.
func thin(classes []string) (points []int) {
	const edge = 6
	for i := range classes {
		inside := i >= edge && i+edge < len(classes)
		for d := -edge; inside && d < edge-1; d++ {
			inside = classes[i+d] == classes[i+d+2]
		}
		if exhaustive || !inside {
			points = append(points, i+1)
		}
	}
	return points
}

// kill kills c at call n, recovers, and looks. It reports whether the call was
// reached at all.
func (s *shard) kill(t *testing.T, c *command, n int) bool {
	w := s.w
	s.prepare(t, c)
	rep, r := w.disturb(t, fmt.Sprintf("-kill %d", n), c.args(w)...)
	if rep.At == 0 {
		if r.Code != 0 {
			t.Errorf("unharmed, and exit code %d\n%s%s", r.Code, r.Stdout, r.Stderr)
		}
		s.settle(t, c, c.to)
		return false
	}
	s.tried++
	s.by[c.name]++
	w.look(t, false).safe(t, w)
	s.recover(t, c, w.class(rep))
	return true
}

// done reports whether an exit code says that nothing is left to do. A seal or release
// that was finished by the recovery finds no such path where it looks, and says so.
func done(c *command, code int) bool {
	const exitNoPath = 22
	return code == 0 || code == exitNoPath && (c.name == "seal" || c.name == "release")
}

// recover runs what comes after a disturbance, sometimes killed as well.
func (s *shard) recover(t *testing.T, c *command, what string) {
	t.Helper()
	w := s.w
	all := recoveries(c)
	rec := all[s.rand.IntN(len(all))]
	want := rec.want(c)
	w.policy(t, want)
	args := rec.args(c, w)
	if s.rand.IntN(8) == 0 { // one of eight is killed in its turn, mostly early: recovery comes first
		m := 1 + s.rand.IntN(1+s.rand.IntN(200))
		rep, r := w.disturb(t, fmt.Sprintf("-kill %d", m), args...)
		what += fmt.Sprintf(", then %s killed at %d (%s)", rec.name, m, w.class(rep))
		if rep.At == 0 && !done(c, r.Code) {
			t.Errorf("after %s: exit code %d\n%s%s", what, r.Code, r.Stdout, r.Stderr)
		}
		s.twice++
		w.look(t, false).safe(t, w)
	}
	r := w.Overkeep(t, "", args...)
	if r.Code == 22 && done(c, r.Code) { // one of the words has moved already; the rest is an apply's
		w.overkeepOK(t, apply(w)...)
	}
	if !done(c, r.Code) {
		t.Errorf("after %s: %s: exit code %d\n%s%s", what, rec.name, r.Code, r.Stdout, r.Stderr)
	}
	s.settle(t, c, want)
	// Undone and done again, or not undone at all: the last operation is one to undo.
	s.undoable = c.undoes() && want == c.from && !t.Failed()
	if t.Failed() {
		t.Logf("after %s, then %s: exit code %d\n%s%s", what, rec.name, r.Code, r.Stdout, r.Stderr)
	}
}

// settle looks at what a command that ended well has left.
func (s *shard) settle(t *testing.T, c *command, want home) {
	t.Helper()
	w := s.w
	// Before anybody opens the databases. After a power cut blocks that the file system
	// gave back before may hold names still (seen once in 45; SECURITY.md says so).
	if want == inKeep && !s.cuts {
		w.hidden(t)
	}
	verify := exhaustive || s.rand.IntN(4) == 0
	st := w.look(t, verify)
	st.sound(t, w)
	st.at(t, w, want)
	if verify {
		s.verified++
	}
	s.at = want
	if c.name == "eject" {
		s.uneject(t)
	}
	if t.Failed() { // the others are still to be tried
		w.Must(t, "root", "find /nix/store -maxdepth 1 -name '*.lock' -delete; rm -f "+resultLink)
		w.bring(t, inSystem)
		w.bring(t, inKeep)
		w.Overkeep(t, "", "wipe", "--keep", "alice")
		s.at = inKeep
	}
}

// TestKill: every command survives a kill at each of its calls.
func TestKill(t *testing.T) {
	for _, names := range [][]string{
		{"seal", "release", "undo of a release", "wipe"},
		{"apply that seals", "apply that releases", "undo of a seal", "eject"},
	} {
		t.Run(strings.Join(names, ", "), func(t *testing.T) {
			t.Parallel()
			s := newShard(t)
			defer func() {
				t.Logf("%d kill points %v, %d of them with a second kill, %d checked by Nix", s.tried, s.by, s.twice, s.verified)
			}()
			for i := 0; i < len(names); i += 2 {
				s.killPair(t, named(names[i]), named(names[i+1]))
			}
		})
	}
}

// killPair kills two commands at each of their calls, in turns: where the one ends
// well, the other can begin.
func (s *shard) killPair(t *testing.T, pair ...*command) {
	var classes [2][]string
	var points [2][]int
	for i, c := range pair {
		classes[i] = s.trace(t, c)
		points[i] = thin(classes[i])
		if !everyKill {
			points[i] = slices.DeleteFunc(points[i], func(int) bool { return s.rand.IntN(3) > 0 })
		}
		t.Logf("%s: %d calls, %d kill points", c.name, len(classes[i]), len(points[i]))
	}
	for at := range max(len(points[0]), len(points[1])) {
		for i, c := range pair {
			if at < len(points[i]) {
				n := points[i][at]
				t.Run(fmt.Sprintf("%s/%d %s", c.name, n, classes[i][n-1]), func(t *testing.T) { s.kill(t, c, n) })
			}
		}
	}
	for i, c := range pair {
		// Whoever counts on fewer calls than there are proves less than it says.
		t.Run(c.name+"/unharmed", func(t *testing.T) {
			if s.kill(t, c, 10*len(classes[i])) {
				t.Errorf("call %d was reached; there were %d", 10*len(classes[i]), len(classes[i]))
			}
		})
	}
}

var errnos = []string{"EIO", "ENOSPC", "EACCES", "EINTR"}

// fail lets call n of c fail, sees that the command is done or refuses, and that the
// next one finishes.
func (s *shard) fail(t *testing.T, c *command, n int, errno string) {
	w := s.w
	s.prepare(t, c)
	rep, r := w.disturb(t, fmt.Sprintf("-locks -fail %d:%s", n, errno), c.args(w)...)
	if rep.At == 0 {
		t.Logf("call %d was not reached", n)
	}
	s.tried++
	s.by[c.name]++
	what := fmt.Sprintf("%s at call %d (%s) of %s, exit code %d", errno, n, w.class(rep), c.name, r.Code)
	for _, bad := range []string{"panic:", "goroutine ", "runtime error"} {
		if strings.Contains(r.Stderr, bad) {
			t.Errorf("%s:\n%s", what, r.Stderr)
		}
	}
	const exitResidue = 29
	if r.Code == exitResidue { // everything is done but for the wiping, which says so
		w.overkeepOK(t, "wipe", "--keep", "alice")
	}
	if r.Code == 0 || r.Code == exitResidue {
		s.settle(t, c, c.to)
		return
	}
	const exitLeft = 25 // it says on standard output what stays where it is, and why
	if r.Code > 127 || r.Code != exitLeft && strings.TrimSpace(r.Stderr) == "" {
		t.Errorf("%s is no refusal: %q", what, r.Stderr)
	}
	w.look(t, false).safe(t, w)
	s.recover(t, c, what)
}

// TestFaults: each call fails once, with each error; the command is done or refuses.
func TestFaults(t *testing.T) {
	for shardN := range 2 {
		t.Run(fmt.Sprint(shardN), func(t *testing.T) {
			t.Parallel()
			s := newShard(t)
			defer func() { t.Logf("%d faults %v, %d checked by Nix", s.tried, s.by, s.verified) }()
			for i := range commands {
				c := &commands[i]
				if i%2 != shardN {
					continue
				}
				classes := s.trace(t, c)
				for _, n := range thin(classes) {
					for e, errno := range errnos {
						if exhaustive || s.rand.IntN(24) == 0 && e == n%len(errnos) {
							t.Run(fmt.Sprintf("%s/%d %s %s", c.name, n, errno, classes[n-1]), func(t *testing.T) { s.fail(t, c, n, errno) })
						}
					}
				}
			}
		})
	}
}

// reboot brings the machine up from its disk, as after a power cut that has happened.
func (s *shard) reboot(t *testing.T) {
	t.Helper()
	w := s.w
	w.Kill(t)
	w.Boot(t)
	w.SystemNix(t)
	w.Unlock(t)
	w.script(t)
}

// TestPowerCut: the power goes before calls that write the journal, and before those
// that follow them.
func TestPowerCut(t *testing.T) {
	t.Parallel()
	s := newShard(t)
	s.cuts = true
	defer func() { t.Logf("%d power cuts %v, %d checked by Nix", s.tried, s.by, s.verified) }()
	for i := range commands {
		c := &commands[i]
		var points []int
		classes := s.trace(t, c)
		for n := range classes {
			journal := func(i int) bool { return i >= 0 && strings.HasSuffix(classes[i], " journal") }
			if exhaustive || (journal(n) || journal(n-1)) && s.rand.IntN(8) == 0 {
				points = append(points, n+1)
			}
		}
		for _, n := range points {
			t.Run(fmt.Sprintf("%s/%d %s", c.name, n, classes[n-1]), func(t *testing.T) {
				w := s.w
				s.prepare(t, c)
				w.Must(t, "root", "sync") // what was before is not what is lost
				rep, _ := w.disturb(t, fmt.Sprintf("-cut %d:/", n), c.args(w)...)
				if rep.At == 0 { // a run that came after another one can be shorter
					s.settle(t, c, c.to)
					return
				}
				s.tried++
				s.by[c.name]++
				s.reboot(t)
				w.look(t, false).safe(t, w)
				s.recover(t, c, w.class(rep))
			})
		}
	}
}
