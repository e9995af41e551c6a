package volume

import (
	"fmt"
	"strings"
)

// ForeignError says that something is not what this volume is made of. Nothing
// was added, mounted or removed because of it.
type ForeignError struct {
	What      string // for example "policy of \"/x/volume\""
	Want, Got string
}

func (e *ForeignError) Error() string {
	return fmt.Sprintf("%s is %s, want %s", e.What, e.Got, e.Want)
}

// ExistsError says that Create or Open found something where it must make it.
type ExistsError struct{ What string }

func (e *ExistsError) Error() string { return e.What + " exists already" }

// MissingError says that a part of the volume is not there.
type MissingError struct{ What string }

func (e *MissingError) Error() string { return e.What + " is missing" }

// DamagedError says that a part of the volume is there but cannot be used.
type DamagedError struct {
	What string
	Err  error
}

func (e *DamagedError) Error() string { return fmt.Sprintf("%s is damaged: %v", e.What, e.Err) }
func (e *DamagedError) Unwrap() error { return e.Err }

// NotMountedError says that Spec.FSImage is not mounted at Path.
type NotMountedError struct{ Path string }

func (e *NotMountedError) Error() string { return fmt.Sprintf("nothing is mounted at %q", e.Path) }

// BusyError says that What is in use. The caller knows how to find the holders.
type BusyError struct {
	What string
	Err  error // the kernel's word, if any
}

func (e *BusyError) Error() string { return e.What + " is busy" }
func (e *BusyError) Unwrap() error { return e.Err }

// NotLockedError says why the volume cannot be said to be locked.
type NotLockedError struct{ Reason string }

func (e *NotLockedError) Error() string { return "not locked: " + e.Reason }

// UnsupportedError says that the filesystem of Path cannot encrypt.
type UnsupportedError struct {
	Path    string
	Missing string // what is missing, in words
	Remedy  string // a command to paste; "" where there is none
	Err     error  // the kernel's word
}

func (e *UnsupportedError) Error() string {
	return fmt.Sprintf("no encryption at %q: %s", e.Path, e.Missing)
}
func (e *UnsupportedError) Unwrap() error { return e.Err }

// ToolError says that a program of e2fsprogs failed or is not installed.
// Output is the tail of what mkfs said; of e2fsck it is empty, because that
// prints names out of the volume.
type ToolError struct {
	Tool   string
	Output string
	Err    error
}

func (e *ToolError) Error() string {
	if e.Output == "" {
		return fmt.Sprintf("%s: %v", e.Tool, e.Err)
	}
	return fmt.Sprintf("%s: %v: %s", e.Tool, e.Err, e.Output)
}
func (e *ToolError) Unwrap() error { return e.Err }

// StepError says which step of Create or Open failed, and on what.
type StepError struct {
	Step string // for example "make"
	Path string
	Err  error
}

func (e *StepError) Error() string { return fmt.Sprintf("%s %q: %v", e.Step, e.Path, e.Err) }
func (e *StepError) Unwrap() error { return e.Err }

func step(name, path string, err error) error {
	if err == nil {
		return nil
	}
	return &StepError{Step: name, Path: path, Err: err}
}

// tail keeps the last n bytes of a tool's output, on one line.
func tail(b []byte, n int) string {
	s := strings.Join(strings.Fields(string(b)), " ")
	if len(s) > n {
		s = "…" + strings.ToValidUTF8(s[len(s)-n:], "")
	}
	return s
}
