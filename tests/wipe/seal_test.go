package wipe

import (
	"strings"
	"testing"

	"overkeep/tests/bed"
	"overkeep/tests/fixture"
	"overkeep/tests/need"
)

// TestSealed: 200 files of 0 to 10 MB, and a build with its log, are sealed one by one,
// each by a command of its own. Then no block of the raw disk holds a content, a name or
// a hash part, and all of them are whole in the keep. What Nix's own way leaves of
// others stands beside it.
func TestSealed(t *testing.T) {
	t.Parallel()
	need.Tool(t, "fstrim")
	k := fixture.New(t, bed.Forky, "--recovery-out=/run/other.txt")
	k.Unlock(t)
	theirs, ours := plant(t, k.Machine, "stock", stock), plant(t, k.Machine, "ours", planted)
	k.Must(t, "root", "nix-store --optimise; mkdir -p /etc/overkeep; echo 'personal name \"*\"' >/etc/overkeep/policy")
	theirDrv, theirOut := log(t, k.Machine, "stock")
	drv, out := log(t, k.Machine, "ours")
	theirs, ours = append(theirs, theirOut, theirDrv), append(ours, out, drv)
	for _, h := range []map[string]int{hits(t, k.Machine, "stock", theirs), hits(t, k.Machine, "ours", ours)} {
		t.Logf("planted: %v", h)
		for n, c := range h {
			if c == 0 {
				t.Fatalf("%s is not found where it is", n)
			}
		}
	}
	k.Must(t, "root", "nix-store --delete "+strings.Join(theirs, " ")+" >/dev/null 2>&1; rm /nix/var/log/nix/drvs/*/*stock*; sync; fstrim /")
	left := hits(t, k.Machine, "stock", theirs)
	t.Logf("nix-store --delete, rm of the log, sync, fstrim leave: %v", left)
	if left[canary("stock", "name")] == 0 {
		t.Error("nothing is left by stock means: this machine cannot tell")
	}

	// Each by itself; the derivation goes along with what it made.
	k.Write(t, "/run/list", strings.Join(ours[:len(ours)-1], "\n")+"\n")
	k.Must(t, "root", `while read -r p; do overkeep seal - --keep alice --yes --quiet <<<"$p" || { echo "exit $? for $p" >&2; exit 1; }; done </run/list; rm /run/list`)
	for n, c := range hits(t, k.Machine, "ours", ours) {
		t.Errorf("%d hits of %s", c, n)
		for _, o := range k.Find(t, n)[n][:1] {
			t.Errorf("%s: %s", n, k.Owner(o))
		}
	}
	if there := k.Must(t, "root", "ls -A /nix/store"); strings.Contains(there, "ours") || strings.Contains(there, "overkeep") {
		t.Errorf("still there: %s", there)
	}
	// All are whole where they are now.
	k.Write(t, "/run/list", strings.Join(ours, "\n")+"\n")
	k.Must(t, "root", "overkeep run alice --as-root -- bash -c 'xargs nix-store --check-validity </run/list; nix-store --verify --check-contents'; nix-store --verify --check-contents; rm /run/list")
	if got := k.Alice(t, "nix-store --read-log "+drv); !strings.Contains(got, "built") {
		t.Errorf("the log in the keep: %q", got)
	}
}
