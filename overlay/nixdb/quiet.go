package nixdb

import (
	"context"
	"encoding/binary"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"sync"
	"time"

	"golang.org/x/sys/unix"

	"overkeep/overlay/nixdb/batch"
)

// SQLite readers of a WAL database are not as harmless as they are said to be. One
// that comes when no other process has the database open locks the WAL index
// exclusively and sets it up; one that looks while a commit is under way takes the
// writer's lock to make sure; and Nix, which opens its database for every client,
// then sleeps for some milliseconds (tests/beside shows it). A reader for which
// the index is read-only (wal.c, WAL_SHM_RDONLY) does none of that: if nobody keeps the
// index, it makes one of its own in memory. It only needs the file to exist.

// settle looks at the error of a first quiet read and says whether to try again,
// and whether quietly.
func settle(ctx context.Context, abs string, err error, n int) (again, quiet bool) {
	const tries = 40 // two seconds
	var e *batch.Error
	if !errors.As(err, &e) || ctx.Err() != nil {
		return false, false
	}
	switch e.Code & 0xff {
	case batch.CodeCantOpen: // there is no index
		return true, n < tries && makeIndex(abs) == nil
	case batch.CodeProtocol: // nothing but an index of its own would do, and that failed
		return true, false
	case batch.CodeReadOnly: // a commit was under way, or a process is just setting it up
		timer := time.NewTimer(min(time.Duration(n)*time.Millisecond, 100*time.Millisecond))
		defer timer.Stop()
		select {
		case <-timer.C:
		case <-ctx.Done():
		}
		return true, n < tries
	}
	return false, false
}

// walSound reports whether a WAL, if there is one, begins as SQLite's do
// (sqlite.org/fileformat2.html#walformat). With another, such as the zeros that
// a power cut can leave, a quiet reader that nobody keeps the index for would try
// for ten seconds in vain.
func walSound(abs string) bool {
	real, err := filepath.EvalSymlinks(abs)
	if err != nil {
		return true // SQLite will say
	}
	f, err := os.Open(real + "-wal") // SQLite has no locks on it
	if err != nil {
		return true
	}
	defer f.Close()
	var h [32]byte
	if n, _ := f.ReadAt(h[:], 0); n < len(h) {
		return true // no header: an empty one
	}
	var order binary.ByteOrder = binary.LittleEndian
	switch binary.BigEndian.Uint32(h[:]) {
	case 0x377f0682:
	case 0x377f0683:
		order = binary.BigEndian
	default:
		return false
	}
	var s0, s1 uint32
	for i := 0; i < 24; i += 8 {
		s0 += order.Uint32(h[i:]) + s1
		s1 += order.Uint32(h[i+4:]) + s0
	}
	return s0 == binary.BigEndian.Uint32(h[24:]) && s1 == binary.BigEndian.Uint32(h[28:])
}

// makeIndex makes an empty WAL index, which SQLite takes for one that a dead
// process left: its next writer sets it up. By mknod(2), for to close a
// descriptor of it would drop the locks that this process has there.
func makeIndex(abs string) error {
	real, err := filepath.EvalSymlinks(abs)
	if err != nil {
		return err
	}
	var st unix.Stat_t
	if err := unix.Stat(real, &st); err != nil {
		return err
	}
	file := real + "-shm"
	mode := st.Mode & 0o666
	if err := unix.Mknod(file, unix.S_IFREG|mode, 0); err != nil {
		if errors.Is(err, fs.ErrExist) {
			return nil
		}
		return err
	}
	// As SQLite has it: mode and owner of the database, whatever the umask.
	if err := unix.Fchmodat(unix.AT_FDCWD, file, mode, 0); err != nil && !errors.Is(err, fs.ErrNotExist) {
		return err
	}
	if os.Geteuid() != 0 {
		return nil
	}
	if err := unix.Lchown(file, int(st.Uid), int(st.Gid)); err != nil && !errors.Is(err, fs.ErrNotExist) {
		return err
	}
	return nil
}

// use is the use of a database file by this process. SQLite maps a WAL index once a
// process, for reading only or for writing, too.
type use struct {
	file  fileID
	quiet bool           // a reader to which the index is read-only
	count map[fileID]int // where it is counted, if it is
	once  sync.Once
}

type fileID struct{ dev, ino uint64 }

var uses = struct {
	sync.Mutex
	readers, writers map[fileID]int
	changed          chan struct{} // closed when one has ended
}{readers: map[fileID]int{}, writers: map[fileID]int{}, changed: make(chan struct{})}

func identify(abs string) (fileID, error) {
	var st unix.Stat_t
	if err := unix.Stat(abs, &st); err != nil {
		return fileID{}, fmt.Errorf("%w: %w", ErrUnreadable, err)
	}
	return fileID{uint64(st.Dev), st.Ino}, nil
}

// beginReading says whether a reader can be quiet: unless this process is writing.
func beginReading(abs string) (*use, error) {
	id, err := identify(abs)
	if err != nil {
		return nil, err
	}
	sound := walSound(abs)
	uses.Lock()
	defer uses.Unlock()
	u := &use{file: id, quiet: uses.writers[id] == 0 && sound}
	if u.quiet {
		u.count = uses.readers
		u.count[id]++
	}
	return u, nil
}

// beginWriting waits until no quiet reader of this process is left, as it would for
// a lock.
func beginWriting(ctx context.Context, abs string) (*use, error) {
	id, err := identify(abs)
	if err != nil {
		return nil, err
	}
	timer := time.NewTimer(busyTimeout)
	defer timer.Stop()
	for {
		uses.Lock()
		if uses.readers[id] == 0 {
			uses.writers[id]++
			uses.Unlock()
			return &use{file: id, count: uses.writers}, nil
		}
		changed := uses.changed
		uses.Unlock()
		select {
		case <-changed:
		case <-ctx.Done():
			return nil, ctx.Err()
		case <-timer.C:
			return nil, fmt.Errorf("%q: %w: this process is reading it", abs, ErrBusy)
		}
	}
}

// end ends the use; nil and a second call are no-ops.
func (u *use) end() {
	if u == nil || u.count == nil {
		return
	}
	u.once.Do(func() {
		uses.Lock()
		defer uses.Unlock()
		if u.count[u.file]--; u.count[u.file] == 0 {
			delete(u.count, u.file)
		}
		close(uses.changed)
		uses.changed = make(chan struct{})
	})
}
