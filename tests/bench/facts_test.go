package bench

import (
	"encoding/json"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"

	"overkeep/overlay/facts"
	"overkeep/overlay/verdict"
	"overkeep/policy"
	"overkeep/policy/graph"
	"overkeep/tests/bed"
	"overkeep/tests/fixture"
	"overkeep/tests/need"
	"overkeep/tests/storegen"
)

// factsMachine is a machine with generated stores at /srv/NAME, and a policy.
type factsMachine struct{ *fixture.Keep }

// benchPolicy is of the size and kind that people write, with a term that looks at the
// whole graph.
const benchPolicy = `let secret = name "*-python3-*-acme*" or name "mod-qt-*"
system   kind output or kind source or kind fixed-output
personal secret
personal depends-on (secret)
personal name "*-font-*" and larger-than 100M
personal unfree when known
`

func newFacts(b *testing.B) factsMachine {
	b.Helper()
	need.Root(b)
	bin := filepath.Join(b.TempDir(), "peak")
	build := exec.Command("go", "build", "-trimpath", "-o", bin, "./peak")
	build.Env = append(os.Environ(), "CGO_ENABLED=0")
	if out, err := build.CombinedOutput(); err != nil {
		b.Fatalf("go build: %v\n%s", err, out)
	}
	m := factsMachine{fixture.Machine(b, bed.Forky)}
	if out, err := exec.Command("cp", bin, filepath.Join(m.Root, "usr/local/bin/peak")).CombinedOutput(); err != nil {
		b.Fatalf("cp: %v: %s", err, out)
	}
	m.Write(b, "/srv/policy", benchPolicy)
	return m
}

func (m factsMachine) dir(name string) string { return "/srv/" + name + "/nix/var/nix/db" }

// store makes a database of n paths: outside, for SQLite resolves symbolic links,
// and /proc/PID/root is one that it cannot.
func (m factsMachine) store(b *testing.B, name string, n int) {
	b.Helper()
	tmp, dir := b.TempDir(), filepath.Join(m.Root, m.dir(name))
	if _, err := storegen.Write(b.Context(), tmp, storegen.Options{Paths: n, Seed: 1}); err != nil {
		b.Fatal(err)
	}
	if err := os.MkdirAll(dir, 0o755); err != nil {
		b.Fatal(err)
	}
	for _, f := range []string{"db.sqlite", "schema"} {
		if out, err := exec.Command("cp", filepath.Join(tmp, f), dir).CombinedOutput(); err != nil {
			b.Fatalf("cp: %v: %s", err, out)
		}
	}
	if err := os.Remove(filepath.Join(tmp, "db.sqlite")); err != nil { // it is large
		b.Fatal(err)
	}
}

// ours is a command of ours on that store's database: a cold process that loads,
// decides and lists.
func (m factsMachine) ours(command, name string) string {
	return "peak overkeep " + command + " --quiet --policy /srv/policy --db " + m.dir(name) + "/db.sqlite"
}

// nix is a command of Nix on that store. Its first use makes what is missing.
func (m factsMachine) nix(command, name string) string {
	return "NIX_CONFIG='experimental-features = nix-command' NIX_REMOTE= " + command + " --store 'local?root=/srv/" + name + "'"
}

// run runs a command to a file (or /dev/null) and returns its wall and CPU seconds and
// what it wrote on standard error; done is false if it was ended after within.
func (m factsMachine) run(b *testing.B, command, to string, within time.Duration) (wall, cpu float64, stderr string, done bool) {
	b.Helper()
	script := fmt.Sprintf("TIMEFORMAT='%%R %%U %%S'; r=0; { time timeout %d bash -c %s >%s 2>/run/err; } 2>/run/time || r=$?; echo $r; cat /run/time; cat /run/err",
		int(within.Seconds()), quote(command), to)
	r, err := m.Exec(bed.Command{Script: script, Within: within + time.Minute})
	if err != nil {
		b.Fatal(err)
	}
	f := strings.SplitN(r.Stdout, "\n", 3)
	if len(f) < 3 || f[0] != "0" && f[0] != "124" {
		b.Fatalf("%s: %s%s", command, r.Stdout, r.Stderr)
	}
	var user, sys float64
	if _, err := fmt.Sscan(f[1], &wall, &user, &sys); err != nil {
		b.Fatalf("%s: %q: %v", command, f[1], err)
	}
	return wall, user + sys, f[2], f[0] == "0"
}

