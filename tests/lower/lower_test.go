// Package lower proves on a real Nix, old and new, that the system's garbage
// collector can take a path away from under a personal store, and that the
// proxy of overlay/lower with the pins of overlay/pins leaves it no moment to.
//
// The proxy and the pins run in the test process and reach the machine through
// /proc/PID/root; both daemons, the overlay, the collector, and the reader of
// the personal database (tests/lower/needs) run in the machine. The keep lies on a tmpfs, so that whatever names
// of it are found on the machine's disk were put there by somebody else.
package lower

import (
	"context"
	"errors"
	"fmt"
	"net"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"testing"
	"time"

	"overkeep/overlay/lower"
	"overkeep/overlay/pins"
	"overkeep/tests/bed"
	"overkeep/tests/need"
)

const (
	keep    = "/run/K"
	pinDir  = "/nix/var/nix/gcroots/overkeep/alice"
	gcLock  = "/nix/var/nix/gc.lock"
	sysSock = "/nix/var/nix/daemon-socket/socket"
)

// world is a machine with a system store of four paths (d refers to p1) and a
// personal daemon over it.
type world struct {
	*bed.Machine
	p1, p2, p3, d string
	view          *bed.Proc // the personal daemon; its namespace is the view
	pinner        *pins.Pinner
	stop          func() // ends the proxy, pins included
}

// each runs f on a machine of every suite.
func each(t *testing.T, f func(t *testing.T, w *world)) {
	for _, s := range bed.Suites {
		t.Run(string(s), func(t *testing.T) {
			w := &world{Machine: bed.Start(t, s), stop: func() {}}
			w.SystemNix(t)
			w.p1, w.p2, w.p3 = w.add(t, "p1"), w.add(t, "p2"), w.add(t, "p3")
			w.d = w.Must(t, "root", fmt.Sprintf(`nix-build --no-out-link -E 'derivation { name = "d"; system = builtins.currentSystem;
				builder = "/bin/sh"; args = [ "-c" "echo ${builtins.storePath "%s"} > $out" ]; }' 2>/dev/null`, w.p1), "NIX_REMOTE=daemon")
			f(t, w)
		})
	}
}

func (w *world) add(t *testing.T, name string) string {
	t.Helper()
	return w.Must(t, "root", "echo "+name+" > /run/"+name+"; nix-store --add /run/"+name, "NIX_REMOTE=daemon")
}

// needsProgram builds tests/lower/needs, static: the machine's libraries are not ours.
var needsProgram = sync.OnceValues(func() ([]byte, error) {
	dir, err := os.MkdirTemp("", "needs-")
	if err != nil {
		return nil, err
	}
	file := filepath.Join(dir, "needs")
	out, err := exec.Command("go", "build", "-tags", "osusergo,netgo,sqlite_omit_load_extension",
		"-ldflags", "-s -w -linkmode external -extldflags -static", "-o", file, "./needs").CombinedOutput()
	if err != nil {
		return nil, errors.Join(fmt.Errorf("build needs: %w: %s", err, out), os.Remove(dir))
	}
	b, err := os.ReadFile(file)
	return b, errors.Join(err, os.Remove(file), os.Remove(dir))
})

// proxy puts ours between the daemons and returns its socket in the machine.
func (w *world) proxy(t *testing.T, lock string) string {
	t.Helper()
	need.Tool(t, "go", "cc")
	program, err := needsProgram()
	if err != nil {
		t.Fatal(err)
	}
	if err := os.WriteFile(w.Root+"/run/needs", program, 0o755); err != nil {
		t.Fatal(err)
	}
	const socket = "/run/lower"
	l, err := net.Listen("unix", w.Root+socket)
	if err != nil {
		t.Fatal(err)
	}
	w.pinner = &pins.Pinner{Dir: pins.Dir{Path: w.Root + pinDir, GCLock: w.Root + gcLock}, Needs: w.needs}
	if lock != "" {
		lock = w.Root + lock
	}
	px := &lower.Proxy{Upstream: w.Root + sysSock, GCLock: lock,
		Absent: func(name string) bool {
			_, err := os.Lstat(w.Root + "/nix/store/" + name)
			return errors.Is(err, os.ErrNotExist)
		},
		BeforeClose: func(ctx context.Context) error {
			_, err := w.pinner.Add(ctx)
			if err != nil {
				t.Errorf("pin: %v", err)
			}
			return err
		}}
	ctx, cancel := context.WithCancel(t.Context())
	done := make(chan error, 1)
	go func() { done <- px.Serve(ctx, l) }()
	w.stop = sync.OnceFunc(func() {
		cancel()
		if err := <-done; err != nil {
			t.Error(err)
		}
		w.pinner.Wait()
	})
	t.Cleanup(w.stop)
	return socket
}

