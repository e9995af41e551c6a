package main

import (
	"context"
	"errors"
	"os"
	"path/filepath"
	"slices"
	"strings"

	"github.com/spf13/cobra"

	"overkeep/overlay/facts"
	"overkeep/overlay/layout"
	"overkeep/overlay/verdict"
	"overkeep/overlay/view"
	"overkeep/policy"
	"overkeep/policy/graph"
	"overkeep/systemd/keep"
)

// sight is what a command that decides looks at: which stores, by which policy.
//
// An open keep can be read in its view only, so the command runs once more in there,
// with --in-view. Without a keep, or with a locked one, it speaks of the system store
// alone, and says so.
type sight struct {
	keep     string
	policies []string
	dbs      []string
	origins  string
	inView   string
	asUser   bool // in the view it runs as the keep's user, and not as root

	// Found by find.
	input   verdict.Input
	of      *layout.Keep // whose view this is; nil: the system store alone
	sources []policy.Source
	only    string // why the keep is not in it, "" if it is
}

func (s *sight) add(a *app, cmd *cobra.Command) {
	f := cmd.Flags()
	f.StringVar(&s.keep, "keep", "", "the `KEEP` whose paths and policy count, too (default: yours, if it is open)")
	f.StringArrayVar(&s.policies, "policy", nil, "decide by this `FILE`, as if it were root's, instead of the policies that are in force; may be repeated")
	f.StringArrayVar(&s.dbs, "db", nil, "read this Nix database `FILE` as the system store instead of the machine's stores; links and derivations below its root, if it is ROOT/nix/var/nix/db/db.sqlite")
	f.StringVar(&s.inView, "in-view", "", "")
	_ = f.MarkHidden("in-view")
	_ = cmd.RegisterFlagCompletionFunc("keep", func(c *cobra.Command, _ []string, part string) ([]string, cobra.ShellCompDirective) {
		return a.completeKeep(c, nil, part)
	})
}

// find settles what is looked at; it does not come back where the command has to
// run in the view of a keep.
func (s *sight) find(a *app) error {
	if err := s.place(a); err != nil {
		return err
	}
	var err error
	if len(s.policies) == 0 {
		s.sources, err = verdict.PolicySources(a.root, s.of)
		return err
	}
	for _, f := range s.policies {
		src, err := verdict.PolicyFile(f, true)
		if err != nil {
			return usagef("%v", err)
		}
		s.sources = append(s.sources, src)
	}
	return nil
}

func (s *sight) place(a *app) error {
	if len(s.dbs) > 1 {
		return usagef("one --db at a time")
	}
	if len(s.dbs) == 1 {
		if s.keep != "" {
			return usagef("--db is another machine's store: it goes without --keep")
		}
		s.input = verdict.Input{Root: rootOf(s.dbs[0]), Stores: []facts.Store{{DB: s.dbs[0], Layer: graph.Lower}}}
		s.only = "another machine's database"
		return nil
	}
	name, err := s.viewOf(a)
	if err != nil {
		return err
	}
	if name == "" {
		s.input = verdict.System("/") // the Nix store itself is not moved by --root
		return nil
	}
	k, err := layout.New(a.root, name)
	if err != nil {
		return err
	}
	a.keep, s.of, s.input = name, &k, verdict.View(k)
	if !exists(filepath.Join(k.NixDB(), "db.sqlite")) {
		// Nix makes it for the first client: nothing was built yet.
		s.input.Stores = slices.DeleteFunc(s.input.Stores, func(st facts.Store) bool { return st.Layer == graph.Upper })
	}
	if os.Geteuid() != 0 {
		// The upper directory is root's; the databases tell nearly as well where a path lies.
		for i := range s.input.Stores {
			s.input.Stores[i].UpperDir = ""
		}
	}
	return nil
}

// sightFlags are the flags of a command line that say what is looked at, so that a
// command to paste speaks of the same.
func sightFlags(line []string) (out []string) {
	for i, w := range line {
		if w == "--" {
			break
		}
		name, _, whole := strings.Cut(w, "=")
		switch {
		case name != "--db" && name != "--policy" && name != "--keep":
		case whole:
			out = append(out, w)
		case i+1 < len(line):
			out = append(out, w, line[i+1])
		}
	}
	return out
}

// rootOf is where the root of another machine is mounted, if the database lies where
// Nix has it below that: its profiles and derivations are the ones to look at, and not
// those of this machine.
func rootOf(db string) string {
	abs, err := filepath.Abs(db)
	if root, ok := strings.CutSuffix(abs, verdict.SystemDB); err == nil && ok && root != "" {
		return root
	}
	return "/"
}

