package holder

import (
	"bufio"
	"cmp"
	"context"
	"errors"
	"fmt"
	"hash/maphash"
	"os"
	"runtime"
	"slices"
	"strconv"
	"strings"
	"sync"

	"golang.org/x/sys/unix"
)

// Scan names whatever holds t, processes by rising id and kernel objects first.
// Processes for which skip says true are passed over; nil skips none. The
// calling process is looked at like any other.
//
// What cannot be looked at is reported by *IncompleteError, together with the
// holders that were found. Another error, such as the context's, comes with none.
func Scan(ctx context.Context, t Target, skip func(pid int) bool) ([]Holder, error) {
	s, err := newScanner(t, skip, false)
	if err != nil {
		return nil, err
	}
	defer s.close()
	if err := s.run(ctx); err != nil {
		return nil, err
	}
	return s.found(), s.incomplete()
}

// scanner is one scan. What is below the mutex is shared by its workers.
type scanner struct {
	target Target
	skip   func(int) bool
	proc   *os.File
	nsfs   uint64 // st_dev of namespace files
	anon   uint64 // st_dev of inotify, io_uring and their like
	own    uint64 // mount namespaces: the caller's and that of process 1
	host   uint64
	old    bool // the kernel's maps show inodes below an overlay, see oldMaps
	text   bool // read maps as text even if the kernel can be asked for what counts
	only   bool // look for namespaces, not for holders

	match   *matcher
	sockets map[uint64]bound
	swaps   []string

	mu      sync.Mutex
	survey  *survey
	spaces  map[uint64]*spaceUse
	memo    map[memoKey]bool
	seed    maphash.Seed
	fsids   map[uint64]bool // by mount id: an overlay of ours
	holders []Holder
	missed  IncompleteError
}

// spaceUse is a known mount namespace and who keeps it alive.
type spaceUse struct {
	points []string // mount points of ours in it; nil when there are none
	pids   []int
}

type memoKey struct {
	file FileID
	path uint64
}

func newScanner(t Target, skip func(int) bool, only bool) (*scanner, error) {
	proc, err := openProc()
	if err != nil {
		return nil, err
	}
	s := &scanner{target: t, skip: skip, only: only, proc: proc, old: oldMaps(),
		sockets: map[uint64]bound{}, spaces: map[uint64]*spaceUse{}, memo: map[memoKey]bool{},
		seed: maphash.MakeSeed(), fsids: map[uint64]bool{}}
	if s.skip == nil {
		s.skip = func(int) bool { return false }
	}
	s.text = s.old // the path is needed to tell mappings apart
	self, err := lookAt(int(proc.Fd()), "thread-self/ns/mnt")
	if err != nil {
		proc.Close()
		return nil, fmt.Errorf("look at the caller's mount namespace: %w", err)
	}
	s.nsfs, s.own = self.dev, self.ino
	if o, err := lookAt(int(proc.Fd()), "1/ns/mnt"); err == nil {
		s.host = o.ino
	}
	if fd, err := unix.Eventfd(0, unix.EFD_CLOEXEC); err == nil {
		f := os.NewFile(uintptr(fd), "eventfd")
		if o, err := lookAtFile(f); err == nil {
			s.anon = o.dev
		}
		f.Close()
	}
	s.survey = &survey{target: &s.target, proc: int(proc.Fd()), nsfs: s.nsfs, keep: only,
		spaces: map[uint64]*space{}, files: map[uint64]*os.File{}, pins: map[pin]int{}}
	return s, nil
}

func (s *scanner) close() {
	s.survey.close()
	s.proc.Close()
}

// oldMaps tells whether /proc/PID/maps may show the device and inode below an
// overlay instead of the overlay's. Newer kernels show the overlay's own
// (file_user_inode in fs/proc/task_mmu.c); the exact version does not matter
// here, being wrong only costs a look at every mapped file.
func oldMaps() bool {
	var u unix.Utsname
	if unix.Uname(&u) != nil {
		return true
	}
	var major, minor int
	_, _ = fmt.Sscanf(unix.ByteSliceToString(u.Release[:]), "%d.%d", &major, &minor)
	return major < 6 || major == 6 && minor < 12
}

