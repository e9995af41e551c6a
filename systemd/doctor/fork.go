package doctor

import (
	"bytes"
	"errors"
	"fmt"
	"os/exec"
	"strings"
	"sync"
	"time"

	"golang.org/x/sys/unix"

	"overkeep/crypt/volume"
	"overkeep/overlay/view"
)

// trials is held for writing by what mounts and unmounts, for reading by whoever
// starts a program: between fork and exec a child has every descriptor of ours,
// and keeps busy for that moment what a trial is about to unmount.
var trials sync.RWMutex

// output runs a program and returns what it wrote, at most maxFile bytes. The
// error of a program that failed ends with the last line of its complaint.
func output(cmd *exec.Cmd) ([]byte, error) {
	return collect(cmd, func() error {
		trials.RLock()
		defer trials.RUnlock()
		return cmd.Start() // returns when the child has become the program
	})
}

// outputInTrial is output for who holds trials already.
func outputInTrial(cmd *exec.Cmd) ([]byte, error) { return collect(cmd, cmd.Start) }

func collect(cmd *exec.Cmd, start func() error) ([]byte, error) {
	out, complaint := bounded{most: maxFile}, bounded{most: 1 << 16}
	cmd.Stdout, cmd.Stderr = &out, &complaint
	if err := start(); err != nil {
		return nil, err
	}
	err := cmd.Wait()
	if exit := (*exec.ExitError)(nil); errors.As(err, &exit) {
		lines := strings.Split(strings.TrimSpace(complaint.String()), "\n")
		if last := oneLine(lines[len(lines)-1]); last != "" {
			err = fmt.Errorf("%w: %s", err, last)
		}
	}
	return out.Bytes(), err
}

// bounded keeps the first bytes and drops the rest.
type bounded struct {
	bytes.Buffer
	most int
}

func (b *bounded) Write(p []byte) (int, error) {
	if room := b.most - b.Len(); room > 0 {
		b.Buffer.Write(p[:min(room, len(p))])
	}
	return len(p), nil
}

// patiently repeats what unmounts for as long as it is busy, up to two seconds:
// whoever looks through /proc holds a mount for an instant.
func patiently(f func() error) error {
	deadline := time.Now().Add(2 * time.Second)
	for pause := time.Millisecond; ; pause = min(2*pause, 50*time.Millisecond) {
		err := f()
		if !busy(err) || time.Now().After(deadline) {
			return err
		}
		time.Sleep(pause) // the kernel has no event to wait for
	}
}

func busy(err error) bool {
	var v *volume.BusyError
	var w *view.BusyError
	return errors.As(err, &v) || errors.As(err, &w) || errors.Is(err, unix.EBUSY)
}

// undo unmounts one mount of a view.
func undo(m view.Mount) error {
	return patiently(func() error { return view.Undo([]view.Mount{m}) })
}
