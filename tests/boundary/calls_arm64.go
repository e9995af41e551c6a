package boundary

import "golang.org/x/sys/unix"

const auditArch = unix.AUDIT_ARCH_AARCH64

// older are the calls that newer architectures no longer have.
var older = []call{
	{name: "renameat", nr: unix.SYS_RENAMEAT, objects: []object{{0, 1}, {2, 3}}},
}