// run looks at the whole system once.
func (s *scanner) run(ctx context.Context) error {
	pids, err := processes(int(s.proc.Fd()))
	if err != nil {
		return fmt.Errorf("list processes: %w", err)
	}
	s.prepare(pids)
	self := os.Getpid()
	work := make(chan int)
	var group sync.WaitGroup
	for range min(4, runtime.GOMAXPROCS(0)) {
		group.Go(func() {
			w := newWorker(s)
			for pid := range work {
				w.process(pid)
			}
		})
	}
	for _, pid := range pids {
		if ctx.Err() != nil {
			break
		}
		if pid != self && !s.skip(pid) {
			work <- pid
		}
	}
	close(work)
	group.Wait()
	// The caller comes last, when the scan itself has nothing open any more.
	if ctx.Err() == nil && !s.skip(self) {
		newWorker(s).process(self)
	}
	return context.Cause(ctx)
}

// prepare reads what matching needs: the mount tables of all namespaces that
// processes live in, loop devices, swap files, bound sockets.
func (s *scanner) prepare(pids []int) {
	proc := int(s.proc.Fd())
	var spaces []*os.File
	nets := map[uint64]*os.File{}
	seen := map[uint64]bool{}
	dirs := []string{"thread-self"} // its namespace need not be the process's
	for _, pid := range pids {
		dirs = append(dirs, strconv.Itoa(pid))
	}
	handle := func(name string) *os.File {
		f, err := openAt(proc, name, unix.O_RDONLY)
		// A refusal is met again, and reported, when the process is looked at.
		if err != nil && !gone(err) && !errors.Is(err, os.ErrPermission) {
			s.missing("a namespace", err)
		}
		return f
	}
	for _, dir := range dirs {
		if o, err := lookAt(proc, dir+"/ns/mnt"); err == nil && !seen[o.ino] {
			if f := handle(dir + "/ns/mnt"); f != nil {
				spaces, seen[o.ino] = append(spaces, f), true
			}
		}
		if s.only {
			continue
		}
		if o, err := lookAt(proc, dir+"/ns/net"); err == nil && nets[o.ino] == nil {
			if f := handle(dir + "/ns/net"); f != nil {
				nets[o.ino] = f
			}
		}
	}
	s.survey.read(append(spaces, s.ownHandles()...))
	snap := snapshot{loops: loops()}
	for _, sp := range s.survey.spaces {
		snap.spaces = append(snap.spaces, *sp)
	}
	s.match = newMatcher(s.target, snap)
	for inode, sp := range s.survey.spaces {
		s.spaces[inode] = &spaceUse{points: s.match.points(sp)}
	}
	if s.only {
		return
	}
	if b, err := readAt(proc, "swaps", 1<<20); err == nil {
		s.swaps = parseSwaps(b)
	}
	s.readSockets(nets)
}

// ownHandles opens again the mount namespaces that the caller has open: a service
// holds its users' views that way, and they need no process.
func (s *scanner) ownHandles() []*os.File {
	fds, err := openAt(int(s.proc.Fd()), "self/fd", unix.O_RDONLY|unix.O_DIRECTORY)
	if err != nil {
		return nil // the walk will meet the same error, and report it
	}
	defer fds.Close()
	var out []*os.File
	_ = names(int(fds.Fd()), make([]byte, 4<<10), func(name string) {
		o, err := lookAt(int(fds.Fd()), name)
		if err != nil || o.dev != s.nsfs || len(out) >= maxSpaces {
			return
		}
		if f, err := openAt(int(fds.Fd()), name, unix.O_RDONLY); err == nil {
			out = append(out, f)
		}
	})
	return slices.DeleteFunc(out, func(f *os.File) bool {
		other := !isMountNamespace(f)
		if other {
			f.Close()
		}
		return other
	})
}

