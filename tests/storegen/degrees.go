package storegen

import "math/rand/v2"

// What stock Nix 2.34 wrote when it instantiated a nixpkgs-derived package set and
// a NixOS-like system (3,258 derivations, 646 sources): quantiles at every 5 %,
// from the least to the greatest, unless said.
var (
	drvDegree  = []int{0, 4, 5, 5, 5, 6, 6, 6, 6, 6, 6, 6, 6, 7, 8, 8, 10, 13, 17, 20, 319} // references of a derivation; mean 8.5
	drvSize    = []int{816, 1816, 2056, 2240, 2344, 2360, 2384, 2584, 2856, 3200, 3224, 3256, 3424, 3584, 3600, 3960, 4016, 4488, 4880, 6792, 57352}
	sourceSize = []int{128, 392, 560, 632, 728, 824, 952, 1088, 1240, 1400, 1656, 1904, 2232, 2832, 3656, 4616, 5944, 7808, 9944, 20488, 3315824}
	nameLength = []int{2, 11, 14, 15, 17, 18, 19, 20, 21, 22, 24, 24, 26, 26, 28, 29, 31, 33, 36, 41, 96}
	// outputs of a derivation at every percent or so: 78 % one, 9 % two, 7 % three, ...
	outputs = []int{1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 2, 2, 3, 3, 6}
)

// Guesses, for that set held no outputs: they bring the mean of all references
// between 5 and 10, as in stores in use.
const (
	sourcesPerRef = 0.03 // 646 sources for 3,258 derivations with 8.5 references each
	fixedShare    = 0.15 // of the derivations are fetchers
	goneShare     = 0.2  // of the derivations are no longer valid
	selfShare     = 0.3  // of the outputs refer to themselves
	hubShare      = 0.4  // of the references go to one of the first of the generation
	hubs          = 200
	window        = 500  // derivations back, on average, go the others
	generation    = 3300 // derivations of one state of the package set, as in the real one
	reuseShare    = 0.2  // of the sources are those of an earlier derivation
)

// quantile draws from a distribution given by equally spaced quantiles. The
// greatest value is an outlier: it is drawn once in a thousand only.
func quantile(rng *rand.Rand, q []int) int {
	if rng.IntN(1000) == 0 {
		return q[len(q)-1]
	}
	x := rng.Float64() * float64(len(q)-2)
	i := int(x)
	return q[i] + int((x-float64(i))*float64(q[i+1]-q[i])+0.5)
}
