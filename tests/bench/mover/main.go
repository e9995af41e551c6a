// Command mover copies store paths as a move between stores does: with the hash of each
// checked while it is copied, and durable at the end.
//
//	mover [--sync] SRC DST < LINES		# of "NAME SHA256-HEX", NAME in SRC
package main

import (
	"bufio"
	"context"
	"crypto/sha256"
	"encoding/hex"
	"errors"
	"fmt"
	"os"
	"strings"

	"golang.org/x/sys/unix"

	"overkeep/overlay/tree"
)

func main() {
	if err := run(os.Args[1:]); err != nil {
		fmt.Fprintln(os.Stderr, "mover:", err)
		os.Exit(1)
	}
}

func run(args []string) error {
	sync := len(args) > 0 && args[0] == "--sync"
	if sync {
		args = args[1:]
	}
	if len(args) != 2 {
		return errors.New("usage: mover [--sync] SRC DST < LINES")
	}
	src, err := os.Open(args[0])
	if err != nil {
		return err
	}
	dst, err := os.Open(args[1])
	if err != nil {
		return err
	}
	var jobs []tree.Job
	in := bufio.NewScanner(os.Stdin)
	for in.Scan() {
		name, sum, _ := strings.Cut(in.Text(), " ")
		b, err := hex.DecodeString(sum)
		if err != nil || len(b) != sha256.Size {
			return fmt.Errorf("%q is no line", in.Text())
		}
		jobs = append(jobs, tree.Job{Name: name, NewName: name, Want: [sha256.Size]byte(b)})
	}
	if err := in.Err(); err != nil {
		return err
	}
	var errs []error
	err = tree.CopyAll(context.Background(), src, dst, jobs, tree.Options{}, func(_ int, _ tree.Result, err error) { errs = append(errs, err) })
	if err := errors.Join(append(errs, err)...); err != nil || !sync {
		return err
	}
	return unix.Syncfs(int(dst.Fd()))
}
