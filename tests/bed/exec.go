package bed

import (
	"bufio"
	"errors"
	"fmt"
	"io"
	"net"
	"os"
	"os/exec"
	"path/filepath"
	"strconv"
	"strings"
	"syscall"
	"testing"
	"time"

	"golang.org/x/sys/unix"
)

// Command is something to run in the machine.
type Command struct {
	User   string   // "root", "alice", "bob"; empty is root
	Script string   // for bash -eu -o pipefail
	Env    []string // "NAME=value", beside the clean default environment
	Stdin  string
	Dir    string        // working directory; empty is the user's home
	Within time.Duration // then it is killed; 0 is five minutes
}

// Result is how a command ended.
type Result struct {
	Stdout, Stderr string
	Code           int // exit code; 128 + signal when killed by one; -1 when it never ran
}

// Failed is the error of a command that ended with a code other than 0.
type Failed struct {
	User, Script string
	Result
}

func (f *Failed) Error() string {
	return fmt.Sprintf("exit code %d of (%s) %s\n%s%s", f.Code, f.User, f.Script, f.Stdout, f.Stderr)
}

// Proc is a running command.
type Proc struct {
	m        *Machine
	c        Command
	cmd      *exec.Cmd
	out, err *os.File // memory files: no pipe that a left-behind daemon could keep open
	done     chan struct{}
	res      error
}

// Exec runs a command to its end. The error is nil when it ran at all and ended
// in time, whatever its exit code.
func (m *Machine) Exec(c Command) (Result, error) {
	p, err := m.start(c, false)
	if err != nil {
		return Result{Code: -1}, err
	}
	return p.Wait()
}

// Run runs a script as user and returns what it wrote on both outputs, as it
// came. An exit code other than 0 is a *Failed.
func (m *Machine) Run(user, script string, env ...string) (string, error) {
	p, err := m.start(Command{User: user, Script: script, Env: env}, true)
	if err != nil {
		return "", err
	}
	r, err := p.Wait()
	if err == nil && r.Code != 0 {
		err = &Failed{User: user, Script: script, Result: r}
	}
	return r.Stdout, err
}

// Must is Run that fails the test on an error. The output comes without
// surrounding white space.
func (m *Machine) Must(t testing.TB, user, script string, env ...string) string {
	t.Helper()
	out, err := m.Run(user, script, env...)
	if err != nil {
		t.Fatalf("bed: %v", err)
	}
	return strings.TrimSpace(out)
}

// Start runs a script in the background, both outputs in one. It ends with the
// machine if not before.
func (m *Machine) Start(user, script string, env ...string) (*Proc, error) {
	return m.start(Command{User: user, Script: script, Env: env, Within: -1}, true)
}

// start runs a command in all namespaces of the machine but the thread's own
// pid namespace: that one only takes effect for children (setns(2)).
func (m *Machine) start(c Command, together bool) (_ *Proc, err error) {
	if m.init == nil {
		return nil, errors.New("the machine is off")
	}
	if c.User == "" {
		c.User = "root"
	}
	who, err := m.user(c.User)
	if err != nil {
		return nil, err
	}
	p := &Proc{m: m, c: c, done: make(chan struct{})}
	var stdin *os.File
	if stdin, err = memory("stdin"); err != nil {
		return nil, err
	}
	defer stdin.Close()
	if _, err = stdin.WriteAt([]byte(c.Stdin), 0); err != nil {
		return nil, err
	}
	if p.out, err = memory("stdout"); err != nil {
		return nil, err
	}
	if p.err = p.out; !together {
		if p.err, err = memory("stderr"); err != nil {
			return nil, err
		}
	}
	p.cmd = exec.Command("/bin/bash", "-eu", "-o", "pipefail", "-c", c.Script)
	p.cmd.Stdin, p.cmd.Stdout, p.cmd.Stderr = stdin, p.out, p.err
	p.cmd.Dir = who.home
	if c.Dir != "" {
		p.cmd.Dir = c.Dir
	}
	p.cmd.Env = append([]string{
		"PATH=/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin",
		"HOME=" + who.home, "USER=" + c.User, "LOGNAME=" + c.User, "SHELL=/bin/bash",
		"LANG=C.UTF-8", "TERM=dumb",
	}, c.Env...)
	p.cmd.SysProcAttr = &syscall.SysProcAttr{
		Setsid:     true,
		Credential: &syscall.Credential{Uid: who.uid, Gid: who.gid, Groups: who.groups},
	}
	m.guests.Add(1)
	started := make(chan error)
	go onThread(func() error {
		defer m.guests.Done()
		err := m.enter()
		if err == nil {
			err = p.cmd.Start()
		}
		started <- err
		return nil
	})
	if err := <-started; err != nil {
		return nil, fmt.Errorf("start %q in the machine: %w", c.Script, err)
	}
	go func() {
		p.res = p.cmd.Wait()
		close(p.done)
	}()
	return p, nil
}

