package crash

import (
	"crypto/rand"
	"slices"
	"testing"

	"filippo.io/age"

	"overkeep/systemd/keep"
	"overkeep/tests/lock/proof"
)

// TestInit: a crash leaves either nothing that is in the way of the next init, or
// a whole keep that both keys open.
func TestInit(t *testing.T) {
	t.Parallel()
	for backend, hows := range map[string][]how{"image": allHows, "dir": {powerCut}, "on-image": {killGroup, powerCut}} {
		t.Run(backend, func(t *testing.T) {
			t.Parallel()
			m := newMachine(t, backend)
			var file, recovery string
			m.campaign(t, attack{
				name:  "init",
				least: 30,
				before: func(t *testing.T, m *machine) {
					if m.exists() {
						m.must(t, overkeep("", "destroy", name, "--yes"))
						m.clean(t)
					}
				},
				script: func(m *machine) script {
					m.pass, m.upper, file = "pass "+rand.Text(), "", m.file("recovery")
					return m.initScript(m.pass, file)
				},
				saw: func(m *machine) { recovery = m.recoveryFrom(file) },
				after: func(t *testing.T, m *machine, fired bool) {
					if m.exists() {
						if m.recovery = recovery; recovery == "" {
							t.Error("the keep is there, and its recovery key nowhere")
						}
						m.whole(t, true)
						return
					}
					if !fired {
						t.Error("init has succeeded, and there is no keep")
					}
					if s := m.status(t); s != "" {
						t.Errorf("there is no keep, and its state is %q", s)
					}
					for _, verb := range []string{"lock", "unlock"} {
						if r := m.run(t, overkeep(m.pass, verb, name)); r.Code != exitNoKeep {
							t.Errorf("%s of a keep that is not there: exit code %d\n%s", verb, r.Code, r.Stderr)
						}
					}
					m.makeOver(t)
				},
			}, hows...)
			m.sound(t)
		})
	}
}

// TestUnlockLock: a crash in unlock or in lock leaves a keep that the next lock
// and the next unlock, whichever comes first, bring to its state.
func TestUnlockLock(t *testing.T) {
	t.Parallel()
	for backend, hows := range map[string][]how{"image": allHows, "dir": {kill, powerCut}, "on-image": {killGroup}} {
		t.Run(backend, func(t *testing.T) {
			t.Parallel()
			m := newMachine(t, backend)
			m.make(t)
			m.fill(t)
			for _, lockFirst := range []bool{true, false} {
				hows := hows
				if !lockFirst { // a boot takes away what a lock would meet: one order will do
					hows = slices.DeleteFunc(slices.Clone(hows), func(h how) bool { return h == powerCut })
				}
				after := func(t *testing.T, m *machine, _ bool) { m.whole(t, lockFirst) }
				order := map[bool]string{true: ", then lock", false: ", then unlock"}[lockFirst]
				m.campaign(t, attack{
					name: "unlock" + order, least: 8,
					before: func(*testing.T, *machine) {},
					script: func(m *machine) script { return overkeep(m.pass, "unlock", name, "--passphrase-fd=0") },
					after:  after,
				}, hows...)
				m.campaign(t, attack{
					name: "lock" + order, least: 7,
					before: func(t *testing.T, m *machine) { m.unlock(t) },
					script: func(m *machine) script { return overkeep("", "lock", name) },
					after:  after,
				}, hows...)
			}
			m.sound(t)
		})
	}
}

