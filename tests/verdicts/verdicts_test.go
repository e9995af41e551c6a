// Package verdicts proves on a real machine with a real Nix, old and new, what the
// commands about the policy say of a system store and a keep over it: verdicts,
// signatures, origins, from outside the view and from inside; and that reading
// never gets into the way of a Nix that writes (safety_test.go).
//
// One machine a version of Nix carries all of it. Do not look here for the engine's
// meaning (policy), nor for its front end's texts (cmd/overkeep).
package verdicts

import (
	"encoding/json"
	"fmt"
	"path"
	"strings"
	"testing"
	"time"

	"overkeep/tests/bed"
	"overkeep/tests/fixture"
)

const (
	daemon     = "NIX_REMOTE=daemon" // root outside, through the system's daemon
	policyFile = "/etc/overkeep/policy"
	ownPolicy  = "/run/overkeep/alice/k/policy/own.policy"
	secretKey  = "/run/secret-key"
	flakes     = "nix --extra-experimental-features 'nix-command flakes' "
)

// patience ends a wait for what never comes; nothing is measured by it.
const patience = 60 * time.Second

// world is a machine with public, leaked and private paths.
type world struct {
	*fixture.Keep
	key string // of the machine's cache, as a policy declares it

	// In the system store.
	lib, app  string // signed; app refers to lib
	leak      string // signed, and named acme
	plain     string // unsigned
	forged    string // signed by another key of the same name
	boot      string // what /run/current-system is, unsigned; refers to init
	init      string
	toolBuilt string

	// In alice's keep.
	payroll, report string // report refers to payroll
	tool            string // signed by nobody, granted by name; its package says unfree
}

func TestOnRealMachines(t *testing.T) {
	for _, suite := range bed.Suites {
		t.Run(string(suite), func(t *testing.T) {
			t.Parallel()
			w := &world{Keep: fixture.New(t, suite)}
			w.system(t)
			w.Unlock(t)
			w.private(t)
			for _, part := range []struct {
				name string
				f    func(*testing.T, *world)
			}{
				{"why", why},
				{"list", list},
				{"signatures", signatures},
				{"check", check},
				{"drop-in of the keep", dropIn},
				{"unsafe policy", unsafePolicy},
				{"origins by themselves", passive},
				{"origins when asked", active},
				{"safety", safety},
				{"locked", locked}, // late: it locks
				{"unlock --strict", strict},
			} {
				if !t.Run(part.name, func(t *testing.T) { part.f(t, w) }) {
					return // what follows builds on it
				}
			}
		})
	}
}

// build builds an expression in the system store.
func (w *world) build(t *testing.T, expr string) string {
	t.Helper()
	file := fmt.Sprintf("/run/expr-%d.nix", time.Now().UnixNano())
	w.Write(t, file, expr)
	return w.Must(t, "root", "nix-build --no-out-link "+file+" 2>/dev/null", daemon)
}

func echo(name, text string, deps ...string) string {
	return fixture.Derivation(name, `{ echo "`+text+`"; for d in $deps; do echo $d; done; } > $out`, deps...)
}

// system fills the system store and writes root's policy.
func (w *world) system(t *testing.T) {
	t.Helper()
	w.key = w.Must(t, "root", "nix-store --generate-binary-cache-key test-1 "+secretKey+" /run/public-key; "+
		"nix-store --generate-binary-cache-key test-1 /run/forged-key /run/forged-public; cat /run/public-key")
	w.lib = w.build(t, echo("lib", "public"))
	w.app = w.build(t, echo("app", "public", w.lib))
	w.leak = w.build(t, echo("notes-acme-1", "should not be here", w.lib))
	w.plain = w.build(t, echo("plain", "unsigned"))
	w.forged = w.build(t, echo("forged", "signed by somebody"))
	w.init = w.build(t, echo("init", "boots"))
	// As on NixOS /run/current-system is a link to a path that nobody signed. Its nix
	// is the first that is found: it tells how it was called.
	w.boot = w.build(t, fixture.Derivation("nixos-system", `read -r i < /dev/null || true
		/bin/sh -c : ; mkdir -p $out/sw/bin; for d in $deps; do echo $d > $out/init; done
		{ echo '#!/bin/bash'; echo '{ id -un; id -Gn; readlink /proc/self/ns/net; echo "$HOME $TMPDIR"; ps -o tty= -p $$; } >> /tmp/nix-was-run 2>&1'; echo 'exec /usr/bin/nix "$@"'; } > $out/sw/bin/nix
		chmod +x $out/sw/bin/nix`, w.init))
	w.Must(t, "root", "ln -s "+w.boot+" /run/current-system")
	w.Must(t, "root", flakes+"store sign --key-file "+secretKey+" "+strings.Join([]string{w.lib, w.app, w.leak}, " ")+" && "+
		flakes+"store sign --key-file /run/forged-key "+w.forged, daemon)
	w.Must(t, "root", "mkdir -p /etc/overkeep; chmod 755 /etc/overkeep")
	w.policy(t, "")
}

