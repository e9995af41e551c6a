package main

import (
	"context"
	"errors"
	"slices"

	"github.com/spf13/cobra"
	"golang.org/x/sys/unix"

	"overkeep/systemd/keep"
)

type runOptions struct {
	keep    string
	asRoot  bool
	command []string // none for the login shell
}

func newRun(a *app) *cobra.Command {
	var o runOptions
	cmd := exits(&cobra.Command{
		Use:        "run [KEEP] [--as-root] -- COMMAND...",
		SuggestFor: []string{"exec", "enter"},
		Short:      "Run a command in an open keep's view",
		GroupID:    "daily",
		Long: `Run a command as the keep's user in its view, where both stores are one
/nix/store and stock nix builds into the keep. Temporary files go into the keep,
too. A locked keep is an error: nothing is ever run beside the view.

With --as-root the command runs as root in the view. The exit code is the
command's; those of overkeep come only when the command did not start.`,
		Example: `  sudo overkeep run -- nix build .#secret-project
  sudo overkeep run alice -- nix-collect-garbage -d
  sudo overkeep run --as-root -- nix store verify --all`,
		ValidArgsFunction: a.completeKeep,
		Args: func(cmd *cobra.Command, args []string) error {
			return a.runArgs(cmd, args)
		},
		RunE: func(cmd *cobra.Command, args []string) error {
			dash := cmd.ArgsLenAtDash()
			o.keep, o.command = first(args[:dash]), args[dash:]
			return runRun(cmd.Context(), a, o)
		},
	}, exitLocked, exitNoKeep, exitNotRoot)
	cmd.Flags().BoolVar(&o.asRoot, "as-root", false, "as root instead of the keep's user")
	return cmd
}

// runArgs wants a "--" and a command after it.
func (a *app) runArgs(cmd *cobra.Command, args []string) error {
	dash := cmd.ArgsLenAtDash()
	switch {
	case dash < 0 && len(args) > 0:
		e := usagef("the command to run stands after \"--\"")
		if fixed := a.withDashes(cmd); fixed != nil {
			return e.meant(fixed...)
		}
		return e.meant(append(slices.Clone(a.line), "--", "nix", "build")...)
	case dash < 0, len(args) == dash:
		line := slices.Clone(a.line)
		if dash < 0 {
			line = append(line, "--")
		}
		return usagef("no command to run was given").meant(append(line, "nix", "build")...)
	case dash > 1:
		return usagef("overkeep run takes one keep, not also %q", args[1]).meant(deleteFirst(a.line, args[1])...)
	}
	return nil
}

// deleteFirst removes the first occurrence of word.
func deleteFirst(line []string, word string) []string {
	if i := slices.Index(line, word); i >= 0 {
		return slices.Delete(slices.Clone(line), i, i+1)
	}
	return line
}

func newShell(a *app) *cobra.Command {
	var o runOptions
	cmd := exits(&cobra.Command{
		Use:     "shell [KEEP]",
		Short:   "A login shell in an open keep's view",
		GroupID: "daily",
		Long: `Start the user's login shell in the view of an open keep, where both stores are
one /nix/store. Leaving the shell does not lock the keep; a shell that is left
open keeps it from being locked.`,
		Example: `  sudo overkeep shell
  sudo overkeep shell work`,
		Args:              a.args(0, 1),
		ValidArgsFunction: a.completeKeep,
		RunE: func(cmd *cobra.Command, args []string) error {
			o.keep = first(args)
			return runRun(cmd.Context(), a, o)
		},
	}, exitLocked, exitNoKeep, exitNotRoot)
	cmd.Flags().BoolVar(&o.asRoot, "as-root", false, "as root instead of the keep's user")
	return cmd
}

// runRun does not come back when it succeeds: the process becomes the command.
func runRun(_ context.Context, a *app, o runOptions) error {
	k, err := a.open(o.keep)
	if err != nil {
		return err
	}
	if err := needRoot(); err != nil {
		return err
	}
	unix.Umask(a.umask) // what runs has the caller's, not ours
	err = k.Exec(o.command, o.asRoot)
	var e *keep.Error
	// A command that cannot be run is the caller's mistake, not ours.
	if errors.As(err, &e) && len(o.command) > 0 && e.Name == o.command[0] && (e.Code == keep.CodeUsage || e.Code == keep.CodeInternal) {
		return usagef("%s", e.Message)
	}
	return err
}
