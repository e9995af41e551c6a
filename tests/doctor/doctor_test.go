// Package doctor_test runs "overkeep doctor" in throw-away machines with a real
// Nix of each suite.
package doctor_test

import (
	"encoding/json"
	"slices"
	"strings"
	"testing"

	"overkeep/systemd/doctor"
	"overkeep/tests/bed"
)

type report struct {
	Answer doctor.Answer  `json:"answer"`
	Checks []doctor.Check `json:"checks"`
}

func (r report) find(t *testing.T, name string) doctor.Check {
	t.Helper()
	i := slices.IndexFunc(r.Checks, func(c doctor.Check) bool { return c.Name == name })
	if i < 0 {
		t.Fatalf("no check %q", name)
	}
	return r.Checks[i]
}

// ask runs doctor in the machine; the exit code is part of what is asked.
func ask(t *testing.T, m *bed.Machine, user, args string, code int) report {
	t.Helper()
	res, err := m.Exec(bed.Command{User: user, Script: "overkeep doctor --json " + args})
	if err != nil {
		t.Fatal(err)
	}
	var r report
	if err := json.Unmarshal([]byte(res.Stdout), &r); err != nil {
		t.Fatalf("%v: %s%s", err, res.Stdout, res.Stderr)
	}
	if res.Code != code {
		t.Errorf("doctor %s as %s: exit code %d, want %d: %s", args, user, res.Code, code, res.Stderr)
		for _, c := range r.Checks {
			if c.Needed && c.Answer != doctor.Yes {
				t.Logf("%+v", c)
			}
		}
	}
	return r
}

// fingerprint is everything that a run could leave behind or touch: mounts, its
// loop devices, the directories it works in, and every file of /nix with its
// times. Not counted is what SQLite writes when the system's daemon, to which a
// connection is made, opens its own database.
const fingerprint = `cat /proc/self/mountinfo; losetup -a | grep overkeep-doctor || :; ls -A /var/lib /tmp /run
find /nix -printf '%p %i %m %s %T@ %C@\n' | grep -v -e /db.sqlite-shm -e /db.sqlite-wal | sort`

func TestDoctor(t *testing.T) {
	for _, suite := range bed.Suites {
		t.Run(string(suite), func(t *testing.T) {
			m := bed.Start(t, suite)
			m.Install(t, bed.Binary(t))

			// Before the system's daemon runs, this is what is missing.
			r := ask(t, m, "root", "--user alice", 7)
			if c := r.find(t, "system daemon answers"); c.Answer != doctor.No || c.Remedy != "nix-daemon &" {
				t.Errorf("%+v", c)
			}
			m.SystemNix(t)

			ask(t, m, "root", "", 0) // the daemon makes its database at the first connection
			before := m.Must(t, "root", fingerprint)
			r = ask(t, m, "root", "--user alice", 0)
			for _, c := range r.Checks {
				if c.Needed && c.Answer != doctor.Yes || c.Group == doctor.Nix && c.Answer == doctor.Unsure {
					t.Errorf("%+v", c)
				}
			}
			for name, want := range map[string]string{
				"system daemon answers": "Nix 2.", "nix-daemon": "/nix-daemon", "build users": "in the group nixbld", "Nix 2.22": "Nix 2.",
			} {
				if c := r.find(t, name); !strings.Contains(c.Found, want) {
					t.Errorf("%+v, want %q found", c, want)
				}
			}
			if after := m.Must(t, "root", fingerprint); after != before {
				t.Errorf("before:\n%s\nafter:\n%s", before, after)
			}

			// Each thing that is taken away is missed, and its remedy brings it back.
			for _, c := range []struct{ check, take, remedy string }{
				{"e2fsprogs", "mv /usr/sbin/mke2fs /root/", ""},
				{"parent directories", "chmod o+w /var/lib", "chmod o-w /var/lib"},
				{"sandbox of the system's builds", "mkdir -p /etc/nix; echo 'sandbox = false' >>/etc/nix/nix.conf", "echo 'sandbox = true' >>/etc/nix/nix.conf"},
				{"build users", "for u in $(grep -o '^nixbld[0-9]*' /etc/passwd); do userdel $u; done; groupdel -f nixbld 2>/dev/null || :", ""},
			} {
				m.Must(t, "root", c.take)
				code := 0
				if r.find(t, c.check).Needed {
					code = 7
				}
				got := ask(t, m, "root", "--user alice", code).find(t, c.check)
				if got.Answer != doctor.No || c.remedy != "" && got.Remedy != c.remedy {
					t.Errorf("%+v, want the remedy %q", got, c.remedy)
					continue
				}
				switch c.check {
				case "e2fsprogs": // the remedy itself wants the network
					m.Must(t, "root", "mv /root/mke2fs /usr/sbin/")
				default:
					m.Must(t, "root", got.Remedy)
				}
				if got := ask(t, m, "root", "--user alice", 0).find(t, c.check); got.Answer != doctor.Yes {
					t.Errorf("after the remedy: %+v", got)
				}
			}

			// As an ordinary user much cannot be told, and nothing is called missing.
			r = ask(t, m, "alice", "", 10)
			for _, c := range r.Checks {
				if c.Needed && c.Answer == doctor.No {
					t.Errorf("%+v", c)
				}
			}
			if c := r.find(t, "system daemon answers"); c.Answer != doctor.Yes {
				t.Errorf("%+v", c)
			}
			text := m.Must(t, "root", "overkeep doctor --user alice")
			for _, want := range []string{"A keep can be used here.", "\nnix\n", "\n  yes  nix-daemon", "      mend:    overkeep unlock\n"} {
				if !strings.Contains(text, want) {
					t.Errorf("no %q in\n%s", want, text)
				}
			}
			if strings.Contains(text, "\x1b") {
				t.Errorf("colour without a terminal:\n%s", text)
			}
		})
	}
}
