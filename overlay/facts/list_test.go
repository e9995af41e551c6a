package facts

import (
	"bytes"
	"context"
	"encoding/base64"
	"encoding/hex"
	"encoding/json"
	"errors"
	"io"
	"slices"
	"strings"
	"testing"

	"github.com/google/go-cmp/cmp"

	"overkeep/policy/graph"
	"overkeep/tests/storegen"
)

// listed is what `nix path-info --json --json-format 1` tells of a path.
type listed struct {
	CA, Deriver      *string
	NarHash          *string
	NarSize          int64
	References       []string
	RegistrationTime int64
	Signatures       []string
	StoreDir         string
	Ultimate         bool
	Version          int
	Verdict          int
}

func TestWriteJSON(t *testing.T) {
	for _, n := range []int{1, 9000} {
		file, s := generate(t, storegen.Options{Paths: n, Seed: 9, Signed: 0.01})
		snap, err := Open(t.Context(), []Store{{DB: file, Layer: graph.Lower}}, Options{})
		if err != nil {
			t.Fatal(err)
		}
		defer snap.Close()
		var out bytes.Buffer
		err = snap.WriteJSON(t.Context(), &out, Listing{Extra: func(b []byte, id graph.ID) []byte {
			return append(b, `,"verdict":7`...)
		}})
		if err != nil {
			t.Fatal(err)
		}
		var got map[string]listed
		if err := json.Unmarshal(out.Bytes(), &got); err != nil {
			t.Fatal(err)
		}
		if strings.Count(out.String(), `"verdict":7`) != n {
			t.Error("a path is missing or there twice")
		}
		want := map[string]listed{}
		text := func(s string) *string {
			if s == "" {
				return nil
			}
			return &s
		}
		for i := range s.Paths {
			p := &s.Paths[i]
			l := listed{CA: text(p.CA), NarHash: text("sha256-" + base64.StdEncoding.EncodeToString(p.Hash[:])), NarSize: p.NarSize,
				RegistrationTime: p.Time, StoreDir: "/nix/store", Ultimate: p.Ultimate, Version: 1, Verdict: 7,
				References: []string{}, Signatures: strings.Fields(p.Sigs)}
			switch {
			case p.Deriver >= 0:
				l.Deriver = text(storegen.StoreDir + s.Paths[p.Deriver].Base)
			case p.Orphan != "":
				l.Deriver = text(storegen.StoreDir + p.Orphan)
			}
			for _, r := range p.Refs {
				l.References = append(l.References, storegen.StoreDir+s.Paths[r].Base)
			}
			slices.Sort(l.References)
			want[storegen.StoreDir+p.Base] = l
		}
		if d := cmp.Diff(want, got); d != "" {
			t.Errorf("%.2000s", d)
		}
	}
}

func TestWriteJSONOfTwo(t *testing.T) {
	stores, _ := twoStores(t)
	snap, err := Open(t.Context(), stores, Options{})
	if err != nil {
		t.Fatal(err)
	}
	defer snap.Close()
	var out bytes.Buffer
	if err := snap.WriteJSON(t.Context(), &out, Listing{}); err != nil {
		t.Fatal(err)
	}
	var got map[string]listed
	if err := json.Unmarshal(out.Bytes(), &got); err != nil || len(got) != snap.Graph.Len() {
		t.Errorf("%d paths of %d: %v", len(got), snap.Graph.Len(), err)
	}
	if n := strings.Count(out.String(), `"narHash"`); n != len(got) {
		t.Errorf("%d objects for %d paths", n, len(got))
	}
	out.Reset()
	only := graph.ID(4321)
	err = snap.WriteJSON(t.Context(), &out, Listing{Only: func(id graph.ID) bool { return id == only }})
	if err != nil || !strings.HasPrefix(out.String(), `{"`+snap.Graph.Path(only)+`":{`) || strings.Count(out.String(), "narHash") != 1 {
		t.Errorf("%v %s", err, out.String())
	}
	out.Reset()
	err = snap.WriteJSON(t.Context(), &out, Listing{Only: func(graph.ID) bool { return false }})
	if err != nil || out.String() != "{}\n" {
		t.Errorf("of nothing: %v %q", err, out.String())
	}
}

type full struct{ room int }

var errFull = errors.New("full")

func (f *full) Write(b []byte) (int, error) {
	if f.room -= len(b); f.room < 0 {
		return 0, errFull
	}
	return len(b), nil
}

// A writer that fails, a context that ends: their error, and nothing hangs.
func TestWriteJSONStops(t *testing.T) {
	file, _ := generate(t, storegen.Options{Paths: 50_000})
	snap, err := Open(t.Context(), []Store{{DB: file, Layer: graph.Upper}}, Options{})
	if err != nil {
		t.Fatal(err)
	}
	defer snap.Close()
	for _, room := range []int{0, 1 << 20, 12 << 20} {
		if err := snap.WriteJSON(t.Context(), &full{room}, Listing{}); err != errFull {
			t.Errorf("room %d: %v", room, err)
		}
	}
	ctx, cancel := context.WithCancel(t.Context())
	err = snap.WriteJSON(ctx, io.Discard, Listing{Only: func(id graph.ID) bool {
		if id == 20_000 {
			cancel()
		}
		return true
	}})
	if !errors.Is(err, context.Canceled) {
		t.Error(err)
	}
	if err := snap.WriteJSON(t.Context(), io.Discard, Listing{}); err != nil {
		t.Error(err)
	}
}

func FuzzAppendText(f *testing.F) {
	for _, s := range []string{"", "a", "\"\\\n\x00\x7f", "é\xff\xed\xa0\x80", " "} {
		f.Add([]byte(s))
	}
	f.Fuzz(func(t *testing.T, s []byte) {
		b := appendText(nil, s)
		var got *string
		if err := json.Unmarshal(b, &got); err != nil {
			t.Fatalf("%q: %q: %v", s, b, err)
		}
		if want := strings.ToValidUTF8(string(bytes.ReplaceAll(s, nil, nil)), "\ufffd"); len(s) > 0 && strings.ReplaceAll(*got, "\ufffd", "") != strings.ReplaceAll(want, "\ufffd", "") {
			t.Fatalf("%q: %q", s, *got)
		}
		if (got == nil) != (len(s) == 0) {
			t.Fatalf("%q: null", s)
		}
	})
}

func TestAppendSRI(t *testing.T) {
	for in, want := range map[string]string{
		"sha256:" + hex.EncodeToString(make([]byte, 32)): `"sha256-AAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAA="`,
		"": "null", "sha256:": "null", "sha512:" + strings.Repeat("0", 64): "null", "sha256:" + strings.Repeat("A", 64): "null",
	} {
		if got := string(appendSRI(nil, []byte(in))); got != want {
			t.Errorf("%q: %s", in, got)
		}
	}
}
