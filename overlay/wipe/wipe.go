// Package wipe removes files so that neither their bytes nor their names are left on
// the device, as far as software can do that.
//
// It promises: what Tree is given is overwritten where it lies before it is unlinked,
// by directory descriptors only, without following a link or crossing into another
// mount, and may be repeated after a crash between any two system calls. What could
// not be done stands in the report; it is never called done.
//
// Start with Tree or Trees for files, Logs for build logs, Slack for names in a
// directory's own blocks, Device when all is unlinked, and Search to look at the
// raw device.
//
// Not for: file systems that write elsewhere (btrfs, zfs, bcachefs, f2fs), where
// overwriting leaves the old blocks to Device's trim. No software can promise
// anything of flash cells, snapshots and backups: see Caveats.
package wipe

import (
	"fmt"
	"os"
	"strings"

	"golang.org/x/sys/unix"
)

// Report says what Tree, Trees or Logs did.
type Report struct {
	Files       int      `json:"files"`       // regular files overwritten and unlinked
	Bytes       int64    `json:"bytes"`       // overwritten, whole blocks
	Symlinks    int      `json:"symlinks"`    // unlinked
	LongLinks   int      `json:"longLinks"`   // of these, with a target in a block of its own
	Directories int      `json:"directories"` // removed
	Others      int      `json:"others"`      // sockets, pipes, devices: unlinked
	Shared      int      `json:"shared"`      // only unlinked: another name outside has the content, too
	SharedBytes int64    `json:"sharedBytes"` // sizes of these
	Links       int      `json:"links"`       // entries of .links unlinked
	Notes       []string `json:"notes,omitempty"`

	// LinkNames are those of the entries of .links: hashes of contents. For Slack.
	LinkNames []string `json:"-"`
	// Blocks are those of the device that held targets of long symbolic links, as far
	// as could be told. For Reuse, where Device cannot trim.
	Blocks []int64 `json:"-"`
}

// Add adds another report.
func (r *Report) Add(o Report) {
	r.Files += o.Files
	r.Bytes += o.Bytes
	r.Symlinks += o.Symlinks
	r.LongLinks += o.LongLinks
	r.Directories += o.Directories
	r.Others += o.Others
	r.Shared += o.Shared
	r.SharedBytes += o.SharedBytes
	r.Links += o.Links
	r.LinkNames = append(r.LinkNames, o.LinkNames...)
	r.Blocks = append(r.Blocks, o.Blocks...)
	for _, n := range o.Notes {
		r.note(n)
	}
}

func (r *Report) note(text string) { r.Notes = note(r.Notes, text) }

// note adds a sentence once.
func note(notes []string, text string) []string {
	for _, n := range notes {
		if n == text {
			return notes
		}
	}
	return append(notes, text)
}

// Sentences for people.
const (
	noteElsewhere = "this file system writes elsewhere than where data lies: the old blocks are only cleared by a trim or by reuse"
	noteNames     = "this kernel (before 5.13) leaves the names of removed files in the blocks of their directories"
	// NoteLongLinks goes with Report.LongLinks; Reuse clears what it is about.
	NoteLongLinks = "the targets of long symbolic links lie in blocks that cannot be overwritten while they are links: they are cleared by a trim or by reuse"
)

// Caveats are what no report can promise, in sentences for people.
func Caveats() []string {
	return []string{
		"flash cells: an SSD or memory card writes to other cells than it did before and keeps the old ones until it erases them by itself; only its own secure erase, or encryption from the start, covers that",
		"snapshots: what LVM, a volume manager, a virtual machine or a storage server has kept of the device still holds what was there",
		"backups and copies: what was copied to elsewhere before is not touched",
		"memory: swap and hibernation images are not looked at",
	}
}

// kernelBefore reports whether the running kernel is older than major.minor.
func kernelBefore(major, minor int) bool {
	var u unix.Utsname
	if unix.Uname(&u) != nil {
		return true
	}
	var a, b int
	if n, _ := fmt.Sscanf(unix.ByteSliceToString(u.Release[:]), "%d.%d", &a, &b); n != 2 {
		return true
	}
	return a < major || a == major && b < minor
}

// inPlace are file systems where a write to a block that is there goes to that block:
// ext2, ext3 and ext4; xfs, as long as no extent is shared; memory.
func inPlace(st *unix.Statfs_t) bool {
	switch uint32(st.Type) {
	case unix.EXT4_SUPER_MAGIC, unix.XFS_SUPER_MAGIC, unix.TMPFS_MAGIC:
		return true
	}
	return false
}

// retry repeats what a signal interrupted.
func retry(f func() error) error {
	for {
		if err := f(); err != unix.EINTR {
			return err
		}
	}
}

// quoted names the call and the entry: callers know the directory.
func quoted(call, name string, err error) error {
	return &os.PathError{Op: call, Path: strings.ToValidUTF8(name, "?"), Err: err}
}
