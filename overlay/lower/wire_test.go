package lower

import (
	"bufio"
	"bytes"
	"errors"
	"fmt"
	"io"
	"net"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"
)

func wireOf(b []byte) *wire { return &wire{r: bufio.NewReader(bytes.NewReader(b))} }

func parse(b []byte) (request, error) { return readRequest(wireOf(b), "/nix/store") }

// TestHostileRequests: every one is refused with a typed error that repeats
// nothing of the input.
func TestHostileRequests(t *testing.T) {
	path := p("x")
	num := func(n uint64) msg { return msg(nil).num(n) }
	for name, b := range map[string][]byte{
		"half a number":          num(1)[:4],
		"operation alone":        num(1),
		"huge operation":         num(1 << 40),
		"operation 0":            num(0),
		"string without end":     num(1).num(100),
		"string of 2^63":         num(1).num(1 << 63),
		"string of 2^64-1":       num(1).num(1<<64 - 1),
		"string over the bound":  append(num(1).num(maxString+1), make([]byte, maxString+8)...),
		"empty string":           num(1).str(""),
		"padding not zero":       append(num(1).num(1), 'a', 0, 0, 0, 0, 0, 0, 1),
		"padding cut off":        num(1).str(path)[:8+8+len(path)],
		"relative":               num(1).str("x"),
		"other directory":        num(1).str("/nix/storage/" + path[11:]),
		"inside a path":          num(1).str(path + "/bin"),
		"traversal":              num(1).str("/nix/store/../../etc/passwd"),
		"newline":                num(1).str(path + "\nx"),
		"zero byte":              num(1).str(path + "\x00"),
		"not base 32":            num(1).str("/nix/store/" + strings.Repeat("e", 32) + "-x"),
		"upper case hash":        num(1).str("/nix/store/" + strings.Repeat("A", 32) + "-x"),
		"no name":                num(1).str("/nix/store/" + strings.Repeat("a", 32) + "-"),
		"no dash":                num(1).str("/nix/store/" + strings.Repeat("a", 33)),
		"name of dots":           num(1).str(p("..")),
		"name too long":          num(1).str(p(strings.Repeat("x", 212))),
		"hash part short":        num(29).str("abc"),
		"hash part with a slash": num(29).str(strings.Repeat("a", 31) + "/"),
		"output id without !":    num(43).str("sha256:00"),
		"output id with newline": num(43).str("sha256:00!out\n"),
		"list of 2^64-1":         num(31).num(1<<64 - 1),
		"list over the bound":    num(31).num(maxList + 1),
		"list that ends early":   num(31).num(3).str(path),
		"list with a bad path":   num(31).num(2).str(path).str("/etc"),
		"list without a flag":    num(31).list([]string{path}),
		"flag too large":         num(31).list(nil).num(1 << 33),
		"substitute":             num(31).list(nil).num(1),
		"options cut off":        append(num(19), neutralOptions[:40]...),
		"options without end":    append(num(19), neutralOptions[:96]...).num(1 << 31),
		"option too large":       append(num(19), neutralOptions[:96]...).num(1 << 33),
		"setting over the bound": append(num(19), neutralOptions[:96]...).num(1).str("a").num(maxSetting + 1),
		"write":                  num(7).str("x"),
		"client's temp root":     num(11).str(path),
		"client asks for roots":  num(14),
	} {
		_, err := parse(b)
		var refused *RefusedError
		if err == nil || !errors.Is(err, ErrProtocol) && !errors.As(err, &refused) && !errors.Is(err, io.ErrUnexpectedEOF) {
			t.Errorf("%s: %v", name, err)
			continue
		}
		if strings.Contains(err.Error(), "aaaa") || strings.Contains(err.Error(), "passwd") {
			t.Errorf("%s: the error repeats the input: %v", name, err)
		}
	}
	if _, err := parse(nil); err != io.EOF {
		t.Errorf("no request: %v, want io.EOF", err)
	}
}

