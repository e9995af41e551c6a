package lower

import (
	"bufio"
	"encoding/binary"
	"errors"
	"fmt"
	"io"
)

// Bounds of what is read. Nix has none for most of these; a lower store never
// comes near them.
const (
	maxString  = 64 << 10  // a path, a hash part, an output id, a feature
	maxSetting = 1 << 20   // the value of a client's setting, a log line
	maxList    = 1_000_000 // entries of a client's list
	maxRequest = 128 << 20 // bytes of one request
	maxReply   = 4 << 30   // bytes of one reply: the list of a very large store
)

// ErrProtocol says that a peer broke the worker protocol or a bound. The text
// around it never contains what the peer sent.
var ErrProtocol = errors.New("worker protocol violated")

func violated(format string, args ...any) error {
	return fmt.Errorf("%w: %s", ErrProtocol, fmt.Sprintf(format, args...))
}

// wire reads one message at a time: numbers are 8 bytes little endian, strings
// a length, the bytes and zeros up to a multiple of 8 (libutil/serialise.cc).
type wire struct {
	r    *bufio.Reader
	left int64 // bytes that this message may still take

	// tee, if set, receives every byte read. Its errors are ignored here: the
	// message is read to its end so that the peer stays in step.
	tee io.Writer

	buf [8]byte
}

// begin starts a message of at most max bytes.
func (w *wire) begin(max int64, tee io.Writer) { w.left, w.tee = max, tee }

func (w *wire) fill(b []byte) error {
	if int64(len(b)) > w.left {
		return violated("message too long")
	}
	w.left -= int64(len(b))
	if _, err := io.ReadFull(w.r, b); err != nil {
		if err == io.EOF {
			return io.ErrUnexpectedEOF
		}
		return err
	}
	if w.tee != nil {
		_, _ = w.tee.Write(b)
	}
	return nil
}

func (w *wire) u64() (uint64, error) {
	if err := w.fill(w.buf[:]); err != nil {
		return 0, err
	}
	return binary.LittleEndian.Uint64(w.buf[:]), nil
}

// u32 reads what Nix reads with readInt: a number that fits 32 bits.
func (w *wire) u32() (uint32, error) {
	n, err := w.u64()
	if err == nil && n > 1<<32-1 {
		return 0, violated("number too large")
	}
	return uint32(n), err
}

// bytes reads a string of at most max bytes.
func (w *wire) bytes(max uint64) ([]byte, error) {
	n, err := w.u64()
	if err != nil {
		return nil, err
	}
	if n > max {
		return nil, violated("string of %d bytes, at most %d allowed", n, max)
	}
	b := make([]byte, (n+7)&^7)
	if err := w.fill(b); err != nil {
		return nil, err
	}
	for _, z := range b[n:] {
		if z != 0 {
			return nil, violated("non-zero padding")
		}
	}
	return b[:n], nil
}

func (w *wire) str(max uint64) (string, error) {
	b, err := w.bytes(max)
	return string(b), err
}

// list reads a list of strings, calling each for every one.
func (w *wire) list(maxEntries uint64, each func(string) error) error {
	n, err := w.u64()
	if err != nil {
		return err
	}
	if n > maxEntries {
		return violated("list of %d entries, at most %d allowed", n, maxEntries)
	}
	for ; n > 0; n-- {
		s, err := w.str(maxString)
		if err != nil {
			return err
		}
		if each == nil {
			continue
		}
		if err := each(s); err != nil {
			return err
		}
	}
	return nil
}

// numbers reads and drops n numbers.
func (w *wire) numbers(n int) error {
	for ; n > 0; n-- {
		if _, err := w.u64(); err != nil {
			return err
		}
	}
	return nil
}

// msg is a message being built.
type msg []byte

func (m msg) num(n uint64) msg { return binary.LittleEndian.AppendUint64(m, n) }

func (m msg) str(s string) msg {
	m = append(m.num(uint64(len(s))), s...)
	return append(m, make([]byte, -len(s)&7)...)
}

func (m msg) list(ss []string) msg {
	m = m.num(uint64(len(ss)))
	for _, s := range ss {
		m = m.str(s)
	}
	return m
}
