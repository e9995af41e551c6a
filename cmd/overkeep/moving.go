package main

import (
	"context"
	"crypto/sha256"
	"encoding/hex"
	"errors"
	"fmt"
	"os"
	"os/user"
	"path/filepath"
	"strconv"
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
	p.user, err = userOf(p.keep)
	return err
}

// userOf is the keep's user, as the view was made for.
func userOf(k *keep.Keep) (view.User, error) {
	u, err := user.Lookup(k.Header.User)
	if err != nil {
		return view.User{}, &keep.Error{Code: keep.CodeForeign, Name: k.Header.User, Message: err.Error()}
	}
	uid, uerr := strconv.Atoi(u.Uid)
	gid, gerr := strconv.Atoi(u.Gid)
	if uerr != nil || gerr != nil || uid != k.Header.UID {
		return view.User{}, &keep.Error{Code: keep.CodeForeign, Name: k.Header.User,
			Message: fmt.Sprintf("keep %q was made for user %q with uid %d, who now has uid %s", k.Name, k.Header.User, k.Header.UID, u.Uid)}
	}
	home, err := filepath.EvalSymlinks(u.HomeDir)
	if err != nil {
		home = u.HomeDir
	}
	return view.User{Name: u.Username, UID: uid, GID: gid, Home: home}, nil
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

// make makes a plan: of in it needs the mode and what is chosen.
func (p *planner) make(ctx context.Context, a *app, in plan.Input) (*plan.Plan, error) {
	w, err := p.load(ctx, a, &in)
	if err != nil {
		return nil, err
	}
	return p.makeIn(ctx, a, w, in)
}

// load reads both stores, and has the policy decide; plan.Exact asks none.
func (p *planner) load(ctx context.Context, a *app, in *plan.Input) (*verdict.World, error) {
	if in.Mode == plan.Exact {
		a.ui.progress("reading the stores")
		w, err := loaded(ctx, p.sight.input)
		if err == nil {
			in.Graph = w.Graph
		}
		return w, err
	}
	pol, w, err := p.sight.load(ctx, a, loaded)
	if err != nil {
		return nil, err
	}
	p.sight.remarks(a, w)
	in.Policy = policyDigest(p.sight.sources)
	in.Verdicts, err = settled(ctx, func() *policy.Verdicts { return w.Decide(pol) })
	return w, err
}

func (p *planner) makeIn(ctx context.Context, a *app, w *verdict.World, in plan.Input) (_ *plan.Plan, err error) {
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

// makeOf makes a plan for what words name: to be sealed, and to be released. For
// plan.Exact they are store paths, and what has gone is blocked instead of an error.
func (p *planner) makeOf(ctx context.Context, a *app, mode plan.Mode, seal, release []string) (*plan.Plan, error) {
	in := plan.Input{Mode: mode}
	w, err := p.load(ctx, a, &in)
	if err != nil {
		return nil, err
	}
	var gone [2][]string
	for i, d := range []struct {
		words []string
		ids   *[]graph.ID
	}{{seal, &in.Seal}, {release, &in.Release}} {
		if *d.ids, gone[i], err = p.named(ctx, w, in.Mode, d.words); err != nil {
			return nil, err
		}
	}
	out, err := p.makeIn(ctx, a, w, in)
	if err != nil {
		return nil, err
	}
	out.Gone(plan.Seal, gone[0]...)
	out.Gone(plan.Release, gone[1]...)
	return out, nil
}

// named finds the paths of words in a world of both stores as a whole.
func (p *planner) named(ctx context.Context, w *verdict.World, mode plan.Mode, words []string) (ids []graph.ID, gone []string, err error) {
	var others []string
	for _, word := range words {
		switch id := w.Index.Path(word); {
		case id != graph.NoID:
			ids = append(ids, id)
		case mode == plan.Exact:
			gone = append(gone, word)
		default:
			others = append(others, word)
		}
	}
	if len(others) == 0 {
		return ids, gone, nil
	}
	none, err := policy.Parse()
	if err != nil {
		return nil, nil, err
	}
	part, found, err := verdict.LoadFor(ctx, p.sight.input, none, others)
	if err != nil {
		return nil, nil, err
	}
	defer part.Close()
	for i, list := range found {
		n := len(ids)
		for _, id := range list {
			if whole := w.Index.Path(part.Graph.Path(id)); whole != graph.NoID {
				ids = append(ids, whole)
			}
		}
		if len(ids) == n {
			return nil, nil, &pathError{others[i]}
		}
	}
	return ids, nil, nil
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
