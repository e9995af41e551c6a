package main

import (
	"context"
	"fmt"
	"path/filepath"
	"slices"

	"github.com/spf13/cobra"

	"overkeep/crypt/slot"
	"overkeep/crypt/volume"
	"overkeep/overlay/layout"
	"overkeep/overlay/view"
	"overkeep/systemd/keep"
)

type initOptions struct {
	name        string
	user        string
	backend     string
	size        size
	sizeGiven   bool
	imageGiven  bool
	onImage     string
	preallocate bool
	workDir     string
	passFD      descriptor
	recoveryOut string
	workFactor  int
	dryRun      bool
}

// defaultSize is sparse: it takes disk only as it fills.
const defaultSize = 20 << 30

func newInit(a *app) *cobra.Command {
	o := initOptions{size: defaultSize}
	cmd := exits(&cobra.Command{
		Use:     "init [KEEP]",
		Short:   "Make a keep",
		GroupID: "once",
		Long: `Make a keep: an encrypted volume, a passphrase that opens it, and a recovery key
for the day the passphrase is lost. KEEP is its name; without one it is named
after its user. It is locked when it has been made.

The recovery key is shown once and stored nowhere. The keep does not exist
before you have typed a part of it back (or it lies in the file --recovery-out,
which belongs on a stick in a drawer and not on this disk).

The back-end "image" puts the files into one encrypted image, so that a thief
sees no sizes or counts, which alone identify most software. "dir" encrypts the
files one by one; it is simpler and takes no fixed size. The file system below
/var/lib/overkeep must be able to encrypt (ext4 and f2fs can, when told so once);
with --on-image FILE the keep brings its own.`,
		Example: `  sudo overkeep init
  sudo overkeep init work --user alice --size 50G
  sudo overkeep init --on-image /srv/alice.img --size 10G
  sudo overkeep init --dry-run
  pass show keep | sudo overkeep init alice --passphrase-fd 0 --recovery-out /media/stick/alice.txt`,
		Args: a.args(0, 1),
		RunE: func(cmd *cobra.Command, args []string) error {
			o.name, o.sizeGiven, o.imageGiven = first(args), cmd.Flags().Changed("size"), cmd.Flags().Changed("on-image")
			return runInit(cmd.Context(), a, o)
		},
	}, exitUnsupported, exitExists, exitNotRoot, exitAborted, exitNoSpace)
	f := cmd.Flags()
	f.StringVar(&o.user, "user", "", "whose keep it is; the `NAME` of the calling user if not given")
	f.StringVar(&o.backend, "backend", "image", "`image` hides sizes and counts, dir does not")
	f.Var(&o.size, "size", "most the keep can hold, as 512M, 20G, 1T; sparse, it takes disk only as it fills")
	f.StringVar(&o.onImage, "on-image", "", "put the keep's own file system into the new file `FILE`")
	f.BoolVar(&o.preallocate, "preallocate", false, "take all of the disk space now, which also hides how full the keep is")
	f.StringVar(&o.workDir, "work-dir", view.WorkDir, "directory `NAME` in the home that lies in the keep, for sources and result links; none for none")
	o.passFD.add(f, "passphrase-fd", "read the passphrase from descriptor `N` instead of asking")
	f.StringVar(&o.recoveryOut, "recovery-out", "", "write the recovery key to the new file `FILE` instead of showing it")
	f.IntVar(&o.workFactor, "work-factor", slot.DefaultLogN, "scrypt work `N` for the passphrase: each step up doubles time and memory")
	dryRunFlag(cmd, &o.dryRun)
	_ = cmd.RegisterFlagCompletionFunc("backend", cobra.FixedCompletions([]string{"image", "dir"}, cobra.ShellCompDirectiveNoFileComp))
	return cmd
}

// check finds the mistakes that need no look at the machine.
func (o *initOptions) check(a *app) error {
	switch {
	case o.backend != string(volume.Image) && o.backend != string(volume.Dir):
		return usagef("--backend is image or dir, not %q", o.backend).meant(setFlag(a.line, "backend", "image")...)
	case o.imageGiven && o.onImage == "":
		return usagef("--on-image was given, but the name of the file is empty")
	case o.backend == string(volume.Dir) && o.onImage == "" && o.sizeGiven:
		return usagef("a keep of the back-end dir has no size of its own").meant(without(a.line, "size")...)
	case o.size < keep.MinSize:
		return usagef("--size %s is below the least, %s", o.size.String(), formatSize(keep.MinSize)).meant(setFlag(a.line, "size", formatSize(keep.MinSize))...)
	case o.workFactor < 10 || o.workFactor > slot.DefaultMaxLogN:
		return usagef("--work-factor is 10 to %d, not %d", slot.DefaultMaxLogN, o.workFactor).
			meant(setFlag(a.line, "work-factor", fmt.Sprint(slot.DefaultLogN))...)
	case o.user == "" && caller() == "":
		return usagef("whose keep is it to be? Root itself has none").meant(append(slices.Clone(a.line), "--user", "alice")...)
	}
	return nil
}

