// Package layers holds the house rules by tests, not by memory: which package may
// import which, what only a few packages may touch, what must never appear, and
// which modules of others are linked in.
//
// It has no code of its own. A rule that stands in the way is changed in the
// table it lives in, with its reason, in the same commit as what needs it.
package layers
