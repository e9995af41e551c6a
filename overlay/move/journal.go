package move

import (
	"bytes"
	"encoding/json"
	"errors"
	"fmt"
	"hash/crc32"
	"io"
	"os"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"time"

	"golang.org/x/sys/unix"

	"overkeep/overlay/gcroot"
	"overkeep/overlay/nixdb"
	"overkeep/overlay/plan"
)

// The journal is a directory of files, one for each operation, numbered. A file is
// lines: the CRC-32C of the text in eight hexadecimal digits, a space, and the text,
// one JSON object. A line counts when it is whole and its sum is right; only the last
// may be otherwise (the write was cut short), and then it never was.

// JournalVersion is the version of the format, in every first line.
const JournalVersion = 1

// Bounds of what is read back: a line holds the rows of one batch.
const (
	maxLine    = 256 << 20
	maxJournal = 4 << 30
)

var (
	// ErrJournal: a line of the journal, not its last, is damaged.
	ErrJournal = errors.New("the journal of moves is damaged")
	// ErrJournalVersion: a newer overkeep wrote it.
	ErrJournalVersion = errors.New("the journal of moves was written by another version")
	// ErrBusy: another mover works on the keep.
	ErrBusy = errors.New("another command moves paths of this keep")
)

// Kind says what command an operation is.
type Kind string

const (
	Apply   Kind = "apply"
	Seal    Kind = "seal"
	Release Kind = "release"
	Undo    Kind = "undo"
	Eject   Kind = "eject"
	Wipe    Kind = "wipe"
)

// event is one line. What is set depends on Type.
type event struct {
	Type string `json:"type"`

	// begin
	Version int         `json:"version,omitempty"`
	ID      int         `json:"id,omitempty"`
	Kind    Kind        `json:"kind,omitempty"`
	Plan    string      `json:"plan,omitempty"` // the plan that is carried out, by its id
	Of      int         `json:"of,omitempty"`   // undo: of which operation
	Time    *time.Time  `json:"time,omitempty"`
	Stage   string      `json:"stage,omitempty"` // directory in the system store
	Moves   []plan.Move `json:"moves,omitempty"`

	// batch and what becomes of it
	Batch int             `json:"batch,omitempty"` // from 1
	Items []item          `json:"items,omitempty"`
	Roots []gcroot.Record `json:"roots,omitempty"`
	Paths []string        `json:"paths,omitempty"`

	// left, done
	Left   []Left       `json:"left,omitempty"`
	Result *CleanResult `json:"result,omitempty"`
}

// item is one path of a batch with its row as it was.
type item struct {
	Info      nixdb.Info `json:"info"`
	Kind      plan.Kind  `json:"kind"`
	Duplicate bool       `json:"duplicate,omitempty"`
}

// Types of events. A batch of seals goes batch, kept, deleting, gone; one of releases
// goes batch, placing, placed, dropped. Either may end with back instead.
const (
	evBegin    = "begin"
	evBatch    = "batch"
	evKept     = "kept"     // seal: verified and valid in the keep
	evDeleting = "deleting" // seal: from here on the rows leave the system's database
	evGone     = "gone"     // seal: neither row nor bytes in the system store
	evPlacing  = "placing"  // release: verified, comes into the system store from here on
	evPlaced   = "placed"   // release: valid in the system store
	evDropped  = "dropped"  // release: not in the upper layer any more
	evBack     = "back"     // the batch was taken back whole
	evLeft     = "left"     // paths that stay where they are, with the reason
	evCleaned  = "cleaned"  // what was sealed is wiped from the device
	evEnd      = "end"
)

// journal is one operation's file, open for appending.
type journal struct {
	f   *os.File
	dir string
	id  int
}

var castagnoli = crc32.MakeTable(crc32.Castagnoli)

func fileOf(dir string, id int) string { return filepath.Join(dir, fmt.Sprintf("%08d.moves", id)) }

