package main

import (
	"bytes"
	"encoding/json"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"

	"github.com/moby/sys/mountinfo"
	"golang.org/x/sys/unix"

	"overkeep/overlay/layout"
	"overkeep/overlay/move"
	"overkeep/overlay/plan"
	"overkeep/overlay/view"
	"overkeep/systemd/keep"
	"overkeep/tests/need"
)

// A mount lies in the keep if it is of the volume or of a part of it.
func TestInsideVolume(t *testing.T) {
	const volume = "/run/overkeep/a/k"
	m := func(id, minor int, root, at string) *mountinfo.Info {
		return &mountinfo.Info{ID: id, Major: 8, Minor: minor, Root: root, Mountpoint: at}
	}
	image := view.Table{m(1, 1, "/", "/"), m(2, 7, "/", volume), m(3, 7, "/home/work", "/home/a/keep"), m(4, 1, "/cover", "/home/a/x")}
	dir := view.Table{m(1, 1, "/", "/"), m(2, 1, "/var/lib/overkeep/a/volume", volume), m(3, 1, "/var/lib/overkeep/a/volume/home/work", "/home/a/keep"),
		m(4, 1, "/var/lib/overkeep/a/volume2", "/x"), m(5, 1, "/var/lib/overkeep/a", "/y"), m(6, 2, "/var/lib/overkeep/a/volume/home", "/z")}
	hidden := append(slices.Clone(image), m(5, 9, "/", volume))
	for _, c := range []struct {
		name  string
		table view.Table
		mount int
		want  bool
	}{
		{"image: the machine's root", image, 1, false},
		{"image: the volume", image, 2, true},
		{"image: a part", image, 3, true},
		{"image: something else", image, 4, false},
		{"dir: the machine's root", dir, 1, false},
		{"dir: the volume", dir, 2, true},
		{"dir: a part", dir, 3, true},
		{"dir: a name that begins alike", dir, 4, false},
		{"dir: what it lies in", dir, 5, false},
		{"dir: another file system", dir, 6, false},
		{"something over the volume", hidden, 3, false},
		{"no such mount", image, 9, false},
		{"no volume", image[:1], 1, false},
	} {
		if got := insideVolume(c.table, volume, c.mount); got != c.want {
			t.Errorf("%s: %v", c.name, got)
		}
	}
}

// planTester is a planner whose keep is a directory.
func planTester(t *testing.T) *planner {
	need.Root(t)
	k := layout.Keep{Root: t.TempDir(), Name: "a"}
	if err := os.MkdirAll(k.Volume(), 0o700); err != nil {
		t.Fatal(err)
	}
	return &planner{keep: &keep.Keep{Keep: k, Header: &keep.Header{ID: "0123", WorkDir: "keep"}}, user: view.User{Name: "root", Home: "/root"}}
}

func TestPlanKey(t *testing.T) {
	p := planTester(t)
	if key, err := planKeyOf(p.keep.Keep, false); key != nil || err != nil {
		t.Errorf("without one: %x %v", key, err)
	}
	first, err := planKeyOf(p.keep.Keep, true)
	if err != nil || len(first) != plan.KeySize || bytes.Equal(first, make([]byte, plan.KeySize)) {
		t.Fatalf("%x %v", first, err)
	}
	for _, create := range []bool{true, false} {
		if again, err := planKeyOf(p.keep.Keep, create); err != nil || !bytes.Equal(again, first) {
			t.Errorf("again: %v", err)
		}
	}
	file := filepath.Join(p.keep.Journal(), planKey)
	var st unix.Stat_t
	if err := unix.Stat(file, &st); err != nil || st.Mode != unix.S_IFREG|0o600 {
		t.Errorf("%o %v", st.Mode, err)
	}
	for name, harm := range map[string]func() error{
		"others may read": func() error { return os.Chmod(file, 0o640) },
		"another's":       func() error { return os.Chown(file, 1000, 0) },
		"short":           func() error { return os.Truncate(file, plan.KeySize-1) },
		"long":            func() error { return os.Truncate(file, plan.KeySize+1) },
		"a pipe":          func() error { return errors.Join(os.Remove(file), unix.Mkfifo(file, 0o600)) },
		"a link":          func() error { return errors.Join(os.Remove(file), os.Symlink("/dev/zero", file)) },
	} {
		if err := errors.Join(os.Remove(file), os.WriteFile(file, first, 0o600), harm()); err != nil {
			t.Fatal(name, err)
		}
		for _, create := range []bool{true, false} {
			key, err := planKeyOf(p.keep.Keep, create)
			var e *keep.Error
			if key != nil || !(errors.As(err, &e) && e.Code == keep.CodeTampered || name == "a link" && errors.Is(err, unix.ELOOP)) {
				t.Errorf("%s: %x %v", name, key, err)
			}
		}
	}
}

// samplePlan has many of everything.
func samplePlan(n int) *plan.Plan {
	p := &plan.Plan{Version: plan.Version, Keep: "a", KeepID: "0123", Residue: []plan.Residue{{Code: "flash", Words: "cells"}}}
	for i := range n {
		path := func(what string) string { return fmt.Sprintf("/nix/store/%032d-%s-%d", i, what, i) }
		p.Reasons = append(p.Reasons, plan.Reason{Reason: "vetoed", Line: fmt.Sprintf(`personal name "x%d"`, i), File: "/etc/overkeep/policy", Row: i + 1})
		for k, kind := range []plan.Kind{plan.Seal, plan.Release} {
			m := plan.Move{Kind: kind, Path: path(string(kind)), NarHash: "sha256:" + strings.Repeat("0", 64), NarSize: 1 << 20, Unit: n*k + i, Reason: i, Duplicate: i%3 == 0}
			if i%2 == 1 {
				m.Follows = path("head")
			}
			p.Moves = append(p.Moves, m)
		}
		p.Roots = append(p.Roots, plan.Root{Link: fmt.Sprintf("/home/a/result-%d", i), Path: path("seal"), Kind: plan.RootUser, To: "home/work/links/x"})
		p.Blocked = append(p.Blocked, plan.Blocked{Move: plan.Move{Kind: plan.Seal, Path: path("held"), Unit: plan.NoUnit, Reason: i}, Why: plan.BlockedOther, By: fmt.Sprintf("/root/\x1b[2J%d", i)})
	}
	slices.SortStableFunc(p.Moves, func(x, y plan.Move) int { return x.Unit - y.Unit })
	return p
}

