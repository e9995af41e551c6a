package main

import (
	"context"
	"crypto/sha256"
	"encoding/hex"
	"fmt"
	"os"
	"path/filepath"
	"strings"

	"github.com/spf13/cobra"
	"golang.org/x/sys/unix"

	"overkeep/overlay/cache"
	"overkeep/overlay/move"
	"overkeep/overlay/nixdb"
	"overkeep/systemd/keep"
)

func init() { more = append(more, newEject) }

type ejectOptions struct {
	mover
	to string
}

func newEject(a *app) *cobra.Command {
	var o ejectOptions
	cmd := exits(&cobra.Command{
		Use:     "eject [--to DIR]",
		Short:   "Take everything out of a keep: the way back to plain Nix",
		GroupID: "moves",
		Long: `Move every path of the keep into the plaintext system store, whatever the policy says,
with rows as they are in the keep, and give what the keep's roots held a root there
(/nix/var/nix/gcroots/overkeep-ejected/KEEP), so that it survives the keep. After it
"destroy" loses no store path. What lies in ~/keep stays in the keep: copy it yourself.

With --to DIR nothing moves: everything, with all it refers to, is written as a
binary cache of NARs into DIR, readable by root alone, from which stock Nix takes it on
any machine:

  nix copy --from file://DIR --no-check-sigs --all

Both make private paths plaintext. You are asked.`,
		Example: `  sudo overkeep eject --dry-run
  sudo overkeep eject --to /media/usb/nars`,
		Args: a.args(0, 0),
		RunE: func(cmd *cobra.Command, _ []string) error { return runEject(cmd.Context(), a, o) },
	}, exitLocked, exitLeft, exitResidue, exitNoSpace, exitAborted, exitInUse, exitNotRoot, exitNoKeep)
	o.add(a, cmd)
	cmd.Flags().StringVar(&o.to, "to", "", "write NARs into `DIR` instead, as a binary cache; an interrupted one is gone on with")
	return cmd
}

func runEject(ctx context.Context, a *app, o ejectOptions) error {
	if o.to != "" {
		abs, err := filepath.Abs(o.to)
		if err != nil {
			return err
		}
		o.to = abs
	}
	if err := o.open(ctx, a); err != nil {
		return err
	}
	defer o.close()
	rows, err := move.OwnRows(ctx, o.keep.Keep)
	if err != nil {
		return err
	}
	var paths []string
	for _, r := range rows {
		paths = append(paths, r.Path)
	}
	if o.to != "" {
		return o.writeCache(ctx, a, paths)
	}
	p, _, err := o.exact(ctx, a, nil, paths)
	if err != nil {
		return err
	}
	if o.dryRun {
		return a.ui.report(o.report(p))
	}
	question := fmt.Sprintf("Make all of keep %s, %s, plaintext for everybody on this machine?", o.keep.Name, counts(len(paths), "path"))
	if err := o.agree(ctx, a, p, question); err != nil {
		return err
	}
	// What the keep uses of the system store; what moves there gets its roots as it comes.
	if err := o.w.RootEjected(ctx); err != nil {
		return err
	}
	err = o.run(ctx, a, move.Op{Kind: move.Eject, Moves: p.Moves, Roots: p.Roots, Original: rowsByPath(rows)})
	if err == nil && len(p.Blocked) > 0 {
		a.ui.caveat("%s stay in the keep: %s", counts(len(p.Blocked), "path"), blockedWords(&p.Blocked[0]))
		return &shownError{exitLeft}
	}
	return err
}

