package volume

import (
	"context"
	"encoding/base64"
	"encoding/hex"
	"errors"
	"maps"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"syscall"
	"testing"
	"time"

	"github.com/google/fscrypt/actions"
	"golang.org/x/sys/unix"

	"overkeep/crypt/secret"
	"overkeep/tests/need"
)

// keyForms are the ways in which a key could stand in a text.
func keyForms(k []byte) [][]byte {
	forms := [][]byte{k, k[:16], []byte(hex.EncodeToString(k[:8])), []byte(strings.ToUpper(hex.EncodeToString(k[:8])))}
	for _, e := range []*base64.Encoding{base64.RawStdEncoding, base64.RawURLEncoding} {
		forms = append(forms, []byte(e.EncodeToString(k)))
	}
	return forms
}

// What does not belong together is refused, and no key is added for it.
func TestForeign(t *testing.T) {
	need.Encryption(t)
	for _, tt := range []struct {
		name string
		make func(t *testing.T, d device, s *Spec, id *ID, m **secret.Bytes)
		want any
	}{
		{"wrong key", func(t *testing.T, _ device, _ *Spec, _ *ID, m **secret.Bytes) { *m = newMaster(t) }, new(*ForeignError)},
		{"key of the wrong length", func(t *testing.T, _ device, _ *Spec, _ *ID, m **secret.Bytes) {
			*m, _ = secret.Random(31)
		}, nil},
		{"protector of another", func(_ *testing.T, _ device, _ *Spec, id *ID, _ **secret.Bytes) { id.Protector = "0123456789abcdef" }, new(*ForeignError)},
		{"policy of another", func(_ *testing.T, _ device, _ *Spec, id *ID, _ **secret.Bytes) { id.Policy = strings.Repeat("ab", 16) }, new(*ForeignError)},
		{"directory of another", func(t *testing.T, d device, s *Spec, _ *ID, _ **secret.Bytes) {
			o := *s
			o.Dir = filepath.Join(d.mnt, "other")
			if _, err := Create(ctxT(t), o, newMaster(t), "other"); err != nil {
				t.Fatal(err)
			}
			s.Dir = o.Dir
		}, new(*ForeignError)},
		{"plain directory", func(t *testing.T, d device, s *Spec, _ *ID, _ **secret.Bytes) {
			s.Dir = filepath.Join(d.mnt, "plain")
			if err := os.Mkdir(s.Dir, 0o700); err != nil {
				t.Fatal(err)
			}
		}, new(*ForeignError)},
		{"symbolic link to the directory", func(t *testing.T, d device, s *Spec, _ *ID, _ **secret.Bytes) {
			if err := errors.Join(os.Rename(s.Dir, s.Dir+".real"), os.Symlink(s.Dir+".real", s.Dir)); err != nil {
				t.Fatal(err)
			}
		}, new(*ForeignError)},
		{"file for the directory", func(t *testing.T, d device, s *Spec, _ *ID, _ **secret.Bytes) {
			s.Dir = filepath.Join(d.mnt, "file")
			if err := os.WriteFile(s.Dir, nil, 0o600); err != nil {
				t.Fatal(err)
			}
		}, new(*ForeignError)},
		{"mount on the directory", func(t *testing.T, d device, s *Spec, _ *ID, _ **secret.Bytes) {
			if err := unix.Mount("tmpfs", s.Dir, "tmpfs", 0, ""); err != nil {
				t.Fatal(err)
			}
			t.Cleanup(func() { _ = unix.Unmount(s.Dir, 0) })
		}, new(*ForeignError)},
		{"no directory", func(_ *testing.T, d device, s *Spec, _ *ID, _ **secret.Bytes) { s.Dir = filepath.Join(d.mnt, "none") }, new(*MissingError)},
		{"no policy metadata", func(t *testing.T, d device, _ *Spec, id *ID, _ **secret.Bytes) {
			if err := os.Remove(filepath.Join(d.mnt, ".fscrypt/policies", id.Policy)); err != nil {
				t.Fatal(err)
			}
		}, new(*MissingError)},
		{"damaged policy metadata", func(t *testing.T, d device, _ *Spec, id *ID, _ **secret.Bytes) {
			flip(t, filepath.Join(d.mnt, ".fscrypt/policies", id.Policy))
		}, nil},
		{"key of an older policy in its place", func(t *testing.T, d device, _ *Spec, id *ID, m **secret.Bytes) {
			exchangeKey(t, d, *id, *m)
		}, new(*ForeignError)},
		{"malformed descriptor", func(_ *testing.T, _ device, _ *Spec, id *ID, _ **secret.Bytes) {
			id.Policy = "../../../../etc/passwd0000000000"
		}, nil},
		{"mount point is a link", func(t *testing.T, d device, _ *Spec, _ *ID, _ **secret.Bytes) {
			if err := os.Symlink("/", filepath.Join(d.mnt, "k")); err != nil {
				t.Fatal(err)
			}
		}, new(*ForeignError)},
	} {
		t.Run(tt.name, func(t *testing.T) {
			d := newDevice(t, 128<<20, "-O", "encrypt")
			s, m := Spec{Backend: Dir, Dir: filepath.Join(d.mnt, "volume")}, newMaster(t)
			real := mustCreate(t, s, m)
			id, spec, key := real, s, m
			tt.make(t, d, &spec, &id, &key)
			target := filepath.Join(d.mnt, "k")
			err := Open(ctxT(t), spec, id, key, target)
			if err == nil {
				t.Fatal("opened")
			}
			if tt.want != nil && !errors.As(err, tt.want) {
				t.Errorf("%T: %v, want %T", err, err, tt.want)
			}
			t.Log(err)
			mustStatus(t, s, real, Absent)
			if st, err := KeyStatus(s, ID{real.Protector, strings.Repeat("ab", 16)}); err != nil || st != Absent {
				t.Errorf("foreign key %v, %v", st, err)
			}
			if fi, err := os.Lstat(target); err == nil && fi.IsDir() {
				t.Errorf("the mount point was left")
			}
		})
	}
}

