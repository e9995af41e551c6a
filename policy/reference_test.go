package policy

import (
	"path/filepath"
	"strings"

	"overkeep/policy/graph"
)

// reference is a slow, obvious reading of docs/POLICY.md, to hold Decide against. It
// shares the parser and the graph with the package and nothing else: one path at a
// time, sets as maps, a fixpoint in place of an order.
type reference struct {
	g *graph.Graph
	p *Policy
}

func not(t graph.Tri) graph.Tri { return -t }

func (r *reference) bad(id graph.ID) bool {
	return r.g.Flags[id]&graph.Broken != 0 || r.g.Flags[id]&graph.Differs != 0
}

func (r *reference) name(id graph.ID) string { return string(r.g.BaseName(id))[33:] }

// like matches a pattern of the tests, which hold only stars, by path/filepath.
func like(pattern, text string) bool {
	ok, err := filepath.Match(pattern, strings.ReplaceAll(text, "/", "|"))
	if err != nil {
		panic(err)
	}
	return ok
}

func (r *reference) eval(e *expr, id graph.ID) graph.Tri {
	switch e.op {
	case opLet:
		return r.eval(r.p.scope.lets[e.arg].cond, id)
	case opAnd:
		v := graph.Yes
		for _, k := range e.kids {
			v = min(v, r.eval(k, id))
		}
		return v
	case opOr:
		v := graph.No
		for _, k := range e.kids {
			v = max(v, r.eval(k, id))
		}
		return v
	case opNot:
		return not(r.eval(e.kids[0], id))
	case opName:
		return tri(like(e.arg, r.name(id)))
	}
	if r.bad(id) {
		return graph.Unknown
	}
	switch e.op {
	case opSigned:
		return r.signedBy(r.p.scope.keys[e.arg], id)
	case opUnsigned:
		v := graph.No
		for _, k := range r.p.scope.keys {
			v = max(v, r.signedBy(k, id))
		}
		return not(v)
	case opBuilt:
		return tri(r.g.Flags[id]&graph.Ultimate != 0)
	case opKind:
		possible := r.kinds(id)
		if !possible[e.arg] {
			return graph.No
		} else if len(possible) == 1 {
			return graph.Yes
		}
		return graph.Unknown
	case opLarger:
		if r.g.NarSize[id] == 0 {
			return graph.Unknown
		}
		return tri(r.g.NarSize[id] > e.size)
	case opLicence, opFrom, opUnfree:
		return r.origin(e, id)
	case opClosure:
		return r.closureOf(e, id)
	case opDepends:
		v := graph.No
		for p := range r.closure(id) {
			v = max(v, r.eval(e.kids[0], p))
			if r.bad(p) {
				v = max(v, graph.Unknown)
			}
		}
		return v
	case opBuiltFrom:
		return r.builtFrom(e.kids[0], id)
	}
	panic(e.op)
}

func (r *reference) signedBy(k Key, id graph.ID) graph.Tri {
	for i, key := range r.g.Keys {
		if key == k.String() {
			if !r.g.Signed[i].Has(id) && r.g.Unsure != nil && r.g.Unsure.Has(id) {
				return graph.Unknown
			}
			return tri(r.g.Signed[i].Has(id))
		}
	}
	return graph.Unknown
}

func (r *reference) kinds(id graph.ID) map[string]bool {
	f, out := r.g.Flags[id], map[string]bool{}
	for name, bit := range map[string]graph.Flags{"source": graph.Source, "derivation": graph.Derivation,
		"output": graph.Output, "fixed-output": graph.FixedOutput} {
		if f&bit != 0 || f&graph.KindMask == 0 {
			out[name] = true
		}
	}
	return out
}

func (r *reference) origin(e *expr, id graph.ID) graph.Tri {
	if r.g.Origin == nil || r.g.Origin[id] < 0 {
		return graph.Unknown
	}
	o := r.g.Origins[r.g.Origin[id]]
	if e.op == opUnfree {
		return o.Unfree
	}
	values := o.From
	if e.op == opLicence {
		values = o.Licences
	}
	if len(values) == 0 {
		return graph.Unknown
	}
	for _, v := range values {
		if like(strings.ReplaceAll(e.arg, "/", "|"), v) {
			return graph.Yes
		}
	}
	return graph.No
}

// closure is a runtime closure as far as it is believed.
func (r *reference) closure(ids ...graph.ID) map[graph.ID]bool {
	set := map[graph.ID]bool{}
	var add func(graph.ID)
	add = func(id graph.ID) {
		if set[id] {
			return
		}
		set[id] = true
		if !r.bad(id) {
			for _, ref := range r.g.References(id) {
				add(ref)
			}
		}
	}
	for _, id := range ids {
		add(id)
	}
	return set
}

func (r *reference) closureOf(e *expr, id graph.ID) graph.Tri {
	var roots []graph.ID
	known := true
	switch base, store := strings.CutPrefix(e.arg, "/nix/store/"); {
	case store:
		for p := range graph.ID(r.g.Len()) {
			if like(base, string(r.g.BaseName(p))) {
				roots = append(roots, p)
			}
		}
	case e.arg[0] == '/':
		roots, known = r.g.Roots[e.arg].IDs, r.g.Roots[e.arg].Known
	default:
		for p := range graph.ID(r.g.Len()) {
			if like(e.arg, r.name(p)) {
				roots = append(roots, p)
			}
		}
	}
	set := r.closure(roots...)
	for p := range set {
		known = known && !r.bad(p)
	}
	switch {
	case set[id]:
		return graph.Yes
	case known:
		return graph.No
	}
	return graph.Unknown
}

