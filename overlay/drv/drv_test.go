package drv

import (
	"archive/tar"
	"bytes"
	"errors"
	"io"
	"path"
	"slices"
	"strings"
	"testing"

	"github.com/google/go-cmp/cmp"
	"pgregory.net/rapid"

	"overkeep/overlay/drv/storepath"
	"overkeep/tests/need"
)

const dir = storepath.Dir

func sp(name string) string { return dir + "/" + strings.Repeat("0", 32) + "-" + name }

// plain is a derivation with everything in it that an ordinary one has.
var plain = Derivation{
	Outputs:   []Output{{Name: "dev", Path: sp("x-dev")}, {Name: "out", Path: sp("x")}},
	InputDrvs: []Input{{sp("a.drv"), []string{"dev", "out"}}, {sp("b.drv"), []string{"out"}}},
	InputSrcs: []string{sp("builder.sh"), sp("source")},
	Platform:  "x86_64-linux", Builder: sp("bash") + "/bin/bash",
	Args: []string{"-e", "", "echo \"$out\" > \\tmp\n\t\r"},
	Env:  []Var{{"", "empty name"}, {"name", "x"}, {"url", "https://example.org/x.tar.gz"}, {"ü", "\x00\x7f\xff"}},
}

const plainText = `Derive([("dev","/nix/store/00000000000000000000000000000000-x-dev","",""),("out","/nix/store/00000000000000000000000000000000-x","","")],` +
	`[("/nix/store/00000000000000000000000000000000-a.drv",["dev","out"]),("/nix/store/00000000000000000000000000000000-b.drv",["out"])],` +
	`["/nix/store/00000000000000000000000000000000-builder.sh","/nix/store/00000000000000000000000000000000-source"],"x86_64-linux",` +
	`"/nix/store/00000000000000000000000000000000-bash/bin/bash",["-e","","echo \"$out\" > \\tmp\n\t\r"],` +
	`[("","empty name"),("name","x"),("url","https://example.org/x.tar.gz"),("ü","` + "\x00\x7f\xff" + `")])`

func TestParse(t *testing.T) {
	d, err := Parse(dir, []byte(plainText))
	if err != nil {
		t.Fatal(err)
	}
	if diff := cmp.Diff(&plain, d); diff != "" {
		t.Error(diff)
	}
	if got := string(d.Append(nil)); got != plainText {
		t.Errorf("written again:\n%s\n%s", got, plainText)
	}
	if v, ok := d.Var("name"); v != "x" || !ok {
		t.Errorf("name is %q %v", v, ok)
	}
	if v, ok := d.Var("nam"); v != "" || ok {
		t.Errorf("nam is %q %v", v, ok)
	}
	if want := []string{sp("a.drv"), sp("b.drv"), sp("builder.sh"), sp("source")}; !slices.Equal(d.References(), want) {
		t.Errorf("references %q", d.References())
	}
}

// A file that ends anywhere before its end is an error at that place or before.
func TestCutAtEveryByte(t *testing.T) {
	for n := range len(plainText) {
		_, err := Parse(dir, []byte(plainText[:n]))
		var se *SyntaxError
		if !errors.As(err, &se) || se.Offset > n {
			t.Fatalf("cut at byte %d: %v", n, err)
		}
	}
}

