package main

import (
	"errors"
	"fmt"
	"slices"
	"strconv"
	"strings"

	"github.com/spf13/cobra"
	"github.com/spf13/pflag"
)

// usageError is a mistake in the command line. line, if any, is the command line
// as it was probably meant, as arguments; command is one of another program.
type usageError struct {
	msg     string
	why     string // of the corrected line, or the command
	line    []string
	command string
}

func (e *usageError) Error() string { return e.msg }

func usagef(format string, a ...any) *usageError {
	return &usageError{msg: fmt.Sprintf(format, a...)}
}

// meant adds the corrected command line.
func (e *usageError) meant(line ...string) *usageError {
	e.line = line
	return e
}

// secretFlags are names under which people try to pass a secret.
var secretFlags = []string{
	"passphrase", "password", "pass", "passwd", "key", "secret", "new-passphrase",
	"recovery", "recovery-key", "pin",
}

// secretInArgs finds a secret in the command line, where it has no place: other
// users see it in ps(1) and the shell keeps it in its history. It looks before
// the flags are parsed, so that no message repeats what was given.
func secretInArgs(args []string) *usageError {
	for i, a := range args {
		if a == "--" {
			return nil
		}
		name, value, has := strings.Cut(strings.TrimLeft(a, "-"), "=")
		flagged := strings.HasPrefix(a, "-") && has && value != "" &&
			slices.Contains(secretFlags, name) && value != "true" && value != "false"
		if !flagged && !strings.Contains(strings.ToUpper(a), "AGE-SECRET-KEY-") {
			continue
		}
		line := slices.Delete(slices.Clone(args), i, i+1)
		if !flagged && i > 0 && strings.HasPrefix(args[i-1], "-") {
			line = slices.Delete(line, i-1, i) // the flag it was the value of
		}
		return secretError(line)
	}
	return nil
}

func secretError(line []string) *usageError {
	return &usageError{
		msg: "a secret is never taken from the command line: others see it in the list of processes, and the shell keeps it in its history. If it was a real one, change it",
		why: "Leave it away to be asked, or pass it on a descriptor with --passphrase-fd:", line: line,
	}
}

// example is a value to show for a flag whose own is missing or wrong.
var example = map[string]string{
	"root": "/srv/test", "user": "alice", "backend": "image", "size": "20G",
	"on-image": "/srv/keep.img", "work-dir": "keep", "passphrase-fd": "0",
	"new-passphrase-fd": "3", "recovery-out": "/media/stick/recovery.txt",
	"work-factor": "18", "identity": "/media/stick/recovery.txt", "slot": "passphrase",
	"name": "laptop-key", "recipient": "age1...", "recipient-file": "id_ed25519.pub",
	"label": "work laptop", "ignore-damaged-slot": "old-token", "man": "man1",
}

// flagMistake turns what pflag complains about into a usage error with the line
// that was probably meant. The value of a flag is not repeated: it may be a
// secret in the wrong place.
func (a *app) flagMistake(cmd *cobra.Command, err error) error {
	if errors.Is(err, pflag.ErrHelp) {
		return err
	}
	// "overkeep unlok --wait": the mistake is the first word, not the flag.
	if cmd.HasSubCommands() {
		w := first(a.wordsAfter(cmd))
		if w != "" && w[0] != '-' && !slices.Contains(commandNames(cmd), w) {
			return a.unknownCommand(cmd, w)
		}
	}
	// "overkeep run ls -l": the flag belongs to the command that is run.
	if cmd.Name() == "run" && !slices.Contains(a.line, "--") {
		if fixed := a.withDashes(cmd); fixed != nil {
			return usagef("what follows the command to run needs \"--\" before it").meant(fixed...)
		}
	}
	var (
		unknown *pflag.NotExistError
		missing *pflag.ValueRequiredError
		invalid *pflag.InvalidValueError
	)
	switch {
	case errors.As(err, &unknown):
		name := unknown.GetSpecifiedName()
		shown := "--" + name
		if short := unknown.GetSpecifiedShortnames(); short != "" {
			shown = "-" + short
		} else if slices.Contains(secretFlags, name) {
			return secretError(without(a.line, name))
		}
		e := usagef("%s has no flag %s", commandOr(cmd), shown)
		if near := nearest(name, flagNames(cmd)); near != "" && shown == "--"+name {
			return e.meant(renameFlag(a.line, name, near)...)
		}
		return e
	case errors.As(err, &missing):
		f := missing.GetFlag()
		return usagef("--%s needs a value", f.Name).meant(append(slices.Clone(a.line), exampleOf(f))...)
	case errors.As(err, &invalid):
		f := invalid.GetFlag()
		if f.Value.Type() == "bool" {
			return usagef("--%s takes no value", f.Name).meant(setFlag(a.line, f.Name, "")...)
		}
		why := invalid.Unwrap().Error()
		if _, plain := f.Value.(*descriptor); !plain && f.Value.Type() == "int" {
			why = "it takes a whole number"
		}
		return usagef("--%s: %s", f.Name, why).meant(setFlag(a.line, f.Name, exampleOf(f))...)
	}
	return usagef("%s", err)
}

