package main

import (
	"context"
	"errors"
	"io/fs"
	"os"
	"path/filepath"
	"slices"
	"strings"

	"github.com/google/renameio/v2"
	"github.com/spf13/cobra"

	"overkeep/overlay/layout"
	"overkeep/policy"
	"overkeep/systemd/keep"
)

type policyInitOptions struct {
	kind    string
	keys    []string
	private []string
	dryRun  bool
}

func newPolicyInit(a *app) *cobra.Command {
	var o policyInitOptions
	cmd := exits(&cobra.Command{
		Use:   "init",
		Short: "Write a first policy, after three questions",
		Long: `Ask three questions and write root's policy, /etc/overkeep/policy, with comments:

  which kind of machine    nixos: what it boots from is public, and has to stay so
                           linux: Nix is a guest; the default profile is public
                           strict: only what a declared cache signed is public
  whose signatures count   the keys of nix.conf, unless --key names others
  what is private          patterns of names, such as "*-acme-*"

Flags answer the questions beforehand. A policy that is there is not overwritten.`,
		Example: `  sudo overkeep policy init
  sudo overkeep policy init --kind nixos --private '*-acme-*'
  overkeep policy init --kind strict --dry-run`,
		Args: a.args(0, 0),
		RunE: func(cmd *cobra.Command, args []string) error {
			return runPolicyInit(cmd.Context(), a, cmd, o)
		},
	}, exitExists, exitNotRoot)
	f := cmd.Flags()
	f.StringVar(&o.kind, "kind", "", "`KIND` of machine: nixos, linux or strict")
	f.StringArrayVar(&o.keys, "key", nil, "a binary cache whose signatures make a path public, as `NAME:BASE64`; may be repeated")
	f.StringArrayVar(&o.private, "private", nil, "a `PATTERN` of names that are private; may be repeated")
	dryRunFlag(cmd, &o.dryRun)
	return cmd
}

func runPolicyInit(ctx context.Context, a *app, cmd *cobra.Command, o policyInitOptions) error {
	file := layout.PolicyFile(a.root)
	if _, err := os.Lstat(file); err == nil && !o.dryRun {
		return &keep.Error{Code: keep.CodeKeepExists, Name: file, Message: "there is a policy already: " + file}
	}
	s := starter{Kind: machineKind(o.kind), Keys: o.keys, Private: o.private}
	if err := s.ask(ctx, a, cmd); err != nil {
		return err
	}
	_, err := os.Stat(defaultProfile)
	s.Profile = err == nil
	text := s.text()
	// What the questions let through, a key that is none or a pattern that is none,
	// the parser finds.
	if _, err := policy.Parse(policy.Source{Name: "policy", Text: []byte(text), Root: true}); err != nil {
		return err
	}
	r := policyWritten{File: file, Text: text, DryRun: o.dryRun, here: a.here()}
	if o.dryRun {
		return a.ui.report(r)
	}
	if err := needRoot(); err != nil && a.root == "" {
		return err
	}
	if err := os.MkdirAll(filepath.Dir(file), 0o755); err != nil {
		return err
	}
	if err := writePolicy(file, []byte(text), 0o644); err != nil {
		return err
	}
	return a.ui.done(r)
}

// ask asks what the flags did not say.
func (s *starter) ask(ctx context.Context, a *app, cmd *cobra.Command) error {
	guess := guessKind()
	if s.Kind == "" {
		answer, err := a.ui.ask(ctx, "1. Is this a NixOS, another Linux, or shall the policy be strict? [nixos/linux/strict, "+string(guess)+"] ",
			"the kind of machine", "--kind "+string(guess))
		if err != nil {
			return err
		}
		if s.Kind = machineKind(strings.ToLower(answer)); s.Kind == "" {
			s.Kind = guess
		}
	}
	if !slices.Contains(machineKinds, s.Kind) {
		return usagef("--kind %q is none of nixos, linux and strict", s.Kind)
	}
	asked := func(flag string) bool { return !cmd.Flags().Changed(flag) && !a.yes }
	if !cmd.Flags().Changed("key") {
		s.Keys = declaredKeys()
		if asked("key") && !cmd.Flags().Changed("kind") {
			answer, err := a.ui.ask(ctx, "2. Whose signatures make a path public? ["+strings.Join(keyNames(s.Keys), " ")+"] ",
				"the keys", "--key "+cacheKey)
			if err != nil {
				return err
			}
			if answer != "" {
				s.Keys = chosenKeys(strings.Fields(answer), s.Keys)
			}
		}
	}
	if asked("private") && !cmd.Flags().Changed("kind") {
		answer, err := a.ui.ask(ctx, "3. Which names are private? Patterns such as *-acme-*, with blanks between them. [none] ",
			"private names", "--private '*-acme-*'")
		if err != nil {
			return err
		}
		s.Private = strings.Fields(answer)
	}
	return nil
}

