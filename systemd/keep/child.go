package keep

import (
	"bufio"
	"bytes"
	"context"
	"encoding/binary"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"log"
	"os"
	"os/exec"
	"os/signal"
	"strings"
	"syscall"

	"golang.org/x/sys/unix"

	"overkeep/crypt/secret"
	"overkeep/overlay/layout"
	"overkeep/overlay/view"
)

// The helper process. Requests and replies are JSON on its standard input and
// output; secrets travel beside them, on two pipes of their own, each as a
// 32-bit length and the bytes. Neither is ever an argument, a variable of the
// environment or a file.
const (
	fdSecretsIn  = 3
	fdSecretsOut = 4
	maxSecret    = 64 << 10
)

// request is what a helper process is asked. Secrets names what stands on the
// secrets pipe, in order.
type request struct {
	Root     string    `json:"root"`
	Name     string    `json:"name"`
	StateDir string    `json:"state_dir"` // the keep's directory: its own, or the one init builds
	Header   *Header   `json:"header,omitempty"`
	User     view.User `json:"user"`
	Secrets  []string  `json:"secrets,omitempty"`
	Slot     string    `json:"slot,omitempty"`
	NewSlot  *NewSlot  `json:"new_slot,omitempty"`
	Salvage  string    `json:"salvage,omitempty"`
	LogN     int       `json:"log_n,omitempty"`
	Prealloc bool      `json:"preallocate,omitempty"`
	Locking  LockMode  `json:"locking,omitempty"`
	Restart  bool      `json:"restart,omitempty"` // open: prove the key, change nothing
	Force    bool      `json:"force,omitempty"`
	OldNix   bool      `json:"old_nix,omitempty"`
	Sizes    bool      `json:"sizes,omitempty"` // state: add up what the volume takes
}

type reply struct {
	Event  string          `json:"event,omitempty"` // not the last line
	Done   bool            `json:"done,omitempty"`
	Error  json.RawMessage `json:"error,omitempty"`
	Result json.RawMessage `json:"result,omitempty"`
}

// call is one request being served in the helper process.
type call struct {
	request
	k       layout.Keep
	secrets map[string]*secret.Bytes
	out     *json.Encoder
	give    func(*secret.Bytes) error
}

func (c *call) event(name string, v any) {
	b, _ := json.Marshal(v)
	_ = c.out.Encode(reply{Event: name, Result: b})
}

type operation func(ctx context.Context, c *call) (any, error)

var operations = map[string]operation{
	"create":  opCreate,
	"open":    opOpen,
	"close":   opClose,
	"holders": opHolders,
	"keys":    opKeys,
	"verify":  opVerify,
	"state":   opState,
	"destroy": opDestroy,
}

// ChildMain serves one request of a Manager and returns the exit status. It is
// only for the hidden "internal" verb of the command.
func ChildMain(op string) int {
	log.SetOutput(io.Discard) // google/fscrypt logs paths and descriptors there
	// A helper that lives in a view must not hold its parent's directory.
	_ = os.Chdir("/")
	switch op {
	case "supervise":
		return superviseMain()
	case "exec-daemon":
		return execDaemonMain()
	}
	ctx, stop := signal.NotifyContext(context.Background(), syscall.SIGINT, syscall.SIGTERM)
	defer stop()
	out := json.NewEncoder(os.Stdout)
	result, err := serve(ctx, op, out)
	r := reply{Done: true}
	if err != nil {
		r.Error, _ = json.Marshal(Classify(err))
	}
	if result != nil {
		r.Result, _ = json.Marshal(result)
	}
	if out.Encode(r) != nil || err != nil {
		return 1
	}
	return 0
}