func flip(t *testing.T, path string) {
	t.Helper()
	b, err := os.ReadFile(path)
	if err != nil {
		t.Fatal(err)
	}
	b[len(b)/2] ^= 1
	if err := os.WriteFile(path, b, 0o600); err != nil {
		t.Fatal(err)
	}
}

// In place of the image: what is no plain file, or none at all, is refused, and
// the key that had been added to look is removed again.
func TestForeignImage(t *testing.T) {
	d := newDevice(t, 512<<20, "-O", "encrypt")
	s, m := specs(d)["image"], newMaster(t)
	id := mustCreate(t, s, m)
	img := filepath.Join(s.Dir, ImageName)
	target := filepath.Join(t.TempDir(), "k")
	// within runs f with the key present and no mount.
	within := func(f func() error) {
		t.Helper()
		ds := s
		ds.Backend = Dir
		mustOpen(t, ds, id, m, target)
		err := f()
		if uerr := errors.Join(Unmount(target), RemoveKeyWait(ctxT(t), s, id)); err != nil || uerr != nil {
			t.Fatal(err, uerr)
		}
	}
	within(func() error { return os.Rename(img, img+".real") })
	for _, tt := range []struct {
		name string
		make func() error
		want any
	}{
		{"none", func() error { return nil }, new(*MissingError)},
		{"symbolic link", func() error { return os.Symlink(img+".real", img) }, new(*ForeignError)},
		{"directory", func() error { return os.Mkdir(img, 0o700) }, nil},
		{"pipe", func() error { return unix.Mkfifo(img, 0o600) }, new(*ForeignError)},
		{"hard link", func() error { return os.Link(img+".real", img) }, new(*ForeignError)},
		{"empty file", func() error { return os.WriteFile(img, nil, 0o600) }, new(*DamagedError)},
		{"no filesystem", func() error { return os.WriteFile(img, make([]byte, 1<<20), 0o600) }, new(*DamagedError)},
	} {
		within(tt.make)
		err := Open(ctxT(t), s, id, m, target)
		if err == nil {
			t.Fatalf("%s: opened", tt.name)
		}
		if tt.want != nil && !errors.As(err, tt.want) {
			t.Errorf("%s: %T: %v, want %T", tt.name, err, err, tt.want)
		}
		t.Log(tt.name, "→", err)
		mustStatus(t, s, id, Absent)
		if on, _ := isMountRoot(target); on {
			t.Fatalf("%s: something is mounted", tt.name)
		}
		within(func() error {
			if err := os.Remove(img); !errors.Is(err, os.ErrNotExist) {
				return err
			}
			return nil
		})
	}
	within(func() error { return os.Rename(img+".real", img) })
	mustOpen(t, s, id, m, target)
	mustLock(t, s, id, target)
}