func TestPlanFile(t *testing.T) {
	p := planTester(t)
	want := samplePlan(3)
	if _, err := p.decodePlan(plan.Encode(want, make([]byte, plan.KeySize))); !errors.Is(err, plan.ErrMachine) {
		t.Errorf("another machine: %v", err)
	}
	var err error
	if want.Machine, err = machine(); err != nil {
		t.Fatal(err)
	}
	if _, err := p.decodePlan(plan.Encode(want, make([]byte, plan.KeySize))); !errors.Is(err, plan.ErrEdited) {
		t.Errorf("before the keep wrote any: %v", err)
	}
	key, err := planKeyOf(p.keep.Keep, true)
	if err != nil {
		t.Fatal(err)
	}
	file := filepath.Join(t.TempDir(), "plan")
	if err := os.WriteFile(file, plan.Encode(want, key), 0o600); err != nil {
		t.Fatal(err)
	}
	b, err := p.readPlan(file)
	if err != nil {
		t.Fatal(err)
	}
	got, err := p.decodePlan(b)
	if err != nil || len(got.Moves) != 6 || !plan.Diff(want, got, nil).Empty() {
		t.Errorf("%+v %v", got, err)
	}
	p.keep.Header.ID = "4567"
	if _, err := p.decodePlan(b); !errors.Is(err, plan.ErrKeep) {
		t.Errorf("another keep: %v", err)
	}
	var use *usageError
	if _, err := p.readPlan(file + "x"); !errors.As(err, &use) {
		t.Errorf("no file: %v", err)
	}
	if err := unix.Mkfifo(file+"y", 0o600); err != nil {
		t.Fatal(err)
	}
	for _, f := range []string{file + "y", filepath.Dir(file), "/dev/zero"} {
		if _, err := p.readPlan(f); !errors.Is(err, plan.ErrNotPlan) {
			t.Errorf("%s: %v", f, err)
		}
	}
}

// The summary fits a screen however much there is; --all names everything; nothing that
// others named gets to the terminal as it is.
func TestPlanText(t *testing.T) {
	p := samplePlan(50)
	r := (&planner{}).report(p)
	text := func() string {
		var b strings.Builder
		r.print(&page{w: &b})
		return b.String()
	}
	short := text()
	if n := strings.Count(short, "\n"); n > 45 || n < 25 {
		t.Errorf("%d lines:\n%s", n, short)
	}
	for _, want := range []string{"Seal 50 paths, 50M from the system store into the keep:", "Release 50 paths, 50M", "and 45 more reasons (--all)", "and held by 46 others (--all)", "and 47 more (--all)"} {
		if !strings.Contains(short, want) {
			t.Errorf("no %q in\n%s", want, short)
		}
	}
	r.all = true
	all := text()
	for _, m := range p.Moves {
		if strings.Count(all, m.Path) != 1 {
			t.Errorf("%s is named %d times", m.Path, strings.Count(all, m.Path))
		}
	}
	for _, b := range p.Blocked {
		if !strings.Contains(all, b.Path) {
			t.Errorf("%s is not named", b.Path)
		}
	}
	if strings.Contains(short+all, "\x1b") {
		t.Error("an escape sequence gets through")
	}
	empty := (&planner{}).report(&plan.Plan{})
	var b bytes.Buffer
	empty.print(&page{w: &b})
	if b.String() != "Every path lies where the policy wants it.\n" {
		t.Errorf("%q", b.String())
	}
	js, err := json.Marshal(empty)
	if err != nil || strings.Contains(string(js), `null`) || !strings.Contains(string(js), `"blocked":[]`) {
		t.Errorf("%s %v", js, err)
	}
}

// Every reason to be blocked has words of its own.
func TestBlockedWords(t *testing.T) {
	seen := map[string]bool{}
	for _, why := range []plan.BlockWhy{plan.BlockedBoot, plan.BlockedOther, plan.BlockedKeepPin, plan.BlockedProcess, plan.BlockedTemp,
		plan.BlockedReferenced, plan.BlockedNeeds, plan.BlockedDiffers, plan.BlockedGone, plan.BlockedRow} {
		w := blockedWords(&plan.Blocked{Why: why})
		if w == "" || seen[w] {
			t.Errorf("%s: %q", why, w)
		}
		seen[w] = true
	}
}

// What was not cleared is not called cleared.
func TestPrintCleaned(t *testing.T) {
	text := func(c *move.CleanResult) string {
		var b bytes.Buffer
		printCleaned(&page{w: &b}, c)
		return b.String()
	}
	if s := text(&move.CleanResult{}); !strings.Contains(s, "cleared.\n") || strings.Contains(s, "not done") {
		t.Errorf("%q", s)
	}
	s := text(&move.CleanResult{Left: []string{"no trim\x1b[2J"}})
	if strings.Contains(s, "cleared.\n") || !strings.Contains(s, "but for what follows") || !strings.Contains(s, "not done: no trim") || strings.Contains(s, "\x1b") {
		t.Errorf("%q", s)
	}
}
