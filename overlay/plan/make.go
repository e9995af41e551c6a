package plan

import (
	"errors"
	"fmt"
	"strings"

	"overkeep/policy"
	"overkeep/policy/graph"
)

// ErrInput is an Input that makes no sense: a caller's mistake.
var ErrInput = errors.New("not an input of a plan")

// NotThereError: a path that was asked for does not lie in the store that it is to
// leave.
type NotThereError struct {
	Kind Kind
	Path string
	Both bool // it is in neither store; else it lies in the other one already
}

func (e *NotThereError) Error() string {
	from, to := "system store", "keep"
	if e.Kind == Release {
		from, to = to, from
	}
	if e.Both {
		return fmt.Sprintf("%q lies in neither store", e.Path)
	}
	return fmt.Sprintf("%q does not lie in the %s: it is in the %s already", e.Path, from, to)
}

// NotPermittedError: a release that was asked for takes a path along that the policy
// does not permit in the system store.
type NotPermittedError struct {
	Asked string // the path that was named
	Path  string // the path that may not go: Asked itself, or one that it refers to by whatever way
	Cause string // the path that decides: Path itself, or one that it refers to by whatever way
	Why   Reason // why Cause is personal
}

func (e *NotPermittedError) Error() string {
	var b strings.Builder
	fmt.Fprintf(&b, "%q may not be released: ", e.Asked)
	if e.Path != e.Asked {
		fmt.Fprintf(&b, "it refers to %q, and ", e.Path)
	}
	if e.Cause != e.Path {
		fmt.Fprintf(&b, "that refers to %q, which is personal (%s)", e.Cause, e.Why.Reason)
	} else {
		fmt.Fprintf(&b, "that is personal (%s)", e.Why.Reason)
	}
	if e.Why.Line != "" {
		fmt.Fprintf(&b, ` by "%s" (%s:%d)`, e.Why.Line, e.Why.File, e.Why.Row)
	}
	return b.String()
}

// Make decides what moves. Errors: that of Input.Row; *NotThereError and
// *NotPermittedError for Chosen; ErrInput.
func Make(in Input) (*Plan, error) {
	m, err := newMaker(in)
	if err != nil {
		return nil, err
	}
	if err := m.want(); err != nil {
		return nil, err
	}
	if err := m.read(); err != nil {
		return nil, err
	}
	m.roots()
	m.blockSeals()
	m.blockReleases()
	m.write()
	m.plan.Residue = in.Medium.residue(m.sealed.Count() > 0)
	return m.plan, nil
}

// maker is a plan being made. Sets are of graph ids.
type maker struct {
	in       Input
	g        *graph.Graph
	v        *policy.Verdicts // nil: not asked
	causes   *policy.Causes
	turned   *graph.Reverse
	seal     graph.Bits // what should leave the system store, and
	release  graph.Bits // the keep: want
	sealed   graph.Bits // of these, what does
	released graph.Bits
	follows  map[graph.ID]graph.ID // Chosen: for whose sake
	rows     map[graph.ID]row
	held     map[graph.ID][]int // the roots of a path, in Input.Roots
	blocks   map[graph.ID]block
	reasons  map[Reason]int
	paths    map[graph.ID]string
	plan     *Plan
}

type row struct {
	hash string
	size int64
}

type block struct {
	why BlockWhy
	by  string
	via graph.ID
}

