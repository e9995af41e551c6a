package badinput

import (
	"crypto/sha256"
	"encoding/json"
	"fmt"
	"slices"
	"strings"
	"testing"

	"overkeep/tests/bed"
	"overkeep/tests/fixture"
)

const (
	daemon   = "NIX_REMOTE=daemon"
	planFile = "/home/alice/keep/plan"
	upper    = "/run/overkeep/alice/k/store/upper"
	// What is called so is wanted in the keep.
	policy = "system name \"*\"\npersonal name \"secret-*\"\n"
)

// Exit codes of the manual.
const (
	ok           = 0
	usage        = 2
	locked       = 3
	notRoot      = 10
	noSpace      = 13
	inUse        = 14
	noPath       = 22
	badPlan      = 24
	left         = 25
	notPermitted = 26
	blocked      = 28
)

// world is a machine with alice's keep, unlocked.
type world struct{ *fixture.Keep }

func newWorld(t *testing.T, args ...string) *world {
	t.Helper()
	w := &world{fixture.New(t, bed.Forky, args...)}
	w.Must(t, "root", "mkdir -p /etc/overkeep; echo 0123456789abcdef0123456789abcdef >/etc/machine-id")
	w.Write(t, "/etc/overkeep/policy", policy)
	w.Unlock(t)
	return w
}

// tree is a path to be: a script makes it at $out.
type tree struct {
	name, script string
	refs         []string
}

// at is the store path of a name; the hash is nobody's but ours.
func at(name string) string {
	const alphabet = "0123456789abcdfghijklmnpqrsvwxyz"
	sum := sha256.Sum256([]byte(name))
	hash := make([]byte, 32)
	for i := range hash {
		hash[i] = alphabet[sum[i]%32]
	}
	return "/nix/store/" + string(hash) + "-" + name
}

// add puts trees into the system store: written by hand and registered, with the hashes
// that the real Nix finds. No derivation is needed, and whatever a file system can hold
// will do. References are names.
func (w *world) add(t *testing.T, trees ...tree) {
	t.Helper()
	var b, reg strings.Builder
	b.WriteString("umask 022\n")
	for _, x := range trees {
		b.WriteString("( out=" + at(x.name) + "\n" + x.script + "\n)\n")
		fmt.Fprintf(&reg, "%s\n\n%d\n", at(x.name), len(x.refs))
		for _, r := range x.refs {
			reg.WriteString(at(r) + "\n")
		}
	}
	b.WriteString("printf %s " + fixture.Quote(reg.String()) + " | nix-store --register-validity --reregister\n")
	w.Must(t, "root", b.String())
}

// gone takes paths away by the real Nix, outside of the view.
func (w *world) gone(t *testing.T, names ...string) {
	t.Helper()
	for i := range names {
		names[i] = at(names[i])
	}
	w.Must(t, "root", "nix-store --delete "+strings.Join(names, " ")+" >/dev/null 2>&1", daemon)
}

// exec runs a command as root and fails the test unless it ends with code; it returns
// both outputs.
func (w *world) exec(t *testing.T, code int, args ...string) string {
	t.Helper()
	r := w.Overkeep(t, "", args...)
	if r.Code != code {
		t.Errorf("overkeep %s: exit code %d, want %d\n%s%s", strings.Join(args, " "), r.Code, code, r.Stdout, r.Stderr)
	}
	return r.Stdout + r.Stderr
}

// says is exec, and its words must hold each of want.
func (w *world) says(t *testing.T, code int, args []string, want ...string) string {
	t.Helper()
	out := w.exec(t, code, args...)
	for _, x := range want {
		if !strings.Contains(out, x) {
			t.Errorf("overkeep %s: no %q in\n%s", strings.Join(args, " "), x, out)
		}
	}
	return out
}

// result is what a move says in JSON, whether or not all of it moved.
type result struct {
	Sealed, Released []string
	Left             []struct{ Path, Why, By string }
	Cleaned          *struct {
		Files struct{ Files, Shared int }
		Left  []string
	}
}

// why tells why a path was left; "" if it was not.
func (r *result) why(path string) string {
	for _, l := range r.Left {
		if l.Path == path {
			return l.Why
		}
	}
	return ""
}

