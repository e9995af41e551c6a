package nar

import (
	"bufio"
	"encoding/binary"
	"errors"
	"fmt"
	"io"
	"strings"
)

// Kind is what an Entry is.
type Kind uint8

// The kinds. Up is the end of the directory that was entered last.
const (
	Regular Kind = iota + 1
	Symlink
	Directory
	Up
)

func (k Kind) String() string {
	switch k {
	case Regular:
		return "regular"
	case Symlink:
		return "symlink"
	case Directory:
		return "directory"
	case Up:
		return "up"
	}
	return fmt.Sprintf("Kind(%d)", uint8(k))
}

// Entry is a step through an archive, in its order.
type Entry struct {
	Kind       Kind
	Name       string // in its directory; empty for the root and for Up
	Executable bool   // of a Regular
	Size       int64  // of a Regular, in bytes
	Target     string // of a Symlink
}

// Reader reads an archive from its beginning, without ever going back. It is not safe for
// concurrent use. After an error it only returns that error.
type Reader struct {
	r      *bufio.Reader
	offset int64
	err    error

	began bool
	names []string // the last name in each directory that is open
	left  int64    // of the contents of the Regular just returned
	pad   int64    // zeros after them; with closing, what must still be read before the next step
	open  bool     // the Regular is not closed yet
}

// NewReader reads from r, also beyond the end of the archive.
func NewReader(r io.Reader) *Reader {
	return &Reader{r: bufio.NewReaderSize(r, 64<<10)}
}

// Next returns the next step, or io.EOF when the archive is complete. What was
// not read of a file's contents is passed over.
func (r *Reader) Next() (Entry, error) {
	e, err := r.next()
	if err != nil && r.err == nil {
		r.err = err
	}
	return e, r.err
}

func (r *Reader) next() (Entry, error) {
	if r.err != nil {
		return Entry{}, r.err
	}
	if !r.began {
		r.began = true
		if err := r.expect(magic); err != nil {
			return Entry{}, err
		}
		return r.node("")
	}
	if r.open {
		if err := r.finish(); err != nil {
			return Entry{}, err
		}
	}
	if len(r.names) == 0 {
		return Entry{}, io.EOF
	}
	// In a directory: another entry, or its end.
	word, err := r.word("entry", ")")
	if err != nil {
		return Entry{}, err
	}
	if word == ")" {
		r.names = r.names[:len(r.names)-1]
		return Entry{Kind: Up}, r.closeEntry()
	}
	name, err := r.name()
	if err != nil {
		return Entry{}, err
	}
	r.names[len(r.names)-1] = name
	return r.node(name)
}

func (r *Reader) name() (string, error) {
	if err := r.expect(entryRest); err != nil {
		return "", err
	}
	at := r.offset
	name, err := r.string(MaxName)
	if err != nil {
		return "", err
	}
	switch {
	case name == "", name == ".", name == "..", strings.ContainsAny(name, "/\x00"):
		return "", &FormatError{at, fmt.Sprintf("%q is no name", name)}
	case name <= r.names[len(r.names)-1]:
		return "", &FormatError{at, fmt.Sprintf("name %q does not come after %q", name, r.names[len(r.names)-1])}
	}
	return name, r.expect(node)
}

// What follows the words that were read singly to see which one it is.
var (
	entryRest = tokens("(", "name")
	begin     = tokens("(", "type")
)

func (r *Reader) node(name string) (Entry, error) {
	e := Entry{Name: name}
	if err := r.expect(begin); err != nil {
		return e, err
	}
	word, err := r.word("regular", "symlink", "directory")
	if err != nil {
		return e, err
	}
	switch word {
	case "regular":
		e.Kind = Regular
		if word, err = r.word("executable", "contents"); err != nil {
			return e, err
		}
		if word == "executable" {
			e.Executable = true
			if err := r.expect(executableRest); err != nil {
				return e, err
			}
		}
		at := r.offset
		size, err := r.uint64()
		if err != nil {
			return e, err
		}
		if int64(size) < 0 {
			return e, &FormatError{at, "a file of more than 2^63 bytes"}
		}
		e.Size, r.left, r.pad, r.open = int64(size), int64(size), int64(-size&7), true
		return e, nil
	case "symlink":
		e.Kind = Symlink
		if err := r.expect(targetWord); err != nil {
			return e, err
		}
		at := r.offset
		if e.Target, err = r.string(MaxTarget); err != nil {
			return e, err
		}
		if e.Target == "" || strings.Contains(e.Target, "\x00") {
			return e, &FormatError{at, fmt.Sprintf("%q is no target of a link", e.Target)}
		}
		if err := r.expect(end); err != nil {
			return e, err
		}
		return e, r.closeEntry()
	default:
		e.Kind = Directory
		if len(r.names) == MaxDepth {
			return e, &FormatError{r.offset, "too many directories in each other"}
		}
		r.names = append(r.names, "")
		return e, nil
	}
}

