package signature

import (
	"bytes"
	"crypto/rand"
	"crypto/sha256"
	"encoding/binary"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"slices"
	"testing"
)

func saved(t testing.TB, n int) (path string, records []record) {
	t.Helper()
	path = filepath.Join(t.TempDir(), "cache", "overkeep", "signatures")
	m, err := Load(path)
	if err != nil || m.Len() != 0 {
		t.Fatalf("a missing memory: %v, %d", err, m.Len())
	}
	records = make([]record, n)
	for i := range records {
		rand.Read(records[i][:])
	}
	m.add(records)
	if err := m.Save(); err != nil {
		t.Fatal(err)
	}
	return path, records
}

func TestMemory(t *testing.T) {
	path, records := saved(t, 5000)
	m, err := Load(path)
	if err != nil || m.Len() != len(records) {
		t.Fatalf("%v, %d", err, m.Len())
	}
	for _, r := range records {
		if !m.has(r) {
			t.Fatalf("%x is forgotten", r)
		}
		for bit := range 8 * recordSize {
			o := r
			o[bit/8] ^= 1 << (bit % 8)
			if m.has(o) {
				t.Fatalf("%x was never remembered", o)
			}
		}
	}
	st, err := os.Stat(path)
	if err != nil || st.Mode().Perm() != 0o600 {
		t.Errorf("mode %v %v", st.Mode(), err)
	}
	if st, err := os.Stat(filepath.Dir(path)); err != nil || st.Mode().Perm() != 0o700 {
		t.Errorf("mode of the directory %v %v", st.Mode(), err)
	}
	// Nothing new: nothing is written. Something new: both are there, and nothing else lies about.
	before, _ := os.Stat(path)
	if err := m.Save(); err != nil {
		t.Fatal(err)
	}
	if after, _ := os.Stat(path); !os.SameFile(before, after) {
		t.Error("written without need")
	}
	more := record{1, 2, 3}
	m.add([]record{more, more, records[0]})
	if err := m.Save(); err != nil {
		t.Fatal(err)
	}
	for _, m := range []*Memory{m, must(Load(path))} {
		if m.Len() != len(records)+1 || !m.has(more) || !m.has(records[0]) {
			t.Errorf("%d remembered", m.Len())
		}
	}
	if entries, _ := os.ReadDir(filepath.Dir(path)); len(entries) != 1 {
		t.Errorf("left behind: %v", entries)
	}
}

func must(m *Memory, err error) *Memory {
	if err != nil {
		panic(err)
	}
	return m
}

// Real verifications are found again by another process, and by none under
// another key.
func TestRemembersVerifications(t *testing.T) {
	path := filepath.Join(t.TempDir(), "signatures")
	f := known(t)
	keys := parse(t, knownKey)
	m := must(Load(path))
	verify(t, keys, m, f)
	if err := m.Save(); err != nil {
		t.Fatal(err)
	}
	if got, stats := verify(t, keys, must(Load(path)), f); got[0] != 1 || stats != (Stats{Remembered: 1}) {
		t.Errorf("%b %+v", got, stats)
	}
	for name, c := range changes(f) {
		if got, stats := verify(t, keys, must(Load(path)), c); got[0] != 0 || stats.Remembered != 0 {
			t.Errorf("%s: %b %+v", name, got, stats)
		}
	}
}

