package doctor

import (
	"reflect"
	"strings"
	"testing"
)

const swapHead = "Filename\t\t\t\tType\t\tSize\t\tUsed\t\tPriority\n"

func TestParseSwaps(t *testing.T) {
	for _, c := range []struct {
		name, in string
		want     []swap
		bad      bool
	}{
		{"none", swapHead, nil, false},
		{"partition", swapHead + "/dev/sda3                               partition\t8388604\t\t0\t\t-2\n", []swap{{Path: "/dev/sda3"}}, false},
		{"zram and file", swapHead + "/dev/zram0 partition 1 0 100\n/swapfile file 2 0 -3\n",
			[]swap{{Path: "/dev/zram0"}, {Path: "/swapfile", File: true}}, false},
		{"blank, tab, newline, backslash in the name", swapHead + `/a\040b\011c\012d\134e file 2 0 -3` + "\n",
			[]swap{{Path: "/a b\tc\nd\\e", File: true}}, false},
		{"deleted", swapHead + `/swapfile\040(deleted) file 2 0 -3` + "\n", []swap{{Path: "/swapfile", File: true, Deleted: true}}, false},
		{"deleted, old kernel", swapHead + "/swapfile (deleted) file 2 0 -3\n", []swap{{Path: "/swapfile", File: true, Deleted: true}}, false},
		{"no end of line", swapHead + "/dev/sda3 partition 1 0 -2", []swap{{Path: "/dev/sda3"}}, false},
		{"empty file", "", nil, true},
		{"no heading", "/dev/sda3 partition 1 0 -2\n", nil, true},
		{"cut off", swapHead + "/dev/sda3 part", nil, true},
		{"unknown kind", swapHead + "/dev/sda3 network 1 0 -2\n", nil, true},
		{"relative", swapHead + "swapfile file 1 0 -2\n", nil, true},
		{"escape cut off", swapHead + `/a\04 file 1 0 -2` + "\n", nil, true},
		{"escape not octal", swapHead + `/a\0x9 file 1 0 -2` + "\n", nil, true},
		{"escape beyond a byte", swapHead + `/a\777 file 1 0 -2` + "\n", nil, true},
		{"empty line", swapHead + "\n/dev/sda3 partition 1 0 -2\n", nil, true},
		{"too many fields", swapHead + "/dev/sda3 x partition 1 0 -2\n", nil, true},
		{"binary", swapHead + "\x00\xff\x1b[2J", nil, true},
	} {
		got, err := parseSwaps([]byte(c.in))
		if (err != nil) != c.bad || !c.bad && !reflect.DeepEqual(got, c.want) {
			t.Errorf("%s: %+v, %v", c.name, got, err)
		}
		if err != nil && strings.ContainsAny(err.Error(), "\x00\x1b") {
			t.Errorf("%s: the error repeats hostile bytes: %q", c.name, err)
		}
	}
}

func TestResumes(t *testing.T) {
	for in, want := range map[string]bool{
		"":                                false,
		"quiet splash\n":                  false,
		"resume=/dev/sda3":                true,
		"quiet resume=UUID=1-2 ro\n":      true,
		"resume=":                         false,
		"resume=/dev/sda3 noresume":       false,
		"resume=/dev/sda3 nohibernate":    false,
		"resume=/dev/sda3 hibernate=no":   false,
		"noresume resume=/dev/sda3":       true,
		"resume=/dev/sda3 resume=":        false,
		"xresume=/dev/sda3":               false,
		"noresumes resume_offset=12":      false,
		"-- resume=/dev/sda3":             false,
		"ro -- resume=/dev/sda3":          false,
		`x="a resume=/dev/sda3 b"`:        false,
		`"resume=/dev/sda3"`:              true,
		`resume="/dev/my disk"`:           true,
		`"unbalanced resume=/dev/sda3`:    false,
		"resume=/dev/sda3\x00":            true,
		"\xff\xfe resume=/dev/sda3":       true,
		"init=/bin/sh--resume=1":          false,
		strings.Repeat("a=b ", 1<<16):     false,
		strings.Repeat("\"", 1<<16) + " ": false,
	} {
		if got := resumes([]byte(in)); got != want {
			t.Errorf("%.60q: %v", in, got)
		}
	}
}

