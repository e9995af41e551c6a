package main

import (
	"fmt"
	"os"
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
				return usagef("where to?").meant(append(append([]string{}, a.line...), "--man", "man8")...)
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

// writeMan writes one page a command. The date is the one of SOURCE_DATE_EPOCH,
// or none, so that the pages do not change from build to build (cobra/doc would
// take the present day).
func writeMan(root *cobra.Command, dir string) error {
	root.DisableAutoGenTag = true
	root.InitDefaultHelpCmd()
	root.InitDefaultCompletionCmd()
	forMan(root)
	date := time.Unix(0, 0).UTC()
	h := &doc.GenManHeader{Title: "", Section: "8", Source: "overkeep " + buildVersion().Version, Manual: "Overkeep", Date: &date}
	if os.Getenv("SOURCE_DATE_EPOCH") != "" {
		h.Date = nil // cobra/doc reads the variable itself
	}
	if err := doc.GenManTree(root, h, dir); err != nil {
		return fmt.Errorf("man pages in %q: %w", dir, err)
	}
	return nil
}

// forMan puts the exit codes into the text, which is all that cobra/doc prints.
func forMan(cmd *cobra.Command) {
	if codes := cmd.Annotations["exits"]; codes != "" {
		cmd.Long += "\n\n# EXIT STATUS\n\n" + manList(codes)
	} else if !cmd.HasParent() {
		cmd.Long += "\n\n# EXIT STATUS\n\n" + manList(exitLines())
	}
	for _, c := range cmd.Commands() {
		forMan(c)
	}
}
