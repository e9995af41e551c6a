package main

import (
	"context"
	"fmt"
	"slices"
	"strings"
	"time"

	"github.com/spf13/cobra"

	"overkeep/overlay/drv/storepath"
	"overkeep/overlay/layout"
	"overkeep/overlay/provenance"
	"overkeep/overlay/view"
	"overkeep/policy/glob"
	"overkeep/policy/graph"
	"overkeep/systemd/keep"
)

func init() { more = append(more, newOrigin) }

func newOrigin(a *app) *cobra.Command {
	cmd := a.group(&cobra.Command{
		Use:     "origin",
		Short:   "What is known of where paths come from",
		GroupID: "policy",
		Long: `Nix does not remember where a path comes from. Overkeep records it inside the keep,
encrypted, for the lines of a policy that ask for "from", "licence" and "unfree":

  by itself      the inputs of flakes that were evaluated in the view, from their
                 lock files; the URLs of fetched files, from their derivations
  when asked     what "overkeep origin record" finds out: the inputs of a flake and
                 the flake itself, licences, and whether a package is unfree

All of it is what the flake or the package says of itself. What was never recorded
is unknown: a "personal" line counts then, too, unless it says "when known".`,
		Example: `  sudo overkeep origin record /home/alice/keep/payroll
  sudo overkeep origin list
  overkeep list --where 'from "git+ssh://*acme*"'`,
	})
	cmd.AddCommand(newOriginRecord(a), newOriginList(a), newOriginForget(a))
	return cmd
}

// originSight is whose keep a command about origins works on.
type originSight struct {
	sight
	k *keep.Keep
}

func (o *originSight) add(a *app, cmd *cobra.Command) {
	f := cmd.Flags()
	f.StringVar(&o.keep, "keep", "", "the `KEEP`, which must be open (default: yours)")
	f.StringVar(&o.inView, "in-view", "", "")
	_ = f.MarkHidden("in-view")
	_ = cmd.RegisterFlagCompletionFunc("keep", func(c *cobra.Command, _ []string, part string) ([]string, cobra.ShellCompDirective) {
		return a.completeKeep(c, nil, part)
	})
}

// enter goes into the view, in which alone the records can be read; it comes back
// there as root, or with an error.
func (o *originSight) enter(a *app) error {
	if err := needRoot(); err != nil {
		return &keep.Error{Code: keep.CodeNotRoot, Message: "recorded origins are root's: a record that a user forged could make private things public"}
	}
	if o.inView == "" {
		k, err := a.open(o.keep)
		if err != nil {
			return err
		}
		o.keep = k.Name
		inside, err := view.Inside()
		if err != nil {
			return err
		}
		if inside { // with sudo, which does not say whose view it is
			o.inView = k.Name
		}
	}
	if err := o.place(a); err != nil {
		return err
	}
	k, err := a.manager().Open(o.of.Name)
	if err != nil {
		return err
	}
	o.k = k
	return k.InView()
}

// store is what is recorded.
func (o *originSight) store() (*provenance.Store, error) {
	s, err := provenance.Open(o.k.Provenance())
	if err != nil {
		return nil, fmt.Errorf("recorded origins: %w", err)
	}
	return s, nil
}

// learned is a record as it is shown.
type learned struct {
	Path     string   `json:"path"`
	From     []string `json:"from,omitempty"`
	Licences []string `json:"licences,omitempty"`
	Unfree   *bool    `json:"unfree"` // null: unknown
	How      string   `json:"how,omitempty"`
	When     string   `json:"when,omitempty"` // RFC 3339, UTC
}

func learnedOf(r provenance.Record) learned {
	l := learned{Path: layout.NixStore + "/" + r.Path, From: r.From, Licences: r.Licences, Unfree: triBool(r.Unfree), How: r.How}
	if r.When != 0 {
		l.When = time.Unix(r.When, 0).UTC().Format(time.RFC3339)
	}
	return l
}

func triBool(t graph.Tri) *bool {
	if t == graph.Unknown {
		return nil
	}
	yes := t == graph.Yes
	return &yes
}

// says is what a record tells, a line each.
func (l learned) says() []string {
	var out []string
	for _, u := range l.From {
		out = append(out, "from "+u)
	}
	for _, u := range l.Licences {
		out = append(out, "licence "+u)
	}
	if l.Unfree != nil && *l.Unfree {
		out = append(out, "unfree")
	} else if l.Unfree != nil {
		out = append(out, "free")
	}
	return out
}

// originMatch compiles a PATTERN of list and forget: a store path, the base name,
// the hash or the name of one, or a pattern of names or base names.
func originMatch(pattern string) (func(base string) bool, error) {
	p := strings.TrimPrefix(pattern, layout.NixStore+"/")
	if strings.Contains(p, "/") {
		return nil, usagef("%q is neither a path of the store nor a name", pattern)
	}
	g, err := glob.Compile(p)
	if err != nil {
		return nil, usagef("%q: %v", pattern, err)
	}
	return func(base string) bool {
		return g.Match([]byte(base)) || g.Match([]byte(storepath.Name(base))) || base[:graph.HashLen] == p
	}, nil
}

