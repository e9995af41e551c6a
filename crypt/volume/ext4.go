package volume

import (
	"bytes"
	"context"
	"crypto/sha256"
	"encoding/binary"
	"encoding/hex"
	"errors"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"strconv"

	"golang.org/x/sys/unix"
)

// fsLabel is the label of a filesystem that lives in Spec.FSImage. The inner
// filesystem has none: udev would publish it.
const fsLabel = "overkeep-fs"

// overhead is what a filesystem of n bytes of content needs beyond them:
// inode tables (256 bytes for each 16 KiB), journal, bitmaps, descriptors.
func overhead(n int64) int64 { return 64<<20 + n/32 }

// Every feature is named and the machine's mke2fs.conf is left out, so that a
// volume is the same wherever it was made and mounts on every kernel that has
// v2 policies.
const features = "none,has_journal,ext_attr,resize_inode,dir_index,filetype,extent,64bit,flex_bg," +
	"sparse_super,large_file,huge_file,dir_nlink,extra_isize,metadata_csum"

// mkfs makes an ext4 in f, a new file of zeros. That is why inode tables and
// journal are not written: they would be zeros over zeros, 1.6 % of the size,
// each through the cipher. For the same reason the mount says noinit_itable.
// nodiscard keeps preallocated blocks. No block is reserved for root (-m 0).
func mkfs(ctx context.Context, f *os.File, args ...string) error {
	all := append([]string{
		"-q", "-F", "-t", "ext4", "-b", "4096", "-I", "256", "-i", "16384", "-m", "0",
		"-E", "nodiscard,lazy_itable_init=1,lazy_journal_init=1",
	}, args...)
	cmd, err := tool(ctx, "mke2fs", append(all, "/proc/self/fd/3")...)
	if err != nil {
		return err
	}
	cmd.ExtraFiles = []*os.File{f}
	out, err := cmd.CombinedOutput()
	if err == nil {
		return nil
	}
	// mke2fs has but one exit status; ask the filesystem whether it is full.
	var st unix.Statfs_t
	if unix.Fstatfs(int(f.Fd()), &st) == nil && int64(st.Bavail)*st.Bsize < 1<<20 {
		err = fmt.Errorf("%w (%w)", unix.ENOSPC, err)
	}
	return &ToolError{Tool: "mke2fs", Output: tail(quiet(out), 300), Err: err}
}

// quiet drops what mke2fs says about a configuration that has no types in it.
func quiet(out []byte) []byte {
	var kept []byte
	for l := range bytes.Lines(out) {
		if !bytes.Contains(l, []byte("mke2fs.conf")) {
			kept = append(kept, l...)
		}
	}
	return kept
}

// fsck repairs what can be repaired without a question. Its output is thrown
// away: it names files of the volume. Exit status 0 and 1 mean clean (e2fsck(8)).
func fsck(ctx context.Context, dev string) error {
	cmd, err := tool(ctx, "e2fsck", "-p", dev)
	if err != nil {
		return err
	}
	err = cmd.Run()
	if exit := (*exec.ExitError)(nil); errors.As(err, &exit) && exit.ExitCode() == 1 {
		return nil
	}
	if err != nil {
		return &ToolError{Tool: "e2fsck", Err: err}
	}
	return nil
}

// tool finds a program of e2fsprogs, first where the system keeps it, then in
// PATH, and gives it an environment of its own.
func tool(ctx context.Context, name string, args ...string) (*exec.Cmd, error) {
	const sbin = "/usr/sbin:/sbin:/usr/local/sbin:/run/current-system/sw/bin"
	var path string
	err := exec.ErrNotFound
	for _, d := range filepath.SplitList(sbin) {
		if path, err = exec.LookPath(filepath.Join(d, name)); err == nil {
			break
		}
	}
	if err != nil {
		path, err = exec.LookPath(name)
	}
	if err != nil {
		return nil, &ToolError{Tool: name, Err: exec.ErrNotFound}
	}
	cmd := exec.CommandContext(ctx, path, args...)
	cmd.Env = []string{"PATH=" + sbin + ":/usr/bin:/bin", "LC_ALL=C", "MKE2FS_CONFIG=/dev/null"}
	return cmd, nil
}

// superblock is what we read of an ext4 superblock (ext4(5), kernel's
// Documentation/filesystems/ext4/super.rst).
type superblock struct {
	UUID    string // hex
	Label   string
	Blocks  uint64
	Encrypt bool // feature flag
	Errors  bool // the kernel found errors, or the volume has no journal and was not unmounted
}

