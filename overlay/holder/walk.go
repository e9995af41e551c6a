package holder

import (
	"bufio"
	"bytes"
	"errors"
	"hash/maphash"
	"os"
	"strconv"
	"strings"

	"golang.org/x/sys/unix"
)

// worker looks at processes, one at a time. Its buffers are reused.
type worker struct {
	*scanner
	dirents []byte
	lines   *bufio.Reader

	pid   int
	holds []Hold
	seen  map[Hold]bool
	more  int
	err   error // a refusal, so that the process counts as not looked into
}

func newWorker(s *scanner) *worker {
	return &worker{scanner: s, dirents: make([]byte, 32<<10), lines: bufio.NewReaderSize(nil, maxLine), seen: map[Hold]bool{}}
}

// process looks at pid with all its threads. Its directory below /proc is held
// open: what is read through it is of that very process or fails, also when
// the number is given to another one meanwhile.
func (w *worker) process(pid int) {
	dir, err := openFD(int(w.proc.Fd()), strconv.Itoa(pid), unix.O_PATH|unix.O_DIRECTORY)
	if err != nil {
		if !gone(err) {
			w.denied(pid, err)
		}
		return
	}
	defer unix.Close(dir)
	w.pid, w.holds, w.more, w.err = pid, nil, 0, nil
	clear(w.seen)
	memory := w.memory(dir)
	if !memory && kernelThread(dir) {
		return
	}
	w.task(dir, pid, true, true)
	for _, t := range w.threads(dir) {
		tdir, err := openFD(dir, "task/"+strconv.Itoa(t.tid), unix.O_PATH|unix.O_DIRECTORY)
		if err != nil {
			w.refused(dir, err)
			continue
		}
		if !memory {
			memory = w.memoryOf(t.tid, tdir)
		}
		w.task(tdir, t.tid, t.fs, t.files)
		unix.Close(tdir)
	}
	if w.err != nil {
		w.denied(pid, w.err)
	}
	if len(w.holds) > 0 {
		w.name(dir)
	}
}

// kernelThread tells whether a task without memory never had any. One that is
// about to end has given up its memory but may still have files open.
func kernelThread(dir int) bool {
	b, err := readAt(dir, "stat", 4096)
	if err != nil {
		return false
	}
	st, err := parseStat(b)
	return err == nil && st.kernel
}

// memory looks at what a task executes and has mapped, and tells whether it has
// memory at all: kernel threads, and threads that have ended, have none.
func (w *worker) memory(dir int) bool {
	if w.only {
		return true
	}
	o, err := lookAt(dir, "exe")
	if err != nil {
		w.refused(dir, err)
		return false
	}
	if w.ask(o, dir, "exe") {
		w.add(RunningBinary, readLink(dir, "exe"))
	}
	w.mapped(dir)
	return true
}

// refused notes err, met below the directory of a task, unless the task or the
// descriptor just went away. The links of /proc say "permission denied" then, as
// for a task that may not be looked at (proc_fd_access_allowed in fs/proc/base.c).
func (w *worker) refused(dir int, err error) {
	if err == nil || w.err != nil || gone(err) {
		return
	}
	if errors.Is(err, os.ErrPermission) {
		if _, serr := readAt(dir, "stat", 4096); serr != nil {
			return
		}
	}
	w.err = err
}

func (w *worker) add(how How, what string) {
	if what == "" {
		what = "?"
	}
	h := Hold{how, printable(what, maxWhat)}
	if w.seen[h] {
		return
	}
	if len(w.holds) == maxHolds {
		w.more++
		return
	}
	w.seen[h] = true
	w.holds = append(w.holds, h)
}

// thread is one besides the first that shares not everything with a thread
// already looked at.
type thread struct {
	tid       int
	fs, files bool // has a root and directory, or descriptors, of its own
}

