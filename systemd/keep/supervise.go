package keep

import (
	"bufio"
	"context"
	"encoding/json"
	"fmt"
	"io"
	"net"
	"os"
	"os/signal"
	"path/filepath"
	"runtime"
	"slices"
	"strconv"
	"strings"
	"sync"
	"sync/atomic"
	"syscall"
	"time"

	"golang.org/x/sys/unix"

	"overkeep/crypt/crashpoint"
	"overkeep/overlay/layout"
	"overkeep/overlay/lower"
	"overkeep/overlay/move"
	"overkeep/overlay/pins"
	"overkeep/overlay/view"
)

// The supervisor is the one process that stays while a keep is unlocked. It
// lives in the view, runs the personal nix-daemon, answers for the system store
// (so that the system's collector never takes what the keep has been told is
// there), keeps the pins, and makes the overlay see the system store grow. It
// holds no file of the volume open itself.
type superviseRequest struct {
	Root      string    `json:"root"`
	Name      string    `json:"name"`
	User      view.User `json:"user"`
	NixDaemon string    `json:"nix_daemon"`
	Env       []string  `json:"env"`
}

// systemGCLock is held by the system's collector while it runs (gc.cc).
const systemGCLock = "/nix/var/nix/gc.lock"

// Descriptors that it is given; Keep.Outside opens them through /proc.
const (
	fdLowerDir = 3 // the system store, below the overlay
	fdHostRoot = 4 // the root directory outside of the view
)

type supervisor struct {
	superviseRequest
	k        layout.Keep
	alone    *os.File // locked for as long as this process lives
	personal *net.UnixListener
	listenFD *os.File
	lowerDir *os.File
	cancel   context.CancelFunc // ends watches and proxy
	starter  *starter

	pinner      *pins.Pinner
	pinned      []string       // the answer to needs at the last time, if all of it was valid
	unforgotten atomic.Bool    // rows that nothing reaches could not be removed
	changed     atomic.Bool    // the keep's database, since the pins were brought up to date
	watching    sync.WaitGroup // what has the volume open now and then, or touches a mount

	stopping sync.Once

	mu       sync.Mutex
	daemon   int           // pid of the personal nix-daemon, 0 when it does not run
	starts   int           // since the last unlock
	gaveUp   bool          // it died again and again
	draining chan struct{} // nil while serving; closed when the daemon has gone
}

func superviseMain() int {
	answer := func(err error) {
		r := reply{Done: true}
		if err != nil {
			r.Error, _ = json.Marshal(Classify(err))
		}
		_ = json.NewEncoder(os.Stdout).Encode(r)
	}
	s := &supervisor{starter: newStarter(), lowerDir: os.NewFile(fdLowerDir, "system store")}
	b, err := io.ReadAll(io.LimitReader(os.Stdin, 1<<20))
	if err == nil {
		err = strictJSON(b, &s.superviseRequest)
	}
	if err == nil {
		s.k, err = layout.New(s.Root, s.Name)
	}
	if err != nil {
		answer(err)
		return 1
	}
	s.pinner = &pins.Pinner{Dir: pins.Dir{Path: s.k.Pins(), GCLock: systemGCLock}, Needs: s.needs}
	// Orphaned workers of the daemon become ours, so that none is lost sight of.
	_ = unix.Prctl(unix.PR_SET_CHILD_SUBREAPER, 1, 0, 0, 0)
	signal.Ignore(syscall.SIGHUP, syscall.SIGINT)
	ctx, cancel := context.WithCancel(context.Background())
	s.cancel = cancel
	control, err := s.start(ctx)
	answer(err)
	if err != nil {
		return 1
	}
	if err := toNull(0, 1); err != nil {
		return 1
	}
	term := make(chan os.Signal, 1)
	signal.Notify(term, syscall.SIGTERM)
	go func() {
		<-term
		s.drain()
		os.Exit(0)
	}()
	s.serveControl(control)
	return 0
}

