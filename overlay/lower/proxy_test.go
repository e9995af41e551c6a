package lower

import (
	"context"
	"errors"
	"fmt"
	"net"
	"os"
	"path/filepath"
	"runtime"
	"slices"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"
	"golang.org/x/sys/unix"
)

const setOptions = "SetOptions 0,0,0,1,1,0,1,7,0,0,1,0,0"

// want compares what the daemon saw, without the first SetOptions.
func want(t *testing.T, f *fake, ops ...string) {
	t.Helper()
	got := f.log()
	if len(got) > 0 && got[0] == setOptions {
		got = got[1:]
	}
	if d := cmp.Diff(ops, got); d != "" {
		t.Errorf("operations upstream (-want +got):\n%s", d)
	}
}

// eventually polls for what another goroutine is about to do.
func eventually(t *testing.T, what string, ok func() bool) {
	t.Helper()
	for range 5000 {
		if ok() {
			return
		}
		time.Sleep(time.Millisecond)
	}
	t.Fatalf("never: %s", what)
}

// TestOrder is the promise: ask, root, ask again; and no root for what is not valid.
func TestOrder(t *testing.T) {
	ask := func(c *Client, op Op, arg string, paths ...string) (result, error) {
		return c.ask(request{op: op, arg: arg, paths: paths})
	}
	for _, tc := range []struct {
		name string
		do   func(t *testing.T, c *Client)
		ops  []string
	}{
		{"valid", func(t *testing.T, c *Client) {
			if r, err := ask(c, opIsValidPath, p("x")); err != nil || r.number != 1 {
				t.Errorf("%+v %v", r, err)
			}
		}, []string{"IsValidPath x", "AddTempRoot x", "IsValidPath x"}},
		{"not valid: never rooted", func(t *testing.T, c *Client) {
			if r, err := ask(c, opIsValidPath, p("private")); err != nil || r.number != 0 {
				t.Errorf("%+v %v", r, err)
			}
			if r, err := ask(c, opQueryPathInfo, p("private")); err != nil || r.number != 0 {
				t.Errorf("%+v %v", r, err)
			}
		}, []string{"IsValidPath private", "IsValidPath private"}},
		{"rooted once a connection", func(t *testing.T, c *Client) {
			ask(c, opIsValidPath, p("x"))
			if r, err := ask(c, opQueryPathInfo, p("x")); err != nil || r.number != 1 {
				t.Errorf("%+v %v", r, err)
			}
			ask(c, opIsValidPath, p("x"))
		}, []string{"IsValidPath x", "AddTempRoot x", "IsValidPath x", "QueryPathInfo x", "IsValidPath x"}},
		{"path info", func(t *testing.T, c *Client) {
			if r, err := ask(c, opQueryPathInfo, p("y")); err != nil || r.number != 1 {
				t.Errorf("%+v %v", r, err)
			}
		}, []string{"IsValidPath y", "AddTempRoot y", "QueryPathInfo y"}},
		{"many", func(t *testing.T, c *Client) {
			r, err := ask(c, opQueryValidPaths, "", p("private"), p("y"), p("x"))
			if d := cmp.Diff([]string{p("y"), p("x")}, r.paths); err != nil || d != "" {
				t.Errorf("%v %s", err, d)
			}
		}, []string{"QueryValidPaths private y x", "AddTempRoot y", "AddTempRoot x", "QueryValidPaths y x"}},
		{"many, some rooted", func(t *testing.T, c *Client) {
			ask(c, opIsValidPath, p("x"))
			if r, err := ask(c, opQueryValidPaths, "", p("x"), p("y")); err != nil || len(r.paths) != 2 {
				t.Errorf("%+v %v", r, err)
			}
			if r, err := ask(c, opQueryValidPaths, ""); err != nil || len(r.paths) != 0 {
				t.Errorf("%+v %v", r, err)
			}
		}, []string{"IsValidPath x", "AddTempRoot x", "IsValidPath x", "QueryValidPaths y", "AddTempRoot y", "QueryValidPaths x y"}},
		{"many, none", func(t *testing.T, c *Client) {
			if r, err := ask(c, opQueryValidPaths, "", p("private")); err != nil || len(r.paths) != 0 {
				t.Errorf("%+v %v", r, err)
			}
		}, []string{"QueryValidPaths private"}},
		{"nothing else roots", func(t *testing.T, c *Client) {
			for _, op := range []Op{opQueryReferrers, opQueryValidDerivers, opQueryAllValidPaths} {
				if r, err := ask(c, op, p("x")); err != nil || len(r.paths) != 2 {
					t.Errorf("%s: %+v %v", op, r, err)
				}
			}
			if _, err := ask(c, opQueryPathFromHashPart, strings.Repeat("a", 32)); err != nil {
				t.Error(err)
			}
			if _, err := ask(c, opQueryRealisation, "sha256:00!out"); err != nil {
				t.Error(err)
			}
		}, []string{"QueryReferrers x", "QueryValidDerivers x", "QueryAllValidPaths", "QueryPathFromHashPart " + strings.Repeat("a", 32), "QueryRealisation sha256:00!out"}},
	} {
		t.Run(tc.name, func(t *testing.T) {
			f, up := startFake(t, "x", "y")
			socket, stop := startProxy(t, &Proxy{Upstream: up})
			tc.do(t, dialed(t, socket))
			if err := stop(); err != nil {
				t.Error(err)
			}
			eventually(t, "upstream closed", func() bool { f.mu.Lock(); defer f.mu.Unlock(); return len(f.open) == 0 })
			want(t, f, append(tc.ops, "closed")...)
		})
	}
}

