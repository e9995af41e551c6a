// Package realinput plans and applies over a store of some thousand paths with real
// files: packages of the Debian archive with their real dependencies (the script
// archive gets them), registered, hashed and signed by a real Nix, and moved back and
// forth by policies one after the other. It begins as an old installation does:
// everything in the system store, with roots of several users and a running system.
//
// Do not look here for what goes wrong (tests/badinput) or is killed (tests/moves).
package realinput
