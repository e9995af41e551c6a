package tree

import (
	"bytes"
	"context"
	"crypto/sha256"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"math/rand/v2"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"
	"golang.org/x/sys/unix"
	"pgregory.net/rapid"

	"overkeep/overlay/nar"
)

// us are options under which any user can write.
func us() Options { return Options{UID: os.Getuid(), GID: os.Getgid()} }

func must(t testing.TB, err error) {
	t.Helper()
	if err != nil {
		t.Fatal(err)
	}
}

// dir is a new directory, its path, and what opens it.
func dir(t testing.TB) (string, *os.File) {
	t.Helper()
	return dirAt(t, t.TempDir())
}

// quick is dir in memory where there is such a file system: ext4 takes its time to make a
// hundred thousand files where as many were removed a moment ago, and deep directories.
func quick(t testing.TB) (string, *os.File) {
	t.Helper()
	path, err := os.MkdirTemp("/dev/shm", "tree")
	if err != nil {
		return dir(t)
	}
	t.Cleanup(func() { must(t, os.RemoveAll(path)) })
	return dirAt(t, path)
}

func dirAt(t testing.TB, path string) (string, *os.File) {
	t.Helper()
	f, err := os.Open(path)
	must(t, err)
	t.Cleanup(func() {
		f.Close()
		must(t, exec(path, func(p string, d fs.DirEntry) error { // let TempDir remove it
			if d.IsDir() {
				return os.Chmod(p, 0o700)
			}
			return nil
		}))
	})
	return path, f
}

func exec(root string, f func(p string, d fs.DirEntry) error) error {
	return filepath.WalkDir(root, func(p string, d fs.DirEntry, err error) error {
		if err != nil {
			return err
		}
		return f(p, d)
	})
}

func write(t testing.TB, path string, content []byte, mode os.FileMode) {
	t.Helper()
	must(t, os.WriteFile(path, content, 0o600))
	must(t, os.Chmod(path, mode))
}

func random(n int, seed uint64) []byte {
	b := make([]byte, n)
	r := rand.NewChaCha8([32]byte{byte(seed), byte(seed >> 8)})
	r.Read(b)
	return b
}

// nasty is a tree with everything in it that a store path may hold.
func nasty(t testing.TB, root string) {
	t.Helper()
	must(t, os.Mkdir(root, 0o755))
	in := func(s string) string { return filepath.Join(root, s) }
	for i, size := range []int{0, 1, 7, 8, 9, 4095, 4096, 4097, 65535, 65536, 65537, pieceSize - 1, pieceSize, pieceSize + 1, 3*pieceSize + 5, 3 << 20} {
		write(t, in(fmt.Sprintf("size-%07d", size)), random(size, uint64(i)), 0o644)
	}
	write(t, in("exec"), []byte("#!/bin/sh\n"), 0o755)
	write(t, in("exec-group-only"), []byte("x"), 0o654)
	write(t, in("setuid"), []byte("x"), os.ModeSetuid|0o4755)
	must(t, os.Link(in("exec"), in("hard")))
	write(t, in(strings.Repeat("n", 255)), []byte("long"), 0o400)
	for _, name := range []string{"a", "a.b", "a-b", "a b", "B", "Z", "z", "\x01", "\xff\xfe", "é", "~nix~case~hack~1", "new\nline", " "} {
		write(t, in("order-"+name), []byte(name), 0o444)
	}
	must(t, os.Symlink("loop-b", in("loop-a")))
	must(t, os.Symlink("loop-a", in("loop-b")))
	must(t, os.Symlink(".", in("self")))
	must(t, os.Symlink("/etc/passwd", in("out")))
	must(t, os.Symlink(strings.Repeat("x/", 2047)+"y", in("far")))
	must(t, os.Mkdir(in("empty"), 0o700))
	must(t, os.MkdirAll(in("sub/sub/sub"), 0o755))
	write(t, in("sub/sub/sub/file"), []byte("deep"), 0o600)
	must(t, os.Symlink("sub", in("to-dir")))

	hole := func(name string, size int64, at ...int64) {
		f, err := os.Create(in(name))
		must(t, err)
		must(t, f.Truncate(size))
		for _, off := range at {
			_, err := f.WriteAt([]byte("data"), off)
			must(t, err)
		}
		must(t, f.Close())
	}
	hole("hole-all", 5<<20)
	hole("hole-small", 12345)
	hole("hole-odd", 1<<20+77, 300_000, 700_001)
	hole("hole-end", 1<<20, 1<<20-4)
	hole("hole-begin", 1<<20+1, 0)
	zeros := make([]byte, 1<<20)
	copy(zeros[500_000:], "middle")
	write(t, in("zeros"), zeros, 0o644)
	write(t, in("zeros-short"), make([]byte, 5000), 0o644)
	old := filepath.Join(root, "sub")
	must(t, os.Chtimes(old, time.Unix(0, 0), time.Unix(0, 0)))
}

