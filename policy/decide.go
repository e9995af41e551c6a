package policy

import (
	"math/bits"
	"sync"

	"overkeep/policy/graph"
)

// Reason is why a path is placed where it is.
type Reason uint8

// The reasons. All but Granted mean personal; those before Reference lie in the path
// itself.
const (
	Granted      Reason = iota // a system line says yes, no personal line speaks, all references are system
	NotGranted                 // no system line says yes or could
	GrantUnknown               // no system line says yes, but one could not tell
	Vetoed                     // a personal line says yes
	VetoUnknown                // a personal line could not tell
	Unreadable                 // its row or its .drv cannot be read: nothing of it is believed
	Differing                  // both stores have it, with other data: nothing of it is believed
	Reference                  // granted and not vetoed, but it refers to a personal path
)

// String is the reason as `because` in expectations and machine output name it.
func (r Reason) String() string { return reasonNames[r] }

var reasonNames = []string{"granted", "not-granted", "grant-unknown", "vetoed", "veto-unknown", "unreadable", "differing", "reference"}

// NoRule stands for no line.
const NoRule = -1

// RuleStat counts for how many paths a line's condition is yes, and for how many it is
// unknown although the path is believed.
type RuleStat struct{ Yes, Unknown int }

// Verdicts is the placement of every path of a graph by a policy. It is immutable,
// three bytes a path and its index.
type Verdicts struct {
	System graph.Bits // the paths placed system; all others are personal
	Stats  []RuleStat // for each of Policy.Rules

	ix      *Index
	policy  *Policy
	reasons []Reason
	rules   []uint16 // the line that decided, plus one
}

// Decide indexes and decides a graph once; see Index.Decide for more than once.
func Decide(g *graph.Graph, p *Policy) (*Verdicts, error) {
	ix, err := NewIndex(g)
	if err != nil {
		return nil, err
	}
	return ix.Decide(p), nil
}

// Decide places every path.
//
// A graph may hold a part of a store. Its verdicts are those of the whole store if
// it is closed under references, and holds what Policy.Needs names besides.
func (ix *Index) Decide(p *Policy) *Verdicts { return ix.decide(p, reading{rule: NoRule}) }

// Index is the index that was decided over, Policy the policy.
func (v *Verdicts) Index() *Index   { return v.ix }
func (v *Verdicts) Policy() *Policy { return v.policy }

// Reason is why a path is where it is, and the line that decided: of a granted path
// the first system line that says yes, of a vetoed one the first personal line that
// says yes (or, if none does, could not tell); else NoRule, and for Reference the
// line that grants the path itself. The first is the first in the order of the
// sources; that order never changes the reason.
func (v *Verdicts) Reason(id graph.ID) (Reason, int) {
	return v.reasons[id], int(v.rules[id]) - 1
}

// reading is how unknown values are read. The zero reading with rule NoRule is that
// of docs/POLICY.md.
type reading struct {
	hopeful bool // what is not known grants and does not veto: what could be at best
	rule    int  // the "when known" of this line is not read
}

// tally is what the lines say of a block of paths.
type tally struct {
	granted, hoped, vetoed, doubted [blockWords]uint64
	grant, hope, veto, doubt        [blockWords * 64]uint16 // the first line to say so, plus one
}

var tallies = sync.Pool{New: func() any { return new(tally) }}

// note adds a line that speaks of the paths in set, and remembers it for those that
// no line before it spoke of.
func note(all *[blockWords]uint64, first *[blockWords * 64]uint16, w int, set uint64, rule int) {
	for fresh := set &^ all[w]; fresh != 0; fresh &= fresh - 1 {
		first[w*64+bits.TrailingZeros64(fresh)] = uint16(rule + 1)
	}
	all[w] |= set
}

func (t *tally) read(p *Policy, b *block, how reading) {
	size := b.hi - b.lo
	clear(t.granted[:size])
	clear(t.hoped[:size])
	clear(t.vetoed[:size])
	clear(t.doubted[:size])
	for i := range p.Rules {
		r := &p.Rules[i]
		yes, may := b.at(i)
		for w := range yes {
			unknown := may[w] &^ yes[w]
			switch {
			case r.Verb == Grant && how.hopeful:
				note(&t.granted, &t.grant, w, may[w], i)
			case r.Verb == Grant:
				note(&t.granted, &t.grant, w, yes[w], i)
				note(&t.hoped, &t.hope, w, unknown, i)
			case r.Verb == Veto:
				note(&t.vetoed, &t.veto, w, yes[w], i)
				if !how.hopeful && (!r.WhenKnown || how.rule == i) {
					note(&t.doubted, &t.doubt, w, unknown, i)
				}
			}
		}
	}
}

