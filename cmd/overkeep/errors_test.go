package main

import (
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"go/ast"
	"go/parser"
	"go/token"
	"slices"
	"strconv"
	"strings"
	"testing"

	"overkeep/overlay/holder"
	"overkeep/systemd/keep"
)

// libraryCodes reads the codes out of the library's source, so that a new one
// cannot be forgotten here.
func libraryCodes(t *testing.T) []keep.Code {
	t.Helper()
	f, err := parser.ParseFile(token.NewFileSet(), "../../systemd/keep/errors.go", nil, 0)
	if err != nil {
		t.Fatal(err)
	}
	var codes []keep.Code
	ast.Inspect(f, func(n ast.Node) bool {
		v, ok := n.(*ast.ValueSpec)
		if !ok || len(v.Names) != 1 || !strings.HasPrefix(v.Names[0].Name, "Code") || len(v.Values) != 1 {
			return true
		}
		s, err := strconv.Unquote(v.Values[0].(*ast.BasicLit).Value)
		if err != nil {
			t.Fatal(err)
		}
		codes = append(codes, keep.Code(s))
		return true
	})
	if len(codes) < 20 {
		t.Fatalf("only %d codes found", len(codes))
	}
	return codes
}

// noRemedy are the codes that no command can help with.
var noRemedy = []keep.Code{keep.CodeAborted}

func TestEveryCodeHasExitAndRemedy(t *testing.T) {
	h := here{verb: []string{"unlock"}, keep: "alice", line: []string{"unlock", "alice"}, keeps: []string{"alice", "work"}}
	for _, c := range libraryCodes(t) {
		if _, ok := exitOf[c]; !ok {
			t.Errorf("code %q has no exit code", c)
		}
		rs := remedies(&keep.Error{Code: c, Message: "m", Name: "alice"}, h)
		if slices.Contains(noRemedy, c) {
			if rs != nil {
				t.Errorf("code %q has a remedy, but is listed as having none", c)
			}
			continue
		}
		if c == keep.CodeUnsupported {
			continue // what the probe says, see below
		}
		if len(rs) == 0 {
			t.Errorf("code %q has no remedy", c)
		}
		for _, r := range rs {
			if r.Command == "" {
				t.Errorf("code %q: remedy %q without a command", c, r.Why)
			}
			parses(t, r.Command)
		}
	}
	if want := len(libraryCodes(t)) + len(policyCodes) + len(moveCodes); len(exitOf) != want {
		t.Errorf("exitOf has %d codes, the library and the policies %d", len(exitOf), want)
	}
}

