package main

import (
	"context"
	"crypto/sha256"
	"encoding/hex"
	"errors"
	"fmt"

	"github.com/spf13/cobra"

	"overkeep/overlay/move"
	"overkeep/overlay/plan"
)

func init() { more = append(more, newApply, newUndo) }

type applyOptions struct {
	mover
	file string
}

func newApply(a *app) *cobra.Command {
	var o applyOptions
	cmd := exits(&cobra.Command{
		Use:     "apply [PLAN]",
		Short:   "Move paths to where the policy wants them",
		GroupID: "moves",
		Long: `Carry out a plan that "plan --out" wrote, exactly, or refuse if the stores have
changed since. Without PLAN a plan is made now, shown, and asked about.

Private paths in the system store are copied into the keep, verified, removed from
the system store by the rules of Nix's own collector, and wiped from its device
(seal). What the policy grants and lies in the keep goes the other way (release).

It may be interrupted at any time, also by a power cut: what was begun is finished or
taken back by the next command, and the same apply goes on with the rest.`,
		Example: `  sudo overkeep plan --out ~/keep/plan
  sudo overkeep apply ~/keep/plan
  sudo overkeep apply --dry-run`,
		Args: a.args(0, 1, "a file that plan --out wrote"),
		RunE: func(cmd *cobra.Command, args []string) error {
			o.file = first(args)
			return runApply(cmd.Context(), a, o)
		},
	}, exitLocked, exitPlan, exitLeft, exitResidue, exitNoSpace, exitAborted, exitInUse, exitNotRoot, exitNoKeep)
	o.add(a, cmd)
	return cmd
}

func runApply(ctx context.Context, a *app, o applyOptions) error {
	if err := o.open(ctx, a); err != nil {
		return err
	}
	defer o.close()
	var want *plan.Plan
	id := ""
	if o.file != "" {
		b, err := o.readPlan(o.file)
		if err != nil {
			return err
		}
		if want, err = o.decodePlan(b); err != nil {
			return err
		}
		sum := sha256.Sum256(b)
		id = hex.EncodeToString(sum[:])
	}
	now, err := o.make(ctx, a, plan.Misplaced)
	if err != nil {
		return err
	}
	if want != nil {
		past, err := move.History(o.keep.Journal())
		if err != nil {
			return err
		}
		done := move.DoneOf(past, id)
		if d := plan.Diff(want, now, func(p string) bool { return done[p] }); !d.Empty() {
			return &planChanged{o.file, d}
		}
	}
	if o.dryRun {
		return a.ui.report(o.report(now))
	}
	if len(now.Moves) == 0 {
		return a.ui.done(o.report(now))
	}
	if want == nil {
		if err := o.agree(ctx, a, now, "Do this?"); err != nil {
			return err
		}
	}
	return o.run(ctx, a, move.Op{Kind: move.Apply, Plan: id, Moves: now.Moves, Roots: now.Roots})
}

// planChanged: the stores are not any more what a plan was made for.
type planChanged struct {
	file string
	diff *plan.Difference
}

func (e *planChanged) Error() string {
	d := e.diff
	for _, c := range []struct {
		moves []plan.Move
		words string
	}{{d.Missing, "has not to move any more"}, {d.New, "has to move now, and is not in it"}, {d.Changed, "is not what it was"}} {
		if n := len(c.moves); n > 0 {
			return fmt.Sprintf("the stores have changed since plan %q was made: %q %s%s", e.file, c.moves[0].Path, c.words, andMore(d, n))
		}
	}
	return fmt.Sprintf("the stores have changed since plan %q was made: root %q is new", e.file, d.NewRoots[0].Link)
}

func andMore(d *plan.Difference, _ int) string {
	if n := len(d.Missing) + len(d.New) + len(d.Changed) + len(d.NewRoots) - 1; n > 0 {
		return fmt.Sprintf(", and %s", counts(n, "other difference"))
	}
	return ""
}

type undoOptions struct{ mover }

func newUndo(a *app) *cobra.Command {
	var o undoOptions
	cmd := exits(&cobra.Command{
		Use:     "undo",
		Short:   "Take the last apply, seal or release back",
		GroupID: "moves",
		Long: `Move back what the last apply, seal or release has moved, whatever the policy says:
what was sealed comes back to the plaintext system store, with its row as it was and
the links that went along; what was released is sealed again, and wiped. Each undo
goes one operation further back.

What has been collected meanwhile cannot come back, and is named.`,
		Example: `  sudo overkeep undo --dry-run
  sudo overkeep undo`,
		Args: a.args(0, 0),
		RunE: func(cmd *cobra.Command, _ []string) error { return runUndo(cmd.Context(), a, o) },
	}, exitLocked, exitLeft, exitResidue, exitNoSpace, exitAborted, exitInUse, exitNotRoot, exitNoKeep)
	o.add(a, cmd)
	return cmd
}

func runUndo(ctx context.Context, a *app, o undoOptions) (err error) {
	begun := false
	if err := o.open(ctx, a); err != nil {
		return err
	}
	defer o.close()
	past, err := move.History(o.keep.Journal())
	if err != nil {
		return err
	}
	last := move.Undoable(past)
	if last == nil {
		return usagef("there is nothing to undo: the keep's journal has no move that was not undone")
	}
	if last.Kind == move.Eject && !o.dryRun {
		// Its roots would hold what is to go; the keep's pins do, too. What stays after
		// all has them again.
		if err := o.w.UnrootEjected(); err != nil {
			return err
		}
		defer func() {
			if !begun {
				err = errors.Join(err, o.w.RootEjected(context.WithoutCancel(ctx)))
			}
		}()
	}
	var sealed, released []string
	for _, r := range last.Sealed {
		sealed = append(sealed, r.Path)
	}
	for _, r := range last.Released {
		released = append(released, r.Path)
	}
	p, gone, err := o.exact(ctx, a, released, sealed) // the other way round
	if err != nil {
		return err
	}
	if n := len(gone); n > 0 {
		a.ui.caveat("%s cannot be moved back, for they are not there any more: %s", counts(n, "path"), gone[0])
	}
	if o.dryRun {
		return a.ui.report(o.report(p))
	}
	if len(p.Moves) == 0 {
		return a.ui.done(o.report(p))
	}
	var besides []string
	if n := len(sealed); n > 0 {
		besides = append(besides, fmt.Sprintf("Everybody on this machine, and who steals it, will be able to read %s again.", counts(n, "path")))
	}
	if err := o.agree(ctx, a, p, fmt.Sprintf("Undo the %s of %s?", last.Kind, last.Time.Local().Format("2 January 15:04")), besides...); err != nil {
		return err
	}
	begun = true
	return o.run(ctx, a, move.Op{Kind: move.Undo, Of: last.ID, Moves: p.Moves, Roots: p.Roots,
		Original: rowsByPath(append(last.Sealed, last.Released...)), Restore: last.Roots})
}
