package lower

import (
	"context"
	"errors"
	"log/slog"
	"net"
	"sync"
	"time"

	"golang.org/x/sys/unix"
)

// Proxy gives a personal Nix store a read-only lower store. The zero values of
// the optional fields are usable; do not change fields after Serve.
type Proxy struct {
	// Upstream is the path of the system nix-daemon's socket.
	Upstream string

	// BeforeClose pins, durably, every path of the lower store that the
	// personal store now needs. It is called once a client that was told of
	// valid paths has gone and before its temp roots are dropped, and again,
	// with growing pauses, until it returns nil or Serve's grace is over.
	// Calls may overlap (pins.Pinner.Add is made for this). Nil means there is
	// nothing to do.
	BeforeClose func(context.Context) error

	// Rooted, if set, is called with paths that have just been rooted and are
	// about to be called valid for the first time on their connection. A pin
	// written here survives the death of this process and a power cut; without
	// it such paths are safe only while the process lives. If it fails, the
	// client gets an error instead of the answer. Beware: a personal garbage
	// collection walks the merged store and so asks for every path of the lower.
	Rooted func(ctx context.Context, paths []string) error

	// Absent, if set, reports that the directory of the system store has no entry
	// with that base name now. Such a path is called not valid without asking
	// upstream: Nix moves a path into place before it registers it (local-store.cc,
	// addToStore; derivation goals' registerOutputs) and forgets it before it removes
	// it (gc.cc, deleteFromStore). Most questions of a personal store are
	// about its own paths, and their names then never leave the proxy.
	Absent func(name string) bool

	// GCLock is the system store's gc.lock (/nix/var/nix/gc.lock). If set, a
	// path is told valid for the first time only while no collection runs; the
	// client sees a line that says so. Needed for full safety with an
	// upstream before Nix 2.35, see shareGCLock.
	GCLock string

	// AllowUID, if set, decides by the peer's user id (SO_PEERCRED) who may connect.
	AllowUID func(uid uint32) bool

	StoreDir string        // default /nix/store
	MaxConns int           // connections at a time, further ones wait; default 256
	Grace    time.Duration // time for BeforeClose after ctx ended; default 10 s
	Log      *slog.Logger  // default: nothing. Never gets a path or a hash.
}

const (
	defaultConns   = 256
	defaultGrace   = 10 * time.Second
	handshakeLimit = 30 * time.Second
)

// Serve accepts connections until ctx ends or l fails. It closes l. It returns
// after every connection has been finished, BeforeClose included: nil if ctx
// ended, else the listener's error.
func (p *Proxy) Serve(ctx context.Context, l net.Listener) error {
	q := *p
	p = &q
	if p.StoreDir == "" {
		p.StoreDir = "/nix/store"
	}
	if p.MaxConns <= 0 {
		p.MaxConns = defaultConns
	}
	if p.Grace <= 0 {
		p.Grace = defaultGrace
	}
	if p.Log == nil {
		p.Log = slog.New(slog.DiscardHandler)
	}
	ctx, cancel := context.WithCancel(ctx)
	defer cancel()
	stop := context.AfterFunc(ctx, func() { _ = l.Close() })
	defer stop()
	defer l.Close()

	// Sessions finish under a context that outlives ctx by Grace.
	late, expire := context.WithCancel(context.WithoutCancel(ctx))
	defer expire()
	grace := context.AfterFunc(ctx, func() {
		t := time.AfterFunc(p.Grace, expire)
		context.AfterFunc(late, func() { t.Stop() })
	})
	defer grace()

	var wg sync.WaitGroup
	defer wg.Wait()
	defer cancel() // a failed listener ends the sessions too
	room := make(chan struct{}, p.MaxConns)
	for {
		select {
		case room <- struct{}{}:
		case <-ctx.Done():
			return nil
		}
		c, err := l.Accept()
		if err != nil {
			if ctx.Err() != nil {
				return nil
			}
			if errors.Is(err, unix.EMFILE) || errors.Is(err, unix.ENFILE) || errors.Is(err, unix.ECONNABORTED) {
				<-room
				p.Log.Warn("lower store: accept", "err", err)
				pause(ctx, gcPoll)
				continue
			}
			return err
		}
		wg.Go(func() {
			defer func() { <-room }()
			p.connection(ctx, late, c)
		})
	}
}

func (p *Proxy) connection(ctx, late context.Context, c net.Conn) {
	defer c.Close()
	if p.AllowUID != nil {
		if uid, err := peerUID(c); err != nil || !p.AllowUID(uid) {
			p.Log.Warn("lower store: peer refused", "uid", uid, "err", err)
			return
		}
	}
	err := p.serveOne(ctx, late, c)
	var refused *RefusedError
	switch {
	case err == nil, ctx.Err() != nil && errors.Is(err, net.ErrClosed):
	case errors.As(err, &refused):
		p.Log.Warn("lower store: refused", "op", refused.Op.String(), "reason", refused.Reason)
	default:
		p.Log.Warn("lower store: connection ended", "err", err)
	}
}

// peerUID is the user id of the process that connected.
func peerUID(c net.Conn) (uint32, error) {
	u, ok := c.(*net.UnixConn)
	if !ok {
		return 0, errors.New("not a unix socket")
	}
	raw, err := u.SyscallConn()
	if err != nil {
		return 0, err
	}
	var cred *unix.Ucred
	var credErr error
	if err := raw.Control(func(fd uintptr) {
		cred, credErr = unix.GetsockoptUcred(int(fd), unix.SOL_SOCKET, unix.SO_PEERCRED)
	}); err != nil {
		return 0, err
	}
	if credErr != nil {
		return 0, credErr
	}
	return cred.Uid, nil
}

// pause waits for d or the end of ctx.
func pause(ctx context.Context, d time.Duration) {
	t := time.NewTimer(d)
	defer t.Stop()
	select {
	case <-ctx.Done():
	case <-t.C:
	}
}
