// Package keep is the life of a keep: made, unlocked, locked with proof, its
// keys changed, destroyed. It joins crypt (the encrypted place) and overlay (the
// two stores), and is the one place that acts on both. The command uses it
// in-process as root; the service will call the same functions.
//
// Start with Manager: Init makes a keep, Open finds one, and its methods act on
// it. A function that changes something takes the keep's run lock, so two
// commands never act on one keep at a time.
//
// What needs a key or the user's view runs in a short-lived child process
// (ChildMain) that lives wholly in the keep's mount namespace: its copies of
// secrets die with it, and /proc/self shows the mounts that matter.
//
// The state of a keep is read from the kernel (key status, mounts, processes)
// and never from a file alone: a stale file cannot make a keep look locked.
//
// Do not use it from a process that must not be root, nor to look at a keep's
// content: it hands nothing of the plaintext back.
package keep