// A filesystem that cannot encrypt is told apart, with what helps, and is left
// as it was.
func TestUnsupported(t *testing.T) {
	need.Encryption(t)
	plain := newDevice(t, 64<<20)
	tmp := t.TempDir()
	if err := unix.Mount("tmpfs", tmp, "tmpfs", 0, ""); err != nil {
		t.Fatal(err)
	}
	defer unix.Unmount(tmp, 0)
	dev, err := exec.Command("findmnt", "--noheadings", "--output", "SOURCE", plain.mnt).Output()
	if err != nil {
		t.Fatal(err)
	}
	for _, tt := range []struct {
		dir    string
		errno  error
		remedy string
	}{
		{plain.mnt, unix.EOPNOTSUPP, "tune2fs -O encrypt " + strings.TrimSpace(string(dev))},
		{tmp, unix.ENOTTY, "--on-image FILE"},
	} {
		_, err := Create(ctxT(t), Spec{Backend: Image, Dir: filepath.Join(tt.dir, "volume"), Size: MinSize}, newMaster(t), "x")
		var u *UnsupportedError
		if !errors.As(err, &u) || !errors.Is(err, tt.errno) || u.Remedy != tt.remedy {
			t.Errorf("%s: %v (%+v), want remedy %q", tt.dir, err, u, tt.remedy)
		}
		t.Log(err)
		if left := entries(t, tt.dir); len(left) != 0 {
			t.Errorf("left: %v", left)
		}
		if r := Probe(tt.dir); r.Answer != No || r.Remedy != tt.remedy {
			t.Errorf("probe %+v", r)
		}
		if left := entries(t, tt.dir); len(left) != 0 {
			t.Errorf("left by the probe: %v", left)
		}
	}
	// The remedy holds: after it, the same place takes a volume.
	if out, err := exec.Command("tune2fs", "-O", "encrypt", strings.TrimSpace(string(dev))).CombinedOutput(); err != nil {
		t.Fatalf("tune2fs: %v: %s", err, out)
	}
	if r := Probe(plain.mnt); r.Answer != Yes {
		t.Errorf("probe after tune2fs: %+v", r)
	}
	if r := ProbeThrowaway(ctxT(t), tmp); r.Answer != Yes {
		t.Errorf("throw-away probe: %+v", r)
	}
	if left := append(entries(t, plain.mnt), entries(t, tmp)...); len(left) != 0 {
		t.Errorf("left by the probes: %v", left)
	}
}

// A disk that runs full, at whatever step, leaves nothing half made; the error
// is ENOSPC.
func TestFullDisk(t *testing.T) {
	need.Encryption(t)
	for name := range specs(device{}) {
		for _, prealloc := range []bool{false, true} {
			t.Run(name+map[bool]string{true: " preallocated"}[prealloc], func(t *testing.T) {
				d := newDevice(t, 64<<20, "-O", "encrypt", "-m", "0")
				s, m := specs(d)[name], newMaster(t)
				s.Preallocate, s.Size = prealloc, 20<<20
				fill, err := os.Create(filepath.Join(d.mnt, "fill"))
				if err != nil {
					t.Fatal(err)
				}
				defer fill.Close()
				b, size := make([]byte, 4096), int64(0)
				for n := 0; err == nil; size += int64(n) {
					n, err = fill.Write(b)
				}
				if err := fill.Sync(); err != nil {
					t.Log("sync:", err)
				}
				before := entries(t, d.mnt)
				failed := map[string]bool{}
				for free := int64(0); ; free = max(free+4096, free*5/4/4096*4096) {
					if free > size {
						break // as large as it can be, and still not enough
					}
					if err := errors.Join(fill.Truncate(size-free), fill.Sync()); err != nil {
						t.Fatal(err)
					}
					id, err := Create(ctxT(t), s, m, "x")
					if err == nil {
						if err := Destroy(ctxT(t), s, id); err != nil {
							t.Fatal(err)
						}
						break
					}
					if !errors.Is(err, unix.ENOSPC) {
						t.Errorf("%d bytes free: %v", free, err)
					}
					failed[strings.SplitN(err.Error(), "\"", 2)[0]] = true
					if after := entries(t, d.mnt); !slices.Equal(before, after) {
						t.Fatalf("%d bytes free: before %v, after %v", free, before, after)
					}
				}
				if len(failed) == 0 {
					t.Error("never failed")
				}
				t.Log("failed at:", slices.Sorted(maps.Keys(failed)))
			})
		}
	}
}

