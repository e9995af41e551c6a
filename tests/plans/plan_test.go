// Package plans holds what `overkeep plan` says on a machine with a real Nix and an
// open keep: what would move, with which links, what is held and by what, and that a
// plan gets into no file outside of the keep.
package plans

import (
	"encoding/json"
	"fmt"
	"path"
	"slices"
	"strings"
	"testing"

	"overkeep/tests/bed"
	"overkeep/tests/fixture"
)

const policy = `system name "pub-*"
personal name "secret-*"
`

type report struct {
	Moves []struct {
		Kind, Path, Follows string
		Duplicate           bool
		Reason              struct{ Line string }
	}
	Roots   []struct{ Link, To string }
	Blocked []struct {
		Kind, Path, Why, By string
		Way                 []string
	}
	Residue []struct{ Code string }
}

func TestPlan(t *testing.T) {
	for _, backend := range []string{"image", "dir"} {
		t.Run(backend, func(t *testing.T) { onMachine(t, backend) })
	}
}

// name leaves of a store path what it was called.
func name(p string) string {
	if p = path.Base(p); len(p) > 33 {
		return p[33:]
	}
	return p
}

func onMachine(t *testing.T, backend string) {
	k := fixture.New(t, bed.Forky, "--backend="+backend)
	k.Must(t, "root", "mkdir -p /etc/overkeep")
	k.Write(t, "/etc/overkeep/policy", policy)
	expr := func(name string, refs ...string) string {
		var deps []string
		for _, r := range refs {
			deps = append(deps, fmt.Sprintf("(builtins.storePath %s)", r))
		}
		return fmt.Sprintf(`'derivation { name = "%s"; system = builtins.currentSystem; builder = "/bin/sh";
			args = [ "-c" "echo %s $refs > $out" ]; refs = [ %s ]; }'`, name, name, strings.Join(deps, " "))
	}
	// Outside of the view everything lands in the system store, as on any Nix before.
	outside := func(user, args, expr string) string {
		t.Helper()
		return strings.TrimSpace(k.Must(t, user, "cd ~ && nix-build -Q "+args+" -E "+expr+" 2>/dev/null", "NIX_REMOTE=daemon"))
	}
	lib := outside("root", "--no-out-link", expr("pub-lib"))
	secret := outside("alice", "-o result", expr("secret-data", lib))
	app := outside("alice", "--no-out-link", expr("pub-app", secret))
	deep := outside("root", "--no-out-link", expr("secret-deep"))
	held := outside("root", "-o /root/held", expr("secret-held", deep))
	boot := outside("root", "--no-out-link", expr("secret-boot"))
	k.Must(t, "root", "ln -s "+boot+" /run/current-system && ln -s /run/current-system /nix/var/nix/gcroots/current-system")
	used := outside("alice", "--no-out-link", expr("secret-used"))
	user, err := k.Start("alice", "exec 7<"+used+"; exec sleep 100000")
	if err != nil {
		t.Fatal(err)
	}
	defer user.Kill()
	k.Must(t, "root", "until ls -l /proc/*/fd/7 2>/dev/null | grep -q "+used+"; do :; done")

	if r := k.Overkeep(t, "", "plan", "--keep", "alice"); r.Code != 3 || !strings.Contains(r.Stderr, "unlock") || r.Stdout != "" {
		t.Errorf("locked: %+v", r)
	}
	k.Unlock(t)
	if r, err := k.Exec(bed.Command{User: "alice", Script: "exec overkeep plan"}); err != nil || r.Code != 10 {
		t.Errorf("as alice: %+v %v", r, err)
	}
	// Nobody has used the keep yet: its Nix has no database.
	if text := k.MustOverkeep(t, 0, "", "plan", "--keep", "alice"); !strings.Contains(text, "Seal ") || strings.Contains(text, "Release ") {
		t.Errorf("a fresh keep:\n%s", text)
	}
	inKeep := k.Alice(t, "nix-build -Q --no-out-link -E "+expr("pub-built")+" 2>/dev/null")
	k.Alice(t, "nix-build -Q --no-out-link -E "+expr("secret-mine", inKeep)+" 2>/dev/null")

	var r report
	if err := json.Unmarshal([]byte(k.MustOverkeep(t, 0, "", "plan", "--json")), &r); err != nil {
		t.Fatal(err)
	}
	var moves []string
	for _, m := range r.Moves {
		if strings.HasSuffix(m.Path, ".drv") {
			continue // those follow their outputs' names
		}
		s := m.Kind + " " + name(m.Path)
		if m.Follows != "" {
			s += " <" + name(m.Follows)
		}
		moves = append(moves, s)
	}
	if i, j := slices.Index(moves, "seal pub-app <secret-data"), slices.Index(moves, "seal secret-data"); i < 0 || i > j {
		t.Errorf("order: %q", moves)
	}
	slices.Sort(moves)
	if want := []string{"release pub-built", "seal pub-app <secret-data", "seal secret-data"}; !slices.Equal(moves, want) {
		t.Errorf("moves %q, want %q", moves, want)
	}
	if len(r.Roots) != 1 || r.Roots[0].Link != "/home/alice/result" || r.Roots[0].To != "home/work/links/home/alice/result" {
		t.Errorf("roots %+v", r.Roots)
	}
	var blocked []string
	for _, b := range r.Blocked {
		if !strings.HasSuffix(b.Path, ".drv") {
			by, _, _ := strings.Cut(b.By, " ") // "pid"
			var way []string
			for _, w := range b.Way {
				way = append(way, name(w))
			}
			blocked = append(blocked, fmt.Sprintf("%s %s %s: %s", name(b.Path), b.Why, by, strings.Join(way, ">")))
		}
	}
	slices.Sort(blocked)
	if want := []string{
		"secret-boot boot /run/current-system: secret-boot",
		"secret-deep other /root/held: secret-held>secret-deep",
		"secret-held other /root/held: secret-held",
		"secret-used process pid: secret-used",
	}; !slices.Equal(blocked, want) {
		t.Errorf("blocked\n%s\nwant\n%s", strings.Join(blocked, "\n"), strings.Join(want, "\n"))
	}
	if len(r.Residue) == 0 {
		t.Error("no residue is named")
	}
	_, _ = app, held

	text := k.MustOverkeep(t, 0, "", "plan", "--keep", "alice")
	t.Logf("\n%s", text)
	if n := strings.Count(text, "\n"); n > 40 {
		t.Errorf("%d lines are more than a screen", n)
	}
	for _, want := range []string{`personal name "secret-*"  (policy:2)`, "/home/alice/result -> work/links/home/alice/result", "/run/current-system", "overkeep apply"} {
		if !strings.Contains(text, want) {
			t.Errorf("no %q in\n%s", want, text)
		}
	}
	if all := k.MustOverkeep(t, 0, "", "plan", "--all"); !strings.Contains(all, secret) || !strings.Contains(all, deep) {
		t.Errorf("--all:\n%s", all)
	}
	t.Run("out", func(t *testing.T) { out(t, k, secret) })
}

