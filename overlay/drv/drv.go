// Package drv reads Nix derivation files: the .drv of the store, an ATerm
//
//	Derive([outputs],[input derivations],[input sources],system,builder,[args],[env])
//
// It promises: what Parse accepts is byte for byte what Nix would write for the
// same derivation (libstore/derivations.cc, "unparse"), so Append gives it back
// unchanged; everything else is an error that says at which byte, never a panic;
// time and memory are linear in the size. With ParseAt the store path is computed
// anew, so that a success speaks for every byte.
//
// Being stricter than Nix's own reader costs nothing that a store holds: Nix
// writes these files itself. A file that it would accept and never write is
// refused here, and whoever asks treats the path as private.
//
// Start with ParseAt. What a derivation says of itself (URLs, pname) is a claim of
// whoever wrote it; see Claims. Do not use the package to compute the paths of
// ordinary outputs.
package drv

import (
	"encoding/json"
	"slices"
	"strings"

	"overkeep/overlay/drv/storepath"
)

// Ext ends the name of every derivation.
const Ext = ".drv"

// Derivation is a parsed file. Sets are sorted bytewise, as in the file.
type Derivation struct {
	Outputs   []Output // at least one
	InputDrvs []Input
	InputSrcs []string // store paths
	Platform  string   // "x86_64-linux", "builtin"
	Builder   string   // a path, or "builtin:NAME"
	Args      []string
	Env       []Var
}

// Output is one output.
type Output struct {
	Name     string // "out"
	Path     string // store path; empty where it is only known after the build
	HashAlgo string // with the method: "sha256", "r:sha256", "text:sha256", …
	Hash     string // hex; "impure"; empty
}

// Input is a derivation whose outputs are needed to build.
type Input struct {
	Path    string // store path of a .drv
	Outputs []string
}

// Var is an environment variable of the builder.
type Var struct{ Name, Value string }

// Kind is what is known of an output before it is built.
type Kind int

// The kinds of outputs (DerivationOutput in derivations.hh).
const (
	InputAddressed Kind = iota // the ordinary one
	Fixed                      // of a known content: what fetchers make
	Floating                   // content-addressed, path known after the build
	Deferred                   // input-addressed, behind a floating one
	Impure                     // built anew each time
)

// Kind of a parsed output.
func (o Output) Kind() Kind {
	switch {
	case o.HashAlgo == "" && o.Path != "":
		return InputAddressed
	case o.HashAlgo == "":
		return Deferred
	case o.Hash == "impure":
		return Impure
	case o.Hash == "":
		return Floating
	}
	return Fixed
}

// methods of ingestion in front of a hash function. git: and text: need
// experimental features, but are written.
var methods = []string{"r:", "text:", "git:"}

// Method splits HashAlgo into the method and the function.
func (o Output) Method() (method, function string) {
	for _, m := range methods {
		if f, ok := strings.CutPrefix(o.HashAlgo, m); ok {
			return m, f
		}
	}
	return "", o.HashAlgo
}

// check returns what is wrong with the fields taken together.
func (o Output) check() string {
	if o.HashAlgo == "" {
		if o.Hash != "" {
			return "has a hash without a function"
		}
		return ""
	}
	_, function := o.Method()
	size, ok := storepath.Sizes[function]
	switch {
	case !ok:
		return "has a hash of an unknown function"
	case o.Hash == "" || o.Hash == "impure":
		if o.Path != "" {
			return "has a path before it is built"
		}
	case o.Path == "":
		return "has a hash and no path"
	case len(o.Hash) != 2*size || strings.Trim(o.Hash, "0123456789abcdef") != "":
		return "has a hash that is not lower-case hex of its function's length"
	}
	return ""
}

// References are the store paths that the file refers to, sorted: its input
// derivations and sources. Outputs are not among them.
func (d *Derivation) References() []string {
	refs := slices.Clone(d.InputSrcs)
	for _, in := range d.InputDrvs {
		refs = append(refs, in.Path)
	}
	slices.Sort(refs)
	return slices.Compact(refs)
}