// policy writes root's policy, with further lines.
func (w *world) policy(t *testing.T, more string) {
	t.Helper()
	w.Write(t, policyFile, "key "+w.key+`
let boot = closure-of /run/current-system
system   signed-by test-1
system   boot
system   name "tool"
personal name "*-acme-*"
personal unfree when known
require  system boot
`+more)
}

// private fills the keep.
func (w *world) private(t *testing.T) {
	t.Helper()
	build := func(expr, link string) string {
		file := fmt.Sprintf("/run/expr-%d.nix", time.Now().UnixNano())
		w.Write(t, file, expr)
		return w.Alice(t, "nix-build -o "+link+" "+file+" 2>/dev/null")
	}
	w.payroll = build(echo("payroll", "private", w.app), "result")
	w.report = build(echo("report", "private", w.payroll), "report")
}

// verdict is a path in the JSON of why.
type verdict struct {
	Path, Placement, Reason string
	Lies                    []string `json:"lies_in"`
	Lines                   []struct {
		Sign, Line, File string
		Row              int
	}
	Chain []struct{ Path string }
}

type whyAnswer struct {
	Keep, Only string
	Paths      []verdict
}

// ask runs overkeep with --json and decodes what it answers.
func (w *world) ask(t *testing.T, to any, args ...string) {
	t.Helper()
	decode(t, w.MustOverkeep(t, 0, "", append(args, "--json")...), to)
}

func decode(t *testing.T, out string, to any) {
	t.Helper()
	if err := json.Unmarshal([]byte(out), to); err != nil {
		t.Fatalf("%v\n%s", err, out)
	}
}

// is fails the test unless v is as told; line is that of the policy which decides.
func (v *verdict) is(t *testing.T, placement, reason, lies, line string) {
	t.Helper()
	first := ""
	if len(v.Lines) > 0 {
		first = fmt.Sprintf("%s %s (%s:%d)", v.Lines[0].Sign, v.Lines[0].Line, path.Base(v.Lines[0].File), v.Lines[0].Row)
	}
	if v.Placement != placement || v.Reason != reason || strings.Join(v.Lies, " ") != lies || !strings.Contains(first, line) {
		t.Errorf("%s: %s (%s), lies in %s, by %q; want %s (%s), %s, %q", v.Path, v.Placement, v.Reason, v.Lies, first, placement, reason, lies, line)
	}
}

// why from outside as root and from inside as alice, by every kind of name.
func why(t *testing.T, w *world) {
	want := map[string][4]string{
		w.lib:     {"system", "granted", "system", "+ system signed-by test-1 (policy:3)"},
		w.app:     {"system", "granted", "system", "+ system signed-by test-1 (policy:3)"},
		w.leak:    {"personal", "vetoed", "system", `- personal name "*-acme-*" (policy:6)`},
		w.plain:   {"personal", "not-granted", "system", ""},
		w.forged:  {"personal", "not-granted", "system", ""},
		w.boot:    {"system", "granted", "system", "+ system boot (policy:4)"},
		w.init:    {"system", "granted", "system", "+ system boot (policy:4)"},
		w.payroll: {"personal", "not-granted", "personal", ""},
		w.report:  {"personal", "not-granted", "personal", ""},
	}
	var paths []string
	for p := range want {
		paths = append(paths, p)
	}
	judge := func(where string, a whyAnswer) {
		t.Helper()
		if a.Keep != "alice" || a.Only != "" || len(a.Paths) != len(want) {
			t.Errorf("%s: %+v", where, a)
		}
		for _, v := range a.Paths {
			x := want[v.Path]
			v.is(t, x[0], x[1], x[2], x[3])
		}
	}
	var out, in whyAnswer
	w.ask(t, &out, append([]string{"why", "--keep", "alice"}, paths...)...)
	judge("root, outside", out)
	decode(t, w.Alice(t, "overkeep why --json "+strings.Join(paths, " ")), &in)
	judge("alice, inside", in)

	for _, word := range []string{"payroll", path.Base(w.payroll), path.Base(w.payroll)[:32], w.payroll + "/x", "/home/alice/keep/result", "payr*"} {
		var a whyAnswer
		w.ask(t, &a, "why", "--keep", "alice", word)
		if len(a.Paths) == 0 || a.Paths[len(a.Paths)-1].Path != w.payroll && a.Paths[0].Path != w.payroll {
			t.Errorf("why %s: %+v", word, a)
		}
	}
	var a whyAnswer
	decode(t, w.Alice(t, "overkeep why --json ./result"), &a)
	if len(a.Paths) != 1 || a.Paths[0].Path != w.payroll {
		t.Errorf("why ./result: %+v", a)
	}
	w.MustOverkeep(t, 22, "", "why", "--keep", "alice", "no-such-name")
}