// enter moves the calling thread into the machine.
func (m *Machine) enter() error {
	if err := unix.Unshare(unix.CLONE_FS); err != nil {
		return fmt.Errorf("unshare: %w", err)
	}
	const all = unix.CLONE_NEWNS | unix.CLONE_NEWPID | unix.CLONE_NEWIPC | unix.CLONE_NEWUTS | unix.CLONE_NEWNET
	if err := unix.Setns(m.pidfd, all); err != nil {
		return fmt.Errorf("setns: %w", err)
	}
	return nil
}

func memory(name string) (*os.File, error) {
	fd, err := unix.MemfdCreate(name, unix.MFD_CLOEXEC)
	if err != nil {
		return nil, fmt.Errorf("memfd_create: %w", err)
	}
	return os.NewFile(uintptr(fd), name), nil
}

// Wait waits for the command's end, within its time.
func (p *Proc) Wait() (Result, error) {
	within := p.c.Within
	if within == 0 {
		within = 5 * time.Minute
	}
	var late <-chan time.Time
	if within > 0 {
		timer := time.NewTimer(within)
		defer timer.Stop()
		late = timer.C
	}
	var err error
	select {
	case <-p.done:
	case <-late:
		p.Kill()
		<-p.done
		err = fmt.Errorf("(%s) %s: killed after %v\n%s", p.c.User, p.c.Script, within, p.Output())
	}
	r := Result{Stdout: text(p.out)}
	if p.err != p.out {
		r.Stderr = text(p.err)
	}
	var exit *exec.ExitError
	switch {
	case p.res == nil:
	case errors.As(p.res, &exit):
		r.Code = exit.ExitCode()
		if ws := exit.Sys().(syscall.WaitStatus); ws.Signaled() {
			r.Code = 128 + int(ws.Signal())
		}
	default:
		r.Code, err = -1, errors.Join(err, p.res)
	}
	return r, err
}

// Done is closed when the command has ended.
func (p *Proc) Done() <-chan struct{} { return p.done }

// PID is its process id as seen from outside the machine.
func (p *Proc) PID() int { return p.cmd.Process.Pid }

// Kill ends it and what it started in its session's process group.
func (p *Proc) Kill() { _ = unix.Kill(-p.cmd.Process.Pid, unix.SIGKILL) }

// Signal sends a signal to the command itself.
func (p *Proc) Signal(s os.Signal) error { return p.cmd.Process.Signal(s) }

// Output is what it has written so far.
func (p *Proc) Output() string { return text(p.out) }

// text reads a memory file from its start, whatever the writers' offset.
func text(f *os.File) string {
	b, _ := io.ReadAll(io.NewSectionReader(f, 0, 1<<30))
	return string(b)
}

type account struct {
	uid, gid uint32
	groups   []uint32
	home     string
}