// start brings up the sockets and the daemon; on return all sockets listen, and a
// later command finds this process by its control socket.
func (s *supervisor) start(ctx context.Context) (*net.UnixListener, error) {
	var err error
	s.alone, err = os.OpenFile(supervisorLock(s.k), os.O_CREATE|os.O_RDWR|unix.O_NOFOLLOW, 0o600)
	if err != nil {
		return nil, err
	}
	if err := unix.Flock(int(s.alone.Fd()), unix.LOCK_EX|unix.LOCK_NB); err != nil {
		return nil, errorf(CodeBusyRun, s.Name, "keep %q has a supervisor already", s.Name)
	}
	if err := s.alone.Truncate(0); err != nil {
		return nil, err
	}
	if _, err := fmt.Fprintln(s.alone, os.Getpid()); err != nil {
		return nil, err
	}
	lowerSock, err := listen(filepath.Join(s.k.LowerSocketDir(), "socket"), 0, 0)
	if err != nil {
		return nil, err
	}
	proxy := &lower.Proxy{
		Upstream: filepath.Join(s.k.SystemSocketDir(), "socket"),
		GCLock:   systemGCLock,
		Absent:   s.absent,
		BeforeClose: func(ctx context.Context) error {
			_, err := s.pinner.Add(ctx)
			return err
		},
		AllowUID: func(uid uint32) bool { return uid == 0 },
	}
	s.watching.Go(func() { _ = proxy.Serve(ctx, lowerSock) })

	control, err := listen(filepath.Join(s.k.LowerSocketDir(), "control"), 0, 0)
	if err != nil {
		return nil, err
	}
	// What an earlier supervisor had no time to do, before anything can ask.
	soon, done := context.WithTimeout(ctx, answerGrace)
	defer done()
	if _, err := s.pinner.Add(soon); err != nil {
		return nil, errorf(CodeNoNix, layout.NixDaemonSocket+"/socket", "the system's nix-daemon does not answer: %w", err)
	}
	// Before the daemon is started: one that dies at once is seen, too.
	ended := make(chan os.Signal, 16)
	signal.Notify(ended, syscall.SIGCHLD)
	if err := s.serve(); err != nil {
		return nil, err
	}
	go s.reap(ended)
	s.watching.Go(func() { s.watchPins(ctx) })
	s.watching.Go(func() { s.watchLower(ctx) })
	return control, nil
}

// toNull points descriptors at /dev/null.
func toNull(fds ...int) error {
	null, err := os.OpenFile(os.DevNull, os.O_RDWR, 0)
	if err != nil {
		return err
	}
	defer null.Close()
	for _, fd := range fds {
		if err := unix.Dup2(int(null.Fd()), fd); err != nil {
			return err
		}
	}
	return nil
}

// serve opens the personal socket and starts the daemon on it. s.mu is held, or
// nothing else runs yet.
func (s *supervisor) serve() (err error) {
	s.starts, s.gaveUp, s.draining = 0, false, nil
	if s.personal, err = listen(filepath.Join(s.k.SocketDir(), "socket"), s.User.UID, s.User.GID); err != nil {
		return err
	}
	if s.listenFD, err = s.personal.File(); err != nil {
		return err
	}
	return s.startDaemon()
}

// supervisorLock is the file that a supervisor holds locked; its pid stands in it.
func supervisorLock(k layout.Keep) string { return filepath.Join(k.LowerSocketDir(), "supervisor") }

// listen makes a Unix socket that only uid (and root) can connect to.
func listen(path string, uid, gid int) (*net.UnixListener, error) {
	_ = os.Remove(path)
	l, err := net.ListenUnix("unix", &net.UnixAddr{Name: path, Net: "unix"})
	if err != nil {
		return nil, err
	}
	l.SetUnlinkOnClose(false)
	if err := os.Chmod(path, 0o600); err != nil {
		return nil, err
	}
	return l, os.Lchown(path, uid, gid)
}

