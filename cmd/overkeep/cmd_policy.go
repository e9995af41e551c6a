package main

import (
	"context"
	"errors"
	"fmt"
	"io/fs"
	"path"
	"strings"

	"github.com/spf13/cobra"

	"overkeep/overlay/layout"
	"overkeep/overlay/verdict"
	"overkeep/policy"
	"overkeep/policy/graph"
)

func init() { more = append(more, newPolicy) }

func newPolicy(a *app) *cobra.Command {
	cmd := a.group(&cobra.Command{
		Use:     "policy",
		Short:   "Look after the policy: which paths are private",
		GroupID: "policy",
		Long: `The policy says which store paths are public enough for the system store. It is a
short text: "system" lines grant, "personal" lines veto, and what nothing grants is
personal. The order of lines means nothing. "overkeep help policy" has the language.

Root's policy is /etc/overkeep/policy with drop-ins in policy.d/*.policy, which
everybody can read. A keep has drop-ins of its own inside the encrypted volume;
they can only veto, and hide the names they mention.`,
		Example: `  sudo overkeep policy init
  overkeep policy check
  overkeep policy diff /etc/overkeep/policy new-policy`,
	})
	cmd.AddCommand(newPolicyCheck(a), newPolicyDiff(a), newPolicyTest(a), newPolicyShow(a), newPolicyEdit(a), newPolicyInit(a), newPolicyGraph(a))
	return cmd
}

func newPolicyCheck(a *app) *cobra.Command {
	var o struct {
		sight    sight
		minReach int
	}
	cmd := exits(&cobra.Command{
		Use:   "check",
		Short: "Find mistakes, broken requirements and surprises",
		Long: `Read the policy that is in force and say what is wrong with it (mistakes, require
lines that do not hold) and what may surprise: a private path that drags many
public ones along, lines that match nothing, what hangs on "when known".

Only mistakes and broken requirements make the exit code other than 0.`,
		Example: `  overkeep policy check
  overkeep policy check --policy draft
  overkeep policy check --json | jq .reach`,
		Args: a.args(0, 0),
		RunE: func(cmd *cobra.Command, args []string) error {
			return runPolicyCheck(cmd.Context(), a, &o.sight, o.minReach)
		},
	}, exitPolicy, exitRequire, exitNoKeep, exitDamaged)
	o.sight.add(a, cmd)
	cmd.Flags().IntVar(&o.minReach, "min-reach", 10, "name what drags at least `N` public paths along")
	return cmd
}

func runPolicyCheck(ctx context.Context, a *app, s *sight, minReach int) error {
	if minReach < 1 {
		return usagef("--min-reach %d is less than one", minReach)
	}
	if err := s.find(a); err != nil {
		return err
	}
	p, w, err := s.load(ctx, a, loaded)
	if err != nil {
		return err
	}
	s.standing(a)
	r, err := settled(ctx, func() checkReport {
		v := w.Decide(p)
		return checked(v, v.Check(policy.CheckOptions{MinReach: minReach}), w)
	})
	if err != nil {
		return err
	}
	r.scope, r.here = s.scope(), a.here()
	if err := a.ui.report(r); err != nil {
		return err
	}
	if len(r.Broken) > 0 {
		return &shownError{exitRequire} // told in its place
	}
	return nil
}

// ruleRef names a line of the policy in a report.
type ruleRef struct {
	Line string `json:"line"`
	File string `json:"file"`
	Row  int    `json:"row"`
}

func refer(p *policy.Policy, rule int) ruleRef {
	r := &p.Rules[rule]
	return ruleRef{r.Text, r.Pos.Source, r.Pos.Line}
}

func (r ruleRef) String() string { return fmt.Sprintf("%s (%s:%d)", r.Line, path.Base(r.File), r.Row) }

// amount is a number of paths and their size.
type amount struct {
	Paths int   `json:"paths"`
	Bytes int64 `json:"bytes"`
}

func (m amount) String() string { return fmt.Sprintf("%s, %s", paths(m.Paths), formatSize(m.Bytes)) }

