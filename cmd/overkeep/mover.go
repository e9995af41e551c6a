package main

import (
	"context"
	"fmt"
	"os"
	"strings"
	"time"

	"github.com/spf13/cobra"

	"overkeep/overlay/move"
	"overkeep/overlay/nixdb"
	"overkeep/overlay/plan"
	"overkeep/overlay/view"
	"overkeep/systemd/keep"
)

// mover is what the commands share that move paths: a process in the keep's view that
// has both stores open.
type mover struct {
	planner
	dryRun bool
	w      *move.World
	out    *keep.Outside
}

func (m *mover) add(a *app, cmd *cobra.Command) {
	m.planner.add(a, cmd)
	dryRunFlag(cmd, &m.dryRun)
}

// open finds the keep, comes back in its view, and sets right what was interrupted. With
// --dry-run it changes nothing and leaves the journal's lock alone.
func (m *mover) open(ctx context.Context, a *app) error {
	if err := m.planner.find(a); err != nil {
		return err
	}
	if m.dryRun {
		return nil
	}
	// A keep that nothing was built in has none yet.
	if err := m.keep.CreateDatabase(ctx); err != nil {
		return err
	}
	var err error
	if m.out, err = m.keep.Outside(); err != nil {
		return err
	}
	m.host = fmt.Sprintf("/proc/self/fd/%d", m.out.Root.Fd())
	places := move.Places{Keep: m.keep.Keep, Lower: m.out.Store, Host: m.out.Root, System: "/nix/var/nix", Links: m.links()}
	m.w, err = move.Open(places, move.Hooks{
		Roots:    m.roots,
		Pin:      m.keep.Pin,
		Settle:   m.keep.Settle,
		Remount:  view.Remount,
		Held:     m.keep.Held,
		Progress: m.progress(a),
	})
	if err != nil {
		m.close()
		return err
	}
	rec, err := m.w.Recover(ctx)
	if err != nil {
		m.close()
		return err
	}
	if rec.ID != 0 {
		a.ui.caveat("the last %s was interrupted; it has been set right: %s", rec.Kind, movedWords(&rec.Result))
	}
	return nil
}

func (m *mover) close() {
	if m.w != nil {
		_ = m.w.Close()
	}
	if m.out != nil {
		m.out.Close()
	}
}

// progress shows bytes, rate and the time left, some times a second.
func (m *mover) progress(a *app) func(move.Progress) {
	begun, last := time.Now(), time.Time{}
	var phase string
	return func(p move.Progress) {
		now := time.Now()
		if p.Doing == phase && now.Sub(last) < 200*time.Millisecond {
			return
		}
		phase, last = p.Doing, now
		if p.TotalBytes == 0 || p.Bytes == 0 {
			a.ui.progress(p.Doing)
			return
		}
		spent := now.Sub(begun)
		rate := float64(p.Bytes) / max(spent.Seconds(), 0.001)
		left := time.Duration(float64(p.TotalBytes-p.Bytes) / rate * float64(time.Second))
		a.ui.progress(fmt.Sprintf("%s %d of %d paths, %s of %s, %s/s, %s left", p.Doing, p.Paths, p.TotalPaths,
			formatSize(p.Bytes), formatSize(p.TotalBytes), formatSize(int64(rate)>>20<<20), max(0, left).Round(time.Second)))
	}
}

// run carries out the moves of a plan and reports.
func (m *mover) run(ctx context.Context, a *app, op move.Op) error {
	a.ui.progress("asking for room")
	if err := m.w.Room(ctx, op.Moves, m.outer()); err != nil {
		return err
	}
	res, err := m.w.Run(ctx, op)
	a.ui.endProgress()
	if err != nil {
		if res != nil && len(res.Sealed)+len(res.Released) > 0 {
			a.ui.caveat("before it stopped: %s", movedWords(res))
		}
		return err
	}
	if err := a.ui.done(&movedReport{Result: res, keep: m.keep.Name}); err != nil {
		return err
	}
	if len(res.Left) > 0 {
		return &shownError{exitLeft}
	}
	if res.Clean != nil && len(res.Clean.Left) > 0 {
		return &shownError{exitResidue}
	}
	return nil
}

// outer is a directory of the file system that a sparse image grows on.
func (m *mover) outer() *os.File {
	if m.keep.Header.Size == 0 {
		return nil
	}
	dir, err := m.outside(m.keep.StateDir())
	if err != nil {
		return nil
	}
	return dir
}

