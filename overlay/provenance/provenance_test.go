package provenance

import (
	"encoding/json"
	"errors"
	"fmt"
	"strings"
	"testing"

	"github.com/google/go-cmp/cmp"

	"overkeep/overlay/drv"
	"overkeep/overlay/drv/storepath"
	"overkeep/policy/graph"
)

const dir = storepath.Dir

// The NAR hash of nothing in particular, and the paths that follow from it.
const (
	hashA = "sha256-47DEQpj8HBSa+/TImW+5JCeuQeRkm5NMpJWZG3hSuFU="
	hashB = "sha256-AAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAA="
)

func source(t testing.TB, hash, name string) string {
	t.Helper()
	h, err := storepath.ParseHash(hash)
	if err != nil {
		t.Fatal(err)
	}
	p, err := storepath.Fixed(dir, name, storepath.NAR, h)
	if err != nil {
		t.Fatal(err)
	}
	return strings.TrimPrefix(p, dir+"/")
}

func base(name string) string { return strings.Repeat("0", 32) + "-" + name }

// lockText is a lock file whose node "in" has the given JSON members.
func lockText(members string) string {
	return `{"version":7,"root":"root","nodes":{"root":{"inputs":{"in":"in"}},"in":{` + members + `}}}`
}

func TestLock(t *testing.T) {
	a := source(t, hashA, "source")
	for _, c := range []struct {
		name, in string
		want     []Record
	}{
		{"github", lockText(`"locked":{"type":"github","owner":"NixOS","repo":"nixpkgs","rev":"0123","narHash":"` + hashA + `","lastModified":1},
			"original":{"type":"github","owner":"NixOS","repo":"nixpkgs","ref":"nixos-26.05"}`),
			[]Record{{Path: a, From: []string{"github:NixOS/nixpkgs/0123", "github:NixOS/nixpkgs/nixos-26.05"}, How: ByLock}}},
		{"git over ssh, indirect", lockText(`"locked":{"type":"git","url":"ssh://git@git.acme.example/payroll","rev":"89ab","ref":"refs/heads/main","narHash":"` + hashA + `"},
			"original":{"type":"indirect","id":"payroll"}`),
			[]Record{{Path: a, From: []string{"git+ssh://git@git.acme.example/payroll?ref=refs%2Fheads%2Fmain&rev=89ab", "flake:payroll"}, How: ByLock}}},
		{"one URL twice", lockText(`"locked":{"type":"tarball","url":"https://example.org/x.tar.gz","narHash":"` + hashA + `"},"original":{"type":"tarball","url":"https://example.org/x.tar.gz"}`),
			[]Record{{Path: a, From: []string{"https://example.org/x.tar.gz"}, How: ByLock}}},
		{"version 5 has info", strings.Replace(lockText(`"info":{"narHash":"`+hashA+`"},"locked":{"type":"path","path":"/home/u/x"}`), `"version":7`, `"version":5`, 1),
			[]Record{{Path: a, From: []string{"path:/home/u/x"}, How: ByLock}}},
		{"a name of its own", lockText(`"locked":{"type":"file","url":"https://a/x","name":"x","narHash":"` + hashA + `"}`),
			[]Record{{Path: source(t, hashA, "x"), From: []string{"https://a/x"}, How: ByLock}}},
		{"relative path: no hash, no record", lockText(`"locked":{"type":"path","path":"./sub"},"original":{"type":"path","path":"./sub"},"parent":[]`), nil},
		{"unknown type", lockText(`"locked":{"type":"ftp","url":"ftp://a","narHash":"` + hashA + `"}`), nil},
		{"no inputs", `{"version":7,"root":"root","nodes":{"root":{}}}`, nil},
	} {
		got, err := Lock(dir, []byte(c.in))
		if err != nil {
			t.Errorf("%s: %v", c.name, err)
		}
		if diff := cmp.Diff(c.want, got); diff != "" {
			t.Errorf("%s: %s", c.name, diff)
		}
	}
}

