package volume

import (
	"bytes"
	"errors"
	"log"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"testing"

	"github.com/google/fscrypt/metadata"
	"golang.org/x/sys/unix"

	"overkeep/tests/need"
)

// Every shape of a volume is created closed, opens, keeps what is written, locks
// with proof and opens again; the raw device never shows content, nor (image)
// names; and after Destroy nothing is left.
func TestLifecycle(t *testing.T) {
	need.Encryption(t)
	for name := range specs(device{}) {
		t.Run(name, func(t *testing.T) {
			d := newDevice(t, 512<<20, "-O", "encrypt")
			s, m := specs(d)[name], newMaster(t)
			const content, file = "canary-content-7Vq2", "canary-name-x81Zt"
			// A control: what is written in the open is found.
			if err := os.WriteFile(filepath.Join(d.mnt, "plain-8sK1"), []byte("plain-content-8sK1"), 0o600); err != nil {
				t.Fatal(err)
			}
			if rawHits(t, d.raw, "plain-content-8sK1") == 0 || rawHits(t, d.raw, "plain-8sK1") == 0 {
				t.Fatal("the search does not find plaintext")
			}
			id := mustCreate(t, s, m)
			if want, _ := ProtectorDescriptor(m); id.Protector != want || id.check() != nil {
				t.Fatalf("id %+v, want protector %s", id, want)
			}
			mustStatus(t, s, id, Absent)
			target := filepath.Join(t.TempDir(), "k")
			mustOpen(t, s, id, m, target)
			mustStatus(t, s, id, Present)
			path := filepath.Join(target, file)
			if err := os.WriteFile(path, []byte(strings.Repeat(content+"\n", 5000)), 0o600); err != nil {
				t.Fatal(err)
			}
			if err := os.Symlink(content, filepath.Join(target, "link")); err != nil {
				t.Fatal(err)
			}
			if err := ProveLocked(s, id, file); !errors.As(err, new(*NotLockedError)) {
				t.Fatalf("proof of an open volume: %v", err)
			}
			if err := Open(ctxT(t), s, id, m, target); !errors.As(err, new(*ExistsError)) {
				t.Fatalf("second open at the same place: %v", err)
			}
			mustStatus(t, s, id, Present)
			var st unix.Statfs_t
			if err := unix.Statfs(target, &st); err != nil || st.Flags&(unix.ST_NODEV|unix.ST_NOSUID|unix.ST_NOATIME) != unix.ST_NODEV|unix.ST_NOSUID|unix.ST_NOATIME || st.Flags&unix.ST_NOEXEC != 0 {
				t.Errorf("mount flags %#x (%v)", st.Flags, err)
			}
			search := func(when string) {
				t.Helper()
				if n := rawHits(t, d.raw, content); n != 0 {
					t.Errorf("%s: content is on the device %d times", when, n)
				}
				if n := rawHits(t, d.raw, file); n != 0 {
					t.Errorf("%s: a name is on the device %d times", when, n)
				}
			}
			search("open")
			mustLock(t, s, id, target, file)
			search("locked")

			mustOpen(t, s, id, m, target)
			if b, err := os.ReadFile(path); err != nil || bytes.Count(b, []byte(content)) != 5000 {
				t.Errorf("read back: %d bytes, %v", len(b), err)
			}
			if u, err := Usage(s, target); err != nil || u.Total == 0 || u.Free == 0 || s.Backend == Image && (u.Image != s.Size || u.ImageAllocated == 0 || u.ImageAllocated > s.Size) {
				t.Errorf("usage %+v, %v", u, err)
			}
			if s.FSImage == "" {
				if err := Destroy(ctxT(t), s, id); !errors.As(err, new(*BusyError)) {
					t.Errorf("destroy of an open volume: %v", err)
				}
			}
			mustLock(t, s, id, target, file)
			if u, err := Usage(s, target); err != nil || s.Backend == Image && s.FSImage == "" && u.Image != s.Size {
				t.Errorf("usage locked %+v, %v", u, err)
			}
			if err := Destroy(ctxT(t), s, id); err != nil {
				t.Fatalf("destroy: %v", err)
			}
			if err := Destroy(ctxT(t), s, id); err != nil {
				t.Errorf("destroy again: %v", err)
			}
			left := entries(t, d.mnt)
			allowed := []string{"plain-8sK1", "fs", ".fscrypt", ".fscrypt/policies", ".fscrypt/protectors"}
			for _, l := range left {
				if !slices.Contains(allowed, l) {
					t.Errorf("left after destroy: %s", l)
				}
			}
		})
	}
}

