package main

import (
	"context"
	"errors"
	"fmt"
	"os"

	"github.com/spf13/cobra"

	"overkeep/overlay/layout"
	"overkeep/systemd/keep"
)

type destroyOptions struct {
	keep   string
	dryRun bool
}

func newDestroy(a *app) *cobra.Command {
	var o destroyOptions
	cmd := exits(&cobra.Command{
		Use:        "destroy KEEP",
		SuggestFor: []string{"delete", "remove", "rm"},
		Short:      "Destroy a keep for good",
		GroupID:    "once",
		Long: `Destroy a locked keep: first its slots, so that nothing opens it any more, then
the volume and all that belongs to it. There is no way back. The recovery key
does not help, for what it opens is gone.

You are asked to type the keep's name, unless --yes is given. The slots are
overwritten before they are removed; that speaks for the file system's blocks and
not for the cells of a flash disk. A destroy that was interrupted is finished by
giving the command again.`,
		Example: `  sudo overkeep destroy work --dry-run
  sudo overkeep destroy work`,
		Args:              a.args(1, 1, "KEEP"),
		ValidArgsFunction: a.completeKeep,
		RunE: func(cmd *cobra.Command, args []string) error {
			o.keep = first(args)
			return runDestroy(cmd.Context(), a, o)
		},
	}, exitNotLocked, exitNoKeep, exitNotRoot, exitAborted, exitInUse)
	dryRunFlag(cmd, &o.dryRun)
	return cmd
}

func runDestroy(ctx context.Context, a *app, o destroyOptions) error {
	if err := needRoot(); err != nil {
		return err
	}
	a.keep = o.keep
	d, err := a.doomed(ctx, o.keep)
	var e *keep.Error
	switch {
	case errors.As(err, &e) && e.Code == keep.CodeNoKeep && !o.dryRun:
		// What an interrupted destroy has left is taken away, without asking
		// again; when nothing is left, this says that there is no such keep.
		if err := a.manager().Destroy(ctx, o.keep); err != nil {
			return err
		}
		return a.ui.done(destroyed{o.keep})
	case err != nil:
		return err
	}
	if o.dryRun {
		return a.ui.report(d.steps())
	}
	if !a.yes {
		if err := a.confirmDestroy(ctx, d); err != nil {
			return err
		}
	}
	if err := a.manager().Destroy(ctx, o.keep); err != nil {
		return err
	}
	return a.ui.done(destroyed{o.keep})
}

// doomed is what destroy would take away.
type doomed struct {
	layout.Keep
	header *keep.Header // nil when it cannot be read: the keep can go all the same
	size   int64
	pins   int
}

func (a *app) doomed(ctx context.Context, name string) (*doomed, error) {
	l, err := layout.New(a.root, name)
	if err != nil {
		return nil, err
	}
	d := &doomed{Keep: l}
	k, err := a.manager().Open(name)
	var e *keep.Error
	switch {
	case errors.As(err, &e) && (e.Code == keep.CodeDamaged || e.Code == keep.CodeVersion):
		return d, nil
	case errors.As(err, &e) && e.Code == keep.CodeNoKeep && exists(l.StateDir()):
		return d, nil // its header is gone
	case err != nil:
		return nil, err
	}
	d.header = k.Header
	st, err := k.Status(ctx)
	if err != nil {
		return d, nil // what is too broken to be looked at can go
	}
	if st.State != keep.Locked {
		return nil, &keep.Error{Code: keep.CodeUnlocked, Name: name, Message: fmt.Sprintf("keep %q is not locked", name)}
	}
	d.size, d.pins = st.SizeOnDisk, st.Pins
	return d, nil
}

func exists(path string) bool {
	_, err := os.Lstat(path)
	return err == nil
}

func (d *doomed) steps() steps {
	s := steps{DryRun: true, Keep: d.Name}
	add := func(do string, detail ...string) { s.Would = append(s.Would, step{do, detail}) }
	add("take the keep's name away", d.StateDir())
	add("overwrite and remove its slots; from here on no passphrase and no key opens it", d.Slots())
	volume := []string{d.VolumeDir() + "  (" + formatSize(d.size) + " on disk)"}
	if d.header != nil && d.header.FSImage != "" {
		volume = []string{d.header.FSImage + "  (the keep's own file system, the whole file)"}
	}
	add("remove the encrypted volume and its fscrypt metadata", volume...)
	add("remove the header and the directory", d.Header(), d.StateDir())
	add(fmt.Sprintf("let go of %d paths of the system store that were held for it", d.pins), d.Pins())
	return s
}

func (a *app) confirmDestroy(ctx context.Context, d *doomed) error {
	whose := "whose header cannot be read"
	if d.header != nil {
		whose = fmt.Sprintf("of user %q, made %s", d.header.User, d.header.Created.Format("2006-01-02"))
	}
	answer, err := a.ui.ask(ctx, fmt.Sprintf("This destroys keep %q %s, with all that is in it (%s on disk).\n"+
		"No passphrase and no recovery key will bring it back.\nType its name to go on: ", d.Name, whose, formatSize(d.size)),
		"a confirmation", "--yes")
	if err != nil {
		return err
	}
	if answer != d.Name {
		return aborted("that is not its name; nothing was destroyed")
	}
	return nil
}

// destroyed is the result of destroy.
type destroyed struct {
	Destroyed string `json:"destroyed"`
}

func (r destroyed) print(p *page) { p.printf("Keep %q is destroyed.\n", r.Destroyed) }
