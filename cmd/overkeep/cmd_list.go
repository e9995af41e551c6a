package main

import (
	"bufio"
	"bytes"
	"cmp"
	"context"
	"encoding/binary"
	"encoding/json"
	"fmt"
	"io"
	"slices"
	"strconv"
	"strings"

	"github.com/spf13/cobra"

	"overkeep/overlay/facts"
	"overkeep/overlay/verdict"
	"overkeep/policy"
	"overkeep/policy/graph"
)

func init() { more = append(more, newList) }

type listOptions struct {
	sight                       sight
	personal, system, misplaced bool
	where                       string
	sort                        string
	tree                        bool
	closureSize                 bool
}

func newList(a *app) *cobra.Command {
	var o listOptions
	cmd := exits(&cobra.Command{
		Use:     "list",
		Aliases: []string{"ls"},
		Short:   "List paths with their verdict and the reason",
		GroupID: "policy",
		Long: `List the paths of both stores with the verdict of the policy, where they lie, their
size and the reason. A path is misplaced where it lies in one store and belongs
into the other: in the system store that is a leak, in the keep it is waste. The
second column says where a path lies: s- in the system store, -p in the keep, sp in
both; "!" marks what is misplaced.

--json is one object by path with everything "nix path-info --all --json" tells and
the verdicts besides. --tree groups what is personal for a reference under the path
that decides.`,
		Example: `  overkeep list --misplaced
  overkeep list --personal --sort size
  overkeep list --where 'name "acme-*" and not kind derivation'
  overkeep list --json | jq -r 'to_entries[] | select(.value.placement == "personal") | .key'`,
		Args: a.args(0, 0),
		RunE: func(cmd *cobra.Command, args []string) error {
			return runList(cmd.Context(), a, o)
		},
	}, exitPolicy, exitNoKeep, exitDamaged)
	o.sight.add(a, cmd)
	f := cmd.Flags()
	f.BoolVar(&o.personal, "personal", false, "only what the policy calls personal")
	f.BoolVar(&o.system, "system", false, "only what the policy calls system")
	f.BoolVar(&o.misplaced, "misplaced", false, "only what does not lie where it belongs")
	f.StringVar(&o.where, "where", "", "only paths for which this `CONDITION` of the policy language is yes")
	f.StringVar(&o.sort, "sort", "name", "`KEY`: size (that of the closure with --closure-size), name or reason")
	f.BoolVar(&o.closureSize, "closure-size", false, "the size of all that a path needs to run, instead of its own")
	f.BoolVar(&o.tree, "tree", false, "group what is dragged along under the path that drags it")
	a.exclusive(cmd, "personal", "system")
	a.exclusive(cmd, "tree", "json")
	a.exclusive(cmd, "tree", "system")
	return cmd
}

var sorts = []string{"size", "name", "reason"}

func runList(ctx context.Context, a *app, o listOptions) error {
	if !slices.Contains(sorts, o.sort) {
		e := usagef("--sort %q is none of size, name and reason", o.sort)
		if n := nearest(o.sort, sorts); n != "" {
			return e.meant(setFlag(a.line, "sort", n)...)
		}
		return e
	}
	if err := o.sight.find(a); err != nil {
		return err
	}
	// The JSON is full of what only the database has, so it stays open meanwhile.
	load := loaded
	if a.ui.json {
		load = verdict.Load
	}
	p, w, err := o.sight.load(ctx, a, load)
	if err != nil {
		return err
	}
	defer w.Close()
	o.sight.remarks(a, w)
	if a.ui.json && o.sight.only != "" && len(o.sight.dbs) == 0 && !a.ui.quiet {
		fmt.Fprintf(a.ui.err, "overkeep: this is the system store alone: %s\n", o.sight.only) // the JSON is paths alone
	}
	v, err := settled(ctx, func() *policy.Verdicts { return w.Decide(p) })
	if err != nil {
		return err
	}
	ids, err := o.choose(w, v)
	if err != nil {
		return err
	}
	sizes, closures := w.Graph.NarSize, []int64(nil)
	if o.closureSize {
		if closures, err = facts.ClosureSizes(ctx, w.Graph); err != nil {
			return err
		}
		sizes = closures
	}
	a.ui.endProgress()
	out := bufio.NewWriterSize(a.ui.out, 1<<16)
	switch {
	case a.ui.json:
		err = o.writeJSON(ctx, out, w, v, ids, closures)
	case o.tree:
		err = writeTree(&page{w: out, color: a.ui.color}, v, ids)
	default:
		o.order(v, ids, sizes)
		err = writeList(out, v, ids, sizes)
	}
	if err != nil {
		return err
	}
	return out.Flush()
}