func newMaker(in Input) (*maker, error) {
	m := &maker{in: in, g: in.Graph, v: in.Verdicts, follows: map[graph.ID]graph.ID{}, rows: map[graph.ID]row{},
		held: map[graph.ID][]int{}, blocks: map[graph.ID]block{}, reasons: map[Reason]int{}, paths: map[graph.ID]string{}}
	if m.v != nil {
		if g := m.v.Index().Graph(); m.g == nil {
			m.g = g
		} else if m.g != g {
			return nil, fmt.Errorf("%w: verdicts over another graph", ErrInput)
		}
	}
	switch {
	case m.g == nil:
		return nil, fmt.Errorf("%w: no graph", ErrInput)
	case m.v == nil && in.Mode != Exact:
		return nil, fmt.Errorf("%w: no verdicts", ErrInput)
	case in.Row == nil:
		return nil, fmt.Errorf("%w: no rows", ErrInput)
	case in.Mode != Misplaced && in.Mode != Chosen && in.Mode != Exact:
		return nil, fmt.Errorf("%w: mode %d", ErrInput, in.Mode)
	}
	for _, list := range [][]graph.ID{in.Seal, in.Release} {
		for _, id := range list {
			if id < 0 || int(id) >= m.g.Len() {
				return nil, fmt.Errorf("%w: path %d of %d", ErrInput, id, m.g.Len())
			}
		}
		if in.Mode == Misplaced && len(list) > 0 {
			return nil, fmt.Errorf("%w: paths are named, and all are asked for", ErrInput)
		}
	}
	m.seal, m.release = graph.NewBits(m.g.Len()), graph.NewBits(m.g.Len())
	m.plan = &Plan{Version: Version, Machine: in.Machine, Keep: in.Keep, KeepID: in.KeepID, Policy: in.Policy, Created: in.Created}
	return m, nil
}

func (m *maker) lies(id graph.ID, layer graph.Flags) bool { return m.g.Flags[id]&layer != 0 }

func (m *maker) both(id graph.ID) bool { return m.g.Flags[id]&graph.LayerMask == graph.LayerMask }

// path is a path as text, the same text for everybody.
func (m *maker) path(id graph.ID) string {
	s, ok := m.paths[id]
	if !ok {
		s = m.g.Path(id)
		m.paths[id] = s
	}
	return s
}

// referrers are the references turned round, once they are needed.
func (m *maker) referrers(id graph.ID) []graph.ID {
	if m.turned == nil {
		m.turned = graph.NewReverse(m.g)
	}
	return m.turned.To(id)
}

// want fills seal and release.
func (m *maker) want() error {
	switch m.in.Mode {
	case Misplaced:
		for id := range graph.ID(m.g.Len()) {
			switch system := m.v.System.Has(id); {
			case !system && m.lies(id, graph.Lower):
				m.seal.Set(id)
			case system && m.lies(id, graph.Upper):
				m.release.Set(id)
			}
		}
		return nil
	case Chosen:
		if err := m.wantSeals(); err != nil {
			return err
		}
		if err := m.wantReleases(); err != nil {
			return err
		}
	case Exact:
		for _, id := range m.in.Seal {
			m.seal.Set(id)
		}
		for _, id := range m.in.Release {
			m.release.Set(id)
		}
		m.gone(m.seal, graph.Lower)
		m.gone(m.release, graph.Upper)
	}
	for w := range m.seal {
		if m.seal[w]&m.release[w] != 0 {
			return fmt.Errorf("%w: a path that is to be sealed and released", ErrInput)
		}
	}
	return nil
}

// there sees that paths lie in the store that they are to leave.
func (m *maker) there(k Kind, ids []graph.ID) error {
	from := graph.Lower
	if k == Release {
		from = graph.Upper
	}
	for _, id := range ids {
		if !m.lies(id, from) {
			return &NotThereError{k, m.g.Path(id), !m.lies(id, graph.LayerMask)}
		}
	}
	return nil
}

// gone blocks what does not lie where it should leave.
func (m *maker) gone(set graph.Bits, from graph.Flags) {
	set.Each(func(id graph.ID) {
		if !m.lies(id, from) {
			m.blocks[id] = block{BlockedGone, "", graph.NoID}
		}
	})
}

// wantSeals takes along what refers to the chosen paths in the system store.
func (m *maker) wantSeals() error {
	if err := m.there(Seal, m.in.Seal); err != nil {
		return err
	}
	return m.along(m.seal, m.in.Seal, func(id graph.ID, visit func(graph.ID)) {
		for _, r := range m.referrers(id) {
			if m.lies(r, graph.Lower) {
				visit(r)
			}
		}
	}, nil)
}

