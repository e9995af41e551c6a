package lower

import (
	"bufio"
	"context"
	"errors"
	"fmt"
	"io"
	"maps"
	"net"
	"slices"
	"sync/atomic"
	"time"
)

// maxRooted bounds the paths one connection may hold.
const maxRooted = 4_000_000

// session is one client with its upstream connection.
type session struct {
	p      *Proxy
	client net.Conn
	in     wire
	out    *bufio.Writer
	up     *upstream
	lost   atomic.Bool // upstream hung up while it was idle
}

// serveOne runs a connection from handshake to finish. When ctx ends the
// client is cut off; late bounds what is done after that.
func (p *Proxy) serveOne(ctx, late context.Context, c net.Conn) error {
	stop := context.AfterFunc(ctx, func() { _ = c.Close() })
	defer stop()
	s := &session{p: p, client: c, in: wire{r: bufio.NewReaderSize(c, 16<<10)}, out: bufio.NewWriterSize(c, 16<<10)}
	limit := time.Now().Add(handshakeLimit)
	if err := c.SetDeadline(limit); err != nil {
		return err
	}
	if err := readMagic(&s.in); err != nil {
		return err
	}
	up, err := dialUpstream(ctx, p.Upstream)
	if err != nil {
		return err
	}
	s.up = up
	defer up.close()
	give := context.AfterFunc(late, func() { _ = up.conn.Close() })
	defer give()
	if err := up.conn.SetDeadline(limit); err != nil {
		return err
	}
	if err := s.handshake(); err != nil {
		return err
	}
	if err := errors.Join(c.SetDeadline(time.Time{}), up.conn.SetDeadline(time.Time{})); err != nil {
		return err
	}
	up.watch(func() { s.lost.Store(true); _ = c.Close() })
	err = s.loop(ctx)
	if s.lost.Load() {
		err = ErrUpstreamLost
	}
	_ = c.Close()
	return errors.Join(err, s.finish(late))
}

func (s *session) handshake() error {
	theirs, err := s.up.hello()
	if err != nil {
		return err
	}
	v, err := greet(&s.in, s.send, theirs)
	if err != nil {
		return err
	}
	g, err := s.up.agree(v)
	if err != nil {
		return err
	}
	if err := finishGreeting(&s.in, s.send, v, g); err != nil {
		return err
	}
	if g.failed {
		return fmt.Errorf("upstream refused the connection: %s", g.text)
	}
	return nil
}

func (s *session) send(m msg) error {
	if _, err := s.out.Write(m); err != nil {
		return err
	}
	return s.out.Flush()
}

// loop answers requests until the client leaves (nil) or something fails.
func (s *session) loop(ctx context.Context) error {
	for {
		s.up.idle()
		q, err := readRequest(&s.in, s.p.StoreDir)
		var refused *RefusedError
		switch {
		case err == io.EOF:
			return nil
		case errors.As(err, &refused):
			return errors.Join(err, s.send(errorFrame(refused.Error())))
		case errors.Is(err, ErrProtocol):
			return errors.Join(err, s.send(errorFrame(err.Error())))
		case err != nil:
			return err
		}
		if err := s.handle(ctx, q); err != nil {
			return err
		}
	}
}

// notValid is the answer "no" to IsValidPath and QueryPathInfo, and the empty list.
var notValid = msg(nil).num(stderrLast).num(0)

// absent reports whether the system store has nothing of the name of a path.
func (s *session) absent(path string) bool {
	return s.p.Absent != nil && s.p.Absent(path[len(s.p.StoreDir)+1:])
}

