package split

import (
	"strings"
	"testing"
)

// The fourth row: alice's build inputs survive her collections as long as what
// they made is rooted; the system's, where the same is built the same way, do
// not. Her choice holds whatever the system's nix.conf says, and no client's
// option changes it.
func TestKeepOutputs(t *testing.T) {
	each(t, "keep-outputs = false\nkeep-derivations = false\n", func(t *testing.T, l *laptop) {
		l.unlockOf(t, "alice")
		// tool is needed to build product, which does not refer to it.
		expr := func(who string) string {
			return `let
				sh = name: more: derivation ({ inherit name; system = builtins.currentSystem; builder = "/bin/sh"; } // more);
				source = builtins.toFile "source-` + who + `" "source";
				tool = sh "tool-` + who + `" { args = [ "-c" "cat ${source} > $out" ]; };
			in sh "product-` + who + `" { inherit tool; args = [ "-c" "read x < $tool; echo made with $x > $out" ]; }`
		}
		sides := []struct {
			who  string
			at   place
			kept bool
		}{{"alice", alice, true}, {"bob", bobOut, false}}
		type parts struct{ product, drv, tool, toolDrv, source string }
		of := map[string]parts{}
		for _, s := range sides {
			var p parts
			p.product = l.build(t, s.at, expr(s.who), "-o product")
			p.drv = l.at(t, s.at, "nix-store --query --deriver "+p.product)
			for _, r := range strings.Fields(l.at(t, s.at, "nix-store --query --requisites --include-outputs "+p.drv)) {
				switch {
				case strings.HasSuffix(r, "-tool-"+s.who):
					p.tool = r
				case strings.HasSuffix(r, "-tool-"+s.who+".drv"):
					p.toolDrv = r
				case strings.HasSuffix(r, "-source-"+s.who):
					p.source = r
				}
			}
			l.have(t, s.at, true, map[string]string{"product": p.product, "its derivation": p.drv, "tool": p.tool, "its derivation too": p.toolDrv, "source": p.source})
			if refs := l.at(t, s.at, "nix-store --query --references "+p.product); refs != "" {
				t.Fatalf("%s's product refers to %s", s.who, refs)
			}
			of[s.who] = p
		}
		for round := range 2 { // the second time after a lock
			for _, s := range sides {
				p := of[s.who]
				if s.kept {
					l.personalGC(t)
				} else {
					l.systemGC(t, p.drv, p.tool, p.toolDrv, p.source)
				}
				l.have(t, s.at, true, map[string]string{s.who + "'s product": p.product})
				l.have(t, s.at, s.kept, map[string]string{
					s.who + "'s derivation": p.drv, s.who + "'s tool": p.tool, s.who + "'s tool's derivation": p.toolDrv, s.who + "'s source": p.source,
				})
			}
			l.verify(t)
			if round == 0 {
				l.lockOf(t, "alice")
				l.unlockOf(t, "alice")
			}
		}
		// A user who is not trusted by the daemon cannot talk it out of it.
		l.at(t, alice, "nix-store --gc --option keep-outputs false --option keep-derivations false")
		p := of["alice"]
		l.have(t, alice, true, map[string]string{"tool, asked to be dropped": p.tool, "derivation, asked to be dropped": p.drv})
		// The tool is there for the next build, which does not make it anew.
		log := l.at(t, alice, "nix-build --no-out-link --check "+l.expression(t, expr("alice"))+" 2>&1")
		if strings.Contains(log, "building '"+p.toolDrv) {
			t.Errorf("the tool was built again:\n%s", log)
		}
		// Without its root all of it goes.
		l.at(t, alice, "rm product")
		l.personalGC(t)
		l.have(t, alice, false, map[string]string{"product": p.product, "derivation": p.drv, "tool": p.tool, "tool's derivation": p.toolDrv, "source": p.source})
		l.verify(t)
	})
}

// What a personal build needed of the system store only while it ran is its
// input, too: the pins hold it.
func TestKeepSystemInputs(t *testing.T) {
	each(t, "", func(t *testing.T, l *laptop) {
		tool := l.build(t, rootOut, echo("tool", "tool"), "")
		l.unlockOf(t, "alice")
		product := l.build(t, alice, `derivation { name = "product"; system = builtins.currentSystem; builder = "/bin/sh";
			tool = builtins.storePath `+tool+`; args = [ "-c" "read x < $tool; echo made with $x > $out" ]; }`, "-o product")
		if refs := l.at(t, alice, "nix-store --query --references "+product); refs != "" {
			t.Fatalf("the product refers to %s", refs)
		}
		l.personalGC(t)
		l.lockOf(t, "alice")
		l.systemGC(t)
		l.unlockOf(t, "alice")
		l.systemGC(t)
		l.have(t, rootOut, true, map[string]string{"tool": tool})
		l.at(t, alice, "nix-store --realise --check $(nix-store --query --deriver "+product+")")
		l.at(t, alice, "rm product")
		l.personalGC(t)
		eventually(t, "the pin goes", func() bool { return len(l.pins()) == 0 })
		l.systemGC(t, tool)
		l.have(t, rootOut, false, map[string]string{"tool": tool})
		l.verify(t)
	})
}