func TestHostileReplies(t *testing.T) {
	path := p("x")
	num := func(n uint64) msg { return msg(nil).num(n) }
	for name, tc := range map[string]struct {
		op Op
		b  []byte
	}{
		"nothing":               {opIsValidPath, nil},
		"unknown frame":         {opIsValidPath, num(42)},
		"asks for data":         {opIsValidPath, num(0x64617461).num(1)},
		"sends data":            {opIsValidPath, num(0x64617416).str("x")},
		"no result":             {opIsValidPath, num(stderrLast)},
		"log line of 2^63":      {opIsValidPath, num(stderrNext).num(1 << 63)},
		"fields without end":    {opIsValidPath, num(stderrResult).num(1).num(1).num(1 << 60)},
		"unknown field":         {opIsValidPath, num(stderrResult).num(1).num(1).num(1).num(2)},
		"error of another kind": {opIsValidPath, num(stderrError).str("Warning")},
		"error with a position": {opIsValidPath, num(stderrError).str("Error").num(0).str("").str("x").num(1)},
		"traces without end":    {opIsValidPath, num(stderrError).str("Error").num(0).str("").str("x").num(0).num(1 << 60)},
		"trace with a position": {opIsValidPath, num(stderrError).str("Error").num(0).str("").str("x").num(0).num(1).num(1)},
		"list without end":      {opQueryAllValidPaths, num(stderrLast).num(1 << 60)},
		"half a path info":      {opQueryPathInfo, num(stderrLast).num(1).str("").str("00")},
		"unknown operation":     {opAddTempRoot + 1, num(stderrLast)},
		"roots without end":     {opFindRoots, num(stderrLast).num(1 << 60)},
		"more roots than said":  {opFindRoots, num(stderrLast).num(2).str("/l").str(path)},
		"half a root":           {opFindRoots, num(stderrLast).num(1).str("/l")},
		"a long link":           {opFindRoots, num(stderrLast).num(1).str(strings.Repeat("x", maxRootLink+1)).str(path)},
		"a root of no path":     {opFindRoots, num(stderrLast).num(1).str("/l").str("/etc/passwd")},
		"a root inside a path":  {opFindRoots, num(stderrLast).num(1).str("/l").str(path + "/bin")},
		"a relative root":       {opFindRoots, num(stderrLast).num(1).str("/l").str(path[1:])},
		"an empty root":         {opFindRoots, num(stderrLast).num(1).str("/l").str("")},
	} {
		w := wireOf(tc.b)
		w.begin(maxReply, nil)
		if _, err := readReply(w, tc.op, true); !errors.Is(err, ErrProtocol) && !errors.Is(err, io.ErrUnexpectedEOF) {
			t.Errorf("%s: %v", name, err)
		}
	}
	w := wireOf(msg(nil).num(stderrNext).str("a long line").num(stderrLast).num(1))
	w.begin(16, nil)
	if _, err := readReply(w, opIsValidPath, true); !errors.Is(err, ErrProtocol) {
		t.Errorf("longer than the message may be: %v", err)
	}
}

func TestValidPath(t *testing.T) {
	for path, want := range map[string]bool{
		p("hello-2.12"):             true,
		p("a+b-c.d_e?f=g"):          true,
		p(".hidden"):                true,
		p(strings.Repeat("x", 211)): true,
		p("."):                      false,
		p(".-x"):                    false,
		p("..-x"):                   false,
		p("a b"):                    false,
		p("ä"):                      false,
		"/nix/store":                false,
		"/nix/store/":               false,
		"/gnu/store/" + p("x")[11:]: false,
		"":                          false,
	} {
		if ValidPath("/nix/store", path) != want {
			t.Errorf("%q: want %v", path, want)
		}
	}
	if !ValidPath("/srv/s", "/srv/s/"+p("x")[11:]) {
		t.Error("other store directory")
	}
}

