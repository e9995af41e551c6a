// Package storegen makes Nix databases (SQLite, schema 10) of any size for tests and
// benchmarks: the tables, indexes and trigger as Nix creates them, WAL mode, and
// rows as Nix writes them.
//
// It promises: the same options give the same rows, degrees follow what stock
// Nix wrote for a nixpkgs-derived package set (see degrees.go), references
// point to older paths only (save self references), and a million paths take
// well under a minute.
//
// Start with storegen.Write(dir, storegen.Options{Paths: 1000}); storegen.Model
// gives the same rows without a database. No files of the store are made, and
// derivations have no .drv: it is for what reads the database only.
package storegen

import (
	"crypto/ed25519"
	"crypto/sha256"
	"encoding/base64"
	"encoding/binary"
	"fmt"
	"math"
	"math/rand/v2"
	"slices"
	"strconv"
)

// KeyName is the name of the key that signs the share Signed of the outputs.
const KeyName = "test.example.org-1"

// Key is that key; it is made of a constant and protects nothing.
func Key() ed25519.PrivateKey {
	seed := sha256.Sum256([]byte("storegen test key"))
	return ed25519.NewKeyFromSeed(seed[:])
}

// Options say what to make.
type Options struct {
	Paths  int     // how many; at least 1
	Seed   uint64  // other rows for another seed
	Signed float64 // share of the outputs with a signature by Key
	// Prefix starts the names of all paths, so that two stores can be told apart.
	Prefix string
}

// Path is a row of ValidPaths with its references.
type Path struct {
	ID       int64
	Base     string // HASH-NAME
	Hash     [32]byte
	Time     int64
	Deriver  int    // index in Store.Paths, or -1
	Orphan   string // base of a deriver that is not valid, or empty
	NarSize  int64
	Ultimate bool
	Sigs     string
	CA       string
	Refs     []int32 // indexes in Store.Paths, ascending
	Outs     []int32 // of a derivation: indexes of its valid outputs
}

// StoreDir is where all the paths lie.
const StoreDir = "/nix/store/"

// Store is what a generated database holds.
type Store struct{ Paths []Path }

type generator struct {
	o       Options
	rng     *rand.Rand
	paths   []Path
	sources []int32
	drvs    []int32   // derivations so far
	inputs  [][]int32 // per derivation so far: the derivations it needs
	outs    [][]int32 // per derivation so far: its outputs
	key     ed25519.PrivateKey
}

// Model makes the rows.
func Model(o Options) *Store {
	g := &generator{o: o, rng: rand.New(rand.NewPCG(o.Seed, 0x6e6978)), key: Key()}
	g.paths = make([]Path, 0, o.Paths+80)
	for len(g.paths) < o.Paths {
		g.unit()
	}
	g.cut(o.Paths)
	for i := range g.paths {
		g.sign(&g.paths[i])
	}
	return &Store{g.paths}
}

// cut drops the last unit's surplus; only its own members refer to it.
func (g *generator) cut(n int) {
	g.paths = g.paths[:n]
	for i := range g.paths {
		p := &g.paths[i]
		p.Outs = slices.DeleteFunc(p.Outs, func(o int32) bool { return int(o) >= n })
	}
}

// unit adds a derivation with the sources that it brings along, and its outputs.
func (g *generator) unit() {
	degree := quantile(g.rng, drvDegree)
	var refs, inputs []int32
	for range degree {
		k, ok := g.pick()
		switch {
		case !ok || g.rng.Float64() < sourcesPerRef:
			refs = append(refs, g.source())
		default:
			inputs = append(inputs, k)
			refs = append(refs, g.drvs[k])
		}
	}
	name := g.name()
	fixed := g.rng.Float64() < fixedShare
	drv := g.add(name+".drv", uniq(refs))
	d := &g.paths[drv]
	d.NarSize = int64(quantile(g.rng, drvSize))
	d.CA = "text:sha256:" + g.digest()
	// Some derivations are no longer valid: only their outputs stay, as after a
	// garbage collection without keep-derivations.
	gone := g.rng.Float64() < goneShare
	n := quantile(g.rng, outputs)
	if fixed {
		n = 1
	}
	orphan := ""
	if gone {
		orphan = d.Base
		g.paths = g.paths[:drv]
	}
	var mine []int32
	for i := range n {
		out := name
		if i > 0 {
			out += "-" + [...]string{"dev", "lib", "man", "doc", "bin"}[(i-1)%5]
			if i > 5 {
				out += strconv.Itoa(i)
			}
		}
		mine = append(mine, g.output(out, drv, orphan, fixed, inputs, mine))
	}
	if !gone {
		g.paths[drv].Outs = mine
		g.drvs = append(g.drvs, drv)
		g.inputs = append(g.inputs, inputs)
		g.outs = append(g.outs, mine)
	}
}

// output adds an output: it refers to some outputs of its derivation's inputs,
// at times to itself and to the outputs before it.
func (g *generator) output(name string, drv int32, orphan string, fixed bool, inputs, siblings []int32) int32 {
	var refs []int32
	if !fixed {
		for _, k := range inputs {
			refs = append(refs, pickSome(g.rng, g.outs[k], 0.6)...)
			for _, kk := range g.inputs[k][:min(2, len(g.inputs[k]))] { // propagated
				refs = append(refs, pickSome(g.rng, g.outs[kk], 0.2)...)
			}
		}
		refs = append(refs, pickSome(g.rng, siblings, 0.5)...)
		if g.rng.Float64() < selfShare {
			refs = append(refs, int32(len(g.paths)))
		}
	}
	id := g.add(name, uniq(refs))
	p := &g.paths[id]
	p.NarSize = int64(math.Exp(8+4*g.rng.Float64()+2*g.rng.NormFloat64()))&^7 + 112
	p.Deriver = int(drv)
	if orphan != "" {
		p.Deriver, p.Orphan = -1, orphan
	}
	p.Ultimate = g.rng.Float64() < 0.2
	if fixed {
		p.CA = "fixed:r:sha256:" + g.digest()
	}
	return id
}

