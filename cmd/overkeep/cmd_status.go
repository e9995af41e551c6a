package main

import (
	"context"
	"fmt"

	"github.com/spf13/cobra"

	"overkeep/crypt/volume"
	"overkeep/systemd/keep"
)

type statusOptions struct {
	keep string
}

func newStatus(a *app) *cobra.Command {
	var o statusOptions
	return exits(&cobra.Command{
		Use:        "status [KEEP]",
		SuggestFor: []string{"list", "ls", "info", "show"},
		Short:      "Say where a keep stands",
		GroupID:    "daily",
		Long: `Say where a keep stands, asked of the kernel and not of a file: locked, unlocked,
or locking, which is between the two and NOT locked. Then what the split promises
for the system store and the personal one as it is now, sizes, mounts and the
weakest slot. Without an argument it speaks of all keeps.

The exit code is 0 whatever the state; scripts read "state" of --json.`,
		Example: `  sudo overkeep status
  sudo overkeep status alice
  sudo overkeep status --json`,
		Args:              a.args(0, 1),
		ValidArgsFunction: a.completeKeep,
		RunE: func(cmd *cobra.Command, args []string) error {
			o.keep = first(args)
			return runStatus(cmd.Context(), a, o)
		},
	}, exitNoKeep, exitNotRoot, exitDamaged)
}

func runStatus(ctx context.Context, a *app, o statusOptions) error {
	names := []string{o.keep}
	m := a.manager()
	if o.keep == "" {
		var err error
		if names, err = m.List(); err != nil {
			return err
		}
	}
	r := statusReport{Keeps: []keepStatus{}, here: a.here()}
	var worst *problem
	for _, n := range names {
		st, err := func() (*keep.Status, error) {
			k, err := m.Open(n)
			if err != nil {
				return nil, err
			}
			return k.Status(ctx)
		}()
		if err != nil {
			if o.keep != "" || len(names) == 1 || ctx.Err() != nil {
				a.keep = n
				return err
			}
			h := a.here()
			h.keep = n
			worst = explain(err, h)
			r.Keeps = append(r.Keeps, keepStatus{Name: n, Problem: worst})
			continue
		}
		r.Keeps = append(r.Keeps, keepStatus{Status: st})
	}
	if err := a.ui.report(r); err != nil {
		return err
	}
	if worst != nil {
		return &shownError{worst.Exit} // told in its place in the list
	}
	return nil
}

// statusReport is the result of status: always a list, also of one.
type statusReport struct {
	Keeps []keepStatus `json:"keeps"`
	here  here
}

// keepStatus is one keep's status, or why it has none.
type keepStatus struct {
	*keep.Status
	Name    string   `json:"name,omitempty"` // only beside an error
	Problem *problem `json:"error,omitempty"`
}

func (r statusReport) print(p *page) {
	if len(r.Keeps) == 0 {
		p.printf("There is no keep yet. Make one:\n    %s\n", p.style("1", r.here.command("init")))
	}
	for i, k := range r.Keeps {
		if i > 0 {
			p.printf("\n")
		}
		if k.Problem != nil {
			p.printf("%s  %s\n", p.style("1", k.Name), p.style("31", "cannot be told"))
			k.Problem.print(p)
			continue
		}
		printStatus(p, k.Status, r.here)
	}
}

func printStatus(p *page, s *keep.Status, h here) {
	p.printf("%s  %s\n", p.style("1", s.Keep), stateWords(p, s))
	if s.State == keep.Locking {
		p.printf("  Close it, or open it again:\n      %s\n      %s\n", p.style("1", h.command("lock", s.Keep)), p.style("1", h.command("unlock", s.Keep)))
	}
	if s.MoveUnfinished {
		p.printf("  A move between the stores was interrupted. Set it right:\n      %s\n", p.style("1", h.command("wipe", "--keep", s.Keep)))
	}
	p.printf("\n")
	rows := [][]string{{"", "SYSTEM STORE", "PERSONAL STORE"}}
	for _, r := range s.Split {
		rows = append(rows, []string{r.Promise, r.System, r.Personal})
	}
	p.table("  ", rows)
	p.printf("\n")

	place := s.Backend
	if s.FSImage != "" {
		place += " on " + s.FSImage
	}
	facts := [][]string{{"user", s.User}, {"back-end", place}, {"on disk", formatSize(s.SizeOnDisk)}}
	if s.SizeTotal > 0 {
		where := "inside"
		if s.Backend == string(volume.Dir) && s.FSImage == "" {
			where = "its disk" // a directory shares the file system of the machine
		}
		facts = append(facts, []string{where, fmt.Sprintf("%s of %s used (%d %%)", formatSize(s.SizeUsed), formatSize(s.SizeTotal), 100*s.SizeUsed/s.SizeTotal)})
	}
	if s.State == keep.Unlocked {
		facts = append(facts, []string{"paths", fmt.Sprint(s.Paths)})
	}
	weakest := s.Weakest
	if weakest == "" {
		weakest = "none stands out"
	}
	facts = append(facts,
		[]string{"pins", fmt.Sprintf("%d paths of the system store are held for it", s.Pins)},
		[]string{"slots", fmt.Sprint(s.Slots)},
		[]string{"weakest", weakest})
	p.table("  ", facts)

	if len(s.Mounts) > 0 {
		p.printf("\n  Mounts in the view:\n")
		var rows [][]string
		for _, m := range s.Mounts {
			there := "yes"
			if !m.Mounted {
				there = "MISSING"
			}
			rows = append(rows, []string{m.Target, there, m.What})
		}
		p.table("    ", rows)
	}
}

// stateWords says the state so that it cannot be misread without colour.
func stateWords(p *page, s *keep.Status) string {
	switch s.State {
	case keep.Locked:
		return p.style("32", "locked") + ": nothing is mounted, the kernel says the key is " + s.Key
	case keep.Unlocked:
		return p.style("33", "unlocked") + ": the key is " + s.Key
	case keep.Locking:
		return p.style("1;31", "NOT locked, and not usable") + ": the key is " + s.Key
	}
	return string(s.State)
}
