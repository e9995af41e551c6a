package badinput

import (
	"fmt"
	"os"
	"path/filepath"
	"strconv"
	"strings"
	"testing"
)

// TestPlan: a plan that is not the one that was written for these stores is refused,
// and nothing moves.
func TestPlan(t *testing.T) {
	w := newWorld(t)
	w.add(t,
		tree{"pub-lib", "mkdir $out; echo lib >$out/lib", nil},
		tree{"secret-a", "mkdir $out; echo a >$out/f", []string{"pub-lib"}},
		tree{"secret-b", "mkdir $out; echo b >$out/f", []string{"secret-a"}},
		tree{"secret-c", "echo c >$out", nil},
		tree{"secret-held", "echo held >$out", nil},
		tree{"pub-app", "echo app >$out", []string{"secret-c"}},
	)
	w.Must(t, "alice", "nix-store --realise "+at("secret-b")+" --add-root ~/result >/dev/null", daemon)
	w.Must(t, "root", "nix-store --realise "+at("secret-held")+" --add-root /root/held >/dev/null", daemon)
	w.plan(t)
	good := w.Alice(t, "cat plan") + "\n"
	before := w.where(t)
	t.Run("edited", func(t *testing.T) { w.refused(t, edited(t, good)) })
	t.Run("truncated", func(t *testing.T) { w.refused(t, truncated(good)) })
	w.same(t, before)
	t.Run("elsewhere", func(t *testing.T) { w.elsewhere(t, good) })
	t.Run("no plan", func(t *testing.T) { w.noPlan(t) })
	w.same(t, before)
	t.Run("changed", func(t *testing.T) { w.changed(t) })
	w.same(t, before)

	// The one that was written does what it says, and once more does no harm.
	w.move(t, ok, "apply", planFile)
	w.home(t, "keep", "secret-a", "secret-b", "secret-c", "pub-app")
	w.home(t, "system", "secret-held", "pub-lib")
	w.says(t, ok, []string{"apply", planFile, "--keep", "alice", "--yes"})
	w.move(t, ok, "undo")
	w.same(t, before)
	w.sound(t)
}

// variant is a file in the place of a plan.
type variant struct{ name, text string }

// refused gives each variant to apply, which must say that it is no plan to carry out,
// and must not say what a plan does not tell. All of them in one go.
func (w *world) refused(t *testing.T, all []variant) {
	t.Helper()
	dir := filepath.Join(w.Root, "run", "variants")
	if err := os.MkdirAll(dir, 0o755); err != nil {
		t.Fatal(err)
	}
	for i, v := range all {
		if err := os.WriteFile(filepath.Join(dir, strconv.Itoa(i)), []byte(v.text), 0o644); err != nil {
			t.Fatal(err)
		}
	}
	out := w.Must(t, "root", fmt.Sprintf(`cd /run/variants
		for i in $(seq 0 %d); do
			code=0
			overkeep apply $i --keep alice --yes >$i.out 2>&1 || code=$?
			echo $i $code
		done`, len(all)-1))
	n := 0
	for line := range strings.Lines(out) {
		var i, code int
		if _, err := fmt.Sscan(line, &i, &code); err != nil {
			t.Fatalf("%q", line)
		}
		n++
		words := w.Read(t, fmt.Sprintf("/run/variants/%d.out", i))
		if code != badPlan || strings.Contains(words, "panic") || !strings.Contains(words, "plan") {
			t.Errorf("%s: exit code %d, want %d\n%s", all[i].name, code, badPlan, words)
		}
	}
	if n != len(all) {
		t.Errorf("%d of %d were tried", n, len(all))
	}
	t.Logf("%d plans refused", n)
	w.Must(t, "root", "rm -r /run/variants")
}

