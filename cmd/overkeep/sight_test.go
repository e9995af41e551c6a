package main

import (
	"bytes"
	"context"
	"database/sql"
	"errors"
	"os"
	"path/filepath"
	"slices"
	"testing"

	"overkeep/overlay/layout"
	"overkeep/policy"
	"overkeep/tests/storegen"
)

// A command line that runs once more in a view means there what it meant outside,
// wherever its flags stand.
func TestInViewLine(t *testing.T) {
	for _, c := range []struct {
		root       string // of the environment
		line, args []string
		json       bool
	}{
		{"", []string{"list"}, nil, false},
		{"/x", []string{"list", "--json"}, nil, true},
		{"/x", []string{"--root", "/x", "list"}, nil, false},
		{"/x", []string{"policy", "--root", "/x", "check", "--json"}, nil, true},
		{"/x", []string{"--json", "--root=/x", "why", "a", "b"}, []string{"a", "b"}, true},
		{"/x", []string{"why", "--", "--root"}, []string{"--root"}, false},
	} {
		a := &app{ui: &ui{}, exe: "overkeep", line: c.line, root: c.root}
		line := inViewLine(a, "alice")
		b := &app{ui: &ui{}}
		cmd, rest, err := newRoot(b).Find(line[1:])
		if err == nil {
			err = cmd.ParseFlags(rest)
		}
		if err != nil {
			t.Errorf("%q: %v", line, err)
			continue
		}
		view, _ := cmd.Flags().GetString("in-view")
		if view != "alice" || b.root != c.root || b.json != c.json || !slices.Equal(cmd.Flags().Args(), c.args) {
			t.Errorf("%q: view %q, root %q, json %v, words %q", line, view, b.root, b.json, cmd.Flags().Args())
		}
	}
}

func TestPolicyToEdit(t *testing.T) {
	alice := &sight{keep: "alice", of: &layout.Keep{Root: "/", Name: "alice"}}
	for _, c := range []struct {
		sight *sight
		name  string
		file  string
		root  bool
	}{
		{&sight{}, "", "/etc/overkeep/policy", true},
		{&sight{}, "policy", "/etc/overkeep/policy", true},
		{&sight{}, "work", "/etc/overkeep/policy.d/work.policy", true},
		{&sight{}, "work.policy", "/etc/overkeep/policy.d/work.policy", true},
		{alice, "", "/run/overkeep/alice/k/policy/own.policy", false},
		{alice, "acme", "/run/overkeep/alice/k/policy/acme.policy", false},
	} {
		file, root, err := policyToEdit(&app{}, c.sight, c.name)
		if err != nil || file != c.file || root != c.root {
			t.Errorf("%q: %q, %v, %v; want %q", c.name, file, root, err, c.file)
		}
	}
	for _, name := range []string{".", "..", ".hidden", "a/b", "../policy", "/etc/passwd"} {
		if file, _, err := policyToEdit(&app{}, alice, name); err == nil {
			t.Errorf("%q is %q", name, file)
		}
	}
}

// What a person types as a pattern stands in the policy as that pattern.
func TestStarterPatterns(t *testing.T) {
	p, err := policy.Parse(policy.Source{Name: "policy", Text: []byte(starter{Kind: kindStrict, Private: []string{`*-a\?b-*`}}.text()), Root: true})
	if err != nil {
		t.Fatal(err)
	}
	if !slices.ContainsFunc(p.Sources(), func(s policy.Source) bool { return bytes.Contains(s.Text, []byte(`let secret = name "*-a\?b-*"`)) }) {
		t.Errorf("%s", p)
	}
}

// No policy is so heavy that Ctrl-C has to wait for it.
func TestSettled(t *testing.T) {
	ctx, cancel := context.WithCancel(t.Context())
	cancel()
	never := make(chan int)
	if _, err := settled(ctx, func() int { return <-never }); !errors.Is(err, context.Canceled) {
		t.Error(err)
	}
	if v, err := settled(t.Context(), func() int { return 3 }); v != 3 || err != nil {
		t.Error(v, err)
	}
}

// writer commits to a database at the first thing that is shown: a pager may then take
// its time, and a Nix without WAL would wait for it.
type writer struct {
	db    *sql.DB
	err   error
	bytes int
}

func (w *writer) Write(b []byte) (int, error) {
	if w.bytes == 0 {
		_, w.err = w.db.Exec("update ValidPaths set registrationTime = registrationTime + 1 where id = 1")
	}
	w.bytes += len(b)
	return len(b), nil
}

func TestNobodyWaitsForThePager(t *testing.T) {
	dir := t.TempDir()
	if _, err := storegen.Write(t.Context(), dir, storegen.Options{Paths: 50}); err != nil {
		t.Fatal(err)
	}
	file := filepath.Join(dir, "db.sqlite")
	db, err := sql.Open("sqlite3", file+"?_journal_mode=DELETE&_busy_timeout=0")
	if err != nil {
		t.Fatal(err)
	}
	defer db.Close()
	if err := os.WriteFile(filepath.Join(dir, "p"), []byte(`personal name "*"`), 0o600); err != nil {
		t.Fatal(err)
	}
	for _, words := range [][]string{{"list"}, {"list", "--tree"}, {"why", "*", "--all"}, {"policy", "check"}, {"policy", "graph", "*"},
		{"policy", "diff", dir + "/p", dir + "/p"}} {
		w := &writer{db: db}
		words = append(words, "--db", file, "--policy", dir+"/p")
		a := &app{ui: &ui{out: w, err: os.Stderr}, line: words}
		if code := a.run(t.Context(), words); code != exitOK || w.bytes == 0 {
			t.Errorf("%q: exit code %d, %d bytes", words, code, w.bytes)
		}
		if w.err != nil {
			t.Errorf("%q: while its answer is read: %v", words, w.err)
		}
	}
}
