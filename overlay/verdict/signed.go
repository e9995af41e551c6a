package verdict

import (
	"context"
	"strings"

	"overkeep/overlay/facts"
	"overkeep/overlay/signature"
	"overkeep/policy"
)

// verifier is what package facts asks, answered by package signature. Keys of one
// name and different values, which two policies may declare, go to different rounds.
type verifier struct {
	dir    string
	rounds []round
	stats  signature.Stats
}

type round struct {
	v    *signature.Verifier
	bits []int // of the round's keys, in the answer
}

func newVerifier(storeDir string, keys []policy.Key, memory *signature.Memory) (*verifier, error) {
	out := &verifier{dir: storeDir + "/"}
	var sets [][]signature.Key
	var bits [][]int
next:
	for i, k := range keys {
		for s := range sets {
			if !named(sets[s], k.Name) {
				sets[s], bits[s] = append(sets[s], k), append(bits[s], i)
				continue next
			}
		}
		sets, bits = append(sets, []signature.Key{k}), append(bits, []int{i})
	}
	for s := range sets {
		v, err := signature.New(storeDir, sets[s], memory)
		if err != nil {
			return nil, err
		}
		out.rounds = append(out.rounds, round{v, bits[s]})
	}
	return out, nil
}

func named(keys []signature.Key, name string) bool {
	for _, k := range keys {
		if k.Name == name {
			return true
		}
	}
	return false
}

func (v *verifier) base(path string) string { return strings.TrimPrefix(path, v.dir) }

// Verify implements facts.Verifier.
func (v *verifier) Verify(ctx context.Context, batch []facts.SignedPath) ([]uint64, error) {
	out := make([]uint64, len(batch))
	for _, r := range v.rounds {
		masks, stats, err := r.v.Verify(ctx, len(batch), func(i int, f *signature.Facts) {
			p := &batch[i]
			f.Path, f.NarHash, f.NarSize, f.Sigs = v.base(p.Path), p.NarHash, p.NarSize, p.Sigs
			f.Cut = &p.Cut
			for _, ref := range p.Refs {
				f.Refs = append(f.Refs, v.base(ref))
			}
		})
		if err != nil {
			return nil, err
		}
		v.stats.Verified += stats.Verified
		v.stats.Bad += stats.Bad
		v.stats.Remembered += stats.Remembered
		v.stats.Unsignable += stats.Unsignable
		v.stats.Cut += stats.Cut
		for i, m := range masks {
			for bit, at := range r.bits {
				out[i] |= m >> bit & 1 << at
			}
		}
	}
	return out, nil
}
