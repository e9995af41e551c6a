// Package holder names what keeps an unlocked keep busy: the processes, and the
// kernel objects without a process, that pin its filesystems or its encryption
// key.
//
// It promises that whoever has a file, directory, binary, mapping, socket, loop
// device, swap file or copied mount of the keep open is named with a process id
// that is safe against reuse, and that what could not be looked at is said to
// have not been looked at (*IncompleteError) instead of passing for free. It
// never promises that the keep is free: processes come and go while it looks,
// and some pins show nowhere (below). Only the kernel's key status proves a lock.
//
// Start with Describe while the keep is unlocked, keep the Target (it is plain
// data and may be stored), then Scan; Namespaces and UnmountIn for the copies of
// the mounts in other mount namespaces; End to terminate processes.
//
// Do not use it to decide whether a keep is locked, nor log what it returns:
// Hold.What and Holder.Command name personal paths. They are meant for the
// terminal of the keep's user, and are already safe to print there: control
// characters, line breaks and direction marks are escaped.
//
// It needs CAP_SYS_PTRACE (to look into others' processes), CAP_SYS_ADMIN and
// CAP_SYS_CHROOT (to enter namespaces and follow mapped files); CAP_NET_ADMIN and
// CAP_DAC_READ_SEARCH for sockets and watches on a filesystem shared with the
// host; Linux 5.8 or later (statx mount ids); and the /proc of the initial
// process-id namespace: processes outside the caller's are invisible.
//
// Blind spots, none of which shows in /proc: descriptors in flight in a unix
// socket (SCM_RIGHTS) and in no process; what the kernel still closes for a
// process that has just ended, such as the files of an io_uring; a detached copy
// of a mount tree (open_tree(2)) whose own root is not the keep's, or a
// filesystem context (fsopen(2)) of it; uprobes, process accounting and nfsd
// exports; whatever a process takes hold of after it was looked at.
package holder

import (
	"fmt"
	"log/slog"
	"slices"
	"strconv"
	"strings"
)

// Target is what is to be freed. It is made by Describe while the mounts exist
// and stays valid after they were unmounted or detached.
type Target struct {
	// Namespace is the inode of the view's own mount namespace, whose mounts the
	// caller unmounts itself: living in it is no hold.
	Namespace uint64 `json:"namespace"`
	// Devices are the st_dev numbers of filesystems that belong to the keep as a
	// whole: the overlay, and the ext4 inside a volume image.
	Devices []uint64 `json:"devices"`
	// Overlays identify overlay filesystems among Devices by statfs(2). Without
	// xino an overlay gives its files device numbers of no mount at all
	// (overlayfs.rst, "Inode properties").
	Overlays []FSID `json:"overlays,omitempty"`
	// Trees are encrypted directories on filesystems shared with the host.
	Trees []Tree `json:"trees,omitempty"`
	// Mounts are the mounts that were described, as they were then.
	Mounts []MountRef `json:"mounts"`
	// Files are single files that belong to the keep: the volume image.
	Files []FileID `json:"files,omitempty"`
	// Loops are the loop devices among Devices, with the file that each had: the
	// kernel gives their numbers to the next who asks for one.
	Loops []LoopRef `json:"loops,omitempty"`
}

// LoopRef is a loop device and its backing file.
type LoopRef struct {
	Dev  uint64 `json:"dev"`
	File FileID `json:"file"`
}

// FileID names an inode.
type FileID struct {
	Dev uint64 `json:"dev"`
	Ino uint64 `json:"ino"`
}

// FSID is f_fsid of statfs(2).
type FSID [2]int32

// Tree is a directory of a filesystem that is not the keep's alone.
type Tree struct {
	Dev  uint64 `json:"dev"`  // st_dev of the shared filesystem
	Path string `json:"path"` // from the root of that filesystem (mountinfo, field 4)
	// Key is the fscrypt v2 master key identifier in hexadecimal, "" when the
	// directory is not encrypted.
	Key string `json:"key,omitempty"`
}

// MountRef is one mount of the view.
type MountRef struct {
	ID    uint64 `json:"id"` // mount id; the kernel uses ids again
	Dev   uint64 `json:"dev"`
	Point string `json:"point"` // from the root of the view
	Type  string `json:"type"`  // of the filesystem
	// Layers are the directories of an overlay: with Type they tell whether a
	// device number that is seen again still means the same filesystem.
	Layers []string `json:"layers,omitempty"`
}

// How is the way in which something holds the keep.
type How string

// The ways. Those marked (no process) come with PID 0.
const (
	OpenFile         How = "open file"
	CurrentDirectory How = "current directory"
	RootDirectory    How = "root directory"
	RunningBinary    How = "running binary"
	MappedFile       How = "mapped file"
	UnixSocket       How = "unix socket"     // bound to a name in the keep
	WatchedFile      How = "watched file"    // inotify or fanotify; counts only in a Tree
	BlockDevice      How = "block device"    // an open block device the keep lies on, or one stacked on it (no process)
	MountNamespace   How = "mount namespace" // lives in another namespace that has copies of the mounts
	NamespaceFile    How = "namespace file"  // keeps such a namespace alive by a descriptor, or by a bind mount (no process)
	MountPoint       How = "mount"           // a mount in the view that was not described, on or of the keep (no process)
	LoopDevice       How = "loop device"     // (no process)
	SwapFile         How = "swap file"       // (no process)
)

