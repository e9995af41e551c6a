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

	"overkeep/tests/bed"
	"overkeep/tests/need"
	"overkeep/tests/storegen"
)

// factsMachine is a machine with a generated store's database at /srv/NAME and our
// reader of it.
type factsMachine struct{ *bed.Machine }

func newFacts(b *testing.B) factsMachine {
	b.Helper()
	need.Root(b)
	bin := filepath.Join(b.TempDir(), "factsbench")
	build := exec.Command("go", "build", "-trimpath", "-tags", "osusergo,netgo,sqlite_omit_load_extension",
		"-ldflags", "-s -w -linkmode external -extldflags -static", "-o", bin, "./factsbench")
	if out, err := build.CombinedOutput(); err != nil {
		b.Fatalf("go build: %v\n%s", err, out)
	}
	m := factsMachine{bed.Start(b, bed.Forky)}
	m.Install(b, bin)
	m.Must(b, "root", "mv /usr/local/bin/overkeep /usr/local/bin/factsbench")
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

func (m factsMachine) ours(verb, name string) string {
	return "factsbench " + verb + " " + m.dir(name) + "/db.sqlite"
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
		if kib, err := strconv.Atoi(strings.TrimSpace(text)); err == nil {
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

// same fails if our JSON, sizes and list are not what Nix tells of the store.
func (m factsMachine) same(b *testing.B, name string, sizes bool) {
	b.Helper()
	read := func(command string) string {
		m.run(b, command, "/srv/out", 10*time.Minute)
		return m.Read(b, "/srv/out")
	}
	var got, want map[string]any
	for text, to := range map[string]*map[string]any{
		read(m.ours("json", name)):                                      &got,
		read(m.nix("nix path-info --all --json --json-format 1", name)): &want,
	} {
		if err := json.Unmarshal([]byte(text), to); err != nil {
			b.Fatalf("%v: %.200s", err, text)
		}
	}
	if d := cmp.Diff(want, got); d != "" {
		b.Fatalf("Nix's JSON (-) and ours (+): %.2000s", d)
	}
	dump := strings.Split(read(m.nix("nix-store --dump-db", name)), "\n")
	ours := map[string]int{}
	for line := range strings.Lines(read(m.ours("list", name))) {
		base, n, _ := strings.Cut(strings.TrimSpace(line), " ")
		ours["/nix/store/"+base], _ = strconv.Atoi(n)
	}
	for len(dump) >= 5 { // path, hash, size, deriver, number of references, references
		n, err := strconv.Atoi(dump[4])
		if err != nil || ours[dump[0]] != n {
			b.Fatalf("%s: %d references for Nix (%v), %d for us", dump[0], n, err, ours[dump[0]])
		}
		delete(ours, dump[0])
		dump = dump[5+n:]
	}
	if len(ours) > 0 {
		b.Fatalf("%d paths that Nix does not dump", len(ours))
	}
	if !sizes {
		return
	}
	table := func(command string) map[string]string {
		t := map[string]string{}
		for line := range strings.Lines(read(command)) {
			if f := strings.Fields(line); len(f) == 2 {
				t[f[0]] = f[1]
			}
		}
		return t
	}
	theirs := table(m.nix("nix path-info --all -S", name))
	if d := cmp.Diff(theirs, table(m.ours("sizes", name))); d != "" || len(theirs) == 0 {
		b.Fatalf("Nix's closure sizes (-) and ours (+): %.2000s", d)
	}
}

// BenchmarkFacts: reading the database of a store, beside the command of Nix that
// tells the same. Aims: a million paths 12 times as fast as --dump-db, within 400 MiB;
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
			for n, rounds := range map[int]int{10_000: 5, 100_000: 5, 1_000_000: 3} {
				name := fmt.Sprint("s", n)
				m.against(b, fmt.Sprintf("load and list %d paths", n), m.ours("list", name), m.nix("nix-store --dump-db", name), rounds, 10*time.Minute)
			}
		}
	})
	b.Run("json", func(b *testing.B) {
		for b.Loop() {
			m.against(b, "JSON of 100,000 paths", m.ours("json", "s100000"),
				m.nix("nix path-info --all --json --json-format 1", "s100000"), 3, 10*time.Minute)
		}
	})
	b.Run("sizes", func(b *testing.B) {
		for b.Loop() {
			m.against(b, "closure sizes of 30,000 paths", m.ours("sizes", "s30k"), m.nix("nix path-info --all -S", "s30k"), 1, 4*time.Minute)
		}
	})
}