// choose returns the paths that are asked for.
func (o *listOptions) choose(w *verdict.World, v *policy.Verdicts) ([]graph.ID, error) {
	var only graph.Bits
	if o.where != "" {
		q, err := v.Policy().Query(policy.Source{Name: "--where", Text: []byte(o.where)})
		if err != nil {
			return nil, err
		}
		only, _ = w.Engine.Select(q)
	}
	g := w.Graph
	ids := make([]graph.ID, 0, g.Len())
	for i := range g.Len() {
		id := graph.ID(i)
		system := v.System.Has(id)
		switch {
		case o.personal && system, o.system && !system:
		case o.misplaced && !misplaced(g.Flags[id], system):
		case only != nil && !only.Has(id):
		default:
			ids = append(ids, id)
		}
	}
	return ids, nil
}

// misplaced: it lies in the system store and is personal, or it is system and lies
// in the keep alone.
func misplaced(f graph.Flags, system bool) bool {
	if system {
		return f&graph.LayerMask == graph.Upper
	}
	return f&graph.Lower != 0
}

// order sorts the paths. A million of them are compared by numbers first: the key,
// then the first letters of the name.
func (o *listOptions) order(v *policy.Verdicts, ids []graph.ID, sizes []int64) {
	g := v.Index().Graph()
	type keyed struct {
		key, name uint64
		id        graph.ID
	}
	all := make([]keyed, len(ids))
	for i, id := range ids {
		var letters [16]byte
		copy(letters[:], g.Name(id))
		k := keyed{binary.BigEndian.Uint64(letters[:]), binary.BigEndian.Uint64(letters[8:]), id}
		switch o.sort {
		case "size":
			k.key, k.name = ^uint64(sizes[id]), k.key
		case "reason":
			reason, line := v.Reason(id)
			k.key, k.name = uint64(reason)<<32|uint64(uint32(line+1)), k.key
		}
		all[i] = k
	}
	slices.SortFunc(all, func(x, y keyed) int {
		if c := cmp.Compare(x.key, y.key); c != 0 {
			return c
		}
		if c := cmp.Compare(x.name, y.name); c != 0 {
			return c
		}
		return cmp.Or(bytes.Compare(g.Name(x.id), g.Name(y.id)), bytes.Compare(g.BaseName(x.id), g.BaseName(y.id)))
	})
	for i, k := range all {
		ids[i] = k.id
	}
}

// writeList writes a line a path: placement, where it lies, size, path, reason.
func writeList(out io.Writer, v *policy.Verdicts, ids []graph.ID, sizes []int64) error {
	const blanks = "        "
	g := v.Index().Graph()
	why := reasonTexts(v)
	var line, size []byte
	for _, id := range ids {
		reason, rule := v.Reason(id)
		system := v.System.Has(id)
		size = appendSize(size[:0], sizes[id])
		line = append(line[:0], placement(system)...)
		line = append(line, blanks[:10-len(line)]...)
		line = append(line, lieMark(g.Flags[id], system)...)
		line = append(line, blanks[:1+max(0, 6-len(size))]...)
		line = append(line, size...)
		line = append(line, ' ', ' ')
		line = append(line, g.BaseName(id)...)
		line = append(line, ' ', ' ')
		line = append(line, why(reason, rule)...)
		line = append(line, '\n')
		if _, err := out.Write(line); err != nil {
			return err
		}
	}
	return nil
}

// lieMark says in one letter pair where a path lies; "!" marks the misplaced ones.
func lieMark(f graph.Flags, system bool) string {
	mark := [...][2]string{{"-- ", "--!"}, {"s- ", "s-!"}, {"-p ", "-p!"}, {"sp ", "sp!"}}
	i, bad := 0, 0
	if f&graph.Lower != 0 {
		i |= 1
	}
	if f&graph.Upper != 0 {
		i |= 2
	}
	if misplaced(f, system) {
		bad = 1
	}
	return mark[i][bad]
}

