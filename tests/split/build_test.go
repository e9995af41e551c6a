package split

import (
	"fmt"
	"path"
	"strings"
	"testing"

	"overkeep/tests/bed"
	"overkeep/tests/fixture"
)

// look is a build that writes down what it sees. Its file has one section for
// each question. (Standard error stays open: to Nix its end is the build's.)
func look(name string, deps ...string) string {
	return fixture.Derivation(name, `exec > $out
		echo "-- uid"; read inside outside count < /proc/self/uid_map; echo $outside $count
		echo "-- interfaces"; for i in /sys/class/net/*; do echo $i; done; while read i rest; do case $i in *:*) echo $i;; esac; done < /proc/net/dev
		echo "-- routes"; tail -n +2 /proc/net/route; true
		echo "-- root"; ls /
		echo "-- store"; ls /nix/store
		echo "-- reach"; for f in /home/alice/keep /run/overkeep /var/lib/overkeep /nix/var /root /etc/nix; do test -e $f && echo $f; done; true
		echo "-- write"; touch /nix/store/.mine /etc/mine /bin/mine 2>/dev/null && echo yes; true
		echo "-- deps"; for d in $deps; do echo $d; done`, deps...)
}

// section returns one section of such a file.
func section(t *testing.T, file, name string) []string {
	t.Helper()
	_, rest, ok := strings.Cut("\n"+file, "\n-- "+name+"\n")
	if !ok {
		t.Fatalf("no section %q in\n%s", name, file)
	}
	body, _, _ := strings.Cut("\n"+rest, "\n-- ")
	return strings.Fields(body)
}

// Personal builds run as the build users, in a sandbox with nothing in it but
// their inputs, and neither the derivation nor the user's options open it.
func TestSandbox(t *testing.T) {
	each(t, "", func(t *testing.T, l *laptop) {
		first, last := 30001, 30000+strings.Count(l.Must(t, "root", "getent group nixbld | cut -d: -f4 | tr , '\\n'"), "nixbld")
		lower := l.build(t, rootOut, echo("lower", "l"), "")
		other := l.build(t, rootOut, echo("other", "not asked for"), "-o /nix/var/nix/gcroots/other")
		l.unlockOf(t, "alice")
		upper := l.build(t, alice, echo("upper", "u", lower), "-o upper")

		check := func(p place, name string, deps ...string) {
			t.Helper()
			out := l.build(t, p, look(name, deps...), "")
			saw := l.at(t, p, "cat "+out)
			var uid, count int
			if n, _ := fmt.Sscan(strings.Join(section(t, saw, "uid"), " "), &uid, &count); n != 2 || uid < first || uid > last || count != 1 {
				t.Errorf("%s: the build ran as %v, no build user alone (%d to %d)", p, section(t, saw, "uid"), first, last)
			}
			for _, i := range section(t, saw, "interfaces") {
				if i != "lo:" && i != "/sys/class/net/*" {
					t.Errorf("%s: the build had the network interface %s", p, i)
				}
			}
			for _, name := range []string{"routes", "reach", "write"} {
				if got := section(t, saw, name); len(got) != 0 {
					t.Errorf("%s: %s of the build: %v", p, name, got)
				}
			}
			for _, d := range section(t, saw, "root") {
				if !strings.Contains(" bin build dev etc nix proc tmp ", " "+d+" ") {
					t.Errorf("%s: the build saw /%s", p, d)
				}
			}
			want := map[string]bool{path.Base(out): true}
			for _, d := range strings.Fields(l.at(t, p, "nix-store --query --requisites "+strings.Join(deps, " "))) {
				want[path.Base(d)] = true
			}
			got := section(t, saw, "store")
			for _, f := range got {
				if !want[f] {
					t.Errorf("%s: the build saw %s in the store", p, f)
				}
			}
			if len(got) != len(want) {
				t.Errorf("%s: the build saw %v in the store, want %v", p, got, want)
			}
		}
		check(bobOut, "look-system", lower)
		check(alice, "look-personal", lower, upper)
		check(rootInView, "look-root", lower, upper)
		if !l.exists(alice, other) {
			t.Errorf("the view does not show %s, which the builds must not", other)
		}

		// Not even when alice, or the derivation, would have it otherwise.
		open := l.at(t, alice, "nix-build --no-out-link --option sandbox false --option sandbox-paths /home "+l.expression(t, look("look-option"))+" 2>/dev/null")
		if saw := l.at(t, alice, "cat "+open); len(section(t, saw, "reach")) != 0 || strings.Contains(strings.Join(section(t, saw, "root"), " "), "home") {
			t.Errorf("an option of alice's opened the sandbox:\n%s", saw)
		}
		noChroot := strings.Replace(look("look-chroot"), "derivation {", "derivation { __noChroot = true;", 1)
		if out, err := l.try(alice, "nix-build --no-out-link "+l.expression(t, noChroot)); err == nil {
			t.Errorf("a derivation without a sandbox was built: %s", out)
		}
		l.verify(t)
	})
}

