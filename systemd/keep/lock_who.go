package keep

import (
	"fmt"
	"os"
	"path/filepath"
	"slices"
	"strconv"
	"strings"

	"golang.org/x/sys/unix"

	"overkeep/overlay/holder"
)

// Whose processes the lock meets: its own, which end with it, and others.

// own are the supervisor and its idle daemon: they end with the lock and hold
// nothing against it.
func (l *locker) own() map[int]bool {
	pid := supervisorPID(l.c.k)
	own := map[int]bool{}
	if pid == 0 {
		return own
	}
	own[pid] = true
	for _, c := range children(pid) {
		own[c] = true // the daemon; its workers are children of its own
	}
	return own
}

// hasClient reports whether the client of a worker may still be there: Nix's daemon
// writes its process id behind the name of the worker (daemon.cc), 0 if it has none here.
func hasClient(h holder.Holder) bool {
	f := strings.Fields(h.Command)
	if len(f) < 2 {
		return false // just ending
	}
	pid, err := strconv.Atoi(f[len(f)-1])
	return err != nil || pid == 0 || unix.Kill(pid, 0) != unix.ESRCH
}

// workersOnly reports whether all holders are children of our idle daemon, or
// processes that are just ending: those have no command line any more.
func (l *locker) workersOnly(hs []holder.Holder) bool {
	workers := map[int]bool{}
	for pid := range l.own() {
		for _, c := range children(pid) {
			workers[c] = true
		}
	}
	return !slices.ContainsFunc(hs, func(h holder.Holder) bool {
		return h.PID == 0 || !workers[h.PID] && !strings.HasPrefix(h.Command, "[")
	})
}

// inhabited reports whether a process other than this one and those that are just
// ending lives in the mount namespace.
func inhabited(ns uint64, ending ...int) bool {
	want := fmt.Sprintf("mnt:[%d]", ns)
	entries, err := os.ReadDir("/proc")
	if err != nil {
		return true
	}
	for _, e := range entries {
		pid, err := strconv.Atoi(e.Name())
		if err != nil || pid == os.Getpid() || slices.Contains(ending, pid) {
			continue
		}
		if l, err := os.Readlink(filepath.Join("/proc", e.Name(), "ns/mnt")); err == nil && l == want {
			return true
		}
	}
	return false
}