// threads returns the tasks of a process that must be looked at on their own.
// Almost always all of them share everything, which kcmp tells in one call.
func (w *worker) threads(dir int) []thread {
	var st unix.Stat_t
	if err := unix.Fstatat(dir, "task", &st, 0); err != nil || st.Nlink <= 3 {
		w.refused(dir, err)
		return nil // "task" has two links and one a thread (proc_task_getattr)
	}
	tasks, err := openFD(dir, "task", unix.O_RDONLY|unix.O_DIRECTORY)
	if err != nil {
		w.refused(dir, err)
		return nil
	}
	defer unix.Close(tasks)
	var tids []int
	w.refused(dir, names(tasks, w.dirents, func(s string) {
		if tid, err := strconv.Atoi(s); err == nil && tid != w.pid {
			tids = append(tids, tid)
		}
	}))
	var out []thread
	fs, files := []int{w.pid}, []int{w.pid} // one for each table met
	known := func(list []int, tid, kind int) bool {
		for _, other := range list[:min(len(list), 8)] {
			if sameTable(other, tid, kind) {
				return true
			}
		}
		return false
	}
	for _, tid := range tids {
		t := thread{tid, !known(fs, tid, kcmpFS), !known(files, tid, kcmpFiles)}
		if t.fs {
			fs = append(fs, tid)
		}
		if t.files {
			files = append(files, tid)
		}
		if t.fs || t.files {
			out = append(out, t)
		}
	}
	return out
}

// memoryOf looks at the memory of a process whose first thread has ended, through
// another one. Only /proc/TID, which is not listed but can be opened, has
// map_files; task, the same thread's directory below the process, tells
// whether it is still that thread's.
func (w *worker) memoryOf(tid, task int) bool {
	dir, err := openFD(int(w.proc.Fd()), strconv.Itoa(tid), unix.O_PATH|unix.O_DIRECTORY)
	if err != nil {
		w.refused(task, err)
		return false
	}
	defer unix.Close(dir)
	if _, err := lookAt(task, "exe"); err != nil {
		w.refused(task, err)
		return false
	}
	return w.memory(dir)
}

// task looks at what a thread may have for its own.
func (w *worker) task(dir, tid int, fs, files bool) {
	if fs {
		if !w.only {
			w.link(dir, "cwd", CurrentDirectory)
			w.link(dir, "root", RootDirectory)
		}
		w.namespace(dir)
	}
	if files {
		w.descriptors(dir, tid)
	}
}

func (w *worker) link(dir int, name string, how How) {
	o, err := lookAt(dir, name)
	if err != nil {
		w.refused(dir, err)
		return
	}
	if w.ask(o, dir, name) {
		w.add(how, readLink(dir, name))
	}
}

func (w *worker) namespace(dir int) {
	o, err := lookAt(dir, "ns/mnt")
	if err != nil {
		w.refused(dir, err)
		return
	}
	u := w.space(o.ino, func() *os.File {
		f, err := openAt(dir, "ns/mnt", unix.O_RDONLY)
		w.refused(dir, err)
		return f
	})
	if len(u.points) == 0 {
		return
	}
	w.mu.Lock()
	if n := len(u.pids); n == 0 || u.pids[n-1] != w.pid {
		u.pids = append(u.pids, w.pid)
	}
	w.mu.Unlock()
	if w.foreign(o.ino) {
		w.add(MountNamespace, pointList(u.points))
	}
}

func (w *worker) descriptors(dir, tid int) {
	fds, err := openFD(dir, "fd", unix.O_RDONLY|unix.O_DIRECTORY)
	if err != nil {
		w.refused(dir, err)
		return
	}
	defer unix.Close(fds)
	w.refused(dir, names(fds, w.dirents, func(name string) {
		o, err := lookAt(fds, name)
		if err != nil {
			w.refused(dir, err)
			return
		}
		switch {
		case o.dev == w.nsfs:
			w.namespaceFile(o, fds, name)
		case w.only:
		case o.kind() == unix.S_IFSOCK && len(w.sockets) > 0 && w.sockets[o.ino].socket != 0:
			w.socket(w.sockets[o.ino], tid, name)
		case o.dev == w.anon:
			w.anonymous(dir, fds, name)
		case w.ask(o, fds, name):
			how := OpenFile
			if o.kind() == unix.S_IFBLK && w.match.devices[o.rdev] {
				how = BlockDevice
			}
			w.add(how, readLink(fds, name))
		}
	}))
}