// oracle is a NAR by another way: recursion, absolute paths, io.ReadFile.
func oracle(t testing.TB, path string) []byte {
	t.Helper()
	var b []byte
	str := func(s string) {
		var n [8]byte
		for i := range n {
			n[i] = byte(len(s) >> (8 * i))
		}
		b = append(b, n[:]...)
		b = append(b, s...)
		for len(b)%8 != 0 {
			b = append(b, 0)
		}
	}
	var node func(path string)
	node = func(path string) {
		fi, err := os.Lstat(path)
		must(t, err)
		str("(")
		str("type")
		switch {
		case fi.Mode().IsRegular():
			str("regular")
			if fi.Mode()&0o100 != 0 {
				str("executable")
				str("")
			}
			str("contents")
			content, err := os.ReadFile(path)
			must(t, err)
			str(string(content))
		case fi.Mode()&os.ModeSymlink != 0:
			str("symlink")
			str("target")
			to, err := os.Readlink(path)
			must(t, err)
			str(to)
		case fi.IsDir():
			str("directory")
			entries, err := os.ReadDir(path) // sorted
			must(t, err)
			for _, e := range entries {
				str("entry")
				str("(")
				str("name")
				str(e.Name())
				str("node")
				node(filepath.Join(path, e.Name()))
				str(")")
			}
		default:
			t.Fatalf("%q is a %v", path, fi.Mode())
		}
		str(")")
	}
	str("nix-archive-1")
	node(path)
	return b
}

// canonical fails the test if something in a tree is not in Nix's canonical form.
func canonical(t testing.TB, root string) {
	t.Helper()
	must(t, exec(root, func(p string, d fs.DirEntry) error {
		var st unix.Stat_t
		must(t, unix.Lstat(p, &st))
		if st.Mtim.Sec != 1 || st.Mtim.Nsec != 0 {
			t.Errorf("%q: modification time %v", p, st.Mtim)
		}
		if int(st.Uid) != os.Getuid() || int(st.Gid) != os.Getgid() {
			t.Errorf("%q: owner %d:%d", p, st.Uid, st.Gid)
		}
		if !d.IsDir() && st.Nlink != 1 {
			t.Errorf("%q: %d links", p, st.Nlink)
		}
		mode := st.Mode & 0o7777
		if st.Mode&unix.S_IFMT != unix.S_IFLNK && mode != 0o555 && (d.IsDir() || mode != 0o444) {
			t.Errorf("%q: mode %o", p, mode)
		}
		n, err := unix.Llistxattr(p, nil)
		if err != nil || n != 0 {
			t.Errorf("%q: %d bytes of names of attributes, %v", p, n, err)
		}
		return nil
	}))
}

func blocks(t testing.TB, root string) (n, inodes int64) {
	t.Helper()
	must(t, exec(root, func(p string, d fs.DirEntry) error {
		var st unix.Stat_t
		must(t, unix.Lstat(p, &st))
		n += st.Blocks
		inodes++
		return nil
	}))
	return n, inodes
}

