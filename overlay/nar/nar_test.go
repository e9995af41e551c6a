package nar

import (
	"bytes"
	"encoding/binary"
	"errors"
	"fmt"
	"io"
	"strings"
	"testing"
	"testing/iotest"
)

// sample has a node of each kind.
func sample() []byte {
	b := AppendDirectory(AppendMagic(nil))
	file := func(name, content string, exec bool) {
		b = AppendRegular(AppendEntry(b, name), exec, int64(len(content)))
		b = AppendEnd(AppendEnd(AppendPadding(append(b, content...), int64(len(content)))))
	}
	file(" first", "", false)
	file("exec", "#!/bin/sh\n", true)
	b = AppendDirectory(AppendEntry(b, "sub"))
	file("a", "12345678", false)
	b = AppendEnd(AppendSymlink(AppendEntry(b, "b"), "../exec"))
	b = AppendEnd(AppendEnd(b))
	return AppendEnd(b)
}

// read reads an archive to its end: its steps, in text, with the contents of files.
func read(r io.Reader) (string, error) {
	var s strings.Builder
	in := NewReader(r)
	for {
		e, err := in.Next()
		if err == io.EOF {
			return s.String(), in.End()
		}
		if err != nil {
			if again, err2 := in.Next(); err2 != err || again != (Entry{}) {
				return "", fmt.Errorf("after %v: %v", err, err2)
			}
			return s.String(), err
		}
		content, err := io.ReadAll(io.LimitReader(in, 1<<16))
		if err != nil {
			return s.String(), err
		}
		fmt.Fprintf(&s, "%v %q %v %d %q %q\n", e.Kind, e.Name, e.Executable, e.Size, e.Target, content)
	}
}

// encode is the archive of what read tells, by the steps that are read again.
func encode(r io.Reader) ([]byte, error) {
	in := NewReader(r)
	b := AppendMagic(nil)
	depth := 0
	for {
		e, err := in.Next()
		if err == io.EOF {
			return b, in.End()
		}
		if err != nil {
			return nil, err
		}
		if e.Kind == Up {
			depth--
			b = AppendEnd(b)
		} else if e.Name != "" {
			b = AppendEntry(b, e.Name)
		}
		switch e.Kind {
		case Directory:
			depth++
			b = AppendDirectory(b)
			continue
		case Symlink:
			b = AppendSymlink(b, e.Target)
		case Regular:
			b = AppendRegular(b, e.Executable, e.Size)
			content, err := io.ReadAll(in)
			if err != nil {
				return nil, err
			}
			b = AppendEnd(AppendPadding(append(b, content...), e.Size))
		}
		if depth > 0 {
			b = AppendEnd(b)
		}
	}
}

const steps = `directory "" false 0 "" ""
regular " first" false 0 "" ""
regular "exec" true 10 "" "#!/bin/sh\n"
directory "sub" false 0 "" ""
regular "a" false 8 "" "12345678"
symlink "b" false 0 "../exec" ""
up "" false 0 "" ""
up "" false 0 "" ""
`

func TestRead(t *testing.T) {
	for name, r := range map[string]io.Reader{
		"whole":  bytes.NewReader(sample()),
		"bytes":  iotest.OneByteReader(bytes.NewReader(sample())),
		"halves": iotest.HalfReader(bytes.NewReader(sample())),
		"end":    iotest.DataErrReader(bytes.NewReader(sample())),
	} {
		if got, err := read(r); err != nil || got != steps {
			t.Errorf("%s: %v\n%s", name, err, got)
		}
	}
	if again, err := encode(bytes.NewReader(sample())); err != nil || !bytes.Equal(again, sample()) {
		t.Errorf("encoded again: %v %q", err, again)
	}
	// Contents need not be read.
	in := NewReader(bytes.NewReader(sample()))
	n := 0
	for {
		_, err := in.Next()
		if err == io.EOF {
			break
		}
		if err != nil {
			t.Fatal(err)
		}
		n++
	}
	if err := in.End(); err != nil || n != 8 {
		t.Errorf("%d steps, %v", n, err)
	}
	early := NewReader(bytes.NewReader(sample()))
	if _, err := early.Next(); err != nil || early.End() == nil {
		t.Errorf("an end in the middle (%v)", err)
	}
	// A root that is no directory.
	for _, b := range [][]byte{
		AppendSymlink(AppendMagic(nil), "x"),
		AppendEnd(AppendPadding(append(AppendRegular(AppendMagic(nil), false, 3), "abc"...), 3)),
	} {
		if _, err := read(bytes.NewReader(b)); err != nil {
			t.Errorf("%q: %v", b, err)
		}
		if _, err := read(bytes.NewReader(append(b, end...))); err == nil {
			t.Errorf("%q and another end", b)
		}
	}
}

