package policy

import (
	"testing"

	"overkeep/policy/graph"
)

const exampleKey = "cache.nixos.org-1:6NCHdD59X431o0gWypbMrAURkbJ16ZPMQFGspcDShjY="

const example = `# A NixOS that still boots, and a client's work that stays private
key ` + exampleKey + `
let boot = closure-of /run/current-system
system   signed-by cache.nixos.org-1
system   boot
personal name "*-acme-*"
personal built-from (name "*-acme-*")
personal from "git+ssh://*acme.example/*"   when known
personal unfree                             when known
require  system boot
`

func TestSmoke(t *testing.T) {
	p, err := Parse(Source{"policy", []byte(example), true})
	if err != nil {
		t.Fatal(err)
	}
	t.Log(p.String(), p.Roots(), p.Needs())
	b := graph.NewBuilder("/nix/store")
	b.Keys(exampleKey)
	n := graph.TestBase
	b.Add(graph.Path{Base: n("glibc-2"), Flags: graph.Output, SignedBy: []string{exampleKey}, Refs: []string{n("glibc-2")}, Deriver: n("glibc-2.drv")})
	b.Add(graph.Path{Base: n("glibc-2.drv"), Flags: graph.Derivation, Outputs: []string{n("glibc-2")}})
	b.Add(graph.Path{Base: n("app"), Flags: graph.Output, SignedBy: []string{exampleKey}, Refs: []string{n("glibc-2"), n("lib-acme-1")}})
	b.Add(graph.Path{Base: n("lib-acme-1"), Flags: graph.Output, SignedBy: []string{exampleKey}, Refs: []string{n("glibc-2")}})
	b.Add(graph.Path{Base: n("tool"), Flags: graph.Output, SignedBy: []string{exampleKey}, Refs: []string{n("glibc-2")}, Deriver: n("tool.drv")})
	b.Add(graph.Path{Base: n("tool.drv"), Flags: graph.Derivation, Refs: []string{n("src-acme-3")}, Outputs: []string{n("tool")}})
	b.Add(graph.Path{Base: n("src-acme-3"), Flags: graph.Source})
	b.Root("/run/current-system", n("glibc-2"))
	g, err := b.Graph()
	if err != nil {
		t.Fatal(err)
	}
	v, err := Decide(g, p)
	if err != nil {
		t.Fatal(err)
	}
	for id := range graph.ID(g.Len()) {
		r, i := v.Reason(id)
		line := ""
		if i >= 0 {
			line = p.Rules[i].Text
		}
		t.Log(v.System.Has(id), g.Path(id), r, line)
	}
}