func (s *scanner) readSockets(nets map[uint64]*os.File) {
	want := func(f FileID) bool { return s.match.devices[f.Dev] || len(s.match.trees[f.Dev]) > 0 }
	err := onThread(func() error {
		for inode, f := range nets {
			err := unix.Setns(int(f.Fd()), unix.CLONE_NEWNET)
			if err == nil {
				err = boundSockets(want, s.sockets)
			}
			if err != nil {
				s.missing("sockets of network namespace "+strconv.FormatUint(inode, 10), err)
			}
		}
		return nil
	})
	for _, f := range nets {
		f.Close()
	}
	if err != nil {
		s.missing("sockets", err)
	}
}

// points returns where in sp mounts of ours are.
func (m *matcher) points(sp *space) []string {
	var out []string
	for _, mt := range sp.mounts {
		if m.mountOurs(mt) {
			out = append(out, mt.point)
		}
	}
	return out
}

// space returns what is known of mount namespace inode, reading it first when it
// is new. open may return nil: the namespace is gone, or is of another kind.
func (s *scanner) space(inode uint64, open func() *os.File) *spaceUse {
	s.mu.Lock()
	defer s.mu.Unlock()
	if u := s.spaces[inode]; u != nil {
		return u
	}
	u := &spaceUse{}
	if f := open(); f != nil {
		s.survey.read([]*os.File{f})
		for id, sp := range s.survey.spaces {
			if s.spaces[id] == nil {
				s.spaces[id] = &spaceUse{points: s.match.points(sp)}
			}
		}
	}
	if s.spaces[inode] == nil {
		s.spaces[inode] = u // no mount namespace, or unreadable: do not ask again
	}
	return s.spaces[inode]
}

// foreign tells whether living in, or pinning, namespace inode is a hold. The
// view is unmounted by the caller; in the namespace of the machine or of the
// caller itself a stray mount is no fault of the processes there.
func (s *scanner) foreign(inode uint64) bool {
	return inode != s.target.Namespace && inode != s.host && inode != s.own
}

func (s *scanner) missing(what string, err error) {
	s.mu.Lock()
	defer s.mu.Unlock()
	if len(s.missed.Other) < 16 {
		s.missed.Other = append(s.missed.Other, what)
	}
	if s.missed.Err == nil {
		s.missed.Err = err
	}
}

func (s *scanner) denied(pid int, err error) {
	s.mu.Lock()
	defer s.mu.Unlock()
	s.missed.Count++
	if len(s.missed.PIDs) < 32 {
		s.missed.PIDs = append(s.missed.PIDs, pid)
	}
	if s.missed.Err == nil {
		s.missed.Err = err
	}
}

// incomplete returns what was missed, nil if nothing was.
func (s *scanner) incomplete() error {
	e := s.missed
	e.Other = append(e.Other, s.survey.bad...)
	e.Err = cmp.Or(e.Err, s.survey.err)
	if hidden(int(s.proc.Fd())) {
		e.Other = append(e.Other, "processes are hidden from the caller (hidepid)")
	}
	if e.Count == 0 && len(e.Other) == 0 {
		return nil
	}
	slices.Sort(e.PIDs)
	return &e
}

// hidden tells whether /proc may not show all processes to the caller: it is
// mounted with hidepid (proc(5)) and the caller lacks CAP_SYS_PTRACE.
func hidden(proc int) bool {
	b, err := readAt(proc, "thread-self/status", 64<<10)
	if err != nil {
		return true
	}
	for line := range strings.Lines(string(b)) {
		if rest, ok := strings.CutPrefix(line, "CapEff:\t"); ok {
			caps, ok := parseUint([]byte(strings.TrimSpace(rest)), 16)
			if ok && caps&(1<<unix.CAP_SYS_PTRACE) != 0 {
				return false
			}
		}
	}
	o, err := statx(proc, "", unix.AT_EMPTY_PATH)
	if err != nil {
		return true
	}
	hid := false
	err = readMounts(proc, bufio.NewReaderSize(nil, maxLine), func(m mount) {
		for opt := range strings.SplitSeq(m.super, ",") {
			v, ok := strings.CutPrefix(opt, "hidepid=")
			hid = hid || m.id == o.mnt && ok && v != "0" && v != "off"
		}
	})
	return hid || err != nil
}

