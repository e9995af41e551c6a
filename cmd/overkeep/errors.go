package main

import (
	"context"
	"errors"
	"fmt"
	"os/user"
	"path/filepath"
	"regexp"
	"slices"
	"strconv"
	"strings"

	"overkeep/overlay/holder"
	"overkeep/overlay/layout"
	"overkeep/systemd/keep"
)

// uidInMessage finds the number of a keep's user in an error of systemd/keep.
var uidInMessage = regexp.MustCompile(`uid (\d+)`)

// problem is an error as it is shown: what went wrong, and what to do about it.
type problem struct {
	Code    keep.Code       `json:"code"`
	Exit    int             `json:"exit"`
	Message string          `json:"message"`
	Name    string          `json:"name,omitempty"`
	Missing string          `json:"missing,omitempty"`
	Remedy  []remedy        `json:"remedy"`
	Holders []holder.Holder `json:"holders,omitempty"`
}

// remedy is one way on: in words, and as a command to paste. A remedy without a
// command is one that no command can bring about.
type remedy struct {
	Why     string `json:"why"`
	Command string `json:"command,omitempty"`
}

// here is what a command to paste depends on.
type here struct {
	sudo  bool     // the command is pasted into a shell that is not root's
	root  string   // --root, "" for none
	verb  []string // the command that was given, for example key add
	keep  string   // the keep it was about, "" when that is not known
	line  []string // all of the command line
	keeps []string // the keeps there are
}

// command is an overkeep command line that works where this one was run.
func (h here) command(args ...string) string {
	words := []string{"overkeep"}
	if h.sudo {
		words = []string{"sudo", "overkeep"}
	}
	if h.root != "" && !hasFlag(args, "root") {
		words = append(words, "--root", h.root)
	}
	for _, a := range args {
		if a != "" {
			words = append(words, a)
		}
	}
	return quoteLine(words)
}

// again is the command line that was given.
func (h here) again() string { return h.command(h.line...) }

func hasFlag(args []string, name string) bool {
	for _, a := range args {
		if a == "--" {
			break
		}
		if a == "--"+name || strings.HasPrefix(a, "--"+name+"=") {
			return true
		}
	}
	return false
}

// quoteLine writes words as a shell reads them.
func quoteLine(words []string) string {
	out := make([]string, len(words))
	for i, w := range words {
		out[i] = quoteWord(w)
	}
	return strings.Join(out, " ")
}

func quoteWord(w string) string {
	plain := w != ""
	for _, c := range w {
		plain = plain && (c >= 'a' && c <= 'z' || c >= 'A' && c <= 'Z' || c >= '0' && c <= '9' || strings.ContainsRune("/_.,:=@%+-", c))
	}
	if plain {
		return w
	}
	return "'" + strings.ReplaceAll(w, "'", `'\''`) + "'"
}

// explain turns any error into what is shown. It is the one place where that
// happens.
func explain(err error, h here) *problem {
	var use *usageError
	var noTTY *errNoTerminal
	switch {
	case errors.As(err, &use):
		p := &problem{Code: keep.CodeUsage, Message: use.msg}
		if use.line != nil {
			why := use.why
			if why == "" {
				why = "You may have meant:"
			}
			p.Remedy = append(p.Remedy, remedy{why, h.command(use.line...)})
		}
		if use.command != "" {
			p.Remedy = append(p.Remedy, remedy{use.why, use.command})
		}
		p.Remedy = append(p.Remedy, helpRemedy(h))
		return finish(p)
	case errors.As(err, &noTTY):
		p := &problem{Code: keep.CodeUsage, Message: noTTY.Error()}
		p.Remedy = []remedy{{"Give it otherwise:", h.command(append(slices.Clone(h.line), strings.Fields(noTTY.flag)...)...)}}
		return finish(p)
	}
	for _, explain := range []func(error, here) *problem{explainMoves, explainPolicy} {
		if p := explain(err, h); p != nil {
			return finish(p)
		}
	}
	e := keep.Classify(err)
	if e.Code == keep.CodeInternal && errors.Is(err, context.Canceled) {
		e = &keep.Error{Code: keep.CodeAborted, Message: "interrupted"}
	}
	return finish(&problem{Code: e.Code, Message: e.Message, Name: e.Name, Missing: e.Missing,
		Holders: e.Holders, Remedy: remedies(e, h)})
}

