package main

import (
	"context"
	"crypto/sha256"
	"encoding/hex"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"time"

	"github.com/moby/sys/mountinfo"
	"github.com/spf13/cobra"

	"overkeep/overlay/facts"
	"overkeep/overlay/gcroot"
	"overkeep/overlay/layout"
	"overkeep/overlay/nixdb"
	"overkeep/overlay/plan"
	"overkeep/overlay/verdict"
	"overkeep/overlay/view"
	"overkeep/policy"
	"overkeep/policy/graph"
	"overkeep/systemd/keep"
)

// planner is what the commands share that make plans: it lives as root in the view of
// an open keep, and knows whose that is. Call find first.
type planner struct {
	sight sight
	host  string // gcroot.Finder.Host

	// Found by find.
	keep *keep.Keep
	user view.User
}

// add adds the flags that say which keep. There is none for another policy or another
// machine's stores: what is moved is this machine's, by the policy in force.
func (p *planner) add(a *app, cmd *cobra.Command) {
	f := cmd.Flags()
	f.StringVar(&p.sight.keep, "keep", "", "the `KEEP` (default: yours)")
	f.StringVar(&p.sight.inView, "in-view", "", "")
	_ = f.MarkHidden("in-view")
	_ = cmd.RegisterFlagCompletionFunc("keep", func(c *cobra.Command, _ []string, part string) ([]string, cobra.ShellCompDirective) {
		return a.completeKeep(c, nil, part)
	})
}

// find does not come back where the command has to run in the view of the keep. A keep
// that is locked, or that there is not, is an error: moves need both stores.
func (p *planner) find(a *app) error {
	if err := needRoot(); err != nil {
		return err
	}
	if err := p.sight.find(a); err != nil {
		return err
	}
	if p.sight.of == nil {
		k, err := a.open(p.sight.keep) // says why there is none
		if err != nil {
			return err
		}
		return &keep.Error{Code: keep.CodeLocked, Name: k.Name, Message: fmt.Sprintf("keep %q is locked: moves need both stores", k.Name)}
	}
	var err error
	if p.keep, err = a.manager().Open(p.sight.of.Name); err != nil {
		return err
	}
	if err := p.keep.InView(); err != nil {
		return err
	}
	p.user, err = p.keep.User()
	return err
}

// place is whose roots move along.
func (p *planner) place() gcroot.Place {
	return gcroot.Place{Keep: p.keep.Keep, User: p.user, WorkDir: p.keep.Header.WorkDir}
}

// roots are all roots of the system store as it says now.
func (p *planner) roots(ctx context.Context) ([]plan.Root, error) {
	f := gcroot.Finder{Place: p.place(), Socket: filepath.Join(p.keep.SystemSocketDir(), "socket"), Host: p.host}
	return f.Find(ctx)
}

// links moves the user's roots.
func (p *planner) links() gcroot.Mover { return gcroot.Mover{Place: p.place(), Host: p.host} }

// make makes a plan of the stores as they are now, by a mode that needs no paths.
func (p *planner) make(ctx context.Context, a *app, mode plan.Mode) (*plan.Plan, error) {
	w, in, err := p.load(ctx, a, mode)
	if err != nil {
		return nil, err
	}
	return p.decide(ctx, a, w, in)
}

// chosen makes a plan of the paths that words name: those to be sealed and those to be
// released, with all that has to follow. A word for several paths means those of them
// that lie where they are to go from. Errors also *pathError, and those of plan.Make.
func (p *planner) chosen(ctx context.Context, a *app, seal, release []string) (*plan.Plan, error) {
	w, in, err := p.load(ctx, a, plan.Chosen)
	if err != nil {
		return nil, err
	}
	if in.Seal, err = p.named(ctx, w, seal, graph.Lower); err != nil {
		return nil, err
	}
	in.Seal = append(in.Seal, makers(w.Graph, in.Seal)...)
	if in.Release, err = p.named(ctx, w, release, graph.Upper); err != nil {
		return nil, err
	}
	return p.decide(ctx, a, w, in)
}

