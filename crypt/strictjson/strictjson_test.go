package strictjson

import (
	"encoding/json"
	"errors"
	"strings"
	"testing"
	"time"
)

type inner struct {
	X int `json:"x"`
}

type sample struct {
	Name  string    `json:"name"`
	N     uint8     `json:"n"`
	On    bool      `json:"on"`
	When  time.Time `json:"when"`
	Tags  []string  `json:"tags"`
	Inner []inner   `json:"inner"`
	Maybe string    `json:"maybe,omitempty"`
}

const good = `{"name":"a","n":7,"on":true,"when":"2026-11-22T10:00:00Z","tags":["x"],"inner":[{"x":1}]}`

func TestDecode(t *testing.T) {
	var s sample
	if err := Decode([]byte(good), &s); err != nil {
		t.Fatal(err)
	}
	if s.Name != "a" || s.N != 7 || !s.On || s.Inner[0].X != 1 || s.When.Year() != 2026 {
		t.Errorf("read %+v", s)
	}
}

func TestDecodeRefuses(t *testing.T) {
	change := func(old, new string) string { return strings.Replace(good, old, new, 1) }
	for _, tt := range []struct{ name, in, want string }{
		{"empty", "", "empty"},
		{"cut", good[:20], "ends too early"},
		{"not JSON", "hello", "byte"},
		{"null", "null", "null where"},
		{"array", "[]", `"[" where "{"`},
		{"another case", change(`"name"`, `"Name"`), `unknown key "Name"`},
		{"repeated", change(`"n":7`, `"n":7,"n":8`), `key "n" repeated`},
		{"missing", change(`"n":7,`, ""), `key "n" missing`},
		{"unknown", change(`"n":7`, `"n":7,"z":1`), `unknown key "z"`},
		{"unknown inside", change(`{"x":1}`, `{"x":1,"y":2}`), `unknown key "y"`},
		{"null value", change(`"a"`, "null"), "null where a string"},
		{"string for number", change("7", `"7"`), "a string where a number"},
		{"number for string", change(`"a"`, "1"), "a number where a string"},
		{"object for string", change(`"a"`, "{}"), `"{" where a string`},
		{"out of range", change("7", "300"), "out of range"},
		{"fraction", change("7", "7.5"), "out of range"},
		{"bad time", change("2026-11-22", "2026-13-22"), "malformed value"},
		{"trailing value", good + "{}", "follows"},
		{"trailing word", good + "x", "byte"},
		{"invalid UTF-8", change(`"a"`, "\"\xff\""), "UTF-8"},
		{"replacement character", change(`"a"`, `"`+"\uFFFD"+`"`), "UTF-8"},
	} {
		var s sample
		err := Decode([]byte(tt.in), &s)
		var e *Error
		if !errors.As(err, &e) || !strings.Contains(err.Error(), tt.want) {
			t.Errorf("%s: error %v, want one with %q", tt.name, err, tt.want)
		}
		if err != nil && (strings.Contains(err.Error(), "sample") || strings.Contains(err.Error(), "Go ")) {
			t.Errorf("%s: error names Go's own things: %v", tt.name, err)
		}
	}
}

func FuzzDecode(f *testing.F) {
	f.Add([]byte(good))
	f.Add([]byte(`{"name":"a"`))
	f.Fuzz(func(t *testing.T, b []byte) {
		var s sample
		if Decode(b, &s) != nil {
			return
		}
		again, err := json.Marshal(s)
		if err != nil {
			return // a year beyond 9999
		}
		var s2 sample
		if err := Decode(again, &s2); err != nil && s.Tags != nil && s.Inner != nil {
			t.Fatalf("%q is accepted, but %q is not: %v", b, again, err)
		}
	})
}
