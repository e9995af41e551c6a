package main

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"os/exec"
	"strings"
	"time"

	"github.com/spf13/cobra"

	"overkeep/overlay/layout"
	"overkeep/overlay/provenance"
	"overkeep/systemd/keep"
)

type originRecordOptions struct {
	sight  originSight
	flake  string
	metas  []string
	file   string
	impure bool
	fetch  bool
	dryRun bool
}

func newOriginRecord(a *app) *cobra.Command {
	var o originRecordOptions
	cmd := exits(&cobra.Command{
		Use:   "record [FLAKE] [--meta INSTALLABLE]...",
		Short: "Find out where paths come from, and record it",
		Long: `Ask the stock nix, as the keep's user in the view, where the source of FLAKE and of
all its inputs come from, and record it. A FLAKE that is a directory needs an
absolute path: it is looked for in the view.

With --meta: evaluate INSTALLABLE, such as FLAKE#NAME, and record its licence and
whether it is unfree, for its derivation and its outputs. With --file INSTALLABLE
is an attribute of that file.

With neither: read the lock files in all sources of both stores, what the keep does
by itself for its own.

Nothing is built, and nix has no network; with --fetch it has one, and fetches and
builds what it needs to answer. No lock file is written.`,
		Example: `  sudo overkeep origin record /home/alice/keep/payroll
  sudo overkeep origin record --meta /home/alice/keep/payroll#default
  sudo overkeep origin record --file /home/alice/keep/default.nix --meta tool
  sudo overkeep origin record --dry-run`,
		Args: a.args(0, 1),
		RunE: func(cmd *cobra.Command, args []string) error {
			o.flake = first(args)
			return runOriginRecord(cmd.Context(), a, &o)
		},
	}, exitLocked, exitNoKeep, exitNotRoot, exitNix)
	o.sight.add(a, cmd)
	f := cmd.Flags()
	f.StringArrayVar(&o.metas, "meta", nil, "record licence and unfree of this `INSTALLABLE`; may be repeated")
	f.StringVarP(&o.file, "file", "f", "", "INSTALLABLE is an attribute of this `FILE`")
	f.BoolVar(&o.impure, "impure", false, "evaluate INSTALLABLE with access to the environment and to all files")
	f.BoolVar(&o.fetch, "fetch", false, "nix may fetch from the network, and build")
	dryRunFlag(cmd, &o.dryRun)
	return cmd
}

func (o *originRecordOptions) check() error {
	for _, w := range append([]string{o.flake, o.file}, o.metas...) {
		if strings.HasPrefix(w, "-") {
			return usagef("%q is an option, not something to evaluate", w)
		}
	}
	if len(o.metas) == 0 && (o.file != "" || o.impure) {
		return usagef("--file and --impure are about what --meta evaluates, which was not given")
	}
	return nil
}

func runOriginRecord(ctx context.Context, a *app, o *originRecordOptions) error {
	if err := o.check(); err != nil {
		return err
	}
	if err := o.sight.enter(a); err != nil {
		return err
	}
	records, err := o.find(ctx, a)
	if err != nil {
		return err
	}
	store, err := o.sight.store()
	if err != nil {
		return err
	}
	news, err := store.News(records...)
	if err != nil {
		return err
	}
	r := recorded{Keep: o.sight.k.Name, DryRun: o.dryRun, Found: len(records), New: []learned{}}
	for _, n := range news {
		r.New = append(r.New, learnedOf(n))
	}
	if o.dryRun {
		return a.ui.report(r)
	}
	if _, err := store.Add(news...); err != nil {
		return err
	}
	return a.ui.done(r)
}

// find collects records, old and new.
func (o *originRecordOptions) find(ctx context.Context, a *app) (records []provenance.Record, err error) {
	if o.flake == "" && len(o.metas) == 0 {
		a.ui.progress("reading lock files")
		s := provenance.Sources{Dir: layout.NixStore}
		seen, err := s.Look(ctx, func(_ string, r []provenance.Record) error {
			records = append(records, r...)
			return nil
		})
		if seen.Bad > 0 {
			a.ui.note("%d lock files cannot be read", seen.Bad)
		}
		return records, err
	}
	if o.flake != "" {
		metadata, err := o.nix(ctx, a, "flake", "metadata", "--json", "--no-write-lock-file", o.flake)
		if err != nil {
			return nil, err
		}
		// In both 2.26 and 2.34 a dry run computes the paths of the inputs from the
		// lock file, and fetches none (flake.cc, CmdFlakeArchive).
		archive, err := o.nix(ctx, a, "flake", "archive", "--json", "--dry-run", "--no-write-lock-file", o.flake)
		if err != nil {
			return nil, err
		}
		if records, err = provenance.Flake(layout.NixStore, metadata, archive); err != nil {
			return nil, o.odd(err, "flake", "metadata", o.flake)
		}
	}
	for _, m := range o.metas {
		args := []string{"eval", "--json", "--no-write-lock-file", "--apply", provenance.MetaExpression}
		if o.file != "" {
			args = append(args, "--file", o.file)
		}
		if o.impure {
			args = append(args, "--impure")
		}
		b, err := o.nix(ctx, a, append(args, m)...)
		if err != nil {
			return nil, err
		}
		more, err := provenance.Meta(layout.NixStore, b)
		if err != nil {
			return nil, o.odd(err, "eval", "--json", m)
		}
		records = append(records, more...)
	}
	return records, nil
}

