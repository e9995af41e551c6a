// Reader reads a Nix database $1 times, mostly the part that a question about one
// path needs, at times all of it, and fails at the first error or torn view. It
// runs in the test machine, beside a Nix that adds and deletes.
//
// What that Nix does keeps an invariant: LEFT-i is registered in one transaction
// with RIGHT-i, to which it refers, and deleted before it.
package main

import (
	"context"
	"errors"
	"fmt"
	"os"
	"strconv"
	"strings"
	"sync"
	"sync/atomic"

	"overkeep/overlay/facts"
	"overkeep/policy/graph"
)

func main() {
	if err := run(context.Background(), os.Args[1:]); err != nil {
		fmt.Fprintln(os.Stderr, "reader:", err)
		os.Exit(1)
	}
}

func run(ctx context.Context, args []string) error {
	if len(args) < 3 {
		return errors.New("usage: reader N DB LEFT=RIGHT...")
	}
	n, err := strconv.Atoi(args[0])
	if err != nil {
		return err
	}
	stores, pairs := []facts.Store{{DB: args[1], Layer: graph.Lower}}, args[2:]
	ctx, cancel := context.WithCancelCause(ctx)
	defer cancel(nil)
	var next, seen atomic.Int64
	var wg sync.WaitGroup
	for range 2 {
		wg.Go(func() {
			for i := next.Add(1); int(i) <= n && ctx.Err() == nil; i = next.Add(1) {
				found, err := read(ctx, stores, pairs, int(i))
				seen.Add(int64(found))
				if err != nil {
					cancel(fmt.Errorf("read %d: %w", i, err))
				}
			}
		})
	}
	wg.Wait()
	fmt.Println(seen.Load())
	return context.Cause(ctx)
}

// read reads once and counts the pairs that were there.
func read(ctx context.Context, stores []facts.Store, pairs []string, i int) (found int, err error) {
	var l *facts.Loaded
	if i%20 == 0 {
		l, err = facts.Load(ctx, stores, facts.Options{Readers: 2})
	} else {
		left, _, _ := strings.Cut(pairs[i%len(pairs)], "=")
		l, err = facts.LoadFor(ctx, stores, []string{left}, facts.Need{Build: i%2 == 0}, facts.Options{})
	}
	if err != nil {
		return 0, err
	}
	if l.Report.Broken+l.Report.Dropped > 0 {
		return 0, fmt.Errorf("%+v", l.Report)
	}
	for _, p := range pairs {
		left, right, _ := strings.Cut(p, "=")
		id, to := l.Index.Path(left), l.Index.Path(right)
		if id == graph.NoID {
			continue
		}
		found++
		if refs := l.Graph.References(id); to == graph.NoID || len(refs) != 1 || refs[0] != to {
			return found, fmt.Errorf("%s refers to %v, not to %d", p, refs, to)
		}
	}
	return found, nil
}
