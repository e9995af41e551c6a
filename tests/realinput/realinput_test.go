package realinput

import (
	"encoding/json"
	"fmt"
	"maps"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"
	"time"

	"overkeep/tests/bed"
	"overkeep/tests/fixture"
)

const (
	keepDir  = "/run/overkeep/alice/k"
	planFile = "/home/alice/keep/plan"
)

// report is what plan says in JSON.
type report struct {
	Moves []struct {
		Kind, Path string
		Size       int64 `json:"nar_size"`
	}
	Roots   []struct{ Link, To string }
	Blocked []struct{ Kind, Path, Why, By string }
}

// moved is what apply says.
type moved struct {
	Sealed, Released []string
	Bytes            int64
	Left             []struct{ Path, Why, By string }
	Roots            []struct {
		From, To string
		Back     bool
	}
	Cleaned *struct{ Left []string }
}

// world is the machine with everything that stays the same from policy to policy.
type world struct {
	*fixture.Keep
	*store
	all  map[string]string // every row as it was at first
	held map[string]bool   // what roots hold that do not move along
}

// state is where everything lies.
type state struct {
	system, keep map[string]string // row by path; of the keep those whose files it has
	left         []string          // what must not be there between two commands
}

// stateScript prints rows and names of both stores.
const stateScript = `
	export NIX_REMOTE=daemon
	rows="select v.path, hash, narSize, ifnull(ultimate, 0), ifnull(sigs, ''), ifnull(ca, ''), ifnull(deriver, ''),
		(select group_concat(w.path, ' ') from Refs r join ValidPaths w on w.id = r.reference where r.referrer = v.id) from ValidPaths v"
	sqlite3 -separator '|' /nix/var/nix/db/db.sqlite "$rows" | sed 's/^/system /'
	find /nix/store -mindepth 1 -maxdepth 1 ! -name .links -printf 'lower /nix/store/%f\n'
	overkeep run alice --as-root -- bash -eu -c '
		cd ` + keepDir + `
		sqlite3 -separator "|" nix/db/db.sqlite "$1" | sed "s/^/keep /"
		find store/upper -mindepth 1 -maxdepth 1 ! -name .links -printf "upper /nix/store/%f\n"
		for d in incoming trash; do [ ! -e store/$d ] || echo left $d; done' - "$rows"`

// look finds out where everything lies.
func (w *world) look(t *testing.T) *state {
	t.Helper()
	s := &state{system: map[string]string{}, keep: map[string]string{}}
	keep, lower, upper := map[string]string{}, map[string]bool{}, map[string]bool{}
	r, err := w.Exec(bed.Command{Script: stateScript})
	if err != nil || r.Code != 0 {
		t.Fatalf("state: %v %d %s", err, r.Code, r.Stderr)
	}
	for line := range strings.Lines(r.Stdout) {
		kind, rest, _ := strings.Cut(strings.TrimSuffix(line, "\n"), " ")
		p, row, _ := strings.Cut(rest, "|")
		switch kind {
		case "system":
			s.system[p] = inOrder(row)
		case "keep":
			keep[p] = inOrder(row)
		case "lower":
			lower[p] = true
		case "upper":
			upper[p] = true
		default:
			s.left = append(s.left, line)
		}
	}
	for p := range upper {
		if row, ok := keep[p]; ok {
			s.keep[p] = row
		} else {
			s.left = append(s.left, p+" lies in the keep without a row")
		}
	}
	for p := range lower {
		if _, ok := s.system[p]; !ok {
			s.left = append(s.left, p+" lies in the system store without a row")
		}
	}
	for p := range s.system {
		if !lower[p] {
			s.left = append(s.left, p+" has a row and no files")
		}
	}
	return s
}

// inOrder sorts the references in a row: SQLite gives them in any order.
func inOrder(row string) string {
	at := strings.LastIndexByte(row, '|') + 1
	refs := strings.Fields(row[at:])
	slices.Sort(refs)
	return row[:at] + strings.Join(refs, " ")
}

// sound fails the test unless every path that there ever was is valid in one place, with
// the row that it had, and nothing is left of how it came there.
func (w *world) sound(t *testing.T, s *state) {
	t.Helper()
	for _, l := range s.left {
		t.Errorf("left behind: %s", l)
	}
	for p, row := range w.all {
		sys, in := s.system[p]
		own, up := s.keep[p]
		switch {
		case in == up:
			t.Errorf("%s: valid in the system store %v, in the keep %v", p, in, up)
		case sys+own != row:
			t.Errorf("%s: its row is\n%s\nand was\n%s", p, sys+own, row)
		}
	}
	if n := len(s.system) + len(s.keep); n != len(w.all) {
		t.Errorf("%d paths, and there were %d", n, len(w.all))
	}
	for p := range s.system {
		for _, ref := range w.byPath[p].refs {
			if _, ok := s.system[ref]; !ok {
				t.Errorf("%s in the system store refers to %s, which is not there", p, ref)
			}
		}
	}
}

