package lower

import "fmt"

const (
	magic1 = 0x6e697863 // client's greeting
	magic2 = 0x6478696f // server's greeting
)

// Version is a protocol version, major<<8 | minor.
type Version uint32

// The versions spoken. Newest is what Nix 2.24 to 2.34 speak; later Nix keeps
// the number and negotiates features instead, of which we offer none, so both
// ends stay with the formats known here. Oldest is Nix 2.4.
const (
	Newest Version = 1<<8 | 38
	Oldest Version = 1<<8 | 32
)

func (v Version) String() string { return fmt.Sprintf("%d.%d", v>>8, v&0xff) }

// VersionError says that a peer speaks a version that is not known here.
type VersionError struct {
	Peer string // "client" or "upstream"
	Got  Version
}

func (e *VersionError) Error() string {
	return fmt.Sprintf("%s speaks worker protocol %s, need %s or newer", e.Peer, e.Got, Oldest)
}

func (v Version) check(peer string) error {
	if v>>8 != Newest>>8 || v < Oldest {
		return &VersionError{peer, v}
	}
	return nil
}

// greeting is what a daemon says of itself after the versions are agreed on.
type greeting struct {
	nix    string // since 1.33
	frames []byte // log frames up to and with STDERR_LAST or STDERR_ERROR
	failed bool
	text   string
}

// The upstream half of the handshake is in two steps, because the version that
// both peers speak is known only when each has named its own. Older clients
// (before 2.24) wait for the server's version before naming theirs.

// hello greets upstream and returns its version.
func (u *upstream) hello() (Version, error) {
	if err := u.send(msg(nil).num(magic1)); err != nil {
		return 0, err
	}
	u.in.begin(maxString, nil)
	if m, err := u.in.u64(); err != nil || m != magic2 {
		return 0, orViolated(err, "upstream is not a nix-daemon")
	}
	v, err := u.in.u32()
	if err != nil {
		return 0, err
	}
	return min(Version(v), Newest), Version(v).check("upstream")
}

// agree tells upstream the version v and reads what it says of itself.
func (u *upstream) agree(v Version) (greeting, error) {
	var g greeting
	m := msg(nil).num(uint64(v))
	if v >= 1<<8|38 {
		m = m.list(nil) // features
	}
	m = m.num(0).num(0) // obsolete: CPU affinity, reserve space
	if err := u.send(m); err != nil {
		return g, err
	}
	u.in.begin(maxRequest, nil)
	var err error
	if v >= 1<<8|38 {
		if err = u.in.list(1000, nil); err != nil {
			return g, err
		}
	}
	if v >= 1<<8|33 {
		if g.nix, err = u.in.str(1000); err != nil {
			return g, err
		}
	}
	if v >= 1<<8|35 {
		if err = u.in.numbers(1); err != nil { // whether upstream trusts us
			return g, err
		}
	}
	var kept buffer
	u.in.begin(maxRequest, &kept)
	g.failed, g.text, err = readFrames(&u.in)
	g.frames = kept.b
	return g, err
}

// greet is the client's half: it answers with upstream's version and returns
// the one agreed on.
func greet(w *wire, send func(msg) error, upstream Version) (Version, error) {
	if err := send(msg(nil).num(magic2).num(uint64(upstream))); err != nil {
		return 0, err
	}
	w.begin(maxString, nil)
	n, err := w.u32()
	if err != nil {
		return 0, err
	}
	v := min(Version(n), upstream)
	if err := v.check("client"); err != nil {
		return 0, err
	}
	return v, nil
}

// readMagic reads the first word of a client.
func readMagic(w *wire) error {
	w.begin(8, nil)
	m, err := w.u64()
	if err != nil || m != magic1 {
		return orViolated(err, "client does not speak the worker protocol")
	}
	return nil
}

// finishGreeting reads the client's features and obsolete fields and passes
// on upstream's greeting. The client is told that it is not trusted: nothing a
// trusted client may do is let through.
func finishGreeting(w *wire, send func(msg) error, v Version, g greeting) error {
	var m msg
	if v >= 1<<8|38 {
		w.begin(maxString, nil)
		if err := w.list(1000, nil); err != nil {
			return err
		}
		m = m.list(nil)
		// The client waits for these before it goes on.
		if err := send(m); err != nil {
			return err
		}
		m = nil
	}
	w.begin(maxString, nil)
	if affinity, err := w.u32(); err != nil {
		return err
	} else if affinity != 0 {
		if err := w.numbers(1); err != nil {
			return err
		}
	}
	if err := w.numbers(1); err != nil { // reserve space
		return err
	}
	if v >= 1<<8|33 {
		m = m.str(g.nix)
	}
	if v >= 1<<8|35 {
		m = m.num(2) // not trusted
	}
	return send(append(m, g.frames...))
}

// buffer is an io.Writer that keeps everything; what is read into it is
// bounded by wire.begin.
type buffer struct{ b []byte }

func (k *buffer) Write(p []byte) (int, error) { k.b = append(k.b, p...); return len(p), nil }
