// Package policy decides which store paths are public enough for the system store
// and which are personal, and says why.
//
// A policy is a short text (docs/POLICY.md): "system" lines grant, "personal" lines
// veto, and what nothing grants is personal. Conditions have three values. Terms
// used here: a *grant* counts if its condition is yes; a *veto* counts if it is yes
// or unknown, or only if it is yes where the line ends in "when known"; a path is
// *placed* system if it is granted, not vetoed, not broken, and all it refers to is
// placed system.
//
// Start with
//
//	p, err := policy.Parse(policy.Source{Name: "policy", Text: text, Root: true})
//	ix, err := policy.NewIndex(g)      // a graph.Graph, once
//	v := ix.Decide(p)                  // as often as policies change
//	v.System.Has(id); v.Why(id); v.Check(); policy.Diff(v, w)
//
// It promises:
//
//   - No path that is placed system refers to one that is personal.
//   - What is not known never grants: a path placed system stays so however the
//     unknown facts turn out, for policies without "when known".
//   - Another personal line never makes a path system; the order of lines and
//     files never matters.
//   - Time and memory are linear in the graph, for each line, whatever its cycles.
//   - No input makes it panic: text, patterns and graphs are bounded and checked.
//
// It is pure: no files, no clock, no network; whoever calls it brings the facts. Do
// not use it to find out facts (package overlay does) nor to act on a verdict.
package policy
