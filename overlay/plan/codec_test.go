package plan

import (
	"bytes"
	"errors"
	"fmt"
	"strings"
	"testing"

	"github.com/google/go-cmp/cmp"
	"pgregory.net/rapid"
)

var (
	testKey = bytes.Repeat([]byte{7}, KeySize)
	ours    = Expect{Machine: "m", KeepID: "k"}
)

// sample has one of everything.
func sample(t testing.TB) *Plan {
	in, _ := world(t, node{"pub-a", lo, "secret"}, node{"secret", lo, ""}, node{"held", lo, "low"}, node{"low", lo, ""}, node{"pub-r", up, ""}, node{"x", lu, ""})
	in.Roots = []Root{
		{Link: "/home/alice/re sult<&>\u2028", Path: store("pub-a"), Kind: RootUser, Auto: "/nix/var/nix/gcroots/auto/x", To: "home/work/links/home/alice/result"},
		{Link: "/run/current-system", Path: store("held"), Kind: RootBoot},
	}
	p, err := Make(in)
	if err != nil {
		t.Fatal(err)
	}
	return p
}

func TestRoundTrip(t *testing.T) {
	p := sample(t)
	b := Encode(p, testKey)
	got, err := Decode(b, testKey, ours)
	if err != nil {
		t.Fatal(err)
	}
	if d := cmp.Diff(p, got); d != "" {
		t.Error(d)
	}
	if len(p.Moves) == 0 || len(p.Roots) == 0 || len(p.Blocked) < 2 || len(p.Residue) == 0 {
		t.Errorf("the sample lacks something: %+v", p)
	}
	empty := &Plan{Version: Version, Machine: "m", KeepID: "k"}
	if got, err := Decode(Encode(empty, testKey), testKey, ours); err != nil || !cmp.Equal(got, empty) {
		t.Errorf("%+v, %v", got, err)
	}
}

func TestRoundTripRandom(t *testing.T) {
	rapid.Check(t, func(t *rapid.T) {
		in := drawn(t)
		in.Machine, in.KeepID = "m", "k"
		p, err := Make(in)
		if err != nil {
			return
		}
		got, err := Decode(Encode(p, testKey), testKey, ours)
		if err != nil || !cmp.Equal(got, p) {
			t.Fatalf("%v\n%s", err, cmp.Diff(p, got))
		}
	})
}

// signed is lines with a fitting code: what a broken program with the key could write.
func signed(lines ...string) []byte {
	b := []byte(strings.Join(lines, "\n") + "\n")
	return append(b, line{MAC: mac(testKey, b)}.encode()...)
}

