package doctor

import (
	"bytes"
	"fmt"
	"io"
	"os"
	"strconv"
	"strings"

	"golang.org/x/sys/unix"
)

// maxFile bounds every file that is read here, in bytes. /proc/cpuinfo of a large
// machine is the longest.
const maxFile = 4 << 20

// readBounded reads at most maxFile bytes of a file, without ever waiting for
// somebody else to write to it.
func readBounded(path string) ([]byte, error) {
	f, err := os.OpenFile(path, os.O_RDONLY|unix.O_NONBLOCK|unix.O_CLOEXEC, 0)
	if err != nil {
		return nil, err
	}
	defer f.Close()
	return io.ReadAll(io.LimitReader(f, maxFile))
}

// release is a kernel's version, as far as it matters.
type release struct{ major, minor int }

func (r release) less(o release) bool {
	return r.major < o.major || r.major == o.major && r.minor < o.minor
}
func (r release) String() string { return fmt.Sprintf("%d.%d", r.major, r.minor) }

// parseRelease reads "6.12.9-amd64"; the zero release if it is none.
func parseRelease(s string) release {
	major, rest, ok := strings.Cut(s, ".")
	if !ok {
		return release{}
	}
	if i := strings.IndexFunc(rest, func(r rune) bool { return r < '0' || r > '9' }); i >= 0 {
		rest = rest[:i]
	}
	a, err1 := strconv.ParseUint(major, 10, 15)
	b, err2 := strconv.ParseUint(rest, 10, 15)
	if err1 != nil || err2 != nil {
		return release{}
	}
	return release{int(a), int(b)}
}

// swap is a line of /proc/swaps.
type swap struct {
	Path string
	File bool // a file, not a block device
	// Deleted: the kernel says that the name leads nowhere any more.
	Deleted bool
}

// parseSwaps reads /proc/swaps (proc_swaps(5)). Names are escaped as in
// seq_file_path: "\" and three octal digits for blank, tab, newline, backslash.
func parseSwaps(b []byte) ([]swap, error) {
	lines := strings.Split(strings.TrimSuffix(string(b), "\n"), "\n")
	if len(lines) == 0 || !strings.HasPrefix(lines[0], "Filename") {
		return nil, fmt.Errorf("no heading in the table of swap spaces")
	}
	var out []swap
	for i, l := range lines[1:] {
		f := strings.Fields(l)
		n := len(f)
		if n < 5 || f[0] == "" || f[0][0] != '/' {
			return nil, fmt.Errorf("line %d of the table of swap spaces is malformed", i+2)
		}
		path, err := unescape(f[0])
		if err != nil {
			return nil, fmt.Errorf("line %d of the table of swap spaces: %w", i+2, err)
		}
		// "\040(deleted)" is escaped in all kernels since 2.6; older had a blank.
		s := swap{Path: path, File: f[n-4] == "file"}
		if f[n-4] != "file" && f[n-4] != "partition" {
			return nil, fmt.Errorf("line %d of the table of swap spaces names an unknown kind", i+2)
		}
		if p, gone := strings.CutSuffix(path, " (deleted)"); gone || n == 6 && f[1] == "(deleted)" {
			s.Path, s.Deleted = p, true
		} else if n != 5 {
			return nil, fmt.Errorf("line %d of the table of swap spaces has %d fields", i+2, n)
		}
		out = append(out, s)
	}
	return out, nil
}

