package plan

import (
	"fmt"
	"slices"
	"testing"

	"pgregory.net/rapid"

	"overkeep/policy/graph"
)

var rootKinds = []RootKind{RootBoot, RootUser, RootOther, RootKeepPin, RootProcess, RootTemp, RootOwnPin}

// drawn is a world with circles, doubt and roots in it.
func drawn(t *rapid.T) Input {
	n := rapid.IntRange(1, 12).Draw(t, "n")
	names := make([]string, n)
	for i := range names {
		names[i] = fmt.Sprintf("%s%d", rapid.SampledFrom([]string{"pub", "pub", "secret", "x", "rowless", "pub-rowless"}).Draw(t, "name"), i)
	}
	b := graph.NewBuilder("/nix/store")
	for _, name := range names {
		p := graph.Path{Base: graph.TestBase(name), NarSize: 1}
		p.Flags = rapid.SampledFrom([]graph.Flags{lo, lo, lo, up, up, up, lu, 0, lu | graph.Differs, lo | graph.Broken, up | graph.Broken}).Draw(t, "flags")
		for _, r := range names {
			if rapid.IntRange(0, n).Draw(t, "ref") == 0 {
				p.Refs = append(p.Refs, graph.TestBase(r))
			}
		}
		b.Add(p)
	}
	g, err := b.Graph()
	if err != nil {
		t.Fatal(err)
	}
	tt := &testing.T{}
	in := Input{Verdicts: decide(tt, g), Row: rowsOf(g)}
	for range rapid.IntRange(0, 3).Draw(t, "roots") {
		in.Roots = append(in.Roots, Root{Link: fmt.Sprint("/root", len(in.Roots)), Path: g.Path(graph.ID(rapid.IntRange(0, n-1).Draw(t, "root"))),
			Kind: rapid.SampledFrom(rootKinds).Draw(t, "kind")})
	}
	some := func(layer graph.Flags, not []graph.ID) (out []graph.ID) {
		for id := range graph.ID(n) {
			if g.Flags[id]&layer != 0 && !slices.Contains(not, id) && rapid.IntRange(0, 2).Draw(t, "chosen") == 0 {
				out = append(out, id)
			}
		}
		return out
	}
	in.Mode = rapid.SampledFrom([]Mode{Misplaced, Misplaced, Chosen, Exact}).Draw(t, "mode")
	switch in.Mode {
	case Chosen: // one direction at a time, as the commands ask
		if rapid.Bool().Draw(t, "seal") {
			in.Seal = some(lo, nil)
		} else {
			in.Release = some(up, nil)
		}
	case Exact:
		in.Seal = some(lo, nil)
		in.Release = some(up, in.Seal)
	}
	return in
}

// open are the references out of a store that a layer's paths make; the ones that
// were open before do not count.
func open(g *graph.Graph, lower graph.Bits) map[[2]graph.ID]bool {
	out := map[[2]graph.ID]bool{}
	lower.Each(func(id graph.ID) {
		for _, r := range g.References(id) {
			if !lower.Has(r) {
				out[[2]graph.ID{id, r}] = true
			}
		}
	})
	return out
}

