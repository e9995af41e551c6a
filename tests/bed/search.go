package bed

import (
	"bytes"
	"errors"
	"fmt"
	"io"
	"os"
	"os/exec"
	"strings"
	"testing"

	"golang.org/x/sys/unix"
)

// Search looks for byte strings on the raw disk, where a thief would: file
// contents, names, free blocks and the journal alike. Everything the machine has
// written is synced first. The result has an entry for every string, 0 when
// it is nowhere.
//
// It sees no string that is compressed (Nix's build logs are: search for the
// name), encrypted, split between two blocks that are not neighbours, or only in
// memory (/run). A search that finds nothing proves something only if the same
// test shows that it can find: see Find.
func (m *Machine) Search(t testing.TB, canaries ...string) map[string]int {
	t.Helper()
	counts := map[string]int{}
	for c, at := range m.Find(t, canaries...) {
		counts[c] = len(at)
	}
	return counts
}

// Find is Search with the byte offsets of all hits.
func (m *Machine) Find(t testing.TB, canaries ...string) map[string][]int64 {
	t.Helper()
	if m.init != nil {
		if err := syncfs(m.Root); err != nil {
			t.Fatalf("bed: search: %v", err)
		}
	}
	f, err := os.Open(m.Disk)
	if err != nil {
		t.Fatalf("bed: search: %v", err)
	}
	defer f.Close()
	hits, err := find(f, canaries)
	if err != nil {
		t.Fatalf("bed: search: %v", err)
	}
	return hits
}

func syncfs(path string) error {
	d, err := os.Open(path)
	if err != nil {
		return err
	}
	defer d.Close()
	if err := unix.Syncfs(int(d.Fd())); err != nil {
		return fmt.Errorf("syncfs %q: %w", path, err)
	}
	return nil
}

// find reads the file's data, extent by extent (holes are zeros, and no canary
// holds one), and keeps the end of each read for strings that cross it.
func find(f *os.File, canaries []string) (map[string][]int64, error) {
	hits, longest := map[string][]int64{}, 0
	for _, c := range canaries {
		if c == "" {
			return nil, errors.New("an empty string is everywhere")
		}
		hits[c], longest = []int64{}, max(longest, len(c))
	}
	buf := make([]byte, 4<<20)
	for pos := int64(0); ; {
		start, err := unix.Seek(int(f.Fd()), pos, unix.SEEK_DATA)
		if errors.Is(err, unix.ENXIO) { // no more data
			return hits, nil
		} else if err != nil {
			return nil, fmt.Errorf("seek data: %w", err)
		}
		end, err := unix.Seek(int(f.Fd()), start, unix.SEEK_HOLE)
		if err != nil {
			return nil, fmt.Errorf("seek hole: %w", err)
		}
		r := io.NewSectionReader(f, start, end-start)
		kept := 0
		for base := start; ; {
			n, err := r.Read(buf[kept:])
			have := buf[:kept+n]
			for _, c := range canaries {
				// A hit that ends in the kept part was counted before.
				for at := max(0, kept-len(c)+1); ; at++ {
					i := bytes.Index(have[min(at, len(have)):], []byte(c))
					if i < 0 {
						break
					}
					at += i
					hits[c] = append(hits[c], base+int64(at))
				}
			}
			if errors.Is(err, io.EOF) {
				break
			} else if err != nil {
				return nil, err
			}
			kept = copy(buf, have[max(0, len(have)-longest+1):])
			base += int64(len(have) - kept)
		}
		pos = end
	}
}

// Owner says which file a byte of the disk belongs to, as far as debugfs(8)
// knows: for the message of a test that found a trace.
func (m *Machine) Owner(offset int64) string {
	ask := func(request string) string {
		out, err := exec.Command("debugfs", "-R", request, m.Disk).Output()
		if err != nil {
			return err.Error()
		}
		lines := strings.Split(strings.TrimSpace(string(out)), "\n")
		return lines[len(lines)-1]
	}
	block := offset / 4096
	inode := strings.Fields(ask(fmt.Sprintf("icheck %d", block)))
	if len(inode) != 2 {
		return fmt.Sprintf("block %d: no file (free, journal or metadata)", block)
	}
	return fmt.Sprintf("block %d: %s", block, ask("ncheck "+inode[1]))
}
