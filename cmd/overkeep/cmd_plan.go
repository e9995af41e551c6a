package main

import (
	"context"
	"encoding/json"
	"fmt"
	"path"
	"strings"

	"github.com/spf13/cobra"

	"overkeep/overlay/plan"
	"overkeep/overlay/verdict"
	"overkeep/policy"
	"overkeep/policy/graph"
)

func init() { more = append(more, newPlan) }

type planOptions struct {
	planner
	out      string
	policies []string
	all      bool
}

func newPlan(a *app) *cobra.Command {
	var o planOptions
	cmd := exits(&cobra.Command{
		Use:        "plan",
		SuggestFor: []string{"preview", "migrate", "diff"},
		Short:      "Show which paths would move between the stores, and why",
		GroupID:    "moves",
		Long: `Compare what the policy wants with where the paths lie, and show what "apply" would
do: which paths move into the keep (seal) or into the system store (release), grouped
by the line that decides, with their sizes; what follows them, for it refers to them;
which of your own links (results, profiles) move along; what cannot move, and what
holds it: the running system, a root of somebody else's, a running process; and what
will remain readable that no software can take away.

It moves nothing. --out writes the plan into a file, so that "apply" does exactly that
or refuses. A plan names private paths: the file must lie in the keep.`,
		Example: `  sudo overkeep plan
  sudo overkeep plan --all
  sudo overkeep plan --out ~/keep/plan
  sudo overkeep plan --policy draft
  sudo overkeep plan --json | jq -r '.blocked[] | "\(.path) \(.why) \(.by)"'`,
		Args: a.args(0, 0),
		RunE: func(cmd *cobra.Command, _ []string) error { return runPlan(cmd.Context(), a, o) },
	}, exitLocked, exitPolicy, exitRequire, exitNotRoot, exitNoKeep, exitExists, exitDamaged)
	o.add(a, cmd)
	f := cmd.Flags()
	f.StringVar(&o.out, "out", "", "write the plan into `FILE`, which must lie in the keep")
	f.StringArrayVar(&o.policies, "policy", nil, "plan by this `FILE`, as if it were root's, instead of the policies that are in force; may be repeated")
	f.BoolVar(&o.all, "all", false, "name every path, not only sums")
	a.exclusive(cmd, "out", "policy")
	return cmd
}

func runPlan(ctx context.Context, a *app, o planOptions) error {
	o.sight.policies = o.policies
	if err := o.find(a); err != nil {
		return err
	}
	w, in, err := o.load(ctx, a, plan.Misplaced)
	if err != nil {
		return err
	}
	p, err := o.decide(ctx, a, w, in)
	if err != nil {
		return err
	}
	r := o.report(p)
	r.all = o.all
	r.Broken = brokenLines(w, in.Verdicts)
	if o.out != "" {
		if err := o.writePlan(o.out, p); err != nil {
			return err
		}
		r.File = o.out
	}
	if r.next = a.here().command("apply", o.out); len(o.policies) > 0 {
		r.next = ""
	}
	if err := a.ui.report(r); err != nil {
		return err
	}
	if len(r.Broken) > 0 {
		return &shownError{exitRequire}
	}
	return nil
}

// brokenLines are the require lines that do not hold, in words: docs/POLICY.md has plan
// fail with them.
func brokenLines(w *verdict.World, v *policy.Verdicts) (out []string) {
	for _, b := range v.Check(policy.CheckOptions{}).Broken {
		if b.Holds() {
			continue
		}
		line := refer(v.Policy(), b.Rule).String()
		if len(b.Paths) > 0 {
			line += ": " + w.Graph.Path(b.Paths[0])
		}
		out = append(out, line)
	}
	return out
}

// planReport is a plan as it is shown. Moves and Stay are of the JSON alone.
type planReport struct {
	*plan.Plan
	Seal    amount         `json:"seal"`
	Release amount         `json:"release"`
	Groups  []plan.Group   `json:"groups"`
	Moves   []plannedMove  `json:"moves"`
	Along   []plan.Root    `json:"roots"`
	Holds   []plan.Hold    `json:"holds"`
	Stay    []plannedStay  `json:"blocked"`
	Remains []plan.Residue `json:"residue"`
	Broken  []string       `json:"broken_requirements,omitempty"`
	File    string         `json:"file,omitempty"`
	ways    func(i, most int) []string
	all     bool
	next    string
}

