package doctor

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"os/exec"
	"slices"
	"strings"
	"testing"

	"golang.org/x/sys/unix"

	"overkeep/crypt/volume"
	"overkeep/overlay/lower"
	"overkeep/overlay/nixconf"
	"overkeep/systemd/keep"
)

// good is a machine on which everything is as it should be.
func good() (facts, machine, Config) {
	ok := worked("")
	trial := keepTrial{ok, ok, ok, ok}
	f := facts{
		kernel: kernelFacts{
			namespace: ok, enter: ok, pin: ok, loop: ok, encryption: volume.Result{Answer: Yes}, image: trial, dir: trial,
			sandbox: ok, userNS: ok, memory: ok, pidfd: ok, openat2: ok, aesCPU: Yes, aesDriver: "xts-aes-aesni",
		},
		fs: fsFacts{
			root: "/", state: "/var/lib/overkeep", at: "/var/lib/overkeep", fsType: "ext4", device: "/dev/sda2",
			encryption: volume.Result{Answer: Yes}, exchange: ok, overlay: ok, trim: trimNow, free: 100 << 30, run: "/run/overkeep",
			stairs: []pathFacts{{"/", fs.ModeDir | 0o755, 0}, {"/run", fs.ModeDir | 0o755, 0}, {"/var", fs.ModeDir | 0o755, 0}},
		},
		nix: nixFacts{
			daemon: "/usr/bin/nix-daemon", client: "/usr/bin/nix", searched: keep.NixPath, debian: true, version: "nix-daemon (Nix) 2.34.8\n",
			settings: map[string]string{"experimental-features": "flakes local-overlay-store nix-command", "sandbox": "true"},
			answers:  worked("Nix 2.34.8"), trial: ok, buildGroup: "nixbld", groupFound: true, buildUsers: []string{"nixbld1"},
			store: pathFacts{"/nix/store", fs.ModeDir | fs.ModeSticky | 0o775, 0}, storeType: "ext4", asLower: ok, substituters: nixconf.None,
		},
		login: loginFacts{
			pam: "/etc/pam.d/common-session", module: "/usr/lib/security/pam_overkeep.so", moduleOn: true, systemd: true, seats: true,
			bus: ok, userUnit: true, userKnown: true, uid: 1000, homeUID: 1000,
		},
		safety: safetyFacts{
			swaps: []swapFacts{{"/dev/zram0", Yes}}, device: "/dev/dm-0", fullDisk: Yes, dumps: dumpNowhere, fsType: "ext4",
		},
	}
	return f, machine{root: true, release: release{6, 12}, at: "/"}, Config{Root: "/", User: "alice"}
}

func find(t *testing.T, checks []Check, name string) Check {
	t.Helper()
	i := slices.IndexFunc(checks, func(c Check) bool { return c.Name == name })
	if i < 0 {
		t.Fatalf("no check %q", name)
	}
	return checks[i]
}

// sane holds what every list of checks must hold.
func sane(t *testing.T, checks []Check) {
	t.Helper()
	order := []Group{Kernel, Filesystem, Nix, Login, Safety}
	at, names := 0, map[string]bool{}
	for _, c := range checks {
		i := slices.Index(order, c.Group)
		if i < at {
			t.Errorf("%s: group %q out of order", c.Name, c.Group)
		}
		at = i
		switch {
		case names[c.Name]:
			t.Errorf("%s: twice", c.Name)
		case c.Answer != Yes && c.Answer != No && c.Answer != Unsure:
			t.Errorf("%s: answer %q", c.Name, c.Answer)
		case c.Answer == Yes && c.Missing+c.Remedy+c.Or != "":
			t.Errorf("%s: yes, and yet %+v", c.Name, c)
		case c.Answer != Yes && c.Missing == "":
			t.Errorf("%s: %s without what is missing", c.Name, c.Answer)
		case c.Answer == No && c.Remedy == "" && c.Or == "":
			t.Errorf("%s: no without a way on: %+v", c.Name, c)
		}
		names[c.Name] = true
		for _, s := range []string{c.Found, c.Missing, c.Remedy, c.Or} {
			if strings.ContainsAny(s, "\n\r\x00\x1b") || len(s) > 700 {
				t.Errorf("%s: %q", c.Name, s)
			}
		}
	}
}

func TestAllGood(t *testing.T) {
	f, m, c := good()
	checks := f.checks(m, c)
	sane(t, checks)
	for _, c := range checks {
		if c.Answer != Yes {
			t.Errorf("%+v", c)
		}
	}
	if v := Verdict(checks); v != Yes {
		t.Error(v)
	}
}

// failed is the error of a child that could not be started.
func failed(e unix.Errno) error { return &os.PathError{Op: "fork/exec", Path: "/bin/sh", Err: e} }

