package tree

import (
	"golang.org/x/sys/unix"
)

// window is how many directories of a way down are open at a time.
const window = 32

// chain is the way from a caller's directory down to where a walk stands. Only
// the last directories of it are open: those above are opened again by ".." on the way
// back, and must be the ones that they were.
type chain struct {
	base int // the caller's; never closed
	dirs []link
}

type link struct {
	fd       int // -1: closed for now
	dev, ino uint64
}

// fd is the directory where the walk stands.
func (c *chain) fd() int {
	if len(c.dirs) == 0 {
		return c.base
	}
	return c.dirs[len(c.dirs)-1].fd
}

// push goes down into fd, which st is of, and owns it.
func (c *chain) push(fd int, st *unix.Stat_t) {
	c.dirs = append(c.dirs, link{fd, st.Dev, st.Ino})
	if i := len(c.dirs) - 1 - window; i >= 0 {
		_ = shut(c.dirs[i].fd)
		c.dirs[i].fd = -1
	}
}

// pop goes back up. The chain stays usable for close only after an error.
func (c *chain) pop() error {
	last := len(c.dirs) - 1
	if last > 0 && c.dirs[last-1].fd < 0 {
		up := &c.dirs[last-1]
		fd, err := open(c.dirs[last].fd, "..", openDir)
		if err != nil {
			return err
		}
		var st unix.Stat_t
		if err := fstat(fd, &st); err != nil {
			_ = shut(fd)
			return err
		}
		if st.Dev != up.dev || st.Ino != up.ino {
			_ = shut(fd)
			return ErrChanged
		}
		up.fd = fd
	}
	_ = shut(c.dirs[last].fd) // a directory has nothing that could be lost
	c.dirs = c.dirs[:last]
	return nil
}

func (c *chain) close() {
	for _, l := range c.dirs {
		if l.fd >= 0 {
			_ = shut(l.fd)
		}
	}
	c.dirs = nil
}
