package nixdb

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"iter"
	"os"
	"path/filepath"
	"strings"

	"golang.org/x/sys/unix"
)

// originAttr marks what OverlayFS copied up from the lower
// (Documentation/filesystems/overlayfs.rst, "Non-directories" and "Inode
// properties"). Reading it needs CAP_SYS_ADMIN.
const originAttr = "trusted.overlay.origin"

// LowerNeeds returns the paths that a keep's database calls valid and that do
// not lie in the keep's own upper directory, so must come from the lower store:
// no entry there, a whiteout, or an entry copied up from the lower (a
// directory whose contents are still the lower's).
//
// A row is a need whether or not a personal root reaches it: as long as Nix calls
// the path valid, it will use it without asking the lower again.
//
// It does not look at the lower store: a damaged keep can need what is nowhere.
// Before a name leaves the keep, as a pin does, take only what the lower store
// says is valid (lower.Client.ValidPaths).
func LowerNeeds(ctx context.Context, upperDB, upperDir string) ([]string, error) {
	g, err := LowerGraph(ctx, upperDB, upperDir)
	return g.Paths, err
}

// Layered is a keep's database as a graph, and which of its paths lie in the
// keep's own upper directory.
type Layered struct {
	Graph
	Own []bool // by index of Paths
}

// ReadLayered reads the whole graph of a keep.
func ReadLayered(ctx context.Context, upperDB, upperDir string) (Layered, error) {
	// Rows before the directory: Nix moves a path into place and then
	// registers it, so a row that is seen has its entry.
	g, err := (&DB{upperDB}).Graph(ctx, nil)
	if err != nil {
		return Layered{}, err
	}
	own, err := ownEntries(upperDir)
	if err != nil {
		return Layered{}, err
	}
	l := Layered{Graph: g, Own: make([]bool, len(g.Paths))}
	for i, p := range g.Paths {
		if l.Own[i], err = own.has(filepath.Base(p)); err != nil {
			return Layered{}, err
		}
	}
	return l, nil
}

// LowerGraph is LowerNeeds with the references among those paths.
func LowerGraph(ctx context.Context, upperDB, upperDir string) (Graph, error) {
	all, err := ReadLayered(ctx, upperDB, upperDir)
	if err != nil {
		return Graph{}, err
	}
	var g Graph
	index := make([]int32, len(all.Paths))
	for i, p := range all.Paths {
		index[i] = -1
		if !all.Own[i] {
			index[i] = int32(len(g.Paths))
			g.Paths = append(g.Paths, p)
		}
	}
	for _, r := range all.Refs {
		if a, b := index[r[0]], index[r[1]]; a >= 0 && b >= 0 {
			g.Refs = append(g.Refs, [2]int32{a, b})
		}
	}
	return g, nil
}

// entries are the names in an upper directory that are not whiteouts.
type entries struct {
	dir   string
	names map[string]bool
}

func ownEntries(dir string) (entries, error) {
	e := entries{dir, map[string]bool{}}
	list, err := os.ReadDir(dir)
	if err != nil {
		return e, fmt.Errorf("read the upper directory: %w", err)
	}
	for _, l := range list {
		if storeEntry(l) {
			e.names[l.Name()] = true
		}
	}
	return e, nil
}

// storeEntry tells what can be a store path: not .links and the like, nor a
// whiteout, which is a character device 0/0; Nix makes no devices.
func storeEntry(l os.DirEntry) bool {
	return !strings.HasPrefix(l.Name(), ".") && l.Type()&os.ModeCharDevice == 0
}

// has reports whether name is the keep's own.
func (e entries) has(name string) (bool, error) {
	if !e.names[name] {
		return false, nil
	}
	return notCopied(e.dir, name)
}

func notCopied(dir, name string) (bool, error) {
	_, err := unix.Lgetxattr(filepath.Join(dir, name), originAttr, nil)
	switch {
	case err == nil, errors.Is(err, unix.ENOENT): // copied up; gone meanwhile
		return false, nil
	case errors.Is(err, unix.ENODATA), errors.Is(err, unix.ENOTSUP), errors.Is(err, unix.EPERM):
		return true, nil
	}
	// The error's path would be a personal name.
	return false, fmt.Errorf("read an attribute in %q: %w", dir, err)
}

// Upper is what lies in a keep's upper directory, by one reading of it.
type Upper struct {
	names []byte // each ends with a slash
}

// ReadUpper reads the directory. Read the database first: Nix moves a path into
// place and then registers it, so a row that was seen has its entry.
func ReadUpper(dir string) (*Upper, error) {
	u := &Upper{}
	d, err := os.Open(dir)
	if err != nil {
		return nil, fmt.Errorf("read the upper directory: %w", err)
	}
	defer d.Close()
	for {
		list, err := d.ReadDir(1024)
		for _, l := range list {
			if n := l.Name(); storeEntry(l) {
				u.names = append(append(u.names, n...), '/')
			}
		}
		if errors.Is(err, io.EOF) {
			return u, nil
		}
		if err != nil {
			return nil, fmt.Errorf("read the upper directory: %w", err)
		}
	}
}

// Names yields every name in it that is no whiteout, in no order. What a name
// stands for may still have been copied up from the lower: see OwnEntry.
func (u *Upper) Names() iter.Seq[[]byte] {
	return func(yield func([]byte) bool) {
		for rest := u.names; len(rest) > 0; {
			name, after, _ := bytes.Cut(rest, []byte{'/'})
			if !yield(name) {
				return
			}
			rest = after
		}
	}
}

// OwnEntry reports whether a name in an upper directory is the keep's own and was
// not copied up. Only what the lower has, too, can have been copied up.
func OwnEntry(dir, name string) (bool, error) { return notCopied(dir, name) }

// InUpper is Names for one name, without reading the directory.
func InUpper(dir, name string) (bool, error) {
	st, err := os.Lstat(filepath.Join(dir, name))
	switch {
	case errors.Is(err, fs.ErrNotExist):
		return false, nil
	case err != nil: // its text would hold a personal name
		return false, fmt.Errorf("look into the upper directory %q: %w", dir, errors.Unwrap(err))
	}
	return st.Mode()&os.ModeCharDevice == 0, nil
}
