package main

import (
	"context"
	"fmt"
	"os"
	"strings"

	"github.com/spf13/cobra"

	"overkeep/systemd/doctor"
)

func init() { more = append(more, newDoctor) }

type doctorOptions struct {
	user string
}

func newDoctor(a *app) *cobra.Command {
	var o doctorOptions
	cmd := exits(&cobra.Command{
		Use:        "doctor",
		SuggestFor: []string{"check", "test", "diagnose", "probe"},
		Short:      "Try what a keep needs, and name what is missing",
		GroupID:    "look",
		Long: `Try each feature of the kernel, the file systems, Nix and the login that a keep
needs, on something thrown away, and name the command that mends what is missing.
Nothing is changed, and nothing is left behind.

There are three answers: yes, no, and could not tell. What is marked as advice is
not needed for a keep, but for its safety or comfort. The exit code is 0 when all
that is needed was tried and works.`,
		Example: `  sudo overkeep doctor
  sudo overkeep doctor --user alice
  sudo overkeep doctor --json`,
		Args: a.args(0, 0),
		RunE: func(cmd *cobra.Command, _ []string) error {
			if !cmd.Flags().Changed("user") {
				o.user = caller()
			}
			return runDoctor(cmd.Context(), a, o)
		},
	}, exitOK, exitInternal, exitUnsupported, exitNotRoot)
	cmd.Flags().StringVar(&o.user, "user", "", "whose keep it is to be; the `NAME` of the calling user if not given")
	return cmd
}

func runDoctor(ctx context.Context, a *app, o doctorOptions) error {
	a.ui.progress("trying the kernel, the file systems and Nix")
	checks := doctor.Run(ctx, doctor.Config{Root: a.root, User: o.user, Sudo: a.here().sudo})
	if ctx.Err() != nil {
		return aborted("interrupted")
	}
	r := doctorReport{Answer: doctor.Verdict(checks), Checks: checks}
	if err := a.ui.report(r); err != nil {
		return err
	}
	switch {
	case r.Answer == doctor.Yes:
		return nil
	case r.Answer == doctor.No:
		return &shownError{exitUnsupported}
	case os.Geteuid() != 0:
		return &shownError{exitNotRoot}
	}
	return &shownError{exitInternal} // as root everything should be told
}

// doctorReport is the result of doctor. Answer is that over all that is needed.
type doctorReport struct {
	Answer doctor.Answer  `json:"answer"`
	Checks []doctor.Check `json:"checks"`
}

func (r doctorReport) print(p *page) {
	said := map[string]bool{}
	for i := 0; i < len(r.Checks); {
		group := r.Checks[i].Group
		n := i
		for n < len(r.Checks) && r.Checks[n].Group == group {
			n++
		}
		if i > 0 {
			p.printf("\n")
		}
		p.printf("%s\n", p.style("1", string(group)))
		printChecks(p, r.Checks[i:n], said)
		i = n
	}
	p.printf("\n%s\n", r.summary(p))
}

// printChecks prints a group: a table, and beneath each line of it that is not
// yes what is missing and what to do, unless said gave the same two before.
func printChecks(p *page, checks []doctor.Check, said map[string]bool) {
	var rows [][]string
	for _, c := range checks {
		rows = append(rows, []string{answerWords(c), c.Name, c.Found})
	}
	var b strings.Builder
	(&page{w: &b}).table("  ", rows)
	for i, line := range strings.SplitAfter(strings.TrimSuffix(b.String(), "\n"), "\n") {
		c := checks[i]
		words := answerWords(c)
		line = strings.TrimRight(strings.TrimPrefix(line, "  "+words), " \n")
		p.printf("  %s%s\n", p.style(answerColor(c), words), line)
		// Without root nearly every line would end alike.
		again := c.Missing + "\x00" + c.Remedy
		if c.Answer == doctor.Yes || c.Or == "" && said[again] {
			continue
		}
		said[again] = true
		for _, more := range []struct{ what, text string }{
			{"missing", c.Missing}, {"mend", c.Remedy}, {"or", c.Or},
		} {
			if more.text != "" {
				p.printf("      %-8s %s\n", more.what+":", printable(more.text))
			}
		}
	}
}

func answerWords(c doctor.Check) string {
	if c.Answer == doctor.No && !c.Needed {
		return "no (advice)"
	}
	return string(c.Answer)
}

func answerColor(c doctor.Check) string {
	switch {
	case c.Answer == doctor.Yes:
		return "32"
	case c.Answer == doctor.No && c.Needed:
		return "1;31"
	}
	return "33"
}

// summary is one line: how many of what is needed, and how much advice.
func (r doctorReport) summary(p *page) string {
	var needed, no, unsure, advice int
	for _, c := range r.Checks {
		switch {
		case !c.Needed && c.Answer != doctor.Yes:
			advice++
		case !c.Needed:
		default:
			needed++
			switch c.Answer {
			case doctor.No:
				no++
			case doctor.Unsure:
				unsure++
			}
		}
	}
	s := fmt.Sprintf("Of %d that are needed, %d work", needed, needed-no-unsure)
	if no > 0 {
		s += fmt.Sprintf(", %d do not", no)
	}
	if unsure > 0 {
		s += fmt.Sprintf(", %d could not be told", unsure)
	}
	s += "."
	if advice > 0 {
		s += fmt.Sprintf(" Advice on %d more.", advice)
	}
	switch r.Answer {
	case doctor.Yes:
		return p.style("32", "A keep can be used here.") + " " + s
	case doctor.No:
		return p.style("1;31", "A keep can NOT be used here yet.") + " " + s
	}
	return p.style("33", "Whether a keep can be used here could not be told.") + " " + s
}
