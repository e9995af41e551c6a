package drv

import (
	"crypto/sha256"
	"encoding/hex"
	"errors"
	"fmt"
	"path"
	"strings"

	"overkeep/overlay/drv/storepath"
)

// MaxSize bounds a file, in bytes. Nix has no bound of its own. A derivation of
// nixpkgs has some KB and the largest ones some MB; what grows beyond is text
// that somebody put into one (writeText of a data file), and 64 MiB of it is far
// more than Nix handles gracefully.
const MaxSize = 64 << 20

var (
	// ErrSize: the file is larger than MaxSize.
	ErrSize = errors.New("derivation is too large")
	// ErrUnsupported: a form that exists, but that this package does not read:
	// DrvWithVersion of the experimental feature dynamic-derivations.
	ErrUnsupported = errors.New("derivation of an experimental kind")
	// ErrForged: the content does not have the store path under which it was found.
	ErrForged = errors.New("derivation is not what its store path commits to")
)

// SyntaxError says where a file is not a derivation as Nix writes it. It quotes
// at most a few bytes of the file.
type SyntaxError struct {
	Offset int // in bytes from the beginning
	Msg    string
}

func (e *SyntaxError) Error() string {
	return fmt.Sprintf("not a derivation as Nix writes it: %s, at byte %d", e.Msg, e.Offset)
}

// Parse reads the content of a .drv file of the store at storeDir. The error is a
// *SyntaxError, ErrSize or ErrUnsupported.
//
// The strings of the result share one copy of the content: clone those that are
// to live longer.
func Parse(storeDir string, content []byte) (*Derivation, error) {
	if len(content) > MaxSize {
		return nil, fmt.Errorf("%w: %d bytes, more than %d", ErrSize, len(content), MaxSize)
	}
	p := parser{in: string(content), dir: storeDir}
	if strings.HasPrefix(p.in, "DrvWithVersion(") {
		return nil, fmt.Errorf("%w: %.40q", ErrUnsupported, p.in)
	}
	d := &Derivation{}
	p.derivation(d)
	if p.err != nil {
		return nil, p.err
	}
	return d, nil
}

// ParseAt is Parse for what was found at a store path. It is ErrForged unless
// content and references have exactly that path, so that a success speaks for
// every byte.
func ParseAt(storeDir, storePath string, content []byte) (*Derivation, error) {
	d, err := Parse(storeDir, content)
	if err != nil {
		return nil, err
	}
	base, ok := storepath.Base(storeDir, storePath)
	if !ok {
		return nil, fmt.Errorf("%w: %q is no store path", ErrForged, storePath)
	}
	name := storepath.Name(base)
	if have, err := storepath.Text(storeDir, name, content, d.References()); err != nil || have != storePath {
		return nil, ErrForged
	}
	for _, o := range d.Outputs {
		if o.Kind() == Fixed && !o.hasPathOf(storeDir, strings.TrimSuffix(name, Ext)) {
			return nil, fmt.Errorf("%w: the path of output %q is not that of its hash", ErrForged, o.Name)
		}
	}
	return d, nil
}

// hasPathOf reports whether a fixed output of the derivation called name has the
// path that its hash gives it.
func (o Output) hasPathOf(storeDir, name string) bool {
	if o.Name != "out" {
		name += "-" + o.Name
	}
	method, function := o.Method()
	sum, err := hex.DecodeString(o.Hash)
	if err != nil {
		return false
	}
	have := ""
	if method == "text:" {
		if function == "sha256" {
			have, err = storepath.Make(storeDir, "text", [sha256.Size]byte(sum), name)
		}
	} else {
		have, err = storepath.Fixed(storeDir, name, storepath.Method(method), storepath.Hash{Algo: function, Sum: sum})
	}
	return err == nil && have == o.Path
}

// parser reads left to right and never looks back or nests. After the first
// error every step does nothing.
type parser struct {
	in  string
	at  int
	dir string
	err error
}

func (p *parser) fail(at int, format string, a ...any) {
	if p.err == nil {
		p.err = &SyntaxError{at, fmt.Sprintf(format, a...)}
		p.at = len(p.in)
	}
}

// expect takes exactly s.
func (p *parser) expect(s string) {
	if p.err != nil {
		return
	}
	if rest := p.in[p.at:]; !strings.HasPrefix(rest, s) {
		same := 0
		for same < len(rest) && rest[same] == s[same] {
			same++
		}
		if same == len(rest) {
			p.fail(len(p.in), "it ends where %q is expected", s)
		} else {
			p.fail(p.at+same, "%q where %q is expected", rest[same], s[same:])
		}
		return
	}
	p.at += len(s)
}

// next reports whether the list that was begun with "[" has a further element,
// and takes the comma before it or the bracket that ends it.
func (p *parser) next(first *bool) bool {
	if p.err != nil {
		return false
	}
	if strings.HasPrefix(p.in[p.at:], "]") {
		p.at++
		return false
	}
	if !*first {
		p.expect(",")
	}
	*first = false
	return p.err == nil
}

