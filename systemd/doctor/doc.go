// Package doctor tries each feature of the kernel, the file systems, Nix and the
// login that a keep needs, on something thrown away, and names what is missing
// and the command that mends it.
//
// It promises three answers: yes (it was tried and works), no (it was tried and
// does not, with what is missing), could not tell (the attempt itself was not
// possible, most often for want of root). No version number stands for an
// attempt; a kernel that is new enough and says no is said to be so. Nothing is
// left behind, also when the process is killed: what is mounted lives in a mount
// namespace that ends with it, on a tmpfs that ends with the namespace. Two small
// directories beside the state of the keeps are the exception; they are removed
// at once, with rmdir. The real /nix is never written to: Nix is tried where
// every mount of the machine is read-only.
//
// # How to start
//
// Run, then Verdict over what it returns. Probing (the *_probe.go files) only
// gathers facts; the judgement on them is pure and tested as tables.
//
// # When not to use it
//
// It says nothing of an existing keep: that is status, verify and audit. It is no
// guard either: what mounts and unlocks checks for itself, at that moment.
//
// Like everything above crypt/volume, a command that calls Run must have silenced
// the standard logger (package volume says why).
package doctor