// startDaemon starts the personal nix-daemon on the listening socket, as systemd
// would (sd_listen_fds(3)). Its messages go into the keep.
func (s *supervisor) startDaemon() error {
	crashpoint.At("supervise.daemon")
	logFile, err := s.openLog()
	if err != nil {
		return err
	}
	defer logFile.Close()
	// Our own last words, should there be any, may hold private names, too.
	if err := unix.Dup2(int(logFile.Fd()), 2); err != nil {
		return err
	}
	null, err := os.Open(os.DevNull)
	if err != nil {
		return err
	}
	defer null.Close()
	// Started by hand, not by os/exec: reap waits for every child of this
	// process, the daemon's orphans included. The daemon dies with the supervisor.
	p, err := s.starter.start("/proc/self/exe", []string{"overkeep", "internal", "exec-daemon"}, &os.ProcAttr{
		Dir:   "/",
		Env:   append(slices.Clip(s.Env), "LISTEN_FDS=1", execDaemonVar+"="+s.NixDaemon),
		Files: []*os.File{null, logFile, logFile, s.listenFD},
		Sys:   &syscall.SysProcAttr{Setsid: true, Pdeathsig: syscall.SIGKILL},
	})
	if err != nil {
		return err
	}
	s.daemon = p.Pid
	s.starts++
	return p.Release()
}

// openLog opens the daemon's log, begun anew when it is long.
func (s *supervisor) openLog() (*os.File, error) {
	path := filepath.Join(s.k.Log(), "daemon.log")
	flags := os.O_CREATE | os.O_WRONLY | os.O_APPEND | unix.O_NOFOLLOW
	if fi, err := os.Lstat(path); err == nil && fi.Size() > 1<<20 {
		flags |= os.O_TRUNC
	}
	return os.OpenFile(path, flags, 0o600)
}

// starter starts processes from one thread that lives as long as this process:
// the parent-death signal is sent when the thread that forked ends, not the
// process (PR_SET_PDEATHSIG(2const)).
type starter struct{ work chan func() }

func newStarter() *starter {
	s := &starter{work: make(chan func())}
	go func() {
		runtime.LockOSThread()
		for f := range s.work {
			f()
		}
	}()
	return s
}

func (s *starter) start(name string, argv []string, attr *os.ProcAttr) (p *os.Process, err error) {
	done := make(chan struct{})
	s.work <- func() {
		p, err = os.StartProcess(name, argv, attr)
		close(done)
	}
	<-done
	return p, err
}

// execDaemonVar tells the helper process which nix-daemon to become.
const execDaemonVar = "OVERKEEP_NIX_DAEMON"

// execDaemonMain becomes the nix-daemon: LISTEN_PID must be the pid of the
// process that reads it.
func execDaemonMain() int {
	path := os.Getenv(execDaemonVar)
	_ = os.Unsetenv(execDaemonVar)
	env := append(os.Environ(), "LISTEN_PID="+strconv.Itoa(os.Getpid()))
	_, _ = fmt.Fprintln(os.Stderr, "overkeep: exec", path, unix.Exec(path, []string{path, "--daemon"}, env))
	return 127
}

// maxStarts bounds how often a daemon that dies is started again in one unlock.
const maxStarts = 20

// reap waits for every child, and starts the daemon again when it died unasked.
func (s *supervisor) reap(sig <-chan os.Signal) {
	for range sig {
		for {
			var ws unix.WaitStatus
			pid, err := unix.Wait4(-1, &ws, unix.WNOHANG, nil)
			if err == unix.EINTR {
				continue
			}
			if err != nil || pid <= 0 {
				break
			}
			s.mu.Lock()
			if pid == s.daemon {
				s.daemon = 0
				switch {
				case s.draining != nil:
					close(s.draining)
				case s.starts >= maxStarts || s.startDaemon() != nil:
					// Nobody would answer: a refused connection beats a silent one.
					s.hangUp()
					s.draining = make(chan struct{})
					close(s.draining)
					s.gaveUp = true
				}
			}
			s.mu.Unlock()
		}
	}
}

