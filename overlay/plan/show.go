package plan

import (
	"cmp"
	"slices"
)

// Group is the moves of one kind for one reason.
type Group struct {
	Kind   Kind   `json:"kind"`
	Reason Reason `json:"reason"`
	Paths  int    `json:"paths"`
	Bytes  int64  `json:"bytes"` // sum of the NAR sizes

	// Of these, what follows another path, and what both stores have.
	Following      int   `json:"following,omitempty"`
	FollowingBytes int64 `json:"following_bytes,omitempty"`
	Duplicates     int   `json:"duplicates,omitempty"`
	DuplicateBytes int64 `json:"duplicate_bytes,omitempty"`
}

// Groups sums the moves up: seals first, of each kind the most bytes first.
func (p *Plan) Groups() []Group {
	type key struct {
		kind   Kind
		reason int
	}
	at := map[key]int{}
	var out []Group
	for i := range p.Moves {
		m := &p.Moves[i]
		k := key{m.Kind, m.Reason}
		n, ok := at[k]
		if !ok {
			n = len(out)
			at[k] = n
			out = append(out, Group{Kind: m.Kind, Reason: p.Reasons[m.Reason]})
		}
		g := &out[n]
		g.Paths++
		g.Bytes += m.NarSize
		if m.Follows != "" {
			g.Following++
			g.FollowingBytes += m.NarSize
		}
		if m.Duplicate {
			g.Duplicates++
			g.DuplicateBytes += m.NarSize
		}
	}
	slices.SortStableFunc(out, func(x, y Group) int {
		return cmp.Or(cmp.Compare(rank(x.Kind), rank(y.Kind)), cmp.Compare(y.Bytes, x.Bytes), cmp.Compare(y.Paths, x.Paths))
	})
	return out
}

func rank(k Kind) int {
	if k == Seal {
		return 0
	}
	return 1
}

// Hold is the blocked paths of one kind that one thing holds.
type Hold struct {
	Kind  Kind     `json:"kind"`
	Why   BlockWhy `json:"why"`
	By    string   `json:"by,omitempty"`
	Paths int      `json:"paths"`
	Bytes int64    `json:"bytes"`
	First int      `json:"-"` // index in Plan.Blocked of one that it holds directly, if there is one
}

// Holds sums up what is blocked: the most paths first.
func (p *Plan) Holds() []Hold {
	type key struct {
		kind Kind
		why  BlockWhy
		by   string
	}
	at := map[key]int{}
	var out []Hold
	for i := range p.Blocked {
		b := &p.Blocked[i]
		k := key{b.Kind, b.Why, b.By}
		n, ok := at[k]
		if !ok {
			n = len(out)
			at[k] = n
			out = append(out, Hold{Kind: b.Kind, Why: b.Why, By: b.By, First: i})
		}
		h := &out[n]
		h.Paths++
		h.Bytes += b.NarSize
		if b.Via == "" && p.Blocked[h.First].Via != "" {
			h.First = i
		}
	}
	slices.SortStableFunc(out, func(x, y Hold) int {
		return cmp.Or(cmp.Compare(rank(x.Kind), rank(y.Kind)), cmp.Compare(y.Paths, x.Paths), cmp.Compare(x.By, y.By))
	})
	return out
}

// Ways returns a function that gives a shortest way from what holds Blocked[i] to
// its path: the blocked paths in between, and last the path itself. Of a seal each
// refers to the next, of a release each is referred to by the next. At most most
// paths are given, the last ones.
func (p *Plan) Ways() func(i, most int) []string {
	at := make(map[string]int, len(p.Blocked))
	for i := range p.Blocked {
		at[p.Blocked[i].Path] = i
	}
	return func(i, most int) []string {
		var way []string
		for len(way) < most {
			b := &p.Blocked[i]
			way = append(way, b.Path)
			if b.Via == "" {
				break
			}
			next, ok := at[b.Via]
			if !ok {
				break
			}
			i = next
		}
		slices.Reverse(way)
		return way
	}
}

// Medium is what is known of the disk that the system store lies on.
type Medium struct {
	FSType  string // as in /proc/self/mountinfo
	Discard bool   // the device takes FITRIM
	Links   bool   // the store shares equal files by hard links (/nix/store/.links is in use)
}

// residue says what no move takes away. What was written by others than Nix is said
// once, in general: nobody can know it all.
func (m Medium) residue(seals bool) []Residue {
	if !seals {
		return nil
	}
	out := []Residue{{"flash", "flash cells that the device has put aside: no software reaches them"}}
	if m.FSType != "" && m.FSType != "ext4" {
		out = append(out, Residue{"file-system", "blocks and names that " + m.FSType + " keeps besides (its journal, copies, snapshots): they are made empty on ext4 only"})
	}
	if !m.Discard {
		out = append(out, Residue{"no-discard", "the device takes no discard: what was free before is not given back to it, only what is moved is overwritten"})
	}
	if m.Links {
		out = append(out, Residue{"hard-links", "contents that a public path has, too: the file stays, as that path's"})
	}
	return append(out,
		Residue{"copies", "backups, snapshots and caches of others that were made before"},
		Residue{"logs", "names in shell histories, in the system's journal and in other programs' files"})
}
