package wipe

import (
	"context"
	"fmt"
	"math/rand/v2"
	"os"
	"path/filepath"
	"strings"
	"testing"

	"golang.org/x/sys/unix"
)

// Old copies of names that splits have left are found, and are gone afterwards, from
// the device, too; the directory has its other entries and no others, in as many blocks.
func TestSlack(t *testing.T) {
	const entries, every = 20_000, 50
	d := newDevice(t, 128<<20, false)
	store := filepath.Join(d.mnt, "store")
	if err := os.Mkdir(store, 0o755); err != nil {
		t.Fatal(err)
	}
	dir := opened(t, store)
	rnd := rand.New(rand.NewPCG(1, 1))
	var all, gone []string
	var names [][]byte
	for i := range entries {
		n := fmt.Sprintf("%032d-%d-%s", i, i, strings.Repeat("x", rnd.IntN(40)))
		all = append(all, n)
		if err := unix.Mknodat(int(dir.Fd()), n, unix.S_IFREG|0o444, 0); err != nil {
			t.Fatal(err)
		}
		if i%every == 0 {
			gone = append(gone, n)
			names = append(names, []byte(n[:32]))
		}
	}
	if _, err := Trees(t.Context(), dir, gone, Options{}); err != nil {
		t.Fatal(err)
	}
	size := func() int64 {
		st, err := os.Stat(store)
		if err != nil {
			t.Fatal(err)
		}
		return st.Size()
	}
	before := size()
	// What a killed call has left.
	if err := os.WriteFile(filepath.Join(store, fillerPrefix+"left"), nil, 0o400); err != nil {
		t.Fatal(err)
	}
	r, err := Slack(t.Context(), dir, names)
	t.Logf("%+v", r)
	if err != nil || r.Looked != Done || r.Before == 0 || r.After != 0 || r.Fillers == 0 {
		t.Errorf("%+v, %v", r, err)
	}
	if size() != before {
		t.Errorf("%d bytes, then %d", before, size())
	}
	left, err := os.ReadDir(store)
	if err != nil || len(left) != entries-len(gone) {
		t.Errorf("%d entries, %v", len(left), err)
	}
	if dev, err := Device(t.Context(), dir); err != nil || dev.Checkpoint != Done || dev.Trim == Done {
		t.Errorf("%+v, %v", dev, err)
	}
	var short []string
	for _, n := range names {
		short = append(short, string(n))
	}
	if found := d.onDisk(t, short...); len(found) != 0 {
		t.Errorf("%d names on the device", len(found))
	}
	// The hash of names is the kernel's: every name lies in the leaf that it says.
	s, err := openSlack(dir, nil)
	if err != nil {
		t.Fatal(err)
	}
	defer s.disk.Close()
	blocks, indexed, err := s.read()
	if err != nil || !indexed {
		t.Fatalf("indexed: %v, %v", indexed, err)
	}
	tree, err := leaves(func(n uint32) ([]byte, error) { return blocks[n], nil })
	if err != nil || len(tree) < 100 {
		t.Fatalf("%d leaves, %v", len(tree), err)
	}
	for _, e := range left {
		if l := tree[leafOf(tree, nameHash(s.seed, e.Name()))]; !strings.Contains(string(blocks[l.block]), e.Name()) {
			t.Fatalf("%q is not where its hash says", e.Name())
		}
	}
}

// Where the blocks cannot be read, the report says so.
func TestSlackElsewhere(t *testing.T) {
	if r, err := Slack(context.Background(), opened(t, "/proc/self"), [][]byte{[]byte("name")}); err != nil || r.Looked != Unsupported || len(r.Notes) == 0 {
		t.Errorf("%+v, %v", r, err)
	}
	if _, err := DeviceOf(opened(t, "/proc/self")); err == nil {
		t.Error("a device of /proc")
	}
	if dev, err := Device(context.Background(), opened(t, "/dev/shm")); err == nil && dev.Trim == Done {
		t.Errorf("%+v", dev)
	}
}

// FuzzBlocks: whatever stands on a device, the readers end without a panic, with
// gaps inside of the block.
func FuzzBlocks(f *testing.F) {
	b := make([]byte, 1024)
	le.PutUint32(b, 2)
	le.PutUint16(b[4:], 12)
	le.PutUint16(b[16:], 1012)
	b[0x1c], b[0x1d] = halfMD4, 8
	le.PutUint16(b[0x22:], 1)
	f.Add(b)
	f.Add(make([]byte, 64))
	f.Fuzz(func(t *testing.T, b []byte) {
		if list, live, err := gaps(b); err == nil {
			for _, g := range list {
				if g.at < 0 || g.spare < 0 || g.at+g.spare > len(b) {
					t.Fatalf("%+v", g)
				}
			}
			live(0, 4)
		}
		n := 0
		all, err := leaves(func(uint32) ([]byte, error) {
			if n++; n > 4 {
				return nil, errLayout
			}
			return b, nil
		})
		if err == nil && len(all) > 0 {
			leafOf(all, 1)
		}
	})
}