func TestHostile(t *testing.T) {
	h := strings.Repeat("ab", 32)
	one := func(out string) string { return `Derive([` + out + `],[],[],"s","b",[],[])` }
	for _, c := range []struct {
		name, in string
		at       int    // where the error points
		msg      string // part of its text
	}{
		{"empty", "", 0, "ends where"},
		{"ELF", "\x7fELF", 0, `'\x7f' where`},
		{"behind the end", plainText + "\n", len(plainText), "behind its end"},
		{"twice", plainText + plainText, len(plainText), "behind its end"},
		{"no output", one(""), 8, "no output"},
		{"leading comma", one(`,("out","","","")`), 8, "where"},
		{"trailing comma", one(`("out","","",""),`), 25, "where"},
		{"blank", one(` ("out","","","")`), 8, "where"},
		{"output twice", one(`("out","","",""),("out","","","")`), 25, "not behind"},
		{"outputs unsorted", one(`("out","","",""),("dev","","","")`), 25, "not behind"},
		{"output is a path", one(`("a/b","","","")`), 9, "an output"},
		{"output is empty", one(`("","","","")`), 9, "an output"},
		{"path outside", one(`("out","/etc/passwd","","")`), 15, "no path of the store"},
		{"path below", one(`("out","` + sp("x") + `/y","","")`), 15, "no path of the store"},
		{"path of another store", one(`("out","/gnu/store/` + strings.Repeat("0", 32) + `-x","","")`), 15, "no path of the store"},
		{"hash without function", one(`("out","` + sp("x") + `","","` + h + `")`), 9, "without a function"},
		{"unknown function", one(`("out","` + sp("x") + `","sha3","` + h + `")`), 9, "unknown function"},
		{"hash too short", one(`("out","` + sp("x") + `","sha256","` + h[2:] + `")`), 9, "lower-case hex"},
		{"hash in capitals", one(`("out","` + sp("x") + `","sha256","` + strings.ToUpper(h) + `")`), 9, "lower-case hex"},
		{"hash without path", one(`("out","","sha256","` + h + `")`), 9, "no path"},
		{"floating with path", one(`("out","` + sp("x") + `","r:sha256","")`), 9, "before it is built"},
		{"input is no derivation", `Derive([("out","","","")],[("` + sp("x") + `",["out"])],[],"s","b",[],[])`, 28, "no derivation"},
		{"input twice", strings.Replace(plainText, "-b.drv", "-a.drv", 1), 206, "not behind"},
		{"sources unsorted", strings.Replace(plainText, "builder.sh", "z.sh", 1), 321, "not behind"},
		{"variable twice", `Derive([("out","","","")],[],[],"s","b",[],[("a",""),("a","")])`, 53, "not behind"},
		{"unknown escape", `Derive([("out","","","")],[],[],"s\x","b",[],[])`, 34, `escape \x`},
		{"raw newline", "Derive([(\"out\",\"\",\"\",\"\")],[],[],\"s\n\",\"b\",[],[])", 34, "where Nix writes an escape"},
		{"raw tab", "Derive([(\"out\",\"\",\"\",\"\")],[],[],\"s\t\",\"b\",[],[])", 34, "where Nix writes an escape"},
		{"string never ends", `Derive([("out","` + strings.Repeat("x", 1<<20), 16 + 1<<20, "ends inside the string that begins at byte 15"},
		{"brackets", "Derive(" + strings.Repeat("[", 1<<20), 8, "where"},
		{"old experiment", `DrvWithVersion`, 1, "where"},
	} {
		d, err := Parse(dir, []byte(c.in))
		var se *SyntaxError
		if !errors.As(err, &se) || d != nil {
			t.Errorf("%s: %v %v", c.name, d, err)
			continue
		}
		if se.Offset != c.at || !strings.Contains(se.Msg, c.msg) || len(err.Error()) > 1000 {
			t.Errorf("%s: byte %d, not %d: %.1000s", c.name, se.Offset, c.at, se.Msg)
		}
	}
}

func TestUnsupported(t *testing.T) {
	in := `DrvWithVersion("xp-dyn-drv",[("out","","","")],[("` + sp("a.drv") + `",(["out"],[("x",["out"])]))],[],"s","b",[],[])`
	if d, err := Parse(dir, []byte(in)); !errors.Is(err, ErrUnsupported) || d != nil {
		t.Errorf("%v %v", d, err)
	}
}

