package main

import (
	"bytes"
	"cmp"
	"fmt"
	"os"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"time"

	"github.com/spf13/cobra"
	"github.com/spf13/pflag"
)

// newDocs is for packagers: it writes the man pages.
func newDocs(a *app) *cobra.Command {
	var dir string
	cmd := &cobra.Command{
		Use:    "docs --man DIR",
		Short:  "Write the man pages",
		Hidden: true,
		Long:   `Write the man pages of all commands, section 8, into a directory. It is made when it is missing.`,
		Args:   a.args(0, 0),
		RunE: func(cmd *cobra.Command, _ []string) error {
			if dir == "" {
				return usagef("where to?").meant(append(slices.Clone(a.line), "--man", "man8")...)
			}
			if err := os.MkdirAll(dir, 0o755); err != nil {
				return err
			}
			return writeMan(cmd.Root(), dir)
		},
	}
	cmd.Flags().StringVar(&dir, "man", "", "the directory `DIR`")
	return cmd
}

// writeMan writes one page a command. Their date is that of SOURCE_DATE_EPOCH or
// of the commit, so that they do not change from one build to the next.
//
// cobra's own writer is not used: the Markdown parser behind it would be set up in
// every start of the program.
func writeMan(root *cobra.Command, dir string) error {
	root.InitDefaultHelpCmd()
	root.InitDefaultCompletionCmd()
	v := buildVersion()
	date := time.Now()
	if at, err := time.Parse(time.RFC3339, v.time); err == nil {
		date = at
	}
	if epoch := os.Getenv("SOURCE_DATE_EPOCH"); epoch != "" {
		s, err := strconv.ParseInt(epoch, 10, 64)
		if err != nil {
			return usagef("SOURCE_DATE_EPOCH is %q, not a number of seconds", epoch)
		}
		date = time.Unix(s, 0)
	}
	head := fmt.Sprintf(`"8" "%s" "overkeep %s" "Overkeep"`, date.UTC().Format("Jan 2006"), v.Version)
	return manTree(root, head, dir)
}

func manTree(cmd *cobra.Command, head, dir string) error {
	for _, c := range cmd.Commands() {
		if c.IsAvailableCommand() && !c.IsAdditionalHelpTopicCommand() {
			if err := manTree(c, head, dir); err != nil {
				return err
			}
		}
	}
	cmd.InitDefaultHelpFlag()
	return os.WriteFile(filepath.Join(dir, manName(cmd)+".8"), manPage(cmd, head), 0o644)
}

func manName(cmd *cobra.Command) string { return strings.ReplaceAll(cmd.CommandPath(), " ", "-") }

// manPage is a page in the language of man(7).
func manPage(cmd *cobra.Command, head string) []byte {
	var b bytes.Buffer
	section := func(name string) { fmt.Fprintf(&b, ".SH %s\n", name) }
	fmt.Fprintf(&b, ".nh\n.TH \"%s\" %s\n", roff(strings.ToUpper(manName(cmd))), head)
	section("NAME")
	fmt.Fprintf(&b, "%s \\- %s\n", roff(manName(cmd)), roff(cmd.Short))
	section("SYNOPSIS")
	fmt.Fprintf(&b, "\\fB%s\\fP\n", roff(cmd.UseLine()))
	section("DESCRIPTION")
	manText(&b, cmp.Or(cmd.Long, cmd.Short))
	if codes := cmd.Annotations["exits"]; codes != "" || !cmd.HasParent() {
		section("EXIT STATUS")
		manExits(&b, cmp.Or(codes, exitLines()))
	}
	if !cmd.HasParent() {
		section("FILES")
		for _, f := range manFiles {
			fmt.Fprintf(&b, ".TP\n\\fB%s\\fP\n%s\n", roff(f[0]), roff(f[1]))
		}
	}
	for _, f := range []struct {
		name string
		set  *pflag.FlagSet
	}{{"OPTIONS", cmd.NonInheritedFlags()}, {"OPTIONS INHERITED FROM PARENT COMMANDS", cmd.InheritedFlags()}} {
		if f.set.HasAvailableFlags() {
			section(f.name)
			f.set.VisitAll(func(f *pflag.Flag) { manFlag(&b, f) })
		}
	}
	if cmd.Example != "" {
		section("EXAMPLE")
		fmt.Fprintf(&b, ".EX\n%s\n.EE\n", roff(cmd.Example))
	}
	var also []string
	if cmd.HasParent() {
		also = append(also, manName(cmd.Parent()))
	}
	for _, c := range cmd.Commands() {
		if c.IsAvailableCommand() && !c.IsAdditionalHelpTopicCommand() {
			also = append(also, manName(c))
		}
	}
	if len(also) > 0 {
		section("SEE ALSO")
		for i, name := range also {
			also[i] = "\\fB" + roff(name) + "\\fP(8)"
		}
		b.WriteString(strings.Join(also, ",\n") + "\n")
	}
	return b.Bytes()
}

// manText writes paragraphs as they are in the help: what is indented keeps its lines.
func manText(b *bytes.Buffer, text string) {
	for _, p := range strings.Split(strings.TrimSpace(text), "\n\n") {
		indented := strings.HasPrefix(p, " ") || strings.Contains(p, "\n  ")
		if b.WriteString(".PP\n"); indented {
			fmt.Fprintf(b, ".EX\n%s\n.EE\n", roff(p))
		} else {
			b.WriteString(roff(p) + "\n")
		}
	}
}

// manExits turns the lines of exitLines into a list.
func manExits(b *bytes.Buffer, lines string) {
	for l := range strings.Lines(lines) {
		if f := strings.Fields(l); len(f) > 0 {
			code, rest := f[0], strings.TrimSpace(strings.TrimPrefix(strings.TrimSpace(l), f[0]))
			name, meaning, _ := strings.Cut(rest, "  ")
			fmt.Fprintf(b, ".TP\n\\fB%s\\fP %s\n%s\n", roff(code), roff(name), roff(strings.TrimSpace(meaning)))
		}
	}
}

// manFlag writes one flag as its usage has it: the word in backquotes is its value.
func manFlag(b *bytes.Buffer, f *pflag.Flag) {
	if f.Hidden || f.Deprecated != "" {
		return
	}
	value, usage := pflag.UnquoteUsage(f)
	name := "\\fB\\-\\-" + roff(f.Name) + "\\fP"
	if f.Shorthand != "" {
		name = "\\fB\\-" + roff(f.Shorthand) + "\\fP, " + name
	}
	if value != "" {
		name += " \\fI" + roff(value) + "\\fP"
	}
	fmt.Fprintf(b, ".TP\n%s\n%s\n", name, roff(usage))
}

// roff escapes text for man(7): backslashes, hyphens that are to be copied, and what
// would be a request at the start of a line.
func roff(text string) string {
	text = strings.NewReplacer(`\`, `\e`, "-", `\-`, "\t", "    ").Replace(text)
	lines := strings.Split(text, "\n")
	for i, l := range lines {
		if strings.HasPrefix(l, ".") || strings.HasPrefix(l, "'") {
			lines[i] = `\&` + l
		}
	}
	return strings.Join(lines, "\n")
}

// manFiles are the files that all commands share.
var manFiles = [][2]string{
	{"/etc/overkeep/config.toml", "The machine's settings; need not exist."},
	{"/var/lib/overkeep/KEEP/", "The keep: public header, slots, encrypted volume."},
	{"/run/overkeep/KEEP/", "Sockets and the mount namespace of an open keep."},
}
