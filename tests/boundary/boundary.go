// Package boundary kills or disturbs a program at any one of its system calls
// that change something.
//
// Run starts a command under a seccomp filter that reports every such call of it
// and of all its descendants (writes, names, modes, times, sizes, syncs, mounts,
// and the ioctls that matter to a file system) before it is carried out
// (seccomp_unotify(2)). The calls are numbered from 1 in one order over all
// threads and processes. At a given number everything the command started is
// killed, or the call fails with a given error, or the file system stops as in a
// power cut; all other calls are carried out unchanged. So
//
//	for n := 1; ; n++ { boundary -kill n -- overkeep apply; ... }
//
// leaves the disk in every state that a kill of that command can leave it in, as
// far as one process does things one after the other. Calls on what has no state
// are not counted: pipes, sockets, terminals, memory files, /proc, /sys, and
// devices such as /dev/null.
//
// Start with Binary, which builds the tool (tests/boundary/tool) so that it can be
// installed in a machine (tests/bed), and Command.
//
// It does not see what others do at the command's request (a daemon that was
// there before), writes through memory maps (SQLite's shared-memory index), nor
// what the kernel does later. Threads that race are counted in the order in which
// the kernel hands the calls out: a number then means no fixed call. It is no
// sandbox. It needs CAP_SYS_ADMIN and Linux 6.0.
package boundary

import (
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"os"
	"strconv"
	"strings"
	"syscall"

	"golang.org/x/sys/unix"
)

// Config is what to run, and what to do to it.
type Config struct {
	Args []string // the command; Args[0] is looked up in PATH

	// At is the number of the call at which something happens; 0: never.
	// What happens is Errno if that is not 0; else everything is killed, after
	// Cut's file system has stopped if Cut is not empty.
	At    int
	Errno unix.Errno // the call is not carried out and returns this, once
	Cut   string     // a path on an ext4; what was not synced on it is lost

	// Locks counts flock(2) as well. It changes nothing that lasts, but can fail.
	Locks bool

	// Trace gets every counted call, a line each. nil: nothing.
	Trace io.Writer
}

// Report says what was seen.
type Report struct {
	Count int    // calls counted; a call that fails is one as well
	At    int    // Config.At, if it was reached, else 0: then nothing happened
	Call  string // name of the call number At
	// Object is the path that call was about, as the process had it; two for a
	// rename, a link or a move, with " -> " between them. It may be a private name.
	Object string
	Code   int // exit code of the command; 128 + signal when killed by one
}

// String is "write /some/file".
func (r Report) String() string {
	if r.At == 0 {
		return fmt.Sprintf("unharmed after %d calls", r.Count)
	}
	return fmt.Sprintf("call %d: %s %s", r.At, r.Call, r.Object)
}

// Run runs the command to the end of all its descendants, those in the background
// included. Standard input, output and error are the command's.
//
// The process that calls it becomes a subreaper (prctl(2)) and reaps all its
// children: use it in a process of its own.
func Run(c Config) (Report, error) {
	if len(c.Args) == 0 {
		return Report{}, errors.New("no command")
	}
	if err := unix.Prctl(unix.PR_SET_CHILD_SUBREAPER, 1, 0, 0, 0); err != nil {
		return Report{}, fmt.Errorf("become a subreaper: %w", err)
	}
	cut := -1
	if c.Cut != "" { // opened now: an open is not what a power cut begins with
		var err error
		if cut, err = unix.Open(c.Cut, unix.O_RDONLY|unix.O_CLOEXEC, 0); err != nil {
			return Report{}, &os.PathError{Op: "open", Path: c.Cut, Err: err}
		}
		defer unix.Close(cut)
	}
	pid, listener, err := start(c)
	if err != nil {
		return Report{}, err
	}
	defer unix.Close(listener)
	code := make(chan int, 1)
	go func() { code <- reap(pid) }()
	w := watcher{Config: c, listener: listener, cut: cut}
	err = w.watch()
	if err != nil { // nobody answers their calls any more
		killAll()
	}
	w.report.Code = <-code
	return w.report, err
}

