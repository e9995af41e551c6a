package main

import (
	"errors"
	"os"
	"os/exec"
	"os/user"
	"path/filepath"
	"strings"
	"syscall"
	"testing"

	"github.com/rogpeppe/go-internal/testscript"
)

func TestMain(m *testing.M) {
	testscript.Main(m, map[string]func(){"overkeep": main, "overkeep-remount": main})
}

// TestScript runs testdata/script, one topic a file. In every script $ROOT is an
// empty directory short enough for --root, and $USER a user who may have a keep.
func TestScript(t *testing.T) {
	testscript.Run(t, testscript.Params{
		Dir:                 "testdata/script",
		RequireExplicitExec: false,
		Setup: func(env *testscript.Env) error {
			// Root's must lie where only root can write; another user's is writable, so
			// that nothing is made there is no accident.
			parent, mode := "/tmp", os.FileMode(0o777)
			if os.Geteuid() == 0 {
				parent, mode = "/var/lib", 0o755
			}
			root, err := os.MkdirTemp(parent, "ok-")
			if err != nil {
				return err
			}
			env.Defer(func() { os.RemoveAll(root) })
			if err := os.Chmod(root, mode); err != nil {
				return err
			}
			env.Setenv("ROOT", root)
			u, uid, err := person()
			env.Setenv("USER", u)
			env.Setenv("USER_ID", uid)
			env.Setenv("TERM", "dumb")
			return err
		},
		Condition: func(cond string) (bool, error) {
			if cond == "root" {
				return os.Geteuid() == 0, nil
			}
			return false, errors.New("unknown condition")
		},
		Cmds: map[string]func(*testscript.TestScript, bool, []string){
			"nobody":       nobody,
			"notty":        notty,
			"world":        world,
			"exits":        exitsWith,
			"sameverdicts": sameverdicts,
			"wellformed":   wellformed,
		},
	})
}

// person is somebody who is not root: the one who runs the test, or nobody.
func person() (name, uid string, err error) {
	u, err := user.Current()
	if err == nil && u.Uid == "0" {
		u, err = user.Lookup("nobody")
	}
	if err != nil {
		return "", "", err
	}
	return u.Username, u.Uid, nil
}

// nobody runs a program as a user who is not root.
func nobody(ts *testscript.TestScript, neg bool, args []string) {
	start(ts, neg, args, func(cmd *exec.Cmd) {
		if os.Geteuid() != 0 {
			return
		}
		cmd.SysProcAttr.Credential = &syscall.Credential{Uid: 65534, Gid: 65534}
		// The program lies in directories of root's own.
		for d := filepath.Dir(cmd.Path); d != "/tmp" && d != "/"; d = filepath.Dir(d) {
			ts.Check(os.Chmod(d, 0o755))
		}
		cmd.Dir = "/"
		// Where the test writes its coverage, nobody may not.
		cmd.Env = append(cmd.Env, "GOCOVERDIR="+ts.Getenv("ROOT"))
	})
}

// notty runs a program in a session without a terminal.
func notty(ts *testscript.TestScript, neg bool, args []string) {
	start(ts, neg, args, func(*exec.Cmd) {})
}

func start(ts *testscript.TestScript, neg bool, args []string, prepare func(*exec.Cmd)) {
	if len(args) == 0 {
		ts.Fatalf("usage: nobody|notty program [args...]")
	}
	path := ""
	for _, d := range filepath.SplitList(ts.Getenv("PATH")) {
		if p := filepath.Join(d, args[0]); path == "" && isFile(p) {
			path = p
		}
	}
	cmd := exec.Command(path, args[1:]...)
	cmd.Args[0] = args[0]
	cmd.Dir = ts.MkAbs(".")
	cmd.Env = []string{"PATH=" + ts.Getenv("PATH"), "TERM=dumb", "HOME=/"}
	for _, v := range []string{"OVERKEEP_ROOT", "GOCOVERDIR"} {
		if s := ts.Getenv(v); s != "" {
			cmd.Env = append(cmd.Env, v+"="+s)
		}
	}
	cmd.Stdout, cmd.Stderr = ts.Stdout(), ts.Stderr()
	cmd.SysProcAttr = &syscall.SysProcAttr{Setsid: true}
	prepare(cmd)
	err := cmd.Run()
	var exit *exec.ExitError
	switch {
	case err != nil && !errors.As(err, &exit):
		ts.Fatalf("%s: %v", strings.Join(args, " "), err)
	case (err != nil) != neg:
		ts.Fatalf("%s: %v", strings.Join(args, " "), cmd.ProcessState)
	}
}

func isFile(p string) bool {
	fi, err := os.Stat(p)
	return err == nil && fi.Mode().IsRegular()
}
