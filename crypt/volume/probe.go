package volume

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"io"
	"os"
	"path/filepath"
	"strings"

	"github.com/google/fscrypt/crypto"
	"github.com/google/fscrypt/metadata"
	"github.com/moby/sys/mountinfo"
	"golang.org/x/sys/unix"
)

// Answer is the answer of a probe.
type Answer string

// The three answers. Unsure is no weaker No: the probe itself could not run.
const (
	Yes    Answer = "yes"
	No     Answer = "no"
	Unsure Answer = "could not tell"
)

// Result is what a probe found. Missing and Remedy are empty after Yes.
type Result struct {
	Answer  Answer `json:"answer"`
	Missing string `json:"missing,omitempty"` // what is missing, in words
	Remedy  string `json:"remedy,omitempty"`  // a command or option to paste; "" if none is known
	Err     error  `json:"-"`                 // the kernel's word
}

const onImage = "--on-image FILE"

// Probe tells whether the filesystem of the directory dir can hold a volume, by
// trying: it makes a directory in dir, encrypts it with a throw-away key, writes
// and reads a file, removes the key, looks for ciphertext, and deletes it all.
func Probe(dir string) Result {
	parent, err := os.OpenFile(dir, unix.O_DIRECTORY|unix.O_CLOEXEC, 0)
	if err != nil {
		return explain(err, facts{})
	}
	defer parent.Close()
	return probe(live, parent, factsOf(parent))
}

// ProbeThrowaway makes a small ext4 image in dir, mounts it for a moment in the
// current namespace and probes that: it tells whether an FSImage would do.
func ProbeThrowaway(ctx context.Context, dir string) Result {
	var r Result
	err := func() (err error) {
		parent, err := os.OpenFile(dir, unix.O_DIRECTORY|unix.O_CLOEXEC, 0)
		if err != nil {
			return err
		}
		defer parent.Close()
		sweepProbes(parent)
		held, err := makeProbe(parent)
		if err != nil {
			return err
		}
		defer held.Close()
		d := filepath.Join(dir, filepath.Base(held.Name()))
		// os.Remove, never recursively: a failed unmount must not become a deletion.
		defer func() { err = errors.Join(err, os.Remove(d)) }()
		name := filepath.Join(d, "img")
		f, err := os.OpenFile(name, unix.O_CREAT|unix.O_EXCL|unix.O_RDWR|unix.O_NOFOLLOW|unix.O_CLOEXEC, 0o600)
		if err != nil {
			return err
		}
		defer f.Close()
		if err := os.Remove(name); err != nil {
			return err
		}
		if err := newImage(ctx, f, 2*MinSize, false, "-O", features+",encrypt"); err != nil {
			return err
		}
		target, _, err := mountpoint(d)
		if err != nil {
			return err
		}
		defer target.Close()
		if err := mountImage(ctx, f, target); err != nil {
			return err
		}
		defer func() { err = errors.Join(err, Unmount(d)) }()
		r = Probe(d)
		return nil
	}()
	if err != nil {
		return Result{Answer: Unsure, Missing: err.Error(), Err: err}
	}
	if r.Remedy == onImage { // that is what was just tried
		r.Remedy = ""
	}
	return r
}

// probePrefix begins the names of what a probe makes.
const probePrefix = ".overkeep-probe-"

// makeProbe makes a directory for a probe in parent and locks it (flock(2)), which
// tells sweepProbes that its maker lives. One that a sweep meets before it is
// locked is lost, and made again.
func makeProbe(parent *os.File) (*os.File, error) {
	for {
		path, err := os.MkdirTemp(procFD(int(parent.Fd())), probePrefix)
		if err != nil {
			return nil, err
		}
		d, err := openBeneath(parent, filepath.Base(path), unix.O_DIRECTORY)
		if errors.Is(err, os.ErrNotExist) {
			continue
		}
		if err != nil {
			return nil, errors.Join(err, unix.Unlinkat(int(parent.Fd()), filepath.Base(path), unix.AT_REMOVEDIR))
		}
		var st unix.Stat_t
		err = unix.Flock(int(d.Fd()), unix.LOCK_EX|unix.LOCK_NB)
		if err == nil {
			err = unix.Fstat(int(d.Fd()), &st)
		}
		if err == nil && st.Nlink > 0 {
			return d, nil
		}
		d.Close()
		if err != nil && !errors.Is(err, unix.EWOULDBLOCK) {
			return nil, errors.Join(err, unix.Unlinkat(int(parent.Fd()), filepath.Base(path), unix.AT_REMOVEDIR))
		}
	}
}

