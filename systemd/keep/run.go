package keep

import (
	"context"
	"os"
	"os/exec"
	"os/user"
	"path/filepath"
	"runtime"
	"slices"
	"strconv"
	"strings"
	"syscall"

	"golang.org/x/sys/unix"

	"overkeep/overlay/layout"
	"overkeep/overlay/view"
)

// Exec replaces this process by argv, as the keep's user in the keep's view. It
// returns only on error. The keep must be unlocked: without the view a personal
// operation is refused, never run beneath it.
//
// An empty argv means the user's login shell.
func (k *Keep) Exec(argv []string, asRoot bool) error {
	if err := requireRoot(); err != nil {
		return err
	}
	if err := guard(k.Keep); err != nil {
		return err
	}
	// Shared with other runs and held until the exec: no lock can come between the
	// look and the entry.
	release, err := flock(k.Keep, unix.LOCK_SH)
	if err != nil {
		return err
	}
	defer release()
	ns, err := existingNamespace(k.Keep)
	if err != nil {
		return err
	}
	if ns == nil || supervisorPID(k.Keep) == 0 || !k.listening() {
		return errorf(CodeLocked, k.Name, "keep %q is not unlocked", k.Name)
	}
	u, err := user.Lookup(k.Header.User)
	if err != nil {
		return errorf(CodeUsage, k.Header.User, "user %q: %w", k.Header.User, err)
	}
	if _, err := k.Header.viewUser(); err != nil {
		return err
	}
	env := runEnv(os.Environ(), k, u, asRoot)
	if len(argv) == 0 {
		shell := loginShell(u.Username)
		argv = []string{shell}
		env = append(env, "SHELL="+shell)
	}
	cwd, _ := os.Getwd()
	runtime.LockOSThread()
	if err := ns.Enter(); err != nil {
		return classified(err)
	}
	if err := k.wholeView(); err != nil {
		return err
	}
	// Where the caller stood, if that is still there in the view; else home.
	if cwd == "" || os.Chdir(cwd) != nil {
		if os.Chdir(u.HomeDir) != nil {
			_ = os.Chdir("/")
		}
	}
	if !asRoot {
		if err := becomeUser(u); err != nil {
			return errorf(CodeInternal, u.Username, "become user %q: %w", u.Username, err)
		}
	}
	path, err := lookPath(argv[0], env)
	if err != nil {
		return errorf(CodeUsage, argv[0], "command %q: %w", argv[0], err)
	}
	err = unix.Exec(path, argv, env)
	return errorf(CodeUsage, argv[0], "run %q: %w", argv[0], err)
}

// InView returns an error unless this process lives in the whole view of this keep:
// else what it writes into the keep would lie beneath it, in plaintext.
func (k *Keep) InView() error {
	inside, err := view.Inside()
	if err != nil {
		return err
	}
	if !inside {
		return errorf(CodeLocked, k.Name, "this is not the view of keep %q", k.Name)
	}
	return k.wholeView()
}

// Command is argv as the keep's user would run it in the view, for a root process that
// lives there already (Exec asRoot). It has a session and a process group of its own, so no way
// to root's terminal, and all of the group is killed when ctx ends. Unless online, it
// has no network, whatever it tries; Unix sockets by name, the daemon's among them, are there.
func (k *Keep) Command(ctx context.Context, online bool, argv ...string) (*exec.Cmd, error) {
	if err := requireRoot(); err != nil {
		return nil, err
	}
	if err := k.InView(); err != nil {
		return nil, err
	}
	u, err := user.Lookup(k.Header.User)
	if err != nil {
		return nil, errorf(CodeUsage, k.Header.User, "user %q: %w", k.Header.User, err)
	}
	uid, gid, groups, err := numbers(u)
	if err != nil {
		return nil, errorf(CodeInternal, u.Username, "user %q: %w", u.Username, err)
	}
	cred := &syscall.Credential{Uid: uint32(uid), Gid: uint32(gid)}
	for _, g := range groups {
		cred.Groups = append(cred.Groups, uint32(g))
	}
	cmd := exec.CommandContext(ctx, argv[0], argv[1:]...)
	cmd.Env = runEnv(os.Environ(), k, u, false)
	cmd.SysProcAttr = &syscall.SysProcAttr{Credential: cred, Setsid: true}
	if !online {
		cmd.SysProcAttr.Cloneflags = unix.CLONE_NEWNET // network_namespaces(7): an empty one
	}
	cmd.Cancel = func() error { return unix.Kill(-cmd.Process.Pid, unix.SIGKILL) }
	return cmd, nil
}