// user looks a name up in the machine's own files: this process's libc would ask
// the wrong ones.
func (m *Machine) user(name string) (account, error) {
	var a account
	found := false
	err := m.fields("/etc/passwd", 7, func(f []string) {
		if f[0] != name || found {
			return
		}
		uid, err1 := strconv.ParseUint(f[2], 10, 32)
		gid, err2 := strconv.ParseUint(f[3], 10, 32)
		if err1 == nil && err2 == nil {
			found = true
			a = account{uid: uint32(uid), gid: uint32(gid), home: f[5]}
		}
	})
	if err != nil {
		return a, err
	}
	if !found {
		return a, fmt.Errorf("no user %q in the machine", name)
	}
	err = m.fields("/etc/group", 4, func(f []string) {
		for member := range strings.SplitSeq(f[3], ",") {
			if gid, err := strconv.ParseUint(f[2], 10, 32); err == nil && member == name {
				a.groups = append(a.groups, uint32(gid))
			}
		}
	})
	return a, err
}

// fields calls f with every line of n colon-separated fields.
func (m *Machine) fields(path string, n int, f func([]string)) error {
	file, err := os.Open(m.Root + path)
	if err != nil {
		return err
	}
	defer file.Close()
	s := bufio.NewScanner(file)
	for s.Scan() {
		if fs := strings.Split(s.Text(), ":"); len(fs) == n {
			f(fs)
		}
	}
	return s.Err()
}

// Write makes a file in the machine, owned by root, mode 0644. Do not write where
// a user of the machine could have put a symbolic link: it would be followed,
// and an absolute one leads out of the machine.
func (m *Machine) Write(t testing.TB, path, content string) {
	t.Helper()
	if err := os.WriteFile(filepath.Join(m.Root, path), []byte(content), 0o644); err != nil {
		t.Fatalf("bed: %v", err)
	}
}

// Read returns a file of the machine, under the same warning as Write.
func (m *Machine) Read(t testing.TB, path string) string {
	t.Helper()
	b, err := os.ReadFile(filepath.Join(m.Root, path))
	if err != nil {
		t.Fatalf("bed: %v", err)
	}
	return string(b)
}

// Install copies a program to /usr/local/bin/overkeep. It must be static: the
// machine's libraries are of another age than ours.
func (m *Machine) Install(t testing.TB, binary string) {
	t.Helper()
	m.Put(t, binary, "/usr/local/bin/overkeep", 0o755)
}

// Put copies a file from outside to a path in the machine, in the place of what
// may be there. The warning at Write holds.
func (m *Machine) Put(t testing.TB, file, path string, mode os.FileMode) {
	t.Helper()
	in, err := os.Open(file)
	if err != nil {
		t.Fatalf("bed: put: %v", err)
	}
	defer in.Close()
	dst := filepath.Join(m.Root, path)
	tmp := dst + ".new" // a running program cannot be written to
	out, err := os.OpenFile(tmp, os.O_CREATE|os.O_TRUNC|os.O_WRONLY, mode)
	if err == nil {
		_, err = io.Copy(out, in)
		err = errors.Join(err, out.Close(), os.Chmod(tmp, mode), os.Rename(tmp, dst))
	}
	if err != nil {
		t.Fatalf("bed: put: %v", err)
	}
}

// SystemNix starts the system's own nix-daemon, stock and with its default
// configuration, and waits until it takes connections.
func (m *Machine) SystemNix(t testing.TB) *Proc {
	t.Helper()
	p, err := m.Start("root", "exec nix-daemon")
	if err != nil {
		t.Fatalf("bed: %v", err)
	}
	m.Accepts(t, p, "/nix/var/nix/daemon-socket/socket")
	return p
}

// Accepts waits until something listens on a Unix socket of the machine, or
// fails the test when the process that should has ended. There is no event for
// "listening"; it connects until it is let in.
func (m *Machine) Accepts(t testing.TB, p *Proc, socket string) {
	t.Helper()
	deadline := time.Now().Add(patience)
	for {
		c, err := net.Dial("unix", m.Root+socket)
		if err == nil {
			c.Close()
			return
		}
		select {
		case <-p.Done():
			t.Fatalf("bed: %s has ended:\n%s", p.c.Script, p.Output())
		default:
		}
		if time.Now().After(deadline) {
			t.Fatalf("bed: nobody accepts on %s: %v\n%s", socket, err, p.Output())
		}
		time.Sleep(5 * time.Millisecond)
	}
}