// drain refuses new work: the socket is gone, the daemon that would accept is
// gone, nothing of ours is open in the volume. Workers that serve a client go on
// and are returned.
func (s *supervisor) drain() []int {
	s.mu.Lock()
	if s.draining == nil {
		s.draining = make(chan struct{})
		s.hangUp()
		if s.daemon == 0 {
			close(s.draining)
		} else {
			_ = unix.Kill(s.daemon, unix.SIGTERM)
		}
	}
	died, daemon := s.draining, s.daemon
	s.mu.Unlock()
	select {
	case <-died:
	case <-time.After(killGrace):
		if daemon != 0 {
			_ = unix.Kill(daemon, unix.SIGKILL) // ours, not reaped: the pid is still its own
		}
		<-died
	}
	return children(os.Getpid())
}

// hangUp takes the personal socket away.
func (s *supervisor) hangUp() {
	_ = os.Remove(filepath.Join(s.k.SocketDir(), "socket"))
	s.personal.Close()
	s.listenFD.Close()
	_ = toNull(2)
}

// resume serves again after a lock that was given up.
func (s *supervisor) resume() error {
	s.mu.Lock()
	defer s.mu.Unlock()
	if s.draining == nil {
		return nil
	}
	return s.serve()
}

// children lists the children of every thread of a process (proc_pid_task(5)).
func children(pid int) []int {
	files, _ := filepath.Glob(fmt.Sprintf("/proc/%d/task/*/children", pid))
	var out []int
	for _, file := range files {
		b, _ := os.ReadFile(file)
		for _, f := range strings.Fields(string(b)) {
			if n, err := strconv.Atoi(f); err == nil {
				out = append(out, n)
			}
		}
	}
	return out
}

// gaveUp is the answer to "status" when the daemon died again and again.
const gaveUp = "gave up"

// serveControl answers root's commands, one line each. It returns after "stop".
func (s *supervisor) serveControl(l *net.UnixListener) {
	stopped := make(chan struct{})
	go func() {
		for {
			conn, err := l.Accept()
			if err != nil {
				return
			}
			go func() {
				defer conn.Close()
				line, _ := bufio.NewReader(io.LimitReader(conn, 64)).ReadString('\n')
				if s.obey(strings.TrimSpace(line), conn) {
					conn.Close()
					close(stopped)
				}
			}()
		}
	}()
	<-stopped
}

// obey does one command and reports whether it was the last.
func (s *supervisor) obey(line string, answer io.Writer) (last bool) {
	switch line {
	case "status":
		s.mu.Lock()
		defer s.mu.Unlock()
		if s.gaveUp {
			fmt.Fprintln(answer, gaveUp)
		} else {
			fmt.Fprintln(answer, "well")
		}
	case "drain":
		fmt.Fprintf(answer, "workers %d\n", len(s.drain()))
	case "resume":
		if s.resume() == nil {
			fmt.Fprintln(answer, "serving")
		}
	case "journal":
		if move.Unfinished(s.k.Journal()) {
			fmt.Fprintln(answer, unfinished)
		} else {
			fmt.Fprintln(answer, "ended")
		}
	case "pin":
		ctx, done := context.WithTimeout(context.Background(), killGrace)
		defer done()
		if _, err := s.pinner.Add(ctx); err != nil {
			fmt.Fprintln(answer, "pins that could not be written")
		} else {
			fmt.Fprintln(answer, settled)
		}
	case "settle":
		fmt.Fprintln(answer, s.settle())
	case "stop":
		s.stopping.Do(func() {
			s.drain()
			s.cancel()
			s.watching.Wait()
			if s.changed.Load() {
				ctx, done := context.WithTimeout(context.Background(), killGrace)
				_, _ = s.pinner.Exact(ctx)
				done()
			}
			s.pinner.Wait()
			last = true
		})
		fmt.Fprintln(answer, "stopped")
	}
	return last
}
