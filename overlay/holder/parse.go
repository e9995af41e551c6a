package holder

import (
	"bytes"
	"encoding/binary"
	"errors"
	"fmt"
	"strconv"
	"strings"

	"golang.org/x/sys/unix"
)

// The parsers of this file are pure and take what the kernel prints, in which
// names were chosen by strangers. None of them panics or allocates more than
// its input.

// ParseError is kernel text that does not look as documented.
type ParseError struct {
	What string // "mountinfo", "maps", "stat", "status", ...
	Line string // escaped, bounded
}

func (e *ParseError) Error() string { return fmt.Sprintf("unexpected line in %s: %s", e.What, e.Line) }

func parseError(what string, line []byte) error {
	return &ParseError{what, printable(string(line[:min(len(line), 120)]), 120)}
}

// mount is a line of mountinfo (proc_pid_mountinfo(5)).
type mount struct {
	id, parent uint64
	dev        uint64 // as in st_dev
	root       string // directory of the filesystem that is its root
	point      string // mount point, seen from the root of the reader
	fstype     string
	super      string // options of the filesystem, still escaped
}

// parseMount parses a line of mountinfo without its newline. A cut line (one
// longer than the reader's buffer) may end anywhere after its device: a stranger
// can make paths of any length and must not be able to hide a mount by that.
//
// github.com/moby/sys/mountinfo, against which this is fuzzed, gives up the whole
// table at a line of 64 KiB.
func parseMount(line []byte, cut bool) (mount, error) {
	var m mount
	var f [5][]byte
	rest := line
	for i := range f {
		var more bool
		f[i], rest, more = bytes.Cut(rest, []byte{' '})
		if !more && (!cut || i < 3) {
			return m, parseError("mountinfo", line)
		}
	}
	major, minor, ok := bytes.Cut(f[2], []byte{':'})
	id, ok1 := parseUint(f[0], 10)
	parent, ok2 := parseUint(f[1], 10)
	ma, ok3 := parseUint(major, 10)
	mi, ok4 := parseUint(minor, 10)
	if !ok || !ok1 || !ok2 || !ok3 || !ok4 || ma > 0xfff || mi > 0xfffff {
		return m, parseError("mountinfo", line)
	}
	m = mount{id: id, parent: parent, dev: unix.Mkdev(uint32(ma), uint32(mi)), root: unescape(f[3]), point: unescape(f[4])}
	// Options, then optional fields up to a lone "-". No field is empty and none
	// contains a space, so the first " - " is the separator.
	_, tail, ok := bytes.Cut(rest, []byte(" - "))
	if !ok {
		if cut {
			return m, nil
		}
		return m, parseError("mountinfo", line)
	}
	fstype, tail, _ := bytes.Cut(tail, []byte{' '})
	_, super, _ := bytes.Cut(tail, []byte{' '})
	m.fstype, m.super = unescape(fstype), string(super)
	return m, nil
}

// parseUint accepts digits only: no sign, no underscore, no prefix.
func parseUint(b []byte, base int) (uint64, bool) {
	if len(b) == 0 || len(b) > 20 || b[0] == '+' {
		return 0, false
	}
	n, err := strconv.ParseUint(string(b), base, 64)
	return n, err == nil
}

// unescape undoes the kernel's \ooo (seq_path: space, tab, newline, backslash
// and, in sources, the number sign).
func unescape(b []byte) string {
	if bytes.IndexByte(b, '\\') < 0 {
		return string(b)
	}
	out := make([]byte, 0, len(b))
	for i := 0; i < len(b); i++ {
		if b[i] == '\\' && i+3 < len(b) {
			if n, err := strconv.ParseUint(string(b[i+1:i+4]), 8, 8); err == nil {
				out = append(out, byte(n))
				i += 3
				continue
			}
		}
		out = append(out, b[i])
	}
	return string(out)
}

// layers returns the directories an overlay is made of, from its options; nil
// for other filesystems. A colon separates lower layers; a literal one, and a
// comma, is escaped with a backslash (overlayfs.rst).
func layers(m mount) []string {
	if m.fstype != "overlay" {
		return nil
	}
	var out []string
	for _, opt := range splitEscaped(m.super, ',') {
		key, val, _ := strings.Cut(opt, "=")
		switch key {
		case "upperdir", "workdir", "lowerdir+", "datadir+":
			out = append(out, unescapeLayer(val))
		case "lowerdir":
			for _, l := range splitEscaped(val, ':') {
				if l != "" { // "::" introduces data-only layers
					out = append(out, unescapeLayer(l))
				}
			}
		}
	}
	return out
}

func splitEscaped(s string, sep byte) []string {
	var out []string
	start := 0
	for i := 0; i < len(s); i++ {
		switch s[i] {
		case '\\':
			i++
		case sep:
			out = append(out, s[start:i])
			start = i + 1
		}
	}
	return append(out, s[start:])
}