func TestGroupMembers(t *testing.T) {
	const file = "root:x:0:\nnixbld:x:30000:nixbld1,nixbld2, nixbld3 ,,\nempty:x:1:\nnixbld:x:2:second\nshort:x:1\nlong:x:1:a:b\n:x:3:nameless\n"
	for _, c := range []struct {
		in, name string
		want     []string
		found    bool
	}{
		{file, "nixbld", []string{"nixbld1", "nixbld2", "nixbld3"}, true},
		{file, "empty", nil, true},
		{file, "short", nil, false},
		{file, "long", nil, false},
		{file, "nix", nil, false},
		{file, "", nil, false},
		{"", "nixbld", nil, false},
		{"nixbld:x:30000:a", "nixbld", []string{"a"}, true},
		{"nixbld:x:30000:a\r\n", "nixbld", []string{"a"}, true},
		{"#nixbld:x:30000:a\n nixbld:x:1:b\n", "nixbld", nil, false},
		{"nixbld:x:30000:" + strings.Repeat("u,", 100000) + "\n", "nixbld", nil, true},
	} {
		got, found := groupMembers([]byte(c.in), c.name)
		if found != c.found || c.want != nil && !reflect.DeepEqual(got, c.want) {
			t.Errorf("%.40q in %.40q: %.80v, %v", c.name, c.in, got, found)
		}
	}
}

func TestParseSettings(t *testing.T) {
	got := parseSettings([]byte("sandbox = true\naccess-tokens = github.com=SECRET\nsandbox-paths =\nbuild-users-group =\nnonsense\n = x\nexperimental-features = a b=c\n"),
		"sandbox", "build-users-group", "experimental-features", "absent")
	want := map[string]string{"sandbox": "true", "build-users-group": "", "experimental-features": "a b=c"}
	if !reflect.DeepEqual(got, want) {
		t.Errorf("%q", got)
	}
}

func TestParseRelease(t *testing.T) {
	for in, want := range map[string]release{
		"6.18.44-fc": {6, 18}, "6.1.0-18-amd64": {6, 1}, "5.4": {5, 4}, "7.0-rc1": {7, 0},
		"": {}, "six": {}, "6": {}, "6.": {}, ".4": {}, "-6.1": {}, "6.x": {}, "99999999999.1": {}, "6.99999999": {},
	} {
		if got := parseRelease(in); got != want {
			t.Errorf("%q: %v", in, got)
		}
	}
	if !(release{5, 15}).less(release{6, 1}) || (release{6, 2}).less(release{6, 2}) || (release{5, 20}).less(release{5, 4}) {
		t.Error("releases are not ordered")
	}
}

func TestAES(t *testing.T) {
	entry := func(name, driver, priority, internal string) string {
		return "name         : " + name + "\ndriver       : " + driver + "\npriority     : " + priority + "\ninternal     : " + internal + "\n\n"
	}
	slow, fast := entry("xts(aes)", "xts(ecb(aes-generic))", "100", "no"), entry("xts(aes)", "xts-aes-aesni", "401", "no")
	for _, c := range []struct{ in, want string }{
		{"", ""}, {slow, "xts(ecb(aes-generic))"}, {slow + fast, "xts-aes-aesni"}, {fast + slow, "xts-aes-aesni"},
		{fast + entry("__xts(aes)", "cryptd", "900", "yes") + entry("xts(aes)", "inner", "900", "yes"), "xts-aes-aesni"},
		{entry("xts(aes)", "x", "many", "no"), ""}, {entry("xts(aes)", strings.Repeat("x", 4096), "9", "no"), ""},
		{entry("xts(aes)", "x", "-5", "no"), ""}, {strings.TrimSpace(fast), "xts-aes-aesni"}, {"\x00:\x00\n\n:\n", ""},
	} {
		if got := aesDriver([]byte(c.in)); got != c.want {
			t.Errorf("%.60q: %q", c.in, got)
		}
	}
	for in, want := range map[string]Answer{
		"flags\t\t: fpu vme aes xsave\n": Yes, "Features\t: fp asimd aes pmull\n": Yes, "features\t: esan3 msa\n": Yes,
		"flags\t\t: fpu vaes xsave\n": No, "model name\t: aes\n": Unsure, "": Unsure, "flags": Unsure, "bugs : aes\nflags :\n": No,
	} {
		if got := cpuAES([]byte(in)); got != want {
			t.Errorf("%q: %v", in, got)
		}
	}
}