// The stock tool knows the directory and opens it with nothing but the raw key.
func TestStockTool(t *testing.T) {
	need.Encryption(t)
	need.Tool(t, "fscrypt")
	d := newDevice(t, 512<<20, "-O", "encrypt")
	overlayEtc(t)
	// Not by "fscrypt setup", which would make /.fscrypt on the machine's own root.
	conf, err := os.Create("/etc/fscrypt.conf")
	if err != nil {
		t.Fatal(err)
	}
	err = metadata.WriteConfig(&metadata.Config{
		Source:    metadata.SourceType_custom_passphrase,
		HashCosts: &metadata.HashingCosts{Time: 1, Memory: 1024, Parallelism: 1, TruncationFixed: true},
		Options:   actionsContext(nil).Config.Options,
	}, conf)
	if err := errors.Join(err, conf.Close()); err != nil {
		t.Fatal(err)
	}
	for _, b := range []Backend{Dir, Image} {
		t.Run(string(b), func(t *testing.T) {
			s, m := Spec{Backend: b, Dir: filepath.Join(d.mnt, "stock-"+string(b)), Size: 32 << 20}, newMaster(t)
			id, err := Create(ctxT(t), s, m, "keep "+string(b))
			if err != nil {
				t.Fatal(err)
			}
			target := filepath.Join(t.TempDir(), "k")
			mustOpen(t, s, id, m, target)
			if err := os.WriteFile(filepath.Join(target, "file"), []byte("by us"), 0o600); err != nil {
				t.Fatal(err)
			}
			mustLock(t, s, id, target, "file")

			out, err := exec.Command("fscrypt", "status", s.Dir).CombinedOutput()
			if err != nil || !strings.Contains(string(out), id.Policy) || !strings.Contains(string(out), id.Protector) || !strings.Contains(string(out), "Unlocked: No") {
				t.Errorf("fscrypt status: %v\n%s", err, out)
			}
			t.Logf("%s", out)
			key := filepath.Join(t.TempDir(), "raw")
			if err := os.WriteFile(key, m.Bytes(), 0o600); err != nil {
				t.Fatal(err)
			}
			if out, err := exec.Command("fscrypt", "unlock", s.Dir, "--key="+key).CombinedOutput(); err != nil {
				t.Fatalf("fscrypt unlock: %v\n%s", err, out)
			}
			mustStatus(t, s, id, Present)
			if b == Dir {
				if got, err := os.ReadFile(filepath.Join(s.Dir, "file")); string(got) != "by us" {
					t.Errorf("read through the stock tool: %q, %v", got, err)
				}
			} else if out, err := exec.Command("debugfs", "-R", "cat /file", filepath.Join(s.Dir, ImageName)).Output(); string(out) != "by us" {
				t.Errorf("read through the stock tool: %q, %v", out, err)
			}
			if out, err := exec.Command("fscrypt", "lock", s.Dir).CombinedOutput(); err != nil {
				t.Errorf("fscrypt lock: %v\n%s", err, out)
			}
			if err := ProveLocked(s, id, "file"); err != nil {
				t.Error(err)
			}
		})
	}
}

// overlayEtc lets the test write to /etc in its own namespace alone.
func overlayEtc(t *testing.T) {
	t.Helper()
	need.OverlayFS(t)
	if os.Getenv(envPrivate) == "" {
		t.Fatal("not in a private mount namespace")
	}
	dir := t.TempDir()
	if err := unix.Mount("tmpfs", dir, "tmpfs", 0, ""); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = unix.Unmount(dir, 0) })
	if err := errors.Join(os.Mkdir(dir+"/u", 0o755), os.Mkdir(dir+"/w", 0o755)); err != nil {
		t.Fatal(err)
	}
	if err := unix.Mount("overlay", "/etc", "overlay", 0, "lowerdir=/etc,upperdir="+dir+"/u,workdir="+dir+"/w"); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		if err := unix.Unmount("/etc", 0); err != nil {
			t.Error(err)
		}
	})
}