func keyNames(keys []string) []string {
	var out []string
	for _, k := range keys {
		name, _, _ := strings.Cut(k, ":")
		out = append(out, name)
	}
	return out
}

// chosenKeys turns the names of known keys into the keys; whole keys stay.
func chosenKeys(words, known []string) []string {
	var out []string
	for _, w := range words {
		if i := slices.Index(keyNames(known), w); i >= 0 {
			w = known[i]
		}
		out = append(out, w)
	}
	return out
}

// writePolicy replaces a policy file, whole or not at all, and durably.
func writePolicy(file string, text []byte, mode os.FileMode) error {
	return renameio.WriteFile(file, text, mode, renameio.WithTempDir(filepath.Dir(file)), renameio.IgnoreUmask())
}

type policyWritten struct {
	File   string `json:"file"`
	Text   string `json:"text"`
	DryRun bool   `json:"dry_run,omitempty"`
	here   here
}

func (r policyWritten) print(p *page) {
	if r.DryRun {
		p.printf("%s", r.Text)
		return
	}
	p.printf("%s is written. What it means for this machine:\n    %s\n    %s\n", printable(r.File),
		p.style("1", r.here.command("policy", "check")), p.style("1", r.here.command("list", "--misplaced")))
}

func newPolicyEdit(a *app) *cobra.Command {
	var s sight
	cmd := exits(&cobra.Command{
		Use:   "edit [NAME]",
		Short: "Edit a policy file; it is replaced only if it is sound",
		Long: `Edit root's policy, or its drop-in NAME.policy, with $VISUAL or $EDITOR. With --keep
it is a drop-in of the keep's own: it is encrypted, so it may mention names that
nobody should see, and can only veto (default name: own).

The text is checked together with the other files before it takes the place of the
old one. With a mistake in it you can go on editing, or leave everything as it was.`,
		Example: `  sudo overkeep policy edit
  sudo overkeep policy edit work
  sudo overkeep policy edit --keep alice`,
		Args: a.args(0, 1),
		RunE: func(cmd *cobra.Command, args []string) error {
			return runPolicyEdit(cmd.Context(), a, &s, first(args))
		},
	}, exitPolicy, exitNotRoot, exitAborted, exitLocked)
	f := cmd.Flags()
	f.StringVar(&s.keep, "keep", "", "edit a file of this open `KEEP`")
	f.StringVar(&s.inView, "in-view", "", "")
	_ = f.MarkHidden("in-view")
	return cmd
}

// policyToEdit is the file, and whether it is root's.
func policyToEdit(a *app, s *sight, name string) (file string, isRoot bool, err error) {
	if name != "" { // whose base would be "."
		name = strings.TrimSuffix(filepath.Base(name), ".policy")
	}
	if name != "" && (strings.HasPrefix(name, ".") || strings.ContainsAny(name, "/\x00")) {
		return "", false, usagef("%q cannot name a policy file", name)
	}
	switch {
	case s.of != nil && s.keep != "":
		if name == "" {
			name = "own"
		}
		return filepath.Join(s.of.Policy(), name+".policy"), false, nil
	case name == "" || name == "policy":
		return layout.PolicyFile(a.root), true, nil
	}
	return filepath.Join(layout.PolicyDir(a.root), name+".policy"), true, nil
}

func runPolicyEdit(ctx context.Context, a *app, s *sight, name string) error {
	if s.keep != "" || s.inView != "" {
		if err := s.find(a); err != nil {
			return err
		}
	}
	file, isRoot, err := policyToEdit(a, s, name)
	if err != nil {
		return err
	}
	others, err := otherSources(a, s, file)
	if err != nil {
		return err
	}
	if err := os.MkdirAll(filepath.Dir(file), 0o755); err != nil {
		return err
	}
	old, err := os.ReadFile(file)
	if err != nil && !errors.Is(err, fs.ErrNotExist) {
		return err
	}
	text, err := a.editText(ctx, file, old, func(text []byte) error {
		_, err := policy.Parse(append(others, policy.Source{Name: file, Text: text, Root: isRoot})...)
		return err
	})
	if err != nil || text == nil {
		return err
	}
	mode := os.FileMode(0o644)
	if !isRoot {
		mode = 0o600
	}
	if err := writePolicy(file, text, mode); err != nil {
		return err
	}
	return a.ui.done(policyWritten{File: file, Text: string(text), here: a.here()})
}
