package doctor

import (
	"context"
	"fmt"
	"os"
	"path/filepath"
	"strings"

	"overkeep/overlay/layout"
)

func probeSafety(_ context.Context, c Config) safetyFacts {
	var s safetyFacts
	tree := map[string]block{}
	if b, err := readBounded("/proc/swaps"); err != nil {
		s.swapErr = err
	} else {
		list, err := parseSwaps(b)
		s.swapErr = err
		for _, w := range list {
			s.swaps = append(s.swaps, swapFacts{w.Path, swapSafe(tree, w)})
		}
	}
	s.probeHibernation(tree)
	if m, err := mountOf(existing(layout.StateRoot(c.Root))); err == nil {
		s.fsType = m.FSType
		if name := deviceName(m); name != "" {
			s.device = "/dev/" + name
			grow(tree, name, maxDepth)
			s.fullDisk = encrypted(tree, name)
		}
	}
	s.probeDumps()
	return s
}

func swapSafe(tree map[string]block, w swap) Answer {
	name := ""
	if w.File && !w.Deleted {
		if m, err := mountOf(w.Path); err == nil {
			name = deviceName(m)
		}
	} else if !w.File {
		name = deviceFile(w.Path)
	}
	if name == "" {
		return Unsure
	}
	grow(tree, name, maxDepth)
	return encrypted(tree, name)
}

// probeHibernation asks the kernel for the device it would wake up from, which
// it has resolved itself, beside what the command line and systemd say.
func (s *safetyFacts) probeHibernation(tree map[string]block) {
	b, err := readBounded("/sys/power/state")
	s.canSleep = err == nil && strings.Contains(" "+strings.TrimSpace(string(b))+" ", " disk ")
	if b, err := readBounded("/proc/cmdline"); err == nil {
		s.resume = resumes(b)
	}
	for _, d := range []string{"/etc/systemd/system", "/run/systemd/system"} {
		to, err := os.Readlink(d + "/hibernate.target")
		s.masked = s.masked || err == nil && to == "/dev/null"
	}
	b, err = readBounded("/sys/power/resume")
	if err != nil {
		return
	}
	var major, minor uint32
	if n, err := fmt.Sscanf(string(b), "%d:%d", &major, &minor); n != 2 || err != nil || major == 0 && minor == 0 {
		return
	}
	s.resumeOn = Unsure
	if name := nodeName(major, minor); name != "" {
		grow(tree, name, maxDepth)
		s.resumeOn = encrypted(tree, name)
	}
}

func (s *safetyFacts) probeDumps() {
	b, err := readBounded("/proc/sys/kernel/core_pattern")
	if err != nil {
		s.dumpsErr = err
		return
	}
	pid, err := readBounded("/proc/sys/kernel/core_uses_pid")
	s.dumps = coreDumps(b, err != nil || strings.TrimSpace(string(pid)) != "0")
	s.dumpStored = true
	// Drop-ins first, the last name wins, then the file (coredump.conf(5)).
	var files []string
	for _, d := range []string{"/usr/lib/systemd", "/etc/systemd", "/run/systemd"} {
		more, _ := filepath.Glob(d + "/coredump.conf.d/*.conf")
		files = append(files, more...)
	}
	for _, f := range append([]string{"/etc/systemd/coredump.conf"}, files...) {
		b, err := readBounded(f)
		if err != nil {
			continue
		}
		for l := range strings.Lines(string(b)) {
			if v, ok := strings.CutPrefix(strings.TrimSpace(l), "Storage="); ok {
				s.dumpStored = strings.TrimSpace(v) != "none"
			}
		}
	}
}

// grow adds a block device, and all that it lies on, to the tree.
func grow(tree map[string]block, name string, depth int) {
	if _, seen := tree[name]; seen || depth == 0 || name == "" || strings.Contains(name, "/") {
		return
	}
	dir, err := filepath.EvalSymlinks(filepath.Join("/sys/class/block", name))
	if err != nil {
		return
	}
	var b block
	read := func(file string) string {
		v, _ := readBounded(filepath.Join(dir, file))
		return strings.TrimSpace(string(v))
	}
	b.uuid = read("dm/uuid")
	if strings.HasPrefix(name, "zram") {
		back := read("backing_dev")
		if b.ram = back == "" || back == "none"; !b.ram {
			b.below = append(b.below, deviceFile(back))
		}
	}
	if entries, err := os.ReadDir(filepath.Join(dir, "slaves")); err == nil {
		for _, e := range entries {
			b.below = append(b.below, e.Name())
		}
	}
	if _, err := os.Stat(filepath.Join(dir, "partition")); err == nil {
		b.below = append(b.below, filepath.Base(filepath.Dir(dir)))
	}
	if file := read("loop/backing_file"); file != "" {
		b.below = append(b.below, fileDevice(file))
	}
	tree[name] = b
	for _, n := range b.below {
		grow(tree, n, depth-1)
	}
}

// fileDevice is the device on which a file lies; "" (which is nobody's name, and
// so unknown) if it cannot be told.
func fileDevice(path string) string {
	m, err := mountOf(path)
	if err != nil {
		return ""
	}
	return deviceName(m)
}