// edited are plans in which one thing is different, of each field and of their order.
func edited(t *testing.T, good string) (out []variant) {
	t.Helper()
	lines := strings.SplitAfter(strings.TrimSuffix(good, "\n"), "\n")
	find := func(kind string) int {
		for i, l := range lines {
			if strings.HasPrefix(l, `{"`+kind+`":`) {
				return i
			}
		}
		t.Fatalf("no %s in\n%s", kind, good)
		return 0
	}
	with := func(name string, i int, line ...string) {
		l := append([]string{}, lines[:i]...)
		out = append(out, variant{name, strings.Join(append(append(l, line...), lines[i+1:]...), "")})
	}
	swap := func(kind, old, new string) {
		t.Helper()
		i := find(kind)
		for ; i < len(lines); i++ {
			if strings.HasPrefix(lines[i], `{"`+kind+`":`) && strings.Contains(lines[i], old) {
				with(kind+": "+old+" to "+new, i, strings.Replace(lines[i], old, new, 1))
				return
			}
		}
		t.Fatalf("no %s with %q in\n%s", kind, old, good)
	}
	for _, v := range []string{"0", "2", "99", "-1", "18446744073709551616", "1.0", `"1"`, "null"} {
		swap("plan", `"version":1`, `"version":`+v)
	}
	swap("plan", `"machine":"`, `"machine":"0`)
	swap("plan", `"keep":"alice"`, `"keep":"bob"`)
	swap("plan", `"keep_id":"`, `"keep_id":"0`)
	swap("plan", `"policy":"`, `"policy":"0`)
	swap("plan", `"created":"2`, `"created":"1`)
	swap("plan", `{"plan":{`, `{"plan":{"also":1,`)
	swap("plan", `{"plan":{`, `{ "plan":{`)
	swap("reason", `"reason":"`, `"reason":"x`)
	swap("reason", "secret-*", "secret-?")
	swap("reason", `"row":`, `"row":1`)
	swap("move", `"kind":"seal"`, `"kind":"release"`)
	swap("move", `"kind":"seal"`, `"kind":"burn"`)
	swap("move", at("secret-a"), at("pub-lib"))
	swap("move", at("secret-a"), at("secret-held"))
	swap("move", at("secret-a"), "/etc/shadow")
	swap("move", at("secret-a"), "/nix/store/../../etc/shadow")
	swap("move", at("secret-a"), "secret-a")
	swap("move", `"nar_hash":"sha256:`, `"nar_hash":"sha256:0`)
	swap("move", `"nar_hash":"sha256:`, `"nar_hash":"md5:`)
	swap("move", `"nar_size":`, `"nar_size":1`)
	swap("move", `"nar_size":`, `"nar_size":-`)
	swap("move", `"unit":`, `"unit":7`)
	swap("move", `"reason":`, `"reason":9`)
	swap("move", `"reason":`, `"duplicate":true,"reason":`)
	swap("move", `"follows":"`, `"follows":"x`)
	swap("root", "/home/alice/result", "/home/alice/other")
	swap("root", `"to":"`, `"to":"../`)
	swap("root", `"auto":"`, `"auto":"../../`)
	swap("root", `"kind":"user"`, `"kind":"boot"`)
	swap("blocked", `"why":"other"`, `"why":"boot"`)
	swap("blocked", at("secret-held"), at("secret-c"))
	swap("residue", `"words":"`, `"words":"x`)
	swap("mac", `"mac":"`, `"mac":"0`)
	m, mac := find("move"), find("mac")
	sum := lines[mac]
	with("another code", mac, `{"mac":"`+strings.Repeat("0", 64)+`"}`+"\n")
	with("an upper case code", mac, `{"mac":"`+strings.ToUpper(strings.TrimSuffix(strings.TrimPrefix(sum, `{"mac":"`), "\"}\n"))+"\"}\n")
	with("a move less", m)
	with("a move twice", m, lines[m], lines[m])
	with("moves in another order", m, lines[m+1], lines[m])
	with("a line that is none", m, "\n", lines[m])
	with("a line of something else", m, `{"also":{}}`+"\n", lines[m])
	with("CRLF", m, strings.Replace(lines[m], "\n", "\r\n", 1))
	with("a very long line", m, `{"reason":{"reason":"`+strings.Repeat("x", 1<<20)+`"}}`+"\n", lines[m])
	out = append(out,
		variant{"something behind", good + "x"}, variant{"a line behind", good + "{}\n"}, variant{"twice", good + good},
		variant{"a byte order mark", "\xef\xbb\xbf" + good}, variant{"upper case", strings.ToUpper(good)},
		variant{"in an array", "[" + good + "]"}, variant{"deep", `{"plan":{"version":1,"machine":` + strings.Repeat("[", 100000)},
		variant{"zeros", strings.Repeat("\x00", 1<<20)}, variant{"a NUL in it", strings.Replace(good, "secret-", "secret\x00", 1)},
		variant{"not UTF-8", strings.Replace(good, "secret-", "secret\xff", 1)})
	return out
}