// needs is what a supervisor gives to its Pinner: what the keep's database has
// and its upper directory has not, if the system store has it, roots only.
func (w *world) needs(ctx context.Context) ([]string, error) {
	r, err := w.Exec(bed.Command{Script: fmt.Sprintf("/run/needs %[1]s/nix/db/db.sqlite %[1]s/upper", keep)})
	if err == nil && r.Code != 0 {
		err = errors.New(r.Stderr)
	}
	if err != nil {
		return nil, err
	}
	c, err := lower.Dial(ctx, w.Root+sysSock)
	if err != nil {
		return nil, err
	}
	defer c.Close()
	return c.ValidPaths(ctx, strings.Fields(r.Stdout))
}

// personal starts the personal daemon over the lower store at socket.
func (w *world) personal(t *testing.T, socket string) {
	t.Helper()
	p, err := w.Start("root", fmt.Sprintf(`
mkdir -p %[1]s/{upper,work,nix/gcroots,log,builds,sock,conf}
ln -s %[1]s/nix/profiles %[1]s/nix/gcroots/profiles
chgrp nixbld %[1]s/upper; chmod 1775 %[1]s/upper
cat > %[1]s/conf/nix.conf <<'CONF'
!include /etc/nix/nix.conf
build-dir = %[1]s/builds
extra-experimental-features = local-overlay-store
store = local-overlay://?state=%[1]s/nix&log=%[1]s/log&upper-layer=%[1]s/upper&lower-store=unix%%3A%%2F%%2F%[2]s%%3Fpath-info-cache-size%%3D0
CONF
export NIX_CONF_DIR=%[1]s/conf NIX_DAEMON_SOCKET_PATH=%[1]s/sock/socket
exec unshare -m --propagation slave sh -euc '
	mount -t overlay overlay -o lowerdir=/nix/store,upperdir=%[1]s/upper,workdir=%[1]s/work,xino=auto,index=off,metacopy=off,redirect_dir=nofollow /nix/store
	exec nix-daemon'`, keep, socket))
	if err != nil {
		t.Fatal(err)
	}
	w.view = p
	w.Accepts(t, p, keep+"/sock/socket")
}

// inView runs a script with the personal store as /nix/store.
func (w *world) inView(script string) (string, error) {
	return w.Run("root", fmt.Sprintf("exec nsenter -t $(pgrep -f '^nix-daemon' | while read p; do "+
		"grep -q ' /nix/store .* overlay ' /proc/$p/mountinfo && echo $p && break; done) -m bash -euc %s", quote(script)),
		"NIX_REMOTE=unix://"+keep+"/sock/socket", "TMPDIR=/run") // nix-build makes its link there
}

func quote(s string) string { return "'" + strings.ReplaceAll(s, "'", `'\''`) + "'" }

// ask asks the personal daemon which of paths are valid, over a connection that
// is left open.
func (w *world) ask(t *testing.T, paths ...string) (*lower.Client, []string) {
	t.Helper()
	c, err := lower.Dial(t.Context(), w.Root+keep+"/sock/socket")
	if err != nil {
		t.Fatalf("%v\nthe personal daemon said:\n%s", err, w.view.Output())
	}
	t.Cleanup(func() { c.Close() })
	valid, err := c.ValidPaths(t.Context(), paths)
	if err != nil {
		t.Fatalf("%v\nthe personal daemon said:\n%s", err, w.view.Output())
	}
	return c, valid
}

// gc runs the system's collector and returns the names that are left of the four.
func (w *world) gc(t *testing.T) string {
	t.Helper()
	w.Must(t, "root", "nix-store --gc", "NIX_REMOTE=daemon")
	return w.left(t)
}

