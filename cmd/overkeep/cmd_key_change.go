package main

import (
	"bufio"
	"context"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"slices"
	"strings"

	"github.com/spf13/cobra"

	"overkeep/crypt/secret"
	"overkeep/crypt/slot"
	"overkeep/systemd/keep"
)

type keyAddOptions struct {
	keyOptions
	name          string
	label         string
	recipient     string
	recipientFile string
	passphrase    bool
	newFD         descriptor
	workFactor    int
}

func newKeyAdd(a *app) *cobra.Command {
	var o keyAddOptions
	cmd := exits(&cobra.Command{
		Use:   "add [KEEP]",
		Short: "Add a slot: a passphrase or somebody's public key",
		Long: `Add a way to open the keep. A public key is enough for a slot that its private
key opens: an age recipient (age1...), a post-quantum one (age1pq1...), an SSH
key (ssh-ed25519, ssh-rsa), or the recipient of an age plugin for a hardware
token. Only the public key is given to overkeep.`,
		Example: `  sudo overkeep key add --recipient-file /home/alice/.ssh/id_ed25519.pub --name laptop
  sudo overkeep key add alice --recipient age1ql3z7hjy54pw3hyww5ayyfg7zqgvc7w3j2elw8zmrj2kg5sfn9aqmcac8p
  sudo overkeep key add --passphrase --name second
  sudo overkeep key add --passphrase --identity recovery.txt --new-passphrase-fd 0`,
		Args:              a.args(0, 1),
		ValidArgsFunction: a.completeKeep,
		RunE: func(cmd *cobra.Command, args []string) error {
			o.keep = first(args)
			return runKeyAdd(cmd.Context(), a, o)
		},
	}, exitWrongKey, exitTampered, exitNoKeep, exitNotRoot, exitInUse, exitPlugin)
	f := cmd.Flags()
	f.StringVar(&o.name, "name", "", "the new slot's `NAME`; after its kind if not given")
	f.StringVar(&o.label, "label", "", "a hint for people, public; for an SSH key its comment if not given")
	f.StringVar(&o.recipient, "recipient", "", "the public key `R`: age1..., age1pq1..., ssh-..., or a plugin's")
	f.StringVar(&o.recipientFile, "recipient-file", "", "the public keys in `FILE`, one a line, a slot for each")
	f.BoolVar(&o.passphrase, "passphrase", false, "another passphrase, which is asked for")
	o.newFD.add(f, "new-passphrase-fd", "read the new passphrase from descriptor `N` instead of asking")
	f.IntVar(&o.workFactor, "work-factor", slot.DefaultLogN, "scrypt work `N` for a new passphrase: each step up doubles time and memory")
	a.exclusive(cmd, "recipient", "recipient-file", "passphrase")
	o.auth.add(a, cmd)
	dryRunFlag(cmd, &o.dryRun)
	return cmd
}

// recipients are the public keys given, without comments and empty lines; none
// for a passphrase.
func (o *keyAddOptions) recipients(a *app) ([]string, error) {
	var rs []string
	switch {
	case o.recipient != "":
		rs = []string{o.recipient}
	case o.recipientFile != "":
		f, err := os.Open(o.recipientFile)
		if err != nil {
			return nil, usagef("--recipient-file: %s", err)
		}
		defer f.Close()
		sc := bufio.NewScanner(f)
		for sc.Scan() {
			if l := strings.TrimSpace(sc.Text()); l != "" && l[0] != '#' {
				rs = append(rs, l)
			}
			if len(rs) > slot.MaxSlots {
				return nil, usagef("--recipient-file %q has more than %d keys", o.recipientFile, slot.MaxSlots)
			}
		}
		if err := sc.Err(); err != nil {
			return nil, usagef("--recipient-file %q: %s", o.recipientFile, err)
		}
		if len(rs) == 0 {
			return nil, usagef("--recipient-file %q has no key in it", o.recipientFile)
		}
	case o.passphrase, o.newFD >= 0:
		if o.newFD >= 0 && o.newFD == o.auth.fd {
			return nil, usagef("--passphrase-fd and --new-passphrase-fd are the same descriptor")
		}
		return nil, nil
	default:
		return nil, usagef("what kind of slot? Give --passphrase, --recipient or --recipient-file").
			meant(append(slices.Clone(a.line), "--passphrase")...)
	}
	return rs, nil
}

