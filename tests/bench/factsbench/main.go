// Command factsbench does with overlay/facts what the benchmarks compare with Nix:
//
//	factsbench list|json|sizes DB
//
// It writes to its standard output and, when done, its peak memory in KiB to
// standard error. A process of its own, so that nothing is warm in it.
package main

import (
	"bufio"
	"bytes"
	"context"
	"errors"
	"fmt"
	"os"
	"strconv"

	"overkeep/overlay/facts"
	"overkeep/policy/graph"
)

func main() {
	if err := run(context.Background(), os.Args[1:]); err != nil {
		fmt.Fprintln(os.Stderr, "factsbench:", err)
		os.Exit(1)
	}
}

func run(ctx context.Context, args []string) error {
	if len(args) != 2 {
		return errors.New("usage: factsbench list|json|sizes DB")
	}
	s, err := facts.Open(ctx, []facts.Store{{DB: args[1], Layer: graph.Lower}}, facts.Options{})
	if err != nil {
		return err
	}
	out := bufio.NewWriterSize(os.Stdout, 1<<20)
	switch args[0] {
	case "list":
		err = list(out, s.Graph)
	case "json":
		err = s.WriteJSON(ctx, out, facts.Listing{})
	case "sizes":
		err = sizes(ctx, out, s.Graph)
	default:
		err = fmt.Errorf("unknown %q", args[0])
	}
	if err = errors.Join(err, out.Flush(), s.Close()); err != nil {
		return err
	}
	status, err := os.ReadFile("/proc/self/status")
	if err != nil {
		return err
	}
	_, peak, _ := bytes.Cut(status, []byte("VmHWM:"))
	fmt.Fprintf(os.Stderr, "%s\n", bytes.Fields(peak)[0])
	return nil
}

// list writes every path with its references, as much as `nix-store --dump-db` tells
// of them.
func list(out *bufio.Writer, g *graph.Graph) error {
	var b []byte
	for id := range graph.ID(g.Len()) {
		b = append(append(b[:0], g.BaseName(id)...), ' ')
		b = strconv.AppendInt(b, int64(len(g.References(id))), 10)
		if _, err := out.Write(append(b, '\n')); err != nil {
			return err
		}
	}
	return nil
}

func sizes(ctx context.Context, out *bufio.Writer, g *graph.Graph) error {
	sizes, err := facts.ClosureSizes(ctx, g)
	if err != nil {
		return err
	}
	var b []byte
	for id := range graph.ID(g.Len()) {
		b = append(append(b[:0], g.Path(id)...), ' ')
		b = strconv.AppendInt(b, sizes[id], 10)
		if _, err := out.Write(append(b, '\n')); err != nil {
			return err
		}
	}
	return nil
}
