package main

import (
	"context"
	"fmt"

	"github.com/spf13/cobra"

	"overkeep/overlay/holder"
	"overkeep/overlay/layout"
	"overkeep/systemd/keep"
)

type lockOptions struct {
	keep       string
	wait, kill bool
	dryRun     bool
}

func newLock(a *app) *cobra.Command {
	var o lockOptions
	cmd := exits(&cobra.Command{
		Use:        "lock [KEEP]",
		SuggestFor: []string{"close", "umount", "unmount", "stop"},
		Short:      "Close a keep, with proof",
		GroupID:    "daily",
		Long: `Close a keep. Success means proof: nothing of it is mounted anywhere, the kernel
says that the key is gone, and the names on disk are ciphertext. Anything else is
an error that says NOT locked and names the processes that hold it. Then nothing
was taken from them, and the keep stays usable.

With --wait new work is refused and lock waits until the old is done. With --kill
what holds the keep is named, you are asked, and it is ended (SIGTERM, then SIGKILL).`,
		Example: `  sudo overkeep lock
  sudo overkeep lock alice --wait
  sudo overkeep lock alice --kill --yes
  sudo overkeep lock --dry-run`,
		Args:              a.args(0, 1),
		ValidArgsFunction: a.completeKeep,
		RunE: func(cmd *cobra.Command, args []string) error {
			o.keep = first(args)
			return runLock(cmd.Context(), a, o)
		},
	}, exitOK, exitNotLocked, exitNoKeep, exitNotRoot, exitInUse)
	cmd.Flags().BoolVar(&o.wait, "wait", false, "refuse new work, and wait for what holds the keep")
	cmd.Flags().BoolVar(&o.kill, "kill", false, "end what holds the keep, after asking")
	a.exclusive(cmd, "wait", "kill")
	dryRunFlag(cmd, &o.dryRun)
	return cmd
}

func runLock(ctx context.Context, a *app, o lockOptions) error {
	k, err := a.open(o.keep)
	if err != nil {
		return err
	}
	if o.dryRun {
		return a.ui.report(lockSteps(ctx, k, o))
	}
	if err := needRoot(); err != nil {
		return err
	}
	mode := keep.LockRefuse
	switch {
	case o.wait:
		mode = keep.LockWait
	case o.kill:
		mode = keep.LockKill
	}
	if o.kill && !a.yes {
		hs, err := k.Holders(ctx)
		if err != nil {
			return err
		}
		if len(hs) > 0 {
			if err := a.confirmKill(ctx, hs); err != nil {
				return err
			}
		}
	}
	r, err := k.Lock(ctx, mode)
	if err != nil {
		return err
	}
	return a.ui.done(lockDone{r})
}

// confirmKill names the holders on the terminal and asks.
func (a *app) confirmKill(ctx context.Context, hs []holder.Holder) error {
	tty, err := a.ui.tty("a confirmation", "--yes")
	if err != nil {
		return err
	}
	printHolders(&page{w: tty}, hs)
	tty.Close()
	yes, err := a.ui.confirm(ctx, fmt.Sprintf("End %s? What they have not saved is lost.", processes(hs)))
	if err == nil && !yes {
		err = aborted("nothing was ended; the keep is NOT locked")
	}
	return err
}

func processes(hs []holder.Holder) string {
	n := 0
	for _, h := range hs {
		if h.PID > 0 {
			n++
		}
	}
	if n == 1 {
		return "this process"
	}
	return fmt.Sprintf("these %d processes", n)
}

// lockDone is the result of lock.
type lockDone struct{ *keep.LockResult }

func (r lockDone) print(p *page) {
	if r.Already {
		p.printf("Keep %q was locked already.\n", r.Keep)
		return
	}
	p.printf("Keep %q is locked: nothing is mounted, the key is gone, the names are ciphertext.\n", r.Keep)
	if len(r.Ended) > 0 {
		p.printf("Ended:\n")
		printHolders(p, r.Ended)
	}
}

// lockSteps is the dry run.
func lockSteps(ctx context.Context, k *keep.Keep, o lockOptions) steps {
	s := steps{DryRun: true, Keep: k.Name}
	add := func(do string, detail ...string) { s.Would = append(s.Would, step{do, detail}) }
	switch {
	case o.wait:
		add("refuse new work, and wait until nothing holds the keep; now these do:", holderLines(ctx, k)...)
	case o.kill:
		add("name what holds the keep, ask, refuse new work, and end it (SIGTERM, 5 s later SIGKILL):", holderLines(ctx, k)...)
	default:
		add("look what holds the keep, and give up if anything does:", holderLines(ctx, k)...)
	}
	add("stop the personal nix-daemon and its supervisor")
	add("unmount the keep in every other mount namespace that has a copy")
	var mounts []string
	if r, err := k.Render(); err == nil {
		for i := len(r.Mounts) - 1; i >= 0; i-- {
			mounts = append(mounts, "umount "+r.Mounts[i].Target)
		}
	}
	add("unmount the view, then the volume:", append(mounts, "umount "+k.Volume())...)
	add("take the key from the kernel, for all users, until it says absent")
	add("prove it: the key is absent and names in the encrypted directory are ciphertext")
	if k.Header.FSImage != "" {
		add("unmount the keep's own file system", "umount "+k.FSMount())
	}
	add("forget the mount namespace, unless sessions live in it", k.Namespace(), layout.RunRoot(k.Root)+"/"+k.Name)
	return s
}

// holderLines are the present holders, as far as they can be had.
func holderLines(ctx context.Context, k *keep.Keep) []string {
	hs, err := k.Holders(ctx)
	if err != nil {
		return []string{"(who holds it now cannot be told: " + err.Error() + ")"}
	}
	if len(hs) == 0 {
		return []string{"(nothing holds it now)"}
	}
	var lines []string
	for _, h := range hs {
		lines = append(lines, h.String())
	}
	return lines
}
