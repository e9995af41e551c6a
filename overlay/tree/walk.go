package tree

import (
	"context"
	"errors"
	"fmt"

	"golang.org/x/sys/unix"

	"overkeep/overlay/nar"
)

// walker goes through one tree at a time, without recursion.
type walker struct {
	ctx    context.Context
	src    chain
	frames []frame // one for each directory of the chain

	// noatime is O_NOATIME as long as it is permitted: when a path was last read
	// is not to be left behind, nor paid for.
	noatime int
	dirents []byte
}

// frame is a directory of the way down.
type frame struct {
	names
	at      int    // the next of the names
	name    string // its own
	removed bool   // something of it was (Remove)
}

func newWalker() walker { return walker{noatime: unix.O_NOATIME, dirents: make([]byte, 32<<10)} }

// begin makes it ready for a tree in the directory base.
func (w *walker) begin(ctx context.Context, base int) {
	w.ctx, w.src = ctx, chain{base: base}
	clear(w.frames)
	w.frames = w.frames[:0]
}

// next is the next entry of the directory where the walk stands, with its DT_* type; or the walk
// has left the directory (whose name is given), for it has no more.
func (w *walker) next() (name string, typ uint8, left bool, err error) {
	if err := w.ctx.Err(); err != nil {
		return "", 0, false, err
	}
	f := &w.frames[len(w.frames)-1]
	if f.at < len(f.spans) {
		i := f.at
		f.at++
		return string(f.slice(i)), f.spans[i].typ, false, nil
	}
	name = f.name
	if err := w.src.pop(); err != nil {
		return "", 0, false, &Error{"leave", name, false, err}
	}
	*f = frame{}
	w.frames = w.frames[:len(w.frames)-1]
	return name, 0, true, nil
}

// lost is what an error means for a name that was there a moment ago.
func (w *walker) lost(op, name string, err error) error {
	if len(w.frames) > 0 {
		for _, gone := range []error{unix.ENOENT, unix.ELOOP, unix.ENOTDIR, unix.ENXIO, unix.EINVAL} {
			if errors.Is(err, gone) {
				err = fmt.Errorf("%w: %w", ErrChanged, err)
				break
			}
		}
	}
	return &Error{op, name, false, err}
}

// mode is the type of name (st_mode & S_IFMT), of which its directory says typ.
func (w *walker) mode(name string, typ uint8) (uint32, error) {
	if typ != unix.DT_UNKNOWN {
		return uint32(typ) << 12, nil // that is how DT_* are made
	}
	var st unix.Stat_t
	if err := lstatat(w.src.fd(), name, &st); err != nil {
		return 0, w.lost("stat", name, err)
	}
	return st.Mode & unix.S_IFMT, nil
}

// open opens name in the directory where the walk stands.
func (w *walker) open(name string, flags int, st *unix.Stat_t) (int, error) {
	fd, err := open(w.src.fd(), name, flags|w.noatime)
	if errors.Is(err, unix.EPERM) && w.noatime != 0 { // for owners and root only (open(2))
		w.noatime = 0
		fd, err = open(w.src.fd(), name, flags)
	}
	if err != nil {
		return -1, w.lost("open", name, err)
	}
	if err := fstat(fd, st); err != nil {
		_ = shut(fd)
		return -1, &Error{"stat", name, false, err}
	}
	return fd, nil
}

// enter goes down into name.
func (w *walker) enter(name string, sorted bool) error {
	if len(w.frames) == nar.MaxDepth {
		return &Error{"enter", name, false, ErrDepth}
	}
	var st unix.Stat_t
	fd, err := w.open(name, openDir, &st)
	if err != nil {
		return err
	}
	w.src.push(fd, &st)
	list, err := readNames(fd, w.dirents)
	if err != nil {
		return &Error{"read", name, false, err}
	}
	if sorted {
		list.sort()
	}
	w.frames = append(w.frames, frame{names: list, name: name})
	return nil
}
