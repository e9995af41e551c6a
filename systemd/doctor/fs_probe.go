package doctor

import (
	"context"
	"errors"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"strings"

	"github.com/moby/sys/mountinfo"
	"golang.org/x/sys/unix"

	"overkeep/crypt/volume"
	"overkeep/overlay/layout"
	"overkeep/overlay/view"
)

func probeFS(ctx context.Context, c Config) fsFacts {
	f := fsFacts{root: c.Root, state: layout.StateRoot(c.Root), run: layout.RunRoot(c.Root), free: -1, tools: missingTools()}
	f.at = existing(f.state)
	f.stairs = stairs(f.state, f.run)
	var st unix.Statfs_t
	if unix.Statfs(f.at, &st) == nil {
		f.free = int64(min(st.Bfree, 1<<62/uint64(max(st.Bsize, 1)))) * max(st.Bsize, 1)
	}
	m, _ := mountOf(f.at)
	if m != nil {
		f.fsType = m.FSType
		if name := deviceName(m); name != "" {
			f.device = "/dev/" + name
		}
	}
	f.trim = probeTrim(ctx, m)
	if os.Geteuid() != 0 || f.at == "" {
		return f
	}
	trials.Lock()
	defer trials.Unlock()
	f.encryption = volume.Probe(f.at)
	f.exchange, f.overlay = tryBeside(f.at)
	return f
}

// missingTools looks for mke2fs and e2fsck where crypt/volume does.
func missingTools() (missing []string) {
	dirs := append(filepath.SplitList(os.Getenv("PATH")), "/usr/sbin", "/sbin", "/usr/local/sbin", "/run/current-system/sw/bin")
	for _, name := range []string{"mke2fs", "e2fsck"} {
		if findIn(dirs, name) == "" {
			missing = append(missing, name)
		}
	}
	return missing
}

func findIn(dirs []string, name string) string {
	for _, d := range dirs {
		p := filepath.Join(d, name)
		if fi, err := os.Stat(p); filepath.IsAbs(d) && err == nil && fi.Mode().IsRegular() && fi.Mode()&0o111 != 0 {
			return p
		}
	}
	return ""
}

// existing is dir or its nearest ancestor that is there.
func existing(dir string) string {
	for {
		if fi, err := os.Stat(dir); err == nil && fi.IsDir() {
			return dir
		} else if err != nil && !errors.Is(err, os.ErrNotExist) {
			return ""
		}
		if dir == "/" {
			return ""
		}
		dir = filepath.Dir(dir)
	}
}

// stairs lists what exists of the given directories and above them.
func stairs(dirs ...string) []pathFacts {
	var out []pathFacts
	seen := map[string]bool{}
	for _, d := range dirs {
		for ; !seen[d]; d = filepath.Dir(d) {
			seen[d] = true
			var st unix.Stat_t
			if fi, err := os.Lstat(d); err == nil && unix.Lstat(d, &st) == nil {
				out = append(out, pathFacts{d, fi.Mode(), st.Uid})
			}
		}
	}
	return out
}

// mountOf is the row of the mount table in which dir lies.
func mountOf(dir string) (*mountinfo.Info, error) {
	var st unix.Statx_t
	if err := unix.Statx(unix.AT_FDCWD, dir, unix.AT_NO_AUTOMOUNT, unix.STATX_MNT_ID, &st); err != nil {
		return nil, &os.PathError{Op: "statx", Path: dir, Err: err}
	}
	rows, err := mountinfo.GetMounts(func(m *mountinfo.Info) (skip, stop bool) { return uint64(m.ID) != st.Mnt_id, false })
	if err != nil {
		return nil, err
	}
	if len(rows) == 0 {
		return nil, fmt.Errorf("the mount of %q is not in the mount table", dir)
	}
	return rows[0], nil
}

