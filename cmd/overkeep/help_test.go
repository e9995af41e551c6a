package main

import (
	"os"
	"path/filepath"
	"regexp"
	"strings"
	"testing"

	"github.com/spf13/cobra"
)

// Every command that can be run says why, how, and how it ends.
func TestHelpTeaches(t *testing.T) {
	a := &app{ui: &ui{}}
	forEveryCommand(newRoot(a), func(c *cobra.Command) {
		if c.Hidden || c.IsAdditionalHelpTopicCommand() {
			return
		}
		if len(c.Long) < 60 {
			t.Errorf("%s: the help says too little", c.CommandPath())
		}
		if c.Example == "" {
			t.Errorf("%s: no example", c.CommandPath())
		}
		if c.Runnable() && !c.HasSubCommands() && c.Name() != "version" && c.Annotations["exits"] == "" {
			t.Errorf("%s: no exit codes", c.CommandPath())
		}
		if strings.HasSuffix(c.Short, ".") || c.Short == "" {
			t.Errorf("%s: short text %q", c.CommandPath(), c.Short)
		}
	})
}

// Examples and command lines in texts are such that this program takes them.
func TestExamplesParse(t *testing.T) {
	lines := 0
	check := func(text string) {
		for _, l := range strings.Split(text, "\n") {
			l = strings.TrimSpace(l)
			if i := strings.Index(l, "| sudo overkeep"); i >= 0 {
				l = l[i+2:]
			}
			if !strings.HasPrefix(l, "overkeep ") && !strings.HasPrefix(l, "sudo overkeep ") {
				continue
			}
			l = regexp.MustCompile(`\s{2,}\S.*$`).ReplaceAllString(l, "") // a remark
			l = regexp.MustCompile(`\s(\||\d?<).*$`).ReplaceAllString(l, "")
			parses(t, l)
			lines++
		}
	}
	forEveryCommand(newRoot(&app{ui: &ui{}}), func(c *cobra.Command) { check(c.Example) })
	for _, s := range []string{conceptsText, recoveryText, scriptingText} {
		check(s)
	}
	if lines < 40 {
		t.Errorf("only %d command lines found", lines)
	}
}

// No line is wider than a terminal.
func TestHelpWidth(t *testing.T) {
	forEveryCommand(newRoot(&app{ui: &ui{}}), func(c *cobra.Command) {
		for _, l := range strings.Split(c.Long, "\n") {
			if len([]rune(l)) > 100 {
				t.Errorf("%s: %d characters: %s", c.CommandPath(), len(l), l)
			}
		}
	})
}

func TestManPages(t *testing.T) {
	dir := t.TempDir()
	if err := writeMan(newRoot(&app{ui: &ui{}}), dir); err != nil {
		t.Fatal(err)
	}
	b, err := os.ReadFile(filepath.Join(dir, "overkeep.8"))
	if err != nil {
		t.Fatal(err)
	}
	for _, e := range exitTable {
		if !strings.Contains(string(b), e.meaning) {
			t.Errorf("overkeep.8 does not tell exit code %d", e.code)
		}
	}
}

// main.go stays what it is: a door.
func TestMainIsShort(t *testing.T) {
	b, err := os.ReadFile("main.go")
	if err != nil {
		t.Fatal(err)
	}
	if n := strings.Count(string(b), "\n"); n >= 40 {
		t.Errorf("main.go has %d lines", n)
	}
}
