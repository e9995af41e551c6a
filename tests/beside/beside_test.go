// Package beside proves on a real Nix that reading its database for the policy
// (overlay/facts) gives no error and no torn view while Nix adds and deletes, and
// that Nix never waits for us.
package beside

import (
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"strconv"
	"strings"
	"testing"
	"time"

	"overkeep/tests/bed"
	"overkeep/tests/need"
)

const reads = 10_000

// add and remove are what Nix does for a pair in a loop, through its daemon.
const churn = `
i=0
while [ ! -e /run/stop ]; do
	n=$((i % 8)); i=$((i + 1))
	left=$(sed -n $((n + 1))p /run/lefts); right=$(sed -n $((n + 1))p /run/rights)
	echo right-$n >"$right"; echo "left-$n $right" >"$left"
	nix-store --register-validity --reregister </run/reg-$n
	echo "$i" >/run/file-$n
	p=$(NIX_REMOTE=daemon nix-store --add /run/file-$n)
	# What the process of the last client has not let go of yet goes in a later round.
	NIX_REMOTE=daemon nix-store --delete "$p" "$left" "$right" >/dev/null 2>&1 || :
	echo $i >/run/rounds
done
`

func TestBesideNix(t *testing.T) {
	need.Root(t)
	need.Tool(t, "strace", "go")
	m := bed.Start(t, bed.Forky)
	daemon := m.SystemNix(t)

	bin := filepath.Join(t.TempDir(), "reader")
	out, err := exec.Command("go", "build", "-tags", "osusergo,netgo,sqlite_omit_load_extension",
		"-ldflags", "-s -w -linkmode external -extldflags -static", "-o", bin, "./reader").CombinedOutput()
	if err != nil {
		t.Fatalf("go build: %v\n%s", err, out)
	}
	program, err := os.ReadFile(bin)
	if err != nil {
		t.Fatal(err)
	}
	if err := os.WriteFile(m.Root+"/run/reader", program, 0o755); err != nil {
		t.Fatal(err)
	}

	// Store paths as they come from adding two files; the references are ours.
	var pairs, lefts, rights []string
	for n := range 8 {
		m.Write(t, fmt.Sprintf("/run/left-%d", n), fmt.Sprint("l", n))
		m.Write(t, fmt.Sprintf("/run/right-%d", n), fmt.Sprint("r", n))
		left := m.Must(t, "root", fmt.Sprintf("nix-store --add /run/left-%d", n))
		right := m.Must(t, "root", fmt.Sprintf("nix-store --add /run/right-%d", n))
		pairs, lefts, rights = append(pairs, left+"="+right), append(lefts, left), append(rights, right)
		m.Write(t, fmt.Sprintf("/run/reg-%d", n), right+"\n\n0\n"+left+"\n\n1\n"+right+"\n")
	}
	m.Must(t, "root", "nix-store --delete "+strings.Join(append(lefts, rights...), " "))
	m.Write(t, "/run/lefts", strings.Join(lefts, "\n")+"\n")
	m.Write(t, "/run/rights", strings.Join(rights, "\n")+"\n")

	// Nix waits for a lock of SQLite by sleeping (sqliteDefaultBusyCallback): a sleep of
	// the daemon or its children would be such a wait.
	trace := filepath.Join(t.TempDir(), "trace")
	strace := exec.Command("strace", "-f", "-qq", "-e", "trace=nanosleep,clock_nanosleep,openat", "-o", trace, "-p", strconv.Itoa(daemon.PID()))
	if err := strace.Start(); err != nil {
		t.Fatal(err)
	}
	stopTrace := func() { _ = strace.Process.Signal(os.Interrupt); _ = strace.Wait() }

	loop, err := m.Start("root", churn)
	if err != nil {
		t.Fatal(err)
	}
	r, err := m.Exec(bed.Command{Script: fmt.Sprintf("/run/reader %d /nix/var/nix/db/db.sqlite %s; touch /run/stop", reads, strings.Join(pairs, " ")), Within: 9 * time.Minute})
	m.Write(t, "/run/stop", "")
	if end, werr := loop.Wait(); werr != nil || end.Code != 0 {
		t.Errorf("the loop: %v, %d\n%s", werr, end.Code, end.Stdout)
	}
	stopTrace()
	if err != nil || r.Code != 0 {
		t.Fatalf("the reader: %v, %d\n%s%s", err, r.Code, r.Stdout, r.Stderr)
	}
	rounds, _ := strconv.Atoi(strings.TrimSpace(m.Read(t, "/run/rounds")))
	seen, _ := strconv.Atoi(strings.TrimSpace(r.Stdout))
	t.Logf("%d rounds of adding and deleting beside %d reads, which saw %d pairs", rounds, reads, seen)
	if rounds < 5 || seen < 20 {
		t.Errorf("nothing was tried: %d rounds, %d pairs seen", rounds, seen)
	}
	b, err := os.ReadFile(trace)
	if err != nil {
		t.Fatal(err)
	}
	if !strings.Contains(string(b), "db.sqlite") {
		t.Error("the trace does not show Nix opening its database")
	}
	for line := range strings.Lines(string(b)) {
		if strings.Contains(line, "nanosleep(") {
			t.Errorf("Nix slept: %s", line)
		}
	}
	m.Must(t, "root", "nix-store --verify")
}
