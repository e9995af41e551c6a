package plan

import (
	"bytes"
	"crypto/hmac"
	"crypto/sha256"
	"encoding/hex"
	"encoding/json"
	"errors"
	"fmt"
	"strings"
)

// A plan's file is lines of JSON, each a kind and a value and exactly as Encode writes
// it, so there are no two ways to write a plan:
//
//	{"plan":{...}}                        the header, first
//	{"reason":{...}} {"move":{...}} {"root":{...}} {"blocked":{...}} {"residue":{...}}
//	                                      in this order, any number of each
//	{"mac":"HEX"}                         HMAC-SHA-256 of all before it, last
//
// The key lies in the keep, so nobody can write a plan who cannot read it.

// Bounds of a file. A plan for a million paths is some 250 MB.
const (
	MaxFile = 1 << 30  // bytes
	maxLine = 64 << 10 // bytes
	KeySize = 32       // bytes of the key
)

// What can be wrong with a file.
var (
	ErrNotPlan   = errors.New("not a plan")
	ErrVersion   = errors.New("a plan of another version")
	ErrMachine   = errors.New("a plan for another machine")
	ErrKeep      = errors.New("a plan for another keep")
	ErrTruncated = errors.New("the plan is cut off")
	ErrEdited    = errors.New("the plan is not as it was written")
	ErrSyntax    = errors.New("a mistake in the plan")
	ErrTooLarge  = errors.New("the plan is too large")
)

// FileError says what is wrong with a plan's file, and where. It names no path.
type FileError struct {
	Err  error // one of those above
	Line int   // from 1; 0: the file as a whole
	Text string
}

func (e *FileError) Error() string {
	s := e.Err.Error()
	if e.Line > 0 {
		s = fmt.Sprintf("line %d: %s", e.Line, s)
	}
	if e.Text != "" {
		s += ": " + e.Text
	}
	return s
}

func (e *FileError) Unwrap() error { return e.Err }

// Expect is whose plan is wanted.
type Expect struct{ Machine, KeepID string }

// line is one line of a file: exactly one field is set.
type line struct {
	Plan    *Plan    `json:"plan,omitempty"`
	Reason  *Reason  `json:"reason,omitempty"`
	Move    *Move    `json:"move,omitempty"`
	Root    *Root    `json:"root,omitempty"`
	Blocked *Blocked `json:"blocked,omitempty"`
	Residue *Residue `json:"residue,omitempty"`
	MAC     string   `json:"mac,omitempty"`
}

// section is the place of a line in the order of a file, -1 if it is none.
func (l *line) section() int {
	at, n := -1, 0
	for i, set := range []bool{l.Plan != nil, l.Reason != nil, l.Move != nil, l.Root != nil, l.Blocked != nil, l.Residue != nil, l.MAC != ""} {
		if set {
			at = i
			n++
		}
	}
	if n != 1 {
		return -1
	}
	return at
}

const (
	sectionPlan = 0
	sectionMAC  = 6
)

// Encode writes a plan as a file, authenticated by a key of KeySize bytes.
func Encode(p *Plan, key []byte) []byte {
	var b bytes.Buffer
	put := func(l line) { b.Write(l.encode()) }
	put(line{Plan: p})
	for i := range p.Reasons {
		put(line{Reason: &p.Reasons[i]})
	}
	for i := range p.Moves {
		put(line{Move: &p.Moves[i]})
	}
	for i := range p.Roots {
		put(line{Root: &p.Roots[i]})
	}
	for i := range p.Blocked {
		put(line{Blocked: &p.Blocked[i]})
	}
	for i := range p.Residue {
		put(line{Residue: &p.Residue[i]})
	}
	put(line{MAC: mac(key, b.Bytes())})
	return b.Bytes()
}

// encode cannot fail: a line is strings and numbers.
func (l line) encode() []byte {
	var b bytes.Buffer
	e := json.NewEncoder(&b)
	e.SetEscapeHTML(false)
	_ = e.Encode(l) // ends in a newline
	return b.Bytes()
}

func mac(key, text []byte) string {
	h := hmac.New(sha256.New, key)
	h.Write([]byte("overkeep plan v1\n"))
	h.Write(text)
	return hex.EncodeToString(h.Sum(nil))
}

// Decode reads a file. Errors are *FileError.
//
// Version, machine and keep are looked at first, so that who brings a plan from
// elsewhere hears that, and not that it was edited: another keep has another key.
func Decode(b, key []byte, expect Expect) (*Plan, error) {
	if len(b) > MaxFile {
		return nil, &FileError{Err: ErrTooLarge, Text: fmt.Sprintf("%d bytes, at most %d are read", len(b), MaxFile)}
	}
	p, err := header(b, expect)
	if err != nil {
		return nil, err
	}
	body, err := authentic(b, key)
	if err != nil {
		return nil, err
	}
	if err := p.decode(body); err != nil {
		return nil, err
	}
	return p, nil
}

// header reads the first line.
func header(b []byte, expect Expect) (*Plan, error) {
	first, _, whole := bytes.Cut(b, []byte("\n"))
	if !bytes.HasPrefix(first, []byte(`{"plan":{"version":`)) {
		return nil, &FileError{Err: ErrNotPlan, Line: 1}
	}
	if !whole || len(first) > maxLine {
		return nil, &FileError{Err: ErrTruncated, Line: 1}
	}
	// A plan of another version may have other fields: of it only the version is read.
	var any struct {
		Plan struct {
			Version int `json:"version"`
		} `json:"plan"`
	}
	if err := json.Unmarshal(first, &any); err != nil {
		return nil, &FileError{Err: ErrSyntax, Line: 1, Text: "the header is no JSON of a plan"}
	}
	if v := any.Plan.Version; v != Version {
		return nil, &FileError{Err: ErrVersion, Line: 1, Text: fmt.Sprintf("version %d, this overkeep reads %d: make the plan anew", v, Version)}
	}
	l, err := parse(first, 1)
	if err != nil {
		return nil, err
	}
	switch p := l.Plan; {
	case p == nil:
		return nil, &FileError{Err: ErrNotPlan, Line: 1}
	case p.Machine != expect.Machine:
		return nil, &FileError{Err: ErrMachine, Line: 1}
	case p.KeepID != expect.KeepID:
		return nil, &FileError{Err: ErrKeep, Line: 1}
	default:
		return p, nil
	}
}