// FSImage: a file that is there, somebody else's, or one that others may write
// to is neither overwritten, mounted nor removed.
func TestForeignFSImage(t *testing.T) {
	d := newDevice(t, 512<<20, "-O", "encrypt")
	s, m := specs(d)["dir on image"], newMaster(t)
	if err := os.WriteFile(s.FSImage, []byte("mine"), 0o600); err != nil {
		t.Fatal(err)
	}
	if _, err := Create(ctxT(t), s, m, "x"); !errors.As(err, new(*ExistsError)) {
		t.Errorf("create over a file: %v", err)
	}
	p, _ := ProtectorDescriptor(m)
	if err := Cleanup(ctxT(t), s, p); !errors.As(err, new(*DamagedError)) {
		t.Errorf("clean up somebody's file: %v", err)
	}
	if b, _ := os.ReadFile(s.FSImage); string(b) != "mine" {
		t.Fatalf("the file became %q", b)
	}
	if err := os.Remove(s.FSImage); err != nil {
		t.Fatal(err)
	}
	id := mustCreate(t, s, m)
	other := newMaster(t)
	op, _ := ProtectorDescriptor(other)
	target := filepath.Join(t.TempDir(), "k")
	for _, err := range []error{
		Destroy(ctxT(t), s, ID{op, id.Policy}),
		Cleanup(ctxT(t), s, op),
		Open(ctxT(t), s, ID{op, id.Policy}, other, target),
	} {
		if !errors.As(err, new(*ForeignError)) {
			t.Errorf("with another key's protector: %v", err)
		}
	}
	for _, c := range []func() error{
		func() error { return os.Chmod(s.FSImage, 0o660) },
		func() error { return errors.Join(os.Chmod(s.FSImage, 0o600), os.Chown(s.FSImage, 1000, 1000)) },
	} {
		if err := c(); err != nil {
			t.Fatal(err)
		}
		if err := Open(ctxT(t), s, id, m, target); !errors.As(err, new(*ForeignError)) {
			t.Errorf("open of a file others can write: %v", err)
		}
	}
	if err := os.Chown(s.FSImage, 0, 0); err != nil {
		t.Fatal(err)
	}
	if err := unix.Mount("tmpfs", s.FSMount, "tmpfs", 0, ""); err != nil {
		t.Fatal(err)
	}
	if err := Open(ctxT(t), s, id, m, target); !errors.As(err, new(*ForeignError)) {
		t.Errorf("open with something else mounted: %v", err)
	}
	if err := DetachFS(ctxT(t), s); !errors.As(err, new(*ForeignError)) {
		t.Errorf("detach something else: %v", err)
	}
	if err := unix.Unmount(s.FSMount, 0); err != nil {
		t.Fatal(err)
	}
	// The file is removed while the volume is open: it must still lock.
	mustOpen(t, s, id, m, target)
	if err := os.Remove(s.FSImage); err != nil {
		t.Fatal(err)
	}
	mustStatus(t, s, id, Present)
	mustLock(t, s, id, target)
}

// A context that ends before a durable step stops Create, at once or at the next
// step that waits, and all is taken back; a Create that came through is whole.
func TestCancelled(t *testing.T) {
	need.Encryption(t)
	defer func(old func(string)) { crash = old }(crash)
	for name := range specs(device{}) {
		t.Run(name, func(t *testing.T) {
			d := newDevice(t, 512<<20, "-O", "encrypt")
			s, m := specs(d)[name], newMaster(t)
			before := entries(t, d.mnt)
			stopped := 0
			for last := 0; ; last++ {
				ctx, cancel := context.WithCancel(context.Background())
				n := 0
				crash = func(string) {
					if n++; n == last {
						cancel()
					}
				}
				if last == 0 {
					cancel() // before it began
				}
				id, err := Create(ctx, s, m, name)
				steps := n
				cancel()
				crash = func(string) {}
				if err == nil {
					if err := errors.Join(ProveLocked(s, id), Destroy(ctxT(t), s, id), os.Remove(s.FSMount)); err != nil && s.FSMount != "" {
						t.Fatal(err)
					}
					for _, dir := range []string{".fscrypt/policies", ".fscrypt/protectors", ".fscrypt"} {
						_ = os.Remove(filepath.Join(d.mnt, dir))
					}
				} else if stopped++; !errors.Is(err, context.Canceled) && !strings.Contains(err.Error(), "signal: killed") {
					t.Errorf("step %d: %v", last, err)
				}
				if after := entries(t, d.mnt); !slices.Equal(before, after) {
					t.Fatalf("step %d: before %v, after %v (%v)", last, before, after, err)
				}
				if last > steps {
					break
				}
			}
			if stopped < 3 {
				t.Errorf("stopped only %d times", stopped)
			}
		})
	}
}