// TestRealNix reads what a local-overlay store of Nix 2.26.3 and 2.34.8 said to
// its lower daemon, and what that answered, to the last byte. The recordings
// are of a scratch machine: validity of a path with a reference, referrers,
// valid derivers, a build, path info, garbage collection.
func TestRealNix(t *testing.T) {
	files, err := filepath.Glob("testdata/real/*.client")
	if err != nil || len(files) == 0 {
		t.Fatal(files, err)
	}
	var all []string
	for _, file := range files {
		client, err := os.ReadFile(file)
		if err != nil {
			t.Fatal(err)
		}
		daemon, err := os.ReadFile(strings.TrimSuffix(file, "client") + "daemon")
		if err != nil {
			t.Fatal(err)
		}
		in := wireOf(client)
		if err := readMagic(in); err != nil {
			t.Errorf("%s: %v", file, err)
			continue
		}
		v, err := greet(in, func(msg) error { return nil }, Newest)
		if err == nil {
			err = finishGreeting(in, func(msg) error { return nil }, v, greeting{})
		}
		if err != nil || v != Newest {
			t.Errorf("%s: %s %v", file, v, err)
			continue
		}
		up := &upstream{in: *wireOf(daemon), conn: nowhere{}}
		if _, err := up.hello(); err != nil {
			t.Errorf("%s: %v", file, err)
		}
		g, err := up.agree(v)
		if err != nil || !strings.Contains(file, "nix-"+g.nix+"-") {
			t.Errorf("%s: %q %v", file, g.nix, err)
		}
		ops := []string{}
		for {
			q, err := readRequest(in, "/nix/store")
			if err == io.EOF {
				break
			}
			if err != nil {
				t.Errorf("%s: request %d: %v", file, len(ops), err)
				break
			}
			up.in.begin(maxReply, nil)
			r, err := readReply(&up.in, q.op, true)
			if err != nil || r.failed {
				t.Errorf("%s: reply %d to %s: %+v %v", file, len(ops), q.op, r, err)
				break
			}
			line := fmt.Sprint(q.op)
			if q.arg != "" {
				line += " " + q.arg[max(0, strings.LastIndexByte(q.arg, '-')+1):]
			}
			ops = append(ops, fmt.Sprintf("%s = %d%s", line, r.number, strings.Repeat(" path", len(r.paths))))
		}
		if _, err := up.in.r.ReadByte(); err != io.EOF {
			t.Errorf("%s: the daemon said more than was read", file)
		}
		all = append(all, "# "+filepath.Base(file), strings.Join(ops, "\n"))
	}
	got := strings.Join(all, "\n") + "\n"
	golden := "testdata/real/operations.txt"
	if os.Getenv("UPDATE") != "" {
		if err := os.WriteFile(golden, []byte(got), 0o644); err != nil {
			t.Fatal(err)
		}
	}
	wantOps, err := os.ReadFile(golden)
	if err != nil {
		t.Fatal(err)
	}
	if d := cmp.Diff(string(wantOps), got); d != "" {
		t.Error(d)
	}
}

// TestSession is the golden transcript of what the proxy itself sends: the
// bytes upstream gets and the client gets for one whole session.
func TestSession(t *testing.T) {
	in := msg(nil).num(magic1).num(1<<8 | 38).list([]string{"new-thing"}).num(0).num(0)
	in = append(in.num(19), neutralOptions[:96]...).num(1).str("access-tokens").str("SECRET")
	wantUp := msg(nil).num(magic1).num(1<<8 | 38).list(nil).num(0).num(0)
	wantUp = append(wantUp.num(19), neutralOptions...)
	if bytes.Contains(wantUp, []byte("SECRET")) {
		t.Fatal("test is wrong")
	}
	w := wireOf(in)
	var toClient, toUp bytes.Buffer
	u := &upstream{conn: nowhere{&toUp}, in: *wireOf(msg(nil).num(magic2).num(1<<8 | 38).list([]string{"x"}).str("2.34.8").num(1).num(stderrLast))}
	send := func(m msg) error { toClient.Write(m); return nil }
	if err := readMagic(w); err != nil {
		t.Fatal(err)
	}
	theirs, err := u.hello()
	if err != nil {
		t.Fatal(err)
	}
	v, err := greet(w, send, theirs)
	if err != nil {
		t.Fatal(err)
	}
	g, err := u.agree(v)
	if err != nil {
		t.Fatal(err)
	}
	if err := finishGreeting(w, send, v, g); err != nil {
		t.Fatal(err)
	}
	q, err := readRequest(w, "/nix/store")
	if err != nil {
		t.Fatal(err)
	}
	if err := u.send(q.encode()); err != nil {
		t.Fatal(err)
	}
	wantClient := msg(nil).num(magic2).num(1<<8 | 38).list(nil).str("2.34.8").num(2).num(stderrLast)
	if !bytes.Equal(toUp.Bytes(), wantUp) {
		t.Errorf("to upstream:\n%q, want\n%q", toUp.Bytes(), []byte(wantUp))
	}
	if !bytes.Equal(toClient.Bytes(), wantClient) {
		t.Errorf("to the client:\n%q, want\n%q", toClient.Bytes(), []byte(wantClient))
	}
}

