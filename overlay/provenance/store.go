package provenance

import (
	"bytes"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"iter"
	"os"
	"path/filepath"
	"slices"
	"sync"
	"time"
	"unicode/utf8"

	"github.com/google/renameio/v2"
	"golang.org/x/sys/unix"

	"overkeep/overlay/drv/storepath"
	"overkeep/policy/graph"
)

// fileName is the file of a Store in its directory: a header line, then one JSON
// object a line, in the order in which things were learned.
const fileName = "origins.jsonl"

// fileMode lets the group of the directory, if it is set-group-ID, read: whose paths
// they are may know where they come from.
const fileMode = 0o640

const (
	maxFile = 256 << 20 // bytes; a million records of usual size
	maxLine = 4 << 20   // bytes; the bounds of a record, escaped at worst
)

var (
	// ErrUnsafe: another user than root could have written the file. A forged record could
	// make a policy grant.
	ErrUnsafe = errors.New("provenance that another user could have written")
	// ErrRecord: a record that cannot be kept.
	ErrRecord = errors.New("not a record")
)

// Store is what is known of the origins of paths, in memory and in a file. It is
// safe for concurrent use, also by several processes: what another one adds is
// seen after the next Open.
type Store struct {
	dir     string
	now     func() time.Time
	maxFile int64

	mu      sync.Mutex
	known   map[string]*graph.Origin // by base name
	lines   int                      // records in the file
	useless int                      // of these, what said nothing new
	damaged int
}

// Open reads the records in dir, which lies inside the keep's volume (K/provenance)
// and is written by root or the caller alone. Nothing is made until something is added. What a
// crash tore off at the end is no error; lines that cannot be read are left out
// and counted, see Damaged.
func Open(dir string) (*Store, error) { return OpenWithin(dir, maxFile) }

// OpenWithin is Open with a bound of its own on the file, in bytes: a larger one is
// ErrSize, and so is what would make it larger.
func OpenWithin(dir string, bound int64) (*Store, error) {
	s := &Store{dir: dir, now: time.Now, maxFile: min(bound, maxFile)}
	b, err := s.read()
	if err != nil {
		return nil, err
	}
	s.known = map[string]*graph.Origin{}
	return s, s.load(b)
}

// line is a record in the file.
type line struct {
	Path     string   `json:"path"`
	From     []string `json:"from,omitempty"`
	Licences []string `json:"licences,omitempty"`
	Unfree   *bool    `json:"unfree,omitempty"`
	How      string   `json:"how"`
	When     int64    `json:"when"`
}

// header is the first line.
type header struct {
	Format   string   `json:"format"`
	Version  int      `json:"version"`
	Features []string `json:"features"`
}

const headerLine = `{"format":"overkeep provenance","version":1,"features":[]}` + "\n"

func checkHeader(b []byte) error {
	var h header
	if json.Unmarshal(b, &h) != nil || h.Format != "overkeep provenance" {
		return fmt.Errorf("provenance: %w: its first line is no header", ErrInput)
	}
	if h.Version != 1 || len(h.Features) > 0 {
		return fmt.Errorf("provenance: %w: version %d, features %.200q", ErrVersion, h.Version, h.Features)
	}
	return nil
}

// openFile opens the file and checks whose it is. fs.ErrNotExist: there is none.
func (s *Store) openFile(flags int) (*os.File, int64, error) {
	f, err := os.OpenFile(filepath.Join(s.dir, fileName), flags|unix.O_NOFOLLOW|unix.O_NONBLOCK, fileMode)
	if errors.Is(err, unix.ELOOP) {
		return nil, 0, fmt.Errorf("%w: a symbolic link", ErrUnsafe)
	}
	if err != nil {
		return nil, 0, err
	}
	var st unix.Stat_t
	if err := unix.Fstat(int(f.Fd()), &st); err != nil {
		return nil, 0, errors.Join(err, f.Close())
	}
	if st.Mode&unix.S_IFMT != unix.S_IFREG || st.Uid != 0 && st.Uid != uint32(os.Geteuid()) || st.Mode&0o022 != 0 {
		err := fmt.Errorf("%w: uid %d, mode %#o", ErrUnsafe, st.Uid, st.Mode)
		return nil, 0, errors.Join(err, f.Close())
	}
	return f, st.Size, nil
}

