package main

import (
	"context"
	"fmt"
	"path"
	"strings"

	"github.com/spf13/cobra"

	"overkeep/overlay/verdict"
	"overkeep/policy"
	"overkeep/policy/graph"
)

func init() { more = append(more, newWhy) }

type whyOptions struct {
	sight sight
	all   bool
	paths []string
}

// maxWords is how many paths are explained at once.
const maxWords = 10000

// maxWhy is how many paths one word of the command line may stand for.
const maxWhy = 10

func newWhy(a *app) *cobra.Command {
	var o whyOptions
	cmd := exits(&cobra.Command{
		Use:        "why PATH...",
		SuggestFor: []string{"explain", "why-private"},
		Short:      "Say why a path is private, or public",
		GroupID:    "policy",
		Long: `Say for store paths whether they belong into the system store or into the keep,
and why: the deciding reason first, then every line of the policy that spoke (+
grants, - vetoes, ? could not tell), and the shortest way to the path that decides.

A PATH may be a store path or any file below one, the hash or the name of one (or
a pattern of names, in quotes), or a link to one: a profile, a result.

Only what the answer needs is read, so it is fast in a store of any size.`,
		Example: `  overkeep why /nix/store/0c1...-payroll-0.3
  overkeep why payroll
  overkeep why 'acme-*' --all
  overkeep why ./result
  sudo overkeep why --keep alice /home/alice/.local/state/nix/profiles/profile`,
		Args: a.args(1, maxWords, "a store path, a name, a hash or a link"),
		RunE: func(cmd *cobra.Command, args []string) error {
			o.paths = args
			return runWhy(cmd.Context(), a, o)
		},
	}, exitNoPath, exitPolicy, exitNoKeep, exitDamaged)
	o.sight.add(a, cmd)
	cmd.Flags().BoolVar(&o.all, "all", false, fmt.Sprintf("explain all paths of a name, also more than %d", maxWhy))
	return cmd
}

func runWhy(ctx context.Context, a *app, o whyOptions) error {
	if err := o.sight.find(a); err != nil {
		return err
	}
	p, err := policy.Parse(o.sight.sources...)
	if err != nil {
		return err
	}
	a.ui.progress("reading the stores")
	w, ids, err := verdict.LoadFor(ctx, o.sight.input, p, o.paths)
	if err != nil {
		return err
	}
	if err := w.Close(); err != nil {
		return err
	}
	o.sight.remarks(a, w)
	v, err := settled(ctx, func() *policy.Verdicts { return w.Decide(p) })
	if err != nil {
		return err
	}
	r := whyReport{scope: o.sight.scope(), Notes: w.Notes}
	for i, list := range ids {
		if len(list) == 0 {
			return &pathError{o.paths[i]}
		}
		for n, id := range list {
			if n == maxWhy && !o.all {
				r.Left += len(list) - n
				break
			}
			r.Paths = append(r.Paths, explained(v, v.Why(id)))
		}
	}
	return a.ui.report(r)
}

// pathError is a word that names no path of the stores.
type pathError struct{ word string }

func (e *pathError) Error() string { return fmt.Sprintf("no path of the stores is %q", e.word) }

type whyReport struct {
	scope
	Paths []explanation `json:"paths"`
	Notes []string      `json:"notes,omitempty"` // what could not be found out
	Left  int           `json:"left_off,omitempty"`
}

// explanation is a policy.Explanation as it is shown.
type explanation struct {
	Path      string       `json:"path"`
	Placement string       `json:"placement"` // system, personal
	Lies      []string     `json:"lies_in"`   // system, personal
	Reason    string       `json:"reason"`
	Words     string       `json:"words"`
	Lines     []spoken     `json:"lines"`
	Silenced  []spoken     `json:"silenced,omitempty"`
	Chain     []chainStep  `json:"chain,omitempty"`
	Cause     *explanation `json:"cause,omitempty"`
}

// spoken is a line of the policy, and what it said.
type spoken struct {
	Sign  string     `json:"sign"` // +, -, ?
	Line  string     `json:"line"`
	File  string     `json:"file"`
	Row   int        `json:"row"`
	Facts []spokenOf `json:"facts,omitempty"`
}

type spokenOf struct {
	Term  string      `json:"term"`
	Value string      `json:"value"`
	Note  string      `json:"note,omitempty"`
	Chain []chainStep `json:"chain,omitempty"`
}

type chainStep struct {
	Path string `json:"path"`
	Via  string `json:"via,omitempty"`
}

var triWords = map[graph.Tri]string{graph.Yes: "yes", graph.No: "no", graph.Unknown: "unknown"}

// reasonWords say a policy.Reason to a person.
var reasonWords = map[policy.Reason]string{
	policy.Granted:      "granted, and nothing speaks against it",
	policy.NotGranted:   "no line of the policy grants it",
	policy.GrantUnknown: "a line might grant it, but what it asks for is not known",
	policy.Vetoed:       "a personal line says so",
	policy.VetoUnknown:  "a personal line might say so: what it asks for is not known",
	policy.Unreadable:   "its facts cannot be read, so nothing of it is believed",
	policy.Differing:    "the two stores hold it with different data, so nothing of it is believed",
	policy.Reference:    "granted, but it refers to a personal path",
}

