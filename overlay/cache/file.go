package cache

import (
	"errors"
	"fmt"
	"io"

	"golang.org/x/sys/unix"
)

// Error is a system call on the cache's directory that did not work.
type Error struct {
	Op, Name string
	Err      error
}

func (e *Error) Error() string { return fmt.Sprintf("%s %q: %v", e.Op, e.Name, e.Err) }
func (e *Error) Unwrap() error { return e.Err }

func failed(op, name string, err error) error { return &Error{op, name, err} }

// again repeats what a signal interrupted (signal(7)).
func again(f func() error) error {
	for {
		if err := f(); !errors.Is(err, unix.EINTR) {
			return err
		}
	}
}

// file writes name of the directory dir by way of another name that a crash leaves
// to be written again. No link that someone put there is followed.
func (w *writing) file(dir int, name string, content func(io.Writer) error) error {
	tmp := name + suffix
	unlink := func() error {
		err := again(func() error { return unix.Unlinkat(dir, tmp, 0) })
		if errors.Is(err, unix.ENOENT) {
			return nil
		}
		return err
	}
	if err := unlink(); err != nil {
		return failed("remove", tmp, err)
	}
	f := fdWriter{name: tmp}
	err := again(func() (err error) {
		f.fd, err = unix.Openat(dir, tmp, unix.O_WRONLY|unix.O_CREAT|unix.O_EXCL|unix.O_NOFOLLOW|unix.O_CLOEXEC, 0o600)
		return err
	})
	if err != nil {
		return failed("create", tmp, err)
	}
	err = again(func() error { return unix.Fchown(f.fd, w.o.UID, w.o.GID) })
	if err == nil {
		err = again(func() error { return unix.Fchmod(f.fd, 0o600) }) // whatever the umask
	}
	if err != nil {
		err = failed("chown", tmp, err)
	} else {
		err = content(f)
	}
	if e := unix.Close(f.fd); e != nil && !errors.Is(e, unix.EINTR) && err == nil { // closed also after EINTR
		err = failed("close", tmp, e)
	}
	if err == nil {
		if e := again(func() error { return unix.Renameat(dir, tmp, dir, name) }); e != nil {
			err = failed("rename", tmp, e)
		}
	}
	if err != nil {
		_ = unlink() // it may stay: the next call removes it
	}
	return err
}

type fdWriter struct {
	fd   int
	name string
}

func (f fdWriter) Write(p []byte) (n int, err error) {
	for n < len(p) {
		var k int
		err := again(func() (err error) { k, err = unix.Write(f.fd, p[n:]); return err })
		if err == nil && k <= 0 {
			err = io.ErrShortWrite
		}
		if err != nil {
			return n, failed("write", f.name, err)
		}
		n += k
	}
	return n, nil
}

// read reads a regular file of at most limit bytes, or its beginning.
func read(dir int, name string, limit int) ([]byte, error) {
	var fd int
	err := again(func() (err error) {
		fd, err = unix.Openat(dir, name, unix.O_RDONLY|unix.O_NOFOLLOW|unix.O_NONBLOCK|unix.O_CLOEXEC, 0)
		return err
	})
	if err != nil {
		return nil, err
	}
	defer unix.Close(fd)
	var st unix.Stat_t
	if err := again(func() error { return unix.Fstat(fd, &st) }); err != nil {
		return nil, err
	}
	if st.Mode&unix.S_IFMT != unix.S_IFREG {
		return nil, ErrForeign
	}
	b := make([]byte, limit)
	got := 0
	for got < limit {
		var n int
		if err := again(func() (err error) { n, err = unix.Read(fd, b[got:]); return err }); err != nil {
			return nil, err
		}
		if n == 0 {
			break
		}
		got += n
	}
	return b[:got], nil
}