// TestAbsent: what the directory of the system store has no entry of is not valid,
// and upstream never hears of it; what is there is asked for, and what is rooted always.
func TestAbsent(t *testing.T) {
	f, up := startFake(t, "x", "y")
	var mu sync.Mutex
	gone := map[string]bool{strings.Repeat("a", 32) + "-private": true}
	socket, stop := startProxy(t, &Proxy{Upstream: up, Absent: func(name string) bool {
		mu.Lock()
		defer mu.Unlock()
		return gone[name]
	}})
	c := dialed(t, socket)
	for _, tc := range []struct {
		req   request
		valid uint64
		paths []string
	}{
		{request{op: opIsValidPath, arg: p("private")}, 0, nil},
		{request{op: opQueryPathInfo, arg: p("private")}, 0, nil},
		{request{op: opQueryValidPaths, paths: []string{p("private")}}, 0, nil},
		{request{op: opIsValidPath, arg: p("unknown")}, 0, nil}, // an entry, but no row
		{request{op: opQueryValidPaths, paths: []string{p("private"), p("x"), p("unknown")}}, 0, []string{p("x")}},
		{request{op: opQueryPathInfo, arg: p("y")}, 1, nil},
	} {
		r, err := c.ask(tc.req)
		if d := cmp.Diff(tc.paths, r.paths); err != nil || r.number != tc.valid || d != "" {
			t.Errorf("%s %s %v: %+v %v", tc.req.op, tc.req.arg, tc.req.paths, r, err)
		}
	}
	// A root means that the store still answers for it.
	mu.Lock()
	gone[strings.Repeat("a", 32)+"-x"] = true
	mu.Unlock()
	if r, err := c.ask(request{op: opIsValidPath, arg: p("x")}); err != nil || r.number != 1 {
		t.Errorf("rooted: %+v %v", r, err)
	}
	if err := stop(); err != nil {
		t.Error(err)
	}
	eventually(t, "upstream closed", func() bool { f.mu.Lock(); defer f.mu.Unlock(); return len(f.open) == 0 })
	want(t, f, "IsValidPath unknown", "QueryValidPaths x unknown", "AddTempRoot x", "QueryValidPaths x",
		"IsValidPath y", "AddTempRoot y", "QueryPathInfo y", "IsValidPath x", "closed")
}

// TestCollectedMeanwhile: the path dies between the first answer and the root,
// or comes to life after the first answer. The client hears the truth under the root.
func TestCollectedMeanwhile(t *testing.T) {
	f, up := startFake(t, "x", "y")
	f.before = func(op Op, args []string) {
		if op == opAddTempRoot {
			f.set("x", false)
			f.set("late", true)
		}
	}
	socket, _ := startProxy(t, &Proxy{Upstream: up})
	c := dialed(t, socket)
	if r, err := c.ask(request{op: opIsValidPath, arg: p("x")}); err != nil || r.number != 0 {
		t.Errorf("%+v %v", r, err)
	}
	f.set("x", true)
	f.set("late", false)
	c = dialed(t, socket)
	got, err := c.ValidPaths(t.Context(), []string{p("x"), p("y"), p("late")})
	if d := cmp.Diff([]string{p("y")}, got); err != nil || d != "" {
		t.Errorf("%v %s", err, d)
	}
}