func paths(n int) string {
	if n == 1 {
		return "1 path"
	}
	return fmt.Sprintf("%d paths", n)
}

func amountOf(t policy.Total) amount { return amount{t.Paths, t.Bytes} }

type checkReport struct {
	scope
	Lines    int          `json:"lines"`
	System   amount       `json:"system"`
	Personal amount       `json:"personal"`
	Leaked   amount       `json:"leaked"` // personal, and in the system store
	Broken   []brokenLine `json:"broken"`
	Reach    []reaching   `json:"reach"`
	Idle     []idle       `json:"idle"`
	Hanging  []hanging    `json:"hanging"`
	OnlyFor  amount       `json:"personal_for_the_unknown"`
	Unknown  []string     `json:"unresolved"`
	Notes    []string     `json:"notes"`
	// Signatures are those of declared keys: what was verified now, what was remembered
	// from before, and how many do not hold.
	Signatures checkedSigs `json:"signatures"`

	here here
}

type checkedSigs struct {
	Verified   int64 `json:"verified"`
	Remembered int64 `json:"remembered"`
	Bad        int64 `json:"bad"`
}

// idle is a line that is yes for no path.
type idle struct {
	ruleRef
	Unknown int `json:"unknown_for"`
}

type brokenLine struct {
	ruleRef
	Count      int      `json:"count"`
	Paths      []string `json:"paths"`
	Unresolved []string `json:"unresolved,omitempty"`
}

type reaching struct {
	Path  string `json:"path"`
	Pulls amount `json:"pulls"`
}

type hanging struct {
	ruleRef
	Unknown int    `json:"unknown_for"`
	Moves   amount `json:"would_move"`
}

// maxBroken is how many paths of a broken require are named.
const maxBroken = 5

func checked(v *policy.Verdicts, r *policy.Report, w *verdict.World) checkReport {
	p, g := v.Policy(), v.Index().Graph()
	out := checkReport{Lines: len(p.Rules), Broken: []brokenLine{}, Reach: []reaching{}, Idle: []idle{}, Hanging: []hanging{},
		OnlyFor: amountOf(r.OnlyFor), Unknown: append([]string{}, r.Unresolved...), Notes: append([]string{}, w.Notes...),
		Signatures: checkedSigs{w.Signatures.Verified, w.Signatures.Remembered, w.Signatures.Bad}}
	for i := range g.Len() {
		id := graph.ID(i)
		to := &out.Personal
		if v.System.Has(id) {
			to = &out.System
		} else if g.Flags[id]&graph.Lower != 0 {
			out.Leaked.Paths++
			out.Leaked.Bytes += g.NarSize[id]
		}
		to.Paths++
		to.Bytes += g.NarSize[id]
	}
	for _, b := range r.Broken {
		if b.Holds() {
			continue
		}
		line := brokenLine{ruleRef: refer(p, b.Rule), Count: len(b.Paths), Paths: []string{}, Unresolved: b.Unresolved}
		for _, id := range b.Paths[:min(len(b.Paths), maxBroken)] {
			line.Paths = append(line.Paths, g.Path(id))
		}
		out.Broken = append(out.Broken, line)
	}
	for _, x := range r.Reach {
		out.Reach = append(out.Reach, reaching{g.Path(x.ID), amountOf(x.Pulls)})
	}
	for _, rule := range r.Idle {
		out.Idle = append(out.Idle, idle{refer(p, rule), v.Stats[rule].Unknown})
	}
	for _, h := range r.Hanging {
		out.Hanging = append(out.Hanging, hanging{refer(p, h.Rule), h.Direct, amountOf(h.Moves)})
	}
	return out
}

