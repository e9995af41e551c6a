package main

import (
	"context"
	"errors"
	"io"
	"log"
	"os"
	"os/signal"
	"os/user"
	"slices"
	"strings"

	"github.com/spf13/cobra"
	"golang.org/x/sys/unix"

	"overkeep/overlay/layout"
	"overkeep/systemd/keep"
)

// app is what every command shares: the flags of all of them, and the terminal.
type app struct {
	root    string
	json    bool
	yes     bool
	quiet   bool
	noColor bool

	ui    *ui
	line  []string // the command line, without the program's name
	verb  []string // the command that runs
	keep  string   // the keep it turned out to be about
	exe   string   // serves the "internal" verb
	sudo  bool     // commands are pasted into a shell that is not root's
	umask int      // the caller's, for what `run` starts
}

// harden makes the process one that leaves nothing behind: no core dump, no
// file that others may read, no chatter of libraries. It returns the umask that
// was in force.
func harden() (umask int) {
	// Also keeps other processes of the user from attaching (prctl(2)). An exec
	// takes it back, so that what `run` starts is not affected.
	_ = unix.Prctl(unix.PR_SET_DUMPABLE, 0, 0, 0, 0)
	log.SetOutput(io.Discard) // google/fscrypt logs paths and descriptors there
	return unix.Umask(0o077)
}

// closeOnExec keeps the caller's descriptors, which may be root's, from what this
// program starts: helpers, the supervisor, the user's command.
func closeOnExec() {
	_ = unix.CloseRange(3, ^uint(0), unix.CLOSE_RANGE_CLOEXEC)
}

// execute runs one command line and returns the exit code.
func execute(args []string, umask int) int {
	ctx, stop := signal.NotifyContext(context.Background(), unix.SIGINT, unix.SIGTERM, unix.SIGHUP)
	defer stop()
	a := &app{ui: newUI(hasFlag(args, "no-color")), line: args, exe: "/proc/self/exe", umask: umask}
	a.sudo = os.Geteuid() != 0 || os.Getenv("SUDO_USER") != ""
	a.root = os.Getenv("OVERKEEP_ROOT")
	// Known before the flags are parsed: their mistakes are told in it, too.
	a.ui.json = hasFlag(args, "json")
	return a.run(ctx, args)
}

func (a *app) run(ctx context.Context, args []string) int {
	root := newRoot(a)
	root.SetArgs(args)
	var err error
	if e := secretInArgs(args); e != nil {
		a.findVerb(root, args)
		err = e
	} else {
		cmd, cerr := root.ExecuteContextC(ctx)
		a.setVerb(cmd)
		err = cerr
	}
	if err == nil {
		return exitOK
	}
	var shown *shownError
	if errors.As(err, &shown) {
		return shown.exit
	}
	if c := keep.Classify(err).Code; ctx.Err() != nil && (c == keep.CodeInternal || c == keep.CodeAborted) {
		err = aborted("interrupted")
	}
	p := explain(err, a.here())
	a.ui.problem(p)
	return p.Exit
}

// shownError ends the program with an exit code; what there was to say was said.
type shownError struct{ exit int }

func (e *shownError) Error() string { return "already shown" }

// newRoot makes the command tree.
func newRoot(a *app) *cobra.Command {
	cmd := a.group(&cobra.Command{
		Use:   "overkeep",
		Short: "An encrypted personal Nix store over the system's",
		Long: `Overkeep gives a person a Nix store of their own, encrypted, over the system's
plain one. Public software stays in the system store, where everybody reads it
fast; what is private lies in the "keep", which only its user can open. Inside
the view both are one /nix/store, and stock nix works without any setting.

Begin with "overkeep help concepts".`,
		Example: `  sudo overkeep init              make a keep for the calling user
  sudo overkeep unlock            open it
  sudo overkeep shell             a shell in which both stores are one
  sudo overkeep lock              close it, with proof
  sudo overkeep status            where it stands`,
		SilenceUsage:  true,
		SilenceErrors: true,
		PersistentPreRunE: func(cmd *cobra.Command, args []string) error {
			a.setVerb(cmd)
			a.ui.json, a.ui.quiet = a.json, a.quiet
			_, err := layout.CheckRoot(a.root)
			if err != nil {
				return usagef("--%s", err)
			}
			return noEmptyWord(cmd, args)
		},
	})
	// The wrapped usage has flags last and exit codes after them.
	cmd.SetUsageTemplate(cmd.UsageTemplate() + `{{with .Annotations.exits}}
Exit codes (all of them: overkeep help exit-codes):
{{.}}{{end}}`)
	cmd.SetFlagErrorFunc(a.flagMistake)
	f := cmd.PersistentFlags()
	f.StringVar(&a.root, "root", a.root, "work below `DIR` instead of / (or set OVERKEEP_ROOT); the Nix store itself is not moved")
	f.BoolVar(&a.json, "json", false, "print one JSON object; errors too, on standard error")
	f.BoolVar(&a.yes, "yes", false, "do not ask whether it is meant")
	f.BoolVar(&a.quiet, "quiet", false, "print nothing but errors and what was asked for")
	f.BoolVar(&a.noColor, "no-color", false, "no colour (or set NO_COLOR)")
	f.SortFlags = false
	cmd.AddGroup(
		&cobra.Group{ID: "daily", Title: "Every day:"},
		&cobra.Group{ID: "policy", Title: "What is private, and why:"},
		&cobra.Group{ID: "moves", Title: "Moving paths:"},
		&cobra.Group{ID: "keys", Title: "Keys:"},
		&cobra.Group{ID: "once", Title: "Once:"},
		&cobra.Group{ID: "look", Title: "To look at:"},
	)
	cmd.AddCommand(
		newUnlock(a), newLock(a), newStatus(a), newRun(a), newShell(a),
		newKey(a),
		newInit(a), newDestroy(a),
		newRender(a), newVersion(a), newDocs(a),
	)
	for _, f := range more {
		cmd.AddCommand(f(a))
	}
	cmd.AddCommand(helpTopics()...)
	cmd.SetHelpCommandGroupID("look")
	cmd.SetCompletionCommandGroupID("look")
	return cmd
}

