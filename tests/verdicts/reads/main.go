// Reads reads the databases of the system and of a keep $2 times, as a command in the
// view of keep $1 does, and checks that each answer is one of a single moment. It
// runs in the test machine, beside a Nix that adds and deletes.
//
// Paths whose names begin with "pair-" come and go in twos: pair-X-top refers to
// pair-X-dep, and whoever sees the first has to see the second. On standard output
// it counts what it saw; an error ends it with code 1.
package main

import (
	"context"
	"encoding/json"
	"fmt"
	"os"
	"strconv"
	"strings"
	"time"

	"overkeep/overlay/facts"
	"overkeep/overlay/layout"
	"overkeep/overlay/verdict"
	"overkeep/policy/graph"
)

// Seen is what is written.
type Seen struct {
	Reads, Full        int
	Pairs              int // reads that saw a pair
	Came, Went         int // changes of the paths between two full reads
	Going              int // paths that were deleted while they were read
	Longest, FullReads string
}

func main() {
	seen, err := run(os.Args[1], os.Args[2])
	if err != nil {
		fmt.Fprintln(os.Stderr, err)
		os.Exit(1)
	}
	_ = json.NewEncoder(os.Stdout).Encode(seen)
}

// between is how many reads of single paths follow a read of all.
const between = 100

func run(keep, reads string) (seen Seen, err error) {
	k, err := layout.New("", keep)
	if err != nil {
		return seen, err
	}
	n, err := strconv.Atoi(reads)
	if err != nil {
		return seen, err
	}
	ctx, stores := context.Background(), verdict.View(k).Stores // the system's first
	var targets []string
	var longest, full time.Duration
	before := map[string]bool{}
	for seen.Reads < n {
		start := time.Now()
		var l *facts.Loaded
		if seen.Reads%between == 0 {
			l, err = facts.Load(ctx, stores, facts.Options{})
			seen.Full++
		} else {
			// Among the targets are those that are there now, and those that were. Every other
			// time it is the system's database alone, as for somebody without a keep.
			at := seen.Reads % len(targets)
			of := stores[:1+seen.Reads%2]
			l, err = facts.LoadFor(ctx, of, targets[at:at+1], facts.Need{Build: seen.Reads%4 < 2}, facts.Options{})
		}
		if err != nil {
			return seen, fmt.Errorf("read %d: %w", seen.Reads, err)
		}
		took := time.Since(start)
		pairs, err := whole(l)
		if err != nil {
			return seen, fmt.Errorf("read %d: %w", seen.Reads, err)
		}
		n, err := going(ctx, stores, l)
		if err != nil {
			return seen, fmt.Errorf("read %d: %w", seen.Reads, err)
		}
		seen.Going += n
		if pairs > 0 {
			seen.Pairs++
		}
		if seen.Reads%between == 0 {
			full += took
			now := map[string]bool{}
			for i := range l.Graph.Len() {
				p := l.Graph.Path(graph.ID(i))
				now[p] = true
				if !before[p] {
					seen.Came++
					targets = append(targets, p)
				}
			}
			for p := range before {
				if !now[p] {
					seen.Went++
				}
			}
			before = now
		} else {
			longest = max(longest, took)
		}
		seen.Reads++
	}
	seen.Longest, seen.FullReads = longest.String(), (full / time.Duration(seen.Full)).String()
	return seen, nil
}

// whole checks that a graph is of one moment, and counts its pairs.
func whole(l *facts.Loaded) (pairs int, err error) {
	g := l.Graph
	if l.Report.Dropped != 0 || l.Report.Differs != 0 {
		return 0, fmt.Errorf("torn: %+v", l.Report)
	}
	for i := range g.Len() {
		id := graph.ID(i)
		if g.Flags[id]&graph.LayerMask == 0 {
			return 0, fmt.Errorf("torn: %s lies nowhere", g.Path(id))
		}
		name := string(g.Name(id))
		if !strings.HasPrefix(name, "pair-") || !strings.HasSuffix(name, "-top") {
			continue
		}
		pairs++
		found := false
		for _, r := range g.Refs[g.RefOff[id]:g.RefOff[id+1]] {
			found = found || string(g.Name(r)) == strings.TrimSuffix(name, "-top")+"-dep"
		}
		if !found {
			return 0, fmt.Errorf("torn: %s without what it refers to", g.Path(id))
		}
	}
	return pairs, nil
}

// patience is how long a Nix that is not scheduled may take over a deletion.
const patience = time.Minute

// going reads again what a graph calls broken: a path of the keep that was deleted
// between the reading of its row and the look for its files, or of which Nix itself is
// between the two. Then it goes, or comes again, and nothing of it is broken.
func going(ctx context.Context, stores []facts.Store, l *facts.Loaded) (int, error) {
	var paths []string
	for i := range l.Graph.Len() {
		if id := graph.ID(i); l.Graph.Flags[id]&graph.Broken != 0 {
			paths = append(paths, l.Graph.Path(id))
		}
	}
	n := len(paths)
	for end := time.Now().Add(patience); len(paths) > 0; {
		again, err := facts.LoadFor(ctx, stores, paths, facts.Need{}, facts.Options{})
		if err != nil {
			return n, err
		}
		if again.Report.Broken == 0 {
			break
		}
		if time.Now().After(end) {
			return n, fmt.Errorf("torn: %q stay broken", paths)
		}
	}
	return n, nil
}
