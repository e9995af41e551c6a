package holder

import (
	"bufio"
	"bytes"
	"encoding/binary"
	"errors"
	"log/slog"
	"reflect"
	"slices"
	"strings"
	"testing"
	"unicode"

	"github.com/moby/sys/mountinfo"
	"golang.org/x/sys/unix"
)

func TestParseMount(t *testing.T) {
	tests := []struct {
		line string
		want mount
	}{
		{"36 35 98:0 /mnt1 /mnt2 rw,noatime master:1 - ext3 /dev/root rw,errors=continue",
			mount{36, 35, unix.Mkdev(98, 0), "/mnt1", "/mnt2", "ext3", "rw,errors=continue"}},
		{"276 185 0:51 / /mrg rw,relatime - overlay overlay rw,lowerdir=low,upperdir=mnt/u",
			mount{276, 185, unix.Mkdev(0, 51), "/", "/mrg", "overlay", "rw,lowerdir=low,upperdir=mnt/u"}},
		{`1 1 0:4 mnt:[4026532191] /run/a\040-\040b\012c\134 rw shared:1 master:2 propagate_from:3 - nsfs nsfs rw`,
			mount{1, 1, unix.Mkdev(0, 4), "mnt:[4026532191]", "/run/a - b\nc\\", "nsfs", "rw"}},
		// cifs shares with spaces, as old kernels print them
		{"1 2 0:9 / /s rw - cifs //srv/My Docs rw,unc=//srv/My Docs", mount{1, 2, unix.Mkdev(0, 9), "/", "/s", "cifs", "Docs rw,unc=//srv/My Docs"}},
		{"1 2 259:1048575 / /x rw - ext4 none", mount{1, 2, unix.Mkdev(259, 1048575), "/", "/x", "ext4", ""}},
	}
	for _, x := range tests {
		got, err := parseMount([]byte(x.line), false)
		if err != nil || got != x.want {
			t.Errorf("parseMount(%q) = %+v, %v; want %+v", x.line, got, err, x.want)
		}
	}
	for _, line := range []string{
		"", " ", "1", "1 2 3 4 5 6 7 8 9 10 11", "a 2 0:1 / / rw - x y z", "1 2 01 / / rw - x y z", "1 2 0:-1 / / rw - x y z",
		"-1 2 0:1 / / rw - x y z", "1 2 0:1 / / rw x y z", "1 2 4096:1 / / rw - x y z", "1 2 0:1048576 / / rw - x y z",
		"1 2 0:1 /", "18446744073709551616 2 0:1 / / rw - x y z", "+1 2 0:1 / / rw - x y z",
	} {
		var pe *ParseError
		if got, err := parseMount([]byte(line), false); !errors.As(err, &pe) {
			t.Errorf("parseMount(%q) = %+v, %v; want *ParseError", line, got, err)
		}
	}
}

// A line cut anywhere after the device still tells the device, and never panics.
func TestParseMountCut(t *testing.T) {
	line := "36 35 7:3 /very/long /mnt2 rw,noatime master:1 - ext4 /dev/root rw"
	for n := range line {
		m, err := parseMount([]byte(line[:n]), true)
		if n > len("36 35 7:3 ") && (err != nil || m.dev != unix.Mkdev(7, 3)) {
			t.Errorf("cut at %d: %+v, %v", n, m, err)
		}
	}
}

// A mount table with a line longer than the buffer is read to its end.
func TestEachLineLong(t *testing.T) {
	long := "1 2 7:1 /" + strings.Repeat("x", 3*maxLine) + " /p rw - ext4 a rw"
	in := strings.NewReader(long + "\n2 1 7:2 / /q rw - ext4 a rw\n3 1 7:3 / /r rw - ext4 a rw")
	var devs []uint64
	err := eachLine(in, bufio.NewReaderSize(nil, maxLine), func(line []byte, cut bool) error {
		m, err := parseMount(line, cut)
		devs = append(devs, m.dev)
		return err
	})
	want := []uint64{unix.Mkdev(7, 1), unix.Mkdev(7, 2), unix.Mkdev(7, 3)}
	if err != nil || !slices.Equal(devs, want) {
		t.Errorf("got %x, %v; want %x", devs, err, want)
	}
}

