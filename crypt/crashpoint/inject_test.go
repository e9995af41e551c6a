//go:build inject

package crashpoint

import (
	"errors"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"sync"
	"syscall"
	"testing"
)

// TestMain turns the binary into the process that is to crash.
func TestMain(m *testing.M) {
	switch os.Getenv("CRASHPOINT_HELPER") {
	case "":
		os.Exit(m.Run())
	case "parent": // passes one point, runs a child of the same group, passes another
		At("parent")
		cmd := exec.Command(os.Args[0])
		cmd.Env = append(os.Environ(), "CRASHPOINT_HELPER=child")
		err := cmd.Run()
		var exit *exec.ExitError
		if err != nil && !errors.As(err, &exit) {
			panic(err)
		}
		At("parent again")
	default:
		for _, name := range []string{"one", "two", "three"} {
			At(name)
		}
	}
}

// helper runs the binary in the given role, in a group of its own, and returns
// how it ended and the names it passed.
func helper(t *testing.T, role string, env ...string) (syscall.WaitStatus, string, error) {
	t.Helper()
	log := filepath.Join(t.TempDir(), "log")
	cmd := exec.Command(os.Args[0])
	cmd.Env = append(append(os.Environ(), "CRASHPOINT_HELPER="+role, "OVERKEEP_CRASH_LOG="+log), env...)
	cmd.SysProcAttr = &syscall.SysProcAttr{Setpgid: true}
	err := cmd.Run()
	b, rerr := os.ReadFile(log)
	if rerr != nil && !errors.Is(rerr, os.ErrNotExist) {
		t.Fatal(rerr)
	}
	return cmd.ProcessState.Sys().(syscall.WaitStatus), strings.Join(strings.Fields(strings.ReplaceAll(string(b), " ", "-")), " "), err
}

// A process dies before its Nth step, having logged that step and none after it.
func TestKill(t *testing.T) {
	for _, tt := range []struct {
		at, how string
		log     string
		killed  bool
		fails   bool
	}{
		{"", "", "one two three", false, false},
		{"1", "", "one", true, false},
		{"2", "kill", "one two", true, false},
		{"3", "", "one two three", true, false},
		{"2", "killgroup", "one two", true, false},
		{"4", "", "one two three", false, false},
		{"0", "", "one", false, true},
		{"x", "", "one", false, true},
		{"1", "nicely", "one", false, true},
		{"1", "shutdown:/nonexistent", "one", false, true},
	} {
		t.Run(tt.at+","+tt.how, func(t *testing.T) {
			status, log, err := helper(t, "alone", "OVERKEEP_CRASH_AT="+tt.at, "OVERKEEP_CRASH_HOW="+tt.how)
			if killed := status.Signaled() && status.Signal() == syscall.SIGKILL; killed != tt.killed {
				t.Errorf("killed %v, want %v (%v)", killed, tt.killed, err)
			}
			if fails := err != nil && !tt.killed; fails != tt.fails {
				t.Errorf("failed %v, want %v (%v)", fails, tt.fails, err)
			}
			if log != tt.log {
				t.Errorf("log %q, want %q", log, tt.log)
			}
		})
	}
}

// With a count file the calls of all processes are one sequence; the one that
// dies is the one that makes call N, and the others go on or die with it.
func TestCount(t *testing.T) {
	const all = "parent one two three parent-again"
	for _, tt := range []struct {
		at, how string
		log     string
		killed  bool // the parent
	}{
		{"6", "kill", all, false},
		{"1", "kill", "parent", true},
		{"2", "kill", "parent one parent-again", false},
		{"3", "kill", "parent one two parent-again", false},
		{"3", "killgroup", "parent one two", true},
		{"5", "kill", all, true},
	} {
		t.Run(tt.at+","+tt.how, func(t *testing.T) {
			status, log, err := helper(t, "parent", "OVERKEEP_CRASH_AT="+tt.at, "OVERKEEP_CRASH_HOW="+tt.how,
				"OVERKEEP_CRASH_COUNT="+filepath.Join(t.TempDir(), "count"))
			if killed := status.Signaled() && status.Signal() == syscall.SIGKILL; killed != tt.killed {
				t.Errorf("killed %v, want %v (%v)", killed, tt.killed, err)
			}
			if log != tt.log {
				t.Errorf("log %q, want %q", log, tt.log)
			}
		})
	}
}

// No call is lost or counted twice when many processes count at once.
func TestCountTogether(t *testing.T) {
	count := filepath.Join(t.TempDir(), "count")
	var all sync.WaitGroup
	const processes = 8
	for range processes {
		all.Go(func() {
			if _, _, err := helper(t, "parent", "OVERKEEP_CRASH_COUNT="+count); err != nil {
				t.Error(err)
			}
		})
	}
	all.Wait()
	b, err := os.ReadFile(count)
	if err != nil {
		t.Fatal(err)
	}
	if string(b) != "40" { // five calls each
		t.Errorf("counted %q calls, want 40", b)
	}
}

// A count file that holds no number is a test that would inject nothing.
func TestBadCount(t *testing.T) {
	bad := filepath.Join(t.TempDir(), "count")
	if err := os.WriteFile(bad, []byte("many"), 0o600); err != nil {
		t.Fatal(err)
	}
	for _, path := range []string{bad, filepath.Join(bad, "below a file")} {
		if _, log, err := helper(t, "alone", "OVERKEEP_CRASH_COUNT="+path); err == nil || log != "" {
			t.Errorf("%s: went on (%v), log %q", path, err, log)
		}
	}
}

// A stopped process goes on where it was.
func TestStop(t *testing.T) {
	cmd := exec.Command(os.Args[0])
	log := filepath.Join(t.TempDir(), "log")
	cmd.Env = append(os.Environ(), "CRASHPOINT_HELPER=alone", "OVERKEEP_CRASH_AT=2", "OVERKEEP_CRASH_HOW=stop", "OVERKEEP_CRASH_LOG="+log)
	if err := cmd.Start(); err != nil {
		t.Fatal(err)
	}
	var ws syscall.WaitStatus
	if _, err := syscall.Wait4(cmd.Process.Pid, &ws, syscall.WUNTRACED, nil); err != nil || !ws.Stopped() {
		t.Fatalf("not stopped: %v, %v", ws, err)
	}
	if b, err := os.ReadFile(log); err != nil || string(b) != "one\ntwo\n" {
		t.Errorf("log %q while stopped (%v)", b, err)
	}
	if err := cmd.Process.Signal(syscall.SIGCONT); err != nil {
		t.Fatal(err)
	}
	if err := cmd.Wait(); err != nil {
		t.Error(err)
	}
	if b, err := os.ReadFile(log); err != nil || string(b) != "one\ntwo\nthree\n" {
		t.Errorf("log %q at the end (%v)", b, err)
	}
}