func FuzzReadRequest(f *testing.F) {
	f.Add([]byte(msg(nil).num(1).str(p("x"))))
	f.Add([]byte(msg(nil).num(31).list([]string{p("x"), p("y")}).num(0)))
	f.Add([]byte(append(msg(nil).num(19), neutralOptions...)))
	f.Add([]byte(append(msg(nil).num(19), neutralOptions[:96]...).num(1).str("a").str("b")))
	f.Add([]byte(msg(nil).num(43).str("sha256:00!out").num(23).num(29).str(strings.Repeat("a", 32))))
	f.Fuzz(func(t *testing.T, b []byte) {
		w := wireOf(b)
		for {
			q, err := readRequest(w, "/nix/store")
			if err != nil {
				return
			}
			for _, s := range append(slices.Clone(q.paths), q.arg) {
				if strings.ContainsAny(s, "\n\x00 ") {
					t.Fatalf("%s let %q through", q.op, s)
				}
			}
			again, err := parse(q.encode())
			if d := cmp.Diff(fmt.Sprint(q), fmt.Sprint(again)); err != nil || d != "" {
				t.Fatalf("%v %s", err, d)
			}
		}
	})
}

func FuzzReadReply(f *testing.F) {
	f.Add(uint32(1), []byte(msg(nil).num(stderrNext).str("x").num(stderrLast).num(1)))
	f.Add(uint32(26), []byte(msg(nil).num(stderrLast).num(1).str("").str("00").list(nil).num(1).num(2).num(0).list(nil).str("")))
	f.Add(uint32(31), []byte(msg(nil).num(stderrLast).list([]string{p("x")})))
	f.Add(uint32(1), []byte(errorFrame("no")))
	f.Add(uint32(14), []byte(msg(nil).num(stderrLast).num(1).str("{temp:7}").str(p("x"))))
	f.Fuzz(func(t *testing.T, op uint32, b []byte) {
		var kept buffer
		w := wireOf(b)
		w.begin(1<<20, &kept)
		r, err := readReply(w, Op(op), true)
		if !bytes.HasPrefix(b, kept.b) {
			t.Fatal("what is passed on is not what was read")
		}
		if err == nil && len(r.text) > len(b) {
			t.Fatal("error longer than its reply")
		}
	})
}

// nowhere is a connection that only takes.
type nowhere struct{ w *bytes.Buffer }

func (n nowhere) Write(b []byte) (int, error) {
	if n.w != nil {
		n.w.Write(b)
	}
	return len(b), nil
}
func (nowhere) Read([]byte) (int, error)         { return 0, io.EOF }
func (nowhere) Close() error                     { return nil }
func (nowhere) LocalAddr() net.Addr              { return nil }
func (nowhere) RemoteAddr() net.Addr             { return nil }
func (nowhere) SetDeadline(time.Time) error      { return nil }
func (nowhere) SetReadDeadline(time.Time) error  { return nil }
func (nowhere) SetWriteDeadline(time.Time) error { return nil }