func FuzzParseMount(f *testing.F) {
	f.Add("36 35 98:0 /mnt1 /mnt2 rw,noatime master:1 - ext3 /dev/root rw,errors=continue")
	f.Add(`1 1 0:4 mnt:[1] /a\040-\040b rw shared:1 - nsfs nsfs rw`)
	f.Add("1 2 0:51 / /m rw - overlay overlay rw,lowerdir=/a\\:b:/c::/d,upperdir=/u\\,v")
	f.Fuzz(func(t *testing.T, line string) {
		m, err := parseMount([]byte(line), false)
		layers(m)
		_, _ = parseMount([]byte(line), true)
		if err != nil || strings.ContainsAny(line, "\n\r") {
			return
		}
		// What the kernel can print, the other parser reads the same: fields that
		// are not empty, one separator.
		if strings.Contains(line, "  ") || strings.Count(line, " - ") != 1 || strings.HasSuffix(line, " ") || m.super == "" || strings.Contains(m.super, " ") {
			return
		}
		other, err := mountinfo.GetMountsFromReader(strings.NewReader(line), nil)
		if err != nil || len(other) != 1 {
			return
		}
		o := other[0]
		if m.id>>62 == 0 && uint64(o.ID) != m.id || unix.Mkdev(uint32(o.Major), uint32(o.Minor)) != m.dev {
			t.Errorf("%q: got %+v, other parser %+v", line, m, o)
		}
		if !strings.Contains(line, `\2`) && !strings.Contains(line, `\3`) && (o.Root != m.root || o.Mountpoint != m.point || o.FSType != m.fstype || o.VFSOptions != m.super) {
			t.Errorf("%q: got %+v, other parser %+v", line, m, o)
		}
	})
}