func TestJudgement(t *testing.T) {
	const useradd = `for n in $(seq 1 10); do useradd -r -M -N -g nixbld -G nixbld -d /var/empty -s /usr/sbin/nologin -c "Nix build user $n" nixbld$n; done`
	for _, c := range []struct {
		check   string
		set     func(*facts, *machine, *Config)
		answer  Answer
		missing string // part of it
		remedy  string // all of it
		or      string // part of it
		verdict Answer
	}{
		// Kernel.
		{"mount namespaces", func(f *facts, _ *machine, _ *Config) {
			f.kernel.namespace = ended(fmt.Errorf("make: %w", unix.ENOSPC))
			f.kernel.enter = behind("mount namespaces")
		}, No, "Linux 6.12 is new enough (3.8) and says no; built without CONFIG_NAMESPACES", "sysctl -w user.max_mnt_namespaces=15000", "", No},
		{"entering a namespace", func(f *facts, _ *machine, _ *Config) { f.kernel.enter = behind("mount namespaces") },
			Unsure, "mount namespaces has to work first", "", "", Unsure},
		{"entering a namespace", func(f *facts, _ *machine, _ *Config) { f.kernel.enter = ended(unix.EINVAL) },
			No, "setns(2)", "", "boot Linux 3.8 or newer, built with CONFIG_NAMESPACES", No},
		{"pinned namespace", func(f *facts, _ *machine, _ *Config) { f.kernel.pin = ended(wrong("another namespace came back")) },
			No, "another namespace came back", "", "boot Linux 3.8", No},
		{"loop devices", func(f *facts, _ *machine, _ *Config) { f.kernel.loop = ended(fs.ErrNotExist) },
			Unsure, "file does not exist", "", "", Unsure}, // not an errno: not the kernel's word
		{"loop devices", func(f *facts, _ *machine, _ *Config) {
			f.kernel.loop = ended(&os.PathError{Op: "open", Path: "/dev/loop-control", Err: unix.ENOENT})
		}, No, "is new enough (5.8) and says no; built without CONFIG_BLK_DEV_LOOP", "modprobe loop", "give it /dev/loop-control", No},
		{"loop devices", func(f *facts, m *machine, _ *Config) {
			f.kernel.loop, m.release = ended(unix.EINVAL), release{5, 4}
		}, No, "it came with Linux 5.8, this is 5.4", "modprobe loop", "", No},
		{"loop devices", func(f *facts, _ *machine, _ *Config) { f.kernel.loop = ended(unix.EPERM) },
			No, "root is not allowed to", "", "outside of the container", No},
		{"loop devices", func(f *facts, _ *machine, _ *Config) { f.kernel.loop = ended(unix.EMFILE) },
			Unsure, "too many open files", "", "", Unsure},
		{"ext4 encryption", func(f *facts, _ *machine, _ *Config) {
			f.kernel.encryption = volume.Result{Answer: No, Missing: "the kernel option CONFIG_FS_ENCRYPTION"}
		}, No, "CONFIG_FS_ENCRYPTION; Linux 6.12 is new enough (5.4) and says no", "", "boot Linux 5.4", No},
		{"ext4 encryption", func(f *facts, m *machine, _ *Config) {
			m.release = release{4, 19}
			f.kernel.encryption = volume.Result{Answer: No, Missing: "v2 policies"}
		}, No, "it came with Linux 5.4, this is 4.19", "", "boot Linux 5.4", No},
		{"ext4 encryption", func(f *facts, _ *machine, _ *Config) { f.kernel.encryption = volume.Result{} },
			Unsure, "loop devices", "", "", Unsure},
		{"ext4 encryption", func(f *facts, _ *machine, _ *Config) {
			f.kernel.encryption = volume.Result{Answer: Unsure, Missing: "free space"}
		}, Unsure, "free space", "", "", Unsure},
		{"keep in an image", func(f *facts, _ *machine, _ *Config) {
			f.kernel.image.volume = ended(&volume.UnsupportedError{Path: "/x", Missing: "the thing", Err: unix.ENOTTY})
		}, No, "the thing", "", "boot Linux 5.8", No},
		{"keep in an image", func(f *facts, _ *machine, _ *Config) {
			f.kernel.image.volume = ended(&volume.ToolError{Tool: "mke2fs", Err: exec.ErrNotFound})
		}, Unsure, "mke2fs", "", "", Unsure},
		{"overlay store", func(f *facts, _ *machine, _ *Config) { f.kernel.image.overlay = ended(unix.ENODEV) },
			No, "new enough (4.19) and says no; built without CONFIG_OVERLAY_FS", "modprobe overlay", "", No},
		{"overlay store", func(f *facts, _ *machine, _ *Config) {
			f.kernel.image.overlay = ended(errors.Join(nil, wrong("a deleted file is still there")))
		}, No, "a deleted file is still there", "modprobe overlay", "", No},
		{"remount while busy", func(f *facts, _ *machine, _ *Config) {
			f.kernel.image.remount = ended(wrong("a name that came later stays missing"))
		}, No, "stays missing", "", "boot Linux 4.19", No},
		{"lock with proof", func(f *facts, _ *machine, _ *Config) {
			f.kernel.image.proof = ended(wrong("a plaintext name shows"))
		}, No, "a plaintext name shows", "", "boot Linux 5.4", No},
		{"lock with proof", func(f *facts, _ *machine, _ *Config) {
			f.kernel.image.proof = ended(&volume.BusyError{What: `"/x"`, Err: context.DeadlineExceeded})
		}, Unsure, "an answer in time", "", "", Unsure},
		{"keep in a directory", func(f *facts, _ *machine, _ *Config) { f.kernel.dir.overlay = ended(unix.EINVAL) },
			No, "--backend dir", "", "the image back-end", Yes},
		{"build sandbox", func(f *facts, _ *machine, _ *Config) { f.kernel.sandbox = ended(failed(unix.ENOSPC)) },
			No, "pid, network", "sysctl -w user.max_pid_namespaces=15000 user.max_net_namespaces=15000 user.max_mnt_namespaces=15000", "", No},
		{"build sandbox", func(f *facts, _ *machine, _ *Config) {
			f.kernel.sandbox = ended(errors.New("there is no /bin/sh to start"))
		},
			Unsure, "/bin/sh", "", "", Unsure},
		{"user namespaces", func(f *facts, _ *machine, _ *Config) {
			f.kernel.userNS, f.kernel.userNSLimit = ended(failed(unix.ENOSPC)), "user.max_user_namespaces is 0"
		}, No, "user namespaces", "sysctl -w user.max_user_namespaces=15000", "build users", Yes},
		{"user namespaces", func(f *facts, _ *machine, _ *Config) {
			f.kernel.userNS, f.nix.buildUsers = ended(failed(unix.ENOSPC)), nil
		}, No, "user namespaces", "sysctl -w user.max_user_namespaces=15000", "", No},
		{"user namespaces", func(f *facts, _ *machine, _ *Config) {
			f.kernel.userNSLimit = "kernel.apparmor_restrict_unprivileged_userns is 1"
		}, Yes, "", "", "", Yes},
		{"locked memory", func(f *facts, _ *machine, _ *Config) { f.kernel.memory = ended(fmt.Errorf("lock: %w", unix.ENOMEM)) },
			No, "RLIMIT_MEMLOCK", "ulimit -l 1024", "LimitMEMLOCK", No},
		{"process handles", func(f *facts, m *machine, _ *Config) {
			f.kernel.pidfd, m.release = ended(unix.ENOSYS), release{5, 2}
		}, No, "it came with Linux 5.3, this is 5.2", "", "boot Linux 5.3", No},
		{"process handles", func(f *facts, m *machine, _ *Config) {
			f.kernel.pidfd, m.release = ended(unix.ENOSYS), release{}
		}, No, "pidfd_open(2) (function not implemented)", "", "boot Linux 5.3", No},
		{"safe paths", func(f *facts, _ *machine, _ *Config) { f.kernel.openat2 = ended(unix.EPERM) },
			No, "container", "", "container", No},
		{"fast AES", func(f *facts, _ *machine, _ *Config) { f.kernel.aesDriver = "xts(ecb(aes-fixed-time))" },
			No, "does not use them", "modprobe aesni_intel", "ARM", Yes},
		{"fast AES", func(f *facts, _ *machine, _ *Config) { f.kernel.aesDriver, f.kernel.aesCPU = "", No },
			No, "instructions of the processor", "", "works all the same", Yes},
		{"fast AES", func(f *facts, _ *machine, _ *Config) { f.kernel.aesDriver, f.kernel.aesCPU = "", Unsure },
			Unsure, "flags", "", "", Yes},
		{"fast AES", func(f *facts, _ *machine, _ *Config) { f.kernel.aesDriver = "" }, Yes, "", "", "", Yes},

		// Without root.
		{"root", func(_ *facts, m *machine, _ *Config) { m.root, m.sudo = false, true },
			No, "root", "sudo overkeep doctor", "", Yes},
		{"mount namespaces", func(f *facts, m *machine, _ *Config) {
			m.root, m.sudo, f.kernel.namespace = false, true, outcome{}
		}, Unsure, "root", "sudo overkeep doctor", "", Unsure},
		{"mount namespaces", func(f *facts, m *machine, c *Config) {
			m.root, m.sudo, m.at, f.kernel.namespace = false, true, "/srv/x", outcome{}
		}, Unsure, "root", "sudo overkeep --root /srv/x doctor", "", Unsure},
		{"ext4 encryption", func(f *facts, m *machine, _ *Config) {
			m.root, m.sudo, f.kernel.encryption = false, true, volume.Result{}
		}, Unsure, "root", "sudo overkeep doctor", "", Unsure},
		{"user namespaces", func(f *facts, m *machine, _ *Config) {
			m.root, m.sudo, f.kernel.userNS, f.kernel.userNSLimit = false, true, ended(failed(unix.EPERM)), "x is 1"
		}, Unsure, "root", "sudo overkeep doctor", "x is 1", Yes},
		{"locked memory", func(f *facts, m *machine, _ *Config) {
			m.root, m.sudo, f.kernel.memory = false, true, ended(unix.EPERM)
		}, Unsure, "root", "sudo overkeep doctor", "", Unsure},
		{"encryption", func(f *facts, m *machine, _ *Config) {
			m.root, m.sudo, f.fs.encryption = false, true, volume.Result{}
		}, Unsure, "root", "sudo overkeep doctor", "", Unsure},

		// Filesystem.
		{"encryption", func(f *facts, _ *machine, _ *Config) {
			f.fs.encryption = volume.Result{Answer: No, Missing: "the flag", Remedy: "tune2fs -O encrypt /dev/sda2"}
		}, No, "the flag", "tune2fs -O encrypt /dev/sda2", "overkeep init --on-image FILE", No},
		{"encryption", func(f *facts, m *machine, _ *Config) {
			m.sudo, m.at = true, "/srv/x"
			f.fs.encryption = volume.Result{Answer: No, Missing: "btrfs", Remedy: "--on-image FILE"}
		}, No, "btrfs", "sudo overkeep --root /srv/x init --on-image FILE", "", No},
		{"encryption", func(f *facts, _ *machine, _ *Config) {
			f.fs.encryption = volume.Result{Answer: No, Missing: "btrfs", Remedy: "--on-image FILE"}
			f.kernel.image.volume = ended(unix.ENOTTY)
		}, No, "btrfs", "overkeep init --on-image FILE", "did not work above", No},
		{"encryption", func(f *facts, _ *machine, _ *Config) {
			f.fs.encryption = volume.Result{Answer: No, Missing: "the kernel option"}
		}, No, "the kernel option", "", "CONFIG_FS_ENCRYPTION", No},
		{"encryption", func(f *facts, _ *machine, _ *Config) {
			f.fs.encryption = volume.Result{Answer: Unsure, Missing: "a writable filesystem"}
		}, Unsure, "a writable filesystem", "", "", Unsure},
		{"exchange of directories", func(f *facts, _ *machine, _ *Config) { f.fs.exchange = ended(unix.EINVAL) },
			No, "RENAME_EXCHANGE", "overkeep init --root DIR", "ext4, xfs", No},
		{"exchange of directories", func(f *facts, _ *machine, _ *Config) { f.fs.exchange = ended(unix.EROFS) },
			Unsure, "read-only", "", "", Unsure},
		{"upper layer beside the state", func(f *facts, _ *machine, _ *Config) { f.fs.overlay = ended(unix.EINVAL) },
			No, "--backend dir", "", "image back-end", Yes},
		{"e2fsprogs", func(f *facts, m *machine, _ *Config) { f.fs.tools, m.sudo = []string{"mke2fs", "e2fsck"}, true },
			No, "mke2fs and e2fsck", "sudo apt install e2fsprogs", "", No},
		{"free space", func(f *facts, _ *machine, _ *Config) { f.fs.free = 10 << 20 }, No, "256 MiB", "", "--on-image", Yes},
		{"free space", func(f *facts, _ *machine, _ *Config) { f.fs.free = -1 }, Unsure, "free space", "", "", Yes},
		{"parent directories", func(f *facts, _ *machine, _ *Config) { f.fs.stairs[2].mode |= 0o002 },
			No, "/var can be changed by others", "chmod o-w /var", "", No},
		{"parent directories", func(f *facts, _ *machine, _ *Config) { f.fs.stairs[1].mode |= 0o002 | fs.ModeSticky },
			No, "/run can be changed by others", "", "another --root", No},
		{"parent directories", func(f *facts, _ *machine, _ *Config) { f.fs.stairs[1].uid = 1000 },
			No, "/run belongs to uid 1000", "chown root /run", "", No},
		{"parent directories", func(f *facts, m *machine, _ *Config) {
			m.at, f.fs.root = "/srv/x", "/srv/x"
			f.fs.stairs[1].mode = fs.ModeSymlink | 0o777
		}, No, "symbolic link", `overkeep doctor --root "$(realpath /srv/x)"`, "", No},
		{"parent directories", func(f *facts, _ *machine, _ *Config) { f.fs.stairs[1].mode = 0o644 },
			No, "/run is not a directory", "", "another --root", No},
		{"parent directories", func(f *facts, _ *machine, _ *Config) { f.fs.stairs = nil }, Unsure, "/run/overkeep", "", "", Unsure},
		{"freed blocks are discarded", func(f *facts, _ *machine, _ *Config) { f.fs.trim = trimNever },
			No, "freed blocks", "systemctl enable --now fstrim.timer", "", Yes},
		{"freed blocks are discarded", func(f *facts, _ *machine, _ *Config) { f.fs.trim = trimWeekly }, Yes, "", "", "", Yes},
		{"freed blocks are discarded", func(f *facts, _ *machine, _ *Config) { f.fs.trim = trimUnable }, Yes, "", "", "", Yes},
		{"freed blocks are discarded", func(f *facts, _ *machine, _ *Config) { f.fs.trim = trimUnknown }, Unsure, "mount options", "", "", Yes},

		// Nix.
		{"nix-daemon", func(f *facts, m *machine, _ *Config) { f.nix.daemon, m.sudo = "", true },
			No, "/run/current-system/sw/bin", "sudo apt install nix-setup-systemd", "", No},
		{"nix-daemon", func(f *facts, m *machine, _ *Config) { f.nix.daemon, f.nix.debian, m.sudo = "", false, true },
			No, "nix-daemon in any", nixInstaller, "", No},
		{"nix-daemon", func(f *facts, _ *machine, _ *Config) { f.nix.client = "" }, No, "program nix", "apt install nix-setup-systemd", "", No},
		{"Nix 2.22", func(f *facts, _ *machine, _ *Config) { f.nix.daemon = "" }, Unsure, "a nix-daemon", "", "", No},
		{"Nix 2.22", func(f *facts, _ *machine, _ *Config) { f.nix.version = "nix (Nix) 2.8.0" },
			No, "2.22 or newer", "apt install nix-setup-systemd", "Debian 13", No},
		{"Nix 2.22", func(f *facts, _ *machine, _ *Config) { f.nix.version, f.nix.debian = "nix (Nix) 2.21.4", false },
			No, "2.22 or newer", nixInstaller, "", No},
		{"Nix 2.22", func(f *facts, _ *machine, _ *Config) { f.nix.version = "nix (Nix) 2.22.0" }, Yes, "", "", "", Yes},
		{"Nix 2.22", func(f *facts, _ *machine, _ *Config) {
			f.nix.version, f.nix.versionErr = "\x1b[2J\n", errors.New("exit status 1\nSegfault")
		}, Unsure, "exit status 1 Segfault", "", "", Unsure},
		{"experimental feature", func(f *facts, _ *machine, _ *Config) {
			f.nix.settings["experimental-features"] = "flakes not-local-overlay-store nix-command"
		}, No, "does not know", "apt install nix-setup-systemd", "", No},
		{"experimental feature", func(f *facts, _ *machine, _ *Config) {
			f.nix.settings, f.nix.settingsErr = nil, errors.New("exit status 1: 'config' is not a recognised command")
		}, Unsure, "not a recognised command", "", "", Unsure},
		{"local-overlay store", func(f *facts, _ *machine, _ *Config) {
			f.nix.trial = ended(wrong("exit status 1: error: don't know how to open Nix store"))
		}, No, "don't know how to open", "apt install nix-setup-systemd", "", No},
		{"local-overlay store", func(f *facts, _ *machine, _ *Config) { f.nix.trial = ended(fmt.Errorf("%w", plain{unix.ENOSYS})) },
			Unsure, "function not implemented", "", "", Unsure},
		{"local-overlay store", func(f *facts, _ *machine, _ *Config) { f.nix.trial = behind("the program nix") },
			Unsure, "the program nix has to work first", "", "", Unsure},
		{"system daemon answers", func(f *facts, m *machine, _ *Config) {
			m.sudo = true
			f.nix.answers = ended(&os.SyscallError{Syscall: "connect", Err: unix.ENOENT})
		}, No, "a socket at /nix/var/nix/daemon-socket/socket", "sudo systemctl enable --now nix-daemon.socket", "", No},
		{"system daemon answers", func(f *facts, m *machine, _ *Config) {
			m.sudo, f.login.systemd, f.nix.answers = true, false, ended(unix.ECONNREFUSED)
		}, No, "somebody who listens", "sudo sh -c 'nix-daemon &'", "", No},
		{"system daemon answers", func(f *facts, _ *machine, _ *Config) {
			f.nix.answers = ended(&lower.VersionError{Peer: "upstream", Got: 1<<8 | 20})
		}, No, "worker protocol 1.20", "apt install nix-setup-systemd", "", No},
		{"system daemon answers", func(f *facts, _ *machine, _ *Config) { f.nix.answers = ended(&lower.DaemonError{Text: "no"}) },
			No, "refuses this user", "", "allowed-users", No},
		{"system daemon answers", func(f *facts, _ *machine, _ *Config) { f.nix.answers = ended(unix.EACCES) },
			Unsure, "permission", "", "root", Unsure},
		{"system daemon answers", func(f *facts, _ *machine, _ *Config) { f.nix.answers = ended(context.DeadlineExceeded) },
			Unsure, "deadline", "systemctl enable --now nix-daemon.socket", "", Unsure},
		{"build users", func(f *facts, m *machine, _ *Config) {
			m.sudo, f.nix.groupFound, f.nix.buildUsers = true, false, nil
		}, No, "the group nixbld", "sudo sh -c " + quote("groupadd -r nixbld; "+useradd), "", No},
		{"build users", func(f *facts, _ *machine, _ *Config) { f.nix.buildUsers = nil }, No, "no build can run", useradd, "", No},
		{"build users", func(f *facts, _ *machine, _ *Config) { f.nix.buildGroup, f.nix.buildUsers = "", nil },
			No, "would run as root", "sed -i '/^build-users-group/d' /etc/nix/nix.conf", "nixbld", No},
		{"build users", func(f *facts, _ *machine, _ *Config) {
			f.nix.settings["auto-allocate-uids"], f.nix.groupFound, f.nix.buildUsers = "true", false, nil
		}, Yes, "", "", "", Yes},
		{"system store", func(f *facts, _ *machine, _ *Config) { f.nix.store, f.nix.storeErr = pathFacts{}, fs.ErrNotExist },
			No, "/nix/store", "apt install nix-setup-systemd", "", No},
		{"system store", func(f *facts, _ *machine, _ *Config) { f.nix.store, f.nix.storeErr = pathFacts{}, unix.EIO },
			Unsure, "input/output error", "", "", Unsure},
		{"system store", func(f *facts, _ *machine, _ *Config) { f.nix.store.mode = fs.ModeSymlink | 0o777 },
			No, "symbolic link", "", "bind-mount", No},
		{"system store", func(f *facts, _ *machine, _ *Config) { f.nix.store.mode = 0o644 }, No, "a directory", "apt install nix-setup-systemd", "", No},
		{"system store", func(f *facts, _ *machine, _ *Config) { f.nix.store.uid = 1000 }, No, "single-user", "", "many users", No},
		{"system store", func(f *facts, _ *machine, _ *Config) { f.nix.store.mode |= 0o002 }, No, "by everybody", "chmod o-w /nix/store", "", No},
		{"system store", func(f *facts, _ *machine, _ *Config) { f.nix.store.mode = fs.ModeDir | 0o750 },
			No, "cannot be read", "chmod o+rx /nix/store", "", No},
		{"system store", func(f *facts, _ *machine, _ *Config) { f.nix.inView = true }, Unsure, "inside a view", "exit", "outside", Unsure},
		{"store as lower layer", func(f *facts, _ *machine, _ *Config) {
			f.nix.asLower, f.nix.storeType = ended(fmt.Errorf("mount: %w", unix.EINVAL)), "fuse.x"
		}, No, "fuse.x", "", "move /nix", No},
		{"system store is plain", func(f *facts, _ *machine, _ *Config) { f.nix.encrypted = true }, No, "fscrypt", "", "not encrypted", Yes},
		{"sandbox of the system's builds", func(f *facts, m *machine, _ *Config) { f.nix.settings["sandbox"], m.sudo = "relaxed", true },
			No, "sandbox = true", `sudo sh -c 'echo '\''sandbox = true'\'' >>/etc/nix/nix.conf'`, "", Yes},
		{"sandbox of the system's builds", func(f *facts, _ *machine, _ *Config) { f.nix.settings = nil }, Unsure, "settings", "", "", Unsure},
		{"nobody is asked for private hashes", func(f *facts, _ *machine, _ *Config) { f.nix.substituters = nixconf.Inherit },
			No, "hash of a private path", "", `"none"`, Yes},
		{"nobody is asked for private hashes", func(f *facts, _ *machine, _ *Config) { f.nix.configErr = errors.New("settings x:3: bad") },
			No, "settings x:3", "", "mend the line", No},

		// Login.
		{"PAM", func(f *facts, _ *machine, _ *Config) { f.login.pam = "" }, No, "session stack", "apt install libpam-runtime", "", Yes},
		{"systemd", func(f *facts, _ *machine, _ *Config) { f.login.systemd = false }, No, "as the init", "", "overkeep lock", Yes},
		{"logind", func(f *facts, _ *machine, _ *Config) { f.login.seats = false }, No, "systemd-logind", "systemctl start systemd-logind", "", Yes},
		{"logind", func(f *facts, _ *machine, _ *Config) { f.login.seats, f.login.systemd = false, false }, No, "logind", "", "as the init", Yes},
		{"logind", func(f *facts, _ *machine, _ *Config) { f.login.bus = ended(unix.ECONNREFUSED) }, No, "system bus", "systemctl start dbus.socket", "", Yes},
		{"logind", func(f *facts, _ *machine, _ *Config) { f.login.bus = ended(unix.EACCES) }, Unsure, "permission", "", "", Yes},
		{"user sessions", func(f *facts, _ *machine, _ *Config) { f.login.userUnit = false }, No, "user@.service", "apt install libpam-systemd", "", Yes},
		{"user sessions", func(f *facts, _ *machine, _ *Config) { f.login.userUnit, f.login.runDir = false, true }, Yes, "", "", "", Yes},
		{"user", func(f *facts, _ *machine, _ *Config) { f.login.userKnown = false }, No, "of that name", "useradd -m alice", "", No},
		{"user", func(f *facts, _ *machine, c *Config) { f.login.userKnown, c.User = false, "-x; rm" }, No, "of that name", "useradd -m '-x; rm'", "", No},
		{"user", func(f *facts, _ *machine, _ *Config) {
			f.login.userKnown, f.login.userErr = false, errors.New("no answer")
		}, Unsure, "no answer", "", "", Unsure},
		{"user", func(f *facts, _ *machine, _ *Config) { f.login.uid = 0 }, No, "a person", "", "--user NAME", No},
		{"user", func(f *facts, _ *machine, _ *Config) { f.login.homeUID = -1 }, No, "home directory", "mkhomedir_helper alice", "", No},
		{"user", func(f *facts, _ *machine, _ *Config) { f.login.homeUID = 1001 }, No, "uid 1001", "", "--user", No},
		{"unlock at login", func(f *facts, m *machine, _ *Config) { f.login.module, m.sudo = "", true }, No, "not installed", "sudo overkeep unlock", "", Yes},
		{"unlock at login", func(f *facts, _ *machine, _ *Config) { f.login.moduleOn = false }, No, "/etc/pam.d", "pam-auth-update --enable overkeep", "", Yes},

		// Safety.
		{"swap", func(f *facts, _ *machine, _ *Config) {
			f.safety.swaps = []swapFacts{{"/dev/dm-1", Yes}, {"/dev/sda3", No}, {"/my swap", No}, {"/x", Unsure}}
		}, No, "encryption of /dev/sda3, '/my swap'", "swapoff /dev/sda3 '/my swap'", "crypttab", Yes},
		{"swap", func(f *facts, _ *machine, _ *Config) { f.safety.swaps = []swapFacts{{"/x", Unsure}} }, Unsure, "/x is encrypted", "", "", Yes},
		{"swap", func(f *facts, _ *machine, _ *Config) { f.safety.swapErr = errors.New("line 2 is malformed") }, Unsure, "line 2", "", "", Yes},
		{"swap", func(f *facts, _ *machine, _ *Config) { f.safety.swaps = nil }, Yes, "", "", "", Yes},
		{"hibernation", func(f *facts, _ *machine, _ *Config) {
			f.safety.canSleep, f.safety.resume, f.safety.resumeOn = true, true, No
		},
			No, "keys of open keeps", "systemctl mask hibernate.target hybrid-sleep.target suspend-then-hibernate.target", "overkeep lock", Yes},
		{"hibernation", func(f *facts, _ *machine, _ *Config) { f.safety.canSleep, f.safety.resume = true, true },
			Unsure, "whether the device", "systemctl mask hibernate.target hybrid-sleep.target suspend-then-hibernate.target", "", Yes},
		{"hibernation", func(f *facts, _ *machine, _ *Config) {
			f.safety.canSleep, f.safety.resume, f.safety.resumeOn = true, true, Yes
		}, Yes, "", "", "", Yes},
		{"hibernation", func(f *facts, _ *machine, _ *Config) {
			f.safety.canSleep, f.safety.resumeOn, f.safety.masked = true, No, true
		}, Yes, "", "", "", Yes},
		{"hibernation", func(f *facts, _ *machine, _ *Config) { f.safety.resume = true }, Yes, "", "", "", Yes}, // the kernel cannot
		{"full-disk encryption", func(f *facts, _ *machine, _ *Config) { f.safety.fullDisk, f.safety.device = No, "/dev/sda2" },
			No, "use full-disk encryption too if you can", "", "cryptsetup", Yes},
		{"full-disk encryption", func(f *facts, _ *machine, _ *Config) { f.safety.fullDisk, f.safety.fsType = "", "zfs" }, Unsure, "zfs", "", "", Yes},
		{"core dumps", func(f *facts, _ *machine, _ *Config) { f.safety.dumps = dumpFile }, No, "core dumps", "sysctl -w kernel.core_pattern='|/bin/false'", "ulimit -c 0", Yes},
		{"core dumps", func(f *facts, m *machine, _ *Config) { f.safety.dumps, m.sudo = dumpProgram, true },
			No, "core dumps", `sudo sh -c 'sysctl -w kernel.core_pattern='\''|/bin/false'\'''`, "", Yes},
		{"core dumps", func(f *facts, _ *machine, _ *Config) { f.safety.dumps, f.safety.dumpStored = dumpSystemd, true },
			No, "core dumps", `mkdir -p /etc/systemd/coredump.conf.d && printf '[Coredump]\nStorage=none\nProcessSizeMax=0\n' >/etc/systemd/coredump.conf.d/overkeep.conf`, "", Yes},
		{"core dumps", func(f *facts, _ *machine, _ *Config) { f.safety.dumps = dumpSystemd }, Yes, "", "", "", Yes},
		{"core dumps", func(f *facts, _ *machine, _ *Config) { f.safety.dumpsErr = unix.EACCES }, Unsure, "permission denied", "", "", Yes},
	} {
		f, m, conf := good()
		c.set(&f, &m, &conf)
		checks := f.checks(m, conf)
		sane(t, checks)
		got := find(t, checks, c.check)
		if got.Answer != c.answer || !strings.Contains(got.Missing, c.missing) || got.Remedy != c.remedy || !strings.Contains(got.Or, c.or) {
			t.Errorf("%s (%s):\n got %+v\nwant %s | %s | %s | %s", c.check, c.missing, got, c.answer, c.missing, c.remedy, c.or)
		}
		if v := Verdict(checks); v != c.verdict {
			t.Errorf("%s (%s): verdict %s, want %s", c.check, c.missing, v, c.verdict)
		}
	}
}