// deviceName is the kernel's name ("dm-0") of the device of a mount; "" if it has
// none. btrfs shows a made-up number, but the source.
func deviceName(m *mountinfo.Info) string {
	if name := nodeName(uint32(m.Major), uint32(m.Minor)); name != "" {
		return name
	}
	if !strings.HasPrefix(m.Source, "/dev/") {
		return ""
	}
	return deviceFile(m.Source)
}

// deviceFile is the kernel's name of a block device file.
func deviceFile(path string) string {
	var st unix.Stat_t
	if unix.Stat(path, &st) != nil || st.Mode&unix.S_IFMT != unix.S_IFBLK {
		return ""
	}
	return nodeName(unix.Major(st.Rdev), unix.Minor(st.Rdev))
}

func nodeName(major, minor uint32) string {
	to, err := os.Readlink(fmt.Sprintf("/sys/dev/block/%d:%d", major, minor))
	if err != nil {
		return ""
	}
	return filepath.Base(to)
}

func probeTrim(ctx context.Context, m *mountinfo.Info) trim {
	if m == nil {
		return trimUnknown
	}
	for o := range strings.SplitSeq(m.Options+","+m.VFSOptions, ",") {
		if o == "discard" || strings.HasPrefix(o, "discard=") {
			return trimNow
		}
	}
	name := deviceName(m)
	if name == "" {
		return trimUnknown
	}
	dir, err := filepath.EvalSymlinks(filepath.Join("/sys/class/block", name))
	if err != nil {
		return trimUnknown
	}
	for _, d := range []string{dir, filepath.Dir(dir)} { // a partition's queue is its disk's
		b, err := readBounded(filepath.Join(d, "queue/discard_max_bytes"))
		if err != nil {
			continue
		}
		if strings.TrimSpace(string(b)) == "0" {
			return trimUnable
		}
		if _, err := output(exec.CommandContext(ctx, "systemctl", "is-enabled", "--quiet", "fstrim.timer")); err == nil {
			return trimWeekly
		}
		return trimNever
	}
	return trimUnknown
}

// tryBeside makes a directory next to the state of the keeps, exchanges two
// directories in it, and mounts an overlay on it in a private namespace. It is
// taken down with rmdir alone.
func tryBeside(at string) (exchange, overlay outcome) {
	dir, err := os.MkdirTemp(at, ".overkeep-doctor-")
	if err != nil {
		return ended(err), ended(err)
	}
	made := []string{dir}
	defer func() {
		for i := len(made) - 1; i >= 0; i-- {
			if err := os.Remove(made[i]); err != nil && exchange.err == nil {
				exchange = ended(err)
			}
		}
	}()
	sub := func(name string) string { return filepath.Join(dir, name) }
	for _, n := range []string{"lower", "upper", "work", "merged"} {
		if err := os.Mkdir(sub(n), 0o700); err != nil {
			return ended(err), ended(err)
		}
		made = append(made, sub(n))
	}
	exchange = ended(unix.Renameat2(unix.AT_FDCWD, sub("upper"), unix.AT_FDCWD, sub("work"), unix.RENAME_EXCHANGE))
	overlay = ended(privately(func() error {
		m, err := overlayMount(sub("lower"), sub("upper"), sub("work"), sub("merged"))
		if err != nil {
			return err
		}
		if err := view.Make([]view.Mount{m}, view.User{}); err != nil {
			return err
		}
		err = os.Mkdir(filepath.Join(sub("merged"), "new"), 0o700)
		if err == nil {
			err = os.Remove(filepath.Join(sub("merged"), "new"))
		}
		return errors.Join(err, undo(m))
	}))
	// overlayfs leaves its own empty directory in the work directory.
	if err := os.Remove(filepath.Join(sub("work"), "work")); err != nil && !errors.Is(err, os.ErrNotExist) {
		overlay = ended(errors.Join(overlay.err, err))
	}
	return exchange, overlay
}

// privately runs f on a thread in a mount namespace that ends with it.
func privately(f func() error) error {
	ns, err := view.NewNamespace()
	if err != nil {
		return err
	}
	defer ns.Close()
	return ns.Do(f)
}