// plannedMove is a move with its reason instead of the reason's number.
type plannedMove struct {
	plan.Move
	Why plan.Reason `json:"reason"`
}

type plannedStay struct {
	plan.Blocked
	Why   plan.Reason `json:"reason"`
	Holds string      `json:"why"`
	Way   []string    `json:"way"` // from what holds it to the path, the last maxWay of it
}

// maxWay is how many paths of the way to a blocked path are given.
const maxWay = 12

func (p *planner) report(of *plan.Plan) *planReport {
	r := &planReport{Plan: of, Groups: of.Groups(), Holds: of.Holds(), ways: of.Ways(), Along: of.Roots, Remains: of.Residue}
	for i := range of.Moves {
		m := &of.Moves[i]
		sum := &r.Seal
		if m.Kind == plan.Release {
			sum = &r.Release
		}
		sum.Paths++
		sum.Bytes += m.NarSize
	}
	return r
}

// MarshalJSON writes every path out, with its reason and its way; no list is null.
func (r *planReport) MarshalJSON() ([]byte, error) {
	type plain planReport // without this method
	out := plain(*r)
	out.Groups, out.Holds = append([]plan.Group{}, r.Groups...), append([]plan.Hold{}, r.Holds...)
	out.Along, out.Remains = append([]plan.Root{}, r.Along...), append([]plan.Residue{}, r.Remains...)
	out.Moves, out.Stay = []plannedMove{}, []plannedStay{}
	for i := range r.Plan.Moves {
		m := &r.Plan.Moves[i]
		out.Moves = append(out.Moves, plannedMove{*m, r.ReasonOf(m)})
	}
	for i := range r.Blocked {
		b := &r.Blocked[i]
		out.Stay = append(out.Stay, plannedStay{*b, r.ReasonOf(&b.Move), string(b.Why), r.ways(i, maxWay)})
	}
	return json.Marshal(out)
}

// text is the report as it is shown before a question.
func (p *planner) text(a *app, of *plan.Plan) string {
	var b strings.Builder
	p.report(of).print(&page{w: &b, color: a.ui.color})
	return strings.TrimSuffix(b.String(), "\n")
}

// A summary fits a screen. Fewer moves than maxNamed are named all.
const (
	maxNamed  = 20
	maxGroups = 5 // of each direction
	maxRoots  = 3
	maxHolds  = 4
)

func (r *planReport) print(p *page) {
	for _, line := range r.Broken {
		p.printf("%s %s\n", p.style("31", "Not as required:"), printable(line))
	}
	if len(r.Plan.Moves) == 0 && len(r.Blocked) == 0 {
		p.printf("%s\n", p.style("32", "Every path lies where the policy wants it."))
		return
	}
	for _, k := range []struct {
		kind   plan.Kind
		amount amount
		words  string
	}{{plan.Seal, r.Seal, "from the system store into the keep"}, {plan.Release, r.Release, "from the keep into the system store"}} {
		if k.amount.Paths > 0 {
			p.printf("%s %s %s:\n", p.style("1", upper(string(k.kind))), k.amount, k.words)
			r.printGroups(p, k.kind)
		}
	}
	r.printRoots(p)
	r.printStay(p)
	if len(r.Remains) > 0 {
		p.printf("%s\n", p.style("1", "What no move takes away:"))
		for _, x := range r.Remains {
			p.printf("  %s\n", x.Words)
		}
	}
	if r.File != "" {
		p.printf("Written to %s.\n", printable(r.File))
	}
	if len(r.Plan.Moves) > 0 && r.next != "" {
		p.printf("Do it: %s\n", r.next)
	}
}

func upper(s string) string { return strings.ToUpper(s[:1]) + s[1:] }

func (r *planReport) printGroups(p *page, kind plan.Kind) {
	shown := 0
	for _, g := range r.Groups {
		if g.Kind != kind {
			continue
		}
		if shown++; shown > maxGroups && !r.all {
			continue
		}
		p.printf("  %s  %s\n", amount{g.Paths, g.Bytes}, printable(reasonLine(g.Reason)))
		var notes []string
		if g.Following > 0 {
			what := "because they refer to these"
			if kind == plan.Release {
				what = "because these refer to them"
			}
			notes = append(notes, fmt.Sprintf("%s %s", amount{g.Following, g.FollowingBytes}, what))
		}
		if g.Duplicates > 0 {
			where := "the keep has them already"
			if kind == plan.Release {
				where = "the system store has them already"
			}
			notes = append(notes, fmt.Sprintf("%s: %s", amount{g.Duplicates, g.DuplicateBytes}, where))
		}
		if len(notes) > 0 {
			p.printf("      of these %s\n", strings.Join(notes, "; "))
		}
		if r.all {
			r.printMoves(p, kind, g.Reason)
		}
	}
	if n := shown - maxGroups; n > 0 && !r.all {
		p.printf("  and %d more reasons (--all)\n", n)
	}
}