// unescapeLayer undoes mountinfo's escapes first, then overlayfs's.
func unescapeLayer(s string) string {
	s = unescape([]byte(s))
	var b strings.Builder
	for i := 0; i < len(s); i++ {
		if s[i] == '\\' && i+1 < len(s) {
			i++
		}
		b.WriteByte(s[i])
	}
	return b.String()
}

// mapping is a line of /proc/PID/maps (proc_pid_maps(5)).
type mapping struct {
	start, end uint64 // addresses
	dev, ino   uint64
	path       []byte // as printed; aliases the line; nil when not asked for
}

// name is the link that leads to the mapped file, from the task's directory.
func (m mapping) name() string { return fmt.Sprintf("map_files/%x-%x", m.start, m.end) }

// parseMapping parses a line of maps without its newline; a path that was cut
// off is no error. Mappings without a file have inode 0.
func parseMapping(line []byte) (mapping, error) {
	var m mapping
	var f [5][]byte
	rest := line
	for i := range f {
		var more bool
		f[i], rest, more = bytes.Cut(rest, []byte{' '})
		if !more && i < 4 {
			return m, parseError("maps", line)
		}
	}
	from, to, ok := bytes.Cut(f[0], []byte{'-'})
	major, minor, ok0 := bytes.Cut(f[3], []byte{':'})
	ma, ok1 := parseUint(major, 16)
	mi, ok2 := parseUint(minor, 16)
	ino, ok3 := parseUint(f[4], 10)
	start, ok4 := parseUint(from, 16)
	end, ok5 := parseUint(to, 16)
	if !ok || !ok0 || !ok1 || !ok2 || !ok3 || !ok4 || !ok5 || ma > 0xfff || mi > 0xfffff {
		return m, parseError("maps", line)
	}
	return mapping{start, end, unix.Mkdev(uint32(ma), uint32(mi)), ino, bytes.TrimLeft(rest, " ")}, nil
}

// stat is what matters of /proc/PID/stat (proc_pid_stat(5)).
type stat struct {
	comm   string
	state  byte
	kernel bool   // a kernel thread
	start  uint64 // clock ticks since boot
}

// parseStat parses /proc/PID/stat. The command name may contain anything, also
// ") S 1 1": it ends at the last closing parenthesis.
func parseStat(b []byte) (stat, error) {
	open, end := bytes.IndexByte(b, '('), bytes.LastIndexByte(b, ')')
	if open < 0 || end < open {
		return stat{}, parseError("stat", b)
	}
	f := bytes.Fields(b[end+1:])
	if len(f) < 20 || len(f[0]) != 1 {
		return stat{}, parseError("stat", b)
	}
	flags, ok1 := parseUint(f[6], 10)  // field 9; the state is field 3
	start, ok2 := parseUint(f[19], 10) // field 22
	if !ok1 || !ok2 {
		return stat{}, parseError("stat", b)
	}
	const kthread = 0x00200000 // PF_KTHREAD of linux/sched.h
	return stat{string(b[open+1 : end]), f[0][0], flags&kthread != 0, start}, nil
}

// parseUID returns the real user id of /proc/PID/status. The Name line comes
// first and the kernel escapes a newline in it.
func parseUID(b []byte) (uint32, error) {
	for line := range bytes.Lines(b) {
		rest, ok := bytes.CutPrefix(line, []byte("Uid:\t"))
		if !ok {
			continue
		}
		f, _, _ := bytes.Cut(rest, []byte{'\t'})
		n, ok := parseUint(f, 10)
		if !ok || n > 0xffffffff {
			return 0, parseError("status", line)
		}
		return uint32(n), nil
	}
	return 0, parseError("status", nil)
}

// parseSwaps returns the swap files of /proc/swaps, without partitions. Names
// are escaped like those of mountinfo.
func parseSwaps(b []byte) []string {
	var out []string
	for line := range bytes.Lines(b) {
		f := bytes.Fields(line)
		if len(f) >= 5 && string(f[len(f)-4]) == "file" && line[0] == '/' {
			// Spaces of the name are escaped, so it is the first field.
			out = append(out, unescape(f[0]))
		}
	}
	return out
}

// namespaceLink parses "mnt:[4026531841]", the root of a bind-mounted namespace
// and the text of /proc/PID/ns links.
func namespaceLink(s string) (kind string, inode uint64, ok bool) {
	kind, rest, ok := strings.Cut(s, ":[")
	num, closed := strings.CutSuffix(rest, "]")
	inode, isNum := parseUint([]byte(num), 10)
	if !ok || !closed || !isNum {
		return "", 0, false
	}
	return kind, inode, true
}

// watch is an inotify or fanotify mark on an inode (proc_pid_fdinfo(5)).
type watch struct {
	file   FileID
	handle []byte // to open the inode by (open_by_handle_at(2)); nil when not printed
	kind   int32  // of the handle
}

