package slot

import (
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"

	"golang.org/x/sys/unix"

	"overkeep/crypt/crashpoint"
	"overkeep/crypt/secret"
)

// Variables for the tests of this package: crash at any step, pretend a filesystem.
var (
	step      = crashpoint.At
	renameat2 = unix.Renameat2
)

// Seal returns the set with the hashes of files and the MAC in place. Every slot
// needs its file, by slot name, every file its slot, and the header of each must
// be one this package would open and fit the slot's kind.
func (s *Set) Seal(files map[string][]byte, master *secret.Bytes) (*Set, error) {
	if err := s.check(); err != nil {
		return nil, err
	}
	n := *s
	n.Slots = append([]Slot(nil), s.Slots...)
	for i := range n.Slots {
		x := &n.Slots[i]
		file, ok := files[x.Name]
		if !ok {
			return nil, &SlotError{x.Name, errNoFile}
		}
		if _, err := x.inspect(file); err != nil {
			return nil, named(x.Name, err)
		}
		x.SHA256 = hash(file)
	}
	for name := range files {
		if _, ok := n.Lookup(name); !ok {
			return nil, &SlotError{name, ErrUnknownSlot}
		}
	}
	var err error
	n.MAC, err = n.mac(master)
	return &n, err
}

var errNoFile = errors.New("no file is given for it")

// Commit replaces the set in dir by next, whole: after a crash or a power cut at
// any moment dir is the complete old set or the complete new one. When Commit has
// returned nil it is the new one, durably, and next has its hashes and MAC.
//
// The new set is written and synced in dir+".new", which then changes places with
// dir (renameat2(2), RENAME_EXCHANGE); a dir that does not exist yet is created by
// the rename. What an earlier crash left in dir+".new" is removed first. Files are
// unlinked by name: a directory, or a file whose name no set can have, stops
// Commit with a *TamperError before it has changed anything.
//
// master must be the key of the old set too, as its MAC shows (*TamperError), the
// binding must be the same and the epoch higher (*StaleError): of two changes made
// from one Load the second is refused. An old set.json too damaged to be read is
// replaced without these checks; one of an unknown version is not. A filesystem
// that cannot exchange is an *UnsupportedError, with nothing changed.
func Commit(dir string, next *Set, files map[string][]byte, master *secret.Bytes) error {
	sealed, err := next.Seal(files, master)
	if err != nil {
		return err
	}
	list, err := sealed.marshal()
	if err != nil {
		return err
	}
	if _, err := parse(list); err != nil {
		return fmt.Errorf("own slot set: %w", err)
	}
	parent, base, err := split(dir)
	if err != nil {
		return err
	}
	defer parent.Close()
	at := int(parent.Fd())

	work, err := claim(at, base+newSuffix)
	if err != nil {
		return err
	}
	defer work.Close()
	committed := false
	defer func() {
		if !committed {
			// Best effort: the next Commit removes it as well.
			_ = remove(at, base+newSuffix, work)
		}
	}()

	old, err := openLocked(at, base, unix.LOCK_EX)
	switch {
	case errors.Is(err, fs.ErrNotExist):
	case err != nil:
		return err
	default:
		defer old.Close()
		if err := replaceable(old, sealed, master); err != nil {
			return err
		}
	}

	for _, x := range sealed.Slots {
		if err := write(work, x.Name+suffix, files[x.Name]); err != nil {
			return err
		}
	}
	if err := write(work, setFile, list); err != nil {
		return err
	}
	step("slot: fsync directory")
	if err := work.Sync(); err != nil {
		return err
	}
	if err := place(at, base, old != nil); err != nil {
		return err
	}
	committed = true
	*next = *sealed
	step("slot: fsync parent")
	if err := parent.Sync(); err != nil {
		return err
	}
	if old == nil {
		return nil
	}
	if err := remove(at, base+newSuffix, old); err != nil {
		return fmt.Errorf("remove the old slot set: %w", err)
	}
	step("slot: fsync parent again")
	return parent.Sync()
}

// Sweep removes what a crash within Commit may have left beside dir: without it a
// removed slot's file lies there until the next Commit. Call it at every start. It
// waits for a Commit at the same time; nothing to remove is not an error.
func Sweep(dir string) error {
	parent, base, err := split(dir)
	if err != nil {
		return err
	}
	defer parent.Close()
	d, err := openLocked(int(parent.Fd()), base+newSuffix, unix.LOCK_EX)
	if errors.Is(err, fs.ErrNotExist) {
		return nil
	}
	if err != nil {
		return err
	}
	defer d.Close()
	if err := remove(int(parent.Fd()), base+newSuffix, d); err != nil {
		return err
	}
	step("slot: fsync parent")
	return parent.Sync()
}

// split opens the parent of dir.
func split(dir string) (*os.File, string, error) {
	base := filepath.Base(dir)
	if base == "." || base == ".." || base == string(filepath.Separator) {
		return nil, "", &fs.PathError{Op: "commit", Path: dir, Err: fs.ErrInvalid}
	}
	parent, err := openDir(unix.AT_FDCWD, filepath.Dir(dir))
	return parent, base, err
}

// claim makes the directory name, or takes over what a crash left of it, emptied.
// The lock keeps a second Commit and Sweep away until it is closed.
func claim(at int, name string) (*os.File, error) {
	for {
		step("slot: mkdir")
		err := unix.Mkdirat(at, name, 0o700)
		if err != nil && !errors.Is(err, fs.ErrExist) {
			return nil, &fs.PathError{Op: "mkdir", Path: name, Err: err}
		}
		d, err := openLocked(at, name, unix.LOCK_EX)
		if errors.Is(err, fs.ErrNotExist) {
			continue // another Commit removed it while we waited
		}
		if err != nil {
			return nil, err
		}
		err = empty(d)
		if err == nil {
			err = unix.Fchmod(int(d.Fd()), 0o700)
		}
		if err != nil {
			d.Close()
			return nil, err
		}
		return d, nil
	}
}

// replaceable says whether next may take the place of the set in old.
func replaceable(old *os.File, next *Set, master *secret.Bytes) error {
	if err := removable(old); err != nil {
		return err
	}
	b, err := readAt(old, setFile, MaxSetSize)
	if err != nil {
		return nil // damaged: to be replaced
	}
	s, err := parse(b)
	var format *FormatError
	if errors.As(err, &format) {
		return nil
	}
	if err != nil {
		return err
	}
	if err := s.VerifyMAC(master); err != nil {
		return err
	}
	if s.Binding != next.Binding {
		return &TamperError{Reason: Moved}
	}
	if next.Epoch <= s.Epoch {
		return &StaleError{Disk: s.Epoch, Next: next.Epoch}
	}
	return nil
}

// place moves base+".new" to base.
func place(at int, base string, exists bool) error {
	flag, op := uint(unix.RENAME_NOREPLACE), "RENAME_NOREPLACE"
	if exists {
		flag, op = unix.RENAME_EXCHANGE, "RENAME_EXCHANGE"
	}
	step("slot: rename")
	err := renameat2(at, base+newSuffix, at, base, flag)
	switch err {
	case nil:
		return nil
	case unix.EINVAL, unix.ENOSYS, unix.EOPNOTSUPP:
		return &UnsupportedError{Op: op, Path: base, Err: err}
	}
	return &fs.PathError{Op: "rename", Path: base + newSuffix, Err: err}
}
