// Package nixfacts holds what the packages of facts read and compute against a
// real Nix, old and new: signatures made by one and verified by the other, .drv
// files with everything awkward in them, lock files, archives, meta, profiles.
//
// Everything runs on one throw-away machine a suite (tests/bed), without network.
// What can be tested without Nix is tested in the packages themselves.
package nixfacts

import (
	"crypto/ed25519"
	"encoding/base64"
	"encoding/hex"
	"encoding/json"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"

	"overkeep/overlay/drv"
	"overkeep/overlay/drv/storepath"
	"overkeep/overlay/provenance"
	"overkeep/overlay/roots"
	"overkeep/overlay/signature"
	"overkeep/policy/graph"
	"overkeep/tests/bed"
)

const (
	dir    = storepath.Dir
	nix    = "nix --extra-experimental-features 'nix-command flakes' "
	daemon = "NIX_REMOTE=daemon"
)

func TestAgainstNix(t *testing.T) {
	for _, s := range bed.Suites {
		t.Run(string(s), func(t *testing.T) {
			m := bed.Start(t, s)
			m.SystemNix(t)
			t.Run("signatures", func(t *testing.T) { signatures(t, m) })
			t.Run("derivations", func(t *testing.T) { derivations(t, m) })
			t.Run("flakes", func(t *testing.T) { flakes(t, m) })
			t.Run("meta", func(t *testing.T) { meta(t, m) })
			t.Run("profiles", func(t *testing.T) { profiles(t, m) })
		})
	}
}

// stdout is what a script of root's wrote, without its messages.
func stdout(t *testing.T, m *bed.Machine, script string) string {
	t.Helper()
	r, err := m.Exec(bed.Command{Script: script, Env: []string{daemon}})
	if err != nil || r.Code != 0 {
		t.Fatalf("%s: code %d, %v\n%s%s", script, r.Code, err, r.Stdout, r.Stderr)
	}
	return strings.TrimSpace(r.Stdout)
}

// build builds an expression that may use dep, a path of the store.
func build(t *testing.T, m *bed.Machine, name, script string) string {
	t.Helper()
	return stdout(t, m, fmt.Sprintf(`nix-build --no-out-link -E 'derivation { name = "%s"; system = builtins.currentSystem;
		builder = "/bin/sh"; args = [ "-c" "%s" ]; }'`, name, script))
}

func baseOf(t *testing.T, path string) string {
	t.Helper()
	b, ok := storepath.Base(dir, path)
	if !ok {
		t.Fatalf("%q is no store path", path)
	}
	return b
}

// facts asks Nix for what is signed of a path.
func facts(t *testing.T, m *bed.Machine, path string) signature.Facts {
	t.Helper()
	type info struct {
		NarHash    json.RawMessage
		NarSize    int64
		References []string
		Signatures []string
	}
	var all map[string]info
	out := stdout(t, m, nix+"path-info --json "+path)
	if err := json.Unmarshal([]byte(out), &all); err != nil {
		t.Fatalf("%v\n%s", err, out)
	}
	i, ok := all[path]
	if !ok {
		t.Fatalf("%s is not in %s", path, out)
	}
	var text string
	if err := json.Unmarshal(i.NarHash, &text); err != nil {
		t.Fatalf("%v\n%s", err, out)
	}
	h, err := storepath.ParseHash(text)
	if err != nil {
		t.Fatal(err)
	}
	f := signature.Facts{Path: baseOf(t, path), NarHash: h.Algo + ":" + hex.EncodeToString(h.Sum), NarSize: i.NarSize, Sigs: strings.Join(i.Signatures, " ")}
	for _, r := range i.References {
		f.Refs = append(f.Refs, baseOf(t, r))
	}
	return f
}

func verified(t *testing.T, f signature.Facts, keys ...signature.Key) uint64 {
	t.Helper()
	v, err := signature.New(dir, keys, nil)
	if err != nil {
		t.Fatal(err)
	}
	got, _, err := v.Verify(t.Context(), 1, func(_ int, to *signature.Facts) { *to = f })
	if err != nil {
		t.Fatal(err)
	}
	return got[0]
}

