package main

import (
	"fmt"
	"go/ast"
	"go/parser"
	"go/token"
	"strconv"
	"strings"
	"testing"

	"github.com/spf13/cobra"
)

func TestExitCodes(t *testing.T) {
	// Every constant, from the source.
	f, err := parser.ParseFile(token.NewFileSet(), "exitcodes.go", nil, parser.ParseComments)
	if err != nil {
		t.Fatal(err)
	}
	consts := map[string]int{}
	ast.Inspect(f, func(n ast.Node) bool {
		v, ok := n.(*ast.ValueSpec)
		if ok && strings.HasPrefix(v.Names[0].Name, "exit") && v.Names[0].Name != "exitTable" && v.Names[0].Name != "exitOf" {
			n, err := strconv.Atoi(v.Values[0].(*ast.BasicLit).Value)
			if err != nil {
				t.Fatal(err)
			}
			if v.Comment == nil {
				t.Errorf("%s has no comment", v.Names[0].Name)
			}
			consts[v.Names[0].Name] = n
		}
		return true
	})
	numbers := map[int]bool{}
	for name, n := range consts {
		if numbers[n] {
			t.Errorf("%s: %d is used twice", name, n)
		}
		// Above 125 shells and env(1) have meanings of their own.
		if n < 0 || n > 125 {
			t.Errorf("%s = %d", name, n)
		}
		numbers[n] = true
	}
	if len(exitTable) != len(consts) {
		t.Errorf("%d codes in the table, %d constants", len(exitTable), len(consts))
	}
	names := map[string]bool{}
	for i, e := range exitTable {
		if e.code != i {
			t.Errorf("row %d of the table has code %d: a number is never left out or used again", i, e.code)
		}
		if names[e.name] || e.name == "" || e.meaning == "" || !strings.HasSuffix(e.meaning, ".") {
			t.Errorf("row %d: name %q, meaning %q", i, e.name, e.meaning)
		}
		names[e.name] = true
	}
	for c, n := range exitOf {
		if !numbers[n] || n == exitOK {
			t.Errorf("code %q has exit code %d", c, n)
		}
	}
}

// Every code is in its help topic, and what a command's help names is in the table.
func TestExitCodesAreDocumented(t *testing.T) {
	all := exitLines()
	for _, e := range exitTable {
		if !strings.Contains(all, fmt.Sprintf("  %2d  %s", e.code, e.name)) {
			t.Errorf("%d is not in the help", e.code)
		}
	}
	forEveryCommand(newRoot(&app{ui: &ui{}}), func(c *cobra.Command) {
		for _, l := range strings.Split(c.Annotations["exits"], "\n") {
			if l != "" && !strings.Contains(all, l) {
				t.Errorf("%s: %q", c.CommandPath(), l)
			}
		}
	})
}

func forEveryCommand(c *cobra.Command, f func(*cobra.Command)) {
	f(c)
	for _, s := range c.Commands() {
		forEveryCommand(s, f)
	}
}