func exampleOf(f *pflag.Flag) string {
	if v := example[f.Name]; v != "" {
		return v
	}
	return "VALUE"
}

func flagNames(cmd *cobra.Command) []string {
	var names []string
	cmd.Flags().VisitAll(func(f *pflag.Flag) {
		if !f.Hidden {
			names = append(names, f.Name)
		}
	})
	return names
}

// wordsAfter returns the arguments that follow the words of cmd.
func (a *app) wordsAfter(cmd *cobra.Command) []string {
	line := a.line
	for c := cmd; c.HasParent(); c = c.Parent() {
		for i, w := range line {
			if w == c.Name() {
				line = line[i+1:]
				break
			}
		}
	}
	// Flags that stand before the word, with their values.
	for len(line) > 0 && strings.HasPrefix(line[0], "-") {
		takesValue := line[0] == "--root"
		line = line[1:]
		if takesValue && len(line) > 0 {
			line = line[1:]
		}
	}
	return line
}

// unknownCommand names the command that was probably meant.
func (a *app) unknownCommand(cmd *cobra.Command, word string) error {
	e := usagef("there is no command %q", strings.TrimSpace(words(cmd)+" "+word))
	for _, c := range cmd.Commands() {
		if slices.Contains(c.SuggestFor, word) {
			return e.meant(replaceWord(a.line, word, c.Name())...)
		}
	}
	if near := nearest(word, commandNames(cmd)); near != "" {
		return e.meant(replaceWord(a.line, word, near)...)
	}
	return e
}

// words are the words of a command, without the program's name.
func words(cmd *cobra.Command) string {
	return strings.TrimPrefix(strings.TrimPrefix(cmd.CommandPath(), cmd.Root().Name()), " ")
}

func commandOr(cmd *cobra.Command) string {
	if w := words(cmd); w != "" {
		return w
	}
	return cmd.Root().Name()
}

func commandNames(cmd *cobra.Command) []string {
	var names []string
	for _, c := range cmd.Commands() {
		if !c.Hidden {
			names = append(names, c.Name())
		}
	}
	return names
}

// exclusive lets only one of the flags be given. It stands in for cobra's own,
// whose error is no usage error of ours.
func (a *app) exclusive(cmd *cobra.Command, names ...string) {
	before := cmd.PreRunE
	cmd.PreRunE = func(cmd *cobra.Command, args []string) error {
		if before != nil {
			if err := before(cmd, args); err != nil {
				return err
			}
		}
		var given []string
		for _, n := range names {
			if cmd.Flags().Changed(n) {
				given = append(given, n)
			}
		}
		if len(given) < 2 {
			return nil
		}
		line := without(a.line, given[1])
		if f := cmd.Flags().Lookup(given[1]); f.NoOptDefVal != "" { // takes no value
			line = slices.DeleteFunc(slices.Clone(a.line), func(w string) bool { return w == "--"+given[1] })
		}
		return usagef("--%s and --%s exclude each other", given[0], given[1]).meant(line...)
	}
}

// group makes cmd a command that only has others below it.
func (a *app) group(cmd *cobra.Command) *cobra.Command {
	cmd.Args = func(cmd *cobra.Command, args []string) error {
		if len(args) > 0 {
			return a.unknownCommand(cmd, args[0])
		}
		return nil
	}
	cmd.RunE = func(cmd *cobra.Command, _ []string) error { return cmd.Help() }
	return cmd
}

// args checks the number of positional arguments: least to most of them, shown
// as want when some are missing.
func (a *app) args(least, most int, want ...string) cobra.PositionalArgs {
	return func(cmd *cobra.Command, args []string) error {
		switch {
		case len(args) > most:
			extra := args[most]
			e := usagef("%s takes %s, not also %q", commandOr(cmd), counted(most), extra)
			return e.meant(deleteWord(a.line, extra)...)
		case len(args) < least:
			missing := want[len(args):]
			e := usagef("%s needs %s", commandOr(cmd), strings.Join(missing, " and "))
			return e.meant(append(slices.Clone(a.line), missing...)...)
		}
		return nil
	}
}