func (w *world) left(t *testing.T) string {
	t.Helper()
	var left []string
	for _, p := range []string{w.d, w.p1, w.p2, w.p3} {
		if _, err := os.Lstat(w.Root + p); err == nil {
			left = append(left, p[44:])
		}
	}
	return strings.Join(left, " ")
}

func (w *world) pins(t *testing.T) []string {
	t.Helper()
	list, err := w.pinner.Dir.List(t.Context())
	if err != nil {
		t.Fatal(err)
	}
	return list
}

// TestRaceIsReal: without us, the system's collector deletes what the personal
// store has just been told is valid.
func TestRaceIsReal(t *testing.T) {
	each(t, func(t *testing.T, w *world) {
		w.personal(t, sysSock)
		if _, valid := w.ask(t, w.d, w.p2); len(valid) != 2 {
			t.Fatalf("valid: %q", valid)
		}
		if got := w.gc(t); got != "" {
			t.Errorf("left %q: there is no race, and no need of this package", got)
		}
	})
}

// TestRaceIsClosed: with us, what the personal store was told of stays while
// its client is connected, stays by its pin afterwards, and goes when the
// personal store has let go of it. What it never asked for goes at once.
func TestRaceIsClosed(t *testing.T) {
	each(t, func(t *testing.T, w *world) {
		w.personal(t, w.proxy(t, gcLock))
		c, valid := w.ask(t, w.d, w.p2)
		if len(valid) != 2 {
			t.Fatalf("valid: %q", valid)
		}
		if got := w.gc(t); got != "d p1 p2" {
			t.Errorf("with the client connected: left %q", got)
		}
		if _, err := os.Stat(w.Root + pinDir); err == nil {
			t.Errorf("pinned while connected: the test proves nothing: %q", w.pins(t))
		}
		c.Close()
		w.stop() // returns when pins are made and every upstream connection is closed
		want := []string{w.d, w.p2}
		slices.Sort(want)
		if got := w.pins(t); !slices.Equal(got, want) {
			t.Errorf("pins %q, want %q (p1 is reached through d)", got, want)
		}
		if got := w.gc(t); got != "d p1 p2" {
			t.Errorf("with the client gone: left %q", got)
		}
		if out, err := w.inView("nix-store --verify --check-contents"); err != nil || strings.Contains(out, "disappeared") {
			t.Errorf("the personal store lost something: %s %v", out, err)
		}
	})
}

// TestNames: no name of a personal path reaches the system's disk by way of
// the proxy; the overlay asks its lower store about each of them several times.
func TestNames(t *testing.T) {
	each(t, func(t *testing.T, w *world) {
		w.personal(t, w.proxy(t, gcLock))
		out, err := w.inView(fmt.Sprintf(`nix-build --no-out-link -E 'derivation { name = "CANARY"; system = builtins.currentSystem;
			builder = "/bin/sh"; args = [ "-c" "echo ${builtins.storePath "%s"} > $out" ]; }'`, w.p2))
		if err != nil || !strings.Contains(out, "CANARY") {
			t.Fatalf("%s %v", out, err)
		}
		if out, err := w.inView("nix-store --verify --check-contents"); err != nil {
			t.Errorf("%s %v", out, err)
		}
		w.stop()
		if got := w.pins(t); !slices.Equal(got, []string{w.p2}) {
			t.Errorf("pins %q, want p2 alone", got)
		}
		w.Must(t, "root", "sync")
		hits := w.Find(t, filepath.Base(w.p2), "CANARY")
		for _, at := range hits["CANARY"] {
			t.Errorf("a personal name is on the system's disk: %s", w.Owner(at))
		}
		if len(hits[filepath.Base(w.p2)]) == 0 {
			t.Error("the search finds nothing at all")
		}
	})
}