func TestCopyNasty(t *testing.T) {
	from, src := dir(t)
	to, dst := dir(t)
	nasty(t, filepath.Join(from, "p"))
	_ = unix.Setxattr(filepath.Join(from, "p/exec"), "user.mine", []byte("x"), 0) // not everywhere
	want := oracle(t, filepath.Join(from, "p"))
	sum := sha256.Sum256(want)

	told := int64(0)
	o := us()
	o.Progress = func(n int64) { told += n }
	r, err := Copy(t.Context(), src, "p", dst, "q", o)
	must(t, err)
	if r.NarHash != sum || r.NarSize != int64(len(want)) || told != r.NarSize {
		t.Errorf("hash %x, size %d, told %d; want %x, %d", r.NarHash, r.NarSize, told, sum, len(want))
	}
	canonical(t, filepath.Join(to, "q"))
	if got := oracle(t, filepath.Join(to, "q")); !bytes.Equal(got, want) {
		t.Error("the copy has another content")
	}

	h, err := Hash(t.Context(), src, "p", Options{})
	must(t, err)
	h.Blocks = r.Blocks
	if d := cmp.Diff(r, h); d != "" {
		t.Errorf("copied (-) and hashed (+): %s", d)
	}
	var out bytes.Buffer
	_, err = Dump(t.Context(), &out, dst, "q", Options{})
	must(t, err)
	if !bytes.Equal(out.Bytes(), want) {
		t.Error("the dump is another one")
	}
	back, err := Restore(t.Context(), &out, dst, "restored", us())
	must(t, err)
	if d := cmp.Diff(r, back); d != "" {
		t.Errorf("copied (-) and restored (+): %s", d)
	}
	canonical(t, filepath.Join(to, "restored"))

	// Holes are holes, and there is room where Usage says that there is.
	must(t, unix.Syncfs(int(dst.Fd())))
	room, err := Room(dst)
	must(t, err)
	u, err := Usage(t.Context(), src, "p", room.BlockSize)
	must(t, err)
	have, _ := blocks(t, filepath.Join(from, "p"))
	for _, name := range []string{"q", "restored"} {
		got, inodes := blocks(t, filepath.Join(to, name))
		if got*512 > u.Blocks*u.BlockSize || inodes != u.Inodes {
			t.Errorf("%s: %d bytes, %d inodes; Usage said %+v", name, got*512, inodes, u)
		}
		// A hard link is a file of its own, a written block of zeros is none.
		if got > have+8 {
			t.Errorf("%s has %d blocks, the source %d", name, got, have)
		}
		for _, hole := range []string{"hole-all", "zeros-short", "hole-small"} {
			var st unix.Stat_t
			must(t, unix.Lstat(filepath.Join(to, name, hole), &st))
			if st.Blocks > 8 {
				t.Errorf("%s/%s has %d blocks", name, hole, st.Blocks)
			}
		}
	}
	for _, name := range []string{"q", "restored", "nothing"} {
		must(t, Remove(t.Context(), dst, name))
	}
	if left, err := os.ReadDir(to); err != nil || len(left) != 0 {
		t.Errorf("%v %v is left", left, err)
	}
}

// A path may also be a single file or link.
func TestCopyRoots(t *testing.T) {
	from, src := dir(t)
	to, dst := dir(t)
	write(t, filepath.Join(from, "file"), []byte("file"), 0o640)
	write(t, filepath.Join(from, "exec"), nil, 0o700)
	must(t, os.Symlink("nowhere", filepath.Join(from, "link")))
	must(t, os.Mkdir(filepath.Join(from, "dir"), 0o700))
	for _, name := range []string{"file", "exec", "link", "dir"} {
		r, err := Copy(t.Context(), src, name, dst, name, us())
		must(t, err)
		want := oracle(t, filepath.Join(from, name))
		if r.NarHash != sha256.Sum256(want) || !bytes.Equal(oracle(t, filepath.Join(to, name)), want) {
			t.Errorf("%s: another content", name)
		}
		if _, err := Copy(t.Context(), src, name, dst, name, us()); !errors.Is(err, fs.ErrExist) {
			t.Errorf("%s again: %v", name, err)
		}
	}
	canonical(t, filepath.Join(to, "file"))
	canonical(t, filepath.Join(to, "dir"))
	for _, bad := range []string{"", ".", "..", "a/b", "/etc", "a\x00", strings.Repeat("n", 256)} {
		_, err := Copy(t.Context(), src, bad, dst, "new", us())
		_, err2 := Copy(t.Context(), src, "file", dst, bad, us())
		_, err3 := Hash(t.Context(), src, bad, us())
		_, err4 := Usage(t.Context(), src, bad, 4096)
		_, err5 := Restore(t.Context(), strings.NewReader(""), dst, bad, us())
		for i, err := range []error{err, err2, err3, err4, err5, Remove(t.Context(), dst, bad)} {
			if !errors.Is(err, ErrName) {
				t.Errorf("%q, call %d: %v", bad, i, err)
			}
		}
	}
	if _, err := Hash(t.Context(), src, "missing", us()); !errors.Is(err, fs.ErrNotExist) {
		t.Errorf("missing: %v", err)
	}
}