// parseSuperblock reads the 1024 bytes at offset 1024.
func parseSuperblock(b []byte) (superblock, error) {
	const (
		stateValid, stateError        = 1, 2
		compatJournal                 = 0x4
		incompat64bit, incompatCipher = 0x80, 0x10000
	)
	if len(b) != 1024 {
		return superblock{}, fmt.Errorf("superblock of %d bytes", len(b))
	}
	le := binary.LittleEndian
	if le.Uint16(b[0x38:]) != 0xEF53 {
		return superblock{}, errors.New("no ext4 superblock")
	}
	state, compat, incompat := le.Uint16(b[0x3A:]), le.Uint32(b[0x5C:]), le.Uint32(b[0x60:])
	label, _, _ := bytes.Cut(b[0x78:0x88], []byte{0})
	s := superblock{
		UUID:    hex.EncodeToString(b[0x68:0x78]),
		Label:   string(label),
		Blocks:  uint64(le.Uint32(b[0x4:])),
		Encrypt: incompat&incompatCipher != 0,
		Errors:  state&stateError != 0 || state&stateValid == 0 && compat&compatJournal == 0,
	}
	if incompat&incompat64bit != 0 {
		s.Blocks |= uint64(le.Uint32(b[0x150:])) << 32
	}
	return s, nil
}

func readSuperblock(f *os.File) (superblock, error) {
	b := make([]byte, 1024)
	if _, err := f.ReadAt(b, 1024); err != nil {
		return superblock{}, err
	}
	return parseSuperblock(b)
}

// fsUUID is the UUID of the ext4 in an FSImage. It is derived from the
// protector, so that Cleanup and Destroy know our file from somebody else's
// without mounting it. RFC 9562, version 8.
func fsUUID(protector string) string {
	h := sha256.Sum256([]byte("overkeep fsimage\x00" + protector))
	h[6], h[8] = h[6]&0x0f|0x80, h[8]&0x3f|0x80
	return hex.EncodeToString(h[:16])
}

func dashed(uuid string) string {
	return uuid[:8] + "-" + uuid[8:12] + "-" + uuid[12:16] + "-" + uuid[16:20] + "-" + uuid[20:]
}

// newImage makes f a new file of size bytes with an ext4 in it, and writes it
// to the device.
func newImage(ctx context.Context, f *os.File, size int64, preallocate bool, args ...string) error {
	size = (size + 4095) / 4096 * 4096
	if err := f.Truncate(size); err != nil {
		return err
	}
	if preallocate {
		if err := unix.Fallocate(int(f.Fd()), 0, 0, size); err != nil {
			return fmt.Errorf("reserve %s bytes: %w", strconv.FormatInt(size, 10), err)
		}
	}
	if err := mkfs(ctx, f, args...); err != nil {
		return err
	}
	return f.Sync()
}

// mountFlags: no device nodes and no setuid programs come out of a volume.
// Programs do: a store is full of them.
const mountFlags = unix.MS_NODEV | unix.MS_NOSUID | unix.MS_NOATIME

// mountImage mounts the ext4 in f at the directory target. A filesystem that was
// not unmounted is no reason for e2fsck: mount(2) replays the journal. Only
// when the kernel had noted an error in the superblock is it run first.
func mountImage(ctx context.Context, f, target *os.File) error {
	sb, err := readSuperblock(f)
	if err != nil {
		return &DamagedError{What: fmt.Sprintf("image %q", f.Name()), Err: err}
	}
	dev, err := attachLoop(f)
	if err != nil {
		return err
	}
	defer dev.Close() // from here on the mount holds the device
	if sb.Errors {
		if err := fsck(ctx, dev.Name()); err != nil {
			return &DamagedError{What: fmt.Sprintf("filesystem in %q", f.Name()), Err: err}
		}
	}
	crash("volume.open.mount")
	// errors=remount-ro: a damaged filesystem is not made worse.
	err = unix.Mount(dev.Name(), procFD(int(target.Fd())), "ext4", mountFlags, "noinit_itable,errors=remount-ro")
	switch {
	case errors.Is(err, unix.EUCLEAN), errors.Is(err, unix.EBADMSG), errors.Is(err, unix.EINVAL):
		return &DamagedError{What: fmt.Sprintf("filesystem in %q", f.Name()), Err: err}
	}
	return step("mount at", target.Name(), err)
}
