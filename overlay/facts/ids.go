package facts

import (
	"bytes"
	"hash/maphash"
	"math/bits"
	"slices"
	"strings"

	"overkeep/policy/graph"
)

// rowIDs numbers the rows of a table by ascending row id: a bit per possible id
// and the number of rows before each word. It takes a fraction of what an array
// would, and stays in the cache. Where ids are so sparse that bits would be
// waste, they are searched for.
type rowIDs struct {
	lo     int64
	words  []uint64
	before []int32
	sorted []int64 // instead of bits
}

// maxSparse is how many words per row are worth it: a store that was collected
// often has used ten ids per row that is left.
const maxSparse = 4

// newRowIDs takes ascending ids.
func newRowIDs(ids []int64) rowIDs {
	if len(ids) == 0 {
		return rowIDs{}
	}
	r := rowIDs{lo: ids[0]}
	words := uint64(ids[len(ids)-1]-ids[0])/64 + 1
	if words > uint64(len(ids))*maxSparse+1024 {
		r.sorted = slices.Clone(ids)
		return r
	}
	r.words = make([]uint64, words)
	r.before = make([]int32, words)
	for _, id := range ids {
		r.words[(id-r.lo)>>6] |= 1 << (uint64(id-r.lo) & 63)
	}
	n := int32(0)
	for i, w := range r.words {
		r.before[i] = n
		n += int32(bits.OnesCount64(w))
	}
	return r
}

// row is the number of the row with this id, or -1.
func (r *rowIDs) row(id int64) int32 {
	if r.sorted != nil {
		if i, ok := slices.BinarySearch(r.sorted, id); ok {
			return int32(i)
		}
		return -1
	}
	d := uint64(id - r.lo) // an id below lo is beyond the end
	w := d >> 6
	if w >= uint64(len(r.words)) {
		return -1
	}
	bit := uint64(1) << (d & 63)
	if r.words[w]&bit == 0 {
		return -1
	}
	return r.before[w] + int32(bits.OnesCount64(r.words[w]&(bit-1)))
}

// Index finds paths of a graph by name. It is safe for concurrent use.
type Index struct {
	g     *graph.Graph
	seed  maphash.Seed
	slots []uint64 // hash<<32 | id+1, open addressing; 0: free
}

// NewIndex indexes a graph.
func NewIndex(g *graph.Graph) *Index {
	x := emptyIndex(g, maphash.MakeSeed(), g.Len())
	for id := range g.Len() {
		x.insert(x.hash(g.BaseName(graph.ID(id))), graph.ID(id))
	}
	return x
}

func emptyIndex(g *graph.Graph, seed maphash.Seed, n int) *Index {
	return &Index{g: g, seed: seed, slots: make([]uint64, 1<<bits.Len(uint(n+n/2+1)))}
}

func (x *Index) hash(base []byte) uint64 { return maphash.Bytes(x.seed, base) }

// insert puts id in, or returns the id with the same name that is there.
func (x *Index) insert(hash uint64, id graph.ID) graph.ID {
	mask := uint64(len(x.slots) - 1)
	for i := hash & mask; ; i = (i + 1) & mask {
		s := x.slots[i]
		if s == 0 {
			x.slots[i] = hash&^0xffffffff | uint64(id+1)
			return id
		}
		if s>>32 == hash>>32 {
			if there := graph.ID(uint32(s)) - 1; bytes.Equal(x.g.BaseName(there), x.g.BaseName(id)) {
				return there
			}
		}
	}
}

func (x *Index) find(hash uint64, base []byte) graph.ID {
	mask := uint64(len(x.slots) - 1)
	for i := hash & mask; ; i = (i + 1) & mask {
		s := x.slots[i]
		if s == 0 {
			return graph.NoID
		}
		if s>>32 == hash>>32 {
			if there := graph.ID(uint32(s)) - 1; bytes.Equal(x.g.BaseName(there), base) {
				return there
			}
		}
	}
}

// findHash finds a name by two hashes of it, under the index's own seed and
// another, in place of its text: another name has both by chance once in 2^128,
// and nobody outside knows the seeds.
func (x *Index) findHash(h [2]uint64, second maphash.Seed) graph.ID {
	mask := uint64(len(x.slots) - 1)
	for i := h[0] & mask; ; i = (i + 1) & mask {
		s := x.slots[i]
		if s == 0 {
			return graph.NoID
		}
		if s>>32 == h[0]>>32 {
			there := graph.ID(uint32(s)) - 1
			if b := x.g.BaseName(there); maphash.Bytes(second, b) == h[1] && x.hash(b) == h[0] {
				return there
			}
		}
	}
}

// Base finds HASH-NAME; NoID: the graph has no such path.
func (x *Index) Base(base []byte) graph.ID { return x.find(x.hash(base), base) }

// Path finds a whole store path.
func (x *Index) Path(path string) graph.ID {
	base, ok := strings.CutPrefix(path, x.g.StoreDir+"/")
	if !ok {
		return graph.NoID
	}
	return x.Base([]byte(base))
}