// found puts the result together.
func (s *scanner) found() []Holder {
	slices.SortFunc(s.holders, func(a, b Holder) int { return cmp.Compare(a.PID, b.PID) })
	return append(s.objects(), s.holders...)
}

// objects names the holders without a process.
func (s *scanner) objects() []Holder {
	out := s.match.deviceHolders(s.survey.spaces, s.swaps)
	if sp := s.survey.spaces[s.target.Namespace]; sp != nil {
		for _, mt := range s.match.ours(sp.mounts) {
			known := slices.ContainsFunc(s.target.Mounts, func(r MountRef) bool { return r.Point == mt.point })
			if !known {
				out = append(out, Holder{Command: "mount in the view", Holds: []Hold{{MountPoint, printable(mt.point, maxWhat)}}})
			}
		}
	}
	for _, inode := range slices.Compact([]uint64{s.own, s.host}) {
		u := s.spaces[inode]
		if u == nil || len(u.points) == 0 || inode == s.target.Namespace {
			continue
		}
		command := "mount namespace of the machine"
		if inode != s.host {
			command = "mount namespace of the caller"
		}
		out = append(out, Holder{Command: command, Holds: []Hold{{MountNamespace, pointList(u.points)}}})
	}
	for p, n := range s.survey.pins {
		u := s.spaces[p.inode]
		if u == nil || len(u.points) == 0 || !s.foreign(p.inode) {
			continue
		}
		what := printable(p.point, maxWhat)
		if n > 1 {
			what += fmt.Sprintf(" (in %d mount namespaces)", n)
		}
		out = append(out, Holder{Command: fmt.Sprintf("bind mount of mount namespace %d", p.inode),
			Holds: []Hold{{NamespaceFile, what}}})
	}
	slices.SortFunc(out, func(a, b Holder) int {
		return cmp.Or(cmp.Compare(a.Command, b.Command), cmp.Compare(a.Holds[0].What, b.Holds[0].What))
	})
	return out
}

func pointList(points []string) string {
	const show = 4
	var out []string
	for _, p := range points[:min(show, len(points))] {
		out = append(out, printable(p, 256))
	}
	s := "with " + strings.Join(out, ", ")
	if n := len(points) - show; n > 0 {
		s += fmt.Sprintf(" and %d more", n)
	}
	return s
}

// ask answers what the matcher could not tell from numbers alone.
func (s *scanner) ask(o object, dirfd int, name string) bool {
	switch s.match.judge(o) {
	case yes:
		return true
	case askPolicy:
		if o.kind() == unix.S_IFREG || o.kind() == unix.S_IFDIR {
			key, _, err := policyKey(dirfd, name)
			if err == nil {
				return s.match.keyOurs(o.dev, key)
			}
		}
		return s.match.objectInTree(o, readLink(dirfd, name))
	case askPath:
		return s.match.objectInTree(o, readLink(dirfd, name))
	case askFS:
		// A mount id stands for one filesystem as long as anything is open on it.
		s.mu.Lock()
		ours, known := s.fsids[o.mnt]
		s.mu.Unlock()
		if !known {
			id, overlay, err := overlayID(dirfd, name)
			if err != nil {
				return false // closed meanwhile
			}
			ours = overlay && slices.Contains(s.target.Overlays, id)
			s.mu.Lock()
			if len(s.fsids) < maxMemo {
				s.fsids[o.mnt] = ours
			}
			s.mu.Unlock()
		}
		return ours
	}
	return false
}