func refused(t *testing.T, what string, b []byte) {
	t.Helper()
	var f *FormatError
	if got, err := read(bytes.NewReader(b)); !errors.As(err, &f) || f.Offset < 0 || f.Offset > int64(len(b)) {
		t.Errorf("%s: %v\n%s", what, err, got)
	}
	if _, err := encode(bytes.NewReader(b)); err == nil {
		t.Errorf("%s is read when contents are", what)
	}
}

func TestTruncations(t *testing.T) {
	for n := range len(sample()) {
		refused(t, fmt.Sprintf("the first %d bytes", n), sample()[:n])
	}
	refused(t, "one byte more", append(sample(), 0))
	refused(t, "another archive", append(sample(), sample()...))
}

// A bit of what is not a name, a target or contents makes it no archive, or another one.
func TestFlips(t *testing.T) {
	for i := range len(sample()) * 8 {
		b := sample()
		b[i/8] ^= 1 << (i % 8)
		got, err := read(bytes.NewReader(b))
		if err == nil && got == steps {
			t.Errorf("bit %d makes no difference", i)
		}
		if again, err2 := encode(bytes.NewReader(b)); err == nil && (err2 != nil || !bytes.Equal(again, b)) {
			t.Errorf("bit %d: it has another encoding", i)
		}
	}
}

func words(s ...string) []byte { return []byte(tokens(s...)) }