// truncated are plans that end too early: at every line, beside it, and here and there.
func truncated(good string) (out []variant) {
	cut := func(n int) { out = append(out, variant{fmt.Sprintf("%d of %d bytes", n, len(good)), good[:n]}) }
	for i, b := range []byte(good) {
		if b == '\n' && i < len(good)-1 {
			cut(i)
			cut(i + 1)
		}
	}
	for n := 0; n < len(good)-1; n += len(good)/24 + 1 {
		cut(n)
	}
	for n := len(good) - 1; n > len(good)-8; n-- {
		cut(n)
	}
	return out
}

// elsewhere: made on another machine, or for another keep.
func (w *world) elsewhere(t *testing.T, good string) {
	w.Must(t, "root", "mv /etc/machine-id /etc/machine-id.was; echo fedcba9876543210fedcba9876543210 >/etc/machine-id")
	w.says(t, badPlan, []string{"apply", planFile, "--keep", "alice", "--yes"}, "another machine")
	w.Must(t, "root", "rm /etc/machine-id")
	w.says(t, badPlan, []string{"apply", planFile, "--keep", "alice", "--yes"}, "another machine")
	w.Must(t, "root", "mv /etc/machine-id.was /etc/machine-id")

	// Bob makes one for his keep, of the same paths, and gives it to alice; and takes hers.
	w.MustOverkeep(t, 0, "bob's passphrase", "init", "--user", "bob", "--work-factor", "10", "--passphrase-fd", "0", "--recovery-out", "/run/bob", "--yes", "--size", "64M")
	w.MustOverkeep(t, 0, "bob's passphrase", "unlock", "bob", "--passphrase-fd", "0")
	w.exec(t, ok, "plan", "--keep", "bob", "--out", "/home/bob/keep/plan")
	w.Must(t, "root", "overkeep run bob -- cat /home/bob/keep/plan >/run/bobs; overkeep run alice -- cat "+planFile+" >/run/alices")
	w.says(t, badPlan, []string{"apply", "/run/bobs", "--keep", "alice", "--yes"}, "another keep")
	w.says(t, badPlan, []string{"apply", "/run/alices", "--keep", "bob", "--yes"}, "another keep")
	// With her keep's name and id on it, it is still not hers.
	header := strings.SplitAfter(good, "\n")[0]
	b := w.Read(t, "/run/bobs")
	w.refused(t, []variant{{"bob's moves under alice's header", header + strings.Join(strings.SplitAfter(b, "\n")[1:], "")}})
	w.MustOverkeep(t, 0, "", "lock", "bob", "--yes")
	w.MustOverkeep(t, 0, "bob's passphrase", "destroy", "bob", "--yes")
	w.Must(t, "root", "rm -f /run/bobs /run/alices")
}

