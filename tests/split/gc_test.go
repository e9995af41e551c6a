package split

import (
	"fmt"
	"path"
	"slices"
	"strings"
	"testing"

	"overkeep/tests/fixture"
)

// stores is what the tests of garbage collection begin with: system paths that
// no root of the system's holds, and personal paths that refer to them.
type stores struct {
	*laptop
	system   map[string]string // all by name
	personal map[string]string
}

// newStores makes:
//
//	kept (rooted by ~/keep/kept) -> direct -> indirect
//	loose (no root)              -> loosely
//	nobody needs                    spare
//
// and leaves the keep open.
func newStores(t *testing.T, l *laptop) *stores {
	t.Helper()
	s := &stores{l, map[string]string{}, map[string]string{}}
	s.system["indirect"] = l.build(t, rootOut, echo("indirect", "i"), "")
	s.system["direct"] = l.build(t, rootOut, echo("direct", "d", s.system["indirect"]), "")
	s.system["loosely"] = l.build(t, rootOut, echo("loosely", "l"), "")
	l.unlockOf(t, "alice")
	s.personal["kept"] = l.build(t, alice, echo("kept", "k", s.system["direct"]), "-o kept")
	s.personal["loose"] = l.build(t, alice, echo("loose", "x", s.system["loosely"]), "")
	s.system["spare"] = l.build(t, bobOut, echo("spare", "s"), "")
	return s
}

// collect runs the system's collector once nothing holds the named system paths.
func (s *stores) collect(t *testing.T, names ...string) {
	t.Helper()
	var paths []string
	for _, n := range names {
		paths = append(paths, s.system[n])
	}
	s.systemGC(t, paths...)
}

// expect says which paths are left, by name; the others are gone. In the view
// there is the union of both.
func (s *stores) expect(t *testing.T, when string, open bool, names ...string) {
	t.Helper()
	for name, p := range s.system {
		want := slices.Contains(names, name)
		if valid, there := s.valid(rootOut, p), s.exists(rootOut, p); valid != want || there != want {
			t.Errorf("%s: system path %s: valid %v, there %v; want %v", when, name, valid, there, want)
		}
		if !open {
			continue
		}
		// The view follows the system store within a moment, alice need not do anything.
		for end := newDeadline(); s.exists(alice, p) != want; end.wait() {
			if end.over() {
				t.Errorf("%s: system path %s in the view: there %v", when, name, !want)
				break
			}
		}
	}
	if !open {
		return
	}
	for name, p := range s.personal {
		want := slices.Contains(names, name)
		if valid, there := s.valid(alice, p), s.exists(alice, p); valid != want || there != want {
			t.Errorf("%s: personal path %s: valid %v, there %v; want %v", when, name, valid, there, want)
		}
		if want {
			s.at(t, alice, "for p in $(nix-store --query --requisites "+p+"); do test -r $p && nix-store --query --hash $p; done")
		}
	}
}

// pinned waits until exactly the named system paths are held by pins, directly or
// as what another one refers to. Derivations may be held as well: alice's choice
// is to keep those of what she keeps.
func (s *stores) pinned(t *testing.T, when string, closures ...string) {
	t.Helper()
	var got []string
	want := map[string]bool{}
	for _, n := range closures {
		want[path.Base(s.system[n])] = true
	}
	for deadline := newDeadline(); ; deadline.wait() {
		got = s.pins()
		reached := map[string]bool{}
		for _, p := range got {
			out, _ := s.try(rootOut, "nix-store --query --requisites "+storeDir+"/"+p)
			for _, r := range strings.Fields(out) {
				if !strings.HasSuffix(r, ".drv") {
					reached[path.Base(r)] = true
				}
			}
		}
		same := len(reached) == len(want)
		for w := range want {
			same = same && reached[w]
		}
		if same {
			return
		}
		if deadline.over() {
			t.Fatalf("%s: pins %v, which hold %v; want %v", when, got, reached, closures)
		}
	}
}