// newSlots plans the slots to add: kinds, names and labels.
func (o *keyAddOptions) newSlots(have []string, rs []string) ([]keep.NewSlot, error) {
	var out []keep.NewSlot
	name := func(kind string) string {
		base := o.name
		if base == "" {
			base = kind
		}
		n := base
		for i := 2; slices.Contains(have, n) && (o.name == "" || len(rs) > 1); i++ {
			n = fmt.Sprintf("%s-%d", base, i)
		}
		have = append(have, n)
		return n
	}
	if len(rs) == 0 {
		return []keep.NewSlot{{Action: keep.ActionAdd, Name: name("passphrase"), Label: o.label}}, nil
	}
	for i, r := range rs {
		_, kind, err := slot.ParseRecipient(r, nil)
		if err != nil {
			which := "--recipient"
			if o.recipientFile != "" {
				which = fmt.Sprintf("--recipient-file %q, key %d", o.recipientFile, i+1)
			}
			return nil, usagef("%s: %s", which, err)
		}
		label := o.label
		if kind == slot.SSH && label == "" {
			// ssh-ed25519 AAAA... comment
			if f := strings.SplitN(r, " ", 3); len(f) == 3 && printable(f[2]) == f[2] {
				label = clip(strings.TrimSpace(f[2]), 64)
			}
		}
		out = append(out, keep.NewSlot{Action: keep.ActionAdd, Name: name(string(kind)), Recipient: r, Label: label})
	}
	return out, nil
}

func runKeyAdd(ctx context.Context, a *app, o keyAddOptions) error {
	rs, err := o.recipients(a)
	if err != nil {
		return err
	}
	k, err := a.openForChange(o.keep)
	if err != nil {
		return err
	}
	l, err := k.Keys()
	if err != nil {
		return err
	}
	var have []string
	for _, s := range l.Slots {
		have = append(have, s.Name)
	}
	add, err := o.newSlots(have, rs)
	if err != nil {
		return err
	}
	if o.name != "" && slices.Contains(have, o.name) {
		return usagef("slot %q exists already", o.name).meant(setFlag(a.line, "name", o.name+"-2")...)
	}
	var names []string
	for _, s := range add {
		names = append(names, s.Name)
	}
	if o.dryRun {
		return a.ui.report(keySteps(k, "wrap the master key once for each new slot:", names...))
	}
	var fresh func() (*secret.Bytes, error)
	if len(rs) == 0 {
		fresh = func() (*secret.Bytes, error) {
			return a.newPassphrase(ctx, fmt.Sprintf("slot %q", add[0].Name), o.newFD, "new-passphrase-fd")
		}
	}
	done := 0
	err = o.auth.with(ctx, a.ui, k.Name, func(auth keep.Auth) error {
		for done < len(add) {
			if err := a.change(ctx, k, auth, o.auth.asks(), add[done], o.workFactor, false, fresh, nil); err != nil {
				return err
			}
			done++
		}
		return nil
	})
	if err != nil {
		if done > 0 {
			a.ui.note("%s added before this failed.", slotWord(names[:done]))
		}
		return err
	}
	return a.ui.done(keyChanged{Keep: k.Name, Action: "add", Slots: names})
}

// change is one change of the slots. When the present key was typed and the new
// secret will be, the first is verified before the second is asked for, so that
// a slip shows at once.
func (a *app) change(ctx context.Context, k *keep.Keep, auth keep.Auth, typed bool, change keep.NewSlot, logN int, force bool,
	fresh func() (*secret.Bytes, error), confirm func(*secret.Bytes) error) error {
	var p *secret.Bytes
	if fresh != nil {
		if typed {
			a.ui.progress("checking the present key")
			if _, err := k.Verify(ctx, auth); err != nil {
				return err
			}
		}
		var err error
		if p, err = fresh(); err != nil {
			return err
		}
		defer p.Wipe()
	}
	a.ui.progress("changing the slots")
	return k.ChangeKeys(ctx, auth, change, p, logN, force, confirm)
}

type keyRemoveOptions struct {
	keyOptions
	name  string
	force bool
}