func counted(n int) string {
	switch n {
	case 0:
		return "no argument"
	case 1:
		return "one argument"
	}
	return fmt.Sprintf("%d arguments", n)
}

// withDashes inserts "--" before the command that run is to run.
func (a *app) withDashes(cmd *cobra.Command) []string {
	at := slices.Index(a.line, cmd.Name())
	if at < 0 {
		return nil
	}
	at++
	names := a.keepNames()
	for at < len(a.line) && (a.line[at] == "--as-root" || slices.Contains(names, a.line[at])) {
		at++
	}
	if at >= len(a.line) {
		return nil
	}
	return slices.Insert(slices.Clone(a.line), at, "--")
}

// descriptor is a flag that takes a file descriptor; -1 when it was not given.
type descriptor int

func (d *descriptor) Type() string { return "int" }

func (d *descriptor) String() string {
	if *d < 0 {
		return "" // no default to show
	}
	return strconv.Itoa(int(*d))
}

func (d *descriptor) Set(s string) error {
	n, err := strconv.ParseUint(s, 10, 16)
	if err != nil {
		return errors.New("it takes the number of an open descriptor")
	}
	*d = descriptor(n)
	return nil
}

func (d *descriptor) add(f *pflag.FlagSet, name, usage string) {
	*d = -1
	f.Var(d, name, usage)
}

// The functions below edit a command line and leave theirs alone.

func replaceWord(line []string, word, by string) []string {
	out := slices.Clone(line)
	if i := slices.Index(out, word); i >= 0 {
		out[i] = by
	}
	return out
}

// deleteWord removes the last occurrence.
func deleteWord(line []string, word string) []string {
	for i := len(line) - 1; i >= 0; i-- {
		if line[i] == word {
			return slices.Delete(slices.Clone(line), i, i+1)
		}
	}
	return line
}

func renameFlag(line []string, name, by string) []string {
	out := slices.Clone(line)
	for i, w := range out {
		if w == "--" {
			break
		}
		if rest, ok := strings.CutPrefix(w, "--"+name); ok && (rest == "" || rest[0] == '=') {
			out[i] = "--" + by + rest
		}
	}
	return out
}

// setFlag replaces the value of a flag; "" means that it takes none.
func setFlag(line []string, name, value string) []string {
	out := slices.Clone(line)
	for i, w := range out {
		switch {
		case w == "--":
			return out
		case strings.HasPrefix(w, "--"+name+"="):
			if out[i] = "--" + name; value != "" {
				out[i] += "=" + value
			}
		case w == "--"+name && value != "" && i+1 < len(out):
			out[i+1] = value
			return out
		}
	}
	return out
}

// without removes a flag and, when it does not look like another flag, the word
// after it: a secret that was given as its value.
func without(line []string, name string) []string {
	var out []string
	for i := 0; i < len(line); i++ {
		w := line[i]
		if w == "--"+name {
			if i+1 < len(line) && !strings.HasPrefix(line[i+1], "-") {
				i++
			}
			continue
		}
		if !strings.HasPrefix(w, "--"+name+"=") {
			out = append(out, w)
		}
	}
	return out
}

// nearest returns the one of names that word is most likely a slip for: at most
// two letters away, and nearer than half of it; "" when there is none.
func nearest(word string, names []string) string {
	best, least := "", 3
	for _, n := range names {
		if d := distance(word, n); d < least && 2*d < len(word) {
			best, least = n, d
		}
	}
	if best == "" && len(word) >= 3 {
		for _, n := range names {
			if strings.HasPrefix(n, word) {
				return n
			}
		}
	}
	return best
}

// distance is the Levenshtein distance in bytes, with a swap of neighbours as one.
func distance(a, b string) int {
	if len(a) > 64 || len(b) > 64 {
		return 64
	}
	before, prev := make([]int, len(b)+1), make([]int, len(b)+1)
	for j := range prev {
		prev[j] = j
	}
	for i := 1; i <= len(a); i++ {
		cur := make([]int, len(b)+1)
		cur[0] = i
		for j := 1; j <= len(b); j++ {
			cost := 1
			if a[i-1] == b[j-1] {
				cost = 0
			}
			cur[j] = min(prev[j]+1, cur[j-1]+1, prev[j-1]+cost)
			if i > 1 && j > 1 && a[i-1] == b[j-2] && a[i-2] == b[j-1] {
				cur[j] = min(cur[j], before[j-2]+1)
			}
		}
		before, prev = prev, cur
	}
	return prev[len(b)]
}