func newOriginList(a *app) *cobra.Command {
	var o originSight
	cmd := exits(&cobra.Command{
		Use:   "list [PATTERN]",
		Short: "Show what is recorded of which path, how and when",
		Long: `Show what is recorded of the paths whose name, HASH-NAME or store path matches
PATTERN (default: of all), how it was learned and when. A path need not be in a
store any more, or yet: a lock file tells of inputs that were never fetched.`,
		Example: `  sudo overkeep origin list
  sudo overkeep origin list 'payroll-*'
  sudo overkeep origin list --json | jq -r '.paths[] | select(.unfree) | .path'`,
		Args: a.args(0, 1),
		RunE: func(cmd *cobra.Command, args []string) error {
			return runOriginList(a, &o, first(args))
		},
	}, exitLocked, exitNoKeep, exitNotRoot, exitDamaged)
	o.add(a, cmd)
	return cmd
}

type originList struct {
	Keep    string       `json:"keep"`
	Paths   []originPath `json:"paths"`
	Damaged int          `json:"damaged"` // records that cannot be read
}

type originPath struct {
	learned           // all that is known
	Records []learned `json:"records"`
}

func runOriginList(a *app, o *originSight, pattern string) error {
	match := func(string) bool { return true }
	var err error
	if pattern != "" {
		if match, err = originMatch(pattern); err != nil {
			return err
		}
	}
	if err := o.enter(a); err != nil {
		return err
	}
	store, err := o.store()
	if err != nil {
		return err
	}
	records, err := store.Records()
	if err != nil {
		return err
	}
	r := originList{Keep: o.k.Name, Paths: []originPath{}, Damaged: store.Damaged()}
	at := map[string]int{}
	for _, rec := range records {
		if !match(rec.Path) {
			continue
		}
		i, ok := at[rec.Path]
		if !ok {
			i = len(r.Paths)
			at[rec.Path] = i
			known, _ := store.Origin(rec.Path)
			r.Paths = append(r.Paths, originPath{learned: learnedOf(provenance.Record{Path: rec.Path,
				From: known.From, Licences: known.Licences, Unfree: known.Unfree})})
		}
		r.Paths[i].Records = append(r.Paths[i].Records, learnedOf(rec))
	}
	slices.SortFunc(r.Paths, func(x, y originPath) int {
		return strings.Compare(shortPath(x.Path)+"\x00"+x.Path, shortPath(y.Path)+"\x00"+y.Path)
	})
	return a.ui.report(r)
}

func (r originList) print(p *page) {
	for _, x := range r.Paths {
		p.printf("%s\n", p.style("1", printable(x.Path)))
		for _, rec := range x.Records {
			for _, s := range rec.says() {
				p.printf("    %s  %s\n", printable(s), p.style("2", fmt.Sprintf("(%s, %s)", printable(rec.How), rec.When)))
			}
		}
	}
	if len(r.Paths) == 0 {
		p.printf("Nothing is recorded.\n")
	}
	if r.Damaged > 0 {
		p.printf("%s %d records cannot be read; what they said is unknown.\n", p.style("1;31", "damaged:"), r.Damaged)
	}
}

func newOriginForget(a *app) *cobra.Command {
	var o originSight
	var dryRun bool
	cmd := exits(&cobra.Command{
		Use:   "forget PATTERN",
		Short: "Forget what is recorded of paths",
		Long: `Forget all that is recorded of the paths whose name, HASH-NAME or store path matches
PATTERN, for what was recorded by mistake.

What is forgotten is unknown again, so a line "personal ... when known" that it made
count may count no more, and the path be public. What a lock file says comes back
at the latest when the keep is unlocked the next time, if its flake is still there.`,
		Example: `  sudo overkeep origin forget 'payroll-*' --dry-run
  sudo overkeep origin forget 0c1...-source`,
		Args: a.args(1, 1, "PATTERN"),
		RunE: func(cmd *cobra.Command, args []string) error {
			return runOriginForget(cmd.Context(), a, &o, args[0], dryRun)
		},
	}, exitLocked, exitNoKeep, exitNotRoot, exitAborted)
	o.add(a, cmd)
	dryRunFlag(cmd, &dryRun)
	return cmd
}

type forgotten struct {
	Keep   string   `json:"keep"`
	DryRun bool     `json:"dry_run"`
	Paths  []string `json:"paths"`
}

func runOriginForget(ctx context.Context, a *app, o *originSight, pattern string, dryRun bool) error {
	match, err := originMatch(pattern)
	if err != nil {
		return err
	}
	if err := o.enter(a); err != nil {
		return err
	}
	store, err := o.store()
	if err != nil {
		return err
	}
	r := forgotten{Keep: o.k.Name, DryRun: dryRun, Paths: []string{}}
	for base := range store.All() {
		if match(base) {
			r.Paths = append(r.Paths, layout.NixStore+"/"+base)
		}
	}
	slices.Sort(r.Paths)
	if dryRun || len(r.Paths) == 0 {
		return a.ui.report(r)
	}
	if !a.yes {
		ok, err := a.ui.confirm(ctx, fmt.Sprintf("Forget where %s came from? A veto that needs to know it will be silent.", paths(len(r.Paths))))
		if err != nil {
			return err
		}
		if !ok {
			return aborted("nothing was forgotten")
		}
	}
	if _, err := store.Forget(match); err != nil {
		return err
	}
	return a.ui.done(r)
}

func (r forgotten) print(p *page) {
	switch {
	case len(r.Paths) == 0:
		p.printf("Nothing is recorded of such a path.\n")
		return
	case r.DryRun:
		p.printf("%s\n", p.style("1", "Nothing was done. This would be forgotten, of:"))
	default:
		p.printf("Forgotten, of:\n")
	}
	for _, x := range r.Paths {
		p.printf("    %s\n", printable(x))
	}
}
