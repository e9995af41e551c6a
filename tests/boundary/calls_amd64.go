package boundary

import "golang.org/x/sys/unix"

const auditArch = unix.AUDIT_ARCH_X86_64

// older are the calls that newer architectures no longer have.
var older = []call{
	{name: "open", nr: unix.SYS_OPEN, objects: names(0), flags: 1},
	{name: "creat", nr: unix.SYS_CREAT, objects: names(0)},
	{name: "mkdir", nr: unix.SYS_MKDIR, objects: names(0)},
	{name: "mknod", nr: unix.SYS_MKNOD, objects: names(0)},
	{name: "symlink", nr: unix.SYS_SYMLINK, objects: names(1)},
	{name: "link", nr: unix.SYS_LINK, objects: names(0, 1)},
	{name: "unlink", nr: unix.SYS_UNLINK, objects: names(0)},
	{name: "rmdir", nr: unix.SYS_RMDIR, objects: names(0)},
	{name: "rename", nr: unix.SYS_RENAME, objects: names(0, 1)},
	{name: "renameat", nr: unix.SYS_RENAMEAT, objects: []object{{0, 1}, {2, 3}}},
	{name: "chmod", nr: unix.SYS_CHMOD, objects: names(0)},
	{name: "chown", nr: unix.SYS_CHOWN, objects: names(0)},
	{name: "lchown", nr: unix.SYS_LCHOWN, objects: names(0)},
	{name: "utime", nr: unix.SYS_UTIME, objects: names(0)},
	{name: "utimes", nr: unix.SYS_UTIMES, objects: names(0)},
	{name: "futimesat", nr: unix.SYS_FUTIMESAT, objects: at(0, 1)},
}