// viewOf names the keep in whose view this process is, or becomes a process there.
func (s *sight) viewOf(a *app) (string, error) {
	at, err := view.Of()
	if err != nil {
		return "", err
	}
	if at != nil {
		return at.Name, s.inside(a, at)
	}
	if s.inView != "" {
		return "", &keep.Error{Code: keep.CodeLocked, Name: s.inView, Message: "this is not the view of keep \"" + s.inView + "\""}
	}
	if s.keep == "" && os.Geteuid() != 0 {
		s.only = "a keep is read as root, or in its view"
		return "", nil
	}
	k, err := a.open(s.keep)
	if err != nil {
		var e *keep.Error
		if s.keep == "" && errors.As(err, &e) && (e.Code == keep.CodeNoKeep || e.Code == keep.CodeUsage) {
			s.only, a.keep = "no keep was named", ""
			return "", nil
		}
		return "", err
	}
	if err := needRoot(); err != nil {
		return "", err
	}
	err = k.Exec(inViewLine(a, k.Name), !s.asUser)
	var e *keep.Error
	if s.keep == "" && errors.As(err, &e) && e.Code == keep.CodeLocked {
		s.only = "keep " + k.Name + " is locked"
		return "", nil
	}
	return "", err
}

// inside sees that the view this is in is the one that is meant. The mount says which
// it is: sudo takes the environment away, and anybody can set it.
func (s *sight) inside(a *app, at *layout.Keep) error {
	root, err := layout.CheckRoot(a.root)
	if err != nil {
		return err
	}
	for _, name := range []string{s.keep, s.inView} {
		if name != "" && name != at.Name {
			return usagef("this is the view of keep %q: leave it to ask about %q", at.Name, name)
		}
	}
	if a.root != "" && root != at.Root {
		return usagef("this is the view of a keep below %q: leave it to ask about %q", at.Root, root)
	}
	if at.Root != "/" {
		a.root = at.Root // the environment of a view does not have it
	}
	return nil
}

// inViewLine is the command line once more, for the view of a keep. What is added
// stands in front: behind the words there may be a "--", and among them a flag that
// waits for its value.
func inViewLine(a *app, name string) []string {
	line := []string{a.exe, "--in-view=" + name}
	if a.root != "" && !hasFlag(a.line, "root") {
		line = append(line, "--root="+a.root)
	}
	return append(line, a.line...)
}

// load parses the policies in force and loads what they need.
func (s *sight) load(ctx context.Context, a *app, how loader) (*policy.Policy, *verdict.World, error) {
	p, err := policy.Parse(s.sources...)
	if err != nil {
		return nil, nil, err
	}
	a.ui.progress("reading the stores")
	w, err := how(ctx, s.input, p)
	if err != nil {
		return nil, nil, err
	}
	return p, w, nil
}

type loader func(context.Context, verdict.Input, ...*policy.Policy) (*verdict.World, error)

// loaded is verdict.Load for whoever needs the graph alone: the databases are closed,
// so that nothing of Nix waits while somebody reads the answer in a pager.
func loaded(ctx context.Context, in verdict.Input, policies ...*policy.Policy) (*verdict.World, error) {
	w, err := verdict.Load(ctx, in, policies...)
	if err != nil {
		return nil, err
	}
	return w, w.Close()
}

// settled waits for what f works out, or until ctx ends: no policy is so heavy that
// one could not leave. f then goes on until the process ends, so it must change nothing.
func settled[T any](ctx context.Context, f func() T) (T, error) {
	done := make(chan T, 1)
	go func() { done <- f() }()
	select {
	case v := <-done:
		return v, nil
	case <-ctx.Done():
		var none T
		return none, ctx.Err()
	}
}

// remarks are what a reader has to know beside a verdict.
func (s *sight) remarks(a *app, w *verdict.World) {
	s.standing(a)
	for _, n := range w.Notes {
		a.ui.note("%s", n)
	}
}

// standing says from where the stores are looked at.
func (s *sight) standing(a *app) {
	if s.only != "" && len(s.dbs) == 0 {
		a.ui.caveat("this is the system store alone: %s", s.only)
	}
	if len(s.sources) == 0 {
		a.ui.caveat("there is no policy, so everything is personal; make one: %s", a.here().command("policy", "init"))
	}
}

// scope says in a report which stores it speaks of.
type scope struct {
	Keep string `json:"keep,omitempty"` // whose personal store is in it
	Only string `json:"only,omitempty"` // why there is none
}

func (s *sight) scope() scope {
	if s.of != nil {
		return scope{Keep: s.of.Name}
	}
	return scope{Only: s.only}
}