func TestURL(t *testing.T) {
	for in, want := range map[string]string{
		`{"type":"gitlab","owner":"a%2Fb","repo":"c","rev":"r","host":"git.example.org","dir":"x y"}`: "gitlab:a%2Fb/c/r?host=git.example.org&dir=x+y",
		`{"type":"sourcehut","owner":"~u","repo":"c"}`:                                                "sourcehut:~u/c",
		`{"type":"github","owner":"","repo":"c"}`:                                                     "",
		`{"type":"git","url":"https://user:secret@example.org/x","rev":"r"}`:                          "git+https://user:secret@example.org/x?rev=r", // clean comes later
		`{"type":"git","url":"git+https://example.org/x?a=b","rev":"r"}`:                              "git+https://example.org/x?a=b&rev=r",
		`{"type":"git","url":"git://example.org/x"}`:                                                  "git://example.org/x",
		`{"type":"git","url":"/home/u/x"}`:                                                            "git+file:///home/u/x",
		`{"type":"git","url":"file:///home/u/x"}`:                                                     "git+file:///home/u/x",
		`{"type":"git"}`: "",
		`{"type":"mercurial","url":"https://example.org/x","rev":"r"}`: "hg+https://example.org/x?rev=r",
		`{"type":"indirect","id":"nixpkgs","ref":"a","rev":"b"}`:       "flake:nixpkgs/a/b",
		`{"type":"path"}`:           "",
		`{"type":1}`:                "",
		`{}`:                        "",
		`{"type":"path","path":[]}`: "",
	} {
		var attrs map[string]any
		if err := json.Unmarshal([]byte(in), &attrs); err != nil {
			t.Fatal(err)
		}
		if got := URL(attrs); got != want {
			t.Errorf("%s: %q", in, got)
		}
	}
}

func TestClean(t *testing.T) {
	for in, want := range map[string]string{
		"https://u:p@h/x?a=@b":      "https://h/x?a=@b",
		"https://token@h/x":         "https://h/x",
		"git+https://t:x@h:1/x":     "git+https://h:1/x",
		"git+ssh://git:p@h/x":       "git+ssh://git@h/x",
		"git+ssh://git@h/x":         "git+ssh://git@h/x",
		"https://u:p@x@h/":          "https://h/",
		"https://h/u:p@x":           "https://h/u:p@x",
		"https://h?u:p@x":           "https://h?u:p@x",
		"path:/home/u:p@x":          "path:/home/u:p@x",
		"MIT":                       "MIT",
		"":                          "",
		"a\nb":                      "",
		"a\x00b":                    "",
		"\xff":                      "",
		strings.Repeat("x", 4097):   "",
		"ftp://%zz:secret@[::1/":    "ftp://%zz@[::1/",
		"svn+http://a:b@c":          "svn+http://c",
		"https://user:p%40ss@h:8/x": "https://h:8/x",
	} {
		got, ok := clean(in)
		if got != want || ok != (want != "") {
			t.Errorf("%.50q: %q %v", in, got, ok)
		}
		if again, ok2 := clean(got); ok && (again != got || !ok2) {
			t.Errorf("%.50q: not at rest: %q", in, again)
		}
	}
}