// Remedies in the situations in which they differ.
func TestRemedies(t *testing.T) {
	unlock := here{verb: []string{"unlock"}, keep: "alice", line: []string{"unlock", "alice"}, keeps: []string{"alice"}}
	elsewhere := unlock
	elsewhere.root, elsewhere.sudo = "/srv/x", true
	mk := here{verb: []string{"init"}, line: []string{"init", "--size", "1G"}, root: "/srv/x"}
	nameless := here{verb: []string{"lock"}, line: []string{"lock", "--wait"}, keeps: []string{"alice", "work"}}
	for _, x := range []struct {
		name string
		err  *keep.Error
		h    here
		want []string
	}{
		{"locked", &keep.Error{Code: keep.CodeLocked, Name: "alice"}, unlock, []string{"overkeep unlock alice"}},
		{"root and sudo are kept", &keep.Error{Code: keep.CodeNotLocked, Name: "alice"}, elsewhere,
			[]string{"sudo overkeep --root /srv/x lock alice --wait", "sudo overkeep --root /srv/x lock alice --kill"}},
		{"not root", &keep.Error{Code: keep.CodeNotRoot}, unlock, []string{"sudo overkeep unlock alice"}},
		{"no keep at all", &keep.Error{Code: keep.CodeNoKeep}, here{line: []string{"lock"}}, []string{"overkeep init"}},
		{"a slip", &keep.Error{Code: keep.CodeNoKeep, Name: "alcie"},
			here{line: []string{"lock", "alcie"}, keeps: []string{"alice"}}, []string{"overkeep lock alice"}},
		{"which keep", &keep.Error{Code: keep.CodeUsage}, nameless, []string{"overkeep lock alice --wait", "overkeep lock work --wait"}},
		{"a damaged slot", &keep.Error{Code: keep.CodeTampered, Name: "token"}, unlock,
			[]string{"overkeep key list alice", "overkeep unlock alice --ignore-damaged-slot token"}},
		{"a header that was exchanged", &keep.Error{Code: keep.CodeTampered, Name: "alice"}, unlock,
			[]string{"overkeep key list alice", "cp -a BACKUP/alice/. /var/lib/overkeep/alice/"}},
		{"a header that is gone", &keep.Error{Code: keep.CodeNoKeep, Name: "alice"}, unlock,
			[]string{"cp -a BACKUP/alice/. /var/lib/overkeep/alice/", "overkeep destroy alice"}},
		{"a wait that was given up", &keep.Error{Code: keep.CodeNotLocked},
			here{keep: "alice", line: []string{"lock", "--wait"}}, []string{"overkeep unlock alice", "overkeep lock alice --kill"}},
		{"a name that is taken", &keep.Error{Code: keep.CodeKeepExists, Name: "work"},
			here{verb: []string{"init"}, line: []string{"init", "work", "--user", "bob"}}, []string{"overkeep status work", "overkeep init work-2 --user bob"}},
		{"the settings", &keep.Error{Code: keep.CodeUsage, Name: "/etc/overkeep/config.toml"}, unlock, []string{"sudoedit /etc/overkeep/config.toml"}},
		{"no such slot", &keep.Error{Code: keep.CodeUsage, Name: "tokn"}, unlock, []string{"overkeep key list alice", "overkeep unlock --help"}},
		{"wrong recovery key", &keep.Error{Code: keep.CodeWrongKey},
			here{keep: "alice", line: []string{"unlock", "--recovery"}}, []string{"overkeep key list alice"}},
		{"no encryption here", &keep.Error{Code: keep.CodeUnsupported, Remedy: "tune2fs -O encrypt /dev/sda2"}, mk,
			[]string{"tune2fs -O encrypt /dev/sda2", "overkeep --root /srv/x init --size 1G --on-image /srv/x/var/lib/overkeep/keep.img"}},
		{"nothing to be done", &keep.Error{Code: keep.CodeUnsupported}, unlock, nil},
		{"no daemon", &keep.Error{Code: keep.CodeNoNix, Name: "/nix/var/nix/daemon-socket/socket"}, unlock, []string{"systemctl start nix-daemon.socket"}},
		{"in the way", &keep.Error{Code: keep.CodeMountPoint, Name: "/home/alice/my keep"}, unlock,
			[]string{"mv '/home/alice/my keep' '/home/alice/my keep.before-overkeep'"}},
		{"image file exists", &keep.Error{Code: keep.CodeKeepExists, Name: "/srv/it's.img"}, mk, []string{`ls -l '/srv/it'\''s.img'`}},
		{"full while making", &keep.Error{Code: keep.CodeNoSpace}, mk, []string{"df -h /srv/x/var/lib/overkeep"}},
	} {
		var got []string
		for _, r := range remedies(x.err, x.h) {
			got = append(got, r.Command)
		}
		if !slices.Equal(got, x.want) {
			t.Errorf("%s: got %q, want %q", x.name, got, x.want)
		}
	}
}

// parses fails when a command to paste is not one of this program.
func parses(t *testing.T, line string) {
	t.Helper()
	words := splitLine(t, line)
	if words[0] == "sudo" {
		words = words[1:]
	}
	if words[0] != "overkeep" {
		return
	}
	words = words[1:]
	root := newRoot(&app{ui: &ui{}, line: words})
	root.InitDefaultHelpCmd()
	root.InitDefaultCompletionCmd()
	cmd, rest, err := root.Find(words)
	if err == nil {
		cmd.InitDefaultHelpFlag()
		err = cmd.ParseFlags(rest)
	}
	if err == nil && !slices.Contains(rest, "--help") {
		err = cmd.ValidateArgs(cmd.Flags().Args())
	}
	if err != nil {
		t.Errorf("%q does not parse: %v", line, err)
	}
}

// splitLine undoes quoteLine, and stops where a shell would do more.
func splitLine(t *testing.T, line string) []string {
	t.Helper()
	var words []string
	word, open, quoted := "", false, false
	for i := 0; i < len(line); i++ {
		c := line[i]
		switch {
		case quoted && c == '\'':
			quoted = false
		case quoted:
			word += line[i : i+1]
		case c == '\'':
			quoted, open = true, true
		case c == '\\' && i+1 < len(line):
			i++
			word, open = word+line[i:i+1], true
		case c == ' ':
			if open {
				words = append(words, word)
			}
			word, open = "", false
		default:
			word, open = word+line[i:i+1], true
		}
	}
	if quoted {
		t.Fatalf("%q: open quote", line)
	}
	if open {
		words = append(words, word)
	}
	return words
}

