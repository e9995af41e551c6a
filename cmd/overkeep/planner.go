package main

import (
	"context"
	"crypto/rand"
	"crypto/sha256"
	"encoding/hex"
	"errors"
	"fmt"
	"io"
	"os"
	"path/filepath"
	"strings"
	"time"

	"github.com/google/renameio/v2"
	"github.com/spf13/cobra"
	"golang.org/x/sys/unix"

	"overkeep/overlay/cache"
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

// planner makes plans: a process in the keep's view that reads both stores.
type planner struct {
	sight sight
	keep  *keep.Keep
	user  view.User
}

func (m *planner) add(a *app, cmd *cobra.Command) { m.sight.add(a, cmd) }

// find comes back as root in the view of an open keep, or with an error.
func (m *planner) find(ctx context.Context, a *app) error {
	if err := needRoot(); err != nil {
		return err
	}
	if len(m.sight.dbs) > 0 {
		return usagef("--db is another machine's store: nothing moves there")
	}
	if err := m.sight.find(a); err != nil {
		return err
	}
	if m.sight.of == nil {
		// Of the keep that would be meant, the error says what to do.
		k, err := a.open(m.sight.keep)
		if err != nil {
			return err
		}
		return &keep.Error{Code: keep.CodeLocked, Name: k.Name, Message: fmt.Sprintf("keep %q is locked: paths move into an open one", k.Name)}
	}
	var err error
	if m.keep, err = a.manager().Open(m.sight.of.Name); err != nil {
		return err
	}
	// A keep that nothing was built in has none yet.
	if err := m.keep.CreateDatabase(ctx); err != nil {
		return err
	}
	m.user, err = m.keep.User()
	return err
}

func (m *planner) place() gcroot.Place {
	return gcroot.Place{Keep: m.keep.Keep, User: m.user, WorkDir: m.keep.Header.WorkDir}
}

// links moves the user's roots.
func (m *planner) links() gcroot.Mover { return gcroot.Mover{Place: m.place()} }

// roots are those of the system store, as its own daemon knows them.
func (m *planner) roots(ctx context.Context) ([]plan.Root, error) {
	f := gcroot.Finder{Place: m.place(), Socket: filepath.Join(m.keep.SystemSocketDir(), "socket")}
	return f.Find(ctx)
}

// load reads the stores, the policies and the roots for a plan.
func (m *planner) load(ctx context.Context, a *app) (*policy.Policy, *verdict.World, plan.Input, error) {
	in := plan.Input{Keep: m.keep.Name, KeepID: m.keep.Header.ID, Created: time.Now().UTC().Format(time.RFC3339)}
	p, w, err := m.sight.load(ctx, a, loaded)
	if err != nil {
		return nil, nil, in, err
	}
	m.sight.remarks(a, w)
	v, err := settled(ctx, func() *policy.Verdicts { return w.Decide(p) })
	if err != nil {
		return nil, nil, in, err
	}
	in.Graph, in.Verdicts = w.Graph, v
	if in.Roots, err = m.roots(ctx); err != nil {
		return nil, nil, in, err
	}
	sum := sha256.New()
	for _, s := range p.Sources() {
		fmt.Fprintf(sum, "%d:%s%d:%s", len(s.Name), s.Name, len(s.Text), s.Text)
	}
	in.Policy = hex.EncodeToString(sum.Sum(nil))
	if in.Machine, err = machineID(); err != nil {
		return nil, nil, in, err
	}
	in.Medium = m.medium()
	return p, w, in, nil
}

// make makes a plan of what in asks for, over the stores as they are now.
func (m *planner) make(ctx context.Context, a *app, mode plan.Mode) (*plan.Plan, error) {
	_, _, in, err := m.load(ctx, a)
	if err != nil {
		return nil, err
	}
	in.Mode = mode
	return m.decide(ctx, in)
}

// chosen makes a plan of paths that words name: those to seal and those to release.
func (m *planner) chosen(ctx context.Context, a *app, seal, release []string) (*plan.Plan, error) {
	p, w, in, err := m.load(ctx, a)
	if err != nil {
		return nil, err
	}
	_ = w
	in.Mode = plan.Chosen
	ix := facts.NewIndex(in.Graph)
	for _, side := range []struct {
		words []string
		to    *[]graph.ID
		layer graph.Flags
	}{{seal, &in.Seal, graph.Lower}, {release, &in.Release, graph.Upper}} {
		if len(side.words) == 0 {
			continue
		}
		part, ids, err := verdict.LoadFor(ctx, m.sight.input, p, side.words)
		if err != nil {
			return nil, err
		}
		for i, list := range ids {
			n := 0
			for _, id := range list {
				g := part.Graph
				whole := ix.Base(g.Base[g.BaseOff[id]:g.BaseOff[id+1]])
				if whole == graph.NoID {
					continue
				}
				// A name or pattern means those of its paths that lie where they are to go from.
				if len(list) > 1 && in.Graph.Flags[whole]&side.layer == 0 {
					continue
				}
				*side.to = append(*side.to, whole)
				n++
			}
			if n == 0 {
				_ = part.Close()
				return nil, &pathError{side.words[i]}
			}
		}
		if err := part.Close(); err != nil {
			return nil, err
		}
	}
	return m.decide(ctx, in)
}

// exact makes a plan of these store paths and no others, whatever the policy says. Those
// that are not there are returned beside it.
func (m *planner) exact(ctx context.Context, a *app, seal, release []string) (*plan.Plan, []string, error) {
	_, _, in, err := m.load(ctx, a)
	if err != nil {
		return nil, nil, err
	}
	in.Mode = plan.Exact
	ix := facts.NewIndex(in.Graph)
	var gone []string
	for _, side := range []struct {
		paths []string
		to    *[]graph.ID
		layer graph.Flags
	}{{seal, &in.Seal, graph.Lower}, {release, &in.Release, graph.Upper}} {
		for _, p := range side.paths {
			id := ix.Path(p)
			if id == graph.NoID || in.Graph.Flags[id]&side.layer == 0 {
				gone = append(gone, p)
				continue
			}
			*side.to = append(*side.to, id)
		}
	}
	p, err := m.decide(ctx, in)
	return p, gone, err
}

// decide makes the plan, with the hashes that the databases have.
func (m *planner) decide(ctx context.Context, in plan.Input) (*plan.Plan, error) {
	asks := map[plan.Kind]*rowReader{}
	for kind, db := range map[plan.Kind]string{plan.Seal: verdict.SystemDB, plan.Release: filepath.Join(m.keep.NixDB(), "db.sqlite")} {
		r, err := newRowReader(ctx, db)
		if err != nil {
			return nil, err
		}
		defer r.close()
		asks[kind] = r
	}
	g := in.Graph
	in.Row = func(k plan.Kind, id graph.ID) (string, int64, error) {
		return asks[k].row(ctx, layout.NixStore+"/"+string(g.Base[g.BaseOff[id]:g.BaseOff[id+1]]))
	}
	return plan.Make(in)
}

// rowReader asks one database for single rows; a database that is not there has none.
type rowReader struct {
	s *nixdb.Snapshot
	l *nixdb.Lookup
}

func newRowReader(ctx context.Context, db string) (*rowReader, error) {
	s, err := nixdb.OpenSnapshot(ctx, db, 1)
	if errors.Is(err, nixdb.ErrMissing) {
		return &rowReader{}, nil
	}
	if err != nil {
		return nil, err
	}
	l, err := s.Lookup()
	if err != nil {
		_ = s.Close()
		return nil, err
	}
	return &rowReader{s, l}, nil
}

func (r *rowReader) row(ctx context.Context, path string) (string, int64, error) {
	var row nixdb.Row
	if r.s == nil {
		return "", 0, nil
	}
	ok, err := r.l.ByPath(ctx, []byte(path), &row)
	if !ok || err != nil || row.Wrong {
		return "", 0, err
	}
	return string(row.Hash), row.NarSize, nil
}

func (r *rowReader) close() {
	if r.s != nil {
		r.l.Close()
		_ = r.s.Close()
	}
}

// machineID tells this machine from others (machine-id(5)).
func machineID() (string, error) {
	b, err := os.ReadFile("/etc/machine-id")
	if errors.Is(err, os.ErrNotExist) {
		return "uninitialized", nil // as a first boot has it; the plan's key tells keeps apart
	}
	return strings.TrimSpace(string(b)), err
}

// medium is what the disk of the system store is like.
func (m *planner) medium() plan.Medium {
	out, err := m.keep.Outside()
	if err != nil {
		return plan.Medium{}
	}
	defer out.Close()
	return storeMedium(out.Store)
}

// planKey authenticates plans: root's, inside the keep.
func (m *planner) planKey() ([]byte, error) {
	dir := m.keep.Journal()
	if err := os.Mkdir(dir, 0o700); err != nil && !errors.Is(err, os.ErrExist) {
		return nil, err
	}
	file := filepath.Join(dir, "plan.key")
	b, err := readFile(file, 64)
	if err == nil && len(b) == 32 {
		return b, nil
	}
	if err != nil && !errors.Is(err, os.ErrNotExist) {
		return nil, err
	}
	b = make([]byte, 32)
	if _, err := rand.Read(b); err != nil {
		return nil, err
	}
	return b, renameio.WriteFile(file, b, 0o600)
}

// maxPlan bounds the file of a plan: a million moves.
const maxPlan = 1 << 30

func (m *planner) readPlan(file string) ([]byte, error) { return readFile(file, maxPlan) }

func (m *planner) decodePlan(b []byte) (*plan.Plan, error) {
	key, err := m.planKey()
	if err != nil {
		return nil, err
	}
	id, err := machineID()
	if err != nil {
		return nil, err
	}
	return plan.Decode(b, key, plan.Expect{Machine: id, KeepID: m.keep.Header.ID})
}

// readFile reads a file of at most so many bytes.
func readFile(file string, most int64) ([]byte, error) {
	f, err := os.OpenFile(file, os.O_RDONLY|unix.O_NONBLOCK, 0)
	if err != nil {
		return nil, err
	}
	defer f.Close()
	b, err := io.ReadAll(io.LimitReader(f, most+1))
	if err == nil && int64(len(b)) > most {
		err = fmt.Errorf("%q is longer than %d bytes", file, most)
	}
	return b, err
}

// closure reads the rows of paths and of all they refer to from the keep, as a binary
// cache takes them.
func (m *planner) closure(ctx context.Context, paths []string) ([]cache.Info, error) {
	if len(paths) == 0 {
		return nil, nil
	}
	rows, err := nixdb.ReadClosure(ctx, filepath.Join(m.keep.NixDB(), "db.sqlite"), paths)
	if err != nil {
		return nil, err
	}
	out := make([]cache.Info, 0, len(rows))
	for _, r := range rows {
		hash, err := hex.DecodeString(strings.TrimPrefix(r.NarHash, "sha256:"))
		if err != nil || len(hash) != sha256.Size {
			return nil, fmt.Errorf("%q has no NAR hash", r.Path)
		}
		out = append(out, cache.Info{Path: r.Path, NarHash: [32]byte(hash), NarSize: r.NarSize, Refs: r.Refs, Deriver: r.Deriver, Sigs: r.Sigs, CA: r.CA})
	}
	return out, nil
}
