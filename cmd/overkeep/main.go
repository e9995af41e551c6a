// Command overkeep makes, opens, locks and inspects keeps: encrypted personal
// Nix stores over a plain system store.
//
// It promises to say what to do about every error, to end with an exit code that
// means one thing (see exitcodes.go), and never to take a secret from an
// argument or a variable of the environment. `overkeep help concepts` is the
// place to start reading.
//
// This package only parses, asks and prints; what happens to a keep is in
// overkeep/systemd/keep. Do not look here for it.
package main

import (
	"os"
	"path/filepath"

	"overkeep/overlay/view"
	"overkeep/systemd/keep"
)

func main() {
	// Nix calls its remount hook with one argument and without a shell, so the
	// hook is a link to this program.
	if filepath.Base(os.Args[0]) == "overkeep-remount" {
		if view.Remount() != nil {
			os.Exit(exitInternal)
		}
		return
	}
	umask := harden()
	// The helper processes of overkeep/systemd/keep.
	if len(os.Args) > 2 && os.Args[1] == "internal" {
		os.Exit(keep.ChildMain(os.Args[2]))
	}
	closeOnExec()
	os.Exit(execute(os.Args[1:], umask))
}
