package policy

import (
	"cmp"
	"math/rand/v2"
	"slices"
	"sync"

	"overkeep/policy/graph"
)

// Report is what is questionable about a policy over a store.
type Report struct {
	Broken     []Broken
	Reach      []Reach   // the widest first
	Idle       []int     // rules that are yes for no path; of vetoes that count the unknown, nor unknown for any
	Hanging    []Hanging // for each "when known" that changes something
	OnlyFor    Total     // personal paths that would be system if every unknown turned out well
	Unresolved []string  // closure-of targets that could not be resolved
}

// Broken is a require line that does not hold, or of which nobody can tell.
type Broken struct {
	Rule       int
	Paths      []graph.ID // personal paths that it is yes for
	Unknown    int        // personal paths that it is unknown for
	Unresolved []string   // its closure-of targets that could not be resolved
}

// Holds reports whether no path breaks the line and all that it is about is known
// to be there. Single unknown facts do not break a line.
func (b *Broken) Holds() bool { return len(b.Paths) == 0 && len(b.Unresolved) == 0 }

// Reach is how many paths a personal path drags along.
type Reach struct {
	ID    graph.ID
	Pulls Total // granted and not vetoed themselves, but referring to it by way of such
}

// Hanging is what a line's "when known" lets through.
type Hanging struct {
	Rule   int
	Direct int   // system paths for which the condition is unknown
	Moves  Total // system paths that would be personal without "when known"
}

// CheckOptions are the limits of a Report. The zero value is replaced by ten of
// everything.
type CheckOptions struct {
	MinReach int // paths dragged along that are worth a word
	MaxReach int // paths in Report.Reach
}

// Check looks for what a person should know before they use the policy. It decides
// once more for each line with "when known", and once for OnlyFor.
func (v *Verdicts) Check(o CheckOptions) *Report {
	if o.MinReach == 0 {
		o.MinReach = 10
	}
	if o.MaxReach == 0 {
		o.MaxReach = 10
	}
	r := &Report{Unresolved: v.unresolved(v.policy.Roots())}
	r.Broken = v.requires()
	r.Reach = v.reach(o)
	for i := range v.policy.Rules {
		rule, stat := &v.policy.Rules[i], v.Stats[i]
		if stat.Yes == 0 && (stat.Unknown == 0 || rule.Verb != Veto || rule.WhenKnown) {
			r.Idle = append(r.Idle, i)
		}
		if rule.WhenKnown && stat.Unknown > 0 {
			if h := v.hanging(i); h.Direct > 0 {
				r.Hanging = append(r.Hanging, h)
			}
		}
	}
	best := v.ix.decide(v.policy, reading{hopeful: true, rule: NoRule})
	r.OnlyFor = v.moved(best.System, v.System)
	return r
}

// moved counts the paths that are in one set and not in the other.
func (v *Verdicts) moved(in, out graph.Bits) (t Total) {
	for w := range in {
		graph.Bits{in[w] &^ out[w]}.Each(func(i graph.ID) { t.add(v.ix.g.NarSize[w*64+int(i)]) })
	}
	return t
}

func (v *Verdicts) unresolved(roots []string) (out []string) {
	for _, root := range roots {
		if !v.ix.g.Roots[root].Known {
			out = append(out, root)
		}
	}
	return out
}

// requires evaluates the require lines against the verdicts.
func (v *Verdicts) requires() (out []Broken) {
	var rules []int
	var tops []int32
	for i, r := range v.policy.Rules {
		if r.Verb == Require {
			rules, tops = append(rules, i), append(tops, r.cond)
		}
	}
	if len(rules) == 0 {
		return nil
	}
	out = make([]Broken, len(rules))
	var mu sync.Mutex
	v.ix.mu.Lock()
	ev := v.ix.evaluate(v.policy.prog, tops)
	v.ix.mu.Unlock()
	ev.sweep(tops, func(b *block) {
		mu.Lock()
		defer mu.Unlock()
		for i := range rules {
			yes, may := b.at(i)
			for w := range yes {
				personal := ^v.System[b.lo+w]
				graph.Bits{yes[w] & personal}.Each(func(id graph.ID) {
					out[i].Paths = append(out[i].Paths, graph.ID((b.lo+w)*64)+id)
				})
				out[i].Unknown += graph.Bits{may[w] &^ yes[w] & personal}.Count()
			}
		}
	})
	for i := range out {
		out[i].Rule = rules[i]
		slices.Sort(out[i].Paths)
		var roots []string
		for _, n := range v.policy.prog.below(func(int32) bool { return false }, tops[i]) {
			if root := v.policy.prog.nodes[n].root; root != "" {
				roots = append(roots, root)
			}
		}
		out[i].Unresolved = v.unresolved(roots)
	}
	return slices.DeleteFunc(out, func(b Broken) bool { return b.Holds() && b.Unknown == 0 })
}

