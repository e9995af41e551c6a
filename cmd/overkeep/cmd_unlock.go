package main

import (
	"context"
	"encoding/json"
	"errors"
	"os/exec"
	"strings"

	"github.com/spf13/cobra"

	"overkeep/systemd/keep"
)

type unlockOptions struct {
	keep   string
	auth   authFlags
	strict bool
	dryRun bool
}

func newUnlock(a *app) *cobra.Command {
	var o unlockOptions
	cmd := exits(&cobra.Command{
		Use:        "unlock [KEEP]",
		SuggestFor: []string{"open", "mount", "start"},
		Short:      "Open a keep",
		GroupID:    "daily",
		Long: `Open a keep: one of its slots gives the key to the kernel, the volume is mounted
in the user's view, both stores become one /nix/store there, and a nix-daemon of
the user's own serves it. Nothing shows outside of the view. Opening an open
keep does nothing.

Without flags the passphrase is asked for. Other ways are a key file and the
recovery key. When a step fails, the keep is locked again. With --strict that
holds for the policy, too: a mistake in it, or a require line that does not hold.`,
		Example: `  sudo overkeep unlock
  sudo overkeep unlock work --identity /home/alice/.ssh/id_ed25519
  sudo overkeep unlock --recovery
  pass show keep | sudo overkeep unlock alice --passphrase-fd 0
  sudo overkeep unlock --dry-run`,
		Args:              a.args(0, 1),
		ValidArgsFunction: a.completeKeep,
		RunE: func(cmd *cobra.Command, args []string) error {
			o.keep = first(args)
			return runUnlock(cmd.Context(), a, o)
		},
	}, exitWrongKey, exitTampered, exitUnsupported, exitNoKeep, exitNotRoot, exitInUse, exitMountPoint, exitPolicy, exitRequire)
	o.auth.add(a, cmd)
	cmd.Flags().BoolVar(&o.strict, "strict", false, "lock again unless \"policy check\" finds every requirement to hold")
	dryRunFlag(cmd, &o.dryRun)
	return cmd
}

func runUnlock(ctx context.Context, a *app, o unlockOptions) error {
	k, err := a.open(o.keep)
	if err != nil {
		return err
	}
	if o.dryRun {
		s, err := unlockSteps(a, k, o.strict)
		if err != nil {
			return err
		}
		return a.ui.report(s)
	}
	if err := needRoot(); err != nil {
		return err
	}
	if _, err := keep.ReadConfig(a.root); err != nil {
		return err
	}
	// What can be found out is, before anything is typed.
	if st, err := k.State(ctx); err == nil && st == keep.Unlocked {
		return a.ui.done(unlockDone{&keep.UnlockResult{Keep: k.Name, Already: true}, a.here().command("shell", k.Name)})
	}
	defer k.LookForNix()()
	if o.auth.asks() {
		if err := k.CheckNix(); err != nil {
			return err
		}
	}
	return o.auth.with(ctx, a.ui, k.Name, func(auth keep.Auth) error {
		r, err := k.Unlock(ctx, auth)
		if err != nil {
			return err
		}
		if k.MoveUnfinished() {
			a.recoverMove(ctx, k)
		}
		if o.strict {
			if err := strictly(ctx, a, k); err != nil {
				return err
			}
		}
		return a.ui.done(unlockDone{r, a.here().command("shell", k.Name)})
	})
}

// recoverMove has a mover in the view set right what was interrupted. The keep is open
// whether that can be had or not.
func (a *app) recoverMove(ctx context.Context, k *keep.Keep) {
	a.ui.progress("setting an interrupted move right")
	c := exec.CommandContext(ctx, a.exe, "wipe", "--keep", k.Name, "--root", k.Root, "--quiet", "--json")
	var said strings.Builder
	c.Stderr = &said
	err := c.Run()
	var exit *exec.ExitError
	switch {
	case err == nil, errors.As(err, &exit) && exit.ExitCode() == exitResidue:
		a.ui.caveat("a move was interrupted; it has been set right")
	default:
		a.ui.caveat("a move was interrupted and is not set right: %s", a.here().command("wipe", "--keep", k.Name))
	}
}

// strictly has the policy checked in the view that was just opened, and locks the keep
// if it does not hold or cannot be checked.
func strictly(ctx context.Context, a *app, k *keep.Keep) error {
	a.ui.progress("checking the policy")
	var out, msg strings.Builder
	c := exec.CommandContext(ctx, a.exe, "policy", "check", "--keep", k.Name, "--root", k.Root, "--json")
	c.Stdout, c.Stderr = &out, &msg
	err := c.Run()
	if err == nil {
		return nil
	}
	e := strictError(err, out.String(), msg.String())
	if _, lerr := k.Lock(context.WithoutCancel(ctx), keep.LockRefuse); lerr != nil {
		return errors.Join(lerr, e)
	}
	e.Message += "; keep \"" + k.Name + "\" is locked again"
	return e
}

// strictError says what a policy check that did not succeed found.
func strictError(err error, out, msg string) *keep.Error {
	var exit *exec.ExitError
	var found struct {
		Broken []brokenLine `json:"broken"`
	}
	if errors.As(err, &exit) && exit.ExitCode() == exitRequire && json.Unmarshal([]byte(out), &found) == nil {
		var lines []string
		for _, b := range found.Broken {
			lines = append(lines, b.String())
		}
		return &keep.Error{Code: codeRequire, Message: "the policy does not hold: " + strings.Join(lines, ", ")}
	}
	var said struct {
		Error problem `json:"error"`
	}
	if json.Unmarshal([]byte(msg), &said) == nil && said.Error.Code != "" {
		return &keep.Error{Code: said.Error.Code, Name: said.Error.Name, Message: said.Error.Message}
	}
	return &keep.Error{Code: keep.CodeInternal, Message: "the policy cannot be checked: " + err.Error()}
}

// unlockDone is the result of unlock.
type unlockDone struct {
	*keep.UnlockResult
	Next string `json:"next"`
}

func (r unlockDone) print(p *page) {
	if r.Already {
		p.printf("Keep %q is open already.\n", r.Keep)
	} else {
		p.printf("Keep %q is open (slot %q).\n", r.Keep, r.Slot)
	}
	p.printf("A shell in it:\n    %s\n", p.style("1", r.Next))
}

// unlockSteps is the dry run.
func unlockSteps(a *app, k *keep.Keep, strict bool) (steps, error) {
	r, err := k.Render()
	if err != nil {
		return steps{}, err
	}
	s := steps{DryRun: true, Keep: k.Name}
	add := func(do string, detail ...string) { s.Would = append(s.Would, step{do, detail}) }
	add("check that the system's Nix has a local-overlay store (2.22 or later) and its daemon runs")
	add("make a mount namespace for the view, or take the one there is", k.Namespace())
	add("open a slot with what you give: passphrase, --identity or --recovery", k.Slots())
	if k.Header.FSImage != "" {
		add("mount the keep's own file system, in the view", k.Header.FSImage+" on "+k.FSMount())
	}
	add("give the key to the kernel, and mount the volume in the view", k.Volume())
	add("compare the public header and the slots' epoch with what is pinned inside the volume", k.InnerHeader())
	add("write the personal nix-daemon's settings (overkeep render shows them)", k.NixConfDir()+"/nix.conf")
	var mounts []string
	for _, m := range r.Mounts {
		mounts = append(mounts, m.Command())
	}
	add("mount, in the view:", mounts...)
	add("start the personal nix-daemon, with the store", strings.TrimSpace(r.Store))
	if strict {
		add("check the policy in the view, and lock the keep again if it does not hold")
	}
	return s, nil
}
