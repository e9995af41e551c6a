package doctor

import (
	"fmt"
	"strings"
)

// safetyFacts is what was found of places where plaintext may come to rest. All
// of it is advice.
type safetyFacts struct {
	swaps    []swapFacts
	swapErr  error
	resume   bool   // the kernel command line names where to wake up from
	canSleep bool   // the kernel can hibernate
	masked   bool   // hibernate.target is masked
	resumeOn Answer // is the place it wakes up from encrypted?

	device     string // of the state; "" if it has none
	fullDisk   Answer // does dm-crypt lie below it?
	dumps      dump
	dumpsErr   error
	dumpStored bool // systemd-coredump keeps dumps
	fsType     string
}

// swapFacts is a swap space, and whether what it holds is safe from a thief:
// in memory only, or on an encrypted device.
type swapFacts struct {
	path string
	safe Answer
}

func (s safetyFacts) checks() []Check {
	out := []Check{s.swapCheck(), s.hibernationCheck(), s.fullDiskCheck(), s.dumpsCheck()}
	for i := range out {
		out[i].Group = Safety
	}
	return out
}

func (s safetyFacts) swapCheck() Check {
	c := Check{Name: "swap", Answer: Yes}
	var open, unknown []string
	for _, w := range s.swaps {
		switch w.safe {
		case Yes:
		case No:
			open = append(open, quote(w.path))
		default:
			unknown = append(unknown, quote(w.path))
		}
	}
	const why = ": what programs read from an open keep may be written there in plaintext"
	switch {
	case s.swapErr != nil:
		c.Answer, c.Missing = Unsure, "the list of swap spaces: "+oneLine(s.swapErr.Error())
	case len(s.swaps) == 0:
		c.Found = "none"
	case len(open) > 0:
		c.Answer, c.Missing = No, "encryption of "+strings.Join(open, ", ")+why
		c.Remedy = "swapoff " + strings.Join(open, " ")
		c.Or = "for good: zram, or in /etc/crypttab: swap DEVICE /dev/urandom swap,plain"
	case len(unknown) > 0:
		c.Answer, c.Missing = Unsure, "whether "+strings.Join(unknown, ", ")+" is encrypted"
	default:
		c.Found = fmt.Sprintf("%d, in memory or encrypted", len(s.swaps))
	}
	return c
}

func (s safetyFacts) hibernationCheck() Check {
	c := Check{Name: "hibernation", Answer: Yes}
	switch {
	case !s.canSleep:
		c.Found = "the kernel cannot"
	case s.masked:
		c.Found = "switched off"
	case s.resumeOn == Yes:
		c.Found = "into an encrypted device"
	case !s.resume && s.resumeOn == "":
		c.Found = "not set up"
	default:
		c.Answer = No
		c.Missing = "safety from hibernation: the keys of open keeps are written to the disk with everything else"
		if s.resumeOn == Unsure || s.resumeOn == "" {
			c.Answer = Unsure
			c.Missing = "whether the device it hibernates into is encrypted; if not, the keys of open keeps end up on the disk"
		}
		c.Remedy = "systemctl mask hibernate.target hybrid-sleep.target suspend-then-hibernate.target"
		c.Or = "lock before you hibernate: overkeep lock"
	}
	return c
}

func (s safetyFacts) fullDiskCheck() Check {
	c := Check{Name: "full-disk encryption", Answer: s.fullDisk, Found: s.device}
	switch s.fullDisk {
	case Yes:
		c.Found = s.device + " lies on dm-crypt"
	case No:
		c.Missing = "dm-crypt below " + s.device + ": use full-disk encryption too if you can; a keep protects itself, not the names of installed software, logs or swap"
		c.Or = "choose it when the system is next installed; cryptsetup-reencrypt(8) does it in place, with a backup at hand"
	default:
		c.Answer, c.Missing = Unsure, "what lies below the filesystem of the state"
		if s.fsType != "" {
			c.Missing += " (" + s.fsType + ")"
		}
	}
	return c
}

func (s safetyFacts) dumpsCheck() Check {
	c := Check{Name: "core dumps", Answer: Yes}
	const what = "safety from core dumps: a program that crashes in a view leaves what it had in memory outside the keep"
	off := "sysctl -w kernel.core_pattern='|/bin/false'"
	switch {
	case s.dumpsErr != nil:
		c.Answer, c.Missing = Unsure, "where core dumps go: "+oneLine(s.dumpsErr.Error())
	case s.dumps == dumpNowhere:
		c.Found = "go nowhere"
	case s.dumps == dumpSystemd && !s.dumpStored:
		c.Found = "are not stored"
	case s.dumps == dumpSystemd:
		c.Answer, c.Found, c.Missing = No, "systemd-coredump", what
		c.Remedy = "mkdir -p /etc/systemd/coredump.conf.d && printf '[Coredump]\\nStorage=none\\nProcessSizeMax=0\\n' >/etc/systemd/coredump.conf.d/overkeep.conf"
	case s.dumps == dumpProgram:
		c.Answer, c.Found, c.Missing, c.Remedy = No, "go to a program", what, off
	default:
		c.Answer, c.Found, c.Missing, c.Remedy = No, "go to files", what, off
		c.Or = "ulimit -c 0, which is the default of most shells, is enough for a session"
	}
	return c
}

// block is a block device and what it lies on.
type block struct {
	uuid  string   // device-mapper's; cryptsetup's begins with "CRYPT-"
	ram   bool     // compressed memory, written to no disk
	below []string // names of what carries it; none: it is a disk
}

// maxDepth bounds a stack of block devices.
const maxDepth = 16

// encrypted says whether every way from a device down to a disk passes dm-crypt.
func encrypted(tree map[string]block, name string) Answer {
	return encryptedAt(tree, name, maxDepth)
}

func encryptedAt(tree map[string]block, name string, depth int) Answer {
	b, ok := tree[name]
	switch {
	case !ok || depth == 0:
		return Unsure
	case b.ram || strings.HasPrefix(b.uuid, "CRYPT-"):
		return Yes
	case len(b.below) == 0:
		return No
	}
	a := Yes
	for _, n := range b.below {
		switch encryptedAt(tree, n, depth-1) {
		case No:
			return No
		case Unsure:
			a = Unsure
		}
	}
	return a
}