func signatures(t *testing.T, m *bed.Machine) {
	public := stdout(t, m, "nix-store --generate-binary-cache-key real-1 /run/secret /run/public && cat /run/public")
	theirs, err := signature.ParseKey(public)
	if err != nil {
		t.Fatal(err)
	}
	dep := stdout(t, m, "echo dep > /run/dep; nix-store --add /run/dep")
	refers := build(t, m, "refers", `echo $out ${builtins.storePath "`+dep+`"} > $out`)
	stdout(t, m, nix+"store sign --key-file /run/secret "+dep+" "+refers)
	pub, priv, err := ed25519.GenerateKey(nil)
	if err != nil {
		t.Fatal(err)
	}
	ours := signature.Key{Name: "ours-1", Public: pub}
	for _, path := range []string{dep, refers} {
		f := facts(t, m, path)
		if path == refers && len(f.Refs) != 2 {
			t.Errorf("%s refers to %q, not to itself and another", path, f.Refs)
		}
		// What Nix signed we verify, and nothing that differs.
		if verified(t, f, ours, theirs) != 2 {
			t.Errorf("%s: the signature of Nix is not good: %+v", path, f)
		}
		for name, change := range map[string]func(*signature.Facts){
			"path":       func(f *signature.Facts) { f.Path += "x" },
			"hash":       func(f *signature.Facts) { f.NarHash = "sha256:" + strings.Repeat("0", 64) },
			"size":       func(f *signature.Facts) { f.NarSize++ },
			"references": func(f *signature.Facts) { f.Refs = append(slices.Clone(f.Refs), f.Path[:32]+"-other") },
		} {
			c := f
			change(&c)
			if verified(t, c, theirs) != 0 {
				t.Errorf("%s: with another %s the signature is good", path, name)
			}
		}
		// What we sign Nix verifies: ours gets into its store by way of a cache.
		sign := func(f signature.Facts) string {
			return "ours-1:" + base64.StdEncoding.EncodeToString(ed25519.Sign(priv, signature.AppendFingerprint(nil, dir, &f)))
		}
		wrong := f
		wrong.NarSize++
		for i, sig := range []string{sign(wrong), sign(f)} {
			cache := fmt.Sprintf("/run/cache-%s-%d", f.Path[:8], i)
			stdout(t, m, fmt.Sprintf("%[1]scopy --no-check-sigs --to file://%[2]s %[3]s; echo 'Sig: %[4]s' >> %[2]s/%[5]s.narinfo; %[1]sstore copy-sigs --substituter file://%[2]s %[3]s",
				nix, cache, path, sig, f.Path[:32]))
			r, err := m.Exec(bed.Command{Script: nix + "store verify --no-contents --sigs-needed 1 --option trusted-public-keys '" + ours.String() + "' " + path, Env: []string{daemon}})
			// To Nix a content address is as good as a signature; to us it is none.
			if good := i == 1 || path == dep; err != nil || (r.Code == 0) != good {
				t.Errorf("%s: signature %d of ours: Nix says code %d, %v\n%s", path, i, r.Code, err, r.Stderr)
			}
		}
		if got := verified(t, facts(t, m, path), ours, theirs); got != 3 {
			t.Errorf("%s: with a bad one of ours, a good one and theirs: %b", path, got)
		}
	}
}

