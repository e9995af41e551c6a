// Package proof looks for a keep's plaintext in a machine, from outside and
// with nothing of overkeep: through the roots and descriptors of all processes,
// the mount tables, the loop devices, the kernel's key status, and the names in
// the encrypted directory.
//
// Start with Gather while the keep is unlocked; Locked then finds fault with a
// keep that is not locked, and Readable with one that is.
//
//	e := proof.Gather(t, m, "alice", "/home/alice/keep/secret")
//	... lock ...
//	e.Locked(t)
//
// It sees what is there at the moment, not what was written to the disk: for
// that is bed.Machine.Search.
package proof

import (
	"encoding/hex"
	"encoding/json"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"testing"
	"time"
	"unsafe"

	"golang.org/x/sys/unix"

	"overkeep/tests/bed"
)

// Evidence is what is known of an unlocked keep, by which it will be recognised.
type Evidence struct {
	m     *bed.Machine
	name  string
	paths []string        // plaintext files, absolute in the view
	names []string        // plaintext names in the encrypted directory; none with --on-image
	devs  map[uint64]bool // st_dev that belong to the keep as a whole
	view  int             // a process in the view
}

// Root is the view's root directory, as long as the process through which it was
// found lives.
func (e *Evidence) Root() string { return fmt.Sprintf("/proc/%d/root", e.view) }

// Gather notes how the keep shows while it is unlocked. paths are files of the
// keep, as the view has them; they must be regular files or directories, seen
// through no symbolic link.
func Gather(t testing.TB, m *bed.Machine, name string, paths ...string) *Evidence {
	t.Helper()
	e := &Evidence{m: m, name: name, devs: map[uint64]bool{}}
	run := "/run/overkeep/" + name
	e.paths = append([]string{run + "/k/keep.json", run + "/k/store/upper", run + "/k/nix"}, paths...)
	for _, p := range Processes(t, m) {
		if _, err := os.Lstat(p.Root() + run + "/k/keep.json"); err == nil {
			e.view = p.PID
			break
		}
	}
	if e.view == 0 {
		t.Fatalf("proof: no process of the machine sees keep %q: it is not unlocked", name)
	}
	for _, p := range e.paths {
		if _, err := os.Lstat(e.Root() + p); err != nil {
			t.Fatalf("proof: %s is not in the view: %v", p, err)
		}
	}
	disk := device(t, m.Root)
	for _, p := range []string{run + "/k", run + "/fs", "/nix/store"} {
		if d := device(t, e.Root()+p); d != disk && d != device(t, m.Root+"/run") {
			e.devs[d] = true
		}
	}
	if entries, err := os.ReadDir(e.volume()); err == nil {
		for _, x := range entries {
			e.names = append(e.names, x.Name())
		}
		if len(e.names) == 0 {
			t.Fatalf("proof: nothing in %q", e.volume())
		}
	}
	return e
}

// volume is the encrypted directory as the host sees it.
func (e *Evidence) volume() string { return e.m.Root + "/var/lib/overkeep/" + e.name + "/volume" }

func device(t testing.TB, path string) uint64 {
	t.Helper()
	var st unix.Stat_t
	if err := unix.Stat(path, &st); err != nil {
		t.Fatalf("proof: stat %s: %v", path, err)
	}
	return st.Dev
}

// Process is one process of the machine.
type Process struct {
	PID    int // as seen from outside
	Inside int // as its own machine knows it
	Parent int // as seen from outside
	Name   string
	State  string // one letter, proc_pid_status(5): "T" is stopped
}

// Root is the process's root directory.
func (p Process) Root() string { return fmt.Sprintf("/proc/%d/root", p.PID) }

func (p Process) String() string { return fmt.Sprintf("%d (%s)", p.Inside, p.Name) }

// Processes lists the processes of the machine, zombies left out.
func Processes(t testing.TB, m *bed.Machine) []Process {
	t.Helper()
	want, err := os.Readlink(fmt.Sprintf("/proc/%d/ns/pid", m.PID()))
	if err != nil {
		t.Fatalf("proof: %v", err)
	}
	entries, err := os.ReadDir("/proc")
	if err != nil {
		t.Fatalf("proof: %v", err)
	}
	var out []Process
	for _, x := range entries {
		pid, err := strconv.Atoi(x.Name())
		if err != nil {
			continue
		}
		// A build sandbox has a pid namespace of its own below the machine's.
		if ns, err := os.Readlink(fmt.Sprintf("/proc/%d/ns/pid", pid)); err != nil || ns != want && !below(pid, want) {
			continue
		}
		b, err := os.ReadFile(fmt.Sprintf("/proc/%d/status", pid))
		if err != nil {
			continue
		}
		p := Process{PID: pid}
		for line := range strings.Lines(string(b)) {
			k, v, _ := strings.Cut(strings.TrimSpace(line), ":\t")
			switch k {
			case "Name":
				p.Name = v
			case "PPid":
				p.Parent, _ = strconv.Atoi(v)
			case "State":
				p.State = v[:1]
			case "NSpid":
				if f := strings.Fields(v); len(f) > 1 {
					p.Inside, _ = strconv.Atoi(f[1])
				}
			}
		}
		if p.State != "Z" && p.State != "X" {
			out = append(out, p)
		}
	}
	return out
}

