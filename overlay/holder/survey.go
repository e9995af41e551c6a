package holder

import (
	"bufio"
	"fmt"
	"os"
	"strconv"

	"golang.org/x/sys/unix"
)

// Bounds on what strangers can make this package remember. Beyond them the
// answer is an *IncompleteError.
const (
	maxSpaces = 1 << 14 // mount namespaces
	maxMounts = 1 << 20 // mounts that may matter, and ids of others
	maxHolds  = 32      // listed for one process
	maxWhat   = 512     // bytes of a name before escaping
	maxMemo   = 1 << 16 // mapped files remembered during one scan
)

// pin is a mount namespace bound to a file (nsfs).
type pin struct {
	inode uint64 // of the namespace it keeps alive
	point string
}

// survey reads the mount tables of namespaces.
type survey struct {
	target *Target
	proc   int // the caller's /proc
	nsfs   uint64
	spaces map[uint64]*space
	keep   bool                // keep the handles, for Namespaces
	files  map[uint64]*os.File // handles of spaces
	pins   map[pin]int         // in how many namespaces it shows
	kept   int
	bad    []string // what could not be read
	err    error
}

func (v *survey) fail(what string, err error) {
	if len(v.bad) < 16 {
		v.bad = append(v.bad, what)
	}
	if v.err == nil {
		v.err = err
	}
}

// read reads the namespaces of files, and those pinned by a file in one of
// them, and so on. It takes the files over.
func (v *survey) read(files []*os.File) {
	err := onThread(func() error {
		lines := bufio.NewReaderSize(nil, maxLine)
		for len(files) > 0 {
			f := files[len(files)-1]
			files = append(files[:len(files)-1], v.readOne(f, lines)...)
		}
		return nil
	})
	if err != nil {
		for _, f := range files {
			f.Close()
		}
		v.fail("mount namespaces", err)
	}
}

func (v *survey) readOne(f *os.File, lines *bufio.Reader) (more []*os.File) {
	o, err := lookAtFile(f)
	if err != nil || v.spaces[o.ino] != nil {
		f.Close()
		return nil
	}
	name := "mount namespace " + strconv.FormatUint(o.ino, 10)
	if len(v.spaces) >= maxSpaces {
		f.Close()
		v.fail("more than "+strconv.Itoa(maxSpaces)+" mount namespaces", nil)
		return nil
	}
	sp := &space{inode: o.ino}
	v.spaces[o.ino] = sp
	if v.keep {
		v.files[o.ino] = f
	} else {
		defer f.Close()
	}
	if err := enter(f); err != nil {
		v.fail(name, err)
		return nil
	}
	err = readMounts(v.proc, lines, func(m mount) {
		if v.kept >= maxMounts {
			return
		}
		if unix.Major(m.dev) == 0 {
			sp.anon = append(sp.anon, m.id)
			v.kept++
		}
		// In the view itself any mount may lie on top of one of ours.
		if v.target.interesting(m) || sp.inode == v.target.Namespace {
			sp.mounts = append(sp.mounts, m)
			v.kept++
		}
	})
	if err == nil && v.kept >= maxMounts {
		err = fmt.Errorf("more than %d mounts", maxMounts)
	}
	if err != nil {
		v.fail(name, err)
	}
	for _, m := range sp.mounts {
		kind, inode, ok := namespaceLink(m.root)
		if m.fstype != "nsfs" || !ok || kind != "mnt" {
			continue
		}
		v.pins[pin{inode, m.point}]++
		if v.spaces[inode] == nil {
			if p := v.openPinned(m.point, inode); p != nil {
				more = append(more, p)
			}
		}
	}
	return more
}

// openPinned opens the namespace bound at point in the thread's namespace. What
// lies there is only opened once it is known to be a namespace: a stranger's
// mount on top might be a device.
func (v *survey) openPinned(point string, inode uint64) *os.File {
	p, err := openAt(unix.AT_FDCWD, point, unix.O_PATH|unix.O_NOFOLLOW)
	if err != nil {
		return nil // covered or unreachable: whoever covers it has a handle, too
	}
	defer p.Close()
	if o, err := lookAtFile(p); err != nil || o.dev != v.nsfs || o.ino != inode {
		return nil
	}
	f, err := openAt(v.proc, "thread-self/fd/"+strconv.Itoa(int(p.Fd())), unix.O_RDONLY|unix.O_NONBLOCK)
	if err != nil {
		return nil
	}
	return f
}

func (v *survey) close() {
	for _, f := range v.files {
		f.Close()
	}
}

// isMountNamespace asks what kind of namespace f is (ioctl_nsfs(2)).
func isMountNamespace(f *os.File) bool {
	kind, err := unix.IoctlRetInt(int(f.Fd()), unix.NS_GET_NSTYPE)
	return err == nil && kind == unix.CLONE_NEWNS
}
