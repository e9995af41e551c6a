// Command boundary runs a command and kills it, or lets it fail, at one of its
// system calls; see the package overkeep/tests/boundary. For tests.
package main

import (
	"os"

	"overkeep/tests/boundary"
)

func main() { os.Exit(boundary.Main(os.Args[1:])) }