func placement(system bool) string {
	if system {
		return "system"
	}
	return "personal"
}

// layers are the stores a path lies in.
func layers(f graph.Flags) []string {
	out := []string{}
	if f&graph.Lower != 0 {
		out = append(out, "system")
	}
	if f&graph.Upper != 0 {
		out = append(out, "personal")
	}
	return out
}

func explained(v *policy.Verdicts, e *policy.Explanation) explanation {
	out := explanation{
		Path: e.Path, Placement: placement(e.System), Lies: layers(v.Index().Graph().Flags[e.ID]),
		Reason: e.Reason.String(), Words: reasonWords[e.Reason], Lines: spokenLines(e.Lines), Silenced: spokenLines(e.Silenced), Chain: chainSteps(e.Chain),
	}
	if e.Cause != nil {
		c := explained(v, e.Cause)
		out.Cause = &c
	}
	return out
}

func spokenLines(lines []policy.Line) []spoken {
	out := []spoken{}
	for _, l := range lines {
		s := spoken{Sign: string(l.Sign), Line: l.Text, File: l.Pos.Source, Row: l.Pos.Line}
		for _, f := range l.Facts {
			s.Facts = append(s.Facts, spokenOf{f.Term, triWords[f.Value], f.Note, chainSteps(f.Chain)})
		}
		out = append(out, s)
	}
	return out
}

func chainSteps(steps []policy.Step) []chainStep {
	var out []chainStep
	for _, s := range steps {
		out = append(out, chainStep{s.Path, s.Via})
	}
	return out
}

func (r whyReport) print(p *page) {
	for i, e := range r.Paths {
		if i > 0 {
			p.printf("\n")
		}
		e.print(p)
	}
	if r.Left > 0 {
		p.printf("\n%d more have that name; --all shows them.\n", r.Left)
	}
}

// shortPath leaves of a store path what a person looks for.
func shortPath(storePath string) string {
	base := path.Base(storePath)
	if len(base) > graph.HashLen+1 {
		return base[graph.HashLen+1:]
	}
	return base
}

func (e explanation) print(p *page) {
	p.printf("%s\n", printable(e.Path))
	p.printf("  %s: %s%s\n", placeStyle(p, e.Placement), e.Words, e.where())
	e.printLines(p, "    ")
	if len(e.Chain) > 1 {
		indent := "    "
		for i, s := range e.Chain[1:] {
			last := ""
			if i == len(e.Chain)-2 && e.Cause != nil {
				last = "  " + e.Cause.brief()
			}
			p.printf("%s└─ %s%s\n", indent, p.style("1", printable(shortPath(s.Path))), printable(last))
			indent += "   "
		}
		if e.Cause != nil {
			p.printf("%s%s\n", indent, printable(e.Cause.Path))
			e.Cause.printLines(p, indent)
		}
	}
}

// where says it if a path lies elsewhere than it belongs.
func (e explanation) where() string {
	for _, l := range e.Lies {
		if l == e.Placement {
			return ""
		}
	}
	if len(e.Lies) == 0 {
		return ""
	}
	return " (it lies in the " + strings.Join(e.Lies, " and the ") + " store)"
}

// brief is the verdict in one line.
func (e explanation) brief() string {
	if len(e.Lines) > 0 && e.Lines[0].Sign != "+" {
		return fmt.Sprintf("%s (%s)", e.Lines[0].Line, e.Lines[0].at())
	}
	return e.Placement + ": " + e.Words
}

func (s spoken) at() string { return fmt.Sprintf("%s:%d", path.Base(s.File), s.Row) }

func (e explanation) printLines(p *page, indent string) {
	width := 0
	for _, l := range e.Lines {
		width = max(width, min(len(l.Line), 60))
	}
	for _, l := range append(e.Lines[:len(e.Lines):len(e.Lines)], e.Silenced...) {
		p.printf("%s%s %-*s  %s\n", indent, l.Sign, width, printable(l.Line), p.style("2", printable(l.at())))
		for _, f := range l.Facts {
			f.print(p, indent+"    ")
		}
	}
	if len(e.Silenced) > 0 {
		last := "the last line does"
		if n := len(e.Silenced); n > 1 {
			last = fmt.Sprintf("the last %d lines do", n)
		}
		p.printf("%s(%s not count: \"when known\" passes over what is unknown)\n", indent, last)
	}
}

// print shows what is not to be seen in the line itself.
func (f spokenOf) print(p *page, indent string) {
	switch {
	case f.Value == "unknown" && f.Note != "":
		p.printf("%s%s: unknown, %s\n", indent, printable(f.Term), printable(f.Note))
	case len(f.Chain) > 1:
		var way []string
		for _, s := range f.Chain {
			step := shortPath(s.Path)
			if s.Via != "" {
				step = s.Via + " " + step
			}
			way = append(way, step)
		}
		p.printf("%s%s\n", indent, printable(strings.Join(way, ", ")))
	}
}

func placeStyle(p *page, place string) string {
	if place == "system" {
		return p.style("32", place)
	}
	return p.style("33", place)
}
