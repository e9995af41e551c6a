package bench

import (
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"testing"
	"time"
)

// copies is a machine with paths in its store, and what copies them.
type copies struct {
	factsMachine
	paths map[string]string // of a set: absolute, separated by spaces
}

func newCopies(b *testing.B) copies {
	b.Helper()
	m := copies{newFacts(b), map[string]string{}}
	bin := filepath.Join(b.TempDir(), "mover")
	build := exec.Command("go", "build", "-trimpath", "-o", bin, "./mover")
	build.Env = append(os.Environ(), "CGO_ENABLED=0")
	if out, err := build.CombinedOutput(); err != nil {
		b.Fatalf("go build: %v\n%s", err, out)
	}
	if out, err := exec.Command("cp", bin, filepath.Join(m.Root, "usr/local/bin/mover")).CombinedOutput(); err != nil {
		b.Fatalf("cp: %v: %s", err, out)
	}
	// Sizes as in a store: many small files, some large ones, and one path that is one file.
	m.Must(b, "root", `mkdir /srv/make; cd /srv/make
for p in {1..30}; do mkdir -p small-$p/{bin,lib,share}; for f in {1..400}; do
	head -c $(( (f * f * 97 + p) % 20000 )) /dev/urandom > small-$p/share/$f; done; ln -s ../share/1 small-$p/lib/l; done
for p in {1..4}; do mkdir -p large-$p; for f in 1 2 3; do head -c 24M /dev/urandom > large-$p/$f; done; done
head -c 300M /dev/urandom > single-1`)
	for _, set := range []string{"small", "large", "single"} {
		m.paths[set] = strings.Join(strings.Fields(m.Must(b, "root", "cd /srv/make; nix-store --add "+set+"-*")), " ")
	}
	m.Must(b, "root", "rm -rf /srv/make")
	m.paths["all"] = m.paths["small"] + " " + m.paths["large"] + " " + m.paths["single"]
	for set, paths := range m.paths {
		m.Must(b, "root", "for p in "+paths+`; do echo "$(basename $p) $(nix-store --query --hash $p | cut -d: -f2 | xargs nix-hash --type sha256 --to-base16)"; done > /srv/lines-`+set)
	}
	return m
}

// each runs the ways of copying a set in turn and prints how they compare to ours.
func (m copies) each(b *testing.B, set string, sync bool, rounds int) {
	paths := m.paths[set]
	flag, after, title := "", "", fmt.Sprintf("copy %d paths (%s)", len(strings.Fields(paths)), set)
	if sync {
		flag, after, title = "--sync ", "; sync -f /srv", title+" to the disk"
	}
	ours := "peak mover " + flag + "/nix/store /srv/ours < /srv/lines-" + set
	peers := []struct{ name, setup, command string }{
		{"nix copy", "", "peak nix --extra-experimental-features nix-command copy --no-check-sigs --to local?root=/srv/nix " + paths + after},
		{"cp -a and nix hash path", "mkdir /srv/cp", "cp -a " + paths + " /srv/cp" + after + "; nix --extra-experimental-features nix-command hash path /srv/cp/* >/dev/null"},
	}
	var fast []float64
	slow, ratios := make([][]float64, len(peers)), make([][]float64, len(peers))
	peak := 0
	for range rounds {
		clean := "cd /srv; chmod -R u+w ours nix cp 2>/dev/null || true; rm -rf ours nix cp; mkdir ours; sync -f /srv; "
		m.Must(b, "root", clean+"cat "+paths+" >/dev/null 2>&1 || true")
		o, _, text, done := m.run(b, ours, "/dev/null", 10*time.Minute)
		if kib, err := strconv.Atoi(lastLine(text)); err == nil {
			peak = max(peak, kib)
		}
		if !done {
			b.Fatalf("%s: ours did not end: %s", title, text)
		}
		fast = append(fast, o)
		if len(fast) == 1 { // the same output
			m.Must(b, "root", "mkdir /srv/was; cp -a "+paths+" /srv/was; diff -r --no-dereference /srv/was /srv/ours; chmod -R u+w /srv/was; rm -rf /srv/was")
		}
		for i, p := range peers {
			m.Must(b, "root", clean+p.setup)
			n, _, text, done := m.run(b, p.command, "/dev/null", 10*time.Minute)
			if !done {
				b.Fatalf("%s: %s did not end: %s", title, p.name, text)
			}
			slow[i], ratios[i] = append(slow[i], n), append(ratios[i], n/o)
		}
	}
	for i, p := range peers {
		fmt.Printf("%-44s ours %7.2f s (%d MiB)   %s %7.2f s   %.2f times as fast (min %.2f, max %.2f, %d pairs)\n", title,
			median(fast), peak>>10, p.name, median(slow[i]), median(ratios[i]), slices.Min(ratios[i]), slices.Max(ratios[i]), rounds)
	}
	b.ReportMetric(median(ratios[0]), "times-nix-copy")
	b.ReportMetric(median(ratios[1]), "times-cp-and-hash")
	b.ReportMetric(float64(peak>>10), "MiB")
	b.ReportMetric(0, "ns/op")
}

// BenchmarkCopy: store paths copied with their hashes checked, beside nix copy and beside
// cp -a followed by a check of the result. Aims: 2 and 0.8 times as fast.
func BenchmarkCopy(b *testing.B) {
	m := newCopies(b)
	for _, set := range []string{"small", "large", "single", "all"} {
		b.Run(set, func(b *testing.B) {
			for b.Loop() {
				m.each(b, set, false, 5)
			}
		})
	}
	b.Run("sync", func(b *testing.B) {
		for b.Loop() {
			m.each(b, "all", true, 3)
		}
	})
}
