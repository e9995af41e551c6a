package lower

import (
	"bufio"
	"context"
	"errors"
	"fmt"
	"io"
	"net"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"testing"
)

// fake is a nix-daemon over a set of paths. It records every operation as
// "Name args" with paths cut to their names.
type fake struct {
	version Version
	mu      sync.Mutex
	valid   map[string]bool
	ops     []string
	roots   map[int][]string // by connection, while it is open
	conns   int
	l       net.Listener

	before func(op Op, args []string)     // called before an operation is done
	reply  func(op Op, args []string) msg // if not nil and it returns bytes, they are the whole reply
	rude   func(op Op, n int, c net.Conn) // called after the reply to the n-th operation
	open   map[int]net.Conn
}

func p(name string) string { return "/nix/store/" + strings.Repeat("a", 32) + "-" + name }

func short(path string) string {
	_, name, _ := strings.Cut(path, "-")
	return name
}

func startFake(t testing.TB, valid ...string) (*fake, string) {
	t.Helper()
	f := &fake{version: Newest, valid: map[string]bool{}, roots: map[int][]string{}, open: map[int]net.Conn{}}
	for _, v := range valid {
		f.valid[p(v)] = true
	}
	socket := filepath.Join(t.TempDir(), "up")
	l, err := net.Listen("unix", socket)
	if err != nil {
		t.Fatal(err)
	}
	f.l = l
	var wg sync.WaitGroup
	wg.Go(func() {
		for {
			c, err := l.Accept()
			if err != nil {
				return
			}
			f.mu.Lock()
			f.conns++
			n := f.conns
			f.open[n] = c
			f.roots[n] = nil
			f.mu.Unlock()
			wg.Go(func() {
				defer c.Close()
				err := f.serve(n, c)
				f.mu.Lock()
				delete(f.roots, n)
				delete(f.open, n)
				f.ops = append(f.ops, "closed")
				f.mu.Unlock()
				if err != nil && !errors.Is(err, net.ErrClosed) && !errors.Is(err, io.EOF) {
					t.Logf("fake daemon: %v", err)
				}
			})
		}
	})
	t.Cleanup(func() {
		l.Close()
		f.mu.Lock()
		for _, c := range f.open {
			c.Close()
		}
		f.mu.Unlock()
		wg.Wait()
	})
	return f, socket
}

func (f *fake) serve(n int, c net.Conn) error {
	w := wire{r: bufio.NewReader(c)}
	w.begin(maxReply, nil)
	if m, err := w.u64(); err != nil || m != magic1 {
		return fmt.Errorf("magic %x: %v", m, err)
	}
	if _, err := c.Write(msg(nil).num(magic2).num(uint64(f.version))); err != nil {
		return err
	}
	v, err := w.u32()
	if err != nil {
		return err
	}
	ver := min(Version(v), f.version)
	var m msg
	if ver >= 1<<8|38 {
		if err := w.list(10, func(s string) error { return fmt.Errorf("feature %q offered", s) }); err != nil {
			return err
		}
		m = m.list([]string{"realisation-with-path-not-hash"})
	}
	if err := w.numbers(2); err != nil {
		return err
	}
	if ver >= 1<<8|33 {
		m = m.str("9.9-fake")
	}
	if ver >= 1<<8|35 {
		m = m.num(1)
	}
	if _, err := c.Write(append(m, noteFrame("hello")...).num(stderrLast)); err != nil {
		return err
	}
	for k := 0; ; k++ {
		if _, err := w.r.Peek(1); err != nil {
			return nil
		}
		w.begin(maxReply, nil)
		o, err := w.u32()
		if err != nil {
			return err
		}
		op := Op(o)
		var args []string
		switch op {
		case opSetOptions:
			var vals []string
			for range 13 {
				x, err := w.u64()
				if err != nil {
					return err
				}
				vals = append(vals, fmt.Sprint(x))
			}
			args = []string{strings.Join(vals, ",")}
		case opQueryAllValidPaths, opFindRoots:
		case opQueryValidPaths:
			if err := w.list(maxList, func(s string) error { args = append(args, s); return nil }); err != nil {
				return err
			}
			if sub, err := w.u64(); err != nil || sub != 0 {
				return fmt.Errorf("substitute %d: %v", sub, err)
			}
		default:
			s, err := w.str(maxString)
			if err != nil {
				return err
			}
			args = []string{s}
		}
		if f.before != nil {
			f.before(op, args)
		}
		if _, err := c.Write(f.perform(n, op, args)); err != nil {
			return err
		}
		if f.rude != nil {
			f.rude(op, k, c)
		}
	}
}

