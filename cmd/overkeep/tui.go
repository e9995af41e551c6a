package main

// All output and every question of the program passes through this file and
// prompt.go. The rules:
//
//   - Standard output carries the result, once, when the command is done: text,
//     or with --json one JSON object. A command that failed leaves it empty.
//   - Standard error carries progress, notes, and errors (with --json one JSON
//     object). Progress and notes show only on a terminal and without --quiet; a
//     caveat, without which the result would be misread, always but for --quiet.
//   - Questions, and every secret that is shown, go to /dev/tty and nowhere
//     else, so that no redirection catches them. Without a terminal a question
//     is an error that names the flag to give instead.
//   - A secret that is typed is not echoed and goes byte by byte into locked
//     memory (package secret). It is in no string, error or log.
//   - Colour is decoration: only on a terminal, and not with NO_COLOR,
//     --no-color or TERM=dumb. Nothing is told by colour alone.
//   - What others named (files, commands, labels) is escaped before it is shown.

import (
	"encoding/json"
	"fmt"
	"io"
	"os"
	"strconv"
	"strings"
	"text/tabwriter"
	"unicode/utf8"

	"golang.org/x/term"
)

// report is a result: its JSON is the value itself, its text is what print writes.
type report interface{ print(p *page) }

// page is where a report prints its text.
type page struct {
	w     io.Writer
	color bool
}

func (p *page) printf(format string, a ...any) { fmt.Fprintf(p.w, format, a...) }

// style wraps s in an SGR sequence ("1" is bold, "31" red) where there is colour.
func (p *page) style(sgr, s string) string {
	if !p.color {
		return s
	}
	return "\x1b[" + sgr + "m" + s + "\x1b[0m"
}

// table prints rows in columns, each line after indent. Cells are escaped.
func (p *page) table(indent string, rows [][]string) {
	t := tabwriter.NewWriter(p.w, 0, 0, 2, ' ', 0)
	for _, r := range rows {
		cells := make([]string, len(r))
		for i, c := range r {
			cells[i] = printable(c)
		}
		fmt.Fprintln(t, indent+strings.Join(cells, "\t"))
	}
	_ = t.Flush()
}

// ui is the terminal of one command.
type ui struct {
	out, err io.Writer
	openTTY  func() (*os.File, error)
	json     bool
	quiet    bool
	color    bool // on out
	errColor bool // on err
	live     bool // err is a terminal that can rewrite a line
	errTTY   bool
	onLine   bool // a progress line stands there, without its end
}

// newUI looks at the standard streams and at NO_COLOR and TERM.
func newUI(noColor bool) *ui {
	outTTY, errTTY := term.IsTerminal(1), term.IsTerminal(2)
	// no-color.org: set and not empty, whatever the value.
	plain := noColor || os.Getenv("NO_COLOR") != "" || dumb()
	return &ui{
		out: os.Stdout, err: os.Stderr,
		openTTY: func() (*os.File, error) { return os.OpenFile("/dev/tty", os.O_RDWR, 0) },
		color:   outTTY && !plain, errColor: errTTY && !plain,
		errTTY: errTTY, live: errTTY && !dumb(),
	}
}

func dumb() bool { return os.Getenv("TERM") == "dumb" || os.Getenv("TERM") == "" }

// report writes the result of a command that was asked for it.
func (u *ui) report(r report) error {
	u.endProgress()
	if u.json {
		return writeJSON(u.out, r)
	}
	b := &strings.Builder{}
	r.print(&page{w: b, color: u.color})
	_, err := io.WriteString(u.out, b.String())
	return err
}

// done writes the result of a command that was told to change something; with
// --quiet its exit code is enough.
func (u *ui) done(r report) error {
	if u.quiet && !u.json {
		u.endProgress()
		return nil
	}
	return u.report(r)
}

// note is advice: it is not part of the result.
func (u *ui) note(format string, a ...any) {
	if u.quiet || u.json || !u.errTTY {
		return
	}
	u.endProgress()
	fmt.Fprintf(u.err, "overkeep: "+format+"\n", a...)
}

// caveat is advice without which the result would be misread: it shows also where
// standard error is no terminal. In JSON the result itself says it.
func (u *ui) caveat(format string, a ...any) {
	if u.quiet || u.json {
		return
	}
	u.endProgress()
	fmt.Fprintf(u.err, "overkeep: "+format+"\n", a...)
}

// progress shows one short line in place of the last one.
func (u *ui) progress(s string) {
	switch {
	case u.quiet || u.json || !u.errTTY:
	case !u.live:
		fmt.Fprintf(u.err, "%s ...\n", printable(s))
	default:
		fmt.Fprintf(u.err, "\r\x1b[2K%s ...", clip(printable(s), 76))
		u.onLine = true
	}
}

func (u *ui) endProgress() {
	if u.onLine {
		fmt.Fprint(u.err, "\r\x1b[2K")
		u.onLine = false
	}
}

// problem writes an error, last of all.
func (u *ui) problem(p *problem) {
	u.endProgress()
	if u.json {
		_ = writeJSON(u.err, struct {
			Error *problem `json:"error"`
		}{p})
		return
	}
	p.print(&page{w: u.err, color: u.errColor})
}

func writeJSON(w io.Writer, v any) error {
	e := json.NewEncoder(w)
	e.SetIndent("", "  ")
	e.SetEscapeHTML(false)
	return e.Encode(v)
}

// printable escapes what would move the cursor, break a line or turn the
// direction of writing. Text that is printable stays as it is.
func printable(s string) string {
	ok := utf8.ValidString(s)
	for _, r := range s {
		ok = ok && strconv.IsPrint(r)
	}
	if ok {
		return s
	}
	q := strconv.Quote(s)
	return strings.ReplaceAll(q[1:len(q)-1], `\"`, `"`)
}

// clip shortens s to n characters.
func clip(s string, n int) string {
	r := []rune(s)
	if len(r) <= n {
		return s
	}
	return string(r[:n-1]) + "…"
}

// steps is the report of --dry-run: what would be done, in order.
type steps struct {
	DryRun bool   `json:"dry_run"`
	Keep   string `json:"keep"`
	Would  []step `json:"would"`
}

// step is one thing that would be done, and the lines that say it exactly.
type step struct {
	Do     string   `json:"do"`
	Detail []string `json:"detail,omitempty"`
}

func (s steps) print(p *page) {
	p.printf("%s\n", p.style("1", "Nothing was done. This is what would be, in order:"))
	for i, x := range s.Would {
		p.printf("%2d. %s\n", i+1, printable(x.Do))
		for _, d := range x.Detail {
			p.printf("      %s\n", printable(d))
		}
	}
}
