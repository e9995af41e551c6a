package verdict

import (
	"context"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"os"
	"path/filepath"
	"strings"

	"golang.org/x/sys/unix"

	"overkeep/overlay/drv"
	"overkeep/overlay/provenance"
	"overkeep/overlay/roots"
	"overkeep/policy"
	"overkeep/policy/graph"
)

// closure is what a closure-of target leads to on disk.
type closure struct {
	target string
	found  roots.Result
	err    error // why it is unknown
}

// resolve follows the closure-of targets of the policies, each once. Its own error is
// ctx's.
func resolve(ctx context.Context, in Input, policies []*policy.Policy) (out []closure, err error) {
	r := roots.Resolver{Root: in.Root, StoreDir: in.StoreDir}
	done := map[string]bool{}
	for _, p := range policies {
		for _, target := range p.Roots() {
			if done[target] {
				continue
			}
			done[target] = true
			if err := ctx.Err(); err != nil {
				return nil, err
			}
			found, err := r.Resolve(target)
			out = append(out, closure{target, found, err})
		}
	}
	return out, nil
}

// addRoots tells the graph where the targets lead. What could not be resolved stays
// unknown; policy.Report says so.
func (w *World) addRoots(closures []closure) {
	w.Graph.Roots = map[string]graph.Root{}
	for _, c := range closures {
		err := c.err
		if err == nil {
			var root graph.Root
			root, err = c.found.Graph(func(base string) (graph.ID, bool) {
				id := w.Index.Base([]byte(base))
				return id, id != graph.NoID
			})
			w.Graph.Roots[c.target] = root
		}
		if err != nil {
			w.note("closure-of is unknown: %v", err)
		}
		if c.found.Anyone || len(c.found.Writers) > 0 {
			w.note("closure-of %s: others than root decide where it leads (%s)", c.target, writers(c.found))
		}
	}
}

func writers(r roots.Result) string {
	if r.Anyone {
		return "a directory on the way is open to others"
	}
	var uids []string
	for _, u := range r.Writers {
		uids = append(uids, fmt.Sprint(u))
	}
	return "uid " + strings.Join(uids, ", ")
}

// addOrigins fills in what was recorded of where paths came from, and what the
// derivations of fixed outputs say themselves.
func (w *World) addOrigins(in Input, policies []*policy.Policy) error {
	if !needs(policies).Origins {
		return nil
	}
	g := w.Graph
	known := map[graph.ID]graph.Origin{}
	if in.Origins != "" {
		store, err := provenance.Open(in.Origins)
		switch {
		case errors.Is(err, fs.ErrNotExist), errors.Is(err, fs.ErrPermission):
			w.note("recorded origins cannot be read here, so they are unknown")
		case err != nil:
			return fmt.Errorf("recorded origins: %w", err)
		default:
			for base, o := range store.All() {
				if id := w.Index.Base([]byte(base)); id != graph.NoID {
					known[id] = o
				}
			}
			if n := store.Damaged(); n > 0 {
				w.note("%d recorded origins cannot be read", n)
			}
		}
	}
	w.fromDerivations(in, known)
	if len(known) == 0 {
		return nil
	}
	g.Origin = make([]int32, g.Len())
	for i := range g.Origin {
		g.Origin[i] = -1
	}
	for id, o := range known {
		g.Origin[id] = int32(len(g.Origins))
		g.Origins = append(g.Origins, o)
	}
	return nil
}

// fromDerivations adds the URLs that a derivation names for an output whose content
// it fixes by hash. A derivation that cannot be read makes its outputs broken: what
// went into them is not known.
func (w *World) fromDerivations(in Input, known map[graph.ID]graph.Origin) {
	g, dir := w.Graph, storeDir(in)
	for i := range g.Len() {
		id := graph.ID(i)
		if g.Flags[id]&graph.FixedOutput == 0 {
			continue
		}
		made := w.DeriverOf(id)
		if made == "" {
			continue
		}
		path := dir + "/" + made
		b, err := readDerivation(filepath.Join("/", in.Root, path))
		if errors.Is(err, fs.ErrNotExist) {
			continue // valid in a database whose files are elsewhere, as with --db
		}
		var d *drv.Derivation
		if err == nil {
			d, err = drv.ParseAt(dir, path, b)
		}
		if err != nil {
			w.note("%s cannot be read: %v", path, err)
			g.Flags[id] |= graph.Broken
			continue
		}
		for _, r := range provenance.Derivation(dir, d) {
			if of := w.Index.Base([]byte(r.Path)); of != graph.NoID {
				o := known[of]
				o.From = append(o.From, r.From...)
				known[of] = o
			}
		}
	}
}

// readDerivation reads a file of at most the size that a derivation may have; one byte
// more, so that the parser says so. A link, a pipe or a device is none.
func readDerivation(name string) ([]byte, error) {
	f, err := os.OpenFile(name, os.O_RDONLY|unix.O_NOFOLLOW|unix.O_NONBLOCK, 0)
	if err != nil {
		return nil, err
	}
	defer f.Close()
	fi, err := f.Stat()
	if err != nil {
		return nil, err
	}
	if !fi.Mode().IsRegular() {
		return nil, &fs.PathError{Op: "read", Path: name, Err: errors.New("no regular file")}
	}
	return io.ReadAll(io.LimitReader(f, drv.MaxSize+1))
}