// verify has the real Nix check both stores by contents.
func (w *world) verify(t *testing.T) {
	t.Helper()
	out := w.Must(t, "root", `export NIX_REMOTE=daemon
		nix-store --verify --check-contents 2>&1
		overkeep run alice --as-root -- env NIX_REMOTE=daemon nix-store --verify --check-contents 2>&1`)
	for line := range strings.Lines(out) {
		if !slices.ContainsFunc([]string{"reading the Nix store", "checking path existence", "checking hashes", "checking store hashes",
			"checking link hashes", "warning: you don't have Internet", "waiting for the big"}, func(p string) bool { return strings.HasPrefix(line, p) }) {
			t.Errorf("nix-store --verify: %s", line)
		}
	}
}

// personal is what a policy wants in the keep, by its own words: what is not granted,
// and all that refers to it.
func (w *world) personal(granted func(p *path) bool) map[string]bool {
	out := map[string]bool{}
	for changed := true; changed; {
		changed = false
		for i := range w.paths {
			p := &w.paths[i]
			if !out[p.path] && (!granted(p) || slices.ContainsFunc(p.refs, func(r string) bool { return out[r] })) {
				out[p.path], changed = true, true
			}
		}
	}
	return out
}

// by applies a policy and sees that each path lies where it belongs, save what a root
// holds, and that the plan has named exactly these.
func (w *world) by(t *testing.T, name, policy string, granted func(p *path) bool) (r report, m moved) {
	t.Helper()
	w.Must(t, "root", "mkdir -p /etc/overkeep")
	w.Write(t, "/etc/overkeep/policy", policy)
	before := w.look(t)
	start := time.Now()
	w.plan(t, &r)
	w.MustOverkeep(t, 0, "", "plan", "--keep", "alice", "--out", planFile)
	planned := time.Since(start)
	start = time.Now()
	w.read(t, &m, "apply", planFile, "--keep", "alice", "--yes", "--json")
	applied := time.Since(start)
	if len(m.Left) > 0 {
		t.Errorf("left: %v", m.Left)
	}
	if m.Cleaned != nil && len(m.Cleaned.Left) > 0 {
		t.Errorf("not wiped: %q", m.Cleaned.Left)
	}
	start = time.Now()
	s := w.look(t)
	w.sound(t, s)
	personal := w.personal(granted)
	blocked := map[string]bool{}
	for _, b := range r.Blocked {
		if blocked[b.Path] = true; b.Kind != "seal" || !w.held[b.Path] {
			t.Errorf("%s %s is blocked by %s %s; no root holds it", b.Kind, b.Path, b.Why, b.By)
		}
	}
	seals, releases, bytes := map[string]bool{}, map[string]bool{}, int64(0)
	for _, x := range r.Moves {
		bytes += x.Size
		if x.Kind == "seal" {
			seals[x.Path] = true
		} else {
			releases[x.Path] = true
		}
	}
	for p := range w.all {
		_, was := before.keep[p]
		_, is := s.keep[p]
		want := personal[p] && (was || !w.held[p])
		switch {
		case is != want:
			t.Errorf("%s: in the keep %v, want %v", p, is, want)
		case seals[p] != (is && !was), releases[p] != (was && !is):
			t.Errorf("%s: was in the keep %v, is %v; the plan says seal %v, release %v", p, was, is, seals[p], releases[p])
		case blocked[p] != (personal[p] && !is):
			t.Errorf("%s: belongs into the keep %v, is there %v; the plan says blocked %v", p, personal[p], is, blocked[p])
		}
	}
	if len(m.Sealed) != len(seals) || len(m.Released) != len(releases) || m.Bytes != bytes {
		t.Errorf("apply says %d sealed, %d released, %d bytes; the plan said %d, %d, %d",
			len(m.Sealed), len(m.Released), m.Bytes, len(seals), len(releases), bytes)
	}
	var again report
	w.plan(t, &again)
	if len(again.Moves) > 0 || len(again.Blocked) != len(r.Blocked) {
		t.Errorf("the next plan: %d moves, %d blocked, and %d were", len(again.Moves), len(again.Blocked), len(r.Blocked))
	}
	w.verify(t)
	t.Logf("%s: %d sealed, %d released, %d blocked, %d MB; plan (twice) %.1f s, apply %.1f s, checked in %.1f s", name,
		len(m.Sealed), len(m.Released), len(r.Blocked), bytes>>20, planned.Seconds(), applied.Seconds(), time.Since(start).Seconds())
	return r, m
}

