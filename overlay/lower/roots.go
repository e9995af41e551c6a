package lower

import "context"

// Root is a root of a store, as its daemon names it.
type Root struct {
	// Link is where the root is: the path of a link, "/proc/PID/exe" and the like of a
	// running process, "{temp:PID}" of a client of the daemon, "{lsof}", or "{censored}"
	// if the daemon does not trust who asks (gc.cc). It is made of any bytes.
	Link string
	Path string // the store path that is held
}

// Bounds of a list of roots: a process with many mappings has one for each, and a
// user may make as many links as there are inodes.
const (
	maxRoots    = 4_000_000
	maxRootLink = 4096 // PATH_MAX
)

// FindRoots asks for all roots of the store: links, running processes and temporary
// roots. A daemon names only to trusted users (root is one) whose they are. It walks
// /proc and all links, so it may take a second.
func (c *Client) FindRoots(ctx context.Context) ([]Root, error) {
	var r result
	err := c.do(ctx, func() (err error) {
		r, err = c.ask(request{op: opFindRoots})
		return err
	})
	return r.roots, err
}

// readRoots reads a number and as many pairs of link and path (daemon.cc, FindRoots).
// A path outside of any store directory, or one that is no name in it, is a
// violation: what is held could not be told.
func readRoots(w *wire) ([]Root, error) {
	n, err := w.u64()
	if err != nil {
		return nil, err
	}
	if n > maxRoots {
		return nil, violated("%d roots, at most %d allowed", n, maxRoots)
	}
	var out []Root
	for ; n > 0; n-- {
		link, err := w.str(maxRootLink)
		if err != nil {
			return nil, err
		}
		path, err := w.str(maxString)
		if err != nil {
			return nil, err
		}
		if !storePath(path) {
			return nil, violated("a root of what is no store path")
		}
		out = append(out, Root{link, path})
	}
	return out, nil
}

// storePath: a valid path of whatever directory the daemon serves.
func storePath(s string) bool {
	for i := len(s) - 1; i > 0; i-- {
		if s[i] == '/' {
			return s[0] == '/' && ValidPath(s[:i], s)
		}
	}
	return false
}
