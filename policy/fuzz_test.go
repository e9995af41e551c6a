package policy

import (
	"testing"
)

// FuzzParse: no text makes the parser panic; what is wrong lies inside the text; what
// is right reads back as the same policy, and decides a graph.
func FuzzParse(f *testing.F) {
	for _, c := range canonical {
		f.Add([]byte(c.text), true)
		f.Add([]byte(c.text), false)
	}
	for _, c := range hostile {
		if len(c.text) < 2000 {
			f.Add([]byte(c.text), true)
		}
	}
	f.Add([]byte("personal mine\nlet mine = name \"a*\" or built-from (closure-of /p/one)"), false)
	graphs := []*Index{}
	for seed := range uint64(3) {
		ix, err := NewIndex(newMaker(seed).graph())
		if err != nil {
			f.Fatal(err)
		}
		graphs = append(graphs, ix)
	}
	f.Fuzz(func(t *testing.T, text []byte, root bool) {
		s := Source{"policy", text, root}
		p, err := Parse(s)
		if err != nil {
			placed(t, "", err, s)
			return
		}
		again, err := Parse(p.Sources()...)
		if err != nil {
			t.Fatalf("%v\n%s", err, p)
		}
		if !same(p, again) || p.String() != again.String() {
			t.Fatalf("printing makes another policy:\n%s\n%s", p, again)
		}
		for _, ix := range graphs {
			v := ix.Decide(p)
			if !root && v.System.Count() > 0 {
				t.Fatal("a user's file grants")
			}
			for id := range ID(ix.g.Len()) {
				v.Why(id)
			}
		}
	})
}

// FuzzExpectations: the same for the file beside the policy.
func FuzzExpectations(f *testing.F) {
	for _, s := range []string{
		"system name \"glibc\" because signed-by\n", "personal /nix/store/*-x\n", "personal mine because mine\n# x\n",
		"system unfre", "personal (unfree\nsystem unsigned", "system /run/x", "personal \"/nix/store/[", "because", "system unfree because",
	} {
		f.Add([]byte(s))
	}
	p := mustParse(f, Source{"policy", []byte(benchKeys() + "let mine = built-here\nsystem signed-by one-1\npersonal mine or built-from (mine)"), true})
	v := mustDecide(f, newMaker(5).graph(), p)
	f.Fuzz(func(t *testing.T, text []byte) {
		s := Source{"policy.test", text, false}
		x, err := p.ParseExpectations(s)
		if err != nil {
			placed(t, "", err, s)
			return
		}
		again, err := p.ParseExpectations(Source{"again", []byte(x.String()), false})
		if err != nil || again.String() != x.String() || again.Len() != x.Len() {
			t.Fatalf("%v\n%s\n%s", err, x, again)
		}
		for _, f := range x.Evaluate(v) {
			if f.Pos.Line < 1 || f.Msg == "" || f.Matched < len(f.Paths) {
				t.Fatalf("%+v", f)
			}
		}
	})
}