// SweepProbes removes from dir what probes left that were killed. Every Probe does
// that where it runs; this is for where it ran before. The throw-away keys of
// killed probes stay in the kernel until the filesystem is unmounted: nothing but
// what is removed here was ever encrypted with them.
func SweepProbes(dir string) {
	if parent, err := os.OpenFile(dir, unix.O_DIRECTORY|unix.O_CLOEXEC, 0); err == nil {
		sweepProbes(parent)
		parent.Close()
	}
}

func sweepProbes(parent *os.File) {
	d, err := openBeneath(parent, ".", unix.O_DIRECTORY)
	if err != nil {
		return
	}
	defer d.Close()
	names, _ := d.Readdirnames(-1)
	for _, n := range names {
		if !strings.HasPrefix(n, probePrefix) {
			continue
		}
		if f, err := openBeneath(parent, n, unix.O_DIRECTORY); err == nil {
			if unix.Flock(int(f.Fd()), unix.LOCK_EX|unix.LOCK_NB) == nil {
				_ = removeTree(parent, n, 0)
			}
			f.Close()
		}
	}
}

// probe tries it in a directory of its own. What is encrypted lies one deeper: the
// lock must be held all the time, and an encrypted directory that is open keeps
// its key busy.
func probe(k kernel, parent *os.File, f facts) (r Result) {
	sweepProbes(parent)
	own, err := makeProbe(parent)
	if err != nil {
		return explain(err, f)
	}
	defer own.Close()
	defer func() {
		if err := removeTree(parent, filepath.Base(own.Name()), 0); err != nil && r.Answer == Yes {
			r = explain(err, f)
		}
	}()
	const name = "dir"
	if err := unix.Mkdirat(int(own.Fd()), name, 0o700); err != nil {
		return explain(err, f)
	}
	key, err := crypto.NewRandomKey(metadata.PolicyKeyLen)
	if err != nil {
		return explain(err, f)
	}
	defer key.Wipe()
	desc, err := crypto.ComputeKeyDescriptor(key, 2)
	if err != nil {
		return explain(err, f)
	}
	const file = "probe"
	added := false
	err = func() error {
		d, err := openBeneath(own, name, unix.O_DIRECTORY)
		if err != nil {
			return err
		}
		defer d.Close()
		if err := k.setPolicy(int(d.Fd()), desc); err != nil {
			return err
		}
		if err := k.addKey(int(parent.Fd()), desc, key); err != nil {
			return err
		}
		added = true
		return writeAndRead(d, file)
	}()
	if added {
		ctx, cancel := context.WithTimeout(context.Background(), graceKey)
		defer cancel()
		if rerr := removeKeyWait(ctx, k, parent, ID{Policy: desc}); err == nil {
			err = rerr
		}
	}
	if err != nil {
		return explain(err, f)
	}
	d, err := openBeneath(own, name, unix.O_DIRECTORY)
	if err != nil {
		return explain(err, f)
	}
	defer d.Close()
	if err := proveCiphertext(d, parent.Name(), []string{file}); err != nil {
		return Result{Answer: No, Missing: "encryption that hides what is locked: " + err.Error(), Remedy: f.image(), Err: err}
	}
	return Result{Answer: Yes}
}

func writeAndRead(dir *os.File, name string) error {
	want := []byte(strings.Repeat("overkeep probe\n", 8))
	fd, err := unix.Openat(int(dir.Fd()), name, unix.O_CREAT|unix.O_EXCL|unix.O_RDWR|unix.O_CLOEXEC, 0o600)
	if err != nil {
		return &os.PathError{Op: "create", Path: filepath.Join(dir.Name(), name), Err: err}
	}
	f := os.NewFile(uintptr(fd), filepath.Join(dir.Name(), name))
	defer f.Close()
	if _, err := f.Write(want); err != nil {
		return err
	}
	if err := f.Sync(); err != nil {
		return err
	}
	got, err := io.ReadAll(io.NewSectionReader(f, 0, 1<<16))
	if err != nil {
		return err
	}
	if !bytes.Equal(got, want) {
		return errors.New("a file reads back changed")
	}
	return nil
}