func TestVerdict(t *testing.T) {
	yes, no, unsure := Check{Answer: Yes, Needed: true}, Check{Answer: No, Needed: true}, Check{Answer: Unsure, Needed: true}
	for _, c := range []struct {
		want Answer
		in   []Check
	}{
		{Yes, nil}, {Yes, []Check{yes}}, {No, []Check{unsure, yes, no}}, {No, []Check{no, unsure}}, {Unsure, []Check{yes, unsure}},
		{Yes, []Check{yes, {Answer: No}, {Answer: Unsure}}},
	} {
		if got := Verdict(c.in); got != c.want {
			t.Errorf("%v: %s", c.in, got)
		}
	}
}

func TestEncrypted(t *testing.T) {
	crypt := block{uuid: "CRYPT-LUKS2-x", below: []string{"sda"}}
	tree := map[string]block{
		"sda": {}, "sda1": {below: []string{"sda"}}, "luks": crypt, "plain": {uuid: "CRYPT-PLAIN-swap", below: []string{"sda1"}},
		"lv on luks": {uuid: "LVM-abc", below: []string{"luks"}}, "lv on both": {uuid: "LVM-abc", below: []string{"luks", "sda1"}},
		"lv on hole": {uuid: "LVM-abc", below: []string{"luks", "gone"}}, "loop": {below: []string{"lv on luks"}}, "loop on hole": {below: []string{""}},
		"zram": {ram: true}, "zram backed": {below: []string{"sda1"}}, "fake": {uuid: "LVM-CRYPT-", below: []string{"sda"}},
		"circle": {below: []string{"circle2"}}, "circle2": {below: []string{"circle"}},
	}
	for name, want := range map[string]Answer{
		"sda": No, "sda1": No, "luks": Yes, "plain": Yes, "lv on luks": Yes, "lv on both": No, "lv on hole": Unsure, "loop": Yes,
		"loop on hole": Unsure, "zram": Yes, "zram backed": No, "fake": No, "circle": Unsure, "": Unsure, "unheard of": Unsure,
	} {
		if got := encrypted(tree, name); got != want {
			t.Errorf("%s: %s, want %s", name, got, want)
		}
	}
}

// Run with probes of its own: the order is fixed, and a root that cannot be is
// told without trying anything.
func TestRunOrder(t *testing.T) {
	f, m, _ := good()
	p := probes{
		func(Config) machine { return m },
		func(context.Context) kernelFacts { return f.kernel },
		func(context.Context, Config) fsFacts { return f.fs },
		func(context.Context, Config) nixFacts { return f.nix },
		func(context.Context, Config) loginFacts { return f.login },
		func(context.Context, Config) safetyFacts { return f.safety },
	}
	checks := run(t.Context(), Config{User: "alice"}, p)
	sane(t, checks)
	if Verdict(checks) != Yes {
		t.Errorf("%+v", checks)
	}
	if got := run(t.Context(), Config{Root: "relative"}, probes{}); len(got) != 1 || got[0].Answer != No || !got[0].Needed {
		t.Errorf("%+v", got)
	}
	text, err := json.Marshal(checks[0])
	if err != nil || string(text) != `{"name":"root","group":"kernel","answer":"yes","needed":false,"found":"runs as root"}` {
		t.Errorf("%s, %v", text, err)
	}
}