func movedWords(res *move.Result) string {
	var parts []string
	if n := len(res.Sealed); n > 0 {
		parts = append(parts, fmt.Sprintf("%s sealed", counts(n, "path")))
	}
	if n := len(res.Released); n > 0 {
		parts = append(parts, fmt.Sprintf("%s released", counts(n, "path")))
	}
	if n := len(res.Left); n > 0 {
		parts = append(parts, fmt.Sprintf("%s left where they were", counts(n, "path")))
	}
	if len(parts) == 0 {
		return "nothing has moved"
	}
	return strings.Join(parts, ", ")
}

func counts(n int, what string) string {
	switch {
	case n == 1:
		return "1 " + what
	case strings.HasSuffix(what, "sh"):
		return fmt.Sprintf("%d %ses", n, what)
	}
	return fmt.Sprintf("%d %ss", n, what)
}

// movedReport is what a move did.
type movedReport struct {
	*move.Result
	keep string
}

// leftWords say a move.Why to a person.
var leftWords = map[move.Why]string{
	move.Vanished:   "it is not valid any more where it was",
	move.Changed:    "the stores have changed since",
	move.Corrupt:    "its contents are not what its hash says; they have",
	move.Strange:    "its files cannot be copied:",
	move.Alive:      "a root of the system store holds it:",
	move.Locked:     "another Nix process works on it",
	move.Referenced: "this stays and refers to it:",
	move.Needs:      "it refers to what stays in the keep:",
	move.Conflict:   "the other store has other data under this name:",
}

// maxShown is how many paths of one kind a report names in text.
const maxShown = 20

func (r *movedReport) print(p *page) {
	p.printf("%s (%s).\n", p.style("1", upper(movedWords(r.Result))), formatSize(r.Bytes))
	for i, l := range r.Left {
		if i == maxShown {
			p.printf("  and %d more; --json names all\n", len(r.Left)-i)
			break
		}
		p.printf("  left: %s\n        %s\n", printable(l.Path), printable(strings.TrimSpace(leftWords[l.Why]+" "+l.By)))
	}
	for _, m := range r.Roots {
		where := "in the keep now:"
		if m.Back {
			where = "where it was again:"
		}
		p.printf("  %s is %s %s\n", printable(m.From), where, printable(m.To))
	}
	printCleaned(p, r.Clean)
}

// printCleaned says what was wiped, and what cannot be promised.
func printCleaned(p *page, c *move.CleanResult) {
	if c == nil {
		return
	}
	p.printf("Wiped: %s overwritten (%s)", counts(c.Files.Files, "file"), formatSize(c.Files.Bytes))
	if c.Logs.Files > 0 {
		p.printf(", %s", counts(c.Logs.Files, "build log"))
	}
	if len(c.Left) == 0 {
		p.printf("; Nix's database, the free blocks and the journal of the file system cleared.\n")
	} else {
		p.printf("; Nix's database, the free blocks and the journal of the file system cleared, but for what follows.\n")
	}
	if c.Files.Shared > 0 {
		p.printf("  %s shared with public paths by hard links: their contents stay there.\n", counts(c.Files.Shared, "file"))
	}
	for _, n := range c.Notes {
		p.printf("  %s\n", printable(n))
	}
	for _, l := range c.Left {
		p.printf("  %s %s\n", p.style("33", "not done:"), printable(l))
	}
	p.printf("  This is what the device shows. Cells of a flash disk, snapshots and backups may hold more.\n")
}

// rowsByPath is for looking rows up.
func rowsByPath(rows []nixdb.Info) map[string]nixdb.Info {
	out := make(map[string]nixdb.Info, len(rows))
	for _, r := range rows {
		out[r.Path] = r
	}
	return out
}

// agree shows a plan, if there is one, with what is to be known besides, and asks whether
// it is meant.
func (m *mover) agree(ctx context.Context, a *app, p *plan.Plan, question string, besides ...string) error {
	if a.yes {
		return nil
	}
	if p != nil {
		besides = append([]string{m.text(a, p)}, besides...)
	}
	for _, line := range besides {
		if err := a.ui.say(line); err != nil {
			return err
		}
	}
	ok, err := a.ui.confirm(ctx, question)
	if err != nil {
		return err
	}
	if !ok {
		return aborted("nothing was done")
	}
	return nil
}

// outside opens a directory of the machine as it is outside the view.
func (m *mover) outside(dir string) (*os.File, error) { return m.w.Outside(dir) }