func derivations(t *testing.T, m *bed.Machine) {
	all := make([]byte, 0, 255)
	for c := 1; c < 256; c++ {
		all = append(all, byte(c))
	}
	m.Write(t, "/run/bytes", string(all))
	m.Write(t, "/run/awkward.nix", `let
	bytes = builtins.readFile /run/bytes;
	plain = { name = "plain"; system = "x86_64-linux"; builder = "/bin/sh"; };
	dep = derivation (plain // { name = "dep"; outputs = [ "out" "dev" "a.b" ]; });
in map derivation [
	plain
	(plain // { name = "bytes"; args = [ bytes "" "\\n" "\"" ]; value = bytes; ${"k\"\n\\"} = "odd name"; "" = "empty name"; })
	(plain // { name = "inputs"; a = "${dep}"; b = dep.dev; c = dep."a.b"; source = builtins.toFile "source" "text"; s2 = /run/bytes; })
	(plain // { name = "structured"; __structuredAttrs = true; url = "https://example.org/a"; urls = [ "https://example.org/b" ]; text = "\"\\\n"; version = "1.2"; })
	(plain // { name = "flat"; outputHash = "e3b0c44298fc1c149afbf4c8996fb92427ae41e4649b934ca495991b7852b855"; outputHashAlgo = "sha256"; url = "https://example.org/flat"; })
	(plain // { name = "tree"; outputHash = "sha512-z4PhNX7vuL3xVChQ1m2AB9Yg5AULVxXcg/SpIdNs6c5H0NE8XYXysP+DGNKHfuwvY7kxvUdBeoGlODJ6+SfaPg=="; outputHashMode = "recursive"; })
	(plain // { name = "sha1"; outputHash = "da39a3ee5e6b4b0d3255bfef95601890afd80709"; outputHashAlgo = "sha1"; outputHashMode = "recursive"; })
	(plain // { name = "md5"; outputHash = "d41d8cd98f00b204e9800998ecf8427e"; outputHashAlgo = "md5"; })
	(plain // { name = "tree256"; outputHash = "0mdqa9w1p6cmli6976v4wi0sw9r4p5prkj7lzfd1877wk11c9c73"; outputHashAlgo = "sha256"; outputHashMode = "recursive"; })
	(plain // { name = "floating"; __contentAddressed = true; outputHashAlgo = "sha256"; outputHashMode = "recursive"; })
	(plain // { name = "text"; __contentAddressed = true; outputHashAlgo = "sha256"; outputHashMode = "text"; })
	(plain // { name = "behind"; input = derivation (plain // { name = "floating2"; __contentAddressed = true; outputHashAlgo = "sha256"; outputHashMode = "recursive"; }); })
	(plain // { name = "impure"; __impure = true; })
	(plain // { name = "dynamic"; input = builtins.outputOf (derivation (plain // { name = "made.drv"; __contentAddressed = true;
		outputHashAlgo = "sha256"; outputHashMode = "text"; })).outPath "out"; })
]`)
	out := stdout(t, m, "NIX_REMOTE=local NIX_CONFIG='extra-experimental-features = ca-derivations impure-derivations dynamic-derivations' nix-instantiate /run/awkward.nix")
	found, dynamic := map[string]*drv.Derivation{}, false
	for _, p := range strings.Fields(out) {
		text, err := os.ReadFile(filepath.Join(m.Root, p))
		if err != nil {
			t.Fatal(err)
		}
		d, err := drv.ParseAt(dir, p, text)
		if strings.HasSuffix(p, "-dynamic.drv") {
			if !errors.Is(err, drv.ErrUnsupported) {
				t.Errorf("%s: %v\n%q", p, err, text)
			}
			dynamic = true
			continue
		}
		if err != nil {
			t.Errorf("%s: %v\n%q", p, err, text)
			continue
		}
		if got := string(d.Append(nil)); got != string(text) {
			t.Errorf("%s: written otherwise\n%q\n%q", p, got, text)
		}
		found[strings.TrimSuffix(storepath.Name(baseOf(t, p)), drv.Ext)] = d
	}
	for name, kind := range map[string]drv.Kind{"plain": drv.InputAddressed, "flat": drv.Fixed, "tree": drv.Fixed, "sha1": drv.Fixed, "md5": drv.Fixed,
		"tree256": drv.Fixed, "floating": drv.Floating, "text": drv.Floating, "behind": drv.Deferred, "impure": drv.Impure} {
		if d := found[name]; d == nil || d.Outputs[0].Kind() != kind {
			t.Errorf("%s: %+v", name, d)
		}
	}
	if len(found) != 13 || !dynamic {
		t.Errorf("%d derivations, dynamic: %v", len(found), dynamic)
	}
	if d := found["bytes"]; d != nil {
		v, _ := d.Var("value")
		odd, _ := d.Var("k\"\n\\")
		if v != string(all) || !slices.Equal(d.Args, []string{string(all), "", `\n`, `"`}) || odd != "odd name" {
			t.Errorf("%q %q %q", v, d.Args, odd)
		}
	}
	if d := found["inputs"]; d != nil && (len(d.InputDrvs) != 1 || !slices.Equal(d.InputDrvs[0].Outputs, []string{"a.b", "dev", "out"}) || len(d.InputSrcs) != 1 && len(d.InputSrcs) != 2) {
		t.Errorf("inputs %+v %q", d.InputDrvs, d.InputSrcs)
	}
	if d := found["structured"]; d != nil {
		if c := d.Claims(); !slices.Equal(c.URLs, []string{"https://example.org/a", "https://example.org/b"}) || c.Version != "1.2" {
			t.Errorf("claims %+v", c)
		}
	}
	if d := found["flat"]; d != nil {
		r := provenance.Derivation(dir, d)
		if len(r) != 1 || !slices.Equal(r[0].From, []string{"https://example.org/flat"}) || r[0].Path != baseOf(t, d.Outputs[0].Path) {
			t.Errorf("%+v", r)
		}
	}
}

