package wipe

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"

	"golang.org/x/sys/unix"
)

const (
	inContent  = "CANARY-in-the-content-of-a-file"
	inName     = "CANARY-in-a-name"
	inLink     = "CANARY-in-the-target-of-a-link"
	inLongLink = "CANARY-in-a-target-of-more-than-sixty-bytes-that-has-a-block-of-its-own"
)

func write(t testing.TB, path string, size int, mode os.FileMode) {
	t.Helper()
	b := bytes.Repeat([]byte(inContent), size/len(inContent)+1)[:size]
	if err := errors.Join(os.WriteFile(path, b, 0o600), os.Chmod(path, mode)); err != nil {
		t.Fatal(err)
	}
}

func setAttr(t testing.TB, path string, attr int) {
	t.Helper()
	f, err := os.Open(path)
	if err != nil {
		t.Fatal(err)
	}
	defer f.Close()
	if err := unix.IoctlSetPointerInt(int(f.Fd()), unix.FS_IOC_SETFLAGS, attr); err != nil {
		t.Fatal(err)
	}
}

// plant makes a tree with everything that is odd, and returns how many regular files
// there are.
func plant(t testing.TB, dir string) (files int) {
	t.Helper()
	sub := filepath.Join(dir, inName+"-sub")
	if err := os.MkdirAll(sub, 0o700); err != nil {
		t.Fatal(err)
	}
	for _, size := range []int{0, 31, 100, 155, 4095, 4096, 4097, 100_000, 3 << 20} {
		write(t, filepath.Join(sub, fmt.Sprint(inName, size)), size, 0o444)
		files++
	}
	write(t, filepath.Join(dir, "program"), 5000, 0o555)
	write(t, filepath.Join(dir, "immutable"), 5000, 0o400)
	write(t, filepath.Join(sub, inName+strings.Repeat("n", 255-len(inName))), 40, 0o400)
	write(t, filepath.Join(sub, "first name"), 7000, 0o400)
	files += 4
	sparse := filepath.Join(sub, "sparse")
	write(t, sparse, 9000, 0o600)
	files++
	f, err := os.OpenFile(sparse, os.O_WRONLY, 0)
	if err == nil {
		_, err = f.WriteAt([]byte(inContent), 1<<30)
		err = errors.Join(err, f.Truncate(1<<31), f.Close())
	}
	deep := sub
	for range 3 * deepest {
		deep = filepath.Join(deep, "d")
	}
	err = errors.Join(err, os.Link(filepath.Join(sub, "first name"), filepath.Join(dir, "second name")),
		os.Symlink(inLink, filepath.Join(sub, "link")), os.Symlink("/nix/store/"+inLongLink, filepath.Join(sub, "long link")),
		os.Symlink("/etc", filepath.Join(sub, "etc")), unix.Mkfifo(filepath.Join(dir, "pipe"), 0o600), os.MkdirAll(deep, 0o700))
	if err != nil {
		t.Fatal(err)
	}
	write(t, filepath.Join(deep, inName), 6000, 0o400)
	files++
	setAttr(t, filepath.Join(dir, "immutable"), attrImmutable)
	setAttr(t, sub, attrAppend)
	if err := os.Chmod(dir, 0o555); err != nil {
		t.Fatal(err)
	}
	return files
}

var variants = []struct {
	name    string
	discard bool
	mkfs    []string
	journal Answer
}{
	{"default", true, nil, Done},
	{"no discard", false, nil, Done},
	{"no journal", true, []string{"-O", "^has_journal"}, Unsupported},
	{"inline data", false, []string{"-O", "inline_data", "-I", "512"}, Done},
	{"1 KiB blocks", false, []string{"-b", "1024"}, Done},
	{"as ext3", false, []string{"-O", "^extent,^64bit,^metadata_csum,^dir_index"}, Done},
}

