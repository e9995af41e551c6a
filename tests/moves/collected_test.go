package moves

import (
	"fmt"
	"strings"
	"testing"
)

// TestCollected: a release is killed on its last stretch, when the paths are in the
// system store and leave the keep, and the system's collector runs before anybody sets
// it right: a dead mover holds no lock, and what was not pinned by then it takes. No
// path is lost by that, and the next command finishes.
func TestCollected(t *testing.T) {
	t.Parallel()
	s := newShard(t)
	w := s.w
	collected := 0
	for _, name := range []string{"release", "apply that releases"} {
		c := named(name)
		classes := s.trace(t, c)
		// From the event before the last but one to the end of the batch: placing, placed,
		// dropped, cleaned, end.
		var writes []int
		for n, class := range classes {
			if strings.HasPrefix(class, "write") && strings.HasSuffix(class, " journal") {
				writes = append(writes, n)
			}
		}
		if len(writes) < 5 {
			t.Fatalf("%s writes %d events: %q", name, len(writes), classes)
		}
		from, to := writes[len(writes)-4], writes[len(writes)-3]+2
		t.Logf("%s: calls %d to %d of %d: %q", name, from, to, len(classes), classes[from:to])
		for _, n := range thin(classes) {
			if n--; n < from || n >= to {
				continue
			}
			t.Run(fmt.Sprintf("%s/%d %s", name, n+1, classes[n]), func(t *testing.T) {
				s.prepare(t, c)
				rep, _ := w.disturb(t, fmt.Sprintf("-kill %d", n+1), c.args(w)...)
				if rep.At == 0 { // what an earlier one has left to be done again is not there always
					s.settle(t, c, c.to)
					return
				}
				s.tried++
				before := w.look(t, false)
				w.Must(t, "root", "nix-store --gc >/dev/null 2>&1")
				if after := w.look(t, false); len(after.System) < len(before.System) {
					collected++
				}
				w.overkeepOK(t, apply(w)...)
				s.settle(t, c, inSystem)
			})
		}
	}
	t.Logf("%d kill points; the collector took something %d times", s.tried, collected)
	if collected == 0 {
		t.Error("the collector never took anything: this shows nothing")
	}
}