func flakes(t *testing.T, m *bed.Machine) {
	stdout(t, m, `mkdir -p /run/f /run/dep-flake /run/src /run/tar/x; echo hello > /run/src/file; echo hi > /run/tar/x/file; echo data > /run/data
		tar -C /run/tar -cf /run/x.tar x
		echo '{ inputs.src = { url = "path:/run/src"; flake = false; }; outputs = _: { }; }' > /run/dep-flake/flake.nix
		echo '{ inputs = { dep.url = "path:/run/dep-flake"; src.follows = "dep/src"; tar = { url = "file:///run/x.tar"; flake = false; };
			data = { url = "file+file:///run/data"; flake = false; }; }; outputs = _: { }; }' > /run/f/flake.nix`)
	stdout(t, m, nix+"flake lock path:/run/f")
	archive := stdout(t, m, nix+"flake archive --json path:/run/f")
	lockFile := m.Read(t, "/run/f/flake.lock")
	locked, err := provenance.Lock(dir, []byte(lockFile))
	if err != nil {
		t.Fatalf("%v\n%s", err, lockFile)
	}
	archived, err := provenance.Archive(dir, []byte(archive), []byte(lockFile), "path:/run/f")
	if err != nil {
		t.Fatalf("%v\n%s", err, archive)
	}
	// The lock file alone gives the paths that Nix made, the archive those and the flake's own.
	urls := map[string][]string{}
	for _, r := range locked {
		urls[r.Path] = r.From
		if _, err := os.Stat(filepath.Join(m.Root, dir, r.Path)); err != nil {
			t.Errorf("%v: %v\n%s", r, err, lockFile)
		}
	}
	seen := map[string]bool{}
	for _, r := range archived {
		seen[r.Path] = true
		if want, ok := urls[r.Path]; ok && !slices.Equal(r.From, want) || !ok && !slices.Equal(r.From, []string{"path:/run/f"}) {
			t.Errorf("%+v, by the lock file %q", r, want)
		}
	}
	if len(urls) != 4 || len(seen) != 5 {
		t.Errorf("%d locked, %d archived\n%s\n%s", len(urls), len(seen), lockFile, archive)
	}
	var all []string
	for _, u := range urls {
		all = append(all, u...)
	}
	for _, want := range []string{"path:/run/src", "path:/run/dep-flake", "file:///run/x.tar", "file:///run/data"} {
		if !slices.ContainsFunc(all, func(u string) bool { return strings.HasPrefix(u, want) }) {
			t.Errorf("%s is not among %q", want, all)
		}
	}
}

