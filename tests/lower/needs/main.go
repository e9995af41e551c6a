// Needs prints, one a line, what a keep with the database $1 and the upper
// directory $2 needs of the system store, roots only. It runs in the test
// machine: SQLite resolves the symlinks of a path, and /proc/PID/root is one, so
// a database there cannot be opened from outside.
package main

import (
	"context"
	"fmt"
	"os"

	"overkeep/overlay/nixdb"
	"overkeep/overlay/pins"
)

func main() {
	g, err := nixdb.LowerGraph(context.Background(), os.Args[1], os.Args[2])
	if err != nil {
		fmt.Fprintln(os.Stderr, err)
		os.Exit(1)
	}
	for _, p := range pins.Roots(g.Paths, g.Refs) {
		fmt.Println(p)
	}
}