func TestQuoteLine(t *testing.T) {
	for _, words := range [][]string{
		{"a"}, {""}, {"a b"}, {"it's"}, {"$HOME", "`x`", "\\"}, {"--root", "/x"}, {"a;b", "*", "~", "!"}, {"é", "\t"},
	} {
		if got := splitLine(t, quoteLine(words)); !slices.Equal(got, words) {
			t.Errorf("%q came back as %q by %s", words, got, quoteLine(words))
		}
	}
}

func TestExplain(t *testing.T) {
	h := here{verb: []string{"unlock"}, line: []string{"unlock"}}
	for _, x := range []struct {
		err  error
		code keep.Code
		exit int
	}{
		{usagef("x"), keep.CodeUsage, exitUsage},
		{&errNoTerminal{"the passphrase", "--passphrase-fd 0"}, keep.CodeUsage, exitUsage},
		{context.Canceled, keep.CodeAborted, exitAborted},
		{errors.New("odd"), keep.CodeInternal, exitInternal},
		{&keep.Error{Code: "from the future", Message: "m"}, "from the future", exitInternal},
		{errors.Join(&keep.Error{Code: keep.CodeWrongKey, Message: "a"}, errors.New("b")), keep.CodeWrongKey, exitWrongKey},
	} {
		p := explain(x.err, h)
		if p.Code != x.code || p.Exit != x.exit || p.Remedy == nil {
			t.Errorf("%v: %+v", x.err, p)
		}
	}
}

// What others named cannot move the cursor, forge a line or vanish.
func TestProblemIsEscaped(t *testing.T) {
	p := &problem{Code: keep.CodeNotLocked, Message: "keep \x1b[2J is \u202e busy",
		Remedy:  []remedy{{"see", "ls '\x1b]0;x\x07'"}},
		Holders: []holder.Holder{{PID: 1, Command: "a\nb\x1b[1A", Holds: []holder.Hold{{How: "open file", What: "/x\r/y"}}}}}
	var b bytes.Buffer
	p.print(&page{w: &b})
	for _, c := range b.String() {
		if c != '\n' && !strconv.IsPrint(c) {
			t.Fatalf("%q in %q", c, b.String())
		}
	}
	// One line for the message, a blank, two of the table, a blank, two of the remedy.
	if n := strings.Count(b.String(), "\n"); n != 7 {
		t.Errorf("%d lines in %q", n, b.String())
	}
}

func TestHoldersTable(t *testing.T) {
	var b bytes.Buffer
	printHolders(&page{w: &b}, []holder.Holder{
		{PID: 42, UID: 0, Command: "sleep 300", Holds: []holder.Hold{{How: holder.CurrentDirectory, What: "/k"}, {How: holder.OpenFile, What: "/k/f"}}, More: 3},
		{Command: "loop device /dev/loop3", Holds: []holder.Hold{{How: holder.LoopDevice, What: "/k/img"}}},
	})
	want := []string{
		"PID USER COMMAND HOW WHAT",
		"42 root sleep 300 current directory /k",
		"open file /k/f",
		"and 3 more",
		"- - loop device /dev/loop3 loop device /k/img",
	}
	got := strings.Split(strings.TrimSpace(b.String()), "\n")
	for i := range got {
		got[i] = strings.Join(strings.Fields(got[i]), " ")
	}
	if !slices.Equal(got, want) {
		t.Errorf("got %q\nwant %q", got, want)
	}
}

func TestProblemJSON(t *testing.T) {
	var out, errs bytes.Buffer
	u := &ui{out: &out, err: &errs, json: true}
	u.problem(explain(&keep.Error{Code: keep.CodeNotLocked, Name: "alice", Message: "NOT locked",
		Holders: []holder.Holder{{PID: 7, Command: "vim"}}}, here{keep: "alice"}))
	var got struct {
		Error struct {
			Code    string
			Exit    int
			Message string
			Remedy  []remedy
			Holders []struct{ PID int }
		}
	}
	if err := json.Unmarshal(errs.Bytes(), &got); err != nil {
		t.Fatal(err)
	}
	if out.Len() != 0 || got.Error.Code != "not-locked" || got.Error.Exit != exitNotLocked || len(got.Error.Remedy) != 2 || got.Error.Holders[0].PID != 7 {
		t.Errorf("%s", errs.String())
	}
}