func TestHostileFiles(t *testing.T) {
	good := string(Encode(sample(t), testKey))
	lines := strings.Split(strings.TrimSuffix(good, "\n"), "\n")
	head, body := lines[0], lines[1:len(lines)-1]
	find := func(kind string) string {
		for _, l := range body {
			if strings.HasPrefix(l, `{"`+kind+`"`) {
				return l
			}
		}
		t.Fatalf("no %s", kind)
		return ""
	}
	reason, move, blocked := find("reason"), find("move"), find("blocked")
	again := func(l, from, to string) string {
		out := strings.Replace(l, from, to, 1)
		if out == l {
			t.Fatalf("no %q in %q", from, l)
		}
		return out
	}
	for name, c := range map[string]struct {
		b    []byte
		want error
		line int
	}{
		"nothing":                {nil, ErrNotPlan, 1},
		"another file":           {[]byte("#!/bin/sh\n"), ErrNotPlan, 1},
		"a header alone":         {[]byte(head), ErrTruncated, 1},
		"no header":              {signed(body...), ErrNotPlan, 1},
		"an older version":       {[]byte(again(good, `"version":1`, `"version":0`)), ErrVersion, 1},
		"a newer version":        {[]byte(again(good, `"version":1`, `"version":2,"more":[]`)), ErrVersion, 1},
		"a version of no number": {[]byte(again(good, `"version":1`, `"version":"1"`)), ErrSyntax, 1},
		"another machine":        {[]byte(again(good, `"machine":"m"`, `"machine":"n"`)), ErrMachine, 1},
		"another keep":           {[]byte(again(good, `"keep_id":"k"`, `"keep_id":"l"`)), ErrKeep, 1},
		"an edited path":         {[]byte(again(good, "secret", "sekret")), ErrEdited, 0},
		"an edited header":       {[]byte(again(good, "2026", "2027")), ErrEdited, 0},
		"a line less":            {[]byte(strings.Replace(good, move+"\n", "", 1)), ErrEdited, 0},
		"a line twice":           {[]byte(strings.Replace(good, move+"\n", move+"\n"+move+"\n", 1)), ErrEdited, 0},
		"two lines exchanged":    {[]byte(strings.Join(append([]string{head, body[1], body[0]}, lines[3:]...), "\n") + "\n"), ErrEdited, 0},
		"cut in a line":          {[]byte(good[:len(good)/2]), ErrTruncated, 1 + strings.Count(good[:len(good)/2], "\n")},
		"cut between lines":      {[]byte(strings.Join(lines[:3], "\n") + "\n"), ErrTruncated, 3},
		"the last byte":          {[]byte(good[:len(good)-1]), ErrTruncated, len(lines)},
		"something behind":       {[]byte(good + "{}\n"), ErrEdited, len(lines) + 1},
		"a code of no length":    {[]byte(strings.Join(lines[:len(lines)-1], "\n") + "\n{\"mac\":\"\"}\n"), ErrTruncated, len(lines)},
		"two plans":              {[]byte(good + good), ErrEdited, 0},
		// From here on the code fits.
		"an unknown kind":       {signed(head, `{"other":{}}`), ErrSyntax, 2},
		"an unknown field":      {signed(head, again(reason, `"reason":"`, `"more":1,"reason":"`)), ErrSyntax, 2},
		"a field twice":         {signed(head, again(reason, `{"reason":{`, `{"reason":{"reason":"x",`)), ErrSyntax, 2},
		"another spelling":      {signed(head, again(reason, `"reason":{`, `"Reason":{`)), ErrSyntax, 2},
		"spaces":                {signed(head, again(reason, `:{`, `: {`)), ErrSyntax, 2},
		"trailing data":         {signed(head, reason+"{}"), ErrSyntax, 2},
		"two things in a line":  {signed(head, again(reason, `{"reason":{`, `{"residue":{"code":"","words":""},"reason":{`)), ErrSyntax, 2},
		"nothing in a line":     {signed(head, "{}"), ErrSyntax, 2},
		"an empty line":         {signed(head, "", reason), ErrSyntax, 2},
		"no JSON":               {signed(head, reason, "\x00"), ErrSyntax, 3},
		"a second header":       {signed(head, head), ErrSyntax, 2},
		"a code in between":     {signed(head, lines[len(lines)-1], reason), ErrSyntax, 2},
		"out of order":          {signed(head, reason, move, reason), ErrSyntax, 4},
		"a path twice":          {signed(head, reason, move, move), ErrSyntax, 0},
		"moved and blocked":     {signed(head, reason, move, again(blocked, store("held"), store("x"))), ErrSyntax, 0},
		"no such reason":        {signed(head, move), ErrSyntax, 2},
		"a reason below zero":   {signed(head, reason, again(move, `"reason":0`, `"reason":-1`)), ErrSyntax, 3},
		"a unit left out":       {signed(head, reason, again(move, `"unit":0`, `"unit":1`)), ErrSyntax, 3},
		"a unit below zero":     {signed(head, reason, again(move, `"unit":0`, `"unit":-1`)), ErrSyntax, 3},
		"a blocked unit":        {signed(head, reason, again(blocked, `"unit":-1`, `"unit":0`)), ErrSyntax, 3},
		"neither seal nor rel.": {signed(head, reason, again(move, `"seal"`, `"steal"`)), ErrSyntax, 3},
		"no path":               {signed(head, reason, again(move, `"/nix`, `"nix`)), ErrSyntax, 3},
		"no hash":               {signed(head, reason, again(move, `"sha256:`, `"sha255:`)), ErrSyntax, 3},
		"a size below zero":     {signed(head, reason, again(move, `"nar_size":`, `"nar_size":-`)), ErrSyntax, 3},
		"a size of no number":   {signed(head, reason, again(move, `"nar_size":`, `"nar_size":1e400,"x":`)), ErrSyntax, 3},
		"a long line":           {signed(head, again(reason, `"reason":"`, `"reason":"`+strings.Repeat("x", maxLine))), ErrSyntax, 2},
		"a release first":       {signed(head, reason, again(move, `"seal"`, `"release"`), again(again(move, `-x"`, `-y"`), `"unit":0`, `"unit":1`)), ErrSyntax, 4},
		"a long header":         {signed(again(head, `"alice"`, `"`+strings.Repeat("x", maxLine)+`"`)), ErrTruncated, 1},
	} {
		p, err := Decode(c.b, testKey, ours)
		var fe *FileError
		if p != nil || !errors.As(err, &fe) || !errors.Is(err, c.want) || fe.Line != c.line {
			t.Errorf("%s: %v, want line %d: %v", name, err, c.line, c.want)
			continue
		}
		if strings.Contains(err.Error(), "secret") || strings.Contains(err.Error(), "/nix") {
			t.Errorf("%s: the error names a path: %v", name, err)
		}
	}
	for _, key := range [][]byte{nil, testKey[1:], bytes.Repeat([]byte{8}, KeySize)} {
		if _, err := Decode([]byte(good), key, ours); !errors.Is(err, ErrEdited) {
			t.Errorf("another key: %v", err)
		}
	}
}

