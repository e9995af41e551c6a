package holder

import (
	"context"
	"errors"
	"os"
	"os/exec"
	"strconv"
	"strings"
	"testing"
	"time"

	"golang.org/x/sys/unix"
)

// spawn starts a shell that runs script after it has printed a line, and
// returns it as a holder.
func spawn(t *testing.T, script string) (*exec.Cmd, Holder) {
	t.Helper()
	cmd := exec.Command("/bin/sh", "-c", script)
	out, err := cmd.StdoutPipe()
	if err != nil {
		t.Fatal(err)
	}
	if _, err := cmd.StdinPipe(); err != nil {
		t.Fatal(err)
	}
	if err := cmd.Start(); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { cmd.Process.Kill(); cmd.Wait() })
	var line [1]byte
	if _, err := out.Read(line[:]); err != nil {
		t.Fatal(err)
	}
	return cmd, asHolder(t, cmd.Process.Pid)
}

func asHolder(t *testing.T, pid int) Holder {
	t.Helper()
	b, err := os.ReadFile("/proc/" + strconv.Itoa(pid) + "/stat")
	if err != nil {
		t.Fatal(err)
	}
	st, err := parseStat(b)
	if err != nil {
		t.Fatal(err)
	}
	return Holder{PID: pid, Start: st.start}
}

func endedBy(t *testing.T, cmd *exec.Cmd) unix.Signal {
	t.Helper()
	var exit *exec.ExitError
	if err := cmd.Wait(); !errors.As(err, &exit) {
		t.Fatalf("ended with %v", err)
	}
	return exit.Sys().(interface{ Signal() unix.Signal }).Signal()
}

const forever = time.Hour // a grace that no test waits out

func TestEndTerm(t *testing.T) {
	cmd, h := spawn(t, "echo; read x")
	if err := End(context.Background(), []Holder{h, {PID: 0, Command: "loop device"}}, forever); err != nil {
		t.Fatal(err)
	}
	if sig := endedBy(t, cmd); sig != unix.SIGTERM {
		t.Errorf("ended by %v", sig)
	}
}

func TestEndKill(t *testing.T) {
	stubborn, h1 := spawn(t, "trap '' TERM; echo; read x")
	stopped, h2 := spawn(t, "trap '' TERM; echo; kill -STOP $$; read x")
	if err := End(context.Background(), []Holder{h1, h2}, time.Millisecond); err != nil {
		t.Fatal(err)
	}
	for _, cmd := range []*exec.Cmd{stubborn, stopped} {
		if sig := endedBy(t, cmd); sig != unix.SIGKILL {
			t.Errorf("ended by %v", sig)
		}
	}
}

func TestEndAtOnce(t *testing.T) {
	cmd, h := spawn(t, "trap 'exit 3' TERM; echo; read x")
	if err := End(context.Background(), []Holder{h}, 0); err != nil {
		t.Fatal(err)
	}
	if sig := endedBy(t, cmd); sig != unix.SIGKILL {
		t.Errorf("ended by %v", sig)
	}
}

// A number that was given to another process is not signalled.
func TestEndPIDReused(t *testing.T) {
	cmd, h := spawn(t, "echo; read x")
	other := h
	other.Start--
	if err := End(context.Background(), []Holder{other, {PID: h.PID}}, 0); err != nil {
		t.Fatal(err)
	}
	if err := unix.Kill(cmd.Process.Pid, 0); err != nil || asHolder(t, h.PID).Start != h.Start {
		t.Fatalf("the process with the reused number is gone: %v", err)
	}
	if b, _ := os.ReadFile("/proc/" + strconv.Itoa(h.PID) + "/stat"); strings.Contains(string(b), ") Z ") {
		t.Fatal("the process with the reused number was killed")
	}
	// One that ended since, and is waited for.
	if err := End(context.Background(), []Holder{h}, 0); err != nil {
		t.Fatal(err)
	}
	cmd.Wait()
	if err := End(context.Background(), []Holder{h}, forever); err != nil {
		t.Errorf("a process that has ended: %v", err)
	}
}

// The context bounds the wait; who is left is named.
func TestEndContext(t *testing.T) {
	_, h := spawn(t, "trap '' TERM; echo; read x")
	ctx, cancel := context.WithCancel(context.Background())
	cancel()
	err := End(ctx, []Holder{h}, forever)
	var se *SurvivorsError
	if !errors.As(err, &se) || len(se.Holders) != 1 || se.Holders[0].PID != h.PID || !errors.Is(err, context.Canceled) {
		t.Errorf("got %v", err)
	}
}

func TestEndNeverSelf(t *testing.T) {
	err := End(context.Background(), []Holder{asHolder(t, os.Getpid()), {PID: 1}, {PID: -5}}, 0)
	var se *SurvivorsError
	if !errors.As(err, &se) || len(se.Holders) != 3 {
		t.Errorf("got %v", err)
	}
}

func TestEndNothing(t *testing.T) {
	if err := End(context.Background(), nil, forever); err != nil {
		t.Error(err)
	}
}
