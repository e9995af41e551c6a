package storegen

import (
	"crypto/ed25519"
	"crypto/sha256"
	"encoding/base64"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"slices"
	"strconv"
	"strings"

	"overkeep/policy/graph"
)

// World is a small store written by hand, for a test that wants to name its paths:
//
//	glibc-2.42    out    signed cache.nixos.org-1
//	payroll.drv   drv    -> payroll-src glibc.drv   => payroll-1.0
//	payroll-1.0   out    here   by payroll.drv      -> glibc-2.42
//	payroll-src   src    from git+ssh://acme.example/payroll
//	root /run/current-system payroll-1.0
//	root /nix/var/nix/profiles/gone
//
// A path has a name, a kind and then words. Kinds: out, fixed (an output fixed by
// hash, which counts as made by its deriver), drv, file (builtins.toFile) and src (a
// source that was added: Nix's database cannot tell it from a fixed output that came
// without its deriver). Words: here (ultimate), signed KEY..., by DERIVER (one that
// the world does not have is one that is not valid), -> references, => outputs, size
// BYTES, and what was recorded: from URL..., licence ID..., unfree, free. A root that
// leads nowhere cannot be resolved.
type World struct {
	Paths []Thing
	Roots []Link
}

// Thing is a path of a World; other paths are given by their names.
type Thing struct {
	Name, Kind      string
	Here            bool
	Signed          []string // names of keys, see KeyNamed
	Refs, Outs      []string
	Deriver         string
	Size            int64
	From, Licences  []string
	Unfree          graph.Tri
	originsRecorded bool
}

// Link is what a profile leads to.
type Link struct {
	At string
	To []string // names; none: it cannot be resolved
}

var thingKinds = []string{"out", "fixed", "drv", "file", "src"}

// ParseWorld reads a world. Empty lines and those that begin with # say nothing.
func ParseWorld(text string) (*World, error) {
	w := &World{}
	number := 0
	for line := range strings.Lines(text) {
		number++
		f := strings.Fields(line)
		switch {
		case len(f) == 0 || strings.HasPrefix(f[0], "#"):
		case f[0] == "root" && len(f) > 1:
			w.Roots = append(w.Roots, Link{f[1], f[2:]})
		case len(f) < 2 || !slices.Contains(thingKinds, f[1]):
			return nil, fmt.Errorf("line %d: no kind of path (%s) in %q", number, strings.Join(thingKinds, ", "), line)
		default:
			t, err := parseThing(f)
			if err != nil {
				return nil, fmt.Errorf("line %d: %w", number, err)
			}
			if w.Find(t.Name) != nil {
				return nil, fmt.Errorf("line %d: %q twice", number, t.Name)
			}
			w.Paths = append(w.Paths, t)
		}
	}
	return w, w.check()
}

func parseThing(f []string) (Thing, error) {
	t := Thing{Name: f[0], Kind: f[1], Size: 4096}
	lists := map[string]*[]string{"signed": &t.Signed, "->": &t.Refs, "=>": &t.Outs, "from": &t.From, "licence": &t.Licences}
	mode := ""
	for _, word := range f[2:] {
		list, isList := lists[word]
		switch {
		case word == "here":
			t.Here, mode = true, ""
		case word == "unfree":
			t.Unfree, mode = graph.Yes, ""
		case word == "free":
			t.Unfree, mode = graph.No, ""
		case word == "by" || word == "size" || isList:
			mode = word
		case mode == "by":
			t.Deriver, mode = word, ""
		case mode == "size":
			n, err := strconv.ParseInt(word, 10, 64)
			if err != nil {
				return t, err
			}
			t.Size, mode = n, ""
		default:
			if list = lists[mode]; list == nil {
				return t, fmt.Errorf("%q in %q", word, strings.Join(f, " "))
			}
			*list = append(*list, word)
		}
	}
	t.originsRecorded = len(t.From)+len(t.Licences) > 0 || t.Unfree != graph.Unknown
	return t, nil
}

// Find is a path by its name, or nil.
func (w *World) Find(name string) *Thing {
	for i := range w.Paths {
		if w.Paths[i].Name == name {
			return &w.Paths[i]
		}
	}
	return nil
}

func (w *World) check() error {
	for _, t := range w.Paths {
		for _, r := range append(slices.Clone(t.Refs), t.Outs...) {
			if w.Find(r) == nil {
				return fmt.Errorf("%q refers to %q, which is not there", t.Name, r)
			}
		}
	}
	for _, l := range w.Roots {
		for _, to := range l.To {
			if w.Find(to) == nil {
				return fmt.Errorf("the root %q leads to %q, which is not there", l.At, to)
			}
		}
	}
	return nil
}

// Base is HASH-NAME of a path of any world.
func Base(name string) string { return graph.TestBase(name) }

func bases(names []string) (out []string) {
	for _, n := range names {
		out = append(out, Base(n))
	}
	return out
}

