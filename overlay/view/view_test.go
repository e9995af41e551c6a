package view

import (
	"errors"
	"os"
	"path/filepath"
	"strings"
	"testing"

	"github.com/google/go-cmp/cmp"
	"github.com/moby/sys/mountinfo"
	"golang.org/x/sys/unix"

	"overkeep/overlay/layout"
)

var alice = User{Name: "alice", UID: 1000, GID: 1000, Home: "/home/alice"}

func aliceKeep(t *testing.T) layout.Keep {
	t.Helper()
	k, err := layout.New("/", "alice")
	if err != nil {
		t.Fatal(err)
	}
	return k
}

func TestMounts(t *testing.T) {
	list, err := Mounts(aliceKeep(t), alice, Options{WorkDir: "keep"})
	if err != nil {
		t.Fatal(err)
	}
	var got []string
	for _, m := range list {
		got = append(got, m.Command())
		if m.Why == "" {
			t.Errorf("%s has no reason", m.Target)
		}
	}
	want := []string{
		"mount --bind /nix/var/nix/daemon-socket /run/overkeep/alice/lower/sys",
		"mount -t overlay overlay -o nosuid,nodev,lowerdir=/nix/store,upperdir=/run/overkeep/alice/k/store/upper,workdir=/run/overkeep/alice/k/store/work,xino=auto,index=off,metacopy=off,redirect_dir=nofollow /nix/store",
		"mount --bind /run/overkeep/alice/socket /nix/var/nix/daemon-socket",
		"mount --bind /run/overkeep/alice/k/log /nix/var/log/nix -o nosuid,nodev",
		"mount --bind /run/overkeep/alice/k/home/cache /home/alice/.cache/nix -o nosuid,nodev",
		"mount --bind /run/overkeep/alice/k/home/state /home/alice/.local/state/nix -o nosuid,nodev",
		"mount --bind /run/overkeep/alice/k/home/share /home/alice/.local/share/nix -o nosuid,nodev",
		"mount --bind /run/overkeep/alice/k/home/work /home/alice/keep -o nosuid,nodev",
	}
	if d := cmp.Diff(want, got); d != "" {
		t.Error(d)
	}
}

// The system daemon's socket must be bound aside before it is covered, and the
// overlay is one mount with one lowerdir: what Nix's check-mount reads.
func TestMountsOrderAndCheckMount(t *testing.T) {
	list, err := Mounts(aliceKeep(t), alice, Options{})
	if err != nil {
		t.Fatal(err)
	}
	at := map[string]int{}
	for i, m := range list {
		if _, twice := at[m.Target]; twice {
			t.Errorf("%s is mounted twice", m.Target)
		}
		at[m.Target] = i
		opts := strings.Join(m.Options, ",")
		if m.Kind == Overlay {
			if m.Source != "overlay" || strings.Count(opts, "lowerdir=") != 1 || strings.Contains(opts, "volatile") {
				t.Errorf("overlay %q with options %q", m.Source, opts)
			}
			if len(opts) > 4000 {
				t.Errorf("options of %d bytes do not fit a page", len(opts))
			}
		}
	}
	if at["/run/overkeep/alice/lower/sys"] > at[layout.NixDaemonSocket] {
		t.Error("the system daemon's socket is covered before it is bound aside")
	}
	if _, ok := at["/home/alice/keep"]; ok {
		t.Error("a work directory that nobody asked for")
	}
}

func TestMountsRefusesWhatOverlayCannotTake(t *testing.T) {
	for _, root := range []string{"/a b", "/a,b", "/a:b", "/a+b", "/a\\b"} {
		_, err := Mounts(layout.Keep{Root: root, Name: "x"}, alice, Options{})
		var e *OptionError
		if !errors.As(err, &e) {
			t.Errorf("root %q: error %v, want *OptionError", root, err)
		}
	}
}

// A mount point in the home must be the user's own directory: a symlink of
// theirs must not lead root to somebody else's.
func TestCheckUserDir(t *testing.T) {
	dir := t.TempDir()
	open := func(p string) int {
		fd, err := unix.Open(p, unix.O_PATH|unix.O_DIRECTORY|unix.O_CLOEXEC, 0)
		if err != nil {
			t.Fatal(err)
		}
		t.Cleanup(func() { unix.Close(fd) })
		return fd
	}
	me := User{Name: "me", UID: os.Geteuid(), GID: os.Getegid(), Home: dir}
	var pe *MountPointError
	if err := checkUserDir(open("/"), Mount{Target: "/"}, User{Name: "x", UID: os.Geteuid() + 1}); !errors.As(err, &pe) {
		t.Errorf("a directory of another user: %v", err)
	}
	if err := checkUserDir(open(dir), Mount{Target: dir}, me); err != nil {
		t.Errorf("the user's own directory: %v", err)
	}
	full := filepath.Join(dir, "full")
	if err := os.MkdirAll(filepath.Join(full, "sub"), 0o700); err != nil {
		t.Fatal(err)
	}
	if err := checkUserDir(open(full), Mount{Target: full, Sealed: true}, me); !errors.As(err, &pe) {
		t.Errorf("a sealed mount point that is not empty: %v", err)
	}
	if fi, err := os.Stat(full); err != nil || fi.Mode().Perm() != 0o700 {
		t.Errorf("a refused mount point was changed: %v %v", fi.Mode(), err)
	}
}

func TestEnvironmentIsInTheKeep(t *testing.T) {
	k := aliceKeep(t)
	for _, e := range Environment(k) {
		name, v, _ := strings.Cut(e, "=")
		if name == "TMPDIR" && !strings.HasPrefix(v, k.Volume()+"/") {
			t.Errorf("temporary files at %q, outside the volume", v)
		}
	}
}

func TestWhose(t *testing.T) {
	at := func(point, fstype, options string) *mountinfo.Info {
		return &mountinfo.Info{Mountpoint: point, FSType: fstype, VFSOptions: options}
	}
	const upper = "rw,lowerdir=/nix/store,upperdir=/run/overkeep/alice/k/store/upper,workdir=/run/overkeep/alice/k/store/work"
	for _, c := range []struct {
		table Table
		want  string
	}{
		{nil, ""},
		{Table{at("/nix/store", "overlay", upper)}, "alice"},
		{Table{at("/", "ext4", "rw"), at("/nix/store", "ext4", "rw"), at("/nix/store", "overlay", upper)}, "alice"},
		{Table{at("/mnt", "overlay", upper)}, ""},
		{Table{at("/nix/store", "overlay", "rw,lowerdir=/a,upperdir=/b,workdir=/c")}, ""},
		{Table{at("/nix/store", "overlay", "rw,lowerdir=/run/overkeep/bob/k/store/upper")}, ""},
		{Table{at("/nix/store", "tmpfs", upper)}, ""},
	} {
		if got := c.table.whose(); got != c.want {
			t.Errorf("%+v: %q, want %q", c.table, got, c.want)
		}
	}
}