// plan reads what plan says in JSON.
func (w *world) plan(t *testing.T, r *report) {
	t.Helper()
	w.read(t, r, "plan", "--keep", "alice", "--json")
}

// read reads what a command says in JSON.
func (w *world) read(t *testing.T, to any, args ...string) {
	t.Helper()
	if err := json.Unmarshal([]byte(w.MustOverkeep(t, 0, "", args...)), to); err != nil {
		t.Fatalf("overkeep %q: %v", args, err)
	}
}

// back undoes the last operation and sees that everything is as it was before.
func (w *world) back(t *testing.T, before *state) (m moved) {
	t.Helper()
	start := time.Now()
	w.read(t, &m, "undo", "--keep", "alice", "--yes", "--json")
	if len(m.Left) > 0 {
		t.Errorf("undo left: %v", m.Left)
	}
	took := time.Since(start)
	s := w.look(t)
	w.sound(t, s)
	if !maps.Equal(s.system, before.system) || !maps.Equal(s.keep, before.keep) {
		t.Errorf("undo: %d paths in the system store and %d in the keep, and there were %d and %d",
			len(s.system), len(s.keep), len(before.system), len(before.keep))
	}
	w.verify(t)
	t.Logf("undo: %d sealed, %d released, %d MB, %.1f s", len(m.Sealed), len(m.Released), m.Bytes>>20, took.Seconds())
	return m
}

func TestPoliciesInTurn(t *testing.T) {
	start := time.Now()
	// In memory, where there is room: tens of thousands of files are made and unmade.
	k := &fixture.Keep{Machine: bed.StartInMemory(t, bed.Forky)}
	k.Install(t, bed.Binary(t))
	k.SystemNix(t)
	w := &world{Keep: k, store: build(t, k), all: map[string]string{}}
	k.Init(t, "--size", "900M")
	w.roots(t)
	k.Unlock(t)
	k.Alice(t, "nix-store -q --hash "+w.boot) // the keep's Nix has a database
	first := w.look(t)
	if len(first.keep) > 0 || len(first.left) > 0 || len(first.system) != len(w.paths) {
		t.Fatalf("at first %d of %d paths in the system store, %d in the keep, %q", len(first.system), len(w.paths), len(first.keep), first.left)
	}
	w.all = first.system
	refs, bytes := 0, strings.TrimSpace(k.Must(t, "root", "du -sm /nix/store | cut -f1"))
	for _, p := range w.paths {
		refs += len(p.refs)
	}
	if len(w.paths) < 2000 {
		t.Errorf("only %d paths", len(w.paths))
	}
	t.Logf("%d paths, %d references, %d files, %s MB; made in %.0f s", len(w.paths), refs, files(k.Root), bytes, time.Since(start).Seconds())

	boot := w.closure(w.boot)
	inBoot := func(p *path) bool { return boot[p.path] }

	// An old installation becomes a split one: what runs stays.
	r, m := w.by(t, "migration", "let boot = closure-of /run/current-system\nsystem boot\nrequire system boot\n", inBoot)
	w.migrated(t, r, m)

	w.by(t, "by name", "let boot = closure-of /run/current-system\nsystem boot\nsystem name \"lib*\"\nsystem name \"perl-*\"\n", func(p *path) bool {
		return boot[p.path] || strings.HasPrefix(p.name, "lib") || strings.HasPrefix(p.name, "perl-")
	})

	eslint := w.closure(w.main["eslint"])
	w.by(t, "by closure", "system closure-of /run/current-system\nsystem closure-of "+w.main["eslint"]+"\nsystem kind output and larger-than 4M\n", func(p *path) bool {
		return boot[p.path] || eslint[p.path] || w.size(p) > 4<<20
	})

	w.by(t, "a student's", w.student(t), func(p *path) bool {
		return w.signed(p.name) && !strings.HasPrefix(p.name, "thesis-")
	})
	before4 := w.look(t)

	moose := w.dependents(w.main["libmoose-perl"])
	w.by(t, "what depends on something", "system name \"*\"\npersonal depends-on (name \""+w.byPath[w.main["libmoose-perl"]].name+"\")\npersonal built-here\n", func(p *path) bool {
		return !moose[p.path] && w.signed(p.name)
	})
	before5 := w.look(t)

	all := func(*path) bool { return true }
	w.by(t, "all public", "system name \"*\"\n", all)
	if s := w.look(t); len(s.keep) > 0 {
		t.Errorf("%d paths are in the keep, and nothing is personal", len(s.keep))
	}

	w.back(t, before5)
	w.back(t, before4)
	w.by(t, "all public again", "system name \"*\"\n", all)
	if s := w.look(t); !maps.Equal(s.system, w.all) {
		t.Error("after all that the system store is not what it was")
	}
	w.Lock(t)
	t.Logf("all in %.0f s", time.Since(start).Seconds())
}