func TestLayers(t *testing.T) {
	tests := []struct {
		super string
		want  []string
	}{
		{"rw,lowerdir=/nix/store,upperdir=/k/u,workdir=/k/w,xino=on", []string{"/nix/store", "/k/u", "/k/w"}},
		{`ro,lowerdir=/a\:b:/c::/d\054e`, []string{"/a:b", "/c", "/d,e"}},
		{`rw,lowerdir=/x\134,y,upperdir=/u`, []string{`/x\`, "/u"}},
		{"rw,lowerdir+=/a,lowerdir+=/b,datadir+=/c", []string{"/a", "/b", "/c"}},
		{"rw", nil}, {"", nil}, {`lowerdir=\`, []string{`\`}}, {"lowerdir=:::", nil},
	}
	for _, x := range tests {
		if got := layers(mount{fstype: "overlay", super: x.super}); !slices.Equal(got, x.want) {
			t.Errorf("layers(%q) = %q, want %q", x.super, got, x.want)
		}
	}
	if got := layers(mount{fstype: "ext4", super: "rw,lowerdir=/x"}); got != nil {
		t.Errorf("ext4 has layers %q", got)
	}
}

func TestParseMapping(t *testing.T) {
	tests := []struct {
		line string
		want mapping
	}{
		{"7f0ceb46b000-7f0ceb46c000 r--s 00000000 00:33 9977901                    /tmp/h/mrg/file",
			mapping{0x7f0ceb46b000, 0x7f0ceb46c000, unix.Mkdev(0, 0x33), 9977901, []byte("/tmp/h/mrg/file")}},
		{"1-2 rw-p 00000000 00:00 0 ", mapping{1, 2, 0, 0, []byte{}}},
		{"1-2 rw-p 00000000 00:00 0", mapping{1, 2, 0, 0, []byte{}}},
		{`1-2 rw-p 0 103:fffff 7 /a\012b (deleted)`, mapping{1, 2, unix.Mkdev(0x103, 0xfffff), 7, []byte(`/a\012b (deleted)`)}},
	}
	for _, x := range tests {
		got, err := parseMapping([]byte(x.line))
		if err != nil || !reflect.DeepEqual(got, x.want) && string(got.path) != string(x.want.path) {
			t.Errorf("parseMapping(%q) = %+v, %v; want %+v", x.line, got, err, x.want)
		}
	}
	for _, line := range []string{"", "1-2", "12 rw-p 0 0:0 0", "1-2 rw-p 0 00 0", "1-2 rw-p 0 g:0 0", "1-2 rw-p 0 0:0 x", "1-2 rw-p 0 1000:0 0", "1-x rw-p 0 0:0 0", "-1-2 rw-p 0 0:0 0"} {
		if got, err := parseMapping([]byte(line)); err == nil {
			t.Errorf("parseMapping(%q) = %+v, want error", line, got)
		}
	}
}

func FuzzParseMapping(f *testing.F) {
	f.Add([]byte("7f0ceb46b000-7f0ceb46c000 r--s 00000000 00:33 9977901                    /tmp/h/mrg/file"))
	f.Add([]byte("1-2 rw-p 0 0:0 0"))
	f.Fuzz(func(t *testing.T, line []byte) {
		if m, err := parseMapping(line); err == nil && !bytes.HasSuffix(line, m.path) {
			t.Errorf("%q: path %q", line, m.path)
		}
	})
}

func TestParseStat(t *testing.T) {
	tail := " S 1 2 3 4 5 6 7 8 9 10 11 12 13 14 15 16 17 18 987654 20 21"
	tests := []struct {
		line, comm string
		start      uint64
	}{
		{"1 (init)" + tail, "init", 987654},
		{"1 (a b) S 1 1 1 (c)" + tail, "a b) S 1 1 1 (c", 987654}, // a name made to fool
		{"1 ()" + tail, "", 987654},
		{"1 (x\ny\x1b[2J)" + tail, "x\ny\x1b[2J", 987654},
	}
	for _, x := range tests {
		got, err := parseStat([]byte(x.line))
		if err != nil || got.comm != x.comm || got.start != x.start || got.state != 'S' {
			t.Errorf("parseStat(%q) = %+v, %v", x.line, got, err)
		}
	}
	for _, line := range []string{"", "1 (x", "1 x)", ")(", "1 (x) S 1 2", "1 (x) SS 1 2 3 4 5 6 7 8 9 10 11 12 13 14 15 16 17 18 1 1", strings.Replace("1 (x)"+tail, "987654", "-1", 1)} {
		if got, err := parseStat([]byte(line)); err == nil {
			t.Errorf("parseStat(%q) = %+v, want error", line, got)
		}
	}
}

func FuzzParseStat(f *testing.F) {
	f.Add([]byte("1 (a b) S 1 1) S 1 2 3 4 5 6 7 8 9 10 11 12 13 14 15 16 17 18 987654 20 21"))
	f.Fuzz(func(t *testing.T, line []byte) { _, _ = parseStat(line) })
}

func TestParseUID(t *testing.T) {
	if got, err := parseUID([]byte("Name:\tUid:\\n\nState:\tS\nUid:\t1000\t0\t0\t0\nGid:\t5\t5\t5\t5\n")); err != nil || got != 1000 {
		t.Errorf("got %d, %v", got, err)
	}
	for _, s := range []string{"", "Uid:\t\n", "Uid:\tx\t0\n", "Uid:\t4294967296\t0\n", "Uid: 5\n"} {
		if got, err := parseUID([]byte(s)); err == nil {
			t.Errorf("parseUID(%q) = %d, want error", s, got)
		}
	}
}

func TestParseSwaps(t *testing.T) {
	in := "Filename\t\t\t\tType\t\tSize\t\tUsed\t\tPriority\n" +
		"/dev/dm-1                               partition\t999420\t\t0\t\t-2\n" +
		"/swap\\040file\\040(deleted)               file\t\t1024\t\t0\t\t-3\n" +
		"file file file file file\n/x file 1\n/y partition 1 2 3\n"
	if got, want := parseSwaps([]byte(in)), []string{"/swap file (deleted)"}; !slices.Equal(got, want) {
		t.Errorf("got %q, want %q", got, want)
	}
}

func TestNamespaceLink(t *testing.T) {
	for s, want := range map[string]uint64{"mnt:[4026531841]": 4026531841, "net:[1]": 1, "mnt:[]": 0, "mnt:[x]": 0, "mnt:1": 0, "": 0, "mnt:[1": 0, "/": 0} {
		if _, got, ok := namespaceLink(s); got != want || ok != (want != 0) {
			t.Errorf("namespaceLink(%q) = %d, %v", s, got, ok)
		}
	}
}

func TestParseWatches(t *testing.T) {
	in := "pos:\t0\nflags:\t02000000\nmnt_id:\t15\nino:\t1\n" +
		"inotify wd:1 ino:9e7e sdev:800013 mask:800afce ignored_mask:0 fhandle-bytes:8 fhandle-type:1 f_handle:7e9e0000640d1b6d\n" +
		"inotify wd:2 ino:5 sdev:700001 mask:1\n" +
		"fanotify flags:10 event-flags:0\nfanotify mnt_id:12 mflags:0 mask:38 ignored_mask:40000000\n" +
		"fanotify ino:4f969 sdev:800013 mflags:0 mask:3b ignored_mask:40000000 fhandle-bytes:8 fhandle-type:1 f_handle:69f90400c275b5b4\n"
	got := parseWatches([]byte(in))
	if len(got) != 3 {
		t.Fatalf("got %d watches: %+v", len(got), got)
	}
	if got[0].file != (FileID{unix.Mkdev(8, 0x13), 0x9e7e}) || len(got[0].handle) != 8 || got[0].kind != 1 {
		t.Errorf("got %+v", got[0])
	}
	if got[1].file != (FileID{unix.Mkdev(7, 1), 5}) || got[1].handle != nil {
		t.Errorf("got %+v", got[1])
	}
	for _, s := range []string{
		"inotify ", "inotify ino: sdev:", "inotify ino:1", "inotify sdev:1", "inotify ino:x sdev:y", "inotify wd ino sdev",
	} {
		if got := parseWatches([]byte(s)); len(got) != 0 {
			t.Errorf("parseWatches(%q) = %+v", s, got)
		}
	}
	long := "inotify ino:1 sdev:1 fhandle-type:ffffffffff f_handle:" + strings.Repeat("ab", 4096)
	if got := parseWatches([]byte(long)); len(got) != 1 || got[0].handle != nil {
		t.Errorf("an overlong handle was taken: %d bytes", len(got[0].handle))
	}
}

func FuzzFdinfo(f *testing.F) {
	f.Add([]byte("inotify wd:1 ino:9e7e sdev:800013 mask:800afce ignored_mask:0 fhandle-bytes:8 fhandle-type:1 f_handle:7e9e0000640d1b6d\n"))
	f.Add([]byte("UserFiles:\t2\n    0: /a\\040b\n    1: <none>\nUserBufs:\t0\n"))
	f.Add([]byte("/x file 1 2 3\nUid:\t1\t\n"))
	f.Fuzz(func(t *testing.T, b []byte) {
		for _, w := range parseWatches(b) {
			if len(w.handle) > 128 {
				t.Errorf("handle of %d bytes", len(w.handle))
			}
		}
		for _, s := range append(parseRingFiles(b), parseSwaps(b)...) {
			if s == "" {
				t.Error("empty name")
			}
		}
		_, _ = parseUID(b)
	})
}

func TestParseRingFiles(t *testing.T) {
	in := "SqMask:\t0x3\nUserFiles:\t3\n    0: /a\\040b\n    1: <none>\n    2: /c\nUserBufs:\t1\n    0: /not/a/file\n"
	if got, want := parseRingFiles([]byte(in)), []string{"/a b", "/c"}; !slices.Equal(got, want) {
		t.Errorf("got %q, want %q", got, want)
	}
}

// diag builds a dump of one socket for the parser.
func diag(ino uint32, name string, vfs ...uint32) []byte {
	native := binary.NativeEndian
	body := make([]byte, 16)
	native.PutUint32(body[4:], ino)
	attr := func(kind uint16, val []byte) {
		head := native.AppendUint16(native.AppendUint16(nil, uint16(4+len(val))), kind)
		body = append(append(body, head...), val...)
		for len(body)%4 != 0 {
			body = append(body, 0)
		}
	}
	if name != "" {
		attr(0, []byte(name))
	}
	if len(vfs) == 2 {
		attr(1, native.AppendUint32(native.AppendUint32(nil, vfs[0]), vfs[1]))
	}
	return message(unix.SOCK_DIAG_BY_FAMILY, body)
}

func message(kind uint16, body []byte) []byte {
	native := binary.NativeEndian
	b := native.AppendUint32(nil, uint32(16+len(body)))
	b = native.AppendUint16(b, kind)
	b = append(b, make([]byte, 10)...)
	return append(b, body...)
}

func TestParseUnixDiag(t *testing.T) {
	in := slices.Concat(diag(5, "/run/x\x00", 77, 8<<20|3), diag(6, "\x00abstract"), diag(7, "rel", 78, 0x33), message(unix.NLMSG_DONE, make([]byte, 4)))
	var got []bound
	done, err := parseUnixDiag(in, func(b bound) { got = append(got, b) })
	want := []bound{{5, FileID{unix.Mkdev(8, 3), 77}, "/run/x"}, {7, FileID{unix.Mkdev(0, 0x33), 78}, "rel"}}
	if !done || err != nil || !slices.Equal(got, want) {
		t.Errorf("got %+v, %v, %v; want %+v", got, done, err, want)
	}
	if _, err := parseUnixDiag(message(unix.NLMSG_ERROR, binary.NativeEndian.AppendUint32(nil, ^uint32(1))), nil); !errors.Is(err, unix.ENOENT) {
		t.Errorf("got %v, want ENOENT", err)
	}
	whole := diag(5, "/run/x", 77, 3)
	for n := 1; n < len(whole); n++ {
		if _, err := parseUnixDiag(whole[:n], func(bound) { t.Errorf("cut at %d gave a socket", n) }); err == nil {
			t.Errorf("cut at %d: no error", n)
		}
	}
	bad := slices.Clone(whole)
	binary.NativeEndian.PutUint16(bad[32:], 3) // an attribute shorter than its header
	if _, err := parseUnixDiag(bad, func(bound) {}); err == nil {
		t.Error("an attribute of length 3 was taken")
	}
}

func FuzzParseUnixDiag(f *testing.F) {
	f.Add(slices.Concat(diag(5, "/run/x\x00", 77, 3), message(unix.NLMSG_DONE, nil)))
	f.Add(message(unix.NLMSG_ERROR, []byte{1, 2}))
	f.Fuzz(func(t *testing.T, b []byte) {
		_, _ = parseUnixDiag(b, func(x bound) {
			if len(x.name) > len(b) {
				t.Error("name longer than the input")
			}
		})
	})
}

// Nothing that a stranger can name reaches a terminal unescaped.
func TestPrintable(t *testing.T) {
	for in, want := range map[string]string{
		"":                            "",
		"/nix/store/x y":              "/nix/store/x y",
		`vim "a"`:                     `vim "a"`,
		"a\nb\x1b[2Jc":                `a\nb\x1b[2Jc`,
		"\u202egpj.exe":               `\u202egpj.exe`,
		"\xff\xfe":                    `\xff\xfe`,
		`a\nb`:                        `a\\nb`,
		`\"`:                          `\\"`,
		"é\u00ad\u2028":               "é\\u00ad\\u2028",
		strings.Repeat("x", 100):      strings.Repeat("x", 64) + "...",
		strings.Repeat("x", 63) + "é": strings.Repeat("x", 63) + `\xc3...`,
	} {
		if got := printable(in, 64); got != want {
			t.Errorf("printable(%q) = %q, want %q", in, got, want)
		}
	}
}

func FuzzPrintable(f *testing.F) {
	f.Add("a\nb\x1b[2J\u202e")
	f.Fuzz(func(t *testing.T, s string) {
		for _, r := range printable(s, 512) {
			if !unicode.IsPrint(r) {
				t.Errorf("%q: %q is left", s, r)
			}
		}
	})
}

func TestHolderString(t *testing.T) {
	h := Holder{PID: 7, UID: 1000, Command: "vim x", Holds: []Hold{{OpenFile, "/k/a"}, {MappedFile, "/k/b"}}, More: 3}
	if got, want := h.String(), "7 (uid 1000) vim x: open file /k/a; mapped file /k/b; and 3 more"; got != want {
		t.Errorf("got %q, want %q", got, want)
	}
	var b strings.Builder
	slog.New(slog.NewTextHandler(&b, nil)).Info("held", "by", h)
	if strings.Contains(b.String(), "/k/") || strings.Contains(b.String(), "vim") || !strings.Contains(b.String(), "by.pid=7") {
		t.Errorf("log line %q", b.String())
	}
}