func (f *fake) perform(n int, op Op, args []string) msg {
	f.mu.Lock()
	defer f.mu.Unlock()
	line := op.String()
	for _, a := range args {
		if strings.HasPrefix(a, "/nix/store/") {
			a = short(a)
		}
		line += " " + a
	}
	f.ops = append(f.ops, line)
	if f.reply != nil {
		if m := f.reply(op, args); m != nil {
			return m
		}
	}
	log := msg(nil).num(stderrStartActivity).num(7).num(3).num(0).str("x").num(2).num(0).num(5).num(1).str("y").num(0)
	log = log.num(stderrResult).num(7).num(101).num(1).num(1).str("z").num(stderrStopActivity).num(7)
	m := log.num(stderrLast)
	switch op {
	case opSetOptions:
		return m
	case opIsValidPath:
		if f.valid[args[0]] {
			return m.num(1)
		}
		return m.num(0)
	case opAddTempRoot:
		f.roots[n] = append(f.roots[n], short(args[0]))
		return m.num(1)
	case opQueryPathInfo:
		if !f.valid[args[0]] {
			return m.num(0)
		}
		return m.num(1).str("").str(strings.Repeat("0", 64)).list([]string{args[0]}).num(1).num(2).num(0).list([]string{"k:sig"}).str("")
	case opQueryValidPaths:
		return m.list(slices.DeleteFunc(slices.Clone(args), func(s string) bool { return !f.valid[s] }))
	case opQueryAllValidPaths, opQueryReferrers, opQueryValidDerivers:
		var all []string
		for s := range f.valid {
			all = append(all, s)
		}
		slices.Sort(all)
		return m.list(all)
	case opFindRoots:
		return m.num(2).str("/proc/7/exe").str(p("x")).str("/home/\xff\n").str(p("y"))
	case opQueryPathFromHashPart:
		return m.str(p("x"))
	case opQueryRealisation:
		return m.list(nil)
	}
	return errorFrame("invalid operation")
}

func (f *fake) set(name string, valid bool) {
	f.mu.Lock()
	defer f.mu.Unlock()
	f.valid[p(name)] = valid
}

// rooted are the names that open connections hold.
func (f *fake) rooted() []string {
	f.mu.Lock()
	defer f.mu.Unlock()
	var all []string
	for _, r := range f.roots {
		all = append(all, r...)
	}
	slices.Sort(all)
	return slices.Compact(all)
}

// log returns what was recorded and forgets it.
func (f *fake) log() []string {
	f.mu.Lock()
	defer f.mu.Unlock()
	ops := f.ops
	f.ops = nil
	return ops
}

// startProxy serves px until the test ends; stop does so earlier and returns
// what Serve returned.
func startProxy(t testing.TB, px *Proxy) (socket string, stop func() error) {
	t.Helper()
	socket = filepath.Join(t.TempDir(), "low")
	l, err := net.Listen("unix", socket)
	if err != nil {
		t.Fatal(err)
	}
	ctx, cancel := context.WithCancel(t.Context())
	done := make(chan error, 1)
	go func() { done <- px.Serve(ctx, l) }()
	stop = sync.OnceValue(func() error { cancel(); return <-done })
	t.Cleanup(func() { _ = stop() })
	return socket, stop
}

// dialed is a client that speaks to the proxy as the personal daemon does.
func dialed(t testing.TB, socket string) *Client {
	t.Helper()
	c, err := Dial(t.Context(), socket)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { c.Close() })
	return c
}

// raw is a client of version says after the handshake at version v, for bytes
// of one's own.
func raw(t *testing.T, socket string, says, v Version) (net.Conn, *wire) {
	t.Helper()
	c, err := net.Dial("unix", socket)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { c.Close() })
	m := msg(nil).num(magic1).num(uint64(says))
	if v >= 1<<8|38 {
		m = m.list([]string{"some-feature"})
	}
	if _, err := c.Write(m.num(0).num(0)); err != nil {
		t.Fatal(err)
	}
	w := &wire{r: bufio.NewReader(c)}
	w.begin(maxReply, nil)
	must := func(err error) {
		t.Helper()
		if err != nil {
			t.Fatal(err)
		}
	}
	got, err := w.u64()
	must(err)
	if got != magic2 {
		t.Fatalf("magic %x", got)
	}
	_, err = w.u64()
	must(err)
	if v >= 1<<8|38 {
		must(w.list(0, nil)) // no feature is passed on
	}
	if v >= 1<<8|33 {
		_, err = w.str(100)
		must(err)
	}
	if v >= 1<<8|35 {
		trust, err := w.u64()
		must(err)
		if trust != 2 {
			t.Errorf("trust %d, want 2 (not trusted)", trust)
		}
	}
	_, _, err = readFrames(w)
	must(err)
	return c, w
}