func (ix *Index) decide(p *Policy, how reading) *Verdicts {
	n := ix.g.Len()
	v := &Verdicts{System: graph.NewBits(n), Stats: make([]RuleStat, len(p.Rules)), ix: ix, policy: p,
		reasons: make([]Reason, n), rules: make([]uint16, n)}
	var mu sync.Mutex
	ix.mu.Lock()
	ev := ix.evaluate(p.prog, p.conditions())
	ix.mu.Unlock()
	ev.sweep(p.conditions(), func(b *block) {
		t := tallies.Get().(*tally)
		t.read(p, b, how)
		v.place(t, b)
		tallies.Put(t)
		mu.Lock()
		defer mu.Unlock()
		for i := range p.Rules {
			yes, may := b.at(i)
			for w := range yes {
				v.Stats[i].Yes += bits.OnesCount64(yes[w])
				v.Stats[i].Unknown += bits.OnesCount64(may[w] &^ yes[w] &^ ix.bad[b.lo+w])
			}
		}
	})
	v.close()
	return v
}

// conditions are the nodes of all rules.
func (p *Policy) conditions() []int32 {
	out := make([]int32, len(p.Rules))
	for i, r := range p.Rules {
		out[i] = r.cond
	}
	return out
}

// place notes the reasons that lie in the paths of a block themselves. The granted
// ones are candidates in System until close.
func (v *Verdicts) place(t *tally, b *block) {
	for w := range b.hi - b.lo {
		from := (b.lo + w) * 64
		var system uint64
		for i := range min(64, len(v.reasons)-from) {
			id, bit, at := graph.ID(from+i), uint64(1)<<i, w*64+i
			reason, rule := NotGranted, uint16(0)
			switch flags := v.ix.g.Flags[id]; {
			case flags&graph.Broken != 0:
				reason = Unreadable
			case flags&graph.Differs != 0:
				reason = Differing
			case t.vetoed[w]&bit != 0:
				reason, rule = Vetoed, t.veto[at]
			case t.doubted[w]&bit != 0:
				reason, rule = VetoUnknown, t.doubt[at]
			case t.granted[w]&bit != 0:
				reason, rule = Granted, t.grant[at]
				system |= bit
			case t.hoped[w]&bit != 0:
				reason, rule = GrantUnknown, t.hope[at]
			}
			v.reasons[id], v.rules[id] = reason, rule
		}
		v.System[b.lo+w] = system
	}
}

// sweeps is how often close goes through all paths before it turns the references
// round, which costs as much as a few sweeps.
var sweeps = 4 // at least one; tests try fewer

// close takes out of System what refers, by whatever way, to something that is no
// candidate. The paths of a cycle stay or go together.
//
// Nix mostly registers a path after what it refers to, so one sweep in the order of
// the ids finds nearly all. Only paths that refer forwards can be left over.
func (v *Verdicts) close() {
	for range sweeps {
		for w, system := range v.System {
			for ; system != 0; system &= system - 1 {
				if bit := bits.TrailingZeros64(system); v.opens(graph.ID(w*64 + bit)) {
					v.System[w] &^= 1 << bit
					v.reasons[w*64+bit] = Reference
				}
			}
		}
		if v.left() == nil {
			return
		}
	}
	personal := graph.NewBits(len(v.reasons))
	for i, w := range v.System {
		personal[i] = ^w
	}
	v.ix.trim(0, personal, personal)
	v.ix.spread(personal, v.left(), graph.NewBits(len(v.reasons)))
	for i, w := range personal {
		graph.Bits{v.System[i] & w}.Each(func(bit graph.ID) { v.reasons[graph.ID(i*64)+bit] = Reference })
		v.System[i] &^= w
	}
}

// opens reports whether a path refers to one that is not in System.
func (v *Verdicts) opens(id graph.ID) bool {
	for _, r := range v.ix.g.References(id) {
		if !v.System.Has(r) {
			return true
		}
	}
	return false
}

// left is the paths in System that a sweep could not know to go, nil if there is none.
func (v *Verdicts) left() (set graph.Bits) {
	for w, back := range v.ix.back {
		graph.Bits{back & v.System[w]}.Each(func(bit graph.ID) {
			if id := graph.ID(w*64) + bit; v.opens(id) {
				if set == nil {
					set = graph.NewBits(len(v.reasons))
				}
				set.Set(id)
			}
		})
	}
	return set
}
