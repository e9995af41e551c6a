package boundary

import (
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"runtime"
	"strconv"
	"strings"
	"syscall"

	"golang.org/x/sys/unix"
)

// childName is argv[0] of ourselves as the process that becomes the command.
const childName = "overkeep-boundary-child"

func init() {
	if os.Args[0] != childName || len(os.Args) < 4 {
		return
	}
	// The filter is this thread's, and exec(2) makes this thread the process.
	runtime.LockOSThread()
	err := become(os.Args[1] == "locks", os.Args[2], os.Args[3:])
	fmt.Fprintln(os.Stderr, "boundary:", err)
	os.Exit(exitTrouble)
}

// become installs the filter, hands the listener over on descriptor 3, and
// becomes the command. None of its own calls after the filter is counted: it only
// sends a message and executes.
func become(locks bool, file string, args []string) error {
	program, env := filter(locks), os.Environ()
	unix.CloseOnExec(3)
	listener, err := install(program)
	if err != nil {
		// The parent reads the end of file.
		return err
	}
	if err := unix.Sendmsg(3, []byte{1}, unix.UnixRights(listener), nil, 0); err != nil {
		return fmt.Errorf("hand over the listener: %w", err)
	}
	return &os.PathError{Op: "execute", Path: file, Err: syscall.Exec(file, args, env)}
}

// start starts the command and returns its process id and the listener.
func start(c Config) (pid, listener int, err error) {
	file, err := lookup(c.Args[0])
	if err != nil {
		return 0, -1, err
	}
	pair, err := unix.Socketpair(unix.AF_UNIX, unix.SOCK_STREAM|unix.SOCK_CLOEXEC, 0)
	if err != nil {
		return 0, -1, fmt.Errorf("socketpair: %w", err)
	}
	defer unix.Close(pair[0])
	locks := "-"
	if c.Locks {
		locks = "locks"
	}
	pid, err = syscall.ForkExec("/proc/self/exe", append([]string{childName, locks, file}, c.Args...), &syscall.ProcAttr{
		Env: os.Environ(), Files: []uintptr{0, 1, 2, uintptr(pair[1])},
	})
	unix.Close(pair[1])
	if err != nil {
		return 0, -1, fmt.Errorf("start: %w", err)
	}
	b, oob := make([]byte, 1), make([]byte, unix.CmsgSpace(4))
	for {
		var n, oobn int
		n, oobn, _, _, err = unix.Recvmsg(pair[0], b, oob, unix.MSG_CMSG_CLOEXEC)
		if errors.Is(err, unix.EINTR) {
			continue
		}
		if err == nil && (n != 1 || oobn == 0) {
			err = errors.New("the child ended before its filter was there")
		}
		break
	}
	if err != nil {
		_, _ = unix.Wait4(pid, nil, 0, nil)
		return 0, -1, err
	}
	msgs, err := unix.ParseSocketControlMessage(oob)
	if err != nil {
		return 0, -1, err
	}
	fds, err := unix.ParseUnixRights(&msgs[0])
	if err != nil {
		return 0, -1, err
	}
	return pid, fds[0], nil
}

// killAll kills all descendants: first those that started others, so that nobody
// lives to learn of a child's death. It returns when they are all on their way;
// orphans become our children and are found in the next round.
func killAll() {
	for {
		pids := descendants()
		if len(pids) == 0 {
			return
		}
		for _, pid := range pids {
			_ = unix.Kill(pid, unix.SIGKILL)
		}
	}
}

// descendants are the living ones, parents before children.
func descendants() []int {
	children := map[int][]int{}
	entries, _ := os.ReadDir("/proc")
	for _, e := range entries {
		pid, err := strconv.Atoi(e.Name())
		if err != nil {
			continue
		}
		stat, err := os.ReadFile(filepath.Join("/proc", e.Name(), "stat"))
		if err != nil {
			continue
		}
		// pid (comm) state ppid ...; comm may hold anything, the last ) ends it.
		_, after, _ := strings.Cut(string(stat[strings.LastIndexByte(string(stat), ')'):]), " ")
		f := strings.Fields(after)
		if len(f) < 2 || f[0] == "Z" || f[0] == "X" {
			continue
		}
		if ppid, err := strconv.Atoi(f[1]); err == nil {
			children[ppid] = append(children[ppid], pid)
		}
	}
	queue := []int{os.Getpid()}
	for i := 0; i < len(queue); i++ {
		queue = append(queue, children[queue[i]]...)
	}
	return queue[1:]
}