func TestHostile(t *testing.T) {
	in := func(entries ...[]byte) []byte {
		b := AppendDirectory(AppendMagic(nil))
		for _, e := range entries {
			b = append(b, e...)
		}
		return AppendEnd(b)
	}
	link := func(name string) []byte {
		return AppendEnd(AppendSymlink(AppendEntry(nil, name), "x"))
	}
	root := func(s ...string) []byte { return append(AppendMagic(nil), words(s...)...) }
	size := func(n uint64) []byte {
		return binary.LittleEndian.AppendUint64(root("(", "type", "regular", "contents"), n)
	}
	deep := AppendMagic(nil)
	for range MaxDepth {
		deep = AppendEntry(AppendDirectory(deep), "d")
	}
	longest := strings.Repeat("n", MaxName)
	for what, b := range map[string][]byte{
		"nothing":             nil,
		"a newer version":     words("nix-archive-2", "(", "type", "directory", ")"),
		"magic alone":         AppendMagic(nil),
		"an empty name":       in(link("")),
		"dot":                 in(link(".")),
		"dot dot":             in(link("..")),
		"a slash":             in(link("a/b")),
		"an absolute name":    in(link("/etc")),
		"NUL in a name":       in(link("a\x00b")),
		"a name that is long": in(link(longest + "n")),
		"the same name twice": in(link("a"), link("a")),
		"descending names":    in(link("b"), link("a")),
		"a prefix after":      in(link("ab"), link("a")),
		"the order of people": in(link("a"), link("B")),
		"signed bytes":        in(link("\xff"), link("a")),
		"an unknown type":     root("(", "type", "device", ")"),
		"no type":             root("(", ")"),
		"no contents":         root("(", "type", "regular", ")"),
		"contents twice":      root("(", "type", "regular", "contents", "a", "contents", "b", ")"),
		"executable last":     root("(", "type", "regular", "contents", "a", "executable", "", ")"),
		"executable: yes":     root("(", "type", "regular", "executable", "yes", "contents", "a", ")"),
		"executable twice":    root("(", "type", "regular", "executable", "", "executable", "", "contents", "a", ")"),
		"type twice":          root("(", "type", "regular", "type", "regular", "contents", "a", ")"),
		"a link to nothing":   root("(", "type", "symlink", "target", "", ")"),
		"a link to NUL":       root("(", "type", "symlink", "target", "a\x00", ")"),
		"a far link":          root("(", "type", "symlink", "target", strings.Repeat("x", MaxTarget+1), ")"),
		"a link, no target":   root("(", "type", "symlink", ")"),
		"an entry, no node":   in(words("entry", "(", "name", "a", ")")),
		"an entry, no name":   in(words("entry", "(", "node", "(", "type", "directory", ")", ")")),
		"node before name":    in(words("entry", "(", "node", "(", "type", "directory", ")", "name", "a", ")")),
		"an entry that stays": in(words("entry", "(", "name", "a", "node", "(", "type", "directory", ")")),
		"a second root":       append(in(), words("(", "type", "directory", ")")...),
		"a huge string":       binary.LittleEndian.AppendUint64(nil, 1<<40),
		"a string below zero": binary.LittleEndian.AppendUint64(nil, 1<<64-1),
		"a huge file":         size(1 << 62),
		"a file below zero":   size(1 << 63),
		"size -1":             size(1<<64 - 1),
		"too deep":            AppendDirectory(deep),
	} {
		refused(t, what, b)
	}
	for what, b := range map[string][]byte{
		"the longest name":   in(link(longest)),
		"the order of bytes": in(link(" "), link("A"), link("a"), link("a "), link("aa"), link("é"), link("\xff")),
		"the farthest link":  AppendSymlink(AppendMagic(nil), strings.Repeat("x", MaxTarget)),
		"a tilde":            in(link("a~nix~case~hack~1")),
	} {
		if _, err := read(bytes.NewReader(b)); err != nil {
			t.Errorf("%s: %v", what, err)
		}
	}
	for i := range 8 { // padding that is not zero
		b := root("(", "type", "regular", "contents", "a", ")")
		at := len(words("(", "type", "regular", "contents")) + len(magic) + 8 + i
		b[at] |= 0x80
		if i > 0 {
			refused(t, fmt.Sprintf("byte %d of the padding", i), b)
		}
	}
	broken := errors.New("broken")
	if _, err := read(io.MultiReader(bytes.NewReader(sample()[:100]), iotest.ErrReader(broken))); !errors.Is(err, broken) {
		t.Errorf("an error of the input: %v", err)
	}
	if _, err := read(io.MultiReader(bytes.NewReader(sample()), iotest.ErrReader(broken))); !errors.Is(err, broken) {
		t.Errorf("an error of the input at the end: %v", err)
	}
}

// Nothing longer than MaxPiece is appended at once.
func TestMaxPiece(t *testing.T) {
	for _, b := range [][]byte{AppendSymlink(nil, strings.Repeat("x", MaxTarget)), AppendEntry(nil, strings.Repeat("x", MaxName)), AppendRegular(nil, true, 1)} {
		if len(b) > MaxPiece {
			t.Errorf("%d bytes", len(b))
		}
	}
}

// Whatever is accepted has one encoding.
func FuzzRead(f *testing.F) {
	f.Fuzz(func(t *testing.T, b []byte) {
		_, err := read(bytes.NewReader(b))
		again, err2 := encode(bytes.NewReader(b))
		if (err == nil) != (err2 == nil) {
			t.Fatalf("%v, and %v", err, err2)
		}
		if err == nil && !bytes.Equal(again, b) {
			t.Fatalf("%q becomes %q", b, again)
		}
		var form *FormatError
		if err != nil && !errors.As(err, &form) {
			t.Fatal(err)
		}
	})
}
