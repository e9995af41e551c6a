// Package strictjson reads the JSON files of a keep, and nothing but what was
// written: encoding/json alone takes "Name" for "name", the last of a repeated
// key, null for anything, and replaces invalid UTF-8 in silence.
//
// Decode promises that what it accepts has every key of the Go type (but those
// marked omitempty) exactly once and no other, values of the right kinds, and
// nothing after it. Its errors speak of bytes and keys, never of Go types.
//
// It is for small files that are read whole. Do not use it where unknown keys
// are to be tolerated.
package strictjson

import (
	"bytes"
	"encoding"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"reflect"
	"strconv"
	"strings"
	"time"
)

// Error says what is wrong and where.
type Error struct {
	Offset int64 // in bytes, just behind the offending token
	Msg    string
}

func (e *Error) Error() string { return fmt.Sprintf("%s, at byte %d", e.Msg, e.Offset) }

// Decode reads b into v, a pointer to a struct. The error is an *Error.
func Decode(b []byte, v any) error {
	if bytes.ContainsRune(b, '\uFFFD') || !bytes.Equal(b, bytes.ToValidUTF8(b, nil)) {
		return &Error{0, "invalid UTF-8"}
	}
	d := json.NewDecoder(bytes.NewReader(b))
	d.UseNumber()
	w := walker{d}
	if err := w.value(reflect.TypeOf(v).Elem()); err != nil {
		return err
	}
	if _, err := d.Token(); !errors.Is(err, io.EOF) {
		return w.errorf("something follows the value")
	}
	if err := json.Unmarshal(b, v); err != nil {
		// What is left is a number out of range, or a text that its type refuses.
		var te *json.UnmarshalTypeError
		if errors.As(err, &te) {
			return &Error{te.Offset, fmt.Sprintf("value of %q is out of range", te.Field)}
		}
		var pe *time.ParseError
		if errors.As(err, &pe) {
			return &Error{int64(len(b)), fmt.Sprintf("malformed value: %q is no time", clip(pe.Value))}
		}
		return &Error{int64(len(b)), "malformed value: " + err.Error()}
	}
	return nil
}

type walker struct{ d *json.Decoder }

func (w walker) errorf(format string, a ...any) error {
	return &Error{w.d.InputOffset(), fmt.Sprintf(format, a...)}
}

func (w walker) token() (json.Token, error) {
	t, err := w.d.Token()
	var se *json.SyntaxError
	switch {
	case err == nil:
		return t, nil
	case errors.Is(err, io.EOF) && w.d.InputOffset() == 0:
		return nil, w.errorf("it is empty")
	case errors.Is(err, io.EOF), errors.Is(err, io.ErrUnexpectedEOF):
		return nil, w.errorf("it ends too early")
	case errors.As(err, &se):
		return nil, &Error{se.Offset, se.Error()}
	}
	return nil, w.errorf("%v", err)
}

var (
	textType = reflect.TypeFor[encoding.TextUnmarshaler]()
	jsonType = reflect.TypeFor[json.Unmarshaler]()
)

func (w walker) value(t reflect.Type) error {
	if reflect.PointerTo(t).Implements(textType) || reflect.PointerTo(t).Implements(jsonType) {
		return w.plain("a string")
	}
	switch t.Kind() {
	case reflect.Struct:
		return w.object(t)
	case reflect.Slice:
		return w.array(t.Elem())
	case reflect.String:
		return w.plain("a string")
	case reflect.Bool:
		return w.plain("a boolean")
	case reflect.Int, reflect.Int8, reflect.Int16, reflect.Int32, reflect.Int64,
		reflect.Uint, reflect.Uint8, reflect.Uint16, reflect.Uint32, reflect.Uint64:
		return w.plain("a number")
	}
	panic("strictjson: no reader for " + t.String()) // a mistake in our own types
}

// plain reads one value that is neither object nor array, of the given kind.
func (w walker) plain(want string) error {
	t, err := w.token()
	if err != nil {
		return err
	}
	if have := name(t); have != want {
		return w.errorf("%s where %s is expected", have, want)
	}
	return nil
}

func (w walker) delim(want json.Delim) error {
	t, err := w.token()
	if err != nil {
		return err
	}
	if t != json.Token(want) {
		return w.errorf("%s where %q is expected", name(t), want.String())
	}
	return nil
}

func (w walker) array(element reflect.Type) error {
	if err := w.delim('['); err != nil {
		return err
	}
	for w.d.More() {
		if err := w.value(element); err != nil {
			return err
		}
	}
	return w.delim(']')
}

func (w walker) object(t reflect.Type) error {
	if err := w.delim('{'); err != nil {
		return err
	}
	seen := map[string]bool{}
	fields := keysOf(t)
	for w.d.More() {
		k, err := w.token()
		if err != nil {
			return err
		}
		key, _ := k.(string) // an object's key is always a string
		f, known := fields[key]
		switch {
		case !known:
			return w.errorf("unknown key %s", clip(strconv.QuoteToASCII(key)))
		case seen[key]:
			return w.errorf("key %q repeated", key)
		}
		seen[key] = true
		if err := w.value(f.typ); err != nil {
			return err
		}
	}
	for i := range t.NumField() {
		if key, f := keyOf(t.Field(i)); !f.optional && !seen[key] {
			return w.errorf("key %q missing", key)
		}
	}
	return w.delim('}')
}

type field struct {
	typ      reflect.Type
	optional bool
}

func keyOf(f reflect.StructField) (string, field) {
	key, options, _ := strings.Cut(f.Tag.Get("json"), ",")
	if key == "" || f.Anonymous || !f.IsExported() {
		panic("strictjson: field " + f.Name + " has no key of its own")
	}
	return key, field{f.Type, options == "omitempty"}
}

func keysOf(t reflect.Type) map[string]field {
	m := make(map[string]field, t.NumField())
	for i := range t.NumField() {
		k, f := keyOf(t.Field(i))
		m[k] = f
	}
	return m
}

func name(t json.Token) string {
	switch t := t.(type) {
	case nil:
		return "null"
	case json.Delim:
		return fmt.Sprintf("%q", t.String())
	case string:
		return "a string"
	case bool:
		return "a boolean"
	}
	return "a number"
}

func clip(s string) string {
	const max = 80
	if len(s) > max {
		return s[:max] + "..."
	}
	return s
}
