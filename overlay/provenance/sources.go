package provenance

import (
	"context"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"os"
	"strings"

	"golang.org/x/sys/unix"

	"overkeep/overlay/drv/storepath"
)

// Bounds of a lock file in a source. Nobody has asked for it to be read: what is
// larger than usual is left alone.
const (
	maxLockFile   = 1 << 20 // bytes
	maxLockInputs = 2000
)

// sourceName is how Nix names the sources of flakes and of their inputs, unless an
// input has the attribute "name" (fetchers/fetchers.cc, Input::getName).
const sourceName = "source"

// Sources finds the flake.lock of each flake whose source lies in a store: Nix
// copies a flake there before it evaluates it, as HASH-source, and the lock file in
// it tells where the sources of its inputs come from, by their hashes, also of those
// that are fetched later.
//
// Not found are a flake below the top of its source ("?dir="), one that was not
// locked yet when it was copied (the first evaluation of a new flake; the next one
// finds it), and where the top flake itself comes from.
//
// What it reads may be anybody's, made to harm: it never leaves the directory, never
// follows a link, never waits, and reads at most a megabyte of one file. It is for
// one goroutine.
type Sources struct {
	Dir      string // holds the paths: a store, or a keep's upper directory
	StoreDir string // where they are in a store; "/nix/store" if empty

	// Valid returns which of store paths are valid: what is not is still being
	// written, and looked at again next time. nil: all are.
	Valid func(ctx context.Context, paths []string) ([]string, error)

	done map[string]bool // what needs no second look, by base name
}

// Seen counts what Look did.
type Seen struct {
	Sources int // looked at for the first time
	Locks   int // of which had a lock file that could be read
	Bad     int // of which had one that could not be
}

// Look calls each with the records of every source that is valid now and was not
// when it was called before. Names that have gone are forgotten. It ends at an error
// of each, of the directory or of Valid; a lock file that cannot be read is none.
func (s *Sources) Look(ctx context.Context, each func(base string, records []Record) error) (Seen, error) {
	var seen Seen
	d, err := os.OpenFile(s.Dir, os.O_RDONLY|unix.O_DIRECTORY|unix.O_NOFOLLOW, 0)
	if err != nil {
		return seen, err
	}
	defer d.Close()
	fresh, err := s.list(ctx, d)
	if err != nil {
		return seen, err
	}
	for _, base := range fresh {
		if err := ctx.Err(); err != nil {
			return seen, err
		}
		seen.Sources++
		records, err := lockOf(d, s.storeDir(), base)
		switch {
		case err == nil:
			seen.Locks++
			if err := each(base, records); err != nil {
				return seen, err
			}
		case !errors.Is(err, fs.ErrNotExist):
			seen.Bad++
		}
		s.done[base] = true
	}
	return seen, nil
}

func (s *Sources) storeDir() string {
	if s.StoreDir == "" {
		return storepath.Dir
	}
	return s.StoreDir
}

// list returns the valid sources that are not done, and forgets of the others those
// that are not there any more.
func (s *Sources) list(ctx context.Context, d *os.File) ([]string, error) {
	var paths []string
	done := map[string]bool{}
	for {
		names, err := d.Readdirnames(4096)
		for _, name := range names {
			if !strings.HasSuffix(name, "-"+sourceName) || !storepath.IsBase(name) || storepath.Name(name) != sourceName {
				continue
			}
			if s.done[name] {
				done[name] = true
			} else {
				paths = append(paths, s.storeDir()+"/"+name)
			}
		}
		if errors.Is(err, io.EOF) {
			break
		}
		if err == nil {
			err = ctx.Err()
		}
		if err != nil {
			return nil, err
		}
	}
	s.done = done
	if s.Valid != nil && len(paths) > 0 {
		var err error
		if paths, err = s.Valid(ctx, paths); err != nil {
			return nil, err
		}
	}
	for i, p := range paths {
		paths[i] = strings.TrimPrefix(p, s.storeDir()+"/")
	}
	return paths, nil
}

// lockOf reads the flake.lock of a source in d. fs.ErrNotExist: there is none, or
// the source has gone.
func lockOf(d *os.File, storeDir, base string) ([]Record, error) {
	const name = "flake.lock"
	fd, err := unix.Openat2(int(d.Fd()), base+"/"+name, &unix.OpenHow{
		// A pipe is opened without waiting for its other end.
		Flags:   unix.O_RDONLY | unix.O_NONBLOCK | unix.O_NOCTTY | unix.O_CLOEXEC | unix.O_NOFOLLOW,
		Resolve: unix.RESOLVE_BENEATH | unix.RESOLVE_NO_SYMLINKS | unix.RESOLVE_NO_MAGICLINKS | unix.RESOLVE_NO_XDEV,
	})
	if errors.Is(err, unix.ENOTDIR) { // a source that is one file
		err = fs.ErrNotExist
	}
	if err != nil {
		return nil, &os.PathError{Op: "open", Path: name, Err: err}
	}
	f := os.NewFile(uintptr(fd), name)
	defer f.Close()
	var st unix.Stat_t
	if err := unix.Fstat(fd, &st); err != nil {
		return nil, err
	}
	if st.Mode&unix.S_IFMT != unix.S_IFREG {
		return nil, fmt.Errorf("%s: %w: no regular file", name, ErrInput)
	}
	b, err := io.ReadAll(io.LimitReader(f, maxLockFile+1))
	if err != nil {
		return nil, err
	}
	if len(b) > maxLockFile {
		return nil, fmt.Errorf("%s: %w: more than %d bytes", name, ErrSize, maxLockFile)
	}
	records, err := Lock(storeDir, b)
	if err == nil && len(records) > maxLockInputs {
		return nil, fmt.Errorf("%s: %w: %d inputs, more than %d", name, ErrSize, len(records), maxLockInputs)
	}
	return records, err
}