// An open file keeps the key: removal says so, the status is incomplete, there
// is no proof; after the close it completes.
func TestFilesBusy(t *testing.T) {
	d := newDevice(t, 256<<20, "-O", "encrypt")
	s, m := Spec{Backend: Dir, Dir: filepath.Join(d.mnt, "volume")}, newMaster(t)
	id := mustCreate(t, s, m)
	target := filepath.Join(t.TempDir(), "k")
	mustOpen(t, s, id, m, target)
	f, err := os.Create(filepath.Join(target, "held"))
	if err != nil {
		t.Fatal(err)
	}
	defer f.Close()
	if err := Unmount(target); !errors.As(err, new(*BusyError)) || !errors.Is(err, unix.EBUSY) {
		t.Fatalf("unmount with an open file: %v", err)
	}
	if err := unix.Unmount(target, unix.MNT_DETACH); err != nil {
		t.Fatal(err)
	}
	r, err := RemoveKey(s, id)
	if err != nil || !r.FilesBusy || r.OtherUsers {
		t.Fatalf("removal %+v, %v", r, err)
	}
	mustStatus(t, s, id, Incomplete)
	if err := ProveLocked(s, id, "held"); !errors.As(err, new(*NotLockedError)) {
		t.Fatalf("proof with an open file: %v", err)
	}
	f.Close()
	if err := RemoveKeyWait(ctxT(t), s, id); err != nil {
		t.Fatal(err)
	}
	mustStatus(t, s, id, Absent)
	if err := ProveLocked(s, id, "held"); err != nil {
		t.Fatal(err)
	}
	if r, err := RemoveKey(s, id); r != (Removal{}) || err != nil {
		t.Errorf("removal of an absent key: %+v, %v", r, err)
	}
	if err := Unmount(target); err != nil {
		t.Errorf("unmount of nothing: %v", err)
	}
}

// What fscrypt's packages write to the standard logger holds no key material.
func TestLogHoldsNoKey(t *testing.T) {
	d := newDevice(t, 256<<20, "-O", "encrypt")
	var b bytes.Buffer
	old := log.Writer()
	log.SetOutput(&b)
	defer log.SetOutput(old)
	s, m := Spec{Backend: Dir, Dir: filepath.Join(d.mnt, "volume")}, newMaster(t)
	id := mustCreate(t, s, m)
	target := filepath.Join(t.TempDir(), "k")
	mustOpen(t, s, id, m, target)
	mustLock(t, s, id, target)
	log.SetOutput(old)
	if b.Len() == 0 {
		t.Fatal("fscrypt wrote nothing; the test looks in the wrong place")
	}
	for _, form := range keyForms(m.Bytes()) {
		if bytes.Contains(b.Bytes(), form) {
			t.Error("the master key is in the log")
		}
	}
}

// A loop device that somebody else set up over the image is listed, spoils the
// proof and stops Open; the volume is as before once it is gone.
func TestForeignLoop(t *testing.T) {
	need.Encryption(t)
	need.Tool(t, "losetup")
	d := newDevice(t, 512<<20, "-O", "encrypt")
	s, m := specs(d)["image"], newMaster(t)
	id := mustCreate(t, s, m)
	target := filepath.Join(t.TempDir(), "k")
	mustOpen(t, s, id, m, target)
	ours, err := LoopDevices(s)
	if err != nil || len(ours) != 1 || !ours[0].Autoclear || ours[0].Outer {
		t.Fatalf("ours: %+v, %v", ours, err)
	}
	out, err := exec.Command("losetup", "--find", "--show", "--read-only", filepath.Join(s.Dir, ImageName)).Output()
	if err != nil {
		t.Fatal(err)
	}
	dev := strings.TrimSpace(string(out))
	detached := false
	detach := func() {
		if !detached {
			detached = true
			if out, err := exec.Command("losetup", "--detach", dev).CombinedOutput(); err != nil {
				t.Errorf("losetup --detach: %v: %s", err, out)
			}
		}
	}
	defer detach()
	both, err := LoopDevices(s)
	if err != nil || len(both) != 2 || !slices.ContainsFunc(both, func(l LoopDevice) bool { return l.Path == dev && !l.Autoclear }) {
		t.Errorf("both: %+v, %v", both, err)
	}
	if err := Unmount(target); err != nil {
		t.Fatal(err)
	}
	if r, err := RemoveKey(s, id); err != nil || !r.FilesBusy {
		t.Errorf("removal with a foreign loop: %+v, %v", r, err)
	}
	if err := ProveLocked(s, id); !errors.As(err, new(*NotLockedError)) {
		t.Errorf("proof with a foreign loop: %v", err)
	}
	if err := Open(ctxT(t), s, id, m, target); !errors.As(err, new(*BusyError)) || !strings.Contains(err.Error(), dev) {
		t.Errorf("open with a foreign loop: %v", err)
	}
	if on, _ := isMountRoot(target); on {
		t.Error("something is mounted after a refused open")
	}
	detach()
	if err := RemoveKeyWait(ctxT(t), s, id); err != nil {
		t.Fatal(err)
	}
	if err := ProveLocked(s, id); err != nil {
		t.Error(err)
	}
	mustOpen(t, s, id, m, target)
	mustLock(t, s, id, target)
}
