package bed

import (
	"fmt"
	"math"
	"os"
	"unsafe"

	"golang.org/x/sys/unix"
)

// A mount namespace can be pinned to a file (bind mount of /proc/PID/ns/mnt) only
// from a namespace with a lower id; that is how the kernel keeps namespaces from
// holding each other in a ring (fs/namespace.c, mnt_ns_loop). Up to Linux 6.17 ids
// simply grew. Since 6.18 every CPU hands out numbers of its own batch, and a pin
// fails with EINVAL, now and then, depending on which CPU made which namespace.
// On a real computer the outer namespace is the first one of all, and a pin always
// works. To be like that, a machine's namespace is made on the CPU whose numbers
// are lowest.

// mntnsID returns the id of a mount namespace, 0 where the kernel has none
// (NS_GET_MNTNS_ID came with Linux 6.11).
func mntnsID(path string) uint64 {
	const nsGetMntnsID = 0x8008b705 // _IOR(0xb7, 5, __u64)
	f, err := os.Open(path)
	if err != nil {
		return 0
	}
	defer f.Close()
	var id uint64
	if _, _, errno := unix.Syscall(unix.SYS_IOCTL, f.Fd(), nsGetMntnsID, uintptr(unsafe.Pointer(&id))); errno != 0 {
		return 0
	}
	return id
}

// nextIDs makes a mount namespace on every CPU and returns their ids. The
// calling thread must be its own (onThread): its CPUs and namespace change.
func nextIDs() map[int]uint64 {
	// Every CPU there is, not those the test was given: the kernel keeps the
	// possible ones of this set (sched_setaffinity(2)).
	var all unix.CPUSet
	for cpu := range 1024 {
		all.Set(cpu)
	}
	if unix.SchedSetaffinity(0, &all) != nil || unix.SchedGetaffinity(0, &all) != nil {
		return nil
	}
	ids := map[int]uint64{}
	for cpu, left := 0, all.Count(); left > 0; cpu++ {
		if !all.IsSet(cpu) {
			continue
		}
		left--
		var one unix.CPUSet
		one.Set(cpu)
		if unix.SchedSetaffinity(0, &one) != nil || unix.Unshare(unix.CLONE_FS|unix.CLONE_NEWNS) != nil {
			continue
		}
		if id := mntnsID("/proc/thread-self/ns/mnt"); id != 0 {
			ids[cpu] = id
		}
	}
	return ids
}

// lowestCPU binds the calling thread to the CPU with the lowest next id.
func lowestCPU() {
	ids := make(chan map[int]uint64)
	go onThread(func() error { ids <- nextIDs(); return nil })
	best, low := -1, uint64(math.MaxUint64)
	for cpu, id := range <-ids {
		if id < low {
			best, low = cpu, id
		}
	}
	if best >= 0 {
		var one unix.CPUSet
		one.Set(best)
		_ = unix.SchedSetaffinity(0, &one)
	}
}

// pinnable reports whether every namespace made from now on can be pinned
// inside the mount namespace of process pid.
func pinnable(pid int) bool {
	own := mntnsID(fmt.Sprintf("/proc/%d/ns/mnt", pid))
	ok := true
	_ = onThread(func() error {
		for _, id := range nextIDs() {
			ok = ok && own < id
		}
		return nil
	})
	return ok
}
