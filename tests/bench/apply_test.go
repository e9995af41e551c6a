package bench

import (
	"fmt"
	"os"
	"slices"
	"strconv"
	"strings"
	"testing"
	"time"
	"unsafe"

	"golang.org/x/sys/unix"

	"overkeep/tests/bed/loop"
	"overkeep/tests/fixture"
)

// ext4ResizeFS is EXT4_IOC_RESIZE_FS, _IOW('f', 16, __u64) (include/uapi/linux/ext4.h).
const ext4ResizeFS = 1<<30 | 8<<16 | 'f'<<8 | 16

// grow makes a running machine's disk larger.
func (m factsMachine) grow(b *testing.B, size int64) {
	b.Helper()
	if err := os.Truncate(m.Disk, size); err != nil {
		b.Fatal(err)
	}
	devs, err := loop.Backed(m.Disk)
	if err != nil || len(devs) != 1 {
		b.Fatalf("devices of the disk: %v %v", devs, err)
	}
	dev, err := os.Open(devs[0])
	if err != nil {
		b.Fatal(err)
	}
	defer dev.Close()
	if err := unix.IoctlSetInt(int(dev.Fd()), unix.LOOP_SET_CAPACITY, 0); err != nil {
		b.Fatal(err)
	}
	root, err := os.Open(m.Root)
	if err != nil {
		b.Fatal(err)
	}
	defer root.Close()
	blocks := uint64(size / 4096)
	if _, _, errno := unix.Syscall(unix.SYS_IOCTL, root.Fd(), ext4ResizeFS, uintptr(unsafe.Pointer(&blocks))); errno != 0 {
		b.Fatal(errno)
	}
}

// BenchmarkApply: the whole command, from reading the stores to the last sync, beside the
// copying alone by others into the same file system and the check of what they wrote. Sealing
// also takes the paths out of the system store and overwrites them there, and trims; the peers
// leave everything where it was. Both stores' sides are warm. Aims, of copying several GB: 2 times
// nix copy, 0.8 of cp -a and a check; 200 MiB.
func BenchmarkApply(b *testing.B) {
	m := newFacts(b)
	m.grow(b, 24<<30)
	m.Init(b, "--size=8G")
	m.Unlock(b)
	m.Must(b, "root", `mkdir /srv/make; cd /srv/make
for p in {1..60}; do mkdir -p small-$p/{bin,lib,share}; for f in {1..400}; do
	head -c $(( (f * f * 97 + p) % 20000 )) /dev/urandom > small-$p/share/$f; done; ln -s ../share/1 small-$p/lib/l; done
for p in {1..12}; do mkdir -p large-$p; for f in 1 2 3; do head -c 32M /dev/urandom > large-$p/$f; done; done
head -c 1G /dev/urandom > single-1`)
	paths := strings.Join(strings.Fields(m.Must(b, "root", "cd /srv/make; nix-store --add small-* large-* single-1")), " ")
	m.Must(b, "root", "rm -rf /srv/make; mkdir -p /etc/overkeep /srv/peer")
	const inKeep, onDisk = "/run/overkeep/alice/k/tmp/peer", "/srv/peer"
	asRoot := func(script string) string { return "overkeep run alice --as-root -- bash -c " + fixture.Quote(script) }
	for b.Loop() {
		for _, way := range []struct{ title, policy, target string }{
			{"seal, with wiping", `personal name "*"`, inKeep},
			{"release", `system name "*"`, onDisk},
		} {
			var ours, nix, cp []float64
			peak := 0
			for range 3 {
				// The paths come to where they are to leave from.
				back := `system name "*"`
				if way.target == onDisk {
					back = `personal name "*"`
				}
				m.Must(b, "root", "echo '"+back+"' >/etc/overkeep/policy; overkeep apply --yes --keep alice; echo '"+way.policy+"' >/etc/overkeep/policy")
				clean := asRoot("rm -rf " + way.target + " 2>/dev/null || { chmod -R u+w " + way.target + "; rm -rf " + way.target + "; }; mkdir " + way.target + "; sync -f " + way.target + "; cat " + paths + " 2>/dev/null | wc -c")
				for _, peer := range []struct {
					to      *[]float64
					command string
				}{
					{&nix, "nix --extra-experimental-features nix-command copy --no-check-sigs --to local?root=" + way.target + " " + paths + "; sync -f " + way.target},
					{&cp, "cp -a " + paths + " " + way.target + "; sync -f " + way.target + "; nix --extra-experimental-features nix-command hash path " + way.target + "/* >/dev/null"},
				} {
					m.Must(b, "root", clean)
					s, _, text, done := m.run(b, asRoot(peer.command), "/dev/null", 20*time.Minute)
					if !done {
						b.Fatalf("%s did not end: %s", peer.command[:20], text)
					}
					*peer.to = append(*peer.to, s)
				}
				m.Must(b, "root", clean)
				s, _, text, done := m.run(b, "peak overkeep apply --yes --keep alice", "/run/out", 20*time.Minute)
				if !done {
					b.Fatalf("apply did not end: %s", text)
				}
				if kib, err := strconv.Atoi(lastLine(text)); err == nil {
					peak = max(peak, kib)
				}
				if left := m.Must(b, "root", "overkeep plan --keep alice"); !strings.Contains(left, "Every path lies") {
					b.Fatalf("%s: after it: %s", way.title, left)
				}
				ours = append(ours, s)
			}
			for i, p := range []struct {
				name  string
				times []float64
			}{{"nix copy", nix}, {"cp -a and a check", cp}} {
				ratios := make([]float64, len(ours))
				for i := range ours {
					ratios[i] = p.times[i] / ours[i]
				}
				fmt.Printf("apply: %-20s ours %6.1f s (%d MiB)   %-18s %6.1f s   %.2f times as fast (min %.2f, max %.2f, %d pairs)\n",
					way.title, median(ours), peak>>10, p.name, median(p.times), median(ratios), slices.Min(ratios), slices.Max(ratios), len(ours))
				b.ReportMetric(median(ratios), fmt.Sprintf("times-%s-%d", strings.Fields(way.title)[0][:4], i))
			}
		}
		b.ReportMetric(0, "ns/op")
	}
}