func TestCoreDumps(t *testing.T) {
	for _, c := range []struct {
		in   string
		pid  bool
		want dump
	}{
		{"core\n", false, dumpFile}, {"/var/crash/%e.%p\n", false, dumpFile}, {"\n", false, dumpNowhere}, {"\n", true, dumpFile},
		{"|/bin/false\n", false, dumpNowhere}, {"| /usr/bin/true", false, dumpNowhere},
		{"|/usr/lib/systemd/systemd-coredump %P %u\n", false, dumpSystemd}, {"|/usr/share/apport/apport -p%p\n", false, dumpProgram},
		{"|", false, dumpProgram}, {"/bin/false", false, dumpFile}, {"|/x/false-not %p", false, dumpProgram},
	} {
		if got := coreDumps([]byte(c.in), c.pid); got != c.want {
			t.Errorf("%q: %v", c.in, got)
		}
	}
}

func TestLikeDebian(t *testing.T) {
	for in, want := range map[string]bool{
		"ID=debian\n": true, "NAME=x\nID=\"ubuntu\"\nID_LIKE=debian\n": true, "ID=pop\nID_LIKE=\"ubuntu debian\"\n": true,
		"ID=nixos\n": false, "ID=fedora\n": false, "": false, "XID=debian": false, "NAME=debian": false,
	} {
		if got := likeDebian([]byte(in)); got != want {
			t.Errorf("%q: %v", in, got)
		}
	}
}

func TestQuote(t *testing.T) {
	for in, want := range map[string]string{
		"/dev/sda3": "/dev/sda3", "": "''", "a b": "'a b'", "it's": `'it'\''s'`, "-x": "'-x'", "$(x)": "'$(x)'", "a\nb": "'a\nb'", "~": "'~'",
	} {
		if got := quote(in); got != want {
			t.Errorf("%q: %s", in, got)
		}
	}
}

// FuzzParsers feeds the same bytes to every parser of what the kernel or a file
// of the system says. None may panic, and what they return stays bounded.
func FuzzParsers(f *testing.F) {
	f.Add([]byte(swapHead + `/a\040b file 1 0 -2`))
	f.Add([]byte(`quiet "resume=/dev/x" -- x`))
	f.Add([]byte("nixbld:x:1:a,b\n"))
	f.Add([]byte("name : xts(aes)\ndriver : d\npriority : 3\n\n"))
	f.Fuzz(func(t *testing.T, b []byte) {
		swaps, err := parseSwaps(b)
		for _, s := range swaps {
			if err != nil || s.Path == "" || s.Path[0] != '/' || len(s.Path) > len(b) {
				t.Errorf("swap %q, %v", s.Path, err)
			}
		}
		if resumes(b) && !strings.Contains(strings.ReplaceAll(string(b), `"`, ""), "resume=") {
			t.Errorf("%q resumes", b)
		}
		members, found := groupMembers(b, "nixbld")
		if len(members) > 0 && !found {
			t.Error("members of a group that was not found")
		}
		for _, m := range members {
			if m == "" || strings.ContainsAny(m, ":,\n") {
				t.Errorf("member %q", m)
			}
		}
		for k := range parseSettings(b, "sandbox") {
			if k != "sandbox" {
				t.Errorf("setting %q was not asked for", k)
			}
		}
		if r := parseRelease(string(b)); r.major < 0 || r.minor < 0 || r.major > 1<<15 || r.minor > 1<<15 {
			t.Errorf("release %v", r)
		}
		if d := aesDriver(b); len(d) > 128 {
			t.Errorf("driver of %d bytes", len(d))
		}
		cpuAES(b)
		likeDebian(b)
		namesModule(b, "pam_overkeep")
		coreDumps(b, false)
		if s := oneLine(string(b)); strings.ContainsAny(s, "\n\t") || len([]rune(s)) > 301 {
			t.Errorf("not one line: %q", s)
		}
		if q := quote(string(b)); len(q) < len(b) {
			t.Errorf("quoted %q", q)
		}
	})
}