// Damage of any kind: nothing is believed, and the next Save mends it.
func TestDamagedMemory(t *testing.T) {
	path, records := saved(t, 3)
	good, err := os.ReadFile(path)
	if err != nil {
		t.Fatal(err)
	}
	resum := func(b []byte) []byte {
		sum := sha256.Sum256(b[:len(b)-sha256.Size])
		return append(slices.Clone(b[:len(b)-sha256.Size]), sum[:]...)
	}
	tries := 0
	try := func(name string, b []byte, want error) {
		t.Helper()
		tries++
		if err := os.WriteFile(path, b, 0o600); err != nil {
			t.Fatal(err)
		}
		m, err := Load(path)
		if !errors.Is(err, want) {
			t.Errorf("%s: %v", name, err)
		}
		if m.Len() != 0 || slices.ContainsFunc(records, m.has) {
			t.Errorf("%s: something of it is believed", name)
		}
		if tries%50 != 1 { // a Save waits for the disk
			return
		}
		m.add(records[:1])
		if err := m.Save(); err != nil {
			t.Errorf("%s: %v", name, err)
		}
		if m, err := Load(path); err != nil || m.Len() != 1 {
			t.Errorf("%s: not mended: %v", name, err)
		}
	}
	for n := range len(good) {
		if n > 0 { // an empty file is cut, too, but is told by the same words
			try(fmt.Sprintf("cut to %d bytes", n), good[:n], ErrDamaged)
		}
	}
	try("empty", nil, ErrDamaged)
	for bit := range len(good) * 8 {
		b := slices.Clone(good)
		b[bit/8] ^= 1 << (bit % 8)
		want := ErrDamaged
		if bit/8 >= len(magic) && bit/8 < len(magic)+8 {
			want = ErrVersion
		}
		try(fmt.Sprintf("bit %d", bit), b, want)
	}
	try("longer", append(slices.Clone(good), 0), ErrDamaged)
	swapped := slices.Clone(good)
	copy(swapped[headerSize:], good[headerSize+recordSize:headerSize+2*recordSize])
	copy(swapped[headerSize+recordSize:], good[headerSize:headerSize+recordSize])
	try("out of order", resum(swapped), ErrDamaged)
	twice := slices.Clone(good)
	copy(twice[headerSize:], good[headerSize+recordSize:headerSize+2*recordSize])
	try("one twice", resum(twice), ErrDamaged)
	count := slices.Clone(good)
	binary.BigEndian.PutUint64(count[16:], 1<<60)
	try("a count that overflows", resum(count), ErrDamaged)
}

func TestUnsafeMemory(t *testing.T) {
	path, records := saved(t, 3)
	refused := func(name, path string) {
		t.Helper()
		m, err := Load(path)
		if !errors.Is(err, ErrUnsafe) || m.Len() != 0 || m.has(records[0]) {
			t.Errorf("%s: %v, %d", name, err, m.Len())
		}
	}
	for _, mode := range []os.FileMode{0o620, 0o602, 0o666} {
		if err := os.Chmod(path, mode); err != nil {
			t.Fatal(err)
		}
		refused(mode.String(), path)
	}
	link := filepath.Join(filepath.Dir(path), "link")
	if err := os.Symlink(path, link); err != nil {
		t.Fatal(err)
	}
	refused("symbolic link", link)
	refused("directory", filepath.Dir(path))
	if os.Geteuid() == 0 {
		if err := errors.Join(os.Chmod(path, 0o600), os.Chown(path, 4242, 4242)); err != nil {
			t.Fatal(err)
		}
		refused("another user's", path)
	}
}

// The bound holds, and what was asked for stays before what was not.
func TestMemoryIsBounded(t *testing.T) {
	path := filepath.Join(t.TempDir(), "signatures")
	var old []record
	for i := range 10 {
		old = append(old, record{byte(i), 1})
	}
	m := empty(path, 10)
	m.add(old)
	m.add([]record{{99}})
	if m.Len() != 10 {
		t.Fatalf("%d remembered", m.Len())
	}
	if err := m.Save(); err != nil {
		t.Fatal(err)
	}
	used := []record{old[2], old[3], old[9]}
	for _, r := range used {
		if !m.has(r) {
			t.Fatal("forgotten")
		}
	}
	added := []record{{50}, {51}, {52}, {53}}
	m.add(added)
	if err := m.Save(); err != nil {
		t.Fatal(err)
	}
	if m.Len() != 10 {
		t.Errorf("%d remembered", m.Len())
	}
	for _, r := range append(used, added...) {
		if !m.has(r) {
			t.Errorf("%x is forgotten", r)
		}
	}
	// More new ones than the bound leaves to the used.
	var many []record
	for i := range 9 {
		many = append(many, record{200, byte(i)})
	}
	m.add(many)
	if err := m.Save(); err != nil || m.Len() != 10 {
		t.Errorf("%v, %d", err, m.Len())
	}
}

func FuzzLoad(f *testing.F) {
	m := empty("", 4)
	m.add([]record{{1}, {2}})
	f.Add(m.encode())
	f.Fuzz(func(t *testing.T, b []byte) {
		m := empty("", 4)
		if m.decode(b) != nil {
			if m.Len() != 0 {
				t.Fatal("something of a damaged memory is believed")
			}
			return
		}
		if !bytes.Equal(m.encode(), b) {
			t.Fatal("written otherwise")
		}
	})
}

func BenchmarkLoadMillion(b *testing.B) {
	path, _ := saved(b, 1<<20)
	for b.Loop() {
		if _, err := Load(path); err != nil {
			b.Fatal(err)
		}
	}
}