func TestHostileLock(t *testing.T) {
	many := func(n int) string {
		var b strings.Builder
		b.WriteString(`{"version":7,"root":"root","nodes":{"root":{}`)
		for i := range n {
			fmt.Fprintf(&b, `,"n%d":{"locked":{}}`, i)
		}
		return b.String() + "}}"
	}
	for _, c := range []struct {
		name, in string
		want     error
	}{
		{"empty", "", ErrInput},
		{"null", "null", ErrInput},
		{"a list", "[]", ErrInput},
		{"two values", `{"version":7} {}`, ErrInput},
		{"cut", lockText("")[:30], ErrInput},
		{"not UTF-8", "{\"version\":7,\"\xff\":1}", ErrInput},
		{"deep", strings.Repeat(`{"a":`, 1<<20), ErrInput},
		{"deep lists", `{"a":` + strings.Repeat(`[`, 1<<20), ErrInput},
		{"no version", `{"root":"r","nodes":{"r":{}}}`, ErrVersion},
		{"version 4", `{"version":4,"root":"r","nodes":{"r":{}}}`, ErrVersion},
		{"version 8", `{"version":8,"root":"r","nodes":{"r":{}}}`, ErrVersion},
		{"version 7.0", `{"version":7.0,"root":"r","nodes":{"r":{}}}`, ErrVersion},
		{"version as text", `{"version":"7","root":"r","nodes":{"r":{}}}`, ErrVersion},
		{"no nodes", `{"version":7,"root":"r"}`, ErrInput},
		{"no root", `{"version":7,"nodes":{"r":{}}}`, ErrInput},
		{"root is no node", `{"version":7,"root":"x","nodes":{"r":{}}}`, ErrInput},
		{"node is a text", `{"version":7,"root":"r","nodes":{"r":{},"a":"b"}}`, ErrInput},
		{"not locked", lockText(``), ErrInput},
		{"hash of another function", lockText(`"locked":{"type":"file","url":"u","narHash":"sha1-2jmj7l5rSw0yVb/vlWAYkK/YBwk="}`), ErrInput},
		{"hash cut", lockText(`"locked":{"type":"file","url":"u","narHash":"` + hashA[:40] + `"}`), ErrInput},
		{"a name that is no name", lockText(`"locked":{"type":"file","url":"u","name":"../x","narHash":"` + hashA + `"}`), ErrInput},
		{"too many nodes", many(maxNodes), ErrSize},
		{"too long", strings.Repeat(" ", MaxInput) + "{}", ErrSize},
	} {
		if got, err := Lock(dir, []byte(c.in)); !errors.Is(err, c.want) || got != nil || len(err.Error()) > 1000 {
			t.Errorf("%s: %v %.500v", c.name, got, err)
		}
	}
}

func TestArchive(t *testing.T) {
	lockFile := `{"version":7,"root":"root","nodes":{
		"root":{"inputs":{"nixpkgs":"nixpkgs","util":"util","loop":["util","loop"]}},
		"nixpkgs":{"locked":{"type":"github","owner":"NixOS","repo":"nixpkgs","rev":"1"}},
		"util":{"inputs":{"nixpkgs":["nixpkgs"],"systems":"systems","loop":["loop"],"self":[]},"locked":{"type":"path","path":"/home/u/util"}},
		"systems":{"locked":{"type":"file","url":"https://example.org/systems"}}}}`
	in := fmt.Sprintf(`{"path":"%[1]s/%[2]s-source","inputs":{
		"nixpkgs":{"inputs":{},"path":"%[1]s/%[3]s-source"},
		"util":{"path":"%[1]s/%[4]s-source","inputs":{"nixpkgs":{"path":"%[1]s/%[3]s-source"},"systems":{"path":"%[1]s/%[5]s-source"},
			"loop":{"path":"%[1]s/%[6]s-source"},"unlocked":{"path":"%[1]s/%[6]s-source"}}},
		"relative":{"inputs":{}}}}`, dir,
		strings.Repeat("0", 32), strings.Repeat("1", 32), strings.Repeat("2", 32), strings.Repeat("3", 32), strings.Repeat("4", 32))
	p := func(n string) string { return strings.Repeat(n, 32) + "-source" }
	self := Record{Path: p("0"), From: []string{"git+ssh://me@example.org/flake"}, How: ByArchive}
	nixpkgs := Record{Path: p("1"), From: []string{"github:NixOS/nixpkgs/1"}, How: ByArchive}
	want := []Record{self, nixpkgs, {Path: p("2"), From: []string{"path:/home/u/util"}, How: ByArchive}, nixpkgs,
		{Path: p("3"), From: []string{"https://example.org/systems"}, How: ByArchive}}
	got, err := Archive(dir, []byte(in), []byte(lockFile), "git+ssh://me:pw@example.org/flake")
	if diff := cmp.Diff(want, got); diff != "" || err != nil {
		t.Errorf("%v %s", err, diff)
	}
	got, err = Archive(dir, []byte(in), nil, "")
	if err != nil || got != nil {
		t.Errorf("without URLs %v %v", got, err)
	}
	deep := strings.Repeat(`{"inputs":{"a":`, maxDepth+1) + `{}` + strings.Repeat(`}}`, maxDepth+1)
	var wide strings.Builder
	for i := range maxNodes + 1 {
		fmt.Fprintf(&wide, `,"%d":{}`, i)
	}
	for _, c := range []struct {
		name, in, lock string
		want           error
	}{
		{"empty", "", lockFile, ErrInput},
		{"a bad lock file", in, "{}", ErrVersion},
		{"path outside", `{"path":"/etc"}`, lockFile, ErrInput},
		{"path below", `{"path":"` + dir + "/" + p("0") + `/x"}`, lockFile, ErrInput},
		{"path is a number", `{"path":1}`, lockFile, ErrInput},
		{"inputs are a list", `{"inputs":[]}`, lockFile, ErrInput},
		{"input is a text", `{"inputs":{"a":"b"}}`, lockFile, ErrInput},
		{"deep", deep, lockFile, ErrSize},
		{"wide", `{"inputs":{` + wide.String()[1:] + `}}`, lockFile, ErrSize},
	} {
		if got, err := Archive(dir, []byte(c.in), []byte(c.lock), ""); !errors.Is(err, c.want) || got != nil {
			t.Errorf("%s: %v %.500v", c.name, got, err)
		}
	}
}