func (w *worker) namespaceFile(o object, fds int, name string) {
	u := w.space(o.ino, func() *os.File {
		f, err := openAt(fds, name, unix.O_RDONLY|unix.O_NONBLOCK)
		if err != nil || !isMountNamespace(f) {
			if f != nil {
				f.Close()
			}
			return nil
		}
		return f
	})
	if len(u.points) > 0 && w.foreign(o.ino) {
		w.add(NamespaceFile, readLink(fds, name)+" "+pointList(u.points))
	}
}

// socket decides about a unix socket that is bound on a filesystem of ours or
// on one we share.
func (w *worker) socket(b bound, tid int, name string) {
	if !w.match.certain(b.file.Dev) {
		n, _ := strconv.Atoi(name)
		f, err := boundFile(tid, n)
		if err == nil {
			defer f.Close()
			link := "self/fd/" + strconv.Itoa(int(f.Fd()))
			o, err := lookAtFile(f)
			if err != nil || !w.ask(o, int(w.proc.Fd()), link) {
				return
			}
			b.name = readLink(int(w.proc.Fd()), link)
		} else if !w.match.pathInTree(b.file.Dev, b.name) {
			return
		}
	}
	w.add(UnixSocket, b.name)
}

// anonymous looks into descriptors that stand for sets of files.
func (w *worker) anonymous(dir, fds int, name string) {
	link := readLink(fds, name)
	switch link {
	case "anon_inode:inotify", "inotify", "anon_inode:[fanotify]":
		if len(w.target.Trees) == 0 {
			return
		}
		for _, x := range parseWatches(w.info(dir, name)) {
			if w.match.watchable(x.file.Dev) && w.watched(dir, x) {
				w.add(WatchedFile, "inode "+strconv.FormatUint(x.file.Ino, 10)+" by "+link)
			}
		}
	case "anon_inode:[io_uring]":
		for _, path := range parseRingFiles(w.info(dir, name)) {
			if w.pathOurs(dir, path) {
				w.add(OpenFile, path+" (registered with io_uring)")
			}
		}
	}
}

func (w *worker) info(dir int, name string) []byte {
	b, err := readAt(dir, "fdinfo/"+name, 4<<20)
	w.refused(dir, err)
	return b
}

// pathOurs decides by the text of a path alone, for what is shown in no other
// way: it counts where it leads into an encrypted directory on the host, or where
// the task's mount namespace has mounts of ours that it may be on.
func (w *worker) pathOurs(dir int, path string) bool {
	for dev := range w.match.trees {
		if w.match.pathInTree(dev, path) {
			return true
		}
	}
	if !w.match.pathOurs(path, true) {
		return false
	}
	o, err := lookAt(dir, "ns/mnt")
	if err != nil {
		return false
	}
	return len(w.space(o.ino, func() *os.File { return nil }).points) > 0
}

// mapped looks at the mapped files of a task: at all by number, closely through
// map_files only at what may be ours.
func (w *worker) mapped(dir int) {
	maps, err := openFD(dir, "maps", unix.O_RDONLY)
	if err != nil {
		w.refused(dir, err)
		return
	}
	defer unix.Close(maps)
	var last FileID // one file is mapped in several pieces that follow each other
	each := func(m mapping) {
		file := FileID{m.dev, m.ino}
		if file == (FileID{}) || file == last {
			return
		}
		last = file
		if w.mappedOurs(dir, m) {
			what := readLink(dir, m.name())
			if !w.seen[Hold{RunningBinary, printable(what, maxWhat)}] {
				w.add(MappedFile, what)
			}
		}
	}
	err = unix.ENOTTY
	if !w.text {
		err = mappedFiles(maps, each)
	}
	if err == unix.ENOTTY {
		err = eachLine(fdReader(maps), w.lines, func(line []byte, _ bool) error {
			m, err := parseMapping(line)
			if err == nil {
				each(m)
			}
			return err
		})
	}
	w.refused(dir, err)
}

