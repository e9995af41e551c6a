package boundary

import (
	"fmt"
	"unsafe"

	"golang.org/x/sys/unix"
)

// The filter is a program for the kernel's classic BPF machine over struct
// seccomp_data {int nr; u32 arch; u64 instruction_pointer; u64 args[6]}
// (seccomp(2)). Both architectures in calls_*.go are little endian: the low half
// of an argument comes first.
const (
	offNr   = 0
	offArch = 4
	offArgs = 16
	// x32 has numbers of its own from here on (asm/unistd.h, __X32_SYSCALL_BIT).
	x32 = 0x40000000
)

func load(off int) unix.SockFilter {
	return unix.SockFilter{Code: unix.BPF_LD | unix.BPF_W | unix.BPF_ABS, K: uint32(off)}
}

// unless does the next instruction, or skips n of them unless the value meets the
// test.
func unless(test uint16, k uint32, n uint8) unix.SockFilter {
	return unix.SockFilter{Code: unix.BPF_JMP | test | unix.BPF_K, K: k, Jf: n}
}

func ret(k uint32) unix.SockFilter {
	return unix.SockFilter{Code: unix.BPF_RET | unix.BPF_K, K: k}
}

// filter is the program. Calls through another architecture's table would not be
// seen; they end the process, and so the test. io_uring writes without calls: it
// is not there.
func filter(locks bool) []unix.SockFilter {
	const enosys = unix.SECCOMP_RET_ERRNO | uint32(unix.ENOSYS)
	p := []unix.SockFilter{
		load(offArch),
		{Code: unix.BPF_JMP | unix.BPF_JEQ | unix.BPF_K, K: auditArch, Jt: 1},
		ret(unix.SECCOMP_RET_KILL_PROCESS),
		load(offNr),
		unless(unix.BPF_JGE, x32, 1),
		ret(unix.SECCOMP_RET_KILL_PROCESS),
		unless(unix.BPF_JEQ, unix.SYS_IO_URING_SETUP, 1),
		ret(enosys),
	}
	for _, c := range calls {
		var then []unix.SockFilter
		switch {
		case c.lock && !locks:
			continue
		case c.flags > 0:
			then = []unix.SockFilter{load(offArgs + 8*c.flags), unless(unix.BPF_JSET, changing, 1),
				ret(unix.SECCOMP_RET_USER_NOTIF), ret(unix.SECCOMP_RET_ALLOW)}
		case c.request:
			then = []unix.SockFilter{load(offArgs + 8)}
			for r := range requests {
				then = append(then, unless(unix.BPF_JEQ, r, 1), ret(unix.SECCOMP_RET_USER_NOTIF))
			}
			then = append(then, ret(unix.SECCOMP_RET_ALLOW))
		default:
			then = []unix.SockFilter{ret(unix.SECCOMP_RET_USER_NOTIF)}
		}
		p = append(append(p, unless(unix.BPF_JEQ, c.nr, uint8(len(then)))), then...)
	}
	return append(p, ret(unix.SECCOMP_RET_ALLOW))
}

// install puts the filter on the calling thread and returns the descriptor on
// which its calls are reported. From here on the thread is watched, and blocks at
// a counted call until somebody listens. WAIT_KILLABLE_RECV: a call that is being
// looked at is not interrupted by a signal, such as the Go runtime's SIGURG, and
// so not seen twice (Linux 5.19).
func install(program []unix.SockFilter) (int, error) {
	prog := unix.SockFprog{Len: uint16(len(program)), Filter: &program[0]}
	fd, _, errno := unix.RawSyscall(unix.SYS_SECCOMP, unix.SECCOMP_SET_MODE_FILTER,
		unix.SECCOMP_FILTER_FLAG_NEW_LISTENER|unix.SECCOMP_FILTER_FLAG_WAIT_KILLABLE_RECV, uintptr(unsafe.Pointer(&prog)))
	if errno != 0 {
		return -1, fmt.Errorf("seccomp: %w", errno)
	}
	return int(fd), nil
}

// From include/uapi/linux/seccomp.h.
type (
	seccompData struct {
		nr   int32
		arch uint32
		ip   uint64
		args [6]uint64
	}
	notification struct {
		id         uint64
		pid, flags uint32
		data       seccompData
	}
	response struct {
		id    uint64
		val   int64
		error int32
		flags uint32
	}
)

const (
	notifRecv     = 0xc0502100 // SECCOMP_IOCTL_NOTIF_RECV
	notifSend     = 0xc0182101
	notifIDValid  = 0x40082102
	notifSetFlags = 0x40082104
	syncWakeUp    = 1 // SECCOMP_USER_NOTIF_FD_SYNC_WAKE_UP, Linux 6.6
	flagContinue  = 1 // SECCOMP_USER_NOTIF_FLAG_CONTINUE
)

func ioctl(fd int, request uintptr, arg unsafe.Pointer) unix.Errno {
	_, _, errno := unix.Syscall(unix.SYS_IOCTL, uintptr(fd), request, uintptr(arg))
	return errno
}