// below tells whether the pid namespace of process pid has want as an ancestor.
func below(pid int, want string) bool {
	f, err := os.Open(fmt.Sprintf("/proc/%d/ns/pid", pid))
	for err == nil {
		var fd int
		fd, err = unix.IoctlRetInt(int(f.Fd()), unix.NS_GET_PARENT)
		f.Close()
		if err != nil {
			return false
		}
		f = os.NewFile(uintptr(fd), "ns")
		var st unix.Stat_t
		if unix.Fstat(fd, &st) == nil && want == fmt.Sprintf("pid:[%d]", st.Ino) {
			f.Close()
			return true
		}
	}
	return false
}

// Outside turns a pid that the machine knows into one of ours; 0 if there is none.
func Outside(t testing.TB, m *bed.Machine, inside int) int {
	t.Helper()
	for _, p := range Processes(t, m) {
		if p.Inside == inside {
			return p.PID
		}
	}
	return 0
}

// Locked fails the test for everything by which the keep could still be read.
func (e *Evidence) Locked(t testing.TB) {
	t.Helper()
	for _, s := range e.reach(t) {
		t.Errorf("locked, but %s", s)
	}
	if e.onDisk() {
		if st := e.KeyStatus(t); st != unix.FSCRYPT_KEY_STATUS_ABSENT {
			t.Errorf("locked, but the kernel's key status is %d, not absent (%d)", st, unix.FSCRYPT_KEY_STATUS_ABSENT)
		}
		e.ciphertext(t)
	}
	if l := Loops(t, e.m); len(l) > 0 {
		t.Errorf("locked, but there are loop devices on the machine's disk: %v", l)
	}
}

// Readable fails the test unless the keep's paths can be read through some
// process: a keep that is said to be not locked must be so for a reason.
func (e *Evidence) Readable(t testing.TB) {
	t.Helper()
	if len(e.reach(t)) == 0 {
		t.Error("not locked, but nobody can reach anything of the keep")
	}
}

func (e *Evidence) onDisk() bool {
	_, err := os.Lstat(e.volume())
	return err == nil
}

// reach says through what something of the keep can be reached.
func (e *Evidence) reach(t testing.TB) []string {
	t.Helper()
	var out []string
	for _, p := range Processes(t, e.m) {
		for _, path := range e.paths {
			if _, err := os.Lstat(p.Root() + path); err == nil {
				out = append(out, fmt.Sprintf("%s is there for process %s", path, p))
			}
		}
		out = append(out, e.open(p)...)
		out = append(out, e.mounts(p)...)
	}
	return out
}

// open says which files of the keep a process has open or mapped, runs, or
// stands in. Of the whole machine nothing but the keep is encrypted.
func (e *Evidence) open(p Process) []string {
	dir := fmt.Sprintf("/proc/%d/", p.PID)
	links := []string{"cwd", "root", "exe"}
	for _, d := range []string{"fd", "map_files"} {
		entries, _ := os.ReadDir(dir + d)
		for _, x := range entries {
			links = append(links, d+"/"+x.Name())
		}
	}
	var out []string
	for _, l := range links {
		var st unix.Statx_t
		if unix.Statx(unix.AT_FDCWD, dir+l, 0, unix.STATX_BASIC_STATS, &st) != nil {
			continue
		}
		dev := unix.Mkdev(st.Dev_major, st.Dev_minor)
		if e.devs[dev] || st.Attributes&unix.STATX_ATTR_ENCRYPTED != 0 {
			to, _ := os.Readlink(dir + l)
			out = append(out, fmt.Sprintf("process %s holds %s by its %s", p, to, l))
		}
	}
	return out
}

// mounts says which mounts of the keep are in the process's mount namespace.
func (e *Evidence) mounts(p Process) []string {
	b, err := os.ReadFile(fmt.Sprintf("/proc/%d/mountinfo", p.PID))
	if err != nil {
		return nil
	}
	var out []string
	for line := range strings.Lines(string(b)) {
		f := strings.Fields(line)
		if len(f) < 6 {
			continue
		}
		major, minor, _ := strings.Cut(f[2], ":")
		ma, _ := strconv.ParseUint(major, 10, 32)
		mi, _ := strconv.ParseUint(minor, 10, 32)
		if e.devs[unix.Mkdev(uint32(ma), uint32(mi))] || strings.Contains(f[3], "/var/lib/overkeep/"+e.name+"/volume") {
			out = append(out, fmt.Sprintf("process %s has %s mounted at %s", p, f[3], f[4]))
		}
	}
	return out
}

