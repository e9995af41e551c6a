package tree

import (
	"crypto/sha256"
	"hash"
	"io"
)

// pieceSize and pieces bound what is read but not hashed yet. A piece is large enough
// that handing it over costs nothing, and small enough to stay in the caches.
const (
	pieceSize = 256 << 10
	pieces    = 8
)

// stream takes the bytes of an archive in order. They are hashed by a goroutine of
// its own, so that reading, writing and hashing one large file take two processors. A
// tree that fits into one piece never starts it.
type stream struct {
	cur      []byte // being filled, in place, by reads
	sum      hash.Hash
	w        io.Writer // or nil
	progress func(int64)
	n        int64

	spare chan []byte // pieces that are free
	full  chan []byte // to the hasher; nil while it does not run
	made  int
	ended chan struct{}
}

func newStream() *stream {
	return &stream{cur: make([]byte, 0, pieceSize), sum: sha256.New(), spare: make(chan []byte, pieces), made: 1}
}

// begin makes it ready for another archive.
func (s *stream) begin(w io.Writer, progress func(int64)) {
	s.stop()
	s.cur, s.n = s.cur[:0], 0
	s.sum.Reset()
	s.w, s.progress = w, progress
}

// room makes sure that n more bytes, at most pieceSize, can be appended to cur.
func (s *stream) room(n int) error {
	if cap(s.cur)-len(s.cur) >= n {
		return nil
	}
	return s.flush()
}

func (s *stream) told() error {
	s.n += int64(len(s.cur))
	if s.progress != nil {
		s.progress(int64(len(s.cur)))
	}
	if s.w != nil {
		if n, err := s.w.Write(s.cur); err != nil {
			return err
		} else if n != len(s.cur) {
			return io.ErrShortWrite
		}
	}
	return nil
}

// flush gives cur to the hasher and takes an empty piece.
func (s *stream) flush() error {
	if err := s.told(); err != nil {
		return err
	}
	if s.full == nil {
		s.full, s.ended = make(chan []byte, pieces), make(chan struct{})
		go func(full <-chan []byte, ended chan<- struct{}) {
			defer close(ended)
			for b := range full {
				s.sum.Write(b)
				s.spare <- b // never blocks: there is room for all
			}
		}(s.full, s.ended)
	}
	s.full <- s.cur
	if s.made < pieces && len(s.spare) == 0 {
		s.made++
		s.cur = make([]byte, 0, pieceSize)
		return nil
	}
	s.cur = (<-s.spare)[:0]
	return nil
}

// end hashes what is left and returns the hash and size of everything.
func (s *stream) end() (sum [sha256.Size]byte, size int64, err error) {
	if err := s.told(); err != nil {
		return sum, 0, err
	}
	s.stop()
	s.sum.Write(s.cur)
	s.sum.Sum(sum[:0])
	return sum, s.n, nil
}

// stop ends the hasher, when it has hashed what it was given.
func (s *stream) stop() {
	if s.full != nil {
		close(s.full)
		<-s.ended
		s.full = nil
	}
}
