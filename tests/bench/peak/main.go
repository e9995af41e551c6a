// Command peak runs a command and writes its peak memory, in KiB, as the last line of
// standard error (getrusage(2)).
//
//	peak COMMAND ARG...
package main

import (
	"errors"
	"fmt"
	"os"
	"os/exec"
	"syscall"
)

func main() {
	if len(os.Args) < 2 {
		fmt.Fprintln(os.Stderr, "usage: peak COMMAND ARG...")
		os.Exit(2)
	}
	c := exec.Command(os.Args[1], os.Args[2:]...)
	c.Stdin, c.Stdout, c.Stderr = os.Stdin, os.Stdout, os.Stderr
	err := c.Run()
	var exit *exec.ExitError
	if err != nil && !errors.As(err, &exit) {
		fmt.Fprintln(os.Stderr, "peak:", err)
		os.Exit(1)
	}
	usage := c.ProcessState.SysUsage().(*syscall.Rusage)
	fmt.Fprintf(os.Stderr, "\n%d\n", usage.Maxrss)
	os.Exit(c.ProcessState.ExitCode())
}