// KeyNamed is a key of that name, made of the name: it protects nothing.
func KeyNamed(name string) ed25519.PrivateKey {
	seed := sha256.Sum256([]byte("storegen test key " + name))
	return ed25519.NewKeyFromSeed(seed[:])
}

// PublicKey is that key as nix.conf and a policy have it.
func PublicKey(name string) string {
	return name + ":" + base64.StdEncoding.EncodeToString(KeyNamed(name).Public().(ed25519.PublicKey))
}

// flags are what package facts makes of the columns of such a path.
func (t *Thing) flags() graph.Flags {
	switch {
	case t.Kind == "drv":
		return graph.Derivation
	case t.Kind == "file":
		return graph.Source
	case t.Kind == "src":
		if len(t.Refs) > 0 {
			return graph.Source | graph.FixedOutput
		}
		return graph.Source | graph.FixedOutput | graph.Added
	case t.Kind == "fixed":
		return graph.FixedOutput
	case t.Here || len(t.Signed) > 0:
		return graph.Output
	}
	return graph.Output | graph.FixedOutput
}

// Graph is the world in the system store, as it is decided over. keys are the
// declared keys, NAME:BASE64; signatures by others are not known to be any.
func (w *World) Graph(keys []string) (*graph.Graph, error) {
	b := graph.NewBuilder(strings.TrimSuffix(StoreDir, "/"))
	b.Keys(keys...)
	for i := range w.Paths {
		t := &w.Paths[i]
		p := graph.Path{Base: Base(t.Name), NarSize: t.Size, Flags: t.flags() | graph.Lower, Refs: bases(t.Refs), Outputs: bases(t.Outs)}
		if t.Here {
			p.Flags |= graph.Ultimate
		}
		if t.Deriver != "" {
			p.Deriver = Base(t.Deriver)
			if d := w.Find(t.Deriver); d != nil && !slices.Contains(d.Outs, t.Name) {
				return nil, fmt.Errorf("%q does not name its output %q", d.Name, t.Name)
			}
		}
		for _, k := range keys {
			if name, _, _ := strings.Cut(k, ":"); slices.Contains(t.Signed, name) {
				p.SignedBy = append(p.SignedBy, k)
			}
		}
		if t.originsRecorded {
			p.Origin = &graph.Origin{From: t.From, Licences: t.Licences, Unfree: t.Unfree}
		}
		b.Add(p)
	}
	for _, l := range w.Roots {
		if len(l.To) == 0 {
			b.UnknownRoot(l.At)
		} else {
			b.Root(l.At, bases(l.To)...)
		}
	}
	return b.Graph()
}

// Store is the world as rows of Nix's database, signed by KeyNamed. What was
// recorded of origins is not in it.
func (w *World) Store() *Store {
	s := &Store{Paths: make([]Path, len(w.Paths))}
	index := func(names []string) (out []int32) {
		for i := range w.Paths {
			if slices.Contains(names, w.Paths[i].Name) {
				out = append(out, int32(i))
			}
		}
		return out
	}
	for i, t := range w.Paths {
		p := &s.Paths[i]
		*p = Path{ID: int64(i + 1), Base: Base(t.Name), Hash: sha256.Sum256([]byte(t.Name)), Time: 1_700_000_000, Deriver: -1,
			NarSize: t.Size, Ultimate: t.Here, Refs: index(t.Refs), Outs: index(t.Outs)}
		if t.Deriver != "" {
			if d := index([]string{t.Deriver}); d != nil {
				p.Deriver = int(d[0])
			} else {
				p.Orphan = Base(t.Deriver)
			}
		} else if t.Kind == "out" || t.Kind == "fixed" {
			p.Orphan = Base(t.Name + "-gone.drv")
		}
		switch t.Kind {
		case "drv", "file":
			p.CA = "text:sha256:" + Base32(p.Hash[:])
		case "fixed", "src":
			p.CA = "fixed:r:sha256:" + Base32(p.Hash[:])
		}
	}
	for i, t := range w.Paths {
		for _, k := range t.Signed {
			sig := ed25519.Sign(KeyNamed(k), []byte(s.Fingerprint(&s.Paths[i])))
			s.Paths[i].Sigs = strings.TrimSpace(s.Paths[i].Sigs + " " + k + ":" + base64.StdEncoding.EncodeToString(sig))
		}
	}
	return s
}

// Links makes the roots of the world below a directory, as links to the store; one
// that leads to several paths is a directory of links.
func (w *World) Links(root string) error {
	for _, l := range w.Roots {
		at := filepath.Join(root, l.At)
		var err error
		switch len(l.To) {
		case 0:
			continue
		case 1:
			err = errors.Join(os.MkdirAll(filepath.Dir(at), 0o755), os.Symlink(StoreDir+Base(l.To[0]), at))
		default:
			err = os.MkdirAll(at, 0o755)
			for _, to := range l.To {
				err = errors.Join(err, os.Symlink(StoreDir+Base(to), filepath.Join(at, to)))
			}
		}
		if err != nil {
			return err
		}
	}
	return nil
}
