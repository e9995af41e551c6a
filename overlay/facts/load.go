package facts

import (
	"bytes"
	"context"
	"encoding/hex"
	"errors"
	"fmt"
	"hash/maphash"
	"math"
	"runtime"
	"sync"
	"sync/atomic"

	"overkeep/overlay/nixdb"
	"overkeep/policy/graph"
)

// loading is one database on its way into the graph.
type loading struct {
	Store
	snap  *nixdb.Snapshot
	upper *nixdb.Upper // nil: not asked for
	both  bool         // there is a second database, so what must agree is kept

	lo, hi int64 // ids
	chunks []*chunk
	rows   rowIDs
	n      int // rows that are in the graph

	ids []graph.ID // of a row in the graph; nil: the same number

	outputs []output
}

// output is a pair of ids.
type output struct{ drv, out graph.ID }

// chunk is what was read of a range of ids. Columns are by row.
type chunk struct {
	lo, hi  int64
	row     int // number of the first row, in the database
	ids     []int64
	base    []byte
	off     []uint32 // ends
	narSize []int64
	flags   []graph.Flags
	deriver [][2]uint64 // the name's hashes; zero: none
	agree   []agree     // where there are two databases
	dropped int

	refs  [][]int32 // rows that the referrers in lo to hi refer to, in blocks
	runs  []run     // whose they are
	lacks []int32   // rows that refer to what is not there
}

// run is how many references a row has.
type run struct {
	row int32
	n   uint32
}

// agree is what must be the same in two databases.
type agree struct {
	narHash [32]byte
	ca      uint64
}

// maxID is beyond any id that Nix can have come to.
const maxID = 1 << 40

// perChunk is how many ids a chunk is for, in a database without a million ids gone.
const perChunk = 1 << 14

// ranges cuts the ids into ranges of so many, or into most larger ones.
func (l *loading) ranges(per uint64) (chunks []*chunk) {
	const most = 1024
	if l.hi < l.lo {
		return nil
	}
	span := uint64(l.hi - l.lo) // ids may be anything, as a whole a range of 64 bits
	step := max(per, span/most+1)
	for at := uint64(0); ; at += step {
		c := &chunk{lo: l.lo + int64(at), hi: math.MaxInt64}
		chunks = append(chunks, c)
		if span-at < step {
			return chunks // the last has no bound
		}
		c.hi = c.lo + int64(step)
	}
}

// task is a piece of work for a reader of a database.
type task func(ctx context.Context, reader int) error

// eachChunk makes a task of every chunk.
func (l *loading) eachChunk(f func(ctx context.Context, reader int, c *chunk) error) (tasks []task) {
	for _, c := range l.chunks {
		tasks = append(tasks, func(ctx context.Context, reader int) error { return f(ctx, reader, c) })
	}
	return tasks
}

// perform runs tasks with all readers of the database at once and returns the
// first error.
func (l *loading) perform(ctx context.Context, tasks []task) error {
	ctx, cancel := context.WithCancelCause(ctx)
	defer cancel(nil)
	var next atomic.Int64
	var wg sync.WaitGroup
	for reader := range l.snap.Readers() {
		wg.Go(func() {
			for ctx.Err() == nil {
				i := int(next.Add(1)) - 1
				if i >= len(tasks) {
					return
				}
				if err := tasks[i](ctx, reader); err != nil {
					cancel(err)
				}
			}
		})
	}
	wg.Wait()
	return context.Cause(ctx)
}

// together runs f for all databases at once.
func (s *Snapshot) together(f func(l *loading) error) error {
	errs := make([]error, len(s.stores))
	var wg sync.WaitGroup
	for i, l := range s.stores {
		wg.Go(func() { errs[i] = f(l) })
	}
	wg.Wait()
	return errors.Join(errs...)
}