// parseWatches reads the marks from the fdinfo of an inotify or fanotify
// descriptor:
//
//	inotify wd:1 ino:9e7e sdev:800013 mask:800afce ignored_mask:0 fhandle-bytes:8 fhandle-type:1 f_handle:7e9e0000640d1b6d
func parseWatches(b []byte) []watch {
	var out []watch
	for line := range bytes.Lines(b) {
		if !bytes.HasPrefix(line, []byte("inotify ")) && !bytes.HasPrefix(line, []byte("fanotify ino:")) {
			continue
		}
		var w watch
		var have int
		for _, f := range strings.Fields(string(line)) {
			key, val, _ := strings.Cut(f, ":")
			n, ok := parseUint([]byte(val), 16)
			switch {
			case key == "ino" && ok:
				w.file.Ino = n
				have |= 1
			case key == "sdev" && ok:
				w.file.Dev = kernelDev(n)
				have |= 2
			case key == "fhandle-type" && ok && n <= 0x7fffffff:
				w.kind = int32(n)
			case key == "f_handle":
				if h, ok := unhex(val); ok && len(h) <= 128 { // MAX_HANDLE_SZ
					w.handle = h
				}
			}
		}
		if have == 3 {
			out = append(out, w)
		}
	}
	return out
}

func unhex(s string) ([]byte, bool) {
	out := make([]byte, len(s)/2)
	for i := range out {
		n, ok := parseUint([]byte(s[2*i:2*i+2]), 16)
		if !ok {
			return nil, false
		}
		out[i] = byte(n)
	}
	return out, len(s)%2 == 0 && len(s) > 0
}

// kernelDev turns the kernel's own device number (MKDEV of linux/kdev_t.h: 12
// bits, 20 bits) into st_dev.
func kernelDev(n uint64) uint64 { return unix.Mkdev(uint32(n>>20)&0xfff, uint32(n)&0xfffff) }

// parseRingFiles returns the names of the files registered with an io_uring,
// from its fdinfo. They stay open though no descriptor shows them.
func parseRingFiles(b []byte) []string {
	var out []string
	in := false
	for line := range bytes.Lines(b) {
		line = bytes.TrimSuffix(line, []byte{'\n'})
		switch {
		case bytes.HasPrefix(line, []byte("UserFiles:")):
			in = true
		case in:
			num, name, ok := bytes.Cut(line, []byte(": "))
			if _, isNum := parseUint(bytes.TrimLeft(num, " "), 10); !ok || !isNum {
				return out
			}
			if len(name) > 0 && name[0] == '/' {
				out = append(out, unescape(name))
			}
		}
	}
	return out
}

// bound is a unix socket bound to a name in a filesystem.
type bound struct {
	socket uint64 // inode in sockfs, as in "socket:[...]"
	file   FileID // the bound name; the inode number is cut to 32 bits
	name   string // as given to bind(2): may be relative, may be gone
}

// errDiag is the kernel's refusal to dump sockets.
var errDiag = errors.New("malformed socket dump")

// parseUnixDiag reads one datagram of a unix_diag dump (sock_diag(7)) and calls
// f for every socket that is bound in a filesystem. done is true at the end of
// the dump.
func parseUnixDiag(b []byte, f func(bound)) (done bool, err error) {
	native := binary.NativeEndian
	for len(b) >= unix.SizeofNlMsghdr {
		n := int(native.Uint32(b))
		if n < unix.SizeofNlMsghdr || n > len(b) {
			return false, errDiag
		}
		body := b[unix.SizeofNlMsghdr:n]
		switch native.Uint16(b[4:]) {
		case unix.NLMSG_DONE:
			return true, nil
		case unix.NLMSG_ERROR:
			if len(body) < 4 {
				return false, errDiag
			}
			return false, unix.Errno(-int32(native.Uint32(body)))
		case unix.SOCK_DIAG_BY_FAMILY:
			if len(body) < 16 { // struct unix_diag_msg
				return false, errDiag
			}
			s := bound{socket: uint64(native.Uint32(body[4:]))}
			has := false
			for a := body[16:]; len(a) >= 4; {
				l := int(native.Uint16(a))
				if l < 4 || l > len(a) {
					return false, errDiag
				}
				val := a[4:l]
				switch native.Uint16(a[2:]) {
				case 0: // UNIX_DIAG_NAME
					s.name = strings.TrimRight(string(val), "\x00")
				case 1: // UNIX_DIAG_VFS
					if len(val) < 8 {
						return false, errDiag
					}
					s.file = FileID{kernelDev(uint64(native.Uint32(val[4:]))), uint64(native.Uint32(val))}
					has = true
				}
				a = a[min(len(a), (l+3)&^3):]
			}
			if has {
				f(s)
			}
		}
		b = b[min(len(b), (n+3)&^3):]
	}
	if len(b) != 0 {
		return false, errDiag
	}
	return false, nil
}
