package crash

import (
	"strings"
	"testing"
)

// TestKeys: a crash in a change of the keys leaves the set of before or that of
// after: no moment has neither, and what was not touched opens the keep always.
func TestKeys(t *testing.T) {
	t.Parallel()
	for _, unlocked := range []bool{false, true} {
		t.Run(map[bool]string{false: "locked", true: "unlocked"}[unlocked], func(t *testing.T) {
			t.Parallel()
			m := newMachine(t, "image")
			m.make(t)
			m.fill(t)
			for _, a := range keyAttacks(t, unlocked) {
				// Who dies matters to the command, which is the same either way; that the
				// volume is opened for the change and closed again matters to what is left.
				hows := []how{killGroup, powerCut}
				switch {
				case unlocked:
					hows = []how{kill}
				case a.name == "key change": // once, for the steps that only a locked keep has
					hows = allHows
				}
				m.campaign(t, a, hows...)
			}
			m.sound(t)
		})
	}
}

// TestLockKill: the same for a lock that ends a holder.
func TestLockKill(t *testing.T) {
	t.Parallel()
	m := newMachine(t, "image")
	m.make(t)
	m.fill(t)
	m.campaign(t, attack{
		name: "lock --kill", least: 7,
		before: func(t *testing.T, m *machine) {
			m.unlock(t)
			p, err := m.Start("root", "cd /; exec overkeep run alice -- bash -c 'exec 3<"+data+"; echo ready; exec sleep infinity'")
			if err != nil {
				t.Fatal(err)
			}
			await(t, func() bool { return strings.Contains(p.Output(), "ready") })
		},
		script: func(m *machine) script { return overkeep("", "lock", name, "--kill", "--yes") },
		after: func(t *testing.T, m *machine, fired bool) {
			if fired {
				m.must(t, overkeep("", "lock", name, "--kill", "--yes"))
			}
			m.whole(t, true)
		},
	}, killGroup)
	m.sound(t)
}
