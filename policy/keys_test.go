package policy

import (
	"testing"

	"overkeep/policy/graph"
)

// A user's file may declare keys for its own vetoes: the name of a client's cache is
// as private as the client. What root's lines say does not change: with one key more
// less would be unsigned, and a user's file would have made a path system.
func TestUsersKeys(t *testing.T) {
	b := graph.NewBuilder("/nix/store")
	b.Keys(testKeys...)
	b.Add(graph.Path{Base: base("client"), Flags: graph.Output, SignedBy: testKeys[1:]})
	b.Add(graph.Path{Base: base("both"), Flags: graph.Output, SignedBy: testKeys})
	b.Add(graph.Path{Base: base("none"), Flags: graph.Output})
	g, err := b.Graph()
	if err != nil {
		t.Fatal(err)
	}
	root := func(lines string) Source {
		return Source{"policy", []byte("key " + testKeys[0] + "\nlet bare = unsigned\n" + lines), true}
	}
	key := "key " + testKeys[1] + "\n"
	for _, c := range []struct{ root, user, system string }{
		{"system name \"*\"\npersonal unsigned", "", "both"},
		{"system name \"*\"\npersonal unsigned", key, "both"},
		{"system name \"*\"\npersonal bare", key, "both"},
		{"system name \"*\"", key + "personal bare", "both"}, // root's let, seen by a user
		{"system unsigned", key, "client none"},
		{"system name \"*\"", key + "personal unsigned", "client both"}, // of all keys that this file sees
		{"system name \"*\"", key + "personal signed-by two-1", "none"},
		{"system name \"*\"", key + "personal signed-by two-1 and not signed-by one-1", "both none"},
	} {
		v := mustDecide(t, g, mustParse(t, root(c.root), Source{"alice", []byte(c.user), false}))
		got := ""
		v.System.Each(func(id ID) {
			if got != "" {
				got += " "
			}
			got += string(g.Name(id))
		})
		if got != c.system {
			t.Errorf("%q, %q: system are %q, want %q", c.root, c.user, got, c.system)
		}
	}
}