func (s *Snapshot) load(ctx context.Context) error {
	for _, l := range s.stores {
		var err error
		if l.lo, l.hi, err = l.snap.Bounds(ctx); err != nil {
			return err
		}
		l.chunks = l.ranges(perChunk)
	}
	prefix := s.o.StoreDir + "/"
	err := s.together(func(l *loading) error {
		return l.perform(ctx, l.eachChunk(func(ctx context.Context, reader int, c *chunk) error {
			return l.readPaths(ctx, reader, c, &s.seeds, prefix)
		}))
	})
	if err != nil {
		return err
	}
	if err := s.number(ctx); err != nil {
		return err
	}
	s.sweep()
	err = s.together(func(l *loading) error {
		outputs := func(ctx context.Context, reader int) error { return s.readOutputs(ctx, reader, l) }
		return l.perform(ctx, append([]task{outputs}, l.eachChunk(l.readRefs)...))
	})
	if err != nil {
		return err
	}
	if err := s.references(); err != nil {
		return err
	}
	return s.finish()
}

// sweep gives back what the chunks of a large store took: the collector itself
// would let the heap grow to twice its size first.
func (s *Snapshot) sweep() {
	if s.Graph.Len() > 100_000 {
		runtime.GC() // 10 ms: the columns hold no pointers
	}
}

// readPaths fills a chunk with its rows.
func (l *loading) readPaths(ctx context.Context, reader int, c *chunk, seeds *[2]maphash.Seed, prefix string) error {
	last := int64(math.MinInt64)
	return l.snap.Paths(ctx, reader, c.lo, c.hi, false, func(r *nixdb.Row) error {
		if r.ID <= last || r.ID < c.lo {
			return fmt.Errorf("%q: %w: rows are out of order", l.DB, nixdb.ErrCorrupt)
		}
		last = r.ID
		base := baseOf(r.Path, prefix)
		if base == nil {
			c.dropped++
			return nil
		}
		if c.ids == nil {
			c.reserve(l.both)
		}
		f, digits := judge(r)
		var deriver [2]uint64
		if d := baseOf(r.Deriver, prefix); d != nil && bytes.HasSuffix(d, dotDrv) {
			deriver = [2]uint64{maphash.Bytes(seeds[0], d), maphash.Bytes(seeds[1], d)}
		}
		c.ids = append(c.ids, r.ID)
		c.base = append(c.base, base...)
		c.off = append(c.off, uint32(len(c.base)))
		c.narSize = append(c.narSize, max(0, r.NarSize))
		c.flags = append(c.flags, f)
		c.deriver = append(c.deriver, deriver)
		if l.both {
			a := agree{ca: maphash.Bytes(seeds[0], r.CA)}
			if digits != nil {
				_, _ = hex.Decode(a.narHash[:], digits) // they have been looked at
			}
			c.agree = append(c.agree, a)
		}
		if len(c.base) > math.MaxInt32 {
			return ErrTooLarge
		}
		return nil
	})
}

// judge says what a row tells of its path, and gives the digits of its hash.
func judge(r *nixdb.Row) (f graph.Flags, digits []byte) {
	digits = hashDigits(r.Hash)
	if r.Wrong || digits == nil || r.NarSize < 0 || r.ID < 1 || r.ID > maxID {
		f |= graph.Broken
	}
	if r.Ultimate {
		f |= graph.Ultimate
	}
	if r.HasSigs {
		f |= saysSigned
	}
	if len(r.Deriver) > 0 {
		f |= saysDeriver
	}
	switch {
	case len(r.CA) == 0:
	case len(r.CA) > 5 && string(r.CA[:5]) == "text:":
		f |= saysText
	case len(r.CA) > 6 && string(r.CA[:6]) == "fixed:":
		f |= saysFixed
	default:
		f |= graph.Broken
	}
	return f, digits
}

// reserve makes room for as many rows as the chunk has ids, if that is not many.
func (c *chunk) reserve(both bool) {
	n := int(min(uint64(c.hi-c.lo), perChunk))
	c.ids = make([]int64, 0, n)
	c.base = make([]byte, 0, n*60)
	c.off = make([]uint32, 0, n)
	c.narSize = make([]int64, 0, n)
	c.flags = make([]graph.Flags, 0, n)
	c.deriver = make([][2]uint64, 0, n)
	if both {
		c.agree = make([]agree, 0, n)
	}
}