func newKeyRemove(a *app) *cobra.Command {
	var o keyRemoveOptions
	cmd := exits(&cobra.Command{
		Use:        "remove [KEEP] NAME",
		SuggestFor: []string{"rm", "delete", "del"},
		Short:      "Remove a slot",
		Long: `Remove a slot from the keep. The last slot stays, whatever is given, and the last
recovery slot needs --force: without it a forgotten passphrase is final.

This takes the slot from this disk. Somebody who copied the slot file before, and
has its key, can still open copies of the disk: what was exposed needs a new keep.`,
		Example: `  sudo overkeep key remove laptop
  sudo overkeep key remove alice recovery --force`,
		Args: a.args(1, 2, "NAME"),
		RunE: func(cmd *cobra.Command, args []string) error {
			o.name = args[len(args)-1]
			if len(args) == 2 {
				o.keep = args[0]
			}
			return runKeyRemove(cmd.Context(), a, o)
		},
	}, exitWrongKey, exitTampered, exitNoKeep, exitNotRoot, exitInUse)
	cmd.Flags().BoolVar(&o.force, "force", false, "also the last recovery slot")
	o.auth.add(a, cmd)
	dryRunFlag(cmd, &o.dryRun)
	return cmd
}

func runKeyRemove(ctx context.Context, a *app, o keyRemoveOptions) error {
	k, err := a.openForChange(o.keep)
	if err != nil {
		return err
	}
	l, err := k.Keys()
	if err != nil {
		return err
	}
	var names []string
	for _, s := range l.Slots {
		names = append(names, s.Name)
	}
	if file := filepath.Join(k.Slots(), filepath.Base(o.name)+".age"); !slices.Contains(names, o.name) && exists(file) {
		return &usageError{msg: fmt.Sprintf("keep %q has no slot %q, but there is a file of that name, which overkeep did not write", k.Name, o.name),
			why: "Look at it, then take it away:", command: sudo(a.here(), quoteLine([]string{"rm", file}))}
	}
	if !slices.Contains(names, o.name) {
		e := usagef("keep %q has no slot %q; it has %s", k.Name, o.name, strings.Join(names, ", "))
		if near := nearest(o.name, names); near != "" {
			e = e.meant(replaceWord(a.line, o.name, near)...)
		}
		return e
	}
	if o.dryRun {
		return a.ui.report(keySteps(k, "leave out one slot, and overwrite its file:", o.name))
	}
	err = o.auth.with(ctx, a.ui, k.Name, func(auth keep.Auth) error {
		return a.change(ctx, k, auth, false, keep.NewSlot{Action: keep.ActionRemove, Name: o.name}, 0, o.force, nil, nil)
	})
	switch {
	case errors.Is(err, slot.ErrLastRecovery) || err != nil && strings.HasSuffix(err.Error(), slot.ErrLastRecovery.Error()):
		return (&usageError{msg: err.Error() + ": a forgotten passphrase would be final", why: "If that is what you want:"}).
			meant(append(slices.Clone(a.line), "--force")...)
	case err != nil:
		return err
	}
	return a.ui.done(keyChanged{Keep: k.Name, Action: "remove", Slots: []string{o.name}})
}

type keyChangeOptions struct {
	keyOptions
	name       string
	newFD      descriptor
	workFactor int
}

func newKeyChange(a *app) *cobra.Command {
	var o keyChangeOptions
	cmd := exits(&cobra.Command{
		Use:        "change [KEEP]",
		SuggestFor: []string{"passwd", "passphrase", "password"},
		Short:      "Change a passphrase",
		Long: `Change the passphrase of a slot. It stays the same slot, and nothing is encrypted
again: only the wrapping of the master key is new. Any slot may be used to
authorise the change, so the recovery key helps when the passphrase is forgotten.`,
		Example: `  sudo overkeep key change
  sudo overkeep key change --recovery
  sudo overkeep key change alice --name second --passphrase-fd 3 --new-passphrase-fd 4 3<old 4<new`,
		Args:              a.args(0, 1),
		ValidArgsFunction: a.completeKeep,
		RunE: func(cmd *cobra.Command, args []string) error {
			o.keep = first(args)
			return runKeyChange(cmd.Context(), a, o)
		},
	}, exitWrongKey, exitTampered, exitNoKeep, exitNotRoot, exitInUse)
	f := cmd.Flags()
	f.StringVar(&o.name, "name", "", "the slot `NAME` to change, when there are several passphrases")
	o.newFD.add(f, "new-passphrase-fd", "read the new passphrase from descriptor `N` instead of asking")
	f.IntVar(&o.workFactor, "work-factor", slot.DefaultLogN, "scrypt work `N` for the new passphrase: each step up doubles time and memory")
	o.auth.add(a, cmd)
	dryRunFlag(cmd, &o.dryRun)
	return cmd
}