// TestBeforeClose: pins first, then the roots again, then the end.
func TestBeforeClose(t *testing.T) {
	f, up := startFake(t, "x")
	fail := errors.New("no room")
	var calls atomic.Int32
	socket, stop := startProxy(t, &Proxy{Upstream: up, BeforeClose: func(context.Context) error {
		if d := cmp.Diff([]string{"x"}, f.rooted()); d != "" {
			t.Errorf("roots while pinning: %s", d)
		}
		if calls.Add(1) == 1 {
			return fail
		}
		f.mu.Lock()
		f.ops = append(f.ops, "pinned")
		f.mu.Unlock()
		return nil
	}})
	c := dialed(t, socket)
	if _, err := c.ask(request{op: opIsValidPath, arg: p("x")}); err != nil {
		t.Fatal(err)
	}
	c.Close()
	eventually(t, "closed", func() bool { return len(f.rooted()) == 0 })
	if n := calls.Load(); n != 2 {
		t.Errorf("BeforeClose called %d times, want 2 (the first failed)", n)
	}
	want(t, f, "IsValidPath x", "AddTempRoot x", "IsValidPath x", "pinned", "AddTempRoot x", "closed")

	// A client that was told of no valid path costs no pinning.
	c = dialed(t, socket)
	if _, err := c.ask(request{op: opIsValidPath, arg: p("private")}); err != nil {
		t.Fatal(err)
	}
	c.Close()
	if err := stop(); err != nil {
		t.Fatal(err)
	}
	if n := calls.Load(); n != 2 {
		t.Errorf("BeforeClose called %d times", n)
	}
}

// TestShutdown: with a client connected, Serve pins before it returns; with
// pinning that never works it still returns.
func TestShutdown(t *testing.T) {
	for _, works := range []bool{true, false} {
		t.Run(fmt.Sprint(works), func(t *testing.T) {
			_, up := startFake(t, "x")
			var pinned atomic.Bool
			socket, stop := startProxy(t, &Proxy{Upstream: up, Grace: 50 * time.Millisecond, BeforeClose: func(ctx context.Context) error {
				if !works {
					return errors.New("no")
				}
				pinned.Store(true)
				return ctx.Err()
			}})
			c := dialed(t, socket)
			if _, err := c.ask(request{op: opIsValidPath, arg: p("x")}); err != nil {
				t.Fatal(err)
			}
			idle := dialed(t, socket)
			if err := stop(); err != nil {
				t.Error(err)
			}
			if works != pinned.Load() {
				t.Error("not pinned before Serve returned")
			}
			if _, err := idle.ask(request{op: opIsValidPath, arg: p("x")}); err == nil {
				t.Error("connection outlived Serve")
			}
			noGoroutines(t)
		})
	}
}

// TestHungUpstream: an upstream that does not answer does not hold up the end.
func TestHungUpstream(t *testing.T) {
	f, up := startFake(t, "x")
	block := make(chan struct{})
	f.before = func(op Op, _ []string) {
		if op == opIsValidPath {
			<-block
		}
	}
	defer close(block)
	socket, stop := startProxy(t, &Proxy{Upstream: up, Grace: 20 * time.Millisecond})
	c := dialed(t, socket)
	go c.ask(request{op: opIsValidPath, arg: p("x")})
	if err := stop(); err != nil {
		t.Error(err)
	}
	noGoroutines(t)
}

// noGoroutines: nothing of a session is left.
func noGoroutines(t *testing.T) {
	t.Helper()
	buf := make([]byte, 1<<20)
	var stacks string
	for range 1000 {
		stacks = string(buf[:runtime.Stack(buf, true)])
		if !strings.Contains(stacks, "lower.(*session)") && !strings.Contains(stacks, "lower.(*upstream).watch") && !strings.Contains(stacks, "lower.(*Proxy)") {
			return
		}
		time.Sleep(time.Millisecond)
	}
	t.Errorf("goroutines left:\n%s", stacks)
}