// number joins the chunks of all databases, gives every path its id, and resolves
// derivers.
func (s *Snapshot) number(ctx context.Context) error {
	total, size := 0, 0
	for _, l := range s.stores {
		for _, c := range l.chunks {
			c.row = l.n
			l.n += len(c.ids)
			size += len(c.base)
			s.Report.Dropped += c.dropped
		}
		total += l.n
		ids := make([]int64, 0, l.n)
		for _, c := range l.chunks {
			ids = append(ids, c.ids...)
			c.ids = nil
		}
		l.rows = newRowIDs(ids)
	}
	if total > math.MaxInt32-1 || size > math.MaxUint32 {
		return ErrTooLarge
	}
	g := &graph.Graph{
		StoreDir: s.o.StoreDir,
		Base:     make([]byte, 0, size),
		BaseOff:  make([]uint32, 1, total+1),
		NarSize:  make([]int64, 0, total),
		Flags:    make([]graph.Flags, 0, total),
	}
	s.Graph, s.Index = g, emptyIndex(g, s.seeds[0], total)
	var agreed []agree // of the first database
	for i, l := range s.stores {
		for _, c := range l.chunks {
			if err := s.join(l, c, i == 0, agreed); err != nil {
				return err
			}
		}
		if i == 0 && l.both {
			agreed = make([]agree, 0, l.n)
			for _, c := range l.chunks {
				agreed = append(agreed, c.agree...)
				c.agree = nil
			}
		}
	}
	return s.derivers(ctx)
}

// join puts the rows of a chunk at the end of the graph, or where their names are.
func (s *Snapshot) join(l *loading, c *chunk, first bool, agreed []agree) error {
	g := s.Graph
	start := uint32(0)
	for row, end := range c.off {
		base := c.base[start:end]
		start = end
		id := graph.ID(len(g.BaseOff) - 1)
		g.Base = append(g.Base, base...)
		g.BaseOff = append(g.BaseOff, uint32(len(g.Base)))
		there := s.Index.insert(s.Index.hash(base), id)
		if !first {
			l.ids = append(l.ids, there)
		}
		if there == id {
			g.NarSize = append(g.NarSize, c.narSize[row])
			g.Flags = append(g.Flags, c.flags[row]|l.Layer)
			continue
		}
		// The other database has it, which has each once.
		g.BaseOff = g.BaseOff[:id+1]
		g.Base = g.Base[:g.BaseOff[id]]
		if g.Flags[there]&l.Layer != 0 {
			return fmt.Errorf("%q: %w: a path stands there twice", l.DB, nixdb.ErrCorrupt)
		}
		g.Flags[there] |= c.flags[row] | l.Layer
		if agreed[there] != c.agree[row] || g.NarSize[there] != c.narSize[row] {
			g.Flags[there] |= graph.Differs
		}
	}
	c.base, c.off, c.narSize, c.flags = nil, nil, nil, nil
	return nil
}

// derivers resolves the deriver columns. Where the two databases name different
// derivations, the first that is valid stays, the lower database's before the other.
func (s *Snapshot) derivers(ctx context.Context) error {
	g := s.Graph
	g.Deriver = make([]graph.ID, g.Len())
	for i := range g.Deriver {
		g.Deriver[i] = graph.NoID
	}
	for _, l := range s.stores {
		// The second database waits for the first: both may write the same path.
		err := l.perform(ctx, l.eachChunk(func(_ context.Context, _ int, c *chunk) error {
			for i, h := range c.deriver {
				if h == [2]uint64{} {
					continue
				}
				if id := l.id(int32(c.row + i)); g.Deriver[id] == graph.NoID {
					g.Deriver[id] = s.Index.findHash(h, s.seeds[1])
				}
			}
			c.deriver = nil
			return nil
		}))
		if err != nil {
			return err
		}
	}
	return nil
}

// id of a row of this database.
func (l *loading) id(row int32) graph.ID {
	if l.ids == nil {
		return row
	}
	return l.ids[row]
}
