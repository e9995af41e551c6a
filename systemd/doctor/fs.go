package doctor

import (
	"fmt"
	"io/fs"
	"strings"

	"overkeep/crypt/volume"
)

// fsFacts is what was found of the filesystem that holds the state of the keeps.
type fsFacts struct {
	root   string // --root
	state  string // the directory of the keeps' state
	at     string // its nearest ancestor that exists; "" if none could be found
	fsType string
	device string // "/dev/sda2"; "" if there is none

	encryption volume.Result // Answer "" if not tried
	exchange   outcome
	overlay    outcome
	trim       trim
	free       int64    // bytes that root may use; -1 if unknown
	tools      []string // programs of e2fsprogs that were not found

	run    string      // the directory of what runs
	stairs []pathFacts // every existing ancestor of state and run, each once
}

// trim is how freed blocks are given back to the device.
type trim string

const (
	trimNow     trim = "discard"    // the mount option
	trimWeekly  trim = "timer"      // fstrim.timer
	trimNever   trim = "never"      //
	trimUnable  trim = "no discard" // the device cannot
	trimUnknown trim = ""
)

// pathFacts is a directory as lstat(2) has it.
type pathFacts struct {
	path string
	mode fs.FileMode
	uid  uint32
}

// leastFree is the smallest keep there can be, with the room its making takes.
const leastFree = 256 << 20

func (f fsFacts) checks(m machine, onImage bool) []Check {
	where := f.state
	if f.at != f.state {
		where += " (not yet made; " + f.at + " stands for it)"
	}
	add := func(c Check) Check { c.Group = Filesystem; return c }
	out := []Check{
		add(f.encryptionCheck(m, onImage, where)),
		m.judge(feature{
			name: "exchange of directories", group: Filesystem, needed: true,
			what:   "renameat2(2) with RENAME_EXCHANGE on the filesystem of " + quote(f.at) + ", by which keys are replaced all at once",
			remedy: "overkeep init --root DIR", or: "with DIR on ext4, xfs, btrfs or f2fs",
		}, f.exchange),
		m.judge(feature{
			name: "upper layer beside the state", group: Filesystem,
			what: "an overlay whose upper layer lies right on the filesystem of " + quote(f.at) + " (--backend dir)",
			or:   "the image back-end, which is the default, does not need it",
		}, f.overlay),
		add(f.toolsCheck()),
		add(f.freeCheck()),
		add(f.stairsCheck()),
		add(f.trimCheck()),
	}
	return out
}

const onImageRemedy = "overkeep init --on-image FILE"

func (f fsFacts) encryptionCheck(m machine, onImage bool, where string) Check {
	c := Check{Name: "encryption", Answer: f.encryption.Answer, Needed: true}
	c.Found = strings.TrimSpace(f.fsType + " " + f.device)
	if c.Found != "" {
		c.Found += ", "
	}
	c.Found += where
	switch f.encryption.Answer {
	case Yes:
		return c
	case "":
		if m.root {
			c.Answer, c.Missing = Unsure, "a directory to try it in"
		} else {
			m.wantsRoot(&c)
		}
		return c
	}
	c.Missing, c.Remedy = oneLine(f.encryption.Missing), f.encryption.Remedy
	if c.Answer == Unsure {
		if !m.root {
			m.wantsRoot(&c)
		}
		return c
	}
	switch {
	case c.Remedy == "--on-image FILE":
		c.Remedy = onImageRemedy
	case strings.HasPrefix(c.Remedy, "tune2fs"):
		// GRUB before 2.04 refuses an ext4 with that flag (google/fscrypt#58).
		c.Or = onImageRemedy + ", which changes nothing here; take it if a GRUB older than 2.04 boots from this filesystem"
	case c.Remedy != "" && onImage:
		c.Or = onImageRemedy
	}
	switch {
	case c.Remedy == "":
		c.Or = otherKernel(release{5, 4}, "CONFIG_FS_ENCRYPTION")
	case c.Remedy == onImageRemedy && !onImage:
		c.Or = "that too needs what did not work above"
	}
	return c
}

func (f fsFacts) toolsCheck() Check {
	c := Check{Name: "e2fsprogs", Answer: Yes, Needed: true, Found: "mke2fs and e2fsck"}
	if len(f.tools) > 0 {
		c.Answer, c.Found = No, ""
		c.Missing = "the program " + strings.Join(f.tools, " and ") + ", which makes and mends the image of a keep"
		c.Remedy = "apt install e2fsprogs"
	}
	return c
}

func (f fsFacts) freeCheck() Check {
	c := Check{Name: "free space", Answer: Yes}
	switch {
	case f.free < 0:
		c.Answer, c.Missing = Unsure, "the free space of "+quote(f.at)
	case f.free < leastFree:
		c.Answer, c.Found = No, mib(f.free)
		c.Missing = fmt.Sprintf("%s for the smallest keep with room to work", mib(leastFree))
		c.Or = "put it elsewhere: overkeep init --on-image FILE, or --root DIR"
	default:
		c.Found = mib(f.free)
	}
	return c
}

func mib(n int64) string {
	if n >= 10<<30 {
		return fmt.Sprintf("%d GiB", n>>30)
	}
	return fmt.Sprintf("%d MiB", n>>20)
}

// stairsCheck: Nix 2.30 and later refuse to build below a directory that others
// may write to, or below a symbolic link, and another user could swap a part.
func (f fsFacts) stairsCheck() Check {
	c := Check{Name: "parent directories", Answer: Yes, Needed: true, Found: f.run + ", " + f.state}
	if len(f.stairs) == 0 {
		c.Answer, c.Found, c.Missing = Unsure, "", "the directories above "+quote(f.run)
	}
	for _, p := range f.stairs {
		who := "can be changed by others than root: no keep is opened below it"
		switch {
		case p.mode&fs.ModeSymlink != 0:
			c.Missing = quote(p.path) + " is a symbolic link; Nix does not build below one"
			c.Remedy = "overkeep doctor --root \"$(realpath " + quote(f.root) + ")\""
		case !p.mode.IsDir():
			c.Missing, c.Or = quote(p.path)+" is not a directory", "move it away, or choose another --root"
		case p.uid != 0:
			c.Missing = quote(p.path) + " belongs to uid " + fmt.Sprint(p.uid) + " and " + who
			c.Remedy = "chown root " + quote(p.path)
		case p.mode.Perm()&0o002 != 0:
			c.Missing = quote(p.path) + " " + who
			c.Remedy = "chmod o-w " + quote(p.path)
			if p.mode&fs.ModeSticky != 0 { // /tmp is so on purpose
				c.Remedy, c.Or = "", "choose another --root"
			}
		default:
			continue
		}
		c.Answer, c.Found = No, ""
		return c
	}
	return c
}

func (f fsFacts) trimCheck() Check {
	c := Check{Name: "freed blocks are discarded", Answer: Yes, Found: string(f.trim)}
	switch f.trim {
	case trimNow:
		c.Found = "at once, by the mount option discard"
	case trimWeekly:
		c.Found = "by fstrim.timer"
	case trimUnable:
		c.Found = "the device does not know of it"
	case trimNever:
		c.Answer, c.Found = No, ""
		c.Missing = "discarding: what a seal moves into the keep may stay readable in freed blocks for long"
		c.Remedy = "systemctl enable --now fstrim.timer"
	default:
		c.Answer, c.Missing = Unsure, "the mount options of "+quote(f.at)
	}
	return c
}