// TestUpstreamLost: when the daemon goes, so do its temp roots; the client is
// cut off at once, even when it is idle, and what is in the database is pinned.
func TestUpstreamLost(t *testing.T) {
	f, up := startFake(t, "x")
	pinned := make(chan struct{}, 1)
	socket, _ := startProxy(t, &Proxy{Upstream: up, BeforeClose: func(context.Context) error { pinned <- struct{}{}; return nil }})
	c := dialed(t, socket)
	if _, err := c.ask(request{op: opIsValidPath, arg: p("x")}); err != nil {
		t.Fatal(err)
	}
	f.mu.Lock()
	for _, o := range f.open {
		o.Close()
	}
	f.mu.Unlock()
	if _, err := c.up.conn.Read(make([]byte, 1)); err == nil {
		t.Error("idle client not cut off")
	}
	<-pinned
}

// TestUnsolicited: a daemon that speaks out of turn is not trusted any more.
func TestUnsolicited(t *testing.T) {
	f, up := startFake(t, "x")
	f.rude = func(op Op, _ int, c net.Conn) {
		if op == opIsValidPath {
			c.Write(msg(nil).num(stderrLast))
		}
	}
	socket, _ := startProxy(t, &Proxy{Upstream: up})
	c := dialed(t, socket)
	_, err := c.ask(request{op: opIsValidPath, arg: p("private")})
	if err == nil {
		_, err = c.ask(request{op: opIsValidPath, arg: p("private")})
	}
	if err == nil {
		t.Error("out of step, and nobody noticed")
	}
}

// TestUpstreamErrors are passed on, and the connection goes on.
func TestUpstreamErrors(t *testing.T) {
	f, up := startFake(t, "x", "y")
	fail := opIsValidPath
	f.reply = func(op Op, _ []string) msg {
		if op == fail {
			return append(noteFrame("note"), errorFrame("disk full")...)
		}
		return nil
	}
	socket, _ := startProxy(t, &Proxy{Upstream: up})
	c := dialed(t, socket)
	for _, tc := range []struct {
		fail Op
		q    request
	}{
		{opIsValidPath, request{op: opIsValidPath, arg: p("x")}},
		{opIsValidPath, request{op: opQueryPathInfo, arg: p("x")}},
		{opAddTempRoot, request{op: opIsValidPath, arg: p("x")}},
		{opAddTempRoot, request{op: opQueryValidPaths, paths: []string{p("x"), p("y")}}},
		{opQueryValidPaths, request{op: opQueryValidPaths, paths: []string{p("x"), p("y")}}},
		{opQueryReferrers, request{op: opQueryReferrers, arg: p("x")}},
	} {
		fail = tc.fail
		_, err := c.ask(tc.q)
		var told *DaemonError
		if !errors.As(err, &told) || told.Text != "disk full" {
			t.Errorf("%s failing for %s: %v", tc.fail, tc.q.op, err)
		}
	}
	fail = 0
	if r, err := c.ask(request{op: opIsValidPath, arg: p("x")}); err != nil || r.number != 1 {
		t.Errorf("connection is of no use after errors: %+v %v", r, err)
	}
}

// TestRooted: the durable pin comes before the answer, and its failure is an error.
func TestRooted(t *testing.T) {
	f, up := startFake(t, "x", "y")
	var got []string
	var fail error
	socket, _ := startProxy(t, &Proxy{Upstream: up, Rooted: func(_ context.Context, paths []string) error {
		got = append(got, paths...)
		if d := cmp.Diff([]string{"x"}, f.rooted()); d != "" && fail == nil {
			t.Errorf("not rooted yet: %s", d)
		}
		return fail
	}})
	c := dialed(t, socket)
	if _, err := c.ask(request{op: opIsValidPath, arg: p("x")}); err != nil {
		t.Fatal(err)
	}
	fail = errors.New("cannot")
	var told *DaemonError
	if _, err := c.ask(request{op: opIsValidPath, arg: p("y")}); !errors.As(err, &told) || strings.Contains(told.Text, p("y")) {
		t.Errorf("%v", err)
	}
	if d := cmp.Diff([]string{p("x"), p("y")}, got); d != "" {
		t.Error(d)
	}
}