// While the keep is open the system store grows, and alice sees it without doing
// anything, also under a name that she had looked for before. What is there is
// not built again upstairs.
func TestSystemGrows(t *testing.T) {
	each(t, "", func(t *testing.T, l *laptop) {
		file := echo("grown-file", "grown")
		tree := fixture.Derivation("grown-tree", "mkdir -p $out/bin; echo grown > $out/bin/tool")
		// Its name, before it is built: only the derivation exists.
		name := func(expr string) (out, drv string) {
			drv = l.at(t, bobOut, "nix-instantiate "+l.expression(t, expr)+" 2>/dev/null")
			return l.at(t, bobOut, "nix-store --query --outputs "+drv), drv
		}
		l.unlockOf(t, "alice")
		for n, expr := range []string{file, tree} {
			out, drv := name(expr)
			inside := out
			if n == 1 {
				inside += "/bin/tool"
			}
			// Alice waits for it, having looked, with the store as her directory.
			waiting := l.start(t, alice, "cd /nix/store; test ! -e "+inside+"; nix-store --check-validity "+out+" && exit 9; echo looked; until test -e "+inside+"; do sleep 0.02; done; cat "+inside)
			eventually(t, "alice has looked", func() bool { return strings.Contains(waiting.Output(), "looked") })
			if got := l.build(t, []place{bobOut, rootOut}[n], expr, ""); got != out {
				t.Fatalf("the system built %s, not %s", got, out)
			}
			if r, err := waiting.Wait(); err != nil || r.Code != 0 || !strings.HasSuffix(r.Stdout, "looked\ngrown\n") {
				t.Errorf("alice waited for %s: %v %+v", inside, err, r)
			}
			l.have(t, alice, true, map[string]string{"path": out, "derivation": drv})
			if log := l.at(t, alice, "nix-build -o built "+l.expression(t, expr)+" 2>&1"); log != out {
				t.Errorf("alice asked for what the system store has, and Nix says:\n%s", log)
			}
			for _, p := range []string{out, drv} {
				if l.inUpper(t, p) {
					t.Errorf("%s was made again upstairs", p)
				}
			}
		}
		// While it is locked it grows, too.
		l.lockOf(t, "alice")
		late := echo("grown-late", "late")
		out := l.build(t, bobOut, late, "")
		l.unlockOf(t, "alice")
		mine := l.build(t, alice, echo("mine", "m", out), "-o mine")
		if got := l.at(t, alice, "cat $(tail -n 1 "+mine+"); nix-build --no-out-link "+l.expression(t, late)+" 2>&1"); got != "late\n"+out {
			t.Errorf("what came while the keep was locked: %q", got)
		}
		if names, _ := l.upper(t); len(names) != 2 { // mine and its derivation
			t.Errorf("in the upper layer: %v", names)
		}
		l.noWhiteouts(t)
		l.verify(t)
	})
}

// The same derivation is built on both sides, alice's first. Each keeps its own,
// even where they differ; when alice's goes the system's shows.
func TestSameOnBothSides(t *testing.T) {
	each(t, "", func(t *testing.T, l *laptop) {
		same := echo("same", "same")
		differs := fixture.Derivation("differs", "cat /proc/sys/kernel/random/uuid > $out")
		l.unlockOf(t, "alice")
		s1 := l.build(t, alice, same, "-o same")
		d1 := l.build(t, alice, differs, "-o differs")
		user := l.build(t, alice, echo("user", "u", s1, d1), "-o user")
		hers := l.at(t, alice, "cat "+d1)
		s2, d2 := l.build(t, bobOut, same, "-o same"), l.build(t, bobOut, differs, "-o differs")
		his := l.at(t, bobOut, "cat "+d2)
		if s1 != s2 || d1 != d2 || hers == his {
			t.Fatalf("not what is to be tested: %s %s, %s %s, %s %s", s1, s2, d1, d2, hers, his)
		}
		for range 2 { // the second time after a lock
			if got := l.at(t, alice, "cat "+s1+" "+d1); got != "same\n"+hers {
				t.Errorf("alice's own now say %q", got)
			}
			if got := l.at(t, bobOut, "cat "+s1+" "+d1); got != "same\n"+his {
				t.Errorf("the system's now say %q", got)
			}
			l.verify(t)
			l.lockOf(t, "alice")
			l.unlockOf(t, "alice")
		}

		// The system's goes, alice's stays.
		l.at(t, bobOut, "rm differs")
		l.systemGC(t, d1)
		if got := l.at(t, alice, "cat "+d1); got != hers {
			t.Errorf("after the system's collection alice's says %q", got)
		}
		l.verify(t)

		// Dropping what is there twice takes alice's; from then on she needs the
		// system's, and it is held for her.
		l.at(t, alice, "nix store optimise")
		if l.inUpper(t, s1) {
			t.Errorf("%s is still there twice", s1)
		}
		l.at(t, bobOut, "rm same")
		l.systemGC(t)
		if got, err := l.try(alice, "cat "+s1+" "+d1+"; nix-store --query --requisites "+user); err != nil || !strings.HasPrefix(got, "same\n"+hers) {
			t.Errorf("after the duplicates were dropped: %q %v", got, err)
		}
		l.verify(t)

		// Both again; then alice's goes, and the system's shows in its place.
		if got := l.build(t, bobOut, differs, "-o differs"); got != d1 {
			t.Fatalf("the system built %s", got)
		}
		his = l.at(t, bobOut, "cat "+d1)
		l.at(t, alice, "rm same differs user")
		l.personalGC(t)
		if got, err := l.try(alice, "nix-store --check-validity "+d1+" && cat "+d1); err != nil || got != his {
			t.Errorf("after alice's collection the path says %q (%v), the system's %q", got, err, his)
		}
		l.noWhiteouts(t)
		l.verify(t)
	})
}