// unescape undoes the octal escapes of the kernel's tables.
func unescape(s string) (string, error) {
	if !strings.Contains(s, `\`) {
		return s, nil
	}
	var b strings.Builder
	for i := 0; i < len(s); i++ {
		if s[i] != '\\' {
			b.WriteByte(s[i])
			continue
		}
		if i+3 >= len(s) {
			return "", fmt.Errorf("an escape is cut off")
		}
		n, err := strconv.ParseUint(s[i+1:i+4], 8, 8)
		if err != nil {
			return "", fmt.Errorf("an escape is not octal")
		}
		b.WriteByte(byte(n))
		i += 3
	}
	return b.String(), nil
}

// resumes says whether the kernel command line names a place to wake up from.
// The value is not kept: a command line may hold secrets. The kernel's quotes
// are double (lib/cmdline.c, next_arg), and what follows "--" is init's.
func resumes(cmdline []byte) bool {
	on := false
	var word []byte
	quoted := false
	end := func() (stop bool) {
		w := string(word)
		word = word[:0]
		switch {
		case w == "--":
			return true
		case w == "noresume", w == "nohibernate", w == "hibernate=no", w == "hibernate=noresume":
			on = false
		case strings.HasPrefix(w, "resume="):
			on = len(w) > len("resume=")
		}
		return false
	}
	for _, c := range cmdline {
		switch {
		case c == '"':
			quoted = !quoted
		case !quoted && (c == ' ' || c == '\t' || c == '\n' || c == 0):
			if end() {
				return on
			}
		default:
			word = append(word, c)
		}
	}
	end()
	return on
}

// groupMembers finds a group in the format of group(5) and returns those named
// as its members. Nix looks at these alone, not at primary groups.
func groupMembers(b []byte, name string) (members []string, found bool) {
	for l := range strings.Lines(string(b)) {
		f := strings.Split(strings.TrimRight(l, "\r\n"), ":")
		if len(f) != 4 || f[0] != name || name == "" {
			continue
		}
		for m := range strings.SplitSeq(f[3], ",") {
			if m = strings.TrimSpace(m); m != "" {
				members = append(members, m)
			}
		}
		return members, true // getgrnam(3) takes the first, too
	}
	return nil, false
}

// parseSettings reads what `nix config show` prints: "name = value" lines. Only
// the names asked for are kept: others may hold access tokens.
func parseSettings(b []byte, want ...string) map[string]string {
	out := map[string]string{}
	for l := range bytes.Lines(b) {
		k, v, ok := bytes.Cut(l, []byte("="))
		if !ok {
			continue
		}
		k = bytes.TrimSpace(k)
		for _, w := range want {
			if string(k) == w {
				out[w] = string(bytes.TrimSpace(v))
			}
		}
	}
	return out
}

// aesDriver finds in /proc/crypto the implementation of AES-XTS that the kernel
// would take: the one of the highest priority that is not internal. "" if none
// was made yet: the kernel makes them when they are first asked for.
func aesDriver(b []byte) string {
	best, bestPriority := "", -1
	for block := range strings.SplitSeq(string(b), "\n\n") {
		e := map[string]string{}
		for l := range strings.Lines(block) {
			if k, v, ok := strings.Cut(l, ":"); ok {
				e[strings.TrimSpace(k)] = strings.TrimSpace(v)
			}
		}
		p, err := strconv.Atoi(e["priority"])
		if e["name"] != "xts(aes)" || e["internal"] == "yes" || err != nil || p < 0 || len(e["driver"]) > 128 {
			continue
		}
		if p > bestPriority {
			best, bestPriority = e["driver"], p
		}
	}
	return best
}

// cpuAES looks for AES instructions among the flags in /proc/cpuinfo: "aes" on
// x86 and ARM, "msa" on s390.
func cpuAES(b []byte) Answer {
	flags := false
	for l := range strings.Lines(string(b)) {
		k, v, ok := strings.Cut(l, ":")
		if !ok {
			continue
		}
		switch strings.TrimSpace(k) {
		case "flags", "Features", "features":
			flags = true
			for f := range strings.FieldsSeq(v) {
				if f == "aes" || f == "msa" {
					return Yes
				}
			}
		}
	}
	if !flags {
		return Unsure
	}
	return No
}

// likeDebian says whether os-release(5) names Debian or a relative of it.
func likeDebian(b []byte) bool {
	for l := range strings.Lines(string(b)) {
		k, v, _ := strings.Cut(strings.TrimSpace(l), "=")
		if k != "ID" && k != "ID_LIKE" {
			continue
		}
		for w := range strings.FieldsSeq(strings.Trim(v, `"'`)) {
			if w == "debian" || w == "ubuntu" {
				return true
			}
		}
	}
	return false
}

// dump is where core(5) files go.
type dump string

const (
	dumpNowhere dump = "nowhere"
	dumpFile    dump = "file"    // beside the program or in a fixed directory
	dumpSystemd dump = "systemd" // systemd-coredump stores them
	dumpProgram dump = "program" // another program gets them
)

// coreDumps reads /proc/sys/kernel/core_pattern. An empty one means no file, but
// for core_uses_pid, which makes it ".PID" (core(5)).
func coreDumps(b []byte, usesPID bool) dump {
	s := strings.TrimRight(string(b), "\n\x00")
	prog, piped := strings.CutPrefix(s, "|")
	prog, _, _ = strings.Cut(strings.TrimSpace(prog), " ")
	base := prog[strings.LastIndexByte(prog, '/')+1:]
	switch {
	case s == "" && !usesPID:
		return dumpNowhere
	case !piped:
		return dumpFile
	case base == "false" || base == "true":
		return dumpNowhere
	case base == "systemd-coredump":
		return dumpSystemd
	}
	return dumpProgram
}