// Of a tree with everything odd nothing is left, in all kinds of ext4.
func TestTree(t *testing.T) {
	for _, v := range variants {
		t.Run(v.name, func(t *testing.T) {
			d := newDevice(t, 128<<20, v.discard, v.mkfs...)
			files := plant(t, filepath.Join(d.mnt, inName))
			write(t, filepath.Join(d.mnt, "neighbour"), 5000, 0o600)
			all := []string{inContent, inName, inLink, inLongLink}
			before := d.onDisk(t, all...)
			for _, n := range all {
				if before[n] == 0 {
					t.Fatalf("%s is nowhere", n)
				}
			}
			parent := opened(t, d.mnt)
			r, err := Tree(t.Context(), parent, inName, Options{})
			if err != nil {
				t.Fatal(err)
			}
			if r.Files != files || r.Shared != 0 || r.Symlinks != 3 || r.LongLinks != 1 || r.Others != 1 || r.Bytes < 3<<20 || r.Bytes > 5<<20 {
				t.Errorf("%d files: %+v", files, r)
			}
			if again, err := Tree(t.Context(), parent, inName, Options{}); err != nil || again.Files != 0 {
				t.Errorf("again: %+v, %v", again, err)
			}
			s, err := Slack(t.Context(), parent, [][]byte{[]byte(inName)})
			if err != nil || s.Looked != Done || s.After != 0 {
				t.Errorf("%+v, %v", s, err)
			}
			if len(r.Blocks) != 1 {
				t.Errorf("a long link is in blocks %d", r.Blocks)
			}
			free, err := Reuse(t.Context(), parent, r.Blocks)
			if err != nil || free != 0 && v.name != "as ext3" && v.name != "1 KiB blocks" {
				t.Errorf("%d blocks of %d not reused, %v", free, len(r.Blocks), err)
			}
			dev, err := Device(t.Context(), parent)
			if err != nil || dev.Sync != Done || dev.Checkpoint != v.journal || dev.Zeroed != (v.journal == Done) || (dev.Trim == Done) != v.discard {
				t.Errorf("%+v, %v", dev, err)
			}
			b, err := os.ReadFile(filepath.Join(d.mnt, "neighbour"))
			if want := bytes.Repeat([]byte(inContent), 200)[:5000]; err != nil || !bytes.Equal(b, want) {
				t.Error("another file has changed")
			}
			if err := os.Remove(filepath.Join(d.mnt, "neighbour")); err != nil {
				t.Fatal(err)
			}
			after := d.onDisk(t, all...)
			t.Logf("%v, then %v; %+v; %+v", before, after, r, dev)
			if want := 5000 / len(inContent); after[inContent] != want && after[inContent] != 0 { // the neighbour's, removed
				t.Errorf("%d contents", after[inContent])
			}
			if after[inName] != 0 || after[inLink] != 0 {
				t.Errorf("left: %v", after)
			}
			if after[inLongLink] != 0 && (v.discard || free == 0 || !slices.Contains(r.Notes, NoteLongLinks)) {
				t.Errorf("left: %v, and nobody says so", after)
			}
			if _, err := os.Stat("/etc/passwd"); err != nil {
				t.Fatal("a link was followed")
			}
		})
	}
}

// steps is a context that ends at the n-th look at it.
type steps struct {
	context.Context
	left int
}

func (s *steps) Err() error {
	if s.left--; s.left < 0 {
		return context.Canceled
	}
	return nil
}

// Whereever it ends, it can be repeated, and what is done is done at last.
func TestTreeRepeated(t *testing.T) {
	d := newDevice(t, 64<<20, false)
	if err := os.Mkdir(filepath.Join(d.mnt, ".links"), 0o700); err != nil {
		t.Fatal(err)
	}
	parent, links := opened(t, d.mnt), opened(t, filepath.Join(d.mnt, ".links"))
	plant(t, filepath.Join(d.mnt, "tree"))
	if err := os.Link(filepath.Join(d.mnt, "tree/program"), filepath.Join(d.mnt, ".links/not what the content says")); err != nil {
		t.Fatal(err)
	}
	ends := 0
	for n := 0; ; n += 7 {
		_, err := Tree(&steps{t.Context(), n}, parent, "tree", Options{Links: links})
		if err == nil {
			break
		}
		if !errors.Is(err, context.Canceled) {
			t.Fatal(err)
		}
		ends++
	}
	left, err := os.ReadDir(d.mnt + "/.links")
	if err != nil || len(left) != 0 || ends < 20 {
		t.Errorf("after %d ends: %v, %v", ends, left, err)
	}
	if n := d.onDisk(t, inContent)[inContent]; n != 0 {
		t.Errorf("%d contents", n)
	}
}

