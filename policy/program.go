package policy

import (
	"crypto/sha256"
	"encoding/binary"
	"slices"
	"strings"

	"overkeep/policy/glob"
	"overkeep/policy/graph"
)

var kinds = map[string]graph.Flags{"source": graph.Source, "derivation": graph.Derivation, "output": graph.Output,
	"fixed-output": graph.FixedOutput}

var kindNames = []string{"source", "derivation", "output", "fixed-output"}

// hash names a condition by all that it means: two nodes with one hash have the same
// value for every path of a graph, in whatever policy they stand.
type hash [sha256.Size]byte

// node is a condition with its lets resolved. Equal conditions are one node, so lets
// that double with every line stay as small as they are written.
type node struct {
	op     op
	hash   hash
	kids   []int32
	glob   *glob.Glob  // name, licence, from; closure-of and store paths that name paths
	base   bool        // the pattern is for HASH-NAME, not for the name
	root   string      // closure-of something that the loader resolves
	kind   graph.Flags // kind
	size   int64       // larger-than
	keys   []string    // signed-by: one key in full; unsigned: all
	text   string      // of a term, for explanations
	beyond bool        // its value for a path depends on other paths
}

// program is a set of nodes; every node stands after its kids.
type program struct {
	nodes    []node
	index    map[hash]int32
	closures int
	order    []*let // every let after those it uses
}

func newProgram() *program { return &program{index: map[hash]int32{}} }

type compiler struct {
	*program
	scope *scope
	keys  []Key
	node  map[*let]int32 // the lets that are compiled
	err   *Error
}

// lets compiles those of the ordered lets that are used, directly or by others.
func (c *compiler) lets(order, uses []*let) {
	used := map[*let]bool{}
	for len(uses) > 0 {
		l := uses[len(uses)-1]
		uses = uses[:len(uses)-1]
		if !used[l] {
			used[l] = true
			uses = append(uses, l.uses...)
		}
	}
	for _, l := range order {
		if used[l] {
			c.node[l] = c.expr(l.cond, l.root)
		}
	}
}

// expr compiles a checked expression. After an error, which is one of bounds, it
// returns node 0.
func (c *compiler) expr(e *expr, root bool) int32 {
	if c.err != nil {
		return 0
	}
	if e.op == opLet {
		return c.node[c.scope.lookup(e.arg, root)]
	}
	n := node{op: e.op}
	for _, kid := range e.kids {
		n.kids = append(n.kids, c.expr(kid, root))
	}
	if c.err != nil {
		return 0
	}
	if n.op == opAnd || n.op == opOr {
		slices.Sort(n.kids)
		if n.kids = slices.Compact(n.kids); len(n.kids) == 1 {
			return n.kids[0]
		}
	} else {
		n.text = e.text()
	}
	c.leaf(&n, e, root)
	n.beyond = n.op == opClosure || n.op == opDepends || n.op == opBuiltFrom
	n.hash = c.sum(&n)
	if old, ok := c.index[n.hash]; ok {
		return old
	}
	if n.beyond {
		c.closures++
	}
	switch {
	case len(c.nodes) >= maxConditions:
		c.err = e.span.errorf("more than %d different conditions in the policy", maxConditions)
		return 0
	case c.closures > maxClosures:
		c.err = e.span.errorf("more than %d different closure-of, depends-on and built-from in the policy", maxClosures)
		return 0
	}
	id := int32(len(c.nodes))
	c.nodes = append(c.nodes, n)
	c.index[n.hash] = id
	return id
}

func (c *compiler) leaf(n *node, e *expr, root bool) {
	pattern := e.arg
	switch e.op {
	case opSigned:
		n.keys = []string{c.scope.keys[e.arg].String()}
		return
	case opUnsigned:
		for _, k := range c.keys {
			if c.scope.sees(k.Name, root) {
				n.keys = append(n.keys, k.String())
			}
		}
		return
	case opKind:
		n.kind = kinds[e.arg]
		return
	case opLarger:
		n.size = e.size
		return
	case opName, opLicence, opFrom:
	case opClosure, opPath:
		if base, store := strings.CutPrefix(e.arg, storePrefix); store {
			pattern, n.base = base, true
		} else if strings.HasPrefix(e.arg, "/") {
			n.root, _ = glob.Unescape(e.arg)
			return
		}
	default:
		return
	}
	g, err := glob.Compile(pattern)
	if err != nil { // the parser has compiled it before
		c.err = e.span.errorf("%s", err)
		return
	}
	n.glob = g
}

// sum is the hash of a node whose kids have theirs.
func (c *compiler) sum(n *node) (sum hash) {
	h := sha256.New()
	put := func(s string) {
		h.Write(binary.AppendUvarint(nil, uint64(len(s))))
		h.Write([]byte(s))
	}
	base := byte(0)
	if n.base {
		base = 1
	}
	h.Write([]byte{byte(n.op), base})
	if n.glob != nil {
		put("glob")
		put(n.glob.String())
	}
	put(n.root)
	h.Write(binary.AppendUvarint(nil, uint64(n.kind)))
	h.Write(binary.AppendVarint(nil, n.size))
	for _, k := range n.keys {
		put(k)
	}
	h.Write([]byte{0xff})
	for _, kid := range n.kids {
		h.Write(c.nodes[kid].hash[:])
	}
	h.Sum(sum[:0])
	return sum
}

func (p *program) roots() (out []string) {
	for _, n := range p.nodes {
		if n.root != "" {
			out = append(out, n.root)
		}
	}
	slices.Sort(out)
	return slices.Compact(out)
}

func (p *program) needs() (w Needs) {
	for _, n := range p.nodes {
		switch n.op {
		case opSigned, opUnsigned:
			w.Signatures = true
		case opLicence, opUnfree, opFrom:
			w.Origins = true
		case opLarger:
			w.Sizes = true
		case opBuiltFrom:
			w.BuildInput = true
		case opClosure:
			w.ClosureOf = true
		}
	}
	return w
}

// below lists the nodes that a node is made of, itself included, in order. It does
// not look below those that are given as known.
func (p *program) below(known func(int32) bool, tops ...int32) []int32 {
	need := map[int32]bool{}
	todo := slices.Clone(tops)
	for len(todo) > 0 {
		n := todo[len(todo)-1]
		todo = todo[:len(todo)-1]
		if need[n] {
			continue
		}
		need[n] = true
		if !known(n) {
			todo = append(todo, p.nodes[n].kids...)
		}
	}
	out := make([]int32, 0, len(need))
	for n := range need {
		out = append(out, n)
	}
	slices.Sort(out)
	return out
}