func finish(p *problem) *problem {
	code, ok := exitOf[p.Code]
	if !ok {
		code = exitInternal
	}
	p.Exit = code
	if p.Remedy == nil {
		p.Remedy = []remedy{} // in JSON a list, not null
	}
	return p
}

func helpRemedy(h here) remedy {
	return remedy{"How it is used:", quoteLine(append(append([]string{"overkeep"}, h.verb...), "--help"))}
}

// remedies says what to do about e. A code whose answer is nil has none, on
// purpose: nothing that could be pasted would help.
func remedies(e *keep.Error, h here) []remedy {
	k := h.keep
	if k == "" {
		k = pickKeep(e, h)
	}
	switch e.Code {
	case keep.CodeInternal:
		return []remedy{{"This should not happen. What the machine can and cannot do:", h.command("doctor")}}

	case keep.CodeUsage:
		if e.Name == "" && len(h.keeps) > 1 {
			var rs []remedy
			for _, n := range h.keeps[:min(len(h.keeps), 4)] {
				rs = append(rs, remedy{"", h.command(withKeep(h, n)...)})
			}
			rs[0].Why = "Name one:"
			return rs
		}
		var rs []remedy
		switch {
		case strings.HasSuffix(e.Name, ".toml"):
			return []remedy{{"Mend the settings:", "sudoedit " + quoteWord(e.Name)}}
		case filepath.IsAbs(e.Name):
			rs = append(rs, remedy{"See what it is:", "ls -ld " + quoteWord(e.Name)})
		case e.Name != "" && k != "" && k != e.Name && len(h.verb) > 0 && (h.verb[0] == "unlock" || h.verb[0] == "key"):
			rs = append(rs, remedy{"The slots there are:", h.command("key", "list", k)})
		}
		return append(rs, helpRemedy(h))

	case keep.CodeNotRoot:
		h.sudo = true
		return []remedy{{"The same as root:", h.again()}}

	case codeRequire, codePolicy: // of unlock --strict
		return []remedy{
			{"Open it all the same:", h.command(deleteWord(h.line, "--strict")...)},
			{"And see what is wrong:", h.command("policy", "check", "--keep", k)},
		}

	case keep.CodeNoKeep:
		switch {
		case slices.Contains(h.keeps, e.Name): // its directory is there
			return []remedy{restore(h, e.Name), {"Or give it up:", h.command("destroy", e.Name)}}
		case len(h.keeps) == 0:
			return []remedy{{"Make one:", h.command("init", e.Name)}}
		case nearest(e.Name, h.keeps) != "":
			near := nearest(e.Name, h.keeps)
			return []remedy{{"You may have meant:", h.command(replaceWord(h.line, e.Name, near)...)}}
		}
		return []remedy{
			{"The keeps there are:", h.command("status")},
			{"Make this one:", h.command("init", e.Name)},
		}

	case keep.CodeKeepExists:
		if filepath.IsAbs(e.Name) {
			return []remedy{{"Look what it is, and choose another name if it is of use:", "ls -l " + quoteWord(e.Name)}}
		}
		other := withKeep(h, e.Name+"-2")
		if i := slices.Index(h.line, e.Name); i > 0 && h.line[i-1] != "--user" { // else it is the user's name
			other = replaceWord(h.line, e.Name, e.Name+"-2")
		}
		return []remedy{
			{"What it is:", h.command("status", e.Name)},
			{"Another keep needs another name:", h.command(other...)},
		}

	case keep.CodeWrongKey:
		rs := []remedy{{"Which slots there are, and of what kind:", h.command("key", "list", k)}}
		if !hasFlag(h.line, "recovery") {
			rs = append(rs, remedy{"The recovery key opens it, too:", h.command("unlock", k, "--recovery")})
		}
		return rs

	case keep.CodeTampered:
		rs := []remedy{{"Somebody or a failing disk changed a file. What is listed, and what is wrong with it:", h.command("key", "list", k)}}
		if e.Name != "" && e.Name != k && !strings.Contains(e.Name, "/") && !hasFlag(h.line, "ignore-damaged-slot") {
			rs = append(rs, remedy{"If you know why that slot is damaged, open the keep with another one, then remove it:",
				h.command("unlock", k, "--ignore-damaged-slot", e.Name)})
		} else {
			rs = append(rs, restore(h, k))
		}
		return rs

	case keep.CodeDamaged:
		if e.Name != "" && e.Name != k {
			return []remedy{
				{"Another slot may still open the keep:", h.command("unlock", k, "--recovery")},
				{"What is damaged:", h.command("key", "list", k)},
			}
		}
		return []remedy{restore(h, k)}

	case keep.CodeVersion:
		return []remedy{{"A newer overkeep made it; this is version:", "overkeep version"}}

	case keep.CodeWorkFactor:
		return []remedy{{"Nobody asked for that much: treat the slot as planted. Open the keep with the recovery key:", h.command("unlock", k, "--recovery")}}

	case keep.CodeForeign:
		if m := uidInMessage.FindStringSubmatch(e.Message); m != nil {
			if strings.Contains(e.Message, "does not exist here") {
				return []remedy{{"Its user must exist here, with the same number as then:", sudo(h, "useradd --create-home --uid "+m[1]+" "+quoteWord(e.Name))}}
			}
			return []remedy{{"Give the user the number of then:", sudo(h, "usermod --uid "+m[1]+" "+quoteWord(e.Name))}}
		}
		return []remedy{{"What the keep's header says of its user and place:", sudo(h, "cat "+quoteWord(filepath.Join(layout.StateRoot(rootOr(h)), k, "keep.json")))}}

	case keep.CodeUnsupported:
		var rs []remedy
		if e.Remedy != "" {
			rs = append(rs, remedy{"This may mend it:", sudo(h, e.Remedy)})
		}
		if len(h.verb) > 0 && h.verb[0] == "init" && !hasFlag(h.line, "on-image") {
			rs = append(rs, remedy{"Or keep it in a file that brings its own file system:",
				h.command(append(slices.Clone(h.line), "--on-image", filepath.Join(layout.StateRoot(rootOr(h)), "keep.img"))...)})
		}
		return rs

	case keep.CodeNoNix:
		if strings.HasSuffix(e.Name, "/socket") || strings.HasSuffix(e.Name, "daemon-socket") {
			return []remedy{{"Start the system's nix-daemon:", sudo(h, "systemctl start nix-daemon.socket")}}
		}
		return []remedy{{"It takes Nix 2.22 or later with its daemon. On Debian 13 or later:", sudo(h, "apt install nix-bin nix-setup-systemd")}}

	case keep.CodeLocked:
		return []remedy{{"Open it first:", h.command("unlock", k)}}

	case keep.CodeUnlocked:
		return []remedy{{"Lock it first:", h.command("lock", k)}}

	case keep.CodeNotLocked:
		wait := remedy{"Wait until they are done; nothing new is let in:", h.command("lock", k, "--wait")}
		if hasFlag(h.line, "wait") { // given up, and new work has been refused
			wait = remedy{"Go on working; new work is let in again:", h.command("unlock", k)}
		}
		return []remedy{
			wait,
			{"Or end them, after they have been named and you have said yes:", h.command("lock", k, "--kill")},
		}

	case keep.CodeNoSpace:
		rs := []remedy{{"What is full:", "df -h " + quoteWord(layout.StateRoot(rootOr(h)))}}
		if k != "" && !(len(h.verb) > 0 && h.verb[0] == "init") {
			rs = append(rs, remedy{"Collect the keep's own garbage, once it is open:", h.command("run", k, "--", "nix-collect-garbage", "-d")})
		}
		return rs

	case keep.CodeMountPoint:
		if e.Name == "" {
			return []remedy{{"What would be mounted where:", h.command("render", k, "--explain")}}
		}
		return []remedy{{"Look at it, then move it out of the way:", quoteLine([]string{"mv", e.Name, e.Name + ".before-overkeep"})}}

	case keep.CodeAborted:
		return nil // it was the user's wish

	case keep.CodeUnconfirmed:
		return []remedy{{"Nothing was made. Begin again when you can write the key down:", h.again()}}

	case keep.CodeBusyRun:
		return []remedy{{"Let the other command end, then:", h.again()}}

	case keep.CodePlugin:
		return []remedy{{"Is it installed where root finds it?", sudo(h, "sh -c 'ls /usr/bin/age-plugin-* /usr/local/bin/age-plugin-*'")}}
	}
	return nil
}