func (o *initOptions) spec() keep.Init {
	in := keep.Init{Name: o.name, User: o.user, Backend: volume.Backend(o.backend), Size: int64(o.size),
		FSImage: o.onImage, Preallocate: o.preallocate, WorkDir: o.workDir, LogN: o.workFactor}
	if in.User == "" {
		in.User = caller()
	}
	if in.WorkDir == "none" {
		in.WorkDir = ""
	}
	return in
}

func runInit(ctx context.Context, a *app, o initOptions) error {
	if err := o.check(a); err != nil {
		return err
	}
	if !o.dryRun {
		if err := needRoot(); err != nil {
			return err
		}
	}
	in := o.spec()
	// Everything that can be found out is, before anything is asked.
	h, err := a.manager().PlanInit(in)
	if err != nil {
		return err
	}
	a.keep = h.Name
	if o.dryRun {
		return a.ui.report(initSteps(a.root, h, o))
	}
	how, err := a.newConfirmer(ctx, o.recoveryOut, h.Name)
	if err != nil {
		return err
	}
	pass, err := a.newPassphrase(ctx, fmt.Sprintf("keep %q", h.Name), o.passFD, "passphrase-fd")
	if err != nil {
		return err
	}
	defer pass.Wipe()
	in.Passphrase, in.Confirm = pass, how.confirm
	k, err := a.manager().Init(ctx, in)
	if err != nil {
		how.failed(err)
		return err
	}
	return a.ui.done(initDone{Header: k.Header, RecoveryFile: absOrEmpty(o.recoveryOut), Next: a.here().command("unlock", k.Name)})
}

func absOrEmpty(p string) string {
	if p == "" {
		return ""
	}
	if q, err := filepath.Abs(p); err == nil {
		return q
	}
	return p
}

// initDone is the result of init.
type initDone struct {
	*keep.Header
	RecoveryFile string `json:"recovery_file,omitempty"`
	Next         string `json:"next"`
}

func (r initDone) print(p *page) {
	what := "up to " + formatSize(r.Size)
	if r.Size == 0 {
		what = "no size of its own"
	}
	p.printf("Keep %q of user %q is made (%s, %s), and locked.\n", r.Name, r.User, r.Backend, what)
	if r.RecoveryFile != "" {
		p.printf("The recovery key is in %s: move it off this machine.\n", printable(r.RecoveryFile))
	}
	p.printf("Open it with:\n    %s\n", p.style("1", r.Next))
}

// initSteps is the dry run: what would be made, with the header as it would be
// written (but for id and time, which are drawn anew).
func initSteps(root string, h *keep.Header, o initOptions) steps {
	k, err := layout.New(root, h.Name)
	if err != nil {
		return steps{DryRun: true, Keep: h.Name}
	}
	s := steps{DryRun: true, Keep: h.Name}
	add := func(do string, detail ...string) { s.Would = append(s.Would, step{do, detail}) }
	add("make the directory in which the keep is built", k.Building()+"  (0700 root)")
	dir := filepath.Join(k.Building(), "volume")
	size := formatSize(h.Size)
	if o.preallocate {
		size += ", all of it taken now"
	} else {
		size += ", sparse"
	}
	if h.FSImage != "" {
		add("make a file system that can encrypt, in a new file", fmt.Sprintf("%s  (ext4, %s)", h.FSImage, size))
		dir = "volume/ in " + h.FSImage
	}
	add("draw the master key, and encrypt a new directory with it", dir+"  (fscrypt, policy version 2)")
	if h.Backend == volume.Image {
		add("make an ext4 image in the encrypted directory", "volume/"+volume.ImageName+"  ("+size+")")
	}
	add("write the public header", headerLines(h)...)
	add("wrap the master key in two slots", "slots/passphrase.age  (scrypt, work 2^"+fmt.Sprint(o.workFactor)+")",
		"slots/recovery.age    (the recovery key)", "slots/set.json        (the list, with a MAC)")
	if o.recoveryOut != "" {
		add("write the recovery key to a new file, and read it back", absOrEmpty(o.recoveryOut)+"  (0600)")
	} else {
		add("show the recovery key, and ask for a part of it back")
	}
	add("lock the volume, with proof, and give the keep its name", k.Building()+" -> "+k.StateDir())
	return s
}

func headerLines(h *keep.Header) []string {
	fsImage, work := h.FSImage, h.WorkDir
	if fsImage == "" {
		fsImage = "none"
	}
	if work == "" {
		work = "none"
	}
	return []string{
		"keep.json  (version " + fmt.Sprint(h.Version) + ")",
		"name       " + h.Name,
		"user       " + h.User + " (uid " + fmt.Sprint(h.UID) + ")",
		"back-end   " + string(h.Backend),
		"size       " + formatSize(h.Size),
		"file       " + fsImage,
		"work dir   " + work,
	}
}