func meta(t *testing.T, m *bed.Machine) {
	m.Write(t, "/run/meta.nix", provenance.MetaExpression)
	m.Write(t, "/run/packages.nix", `let
	p = name: meta: let d = derivation { inherit name; system = builtins.currentSystem; builder = "/bin/sh"; outputs = [ "out" "dev" ]; }; in d // { inherit meta; };
	mit = { spdxId = "MIT"; shortName = "mit"; free = true; };
	own = { shortName = "acme"; fullName = "Acme licence"; free = false; };
in [
	(p "free" { license = mit; })
	(p "list" { license = [ mit own { fullName = "Only this"; } ]; })
	(p "stated" { license = "whatever"; unfree = true; })
	(p "string" { license = "GPL-3.0"; })
	(p "silent" { })
	(derivation { name = "no-meta"; system = "s"; builder = "b"; })
]`)
	want := []struct {
		licences []string
		unfree   graph.Tri
	}{
		{[]string{"MIT"}, graph.No},
		{[]string{"MIT", "acme", "Only this"}, graph.Yes},
		{[]string{"whatever"}, graph.Yes},
		{[]string{"GPL-3.0"}, graph.Unknown},
		{nil, graph.Unknown},
		{nil, graph.Unknown},
	}
	check := func(text string, i int) {
		t.Helper()
		records, err := provenance.Meta(dir, []byte(text))
		if err != nil {
			t.Fatalf("%v\n%s", err, text)
		}
		if w := want[i]; w.licences == nil && w.unfree == graph.Unknown {
			if len(records) != 0 {
				t.Errorf("%d: %+v", i, records)
			}
			return
		}
		if len(records) != 3 { // derivation, out, dev
			t.Errorf("%d: %+v\n%s", i, records, text)
		}
		for _, r := range records {
			if !slices.Equal(r.Licences, want[i].licences) || r.Unfree != want[i].unfree {
				t.Errorf("%d: %+v", i, r)
			}
		}
	}
	out := stdout(t, m, "nix-instantiate --eval --strict --json -E 'map (import /run/meta.nix) (import /run/packages.nix)'")
	var each []json.RawMessage
	if err := json.Unmarshal([]byte(out), &each); err != nil || len(each) != len(want) {
		t.Fatalf("%v\n%s", err, out)
	}
	for i, text := range each {
		check(string(text), i)
	}
	check(stdout(t, m, nix+"eval --json --impure --expr 'builtins.elemAt (import /run/packages.nix) 1' --apply \"$(cat /run/meta.nix)\""), 1)
}

func profiles(t *testing.T, m *bed.Machine) {
	tool := build(t, m, "tool-1", "echo tool > $out")
	env := stdout(t, m, "nix-env --profile /nix/var/nix/profiles/test --set "+tool+"; readlink -f /nix/var/nix/profiles/test")
	result := stdout(t, m, "nix-store --realise "+tool+" --add-root /home/alice/result --indirect >/dev/null; ls -l /nix/var/nix/gcroots/auto >&2; readlink -f /home/alice/result")
	r := roots.Resolver{Root: m.Root, Home: "/home/alice"}
	for target, want := range map[string]string{"/nix/var/nix/profiles/test": env, "~/result": result, "/nix/var/nix/gcroots/auto": result, "/nix/var/nix/gcroots": result} {
		res, err := r.Resolve(target)
		if err != nil || !slices.Contains(res.Bases, baseOf(t, want)) {
			t.Errorf("%s: %+v %v, not %s", target, res, err, want)
		}
	}
	if b, err := r.Boot(); err != nil || b != (roots.Boot{}) {
		t.Errorf("a Debian boots %+v %v", b, err)
	}
}