// add appends an event; on return it is on disk.
func (j *journal) add(e event) error {
	b, err := json.Marshal(e)
	if err != nil {
		return err
	}
	if len(b) > maxLine {
		return fmt.Errorf("a line of %d bytes is too long for the journal", len(b))
	}
	line := fmt.Appendf(nil, "%08x %s\n", crc32.Checksum(b, castagnoli), b)
	for at := 0; at < len(line); {
		n, err := j.f.Write(line[at:])
		at += n
		if err != nil && !errors.Is(err, unix.EINTR) {
			return fmt.Errorf("write the journal of moves: %w", j.cut(err, int64(at)))
		}
	}
	if err := again(func() error { return j.f.Sync() }); err != nil {
		// What is not known to be on disk must not be there either: a later reader
		// would believe a step that we are about to call failed.
		return fmt.Errorf("write the journal of moves: %w", j.cut(err, int64(len(line))))
	}
	return nil
}

// cut takes back the last n bytes, which could not be written durably.
func (j *journal) cut(cause error, n int64) error {
	st, err := j.f.Stat()
	if err == nil {
		err = again(func() error { return j.f.Truncate(max(0, st.Size()-n)) })
	}
	if err == nil {
		err = again(func() error { return j.f.Sync() })
	}
	return errors.Join(cause, err)
}

func (j *journal) close() error { return j.f.Close() }

// again repeats what a signal interrupted.
func again(f func() error) error {
	for {
		if err := f(); !errors.Is(err, unix.EINTR) {
			return err
		}
	}
}

// operation is what a journal file says.
type operation struct {
	begin  event
	events []event // after begin
}

// readJournal reads one file; whole says up to where it is sound. An empty or
// cut-off first line is no operation: nil.
func readJournal(r io.Reader) (op *operation, whole int64, err error) {
	b, err := io.ReadAll(io.LimitReader(r, maxJournal+1))
	if err != nil {
		return nil, 0, err
	}
	if len(b) > maxJournal {
		return nil, 0, fmt.Errorf("%w: it is longer than %d bytes", ErrJournal, maxJournal)
	}
	for line := 1; int(whole) < len(b); line++ {
		rest := b[whole:]
		end := bytes.IndexByte(rest, '\n')
		if end < 0 || end > maxLine+9 {
			break // cut short
		}
		e, err := readLine(rest[:end])
		if err != nil {
			if int(whole)+end+1 == len(b) {
				break // cut short, by a file system that wrote the end first
			}
			return op, whole, fmt.Errorf("%w: line %d: %w", ErrJournal, line, err)
		}
		if (op == nil) != (e.Type == evBegin) {
			return op, whole, fmt.Errorf("%w: line %d: %q does not belong there", ErrJournal, line, e.Type)
		}
		if op == nil {
			if e.Version != JournalVersion {
				return nil, whole, fmt.Errorf("%w: %d, not %d", ErrJournalVersion, e.Version, JournalVersion)
			}
			op = &operation{begin: e}
		} else {
			op.events = append(op.events, e)
		}
		whole += int64(end) + 1
	}
	return op, whole, nil
}

func readLine(line []byte) (e event, err error) {
	if len(line) < 10 || line[8] != ' ' {
		return e, errors.New("no checksum")
	}
	sum, err := strconv.ParseUint(string(line[:8]), 16, 32)
	if err != nil || uint32(sum) != crc32.Checksum(line[9:], castagnoli) {
		return e, errors.New("wrong checksum")
	}
	d := json.NewDecoder(bytes.NewReader(line[9:]))
	d.DisallowUnknownFields()
	if err := d.Decode(&e); err != nil {
		return e, err
	}
	if !slices.Contains([]string{evBegin, evBatch, evKept, evDeleting, evGone, evPlacing, evPlaced, evDropped, evBack, evLeft, evCleaned, evEnd}, e.Type) {
		return e, fmt.Errorf("unknown event %q", e.Type)
	}
	return e, nil
}

// ended reports whether nothing of the operation is left to do.
func (o *operation) ended() bool {
	return len(o.events) > 0 && o.events[len(o.events)-1].Type == evEnd
}