// KeyStatus asks the kernel for the key of the encrypted directory (ioctl
// FS_IOC_GET_ENCRYPTION_KEY_STATUS, fscrypt.rst), by what set.json says.
func (e *Evidence) KeyStatus(t testing.TB) uint32 {
	t.Helper()
	dir := e.m.Root + "/var/lib/overkeep/" + e.name
	b, err := os.ReadFile(dir + "/slots/set.json")
	var set struct{ Policy string }
	if err == nil {
		err = json.Unmarshal(b, &set)
	}
	id, herr := hex.DecodeString(set.Policy)
	if err != nil || herr != nil || len(id) != unix.FSCRYPT_KEY_IDENTIFIER_SIZE {
		t.Fatalf("proof: no policy in set.json: %v, %q", errors.Join(err, herr), set.Policy)
	}
	f, err := os.Open(dir)
	if err != nil {
		t.Fatalf("proof: %v", err)
	}
	defer f.Close()
	var arg unix.FscryptGetKeyStatusArg
	arg.Key_spec.Type = unix.FSCRYPT_KEY_SPEC_TYPE_IDENTIFIER
	copy(arg.Key_spec.U[:], id)
	if _, _, errno := unix.Syscall(unix.SYS_IOCTL, f.Fd(), unix.FS_IOC_GET_ENCRYPTION_KEY_STATUS, uintptr(unsafe.Pointer(&arg))); errno != 0 {
		t.Fatalf("proof: FS_IOC_GET_ENCRYPTION_KEY_STATUS: %v", errno)
	}
	return arg.Status
}

// ciphertext sees that the directory has as many names as before, none of them
// one of those, and that no file in it can be opened.
func (e *Evidence) ciphertext(t testing.TB) {
	t.Helper()
	entries, err := os.ReadDir(e.volume())
	if err != nil {
		t.Errorf("locked, but the encrypted directory: %v", err)
		return
	}
	if len(entries) == 0 {
		t.Error("the encrypted directory is empty")
	}
	for _, x := range entries {
		if slices.Contains(e.names, x.Name()) {
			t.Errorf("locked, but the encrypted directory shows the name %q", x.Name())
		}
		if x.Type().IsRegular() {
			f, err := os.Open(filepath.Join(e.volume(), x.Name()))
			if err == nil {
				f.Close()
			}
			if !errors.Is(err, unix.ENOKEY) {
				t.Errorf("locked, but opening %q gives %v", x.Name(), err)
			}
		}
	}
}

// Loops lists the loop devices whose data lies on the machine's disk, at any
// depth: "/dev/loopN of FILE".
func Loops(t testing.TB, m *bed.Machine) []string {
	t.Helper()
	var st unix.Stat_t
	if err := unix.Stat(m.Device, &st); err != nil {
		t.Fatalf("proof: %v", err)
	}
	on := map[uint64]bool{st.Rdev: true}
	found := map[string]string{}
	for grown := true; grown; {
		grown = false
		files, _ := filepath.Glob("/sys/block/loop*/loop/backing_file")
		for _, file := range files {
			dev := "/dev/" + strings.Split(file, "/")[3] // the machine has a node for every one
			if found[dev] != "" {
				continue
			}
			f, err := os.OpenFile(m.Root+dev, os.O_RDONLY|unix.O_NONBLOCK, 0)
			if err != nil {
				if !errors.Is(err, fs.ErrNotExist) && !errors.Is(err, unix.ENXIO) {
					t.Fatalf("proof: %v", err)
				}
				continue
			}
			info, err := unix.IoctlLoopGetStatus64(int(f.Fd()))
			serr := unix.Fstat(int(f.Fd()), &st)
			f.Close()
			if err != nil || serr != nil || !on[info.Device] {
				continue
			}
			name, _ := os.ReadFile(file)
			found[dev], on[st.Rdev], grown = strings.TrimSpace(string(name)), true, true
		}
	}
	var out []string
	for dev, name := range found {
		out = append(out, dev+" of "+name)
	}
	slices.Sort(out)
	return out
}

// patience ends a hang; nothing is measured by it.
const patience = 60 * time.Second

// Await polls until done, which says what is still missing, returns "". It is
// for what the kernel or a daemon does in its own time and tells nobody.
func Await(t testing.TB, done func() string) {
	t.Helper()
	for start := time.Now(); ; time.Sleep(2 * time.Millisecond) {
		missing := done()
		if missing == "" {
			return
		}
		if time.Since(start) > patience {
			t.Fatalf("waited %v: %s", patience, missing)
		}
	}
}
