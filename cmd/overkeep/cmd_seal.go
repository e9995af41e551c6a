package main

import (
	"context"
	"fmt"
	"io"
	"os"
	"strings"

	"github.com/spf13/cobra"

	"overkeep/overlay/move"
	"overkeep/overlay/plan"
)

func init() { more = append(more, newSeal, newRelease) }

type sealOptions struct {
	mover
	words []string
}

func newSeal(a *app) *cobra.Command {
	var o sealOptions
	cmd := exits(&cobra.Command{
		Use:        "seal PATH...",
		SuggestFor: []string{"hide", "encrypt", "protect"},
		Short:      "Move paths from the system store into the keep",
		GroupID:    "moves",
		Long: `Copy paths out of the plaintext system store into the keep, verify them, remove them
from the system store by the rules of Nix's own collector, and wipe what is left:
files are overwritten, Nix's database, build logs and links cleaned, free blocks
trimmed, and the file system's journal zeroed.

All that refers to a path in the system store goes with it. What a root of somebody
else holds, or a running process uses, cannot move; it is named. Links of yours (a
result, a profile) go along.

A PATH is what "why" takes: a store path, a name, a hash, a link; a single "-" reads
them from standard input, for arguments can be seen by others. The policy is
not asked, but "apply" would bring back what it grants to the system store.`,
		Example: `  echo payroll | sudo overkeep seal -
  sudo overkeep seal ./result --dry-run`,
		Args: a.args(1, maxWords, "a store path, a name, a hash or a link"),
		RunE: func(cmd *cobra.Command, args []string) error {
			o.words = args
			return runSeal(cmd.Context(), a, o)
		},
	}, exitLocked, exitNoPath, exitLeft, exitResidue, exitNoSpace, exitInUse, exitNotRoot, exitNoKeep)
	o.add(a, cmd)
	return cmd
}

func runSeal(ctx context.Context, a *app, o sealOptions) error {
	if err := o.open(ctx, a); err != nil {
		return err
	}
	defer o.close()
	p, err := o.chosenWords(ctx, a, plan.Seal)
	if p == nil || err != nil {
		return err
	}
	// It takes nothing from anybody; only what goes along unasked is worth a question.
	if n := following(p); n > 0 {
		if err := o.agree(ctx, a, p, fmt.Sprintf("Seal these, with %s that refer to them?", counts(n, "path"))); err != nil {
			return err
		}
	}
	return o.run(ctx, a, move.Op{Kind: move.Seal, Moves: p.Moves, Roots: p.Roots})
}

// chosenWords makes the plan of what was asked for. Where there is nothing to do but to
// show it, that is done, and the plan is nil.
func (o *sealOptions) chosenWords(ctx context.Context, a *app, kind plan.Kind) (*plan.Plan, error) {
	words, err := wordsOf(o.words, os.Stdin)
	if err != nil {
		return nil, err
	}
	var seal, release []string
	if kind == plan.Seal {
		seal = words
	} else {
		release = words
	}
	p, err := o.chosen(ctx, a, seal, release)
	switch {
	case err != nil:
		return nil, err
	case o.dryRun || len(p.Moves) == 0 && len(p.Blocked) == 0:
		return nil, a.ui.report(o.report(p))
	case len(p.Moves) == 0:
		return nil, &blockedError{p}
	}
	return p, nil
}

// wordsOf are the words of a command line; a single "-" stands for those of a file.
func wordsOf(words []string, in io.Reader) ([]string, error) {
	if len(words) != 1 || words[0] != "-" {
		return words, nil
	}
	const most = 16 << 20
	b, err := io.ReadAll(io.LimitReader(in, most+1))
	if err != nil {
		return nil, err
	}
	words = strings.Fields(string(b))
	switch {
	case len(b) > most || len(words) > maxWords:
		return nil, usagef("standard input has more than %d paths", maxWords)
	case len(words) == 0:
		return nil, usagef("standard input has no path")
	}
	return words, nil
}

// following counts the moves that nobody asked for.
func following(p *plan.Plan) (n int) {
	for _, m := range p.Moves {
		if m.Follows != "" {
			n++
		}
	}
	return n
}

// blockedError: nothing of what was asked for can move.
type blockedError struct{ p *plan.Plan }

func (e *blockedError) Error() string {
	b := e.p.Blocked[0]
	more := ""
	if n := len(e.p.Blocked) - 1; n > 0 {
		more = fmt.Sprintf(", and %s for a like reason", counts(n, "other path"))
	}
	return fmt.Sprintf("%q cannot move: %s%s", b.Path, blockedWords(&b), more)
}

func newRelease(a *app) *cobra.Command {
	var o sealOptions
	cmd := exits(&cobra.Command{
		Use:        "release PATH...",
		SuggestFor: []string{"publish", "expose", "unseal"},
		Short:      "Move paths from the keep into the system store",
		GroupID:    "moves",
		Long: `Copy paths out of the keep into the plaintext system store, with all they refer to,
verified, and without the name of the derivation that made them. The keep goes on using
them there and pins them. Everybody on the machine can read them then, and whoever
steals it.

The policy must permit each of them; the lines that do are shown, and you are asked.`,
		Example: `  sudo overkeep release hello-2.12 --dry-run
  sudo overkeep release hello-2.12`,
		Args: a.args(1, maxWords, "a store path, a name, a hash or a link"),
		RunE: func(cmd *cobra.Command, args []string) error {
			o.words = args
			return runRelease(cmd.Context(), a, o)
		},
	}, exitLocked, exitNoPath, exitNotPermitted, exitLeft, exitResidue, exitNoSpace, exitAborted, exitInUse, exitNotRoot, exitNoKeep)
	o.add(a, cmd)
	return cmd
}

func runRelease(ctx context.Context, a *app, o sealOptions) error {
	if err := o.open(ctx, a); err != nil {
		return err
	}
	defer o.close()
	p, err := o.chosenWords(ctx, a, plan.Release)
	if p == nil || err != nil {
		return err
	}
	if err := o.agree(ctx, a, p, fmt.Sprintf("Make %s readable by everybody?", counts(len(p.Moves), "path"))); err != nil {
		return err
	}
	return o.run(ctx, a, move.Op{Kind: move.Release, Moves: p.Moves, Roots: p.Roots})
}