// A tree of many small files. entries is what one directory has.
func TestMany(t *testing.T) {
	const entries = 10_000
	d := newDevice(t, 256<<20, false)
	tree := filepath.Join(d.mnt, "tree")
	if err := os.Mkdir(tree, 0o700); err != nil {
		t.Fatal(err)
	}
	dir := opened(t, tree)
	for i := range entries {
		fd, err := unix.Openat(int(dir.Fd()), fmt.Sprint(inName, i), unix.O_CREAT|unix.O_WRONLY|unix.O_EXCL, 0o444)
		if err == nil && i%10 == 0 {
			_, err = unix.Write(fd, []byte(inContent))
		}
		if err := errors.Join(err, unix.Close(fd)); err != nil {
			t.Fatal(err)
		}
	}
	if found := d.onDisk(t, inContent, inName); found[inContent] < entries/10 || found[inName] < entries {
		t.Fatal(found)
	}
	parent := opened(t, d.mnt)
	r, err := Tree(t.Context(), parent, "tree", Options{})
	if err != nil || r.Files != entries {
		t.Errorf("%+v, %v", r, err)
	}
	if dev, err := Device(t.Context(), parent); err != nil || dev.Trim != Unsupported {
		t.Errorf("%+v, %v", dev, err)
	}
	if found := d.onDisk(t, inContent, inName); len(found) != 0 {
		t.Error(found)
	}
}

// What another path has, too, is left as it is; with the last of them it goes.
func TestShared(t *testing.T) {
	d := newDevice(t, 64<<20, false)
	for _, n := range []string{".links", "a", "b"} {
		if err := os.Mkdir(filepath.Join(d.mnt, n), 0o700); err != nil {
			t.Fatal(err)
		}
	}
	parent, links := opened(t, d.mnt), opened(t, filepath.Join(d.mnt, ".links"))
	w := &wiper{ctx: t.Context()}
	share := func(name string) string {
		t.Helper()
		var st unix.Stat_t
		if err := unix.Lstat(filepath.Join(d.mnt, "a", name), &st); err != nil {
			t.Fatal(err)
		}
		link, err := w.linkName(int(opened(t, filepath.Join(d.mnt, "a")).Fd()), name, &st)
		if err != nil {
			t.Fatal(err)
		}
		for _, to := range []string{"b/" + name, ".links/" + link} {
			if err := os.Link(filepath.Join(d.mnt, "a", name), filepath.Join(d.mnt, to)); err != nil {
				t.Fatal(err)
			}
		}
		return link
	}
	write(t, filepath.Join(d.mnt, "a/file"), 10_000, 0o444)
	write(t, filepath.Join(d.mnt, "a/program"), 10_000, 0o555)
	if err := os.Symlink("/nix/store/"+inLongLink, filepath.Join(d.mnt, "a/link")); err != nil {
		t.Fatal(err)
	}
	names := []string{share("file"), share("program"), share("link")}
	if names[0] == names[1] {
		t.Error("the right to execute makes no difference")
	}
	count := func() int {
		l, err := os.ReadDir(filepath.Join(d.mnt, ".links"))
		if err != nil {
			t.Fatal(err)
		}
		return len(l)
	}
	r, err := Tree(t.Context(), parent, "a", Options{Links: links})
	if err != nil || r.Files != 0 || r.Shared != 3 || r.SharedBytes < 20_000 || r.Links != 0 || count() != 3 {
		t.Errorf("%+v, %v, %d links", r, err, count())
	}
	b, err := os.ReadFile(filepath.Join(d.mnt, "b/file"))
	if err != nil || !bytes.Equal(b, bytes.Repeat([]byte(inContent), 400)[:10_000]) {
		t.Error("the other path has changed")
	}
	r, err = Tree(t.Context(), parent, "b", Options{Links: links})
	if err != nil || r.Files != 2 || r.Shared != 0 || r.Links != 3 || count() != 0 || len(r.LinkNames) != 3 {
		t.Errorf("%+v, %v, %d links", r, err, count())
	}
	if n := d.onDisk(t, inContent)[inContent]; n != 0 {
		t.Errorf("%d contents", n)
	}
	// Without .links, a name there is somebody else's.
	write(t, filepath.Join(d.mnt, "c"), 10_000, 0o444)
	if err := os.Link(filepath.Join(d.mnt, "c"), filepath.Join(d.mnt, ".links/x")); err != nil {
		t.Fatal(err)
	}
	if r, err := Tree(t.Context(), parent, "c", Options{}); err != nil || r.Shared != 1 {
		t.Errorf("%+v, %v", r, err)
	}
	// Two trees at once share nothing with others.
	for _, n := range []string{"d", "e"} {
		if err := os.Link(filepath.Join(d.mnt, ".links/x"), filepath.Join(d.mnt, n)); err != nil {
			t.Fatal(err)
		}
	}
	if r, err := Trees(t.Context(), parent, []string{"d", "none", "e"}, Options{Links: links}); err != nil || r.Files != 1 || r.Shared != 0 || r.Links != 1 {
		t.Errorf("%+v, %v", r, err)
	}
}