func (r checkReport) print(p *page) {
	p.printf("%d lines. System: %s. Personal: %s.\n", r.Lines, r.System, r.Personal)
	if r.Leaked.Paths > 0 {
		p.printf("%s: %s personal, and in the system store where everybody reads them.\n", p.style("33", "misplaced"), r.Leaked)
	}
	for _, b := range r.Broken {
		p.printf("%s %s\n", p.style("1;31", "broken:"), printable(b.String()))
		for _, t := range b.Unresolved {
			p.printf("    %s cannot be resolved\n", printable(t))
		}
		for _, path := range b.Paths {
			p.printf("    %s is personal\n", printable(path))
		}
		if n := b.Count - len(b.Paths); n > 0 {
			p.printf("    and %d more\n", n)
		}
		if len(b.Paths) > 0 {
			p.printf("    why: %s\n", r.here.command(append(append([]string{"why"}, sightFlags(r.here.line)...), b.Paths[0])...))
		}
	}
	for _, x := range r.Reach {
		p.printf("%s %s pulls %s into the personal store that would be public\n", p.style("33", "wide reach:"),
			printable(shortPath(x.Path)), x.Pulls)
	}
	for _, l := range r.Idle {
		words := "matches nothing"
		if l.Unknown > 0 {
			words = "matches nothing that is known, and could not tell for " + paths(l.Unknown)
		}
		p.printf("%s %s %s\n", p.style("33", "idle:"), printable(l.String()), words)
	}
	for _, h := range r.Hanging {
		p.printf("%s %s: it could not tell for %s that are public; without \"when known\" %s would be personal\n",
			p.style("33", "when known:"), printable(h.String()), paths(h.Unknown), h.Moves)
	}
	if r.OnlyFor.Paths > 0 {
		p.printf("%s %s personal only because something is not known\n", p.style("33", "unknown:"), r.OnlyFor)
	}
	for _, t := range r.Unknown {
		p.printf("%s closure-of %s cannot be resolved\n", p.style("33", "unknown:"), printable(t))
	}
	for _, n := range r.Notes {
		p.printf("%s %s\n", p.style("33", "note:"), printable(n))
	}
	if len(r.Broken) == 0 {
		p.printf("%s\n", p.style("32", "No mistakes, and every requirement holds."))
	}
}

func newPolicyShow(a *app) *cobra.Command {
	var s sight
	cmd := exits(&cobra.Command{
		Use:   "show",
		Short: "Print the policy that is in force, all files of it",
		Long: `Print all files of the policy that is in force, each under its name, as they stand
there. With --json the lines as they are understood.`,
		Example: `  overkeep policy show
  sudo overkeep policy show --keep alice`,
		Args: a.args(0, 0),
		RunE: func(cmd *cobra.Command, args []string) error {
			return runPolicyShow(a, &s)
		},
	}, exitPolicy, exitNoKeep)
	s.add(a, cmd)
	return cmd
}

func runPolicyShow(a *app, s *sight) error {
	if err := s.find(a); err != nil {
		return err
	}
	r := shownPolicy{scope: s.scope(), Files: []shownFile{}, Rules: []ruleRef{}}
	for _, src := range s.sources {
		r.Files = append(r.Files, shownFile{src.Name, src.Root, string(src.Text)})
	}
	p, err := policy.Parse(s.sources...)
	if err == nil {
		for i := range p.Rules {
			r.Rules = append(r.Rules, refer(p, i))
		}
	} else if a.ui.json {
		return err
	}
	if rerr := a.ui.report(r); rerr != nil {
		return rerr
	}
	return err
}

type shownPolicy struct {
	scope
	Files []shownFile `json:"files"`
	Rules []ruleRef   `json:"rules"`
}

type shownFile struct {
	Name   string `json:"name"`
	Grants bool   `json:"may_grant"`
	Text   string `json:"text"`
}

func (r shownPolicy) print(p *page) {
	if len(r.Files) == 0 {
		p.printf("There is no policy: everything is personal.\n")
	}
	for i, f := range r.Files {
		if i > 0 {
			p.printf("\n")
		}
		p.printf("%s\n", p.style("1", "# "+printable(f.Name)))
		for line := range strings.Lines(f.Text) {
			p.printf("%s\n", printable(strings.TrimRight(line, "\r\n")))
		}
	}
}

