package policy

import (
	"cmp"
	"fmt"
	"slices"
	"sort"
	"strings"
	"unicode/utf8"
)

// The bounds of what is parsed. Nothing that a person writes comes near them.
const (
	MaxSource  = 1 << 20 // bytes of one file
	MaxText    = 4 << 20 // bytes of all files
	MaxSources = 256     // files
	MaxLines   = 4096    // statements of all files
	MaxNesting = 100     // parentheses and nots within each other
	MaxErrors  = 20      // that are told; the rest are counted

	maxConditions = 16384 // different conditions, parts of others included
	maxClosures   = 128   // different closure-of, depends-on and built-from among them
	maxWord       = 4096  // bytes of a word or a string
	maxLetName    = 64
)

// Source is one policy file.
type Source struct {
	Name string // for messages: a path, or "policy"
	Text []byte

	// Root says that this is root's policy. Any other may only hold
	// personal, let and key lines.
	Root bool
}

// Pos is a place in a source. Lines and columns count from 1, columns in
// characters.
type Pos struct {
	Source string `json:"file"`
	Line   int    `json:"line"`
	Col    int    `json:"column"`
}

// String is file:line:column.
func (p Pos) String() string { return fmt.Sprintf("%s:%d:%d", p.Source, p.Line, p.Col) }

// Short is file:line.
func (p Pos) Short() string { return fmt.Sprintf("%s:%d", p.Source, p.Line) }

// Error is one thing that is wrong with a source.
type Error struct {
	Pos
	Msg string // with what to do about it, if that is known

	file    int // of the sources
	width   int // characters that the caret underlines
	excerpt string
	before  string // what stands before the caret, tabs kept
}

// Error is "file:line:column: message".
func (e *Error) Error() string { return e.Pos.String() + ": " + e.Msg }

// Detail is Error with the line it is about and a caret below the place.
func (e *Error) Detail() string {
	if e.excerpt == "" {
		return e.Error()
	}
	pad := strings.Map(func(r rune) rune {
		if r == '\t' {
			return r
		}
		return ' '
	}, e.before)
	return e.Error() + "\n    " + e.excerpt + "\n    " + pad + "^" + strings.Repeat("~", max(0, e.width-1))
}

// Errors is everything that is wrong with the sources, MaxErrors at most, in the
// order of the sources. Parse and ParseExpectations return it.
type Errors struct {
	List []*Error
	More int // how many there are beyond the list
}

// Error has a line for each error.
func (e *Errors) Error() string { return e.join((*Error).Error) }

// Detail is Error with an excerpt and a caret for each.
func (e *Errors) Detail() string { return e.join((*Error).Detail) }

func (e *Errors) join(f func(*Error) string) string {
	var b strings.Builder
	for i, err := range e.List {
		if i > 0 {
			b.WriteByte('\n')
		}
		b.WriteString(f(err))
	}
	if e.More > 0 {
		fmt.Fprintf(&b, "\nand %d more", e.More)
	}
	return b.String()
}

// Unwrap makes the single errors visible to errors.As.
func (e *Errors) Unwrap() []error {
	out := make([]error, len(e.List))
	for i, err := range e.List {
		out[i] = err
	}
	return out
}

// add notes an error; whoever collects sorts before it returns.
func (e *Errors) add(err *Error) {
	if !e.full() {
		e.List = append(e.List, err)
	}
}

// addf is add of an error about a span, made only if it is told.
func (e *Errors) addf(s span, f string, a ...any) {
	if !e.full() {
		e.List = append(e.List, s.errorf(f, a...))
	}
}

// full counts an error that will not be told, if so many were. Whoever can meet
// errors by the thousand asks before making one: its place and what may have been
// meant take time.
func (e *Errors) full() bool {
	if len(e.List) < MaxErrors {
		return false
	}
	e.More++
	return true
}

// sorted puts the errors in the order of the sources, or is nil if there is none.
func (e *Errors) sorted() error {
	if len(e.List) == 0 {
		return nil
	}
	slices.SortStableFunc(e.List, func(a, b *Error) int {
		return cmp.Or(a.file-b.file, a.Line-b.Line, a.Col-b.Col)
	})
	return e
}

// file is a source with what is needed to place errors in it.
type file struct {
	Source
	index int
	lines []int // where each line begins
}

func newFile(index int, s Source) *file {
	f := &file{Source: s, index: index, lines: []int{0}}
	for i, c := range s.Text {
		if c == '\n' {
			f.lines = append(f.lines, i+1)
		}
	}
	return f
}

// span is a part of a file, in bytes.
type span struct {
	file     *file
	from, to int
}

// pos is where a span begins.
func (s span) pos() Pos {
	line := sort.SearchInts(s.file.lines, s.from+1)
	return Pos{s.file.Name, line, 1 + utf8.RuneCount(s.file.Text[s.file.lines[line-1]:s.from])}
}

const excerptWidth = 100 // bytes of a line that are shown, at most, on each side of the caret

// errorf is an error about the span.
func (s span) errorf(f string, a ...any) *Error {
	e := &Error{Pos: s.pos(), Msg: fmt.Sprintf(f, a...), file: s.file.index}
	text := s.file.Text
	begin, end := s.from, s.from
	for begin > 0 && text[begin-1] != '\n' && s.from-begin < excerptWidth {
		begin--
	}
	for end < len(text) && text[end] != '\n' && end-s.from < excerptWidth {
		end++
	}
	clean := func(b []byte) string {
		return strings.Map(func(r rune) rune {
			if r < ' ' && r != '\t' || r == 0x7f || r == utf8.RuneError {
				return '?'
			}
			return r
		}, string(b))
	}
	e.excerpt = strings.TrimRight(clean(text[begin:end]), " \t")
	e.before = clean(text[begin:s.from])
	e.width = utf8.RuneCount(text[s.from:max(s.from, min(s.to, end))])
	return e
}

// nearest is the candidate that a word was probably meant to be, or "".
func nearest(word string, candidates []string) string {
	if len(word) > maxLetName {
		return ""
	}
	best, cost := "", 1+max(1, len(word)/3)
	for _, c := range candidates {
		if d := distance(strings.ToLower(word), c, cost); d < cost && d < len(word) {
			best, cost = c, d
		}
	}
	return best
}

// distance counts the characters to insert, drop, change or swap with a neighbour,
// and gives up at limit.
func distance(a, b string, limit int) int {
	if len(a)-len(b) >= limit || len(b)-len(a) >= limit {
		return limit
	}
	prev2, prev, row := make([]int, len(b)+1), make([]int, len(b)+1), make([]int, len(b)+1)
	for j := range prev {
		prev[j] = j
	}
	for i := range len(a) {
		row[0] = i + 1
		for j := range len(b) {
			d := prev[j]
			if a[i] != b[j] {
				d++
			}
			d = min(d, prev[j+1]+1, row[j]+1)
			if i > 0 && j > 0 && a[i] == b[j-1] && a[i-1] == b[j] {
				d = min(d, prev2[j-1]+1)
			}
			row[j+1] = d
		}
		prev2, prev, row = prev, row, prev2
	}
	return prev[len(b)]
}