// The third row, keep open, the system's collector first: it takes what nobody
// needs and nothing else; then alice's takes her own loose path, and with it the
// reason for a pin; the system's next run takes what that held.
func TestCollectSystemFirst(t *testing.T) {
	each(t, "", func(t *testing.T, l *laptop) {
		s := newStores(t, l)
		s.expect(t, "before", true, "indirect", "direct", "loosely", "spare", "kept", "loose")
		s.collect(t, "spare")
		s.expect(t, "system's gc", true, "indirect", "direct", "loosely", "kept", "loose")
		s.pinned(t, "system's gc", "direct", "indirect", "loosely")
		s.verify(t)
		s.personalGC(t)
		s.expect(t, "then alice's", true, "indirect", "direct", "loosely", "kept")
		s.pinned(t, "then alice's", "direct", "indirect")
		s.noWhiteouts(t)
		s.collect(t, "loosely")
		s.expect(t, "then the system's again", true, "indirect", "direct", "kept")
		s.verify(t)

		// And the last: without her result link nothing is needed any more.
		s.at(t, alice, "rm kept")
		s.personalGC(t)
		s.pinned(t, "nothing left")
		s.collect(t, "direct", "indirect")
		s.expect(t, "nothing left", true)
		s.noWhiteouts(t)
		if names, _ := s.upper(t); len(names) != 0 {
			t.Errorf("left in the upper layer: %v", names)
		}
		s.verify(t)
	})
}

// The other order: alice's first.
func TestCollectPersonalFirst(t *testing.T) {
	each(t, "", func(t *testing.T, l *laptop) {
		s := newStores(t, l)
		s.personalGC(t)
		s.expect(t, "alice's gc", true, "indirect", "direct", "loosely", "spare", "kept")
		s.pinned(t, "alice's gc", "direct", "indirect")
		s.noWhiteouts(t)
		s.verify(t)
		s.collect(t, "loosely", "spare")
		s.expect(t, "then the system's", true, "indirect", "direct", "kept")
		s.verify(t)
		// A path that went is built again where it is asked for.
		again := s.build(t, alice, echo("loose", "y", s.system["direct"]), "")
		s.systemGC(t)
		if !s.exists(alice, again) || s.at(t, alice, "tail -n 1 "+again) != s.system["direct"] {
			t.Errorf("a path built after both collections is broken")
		}
		s.verify(t)
	})
}

// While the keep is locked the system collects without being able to ask. The
// pins answer for the keep: what it needed when it was locked stays, to the byte.
func TestCollectLocked(t *testing.T) {
	each(t, "", func(t *testing.T, l *laptop) {
		s := newStores(t, l)
		s.lockOf(t, "alice")
		s.collect(t, "spare")
		s.expect(t, "system's gc, locked", false, "indirect", "direct", "loosely")
		s.verify(t, rootOut)
		s.unlockOf(t, "alice")
		s.expect(t, "opened after it", true, "indirect", "direct", "loosely", "kept", "loose")
		s.verify(t)

		// Alice's collection, then the lock at once: the pins are right nevertheless.
		s.personalGC(t)
		s.lockOf(t, "alice")
		s.pinned(t, "alice's gc and lock", "direct", "indirect")
		s.collect(t, "loosely")
		s.expect(t, "system's gc after alice's, locked", false, "indirect", "direct")
		s.unlockOf(t, "alice")
		s.expect(t, "opened again", true, "indirect", "direct", "kept")
		s.noWhiteouts(t)
		s.verify(t)

		// A build that is over when the lock begins is safe with what it needs.
		late := s.build(t, rootOut, echo("late", "late"), "")
		last := s.build(t, alice, echo("last", "last", late), "-o last")
		s.lockOf(t, "alice")
		s.systemGC(t)
		s.unlockOf(t, "alice")
		if got := s.at(t, alice, "tail -n 1 "+last+"; cat $(tail -n 1 "+last+")"); got != late+"\nlate" {
			t.Errorf("the last build is broken: %q", got)
		}
		s.verify(t)

		// When the keep goes, so does what it held.
		s.lockOf(t, "alice")
		s.MustOverkeep(t, 0, "", "destroy", "alice", "--yes")
		if p := s.pins(); len(p) != 0 {
			t.Errorf("pins of a keep that is no more: %v", p)
		}
		s.collect(t, "direct", "indirect")
		s.expect(t, "keep destroyed", false)
		if s.exists(rootOut, late) {
			t.Errorf("a destroyed keep still holds a system path")
		}
	})
}