// Many entries in one directory.
func TestWide(t *testing.T) {
	from, src := quick(t)
	_, dst := quick(t)
	const wide = 100_000
	in := filepath.Join(from, "p")
	must(t, os.Mkdir(in, 0o755))
	for i := range wide {
		name := fmt.Sprintf("%s/entry-%d", in, i)
		if i%60_000 == 0 {
			write(t, name, fmt.Append(nil, i), 0o644)
			continue
		}
		must(t, os.Link(fmt.Sprintf("%s/entry-%d", in, i/60_000*60_000), name))
	}
	r, err := Copy(t.Context(), src, "p", dst, "q", us())
	must(t, err)
	if r.Files != wide || r.Dirs != 1 {
		t.Errorf("%+v", r)
	}
	var st unix.Stat_t
	must(t, unix.Fstatat(int(dst.Fd()), "q/entry-99999", &st, 0))
	if st.Nlink != 1 {
		t.Errorf("a copy has %d links", st.Nlink)
	}
	h, err := Hash(t.Context(), dst, "q", us())
	must(t, err)
	if h.Blocks = r.Blocks; h != r {
		t.Errorf("the copy is %+v, the source %+v", h, r)
	}
	must(t, Remove(t.Context(), dst, "q"))
	must(t, Remove(t.Context(), src, "p"))
}

// Directories far deeper than a path can be long, with few descriptors.
func TestDeep(t *testing.T) {
	_, src := quick(t)
	to, dst := quick(t)
	const depth = 5000
	fd, err := unix.Openat(int(src.Fd()), ".", unix.O_DIRECTORY|unix.O_CLOEXEC, 0)
	must(t, err)
	long := strings.Repeat("d", 200)
	for i := range depth {
		name := long
		if i == 0 {
			name = "deep"
		}
		must(t, unix.Mkdirat(fd, name, 0o755))
		next, err := unix.Openat(fd, name, unix.O_DIRECTORY|unix.O_CLOEXEC, 0)
		must(t, err)
		must(t, unix.Symlinkat("x", next, "z"))
		must(t, unix.Close(fd))
		fd = next
	}
	must(t, unix.Close(fd))

	before := descriptors(t)
	o := us()
	most := 0
	o.Progress = func(int64) { most = max(most, descriptors(t)) }
	r, err := Copy(t.Context(), src, "deep", dst, "q", o)
	must(t, err)
	if r.Dirs != depth || r.Links != depth {
		t.Errorf("%+v", r)
	}
	if most == 0 || most > before+2*window+8 {
		t.Errorf("%d descriptors, before %d", most, before)
	}
	h, err := Hash(t.Context(), dst, "q", us())
	must(t, err)
	if h != r {
		t.Errorf("the copy is %+v, the source %+v", h, r)
	}
	pr, pw := io.Pipe()
	go func() {
		_, err := Dump(context.Background(), pw, dst, "q", us())
		pw.CloseWithError(err)
	}()
	back, err := Restore(t.Context(), pr, dst, "restored", us())
	must(t, err)
	if back != r {
		t.Errorf("restored is %+v, the source %+v", back, r)
	}
	if _, err := Usage(t.Context(), src, "deep", 4096); err != nil {
		t.Error(err)
	}
	for _, name := range []string{"q", "restored"} {
		must(t, Remove(t.Context(), dst, name))
	}
	must(t, Remove(t.Context(), src, "deep"))
	if left, err := os.ReadDir(to); err != nil || len(left) != 0 {
		t.Errorf("%v %v is left", left, err)
	}
	if now := descriptors(t); now != before {
		t.Errorf("%d descriptors, before %d", now, before)
	}
}

func descriptors(t testing.TB) int {
	t.Helper()
	d, err := os.ReadDir("/proc/self/fd")
	must(t, err)
	return len(d)
}