func TestTooLarge(t *testing.T) {
	b := append(bytes.Repeat([]byte{'x'}, MaxSize), "y"...)
	if _, err := Parse(dir, b); !errors.Is(err, ErrSize) {
		t.Error(err)
	}
	if _, err := Parse(dir, b[:MaxSize]); errors.Is(err, ErrSize) {
		t.Error(err)
	}
}

func TestKinds(t *testing.T) {
	h := strings.Repeat("ab", 20)
	for out, want := range map[string]Kind{
		`("out","` + sp("x") + `","","")`:                     InputAddressed,
		`("out","` + sp("x") + `","sha1","` + h + `")`:        Fixed,
		`("out","` + sp("x") + `","r:sha1","` + h + `")`:      Fixed,
		`("out","` + sp("x") + `","git:sha1","` + h + `")`:    Fixed,
		`("out","","text:sha256","")`:                         Floating,
		`("out","","r:sha256","")`:                            Floating,
		`("out","","",""),("z","` + sp("x-z") + `","","")`:    Deferred,
		`("out","","r:blake3","impure")`:                      Impure,
		`("out","","r:sha256",""),("z","","sha512","impure")`: Floating,
	} {
		d, err := Parse(dir, []byte(`Derive([`+out+`],[],[],"s","b",[],[])`))
		if err != nil || d.Outputs[0].Kind() != want {
			t.Errorf("%s: %v %v", out, d, err)
		}
	}
}

// A derivation is believed only at the path that its content commits to.
func TestParseAt(t *testing.T) {
	fixed := Derivation{
		Outputs:  []Output{{Name: "out", HashAlgo: "r:sha256", Hash: strings.Repeat("00", 32)}},
		Platform: "builtin", Builder: "builtin:fetchurl",
	}
	var err error
	fixed.Outputs[0].Path, err = storepath.Fixed(dir, "x", storepath.NAR, storepath.Hash{Algo: "sha256", Sum: make([]byte, 32)})
	if err != nil {
		t.Fatal(err)
	}
	lies := fixed
	lies.Outputs = []Output{fixed.Outputs[0]}
	lies.Outputs[0].Path = sp("x")
	for _, c := range []struct {
		name string
		d    Derivation
		ok   bool
	}{{"plain", plain, true}, {"fixed", fixed, true}, {"a path that its hash does not give", lies, false}} {
		b := c.d.Append(nil)
		at, err := storepath.Text(dir, "x.drv", b, c.d.References())
		if err != nil {
			t.Fatal(err)
		}
		if _, err := ParseAt(dir, at, b); (err == nil) != c.ok || !c.ok && !errors.Is(err, ErrForged) {
			t.Errorf("%s: %v", c.name, err)
		}
		if _, err := ParseAt(dir, strings.Replace(at, "x.drv", "y.drv", 1), b); !errors.Is(err, ErrForged) {
			t.Errorf("%s: under another name: %v", c.name, err)
		}
		for _, p := range []string{"", "/", dir, at + "/x", path.Base(at)} {
			if _, err := ParseAt(dir, p, b); !errors.Is(err, ErrForged) {
				t.Errorf("%s: at %q: %v", c.name, p, err)
			}
		}
		// Of any flipped bit there is nothing left to believe.
		for i := range len(b) * 8 {
			b[i/8] ^= 1 << (i % 8)
			if _, err := ParseAt(dir, at, b); err == nil {
				t.Fatalf("%s: bit %d flipped and not seen", c.name, i)
			}
			b[i/8] ^= 1 << (i % 8)
		}
	}
}