func quote(s string) string { return "'" + strings.ReplaceAll(s, "'", `'\''`) + "'" }

// against runs ours and Nix's in turn and prints the ratios: by how much ours is
// faster. A peer that does not end in time gives a lower bound.
func (m factsMachine) against(b *testing.B, title string, ours, nix string, rounds int, within time.Duration) {
	b.Helper()
	var fast, slow, ratios, cpu []float64
	peak, bound := 0, ""
	for range rounds {
		o, oc, text, done := m.run(b, ours, "/dev/null", within)
		if !done {
			b.Fatalf("%s: ours did not end in %v", title, within)
		}
		if kib, err := strconv.Atoi(lastLine(text)); err == nil {
			peak = max(peak, kib)
		}
		n, nc, _, done := m.run(b, nix, "/dev/null", within)
		if !done {
			bound = "more than "
		}
		fast, slow, ratios, cpu = append(fast, o), append(slow, n), append(ratios, n/o), append(cpu, nc/oc)
	}
	fmt.Printf("%-44s ours %7.2f s (%d MiB)   nix %s%7.2f s   %s%.1f times as fast (min %.1f, max %.1f, %d pairs; by CPU time %.1f)\n", title,
		median(fast), peak>>10, bound, median(slow), bound, median(ratios), slices.Min(ratios), slices.Max(ratios), rounds, median(cpu))
	b.ReportMetric(median(fast)*1e3, "ms/ours")
	b.ReportMetric(median(slow)*1e3, "ms/nix")
	b.ReportMetric(median(ratios), "times-as-fast")
	b.ReportMetric(float64(peak>>10), "MiB")
	b.ReportMetric(0, "ns/op")
}

func lastLine(s string) string {
	lines := strings.Split(strings.TrimSpace(s), "\n")
	return lines[len(lines)-1]
}

// same fails if our JSON and closure sizes are not what Nix tells of the store, or if
// our list is not of the same paths as its dump.
func (m factsMachine) same(b *testing.B, name string, sizes bool) {
	b.Helper()
	read := func(command string) string {
		m.run(b, command, "/srv/out", 10*time.Minute)
		return m.Read(b, "/srv/out")
	}
	var got, want map[string]map[string]any
	for text, to := range map[string]*map[string]map[string]any{
		read(m.ours("list --json", name)):                               &got,
		read(m.nix("nix path-info --all --json --json-format 1", name)): &want,
	} {
		if err := json.Unmarshal([]byte(text), to); err != nil {
			b.Fatalf("%v: %.200s", err, text)
		}
	}
	for _, path := range got {
		for _, ours := range []string{"placement", "reason", "lies_in", "line"} { // Nix knows nothing of these
			delete(path, ours)
		}
	}
	if d := cmp.Diff(want, got); d != "" {
		b.Fatalf("Nix's JSON (-) and ours (+): %.2000s", d)
	}
	listed := map[string]string{}
	for line := range strings.Lines(read(m.ours("list", name))) {
		f := strings.Fields(line)
		listed["/nix/store/"+f[3]] = f[0]
	}
	dump := strings.Split(read(m.nix("nix-store --dump-db", name)), "\n")
	for len(dump) >= 5 { // path, hash, size, deriver, number of references, references
		n, err := strconv.Atoi(dump[4])
		if place := listed[dump[0]]; err != nil || place != "system" && place != "personal" {
			b.Fatalf("%s: %q in our list (%v)", dump[0], place, err)
		}
		delete(listed, dump[0])
		dump = dump[5+n:]
	}
	if len(listed) > 0 {
		b.Fatalf("%d paths that Nix does not dump", len(listed))
	}
	if !sizes {
		return
	}
	theirs := map[string]float64{}
	for line := range strings.Lines(read(m.nix("nix path-info --all -S", name))) {
		if f := strings.Fields(line); len(f) == 2 {
			theirs[f[0]], _ = strconv.ParseFloat(f[1], 64)
		}
	}
	var closures map[string]struct {
		ClosureSize float64 `json:"closureSize"`
	}
	if err := json.Unmarshal([]byte(read(m.ours("list --json --closure-size", name))), &closures); err != nil {
		b.Fatal(err)
	}
	ours := map[string]float64{}
	for path, c := range closures {
		ours[path] = c.ClosureSize
	}
	if d := cmp.Diff(theirs, ours); d != "" || len(theirs) == 0 {
		b.Fatalf("Nix's closure sizes (-) and ours (+): %.2000s", d)
	}
}