// Inputs that follow each other for ever, or that take exponential time to follow.
func TestFollowsEnd(t *testing.T) {
	inputs := `"x0":"leaf"`
	for i := 1; i < 60; i++ {
		inputs += fmt.Sprintf(`,"x%d":["x%d","x%d","x%d"]`, i, i-1, i-1, i-1)
	}
	lockFile := `{"version":7,"root":"r","nodes":{"r":{"inputs":{"a":["b"],"b":["a"],"c":["c","c"],"d":[1],"e":"none",` + inputs + `}},
		"leaf":{"inputs":{"x0":"leaf"},"locked":{"type":"file","url":"u"}}}}`
	in := `{"inputs":{"a":{"path":"` + dir + "/" + base("a") + `"},"c":{},"d":{},"e":{},"x59":{"path":"` + dir + "/" + base("x") + `"},"x0":{"path":"` + dir + "/" + base("y") + `"}}}`
	got, err := Archive(dir, []byte(in), []byte(lockFile), "")
	want := []Record{{Path: base("y"), From: []string{"u"}, How: ByArchive}}
	if diff := cmp.Diff(want, got); diff != "" || err != nil {
		t.Errorf("%v %s", err, diff)
	}
}

func TestMeta(t *testing.T) {
	p := func(s string) string { return `"` + dir + "/" + base(s) + `"` }
	rec := func(path string, unfree graph.Tri, licences ...string) Record {
		return Record{Path: base(path), Licences: licences, Unfree: unfree, How: ByMeta}
	}
	for _, c := range []struct {
		name, in string
		want     []Record
	}{
		{"everything", `{"overkeepMeta":1,"drvPath":` + p("x.drv") + `,"outPaths":[` + p("x") + `,` + p("x-dev") + `],"licence":["MIT","GPL-2.0-only"],"unfree":false}`,
			[]Record{rec("x.drv", graph.No, "MIT", "GPL-2.0-only"), rec("x", graph.No, "MIT", "GPL-2.0-only"), rec("x-dev", graph.No, "MIT", "GPL-2.0-only")}},
		{"a string", `{"overkeepMeta":1,"outPaths":` + p("x") + `,"licence":"unfree","unfree":true,"more":{}}`, []Record{rec("x", graph.Yes, "unfree")}},
		{"only unfree", `{"overkeepMeta":1,"outPaths":[` + p("x") + `],"licence":[],"unfree":true}`, []Record{rec("x", graph.Yes)}},
		{"only a licence", `{"overkeepMeta":1,"outPaths":[` + p("x") + `],"licence":["MIT",""],"unfree":null}`, []Record{rec("x", graph.Unknown, "MIT")}},
		{"nothing", `{"overkeepMeta":1,"outPaths":[` + p("x") + `]}`, nil},
		{"no paths", `{"overkeepMeta":1,"unfree":true}`, nil},
	} {
		got, err := Meta(dir, []byte(c.in))
		if diff := cmp.Diff(c.want, got); diff != "" || err != nil {
			t.Errorf("%s: %v %s", c.name, err, diff)
		}
	}
	for _, c := range []struct {
		name, in string
		want     error
	}{
		{"empty", "", ErrInput},
		{"no version", `{}`, ErrVersion},
		{"another version", `{"overkeepMeta":2}`, ErrVersion},
		{"another key", `{"OverkeepMeta":1}`, ErrVersion},
		{"unfree is a text", `{"overkeepMeta":1,"unfree":"yes"}`, ErrInput},
		{"a licence is a number", `{"overkeepMeta":1,"licence":[1]}`, ErrInput},
		{"licence is an object", `{"overkeepMeta":1,"licence":{}}`, ErrInput},
		{"path outside", `{"overkeepMeta":1,"unfree":true,"outPaths":["/etc"]}`, ErrInput},
		{"two derivations", `{"overkeepMeta":1,"drvPath":["a","b"]}`, ErrSize},
		{"too many licences", `{"overkeepMeta":1,"licence":["a"` + strings.Repeat(`,"a"`, maxTexts) + `]}`, ErrSize},
		{"too many paths", `{"overkeepMeta":1,"outPaths":["a"` + strings.Repeat(`,"a"`, maxPackage) + `]}`, ErrSize},
	} {
		if got, err := Meta(dir, []byte(c.in)); !errors.Is(err, c.want) || got != nil {
			t.Errorf("%s: %v %.500v", c.name, got, err)
		}
	}
}