// flowed is what went into something: paths, and whether there may be more.
type flowed struct {
	paths map[graph.ID]bool
	more  bool
	seen  map[string]bool
}

func (r *reference) isDrv(id graph.ID) bool {
	if strings.HasSuffix(r.name(id), ".drv") || len(r.g.Outputs(id)) > 0 {
		return true
	}
	for _, d := range r.g.Deriver {
		if d == id {
			return true
		}
	}
	return false
}

// makers are the derivations that built a path.
func (r *reference) makers(id graph.ID) (out []graph.ID) {
	if d := r.g.Deriver[id]; d != graph.NoID {
		out = append(out, d)
	}
	for d := range graph.ID(r.g.Len()) {
		for _, o := range r.g.Outputs(d) {
			if o == id {
				out = append(out, d)
			}
		}
	}
	return out
}

// wasBuilt: no for what is no output, yes if all that built it is known.
func (r *reference) wasBuilt(id graph.ID) graph.Tri {
	possible := r.kinds(id)
	output := possible["output"] || possible["fixed-output"]
	switch {
	case r.g.Deriver[id] != graph.NoID:
		return graph.Yes
	case len(r.makers(id)) > 0 && len(possible) == 1 && possible["output"]:
		return graph.Yes
	case len(r.makers(id)) == 0 && (!output || r.g.Flags[id]&graph.Added != 0):
		return graph.No
	}
	return graph.Unknown
}

func (f *flowed) once(what string, id graph.ID) bool {
	key := what + string(rune(id))
	if f.seen[key] {
		return false
	}
	f.seen[key] = true
	return true
}

// path: a path was there, and with it all it refers to and all that it was built from.
func (f *flowed) path(r *reference, id graph.ID) {
	if !f.once("path", id) {
		return
	}
	f.paths[id] = true
	if r.bad(id) {
		f.more = true
		return
	}
	for _, ref := range r.g.References(id) {
		f.path(r, ref)
	}
	for _, d := range r.makers(id) {
		f.building(r, d)
	}
	f.more = f.more || r.wasBuilt(id) == graph.Unknown
}

// building: a derivation was built, with its text and all its inputs.
func (f *flowed) building(r *reference, d graph.ID) {
	if !f.once("building", d) {
		return
	}
	f.paths[d] = true
	if r.bad(d) {
		f.more = true
		return
	}
	for _, ref := range r.g.References(d) {
		if !r.isDrv(ref) {
			f.path(r, ref)
			continue
		}
		f.input(r, ref)
	}
}

// input: a derivation was built for another, which had its outputs.
func (f *flowed) input(r *reference, d graph.ID) {
	if !f.once("input", d) {
		return
	}
	f.path(r, d)
	f.building(r, d)
	if !r.bad(d) {
		for _, o := range r.g.Outputs(d) {
			f.path(r, o)
		}
	}
}

func (r *reference) builtFrom(cond *expr, id graph.ID) graph.Tri {
	built := r.wasBuilt(id)
	if built == graph.No {
		return graph.No
	}
	f := &flowed{map[graph.ID]bool{}, built == graph.Unknown, map[string]bool{}}
	for _, d := range r.makers(id) {
		f.building(r, d)
	}
	for _, ref := range r.g.References(id) {
		if ref != id {
			f.path(r, ref)
		}
	}
	v := graph.No
	if f.more {
		v = graph.Unknown
	}
	for p := range f.paths {
		v = max(v, r.eval(cond, p))
	}
	// What may be a source is only sure to be built from something if it was built.
	possible := r.kinds(id)
	if v == graph.Yes && len(r.makers(id)) == 0 && (possible["source"] || possible["derivation"]) {
		return graph.Unknown
	}
	return v
}

// rules are the rules of a policy as they were parsed.
func (p *Policy) ruleStatements() (out []*statement) {
	for _, f := range p.files {
		for _, s := range f.statements {
			if s.verb != "key" && s.verb != "let" {
				out = append(out, s)
			}
		}
	}
	return out
}

// own is whether a path may be system for its own part.
func (r *reference) own(rules []*statement, id graph.ID) bool {
	if r.bad(id) {
		return false
	}
	granted := false
	for _, s := range rules {
		switch v := r.eval(s.cond, id); s.verb {
		case "system":
			granted = granted || v == graph.Yes
		case "personal":
			if v == graph.Yes || v == graph.Unknown && !s.whenKnown {
				return false
			}
		}
	}
	return granted
}

// decide places all paths: those that may be, less those that refer to one that is
// not, until nothing changes.
func (r *reference) decide(rules []*statement) map[graph.ID]bool {
	system := map[graph.ID]bool{}
	for id := range graph.ID(r.g.Len()) {
		if r.own(rules, id) {
			system[id] = true
		}
	}
	for changed := true; changed; {
		changed = false
		for id := range graph.ID(r.g.Len()) {
			if !system[id] {
				continue
			}
			for _, ref := range r.g.References(id) {
				if !system[ref] {
					delete(system, id)
					changed = true
					break
				}
			}
		}
	}
	return system
}
