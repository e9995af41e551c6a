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

// endSupervisor waits for the end of a supervisor, which it asks for by signal
// unless it has been asked already: SIGTERM drains, SIGKILL is for one that hangs.
func endSupervisor(pid int, asked bool) {
	fd, err := unix.PidfdOpen(pid, 0)
	if err != nil {
		return
	}
	defer unix.Close(fd)
	signals := []unix.Signal{unix.SIGTERM, unix.SIGKILL}
	for i, sig := range signals {
		if i > 0 || !asked {
			_ = unix.PidfdSendSignal(fd, sig, nil, 0)
		}
		n, err := unix.Poll([]unix.PollFd{{Fd: int32(fd), Events: unix.POLLIN}}, int(killGrace.Milliseconds()))
		for err == unix.EINTR {
			n, err = unix.Poll([]unix.PollFd{{Fd: int32(fd), Events: unix.POLLIN}}, int(killGrace.Milliseconds()))
		}
		if n > 0 {
			return
		}
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
