package main

import (
	"context"
	"fmt"
	"strings"
	"time"

	"github.com/spf13/cobra"

	"overkeep/crypt/slot"
	"overkeep/systemd/keep"
)

func newKey(a *app) *cobra.Command {
	cmd := a.group(&cobra.Command{
		Use:        "key",
		SuggestFor: []string{"keys", "slot", "slots"},
		Short:      "Manage the slots that open a keep",
		GroupID:    "keys",
		Long: `A slot is one way to open a keep: a passphrase, a key file, an SSH key, a token
with an age plugin, the recovery key. Each holds the same master key, encrypted
to that one way, as a plain age file. All slots together carry a MAC and a number
that only grows, so that none can be planted, exchanged or brought back unnoticed.

A change of the slots asks for one of the present ones.`,
		Example: `  sudo overkeep key list
  sudo overkeep key change
  sudo overkeep key add --recipient-file /home/alice/.ssh/id_ed25519.pub --name laptop`,
	})
	cmd.AddCommand(newKeyList(a), newKeyAdd(a), newKeyRemove(a), newKeyChange(a), newKeyVerify(a), newKeyRecovery(a))
	return cmd
}

type keyOptions struct {
	keep   string
	auth   authFlags
	dryRun bool
}

func newKeyList(a *app) *cobra.Command {
	var o keyOptions
	return exits(&cobra.Command{
		Use:   "list [KEEP]",
		Short: "List the slots and their weaknesses",
		Long: `List the slots, without any key, and what is weak or damaged about them. What it
shows is public and not authenticated: only opening the keep proves the list.`,
		Example: `  sudo overkeep key list
  sudo overkeep key list alice --json`,
		Args:              a.args(0, 1),
		ValidArgsFunction: a.completeKeep,
		RunE: func(cmd *cobra.Command, args []string) error {
			o.keep = first(args)
			return runKeyList(cmd.Context(), a, o)
		},
	}, exitTampered, exitNoKeep, exitNotRoot, exitDamaged)
}

func runKeyList(_ context.Context, a *app, o keyOptions) error {
	k, err := a.open(o.keep)
	if err != nil {
		return err
	}
	l, err := k.Keys()
	if err != nil {
		return err
	}
	return a.ui.report(keyList{l})
}

// keyList is the result of key list.
type keyList struct{ *keep.KeyList }

func (r keyList) print(p *page) {
	rows := [][]string{{"SLOT", "KIND", "ROLE", "MADE", "LABEL"}}
	for _, s := range r.Slots {
		rows = append(rows, []string{s.Name, string(s.Kind), orDash(s.Role), s.Created.Format(time.DateOnly), orDash(s.Label)})
	}
	p.table("", rows)
	var remarks []string
	for _, s := range r.Slots {
		if s.Damaged != "" {
			remarks = append(remarks, fmt.Sprintf("%s: DAMAGED: %s", s.Name, s.Damaged))
		}
		for _, w := range s.Weak {
			if s.Damaged != "" && w == slot.WeakDamaged {
				continue // told above, and of what kind
			}
			remarks = append(remarks, s.Name+": "+w)
		}
	}
	remarks = append(remarks, r.Findings...)
	if len(remarks) > 0 {
		p.printf("\nTo know:\n")
	}
	for _, m := range remarks {
		p.printf("  %s\n", printable(m))
	}
}

func orDash(s string) string {
	if s == "" {
		return "-"
	}
	return s
}

func newKeyVerify(a *app) *cobra.Command {
	var o keyOptions
	cmd := exits(&cobra.Command{
		Use:   "verify [KEEP]",
		Short: "Prove that a key opens a slot",
		Long: `Prove that a passphrase or key opens a slot of the authenticated set, and say
which. Nothing is unlocked. Use it to test the recovery key once a year.`,
		Example: `  sudo overkeep key verify
  sudo overkeep key verify alice --recovery
  sudo overkeep key verify --identity /media/stick/alice.txt`,
		Args:              a.args(0, 1),
		ValidArgsFunction: a.completeKeep,
		RunE: func(cmd *cobra.Command, args []string) error {
			o.keep = first(args)
			return runKeyVerify(cmd.Context(), a, o)
		},
	}, exitWrongKey, exitTampered, exitNoKeep, exitNotRoot, exitPlugin)
	o.auth.add(a, cmd)
	return cmd
}

func runKeyVerify(ctx context.Context, a *app, o keyOptions) error {
	k, err := a.openForChange(o.keep)
	if err != nil {
		return err
	}
	return o.auth.with(ctx, a.ui, k.Name, func(auth keep.Auth) error {
		name, err := k.Verify(ctx, auth)
		if err != nil {
			return err
		}
		return a.ui.done(keyVerified{k.Name, name})
	})
}

// keyVerified is the result of key verify.
type keyVerified struct {
	Keep string `json:"keep"`
	Slot string `json:"slot"`
}

func (r keyVerified) print(p *page) { p.printf("It opens slot %q of keep %q.\n", r.Slot, r.Keep) }

// openForChange is open for what only root can do.
func (a *app) openForChange(name string) (*keep.Keep, error) {
	k, err := a.open(name)
	if err == nil {
		err = needRoot()
	}
	return k, err
}

// keyChanged is the result of every change of the slots.
type keyChanged struct {
	Keep         string   `json:"keep"`
	Action       string   `json:"action"`
	Slots        []string `json:"slots"` // that were added, removed or changed
	RecoveryFile string   `json:"recovery_file,omitempty"`
}

func (r keyChanged) print(p *page) {
	done := map[string]string{"add": "added", "remove": "removed", "change": "changed", "recovery": "made anew"}[r.Action]
	p.printf("%s %s in keep %q.\n", slotWord(r.Slots), done, r.Keep)
	switch {
	case r.RecoveryFile != "":
		p.printf("The recovery key is in %s: move it off this machine.\n", printable(r.RecoveryFile))
	case r.Action == "remove":
		p.printf("Whoever has a copy of the old slot file and its key can still open a copy of the disk.\n")
	}
}

func slotWord(names []string) string {
	q := make([]string, len(names))
	for i, n := range names {
		q[i] = fmt.Sprintf("%q", n)
	}
	if len(q) == 1 {
		return "Slot " + q[0]
	}
	return "Slots " + strings.Join(q, ", ")
}

// keySteps is the dry run of a change of the slots.
func keySteps(k *keep.Keep, what string, detail ...string) steps {
	return steps{DryRun: true, Keep: k.Name, Would: []step{
		{"open a slot with what you give: passphrase, --identity or --recovery", []string{k.Slots()}},
		{"open the volume, unless it is open, and check that the slots were not rolled back", nil},
		{what, detail},
		{"replace the slots as one directory, with a new MAC and the next epoch", []string{k.Slots()}},
		{"pin the new epoch inside the volume", []string{k.InnerHeader()}},
	}}
}