// listed is the part of list --json that is looked at.
type listed map[string]struct {
	Placement, Reason string
	Lies              []string `json:"lies_in"`
}

func (l listed) names() string {
	var out []string
	for p := range l {
		out = append(out, path.Base(p)[33:])
	}
	return strings.Join(out, " ")
}

func list(t *testing.T, w *world) {
	var l listed
	w.ask(t, &l, "list", "--keep", "alice", "--misplaced", "--where", `not kind derivation`)
	for p, lies := range map[string]string{w.leak: "system", w.plain: "system", w.forged: "system"} {
		if x, ok := l[p]; !ok || x.Placement != "personal" || strings.Join(x.Lies, " ") != lies {
			t.Errorf("misplaced: %s: %+v", p, x)
		}
	}
	for _, p := range []string{w.lib, w.boot, w.payroll} {
		if _, ok := l[p]; ok {
			t.Errorf("misplaced: %s", p)
		}
	}
	w.ask(t, &l, "list", "--keep", "alice")
	for p, lies := range map[string]string{w.lib: "system", w.payroll: "personal", w.report: "personal", w.app: "system"} {
		if x := l[p]; strings.Join(x.Lies, " ") != lies {
			t.Errorf("%s lies in %s", p, x.Lies)
		}
	}
}

// checked is the part of policy check --json that is looked at.
type checked struct {
	Broken []struct {
		Line  string
		Row   int
		Paths []string
	}
	Signatures struct{ Verified, Remembered, Bad int }
	Notes      []string
}

// A signature is verified once, and remembered inside the keep. A forged one is bad
// each time: nothing is remembered of it.
func signatures(t *testing.T, w *world) {
	w.MustOverkeep(t, 0, "", "run", "alice", "--as-root", "--", "rm", "-f", "/run/overkeep/alice/k/facts/signatures")
	var first, second checked
	w.ask(t, &first, "policy", "check", "--keep", "alice")
	w.ask(t, &second, "policy", "check", "--keep", "alice")
	// Two of the three paths have a row in the keep's database, too, with the signature.
	if s := first.Signatures; s.Verified != 3 || s.Remembered != 2 || s.Bad != 1 || len(first.Notes) != 0 {
		t.Errorf("at first: %+v", first)
	}
	if s := second.Signatures; s.Verified != 0 || s.Remembered != 5 || s.Bad != 1 || len(second.Notes) != 0 {
		t.Errorf("then: %+v", second)
	}
	// A key of the same name and another value makes nothing of it count.
	var other checked
	w.Write(t, "/run/other-policy", "key "+strings.TrimSpace(w.Read(t, "/run/forged-public"))+"\nsystem signed-by test-1\n")
	w.ask(t, &other, "policy", "check", "--keep", "alice", "--policy", "/run/other-policy")
	if s := other.Signatures; s.Verified != 1 || s.Remembered != 0 || s.Bad != 5 {
		t.Errorf("with the other key: %+v", s)
	}
}

// What the machine boots from has to stay public.
func check(t *testing.T, w *world) {
	w.policy(t, "personal name \"init\"\n")
	var c checked
	decode(t, w.MustOverkeep(t, 20, "", "policy", "check", "--keep", "alice", "--json"), &c)
	if len(c.Broken) != 1 || !strings.Contains(c.Broken[0].Line, "require system boot") || c.Broken[0].Row != 8 ||
		!strings.Contains(strings.Join(c.Broken[0].Paths, " "), w.init) || !strings.Contains(strings.Join(c.Broken[0].Paths, " "), w.boot) {
		t.Errorf("%+v", c)
	}
	w.policy(t, "")
	w.MustOverkeep(t, 0, "", "policy", "check", "--keep", "alice")
}

