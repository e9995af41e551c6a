package keep

import (
	"bufio"
	"context"
	"encoding/json"
	"errors"
	"net"
	"os"
	"os/exec"
	"path/filepath"
	"regexp"
	"strconv"
	"strings"
	"time"

	"golang.org/x/sys/unix"

	"overkeep/crypt/crashpoint"
	"overkeep/overlay/layout"
	"overkeep/overlay/nixconf"
	"overkeep/overlay/view"
)

// Unlocked says what Unlock did.
type UnlockResult struct {
	Keep    string `json:"keep"`
	Slot    string `json:"slot,omitempty"` // which slot opened it
	Already bool   `json:"already"`        // it was open before
}

// Unlock opens the keep: slot, key, volume, view, personal nix-daemon. When a
// step fails the keep is locked again before the error is returned. A keep that
// is stuck between the states is locked first.
func (k *Keep) Unlock(ctx context.Context, auth Auth) (*UnlockResult, error) {
	if err := requireRoot(); err != nil {
		return nil, err
	}
	release, err := runLock(k.Keep)
	if err != nil {
		return nil, err
	}
	defer release()
	u, err := k.Header.viewUser()
	if err != nil {
		return nil, err
	}
	st, err := k.state(ctx)
	if err != nil {
		return nil, err
	}
	if st.State == Unlocked {
		return &UnlockResult{Keep: k.Name, Already: true}, nil
	}
	defer k.LookForNix()()
	if _, err := ReadConfig(k.Root); err != nil {
		return nil, err
	}
	if st.State == Locking && !st.ViewComplete {
		if _, err := k.lock(ctx, LockRefuse); err != nil {
			return nil, err
		}
	}
	if err := ensureRunDirs(k.Keep); err != nil {
		return nil, err
	}
	req := request{Root: k.Root, Name: k.Name, StateDir: k.StateDir(), Header: k.Header, User: u, Restart: st.ViewComplete}
	secrets := auth.apply(&req)

	ns, err := existingNamespace(k.Keep)
	if err != nil {
		return nil, err
	}
	fresh := ns == nil
	if fresh {
		crashpoint.At("unlock.namespace")
		if ns, err = view.NewPinned(k.NamespaceDir()); err != nil {
			removeRunDirs(k.Keep)
			return nil, classified(err)
		}
	}
	defer ns.Close()
	if err := linkHook(k.Keep, k.m.Exe); err != nil {
		return nil, classified(err)
	}
	k.m.progress("opening a slot")
	var r openResult
	crashpoint.At("unlock.open")
	needsNix := func(req *request) error {
		req.OldNix = k.nix().old
		return k.nix().err
	}
	_, err = k.m.child(ctx, "open", req, childOptions{ns: ns, secrets: secrets, late: needsNix}, &r)
	if err != nil && answered(err) && nothingMounted(ns, k.Keep) {
		// It said itself what is wrong, and took back what it had begun.
		if fresh {
			err = errors.Join(err, k.forgetNamespace(ns))
		}
		return nil, classified(err)
	}
	if err == nil {
		crashpoint.At("unlock.supervisor")
		err = k.startSupervisor(ctx, ns, u, k.nix().daemon)
	}
	if err != nil {
		// A helper that was killed half-way left what it had: the lock takes
		// everything back, and says so if it cannot. A view that was whole before
		// stays as it was.
		if req.Restart {
			return nil, classified(err)
		}
		_, lerr := k.lock(context.WithoutCancel(ctx), LockRefuse)
		return nil, classified(errors.Join(classified(err), lerr))
	}
	return &UnlockResult{Keep: k.Name, Slot: r.Slot}, nil
}

// sameNamespace reports whether a process lives in the mount namespace.
func sameNamespace(pid int, ns *view.Namespace) (bool, error) {
	var st unix.Stat_t
	if err := unix.Stat("/proc/"+strconv.Itoa(pid)+"/ns/mnt", &st); err != nil {
		return false, err
	}
	ino, err := ns.Inode()
	return ino == st.Ino, err
}

// answered reports whether a helper process lived long enough to say what failed.
func answered(err error) bool {
	var e *Error
	return errors.As(err, &e) && e.Code != CodeInternal && e.Code != CodeAborted
}

// nothingMounted reports whether nothing of the keep is mounted in ns.
func nothingMounted(ns *view.Namespace, k layout.Keep) bool {
	return ns.Do(func() error {
		b, err := os.ReadFile("/proc/thread-self/mountinfo")
		if err != nil {
			return err
		}
		for line := range strings.Lines(string(b)) {
			f := strings.Fields(line)
			if len(f) > 4 && (f[4] == k.Volume() || f[4] == k.FSMount()) || strings.Contains(line, "upperdir="+k.Upper()) {
				return unix.EBUSY
			}
		}
		return nil
	}) == nil
}

// linkHook puts a name for this program where Nix calls it as the remount hook.
func linkHook(k layout.Keep, exe string) error {
	target, err := filepath.EvalSymlinks(exe)
	if err != nil {
		return err
	}
	if have, err := os.Readlink(k.RemountHook()); err == nil && have == target {
		return nil
	}
	_ = os.Remove(k.RemountHook())
	return os.Symlink(target, k.RemountHook())
}

func nixConfig(k layout.Keep, h *Header, root string) nixconf.Config {
	return nixconf.Config{Keep: k, User: h.User, Substituters: loadConfig(root).Substituters,
		LowerSocket: filepath.Join(k.LowerSocketDir(), "socket")}
}