func TestRefused(t *testing.T) {
	for _, c := range []struct {
		kind string
		mode uint32
		root bool
	}{{"fifo", unix.S_IFIFO, false}, {"socket", unix.S_IFSOCK, false}, {"device", unix.S_IFCHR, true}, {"device", unix.S_IFBLK, true}} {
		if c.root && os.Getuid() != 0 {
			continue
		}
		from, src := dir(t)
		_, dst := dir(t)
		must(t, os.Mkdir(filepath.Join(from, "d"), 0o755))
		must(t, unix.Mknod(filepath.Join(from, "d/odd"), c.mode|0o644, int(unix.Mkdev(1, 3))))
		must(t, unix.Mknod(filepath.Join(from, "odd"), c.mode|0o644, int(unix.Mkdev(1, 3))))
		for _, name := range []string{"d", "odd"} {
			_, err := Copy(t.Context(), src, name, dst, "new", us())
			_, err2 := Hash(t.Context(), src, name, us())
			_, err3 := Usage(t.Context(), src, name, 4096)
			for _, err := range []error{err, err2, err3} {
				var u *UnsupportedError
				if !errors.As(err, &u) || u.Kind != c.kind || u.Name != "odd" {
					t.Errorf("%s in %s: %v", c.kind, name, err)
				}
			}
			must(t, Remove(t.Context(), dst, "new"))
			must(t, Remove(t.Context(), src, name)) // what is no store path can be removed all the same
		}
	}
}

// A file that changes while it is read is an error, at whatever point it does.
func TestChanging(t *testing.T) {
	from, src := dir(t)
	_, dst := dir(t)
	big := filepath.Join(from, "p/a")
	for _, c := range []struct {
		name   string
		change func() error
	}{
		{"shorter", func() error { return os.Truncate(big, 1<<20) }},
		{"longer", func() error { return os.Truncate(big, 9<<20) }},
		{"next is gone", func() error { return os.Remove(filepath.Join(from, "p/b")) }},
		{"next is a link", func() error {
			return errors.Join(os.Remove(filepath.Join(from, "p/b")), os.Symlink("a", filepath.Join(from, "p/b")))
		}},
		{"next is a fifo", func() error {
			return errors.Join(os.Remove(filepath.Join(from, "p/b")), unix.Mkfifo(filepath.Join(from, "p/b"), 0o644))
		}},
		{"next is a directory", func() error {
			return errors.Join(os.Remove(filepath.Join(from, "p/b")), os.Mkdir(filepath.Join(from, "p/b"), 0o755))
		}},
	} {
		must(t, os.Mkdir(filepath.Join(from, "p"), 0o755))
		write(t, big, random(8<<20, 1), 0o644)
		write(t, filepath.Join(from, "p/b"), []byte("b"), 0o644)
		o := us()
		o.Progress = func(int64) {
			if c.change != nil {
				must(t, c.change())
				c.change = nil
			}
		}
		if _, err := Copy(t.Context(), src, "p", dst, "q", o); !errors.Is(err, ErrChanged) {
			t.Errorf("%s: %v", c.name, err)
		}
		must(t, Remove(t.Context(), dst, "q"))
		must(t, Remove(t.Context(), src, "p"))
	}
	// A directory that is moved away while the walk is below it.
	must(t, os.MkdirAll(filepath.Join(from, "p/x"+strings.Repeat("/x", window+5)), 0o755))
	write(t, filepath.Join(from, "p/x"+strings.Repeat("/x", window+5), "f"), random(1<<20, 1), 0o644)
	moved := false
	o := us()
	o.Progress = func(int64) {
		if !moved {
			moved = true
			must(t, os.Mkdir(filepath.Join(from, "elsewhere"), 0o755))
			must(t, os.Rename(filepath.Join(from, "p/x/x/x"), filepath.Join(from, "elsewhere/x")))
		}
	}
	if _, err := Copy(t.Context(), src, "p", dst, "q", o); !errors.Is(err, ErrChanged) || !moved {
		t.Errorf("moved (%v): %v", moved, err)
	}
}

func TestCancelled(t *testing.T) {
	from, src := dir(t)
	to, dst := dir(t)
	must(t, os.Mkdir(filepath.Join(from, "p"), 0o755))
	write(t, filepath.Join(from, "p/a"), random(8<<20, 1), 0o644)
	f, err := os.Create(filepath.Join(from, "p/b"))
	must(t, err)
	must(t, f.Truncate(1<<43)) // hours of zeros
	must(t, f.Close())
	for _, after := range []int{0, 1, 5, 40, 100} {
		ctx, cancel := context.WithCancel(t.Context())
		calls := 0
		o := us()
		o.Progress = func(int64) {
			if calls++; calls >= after {
				cancel()
			}
		}
		if after == 0 {
			cancel()
		}
		if _, err := Copy(ctx, src, "p", dst, "q", o); !errors.Is(err, context.Canceled) {
			t.Errorf("after %d calls: %v", after, err)
		}
		if err := Remove(ctx, dst, "q"); after > 0 && !errors.Is(err, context.Canceled) {
			t.Errorf("after %d calls, removing: %v", after, err)
		}
		must(t, Remove(t.Context(), dst, "q"))
		cancel()
	}
	if left, err := os.ReadDir(to); err != nil || len(left) != 0 {
		t.Errorf("%v %v is left", left, err)
	}
}