// makers are the derivations in the system store that make paths: their text names
// what they make, and so would tell of it.
func makers(g *graph.Graph, ids []graph.ID) (out []graph.ID) {
	made := graph.NewBits(g.Len())
	for _, id := range ids {
		made.Set(id)
	}
	for d := range g.Len() {
		for _, o := range g.Outs[g.OutOff[d]:g.OutOff[d+1]] {
			if made.Has(o) && g.Flags[d]&graph.Lower != 0 {
				out = append(out, graph.ID(d))
				break
			}
		}
	}
	return out
}

// exact makes a plan of these store paths and no others, whatever the policy says: it is
// not even read. Those that do not lie where they are to go from are returned beside it.
func (p *planner) exact(ctx context.Context, a *app, seal, release []string) (_ *plan.Plan, gone []string, err error) {
	w, in, err := p.load(ctx, a, plan.Exact)
	if err != nil {
		return nil, nil, err
	}
	for _, side := range []struct {
		paths []string
		to    *[]graph.ID
		layer graph.Flags
	}{{seal, &in.Seal, graph.Lower}, {release, &in.Release, graph.Upper}} {
		for _, path := range side.paths {
			if id := w.Index.Path(path); id != graph.NoID && w.Graph.Flags[id]&side.layer != 0 {
				*side.to = append(*side.to, id)
			} else {
				gone = append(gone, path)
			}
		}
	}
	out, err := p.decide(ctx, a, w, in)
	return out, gone, err
}

// load reads both stores, and has the policy decide; plan.Exact asks none.
func (p *planner) load(ctx context.Context, a *app, mode plan.Mode) (*verdict.World, plan.Input, error) {
	in := plan.Input{Mode: mode}
	if mode == plan.Exact {
		a.ui.progress("reading the stores")
		w, err := loaded(ctx, p.sight.input)
		if err != nil {
			return nil, in, err
		}
		in.Graph = w.Graph
		return w, in, nil
	}
	pol, w, err := p.sight.load(ctx, a, loaded)
	if err != nil {
		return nil, in, err
	}
	p.sight.remarks(a, w)
	in.Policy = policyDigest(p.sight.sources)
	in.Verdicts, err = settled(ctx, func() *policy.Verdicts { return w.Decide(pol) })
	return w, in, err
}

// decide makes the plan of what load and others have brought together.
func (p *planner) decide(ctx context.Context, a *app, w *verdict.World, in plan.Input) (_ *plan.Plan, err error) {
	a.ui.progress("asking who holds what")
	if in.Roots, err = p.roots(ctx); err != nil {
		return nil, err
	}
	if in.Machine, err = machine(); err != nil {
		return nil, err
	}
	in.Keep, in.KeepID, in.Created = p.keep.Name, p.keep.Header.ID, time.Now().UTC().Format(time.RFC3339)
	in.Medium = medium()
	rows, err := openRows(ctx, p.sight.input.Stores, w.Graph)
	if err != nil {
		return nil, err
	}
	defer func() { err = errors.Join(err, rows.close()) }()
	in.Row = rows.row
	a.ui.progress("planning")
	defer a.ui.endProgress()
	return plan.Make(in)
}

// named finds the paths of words in a world of both stores as a whole.
func (p *planner) named(ctx context.Context, w *verdict.World, words []string, layer graph.Flags) (ids []graph.ID, err error) {
	if len(words) == 0 {
		return nil, nil
	}
	none, err := policy.Parse()
	if err != nil {
		return nil, err
	}
	part, found, err := verdict.LoadFor(ctx, p.sight.input, none, words)
	if err != nil {
		return nil, err
	}
	defer func() { err = errors.Join(err, part.Close()) }()
	for i, list := range found {
		var whole []graph.ID
		for _, id := range list {
			if id := w.Index.Path(part.Graph.Path(id)); id != graph.NoID {
				whole = append(whole, id)
			}
		}
		if len(whole) == 0 {
			return nil, &pathError{words[i]}
		}
		if there := slices.DeleteFunc(slices.Clone(whole), func(id graph.ID) bool { return w.Graph.Flags[id]&layer == 0 }); len(there) > 0 {
			whole = there // else plan.Make says where they lie
		}
		ids = append(ids, whole...)
	}
	return ids, nil
}