// writeCache writes paths and all they refer to into o.to.
func (o *ejectOptions) writeCache(ctx context.Context, a *app, paths []string) error {
	infos, err := o.closure(ctx, paths)
	if err != nil {
		return err
	}
	var total int64
	for _, i := range infos {
		total += i.NarSize
	}
	if o.dryRun {
		return a.ui.report(steps{DryRun: true, Keep: o.keep.Name, Would: []step{{Do: fmt.Sprintf("write %s, %s of NARs, as plaintext into %q", counts(len(infos), "path"), formatSize(total), o.to)}}})
	}
	if err := o.agree(ctx, a, nil, fmt.Sprintf("Write %s (%s, the private ones among them) as plaintext into %s?", counts(len(infos), "path"), formatSize(total), o.to)); err != nil {
		return err
	}
	// Outside the view: there DIR may be covered by the keep itself.
	dst, err := o.makeOutside(o.to)
	if err != nil {
		return err
	}
	defer dst.Close()
	store, err := os.Open("/nix/store") // both layers
	if err != nil {
		return err
	}
	defer store.Close()
	r := ejected{To: o.to, Bytes: total}
	tell := o.progress(a)
	p := move.Progress{Doing: "writing", TotalBytes: total, TotalPaths: len(infos)}
	err = cache.Write(ctx, dst, store, infos, cache.Options{
		Progress: func(n int64) { p.Bytes += n; tell(p) },
		Done: func(_ int, kept bool, err error) {
			p.Paths++
			if err == nil {
				r.Paths++
			}
			if kept {
				r.Kept++
			}
		},
	})
	if err != nil {
		return err
	}
	return a.ui.done(r)
}

// ejected is what eject --to did.
type ejected struct {
	To    string `json:"to"`
	Paths int    `json:"paths"`
	Kept  int    `json:"kept"` // were there already
	Bytes int64  `json:"bytes"`
}

func (r ejected) print(p *page) {
	p.printf("%s (%s) in %s, plaintext. With stock Nix, as root:\n\n  nix copy --from file://%s --no-check-sigs --all\n", counts(r.Paths, "path"), formatSize(r.Bytes), printable(r.To), printable(r.To))
}

// makeOutside makes a directory of root's alone on the machine outside the view, or
// finds one; its parent must be there.
func (m *mover) makeOutside(dir string) (*os.File, error) {
	parent, err := m.outside(filepath.Dir(dir))
	if err != nil {
		return nil, &keep.Error{Code: keep.CodeUsage, Name: dir, Message: fmt.Sprintf("%q: %v", dir, err)}
	}
	defer parent.Close()
	if err := unix.Mkdirat(int(parent.Fd()), filepath.Base(dir), 0o700); err != nil && err != unix.EEXIST {
		return nil, &os.PathError{Op: "mkdir", Path: dir, Err: err}
	}
	fd, err := unix.Openat(int(parent.Fd()), filepath.Base(dir), unix.O_RDONLY|unix.O_DIRECTORY|unix.O_NOFOLLOW|unix.O_CLOEXEC, 0)
	if err != nil {
		return nil, &os.PathError{Op: "open", Path: dir, Err: err}
	}
	f := os.NewFile(uintptr(fd), dir)
	var st unix.Stat_t
	if err := unix.Fstat(fd, &st); err != nil || st.Uid != 0 || st.Mode&0o077 != 0 {
		f.Close()
		if err != nil {
			return nil, &os.PathError{Op: "stat", Path: dir, Err: err}
		}
		return nil, &keep.Error{Code: keep.CodeUsage, Name: dir, Message: fmt.Sprintf("%q exists, and others than root can look into it (uid %d, mode %o): name one that does not exist", dir, st.Uid, st.Mode&0o7777)}
	}
	return f, nil
}

// closure reads the rows of paths and of all they refer to from the keep, as a binary
// cache takes them.
func (m *planner) closure(ctx context.Context, paths []string) ([]cache.Info, error) {
	if len(paths) == 0 {
		return nil, nil
	}
	rows, err := nixdb.ReadClosure(ctx, filepath.Join(m.keep.NixDB(), "db.sqlite"), paths)
	if err != nil {
		return nil, err
	}
	out := make([]cache.Info, 0, len(rows))
	for _, r := range rows {
		hash, err := hex.DecodeString(strings.TrimPrefix(r.NarHash, "sha256:"))
		if err != nil || len(hash) != sha256.Size {
			return nil, fmt.Errorf("%q has no NAR hash", r.Path)
		}
		out = append(out, cache.Info{Path: r.Path, NarHash: [32]byte(hash), NarSize: r.NarSize, Refs: r.Refs, Deriver: r.Deriver, Sigs: r.Sigs, CA: r.CA})
	}
	return out, nil
}
