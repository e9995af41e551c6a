package main

import (
	"context"
	"os"

	"github.com/spf13/cobra"

	"overkeep/overlay/move"
	"overkeep/overlay/nixdb"
	"overkeep/overlay/wipe"
)

func init() { more = append(more, newWipe) }

type wipeOptions struct {
	mover
	verify bool
}

func newWipe(a *app) *cobra.Command {
	var o wipeOptions
	cmd := exits(&cobra.Command{
		Use:     "wipe",
		Short:   "Clear what earlier moves left on the system's disk",
		GroupID: "moves",
		Long: `Remove what the system's side still tells of paths that were sealed before, and of
everything that lies in the keep: rows and free pages of Nix's database and its
write-ahead log, build logs, stale names in the store's directory, free blocks, and
the file system's journal.

seal and apply do this at their end; wipe is for when something was in the way, for
paths that were removed by other means, and for looking: with --verify the raw
device is read whole and searched for the hashes.`,
		Example: `  sudo overkeep wipe
  sudo overkeep wipe --verify`,
		Args: a.args(0, 0),
		RunE: func(cmd *cobra.Command, _ []string) error { return runWipe(cmd.Context(), a, o) },
	}, exitLocked, exitResidue, exitInUse, exitNotRoot, exitNoKeep)
	o.add(a, cmd)
	cmd.Flags().BoolVar(&o.verify, "verify", false, "then read the whole device of the system store and count what still names these paths")
	return cmd
}

func runWipe(ctx context.Context, a *app, o wipeOptions) error {
	if err := o.open(ctx, a); err != nil {
		return err
	}
	defer o.close()
	private, err := o.privateRows(ctx)
	if err != nil {
		return err
	}
	if o.dryRun {
		return a.ui.report(o.wipeSteps(private))
	}
	a.ui.progress("wiping")
	c, err := o.w.Wipe(ctx, private)
	if err != nil {
		return err
	}
	r := wipeReport{CleanResult: c}
	if o.verify {
		if r.Search, err = o.search(ctx, a, private); err != nil {
			return err
		}
	}
	if err := a.ui.done(r); err != nil {
		return err
	}
	if len(c.Left) > 0 || r.Search != nil && r.Search.Hits > 0 {
		return &shownError{exitResidue}
	}
	return nil
}

// privateRows are the rows of all that lies in the keep alone.
func (o *wipeOptions) privateRows(ctx context.Context) ([]nixdb.Info, error) {
	return move.OwnRows(ctx, o.keep.Keep)
}

func (o *wipeOptions) wipeSteps(private []nixdb.Info) steps {
	return steps{DryRun: true, Keep: o.keep.Name, Would: []step{
		{Do: "clear the rows and free pages of the system's Nix database of the names of " + counts(len(private), "path") + " of the keep, and of those that were sealed before"},
		{Do: "carry build logs of private derivations into the keep and overwrite them outside"},
		{Do: "overwrite stale names in the directory of the system store"},
		{Do: "trim the free blocks of its file system, and zero its journal"},
	}}
}

// wipeReport is what wipe did and, if asked, found afterwards.
type wipeReport struct {
	*move.CleanResult
	Search *searched `json:"search,omitempty"`
}

// searched is what a search of a device found.
type searched struct {
	Device string `json:"device"`
	Bytes  int64  `json:"bytes"`
	Names  int    `json:"names"`
	Hits   int    `json:"hits"`
}

func (r wipeReport) print(p *page) {
	printCleaned(p, r.CleanResult)
	if s := r.Search; s != nil {
		p.printf("Searched %s (%s) for %s: %s.\n", s.Device, formatSize(s.Bytes), counts(s.Names, "hash"), counts(s.Hits, "hit"))
	}
}

// search reads the device of the system store for the hashes of private paths.
func (o *wipeOptions) search(ctx context.Context, a *app, private []nixdb.Info) (*searched, error) {
	names, err := o.w.Names(ctx, private)
	if err != nil {
		return nil, err
	}
	dev, err := wipe.DeviceOf(o.out.Store)
	if err != nil {
		return nil, err
	}
	f, err := os.Open(dev)
	if err != nil {
		return nil, err
	}
	defer f.Close()
	s := &searched{Device: dev, Names: len(names)}
	counter := &countingReader{r: f, tell: func(n int64) {
		s.Bytes = n
		a.ui.progress("searching " + dev + ": " + formatSize(n>>26<<26))
	}}
	err = wipe.Search(ctx, counter, names, func(int, int64) { s.Hits++ })
	return s, err
}

// countingReader tells how much was read.
type countingReader struct {
	r    *os.File
	n    int64
	tell func(int64)
}

func (c *countingReader) Read(b []byte) (int, error) {
	n, err := c.r.Read(b)
	if c.n>>26 != (c.n+int64(n))>>26 || err != nil {
		c.tell(c.n + int64(n))
	}
	c.n += int64(n)
	return n, err
}
