// Package wipe removes files so that neither their bytes nor their names are left on
// the device, as far as software can do that.
//
// It promises: whatever Tree is given is overwritten where it lies before it is
// unlinked, by directory descriptors only, without following a link or crossing into
// another mount, and may be repeated after a crash between any two system calls. What
// could not be done stands in the report; it is never called done.
//
// Start with Tree for files, Logs for build logs, Slack for names in a directory's
// blocks, Device when all is unlinked, and Search to look at the raw device.
//
// Not for: file systems that write elsewhere (btrfs, zfs, bcachefs, f2fs, overlay),
// where overwriting leaves the old blocks to Device's trim. No software can promise
// anything of flash cells, snapshots and backups: see Caveats.
package wipe

import (
	"context"
	"errors"
	"io"
	"os"
)

var errTODO = errors.New("not built yet")

// Options say how Tree works.
type Options struct {
	// Links is the store's directory .links, or nil if there is none: the names that
	// Nix's optimiser gives to the contents of files.
	Links *os.File
}

// Report says what Tree or Logs did. Numbers add up: see Add.
type Report struct {
	Files     int      `json:"files"`     // regular files overwritten and unlinked
	Bytes     int64    `json:"bytes"`     // overwritten, whole blocks
	Symlinks  int      `json:"symlinks"`  // unlinked
	LongLinks int      `json:"longLinks"` // of these, with a target in a block of its own, which only a trim or reuse clears
	Dirs      int      `json:"dirs"`
	Others    int      `json:"others"`      // sockets, pipes, devices
	Shared    int      `json:"shared"`      // only unlinked: another name outside of the tree holds the content
	SharedLen int64    `json:"sharedBytes"` // sizes of these
	Links     int      `json:"links"`       // entries of .links unlinked
	Notes     []string `json:"notes,omitempty"`
}

// Add adds another report.
func (r *Report) Add(o Report) {}

// Tree overwrites and removes the entry name of parent, whatever it is. No such entry
// is no error. After an error, what was not done is still there under its name:
// repeat.
func Tree(ctx context.Context, parent *os.File, name string, o Options) (Report, error) {
	return Report{}, errTODO
}

// Answer is what became of a step.
type Answer string

const (
	Done        Answer = "done"
	Unsupported Answer = "not supported" // by the kernel, file system or device
	Denied      Answer = "denied"        // no right to
)

// DeviceReport says what Device did about what is no longer in any file.
type DeviceReport struct {
	Sync       Answer   `json:"sync"`       // everything is on the device
	Trim       Answer   `json:"trim"`       // free blocks were discarded
	Trimmed    int64    `json:"trimmed"`    // bytes
	Checkpoint Answer   `json:"checkpoint"` // the journal was checkpointed and its blocks overwritten
	Zeroed     bool     `json:"zeroed"`     // with zeros; false: discarded
	Notes      []string `json:"notes,omitempty"`
}

// Device clears what the file system that holds dir keeps of removed files: it writes
// everything back, discards the free blocks and overwrites the journal. A step that is
// not supported or denied is an answer, not an error.
func Device(ctx context.Context, dir *os.File) (DeviceReport, error) {
	return DeviceReport{}, errTODO
}

// Slack removes old copies of names that stand in the blocks of directory dir itself
// (not below) beside its entries. It creates and removes entries of its own there.
func Slack(ctx context.Context, dir *os.File, names [][]byte) (SlackReport, error) {
	return SlackReport{}, errTODO
}

// SlackReport says what Slack did.
type SlackReport struct {
	Fillers int      `json:"fillers"` // entries created and removed
	Notes   []string `json:"notes,omitempty"`
}

// Search reads all of r, such as a raw device, and calls each for every occurrence of
// a name: its index and the offset in bytes, ascending. Names of 32 base-32 characters
// of Nix (hash parts) are looked for all at once, at little more than the speed of
// reading.
func Search(ctx context.Context, r io.Reader, names [][]byte, each func(name int, offset int64)) error {
	return errTODO
}

// ErrNoDevice: what holds a directory is not one block device that could be read.
var ErrNoDevice = errors.New("could not tell the device")

// DeviceOf returns the block device (/dev/…) that holds the file system of dir. Down
// says which devices or files lie below it, such as a loop device's file.
func DeviceOf(dir *os.File) (dev string, err error) { return "", ErrNoDevice }

// Logs finds the build logs of derivations (base names HASH-NAME.drv) below logs
// (…/log/nix) and wipes them.
func Logs(ctx context.Context, logs *os.File, drvs []string) (Report, error) {
	return Report{}, errTODO
}

// Caveats are what no report can promise, in sentences for people.
func Caveats() []string { return nil }
