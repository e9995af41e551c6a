package facts

import (
	"context"
	"crypto/ed25519"
	"encoding/base64"
	"encoding/hex"
	"errors"
	"fmt"
	"slices"
	"strings"
	"testing"

	"overkeep/policy/graph"
	"overkeep/tests/storegen"
)

// verifier verifies under the generator's key, from what it is given alone.
type verifier struct {
	seen  map[string]int
	stop  error
	short bool
}

func (v *verifier) Verify(_ context.Context, batch []SignedPath) ([]uint64, error) {
	if v.stop != nil {
		return nil, v.stop
	}
	var out []uint64
	for _, p := range batch {
		v.seen[p.Path]++
		var m uint64
		for _, s := range strings.Fields(p.Sigs) {
			name, b64, _ := strings.Cut(s, ":")
			sig, err := base64.StdEncoding.DecodeString(b64)
			if err != nil || name != storegen.KeyName {
				continue
			}
			slices.Sort(p.Refs)
			var refs []string
			for _, r := range p.Refs {
				refs = append(refs, "/nix/store/"+r)
			}
			raw, err := hex.DecodeString(strings.TrimPrefix(p.NarHash, "sha256:"))
			if err != nil {
				return nil, err
			}
			print := fmt.Sprintf("1;/nix/store/%s;sha256:%s;%d;%s", p.Path, storegen.Base32(raw), p.NarSize, strings.Join(refs, ","))
			if ed25519.Verify(storegen.Key().Public().(ed25519.PublicKey), []byte(print), sig) {
				m |= 2
			}
		}
		out = append(out, m)
	}
	if v.short {
		out = out[:len(out)/2]
	}
	return out, nil
}

func TestSigned(t *testing.T) {
	file, s := generate(t, storegen.Options{Paths: 12_000, Seed: 3, Signed: 0.1})
	v := &verifier{seen: map[string]int{}}
	stores := []Store{{DB: file, Layer: graph.Lower}}
	l, err := Load(t.Context(), stores, Options{Keys: []string{"nobody", "the generator"}, Verifier: v})
	if err != nil {
		t.Fatal(err)
	}
	want, signatures := 0, 0
	for _, p := range s.Paths {
		signed := strings.Contains(p.Sigs, storegen.KeyName+":")
		if id := l.Index.Base([]byte(p.Base)); l.Graph.Signed[1].Has(id) != signed || l.Graph.Signed[0].Has(id) {
			t.Fatalf("%s: signed is not %v", p.Base, signed)
		}
		if signed {
			want++
		}
		if p.Sigs != "" {
			signatures++
		}
		if n := v.seen[p.Base]; n > 1 || (n == 1) != (p.Sigs != "") {
			t.Fatalf("%s: asked %d times", p.Base, n)
		}
	}
	if want < 100 || signatures <= signedPerBatch {
		t.Errorf("only %d of %d", want, signatures)
	}
	part, err := LoadFor(t.Context(), stores, []string{storegen.StoreDir + s.Paths[11_999].Base}, Need{Build: true}, Options{Keys: []string{"x", "y"}, Verifier: v})
	if err != nil {
		t.Fatal(err)
	}
	for id := range graph.ID(part.Graph.Len()) {
		if part.Graph.Signed[1].Has(id) != l.Graph.Signed[1].Has(l.Index.Base(part.Graph.BaseName(id))) {
			t.Fatalf("%s: the part says otherwise", part.Graph.BaseName(id))
		}
	}
	stop := errors.New("stop")
	for want, v := range map[error]*verifier{stop: {stop: stop}, nil: {seen: map[string]int{}, short: true}} {
		if _, err := Load(t.Context(), stores, Options{Keys: []string{"k"}, Verifier: v}); err == nil || want != nil && !errors.Is(err, want) {
			t.Errorf("%v: %v", want, err)
		}
	}
	if _, err := Load(t.Context(), stores, Options{Keys: []string{"k"}}); err == nil {
		t.Error("nobody verifies, and no error")
	}
	if _, err := Load(t.Context(), stores, Options{Keys: make([]string, 65)}); err == nil {
		t.Error("too many keys, and no error")
	}
}

// Nothing of a path that differs or is broken is believed: nobody is asked.
func TestSignedBroken(t *testing.T) {
	file := forged(t, "update ValidPaths set sigs = 'a:b'; update ValidPaths set narSize = -1 where id = 1001; update ValidPaths set sigs = x'00' where id = 1003")
	v := &verifier{seen: map[string]int{}}
	if _, err := Load(t.Context(), []Store{{DB: file, Layer: graph.Lower}}, Options{Keys: []string{"k"}, Verifier: v}); err != nil {
		t.Fatal(err)
	}
	if v.seen[victim] != 0 || v.seen[other] != 0 || v.seen[referrer] != 1 {
		t.Errorf("%v", v.seen)
	}
}