// facts is what the explanation of an error needs to know of a filesystem.
type facts struct {
	Type   string // "ext4"
	Device string // "/dev/sda2"; "" if there is none
	Kernel Answer // was the kernel built with encryption for this type?
}

// image is the remedy of a filesystem that cannot do it; none where the kernel
// could not encrypt an image either.
func (f facts) image() string {
	if f.Kernel == No {
		return ""
	}
	return onImage
}

func factsOf(dir *os.File) facts {
	f := facts{Kernel: Unsure}
	m, err := mountOf(dir)
	if err != nil {
		return f
	}
	f.Type, f.Device = m.FSType, deviceOf(m)
	f.Kernel = kernelOption(m)
	return f
}

// kernelOption looks at /sys/fs/TYPE/features, which lists what the kernel was
// built with, whatever the flags of one filesystem.
func kernelOption(m *mountinfo.Info) Answer {
	dir := filepath.Join("/sys/fs", m.FSType, "features")
	if m.FSType != "ext4" && m.FSType != "f2fs" {
		return Unsure
	}
	if _, err := os.Stat(dir); err != nil {
		return Unsure
	}
	if _, err := os.Stat(filepath.Join(dir, "encryption")); err != nil {
		return No
	}
	return Yes
}

// explain turns what went wrong while trying into an answer. The errors are
// those of FS_IOC_SET_ENCRYPTION_POLICY and FS_IOC_ADD_ENCRYPTION_KEY in
// Documentation/filesystems/fscrypt.rst.
func explain(err error, f facts) Result {
	no := func(missing, remedy string) Result {
		return Result{Answer: No, Missing: missing, Remedy: remedy, Err: err}
	}
	unsure := func(missing string) Result { return Result{Answer: Unsure, Missing: missing, Err: err} }
	knows := f.Type == "ext4" || f.Type == "f2fs" || f.Type == "ubifs" || f.Type == "ceph"
	switch errnoOf(err) {
	case unix.ENOTTY: // the filesystem, or this old kernel's version of it, has no such call
		if knows {
			return no(fmt.Sprintf("a kernel with v2 encryption policies for %s (Linux 5.4)", f.Type), "")
		}
		return no(fmt.Sprintf("encryption in the filesystem type %q", f.Type), f.image())
	case unix.EOPNOTSUPP: // it has the call, but is not allowed to
		if f.Kernel == No {
			return no("the kernel option CONFIG_FS_ENCRYPTION", "")
		}
		missing := fmt.Sprintf("the feature flag \"encrypt\" of the %s on %s", f.Type, f.Device)
		switch {
		case f.Type == "ext4" && strings.HasPrefix(f.Device, "/dev/"):
			return no(missing, "tune2fs -O encrypt "+f.Device)
		case f.Type == "f2fs" && strings.HasPrefix(f.Device, "/dev/"):
			return no(missing, "fsck.f2fs -O encrypt "+f.Device)
		}
		return no(missing, f.image())
	case unix.EINVAL:
		return no("v2 encryption policies with AES-256-XTS (Linux 5.4)", "")
	case unix.ENOPKG:
		return no("the kernel's AES-256-XTS and AES-256-CTS (CONFIG_FS_ENCRYPTION_ALGS, CONFIG_CRYPTO_XTS, CONFIG_CRYPTO_CTS)", "")
	case unix.EEXIST:
		return no("a directory that is not encrypted already", f.image())
	case unix.ENOSPC, unix.EDQUOT:
		return unsure("free space")
	case unix.EROFS:
		return unsure("a writable filesystem")
	case unix.EACCES, unix.EPERM:
		return unsure("permission; root is needed")
	case unix.ENOENT:
		return unsure("the directory itself")
	}
	if busy := (*BusyError)(nil); errors.As(err, &busy) {
		return unsure("an end to " + busy.What)
	}
	return unsure(fmt.Sprint(err))
}

// unsupported is explain as an error of Create.
func unsupported(dir *os.File, errno unix.Errno) error {
	r := explain(errno, factsOf(dir))
	return &UnsupportedError{Path: dir.Name(), Missing: r.Missing, Remedy: r.Remedy, Err: errno}
}