// TestGCLock: while a collector holds the lock, no path becomes valid for a
// client; one that is not valid is answered at once.
func TestGCLock(t *testing.T) {
	f, up := startFake(t, "x")
	lock := filepath.Join(t.TempDir(), "gc.lock")
	gc, err := os.OpenFile(lock, os.O_CREATE|os.O_RDWR, 0o600)
	if err != nil {
		t.Fatal(err)
	}
	defer gc.Close()
	if err := unix.Flock(int(gc.Fd()), unix.LOCK_EX); err != nil {
		t.Fatal(err)
	}
	socket, _ := startProxy(t, &Proxy{Upstream: up, GCLock: lock})
	conn, w := raw(t, socket, Newest, Newest)
	if _, err := conn.Write(request{op: opIsValidPath, arg: p("private")}.encode()); err != nil {
		t.Fatal(err)
	}
	if r, err := readReply(w, opIsValidPath, false); err != nil || r.number != 0 {
		t.Fatalf("%+v %v", r, err)
	}
	if _, err := conn.Write(request{op: opIsValidPath, arg: p("x")}.encode()); err != nil {
		t.Fatal(err)
	}
	tag, err := w.u64() // the note comes while we wait
	if err != nil || tag != stderrNext {
		t.Fatalf("%x %v", tag, err)
	}
	if s, err := w.str(1000); err != nil || !strings.Contains(s, "garbage collector") {
		t.Fatalf("%q %v", s, err)
	}
	if r := f.rooted(); len(r) != 0 {
		t.Errorf("rooted during a collection: %q", r)
	}
	f.set("x", false) // collected
	gc.Close()
	if r, err := readReply(w, opIsValidPath, false); err != nil || r.number != 0 {
		t.Errorf("%+v %v", r, err)
	}
}

// TestRefused: what is not a lower store's business ends the connection and
// never reaches the system's daemon.
func TestRefused(t *testing.T) {
	f, up := startFake(t, "x")
	socket, _ := startProxy(t, &Proxy{Upstream: up})
	for op := range Op(64) {
		switch op {
		case opIsValidPath, opQueryReferrers, opSetOptions, opQueryAllValidPaths, opQueryPathInfo, opQueryPathFromHashPart,
			opQueryValidPaths, opQueryValidDerivers, opQueryRealisation:
			continue
		}
		refused(t, socket, op.String(), msg(nil).num(uint64(op)).str(p("x")), op.String())
	}
	refused(t, socket, "substitute", msg(nil).num(31).list([]string{p("x")}).num(1), "substitution")
	refused(t, socket, "path", msg(nil).num(1).str("/etc/passwd"), "not a store path")
	refused(t, socket, "dirty padding", append(msg(nil).num(29).num(3), "abcdefgh"...), "padding")
	for _, op := range f.log() {
		if op != setOptions && op != "closed" {
			t.Errorf("reached the daemon: %s", op)
		}
	}
}

func refused(t *testing.T, socket, name string, m msg, text string) {
	t.Helper()
	c, w := raw(t, socket, Newest, Newest)
	if _, err := c.Write(m); err != nil {
		t.Fatal(err)
	}
	failed, got, err := readFrames(w)
	if err != nil || !failed || !strings.Contains(got, text) || strings.Contains(got, "/nix/store") {
		t.Errorf("%s: %v %q %v", name, failed, got, err)
	}
	if _, err := w.r.ReadByte(); err == nil {
		t.Errorf("%s: connection still open", name)
	}
}

// TestPipelined: a client that does not wait for replies gets them in order.
func TestPipelined(t *testing.T) {
	f, up := startFake(t, "x", "y")
	socket, _ := startProxy(t, &Proxy{Upstream: up})
	c, w := raw(t, socket, Newest, Newest)
	var m msg
	for _, n := range []string{"x", "private", "y"} {
		m = append(m, request{op: opIsValidPath, arg: p(n)}.encode()...)
	}
	if _, err := c.Write(m); err != nil {
		t.Fatal(err)
	}
	for i, want := range []uint64{1, 0, 1} {
		if r, err := readReply(w, opIsValidPath, false); err != nil || r.number != want {
			t.Errorf("%d: %+v %v", i, r, err)
		}
	}
	if d := cmp.Diff([]string{"x", "y"}, f.rooted()); d != "" {
		t.Error(d)
	}
}