func TestDerivation(t *testing.T) {
	h := strings.Repeat("0", 64)
	d := &drv.Derivation{
		Outputs: []drv.Output{{Name: "out", Path: dir + "/" + base("x.tar.gz"), HashAlgo: "sha256", Hash: h}},
		Env:     []drv.Var{{Name: "url", Value: "https://u:p@example.org/x.tar.gz"}, {Name: "urls", Value: "https://example.org/x.tar.gz mirror://gnu/x \xff"}},
	}
	want := []Record{{Path: base("x.tar.gz"), From: []string{"https://example.org/x.tar.gz", "mirror://gnu/x"}, How: ByDerivation}}
	if diff := cmp.Diff(want, Derivation(dir, d)); diff != "" {
		t.Error(diff)
	}
	built := *d
	built.Outputs = []drv.Output{{Name: "out", Path: dir + "/" + base("x")}}
	if got := Derivation(dir, &built); got != nil {
		t.Errorf("of a path that is not fixed: %v", got)
	}
	built = *d
	built.Env = nil
	if got := Derivation(dir, &built); got != nil {
		t.Errorf("without a URL: %v", got)
	}
}

// Whatever a parser makes, a Store takes.
func storable(t *testing.T, records []Record) {
	for _, r := range records {
		if err := r.check(); err != nil {
			t.Fatalf("%+v: %v", r, err)
		}
	}
}

func FuzzLock(f *testing.F) {
	f.Add([]byte(lockText(`"locked":{"type":"github","owner":"a","repo":"b","narHash":"` + hashA + `"}`)))
	f.Fuzz(func(t *testing.T, b []byte) {
		if records, err := Lock(dir, b); err == nil {
			storable(t, records)
		}
	})
}

func FuzzArchive(f *testing.F) {
	f.Add([]byte(`{"path":"`+dir+"/"+base("source")+`","inputs":{"in":{"path":"`+dir+"/"+base("source")+`"}}}`),
		[]byte(lockText(`"locked":{"type":"file","url":"u"}`)), "path:/x")
	f.Fuzz(func(t *testing.T, b, lockFile []byte, self string) {
		if records, err := Archive(dir, b, lockFile, self); err == nil {
			storable(t, records)
		}
	})
}

func FuzzMeta(f *testing.F) {
	f.Add([]byte(`{"overkeepMeta":1,"outPaths":["` + dir + "/" + base("x") + `"],"licence":["MIT"],"unfree":false}`))
	f.Fuzz(func(t *testing.T, b []byte) {
		if records, err := Meta(dir, b); err == nil {
			storable(t, records)
		}
	})
}