// A mount in the tree, also of the same file system, is not entered, and nothing is
// touched.
func TestMounts(t *testing.T) {
	d := newDevice(t, 64<<20, false)
	for _, n := range []string{"tree/in", "tree/other", "outside"} {
		if err := os.MkdirAll(filepath.Join(d.mnt, n), 0o700); err != nil {
			t.Fatal(err)
		}
	}
	write(t, filepath.Join(d.mnt, "outside/file"), 100, 0o600)
	write(t, filepath.Join(d.mnt, "tree/file"), 100, 0o600)
	parent := opened(t, d.mnt)
	in := filepath.Join(d.mnt, "tree/in")
	if err := unix.Mount(filepath.Join(d.mnt, "outside"), in, "", unix.MS_BIND, ""); err != nil {
		t.Fatal(err)
	}
	if _, err := Tree(t.Context(), parent, "tree", Options{}); !errors.Is(err, unix.EXDEV) {
		t.Errorf("%v", err)
	}
	if err := errors.Join(unix.Unmount(in, 0), unix.Mount("none", in, "tmpfs", 0, "")); err != nil {
		t.Fatal(err)
	}
	if _, err := Tree(t.Context(), parent, "tree", Options{}); !errors.Is(err, unix.EXDEV) {
		t.Errorf("%v", err)
	}
	if err := unix.Unmount(in, 0); err != nil {
		t.Fatal(err)
	}
	for _, n := range []string{"outside/file", "tree/file"} {
		if b, err := os.ReadFile(filepath.Join(d.mnt, n)); err != nil || !strings.HasPrefix(string(b), inContent) {
			t.Errorf("%s: %q, %v", n, b, err)
		}
	}
	if _, err := Tree(t.Context(), parent, "tree", Options{}); err != nil {
		t.Error(err)
	}
	for _, bad := range []string{"", ".", "..", "a/b", "../x"} {
		if _, err := Tree(t.Context(), parent, bad, Options{}); !errors.Is(err, unix.EINVAL) {
			t.Errorf("%q was wiped", bad)
		}
	}
}

// Who is not root can wipe what is theirs; here on whatever holds temporary files.
func TestAnywhere(t *testing.T) {
	dir := t.TempDir()
	tree := filepath.Join(dir, "tree")
	if err := os.Mkdir(tree, 0o700); err != nil {
		t.Fatal(err)
	}
	write(t, filepath.Join(tree, "file"), 10_000, 0o400)
	if err := os.Chmod(tree, 0o500); err != nil {
		t.Fatal(err)
	}
	r, err := Tree(t.Context(), opened(t, dir), "tree", Options{})
	if err != nil || r.Files != 1 || r.Directories != 1 || r.Bytes < 10_000 {
		t.Errorf("%+v, %v", r, err)
	}
	if left, err := os.ReadDir(dir); err != nil || len(left) != 0 {
		t.Errorf("%v, %v", left, err)
	}
	if len(Caveats()) == 0 {
		t.Error("no caveats")
	}
}

func TestLogs(t *testing.T) {
	dir := t.TempDir()
	drv := func(c string) string { return strings.Repeat(c, 32) + "-x.drv" }
	if err := os.MkdirAll(filepath.Join(dir, "drvs", "00"), 0o755); err != nil {
		t.Fatal(err)
	}
	for _, f := range []string{"drvs/00/" + drv("0")[2:] + ".bz2", "drvs/" + drv("1"), "drvs/00/" + drv("2")[2:]} {
		write(t, filepath.Join(dir, f), 100, 0o644)
	}
	logs := opened(t, dir)
	for _, want := range []int{2, 0} {
		r, err := Logs(t.Context(), logs, []string{drv("0"), drv("1"), drv("9"), "../../etc/passwd", "x.drv", strings.Repeat("2", 32) + "-x"})
		if err != nil || r.Files != want {
			t.Errorf("%+v, %v", r, err)
		}
	}
	if _, err := os.Stat(filepath.Join(dir, "drvs/00", drv("2")[2:])); err != nil {
		t.Error(err)
	}
}