// out: a plan is written into the keep as its user, and nowhere else.
func out(t *testing.T, k *fixture.Keep, secret string) {
	r := k.Overkeep(t, "", "plan", "--out", "/home/alice/keep/plan")
	if r.Code != 0 || !strings.Contains(r.Stdout, "apply /home/alice/keep/plan") {
		t.Fatalf("%+v", r)
	}
	if got := k.Alice(t, "stat -c '%U %a' plan; head -c 9 plan; grep -c "+secret+" plan"); !strings.HasPrefix(got, "alice 600\n{\"plan\":{") {
		t.Errorf("%s", got)
	}
	k.MustOverkeep(t, 0, "", "plan", "--out", "/home/alice/keep/plan") // again
	k.Must(t, "root", "test ! -e /home/alice/keep/plan")
	k.Must(t, "alice", "mkdir -p ~/out && mkdir -p ~/.config")
	k.Alice(t, "echo precious > notes; ln -s /home/alice/out link; ln -s /etc/passwd plan3; mkdir -p sub")
	for file, code := range map[string]int{
		"/home/alice/out/plan": 2, "/home/alice/keep/link/plan": 2, "/tmp/plan": 2, "/run/plan": 2, "/root/plan": 2, "/home/alice/.config/plan": 2,
		"/home/alice/keep/nowhere/plan": 2, "/home/alice/keep/notes": 9, "/home/alice/keep/plan3": 9,
		"/home/alice/keep/sub/plan": 0, "/home/alice/.cache/nix/plan": 0,
	} {
		r := k.Overkeep(t, "", "plan", "--out", file)
		if r.Code != code {
			t.Errorf("--out %s: %+v, want exit code %d", file, r, code)
		}
		if code == 2 && (r.Stdout != "" || !strings.Contains(r.Stderr, "/home/alice/keep/plan") && !strings.Contains(file, "nowhere") && !strings.Contains(file, "/root/")) {
			t.Errorf("--out %s: %+v", file, r)
		}
	}
	if got := k.Alice(t, "cat notes"); got != "precious" {
		t.Errorf("notes: %q", got)
	}
	k.Must(t, "root", "test ! -e /home/alice/out/plan && test ! -e /tmp/plan && test ! -e /run/plan && test ! -e /root/plan")
	if got := strings.TrimSpace(k.MustOverkeep(t, 0, "", "run", "alice", "--as-root", "--", "sh", "-c", "stat -c '%U %a %s' /run/overkeep/alice/k/journal/plan.key; ls -A /home/alice/keep")); !strings.HasPrefix(got, "root 600 32\n") || strings.Contains(got, ".overkeep-") {
		t.Errorf("%s", got)
	}
}