// keyAttacks are the changes of keys, of a keep that is locked or open.
func keyAttacks(t *testing.T, unlocked bool) []attack {
	extra, err := age.GenerateX25519Identity()
	if err != nil {
		t.Fatal(err)
	}
	open := func(t *testing.T, m *machine) {
		if unlocked {
			m.unlock(t)
		}
	}
	has := func(t *testing.T, m *machine) bool { return slices.Contains(m.slotNames(t), "extra") }
	add := func(m *machine) script {
		return overkeep(m.pass, "key", "add", name, "--recipient", extra.Recipient().String(), "--name=extra", "--passphrase-fd=0")
	}
	remove := func(m *machine) script { return overkeep(m.pass, "key", "remove", name, "extra", "--passphrase-fd=0") }
	consistent := func(t *testing.T, m *machine) {
		t.Helper()
		if has(t, m) != m.opens(t, extra.String()) {
			t.Errorf("the extra slot: listed %v, opens %v", has(t, m), !has(t, m))
		}
	}
	var newPass, file, newRecovery string
	return []attack{
		{
			name: "key add", least: 18, before: open, script: add,
			after: func(t *testing.T, m *machine, fired bool) {
				if !fired && !has(t, m) {
					t.Error("key add has succeeded, and the slot is not there")
				}
				consistent(t, m)
				m.whole(t, true)
				// That the next add works, the next point and the last show.
				if has(t, m) {
					m.must(t, remove(m))
					m.clean(t)
				}
			},
		},
		{
			name: "key remove", least: 18,
			before: func(t *testing.T, m *machine) {
				if !has(t, m) {
					m.must(t, add(m))
				}
				open(t, m)
			},
			script: remove,
			after: func(t *testing.T, m *machine, fired bool) {
				if !fired && has(t, m) {
					t.Error("key remove has succeeded, and the slot is still there")
				}
				consistent(t, m)
				m.whole(t, true)
			},
		},
		{
			name: "key change", least: 18, before: open,
			script: func(m *machine) script {
				newPass = "pass " + rand.Text()
				return script{"IFS= read -r old; IFS= read -r new; exec overkeep key change " + name + " --work-factor=10" +
					" --passphrase-fd=3 --new-passphrase-fd=4 3< <(printf %s \"$old\") 4< <(printf %s \"$new\")", m.pass + "\n" + newPass + "\n"}
			},
			after: func(t *testing.T, m *machine, fired bool) {
				before, after := m.opens(t, m.pass), m.opens(t, newPass)
				if before == after {
					t.Errorf("the old passphrase opens: %v, the new one: %v", before, after)
				}
				if !fired && !after {
					t.Error("key change has succeeded, and the new passphrase does not open")
				}
				if after {
					m.pass = newPass
				}
				m.whole(t, true)
			},
		},
		{
			name: "key recovery", least: 18, before: open,
			script: func(m *machine) script {
				file = m.file("recovery")
				return overkeep(m.pass, "key", "recovery", name, "--recovery-out", file, "--passphrase-fd=0")
			},
			saw: func(m *machine) { newRecovery = m.recoveryFrom(file) },
			after: func(t *testing.T, m *machine, fired bool) {
				before, after := m.opens(t, m.recovery), newRecovery != "" && m.opens(t, newRecovery)
				if before == after {
					t.Errorf("the old recovery key opens: %v, the new one (there: %v): %v", before, newRecovery != "", after)
				}
				if !fired && !after {
					t.Error("key recovery has succeeded, and the new key does not open")
				}
				if after {
					m.recovery = newRecovery
				}
				m.whole(t, true)
			},
		},
	}
}

// TestDestroy: a crash leaves a keep that is whole, or one that nothing opens and
// that the next destroy, or the next init, takes away.
func TestDestroy(t *testing.T) {
	t.Parallel()
	for backend, hows := range map[string][]how{"image": allHows, "dir": {killGroup, powerCut}, "on-image": {killGroup, powerCut}} {
		t.Run(backend, func(t *testing.T) {
			t.Parallel()
			m := newMachine(t, backend)
			for _, next := range []string{"destroy", "init"} {
				m.campaign(t, attack{
					name: "destroy, then " + next, least: 7,
					before: func(t *testing.T, m *machine) {
						if !m.exists() {
							m.make(t)
						}
					},
					script: func(*machine) script { return overkeep("", "destroy", name, "--yes") },
					after: func(t *testing.T, m *machine, fired bool) {
						switch s := m.status(t); {
						case s != "" && s != keep.Locked:
							t.Errorf("the state of a keep that is being destroyed is %q", s)
						case (s != "") != m.exists():
							t.Errorf("status tells of a keep: %v; there is one: %v", s != "", m.exists())
						}
						if m.exists() {
							if !fired {
								t.Fatal("destroy has succeeded, and the keep is still there")
							}
							m.whole(t, true) // nothing was taken from it yet
							m.must(t, overkeep("", "destroy", name, "--yes"))
							m.clean(t)
							return
						}
						if next == "init" {
							m.makeOver(t)
						}
						// What is gone altogether need not be found again.
						left := m.files(t, stateRoot)
						r := m.run(t, overkeep("", "destroy", name, "--yes"))
						if r.Code != 0 && (r.Code != exitNoKeep || len(left) > 0) {
							t.Errorf("destroy once more, with %q left: exit code %d\n%s", left, r.Code, r.Stderr)
						}
						m.clean(t)
					},
				}, hows...)
			}
		})
	}
}

// await polls until done.
func await(t *testing.T, done func() bool) {
	t.Helper()
	proof.Await(t, func() string {
		if done() {
			return ""
		}
		return "it is not ready"
	})
}
