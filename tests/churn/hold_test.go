package churn

import (
	"fmt"
	"strings"
	"testing"
	"time"

	"overkeep/tests/bed"
	"overkeep/tests/fixture"
)

// TestBuildHolds: a build in the view that was given a path, and reads what that refers
// to, goes on reading just that while these are asked to move: they stay until it is
// done, and then they move.
func TestBuildHolds(t *testing.T) {
	for _, suite := range bed.Suites {
		t.Run(string(suite), func(t *testing.T) {
			t.Parallel()
			s := newSmall(t, suite)
			s.Must(t, "root", "mkdir -m 755 /run/gate")
			for _, from := range []home{inKeep, inSystem} {
				s.want(t, from)
				s.MustOverkeep(t, 0, "", "apply", "--keep", "alice", "--yes")
				name := fmt.Sprintf("reads-%v", from)
				file := s.expression(t, name, `
					top=$(cat $deps); sum() { cat $top/* $(cat $top/needs)/d/f | md5sum; }; want=$(sum)
					echo reading
					while [ ! -e /gate/go ]; do [ "$(sum)" = "$want" ] || { echo CHANGED; exit 1; }; usleep 1000; done
					[ "$(sum)" = "$want" ] || { echo CHANGED at last; exit 1; }
					echo $want > $out`, s.holder)
				build, err := s.Start("root", "cd /; exec overkeep run alice --as-root -- bash -euc "+
					fixture.Quote("nix-build --no-out-link --option extra-sandbox-paths /gate=/run/gate "+file))
				if err != nil {
					t.Fatal(err)
				}
				awaitOutput(t, build, "reading")
				s.want(t, !from)
				const left = 25
				out := s.MustOverkeep(t, left, "", "apply", "--keep", "alice", "--yes", "--json")
				for _, p := range []string{s.top, s.first} {
					if !strings.Contains(out, p) {
						t.Errorf("%s is not named as left:\n%s", p, out)
					}
				}
				s.whole(t, name+": while it builds")
				s.collect(t)
				s.whole(t, name+": while it builds, after both collectors")
				s.Must(t, "root", "touch /run/gate/go")
				if r, err := build.Wait(); err != nil || r.Code != 0 {
					t.Errorf("%s: %v, exit code %d\n%s", name, err, r.Code, r.Stdout)
				}
				s.Must(t, "root", "rm /run/gate/go")
				s.MustOverkeep(t, 0, "", "apply", "--keep", "alice", "--yes")
				s.whole(t, name+": afterwards")
				for _, l := range s.state(t) {
					t.Errorf("%s: %s", name, l)
				}
			}
		})
	}
}

// TestKillEndsFirst: what lock --kill ends sees all of the view until its end. A personal
// collection that went on while the user's directories were unmounted took what the links
// in them hold, and a build whose inputs were unmounted could end well.
func TestKillEndsFirst(t *testing.T) {
	s := newSmall(t, bed.Forky)
	s.Must(t, "root", "mkdir -m 777 /run/gate")
	p, err := s.Start("root", "cd /; exec overkeep run alice -- bash -c "+fixture.Quote(
		`cd /; exec 3<`+s.holder+`; echo looking; while :; do
			[ -L /home/alice/keep/holder -a -e `+s.top+`/needs ] || { echo gone >/run/gate/gone; exit; }; done`))
	if err != nil {
		t.Fatal(err)
	}
	awaitOutput(t, p, "looking")
	s.Lock(t, "--kill")
	<-p.Done()
	if out := s.Must(t, "root", "ls /run/gate"); out != "" {
		t.Errorf("it saw the view go before it was ended")
	}
	s.Unlock(t)
	s.whole(t, "after a lock")
}

// awaitOutput waits until a process has said a word.
func awaitOutput(t *testing.T, p *bed.Proc, word string) {
	t.Helper()
	for end := time.Now().Add(time.Minute); !strings.Contains(p.Output(), word); time.Sleep(20 * time.Millisecond) {
		select {
		case <-p.Done():
			t.Fatalf("it has ended:\n%s", p.Output())
		default:
		}
		if time.Now().After(end) {
			t.Fatalf("it does not say %q:\n%s", word, p.Output())
		}
	}
}