// reap waits for all children, those we inherit included, and returns the exit
// code of one of them.
func reap(pid int) (code int) {
	for {
		var ws unix.WaitStatus
		got, err := unix.Wait4(-1, &ws, 0, nil)
		switch {
		case errors.Is(err, unix.EINTR):
		case err != nil: // ECHILD: there are none
			return code
		case got == pid && ws.Signaled():
			code = 128 + int(ws.Signal())
		case got == pid:
			code = ws.ExitStatus()
		}
	}
}

// Errnos are the names that Main takes.
var Errnos = map[string]unix.Errno{
	"EIO": unix.EIO, "ENOSPC": unix.ENOSPC, "EACCES": unix.EACCES, "EINTR": unix.EINTR, "EDQUOT": unix.EDQUOT,
}

const usage = `usage: boundary [-kill N | -fail N:ERRNO | -cut N:PATH] [-locks] [-report FILE] [-trace FILE] -- COMMAND [ARG...]`

// exitTrouble is the exit code when the tool itself could not do its work; the
// command's own are below 128, or 128 + signal.
const exitTrouble = 255

// Main is the tool: it runs the command in args as they say, writes the report as
// JSON into a file, and returns the command's exit code.
func Main(args []string) int {
	report, err := run(args)
	if err != nil {
		fmt.Fprintln(os.Stderr, "boundary:", err)
		return exitTrouble
	}
	return report.Code
}

func run(args []string) (Report, error) {
	var c Config
	var reportFile, traceFile string
	for ; len(args) > 0 && args[0] != "--"; args = args[1:] {
		option := args[0]
		if option == "-locks" {
			c.Locks = true
			continue
		}
		if args = args[1:]; len(args) == 0 {
			return Report{}, errors.New(usage)
		}
		number, rest, _ := strings.Cut(args[0], ":")
		switch option {
		case "-report":
			reportFile = args[0]
			continue
		case "-trace":
			traceFile = args[0]
			continue
		case "-kill":
		case "-fail":
			if c.Errno = Errnos[rest]; c.Errno == 0 {
				return Report{}, fmt.Errorf("%q is no known error", rest)
			}
		case "-cut":
			if c.Cut = rest; rest == "" {
				return Report{}, errors.New(usage)
			}
		default:
			return Report{}, errors.New(usage)
		}
		var err error
		if c.At, err = strconv.Atoi(number); err != nil || c.At < 1 {
			return Report{}, fmt.Errorf("%q is not a positive number", number)
		}
	}
	if len(args) < 2 {
		return Report{}, errors.New(usage)
	}
	c.Args = args[1:]
	if traceFile != "" {
		f, err := os.OpenFile(traceFile, os.O_WRONLY|os.O_CREATE|os.O_TRUNC, 0o600)
		if err != nil {
			return Report{}, err
		}
		defer f.Close()
		c.Trace = f
	}
	report, err := Run(c)
	if err != nil || reportFile == "" {
		return report, err
	}
	text, err := json.Marshal(report)
	if err != nil {
		return report, err
	}
	return report, os.WriteFile(reportFile, text, 0o600)
}

// lookup finds the command as a shell would. os/exec's own works as well but
// brings a Wait along that fights with ours.
func lookup(name string) (string, error) {
	if strings.Contains(name, "/") {
		return name, nil
	}
	for dir := range strings.SplitSeq(os.Getenv("PATH"), ":") {
		file := dir + "/" + name
		if fi, err := os.Stat(file); err == nil && fi.Mode().IsRegular() && fi.Mode()&0o111 != 0 {
			return file, nil
		}
	}
	return "", &os.PathError{Op: "look up", Path: name, Err: syscall.ENOENT}
}