// held is a build that goes on until it is let go, and tells where it ran.
func held(name string) string {
	return fixture.Derivation(name, `touch held-`+name+`; read in outside count < /proc/self/uid_map; read begin rest < /proc/uptime
		until test -e go; do sleep 0.05; done
		read end rest < /proc/uptime; echo $outside $begin $end > $out`)
}

// A build user serves one build at a time, whichever of the two daemons it is of:
// Nix ends every process of a user before and after its build, so two builds as
// one user would kill, and could change, each other.
func TestBuildUsers(t *testing.T) {
	each(t, "", func(t *testing.T, l *laptop) {
		l.unlockOf(t, "alice")
		dir := func(p place, name string) string { // where a held build waits, once it does
			at, tops := rootOut, "/tmp /nix/var/nix/builds"
			if p == alice {
				at, tops = rootInView, "/run/overkeep/alice/k/builds"
			}
			out, _ := l.try(at, "find "+tops+" -name held-"+name+" -printf %h 2>/dev/null || true")
			return out
		}
		begin := func(p place, name string) *bed.Proc {
			return l.start(t, p, "nix-build --no-out-link "+l.expression(t, held(name)))
		}
		release := func(p place, name string) {
			at := rootOut
			if p == alice {
				at = rootInView
			}
			l.at(t, at, "touch "+dir(p, name)+"/go")
		}
		type ran struct {
			uid        int
			begin, end float64
		}
		end := func(p place, proc *bed.Proc) (r ran) {
			t.Helper()
			res, err := proc.Wait()
			if err != nil || res.Code != 0 {
				t.Fatalf("%s: %v %+v", p, err, res)
			}
			out := strings.Fields(res.Stdout)
			if n, err := fmt.Sscan(l.at(t, p, "cat "+out[len(out)-1]), &r.uid, &r.begin, &r.end); n != 3 {
				t.Fatalf("%s: %v in %s", p, err, out[len(out)-1])
			}
			return r
		}
		// With users enough both run at once.
		a, b := begin(alice, "a1"), begin(bobOut, "b1")
		eventually(t, "two builds at once", func() bool {
			for _, p := range []*bed.Proc{a, b} {
				select {
				case <-p.Done():
					t.Fatalf("a build ended before it was let go:\n%s", p.Output())
				default:
				}
			}
			return dir(alice, "a1") != "" && dir(bobOut, "b1") != ""
		})
		release(alice, "a1")
		release(bobOut, "b1")
		ra, rb := end(alice, a), end(bobOut, b)
		if ra.uid == rb.uid || ra.end < rb.begin || rb.end < ra.begin {
			t.Errorf("two builds that ran at once: %+v %+v", ra, rb)
		}
		// With one they wait for each other, whoever is first.
		l.Must(t, "root", "for n in 2 3 4; do gpasswd -d nixbld$n nixbld; done")
		for n, first := range []place{alice, bobOut} {
			second := []place{bobOut, alice}[n]
			one, two := fmt.Sprintf("one%d", n), fmt.Sprintf("two%d", n)
			p1 := begin(first, one)
			eventually(t, "the first build", func() bool { return dir(first, one) != "" })
			p2 := begin(second, two)
			eventually(t, "the second build waits", func() bool {
				return strings.Contains(p2.Output(), "waiting for a free build user") || dir(second, two) != ""
			})
			if dir(second, two) != "" {
				t.Errorf("%s built as the build user of %s", second, first)
			}
			release(first, one)
			r1 := end(first, p1)
			eventually(t, "the second build", func() bool { return dir(second, two) != "" })
			release(second, two)
			r2 := end(second, p2)
			if r1.uid != r2.uid || r2.begin < r1.end {
				t.Errorf("a pool of one build user: %s %+v, %s %+v", first, r1, second, r2)
			}
		}
		l.verify(t)
	})
}