// authentic returns what the last line vouches for.
func authentic(b, key []byte) ([]byte, error) {
	lines := bytes.Count(b, []byte("\n"))
	if b[len(b)-1] != '\n' {
		return nil, &FileError{Err: ErrTruncated, Line: lines + 1}
	}
	at := bytes.LastIndexByte(b[:len(b)-1], '\n') + 1
	last, ok := strings.CutPrefix(string(b[at:]), `{"mac":"`)
	sum, end := strings.CutSuffix(last, "\"}\n")
	if !ok || !end || len(sum) != 2*sha256.Size {
		if bytes.Contains(b[:at], []byte("\n{\"mac\":\"")) {
			return nil, &FileError{Err: ErrEdited, Line: lines, Text: "there is something behind its end"}
		}
		return nil, &FileError{Err: ErrTruncated, Line: lines}
	}
	if len(key) != KeySize || !hmac.Equal([]byte(sum), []byte(mac(key, b[:at]))) {
		return nil, &FileError{Err: ErrEdited, Text: "its code does not fit: it was changed, or written with another key"}
	}
	return b[:at], nil
}

// parse reads one line, without its newline. It must be as we write it: nothing
// unknown, nothing twice, no other spelling.
func parse(text []byte, n int) (line, error) {
	var l line
	if len(text) > maxLine {
		return l, &FileError{Err: ErrSyntax, Line: n, Text: "the line is too long"}
	}
	d := json.NewDecoder(bytes.NewReader(text))
	d.DisallowUnknownFields()
	if err := d.Decode(&l); err != nil {
		return l, &FileError{Err: ErrSyntax, Line: n, Text: "no line of a plan"}
	}
	if l.section() < 0 {
		return l, &FileError{Err: ErrSyntax, Line: n, Text: "not one thing in a line"}
	}
	if again := l.encode(); !bytes.Equal(again[:len(again)-1], text) {
		return l, &FileError{Err: ErrSyntax, Line: n, Text: "not as a plan is written"}
	}
	return l, nil
}

// decode reads what is authentic; the header has been read. What it refuses was
// written by a program that has the key and is broken.
func (p *Plan) decode(b []byte) error {
	section, n := sectionPlan, 0
	for len(b) > 0 {
		var text []byte
		text, b, _ = bytes.Cut(b, []byte("\n"))
		if n++; n == 1 {
			continue
		}
		l, err := parse(text, n)
		if err != nil {
			return err
		}
		at := l.section()
		if at < section || at == sectionPlan || at == sectionMAC {
			return &FileError{Err: ErrSyntax, Line: n, Text: "out of order"}
		}
		section = at
		if text := p.add(l); text != "" {
			return &FileError{Err: ErrSyntax, Line: n, Text: text}
		}
	}
	return p.unique()
}

// add takes a line in; it returns what is wrong with it.
func (p *Plan) add(l line) string {
	switch {
	case l.Reason != nil:
		p.Reasons = append(p.Reasons, *l.Reason)
	case l.Move != nil:
		if text := p.wrong(l.Move); text != "" {
			return text
		}
		last := -1
		if n := len(p.Moves); n > 0 {
			last = p.Moves[n-1].Unit
			if rank(p.Moves[n-1].Kind) > rank(l.Move.Kind) {
				return "a seal behind a release"
			}
		}
		if u := l.Move.Unit; u != last && u != last+1 || u < 0 {
			return "a unit out of order"
		}
		if !isHash(l.Move.NarHash) {
			return "a NAR hash that is none"
		}
		p.Moves = append(p.Moves, *l.Move)
	case l.Root != nil:
		p.Roots = append(p.Roots, *l.Root)
	case l.Blocked != nil:
		if text := p.wrong(&l.Blocked.Move); text != "" {
			return text
		}
		if l.Blocked.Unit != NoUnit {
			return "a unit of what does not move"
		}
		p.Blocked = append(p.Blocked, *l.Blocked)
	case l.Residue != nil:
		p.Residue = append(p.Residue, *l.Residue)
	}
	return ""
}

func (p *Plan) wrong(m *Move) string {
	switch {
	case m.Kind != Seal && m.Kind != Release:
		return "a move that is neither seal nor release"
	case !strings.HasPrefix(m.Path, "/") || strings.ContainsAny(m.Path, "\x00\n"):
		return "a path that is none"
	case m.NarSize < 0:
		return "a size below zero"
	case m.Reason < 0 || m.Reason >= len(p.Reasons):
		return "a reason that is not there"
	}
	return ""
}

// unique: a path moves once, or is blocked once.
func (p *Plan) unique() error {
	seen := make(map[string]bool, len(p.Moves)+len(p.Blocked))
	for i := range p.Moves {
		seen[p.Moves[i].Path] = true
	}
	for i := range p.Blocked {
		seen[p.Blocked[i].Path] = true
	}
	if len(seen) != len(p.Moves)+len(p.Blocked) {
		return &FileError{Err: ErrSyntax, Text: "a path twice"}
	}
	return nil
}
