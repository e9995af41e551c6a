package policy

import (
	"encoding/binary"
	"fmt"
	"math/rand/v2"
	"runtime"
	"strings"
	"syscall"
	"testing"
	"time"

	"overkeep/policy/graph"
)

// bigGraph makes a store of n paths: derivations that refer to each other, to
// sources and have an output each, outputs that refer to outputs; ids in the order
// of registration but for batches, which are shuffled as Nix does.
func bigGraph(n int) *graph.Graph {
	r := rand.New(rand.NewPCG(1, 2))
	words := []string{"python3", "perl", "lib", "gtk", "source", "rust", "acme", "hook", "glibc", "linux-headers", "ghc", "unwrapped", "dev", "haskell"}
	g := &graph.Graph{StoreDir: "/nix/store", BaseOff: make([]uint32, 1, n+1), RefOff: make([]uint32, 1, n+1), OutOff: make([]uint32, 1, n+1),
		NarSize: make([]int64, n), Flags: make([]graph.Flags, n), Deriver: make([]ID, n), Origin: make([]int32, n),
		Keys: testKeys, Signed: []graph.Bits{graph.NewBits(n), graph.NewBits(n)},
		Origins: []graph.Origin{{Licences: []string{"mit"}, Unfree: graph.No, From: []string{"github:NixOS/nixpkgs"}}}}
	// Batches of three hundred: a hundred sources, derivations and outputs each.
	at := make([]ID, n)
	for i := range at {
		at[i] = ID(i)
	}
	for b := 0; b+300 <= n; b += 300 {
		r.Shuffle(300, func(i, j int) { at[b+i], at[b+j] = at[b+j], at[b+i] })
	}
	what := make([]int, n) // number by id
	for i, id := range at {
		what[id] = i
	}
	near := func(i, kind int) ID { // an earlier path of a kind: often a popular one
		k := i / 3
		if k == 0 {
			return graph.NoID
		}
		j := int(float64(k) * r.Float64() * r.Float64() * r.Float64())
		return at[3*j+kind]
	}
	for id := range ID(n) {
		i := what[id]
		var hash [24]byte
		binary.LittleEndian.PutUint64(hash[:], r.Uint64())
		name := fmt.Sprintf("%032x-%s-%s-%d.%d", hash[:16], words[r.IntN(len(words))], words[r.IntN(len(words))], r.IntN(20), r.IntN(20))
		g.Deriver[id], g.Origin[id] = graph.NoID, -1
		add := func(ref ID) {
			if ref >= 0 {
				g.Refs = append(g.Refs, ref)
			}
		}
		switch i % 3 {
		case 0:
			g.Flags[id] = graph.Source
		case 1:
			g.Flags[id] = graph.Derivation
			name += ".drv"
			add(at[i-1])
			for range 6 + r.IntN(14) {
				add(near(i, 1))
			}
			if i+1 < n {
				g.Outs = append(g.Outs, at[i+1])
			}
		case 2:
			g.Flags[id] = graph.Output
			g.Deriver[id] = at[i-1]
			for range 4 + r.IntN(12) {
				add(near(i, 2))
			}
			add(id)
			if r.IntN(20) > 0 {
				g.Signed[0].Set(id)
			}
			if r.IntN(10) == 0 {
				g.Origin[id] = 0
			}
		}
		g.NarSize[id] = int64(1 + r.IntN(1<<20))
		g.Base = append(g.Base, name...)
		g.BaseOff = append(g.BaseOff, uint32(len(g.Base)))
		g.RefOff = append(g.RefOff, uint32(len(g.Refs)))
		g.OutOff = append(g.OutOff, uint32(len(g.Outs)))
	}
	return g
}

const benchPolicy = `
system signed-by one-1
system kind source
system kind derivation and not name "*-acme-*"
personal name "*-acme-*"
personal unfree when known
`

func cpu() time.Duration {
	var u syscall.Rusage
	if err := syscall.Getrusage(syscall.RUSAGE_SELF, &u); err != nil {
		return 0
	}
	return time.Duration(u.Utime.Nano() + u.Stime.Nano())
}

func benchKeys() string { return "key " + testKeys[0] + "\nkey " + testKeys[1] + "\n" }

func BenchmarkPolicy(b *testing.B) {
	for _, n := range []int{30_000, 300_000, 999_900} {
		g := bigGraph(n)
		var before runtime.MemStats
		runtime.GC()
		runtime.ReadMemStats(&before)
		b.Logf("%d paths, %d references, heap %d MiB", n, len(g.Refs), before.HeapAlloc>>20)
		parse := func(lines ...string) *Policy {
			return mustParse(b, Source{"policy", []byte(benchKeys() + benchPolicy + strings.Join(lines, "\n")), true})
		}
		plain, flow := parse(), parse(`personal built-from (name "*-ghc-1.*")`, `personal depends-on (name "*-hook-*")`, `system closure-of "python3-*"`)
		// CPU time beside wall time: on a busy machine the one tells more than the other.
		run := func(name string, f func(b *testing.B)) {
			b.Run(fmt.Sprintf("%s/%d", name, n), func(b *testing.B) {
				begin := cpu()
				f(b)
				b.ReportMetric((cpu()-begin).Seconds()*1000/float64(b.N), "cpu-ms/op")
			})
		}
		index := func() *Index {
			ix, err := NewIndex(g)
			if err != nil {
				b.Fatal(err)
			}
			return ix
		}
		run("index", func(b *testing.B) {
			for b.Loop() {
				index()
			}
		})
		run("index+first", func(b *testing.B) {
			for b.Loop() {
				index().Decide(plain)
			}
		})
		ix := index()
		ix.Decide(plain)
		run("again", func(b *testing.B) {
			i := 0
			for b.Loop() {
				i++
				ix.Decide(parse(fmt.Sprintf("personal larger-than %d", 1<<20-i)))
			}
		})
		run("again-glob", func(b *testing.B) {
			i := 0
			for b.Loop() {
				i++
				ix.Decide(parse(fmt.Sprintf(`personal name "*-ghc-%d.*"`, i)))
			}
		})
		run("index+flow", func(b *testing.B) {
			for b.Loop() {
				index().Decide(flow)
			}
		})
		ix.Decide(flow)
		run("flow-change", func(b *testing.B) {
			i := 0
			for b.Loop() {
				i++
				ix.Decide(parse(fmt.Sprintf(`personal built-from (name "*-ghc-1.%d")`, i)))
			}
		})
		v := ix.Decide(flow)
		run("why", func(b *testing.B) {
			for b.Loop() {
				v.Why(ID(n - 1))
			}
		})
		run("check", func(b *testing.B) {
			for b.Loop() {
				v.Check(CheckOptions{})
			}
		})
		run("diff", func(b *testing.B) {
			w := ix.Decide(plain)
			for b.Loop() {
				Diff(w, v)
			}
		})
		var after runtime.MemStats
		runtime.GC()
		runtime.ReadMemStats(&after)
		b.Logf("%d paths: %d MiB beside the graph, %d system", n, int64(after.HeapAlloc-before.HeapAlloc)>>20, v.System.Count())
		runtime.KeepAlive(ix)
	}
}
