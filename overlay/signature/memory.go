package signature

import (
	"bytes"
	"crypto/sha256"
	"encoding/binary"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"math/bits"
	"os"
	"path/filepath"
	"slices"
	"sync"
	"sync/atomic"

	"github.com/google/renameio/v2"
	"golang.org/x/sys/unix"
)

// Memory is the set of signatures that were verified before, as hashes of all
// that went into the verification. Only good ones are in it: a bad one costs its
// time again, and nobody can hide a good one by a wrong entry.
//
// An entry is a mathematical fact about bytes. It holds under any policy and at
// any time, so an old file that an attacker puts back (fscrypt has no integrity)
// says nothing false, and any change of name, hash, size, references, key or
// signature is another entry.
//
// An entry is the first 128 bits of a SHA-256. To pass for a remembered one, other
// facts need a second preimage of one of N entries: 2^128/N hashes, 2^106 for a
// full memory. Pairs by birthday do not help, for one of the two must carry a
// signature that a declared key made.
//
// There is no MAC. The file lies inside the encrypted volume, in a directory of
// root's: who can write it while the keep is open is root, who decides anyway;
// who cannot open the keep cannot make up 16 bytes that decrypt to an entry of
// his choice, and the checksum drops what was damaged. Load refuses a file that
// another user could have written. For the same reason it must never lie outside
// the volume or where the keep's user can write: a forged entry would make an
// unsigned path look signed.
type Memory struct {
	path string
	max  int

	sorted []byte   // records as loaded, ascending
	bucket []uint32 // first record whose first two bytes are at least the index

	mu    sync.Mutex
	fresh map[record]struct{}
	used  []atomic.Uint64 // bit per loaded record: asked for since
}

// record is the truncated hash of one verification.
type record [recordSize]byte

const (
	recordSize = 16
	maxRecords = 4 << 20 // 64 MiB; a store of a million paths with several signatures each
	version    = 1
)

// domain keeps the hashes apart from all others.
const domain = "overkeep signature memory 1\x00"

// recordOf hashes fingerprint, key and signature. The last two have fixed lengths,
// so no two triples are the same bytes.
func recordOf(all []byte) (r record) {
	h := sha256.New()
	io.WriteString(h, domain)
	h.Write(all)
	var sum [sha256.Size]byte
	copy(r[:], h.Sum(sum[:0]))
	return r
}

// The file: magic, version, features (none are known), number of records; the
// records, ascending; the SHA-256 of all before it. Numbers are big-endian.
var magic = [8]byte{'o', 'v', 'k', 'S', 'I', 'G', 'S', '\n'}

const headerSize = len(magic) + 4 + 4 + 8

var (
	// ErrDamaged: the file is not what Save wrote. It is left where it is, and
	// the next Save replaces it.
	ErrDamaged = errors.New("damaged memory of signatures")
	// ErrVersion: a version or feature of the file is not known.
	ErrVersion = errors.New("memory of signatures of an unknown version")
	// ErrUnsafe: another user could have written the file.
	ErrUnsafe = errors.New("memory of signatures that another user could have written")
)

// Load reads the memory at path, which lies inside the keep's volume in a
// directory that is the caller's alone. The memory is never nil: on an error it
// begins empty, and everything is verified anew; the error tells why. A file that
// is not there yet is no error.
func Load(path string) (*Memory, error) {
	m := empty(path, maxRecords)
	b, err := read(path, maxRecords)
	if err != nil || b == nil {
		return m, err
	}
	return m, m.decode(b)
}

func empty(path string, max int) *Memory {
	return &Memory{path: path, max: max, fresh: map[record]struct{}{}}
}

// read returns the file's bytes, nil if there is none.
func read(path string, max int) ([]byte, error) {
	f, err := os.OpenFile(path, os.O_RDONLY|unix.O_NOFOLLOW|unix.O_NONBLOCK, 0)
	if errors.Is(err, fs.ErrNotExist) {
		return nil, nil
	}
	if errors.Is(err, unix.ELOOP) {
		return nil, fmt.Errorf("%w: %q is a symbolic link", ErrUnsafe, path)
	}
	if err != nil {
		return nil, err
	}
	defer f.Close()
	var st unix.Stat_t
	if err := unix.Fstat(int(f.Fd()), &st); err != nil {
		return nil, err
	}
	switch limit := int64(headerSize + max*recordSize + sha256.Size); {
	case st.Mode&unix.S_IFMT != unix.S_IFREG || st.Uid != uint32(os.Geteuid()) || st.Mode&0o022 != 0:
		return nil, fmt.Errorf("%w: %q has uid %d and mode %#o", ErrUnsafe, path, st.Uid, st.Mode)
	case st.Size > limit:
		return nil, fmt.Errorf("%w: %d bytes are more than %d", ErrDamaged, st.Size, limit)
	}
	b := make([]byte, st.Size)
	if _, err := io.ReadFull(f, b); err != nil {
		return nil, fmt.Errorf("%w: %w", ErrDamaged, err)
	}
	return b, nil
}

