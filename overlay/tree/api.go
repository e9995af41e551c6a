package tree

import (
	"context"
	"errors"
	"io"
	"os"
)

var errTodo = errors.New("not there yet")

// Copy copies the file, symbolic link or directory name of src to newName of dst, which
// must not exist, in canonical form.
//
// On an error, and when ctx ends, what was copied so far is left at newName: Remove it.
// EEXIST (fs.ErrExist) for newName itself means that nothing was made.
func Copy(ctx context.Context, src *os.File, name string, dst *os.File, newName string, o Options) (Result, error) {
	return Result{}, errTodo
}

// CopyAll copies the trees of jobs from src to dst, several at a time, and compares their
// hashes. done is called once for every job that was begun, one call at a time, in no
// order; err is nil, a *MismatchError, or what Copy returns. What is then left at NewName is
// as with Copy, and a whole but wrong copy after a mismatch.
//
// A job that cannot be read does not stop the others. CopyAll returns early, without
// beginning more jobs, when ctx ends or the target cannot be written to (*Error with
// Target); it returns that error.
func CopyAll(ctx context.Context, src, dst *os.File, jobs []Job, o Options, done func(i int, r Result, err error)) error {
	return errTodo
}

// Hash reads the tree name of dir as Copy does and writes nothing.
func Hash(ctx context.Context, dir *os.File, name string, o Options) (Result, error) {
	return Result{}, errTodo
}

// Dump writes the tree name of dir to w as a NAR. An error of w comes back as it is.
func Dump(ctx context.Context, w io.Writer, dir *os.File, name string, o Options) (Result, error) {
	return Result{}, errTodo
}

// Restore makes newName of dst, which must not exist, from a NAR. r must end with the
// archive. What is wrong with the archive is a *nar.FormatError; after an error a part may
// be left at newName, as with Copy.
func Restore(ctx context.Context, r io.Reader, dst *os.File, newName string, o Options) (Result, error) {
	return Result{}, errTodo
}

// Remove removes the tree name of dir. It makes directories writable for their owner first
// where it must. Links are removed, not followed; a mount point in the tree is ErrMount,
// with a part of the tree possibly gone. A name that does not exist is no error, so it can be
// repeated after a crash at any point.
func Remove(ctx context.Context, dir *os.File, name string) error { return errTodo }

// Usage is what a copy of the tree name of dir needs on a file system with blocks of
// blockSize bytes, such as Room tells of the target. It is at least what ext4 uses, with or
// without fscrypt, and reads no content.
func Usage(ctx context.Context, dir *os.File, name string, blockSize int64) (Space, error) {
	return Space{}, errTodo
}

// Room is what is free, for us, on the file system of dir.
func Room(dir *os.File) (Space, error) { return Space{}, errTodo }
