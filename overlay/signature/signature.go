// Package signature tells which store paths carry a signature that verifies under
// a declared key.
//
// It promises: a bit is set only if an ed25519 signature of that key over Nix's
// fingerprint of the path (its name, NAR hash, NAR size and references, see
// ValidPathInfo::fingerprint in libstore/path-info.cc) was verified, now or, with
// a Memory, at an earlier time over exactly the same bytes. A name in the sigs
// column alone means nothing, nor does a content address. Whatever is malformed
// sets no bit and is no error. Work per path is bounded.
//
// Start with ParseKey, New, and Verifier.Verify. Do not use it to decide whether
// the files of a path are what was signed: it speaks of the database's row, and
// the NAR hash in it must be compared with the files by whoever doubts them.
package signature

import (
	"context"
	"crypto/ed25519"
	"encoding/base64"
	"encoding/hex"
	"errors"
	"fmt"
	"runtime"
	"slices"
	"strconv"
	"strings"
	"sync"
	"sync/atomic"

	"overkeep/overlay/drv/storepath"
	"overkeep/policy"
)

// MaxKeys is how many keys can be declared: one bit of a word for each.
const MaxKeys = 64

// Bounds of the work on one path. Real paths have one to three signatures; with
// more than these somebody wants to keep us busy, and what is behind them is not
// looked at.
const (
	maxSigs    = 1 << 16 // bytes of the sigs column
	maxTries   = 32      // signatures of declared names
	maxRefs    = 1 << 17 // references of a path
	chunk      = 64      // paths that a worker takes at a time
	maxKeyName = 1024    // bytes
)

// ErrKey: a key that cannot be declared.
var ErrKey = errors.New("not a public key")

// Key is a declared key, as a policy has it.
type Key = policy.Key

// ParseKey reads NAME:BASE64, as nix.conf's trusted-public-keys. Keys of small
// order (all zeros is one) are refused, as libsodium refuses them, and with it
// Nix: under such a key anybody can sign.
func ParseKey(s string) (Key, error) {
	name, text, ok := strings.Cut(s, ":")
	switch {
	case !ok:
		return Key{}, fmt.Errorf("%w: %.100q has no colon", ErrKey, s)
	case name == "" || len(name) > maxKeyName || strings.ContainsAny(name, " \t\r\n\v\f"):
		return Key{}, fmt.Errorf("%w: the name in %.100q", ErrKey, s)
	}
	b, err := base64.StdEncoding.Strict().DecodeString(text)
	switch {
	case err != nil || strings.ContainsAny(text, "\r\n"):
		return Key{}, fmt.Errorf("%w: %.100q is not base 64 behind the colon", ErrKey, s)
	case len(b) == ed25519.PrivateKeySize:
		return Key{}, fmt.Errorf("%w: %q is a secret key; declare its public half", ErrKey, name)
	case len(b) != ed25519.PublicKeySize:
		return Key{}, fmt.Errorf("%w: %q has %d bytes, not %d", ErrKey, name, len(b), ed25519.PublicKeySize)
	case policy.WeakKey(b):
		return Key{}, fmt.Errorf("%w: under %.200q anybody can sign", ErrKey, s)
	}
	return Key{Name: name, Public: b}, nil
}

// Facts is what is signed of a path, and the signatures: a row of the database.
// Names are base names (HASH-NAME), which can be parts of one large string.
type Facts struct {
	Path    string
	NarHash string // as stored: "sha256:" and hex
	NarSize int64  // bytes
	Refs    []string
	Sigs    string // as stored: NAME:BASE64, separated by blanks

	// Cut is where to say that there were more signatures than are looked at; nil: nowhere.
	Cut *bool
}

// AppendFingerprint appends what Nix signs: "1;PATH;sha256:BASE32;SIZE;REFS" with
// whole paths, the references sorted and separated by commas. It returns nil if
// the facts cannot be signed, as Nix refuses them, too. Refs are sorted in place.
func AppendFingerprint(b []byte, storeDir string, f *Facts) []byte {
	hash, ok := strings.CutPrefix(f.NarHash, "sha256:")
	if !ok || len(hash) != 64 || f.NarSize <= 0 || len(f.Refs) > maxRefs || !storepath.IsBase(f.Path) {
		return nil
	}
	var sum [32]byte
	if _, err := hex.Decode(sum[:], []byte(hash)); err != nil {
		return nil
	}
	slices.Sort(f.Refs)
	b = append(b, "1;"...)
	b = append(b, storeDir...)
	b = append(b, '/')
	b = append(b, f.Path...)
	b = append(b, ";sha256:"...)
	b = storepath.AppendBase32(b, sum[:])
	b = append(b, ';')
	b = strconv.AppendInt(b, f.NarSize, 10)
	b = append(b, ';')
	for i, r := range f.Refs {
		// A comma or semicolon in a name would be another list of names.
		if !storepath.IsBase(r) {
			return nil
		}
		if i > 0 {
			if r == f.Refs[i-1] {
				continue
			}
			b = append(b, ',')
		}
		b = append(b, storeDir...)
		b = append(b, '/')
		b = append(b, r...)
	}
	return b
}

// Verifier verifies under fixed keys. It is safe for concurrent use.
type Verifier struct {
	dir    string
	keys   []Key
	index  map[string]int
	memory *Memory
}

