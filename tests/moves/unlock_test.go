package moves

import (
	"fmt"
	"strings"
	"testing"

	"overkeep/tests/fixture"
)

// TestUnlockRecovers: a move that was killed half way is told of by status, and the
// next unlock sets it right by itself.
func TestUnlockRecovers(t *testing.T) {
	t.Parallel()
	s := newShard(t)
	w, c := s.w, named("seal")
	calls := len(s.trace(t, c))
	s.prepare(t, c)
	if rep, _ := w.disturb(t, fmt.Sprintf("-kill %d", calls/2), c.args(w)...); rep.At == 0 {
		t.Fatal("it was not killed")
	}
	if r := w.Overkeep(t, "", "status", "alice"); !strings.Contains(r.Stdout, "A move between the stores was interrupted") {
		t.Errorf("status says nothing of it:\n%s", r.Stdout)
	}
	w.Lock(t)
	r := w.Overkeep(t, fixture.Passphrase, "unlock", "--passphrase-fd", "0")
	if r.Code != 0 || !strings.Contains(r.Stderr, "it has been set right") {
		t.Errorf("unlock: exit code %d\n%s%s", r.Code, r.Stdout, r.Stderr)
	}
	w.look(t, true).sound(t, w)
	if r := w.Overkeep(t, "", "status", "alice"); strings.Contains(r.Stdout, "was interrupted") {
		t.Errorf("status still tells of it:\n%s", r.Stdout)
	}
}