// asRoot runs a script as root in the view.
func (w *world) asRoot(t *testing.T, script string) string {
	t.Helper()
	return w.MustOverkeep(t, 0, "", "run", "alice", "--as-root", "--", "bash", "-euo", "pipefail", "-c", script)
}

// A drop-in inside the keep vetoes, and does not grant.
func dropIn(t *testing.T, w *world) {
	own := func(text string) {
		w.asRoot(t, "printf %s "+fixture.Quote(text)+" > "+ownPolicy)
	}
	own("personal name \"lib\"\n")
	for _, p := range []struct{ path, reason, line string }{{w.lib, "vetoed", `- personal name "lib" (own.policy:1)`}, {w.app, "reference", "+ system signed-by test-1"}} {
		var a whyAnswer
		w.ask(t, &a, "why", "--keep", "alice", p.path)
		a.Paths[0].is(t, "personal", p.reason, "system", p.line)
	}
	var without whyAnswer
	if decode(t, w.Must(t, "bob", "overkeep why --json "+w.lib), &without); without.Paths[0].Placement != "system" {
		t.Errorf("alice's drop-in counts for bob: %+v", without)
	}
	own("# mine\nsystem name \"payroll\"\n")
	r := w.Overkeep(t, "", "why", "--keep", "alice", w.payroll)
	if r.Code != 19 || !strings.Contains(r.Stderr, ownPolicy+":2:1") {
		t.Errorf("a drop-in that grants: %+v", r)
	}
	w.asRoot(t, "rm "+ownPolicy)
}

// Root's policy grants, so only root may have written it.
func unsafePolicy(t *testing.T, w *world) {
	for _, s := range []string{"chmod 0666 " + policyFile, "chmod 0664 " + policyFile, "chown alice " + policyFile} {
		w.Must(t, "root", s)
		r := w.Overkeep(t, "", "why", "--keep", "alice", w.lib)
		if r.Code != 19 || !strings.Contains(r.Stderr, policyFile) || !strings.Contains(r.Stderr, "written by others") {
			t.Errorf("%s: %+v", s, r)
		}
		w.Must(t, "root", "chown root "+policyFile+"; chmod 0644 "+policyFile)
	}
	w.MustOverkeep(t, 0, "", "why", "--keep", "alice", w.lib)
}

// With the keep locked there is the system store alone, and the answer says so.
func locked(t *testing.T, w *world) {
	w.Lock(t)
	r, err := w.Exec(bed.Command{Script: "exec overkeep why --json " + w.lib, Env: []string{"SUDO_USER=alice"}})
	if err != nil || r.Code != 0 {
		t.Fatalf("%v %+v", err, r)
	}
	var a whyAnswer
	decode(t, r.Stdout, &a)
	if a.Keep != "" || !strings.Contains(a.Only, "alice is locked") || len(a.Paths) != 1 || a.Paths[0].Placement != "system" {
		t.Errorf("%+v", a)
	}
	w.MustOverkeep(t, 22, "", "why", w.payroll)
	// By name the keep has to be open.
	for _, args := range [][]string{{"why", "--keep", "alice", w.lib}, {"list", "--keep", "alice"}, {"origin", "list", "--keep", "alice"}, {"origin", "record", "--keep", "alice"}} {
		w.MustOverkeep(t, 3, "", args...)
	}
	if out, err := w.Run("root", "find /run/overkeep/alice/k -mindepth 1"); err == nil && out != "" {
		t.Errorf("beneath the view lies %s", out)
	}
}

// unlock --strict opens the keep only if every requirement holds.
func strict(t *testing.T, w *world) {
	open := func() bed.Result {
		return w.Overkeep(t, fixture.Passphrase, "unlock", "alice", "--strict", "--passphrase-fd", "0")
	}
	for _, bad := range []struct {
		line, says string
		code       int
	}{{"personal name \"init\"\n", "require system boot (policy:8)", 20}, {"sytem boot\n", policyFile + ":9:1", 19}} {
		w.policy(t, bad.line)
		if r := open(); r.Code != bad.code || !strings.Contains(r.Stderr, bad.says) || !strings.Contains(r.Stderr, "locked again") {
			t.Errorf("%q: %+v", bad.line, r)
		}
		w.policy(t, "")
		w.MustOverkeep(t, 3, "", "list", "--keep", "alice")
	}
	if r := open(); r.Code != 0 {
		t.Errorf("%+v", r)
	}
	w.MustOverkeep(t, 0, "", "why", "--keep", "alice", w.payroll)
	w.Lock(t)
}
