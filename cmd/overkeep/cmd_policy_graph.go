package main

import (
	"context"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"slices"
	"strings"

	"github.com/spf13/cobra"

	"overkeep/overlay/verdict"
	"overkeep/policy"
	"overkeep/systemd/keep"
)

func newPolicyGraph(a *app) *cobra.Command {
	var o struct {
		sight sight
		svg   string
	}
	cmd := exits(&cobra.Command{
		Use:   "graph PATH...",
		Short: "Draw the reason for a verdict, as DOT or SVG",
		Long: `Draw why a path is where it is: the way to the path that decides, and the lines of
the policy that spoke. DOT, for Graphviz, goes to standard output; --svg writes a
drawing that needs nothing else. The words are those of "overkeep why".`,
		Example: `  overkeep policy graph payroll | dot -Tpdf >why.pdf
  overkeep policy graph payroll --svg why.svg`,
		Args: a.args(1, maxWhy, "a path"),
		RunE: func(cmd *cobra.Command, args []string) error {
			return runPolicyGraph(cmd.Context(), a, &o.sight, o.svg, args)
		},
	}, exitNoPath, exitPolicy, exitExists, exitNoKeep)
	o.sight.add(a, cmd)
	cmd.Flags().StringVar(&o.svg, "svg", "", "write an SVG drawing to the new `FILE` instead (\"-\": standard output)")
	return cmd
}

func runPolicyGraph(ctx context.Context, a *app, s *sight, svg string, words []string) error {
	if err := s.find(a); err != nil {
		return err
	}
	p, err := policy.Parse(s.sources...)
	if err != nil {
		return err
	}
	w, ids, err := verdict.LoadFor(ctx, s.input, p, words)
	if err != nil {
		return err
	}
	if err := w.Close(); err != nil {
		return err
	}
	s.remarks(a, w)
	v, err := settled(ctx, func() *policy.Verdicts { return w.Decide(p) })
	if err != nil {
		return err
	}
	d := &drawing{}
	for i, list := range ids {
		if len(list) == 0 {
			return &pathError{words[i]}
		}
		for _, id := range list[:min(len(list), maxWhy)] {
			d.add(explained(v, v.Why(id)))
		}
	}
	d.rank()
	switch svg {
	case "":
		return a.ui.report(drawn{DOT: d.dot()})
	case "-":
		return a.ui.report(drawn{SVG: d.svg()})
	}
	f, err := os.OpenFile(svg, os.O_WRONLY|os.O_CREATE|os.O_EXCL, 0o600) // it names private paths
	if errors.Is(err, fs.ErrExist) {
		return &keep.Error{Code: keep.CodeKeepExists, Name: absolute(svg), Message: fmt.Sprintf("%q is there already, and is not overwritten", svg)}
	}
	if err != nil {
		return usagef("%v", err)
	}
	_, err = f.WriteString(d.svg())
	if cerr := f.Close(); err == nil {
		err = cerr
	}
	return err
}

// absolute is the path of a file for a message.
func absolute(name string) string {
	if abs, err := filepath.Abs(name); err == nil {
		return abs
	}
	return name
}

type drawn struct {
	DOT string `json:"dot,omitempty"`
	SVG string `json:"svg,omitempty"`
}

func (d drawn) print(p *page) { p.printf("%s", d.DOT+d.SVG) }

// drawing is a graph of boxes in rows: paths, lines of the policy, and arrows.
type drawing struct {
	boxes  []box
	arrows []arrow
}

type box struct {
	id    string // a path, or a line
	label []string
	kind  string // system, personal, line
	row   int
}

type arrow struct {
	from, to int
	label    string
}

func (d *drawing) box(id, kind string, label ...string) int {
	if i := slices.IndexFunc(d.boxes, func(b box) bool { return b.id == id }); i >= 0 {
		return i
	}
	d.boxes = append(d.boxes, box{id: id, label: label, kind: kind})
	return len(d.boxes) - 1
}

func (d *drawing) arrow(from, to int, label string) {
	if x := (arrow{from, to, label}); from != to && !slices.Contains(d.arrows, x) {
		d.arrows = append(d.arrows, x)
	}
}

func (d *drawing) path(path, kind string, words ...string) int {
	return d.box(path, kind, append([]string{shortPath(path)}, words...)...)
}

// add draws an explanation.
func (d *drawing) add(e explanation) int {
	top := d.path(e.Path, e.Placement, e.Placement+": "+e.Words)
	for _, l := range e.Lines {
		line := d.box(l.File+fmt.Sprint(l.Row)+l.Line, "line", l.Line, l.at())
		d.arrow(top, line, map[string]string{"+": "grants", "-": "vetoes", "?": "cannot tell"}[l.Sign])
		for _, f := range l.Facts {
			d.chain(line, f.Chain, top)
		}
	}
	if len(e.Chain) < 2 {
		return top
	}
	at := top
	for i, s := range e.Chain[1:] {
		next := -1
		if i == len(e.Chain)-2 && e.Cause != nil {
			next = d.add(*e.Cause)
		} else {
			next = d.path(s.Path, "personal")
		}
		d.arrow(at, next, s.Via)
		at = next
	}
	return top
}

