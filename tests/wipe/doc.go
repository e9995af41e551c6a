// Package wipe measures on a real machine what is left of removed store paths: beside
// a running Nix, on the raw disk.
//
// It has no code of its own; see overlay/wipe and overlay/nixdb for what is measured.
package wipe