// TestEveryCut: no beginning of a plan is one.
func TestEveryCut(t *testing.T) {
	b := Encode(sample(t), testKey)
	for n := range b {
		if _, err := Decode(b[:n], testKey, ours); !errors.Is(err, ErrTruncated) && !errors.Is(err, ErrNotPlan) {
			t.Errorf("%d of %d bytes: %v", n, len(b), err)
		}
	}
}

// FuzzDecode: whatever bytes, also with a code that fits, Decode refuses with its own
// errors or gives a plan that is written as it was read.
func FuzzDecode(f *testing.F) {
	good := Encode(sample(f), testKey)
	f.Add(good, false)
	f.Add(good[:bytes.LastIndexByte(good[:len(good)-1], '\n')+1], true)
	f.Add([]byte(`{"plan":{"version":1,"machine":"m","keep":"","keep_id":"k","policy":"","created":""}}`+"\n"), true)
	f.Fuzz(func(t *testing.T, b []byte, sign bool) {
		if sign {
			b = append(bytes.Clone(b), line{MAC: mac(testKey, b)}.encode()...)
		}
		p, err := Decode(b, testKey, ours)
		if err != nil {
			var fe *FileError
			if !errors.As(err, &fe) || p != nil {
				t.Fatalf("%v", err)
			}
			return
		}
		if again := Encode(p, testKey); !bytes.Equal(again, b) {
			t.Fatalf("%s\n%s", b, again)
		}
		_, _ = p.Groups(), p.Holds()
		for i, way := 0, p.Ways(); i < len(p.Blocked); i++ {
			if len(way(i, 8)) > 8 {
				t.Fatal("a way without an end")
			}
		}
	})
}

func BenchmarkDecode(b *testing.B) {
	p := &Plan{Version: Version, Machine: "m", KeepID: "k", Reasons: []Reason{{Reason: "vetoed"}}}
	for i := range 20_000 {
		p.Moves = append(p.Moves, Move{Kind: Seal, Path: fmt.Sprintf("/nix/store/%032d-name", i), NarHash: fmt.Sprintf("sha256:%064x", i), Unit: i})
	}
	file := Encode(p, testKey)
	b.SetBytes(int64(len(file)))
	for b.Loop() {
		if _, err := Decode(file, testKey, ours); err != nil {
			b.Fatal(err)
		}
	}
}