func TestCopyAll(t *testing.T) {
	from, src := dir(t)
	to, dst := dir(t)
	var jobs []Job
	for i := range 40 {
		name := fmt.Sprintf("p%d", i)
		must(t, os.Mkdir(filepath.Join(from, name), 0o755))
		write(t, filepath.Join(from, name, "f"), random(1000*i*i, uint64(i)), 0o644)
		nar := oracle(t, filepath.Join(from, name))
		jobs = append(jobs, Job{Name: name, NewName: "n" + name, Want: sha256.Sum256(nar), NarSize: int64(len(nar)) * int64(i%2)})
	}
	jobs[7].Want[0] ^= 1
	jobs[8].Name = "missing"
	must(t, os.Mkdir(filepath.Join(to, "np9"), 0o755))
	jobs[11].NarSize-- // the file alone is not too long for that
	must(t, os.Truncate(filepath.Join(from, "p13", "f"), 1<<40))
	for _, workers := range []int{0, 1, 3, 100} {
		o := us()
		o.Workers = workers
		size, told := int64(0), int64(0)
		o.Progress = func(n int64) { told += n }
		seen := make([]int, len(jobs))
		must(t, CopyAll(t.Context(), src, dst, jobs, o, func(i int, r Result, err error) {
			seen[i]++
			size += r.NarSize
			var bad *MismatchError
			switch i {
			case 7:
				if !errors.As(err, &bad) || bad.Name != "p7" || bad.Want != jobs[7].Want || bad.Got != r.NarHash {
					t.Errorf("job 7: %v", err)
				}
			case 8:
				if !errors.Is(err, fs.ErrNotExist) {
					t.Errorf("job 8: %v", err)
				}
			case 9:
				if !errors.Is(err, fs.ErrExist) {
					t.Errorf("job 9: %v", err)
				}
			case 13: // ended at once, and not after a terabyte of zeros
				if size := (*SizeError)(nil); !errors.As(err, &size) || size.Name != "p13" || size.Want != jobs[13].NarSize {
					t.Errorf("job 13: %v", err)
				}
			default:
				if err != nil || r.NarHash != jobs[i].Want {
					t.Errorf("job %d: %v %+v", i, err, r)
				}
				canonical(t, filepath.Join(to, jobs[i].NewName))
			}
		}))
		if slices.Min(seen) != 1 || slices.Max(seen) != 1 || told < size {
			t.Errorf("%d workers: done %v, size %d, told %d", workers, seen, size, told)
		}
		for i, j := range jobs {
			if i != 9 {
				must(t, Remove(t.Context(), dst, j.NewName))
			}
		}
	}
	ctx, cancel := context.WithCancel(t.Context())
	begun := 0
	if err := CopyAll(ctx, src, dst, jobs, us(), func(int, Result, error) { begun++; cancel() }); !errors.Is(err, context.Canceled) || begun > 3 {
		t.Errorf("cancelled: %v, %d jobs", err, begun)
	}
	if err := CopyAll(t.Context(), src, dst, nil, us(), nil); err != nil {
		t.Errorf("nothing: %v", err)
	}
}

