package main

import (
	"fmt"
	"os"
	"slices"
	"time"

	"github.com/spf13/cobra"
	"github.com/spf13/cobra/doc"
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
func writeMan(root *cobra.Command, dir string) error {
	root.DisableAutoGenTag = true
	root.InitDefaultHelpCmd()
	root.InitDefaultCompletionCmd()
	forMan(root)
	v := buildVersion()
	h := &doc.GenManHeader{Section: "8", Source: "overkeep " + v.Version, Manual: "Overkeep"}
	if at, err := time.Parse(time.RFC3339, v.time); err == nil && os.Getenv("SOURCE_DATE_EPOCH") == "" {
		h.Date = &at // else cobra/doc reads the variable itself
	}
	if err := doc.GenManTree(root, h, dir); err != nil {
		return fmt.Errorf("man pages in %q: %w", dir, err)
	}
	return nil
}

const manFiles = `

# FILES

**/etc/overkeep/config.toml** The machine's settings; need not exist.

**/var/lib/overkeep/KEEP/** The keep: public header, slots, encrypted volume.

**/run/overkeep/KEEP/** Sockets and the mount namespace of an open keep.`

// forMan puts the exit codes into the text, which is all that cobra/doc prints.
func forMan(cmd *cobra.Command) {
	if codes := cmd.Annotations["exits"]; codes != "" {
		cmd.Long += "\n\n# EXIT STATUS\n\n" + manList(codes)
	} else if !cmd.HasParent() {
		cmd.Long += "\n\n# EXIT STATUS\n\n" + manList(exitLines()) + manFiles
	}
	for _, c := range cmd.Commands() {
		forMan(c)
	}
}