// roots makes those of an installation of long ago: the running system and its
// profile, a user's profile and results, another user's.
func (w *world) roots(t *testing.T) {
	t.Helper()
	m := w.main
	w.Must(t, "root", `
		nix-env -p /nix/var/nix/profiles/system --set `+w.boot+`
		ln -s /nix/var/nix/profiles/system /run/booted-system
		ln -s `+w.boot+` /run/current-system
		ln -s /run/current-system /run/booted-system /nix/var/nix/gcroots/`)
	w.Must(t, "alice", `
		mkdir -p ~/.local/state/nix/profiles ~/src/deep
		nix-env -p ~/.local/state/nix/profiles/profile --set `+m["acme-env"]+`
		nix-store --realise `+m["thesis-2026"]+` --add-root ~/result >/dev/null
		nix-store --realise `+m["libcatalyst-perl"]+` --add-root ~/src/deep/result >/dev/null`, "NIX_REMOTE=daemon")
	w.Must(t, "bob", `nix-store --realise `+m["node-semver"]+` --add-root ~/result >/dev/null`, "NIX_REMOTE=daemon")
	w.held = w.closure(w.boot, m["node-semver"])
}

// migrated looks at what a migration has to leave alone, and at what it has to take along.
func (w *world) migrated(t *testing.T, r report, m moved) {
	t.Helper()
	if len(m.Sealed) < len(w.paths)/2 || len(m.Released) > 0 {
		t.Errorf("%d sealed, %d released", len(m.Sealed), len(m.Released))
	}
	if !slices.ContainsFunc(r.Blocked, func(b struct{ Kind, Path, Why, By string }) bool {
		return b.Path == w.main["node-semver"] && b.Why == "other" && strings.HasPrefix(b.By, "/home/bob/result")
	}) {
		t.Errorf("bob's root is not named: %v", r.Blocked)
	}
	// Outside: the system runs, bob has his, alice's links are gone.
	w.Must(t, "root", `
		nix-store -qR /run/current-system | xargs ls -d >/dev/null
		test "$(cat /run/current-system/nixos-version)" = bed
		ls /home/bob/result/ >/dev/null
		for l in result src/deep/result .local/state/nix/profiles/profile-1-link; do test ! -L /home/alice/$l; done
		test -d /home/alice/src/deep`)
	var links []string
	for _, x := range m.Roots {
		if !x.Back {
			links = append(links, x.From)
		}
	}
	slices.Sort(links)
	if want := []string{"/home/alice/.local/state/nix/profiles/profile-1-link", "/home/alice/result", "/home/alice/src/deep/result"}; !slices.Equal(links, want) {
		t.Errorf("roots %q moved along, want %q", links, want)
	}
	// In the view all of it is there, and held.
	got := w.Alice(t, `
		test "$(cat ~/.local/state/nix/profiles/profile/bin/run)" = run
		test "$(wc -l <links/home/alice/result/text)" = 100000
		ls links/home/alice/src/deep/result/ >/dev/null
		nix-store -qR ~/.local/state/nix/profiles/profile-1-link links/home/alice/result | xargs ls -d >/dev/null
		nix-store --gc --print-roots`)
	for _, p := range []string{"acme-env", "thesis-2026", "libcatalyst-perl"} {
		if !strings.Contains(got, w.main[p]) {
			t.Errorf("no root for %s in the keep:\n%s", p, got)
		}
	}
}

// student is a policy of docs/policies, with our key and grants in the place of
// cache.nixos.org's.
func (w *world) student(t *testing.T) string {
	t.Helper()
	root, err := bed.ModuleRoot()
	if err != nil {
		t.Fatal(err)
	}
	b, err := os.ReadFile(filepath.Join(root, "docs/policies/student.policy"))
	if err != nil {
		t.Fatal(err)
	}
	var out []string
	for line := range strings.SplitSeq(string(b), "\n") {
		if strings.HasPrefix(line, "key cache.nixos.org-1:") {
			line = "key " + w.key
		}
		out = append(out, strings.ReplaceAll(line, "cache.nixos.org-1", "real-1"))
	}
	text := strings.Join(out, "\n")
	for _, want := range []string{"key real-1:", "system signed-by real-1", "personal name \"thesis-*\""} {
		if !strings.Contains(text, want) {
			t.Fatalf("docs/policies/student.policy has no %q", want)
		}
	}
	return text
}

// size is that of a path's NAR.
func (w *world) size(p *path) (n int64) {
	f := strings.Split(w.all[p.path], "|")
	if _, err := fmt.Sscan(f[1], &n); err != nil {
		panic(err)
	}
	return n
}

// dependents are a path and all that refers to it, by whatever way.
func (w *world) dependents(of string) map[string]bool {
	return w.personal(func(p *path) bool { return p.path != of })
}
