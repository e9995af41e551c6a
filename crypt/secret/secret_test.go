package secret

import (
	"bytes"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"os"
	"runtime"
	"strings"
	"testing"
	"testing/iotest"
	"unsafe"

	"golang.org/x/sys/unix"
	"pgregory.net/rapid"

	"overkeep/tests/need"
)

func from(t testing.TB, s string) *Bytes {
	t.Helper()
	b, err := From([]byte(s))
	if err != nil {
		t.Fatal(err)
	}
	return b
}

// Whatever prints it, the secret is not in the text, alone, in a struct, behind a
// pointer, in an error or in a log.
func TestRedacts(t *testing.T) {
	const s = "hunter2"
	b := from(t, s)
	defer b.Wipe()
	type box struct {
		Name   string
		Secret *Bytes
	}
	var out []string
	for _, v := range []any{b, &b, box{"x", b}, &box{"x", b}, []*Bytes{b}, map[string]*Bytes{"k": b}} {
		for _, verb := range []string{"%v", "%+v", "%#v", "%s", "%q", "%x", "%X", "%d", "%p", "%T", "%U", "%c", "%b", "%o", "%t", "%e", "%z"} {
			out = append(out, fmt.Sprintf(verb, v))
		}
		out = append(out, fmt.Sprint(v), fmt.Sprintln(v), fmt.Errorf("key %v", v).Error())
	}
	for _, h := range []func(io.Writer) slog.Handler{
		func(w io.Writer) slog.Handler { return slog.NewTextHandler(w, nil) },
		func(w io.Writer) slog.Handler { return slog.NewJSONHandler(w, nil) },
	} {
		var w bytes.Buffer
		l := slog.New(h(&w))
		l.Info("x", "key", b, "box", box{"x", b}, slog.Group("g", "key", b))
		out = append(out, w.String())
	}
	out = append(out, b.String(), b.GoString())
	for _, v := range []any{b, box{"x", b}, []*Bytes{b}} {
		text, err := json.Marshal(v)
		if err == nil {
			t.Errorf("written as JSON: %s", text)
		}
		out = append(out, string(text), fmt.Sprint(err))
	}
	if text, err := b.MarshalText(); err == nil || text != nil {
		t.Errorf("written as text: %s", text)
	}
	for _, text := range out {
		for _, leak := range []string{s, "68756e746572", "68756E746572", "104 117 110", "0x68"} {
			if strings.Contains(text, leak) {
				t.Errorf("%q shows the secret", text)
			}
		}
	}
}

func TestFromWipesItsSource(t *testing.T) {
	src := []byte("hunter2")
	b, err := From(src)
	if err != nil {
		t.Fatal(err)
	}
	if !bytes.Equal(src, make([]byte, 7)) {
		t.Errorf("the source holds %q", src)
	}
	if string(b.Bytes()) != "hunter2" || b.Len() != 7 || cap(b.Bytes()) != 7 {
		t.Errorf("%d bytes, capacity %d", b.Len(), cap(b.Bytes()))
	}
}

func TestWipe(t *testing.T) {
	b := from(t, "hunter2")
	addr := uintptr(unsafe.Pointer(&b.Bytes()[0]))
	for range 3 {
		b.Wipe()
		if b.Len() != 0 || b.Bytes() != nil {
			t.Error("there is something left")
		}
	}
	if flags := vmFlags(t, addr); strings.Contains(flags, " lo") {
		t.Errorf("the memory is still mapped: %s", flags)
	}
	var none *Bytes
	none.Wipe()
	if none.Len() != 0 || none.Bytes() != nil || !none.Equal(b) || none.String() != redacted {
		t.Error("nil is not an empty secret")
	}
	none.TrimNewline()
	if c, err := none.Clone(); err != nil || c.Len() != 0 {
		t.Error(err)
	}
}

// vmFlags returns the kernel's flags of the mapping that holds addr (proc(5),
// smaps), or nothing.
func vmFlags(t *testing.T, addr uintptr) string {
	t.Helper()
	smaps, err := os.ReadFile("/proc/self/smaps")
	if err != nil {
		t.Fatal(err)
	}
	in := false
	for line := range strings.Lines(string(smaps)) {
		var lo, hi uintptr
		if n, _ := fmt.Sscanf(line, "%x-%x ", &lo, &hi); n == 2 {
			in = lo <= addr && addr < hi
		} else if flags, ok := strings.CutPrefix(line, "VmFlags:"); ok && in {
			return flags
		}
	}
	return ""
}

// The memory is locked (lo), not dumped (dd) and wiped in a forked child (wf).
func TestMemoryIsLocked(t *testing.T) {
	for _, n := range []int{1, 32, 4096, 4097, 65537} {
		b, err := New(n)
		if err != nil {
			t.Fatal(err)
		}
		for _, p := range []*byte{&b.Bytes()[0], &b.Bytes()[n-1]} {
			flags := strings.Fields(vmFlags(t, uintptr(unsafe.Pointer(p))))
			for _, want := range []string{"lo", "dd", "wf"} {
				found := false
				for _, f := range flags {
					found = found || f == want
				}
				if !found {
					t.Errorf("%d bytes: %q is missing in %q", n, want, flags)
				}
			}
		}
		b.Wipe()
	}
	if _, err := New(-1); err == nil {
		t.Error("a secret of -1 bytes")
	}
	if b, err := New(0); err != nil || b.Len() != 0 {
		t.Error(err)
	}
}