// wholeView sees that every mount of the view is there, in the thread's namespace.
func (k *Keep) wholeView() error {
	u, err := k.Header.viewUser()
	if err != nil {
		return err
	}
	list, err := view.Mounts(k.Keep, u, view.Options{WorkDir: k.Header.WorkDir})
	if err != nil {
		return classified(err)
	}
	there, err := view.Mounted(list)
	if err != nil {
		return classified(err)
	}
	if i := slices.Index(there, false); i >= 0 {
		return errorf(CodeLocked, k.Name, "the view of keep %q is not whole: nothing of it is mounted at %q", k.Name, list[i].Target)
	}
	return nil
}

// numbers are a user's ids.
func numbers(u *user.User) (uid, gid int, groups []int, err error) {
	if uid, err = strconv.Atoi(u.Uid); err != nil {
		return 0, 0, nil, err
	}
	if gid, err = strconv.Atoi(u.Gid); err != nil {
		return 0, 0, nil, err
	}
	ids, err := u.GroupIds()
	for _, s := range ids {
		if n, err := strconv.Atoi(s); err == nil {
			groups = append(groups, n)
		}
	}
	return uid, gid, groups, err
}

// becomeUser takes on the user's groups and ids, on this thread: it is the one
// that execs.
func becomeUser(u *user.User) error {
	uid, gid, groups, err := numbers(u)
	if err != nil {
		return err
	}
	if err := unix.Setgroups(groups); err != nil {
		return err
	}
	if err := unix.Setresgid(gid, gid, gid); err != nil {
		return err
	}
	return unix.Setresuid(uid, uid, uid)
}

// runEnv is the caller's environment with what belongs to the view. Variables
// that would lead a Nix client elsewhere than to the personal daemon are dropped.
func runEnv(env []string, k *Keep, u *user.User, asRoot bool) []string {
	drop := map[string]bool{
		"NIX_REMOTE": true, "NIX_STORE_DIR": true, "NIX_STATE_DIR": true, "NIX_LOG_DIR": true, "NIX_CONF_DIR": true,
		"NIX_DAEMON_SOCKET_PATH": true, "NIX_CONFIG": true, "NIX_USER_CONF_FILES": true, "TMPDIR": true, "TMP": true, "TEMP": true, "TEMPDIR": true,
		"XDG_CACHE_HOME": true, "XDG_STATE_HOME": true, "XDG_DATA_HOME": true, "XDG_RUNTIME_DIR": true,
		"HOME": true, "USER": true, "LOGNAME": true, "MAIL": true, "OVERKEEP_KEEP": true, "OVERKEEP_ROOT": true,
	}
	var out []string
	for _, e := range env {
		name, _, _ := strings.Cut(e, "=")
		if !drop[name] && !strings.HasPrefix(name, "SUDO_") && !strings.HasPrefix(name, "OVERKEEP_CRASH_") {
			out = append(out, e)
		}
	}
	if asRoot {
		// Root may write the store directly, so Nix would pass the daemon by; and
		// root's own caches are no place for what is evaluated in the view.
		// Its profiles follow the state directory.
		out = append(out, "HOME="+k.DaemonHome(), "USER=root", "LOGNAME=root", "NIX_REMOTE=daemon",
			"NIX_STATE_DIR="+k.NixState(), "NIX_DAEMON_SOCKET_PATH="+layout.NixDaemonSocket+"/socket")
		return append(out, view.Environment(k.Keep)...)
	}
	out = append(out, "HOME="+u.HomeDir, "USER="+u.Username, "LOGNAME="+u.Username)
	if rt := filepath.Join("/run/user", u.Uid); isDir(rt) {
		out = append(out, "XDG_RUNTIME_DIR="+rt)
	}
	return append(out, view.Environment(k.Keep)...)
}

func isDir(p string) bool {
	fi, err := os.Stat(p)
	return err == nil && fi.IsDir()
}

func lookPath(name string, env []string) (string, error) {
	if strings.Contains(name, "/") {
		return name, nil
	}
	for _, e := range env {
		if p, ok := strings.CutPrefix(e, "PATH="); ok {
			for _, d := range filepath.SplitList(p) {
				f := filepath.Join(d, name)
				if fi, err := os.Stat(f); filepath.IsAbs(d) && err == nil && !fi.IsDir() && fi.Mode()&0o111 != 0 {
					return f, nil
				}
			}
		}
	}
	return "", exec.ErrNotFound
}

// loginShell reads the user's shell from the passwd database through getent(1),
// which also knows users of other databases; /bin/sh when it tells none.
func loginShell(name string) string {
	out, err := exec.Command("getent", "passwd", name).Output()
	if err == nil {
		f := strings.Split(strings.TrimSpace(string(out)), ":")
		if len(f) == 7 && filepath.IsAbs(f[6]) {
			return f[6]
		}
	}
	return "/bin/sh"
}
