package policy

import "overkeep/policy/glob"

// NamePattern is a closure-of target that names paths of the store itself.
type NamePattern struct {
	Glob *glob.Glob
	Base bool // it is for HASH-NAME; else for the name
}

// ClosurePatterns are the closure-of targets that are no files. Whoever loads a part
// of a store needs the closures of all paths that match.
func (p *Policy) ClosurePatterns() (out []NamePattern) {
	for _, n := range p.prog.nodes {
		if n.op == opClosure && n.root == "" {
			out = append(out, NamePattern{n.glob, n.base})
		}
	}
	return out
}