var (
	executableRest = tokens("", "contents")
	targetWord     = tokens("target")
)

// closeEntry reads what ends an entry after its node; the root is in none.
func (r *Reader) closeEntry() error {
	if len(r.names) == 0 {
		return nil
	}
	return r.expect(end)
}

// Read reads the contents of the file that Next returned last, io.EOF at their end.
func (r *Reader) Read(p []byte) (int, error) {
	if r.err != nil && r.err != io.EOF {
		return 0, r.err
	}
	if r.left == 0 {
		return 0, io.EOF
	}
	if int64(len(p)) > r.left {
		p = p[:r.left]
	}
	n, err := r.r.Read(p)
	r.offset += int64(n)
	r.left -= int64(n)
	if n > 0 {
		return n, nil // an error will come again
	}
	if err != nil {
		r.err = r.short(err)
	}
	return 0, r.err
}

// finish reads on to the end of a file's node and entry.
func (r *Reader) finish() error {
	for r.left > 0 {
		n, err := r.r.Discard(int(min(r.left, 1<<30)))
		r.offset += int64(n)
		r.left -= int64(n)
		if err != nil {
			return r.short(err)
		}
	}
	if err := r.padding(r.pad); err != nil {
		return err
	}
	r.open = false
	if err := r.expect(end); err != nil {
		return err
	}
	return r.closeEntry()
}

// End returns nil if Next has returned io.EOF and nothing follows the archive.
func (r *Reader) End() error {
	if r.err != io.EOF {
		if r.err != nil {
			return r.err
		}
		return &FormatError{r.offset, "it was not read to its end"}
	}
	switch _, err := r.r.ReadByte(); err {
	case io.EOF:
		return nil
	case nil:
		return &FormatError{r.offset, "something follows the archive"}
	default:
		return err
	}
}

// short turns the end of the input into a refusal and keeps other errors.
func (r *Reader) short(err error) error {
	if errors.Is(err, io.EOF) || errors.Is(err, io.ErrUnexpectedEOF) {
		return &FormatError{r.offset, "it ends"}
	}
	return err
}

func (r *Reader) full(b []byte) error {
	n, err := io.ReadFull(r.r, b)
	if err != nil {
		r.offset += int64(n)
		return r.short(err)
	}
	r.offset += int64(n)
	return nil
}

// expect reads exactly the bytes of piece.
func (r *Reader) expect(piece string) error {
	var buf [128]byte
	b := buf[:len(piece)]
	at := r.offset
	if err := r.full(b); err != nil {
		return err
	}
	if string(b) != piece {
		return &FormatError{at, "not what comes here"}
	}
	return nil
}

// word reads a token that is one of words.
func (r *Reader) word(words ...string) (string, error) {
	at := r.offset
	s, err := r.string(len("executable"))
	if err != nil {
		return "", err
	}
	for _, w := range words {
		if s == w {
			return w, nil
		}
	}
	return "", &FormatError{at, fmt.Sprintf("%q where only %q can be", s, words)}
}

func (r *Reader) string(bound int) (string, error) {
	at := r.offset
	n, err := r.uint64()
	if err != nil {
		return "", err
	}
	if n > uint64(bound) {
		return "", &FormatError{at, fmt.Sprintf("a string of %d bytes, more than %d", n, bound)}
	}
	b := make([]byte, n)
	if err := r.full(b); err != nil {
		return "", err
	}
	return string(b), r.padding(int64(-n & 7))
}

func (r *Reader) uint64() (uint64, error) {
	var b [8]byte
	err := r.full(b[:])
	return binary.LittleEndian.Uint64(b[:]), err
}

func (r *Reader) padding(n int64) error {
	var b [8]byte
	at := r.offset
	if err := r.full(b[:n]); err != nil {
		return err
	}
	if b != [8]byte{} {
		return &FormatError{at, "padding that is not zero"}
	}
	return nil
}
