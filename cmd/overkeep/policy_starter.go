package main

import (
	"fmt"
	"os"
	"slices"
	"strings"
)

// machineKind is what `policy init` asks first.
type machineKind string

const (
	kindNixOS  machineKind = "nixos"  // the running system is in the store, unsigned
	kindLinux  machineKind = "linux"  // another distribution: Nix is a guest
	kindStrict machineKind = "strict" // public is what a declared cache signed, and nothing else
)

var machineKinds = []machineKind{kindNixOS, kindLinux, kindStrict}

// cacheKey is the key of the public binary cache of Nix, its default since 1.11
// (nix.conf(5), trusted-public-keys).
const cacheKey = "cache.nixos.org-1:6NCHdD59X431o0gWypbMrAURkbJ16ZPMQFGspcDShjY="

// starter is what the three questions of `policy init` found out.
type starter struct {
	Kind    machineKind
	Keys    []string // NAME:BASE64
	Private []string // patterns of names
	Profile bool     // there is a default profile
}

// text writes the policy with comments that say what each line is for.
func (s starter) text() string {
	var b strings.Builder
	p := func(format string, a ...any) { fmt.Fprintf(&b, format+"\n", a...) }
	p("# The policy of this machine: which store paths are public enough for the system store.")
	p("#")
	p(`# "system" lines grant, "personal" lines veto, and what nothing grants is personal. The`)
	p("# order of lines means nothing. What a path refers to must be public, too.")
	p("#")
	p("#     overkeep policy check          mistakes, broken requirements, lines without effect")
	p("#     overkeep why PATH              why a path is where it is")
	p("#     overkeep policy diff - DRAFT   what a change would move")
	p("#")
	p("# Everybody on this machine can read this file. Names that nobody should see belong into")
	p("# a file of the keep's own, which is encrypted: overkeep policy edit --keep NAME")
	p("")
	if len(s.Keys) == 0 {
		p("# No key is declared, so nothing counts as signed. Declare one:")
		p("# key %s", cacheKey)
	} else {
		p("# Whose signatures make a path public: they are verified, not believed.")
	}
	names := make([]string, 0, len(s.Keys))
	for _, k := range s.Keys {
		p("key %s", k)
		name, _, _ := strings.Cut(k, ":")
		names = append(names, "signed-by "+name)
	}
	if len(names) > 0 {
		p("")
		p("let public = %s", strings.Join(names, " or "))
		p("system public")
	}
	switch s.Kind {
	case kindNixOS:
		p("")
		p("# What this NixOS boots from is made here and signed by nobody. It has to be readable")
		p("# before anyone logs in; the last line makes `check` and `plan` fail if a change of")
		p("# this policy would take it away.")
		p("let boot = closure-of /run/current-system or closure-of /run/booted-system")
		p("system boot")
		p("require system boot")
	case kindLinux:
		if !s.Profile {
			break
		}
		p("")
		p("# Nix itself, as its installer put it into the default profile.")
		p("system closure-of %s", defaultProfile)
	case kindStrict:
		p("")
		p("# What was built or added here is nobody's business, signed or not.")
		p("personal built-here")
		p("personal unsigned")
	}
	p("")
	p("# Licences that say so are private, as far as they are known. \"when known\": without it")
	p("# every path whose licence was not recorded would be personal.")
	if s.Kind == kindNixOS {
		p("# Firmware and graphics drivers are unfree, too, and it would not boot without them.")
		p("personal unfree and not boot when known")
	} else {
		p("personal unfree when known")
	}
	p("")
	if len(s.Private) == 0 {
		p("# Private work by name, and what was built from it, even where no reference remains, as")
		p("# far as the .drv files are here to tell:")
		p(`# let secret = name "*-acme-*"`)
		p("# personal secret")
		p("# personal built-from (secret) when known")
		return b.String()
	}
	quoted := make([]string, len(s.Private))
	for i, g := range s.Private {
		quoted[i] = "name " + quotePattern(g)
	}
	p("# Private work by name, and what was built from it, even where no reference remains, as")
	p("# far as the .drv files are here to tell.")
	p("let secret = %s", strings.Join(quoted, " or "))
	p("personal secret")
	p("personal built-from (secret) when known")
	return b.String()
}

// quotePattern writes a pattern as a string of the policy language. Its backslashes are
// its own: doubled, they would stand for themselves and the veto would match nothing.
func quotePattern(g string) string {
	var b strings.Builder
	for i := 0; i < len(g); i++ {
		switch {
		case g[i] == '\\' && i+1 < len(g):
			b.WriteByte(g[i])
			i++
		case g[i] == '"':
			b.WriteByte('\\')
		}
		b.WriteByte(g[i])
	}
	return `"` + b.String() + `"`
}

// defaultProfile is where the installers of Nix put Nix.
const defaultProfile = "/nix/var/nix/profiles/default"

// guessKind looks whether this is NixOS (its activation makes /etc/NIXOS).
func guessKind() machineKind {
	if _, err := os.Stat("/etc/NIXOS"); err == nil {
		return kindNixOS
	}
	return kindLinux
}

// declaredKeys are the trusted-public-keys of /etc/nix/nix.conf, or Nix's own
// default. Files that nix.conf includes are not followed.
func declaredKeys() []string {
	keys := []string{}
	found := false
	b, _ := os.ReadFile("/etc/nix/nix.conf")
	for line := range strings.Lines(string(b)) {
		line, _, _ = strings.Cut(line, "#")
		name, value, _ := strings.Cut(line, "=")
		switch strings.TrimSpace(name) {
		case "trusted-public-keys", "binary-cache-public-keys":
			keys, found = strings.Fields(value), true
		case "extra-trusted-public-keys":
			keys = append(keys, strings.Fields(value)...)
		}
	}
	if !found {
		keys = append([]string{cacheKey}, keys...)
	}
	slices.Sort(keys)
	return slices.Compact(keys)
}
