// Package secret holds key material: in memory that is locked against swap,
// left out of core dumps, and wiped when it is no longer needed.
//
// Start with New, From, Random or Read, and defer Wipe. A Bytes never shows its
// content: String, Format, LogValue and MarshalJSON all redact or refuse.
//
// Limits. The Go runtime may copy what is passed through strings and
// interfaces; a passphrase handed to age becomes a Go string on the heap that
// cannot be wiped (filippo.io/age takes a string). That is why the key
// derivation of this project runs in a short-lived process: such copies die
// with it. Nothing here protects from root or from a debugger of the same user.
package secret

import (
	"crypto/rand"
	"crypto/subtle"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"runtime"

	"golang.org/x/sys/unix"
)

// ErrTooLong is returned by Read when the input holds more than the bound.
var ErrTooLong = errors.New("secret is longer than allowed")

// Bytes is a fixed-size secret in its own locked mapping. The zero value is an
// empty, already wiped secret. It is not safe for concurrent use.
type Bytes struct {
	mem []byte // whole mapping, a multiple of the page size
	n   int
}

// New returns n zero bytes of locked memory. The mapping is excluded from core
// dumps and not inherited over fork (madvise(2): MADV_DONTDUMP, MADV_WIPEONFORK).
// It fails when the memory cannot be locked (RLIMIT_MEMLOCK): a key is never
// kept in memory that may be swapped out.
func New(n int) (*Bytes, error) {
	if n < 0 {
		return nil, fmt.Errorf("secret of %d bytes", n)
	}
	if n == 0 {
		return &Bytes{}, nil
	}
	page := unix.Getpagesize()
	size := (n + page - 1) / page * page
	mem, err := unix.Mmap(-1, 0, size, unix.PROT_READ|unix.PROT_WRITE, unix.MAP_PRIVATE|unix.MAP_ANONYMOUS)
	if err != nil {
		return nil, fmt.Errorf("map %d bytes for a secret: %w", size, err)
	}
	for _, f := range []func([]byte) error{
		unix.Mlock,
		func(b []byte) error { return unix.Madvise(b, unix.MADV_DONTDUMP) },
		func(b []byte) error { return unix.Madvise(b, unix.MADV_WIPEONFORK) },
	} {
		if err := f(mem); err != nil {
			_ = unix.Munmap(mem)
			return nil, fmt.Errorf("lock %d bytes for a secret: %w", size, err)
		}
	}
	s := &Bytes{mem: mem, n: n}
	runtime.SetFinalizer(s, (*Bytes).Wipe)
	return s, nil
}

// From moves b into locked memory and wipes b, also when it fails.
func From(b []byte) (*Bytes, error) {
	defer clear(b)
	s, err := New(len(b))
	if err != nil {
		return nil, err
	}
	copy(s.mem, b)
	return s, nil
}

// Random returns n random bytes.
func Random(n int) (*Bytes, error) {
	s, err := New(n)
	if err != nil {
		return nil, err
	}
	rand.Read(s.Bytes())
	return s, nil
}

// Read reads r to its end, at most max bytes, straight into locked memory.
// More than max bytes is ErrTooLong.
func Read(r io.Reader, max int) (*Bytes, error) {
	s, err := New(max + 1)
	if err != nil {
		return nil, err
	}
	// Not io.ReadFull: it ends a short input with io.ErrUnexpectedEOF, which is
	// also what a reader (age's) says of a truncated file.
	n, idle := 0, 0
	for n <= max && idle < 100 {
		m, err := r.Read(s.mem[n : max+1])
		n += m
		switch {
		case err == io.EOF && n <= max:
			s.n = n
			return s, nil
		case err != nil && err != io.EOF:
			s.Wipe()
			return nil, err
		case m == 0:
			idle++
		default:
			idle = 0
		}
	}
	s.Wipe()
	if n <= max {
		return nil, io.ErrNoProgress
	}
	return nil, ErrTooLong
}

// TrimNewline drops one trailing "\n" or "\r\n", as a typed line or a file ends.
// A "\r" without "\n" stays: it may belong to a passphrase.
func (s *Bytes) TrimNewline() {
	for _, c := range []byte{'\n', '\r'} {
		if s.Len() == 0 || s.mem[s.n-1] != c {
			return
		}
		s.n--
		s.mem[s.n] = 0
	}
}

// Clone returns a second, independent copy.
func (s *Bytes) Clone() (*Bytes, error) {
	c, err := New(s.Len())
	if err != nil {
		return nil, err
	}
	copy(c.mem, s.Bytes())
	runtime.KeepAlive(s)
	return c, nil
}

// Bytes returns the secret itself, not a copy. It must not be used after Wipe, nor
// after the last use of s: a finalizer unmaps the memory, and the slice alone does
// not keep s alive. A deferred Wipe, or runtime.KeepAlive, does.
func (s *Bytes) Bytes() []byte {
	if s == nil || s.mem == nil {
		return nil
	}
	return s.mem[:s.n:s.n]
}

// Len returns the number of bytes; 0 after Wipe.
func (s *Bytes) Len() int {
	if s == nil {
		return 0
	}
	return s.n
}

// Equal reports in constant time whether both hold the same bytes.
func (s *Bytes) Equal(o *Bytes) bool {
	eq := subtle.ConstantTimeCompare(s.Bytes(), o.Bytes()) == 1
	runtime.KeepAlive(s)
	runtime.KeepAlive(o)
	return eq
}

// Wipe overwrites the memory with zeros and gives it back. It may be called
// more than once and on nil.
func (s *Bytes) Wipe() {
	if s == nil || s.mem == nil {
		return
	}
	clear(s.mem)
	runtime.KeepAlive(s)
	_ = unix.Munlock(s.mem)
	_ = unix.Munmap(s.mem)
	s.mem, s.n = nil, 0
	runtime.SetFinalizer(s, nil)
}

const redacted = "[secret]"

// String redacts.
func (s *Bytes) String() string { return redacted }

// GoString redacts.
func (s *Bytes) GoString() string { return redacted }

// Format redacts whatever the verb, %x and %v of a struct field among them.
func (s *Bytes) Format(f fmt.State, _ rune) { _, _ = io.WriteString(f, redacted) }

// LogValue redacts.
func (s *Bytes) LogValue() slog.Value { return slog.StringValue(redacted) }

// MarshalJSON refuses: a secret in JSON is a mistake of the caller.
func (s *Bytes) MarshalJSON() ([]byte, error) {
	return nil, errors.New("a secret is not written as JSON")
}

// MarshalText refuses, as MarshalJSON does.
func (s *Bytes) MarshalText() ([]byte, error) {
	return nil, errors.New("a secret is not written as text")
}