func (w *worker) mappedOurs(dir int, m mapping) bool {
	file := FileID{m.dev, m.ino}
	if w.match.certain(m.dev) || w.match.files[file] {
		return true
	}
	if len(w.match.trees[m.dev]) == 0 && !w.match.unsure[m.dev] && (!w.old || len(w.target.Overlays) == 0) {
		return false
	}
	// The same lower file has another path, and another answer, through the
	// overlay; other mappings of a file differ in nothing.
	key := memoKey{file: file}
	if w.old {
		key.path = maphash.Bytes(w.seed, m.path)
	}
	w.mu.Lock()
	ours, known := w.memo[key]
	w.mu.Unlock()
	if known {
		return ours
	}
	name := m.name()
	o, err := lookAt(dir, name)
	switch {
	case err == nil:
		ours = w.ask(o, dir, name)
	case gone(err):
		return false
	case errors.Is(err, unix.EPERM):
		// To follow the link takes CAP_CHECKPOINT_RESTORE; to read it does not.
		path := strings.TrimSuffix(readLink(dir, name), " (deleted)")
		ours = w.pathOurs(dir, path)
	default:
		w.refused(dir, err)
		return false
	}
	w.mu.Lock()
	if len(w.memo) >= maxMemo {
		clear(w.memo)
	}
	w.memo[key] = ours
	w.mu.Unlock()
	return ours
}

// name completes what was found with who it is.
func (w *worker) name(dir int) {
	h := Holder{PID: w.pid, Holds: w.holds, More: w.more}
	b, err := readAt(dir, "stat", 4096)
	if err != nil {
		return // ended meanwhile
	}
	st, err := parseStat(b)
	if err != nil {
		w.denied(w.pid, err)
		return
	}
	h.Start = st.start
	if b, err = readAt(dir, "status", 64<<10); err == nil {
		h.UID, err = parseUID(b)
	}
	if err != nil {
		if !gone(err) {
			w.denied(w.pid, err)
		}
		return
	}
	// A process chooses both its command line and its name.
	line, _ := readAt(dir, "cmdline", 4096)
	h.Command = strings.TrimSpace(string(bytes.ReplaceAll(bytes.TrimRight(line, "\x00"), []byte{0}, []byte{' '})))
	if h.Command == "" {
		h.Command = "[" + st.comm + "]"
	}
	h.Command = printable(h.Command, 256)
	w.mu.Lock()
	w.holders = append(w.holders, h)
	w.mu.Unlock()
}

// watched tells whether the inode of a watch is encrypted with our key. Only its
// handle leads to it; opening that needs some mount of the filesystem.
func (w *worker) watched(dir int, x watch) bool {
	if x.handle == nil {
		w.refused(dir, errNoHandle)
		return false
	}
	mnt, err := w.onFilesystem(x.file.Dev)
	if err != nil {
		w.refused(dir, err)
		return false
	}
	defer mnt.Close()
	f, err := openHandle(mnt, x)
	if err != nil {
		// ESTALE: the inode is gone, and its watch with it.
		if !errors.Is(err, unix.ESTALE) && !errors.Is(err, unix.ENOKEY) {
			w.refused(dir, err)
		}
		return false
	}
	defer f.Close()
	key, _, err := policyOf(f)
	w.refused(dir, err)
	return err == nil && w.match.keyOurs(x.file.Dev, key)
}

var (
	errNoHandle = errors.New("the kernel prints no file handles of watches")
	errNoMount  = errors.New("the filesystem of the encrypted directory is not mounted in the caller's namespace")
)

// onFilesystem opens a directory on filesystem dev in the caller's namespace.
func (w *worker) onFilesystem(dev uint64) (*os.File, error) {
	w.mu.Lock()
	sp := w.survey.spaces[w.own] // fixed once it is there; the map is not
	w.mu.Unlock()
	if sp != nil {
		for _, m := range sp.mounts {
			if m.dev != dev {
				continue
			}
			f, err := openAt(unix.AT_FDCWD, m.point, unix.O_RDONLY|unix.O_DIRECTORY)
			if err != nil {
				continue // a file, or covered
			}
			if o, err := lookAtFile(f); err == nil && o.dev == dev {
				return f, nil
			}
			f.Close()
		}
	}
	return nil, errNoMount
}
