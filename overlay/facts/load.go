package facts

import (
	"bytes"
	"context"
	"encoding/hex"
	"fmt"
	"hash/maphash"
	"math"
	"sync"

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

type output struct{ drv, out graph.ID }

// chunk is what was read of a range of ids. Columns are by row.
type chunk struct {
	lo, hi   int64
	ids      []int64
	base     []byte
	off      []uint32 // ends
	hash     []uint64 // of the base, for the index
	narSize  []int64
	flags    []graph.Flags
	deriver  []byte   // bases, in one piece
	derOff   []uint32 // ends
	derHash  []uint64
	agree    []agree // where there are two databases
	dropped  int
	lastSeen int64

	refs  []int32 // rows that the referrers in lo to hi refer to
	runs  []run   // whose they are
	lacks []int32 // rows that refer to what is not there
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

// ranges cuts the ids into about as many ranges as there is work for.
func (l *loading) ranges() {
	const per, most = 1 << 14, 256
	n := uint64(l.hi-l.lo)/per + 1
	if l.hi < l.lo {
		return
	}
	n = min(n, most)
	step := uint64(l.hi-l.lo)/n + 1
	for i := range n {
		c := &chunk{lo: l.lo + int64(i*step), hi: math.MaxInt64}
		if i+1 < n {
			c.hi = l.lo + int64((i+1)*step)
		}
		l.chunks = append(l.chunks, c)
		if c.hi > l.hi {
			c.hi = math.MaxInt64
			break
		}
	}
}

// task is a piece of work for a reader of a database.
type task func(ctx context.Context, reader int) error

// perform runs the tasks of every database with all its readers at once, and returns
// the first error.
func (s *Snapshot) perform(ctx context.Context, tasks func(l *loading) []task) error {
	ctx, cancel := context.WithCancelCause(ctx)
	defer cancel(nil)
	var wg sync.WaitGroup
	for _, l := range s.stores {
		queue := make(chan task)
		all := tasks(l)
		go func() {
			defer close(queue)
			for _, t := range all {
				select {
				case queue <- t:
				case <-ctx.Done():
					return
				}
			}
		}()
		for reader := range l.snap.Readers() {
			wg.Go(func() {
				for t := range queue {
					if err := t(ctx, reader); err != nil {
						cancel(err)
						return
					}
				}
			})
		}
	}
	wg.Wait()
	return context.Cause(ctx)
}

func (s *Snapshot) load(ctx context.Context) error {
	seed := maphash.MakeSeed()
	for _, l := range s.stores {
		var err error
		if l.lo, l.hi, err = l.snap.Bounds(ctx); err != nil {
			return err
		}
		l.ranges()
	}
	prefix := s.o.StoreDir + "/"
	err := s.perform(ctx, func(l *loading) (tasks []task) {
		for _, c := range l.chunks {
			tasks = append(tasks, func(ctx context.Context, reader int) error { return l.readPaths(ctx, reader, c, seed, prefix) })
		}
		return tasks
	})
	if err != nil {
		return err
	}
	if err := s.number(seed); err != nil {
		return err
	}
	err = s.perform(ctx, func(l *loading) (tasks []task) {
		tasks = append(tasks, func(ctx context.Context, reader int) error { return s.readOutputs(ctx, reader, l) })
		for _, c := range l.chunks {
			tasks = append(tasks, func(ctx context.Context, reader int) error { return l.readRefs(ctx, reader, c) })
		}
		return tasks
	})
	if err != nil {
		return err
	}
	if err := s.references(); err != nil {
		return err
	}
	return s.finish()
}

// readPaths fills a chunk with its rows.
func (l *loading) readPaths(ctx context.Context, reader int, c *chunk, seed maphash.Seed, prefix string) error {
	c.lastSeen = math.MinInt64
	return l.snap.Paths(ctx, reader, c.lo, c.hi, false, func(r *nixdb.Row) error {
		if r.ID <= c.lastSeen || r.ID < c.lo {
			return fmt.Errorf("%q: %w: rows are out of order", l.DB, nixdb.ErrCorrupt)
		}
		c.lastSeen = r.ID
		base := baseOf(r.Path, prefix)
		if base == nil {
			c.dropped++
			return nil
		}
		if c.ids == nil {
			c.reserve()
		}
		var f graph.Flags
		digits := hashDigits(r.Hash)
		if r.Wrong || digits == nil || r.NarSize < 0 || r.ID < 1 || r.ID > maxID {
			f |= graph.Broken
		}
		if r.Ultimate {
			f |= graph.Ultimate
		}
		if r.HasSigs {
			f |= saysSigned
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
		if len(r.Deriver) > 0 {
			f |= saysDeriver
			if d := baseOf(r.Deriver, prefix); d != nil && bytes.HasSuffix(d, dotDrv) {
				c.deriver = append(c.deriver, d...)
				c.derHash = append(c.derHash, maphash.Bytes(seed, d))
			} else {
				c.derHash = append(c.derHash, 0)
			}
		} else {
			c.derHash = append(c.derHash, 0)
		}
		c.derOff = append(c.derOff, uint32(len(c.deriver)))
		c.ids = append(c.ids, r.ID)
		c.base = append(c.base, base...)
		c.off = append(c.off, uint32(len(c.base)))
		c.hash = append(c.hash, maphash.Bytes(seed, base))
		c.narSize = append(c.narSize, max(0, r.NarSize))
		c.flags = append(c.flags, f)
		if l.both {
			a := agree{ca: maphash.Bytes(seed, r.CA)}
			if digits != nil {
				_, _ = hex.Decode(a.narHash[:], digits)
			}
			c.agree = append(c.agree, a)
		}
		if len(c.base) > math.MaxInt32 || len(c.deriver) > math.MaxInt32 {
			return ErrTooLarge
		}
		return nil
	})
}

// reserve makes room for as many rows as the chunk has ids, if that is not many.
func (c *chunk) reserve() {
	n := int(min(uint64(c.hi-c.lo), 1<<14))
	c.ids = make([]int64, 0, n)
	c.base = make([]byte, 0, n*60)
	c.off = make([]uint32, 0, n)
	c.hash = make([]uint64, 0, n)
	c.narSize = make([]int64, 0, n)
	c.flags = make([]graph.Flags, 0, n)
	c.derOff = make([]uint32, 0, n)
	c.derHash = make([]uint64, 0, n)
}

// number joins the chunks of all databases, gives every path its id, and resolves
// derivers.
func (s *Snapshot) number(seed maphash.Seed) error {
	total, size := 0, 0
	for _, l := range s.stores {
		var ids []int64
		for _, c := range l.chunks {
			ids = append(ids, c.ids...)
			size += len(c.base)
			s.Report.Dropped += c.dropped
		}
		l.n = len(ids)
		total += l.n
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
		Deriver:  make([]graph.ID, 0, total),
	}
	s.Graph, s.Index = g, emptyIndex(g, seed, total)
	var agreed []agree // of the first database
	for i, l := range s.stores {
		var own []agree
		if i > 0 {
			l.ids = make([]graph.ID, 0, l.n)
		}
		for _, c := range l.chunks {
			start := uint32(0)
			for row, end := range c.off {
				id := graph.ID(g.Len())
				g.Base = append(g.Base, c.base[start:end]...)
				g.BaseOff = append(g.BaseOff, uint32(len(g.Base)))
				g.Flags = append(g.Flags, c.flags[row])
				start = end
				there := s.Index.insert(c.hash[row], id)
				if i > 0 {
					l.ids = append(l.ids, there)
				}
				if there == id {
					g.NarSize = append(g.NarSize, c.narSize[row])
					g.Flags[id] |= l.Layer
					continue
				}
				// The name is there already: in the other database, once.
				g.Flags = g.Flags[:id]
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
			own = append(own, c.agree...)
			c.base, c.off, c.hash, c.narSize, c.flags, c.agree = nil, nil, nil, nil, nil, nil
		}
		if i == 0 {
			agreed = own
		}
	}
	s.derivers()
	return nil
}

// derivers resolves the deriver columns. Where the two databases name different
// ones, that of the first that is valid stays.
func (s *Snapshot) derivers() {
	g := s.Graph
	g.Deriver = g.Deriver[:g.Len()]
	for i := range g.Deriver {
		g.Deriver[i] = graph.NoID
	}
	for _, l := range s.stores {
		row := int32(0)
		for _, c := range l.chunks {
			start := uint32(0)
			for i, end := range c.derOff {
				if end > start {
					if id := l.id(row); g.Deriver[id] == graph.NoID {
						g.Deriver[id] = s.Index.find(c.derHash[i], c.deriver[start:end])
					}
				}
				start = end
				row++
			}
			c.deriver, c.derOff, c.derHash, c.ids = nil, nil, nil, nil
		}
	}
}

// id of a row of this database.
func (l *loading) id(row int32) graph.ID {
	if l.ids == nil {
		return row
	}
	return l.ids[row]
}