// decode takes all of b or nothing.
func (m *Memory) decode(b []byte) error {
	if len(b) < headerSize+sha256.Size || !bytes.Equal(b[:len(magic)], magic[:]) {
		return fmt.Errorf("%w: no header", ErrDamaged)
	}
	v, features := binary.BigEndian.Uint32(b[8:]), binary.BigEndian.Uint32(b[12:])
	if v != version || features != 0 {
		return fmt.Errorf("%w: version %d, features %#x", ErrVersion, v, features)
	}
	n := binary.BigEndian.Uint64(b[16:])
	body := b[headerSize : len(b)-sha256.Size]
	if len(body)%recordSize != 0 || n != uint64(len(body)/recordSize) || n > uint64(m.max) {
		return fmt.Errorf("%w: %d bytes for %d records", ErrDamaged, len(b), n)
	}
	if sum := sha256.Sum256(b[:len(b)-sha256.Size]); !bytes.Equal(sum[:], b[len(b)-sha256.Size:]) {
		return fmt.Errorf("%w: wrong checksum", ErrDamaged)
	}
	bucket := make([]uint32, 1<<16+1)
	for i := 0; i < len(body); i += recordSize {
		if i > 0 && bytes.Compare(body[i-recordSize:i], body[i:i+recordSize]) >= 0 {
			return fmt.Errorf("%w: records out of order", ErrDamaged)
		}
		bucket[int(binary.BigEndian.Uint16(body[i:]))+1]++
	}
	for i := 1; i < len(bucket); i++ {
		bucket[i] += bucket[i-1]
	}
	m.sorted, m.bucket = body, bucket
	m.used = make([]atomic.Uint64, (n+63)/64)
	return nil
}

// has reports whether r was loaded or added.
func (m *Memory) has(r record) bool {
	if m.sorted != nil {
		first := binary.BigEndian.Uint16(r[:])
		lo, hi := m.bucket[first], m.bucket[int(first)+1]
		for lo < hi {
			mid := (lo + hi) / 2
			switch c := bytes.Compare(m.sorted[mid*recordSize:(mid+1)*recordSize], r[:]); {
			case c < 0:
				lo = mid + 1
			case c > 0:
				hi = mid
			default:
				m.used[mid/64].Or(1 << (mid % 64))
				return true
			}
		}
	}
	m.mu.Lock()
	defer m.mu.Unlock()
	_, ok := m.fresh[r]
	return ok
}

// add remembers new records; nil remembers nothing.
func (m *Memory) add(records []record) {
	if m == nil {
		return
	}
	m.mu.Lock()
	defer m.mu.Unlock()
	for _, r := range records {
		if len(m.fresh) >= m.max {
			return
		}
		m.fresh[r] = struct{}{}
	}
}

// Len is how many signatures are remembered.
func (m *Memory) Len() int {
	m.mu.Lock()
	defer m.mu.Unlock()
	return len(m.sorted)/recordSize + len(m.fresh)
}

// Save replaces the file, atomically and durably, if there is something new. The
// directory is made, mode 0700, if it is missing. Of two processes that save,
// the later one wins, and what the other one learned is learned again. When it
// would grow beyond its bound, what was not asked for since Load goes first.
func (m *Memory) Save() error {
	m.mu.Lock()
	defer m.mu.Unlock()
	if len(m.fresh) == 0 {
		return nil
	}
	b := m.encode()
	dir := filepath.Dir(m.path)
	if err := os.MkdirAll(dir, 0o700); err != nil {
		return err
	}
	// The temporary file holds what the file holds: it stays in the keep.
	if err := renameio.WriteFile(m.path, b, 0o600, renameio.IgnoreUmask(), renameio.WithTempDir(dir)); err != nil {
		return err
	}
	fresh := empty(m.path, m.max)
	if err := fresh.decode(b); err != nil {
		return err
	}
	m.sorted, m.bucket, m.used, m.fresh = fresh.sorted, fresh.bucket, fresh.used, fresh.fresh
	return nil
}

// encode is the file of what is known. The bound holds: the new ones come first,
// then those that were used, then the others.
func (m *Memory) encode() []byte {
	n := len(m.sorted) / recordSize
	room := max(m.max-len(m.fresh), 0)
	usedToo := 0
	for i := range m.used {
		usedToo += bits.OnesCount64(m.used[i].Load())
	}
	unused := max(room-usedToo, 0) // of these so many stay
	keep := make([]record, 0, len(m.fresh)+min(n, room))
	for i := 0; i < n && room > 0; i++ {
		if m.used[i/64].Load()&(1<<(i%64)) == 0 {
			if unused == 0 {
				continue
			}
			unused--
		}
		keep = append(keep, record(m.sorted[i*recordSize:]))
		room--
	}
	for r := range m.fresh {
		keep = append(keep, r)
	}
	slices.SortFunc(keep, func(a, b record) int { return bytes.Compare(a[:], b[:]) })
	keep = slices.Compact(keep)

	b := make([]byte, 0, headerSize+len(keep)*recordSize+sha256.Size)
	b = append(b, magic[:]...)
	b = binary.BigEndian.AppendUint32(b, version)
	b = binary.BigEndian.AppendUint32(b, 0)
	b = binary.BigEndian.AppendUint64(b, uint64(len(keep)))
	for _, r := range keep {
		b = append(b, r[:]...)
	}
	sum := sha256.Sum256(b)
	return append(b, sum[:]...)
}