// read is the content of the file, nil if there is none.
func (s *Store) read() ([]byte, error) {
	f, size, err := s.openFile(os.O_RDONLY)
	if errors.Is(err, fs.ErrNotExist) {
		return nil, nil
	}
	if err != nil {
		return nil, err
	}
	defer f.Close()
	if size > s.maxFile {
		return nil, fmt.Errorf("provenance: %w: %d bytes, more than %d", ErrSize, size, s.maxFile)
	}
	// It may grow meanwhile; what is whole of it counts.
	return io.ReadAll(io.LimitReader(f, s.maxFile))
}

// load folds the lines of a file into s.
func (s *Store) load(b []byte) (err error) {
	s.damaged, err = lines(b, func(r Record, _ []byte) {
		s.lines++
		if !s.fold(r) {
			s.useless++
		}
	})
	return err
}

func decodeLine(b []byte) (Record, error) {
	var l line
	if len(b) > maxLine || !utf8.Valid(b) {
		return Record{}, ErrRecord
	}
	if err := json.Unmarshal(b, &l); err != nil {
		return Record{}, fmt.Errorf("%w: %w", ErrRecord, err)
	}
	r := Record{Path: l.Path, From: l.From, Licences: l.Licences, How: l.How, When: l.When}
	if l.Unfree != nil {
		r.Unfree = graph.No
		if *l.Unfree {
			r.Unfree = graph.Yes
		}
	}
	return r, r.check()
}

// check says why a record cannot be kept.
func (r *Record) check() error {
	switch {
	case !storepath.IsBase(r.Path):
		return fmt.Errorf("%w: %.200q is no store path", ErrRecord, r.Path)
	case r.How == "" || len(r.How) > 64:
		return fmt.Errorf("%w: nothing tells how it was learned", ErrRecord)
	case len(r.From) > maxTexts || len(r.Licences) > maxTexts:
		return fmt.Errorf("%w: more than %d texts", ErrRecord, maxTexts)
	case len(r.From)+len(r.Licences) == 0 && r.Unfree == graph.Unknown:
		return fmt.Errorf("%w: it says nothing", ErrRecord)
	}
	for _, s := range slices.Concat(r.From, r.Licences) {
		if c, ok := clean(s); !ok || c != s {
			return fmt.Errorf("%w: the text %.200q", ErrRecord, s)
		}
	}
	return nil
}

func (r *Record) encode() ([]byte, error) {
	l := line{r.Path, r.From, r.Licences, nil, r.How, r.When}
	if r.Unfree != graph.Unknown {
		yes := r.Unfree == graph.Yes
		l.Unfree = &yes
	}
	b, err := json.Marshal(l)
	return append(b, '\n'), err
}

// fold adds what is new in r and reports whether there was something. Texts
// accumulate: any of them may match. Of "unfree" and "free" said of one path,
// unfree stays: the mistake that leaves a path personal is the harmless one.
func (s *Store) fold(r Record) bool {
	o, ok := s.known[r.Path]
	if !ok {
		o = &graph.Origin{}
		s.known[r.Path] = o
	}
	from, licences, unfree := len(o.From), len(o.Licences), o.Unfree
	o.From, o.Licences = add(o.From, r.From...), add(o.Licences, r.Licences...)
	if r.Unfree == graph.Yes || o.Unfree == graph.Unknown {
		o.Unfree = r.Unfree
	}
	return len(o.From) > from || len(o.Licences) > licences || o.Unfree != unfree
}

// news is whether fold would return true.
func (s *Store) news(r Record) bool {
	o, ok := s.known[r.Path]
	if !ok {
		return true
	}
	copied := &Store{known: map[string]*graph.Origin{r.Path: {From: slices.Clip(o.From), Licences: slices.Clip(o.Licences), Unfree: o.Unfree}}}
	return copied.fold(r)
}

