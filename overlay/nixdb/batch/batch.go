// Package batch steps through SQLite statements in C, thousands of rows a call:
// through database/sql a row costs more than everything that is done with it.
//
// It promises: connections that cannot write and load no code of the database's
// schema with trust, rows copied with the type SQLite gives each value, bounded
// buffers, and the result code of SQLite in every error. It uses the SQLite that
// github.com/mattn/go-sqlite3 links, so that the process has one SQLite only:
// two would drop each other's POSIX locks (sqlite.org/howtocorrupt.html, 2.2.1).
//
// Start with Open, Prepare, Next. It is for overlay/nixdb, which knows the schema and
// gives errors their meaning; do not use it elsewhere.
package batch

// #include <stdlib.h>
// #include "batch.h"
import "C"

import (
	"fmt"
	"net/url"
	"time"
	"unsafe"

	_ "github.com/mattn/go-sqlite3" // links SQLite
)

// Longest is the longest text in bytes that is read; of longer ones only the
// type TooLong is told. Nix's longest, the signatures of a path, are some 100
// bytes each.
const Longest = 64 << 10

const (
	// ManyRows is a good size of a buffer for many rows: with it, it stays within
	// a core's second-level cache.
	ManyRows = 512
	// PairsPerCall is how many pairs a call of NextPairs reads at most.
	PairsPerCall = 8192

	textPerRow = 512 // bytes, to begin with
)

// Result codes of SQLite (sqlite.org/rescode.html).
const (
	codeOK       = 0
	CodeReadOnly = 8
	CodeCantOpen = 14
	CodeProtocol = 15
	CodeMisuse   = 21
	codeRow      = 100
	codeDone     = 101
)

// Error is an error of SQLite. Its text never holds a value of a row.
type Error struct {
	Code    int // extended result code; the primary one is its low byte
	Message string
}

func (e *Error) Error() string { return fmt.Sprintf("sqlite: %s (%d)", e.Message, e.Code) }

// Conn is a connection, for one goroutine at a time.
type Conn struct{ db *C.sqlite3 }

// Open opens a database, given by its absolute path, read-only. A lock of another
// process is waited for as long as busy says.
//
// With quiet, it is read-only for the WAL index, too, which then must exist: it
// takes no exclusive lock, ever, and so makes nobody wait; but what only a
// writer can mend is an error of the kind CodeReadOnly, that the next moment may
// heal. SQLite maps the index once a process: as long as a quiet connection is
// open, no other of this process can write to that database.
func Open(path string, quiet bool, busy time.Duration) (*Conn, error) {
	uri := url.URL{Scheme: "file", Path: path, RawQuery: "mode=ro"}
	if quiet {
		uri.RawQuery += "&readonly_shm=1"
	}
	name := C.CString(uri.String())
	defer C.free(unsafe.Pointer(name))
	c := &Conn{}
	if rc := C.ok_open(name, C.int(busy.Milliseconds()), &c.db); rc != codeOK {
		err := c.error(rc)
		C.ok_close(c.db)
		return nil, err
	}
	return c, nil
}

// Close ends the connection. Its statements must be closed before.
func (c *Conn) Close() error {
	if c.db == nil {
		return nil
	}
	rc := C.ok_close(c.db)
	c.db = nil
	if rc != codeOK {
		return &Error{int(rc), "close"}
	}
	return nil
}

func (c *Conn) error(rc C.int) error {
	if c.db == nil {
		return &Error{int(rc), "no memory"}
	}
	return &Error{int(rc), C.GoString(C.ok_message(c.db))}
}

// Exec runs a statement without result, such as "begin".
func (c *Conn) Exec(sql string) error {
	s, err := c.Prepare(sql, 0)
	if err != nil {
		return err
	}
	defer s.Close()
	_, err = s.Next(NewRows(0, 1))
	return err
}

// Stmt is a prepared statement.
type Stmt struct {
	conn    *Conn
	stmt    *C.sqlite3_stmt
	columns int
	pending C.int
}

// Prepare compiles a statement that does not write and has so many columns.
func (c *Conn) Prepare(sql string, columns int) (*Stmt, error) {
	s := &Stmt{conn: c, columns: columns}
	text := C.CString(sql)
	defer C.free(unsafe.Pointer(text))
	if rc := C.ok_prepare(c.db, text, C.int(len(sql)), C.int(columns), &s.stmt); rc != codeOK {
		return nil, c.error(rc)
	}
	return s, nil
}

// Close frees the statement.
func (s *Stmt) Close() {
	C.ok_finalize(s.stmt)
	s.stmt = nil
}