// BenchmarkFacts: our commands on the database of a store, load, decide and list in a
// cold process, beside the command of Nix that tells as much of it. Aims: a million paths 12 times as fast as --dump-db, within 400 MiB;
// JSON 15 times; closure sizes 30 times.
func BenchmarkFacts(b *testing.B) {
	m := newFacts(b)
	m.store(b, "s3k", 3000)
	m.same(b, "s3k", true)
	m.store(b, "s30k", 30_000)
	m.same(b, "s30k", false)
	for _, n := range []int{10_000, 100_000, 1_000_000} {
		m.store(b, fmt.Sprint("s", n), n)
	}
	b.Run("list", func(b *testing.B) {
		for b.Loop() {
			for n, rounds := range map[int]int{10_000: 5, 100_000: 5, 1_000_000: 2} {
				name := fmt.Sprint("s", n)
				m.against(b, fmt.Sprintf("load, decide and list %d paths", n), m.ours("list", name), m.nix("nix-store --dump-db", name), rounds, 10*time.Minute)
			}
		}
	})
	b.Run("json", func(b *testing.B) {
		for b.Loop() {
			m.against(b, "JSON of 100,000 paths, with verdicts", m.ours("list --json", "s100000"),
				m.nix("nix path-info --all --json --json-format 1", "s100000"), 3, 10*time.Minute)
		}
	})
	b.Run("sizes", func(b *testing.B) {
		for b.Loop() {
			m.against(b, "closure sizes of 30,000 paths", m.ours("list --closure-size", "s30k"), m.nix("nix path-info --all -S", "s30k"), 1, 90*time.Second)
		}
	})
	b.Run("why", func(b *testing.B) {
		path := strings.Fields(m.Must(b, "root", m.ours("list --where 'kind output'", "s1000000")+" 2>/dev/null | sed -n 1000p"))[3]
		for b.Loop() {
			m.against(b, "why one path of 1,000,000 (nix path-info -S)", m.ours("why "+path, "s1000000"),
				m.nix("nix path-info -S /nix/store/"+path, "s1000000"), 5, time.Minute)
		}
	})
}

// BenchmarkAgain: another policy over a graph that is loaded, beside loading it. The aim
// for a change of one rule is a tenth.
func BenchmarkAgain(b *testing.B) {
	dir := b.TempDir()
	if _, err := storegen.Write(b.Context(), dir, storegen.Options{Paths: 1_000_000, Seed: 1}); err != nil {
		b.Fatal(err)
	}
	in := verdict.Input{Root: dir, Stores: []facts.Store{{DB: filepath.Join(dir, "db.sqlite"), Layer: graph.Lower}}}
	parse := func(text string) *policy.Policy {
		p, err := policy.Parse(policy.Source{Name: "policy", Text: []byte(text), Root: true})
		if err != nil {
			b.Fatal(err)
		}
		return p
	}
	first, second := parse(benchPolicy), parse(strings.Replace(benchPolicy, "100M", "50M", 1))
	for b.Loop() {
		var loads, again []float64
		for range 5 {
			start := time.Now()
			w, err := verdict.Load(b.Context(), in, first, second)
			if err != nil {
				b.Fatal(err)
			}
			loads = append(loads, time.Since(start).Seconds())
			w.Decide(first)
			start = time.Now()
			w.Decide(second)
			again = append(again, time.Since(start).Seconds())
			if err := w.Close(); err != nil {
				b.Fatal(err)
			}
		}
		ratios := make([]float64, len(loads))
		for i := range loads {
			ratios[i] = again[i] / loads[i]
		}
		fmt.Printf("%-44s again %6.3f s   load %6.3f s   ratio %.3f (min %.3f, max %.3f, %d rounds)\n", "one rule changed, 1,000,000 paths",
			median(again), median(loads), median(ratios), slices.Min(ratios), slices.Max(ratios), len(ratios))
		b.ReportMetric(median(ratios), "of-loading")
		b.ReportMetric(0, "ns/op")
	}
}
