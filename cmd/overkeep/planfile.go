package main

import (
	"bytes"
	"crypto/rand"
	"errors"
	"fmt"
	"io"
	"os"
	"path/filepath"

	"github.com/moby/sys/mountinfo"
	"golang.org/x/sys/unix"

	"overkeep/overlay/gcroot"
	"overkeep/overlay/layout"
	"overkeep/overlay/plan"
	"overkeep/overlay/view"
	"overkeep/systemd/keep"
)

// planKey is the file in the keep's journal that authenticates plans.
const planKey = "plan.key"

// planKeyOf reads the key, or makes it. Without create a missing one is nil: no plan
// was ever written.
func planKeyOf(k layout.Keep, create bool) ([]byte, error) {
	file := filepath.Join(k.Journal(), planKey)
	key, err := readKey(file)
	if !errors.Is(err, os.ErrNotExist) || !create {
		if errors.Is(err, os.ErrNotExist) {
			return nil, nil
		}
		return key, err
	}
	if err := os.Mkdir(k.Journal(), 0o700); err != nil && !errors.Is(err, os.ErrExist) {
		return nil, err
	}
	dir, err := os.OpenFile(k.Journal(), os.O_RDONLY|unix.O_DIRECTORY|unix.O_NOFOLLOW, 0)
	if err != nil {
		return nil, err
	}
	defer dir.Close()
	// Whole or not there: the file has no name until it is on disk (open(2), O_TMPFILE).
	f, err := os.OpenFile(k.Journal(), os.O_RDWR|unix.O_TMPFILE, 0o600)
	if err != nil {
		return nil, err
	}
	defer f.Close()
	key = make([]byte, plan.KeySize)
	rand.Read(key)
	if _, err := f.Write(key); err != nil {
		return nil, err
	}
	if err := f.Sync(); err != nil {
		return nil, err
	}
	err = unix.Linkat(unix.AT_FDCWD, fmt.Sprintf("/proc/self/fd/%d", f.Fd()), int(dir.Fd()), planKey, unix.AT_SYMLINK_FOLLOW)
	if errors.Is(err, os.ErrExist) { // another command was first
		return readKey(file)
	}
	if err != nil {
		return nil, &os.PathError{Op: "link", Path: file, Err: err}
	}
	return key, dir.Sync()
}

// readKey refuses a key that another user could have written: it would vouch for that
// user's plans.
func readKey(file string) ([]byte, error) {
	f, err := os.OpenFile(file, os.O_RDONLY|unix.O_NOFOLLOW|unix.O_NONBLOCK, 0)
	if err != nil {
		return nil, err
	}
	defer f.Close()
	var st unix.Stat_t
	if err := unix.Fstat(int(f.Fd()), &st); err != nil {
		return nil, err
	}
	if st.Mode&unix.S_IFMT != unix.S_IFREG || st.Uid != 0 || st.Mode&0o077 != 0 || st.Size != plan.KeySize {
		return nil, &keep.Error{Code: keep.CodeTampered, Message: fmt.Sprintf("%q is no key of root's: mode %o, uid %d, %d bytes", file, st.Mode, st.Uid, st.Size)}
	}
	key := make([]byte, plan.KeySize)
	_, err = io.ReadFull(f, key)
	return key, err
}

// readPlan reads a file that is to be a plan; what it is decodePlan says. It is opened
// with the user's rights, or root's if it is root's own.
func (p *planner) readPlan(file string) ([]byte, error) {
	read := func() ([]byte, error) {
		f, err := os.OpenFile(file, os.O_RDONLY|unix.O_NONBLOCK, 0) // a pipe must not hang it
		if err != nil {
			return nil, err
		}
		defer f.Close()
		if st, err := f.Stat(); err != nil || !st.Mode().IsRegular() {
			return nil, errors.Join(err, &plan.FileError{Err: plan.ErrNotPlan, Text: fmt.Sprintf("%q is no regular file", file)})
		}
		return io.ReadAll(io.LimitReader(f, plan.MaxFile+1))
	}
	var b []byte
	err := gcroot.AsUser(p.user, func() (err error) { b, err = read(); return err })
	if errors.Is(err, os.ErrPermission) {
		b, err = read()
	}
	if errors.Is(err, os.ErrNotExist) {
		return nil, usagef("there is no plan %q", file)
	}
	return b, err
}

// decodePlan reads a plan for this machine and keep. Errors: *plan.FileError.
func (p *planner) decodePlan(b []byte) (*plan.Plan, error) {
	key, err := planKeyOf(p.keep.Keep, false)
	if err != nil {
		return nil, err
	}
	m, err := machine()
	if err != nil {
		return nil, err
	}
	return plan.Decode(b, key, plan.Expect{Machine: m, KeepID: p.keep.Header.ID})
}