// Var is the value of an environment variable.
func (d *Derivation) Var(name string) (string, bool) {
	i, ok := slices.BinarySearchFunc(d.Env, name, func(v Var, n string) int { return strings.Compare(v.Name, n) })
	if !ok {
		return "", false
	}
	return d.Env[i].Value, true
}

// Claims is what a derivation says of itself. Nothing checks it: anybody who may
// instantiate can claim any URL and any name, so it may say that a path is
// private, but alone it is no proof that one is public.
type Claims struct {
	Name, Pname, Version string
	URLs                 []string // url and urls of the environment, each once, in order
	OutputHash           string   // as written: SRI, hex or base 32
}

// Claims reads them from the environment, or from the JSON of structured
// attributes (__json) where a derivation has those. What has another type than
// expected is left out.
func (d *Derivation) Claims() Claims {
	get := func(name string) []string {
		if v, ok := d.Var(name); ok && v != "" {
			return []string{v}
		}
		return nil
	}
	if text, ok := d.Var("__json"); ok {
		attrs := map[string]json.RawMessage{}
		if json.Unmarshal([]byte(text), &attrs) != nil {
			attrs = nil
		}
		get = func(name string) []string { return stringOrList(attrs[name]) }
	}
	one := func(name string) string {
		if v := get(name); len(v) == 1 {
			return v[0]
		}
		return ""
	}
	c := Claims{Name: one("name"), Pname: one("pname"), Version: one("version"), OutputHash: one("outputHash")}
	for _, name := range []string{"url", "urls"} {
		for _, v := range get(name) {
			// Lists become words in an environment; a URL has no blanks.
			for _, u := range strings.Fields(v) {
				if !slices.Contains(c.URLs, u) && len(c.URLs) < maxURLs {
					c.URLs = append(c.URLs, u)
				}
			}
		}
	}
	return c
}

// maxURLs keeps a list of mirrors from costing quadratic time.
const maxURLs = 256

// stringOrList is the JSON of a string, or of a list of nothing but strings.
func stringOrList(raw json.RawMessage) []string {
	var s string
	if raw == nil || string(raw) == "null" {
		return nil
	}
	if json.Unmarshal(raw, &s) == nil {
		return []string{s}
	}
	var l []*string
	if json.Unmarshal(raw, &l) != nil {
		return nil
	}
	out := make([]string, 0, len(l))
	for _, p := range l {
		if p == nil {
			return nil
		}
		out = append(out, *p)
	}
	return out
}

// escaper writes what printString of Nix writes.
var escaper = strings.NewReplacer(`"`, `\"`, `\`, `\\`, "\n", `\n`, "\r", `\r`, "\t", `\t`)

// Append appends the file of d. For a parsed derivation that is what was parsed.
func (d *Derivation) Append(b []byte) []byte {
	quote := func(s string) {
		b = append(append(append(b, '"'), escaper.Replace(s)...), '"')
	}
	list := func(n int, one func(i int)) {
		b = append(b, '[')
		for i := range n {
			if i > 0 {
				b = append(b, ',')
			}
			one(i)
		}
		b = append(b, ']')
	}
	tuple := func(fields ...string) {
		for i, f := range fields {
			b = append(b, "(,"[min(i, 1)])
			quote(f)
		}
		b = append(b, ')')
	}
	b = append(b, "Derive("...)
	list(len(d.Outputs), func(i int) {
		o := d.Outputs[i]
		tuple(o.Name, o.Path, o.HashAlgo, o.Hash)
	})
	b = append(b, ',')
	list(len(d.InputDrvs), func(i int) {
		b = append(b, '(')
		quote(d.InputDrvs[i].Path)
		b = append(b, ',')
		list(len(d.InputDrvs[i].Outputs), func(j int) { quote(d.InputDrvs[i].Outputs[j]) })
		b = append(b, ')')
	})
	b = append(b, ',')
	list(len(d.InputSrcs), func(i int) { quote(d.InputSrcs[i]) })
	b = append(b, ',')
	quote(d.Platform)
	b = append(b, ',')
	quote(d.Builder)
	b = append(b, ',')
	list(len(d.Args), func(i int) { quote(d.Args[i]) })
	b = append(b, ',')
	list(len(d.Env), func(i int) { tuple(d.Env[i].Name, d.Env[i].Value) })
	return append(b, ')')
}
