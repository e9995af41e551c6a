package churn

import (
	"fmt"
	"math/rand/v2"
	"slices"
	"strings"
	"testing"

	"overkeep/tests/bed"
	"overkeep/tests/boundary"
	"overkeep/tests/fixture"
)

// small is a handful of paths of alice's:
//
//	holder (always in the keep, rooted there) -> top -> first
//
// What moves is top and first; where they are in the system store, only the keep's pins
// hold them there.
type small struct {
	*world
	holder, top, first string
	sums               string // of all, as they must be
}

func newSmall(t *testing.T, suite bed.Suite, tools ...string) *small {
	t.Helper()
	s := &small{world: newWorld(t, suite, tools...)}
	build := func(name, script, args string, deps ...string) string {
		return s.Alice(t, "nix-build "+args+" "+s.expression(t, name, script, deps...)+" 2>/dev/null")
	}
	s.first = build("move-"+s.canary+"-first", "mkdir -p $out/d; echo first > $out/d/f; ln -s d/f $out/link", "--no-out-link")
	s.top = build("move-"+s.canary+"-top", "mkdir $out; echo $deps > $out/needs; i=0; while [ $i -lt 20 ]; do echo $i > $out/$i; i=$((i+1)); done", "--no-out-link", s.first)
	s.holder = build("hold-"+s.canary, "echo $deps > $out", "-o holder", s.top)
	s.sums = s.Alice(t, fmt.Sprintf(sums, s.paths()))
	s.want(t, inKeep)
	return s
}

func (s *small) paths() string { return strings.Join([]string{s.holder, s.top, s.first}, " ") }

type home bool

const (
	inKeep   home = false
	inSystem home = true
)

func (s *small) want(t *testing.T, h home) {
	t.Helper()
	if h == inSystem {
		s.policy(t, "hold-*")
	} else {
		s.policy(t, "hold-*", "move-*")
	}
}

// whole fails the test unless alice has what her root holds, to the byte, and Nix calls
// it valid.
func (s *small) whole(t *testing.T, when string) {
	t.Helper()
	got, err := s.AliceRun("nix-store --check-validity " + s.paths() + "; " + fmt.Sprintf(sums, s.paths()))
	if err != nil || strings.TrimSpace(got) != s.sums {
		t.Errorf("%s: what alice's root holds: %v\n%s\nwant\n%s", when, err, got, s.sums)
	}
}

// collect runs both collectors, the system's first.
func (s *small) collect(t *testing.T) {
	t.Helper()
	s.Must(t, "root", "NIX_REMOTE=daemon nix-store --gc 2>&1")
	s.Alice(t, "nix-store --gc 2>&1")
	s.Must(t, "root", "NIX_REMOTE=daemon nix-store --gc 2>&1")
}

// TestCollectAfterKill: a command that moves paths is killed, and before anybody sets
// that right both collectors run. Nothing is lost, not then and not by the recovery.
func TestCollectAfterKill(t *testing.T) {
	points := number(t, "OVERKEEP_CHURN_KILLS", 14)
	seed := number(t, "OVERKEEP_CHURN_SEED", rand.Uint64())
	t.Logf("OVERKEEP_CHURN_SEED=%d", seed)
	choose := rand.New(rand.NewPCG(seed, 2))
	s := newSmall(t, bed.Forky, boundary.Binary(t))
	tried := 0
	for _, c := range []struct {
		name string
		from home
		undo bool
	}{{"apply that releases", inKeep, false}, {"apply that seals", inSystem, false}, {"undo of a seal", inKeep, true}} {
		args := []string{"apply", "--keep", "alice", "--yes"}
		if c.undo {
			args[0] = "undo"
		}
		prepare := func(t *testing.T) {
			t.Helper()
			if c.undo {
				s.want(t, !c.from)
				s.MustOverkeep(t, 0, "", "apply", "--keep", "alice", "--yes")
			}
			s.want(t, c.from)
			s.MustOverkeep(t, 0, "", "apply", "--keep", "alice", "--yes")
			s.want(t, !c.from)
		}
		disturb := func(t *testing.T, options string) (boundary.Report, bed.Result) {
			t.Helper()
			r, err := s.Exec(bed.Command{Script: "rm -f /run/report; exec boundary -report /run/report " + options + " -- overkeep " + fixture.Quote(args...)})
			if err != nil {
				t.Fatal(err)
			}
			rep, err := boundary.ReadReport(s.Root + "/run/report")
			if err != nil {
				t.Fatalf("%v\n%s%s", err, r.Stdout, r.Stderr)
			}
			return rep, r
		}
		prepare(t)
		if _, r := disturb(t, "-trace /run/trace"); r.Code != 0 {
			t.Fatalf("%s: exit code %d\n%s%s", c.name, r.Code, r.Stdout, r.Stderr)
		}
		s.whole(t, c.name)
		// Of calls that are alike and follow each other, one.
		var runs [][]int
		last := ""
		for n, line := range slices.Collect(strings.Lines(s.Read(t, "/run/trace"))) {
			f := strings.SplitN(strings.TrimSpace(line), " ", 3)
			f = append(f, "", "")
			if kind := f[1] + " " + s.class(f[2]); kind != last {
				runs, last = append(runs, nil), kind
			}
			runs[len(runs)-1] = append(runs[len(runs)-1], n+1)
		}
		choose.Shuffle(len(runs), func(i, j int) { runs[i], runs[j] = runs[j], runs[i] })
		for _, run := range runs[:min(points, len(runs))] {
			n := run[choose.IntN(len(run))]
			t.Run(fmt.Sprintf("%s/%d", c.name, n), func(t *testing.T) {
				prepare(t)
				rep, _ := disturb(t, fmt.Sprintf("-kill %d", n))
				tried++
				what := fmt.Sprintf("%s killed before call %d, %s", c.name, n, rep.Call+" "+rep.Object)
				s.collect(t)
				s.whole(t, what+", and both collectors")
				// The next to come is no mover: a build that needs it.
				s.Alice(t, "nix-build --no-out-link "+s.expression(t, "uses-"+s.canary+fmt.Sprint(n), "cat $deps/needs > $out", s.top)+" 2>&1")
				if r := s.Overkeep(t, "", "apply", "--keep", "alice", "--yes"); r.Code != 0 {
					t.Errorf("%s: the next apply: exit code %d\n%s%s", what, r.Code, r.Stdout, r.Stderr)
				}
				s.whole(t, what+", and an apply")
				s.collect(t)
				s.whole(t, what+", an apply and both collectors")
				for _, l := range s.state(t) {
					t.Errorf("%s: %s", what, l)
				}
				if t.Failed() {
					t.Fatalf("what is lost is lost: the others are not tried")
				}
			})
			if t.Failed() {
				return
			}
		}
	}
	t.Logf("%d kill points", tried)
}

// class is what kind of object a call was about: names differ from run to run.
func (s *small) class(object string) string {
	for _, k := range []string{keepDir + "/journal", keepDir + "/nix/db", keepDir + "/store/incoming", keepDir + "/store/trash",
		keepDir + "/store", keepDir + "/nix/gcroots", keepDir, "/nix/var/nix/db", "-overkeep-moving", ".lock", "/nix/store", "/nix/var"} {
		if strings.Contains(object, k) {
			return k
		}
	}
	return ""
}