// openJournals makes the directory and takes its lock. The file of an interrupted
// write is cut back to its last whole line.
func openJournals(dir string) (lock *os.File, err error) {
	if err := os.Mkdir(dir, 0o700); err != nil && !errors.Is(err, os.ErrExist) {
		return nil, err
	}
	fi, err := os.Lstat(dir)
	if err != nil {
		return nil, err
	}
	if !fi.IsDir() || fi.Mode().Perm()&0o077 != 0 {
		return nil, fmt.Errorf("%w: %q is not a directory of root's alone", ErrJournal, dir)
	}
	lock, err = os.OpenFile(filepath.Join(dir, "lock"), os.O_CREATE|os.O_RDWR|unix.O_NOFOLLOW, 0o600)
	if err != nil {
		return nil, err
	}
	if err := again(func() error { return unix.Flock(int(lock.Fd()), unix.LOCK_EX|unix.LOCK_NB) }); err != nil {
		lock.Close()
		if errors.Is(err, unix.EWOULDBLOCK) {
			return nil, ErrBusy
		}
		return nil, err
	}
	return lock, nil
}

// numbers lists the operations there are, in order.
func numbers(dir string) (out []int, err error) {
	list, err := os.ReadDir(dir)
	if errors.Is(err, os.ErrNotExist) {
		return nil, nil
	}
	if err != nil {
		return nil, err
	}
	for _, e := range list {
		name, ok := strings.CutSuffix(e.Name(), ".moves")
		if n, err := strconv.Atoi(name); ok && err == nil && n > 0 && fmt.Sprintf("%08d", n) == name {
			out = append(out, n)
		}
	}
	slices.Sort(out)
	return out, nil
}

// load reads operation id and, with repair, cuts off what was written in part.
func load(dir string, id int, repair bool) (*operation, error) {
	flags := os.O_RDONLY
	if repair {
		flags = os.O_RDWR
	}
	f, err := os.OpenFile(fileOf(dir, id), flags|unix.O_NOFOLLOW, 0)
	if err != nil {
		return nil, err
	}
	defer f.Close()
	op, whole, err := readJournal(f)
	if err != nil {
		return op, fmt.Errorf("operation %d: %w", id, err)
	}
	if repair {
		if err := again(func() error { return f.Truncate(whole) }); err != nil {
			return op, err
		}
		if err := again(func() error { return f.Sync() }); err != nil {
			return op, err
		}
	}
	return op, nil
}

// create begins the file of a new operation: it appears with its first line, or not
// at all.
func create(dir string, begin event) (*journal, error) {
	all, err := numbers(dir)
	if err != nil {
		return nil, err
	}
	begin.ID = 1
	if len(all) > 0 {
		begin.ID = all[len(all)-1] + 1
	}
	begin.Type, begin.Version = evBegin, JournalVersion
	now := time.Now().UTC().Truncate(time.Second)
	begin.Time = &now
	f, err := os.OpenFile(fileOf(dir, begin.ID), os.O_CREATE|os.O_EXCL|os.O_RDWR|os.O_APPEND|unix.O_NOFOLLOW, 0o600)
	if err != nil {
		return nil, err
	}
	j := &journal{f: f, dir: dir, id: begin.ID}
	err = j.add(begin)
	if err == nil {
		err = syncDir(dir)
	}
	if err != nil {
		_ = os.Remove(f.Name())
		return nil, errors.Join(err, f.Close())
	}
	return j, nil
}

// reopen goes on with an operation that was interrupted.
func reopen(dir string, id int) (*journal, error) {
	f, err := os.OpenFile(fileOf(dir, id), os.O_RDWR|os.O_APPEND|unix.O_NOFOLLOW, 0)
	if err != nil {
		return nil, err
	}
	return &journal{f: f, dir: dir, id: id}, nil
}

func syncDir(dir string) error {
	d, err := os.Open(dir)
	if err != nil {
		return err
	}
	defer d.Close()
	return again(func() error { return d.Sync() })
}