// move runs a command that moves, which must end with code.
func (w *world) move(t *testing.T, code int, args ...string) *result {
	t.Helper()
	r := w.Overkeep(t, "", append(args, "--keep", "alice", "--yes", "--json")...)
	var m result
	if r.Code != code || json.Unmarshal([]byte(r.Stdout), &m) != nil {
		t.Errorf("overkeep %s: exit code %d, want %d\n%s%s", strings.Join(args, " "), r.Code, code, r.Stdout, r.Stderr)
	}
	if m.Cleaned != nil && len(m.Cleaned.Left) > 0 {
		t.Errorf("overkeep %s: not wiped: %q", strings.Join(args, " "), m.Cleaned.Left)
	}
	return &m
}

func (w *world) plan(t *testing.T) {
	t.Helper()
	w.exec(t, ok, "plan", "--keep", "alice", "--out", planFile)
}

// blockedBy is what plan says of a path that cannot move: why and by what; "" if it is
// not among those.
func (w *world) blockedBy(t *testing.T, path string) (why, by string) {
	t.Helper()
	var r struct {
		Blocked []struct{ Path, Why, By string }
	}
	out := w.MustOverkeep(t, 0, "", "plan", "--keep", "alice", "--json")
	if err := json.Unmarshal([]byte(out), &r); err != nil {
		t.Fatal(err)
	}
	for _, b := range r.Blocked {
		if b.Path == path {
			return b.Why, b.By
		}
	}
	return "", ""
}

// where is what lies where: names in both stores, rows, and what a move in between
// leaves behind.
func (w *world) where(t *testing.T) string {
	t.Helper()
	return w.Must(t, "root", `
		sqlite3 /nix/var/nix/db/db.sqlite "select 'system ' || path || ' ' || hash from ValidPaths order by path"
		find /nix/store -mindepth 1 -maxdepth 1 ! -name .links -printf 'lower %f\n' | sort
		overkeep run alice --as-root -- bash -euo pipefail -c '
			cd /run/overkeep/alice/k/store
			find upper -mindepth 1 -maxdepth 1 ! -name .links -printf "upper %f\n" | sort
			for d in incoming trash; do [ ! -e $d ] || echo left $d; done'`)
}

// same fails the test if anything lies elsewhere than it did.
func (w *world) same(t *testing.T, before string) {
	t.Helper()
	if now := w.where(t); now != before {
		t.Errorf("something has moved:\n%s", difference(before, now))
	}
}

func difference(a, b string) string {
	x, y := strings.Split(a, "\n"), strings.Split(b, "\n")
	var out []string
	for _, l := range x {
		if !slices.Contains(y, l) {
			out = append(out, "- "+l)
		}
	}
	for _, l := range y {
		if !slices.Contains(x, l) {
			out = append(out, "+ "+l)
		}
	}
	return strings.Join(out, "\n")
}

// home fails the test unless the paths are at home in the keep ("keep") or in the system
// store ("system"), and nowhere else.
func (w *world) home(t *testing.T, home string, names ...string) {
	t.Helper()
	all := w.where(t)
	for _, n := range names {
		p := at(n)
		name := strings.TrimPrefix(p, "/nix/store/")
		row, low, up := strings.Contains(all, "system "+p+" "), strings.Contains(all+"\n", "lower "+name+"\n"), strings.Contains(all+"\n", "upper "+name+"\n")
		if in := home == "system"; row != in || low != in || up == in {
			t.Errorf("%s: system row %v, lower %v, upper %v; want it in the %s", p, row, low, up, home)
		}
	}
}

// sound fails the test unless the real Nix finds both stores in order, and nothing is
// left of a move. What is known to be damaged is given.
func (w *world) sound(t *testing.T, damaged ...string) {
	t.Helper()
	out := w.Must(t, "root", `export NIX_REMOTE=daemon
		nix-store --verify --check-contents 2>&1 || :
		overkeep run alice --as-root -- env NIX_REMOTE=daemon nix-store --verify --check-contents 2>&1 || :
		find /nix/store -mindepth 1 -maxdepth 1 \( -name '.overkeep*' -o -name '*.lock' \) -printf 'left behind: %p\n'
		overkeep run alice --as-root -- bash -c 'cd /run/overkeep/alice/k/store; for d in incoming trash; do [ ! -e $d ] || echo left behind: $d; done'`)
	for line := range strings.Lines(out) {
		progress := slices.ContainsFunc([]string{"reading the Nix store", "checking path existence", "checking hashes", "checking store hashes",
			"checking link hashes", "warning: you don't have Internet", "waiting for the big"}, func(p string) bool { return strings.HasPrefix(line, p) })
		known := slices.ContainsFunc(damaged, func(p string) bool { return strings.Contains(line, p) })
		if !progress && !known && !strings.HasPrefix(line, "warning: not all store errors were fixed") {
			t.Errorf("after all: %s", line)
		}
	}
}