func TestClaims(t *testing.T) {
	for _, c := range []struct {
		name string
		env  []Var
		want Claims
	}{
		{"nothing", nil, Claims{}},
		{"fetchurl", []Var{{"name", "x.tar.gz"}, {"outputHash", "sha256-x"}, {"pname", "x"}, {"url", ""}, {"urls", "https://a/x  mirror://b/x"}, {"version", "1"}},
			Claims{Name: "x.tar.gz", Pname: "x", Version: "1", URLs: []string{"https://a/x", "mirror://b/x"}, OutputHash: "sha256-x"}},
		{"url twice", []Var{{"url", "https://a/x"}, {"urls", "https://a/x"}}, Claims{URLs: []string{"https://a/x"}}},
		{"structured", []Var{{"__json", `{"pname":"p","urls":["https://a/x","https://b/x"],"url":"git://c","version":2,"Name":"N"}`}},
			Claims{Pname: "p", URLs: []string{"git://c", "https://a/x", "https://b/x"}}},
		{"structured hides the rest", []Var{{"__json", `{}`}, {"url", "https://a/x"}}, Claims{}},
		{"structured but broken", []Var{{"__json", `{"url":`}}, Claims{}},
		{"structured but a list", []Var{{"__json", `["url"]`}}, Claims{}},
		{"odd types", []Var{{"__json", `{"url":null,"urls":["a",null],"name":{"a":1},"pname":true,"version":["a","b"]}`}}, Claims{}},
		{"deep", []Var{{"__json", `{"url":` + strings.Repeat("[", 100000) + `}`}}, Claims{}},
	} {
		if diff := cmp.Diff(c.want, (&Derivation{Env: c.env}).Claims()); diff != "" {
			t.Errorf("%s: %s", c.name, diff)
		}
	}
	many := (&Derivation{Env: []Var{{"urls", strings.Repeat("a ", 10) + strings.Join(slices.Collect(func(yield func(string) bool) {
		for i := range 100000 {
			if !yield("u" + string(rune(0x4e00+i%20000)) + string(rune('a'+i/20000))) {
				return
			}
		}
	}), " ")}}}).Claims()
	if len(many.URLs) != maxURLs {
		t.Errorf("%d URLs", len(many.URLs))
	}
}

// Parse and Append are inverse on whatever Nix can write.
func TestRoundTrip(t *testing.T) {
	name := rapid.StringMatching(`[a-zA-Z0-9+._?=][a-zA-Z0-9+._?=-]{0,8}`).Filter(func(s string) bool { return storepath.CheckName(s) == nil })
	spg := rapid.Custom(func(t *rapid.T) string {
		return dir + "/" + rapid.StringMatching(`[0-9a-df-np-sv-z]{32}`).Draw(t, "hash") + "-" + name.Draw(t, "name")
	})
	set := func(g *rapid.Generator[string], min int) *rapid.Generator[[]string] {
		return rapid.Custom(func(t *rapid.T) []string {
			return slices.Compact(slices.Sorted(slices.Values(rapid.SliceOfN(g, min, 6).Draw(t, "set"))))
		})
	}
	text := rapid.Custom(func(t *rapid.T) string { return string(rapid.SliceOf(rapid.Byte()).Draw(t, "bytes")) })
	text = rapid.OneOf(text, rapid.String(), rapid.StringMatching(`["\\\n\r\tntr]*`))
	rapid.Check(t, func(t *rapid.T) {
		d := Derivation{Platform: text.Draw(t, "platform"), Builder: text.Draw(t, "builder"), Args: rapid.SliceOfN(text, 0, 4).Draw(t, "args")}
		for _, n := range set(name, 1).Draw(t, "outputs") {
			d.Outputs = append(d.Outputs, Output{Name: n, Path: spg.Draw(t, "path")})
		}
		for _, p := range set(spg, 0).Draw(t, "inputs") {
			d.InputDrvs = append(d.InputDrvs, Input{p + ".drv", set(name, 0).Draw(t, "of")})
		}
		slices.SortFunc(d.InputDrvs, func(a, b Input) int { return strings.Compare(a.Path, b.Path) })
		d.InputSrcs = set(spg, 0).Draw(t, "sources")
		for _, n := range set(text, 0).Draw(t, "env") {
			d.Env = append(d.Env, Var{n, text.Draw(t, "value")})
		}
		b := d.Append(nil)
		back, err := Parse(dir, b)
		if err != nil {
			t.Fatalf("%v\n%q", err, b)
		}
		if again := back.Append(nil); !bytes.Equal(b, again) {
			t.Fatalf("%q\n%q", b, again)
		}
	})
}

