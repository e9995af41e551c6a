// Package verdict brings the facts of the stores and the lines of a policy together,
// for a command that has to say what is private and why.
//
// It promises: facts are loaded only as far as the policies ask for them; a fact that
// cannot be had is unknown, and never an error that would have to be passed over; a
// policy file that cannot be read is an error, for a veto in it would be lost.
//
// Start with PolicySources and policy.Parse, then Load for all of the stores or
// LoadFor for a few paths; World.Decide may be called for one policy after another.
//
// It acts on nothing. Do not use it inside of policy's own tests: a graph can be made
// there by hand.
package verdict

import (
	"context"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"slices"

	"overkeep/overlay/facts"
	"overkeep/overlay/layout"
	"overkeep/overlay/signature"
	"overkeep/policy"
	"overkeep/policy/graph"
)

// Input says where the facts are.
type Input struct {
	Stores   []facts.Store
	StoreDir string // "/nix/store" if empty

	// Root is where the absolute targets of links begin that closure-of names.
	Root string

	// Memory is the file of signatures that were verified before; it is made when it
	// is missing. "": none. It must lie in a keep (package signature says why).
	Memory string

	// Origins is the directory of recorded origins; "": none, and they are unknown.
	Origins string
}

// System is the system's store alone, below root.
func System(root string) Input {
	return Input{Root: root, Stores: []facts.Store{{DB: filepath.Join("/", root, SystemDB), Layer: graph.Lower}}}
}

// SystemDB is Nix's database of the system store.
const SystemDB = "/nix/var/nix/db/db.sqlite"

// View is both stores, as they are seen inside the view of an open keep. Nix's own
// places are not moved by the keep's root.
func View(k layout.Keep) Input {
	return Input{
		Root: "/",
		Stores: []facts.Store{
			{DB: SystemDB, Layer: graph.Lower},
			{DB: filepath.Join(k.NixDB(), "db.sqlite"), Layer: graph.Upper, UpperDir: k.Upper()},
		},
		Memory:  filepath.Join(k.Facts(), "signatures"),
		Origins: k.Provenance(),
	}
}

// World is the stores at one moment, with what the policies asked to know of them.
type World struct {
	*facts.Snapshot
	Engine     *policy.Index
	Signatures signature.Stats
	Notes      []string // what could not be found out, in words
}

// Decide places every path.
func (w *World) Decide(p *policy.Policy) *policy.Verdicts { return w.Engine.Decide(p) }

// Load loads all paths, and of the facts what any of the policies needs. Close the
// World. Errors are those of package facts, and *os.PathError.
func Load(ctx context.Context, in Input, policies ...*policy.Policy) (*World, error) {
	closures, err := resolve(ctx, in, policies)
	if err != nil {
		return nil, err
	}
	return load(ctx, in, policies, closures, func(o facts.Options) (*facts.Snapshot, error) { return facts.Open(ctx, in.Stores, o) })
}

func load(ctx context.Context, in Input, policies []*policy.Policy, closures []closure, open func(facts.Options) (*facts.Snapshot, error)) (_ *World, err error) {
	w := &World{}
	o := facts.Options{StoreDir: in.StoreDir}
	var memory *signature.Memory
	if keys := declared(policies); len(keys) > 0 {
		if in.Memory != "" {
			if memory, err = signature.Load(in.Memory); err != nil {
				if errors.Is(err, os.ErrPermission) || errors.Is(err, signature.ErrUnsafe) {
					memory = nil // they are verified again, and not remembered
				}
				if !errors.Is(err, os.ErrPermission) {
					w.note("signatures that were verified before: %v", err)
				}
			}
		}
		v, err := newVerifier(storeDir(in), keys, memory)
		if err != nil {
			return nil, err
		}
		o.Verifier = v
		for _, k := range keys {
			o.Keys = append(o.Keys, k.String())
		}
		defer func() { w.Signatures = v.stats }()
	}
	if w.Snapshot, err = open(o); err != nil {
		return nil, err
	}
	defer func() {
		if err != nil {
			err = errors.Join(err, w.Close())
		}
	}()
	if n := w.Report.Dropped; n > 0 {
		w.note("%d rows of the databases name no path of the store: nothing is said of them", n)
	}
	if memory != nil {
		if err := memory.Save(); err != nil {
			w.note("signatures could not be remembered: %v", err)
		}
	}
	w.addRoots(closures)
	if err := w.addOrigins(in, policies); err != nil {
		return nil, err
	}
	w.Engine, err = policy.NewIndex(w.Graph)
	return w, err
}

func (w *World) note(format string, a ...any) { w.Notes = append(w.Notes, fmt.Sprintf(format, a...)) }

func storeDir(in Input) string {
	if in.StoreDir != "" {
		return in.StoreDir
	}
	return layout.NixStore
}

// needs is what any of the policies needs.
func needs(policies []*policy.Policy) (n policy.Needs) {
	for _, p := range policies {
		x := p.Needs()
		n.Signatures = n.Signatures || x.Signatures
		n.Origins = n.Origins || x.Origins
		n.Sizes = n.Sizes || x.Sizes
		n.BuildInput = n.BuildInput || x.BuildInput
		n.ClosureOf = n.ClosureOf || x.ClosureOf
	}
	return n
}

// declared are the keys of the policies, each once, if signatures matter at all. Two
// policies may declare a name with different values.
func declared(policies []*policy.Policy) []policy.Key {
	if !needs(policies).Signatures {
		return nil
	}
	var out []policy.Key
	for _, p := range policies {
		for _, k := range p.Keys {
			if !slices.ContainsFunc(out, func(o policy.Key) bool { return o.String() == k.String() }) {
				out = append(out, k)
			}
		}
	}
	return out
}