// minNix is the first Nix with a local-overlay store.
var minNix = [2]int{2, 22}

var nixVersion = regexp.MustCompile(`(\d+)\.(\d+)`)

// NixVersion parses what `nix-daemon --version` prints.
func NixVersion(out string) (major, minor int, ok bool) {
	m := nixVersion.FindStringSubmatch(out)
	if m == nil {
		return 0, 0, false
	}
	major, err1 := strconv.Atoi(m[1])
	minor, err2 := strconv.Atoi(m[2])
	return major, minor, err1 == nil && err2 == nil
}

// NixSupports reports whether that version has a local-overlay store.
func NixSupports(major, minor int) bool {
	return major > minNix[0] || major == minNix[0] && minor >= minNix[1]
}

// CheckNix reports whether a keep can be served here: a nix-daemon that is new
// enough, and the system's own. It looks once for a Keep, Unlock included.
func (k *Keep) CheckNix() error { return k.nix().err }

// LookForNix begins CheckNix and does not wait for it: to start a nix-daemon that
// tells its version takes some 20 ms. What it returns does wait: call it at the end, or a
// command that has failed early leaves that process behind for a moment.
func (k *Keep) LookForNix() (wait func()) {
	go k.nix()
	return func() { k.nix() }
}

// nixFound is what checkNix returns.
type nixFound struct {
	daemon string // its path
	old    bool
	err    error
}

func findNix() (f nixFound) {
	f.daemon, f.old, f.err = checkNix()
	return f
}

// checkNix finds a nix-daemon that can serve a keep, and the system's own.
func checkNix() (path string, old bool, err error) {
	p, err := FindProgram("nix-daemon")
	if err != nil {
		return "", false, errorf(CodeNoNix, "nix-daemon", "no nix-daemon found in %v", NixPath)
	}
	out, err := exec.Command(p, "--version").Output()
	major, minor, ok := NixVersion(string(out))
	if err != nil || !ok {
		return "", false, errorf(CodeNoNix, p, "%q did not tell its version", p)
	}
	if !NixSupports(major, minor) {
		return "", false, errorf(CodeNoNix, p, "Nix %d.%d at %q is too old: the local-overlay store came with %d.%d", major, minor, p, minNix[0], minNix[1])
	}
	sock := filepath.Join(layout.NixDaemonSocket, "socket")
	if fi, err := os.Stat(sock); err != nil || fi.Mode()&os.ModeSocket == 0 {
		return "", false, errorf(CodeNoNix, sock, "the system's nix-daemon has no socket at %q", sock)
	}
	conn, err := net.DialTimeout("unix", sock, time.Second)
	if err != nil {
		return "", false, errorf(CodeNoNix, sock, "nobody answers for the system's nix-daemon at %q", sock)
	}
	conn.Close()
	return p, major == 2 && minor < 27, nil
}

// startSupervisor starts the process that serves the view, and waits until the
// personal daemon's socket listens.
//
// One that is left from a lock that was given up serves again.
func (k *Keep) startSupervisor(ctx context.Context, ns *view.Namespace, u view.User, nixDaemon string) error {
	if pid := supervisorPID(k.Keep); pid != 0 {
		if lives, err := sameNamespace(pid, ns); err == nil && lives {
			if answer, err := control(k.Keep, "resume"); err == nil && answer == "serving" {
				return nil
			}
		}
		endSupervisor(pid)
	}
	in, err := json.Marshal(superviseRequest{Root: k.Root, Name: k.Name, User: u, NixDaemon: nixDaemon,
		Env: nixConfig(k.Keep, k.Header, k.Root).Environment(strings.Join(append([]string{filepath.Dir(nixDaemon)}, NixPath...), ":"))})
	if err != nil {
		return err
	}
	inR, inW, err := os.Pipe()
	if err != nil {
		return err
	}
	defer inW.Close()
	defer inR.Close()
	// The system store as the host sees it: below the overlay, to see it grow.
	lowerDir, err := openStore()
	if err != nil {
		return err
	}
	defer lowerDir.Close()
	root, err := openRoot()
	if err != nil {
		return err
	}
	defer root.Close()
	cmd := exec.Command(k.m.Exe, "internal", "supervise")
	cmd.Args[0] = "overkeep"
	cmd.Stdin = inR
	cmd.ExtraFiles = []*os.File{fdLowerDir - 3: lowerDir, fdHostRoot - 3: root}
	cmd.Env = childEnv(os.Environ())
	cmd.SysProcAttr = &unix.SysProcAttr{Setsid: true}
	out, err := cmd.StdoutPipe()
	if err == nil {
		err = ns.Start(cmd)
	}
	if err != nil {
		return errorf(CodeInternal, k.Name, "start the supervisor: %w", err)
	}
	if _, err := inW.Write(in); err != nil {
		return err
	}
	inW.Close()
	interrupted := context.AfterFunc(ctx, func() { _ = cmd.Process.Kill() })
	line, err := bufio.NewReader(out).ReadBytes('\n')
	if !interrupted() {
		_ = cmd.Wait()
		return errorf(CodeAborted, k.Name, "interrupted")
	}
	var r reply
	if err != nil || json.Unmarshal(line, &r) != nil {
		_ = cmd.Process.Kill()
		_ = cmd.Wait()
		return errorf(CodeInternal, k.Name, "the supervisor ended before it was ready")
	}
	if err := decodeError(r.Error); err != nil {
		_ = cmd.Wait()
		return err
	}
	// It outlives this process; nobody waits for it here.
	return cmd.Process.Release()
}