// Hold is one thing held. What is escaped for terminals and never empty.
type Hold struct {
	How  How    `json:"how"`
	What string `json:"what"`
}

// Holder is a process, or with PID 0 a kernel object, that holds the keep.
type Holder struct {
	PID   int    `json:"pid"`
	Start uint64 `json:"start,omitempty"` // starttime in clock ticks since boot (proc_pid_stat(5)); with PID it names one process for good
	UID   uint32 `json:"uid"`             // real user id
	// Command is the command line, or for a kernel object what it is. Escaped.
	Command string `json:"command"`
	Holds   []Hold `json:"holds"`
	More    int    `json:"more,omitempty"` // holds beyond those listed
}

// String is one line for a terminal.
func (h Holder) String() string {
	var b strings.Builder
	if h.PID != 0 {
		fmt.Fprintf(&b, "%d (uid %d) ", h.PID, h.UID)
	}
	b.WriteString(h.Command)
	for i, x := range h.Holds {
		b.WriteString([]string{": ", "; "}[min(i, 1)])
		b.WriteString(string(x.How) + " " + x.What)
	}
	if h.More > 0 {
		fmt.Fprintf(&b, "; and %d more", h.More)
	}
	return b.String()
}

// LogValue leaves out every name: a log must not tell what a keep contains.
func (h Holder) LogValue() slog.Value {
	var how []string
	for _, x := range h.Holds {
		if !slices.Contains(how, string(x.How)) {
			how = append(how, string(x.How))
		}
	}
	return slog.GroupValue(slog.Int("pid", h.PID), slog.Uint64("uid", uint64(h.UID)), slog.Any("how", how))
}

// IncompleteError says that something could not be looked at. The holders that
// came with it were found all the same; others may exist.
type IncompleteError struct {
	PIDs  []int // at most 32 of the processes
	Count int   // processes that could not be looked into
	// Other lists what else failed: namespaces, devices. Escaped, names no file
	// of the keep.
	Other []string
	Err   error // the first reason met, nil if none is known
}

func (e *IncompleteError) Error() string {
	var parts []string
	if e.Count > 0 {
		ids := make([]string, len(e.PIDs))
		for i, p := range e.PIDs {
			ids[i] = strconv.Itoa(p)
		}
		s := fmt.Sprintf("%d processes could not be looked into (%s", e.Count, strings.Join(ids, ", "))
		if e.Count > len(ids) {
			s += ", ..."
		}
		parts = append(parts, s+")")
	}
	parts = append(parts, e.Other...)
	s := "search for holders is incomplete: " + strings.Join(parts, "; ")
	if e.Err != nil {
		s += ": " + e.Err.Error()
	}
	return s
}

func (e *IncompleteError) Unwrap() error { return e.Err }

// MountPointError is a path given to Describe that nothing is mounted on.
type MountPointError struct{ Path string }

func (e *MountPointError) Error() string {
	return fmt.Sprintf("%q is not a mount point in the view", e.Path)
}

// PolicyError is a directory with an encryption policy other than fscrypt v2.
type PolicyError struct {
	Path    string
	Version int // 0 is fscrypt v1
}

func (e *PolicyError) Error() string {
	return fmt.Sprintf("%q has encryption policy version %d, only 2 is known", e.Path, e.Version)
}

// UnmountError is a mount that stayed. Err is EBUSY when something uses it, and
// EINVAL when it is locked: a namespace of a less privileged user namespace
// cannot give up a single inherited mount (mount_namespaces(7)), it goes when
// its processes end.
type UnmountError struct {
	Namespace uint64
	Point     string
	Err       error
}

func (e *UnmountError) Error() string {
	return fmt.Sprintf("unmount %q in mount namespace %d: %v", e.Point, e.Namespace, e.Err)
}

func (e *UnmountError) Unwrap() error { return e.Err }

// SurvivorsError names processes that End could not bring to an end.
type SurvivorsError struct {
	Holders []Holder
	Err     error // why: the context's error, or the kernel's refusal
}

func (e *SurvivorsError) Error() string {
	ids := make([]string, len(e.Holders))
	for i, h := range e.Holders {
		ids[i] = strconv.Itoa(h.PID)
	}
	return fmt.Sprintf("processes %s did not end: %v", strings.Join(ids, ", "), e.Err)
}

func (e *SurvivorsError) Unwrap() error { return e.Err }

// printable escapes s for a terminal and bounds it: whatever strconv.IsPrint
// does not call printable (controls, line breaks, direction marks, invalid
// UTF-8) becomes a Go escape, a backslash is doubled.
func printable(s string, limit int) string {
	cut := len(s) > limit
	if cut {
		s = s[:limit]
	}
	q := strconv.Quote(s)
	// Go's quoting escapes the double quote, which needs none here.
	q = strings.ReplaceAll(q[1:len(q)-1], `\"`, `"`)
	if cut {
		q += "..."
	}
	return q
}