// TestInvariants: after every prefix the system store is as closed as it was, and
// everything that lies where it should not is moved, or blocked for a true reason.
func TestInvariants(t *testing.T) {
	rapid.Check(t, func(t *rapid.T) {
		in := drawn(t)
		g := in.Verdicts.Index().Graph()
		p, err := Make(in)
		if err != nil {
			if in.Mode == Chosen { // what the policy does not permit
				return
			}
			t.Fatal(err)
		}
		ids := map[string]graph.ID{}
		lower := graph.NewBits(g.Len())
		for id := range graph.ID(g.Len()) {
			ids[g.Path(id)] = id
			if g.Flags[id]&lo != 0 {
				lower.Set(id)
			}
		}
		before := open(g, lower)
		state := map[graph.ID]string{}
		for i, m := range p.Moves {
			id := ids[m.Path]
			if state[id] != "" {
				t.Fatalf("%s twice", m.Path)
			}
			state[id] = string(m.Kind)
			if m.Duplicate != (g.Flags[id]&lu == lu) || m.NarHash == "" || g.Flags[id]&(graph.Differs|graph.Broken) != 0 {
				t.Fatalf("%+v", m)
			}
			if m.Kind == Seal {
				if !lower.Has(id) || i > 0 && p.Moves[i-1].Kind == Release {
					t.Fatalf("%+v", m)
				}
				lower[id>>6] &^= 1 << (id & 63)
			} else {
				if g.Flags[id]&up == 0 || in.Mode != Exact && !in.Verdicts.System.Has(id) {
					t.Fatalf("%+v", m)
				}
				lower.Set(id)
			}
			if i+1 < len(p.Moves) && p.Moves[i+1].Unit == m.Unit {
				continue // within a unit
			}
			for e := range open(g, lower) {
				if !before[e] {
					t.Fatalf("after %d moves %s refers to %s, which is not there\n%q", i+1, g.Path(e[0]), g.Path(e[1]), shown(p))
				}
			}
		}
		blocked := map[graph.ID]Blocked{}
		for _, b := range p.Blocked {
			id := ids[b.Path]
			if state[id] != "" {
				t.Fatalf("%s moves and is blocked", b.Path)
			}
			state[id] = "blocked " + string(b.Kind)
			blocked[id] = b
		}
		for _, b := range p.Blocked {
			if why := untrue(in, g, ids, state, blocked, b); why != "" {
				t.Fatalf("%s is not blocked by %s %s via %s: %s\n%q", b.Path, b.Why, b.By, b.Via, why, shown(p))
			}
		}
		for id := range graph.ID(g.Len()) {
			system, flags := in.Verdicts.System.Has(id), g.Flags[id]
			want := ""
			switch {
			case in.Mode == Misplaced && !system && flags&lo != 0 || slices.Contains(in.Seal, id):
				want = "seal"
			case in.Mode == Misplaced && system && flags&up != 0 || slices.Contains(in.Release, id):
				want = "release"
			}
			if got := state[id]; want != "" && got != want && got != "blocked "+want || want == "" && got != "" && in.Mode != Chosen {
				t.Fatalf("%s: %q, want %q", g.Path(id), got, want)
			}
		}
		for i, r := range in.Roots {
			id, along := ids[r.Path], slices.Contains(p.Roots, in.Roots[i])
			if along != (r.Kind == RootUser && state[id] == "seal") {
				t.Fatalf("root %+v moves along: %v", r, along)
			}
			if state[id] == "seal" && r.Kind != RootUser && r.Kind != RootOwnPin {
				t.Fatalf("%s is sealed, but held by %+v", r.Path, r)
			}
		}
	})
}

// untrue says why a blocked path's reason is none.
func untrue(in Input, g *graph.Graph, ids map[string]graph.ID, state map[graph.ID]string, blocked map[graph.ID]Blocked, b Blocked) string {
	id := ids[b.Path]
	if b.Kind == Release && b.Why == BlockedNeeds && b.Duplicate {
		return "the system store has it already"
	}
	refers := func(a, to graph.ID) bool { return slices.Contains(g.References(a), to) }
	if b.Via != "" {
		via, ok := blocked[ids[b.Via]]
		if !ok || via.Kind != b.Kind {
			return "what passes it on is not blocked"
		}
		if b.Kind == Seal && !refers(ids[b.Via], id) || b.Kind == Release && !refers(id, ids[b.Via]) {
			return "there is no such reference"
		}
		own := via.Why == BlockedRow || via.Why == BlockedDiffers
		if via.By != b.By && !(own && b.By == b.Via) {
			return "by another: " + via.By
		}
		return ""
	}
	switch b.Why {
	case BlockedRow:
		hash, _, _ := in.Row(b.Kind, id)
		if hash != "" && g.Flags[id]&graph.Broken == 0 {
			return "the row is there"
		}
	case BlockedDiffers:
		if g.Flags[id]&graph.Differs == 0 {
			return "it does not differ"
		}
	case BlockedReferenced:
		by, ok := ids[b.By]
		if !ok || !refers(by, id) || g.Flags[by]&lo == 0 || state[by] == "seal" {
			return "that does not refer to it, or does not stay"
		}
	case BlockedNeeds:
		by, ok := ids[b.By]
		if !ok || !refers(id, by) || g.Flags[by]&lo != 0 && state[by] != "seal" || state[by] == "release" {
			return "it does not refer to that, or that will be there"
		}
	default:
		if !slices.ContainsFunc(in.Roots, func(r Root) bool {
			return r.Path == b.Path && r.Link == b.By && BlockWhy(r.Kind) == b.Why && r.Kind != RootUser && r.Kind != RootOwnPin
		}) {
			return "no such root"
		}
	}
	return ""
}
