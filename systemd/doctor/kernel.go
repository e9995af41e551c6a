package doctor

import (
	"fmt"
	"strings"

	"golang.org/x/sys/unix"

	"overkeep/crypt/volume"
)

// kernelFacts is how the attempts on the kernel went.
type kernelFacts struct {
	namespace, enter, pin, loop outcome

	encryption             volume.Result // of a throw-away ext4; Answer "" if not tried
	image, dir             keepTrial
	sandbox, userNS        outcome
	memory, pidfd, openat2 outcome

	userNSLimit string // why user namespaces are limited; "" if they are not
	aesCPU      Answer
	aesDriver   string // "" if unknown
}

// keepTrial is a keep in small: made, opened, used and locked.
type keepTrial struct {
	volume, overlay, remount, proof outcome
}

func (t keepTrial) first() outcome {
	for _, o := range []outcome{t.volume, t.overlay, t.remount, t.proof} {
		if !o.works() {
			return o
		}
	}
	return t.volume
}

func (k kernelFacts) checks(m machine, buildUsers bool) []Check {
	asRoot := Check{Name: "root", Group: Kernel, Answer: Yes, Found: "runs as root"}
	if !m.root {
		asRoot.Answer, asRoot.Found = No, ""
		asRoot.Missing, asRoot.Remedy = "root: most of this can only be tried as root", again
	}
	out := []Check{asRoot}
	add := func(f feature, o outcome) {
		f.group = Kernel
		out = append(out, m.judge(f, o))
	}
	ns := feature{
		name: "mount namespaces", needed: true, what: "mount namespaces of one's own", since: release{3, 8},
		option: "CONFIG_NAMESPACES", also: []unix.Errno{unix.ENOSPC, unix.EUSERS},
		remedy: "sysctl -w user.max_mnt_namespaces=15000",
	}
	add(ns, k.namespace)
	ns.name, ns.what, ns.remedy = "entering a namespace", "setns(2) into a mount namespace, from a thread", ""
	add(ns, k.enter)
	ns.name, ns.what = "pinned namespace", "a mount namespace kept by a bind mount"
	add(ns, k.pin)
	add(feature{
		name: "loop devices", needed: true, what: "LOOP_CONFIGURE on a loop device", since: release{5, 8},
		option: "CONFIG_BLK_DEV_LOOP", remedy: "modprobe loop",
		or: "in a container: give it /dev/loop-control and the loop devices",
	}, k.loop)
	out = append(out, k.encryptionCheck(m))
	add(feature{
		name: "keep in an image", needed: true, what: "an image in an encrypted directory", since: release{5, 8},
	}, k.image.volume)
	add(feature{
		name: "overlay store", needed: true, what: "overlayfs with the options of a view, its upper layer encrypted",
		since: release{4, 19}, option: "CONFIG_OVERLAY_FS", remedy: "modprobe overlay",
	}, k.image.overlay)
	add(feature{
		name: "remount while busy", needed: true, since: release{4, 19},
		what: "a remount that lets a busy overlay see its lower layer grow",
	}, k.image.remount)
	add(feature{
		name: "lock with proof", needed: true, what: "a key that is gone, and names that are ciphertext", since: release{5, 4},
	}, k.image.proof)
	add(feature{
		name: "keep in a directory", what: "an overlay right on an encrypted directory (--backend dir)", since: release{5, 4},
		or: "the image back-end, which is the default, does not need it",
	}, k.dir.first())
	add(feature{
		name: "build sandbox", needed: true, what: "the mount, pid, network, ipc and host name namespaces of Nix's sandbox",
		since: release{3, 8}, option: "CONFIG_PID_NS, CONFIG_NET_NS, CONFIG_IPC_NS, CONFIG_UTS_NS",
		also:   []unix.Errno{unix.ENOSPC, unix.EUSERS},
		remedy: "sysctl -w user.max_pid_namespaces=15000 user.max_net_namespaces=15000 user.max_mnt_namespaces=15000",
	}, k.sandbox)
	out = append(out, k.userNSCheck(m, buildUsers))
	add(feature{
		name: "locked memory", needed: true, what: "memory for keys that is never swapped out (RLIMIT_MEMLOCK)",
		since: release{4, 14}, also: []unix.Errno{unix.ENOMEM, unix.EAGAIN},
		remedy: "ulimit -l 1024", or: "in a unit: LimitMEMLOCK=1M; as root there is no limit but that of a container",
	}, k.memory)
	add(feature{name: "process handles", needed: true, what: "pidfd_open(2)", since: release{5, 3}}, k.pidfd)
	add(feature{name: "safe paths", needed: true, what: "openat2(2) and statx(2) with mount ids", since: release{5, 8}}, k.openat2)
	return append(out, k.aesCheck())
}