// handle answers one request. The order is the point of this package: ask,
// root what is valid, and let the client hear only the answer given under the
// root. What is not valid is not rooted, see the package comment.
//
// QueryPathFromHashPart, QueryValidDerivers, QueryReferrers, QueryRealisation
// and QueryAllValidPaths name paths without the client taking them over: before
// it registers one it asks IsValidPath or QueryPathInfo. So they root nothing.
func (s *session) handle(ctx context.Context, q request) error {
	switch q.op {
	case opIsValidPath, opQueryPathInfo:
		if s.up.holds(q.arg) {
			break
		}
		if s.absent(q.arg) {
			return s.send(notValid)
		}
		var kept buffer
		r, err := s.up.ask(request{op: opIsValidPath, arg: q.arg}, &kept, false)
		switch {
		case err != nil:
			return err
		case r.failed:
			return s.send(kept.b)
		case r.number == 0: // both operations say "no" alike
			return s.send(notValid)
		}
		if answered, err := s.root(ctx, []string{q.arg}); answered || err != nil {
			return err
		}
	case opQueryValidPaths:
		q.paths = slices.DeleteFunc(q.paths, func(p string) bool { return !s.up.holds(p) && s.absent(p) })
		if len(q.paths) == 0 {
			return s.send(notValid) // an empty list looks the same
		}
		fresh := slices.DeleteFunc(slices.Clone(q.paths), s.up.holds)
		if len(fresh) == 0 {
			break
		}
		var kept buffer
		r, err := s.up.ask(request{op: q.op, paths: fresh}, &kept, true)
		switch {
		case err != nil:
			return err
		case r.failed, len(r.paths) == 0 && len(fresh) == len(q.paths):
			return s.send(kept.b) // the answer to all of it
		}
		asked := make(map[string]bool, len(fresh))
		for _, p := range fresh {
			asked[p] = true
		}
		for _, p := range r.paths {
			if !asked[p] {
				return violated("upstream answered with a path it was not asked for")
			}
		}
		if answered, err := s.root(ctx, r.paths); answered || err != nil {
			return err
		}
		// A path that became valid meanwhile has no root: it is left out.
		q.paths = slices.DeleteFunc(q.paths, func(p string) bool { return !s.up.holds(p) })
	}
	if _, err := s.up.ask(q, s.out, false); err != nil {
		return err
	}
	return s.out.Flush()
}

// root makes temp roots of paths. answered means that the client got an error.
func (s *session) root(ctx context.Context, paths []string) (answered bool, err error) {
	if len(paths) == 0 {
		return false, nil
	}
	if len(s.up.rooted)+len(paths) > maxRooted {
		err := violated("more than %d paths on one connection", maxRooted)
		return true, errors.Join(err, s.send(errorFrame(err.Error())))
	}
	release, err := shareGCLock(ctx, s.p.GCLock, func() {
		_ = s.send(noteFrame("waiting for the system store's garbage collector"))
	})
	if err != nil {
		return true, errors.Join(err, s.send(errorFrame("lower store: "+err.Error())))
	}
	failure, err := s.up.addTempRoots(paths)
	release()
	if err != nil {
		return false, err
	}
	if failure != nil {
		return true, s.send(failure)
	}
	if s.p.Rooted != nil {
		if err := s.p.Rooted(ctx, paths); err != nil {
			s.p.Log.Warn("lower store: pin failed", "paths", len(paths), "err", err)
			return true, s.send(errorFrame("lower store: a path could not be pinned in the system store"))
		}
	}
	return false, nil
}

const (
	firstPause = 100 * time.Millisecond
	lastPause  = 30 * time.Second
)

// finish pins and only then lets the temp roots go. It is called with the
// client gone.
//
// After pinning every root is sent again. Nix's collector reads the permanent
// roots first and the temp roots second (gc.cc, collectGarbage); a pin written
// after the first reading and a connection closed before the second would
// lose the path. Sent again, the root reaches a running collector through its
// socket, and a later one sees the pin.
func (s *session) finish(late context.Context) error {
	if len(s.up.rooted) == 0 || s.p.BeforeClose == nil {
		return nil
	}
	for wait := firstPause; ; wait = min(2*wait, lastPause) {
		err := s.p.BeforeClose(late)
		if err == nil {
			break
		}
		s.p.Log.Warn("lower store: pinning failed, temp roots are kept", "paths", len(s.up.rooted), "err", err)
		if pause(late, wait); late.Err() != nil {
			return fmt.Errorf("%d lower paths may be unpinned: %w", len(s.up.rooted), err)
		}
	}
	failure, err := s.up.addTempRoots(slices.Collect(maps.Keys(s.up.rooted)))
	if err == nil && failure != nil {
		err = errors.New("upstream refused a temp root")
	}
	if err != nil {
		return fmt.Errorf("root again before closing: %w", err)
	}
	return nil
}