// real are the derivations of real Nix packages, by base name.
func real(t testing.TB) map[string][]byte {
	t.Helper()
	files := map[string][]byte{}
	r := tar.NewReader(bytes.NewReader(need.DataZstd(t, "real-drvs.tar.zst")))
	for {
		h, err := r.Next()
		if err == io.EOF {
			break
		}
		if err != nil {
			t.Fatal(err)
		}
		if strings.HasSuffix(h.Name, Ext) {
			b, err := io.ReadAll(r)
			if err != nil {
				t.Fatal(err)
			}
			files[path.Base(h.Name)] = b
		}
	}
	return files
}

// Every real derivation is read, has the store path that its content gives it,
// and is written again byte for byte.
func TestRealDerivations(t *testing.T) {
	files := real(t)
	if len(files) != 3258 {
		t.Errorf("%d files", len(files))
	}
	kinds := map[Kind]int{}
	withURL, structured := 0, 0
	for base, b := range files {
		d, err := ParseAt(dir, dir+"/"+base, b)
		if err != nil {
			t.Errorf("%s: %v", base, err)
			continue
		}
		if !bytes.Equal(d.Append(nil), b) {
			t.Errorf("%s: written otherwise", base)
		}
		for _, o := range d.Outputs {
			kinds[o.Kind()]++
		}
		if len(d.Claims().URLs) > 0 {
			withURL++
		}
		if _, ok := d.Var("__json"); ok {
			structured++
		}
	}
	t.Logf("outputs by kind %v, %d with a URL, %d with structured attributes", kinds, withURL, structured)
	if kinds[Fixed] == 0 || kinds[InputAddressed] == 0 || withURL == 0 || structured == 0 {
		t.Error("the data has not what it is there for")
	}
}

// Cut anywhere, a real derivation is an error. All cuts of all files would be
// quadratic: one short file of every kind is cut everywhere.
func TestRealDerivationsCut(t *testing.T) {
	short := map[Kind]string{}
	files := real(t)
	for base, b := range files {
		d, err := Parse(dir, b)
		if err != nil {
			t.Fatal(err)
		}
		k := d.Outputs[0].Kind()
		if old, ok := short[k]; !ok || len(b) < len(files[old]) {
			short[k] = base
		}
	}
	for _, base := range short {
		for n := range files[base] {
			if _, err := Parse(dir, files[base][:n]); err == nil {
				t.Fatalf("%s: cut at %d and read", base, n)
			}
		}
	}
}

func BenchmarkParseReal(b *testing.B) {
	files := real(b)
	size := int64(0)
	for _, f := range files {
		size += int64(len(f))
	}
	b.SetBytes(size)
	b.ReportAllocs()
	for b.Loop() {
		for _, f := range files {
			if _, err := Parse(dir, f); err != nil {
				b.Fatal(err)
			}
		}
	}
}

func BenchmarkParseAtReal(b *testing.B) {
	files := real(b)
	for b.Loop() {
		for base, f := range files {
			if _, err := ParseAt(dir, dir+"/"+base, f); err != nil {
				b.Fatal(err)
			}
		}
	}
}

func FuzzParse(f *testing.F) {
	f.Add([]byte(plainText))
	f.Fuzz(func(t *testing.T, b []byte) {
		d, err := Parse(dir, b)
		if err != nil {
			var se *SyntaxError
			if errors.As(err, &se) && (se.Offset < 0 || se.Offset > len(b)) {
				t.Fatalf("byte %d of %d", se.Offset, len(b))
			}
			return
		}
		if again := d.Append(nil); !bytes.Equal(again, b) {
			t.Fatalf("read %q\nwrote %q", b, again)
		}
		d.Claims()
		d.References()
	})
}