// TestManyRoots: more than one batch, more than the socket buffers hold.
func TestManyRoots(t *testing.T) {
	f, up := startFake(t)
	var paths []string
	for i := range 3000 {
		paths = append(paths, p(fmt.Sprintf("%0200d", i)))
		f.set(short(paths[i]), true)
	}
	socket, _ := startProxy(t, &Proxy{Upstream: up, BeforeClose: func(context.Context) error { return nil }})
	c := dialed(t, socket)
	got, err := c.ValidPaths(t.Context(), paths)
	if err != nil || len(got) != len(paths) || len(f.rooted()) != len(paths) {
		t.Fatalf("%d valid, %d rooted, %v", len(got), len(f.rooted()), err)
	}
	all, err := c.AllValidPaths(t.Context())
	slices.Sort(all)
	if d := cmp.Diff(paths, all); err != nil || d != "" {
		t.Errorf("%v %s", err, d)
	}
}

// TestVersions: the lower of the three versions counts, and each is spoken right.
func TestVersions(t *testing.T) {
	for _, up := range []Version{Oldest, 1<<8 | 34, 1<<8 | 37, Newest, 1<<8 | 40} {
		for _, client := range []Version{Oldest, 1<<8 | 34, 1<<8 | 37, Newest, 1<<8 | 40} {
			t.Run(up.String()+" "+client.String(), func(t *testing.T) {
				f, socket := startFake(t, "x")
				f.version = up
				low, _ := startProxy(t, &Proxy{Upstream: socket})
				c, w := raw(t, low, client, min(up, client, Newest))
				if _, err := c.Write(request{op: opQueryPathInfo, arg: p("x")}.encode()); err != nil {
					t.Fatal(err)
				}
				if r, err := readReply(w, opQueryPathInfo, false); err != nil || r.number != 1 {
					t.Errorf("%+v %v", r, err)
				}
			})
		}
	}
	for _, v := range []Version{0, Oldest - 1, 2 << 8, 0xffffffff} {
		f, socket := startFake(t)
		f.version = v
		var ve *VersionError
		if _, err := Dial(t.Context(), socket); !errors.As(err, &ve) || ve.Peer != "upstream" {
			t.Errorf("upstream %s: %v", v, err)
		}
	}
}

func TestDialCancelled(t *testing.T) {
	l, err := net.Listen("unix", filepath.Join(t.TempDir(), "s"))
	if err != nil {
		t.Fatal(err)
	}
	defer l.Close() // never accepts
	ctx, cancel := context.WithCancel(t.Context())
	cancel()
	if _, err := Dial(ctx, l.Addr().String()); !errors.Is(err, context.Canceled) {
		t.Error(err)
	}
}

func TestPeer(t *testing.T) {
	_, up := startFake(t, "x")
	socket, _ := startProxy(t, &Proxy{Upstream: up, AllowUID: func(uid uint32) bool { return uid == uint32(os.Geteuid()) }})
	dialed(t, socket)
	socket, _ = startProxy(t, &Proxy{Upstream: up, AllowUID: func(uint32) bool { return false }})
	if _, err := Dial(t.Context(), socket); err == nil {
		t.Error("served a stranger")
	}
}

func TestNoUpstream(t *testing.T) {
	socket, stop := startProxy(t, &Proxy{Upstream: filepath.Join(t.TempDir(), "none")})
	if _, err := Dial(t.Context(), socket); err == nil {
		t.Error("no daemon, yet an answer")
	}
	if err := stop(); err != nil {
		t.Error(err)
	}
}

// BenchmarkFirstSight is what a path costs that a connection has not asked for
// before: three round trips upstream instead of one.
func BenchmarkFirstSight(b *testing.B) {
	f, up := startFake(b)
	for i := range 10000 {
		f.valid[p(fmt.Sprint(i))] = true
	}
	socket, _ := startProxy(b, &Proxy{Upstream: up})
	for name, to := range map[string]string{"direct": up, "proxy": socket} {
		b.Run(name, func(b *testing.B) {
			c := dialed(b, to)
			for i := range b.N {
				if r, err := c.ask(request{op: opIsValidPath, arg: p(fmt.Sprint(i % 10000))}); err != nil || r.number != 1 {
					b.Fatal(r, err)
				}
			}
		})
	}
}