// text takes a quoted string. Nix escapes five characters, always and no others
// (printString in derivations.cc).
func (p *parser) text() string {
	p.expect(`"`)
	if p.err != nil {
		return ""
	}
	start := p.at
	var b []byte // nil as long as nothing was escaped
	for {
		n := strings.IndexAny(p.in[p.at:], "\"\\\n\r\t")
		if n < 0 {
			p.fail(len(p.in), "it ends inside the string that begins at byte %d", start-1)
			return ""
		}
		b2 := p.in[p.at : p.at+n]
		p.at += n + 1
		switch c := p.in[p.at-1]; c {
		case '"':
			if b == nil {
				return b2
			}
			return string(append(b, b2...))
		case '\\':
			if p.at == len(p.in) {
				p.fail(p.at, "it ends inside an escape")
				return ""
			}
			u, ok := unescaped(p.in[p.at])
			if !ok {
				p.fail(p.at-1, "the escape \\%c, which Nix does not write", p.in[p.at])
				return ""
			}
			if b == nil {
				b = make([]byte, 0, n+64)
			}
			b = append(append(b, b2...), u)
			p.at++
		default:
			p.fail(p.at-1, "%q in a string, where Nix writes an escape", c)
			return ""
		}
	}
}

func unescaped(c byte) (byte, bool) {
	switch c {
	case '"', '\\':
		return c, true
	case 'n':
		return '\n', true
	case 'r':
		return '\r', true
	case 't':
		return '\t', true
	}
	return 0, false
}

// storePath takes a string that is a path directly in the store.
func (p *parser) storePath() string {
	at := p.at
	s := p.text()
	if _, ok := storepath.Base(p.dir, s); p.err == nil && !ok {
		p.fail(at, "%.200q, which is no path of the store %s", s, p.dir)
	}
	return s
}

// ascends checks that the elements of a set are sorted and each there once, as
// Nix writes them. prev is nil before the first.
func (p *parser) ascends(at int, prev *string, s string) *string {
	if p.err == nil && prev != nil && *prev >= s {
		p.fail(at, "%.200q not behind %.200q", s, *prev)
	}
	return &s
}

func (p *parser) derivation(d *Derivation) {
	p.expect("Derive([")
	var prev *string
	for first := true; p.next(&first); {
		at := p.at
		o := p.output()
		prev = p.ascends(at, prev, o.Name)
		d.Outputs = append(d.Outputs, o)
	}
	p.expect(",[")
	prev = nil
	for first := true; p.next(&first); {
		at := p.at
		in := p.input()
		prev = p.ascends(at, prev, in.Path)
		d.InputDrvs = append(d.InputDrvs, in)
	}
	p.expect(",[")
	prev = nil
	for first := true; p.next(&first); {
		at := p.at
		s := p.storePath()
		prev = p.ascends(at, prev, s)
		d.InputSrcs = append(d.InputSrcs, s)
	}
	p.expect(",")
	d.Platform = p.text()
	p.expect(",")
	d.Builder = p.text()
	p.expect(",[")
	for first := true; p.next(&first); {
		d.Args = append(d.Args, p.text())
	}
	p.expect(",[")
	prev = nil
	for first := true; p.next(&first); {
		at := p.at
		p.expect("(")
		v := Var{Name: p.text()}
		p.expect(",")
		v.Value = p.text()
		p.expect(")")
		prev = p.ascends(at, prev, v.Name)
		d.Env = append(d.Env, v)
	}
	p.expect(")")
	switch {
	case p.err != nil:
	case p.at != len(p.in):
		p.fail(p.at, "%.20q behind its end", p.in[p.at:])
	case len(d.Outputs) == 0:
		p.fail(len("Derive(["), "no output")
	}
}

func (p *parser) input() Input {
	p.expect("(")
	at := p.at
	in := Input{Path: p.storePath()}
	if p.err == nil && !strings.HasSuffix(in.Path, Ext) {
		p.fail(at, "%.200q, which is no derivation", in.Path)
	}
	p.expect(",[")
	var prev *string
	for first := true; p.next(&first); {
		at := p.at
		s := p.outputName()
		prev = p.ascends(at, prev, s)
		in.Outputs = append(in.Outputs, s)
	}
	p.expect(")")
	return in
}

// outputName takes the name of an output: it becomes part of a store path's name.
func (p *parser) outputName() string {
	at := p.at
	s := p.text()
	if err := storepath.CheckName(s); p.err == nil && err != nil {
		p.fail(at, "an output: %v", err)
	}
	return s
}

func (p *parser) output() Output {
	p.expect("(")
	at := p.at
	o := Output{Name: p.outputName()}
	p.expect(",")
	pathAt := p.at
	o.Path = p.text()
	p.expect(",")
	o.HashAlgo = p.text()
	p.expect(",")
	o.Hash = p.text()
	p.expect(")")
	if p.err != nil {
		return o
	}
	if msg := o.check(); msg != "" {
		p.fail(at, "output %q %s", o.Name, msg)
	} else if _, ok := storepath.Base(p.dir, o.Path); o.Path != "" && !ok {
		p.fail(pathAt, "%.200q, which is no path of the store %s", path.Clean(o.Path), p.dir)
	}
	return o
}
