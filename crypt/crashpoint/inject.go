//go:build inject

package crashpoint

import (
	"fmt"
	"io"
	"os"
	"strconv"
	"strings"
	"sync"
	"syscall"

	"golang.org/x/sys/unix"
)

// Enabled reports whether this binary was built with the tag "inject".
const Enabled = true

// From fs/ext4/ext4.h and include/uapi/linux/ext4.h: EXT4_IOC_SHUTDOWN is
// _IOR('X', 125, __u32); flag 2 drops the journal's unwritten part, so that the
// disk is left as after a power cut.
const (
	ext4IOCShutdown          = 2<<30 | 4<<16 | 'X'<<8 | 125
	ext4GoingFlagsNoLogFlush = 2

	crashAt, crashHow     = "OVERKEEP_CRASH_AT", "OVERKEEP_CRASH_HOW"
	crashCount, crashLog  = "OVERKEEP_CRASH_COUNT", "OVERKEEP_CRASH_LOG"
	kill, killGroup, stop = "kill", "killgroup", "stop"
	shutdownPrefix        = "shutdown:"
)

var state struct {
	sync.Mutex
	count int
}

// At counts the call, logs its name and crashes when the environment says so.
// A malformed environment panics: a test that injects nothing proves nothing.
func At(name string) {
	state.Lock()
	defer state.Unlock()
	state.count++
	n := state.count
	if path := os.Getenv(crashCount); path != "" {
		var err error
		if n, err = next(path); err != nil {
			panic(fmt.Sprintf("%s=%q: %v", crashCount, path, err))
		}
	}
	if path := os.Getenv(crashLog); path != "" {
		logName(path, name)
	}
	want := os.Getenv(crashAt)
	if want == "" {
		return
	}
	at, err := strconv.Atoi(want)
	if err != nil || at < 1 {
		panic(fmt.Sprintf("%s=%q is not a positive number", crashAt, want))
	}
	if n == at {
		crash(os.Getenv(crashHow))
	}
}

// next adds one to the number in the file, of which an empty one holds 0, and
// returns it.
func next(path string) (int, error) {
	f, err := os.OpenFile(path, os.O_RDWR|os.O_CREATE, 0o600)
	if err != nil {
		return 0, err
	}
	defer f.Close()
	for {
		if err = unix.Flock(int(f.Fd()), unix.LOCK_EX); err != unix.EINTR {
			break
		}
	}
	if err != nil {
		return 0, err
	}
	b, err := io.ReadAll(f)
	if err != nil {
		return 0, err
	}
	n := 0
	if len(b) > 0 {
		if n, err = strconv.Atoi(string(b)); err != nil {
			return 0, err
		}
	}
	n++
	// Only ever longer: whoever is killed in the middle leaves a number.
	_, err = f.WriteAt([]byte(strconv.Itoa(n)), 0)
	return n, err
}

func logName(path, name string) {
	f, err := os.OpenFile(path, os.O_WRONLY|os.O_APPEND|os.O_CREATE, 0o600)
	if err != nil {
		panic(err)
	}
	defer f.Close()
	if _, err := fmt.Fprintln(f, name); err != nil {
		panic(err)
	}
}

// crash does how. It returns only from a stop.
func crash(how string) {
	path, shutdown := strings.CutPrefix(how, shutdownPrefix)
	switch {
	case how == stop:
		_ = syscall.Kill(os.Getpid(), syscall.SIGSTOP)
		return
	case shutdown:
		if err := shutdownExt4(path); err != nil {
			panic(fmt.Sprintf("shut down the filesystem of %q: %v", path, err))
		}
		_ = syscall.Kill(0, syscall.SIGKILL)
	case how == killGroup:
		_ = syscall.Kill(0, syscall.SIGKILL)
	case how == "" || how == kill:
		_ = syscall.Kill(os.Getpid(), syscall.SIGKILL)
	default:
		panic(fmt.Sprintf("%s=%q", crashHow, how))
	}
	select {} // the signal is on its way; go no step further
}

func shutdownExt4(path string) error {
	fd, err := unix.Open(path, unix.O_RDONLY|unix.O_CLOEXEC, 0)
	if err != nil {
		return err
	}
	defer unix.Close(fd)
	return unix.IoctlSetPointerInt(fd, ext4IOCShutdown, ext4GoingFlagsNoLogFlush)
}