// Both collectors run all the time, while system paths come and lose their roots
// and personal builds begin to refer to them.
func TestCollectDuring(t *testing.T) {
	each(t, "", func(t *testing.T, l *laptop) {
		l.unlockOf(t, "alice")
		const loop = "touch go; while test -e go; do nix-store --gc || exit 1; done"
		system := l.start(t, rootOut, "cd /run; "+loop, rootDaemon)
		personal := l.start(t, alice, loop)
		type pair struct{ lower, upper string }
		var made []pair
		for n := range 6 {
			name := fmt.Sprintf("n%d", n)
			// Rooted until alice's build is through, as a profile of the system's
			// would be that is replaced afterwards.
			lower := l.build(t, rootOut, echo("lower-"+name, name), "-o /run/root-"+name)
			l.at(t, alice, "nix-store --realise "+lower+" --add-root lower-"+name)
			upper := l.build(t, alice, echo("upper-"+name, name, lower), "-o "+name)
			l.at(t, rootOut, "rm /run/root-"+name)
			made = append(made, pair{lower, upper})
		}
		l.at(t, alice, "rm go")
		l.at(t, rootOut, "rm /run/go")
		for who, p := range map[string]interface{ Output() string }{"system": system, "alice": personal} {
			proc := p.(interface{ Done() <-chan struct{} })
			<-proc.Done()
			// Nix's collector finds a path dead that a build registers a reference to at
			// that moment, and its database refuses to drop it: nothing is lost.
			said := strings.ReplaceAll(p.Output(), "BUG: error: cannot delete path", "")
			if strings.Contains(said, "error") {
				t.Errorf("the collector of %s: %s", who, p.Output())
			}
		}
		l.systemGC(t)
		for _, p := range made {
			if got, err := l.try(alice, "cat $(tail -n 1 "+p.upper+")"); err != nil || "lower-"+got != path.Base(p.lower)[33:] {
				t.Errorf("%s needs %s: %q %v", p.upper, p.lower, got, err)
			}
		}
		l.noWhiteouts(t)
		l.verify(t)
	})
}

// The verification that the other tests rely on does find what is broken, on
// either side and from either view.
func TestVerifyFinds(t *testing.T) {
	each(t, "", func(t *testing.T, l *laptop) {
		lower := l.build(t, rootOut, echo("lower", "l"), "")
		l.unlockOf(t, "alice")
		l.build(t, alice, echo("upper", "u", lower), "-o upper")
		l.verify(t)
		l.at(t, rootInView, "p=$(readlink ~alice/keep/upper); chmod u+w $p; echo more >> $p; chmod a-w $p")
		l.at(t, rootOut, "chmod u+w "+lower+"; echo more >> "+lower+"; chmod a-w "+lower)
		for _, p := range []place{rootOut, alice, rootInView} {
			out, err := l.try(p, "nix-store --verify --check-contents")
			found := complaints(out)
			if err == nil || !strings.Contains(found, lower) || p != rootOut && !strings.Contains(found, "-upper") {
				t.Errorf("%s: damage is not found: %v\n%s", p, err, out)
			}
		}
	})
}

// What the system's collector took, and alice had looked at, is gone for her,
// too: she builds it herself, and when she has no more need of it the system's
// next one is hers again.
func TestGhost(t *testing.T) {
	each(t, "", func(t *testing.T, l *laptop) {
		l.unlockOf(t, "alice")
		ghost := l.build(t, bobOut, echo("ghost", "x"), "")
		fails := fixture.Derivation("fails", "test -e /build/never")
		broken := l.at(t, bobOut, "nix-store --query --outputs $(nix-instantiate "+l.expression(t, fails)+" 2>/dev/null)")
		for _, p := range []string{ghost, broken} {
			l.try(alice, "cat "+p) // looked at: what it says is no matter
		}
		l.systemGC(t, ghost)
		eventually(t, "the view forgets what is gone", func() bool { return !l.exists(alice, ghost) })
		if out, err := l.try(alice, "nix-build --no-out-link "+l.expression(t, fails)); err == nil {
			t.Fatalf("a build that fails did not: %s", out)
		}
		mine := l.build(t, alice, echo("ghost", "x"), "-o mine")
		if mine != ghost || !l.inUpper(t, mine) || l.at(t, alice, "cat mine") != "x" {
			t.Errorf("alice's own build of %s: %s", ghost, mine)
		}
		l.noWhiteouts(t)
		l.verify(t)
		l.at(t, alice, "rm mine")
		l.personalGC(t)
		if l.exists(alice, ghost) {
			t.Errorf("%s is left after both collections", ghost)
		}
		l.build(t, bobOut, echo("ghost", "x"), "")
		eventually(t, "the view shows the system's", func() bool { return l.exists(alice, ghost) })
		if l.at(t, alice, "cat "+ghost) != "x" || !l.valid(alice, ghost) || l.inUpper(t, ghost) {
			t.Errorf("the system's build of %s is not alice's", ghost)
		}
		l.noWhiteouts(t)
		l.verify(t)
	})
}
