package lower

import (
	"context"
	"errors"
	"fmt"
	"slices"
	"time"
)

// DaemonError is what a daemon answered instead of a result. Text may name
// the paths that were asked for.
type DaemonError struct {
	Op   Op
	Text string
}

func (e *DaemonError) Error() string { return fmt.Sprintf("%s: %s", e.Op, e.Text) }

// Client asks a nix-daemon about its store. It never writes, never
// substitutes, and makes no temp roots. It is not safe for concurrent use; after
// an error other than *DaemonError it is closed.
type Client struct {
	up  *upstream
	nix string
}

// Dial connects to the daemon at socket and agrees on a version.
func Dial(ctx context.Context, socket string) (*Client, error) {
	u, err := dialUpstream(ctx, socket)
	if err != nil {
		return nil, err
	}
	c := &Client{up: u}
	if err := c.do(ctx, c.open); err != nil {
		_ = u.conn.Close()
		return nil, err
	}
	return c, nil
}

func (c *Client) open() error {
	v, err := c.up.hello()
	if err != nil {
		return err
	}
	g, err := c.up.agree(v)
	if err != nil {
		return err
	}
	if g.failed {
		return &DaemonError{opSetOptions, g.text}
	}
	c.nix = g.nix
	_, err = c.ask(request{op: opSetOptions})
	return err
}

// Nix is the version that the daemon says it is; empty before Nix 2.5.
func (c *Client) Nix() string { return c.nix }

// Close ends the connection.
func (c *Client) Close() error { return c.up.conn.Close() }

// do runs f with the connection's deadlines tied to ctx.
func (c *Client) do(ctx context.Context, f func() error) error {
	stop := context.AfterFunc(ctx, func() { _ = c.up.conn.SetDeadline(time.Unix(1, 0)) })
	err := f()
	stop()
	var told *DaemonError
	if err != nil && !errors.As(err, &told) {
		_ = c.up.conn.Close()
		if ctx.Err() != nil {
			return ctx.Err()
		}
	}
	return err
}

func (c *Client) ask(q request) (result, error) {
	r, err := c.up.ask(q, nil, true)
	if err == nil && r.failed {
		err = &DaemonError{q.op, r.text}
	}
	return r, err
}

// validBatch keeps a request well under the protocol's bounds.
const validBatch = 10_000

// ValidPaths returns those of paths that are valid in the store, in no
// particular order. Each must be a store path below /nix/store or whatever
// directory the daemon serves.
func (c *Client) ValidPaths(ctx context.Context, paths []string) ([]string, error) {
	var valid []string
	err := c.do(ctx, func() error {
		for batch := range slices.Chunk(paths, validBatch) {
			r, err := c.ask(request{op: opQueryValidPaths, paths: batch})
			if err != nil {
				return err
			}
			valid = append(valid, r.paths...)
		}
		return nil
	})
	if err != nil {
		return nil, err
	}
	return valid, nil
}

// AllValidPaths returns every valid path of the store.
func (c *Client) AllValidPaths(ctx context.Context) ([]string, error) {
	var r result
	err := c.do(ctx, func() (err error) {
		r, err = c.ask(request{op: opQueryAllValidPaths})
		return err
	})
	return r.paths, err
}
