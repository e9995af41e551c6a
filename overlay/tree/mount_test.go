package tree

import (
	"bytes"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"runtime"
	"strings"
	"testing"

	"golang.org/x/sys/unix"

	"overkeep/tests/need"
)

// elsewhere runs f in a mount namespace of its own, which ends with f.
func elsewhere(t *testing.T, f func()) {
	t.Helper()
	need.Root(t)
	done := make(chan struct{})
	go func() {
		defer close(done)
		runtime.LockOSThread() // never unlocked: the thread ends with its namespace
		must(t, unix.Unshare(unix.CLONE_FS|unix.CLONE_NEWNS))
		must(t, unix.Mount("", "/", "", unix.MS_REC|unix.MS_PRIVATE, ""))
		f()
	}()
	<-done
}

// A mount point in a tree is neither read nor emptied, also one of the same file system.
func TestMounts(t *testing.T) {
	for _, c := range []struct {
		what  string
		file  bool
		mount func(p, other string) error
	}{
		{"another file system", false, func(p, _ string) error { return unix.Mount("tmpfs", p+"/d", "tmpfs", 0, "") }},
		{"a directory of the same one", false, func(p, other string) error { return unix.Mount(other, p+"/d", "", unix.MS_BIND, "") }},
		{"a file of the same one", true, func(p, other string) error { return unix.Mount(other+"/f", p+"/f", "", unix.MS_BIND, "") }},
		{"the root", false, func(p, other string) error { return unix.Mount(other, p, "", unix.MS_BIND, "") }},
	} {
		from, other := t.TempDir(), t.TempDir()
		p := filepath.Join(from, "p")
		must(t, os.MkdirAll(p+"/d", 0o755))
		write(t, p+"/f", []byte("f"), 0o644)
		write(t, other+"/f", []byte("of another"), 0o644)
		_, dst := dir(t)
		elsewhere(t, func() {
			must(t, c.mount(p, other))
			src, err := os.Open(from)
			must(t, err)
			defer src.Close()
			_, err1 := Copy(t.Context(), src, "p", dst, "q", us())
			_, err2 := Hash(t.Context(), src, "p", us())
			_, err3 := Usage(t.Context(), src, "p", 4096)
			err4 := Remove(t.Context(), src, "p")
			for i, err := range []error{err1, err2, err3, err4} {
				if !errors.Is(err, ErrMount) && !(i == 2 && c.file) { // Usage opens no small file
					t.Errorf("%s, call %d: %v", c.what, i, err)
				}
			}
		})
		must(t, Remove(t.Context(), dst, "q"))
		if b, err := os.ReadFile(other + "/f"); err != nil || string(b) != "of another" {
			t.Errorf("%s: %q, %v", c.what, b, err)
		}
	}
}

// A full target ends everything, with an error that says which side it was.
func TestFull(t *testing.T) {
	from, src := dir(t)
	must(t, os.Mkdir(filepath.Join(from, "p"), 0o755))
	write(t, filepath.Join(from, "p/a"), random(2<<20, 1), 0o644)
	for i := range 100 {
		write(t, fmt.Sprintf("%s/p/f%d", from, i), []byte("f"), 0o644)
	}
	sum, err := Hash(t.Context(), src, "p", us())
	must(t, err)
	for _, size := range []string{"size=1m", "size=8m,nr_inodes=50"} {
		to := t.TempDir()
		elsewhere(t, func() {
			must(t, unix.Mount("tmpfs", to, "tmpfs", 0, size))
			dst, err := os.Open(to)
			must(t, err)
			defer dst.Close()
			room, err := Room(dst)
			must(t, err)
			u, err := Usage(t.Context(), src, "p", room.BlockSize)
			must(t, err)
			if u.Blocks <= room.Blocks && u.Inodes <= room.Inodes {
				t.Errorf("%s: %+v would fit in %+v", size, u, room)
			}
			var jobs []Job
			for _, to := range []string{"q", "r", "s", "t", "u"} {
				jobs = append(jobs, Job{Name: "p", NewName: to, Want: sum.NarHash})
			}
			begun := 0
			err = CopyAll(t.Context(), src, dst, jobs, us(), func(int, Result, error) { begun++ })
			var e *Error
			if !errors.Is(err, unix.ENOSPC) || !errors.As(err, &e) || !e.Target || begun == len(jobs) {
				t.Errorf("%s: %v, %d jobs begun", size, err, begun)
			}
			var nar bytes.Buffer
			_, err = Dump(t.Context(), &nar, src, "p", us())
			must(t, err)
			for _, j := range jobs {
				must(t, Remove(t.Context(), dst, j.NewName))
			}
			if _, err := Restore(t.Context(), &nar, dst, "q", us()); !errors.Is(err, unix.ENOSPC) {
				t.Errorf("%s: restored: %v", size, err)
			}
			must(t, Remove(t.Context(), dst, "q"))
			if left, err := Room(dst); err != nil || left != room {
				t.Errorf("%s: %+v is left of %+v, %v", size, left, room, err)
			}
		})
	}
}