// writePlan writes a plan into a file inside the keep, as the keep's user.
func (p *planner) writePlan(file string, out *plan.Plan) error {
	abs, err := filepath.Abs(file)
	if err != nil {
		return err
	}
	key, err := planKeyOf(p.keep.Keep, true)
	if err != nil {
		return err
	}
	b := plan.Encode(out, key)
	if len(b) > plan.MaxFile {
		return usagef("the plan is larger than %s: leave --out away, and let apply make it", formatSize(plan.MaxFile))
	}
	return gcroot.AsUser(p.user, func() error { return p.writeInside(abs, b) })
}

// writeInside writes with the rights of the thread. Everything happens by descriptors,
// so that what was found to lie in the keep is what is written to.
func (p *planner) writeInside(abs string, b []byte) error {
	parent, name := filepath.Split(abs)
	dir, err := os.OpenFile(parent, os.O_RDONLY|unix.O_DIRECTORY, 0)
	if err != nil {
		return usagef("--out %s: %v", quoteWord(abs), err)
	}
	defer dir.Close()
	inside, err := insideKeep(p.keep.Keep, dir)
	if err != nil {
		return err
	}
	if !inside {
		return usagef("--out %s lies outside of the keep, and a plan names private paths: %s does not", quoteWord(abs), quoteWord(p.suggestOut(name)))
	}
	if err := replaceable(dir, name); err != nil {
		return err
	}
	// A file without a name (O_TMPFILE) could only be linked with rights that this thread
	// has not; after a kill the other one lies in the keep.
	temp := ".overkeep-" + rand.Text()
	fd, err := unix.Openat(int(dir.Fd()), temp, unix.O_WRONLY|unix.O_CREAT|unix.O_EXCL|unix.O_NOFOLLOW|unix.O_CLOEXEC, 0o600)
	if err != nil {
		return &os.PathError{Op: "create", Path: abs, Err: err}
	}
	f := os.NewFile(uintptr(fd), abs)
	_, err = f.Write(b)
	if err == nil {
		err = f.Sync()
	}
	if err = errors.Join(err, f.Close()); err == nil {
		err = unix.Renameat(int(dir.Fd()), temp, int(dir.Fd()), name)
	}
	if err != nil {
		_ = unix.Unlinkat(int(dir.Fd()), temp, 0)
		return err
	}
	return dir.Sync()
}

// suggestOut is a place for a plan in the keep.
func (p *planner) suggestOut(name string) string {
	dir := p.keep.Volume() + "/home/work"
	if w := p.keep.Header.WorkDir; w != "" {
		dir = filepath.Join(p.user.Home, w)
	}
	return filepath.Join(dir, name)
}

// replaceable: nothing, or an older plan.
func replaceable(dir *os.File, name string) error {
	fd, err := unix.Openat(int(dir.Fd()), name, unix.O_RDONLY|unix.O_NOFOLLOW|unix.O_NONBLOCK|unix.O_CLOEXEC, 0)
	if errors.Is(err, unix.ENOENT) {
		return nil
	}
	if err == nil {
		f := os.NewFile(uintptr(fd), name)
		defer f.Close()
		head := []byte(`{"plan":{`)
		have := make([]byte, len(head))
		if _, err := io.ReadFull(f, have); err == nil && bytes.Equal(have, head) {
			return nil
		}
	}
	return &keep.Error{Code: keep.CodeKeepExists, Name: name, Message: fmt.Sprintf("%q exists and is no plan; it was not overwritten", name)}
}

// insideKeep reports whether a directory lies in the keep's volume: in a mount of it,
// or of a part of it. That holds for both back-ends: the volume of the one is a file
// system of its own, of the other a directory of the machine's that is encrypted.
func insideKeep(k layout.Keep, dir *os.File) (bool, error) {
	var st unix.Statx_t
	if err := unix.Statx(int(dir.Fd()), "", unix.AT_EMPTY_PATH, unix.STATX_MNT_ID, &st); err != nil {
		return false, &os.PathError{Op: "statx", Path: dir.Name(), Err: err}
	}
	if st.Mask&unix.STATX_MNT_ID == 0 { // before Linux 5.8
		return false, &keep.Error{Code: keep.CodeUnsupported, Message: "this kernel does not tell which mount a file lies in (Linux 5.8)"}
	}
	f, err := os.Open("/proc/thread-self/mountinfo")
	if err != nil {
		return false, err
	}
	defer f.Close()
	t, err := mountinfo.GetMountsFromReader(f, nil)
	if err != nil {
		return false, err
	}
	return insideVolume(view.Table(t), k.Volume(), int(st.Mnt_id)), nil
}

// insideVolume is insideKeep over a mount table.
func insideVolume(t view.Table, volume string, mount int) bool {
	var k, at *mountinfo.Info
	for _, i := range t {
		if i.Mountpoint == volume {
			k = i // the topmost
		}
		if i.ID == mount {
			at = i
		}
	}
	if k == nil || at == nil || k.Major != at.Major || k.Minor != at.Minor {
		return false
	}
	rest, err := filepath.Rel(k.Root, at.Root)
	return err == nil && filepath.IsLocal(rest)
}