func serve(ctx context.Context, op string, out *json.Encoder) (any, error) {
	f, ok := operations[op]
	if !ok {
		return nil, errorf(CodeUsage, op, "no internal operation %q", op)
	}
	c := &call{out: out, secrets: map[string]*secret.Bytes{}}
	b, err := io.ReadAll(io.LimitReader(os.Stdin, 1<<20))
	if err != nil {
		return nil, err
	}
	if err := strictJSON(b, &c.request); err != nil {
		return nil, errorf(CodeInternal, "", "internal request: %w", err)
	}
	if c.k, err = layout.New(c.Root, c.Name); err != nil {
		return nil, err
	}
	defer func() {
		for _, s := range c.secrets {
			s.Wipe()
		}
	}()
	if len(c.Secrets) > 0 {
		in := os.NewFile(fdSecretsIn, "secrets")
		for _, name := range c.Secrets {
			if c.secrets[name], err = readSecret(in); err != nil {
				return nil, fmt.Errorf("secret for the helper process: %w", err)
			}
		}
		in.Close()
	}
	c.give = func(s *secret.Bytes) error {
		w := os.NewFile(fdSecretsOut, "secrets")
		defer w.Close()
		return writeSecret(w, s)
	}
	v, err := f(ctx, c)
	if err != nil && c.Header != nil {
		err = c.outerFull(err)
	}
	return v, err
}

func readSecret(r io.Reader) (*secret.Bytes, error) {
	var n [4]byte
	if _, err := io.ReadFull(r, n[:]); err != nil {
		return nil, err
	}
	size := binary.BigEndian.Uint32(n[:])
	if size > maxSecret {
		return nil, secret.ErrTooLong
	}
	s, err := secret.New(int(size))
	if err != nil {
		return nil, err
	}
	if _, err := io.ReadFull(r, s.Bytes()); err != nil {
		s.Wipe()
		return nil, err
	}
	return s, nil
}

func writeSecret(w io.Writer, s *secret.Bytes) error {
	if s.Len() > maxSecret {
		return secret.ErrTooLong
	}
	var n [4]byte
	binary.BigEndian.PutUint32(n[:], uint32(s.Len()))
	if _, err := w.Write(n[:]); err != nil {
		return err
	}
	_, err := w.Write(s.Bytes())
	return err
}

// childOptions is how a helper process is run beside its request.
type childOptions struct {
	ns      *view.Namespace // where it lives
	secrets []*secret.Bytes // in the order of request.Secrets
	want    bool            // a secret comes back
	event   func(name string, v json.RawMessage)
	// late completes the request while the helper process is already starting. With
	// an error the helper is asked nothing.
	late func(*request) error
}

// lateRequest is a request that is complete when it is first read.
type lateRequest struct {
	req  request
	late func(*request) error
	r    io.Reader
	err  error
}

func (l *lateRequest) Read(p []byte) (int, error) {
	if l.r == nil {
		l.r = bytes.NewReader(nil)
		if l.late != nil {
			l.err = l.late(&l.req)
		}
		if l.err == nil {
			var b []byte
			if b, l.err = json.Marshal(l.req); l.err == nil {
				l.r = bytes.NewReader(b)
			}
		}
	}
	return l.r.Read(p)
}