// Open on an FSImage that fails after the mount takes the mount back.
func TestOpenDetaches(t *testing.T) {
	d := newDevice(t, 512<<20, "-O", "encrypt")
	s, m := specs(d)["dir on image"], newMaster(t)
	id := mustCreate(t, s, m)
	wrong := ID{id.Protector, strings.Repeat("ab", 16)}
	if err := Open(ctxT(t), s, wrong, m, filepath.Join(t.TempDir(), "k")); !errors.As(err, new(*ForeignError)) {
		t.Errorf("open with another policy: %v", err)
	}
	if on, err := isMountRoot(s.FSMount); on || err != nil {
		t.Errorf("still mounted: %v, %v", on, err)
	}
	if l, err := LoopDevices(s); len(l) != 0 || err != nil {
		t.Errorf("loops %v, %v", l, err)
	}
}

// exchangeKey puts the wrapped key of another policy of the same protector into
// the metadata of id's policy: correctly sealed, but not its key.
func exchangeKey(t *testing.T, d device, id ID, m *secret.Bytes) {
	t.Helper()
	f, err := os.Open(d.mnt)
	if err != nil {
		t.Fatal(err)
	}
	defer f.Close()
	mnt, err := filesystemOf(f)
	if err != nil {
		t.Fatal(err)
	}
	ctx := actionsContext(mnt)
	p, err := actions.GetProtector(ctx, id.Protector)
	if err != nil {
		t.Fatal(err)
	}
	defer p.Lock()
	if err := p.Unlock(once(m)); err != nil {
		t.Fatal(err)
	}
	other, err := actions.CreatePolicy(ctx, p)
	if err != nil {
		t.Fatal(err)
	}
	defer other.Lock()
	a, aerr := mnt.GetPolicy(id.Policy, nil)
	b, berr := mnt.GetPolicy(other.Descriptor(), nil)
	if aerr != nil || berr != nil {
		t.Fatal(aerr, berr)
	}
	a.WrappedPolicyKeys = b.WrappedPolicyKeys
	if err := mnt.AddPolicy(a, nil); err != nil {
		t.Fatal(err)
	}
}

// A copy of the mounts in another namespace keeps a volume open although our
// unmounts succeed: no proof, no second attach; both once it is gone.
func TestOtherNamespace(t *testing.T) {
	d := newDevice(t, 512<<20, "-O", "encrypt")
	s, m := specs(d)["dir on image"], newMaster(t)
	id := mustCreate(t, s, m)
	target := filepath.Join(t.TempDir(), "k")
	mustOpen(t, s, id, m, target)
	if err := os.WriteFile(filepath.Join(target, "file"), nil, 0o600); err != nil {
		t.Fatal(err)
	}
	other := exec.Command("cat") // lives until its input ends
	other.SysProcAttr = &syscall.SysProcAttr{Unshareflags: syscall.CLONE_NEWNS, Pdeathsig: syscall.SIGKILL}
	in, err := other.StdinPipe()
	if err != nil {
		t.Fatal(err)
	}
	if err := other.Start(); err != nil {
		t.Fatal(err)
	}
	defer other.Wait()
	defer in.Close()
	if err := Unmount(target); err != nil {
		t.Fatal(err)
	}
	if r, err := RemoveKey(s, id); err != nil || !r.FilesBusy {
		t.Errorf("removal %+v, %v", r, err)
	}
	mustStatus(t, s, id, Incomplete)
	short, cancel := context.WithTimeout(context.Background(), 50*time.Millisecond)
	defer cancel()
	if err := RemoveKeyWait(short, s, id); !errors.As(err, new(*BusyError)) || !errors.Is(err, context.DeadlineExceeded) {
		t.Errorf("wait for the removal: %v", err)
	}
	if err := DetachFS(short, s); !errors.As(err, new(*BusyError)) {
		t.Errorf("detach: %v", err)
	}
	if st, err := KeyStatus(s, id); st != Unknown || !errors.As(err, new(*BusyError)) {
		t.Errorf("status %v, %v", st, err)
	}
	if err := ProveLocked(s, id); !errors.As(err, new(*NotLockedError)) {
		t.Errorf("proof: %v", err)
	}
	if err := Open(ctxT(t), s, id, m, target); !errors.As(err, new(*BusyError)) {
		t.Errorf("open: %v", err)
	}
	in.Close()
	if err := other.Wait(); err != nil {
		t.Fatal(err)
	}
	if err := DetachFS(ctxT(t), s); err != nil {
		t.Fatal(err)
	}
	mustStatus(t, s, id, Absent)
	if err := ProveLocked(s, id); err != nil {
		t.Error(err)
	}
	mustOpen(t, s, id, m, target)
	mustLock(t, s, id, target)
}