func (k kernelFacts) encryptionCheck(m machine) Check {
	c := Check{Name: "ext4 encryption", Group: Kernel, Needed: true, Answer: k.encryption.Answer}
	switch k.encryption.Answer {
	case Yes:
	case "":
		if m.root {
			c.Answer, c.Missing = Unsure, "it was not tried: loop devices have to work first"
		} else {
			m.wantsRoot(&c)
		}
	default:
		c.Missing, c.Remedy = oneLine(k.encryption.Missing), k.encryption.Remedy
		since := release{5, 4}
		if c.Answer == No && m.release != (release{}) {
			if m.release.less(since) {
				c.Missing += fmt.Sprintf("; it came with Linux %s, this is %s", since, m.release)
			} else {
				c.Missing += fmt.Sprintf("; Linux %s is new enough (%s) and says no", m.release, since)
			}
		}
		if c.Answer == No && c.Remedy == "" {
			c.Or = otherKernel(since, "CONFIG_FS_ENCRYPTION")
		}
	}
	return c
}

// userNSCheck: Nix's daemon prefers builds in a user namespace; without one it
// runs them as its build users, so they are needed only where there are none.
func (k kernelFacts) userNSCheck(m machine, buildUsers bool) Check {
	f := feature{
		name: "user namespaces", group: Kernel, needed: !buildUsers,
		what:  "user namespaces, in which Nix's sandbox gives a build a user of its own",
		since: release{3, 8}, option: "CONFIG_USER_NS", also: []unix.Errno{unix.ENOSPC, unix.EUSERS, unix.ENOMEM},
		remedy: "sysctl -w user.max_user_namespaces=15000",
	}
	if buildUsers {
		f.or = "builds run as Nix's build users without it"
	}
	c := m.judge(f, k.userNS)
	if k.userNSLimit == "" {
		return c
	}
	if c.Answer == Yes {
		c.Found = k.userNSLimit + "; root, as which the daemons run, is not concerned"
	} else if !m.root {
		c.Or = k.userNSLimit
	}
	return c
}

// generic names the drivers that compute AES without instructions for it.
var generic = []string{"aes-generic", "aes-fixed-time", "aes-lib"}

func (k kernelFacts) aesCheck() Check {
	c := Check{Name: "fast AES", Group: Kernel, Answer: k.aesCPU, Found: k.aesDriver}
	slow := false
	for _, g := range generic {
		slow = slow || strings.Contains(k.aesDriver, g)
	}
	const cost = "what is encrypted is read and written several times slower"
	switch {
	case slow && k.aesCPU == Yes:
		c.Answer = No
		c.Missing = "a driver: the processor has AES instructions, the kernel does not use them; " + cost
		c.Remedy = "modprobe aesni_intel"
		c.Or = "on ARM: modprobe aes_ce_blk; a keep made so works all the same"
	case slow, k.aesCPU == No && k.aesDriver == "":
		c.Answer, c.Missing = No, "AES instructions of the processor; "+cost
		c.Or = "a keep works all the same"
	case k.aesDriver != "":
		c.Answer = Yes
	case k.aesCPU == Yes:
		c.Found = "the processor has AES instructions"
	default:
		c.Answer, c.Missing = Unsure, "the processor's flags"
	}
	return c
}
