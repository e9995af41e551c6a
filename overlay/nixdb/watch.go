package nixdb

import (
	"bytes"
	"context"
	"encoding/binary"
	"fmt"
	"os"
	"time"

	"golang.org/x/sys/unix"
)

// Watch sends on the channel after Nix wrote to the database in dbDir (db.sqlite
// or its WAL), by inotify(7). Signals that nobody has received yet are merged
// into one, so a receiver that looks at the database after each signal misses
// nothing. The first signal comes at once.
//
// A personal garbage collection copies the rows of the whole lower store and
// deletes them again: do not pin on these signals while one runs.
//
// The channel is closed after ctx ended or the directory is gone; the watch has
// been removed by then. Until then it pins the directory's inode: lock a keep
// only after the channel is closed.
func Watch(ctx context.Context, dbDir string) (<-chan struct{}, error) {
	fd, err := unix.InotifyInit1(unix.IN_CLOEXEC | unix.IN_NONBLOCK)
	if err != nil {
		return nil, fmt.Errorf("watch %q: %w", dbDir, err)
	}
	// IN_MODIFY suffices for SQLite's writes; the others are for a WAL or
	// database that is made, replaced or truncated by open.
	const mask = unix.IN_MODIFY | unix.IN_CREATE | unix.IN_MOVED_TO | unix.IN_DELETE_SELF | unix.IN_MOVE_SELF | unix.IN_ONLYDIR
	wd, err := unix.InotifyAddWatch(fd, dbDir, mask)
	if err != nil {
		_ = unix.Close(fd)
		return nil, fmt.Errorf("watch %q: %w", dbDir, err)
	}
	f := os.NewFile(uintptr(fd), "inotify")
	stop := context.AfterFunc(ctx, func() { _ = f.SetReadDeadline(time.Unix(1, 0)) })
	ch := make(chan struct{}, 1)
	ch <- struct{}{}
	go func() {
		defer f.Close()
		defer close(ch)
		// Removing the watch lets go of the inode at once; to close the descriptor with
		// watches on it takes the kernel some 20 ms (fsnotify_wait_marks_destroyed in
		// its fs/notify/mark.c), for which nobody has to wait.
		defer unix.InotifyRmWatch(fd, uint32(wd))
		defer stop()
		buf := make([]byte, 64<<10)
		for {
			n, err := f.Read(buf)
			if err != nil {
				return
			}
			wrote, gone := events(buf[:n])
			if gone {
				return
			}
			if wrote {
				select {
				case ch <- struct{}{}:
				default:
				}
			}
		}
	}()
	return ch, nil
}

// events looks through inotify_event records: wd, mask, cookie, len, name.
func events(b []byte) (wrote, gone bool) {
	for len(b) >= unix.SizeofInotifyEvent {
		mask := binary.NativeEndian.Uint32(b[4:])
		size := int(binary.NativeEndian.Uint32(b[12:]))
		b = b[unix.SizeofInotifyEvent:]
		if size > len(b) {
			return true, gone
		}
		name, _, _ := bytes.Cut(b[:size], []byte{0})
		b = b[size:]
		switch {
		case mask&unix.IN_Q_OVERFLOW != 0:
			wrote = true
		case mask&(unix.IN_IGNORED|unix.IN_UNMOUNT|unix.IN_DELETE_SELF|unix.IN_MOVE_SELF) != 0:
			gone = true
		case string(name) == "db.sqlite" || string(name) == "db.sqlite-wal":
			wrote = true
		}
	}
	return wrote, gone
}