// noPlan: files that are none.
func (w *world) noPlan(t *testing.T) {
	w.Must(t, "root", "mkfifo /run/pipe; mkdir -p /run/dir; : >/run/empty; ln -sfn /run/loop /run/loop")
	for file, code := range map[string]int{
		"/run/empty": badPlan, "/run/dir": badPlan, "/run/pipe": badPlan, "/dev/zero": badPlan, "/dev/null": badPlan,
		"/etc/shadow": badPlan, "/usr/bin/bash": badPlan, "/run/nowhere": usage,
	} {
		out := w.exec(t, code, "apply", file, "--keep", "alice", "--yes")
		if strings.Contains(out, "root:") {
			t.Errorf("%s: its contents are shown:\n%s", file, out)
		}
	}
	if r := w.Overkeep(t, "", "apply", "/run/loop", "--keep", "alice", "--yes"); r.Code == 0 || strings.Contains(r.Stderr, "panic") {
		t.Errorf("a link to itself: %+v", r)
	}
}

// changed: what a plan was made for is different when it is to be carried out. Each
// change is undone again.
func (w *world) changed(t *testing.T) {
	apply := []string{"apply", planFile, "--keep", "alice", "--yes"}
	for _, c := range []struct {
		name         string
		change, back func()
		want         []string
	}{
		{"a path vanished",
			func() { w.gone(t, "pub-app", "secret-c") },
			func() {
				w.add(t, tree{"secret-c", "echo c >$out", nil}, tree{"pub-app", "echo app >$out", []string{"secret-c"}})
			}, []string{at("pub-app"), "has not to move any more", "and 1 other difference"}},
		{"a path has other contents",
			func() { w.gone(t, "pub-app"); w.add(t, tree{"pub-app", "echo APP >$out", []string{"secret-c"}}) },
			func() { w.gone(t, "pub-app"); w.add(t, tree{"pub-app", "echo app >$out", []string{"secret-c"}}) },
			[]string{at("pub-app"), "is not what it was"}},
		{"a path more",
			func() { w.add(t, tree{"secret-new", "echo new >$out", nil}) },
			func() { w.gone(t, "secret-new") },
			[]string{at("secret-new"), "is not in it"}},
		{"somebody else refers to one now",
			func() { w.add(t, tree{"pub-more", "echo more >$out", []string{"secret-a"}}) },
			func() { w.gone(t, "pub-more") },
			[]string{at("pub-more"), "is not in it"}},
		{"a root of alice's is new",
			func() {
				w.Must(t, "alice", "nix-store --realise "+at("secret-a")+" --add-root ~/new >/dev/null", daemon)
			},
			func() { w.Must(t, "alice", "rm ~/new") },
			[]string{"/home/alice/new", "is new"}},
		{"a root of bob's is new",
			func() { w.Must(t, "bob", "nix-store --realise "+at("secret-c")+" --add-root ~/new >/dev/null", daemon) },
			func() { w.Must(t, "bob", "rm ~/new") },
			[]string{at("secret-c"), "has not to move any more"}},
		{"the policy wants something else",
			func() { w.Write(t, "/etc/overkeep/policy", policy+"personal name \"pub-lib\"\n") },
			func() { w.Write(t, "/etc/overkeep/policy", policy) },
			[]string{at("pub-lib"), "is not in it"}},
		{"the policy wants less",
			func() {
				w.Write(t, "/etc/overkeep/policy", "system name \"*\"\npersonal name \"secret-*\" and not name \"secret-b\"\n")
			},
			func() { w.Write(t, "/etc/overkeep/policy", policy) },
			nil}, // secret-b refers to secret-a: it is no different
	} {
		before := w.where(t)
		c.change()
		changed := w.where(t)
		if c.want != nil {
			w.says(t, badPlan, apply, c.want...)
			w.same(t, changed)
		} else {
			w.says(t, ok, append(apply, "--dry-run"))
		}
		c.back()
		w.same(t, before)
		if t.Failed() {
			t.Fatalf("at: %s", c.name)
		}
	}
}