// New makes a Verifier for paths of storeDir. Bit i of its answers is keys[i]; two
// keys of one name are an error. memory may be nil.
func New(storeDir string, keys []Key, memory *Memory) (*Verifier, error) {
	if len(keys) > MaxKeys {
		return nil, fmt.Errorf("%d keys are declared, more than %d", len(keys), MaxKeys)
	}
	v := &Verifier{storeDir, slices.Clone(keys), map[string]int{}, memory}
	for i, k := range keys {
		if _, twice := v.index[k.Name]; twice {
			return nil, fmt.Errorf("%w: %q is declared twice", ErrKey, k.Name)
		}
		if len(k.Public) != ed25519.PublicKeySize || policy.WeakKey(k.Public) {
			return nil, fmt.Errorf("%w: %q", ErrKey, k.Name)
		}
		v.index[k.Name] = i
	}
	return v, nil
}

// Stats counts what a call of Verify did.
type Stats struct {
	Verified   int64 // signatures that were computed anew and are good
	Bad        int64 // signatures of a declared name that are malformed or do not verify
	Remembered int64 // good by the memory
	Unsignable int64 // paths with signatures of declared names, and facts that cannot be signed
	Cut        int64 // paths with more signatures than are looked at
}

func (s *Stats) add(o Stats) {
	s.Verified += o.Verified
	s.Bad += o.Bad
	s.Remembered += o.Remembered
	s.Unsignable += o.Unsignable
	s.Cut += o.Cut
}

// Verify returns for each of n paths which keys signed it. facts fills in path i;
// it is called from several goroutines, each with a Facts of its own that it may
// reuse (f.Refs[:0]). The error is ctx's; what was verified until then is
// remembered.
func (v *Verifier) Verify(ctx context.Context, n int, facts func(i int, f *Facts)) ([]uint64, Stats, error) {
	out := make([]uint64, n)
	var stats Stats
	if len(v.keys) == 0 {
		return out, stats, ctx.Err()
	}
	var (
		next atomic.Int64
		mu   sync.Mutex
		wg   sync.WaitGroup
	)
	for range min(runtime.GOMAXPROCS(0), (n+chunk-1)/chunk) {
		wg.Go(func() {
			w := worker{v: v}
			for ctx.Err() == nil {
				from := int(next.Add(chunk)) - chunk
				if from >= n {
					break
				}
				for i := from; i < min(from+chunk, n); i++ {
					w.facts.Path, w.facts.NarHash, w.facts.NarSize, w.facts.Sigs, w.facts.Cut = "", "", 0, "", nil
					w.facts.Refs = w.facts.Refs[:0]
					facts(i, &w.facts)
					out[i] = w.path()
				}
			}
			mu.Lock()
			defer mu.Unlock()
			stats.add(w.stats)
			v.memory.add(w.fresh)
		})
	}
	wg.Wait()
	if err := ctx.Err(); err != nil {
		return nil, stats, err
	}
	return out, stats, nil
}

type worker struct {
	v     *Verifier
	facts Facts
	buf   []byte // fingerprint, then key and signature
	stats Stats
	fresh []record
}

// path verifies the signatures of one path.
func (w *worker) path() (good uint64) {
	sigs, tries := w.facts.Sigs, 0
	if len(sigs) > maxSigs {
		sigs = sigs[:maxSigs]
		w.cut()
	}
	print := -1 // length of the fingerprint in w.buf, once it is needed
	for len(sigs) > 0 {
		var one string
		one, sigs, _ = strings.Cut(sigs, " ")
		name, text, ok := strings.Cut(one, ":")
		i, declared := w.v.index[name]
		if !ok || !declared || good&(1<<i) != 0 {
			continue
		}
		if tries++; tries > maxTries {
			w.cut()
			break
		}
		var sig [ed25519.SignatureSize]byte
		if !decodeSig(&sig, text) {
			w.stats.Bad++
			continue
		}
		if print < 0 {
			b := AppendFingerprint(w.buf[:0], w.v.dir, &w.facts)
			if b == nil {
				w.stats.Unsignable++
				return 0
			}
			w.buf, print = b, len(b)
		}
		if w.verify(print, w.v.keys[i].Public, &sig) {
			good |= 1 << i
		}
	}
	return good
}

func (w *worker) cut() {
	w.stats.Cut++
	if w.facts.Cut != nil {
		*w.facts.Cut = true
	}
}

func (w *worker) verify(print int, key ed25519.PublicKey, sig *[ed25519.SignatureSize]byte) bool {
	var r record
	if w.v.memory != nil {
		w.buf = append(append(w.buf[:print], key...), sig[:]...)
		r = recordOf(w.buf)
		if w.v.memory.has(r) {
			w.stats.Remembered++
			return true
		}
	}
	if !ed25519.Verify(key, w.buf[:print], sig[:]) {
		w.stats.Bad++
		return false
	}
	w.stats.Verified++
	if w.v.memory != nil {
		w.fresh = append(w.fresh, r)
	}
	return true
}

// decodeSig reads the base 64 of a signature, in its one canonical form.
func decodeSig(sig *[ed25519.SignatureSize]byte, text string) bool {
	if len(text) != base64.StdEncoding.EncodedLen(len(sig)) {
		return false
	}
	var b [ed25519.SignatureSize + 2]byte
	n, err := base64.StdEncoding.Strict().Decode(b[:], []byte(text))
	return err == nil && n == len(sig) && copy(sig[:], b[:n]) == n
}