// Origin is what is known of a path, by base name. Its slices must not be changed.
func (s *Store) Origin(base string) (graph.Origin, bool) {
	s.mu.Lock()
	defer s.mu.Unlock()
	if o, ok := s.known[base]; ok {
		return *o, true
	}
	return graph.Origin{}, false
}

// All yields every path of which something is known, in no order.
func (s *Store) All() iter.Seq2[string, graph.Origin] {
	return func(yield func(string, graph.Origin) bool) {
		s.mu.Lock()
		defer s.mu.Unlock()
		for base, o := range s.known {
			if !yield(base, *o) {
				return
			}
		}
	}
}

// Len is the number of paths of which something is known.
func (s *Store) Len() int {
	s.mu.Lock()
	defer s.mu.Unlock()
	return len(s.known)
}

// Damaged is the number of lines that could not be read. More than none means that
// something is forgotten that a policy with "when known" would have used.
func (s *Store) Damaged() int {
	s.mu.Lock()
	defer s.mu.Unlock()
	return s.damaged
}

// Add keeps the records that say something new, durably, and returns how many
// they were. It is all or nothing: a record that cannot be kept is ErrRecord.
func (s *Store) Add(records ...Record) (int, error) {
	s.mu.Lock()
	defer s.mu.Unlock()
	fresh, err := s.fresh(records)
	if err != nil {
		return 0, err
	}
	var b []byte
	for i := range fresh {
		if fresh[i].When == 0 {
			fresh[i].When = s.now().Unix()
		}
		text, err := fresh[i].encode()
		if err != nil {
			return 0, err
		}
		b = append(b, text...)
	}
	if len(fresh) == 0 {
		return 0, nil
	}
	if err := s.locked(func() error { return s.append(b) }); err != nil {
		return 0, err
	}
	for _, r := range fresh {
		s.lines++
		if !s.fold(r) {
			s.useless++
		}
	}
	return len(fresh), nil
}

// News returns those of the records that Add would keep.
func (s *Store) News(records ...Record) ([]Record, error) {
	s.mu.Lock()
	defer s.mu.Unlock()
	return s.fresh(records)
}

func (s *Store) fresh(records []Record) ([]Record, error) {
	var out []Record
	seen := &Store{known: map[string]*graph.Origin{}} // within records
	for _, r := range records {
		if err := r.check(); err != nil {
			return nil, err
		}
		if s.news(r) && seen.fold(r) {
			out = append(out, r)
		}
	}
	return out, nil
}

// locked runs f while no other process changes the file: a lock on the directory,
// for compaction replaces the file. It is held for one append or rewrite.
func (s *Store) locked(f func() error) error {
	if err := os.MkdirAll(s.dir, 0o700); err != nil {
		return err
	}
	d, err := os.Open(s.dir)
	if err != nil {
		return err
	}
	defer d.Close()
	for {
		switch err := unix.Flock(int(d.Fd()), unix.LOCK_EX); err {
		case nil:
			if err := f(); err != nil {
				return err
			}
			return d.Sync() // the name of a new file
		case unix.EINTR:
		default:
			return fmt.Errorf("lock %q: %w", s.dir, err)
		}
	}
}

// append writes b behind the last whole line.
func (s *Store) append(b []byte) error {
	f, size, err := s.openFile(os.O_RDWR | os.O_CREATE)
	if err != nil {
		return err
	}
	defer f.Close()
	end, err := wholeLines(f, size)
	if err != nil {
		return err
	}
	if end == 0 {
		if err := f.Chmod(fileMode); err != nil { // whatever the umask
			return err
		}
		b = append([]byte(headerLine), b...)
	} else {
		first := make([]byte, min(end, 4096))
		if _, err := f.ReadAt(first, 0); err != nil {
			return err
		}
		first, _, _ = bytes.Cut(first, []byte{'\n'})
		if err := checkHeader(first); err != nil {
			return err
		}
	}
	if end+int64(len(b)) > s.maxFile {
		return fmt.Errorf("provenance: %w: %d bytes would be more than %d", ErrSize, end+int64(len(b)), s.maxFile)
	}
	// First away with what was torn, so that a short write cannot be completed by it.
	if end != size {
		if err := f.Truncate(end); err != nil {
			return err
		}
	}
	_, err = f.WriteAt(b, end)
	if err == nil {
		err = f.Sync()
	}
	if err != nil {
		return errors.Join(err, f.Truncate(end))
	}
	return nil
}