func (r *planReport) printMoves(p *page, kind plan.Kind, why plan.Reason) {
	var table [][]string
	for i := range r.Plan.Moves {
		if m := &r.Plan.Moves[i]; m.Kind == kind && r.ReasonOf(m) == why {
			note := ""
			if m.Follows != "" {
				note = "for the sake of " + shortPath(m.Follows)
			}
			if m.Duplicate {
				note = strings.TrimPrefix(note+", is in both stores", ", ")
			}
			table = append(table, []string{formatSize(m.NarSize), m.Path, note})
		}
	}
	p.table("      ", table)
}

// reasonLine says a reason in one line.
func reasonLine(why plan.Reason) string {
	words := why.Reason
	for reason, text := range reasonWords {
		if reason.String() == why.Reason {
			words = text
		}
	}
	if why.Reason == plan.Asked {
		words = "you asked for it"
	}
	if why.Line == "" {
		return words
	}
	return fmt.Sprintf("%s  (%s:%d)", why.Line, path.Base(why.File), why.Row)
}

func (r *planReport) printRoots(p *page) {
	if len(r.Along) == 0 {
		return
	}
	p.printf("%s\n", p.style("1", "Links of yours that move into the keep with them:"))
	for i, x := range r.Along {
		if i == maxRoots && !r.all {
			p.printf("  and %d more (--all)\n", len(r.Along)-i)
			break
		}
		p.printf("  %s -> %s\n", printable(x.Link), printable(strings.TrimPrefix(x.To, "home/")))
	}
}

func (r *planReport) printStay(p *page) {
	if len(r.Blocked) == 0 {
		return
	}
	sum := amount{Paths: len(r.Blocked)}
	for i := range r.Blocked {
		sum.Bytes += r.Blocked[i].NarSize
	}
	p.printf("%s %s:\n", p.style("33", "Cannot move"), sum)
	for i, h := range r.Holds {
		if i == maxHolds && !r.all {
			p.printf("  and held by %d others (--all)\n", len(r.Holds)-i)
			break
		}
		b := &r.Blocked[h.First]
		p.printf("  %s  %s\n", amount{h.Paths, h.Bytes}, printable(blockedWords(b)))
		if !r.all {
			p.printf("      %s\n", printable(wayWords(r.ways(h.First, maxWay))))
			continue
		}
		for n := range r.Blocked {
			if b := &r.Blocked[n]; b.Kind == h.Kind && b.Why == h.Why && b.By == h.By {
				p.printf("      %s  %s\n", printable(b.Path), printable(wayWords(r.ways(n, maxWay))))
			}
		}
	}
}

// wayWords is a way in names.
func wayWords(way []string) string {
	names := make([]string, len(way))
	for i, w := range way {
		names[i] = shortPath(w)
	}
	return strings.Join(names, " → ")
}

// blockedWords say why a path cannot move.
func blockedWords(b *plan.Blocked) string {
	by := b.By
	if strings.HasPrefix(by, "/nix/store/") && len(path.Base(by)) > graph.HashLen+1 {
		by = shortPath(by)
	}
	switch b.Why {
	case plan.BlockedBoot:
		return "the running or booted system needs it: " + by
	case plan.BlockedOther:
		return "held by a root that is not yours: " + by
	case plan.BlockedKeepPin:
		return "another keep needs it: " + by
	case plan.BlockedProcess:
		return "a running process uses it: " + by
	case plan.BlockedTemp:
		return "a client of the system's nix-daemon is at work with it: " + by
	case plan.BlockedReferenced:
		return "what stays in the system store refers to it: " + by
	case plan.BlockedNeeds:
		return "it refers to what does not come to the system store: " + by
	case plan.BlockedDiffers:
		return "the two stores hold it with different data"
	case plan.BlockedGone:
		return "it is not there any more"
	default:
		return "its row in Nix's database cannot be read, or has no hash"
	}
}
