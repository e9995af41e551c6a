package batch

// #include "batch.h"
import "C"

import (
	"io"
	"unsafe"
)

// RawSize is the size of the database file in bytes.
func (c *Conn) RawSize() (int64, error) {
	var size C.int64_t
	if rc := C.ok_raw_size(c.db, &size); rc != codeOK {
		return 0, &Error{int(rc), "size of the file"}
	}
	return int64(size), nil
}

// ReadAt reads the bytes of the database file as they lie on the disk, without the WAL
// and with whatever stands in free pages; size is the one of RawSize.
func (c *Conn) ReadAt(b []byte, offset, size int64) (n int, err error) {
	if offset < 0 || offset >= size {
		return 0, io.EOF
	}
	b = b[:min(int64(len(b)), size-offset, 1<<30)]
	if len(b) == 0 {
		return 0, nil
	}
	if rc := C.ok_raw_read(c.db, unsafe.Pointer(&b[0]), C.int(len(b)), C.int64_t(offset)); rc != codeOK {
		return 0, &Error{int(rc), "read the file"}
	}
	return len(b), nil
}

// Raw is a reader of the whole file by ReadAt.
func (c *Conn) Raw() (io.Reader, error) {
	size, err := c.RawSize()
	return &rawReader{c, 0, size}, err
}

type rawReader struct {
	conn     *Conn
	at, size int64
}

func (r *rawReader) Read(b []byte) (int, error) {
	n, err := r.conn.ReadAt(b, r.at, r.size)
	r.at += int64(n)
	return n, err
}