// The form of a copy does not depend on the umask.
func TestUmask(t *testing.T) {
	from, src := dir(t)
	to, dst := dir(t)
	nasty(t, filepath.Join(from, "p"))
	for _, mask := range []int{0, 0o277} {
		was := unix.Umask(mask)
		_, err := Copy(t.Context(), src, "p", dst, "q", us())
		unix.Umask(was)
		must(t, err)
		canonical(t, filepath.Join(to, "q"))
		must(t, Remove(t.Context(), dst, "q"))
	}
}

// Nor on what the target directory gives to what is made in it.
func TestTarget(t *testing.T) {
	need.Root(t)
	from, src := dir(t)
	nasty(t, filepath.Join(from, "p"))
	to, dst := dir(t)
	must(t, os.Chown(to, 0, 12345))
	must(t, os.Chmod(to, os.ModeSetgid|0o775))
	var err error
	for _, name := range []string{"q", "file", "link"} {
		if name == "q" {
			_, err = Copy(t.Context(), src, "p", dst, name, us())
		} else {
			one := map[string]string{"file": "exec", "link": "self"}[name]
			in, err2 := os.Open(filepath.Join(from, "p"))
			must(t, err2)
			_, err = Copy(t.Context(), in, one, dst, name, us())
			must(t, in.Close())
		}
		must(t, err)
		canonical(t, filepath.Join(to, name))
	}
	owned, err := Copy(t.Context(), src, "p", dst, "other", Options{UID: 1234, GID: 2345})
	must(t, err)
	if owned.Files == 0 {
		t.Errorf("%+v", owned)
	}
	must(t, exec(filepath.Join(to, "other"), func(p string, _ os.DirEntry) error {
		var st unix.Stat_t
		must(t, unix.Lstat(p, &st))
		if st.Uid != 1234 || st.Gid != 2345 || st.Mode&(unix.S_ISGID|unix.S_ISUID) != 0 {
			t.Errorf("%q: owner %d:%d, mode %o", p, st.Uid, st.Gid, st.Mode)
		}
		return nil
	}))

	// A default ACL would be inherited by everything.
	acl := []byte{2, 0, 0, 0, // version; then tag, permissions and id of owner, group and others
		1, 0, 7, 0, 255, 255, 255, 255, 4, 0, 7, 0, 255, 255, 255, 255, 32, 0, 7, 0, 255, 255, 255, 255}
	err = unix.Setxattr(to, "system.posix_acl_default", acl, 0)
	if errors.Is(err, unix.EOPNOTSUPP) {
		return
	}
	must(t, err)
	if _, err := Copy(t.Context(), src, "p", dst, "acl", us()); !errors.Is(err, ErrACL) {
		t.Errorf("%v", err)
	}
}

// What a killed Copy or Remove leaves, another Remove takes away, whatever the modes.
func TestRemoveAnything(t *testing.T) {
	from, src := dir(t)
	other := filepath.Join(from, "other")
	must(t, os.Mkdir(other, 0o755))
	write(t, filepath.Join(other, "kept"), []byte("x"), 0o444)
	in := filepath.Join(from, "p")
	must(t, os.MkdirAll(filepath.Join(in, strings.Repeat("d/", window+3)), 0o755))
	must(t, os.Symlink("../other", filepath.Join(in, "d/link")))
	must(t, os.Symlink(other, filepath.Join(in, "d/d/link")))
	must(t, os.Link(filepath.Join(other, "kept"), filepath.Join(in, "d/hard")))
	write(t, filepath.Join(in, "d/d/d/f"), nil, 0)
	must(t, exec(in, func(p string, d os.DirEntry) error {
		if d.IsDir() {
			return os.Chmod(p, 0o555)
		}
		return nil
	}))
	must(t, Remove(t.Context(), src, "p"))
	must(t, Remove(t.Context(), src, "p"))
	must(t, os.Symlink("other", in))
	must(t, Remove(t.Context(), src, "p"))
	left, err := os.ReadDir(from)
	if err != nil || len(left) != 1 {
		t.Errorf("%v %v", left, err)
	}
	if b, err := os.ReadFile(filepath.Join(other, "kept")); err != nil || string(b) != "x" {
		t.Errorf("%q, %v", b, err)
	}
}