// Memory that cannot be locked is not used.
func TestNoLockNoSecret(t *testing.T) {
	need.Root(t) // raises the limit again
	var old unix.Rlimit
	if err := unix.Getrlimit(unix.RLIMIT_MEMLOCK, &old); err != nil {
		t.Fatal(err)
	}
	if err := unix.Setrlimit(unix.RLIMIT_MEMLOCK, &unix.Rlimit{Cur: 0, Max: old.Max}); err != nil {
		t.Fatal(err)
	}
	defer unix.Setrlimit(unix.RLIMIT_MEMLOCK, &old)
	src := []byte("hunter2")
	done := make(chan error)
	go func() {
		runtime.LockOSThread() // the thread loses a capability and ends with the goroutine
		done <- func() error {
			hdr := unix.CapUserHeader{Version: unix.LINUX_CAPABILITY_VERSION_3}
			var none [2]unix.CapUserData
			if err := unix.Capset(&hdr, &none[0]); err != nil {
				return err
			}
			if b, err := From(src); err == nil || b != nil {
				return errors.New("From gave a secret in memory that is not locked")
			}
			if b, err := Read(strings.NewReader("x"), 10); err == nil || b != nil {
				return errors.New("Read gave a secret in memory that is not locked")
			}
			return nil
		}()
	}()
	if err := <-done; err != nil {
		t.Error(err)
	}
	if !bytes.Equal(src, make([]byte, 7)) {
		t.Error("a failing From left its source")
	}
}

func TestRead(t *testing.T) {
	broken := errors.New("broken")
	for what, tt := range map[string]struct {
		r    io.Reader
		max  int
		want string
		err  error
	}{
		"empty":         {strings.NewReader(""), 10, "", nil},
		"short":         {strings.NewReader("abc"), 10, "abc", nil},
		"exact":         {strings.NewReader("abc"), 3, "abc", nil},
		"one more":      {strings.NewReader("abcd"), 3, "", ErrTooLong},
		"none allowed":  {strings.NewReader(""), 0, "", nil},
		"one too many":  {strings.NewReader("a"), 0, "", ErrTooLong},
		"a page":        {strings.NewReader(strings.Repeat("a", 4096)), 4096, strings.Repeat("a", 4096), nil},
		"byte by byte":  {iotest.OneByteReader(strings.NewReader("abc")), 3, "abc", nil},
		"end with data": {iotest.DataErrReader(strings.NewReader("abc")), 3, "abc", nil},
		"long, at once": {iotest.DataErrReader(strings.NewReader("abcd")), 3, "", ErrTooLong},
		"error":         {iotest.ErrReader(broken), 3, "", broken},
		"late error":    {io.MultiReader(strings.NewReader("abc"), iotest.ErrReader(broken)), 10, "", broken},
		"last error":    {io.MultiReader(strings.NewReader("abc"), iotest.ErrReader(broken)), 3, "", broken},
		"truncated":     {io.MultiReader(strings.NewReader("abc"), iotest.ErrReader(io.ErrUnexpectedEOF)), 10, "", io.ErrUnexpectedEOF},
		"stuck":         {stuck{}, 3, "", io.ErrNoProgress},
	} {
		b, err := Read(tt.r, tt.max)
		if !errors.Is(err, tt.err) || (err == nil) != (b != nil) || string(b.Bytes()) != tt.want {
			t.Errorf("%s: %d bytes, %v", what, b.Len(), err)
		}
		b.Wipe()
	}
}

type stuck struct{}

func (stuck) Read([]byte) (int, error) { return 0, nil }

func TestTrimNewline(t *testing.T) {
	for in, want := range map[string]string{
		"": "", "a": "a", "a\n": "a", "a\r\n": "a", "a\r": "a\r", "a\n\n": "a\n", "a\n\r": "a\n\r", "\n": "", "\r\n": "", "\r\r\n": "\r", " a \n": " a ",
	} {
		b := from(t, in)
		b.TrimNewline()
		if string(b.Bytes()) != want {
			t.Errorf("%q became %q", in, b.Bytes())
		}
		b.Wipe()
	}
}

func TestCloneAndEqualProperty(t *testing.T) {
	rapid.Check(t, func(rt *rapid.T) {
		x := rapid.SliceOf(rapid.Byte()).Draw(rt, "x")
		y := rapid.SliceOf(rapid.Byte()).Draw(rt, "y")
		a, b := from(t, string(x)), from(t, string(y))
		if a.Equal(b) != bytes.Equal(x, y) {
			rt.Fatal("Equal")
		}
		c, err := a.Clone()
		if err != nil || !c.Equal(a) {
			rt.Fatal("Clone", err)
		}
		a.Wipe()
		if !bytes.Equal(c.Bytes(), x) {
			rt.Fatal("the clone went with the original")
		}
		b.Wipe()
		c.Wipe()
	})
}

func TestRandom(t *testing.T) {
	a, err := Random(32)
	if err != nil {
		t.Fatal(err)
	}
	b, err := Random(32)
	if err != nil {
		t.Fatal(err)
	}
	if a.Equal(b) || bytes.Equal(a.Bytes(), make([]byte, 32)) {
		t.Error("not random")
	}
}

// The finalizer must not take memory that a method still reads.
func TestFinalizer(t *testing.T) {
	want := from(t, strings.Repeat("x", 32))
	defer want.Wipe()
	stop, done := make(chan struct{}), make(chan struct{})
	go func() {
		defer close(done)
		for {
			select {
			case <-stop:
				return
			default:
				runtime.GC()
			}
		}
	}()
	for range 2000 {
		if b, err := From(bytes.Repeat([]byte("x"), 32)); err != nil || !b.Equal(want) {
			t.Error(err)
		}
	}
	close(stop)
	<-done
}
