package keep

import (
	"bufio"
	"fmt"
	"io"
	"net"
	"os"
	"path/filepath"
	"strings"
	"time"

	"golang.org/x/sys/unix"

	"overkeep/overlay/layout"
)

// The supervisor as other commands find it, speak to it and end it. What it does
// itself is in supervise.go.

// supervisorPID returns the pid of whoever listens on the control socket, by the
// kernel's word (SO_PEERCRED, unix(7)), or of whoever holds the lock file should
// the socket have been removed; 0 when there is nobody.
func supervisorPID(k layout.Keep) int {
	if conn, err := dialControl(k); err == nil {
		defer conn.Close()
		pid := 0
		if raw, err := conn.SyscallConn(); err == nil {
			_ = raw.Control(func(fd uintptr) {
				if c, err := unix.GetsockoptUcred(int(fd), unix.SOL_SOCKET, unix.SO_PEERCRED); err == nil && c.Uid == 0 {
					pid = int(c.Pid)
				}
			})
		}
		return pid
	}
	f, err := os.OpenFile(supervisorLock(k), os.O_RDONLY|unix.O_NOFOLLOW|unix.O_NONBLOCK, 0)
	if err != nil {
		return 0
	}
	defer f.Close()
	if unix.Flock(int(f.Fd()), unix.LOCK_SH|unix.LOCK_NB) == nil {
		return 0 // nobody holds it; closing lets go again
	}
	pid := 0
	_, _ = fmt.Fscan(io.LimitReader(f, 32), &pid)
	return pid
}

func dialControl(k layout.Keep) (*net.UnixConn, error) {
	return net.DialUnix("unix", nil, &net.UnixAddr{Name: filepath.Join(k.LowerSocketDir(), "control"), Net: "unix"})
}

// endSupervisor ends a supervisor: SIGTERM drains, SIGKILL is for one that hangs.
func endSupervisor(pid int) {
	e := expectEnd(pid)
	defer e.close()
	e.signal(unix.SIGTERM)
	e.wait()
}

// ending is a process that is about to end, told from any later one of its number;
// nil is one that has ended.
type ending struct{ pid, fd int }

// expectEnd takes hold of a process before it is asked to end.
func expectEnd(pid int) *ending {
	fd, err := unix.PidfdOpen(pid, 0)
	if err != nil {
		return nil // gone already
	}
	return &ending{pid, fd}
}

func (e *ending) signal(sig unix.Signal) {
	if e != nil {
		_ = unix.PidfdSendSignal(e.fd, sig, nil, 0)
	}
}

// process is its pid, 0 for none.
func (e *ending) process() int {
	if e == nil {
		return 0
	}
	return e.pid
}

// wait waits for the end, with SIGKILL after a while, and reports whether it came.
func (e *ending) wait() bool {
	if e == nil || e.within(killGrace) {
		return true
	}
	e.signal(unix.SIGKILL)
	return e.within(killGrace)
}

func (e *ending) within(d time.Duration) bool {
	for until := time.Now().Add(d); ; {
		n, err := unix.Poll([]unix.PollFd{{Fd: int32(e.fd), Events: unix.POLLIN}}, max(0, int(time.Until(until).Milliseconds())))
		if err != unix.EINTR {
			return n > 0
		}
	}
}

func (e *ending) close() {
	if e != nil {
		_ = unix.Close(e.fd)
	}
}

// control sends one line to the supervisor and returns its answer.
func control(k layout.Keep, line string) (string, error) {
	conn, err := dialControl(k)
	if err != nil {
		return "", err
	}
	defer conn.Close()
	_ = conn.SetDeadline(time.Now().Add(2 * killGrace))
	if _, err := fmt.Fprintln(conn, line); err != nil {
		return "", err
	}
	s, err := bufio.NewReader(conn).ReadString('\n')
	return strings.TrimSpace(s), err
}