// reasonTexts returns a function that says reasons in a few words, made once each.
func reasonTexts(v *policy.Verdicts) func(policy.Reason, int) string {
	type key struct {
		reason policy.Reason
		rule   int
	}
	made := map[key]string{}
	return func(r policy.Reason, rule int) string {
		k := key{r, rule}
		s, ok := made[k]
		if !ok {
			if s = r.String(); rule != policy.NoRule {
				line := &v.Policy().Rules[rule]
				gap := "  "
				if r == policy.Reference {
					gap = "  despite " // the line is the one that grants it
				}
				s = fmt.Sprintf("%s%s%s (%s)", s, gap, printable(line.Text), printable(spoken{File: line.Pos.Source, Row: line.Pos.Line}.at()))
			}
			made[k] = s
		}
		return s
	}
}

// maxTree is how many dragged paths are named under each that drags.
const maxTree = 20

// writeTree groups the personal paths under those that decide.
func writeTree(p *page, v *policy.Verdicts, ids []graph.ID) error {
	g := v.Index().Graph()
	causes, why := v.Causes(), reasonTexts(v)
	under := map[graph.ID][]graph.ID{}
	var heads []graph.ID
	for _, id := range ids {
		if v.System.Has(id) {
			continue
		}
		reason, _ := v.Reason(id)
		head := id
		if reason == policy.Reference {
			head = causes.Of(id).Cause
		}
		if _, seen := under[head]; !seen {
			heads = append(heads, head)
			under[head] = nil
		}
		if head != id {
			under[head] = append(under[head], id)
		}
	}
	slices.SortFunc(heads, func(x, y graph.ID) int {
		return cmp.Or(cmp.Compare(len(under[y]), len(under[x])), bytes.Compare(g.Name(x), g.Name(y)))
	})
	for _, h := range heads {
		reason, rule := v.Reason(h)
		p.printf("%s  %s\n", p.style("1", string(g.BaseName(h))), why(reason, rule))
		kids := under[h]
		slices.SortFunc(kids, func(x, y graph.ID) int { return bytes.Compare(g.Name(x), g.Name(y)) })
		for i, k := range kids {
			if i == maxTree {
				p.printf("   └─ and %d more\n", len(kids)-i)
				break
			}
			branch := "├─"
			if i == len(kids)-1 {
				branch = "└─"
			}
			p.printf("   %s %s\n", branch, strings.TrimSpace(string(g.Name(k))))
		}
	}
	return nil
}

// writeJSON writes an object by store path, each value with all that nix path-info
// tells and the verdict.
func (o *listOptions) writeJSON(ctx context.Context, out io.Writer, w *verdict.World, v *policy.Verdicts, ids []graph.ID, closures []int64) error {
	g := w.Graph
	chosen := graph.NewBits(g.Len())
	for _, id := range ids {
		chosen.Set(id)
	}
	// The lines of the policy are few and the paths many: each line is encoded once.
	lines := make([][]byte, len(v.Policy().Rules))
	for i := range lines {
		b, err := json.Marshal(refer(v.Policy(), i))
		if err != nil {
			return err
		}
		lines[i] = append([]byte(`,"line":`), b...)
	}
	lies := [...]string{`[]`, `["system"]`, `["personal"]`, `["system","personal"]`}
	return w.WriteJSON(ctx, out, facts.Listing{
		Only: chosen.Has,
		Extra: func(b []byte, id graph.ID) []byte {
			reason, rule := v.Reason(id)
			layer := 0
			if g.Flags[id]&graph.Lower != 0 {
				layer |= 1
			}
			if g.Flags[id]&graph.Upper != 0 {
				layer |= 2
			}
			b = append(b, `,"placement":"`...)
			b = append(b, placement(v.System.Has(id))...)
			b = append(b, `","reason":"`...)
			b = append(b, reason.String()...)
			b = append(b, `","lies_in":`...)
			b = append(b, lies[layer]...)
			if rule != policy.NoRule {
				b = append(b, lines[rule]...)
			}
			if closures != nil {
				b = append(b, `,"closureSize":`...)
				b = strconv.AppendInt(b, closures[id], 10)
			}
			return b
		},
	})
}