// Reset makes the statement ready to be bound and run again.
func (s *Stmt) Reset() {
	s.pending = 0
	C.ok_reset(s.stmt) // its error is the one of the last step
}

// BindInt sets parameter n, counted from 1.
func (s *Stmt) BindInt(n int, v int64) error {
	if rc := C.ok_bind_int(s.stmt, C.int(n), C.int64_t(v)); rc != codeOK {
		return s.conn.error(rc)
	}
	return nil
}

// BindText sets parameter n, counted from 1, to a copy of text.
func (s *Stmt) BindText(n int, text []byte) error {
	p := (*C.char)(unsafe.Pointer(unsafe.SliceData(text)))
	if len(text) == 0 {
		p = (*C.char)(unsafe.Pointer(&[1]byte{})) // a null pointer would bind NULL
	}
	if rc := C.ok_bind_text(s.stmt, C.int(n), p, C.int(len(text))); rc != codeOK {
		return s.conn.error(rc)
	}
	return nil
}

// Type of a value.
type Type uint32

// The types of SQLite, and TooLong for a text longer than Longest.
const (
	Integer Type = 1
	Float   Type = 2
	Text    Type = 3
	Blob    Type = 4
	Null    Type = 5
	TooLong Type = C.OK_TOO_LONG
)

// cell is ok_cell.
type cell struct {
	i   int64
	len uint32
	typ Type
}

var _ [unsafe.Sizeof(cell{}) - C.sizeof_ok_cell]struct{}
var _ [C.sizeof_ok_cell - unsafe.Sizeof(cell{})]struct{}

// Rows is a buffer of rows; its values are valid until it is filled again.
type Rows struct {
	N       int // rows in it
	max     int
	columns int
	cells   []cell
	text    []byte
}

// NewRows makes a buffer for so many rows of statements with so many columns.
func NewRows(columns, rows int) *Rows {
	return &Rows{
		columns: columns,
		cells:   make([]cell, rows*columns+1), // never empty: C gets its address
		text:    make([]byte, rows*textPerRow+1),
		max:     rows,
	}
}

// Next fills rows with what comes next and reports whether there may be more.
func (s *Stmt) Next(rows *Rows) (more bool, err error) {
	if rows.columns != s.columns || rows.max < 1 {
		return false, &Error{CodeMisuse, "a buffer for other columns"}
	}
	for {
		var n C.int
		rc := C.ok_rows(s.stmt, C.int(s.columns), Longest, (*C.ok_cell)(unsafe.Pointer(&rows.cells[0])), C.int(rows.max),
			(*C.char)(unsafe.Pointer(&rows.text[0])), C.int(len(rows.text)), &s.pending, &n)
		rows.N = int(n)
		switch {
		case rc == codeRow && n == 0 && len(rows.text) < s.columns*Longest: // a row longer than the buffer
			rows.text = make([]byte, s.columns*Longest)
		case rc == codeRow:
			return true, nil
		case rc == codeDone:
			return false, nil
		default:
			return false, s.conn.error(rc)
		}
	}
}

// Type of the value in a row and column, both counted from 0.
func (r *Rows) Type(row, col int) Type { return r.cells[row*r.columns+col].typ }

// Int is an integer; of another type it is 0.
func (r *Rows) Int(row, col int) int64 {
	c := &r.cells[row*r.columns+col]
	if c.typ != Integer {
		return 0
	}
	return c.i
}

// Text is a text; of another type it is nil.
func (r *Rows) Text(row, col int) []byte {
	c := &r.cells[row*r.columns+col]
	if c.typ != Text {
		return nil
	}
	return r.text[c.i : c.i+int64(c.len) : c.i+int64(c.len)]
}

// NextPairs fills pairs, which is as long as PairsPerCall, with the rows of a
// statement of two columns. Rows in which one of the two is no integer are left
// out and counted.
func (s *Stmt) NextPairs(pairs [][2]int64) (n, wrong int, more bool, err error) {
	if s.columns != 2 || len(pairs) < PairsPerCall {
		return 0, 0, false, &Error{CodeMisuse, "a buffer for other columns"}
	}
	var read, bad C.int
	rc := C.ok_pairs(s.stmt, (*C.int64_t)(unsafe.Pointer(&pairs[0])), PairsPerCall, &read, &bad)
	switch rc {
	case codeRow:
		return int(read), int(bad), true, nil
	case codeDone:
		return int(read), int(bad), false, nil
	}
	return 0, 0, false, s.conn.error(rc)
}