func (v *Verdicts) hanging(rule int) Hanging {
	h := Hanging{Rule: rule}
	strict := v.ix.decide(v.policy, reading{rule: rule})
	h.Moves = v.moved(v.System, strict.System)
	v.System.Each(func(id graph.ID) {
		if strict.reasons[id] == VetoUnknown {
			h.Direct++
		}
	})
	return h
}

const ranks = 8 // rounds of the estimate

// reach finds the personal paths that drag most others along. Exact counts are a
// walk each, so they are made for the few with the greatest estimates only (Cohen,
// "Size-estimation framework with applications to transitive closure and
// reachability", 1997: the least of random ranks tells how many there are).
func (v *Verdicts) reach(o CheckOptions) (out []Reach) {
	n := v.ix.g.Len()
	var all []graph.ID
	for id, r := range v.reasons {
		if r == Reference {
			all = append(all, graph.ID(id))
		}
	}
	if all == nil {
		return nil
	}
	sum := make([]float32, n)
	least := make([]float32, n)
	shuffle := rand.New(rand.NewPCG(1, 2)) // the same every time
	for range ranks {
		shuffle.Shuffle(len(all), func(i, j int) { all[i], all[j] = all[j], all[i] })
		v.leastRanks(least, all)
		for id, l := range least {
			sum[id] += l
		}
	}
	var ids []graph.ID
	for id := range graph.ID(n) {
		if v.reasons[id] != Reference && !v.System.Has(id) && sum[id] < noRank {
			ids = append(ids, id)
		}
	}
	slices.SortFunc(ids, func(a, b graph.ID) int { return cmp.Or(cmp.Compare(sum[a], sum[b]), cmp.Compare(a, b)) })
	seen := graph.NewBits(n)
	for _, id := range ids[:min(len(ids), 4*o.MaxReach)] {
		if t := v.pulls(id, seen); t.Paths >= o.MinReach {
			out = append(out, Reach{id, t})
		}
	}
	slices.SortStableFunc(out, func(a, b Reach) int { return b.Pulls.Paths - a.Pulls.Paths })
	return out[:min(len(out), o.MaxReach)]
}

const noRank = 1e9

// leastRanks gives every path the least rank of the dragged paths that lead to it by
// way of dragged paths; their ranks are their places in a random order. Who comes
// first leaves its rank wherever it leads, so nobody goes there again.
func (v *Verdicts) leastRanks(least []float32, order []graph.ID) {
	for id := range least {
		least[id] = noRank
	}
	var todo []graph.ID
	for i, id := range order {
		if least[id] != noRank {
			continue
		}
		rank := float32(i+1) / float32(len(order))
		least[id] = rank
		for todo = append(todo, id); len(todo) > 0; {
			id := todo[len(todo)-1]
			todo = todo[:len(todo)-1]
			for _, r := range v.ix.g.References(id) {
				if least[r] == noRank {
					least[r] = rank
					if v.reasons[r] == Reference {
						todo = append(todo, r)
					}
				}
			}
		}
	}
}

// pulls counts the paths that a personal path drags along. It leaves seen empty.
func (v *Verdicts) pulls(id graph.ID, seen graph.Bits) (t Total) {
	from := v.ix.from()
	queue := []graph.ID{id}
	seen.Set(id)
	for i := 0; i < len(queue); i++ {
		for _, r := range from.To(queue[i]) {
			if v.reasons[r] == Reference && !seen.Has(r) {
				seen.Set(r)
				queue = append(queue, r)
				t.add(v.ix.g.NarSize[r])
			}
		}
	}
	for _, id := range queue {
		seen[id>>6] = 0
	}
	return t
}