func newPolicyTest(a *app) *cobra.Command {
	var s sight
	cmd := exits(&cobra.Command{
		Use:   "test [FILE...]",
		Short: "Check what is expected of the policy",
		Long: `Check the expectations kept beside the policy: for /etc/overkeep/policy the file
/etc/overkeep/policy.test, for a drop-in x.policy the file x.test, or the FILEs that
are named. A line says what is expected:

    system   name "hello-*"
    personal name "*-acme-*"           because vetoed
    personal /nix/store/*-payroll-*    because built-here

An expectation about no path fails, too.`,
		Example: `  overkeep policy test
  overkeep policy test --policy draft draft.test`,
		Args: a.args(0, maxWords),
		RunE: func(cmd *cobra.Command, args []string) error {
			return runPolicyTest(cmd.Context(), a, &s, args)
		},
	}, exitPolicy, exitExpectation, exitNoKeep)
	s.add(a, cmd)
	return cmd
}

// testFile is where the expectations of a policy file are kept.
func testFile(name string) string { return strings.TrimSuffix(name, verdict.Suffix) + ".test" }

func runPolicyTest(ctx context.Context, a *app, s *sight, files []string) error {
	if err := s.find(a); err != nil {
		return err
	}
	p, err := policy.Parse(s.sources...)
	if err != nil {
		return err
	}
	named := len(files) > 0
	if !named {
		for _, src := range s.sources {
			files = append(files, testFile(src.Name))
		}
	}
	r := testReport{scope: s.scope(), Failures: []failure{}, Files: []string{}}
	var all []*policy.Expectations
	for i, f := range files {
		// What lies beside a user's file is the user's, and no link of theirs leads root.
		src, err := verdict.PolicyFile(f, named || s.sources[i].Root)
		if errors.Is(err, fs.ErrNotExist) && !named {
			continue
		}
		if err != nil {
			return usagef("%v", err)
		}
		x, err := p.ParseExpectations(src)
		if err != nil {
			return err
		}
		r.Files = append(r.Files, f)
		r.Expectations += x.Len()
		all = append(all, x)
	}
	if len(all) == 0 {
		return usagef("there are no expectations beside the policy: a file %q, with lines such as  personal name \"*-acme-*\"", testFile(layout.PolicyFile(a.root)))
	}
	w, err := loaded(ctx, s.input, p)
	if err != nil {
		return err
	}
	s.remarks(a, w)
	v, err := settled(ctx, func() *policy.Verdicts { return w.Decide(p) })
	if err != nil {
		return err
	}
	for _, x := range all {
		for _, f := range x.Evaluate(v) {
			out := failure{ruleRef: ruleRef{f.Text, f.Pos.Source, f.Pos.Line}, Why: f.Msg, Matched: f.Matched, Count: len(f.Paths), Paths: []string{}}
			for _, id := range f.Paths[:min(len(f.Paths), maxBroken)] {
				out.Paths = append(out.Paths, w.Graph.Path(id))
			}
			r.Failures = append(r.Failures, out)
		}
	}
	if err := a.ui.report(r); err != nil {
		return err
	}
	if len(r.Failures) > 0 {
		return &shownError{exitExpectation}
	}
	return nil
}

type testReport struct {
	scope
	Files        []string  `json:"files"`
	Expectations int       `json:"expectations"`
	Failures     []failure `json:"failures"`
}

type failure struct {
	ruleRef
	Why     string   `json:"why"`
	Matched int      `json:"matched"`
	Count   int      `json:"count"`
	Paths   []string `json:"paths"`
}

func (r testReport) print(p *page) {
	for _, f := range r.Failures {
		p.printf("%s %s\n    %s\n", p.style("1;31", "failed:"), printable(f.String()), printable(f.Why))
		for _, path := range f.Paths {
			p.printf("    %s\n", printable(path))
		}
		if n := f.Count - len(f.Paths); n > 0 {
			p.printf("    and %d more\n", n)
		}
	}
	if len(r.Failures) == 0 {
		words := fmt.Sprintf("All %d expectations hold.", r.Expectations)
		if r.Expectations == 1 {
			words = "The one expectation holds."
		}
		p.printf("%s\n", p.style("32", words))
		return
	}
	p.printf("%d of %d expectations do not hold.\n", len(r.Failures), r.Expectations)
}