// wantReleases takes along what the chosen paths refer to and the system store does
// not have.
func (m *maker) wantReleases() error {
	if err := m.there(Release, m.in.Release); err != nil {
		return err
	}
	return m.along(m.release, m.in.Release, func(id graph.ID, visit func(graph.ID)) {
		if m.both(id) {
			return // the system store has the path with all it refers to
		}
		for _, r := range m.g.References(id) {
			if !m.lies(r, graph.Lower) && m.lies(r, graph.Upper) {
				visit(r)
			}
		}
	}, func(asked, id graph.ID) error {
		if m.v.System.Has(id) {
			return nil
		}
		cause := m.cause(id)
		return &NotPermittedError{m.g.Path(asked), m.g.Path(id), m.g.Path(cause), m.verdict(cause)}
	})
}

// along walks breadth first from the chosen paths, and notes for whose sake the
// others come.
func (m *maker) along(set graph.Bits, chosen []graph.ID, next func(graph.ID, func(graph.ID)), check func(asked, id graph.ID) error) error {
	var queue []graph.ID
	for _, id := range chosen {
		if !set.Has(id) {
			set.Set(id)
			queue = append(queue, id)
		}
	}
	for i := 0; i < len(queue); i++ {
		id := queue[i]
		asked, follows := m.follows[id]
		if !follows {
			asked = id
		}
		if check != nil {
			if err := check(asked, id); err != nil {
				return err
			}
		}
		next(id, func(r graph.ID) {
			if !set.Has(r) {
				set.Set(r)
				m.follows[r] = asked
				queue = append(queue, r)
			}
		})
	}
	return nil
}

// read asks for the rows of all that might move. What lacks one, or is not
// believed, is blocked for itself.
func (m *maker) read() error {
	for _, d := range []struct {
		kind Kind
		set  graph.Bits
	}{{Seal, m.seal}, {Release, m.release}} {
		var failed error
		d.set.Each(func(id graph.ID) {
			if _, gone := m.blocks[id]; gone || failed != nil {
				return
			}
			var r row
			if r.hash, r.size, failed = m.in.Row(d.kind, id); failed != nil {
				return
			}
			m.rows[id] = r
			switch {
			case m.g.Flags[id]&graph.Differs != 0:
				m.blocks[id] = block{BlockedDiffers, "", graph.NoID}
			case m.g.Flags[id]&graph.Broken != 0 || !isHash(r.hash) || r.size < 0:
				m.blocks[id] = block{BlockedRow, "", graph.NoID}
				m.rows[id] = row{}
			}
		})
		if failed != nil {
			return failed
		}
	}
	return nil
}

// isHash: sha256: and 64 lower-case hex digits, as Nix writes it into its database.
func isHash(s string) bool {
	hex, ok := strings.CutPrefix(s, "sha256:")
	return ok && len(hex) == 64 && strings.Trim(hex, "0123456789abcdef") == ""
}

// roots finds the paths that roots hold. What a root holds through a path that does
// not want to move is found by that path: it refers to what does.
func (m *maker) roots() {
	if len(m.in.Roots) == 0 {
		return
	}
	at := make(map[string][]int, len(m.in.Roots))
	for i, r := range m.in.Roots {
		if base, ok := strings.CutPrefix(r.Path, m.g.StoreDir+"/"); ok {
			at[base] = append(at[base], i)
		}
	}
	m.seal.Each(func(id graph.ID) {
		if list := at[string(m.g.BaseName(id))]; list != nil {
			m.held[id] = list
		}
	})
}

// verdict is a path's own reason, in words of a plan.
func (m *maker) verdict(id graph.ID) Reason {
	if m.v == nil || m.in.Mode == Exact {
		return Reason{Reason: Asked}
	}
	reason, rule := m.v.Reason(id)
	out := Reason{Reason: reason.String()}
	if rule != policy.NoRule && reason != policy.Reference {
		r := &m.v.Policy().Rules[rule]
		out.Line, out.File, out.Row = r.Text, r.Pos.Source, r.Pos.Line
	}
	return out
}

// cause is the path that decides about a personal one.
func (m *maker) cause(id graph.ID) graph.ID {
	if reason, _ := m.v.Reason(id); reason != policy.Reference {
		return id
	}
	if m.causes == nil {
		m.causes = m.v.Causes()
	}
	return m.causes.Of(id).Cause
}