// odd is an answer of nix that is none.
func (o *originRecordOptions) odd(err error, args ...string) error {
	return &nixError{args: args, words: err.Error(), keep: o.sight.k.Name}
}

// nix runs the stock nix as the keep's user and returns what it wrote.
func (o *originRecordOptions) nix(ctx context.Context, a *app, args ...string) ([]byte, error) {
	program, err := keep.FindProgram("nix")
	if err != nil {
		return nil, &keep.Error{Code: keep.CodeNoNix, Name: "nix", Message: err.Error()}
	}
	argv := []string{program, "--extra-experimental-features", "nix-command flakes"}
	if !o.fetch {
		argv = append(argv, "--offline", "--option", "allow-import-from-derivation", "false")
	}
	cmd, err := o.sight.k.Command(ctx, o.fetch, append(argv, args...)...)
	if err != nil {
		return nil, err
	}
	// It is to be judged, not to be run: nixpkgs would refuse to tell of what is unfree.
	cmd.Env = append(cmd.Env, "NIXPKGS_ALLOW_UNFREE=1")
	out, words := &bounded{max: provenance.MaxInput}, &bounded{max: 64 << 10, drop: true}
	cmd.Stdout, cmd.Stderr = out, words
	cmd.WaitDelay = 5 * time.Second // for what it may have left behind with its outputs
	a.ui.progress("nix " + strings.Join(args[:min(len(args), 2)], " "))
	err = cmd.Run()
	var exit *exec.ExitError
	switch {
	case ctx.Err() != nil:
		return nil, ctx.Err()
	case out.over:
		return nil, o.odd(fmt.Errorf("it answers with more than %d bytes", out.max), args...)
	case errors.As(err, &exit):
		return nil, &nixError{args: args, words: words.String(), keep: o.sight.k.Name, offline: !o.fetch}
	case err != nil:
		return nil, err
	}
	return out.Bytes(), nil
}

// bounded is a buffer that takes no more than max bytes: it then fails, or drops the
// rest.
type bounded struct {
	bytes.Buffer
	max  int
	drop bool
	over bool
}

func (b *bounded) Write(p []byte) (int, error) {
	if room := b.max - b.Len(); len(p) > room {
		b.over = true
		if !b.drop {
			return 0, errors.New("too much output")
		}
		b.Buffer.Write(p[:room])
		return len(p), nil
	}
	return b.Buffer.Write(p)
}

// nixError is what nix said when it did not answer.
type nixError struct {
	args    []string
	words   string
	keep    string
	offline bool
}

func (e *nixError) Error() string {
	var lines []string
	for line := range strings.Lines(e.words) {
		line = strings.TrimRight(line, " \r\n")
		if line != "" && !strings.HasPrefix(line, "warning: you don't have Internet access") {
			lines = append(lines, printable(line))
		}
	}
	return fmt.Sprintf("nix %s did not answer:\n%s", strings.Join(e.args[:min(len(e.args), 2)], " "), strings.Join(lines, "\n"))
}

// recorded is the result of record.
type recorded struct {
	Keep   string    `json:"keep"`
	DryRun bool      `json:"dry_run"`
	Found  int       `json:"found"` // records, known ones among them
	New    []learned `json:"new"`
}

// maxLearned is how many new records are shown in words.
const maxLearned = 40

func (r recorded) print(p *page) {
	switch {
	case len(r.New) == 0:
		p.printf("Nothing new: %d records, all known.\n", r.Found)
		return
	case r.DryRun:
		p.printf("%s\n", p.style("1", "Nothing was done. This would be recorded:"))
	default:
		p.printf("Recorded:\n")
	}
	for i, n := range r.New {
		if i == maxLearned {
			p.printf("    and of %d more\n", len(r.New)-i)
			break
		}
		p.printf("    %s\n", printable(n.Path))
		for _, s := range n.says() {
			p.printf("        %s\n", printable(s))
		}
	}
}