// more are commands that a file adds by itself, in its init: group, flags and
// exit codes as in the others.
var more []func(*app) *cobra.Command

// exits notes the exit codes that matter for a command's help.
func exits(cmd *cobra.Command, codes ...int) *cobra.Command {
	if cmd.Annotations == nil {
		cmd.Annotations = map[string]string{}
	}
	cmd.Annotations["exits"] = exitLines(codes...)
	return cmd
}

// dryRunFlag adds --dry-run to a command that changes something.
func dryRunFlag(cmd *cobra.Command, v *bool) {
	cmd.Flags().BoolVar(v, "dry-run", false, "say what would be done, in order, and do nothing")
}

func (a *app) setVerb(cmd *cobra.Command) {
	a.verb = nil
	for c := cmd; c != nil && c.HasParent(); c = c.Parent() {
		a.verb = append(a.verb, c.Name())
	}
	slices.Reverse(a.verb)
}

// findVerb is setVerb for a command line that is not to be parsed.
func (a *app) findVerb(root *cobra.Command, args []string) {
	if cmd, _, err := root.Find(args); err == nil {
		a.setVerb(cmd)
	}
}

// manager acts on the keeps below --root.
func (a *app) manager() *keep.Manager {
	return &keep.Manager{Root: a.root, Exe: a.exe, Progress: a.ui.progress}
}

// open finds the keep that a command is about: the one named, else the one of
// the person who calls.
func (a *app) open(name string) (*keep.Keep, error) {
	a.keep = name
	k, err := a.manager().Pick(name, caller())
	if err != nil {
		return nil, err
	}
	a.keep = k.Name
	return k, nil
}

// caller is the login name of the person at the keyboard: with sudo the one who
// called it. "" for root itself.
func caller() string {
	if os.Geteuid() == 0 {
		return os.Getenv("SUDO_USER")
	}
	if u, err := user.Current(); err == nil {
		return u.Username
	}
	return ""
}

// keepNames are the keeps there are, as far as the caller may know.
func (a *app) keepNames() []string {
	names, err := a.manager().List()
	if err != nil {
		return nil
	}
	return names
}

func (a *app) here() here {
	line := slices.DeleteFunc(slices.Clone(a.line), func(w string) bool { return strings.HasPrefix(w, "--in-view=") }) // ours
	return here{sudo: a.sudo, root: a.root, verb: a.verb, keep: a.keep, line: line, keeps: a.keepNames()}
}

// completeKeep completes a keep's name as the first argument.
func (a *app) completeKeep(_ *cobra.Command, args []string, _ string) ([]string, cobra.ShellCompDirective) {
	if len(args) > 0 {
		return nil, cobra.ShellCompDirectiveNoFileComp
	}
	return a.keepNames(), cobra.ShellCompDirectiveNoFileComp
}

// needRoot is said before anything is asked.
func needRoot() error {
	if os.Geteuid() == 0 {
		return nil
	}
	return &keep.Error{Code: keep.CodeNotRoot, Message: "this needs root: it mounts, makes namespaces and gives keys to the kernel"}
}

// noEmptyWord refuses an empty KEEP, as an unset variable of a shell gives it: it
// must not mean the default one.
func noEmptyWord(cmd *cobra.Command, args []string) error {
	if cmd.Name() == cobra.ShellCompRequestCmd || cmd.Name() == cobra.ShellCompNoDescRequestCmd {
		return nil // an empty word is what is to be completed
	}
	if n := cmd.ArgsLenAtDash(); n >= 0 && cmd.Name() == "run" {
		args = args[:n] // what follows is a command of the user's
	}
	if slices.Contains(args, "") {
		return usagef("a keep's name was given, but it is empty")
	}
	return nil
}

// first is args[0], or "".
func first(args []string) string {
	if len(args) == 0 {
		return ""
	}
	return args[0]
}
