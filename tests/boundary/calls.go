package boundary

import "golang.org/x/sys/unix"

// A call is one kind of system call that changes something.
type call struct {
	name string
	nr   uint32
	// What it is about: one or two objects, each a descriptor in one argument or
	// a path in one and its directory in another. The first decides whether the
	// call counts.
	objects []object
	// flags is the number of the argument with open(2) flags: without one of
	// changing it changes nothing. 0: no such argument.
	flags int
	// request: the second argument is one of requests, or the call changes nothing.
	request bool
	// lock: only counted with Config.Locks.
	lock bool
}

// An object is a descriptor in argument fd, or a path in argument path relative to
// the directory in argument fd; none is -1. how is the argument with the struct
// open_how of openat2(2).
type object struct{ fd, path int }

const none = -1

func fd(n int) []object           { return []object{{n, none}} }
func at(fd, path int) []object    { return []object{{fd, path}} }
func names(paths ...int) []object { return two(none, paths...) }

func two(fd int, paths ...int) (out []object) {
	for _, p := range paths {
		out = append(out, object{fd, p})
	}
	return out
}

// changing are the flags with which an open makes or empties a file.
const changing = unix.O_CREAT | unix.O_TRUNC | unix.O_TMPFILE&^unix.O_DIRECTORY

// calls are those of every architecture; older are an architecture's own
// (calls_*.go). Numbers that golang.org/x/sys does not have are the same
// everywhere (include/uapi/asm-generic/unistd.h).
var calls = append(older, []call{
	{name: "write", nr: unix.SYS_WRITE, objects: fd(0)},
	{name: "pwrite64", nr: unix.SYS_PWRITE64, objects: fd(0)},
	{name: "writev", nr: unix.SYS_WRITEV, objects: fd(0)},
	{name: "pwritev", nr: unix.SYS_PWRITEV, objects: fd(0)},
	{name: "pwritev2", nr: unix.SYS_PWRITEV2, objects: fd(0)},
	{name: "copy_file_range", nr: unix.SYS_COPY_FILE_RANGE, objects: fd(2)},
	{name: "sendfile", nr: unix.SYS_SENDFILE, objects: fd(0)},
	{name: "splice", nr: unix.SYS_SPLICE, objects: fd(2)},

	{name: "openat", nr: unix.SYS_OPENAT, objects: at(0, 1), flags: 2},
	{name: "openat2", nr: unix.SYS_OPENAT2, objects: at(0, 1)},
	{name: "mkdirat", nr: unix.SYS_MKDIRAT, objects: at(0, 1)},
	{name: "mknodat", nr: unix.SYS_MKNODAT, objects: at(0, 1)},
	{name: "symlinkat", nr: unix.SYS_SYMLINKAT, objects: at(1, 2)},
	{name: "linkat", nr: unix.SYS_LINKAT, objects: []object{{0, 1}, {2, 3}}},
	{name: "unlinkat", nr: unix.SYS_UNLINKAT, objects: at(0, 1)},
	{name: "renameat2", nr: unix.SYS_RENAMEAT2, objects: []object{{0, 1}, {2, 3}}},

	{name: "fchmod", nr: unix.SYS_FCHMOD, objects: fd(0)},
	{name: "fchmodat", nr: unix.SYS_FCHMODAT, objects: at(0, 1)},
	{name: "fchmodat2", nr: unix.SYS_FCHMODAT2, objects: at(0, 1)},
	{name: "fchown", nr: unix.SYS_FCHOWN, objects: fd(0)},
	{name: "fchownat", nr: unix.SYS_FCHOWNAT, objects: at(0, 1)},
	{name: "utimensat", nr: unix.SYS_UTIMENSAT, objects: at(0, 1)},
	{name: "truncate", nr: unix.SYS_TRUNCATE, objects: names(0)},
	{name: "ftruncate", nr: unix.SYS_FTRUNCATE, objects: fd(0)},
	{name: "fallocate", nr: unix.SYS_FALLOCATE, objects: fd(0)},
	{name: "setxattr", nr: unix.SYS_SETXATTR, objects: names(0)},
	{name: "lsetxattr", nr: unix.SYS_LSETXATTR, objects: names(0)},
	{name: "fsetxattr", nr: unix.SYS_FSETXATTR, objects: fd(0)},
	{name: "setxattrat", nr: 463, objects: at(0, 1)},
	{name: "removexattr", nr: unix.SYS_REMOVEXATTR, objects: names(0)},
	{name: "lremovexattr", nr: unix.SYS_LREMOVEXATTR, objects: names(0)},
	{name: "fremovexattr", nr: unix.SYS_FREMOVEXATTR, objects: fd(0)},
	{name: "removexattrat", nr: 466, objects: at(0, 1)},
	{name: "file_setattr", nr: 469, objects: at(0, 1)},
	{name: "ioctl", nr: unix.SYS_IOCTL, objects: fd(0), request: true},

	{name: "fsync", nr: unix.SYS_FSYNC, objects: fd(0)},
	{name: "fdatasync", nr: unix.SYS_FDATASYNC, objects: fd(0)},
	{name: "syncfs", nr: unix.SYS_SYNCFS, objects: fd(0)},
	{name: "sync", nr: unix.SYS_SYNC},

	{name: "mount", nr: unix.SYS_MOUNT, objects: names(1)},
	{name: "umount2", nr: unix.SYS_UMOUNT2, objects: names(0)},
	{name: "move_mount", nr: unix.SYS_MOVE_MOUNT, objects: []object{{2, 3}, {0, 1}}},
	{name: "mount_setattr", nr: unix.SYS_MOUNT_SETATTR, objects: at(0, 1)},
	{name: "pivot_root", nr: unix.SYS_PIVOT_ROOT, objects: names(0)},

	{name: "flock", nr: unix.SYS_FLOCK, objects: fd(0), lock: true},
}...)

// requests are the ioctls that change something on a file system or block device,
// by the names of include/uapi/linux/{fs,fscrypt,fsverity,loop}.h and ext4.h.
var requests = map[uint32]string{
	0xc0185879: "FITRIM",
	0x4004662b: "EXT4_IOC_CHECKPOINT",
	0x8004587d: "EXT4_IOC_SHUTDOWN",
	0xc028660f: "EXT4_IOC_MOVE_EXT",
	0x40086602: "FS_IOC_SETFLAGS",
	0x401c5820: "FS_IOC_FSSETXATTR",
	0x800c6613: "FS_IOC_SET_ENCRYPTION_POLICY",
	0xc0506617: "FS_IOC_ADD_ENCRYPTION_KEY",
	0xc0406618: "FS_IOC_REMOVE_ENCRYPTION_KEY",
	0xc0406619: "FS_IOC_REMOVE_ENCRYPTION_KEY_ALL_USERS",
	0x40806685: "FS_IOC_ENABLE_VERITY",
	0x40049409: "FICLONE",
	0x4020940d: "FICLONERANGE",
	0xc0045877: "FIFREEZE",
	0xc0045878: "FITHAW",
	0x1277:     "BLKDISCARD",
	0x127d:     "BLKSECDISCARD",
	0x127f:     "BLKZEROOUT",
	0x4c00:     "LOOP_SET_FD",
	0x4c01:     "LOOP_CLR_FD",
	0x4c0a:     "LOOP_CONFIGURE",
}