func runKeyChange(ctx context.Context, a *app, o keyChangeOptions) error {
	if o.newFD >= 0 && o.newFD == o.auth.fd {
		return usagef("--passphrase-fd and --new-passphrase-fd are the same descriptor")
	}
	k, err := a.openForChange(o.keep)
	if err != nil {
		return err
	}
	name, err := o.slotToChange(a, k)
	if err != nil {
		return err
	}
	if o.dryRun {
		return a.ui.report(keySteps(k, "wrap the master key with the new passphrase, in the slot:", name))
	}
	err = o.auth.with(ctx, a.ui, k.Name, func(auth keep.Auth) error {
		return a.change(ctx, k, auth, o.auth.asks(), keep.NewSlot{Action: keep.ActionChange, Name: name}, o.workFactor, false,
			func() (*secret.Bytes, error) {
				return a.newPassphrase(ctx, fmt.Sprintf("slot %q", name), o.newFD, "new-passphrase-fd")
			}, nil)
	})
	if err != nil {
		return err
	}
	return a.ui.done(keyChanged{Keep: k.Name, Action: "change", Slots: []string{name}})
}

// slotToChange is the passphrase slot named, the one that --slot opens, or the
// only one there is.
func (o *keyChangeOptions) slotToChange(a *app, k *keep.Keep) (string, error) {
	l, err := k.Keys()
	if err != nil {
		return "", err
	}
	var names []string
	for _, s := range l.Slots {
		if s.Kind == slot.Passphrase {
			names = append(names, s.Name)
		}
	}
	want := o.name
	if want == "" && slices.Contains(names, o.auth.slot) {
		want = o.auth.slot
	}
	switch {
	case want != "" && slices.Contains(names, want):
		return want, nil
	case want != "":
		return "", usagef("%q is no passphrase slot of keep %q; those are %s", want, k.Name, strings.Join(names, ", "))
	case len(names) == 1:
		return names[0], nil
	case len(names) == 0:
		return "", usagef("keep %q has no passphrase slot", k.Name).meant("key", "add", k.Name, "--passphrase")
	}
	return "", usagef("which passphrase? There are %s", strings.Join(names, ", ")).
		meant(append(slices.Clone(a.line), "--name", names[0])...)
}

type keyRecoveryOptions struct {
	keyOptions
	out string
}

func newKeyRecovery(a *app) *cobra.Command {
	var o keyRecoveryOptions
	cmd := exits(&cobra.Command{
		Use:   "recovery [KEEP]",
		Short: "Make a new recovery key in place of the old",
		Long: `Make a new recovery key. It is shown once, or written to a file, and confirmed
before it takes the place of the old one: until then the old one works.`,
		Example: `  sudo overkeep key recovery
  sudo overkeep key recovery alice --recovery-out /media/stick/alice.txt`,
		Args:              a.args(0, 1),
		ValidArgsFunction: a.completeKeep,
		RunE: func(cmd *cobra.Command, args []string) error {
			o.keep = first(args)
			return runKeyRecovery(cmd.Context(), a, o)
		},
	}, exitWrongKey, exitTampered, exitExists, exitNotRoot, exitAborted, exitInUse)
	cmd.Flags().StringVar(&o.out, "recovery-out", "", "write the recovery key to the new file `FILE` instead of showing it")
	o.auth.add(a, cmd)
	dryRunFlag(cmd, &o.dryRun)
	return cmd
}

func runKeyRecovery(ctx context.Context, a *app, o keyRecoveryOptions) error {
	k, err := a.openForChange(o.keep)
	if err != nil {
		return err
	}
	if o.dryRun {
		return a.ui.report(keySteps(k, "draw a new recovery key, show or write it, have it confirmed, and wrap the master key to it in the slot:", "recovery"))
	}
	how, err := a.newConfirmer(ctx, o.out, k.Name)
	if err != nil {
		return err
	}
	err = o.auth.with(ctx, a.ui, k.Name, func(auth keep.Auth) error {
		err := a.change(ctx, k, auth, o.auth.asks(), keep.NewSlot{Action: keep.ActionRecovery}, 0, false, nil, how.confirm)
		if err != nil {
			how.failed(err)
		}
		return err
	})
	if err != nil {
		return err
	}
	return a.ui.done(keyChanged{Keep: k.Name, Action: "recovery", Slots: []string{"recovery"}, RecoveryFile: absOrEmpty(o.out)})
}