// restore puts a keep's public files back.
func restore(h here, k string) remedy {
	return remedy{"Put the public files (keep.json, slots) back from a backup; they hold no secret:",
		sudo(h, quoteLine([]string{"cp", "-a", "BACKUP/" + k + "/.", filepath.Join(layout.StateRoot(rootOr(h)), k) + "/"}))}
}

// pickKeep guesses the keep of a command that named none.
func pickKeep(e *keep.Error, h here) string {
	if len(h.keeps) == 1 {
		return h.keeps[0]
	}
	return ""
}

// withKeep is the command line with a keep named where none was.
func withKeep(h here, name string) []string {
	for i := range h.line {
		if len(h.verb) > 0 && h.line[i] == h.verb[len(h.verb)-1] {
			out := append([]string{}, h.line[:i+1]...)
			return append(append(out, name), h.line[i+1:]...)
		}
	}
	return append(slices.Clone(h.line), name)
}

func rootOr(h here) string {
	if h.root == "" {
		return "/"
	}
	return h.root
}

func sudo(h here, command string) string {
	if h.sudo {
		return "sudo " + command
	}
	return command
}

// print writes a problem for people.
func (p *problem) print(out *page) {
	for i, line := range strings.Split(strings.TrimRight(p.Message, "\n"), "\n") {
		if i == 0 {
			out.printf("%s %s\n", out.style("1;31", "overkeep:"), printable(line))
			continue
		}
		out.printf("          %s\n", printable(line))
	}
	if len(p.Holders) > 0 {
		out.printf("\n")
		printHolders(out, p.Holders)
	}
	if len(p.Remedy) > 0 {
		out.printf("\n")
	}
	for _, r := range p.Remedy {
		if r.Why != "" {
			out.printf("  %s\n", printable(r.Why))
		}
		if r.Command != "" {
			out.printf("      %s\n", out.style("1", printable(r.Command)))
		}
	}
}

// printHolders is the table of what holds a keep: one line for a hold.
func printHolders(out *page, hs []holder.Holder) {
	rows := [][]string{{"PID", "USER", "COMMAND", "HOW", "WHAT"}}
	for _, h := range hs {
		pid, who := "-", "-"
		if h.PID > 0 {
			pid, who = strconv.Itoa(h.PID), userName(h.UID)
		}
		first := []string{pid, who, clip(h.Command, 40)}
		for _, x := range h.Holds {
			rows = append(rows, append(first, string(x.How), x.What))
			first = []string{"", "", ""}
		}
		switch {
		case len(h.Holds) == 0:
			rows = append(rows, append(first, "", ""))
		case h.More > 0:
			rows = append(rows, append(first, fmt.Sprintf("and %d more", h.More), ""))
		}
	}
	out.table("", rows)
}

func userName(uid uint32) string {
	id := strconv.FormatUint(uint64(uid), 10)
	if u, err := user.LookupId(id); err == nil {
		return u.Username
	}
	return id
}