func (g *generator) source() int32 {
	if len(g.sources) > 0 && g.rng.Float64() < reuseShare {
		return g.sources[g.rng.IntN(len(g.sources))]
	}
	id := g.add(g.name(), nil)
	p := &g.paths[id]
	p.NarSize = int64(quantile(g.rng, sourceSize))
	p.CA = "fixed:r:sha256:" + g.digest()
	g.sources = append(g.sources, id)
	return id
}

func (g *generator) add(name string, refs []int32) int32 {
	i := len(g.paths)
	p := Path{ID: int64(i + 1), Base: g.letters(32) + "-" + g.o.Prefix + name, Time: 1_700_000_000 + int64(i/40), Deriver: -1, Refs: refs}
	p.Hash = g.hash()
	g.paths = append(g.paths, p)
	return int32(i)
}

func (g *generator) hash() (h [32]byte) {
	for i := 0; i < len(h); i += 8 {
		binary.LittleEndian.PutUint64(h[i:], g.rng.Uint64())
	}
	return h
}

// digest is a hash as a content address has it.
func (g *generator) digest() string {
	h := g.hash()
	return Base32(h[:])
}

// pick is an earlier derivation of this generation, one of the few that everything
// needs (a shell, a compiler) or a recent one; ok is false for the first.
func (g *generator) pick() (drv int32, ok bool) {
	n := len(g.drvs)
	start := n / generation * generation
	if n == start {
		return 0, false
	}
	if g.rng.Float64() < hubShare {
		u := g.rng.Float64()
		return int32(start) + int32(float64(min(n-start, hubs))*u*u*u), true
	}
	back := int(g.rng.ExpFloat64() * window)
	return int32(max(start, n-1-back)), true
}

func (g *generator) sign(p *Path) {
	if p.Ultimate || len(p.Base) > 4 && p.Base[len(p.Base)-4:] == ".drv" || p.Deriver < 0 && p.Orphan == "" {
		return
	}
	var raw [64]byte
	for i := range raw {
		raw[i] = byte(g.rng.Uint32())
	}
	// As long as a real one, by a key that nobody has.
	p.Sigs = "cache.example.org-1:" + base64.StdEncoding.EncodeToString(raw[:])
	if g.rng.Float64() < g.o.Signed {
		sig := ed25519.Sign(g.key, []byte((&Store{g.paths}).Fingerprint(p)))
		p.Sigs += " " + KeyName + ":" + base64.StdEncoding.EncodeToString(sig)
	}
}

// Fingerprint is what a signature of a path is over (path-info.cc of Nix,
// ValidPathInfo::fingerprint).
func (s *Store) Fingerprint(p *Path) string {
	refs := make([]string, len(p.Refs))
	for i, r := range p.Refs {
		refs[i] = StoreDir + s.Paths[r].Base
	}
	slices.Sort(refs)
	b := fmt.Appendf(nil, "1;%s%s;sha256:%s;%d;", StoreDir, p.Base, Base32(p.Hash[:]), p.NarSize)
	for i, r := range refs {
		if i > 0 {
			b = append(b, ',')
		}
		b = append(b, r...)
	}
	return string(b)
}

const alphabet = "0123456789abcdfghijklmnpqrsvwxyz" // of Nix: no e o u t

// Base32 is Nix's: five bits a letter, from the last byte to the first.
func Base32(b []byte) string {
	n := (len(b)*8 + 4) / 5
	out := make([]byte, n)
	for i := range n {
		bit := (n - 1 - i) * 5
		v := uint(b[bit/8]) >> (bit % 8)
		if bit/8+1 < len(b) {
			v |= uint(b[bit/8+1]) << (8 - bit%8)
		}
		out[i] = alphabet[v&31]
	}
	return string(out)
}

func (g *generator) letters(n int) string {
	b := make([]byte, n)
	for i := 0; i < n; {
		for v, k := g.rng.Uint64(), 0; k < 12 && i < n; k++ {
			b[i] = alphabet[v&31]
			v >>= 5
			i++
		}
	}
	return string(b)
}

var syllables = [...]string{"lib", "gnu", "perl", "python3", "xml", "net", "core", "utils", "tools", "http", "json", "text",
	"font", "sys", "mod", "kit", "hook", "dev", "vim", "qt", "gtk", "ruby", "rust", "source", "patch", "data", "test"}

func (g *generator) name() string {
	want := quantile(g.rng, nameLength)
	b := append(make([]byte, 0, want+8), syllables[g.rng.IntN(len(syllables))]...)
	for len(b) < want-7 {
		b = append(append(b, '-'), syllables[g.rng.IntN(len(syllables))]...)
	}
	return string(fmt.Appendf(b, "-%d.%d", g.rng.IntN(10), g.rng.IntN(40)))
}

func pickSome(rng *rand.Rand, from []int32, share float64) []int32 {
	var out []int32
	for _, x := range from {
		if rng.Float64() < share {
			out = append(out, x)
		}
		if len(out) == 2 {
			break
		}
	}
	return out
}

func uniq(ids []int32) []int32 {
	slices.Sort(ids)
	return slices.Compact(ids)
}