// chain draws the way that shows why a line says what it says.
func (d *drawing) chain(line int, steps []chainStep, top int) {
	at := line
	for i, s := range steps {
		next := d.path(s.Path, "fact")
		if next == top && i == 0 {
			continue // the way begins with the path that is explained
		}
		d.arrow(at, next, s.Via)
		at = next
	}
}

// rank puts every box a row below what points at it. A way that comes back to where
// it was (references may) keeps the row it has.
func (d *drawing) rank() {
	for range d.boxes {
		changed := false
		for _, a := range d.arrows {
			if r := d.boxes[a.from].row + 1; r > d.boxes[a.to].row && r < len(d.boxes) {
				d.boxes[a.to].row, changed = r, true
			}
		}
		if !changed {
			return
		}
	}
}

var boxColours = map[string][2]string{ // fill and border
	"system": {"#e3f4e3", "#3c8c3c"}, "personal": {"#fff1d6", "#b97a00"}, "line": {"#eeeeee", "#888888"}, "fact": {"#ffffff", "#444444"},
}

func (d *drawing) dot() string {
	var b strings.Builder
	b.WriteString("digraph why {\n  node [shape=box, style=filled, fontname=\"sans-serif\"];\n")
	for i, x := range d.boxes {
		c := boxColours[x.kind]
		fmt.Fprintf(&b, "  n%d [label=%s, fillcolor=%q, color=%q];\n", i, dotQuote(strings.Join(x.label, "\n")), c[0], c[1])
	}
	for _, a := range d.arrows {
		fmt.Fprintf(&b, "  n%d -> n%d [label=%s];\n", a.from, a.to, dotQuote(a.label))
	}
	b.WriteString("}\n")
	return b.String()
}

// dotQuote writes a string of the DOT language (graphviz.org/doc/info/lang.html):
// only the quote is escaped there, and a backslash begins an escape of the label.
func dotQuote(s string) string {
	return `"` + strings.NewReplacer(`\`, `\\`, `"`, `\"`, "\n", `\n`).Replace(printableLines(s)) + `"`
}

func printableLines(s string) string {
	lines := strings.Split(s, "\n")
	for i := range lines {
		lines[i] = printable(lines[i])
	}
	return strings.Join(lines, "\n")
}

// Measures of the drawing, in pixels; letters of 12 pixels are about 7 wide.
const (
	letter, leading = 7, 16
	padX, padY      = 10, 8
	gapX, gapY      = 40, 60
	margin          = 20
)

func (d *drawing) svg() string {
	type place struct{ x, y, w, h int }
	at := make([]place, len(d.boxes))
	rows, widest := 0, 0
	for _, b := range d.boxes {
		rows = max(rows, b.row+1)
	}
	widths, heights := make([]int, rows), make([]int, rows)
	for i, b := range d.boxes {
		w := 0
		for _, l := range b.label {
			w = max(w, len([]rune(printable(l))))
		}
		at[i].w, at[i].h = w*letter+2*padX, len(b.label)*leading+2*padY
		widths[b.row] += at[i].w + gapX
		heights[b.row] = max(heights[b.row], at[i].h)
	}
	for _, w := range widths {
		widest = max(widest, w-gapX)
	}
	y := margin
	for row := range rows {
		x := margin + (widest-widths[row]+gapX)/2
		for i, b := range d.boxes {
			if b.row == row {
				at[i].x, at[i].y = x, y
				x += at[i].w + gapX
			}
		}
		y += heights[row] + gapY
	}
	var s strings.Builder
	fmt.Fprintf(&s, `<svg xmlns="http://www.w3.org/2000/svg" width="%d" height="%d" font-family="sans-serif" font-size="12">`+"\n",
		widest+2*margin, y-gapY+margin)
	s.WriteString(`<defs><marker id="tip" viewBox="0 0 8 8" refX="8" refY="4" markerWidth="8" markerHeight="8" orient="auto"><path d="M0 0L8 4L0 8z" fill="#444"/></marker></defs>` + "\n")
	for _, a := range d.arrows {
		f, t := at[a.from], at[a.to]
		x1, y1, x2, y2 := f.x+f.w/2, f.y+f.h, t.x+t.w/2, t.y
		if d.boxes[a.to].row <= d.boxes[a.from].row {
			y1, y2 = f.y, t.y+t.h // upwards
		}
		fmt.Fprintf(&s, `<line x1="%d" y1="%d" x2="%d" y2="%d" stroke="#444" marker-end="url(#tip)"/>`+"\n", x1, y1, x2, y2)
		fmt.Fprintf(&s, `<text x="%d" y="%d" fill="#444">%s</text>`+"\n", (x1+x2)/2+4, (y1+y2)/2+4, xmlEscape(a.label))
	}
	for i, b := range d.boxes {
		p, c := at[i], boxColours[b.kind]
		fmt.Fprintf(&s, `<rect x="%d" y="%d" width="%d" height="%d" rx="4" fill="%s" stroke="%s"/>`+"\n", p.x, p.y, p.w, p.h, c[0], c[1])
		for n, l := range b.label {
			fmt.Fprintf(&s, `<text x="%d" y="%d">%s</text>`+"\n", p.x+padX, p.y+padY+(n+1)*leading-4, xmlEscape(l))
		}
	}
	s.WriteString("</svg>\n")
	return s.String()
}

func xmlEscape(s string) string {
	return strings.NewReplacer("&", "&amp;", "<", "&lt;", ">", "&gt;", `"`, "&quot;").Replace(printable(s))
}