// wholeLines is the offset behind the last line that ends.
func wholeLines(f *os.File, size int64) (int64, error) {
	buf := make([]byte, 1<<16)
	for size > 0 {
		n := min(size, int64(len(buf)))
		if _, err := f.ReadAt(buf[:n], size-n); err != nil {
			return 0, err
		}
		if i := bytes.LastIndexByte(buf[:n], '\n'); i >= 0 {
			return size - n + int64(i) + 1, nil
		}
		size -= n
	}
	return 0, nil
}

// Records yields the records as they were added, oldest first, also those that said
// nothing new, and what other processes have added.
func (s *Store) Records() ([]Record, error) {
	s.mu.Lock()
	defer s.mu.Unlock()
	b, err := s.read()
	if err != nil {
		return nil, err
	}
	var out []Record
	_, err = lines(b, func(r Record, _ []byte) { out = append(out, r) })
	return out, err
}

// lines calls each with the whole lines of a file that can be read.
func lines(b []byte, each func(r Record, text []byte)) (damaged int, err error) {
	first, rest, ok := bytes.Cut(b, []byte{'\n'})
	if !ok {
		return 0, nil // empty, or torn in its first line
	}
	if err := checkHeader(first); err != nil {
		return 0, err
	}
	for text := range bytes.Lines(rest) {
		if text[len(text)-1] != '\n' {
			break // torn by a crash
		}
		if r, err := decodeLine(text); err == nil {
			each(r, text)
		} else {
			damaged++
		}
	}
	return damaged, nil
}

// Compact rewrites the file without the lines that say nothing new and those that
// cannot be read, atomically, and takes in what other processes have added. When
// and how a thing was first learned stays.
func (s *Store) Compact() error { return s.rewrite(func(Record) bool { return true }) }

// Forget takes away all records of the paths for which forget is true, durably, and
// returns how many paths they were of. What was known of them is unknown then, also
// to a policy: a veto may be lost by it.
func (s *Store) Forget(forget func(base string) bool) (int, error) {
	gone := map[string]bool{}
	err := s.rewrite(func(r Record) bool {
		if !forget(r.Path) {
			return true
		}
		gone[r.Path] = true
		return false
	})
	return len(gone), err
}

// rewrite is Compact with the records only for which keep is true.
func (s *Store) rewrite(keep func(Record) bool) error {
	s.mu.Lock()
	defer s.mu.Unlock()
	return s.locked(func() error {
		b, err := s.read()
		if err != nil || b == nil {
			return err
		}
		next := &Store{known: map[string]*graph.Origin{}}
		out := []byte(headerLine)
		// A header of another version is not ours to rewrite.
		if _, err := lines(b, func(r Record, text []byte) {
			if keep(r) && next.fold(r) {
				out = append(out, text...)
				next.lines++
			}
		}); err != nil {
			return err
		}
		file := filepath.Join(s.dir, fileName)
		if err := renameio.WriteFile(file, out, fileMode, renameio.IgnoreUmask(), renameio.WithTempDir(s.dir)); err != nil {
			return err
		}
		s.known, s.lines, s.useless, s.damaged = next.known, next.lines, 0, 0
		return nil
	})
}

// Wasteful is whether Compact would halve the file, and is worth a rewrite.
func (s *Store) Wasteful() bool {
	s.mu.Lock()
	defer s.mu.Unlock()
	return s.useless > 1000 && s.useless > s.lines/2
}