// TestLetGo: after a personal collection the pins that are of no use are
// removed, and the system's collector may take the paths.
//
// A personal collection walks the merged directory, so asks for every path of
// the lower and copies its row, and deletes that row again; but the row of an
// output whose derivation comes later in the directory is copied a second time
// and stays (gc.cc with keep-derivations; seen with 2.26 and 2.34). Such a path
// is pinned without need. The test has no derivation in the lower.
func TestLetGo(t *testing.T) {
	each(t, func(t *testing.T, w *world) {
		w.personal(t, w.proxy(t, gcLock))
		w.Must(t, "root", "nix-store --delete "+w.d+" $(nix-store -q --deriver "+w.d+")", "NIX_REMOTE=daemon")
		c, _ := w.ask(t, w.p2)
		c.Close()
		if out, err := w.inView("nix-store --gc"); err != nil {
			t.Fatalf("%s %v", out, err)
		}
		if res, err := w.pinner.Exact(t.Context()); err != nil {
			t.Errorf("%+v %v", res, err)
		}
		w.stop()
		if got := w.pins(t); len(got) != 0 {
			t.Errorf("pins %q after the personal store dropped everything", got)
		}
		if got := w.gc(t); got != "" {
			t.Errorf("left %q", got)
		}
	})
}

// collector is a collection of the system store that stands still after it has
// found its roots and before it deletes (Nix's own test hook, gc.cc).
type collector struct {
	p    *bed.Proc
	fifo *os.File
}

func (w *world) collect(t *testing.T) collector {
	t.Helper()
	w.Must(t, "root", "mkfifo /run/gc-sync")
	p, err := w.Start("root", "exec nix-store --gc", "NIX_REMOTE=local", "_NIX_TEST_GC_SYNC_2=/run/gc-sync")
	if err != nil {
		t.Fatal(err)
	}
	// Returns when the collector opens the other end.
	f, err := os.OpenFile(w.Root+"/run/gc-sync", os.O_WRONLY, 0)
	if err != nil {
		t.Fatal(err)
	}
	return collector{p, f}
}

func (c collector) goOn(t *testing.T) {
	t.Helper()
	c.fifo.Close()
	if r, err := c.p.Wait(); err != nil || r.Code != 0 {
		t.Errorf("collector: %+v %v", r, err)
	}
}

// TestDuringCollection: a path is first asked for while a collector runs that
// knows nothing of it. With the lock the client waits, sees why, and is told
// the truth: gone. Without, the collector is told of the root in time, here.
func TestDuringCollection(t *testing.T) {
	for _, lock := range []string{gcLock, ""} {
		t.Run("lock="+lock, func(t *testing.T) {
			each(t, func(t *testing.T, w *world) {
				w.personal(t, w.proxy(t, lock))
				gc := w.collect(t)
				valid := make(chan error, 1)
				var out string
				asked := make(chan struct{})
				go func() {
					defer close(asked)
					var err error
					out, err = w.inView("nix-store --check-validity " + w.d)
					valid <- err
				}()
				if lock == "" {
					if err := <-valid; err != nil {
						t.Errorf("%s %v", out, err)
					}
				} else {
					select {
					case err := <-valid:
						t.Errorf("answered during a collection: %s %v", out, err)
					case <-time.After(time.Second): // it waits; nothing is measured by this
					}
				}
				gc.goOn(t)
				<-asked
				if lock == "" {
					if got := w.left(t); got != "d p1" {
						t.Errorf("left %q", got)
					}
					return
				}
				if err := <-valid; err == nil || w.left(t) != "" {
					t.Errorf("left %q, and the client was told it is valid: %s", w.left(t), out)
				}
				if !strings.Contains(out, "waiting for the system store's garbage collector") {
					t.Errorf("the user does not see why: %s", out)
				}
			})
		})
	}
}

// TestCloseDuringCollection: the client leaves while a collector stands between
// finding roots and deleting. Pinning and closing do not wait for it, and
// nothing is lost, by this collection or the next.
func TestCloseDuringCollection(t *testing.T) {
	each(t, func(t *testing.T, w *world) {
		w.personal(t, w.proxy(t, gcLock))
		c, _ := w.ask(t, w.d)
		gc := w.collect(t)
		c.Close()
		w.stop()
		if got := w.pins(t); !slices.Equal(got, []string{w.d}) {
			t.Errorf("pins %q", got)
		}
		gc.goOn(t)
		if got := w.left(t); got != "d p1" {
			t.Errorf("left %q", got)
		}
		if got := w.gc(t); got != "d p1" {
			t.Errorf("the next collection left %q", got)
		}
	})
}