// rows looks rows up in the database of the store that a path leaves.
type rows struct {
	ctx   context.Context
	g     *graph.Graph
	snaps []*nixdb.Snapshot
	of    map[plan.Kind]*nixdb.Lookup
}

func openRows(ctx context.Context, stores []facts.Store, g *graph.Graph) (_ *rows, err error) {
	r := &rows{ctx: ctx, g: g, of: map[plan.Kind]*nixdb.Lookup{}}
	defer func() {
		if err != nil {
			err = errors.Join(err, r.close())
		}
	}()
	for _, s := range stores {
		kind := plan.Seal
		if s.Layer == graph.Upper {
			kind = plan.Release
		}
		snap, err := nixdb.OpenSnapshot(ctx, s.DB, 1)
		if err != nil {
			return nil, err
		}
		r.snaps = append(r.snaps, snap)
		if r.of[kind], err = snap.Lookup(); err != nil {
			return nil, err
		}
	}
	return r, nil
}

func (r *rows) row(k plan.Kind, id graph.ID) (string, int64, error) {
	l := r.of[k]
	if l == nil {
		return "", 0, nil
	}
	var row nixdb.Row
	found, err := l.ByPath(r.ctx, []byte(r.g.Path(id)), &row)
	if err != nil || !found || row.Wrong {
		return "", 0, err
	}
	return string(row.Hash), row.NarSize, nil
}

func (r *rows) close() error {
	var errs []error
	for _, l := range r.of {
		l.Close()
	}
	for _, s := range r.snaps {
		errs = append(errs, s.Close())
	}
	return errors.Join(errs...)
}

// policyDigest tells whether two plans were made by the same policies.
func policyDigest(sources []policy.Source) string {
	h := sha256.New()
	for _, s := range sources {
		fmt.Fprintf(h, "%q %v %q\n", s.Name, s.Root, s.Text)
	}
	return hex.EncodeToString(h.Sum(nil))
}

// machine names this machine to itself and to nobody else: machine-id(5) asks not to
// show the id. Without one the keep's key still binds a plan.
func machine() (string, error) {
	b, err := os.ReadFile("/etc/machine-id")
	if err != nil && !errors.Is(err, os.ErrNotExist) {
		return "", err
	}
	sum := sha256.Sum256([]byte("overkeep plan " + strings.TrimSpace(string(b))))
	return hex.EncodeToString(sum[:16]), nil
}

// medium looks at what the system store lies on. What cannot be found out is left
// open: then more residue is named, not less.
func medium() (m plan.Medium) {
	mounts, err := mountinfo.GetMounts(mountinfo.ParentsFilter(layout.NixStore))
	if err != nil {
		return m
	}
	var at *mountinfo.Info
	for _, i := range mounts {
		if i.FSType != "overlay" || i.Mountpoint != layout.NixStore { // that is the view's
			if at == nil || len(i.Mountpoint) >= len(at.Mountpoint) {
				at = i
			}
		}
	}
	if at == nil {
		return m
	}
	m.FSType = at.FSType
	for _, queue := range []string{"queue", "../queue"} { // of a disk, of a partition
		b, err := os.ReadFile(fmt.Sprintf("/sys/dev/block/%d:%d/%s/discard_max_bytes", at.Major, at.Minor, queue))
		if err == nil {
			m.Discard = strings.TrimSpace(string(b)) != "0"
			break
		}
	}
	links, err := os.Open(layout.NixStore + "/.links")
	if err == nil {
		names, _ := links.Readdirnames(1)
		m.Links = len(names) > 0
		links.Close()
	}
	return m
}