// Trees drawn at random: what is copied is what is there, by the oracle, the strict reader and back.
func TestCopyProperty(t *testing.T) {
	from, src := dir(t)
	to, dst := dir(t)
	n := 0
	rapid.Check(t, func(r *rapid.T) {
		n++
		root := filepath.Join(from, fmt.Sprint(n))
		var grow func(path string, depth int)
		grow = func(path string, depth int) {
			switch k := rapid.IntRange(0, 3).Draw(r, "kind"); {
			case k == 0:
				must(t, os.Symlink(rapid.StringMatching(`[a-z/.]{1,300}`).Draw(r, "target"), path))
			case k == 1 || depth == 4:
				size := rapid.OneOf(rapid.IntRange(0, 100), rapid.IntRange(0, 3*4096), rapid.SampledFrom([]int{pieceSize, 2*pieceSize + 1})).Draw(r, "size")
				b := make([]byte, size)
				for range rapid.IntRange(0, 3).Draw(r, "runs") {
					if size > 0 {
						at := rapid.IntRange(0, size-1).Draw(r, "at")
						copy(b[at:min(size, at+rapid.IntRange(1, 9000).Draw(r, "run"))], random(9000, uint64(at)))
					}
				}
				write(t, path, b, os.FileMode(rapid.SampledFrom([]int{0o444, 0o755, 0o600, 0o711}).Draw(r, "mode")))
			default:
				must(t, os.Mkdir(path, 0o755))
				names := rapid.SliceOfNDistinct(rapid.StringMatching(`[a-cA-C.~ -]{1,5}`).Filter(func(s string) bool { return s != "." && s != ".." }), 0, 5, rapid.ID[string]).Draw(r, "names")
				for _, name := range names {
					grow(filepath.Join(path, name), depth+1)
				}
			}
		}
		grow(root, 0)
		want := oracle(t, root)
		name := filepath.Base(root)
		res, err := Copy(t.Context(), src, name, dst, name, us())
		if err != nil || res.NarHash != sha256.Sum256(want) || res.NarSize != int64(len(want)) {
			r.Fatalf("%+v, %v", res, err)
		}
		if !bytes.Equal(oracle(t, filepath.Join(to, name)), want) {
			r.Fatal("the copy is another one")
		}
		back, err := Restore(t.Context(), bytes.NewReader(want), dst, name+"r", us())
		if err != nil || back != res || !bytes.Equal(oracle(t, filepath.Join(to, name+"r")), want) {
			r.Fatalf("restored: %+v, %v", back, err)
		}
		canonical(t, filepath.Join(to, name))
		room, err := Room(dst)
		must(t, err)
		need, err := Usage(t.Context(), src, name, room.BlockSize)
		must(t, err)
		if have, inodes := blocks(t, filepath.Join(to, name)); have*512 > need.Blocks*need.BlockSize || inodes != need.Inodes {
			r.Fatalf("%d bytes, %d inodes; Usage said %+v", have*512, inodes, need)
		}
	})
}

// What is no archive is refused, wherever it stops being one.
func TestRestoreRefuses(t *testing.T) {
	from, src := dir(t)
	to, dst := dir(t)
	must(t, os.MkdirAll(filepath.Join(from, "p/sub"), 0o755))
	write(t, filepath.Join(from, "p/sub/f"), []byte("0123456789"), 0o755)
	must(t, os.Symlink("x", filepath.Join(from, "p/l")))
	var b bytes.Buffer
	_, err := Dump(t.Context(), &b, src, "p", us())
	must(t, err)
	for n := range b.Len() {
		_, err := Restore(t.Context(), bytes.NewReader(b.Bytes()[:n]), dst, "q", us())
		var f *nar.FormatError
		if !errors.As(err, &f) {
			t.Errorf("%d of %d bytes: %v", n, b.Len(), err)
		}
		must(t, Remove(t.Context(), dst, "q"))
	}
	if _, err := Restore(t.Context(), io.MultiReader(&b, strings.NewReader("x")), dst, "q", us()); err == nil {
		t.Error("something may follow")
	}
	must(t, Remove(t.Context(), dst, "q"))
	if left, err := os.ReadDir(to); err != nil || len(left) != 0 {
		t.Errorf("%v %v is left", left, err)
	}
}

func TestDumpError(t *testing.T) {
	from, src := dir(t)
	write(t, filepath.Join(from, "f"), random(8<<20, 1), 0o644)
	full := errors.New("full")
	if _, err := Dump(t.Context(), writer(func(p []byte) (int, error) { return 0, full }), src, "f", us()); err != full {
		t.Errorf("%v", err)
	}
	if _, err := Dump(t.Context(), writer(func(p []byte) (int, error) { return len(p) - 1, nil }), src, "f", us()); err != io.ErrShortWrite {
		t.Errorf("%v", err)
	}
}

type writer func(p []byte) (int, error)

func (w writer) Write(p []byte) (int, error) { return w(p) }
