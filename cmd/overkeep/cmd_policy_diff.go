package main

import (
	"cmp"
	"context"
	"slices"

	"github.com/spf13/cobra"

	"overkeep/overlay/verdict"
	"overkeep/policy"
)

func newPolicyDiff(a *app) *cobra.Command {
	var o struct {
		sight sight
		all   bool
	}
	cmd := exits(&cobra.Command{
		Use:   "diff OLD NEW",
		Short: "Say which paths another policy would move",
		Long: `Decide by two policies over the same stores and say what would move: how many paths
and bytes each way, the paths, and for what becomes personal for a reference, which
path drags it along. OLD and NEW are files; "-" is the policy that is in force.

It moves nothing.`,
		Example: `  overkeep policy diff - draft
  overkeep policy diff /etc/overkeep/policy draft --all
  overkeep policy diff - draft --json | jq '.moves[] | select(.to == "system") | .path'`,
		Args: a.args(2, 2, "the old policy", "the new policy"),
		RunE: func(cmd *cobra.Command, args []string) error {
			return runPolicyDiff(cmd.Context(), a, &o.sight, args, o.all)
		},
	}, exitPolicy, exitNoKeep, exitDamaged)
	o.sight.add(a, cmd)
	cmd.Flags().BoolVar(&o.all, "all", false, "name all paths, not only the largest")
	return cmd
}

func runPolicyDiff(ctx context.Context, a *app, s *sight, names []string, all bool) error {
	if err := s.find(a); err != nil {
		return err
	}
	var two []*policy.Policy
	for _, name := range names {
		sources := s.sources
		if name != "-" {
			src, err := verdict.PolicyFile(name, true)
			if err != nil {
				return usagef("%v", err)
			}
			sources = []policy.Source{src}
		}
		p, err := policy.Parse(sources...)
		if err != nil {
			return err
		}
		two = append(two, p)
	}
	a.ui.progress("reading the stores")
	w, err := loaded(ctx, s.input, two...)
	if err != nil {
		return err
	}
	for _, n := range w.Notes {
		a.ui.note("%s", n)
	}
	r, err := settled(ctx, func() diffReport {
		after := w.Decide(two[1])
		return moved(policy.Diff(w.Decide(two[0]), after), after)
	})
	if err != nil {
		return err
	}
	r.scope, r.all = s.scope(), all
	return a.ui.report(r)
}

type diffReport struct {
	scope
	ToSystem   amount     `json:"to_system"`
	ToPersonal amount     `json:"to_personal"`
	Moves      []pathMove `json:"moves"`
	all        bool
}

type pathMove struct {
	Path  string `json:"path"`
	Bytes int64  `json:"bytes"`
	To    string `json:"to"`               // system, personal
	Next  string `json:"refers,omitempty"` // what it refers to, if that is why it is personal
	Cause string `json:"cause,omitempty"`  // and the path that decides

	Line *ruleRef `json:"line,omitempty"` // of the new policy, that decides about the path itself
}

func moved(c *policy.Changes, after *policy.Verdicts) diffReport {
	g := after.Index().Graph()
	out := diffReport{ToSystem: amountOf(c.ToSystem), ToPersonal: amountOf(c.ToPersonal), Moves: []pathMove{}}
	for _, m := range c.Moves {
		x := pathMove{Path: m.Path, Bytes: m.Bytes, To: placement(m.ToSystem)}
		if m.Pull != nil {
			x.Next, x.Cause = g.Path(m.Pull.Next), g.Path(m.Pull.Cause)
		} else if _, rule := after.Reason(m.After); rule != policy.NoRule {
			line := refer(after.Policy(), rule)
			x.Line = &line
		}
		out.Moves = append(out.Moves, x)
	}
	slices.SortFunc(out.Moves, func(x, y pathMove) int {
		return cmp.Or(cmp.Compare(y.To, x.To), cmp.Compare(y.Bytes, x.Bytes), cmp.Compare(x.Path, y.Path))
	})
	return out
}

// maxMoves is how many paths are named each way without --all.
const maxMoves = 20

func (r diffReport) print(p *page) {
	if len(r.Moves) == 0 {
		p.printf("Nothing would move.\n")
		return
	}
	for _, way := range []struct {
		to     string
		amount amount
	}{{"system", r.ToSystem}, {"personal", r.ToPersonal}} {
		if way.amount.Paths == 0 {
			continue
		}
		p.printf("%s into the %s store:\n", way.amount, placeStyle(p, way.to))
		var rows [][]string
		for _, m := range r.Moves {
			if m.To != way.to {
				continue
			}
			why := "no line grants it"
			switch {
			case m.Line != nil:
				why = m.Line.String()
			case m.Cause != "":
				why = "refers to " + shortPath(m.Next)
				if m.Cause != m.Next {
					why += ", for the sake of " + shortPath(m.Cause)
				}
			}
			rows = append(rows, []string{formatSize(m.Bytes), m.Path, why})
			if len(rows) == maxMoves && !r.all {
				break
			}
		}
		p.table("  ", rows)
		if n := way.amount.Paths - len(rows); n > 0 {
			p.printf("  and %d more (--all)\n", n)
		}
	}
}