// child runs one operation in a helper process and decodes its result into v.
// The secret that comes back belongs to the caller.
func (m *Manager) child(ctx context.Context, op string, req request, o childOptions, v any) (*secret.Bytes, error) {
	in := &lateRequest{req: req, late: o.late}
	inR, inW, err := os.Pipe()
	if err != nil {
		return nil, err
	}
	outR, outW, err := os.Pipe()
	if err != nil {
		inR.Close()
		inW.Close()
		return nil, err
	}
	defer outR.Close()
	cmd := exec.CommandContext(ctx, m.Exe, "internal", op)
	cmd.Args[0] = "overkeep"
	cmd.Stdin = in
	cmd.ExtraFiles = []*os.File{inR, outW} // fd 3 and 4
	cmd.Env = childEnv(os.Environ())
	cmd.Dir = "/"
	// SIGTERM first: a lock that is interrupted leaves a state that it can name.
	cmd.Cancel = func() error { return cmd.Process.Signal(unix.SIGTERM) }
	var stderr bytes.Buffer
	cmd.Stderr = &limitedWriter{w: &stderr, n: 4 << 10}
	stdout, err := cmd.StdoutPipe()
	if err == nil {
		err = o.ns.Start(cmd)
	}
	inR.Close()
	outW.Close()
	if err != nil {
		inW.Close()
		return nil, fmt.Errorf("start helper process: %w", err)
	}
	go func() {
		defer inW.Close()
		for _, s := range o.secrets {
			if writeSecret(inW, s) != nil {
				return
			}
		}
	}()
	var back *secret.Bytes
	got := make(chan struct{})
	go func() {
		defer close(got)
		if o.want {
			back, _ = readSecret(outR)
		}
	}()
	last := readReplies(stdout, o.event)
	werr := cmd.Wait()
	<-got
	if last == nil && ctx.Err() != nil {
		back.Wipe()
		return nil, errorf(CodeAborted, req.Name, "interrupted")
	}
	if in.err != nil {
		back.Wipe()
		return nil, in.err
	}
	fail := func(err error) (*secret.Bytes, error) {
		back.Wipe()
		return nil, err
	}
	if last == nil {
		return fail(errorf(CodeInternal, req.Name, "helper process %s ended without an answer: %v %s", op, werr, strings.TrimSpace(stderr.String())))
	}
	if err := decodeError(last.Error); err != nil {
		return fail(err)
	}
	if v != nil && len(last.Result) > 0 {
		if err := json.Unmarshal(last.Result, v); err != nil {
			return fail(errorf(CodeInternal, req.Name, "helper process %s: %w", op, err))
		}
	}
	if o.want && back == nil {
		return nil, errorf(CodeInternal, req.Name, "helper process %s gave nothing back", op)
	}
	return back, nil
}

func readReplies(r io.Reader, event func(string, json.RawMessage)) *reply {
	sc := bufio.NewScanner(r)
	sc.Buffer(nil, 16<<20)
	for sc.Scan() {
		var rep reply
		if json.Unmarshal(sc.Bytes(), &rep) != nil {
			return nil
		}
		if rep.Done {
			return &rep
		}
		if event != nil {
			event(rep.Event, rep.Result)
		}
	}
	return nil
}

// childEnv passes on what a helper and an age plugin need, and nothing else.
func childEnv(env []string) []string {
	var out []string
	for _, e := range env {
		name, _, _ := strings.Cut(e, "=")
		switch {
		case name == "PATH", name == "HOME", name == "TERM", name == "LANG", name == "NO_COLOR",
			strings.HasPrefix(name, "OVERKEEP_CRASH_"), strings.HasPrefix(name, "XDG_"):
			out = append(out, e)
		}
	}
	return out
}

// limitedWriter keeps the first n bytes and swallows the rest.
type limitedWriter struct {
	w io.Writer
	n int
}

func (l *limitedWriter) Write(p []byte) (int, error) {
	if q := p[:min(len(p), l.n)]; len(q) > 0 {
		l.n -= len(q)
		if _, err := l.w.Write(q); err != nil {
			return 0, err
		}
	}
	return len(p), nil
}

// privateNamespace returns a new namespace that vanishes with its last process.
func privateNamespace() (*view.Namespace, error) {
	ns, err := view.NewNamespace()
	if err != nil {
		return nil, classified(err)
	}
	return ns, nil
}

// existingNamespace opens the keep's pinned namespace; nil when there is none.
func existingNamespace(k layout.Keep) (*view.Namespace, error) {
	ns, err := view.OpenNamespace(k.Namespace())
	if errors.Is(err, os.ErrNotExist) {
		// The pin may have been taken away under a view that is still served.
		if pid := supervisorPID(k); pid != 0 {
			if ns, err := view.OpenNamespace(fmt.Sprintf("/proc/%d/ns/mnt", pid)); err == nil {
				return ns, nil
			}
		}
		return nil, nil
	}
	if errors.Is(err, unix.ENOTDIR) || errors.Is(err, unix.ELOOP) {
		return nil, classified(&view.MountPointError{Path: k.NamespaceDir(), Reason: "is no directory"})
	}
	if err != nil {
		return nil, classified(err)
	}
	return ns, nil
}
