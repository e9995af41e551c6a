package lower

import (
	"bufio"
	"context"
	"errors"
	"fmt"
	"io"
	"net"
	"slices"
	"sync/atomic"
)

// ErrUpstreamLost says that the system's daemon closed the connection, or
// spoke out of turn, so its temp roots are gone or cannot be relied on.
var ErrUpstreamLost = errors.New("connection to the system store lost")

// rootBatch is how many AddTempRoot requests are sent before their replies are
// read. A daemon reads requests from a buffered stream, so this saves round
// trips; requests (at most 35 KB) and replies of a batch fit the socket buffers.
const rootBatch = 128

// upstream is a connection to the system's daemon. Only one goroutine uses it;
// between operations a watcher waits for the daemon to hang up.
type upstream struct {
	conn   net.Conn
	in     wire
	rooted map[string]struct{} // temp roots that this connection holds

	arm   chan struct{}
	ready chan error
	done  chan struct{} // closed when the watcher has ended; nil without one
	armed bool
	busy  atomic.Bool
}

func dialUpstream(ctx context.Context, socket string) (*upstream, error) {
	var d net.Dialer
	c, err := d.DialContext(ctx, "unix", socket)
	if err != nil {
		return nil, fmt.Errorf("connect to the system store: %w", err)
	}
	return newUpstream(c), nil
}

func newUpstream(c net.Conn) *upstream {
	return &upstream{
		conn: c, in: wire{r: bufio.NewReaderSize(c, 16<<10)}, rooted: map[string]struct{}{},
		arm: make(chan struct{}, 1), ready: make(chan error, 1),
	}
}

// watch calls lost when the daemon hangs up, or says anything, while it is
// idle. It ends with close.
func (u *upstream) watch(lost func()) {
	u.done = make(chan struct{})
	go func() {
		defer close(u.done)
		for range u.arm {
			_, err := u.in.r.Peek(1)
			if !u.busy.Load() {
				lost()
			}
			u.ready <- err
		}
	}()
}

// idle hands the reading side to the watcher until the next request.
func (u *upstream) idle() {
	if !u.armed {
		u.busy.Store(false)
		u.armed = true
		u.arm <- struct{}{}
	}
}

func (u *upstream) close() {
	_ = u.conn.Close()
	close(u.arm)
	if u.done != nil {
		<-u.done
	}
}

func (u *upstream) send(m msg) error {
	u.busy.Store(true)
	_, err := u.conn.Write(m)
	return err
}

// settle takes the reading side back; call it after send.
func (u *upstream) settle() error {
	if !u.armed {
		return nil
	}
	u.armed = false
	if err := <-u.ready; err != nil {
		return fmt.Errorf("%w: %w", ErrUpstreamLost, err)
	}
	return nil
}

// ask sends a request and reads its reply to the end; the reply's bytes also
// go to tee. An error means that the connection can no longer be used.
func (u *upstream) ask(q request, tee io.Writer, collect bool) (result, error) {
	if err := u.send(q.encode()); err != nil {
		return result{}, fmt.Errorf("%w: %w", ErrUpstreamLost, err)
	}
	if err := u.settle(); err != nil {
		return result{}, err
	}
	u.in.begin(maxReply, tee)
	r, err := readReply(&u.in, q.op, collect)
	if err != nil {
		return result{}, fmt.Errorf("%w: %w", ErrUpstreamLost, err)
	}
	return r, nil
}

func (u *upstream) holds(path string) bool { _, ok := u.rooted[path]; return ok }

// addTempRoots roots the paths, which the caller knows to be valid there. If
// the daemon refuses one, failure is its error as frames for the client.
func (u *upstream) addTempRoots(paths []string) (failure []byte, err error) {
	for batch := range slices.Chunk(paths, rootBatch) {
		var m msg
		for _, p := range batch {
			m = append(m, request{op: opAddTempRoot, arg: p}.encode()...)
		}
		if err := u.send(m); err != nil {
			return nil, fmt.Errorf("%w: %w", ErrUpstreamLost, err)
		}
		if err := u.settle(); err != nil {
			return nil, err
		}
		for _, p := range batch {
			var kept buffer
			u.in.begin(maxRequest, &kept)
			r, err := readReply(&u.in, opAddTempRoot, false)
			switch {
			case err != nil:
				return nil, fmt.Errorf("%w: %w", ErrUpstreamLost, err)
			case r.failed && failure == nil:
				failure = kept.b
			case !r.failed:
				u.rooted[p] = struct{}{}
			}
		}
		if failure != nil {
			return failure, nil
		}
	}
	return nil, nil
}
