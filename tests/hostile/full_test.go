package hostile

import (
	"fmt"
	"strconv"
	"strings"
	"testing"

	"overkeep/tests/fixture"
)

const smallDisk = "/var/lib/overkeep"

// blocks is the free space of the small disk, in its blocks.
func (l *laptop) blocks(t *testing.T) int {
	t.Helper()
	n, err := strconv.Atoi(l.Must(t, "root", "sync -f "+smallDisk+"; stat -f -c %a "+smallDisk))
	if err != nil {
		t.Fatal(err)
	}
	return n
}

// leave fills the small disk up to at most n free blocks, and empties it again.
func (l *laptop) leave(t *testing.T, n int) (mend func()) {
	t.Helper()
	l.Must(t, "root", fmt.Sprintf(`cd %s; sync -f .
		free=$(stat -f -c %%a .); want=$((free - %d))
		while ! fallocate -l $((want * 4096)) .fill 2>/dev/null; do want=$((want - 1)); done
		sync -f .`, smallDisk, n))
	if got := l.blocks(t); got > n+64 {
		t.Fatalf("%d blocks are free, not %d", got, n)
	}
	return sync1(func() { l.Must(t, "root", "rm "+smallDisk+"/.fill; sync -f "+smallDisk) })
}

// steps are numbers of free blocks, each of the first ones and then coarser: the
// writes of a command fail one after the other. finer is by how much.
func steps(finer int) []int {
	var out []int
	for n := 0; n < 40000; n += 1 + n/finer {
		out = append(out, n)
	}
	return out
}

// disk is the state of the small disk, with fscrypt's metadata on it; that the
// directories of fscrypt are there is no matter.
func (l *laptop) disk(t *testing.T) string {
	t.Helper()
	return l.Must(t, "root", "cd "+smallDisk+"; find . -xdev -mindepth 1 -not -path './lost+found*' -not -name .fill -printf '%p %y %m %s %T@\\n' | sed '/ d /d' | sort; find . -xdev -type d | grep -vxE './.fscrypt(/policies|/protectors)?' | sort")
}

// Wherever in its course init finds the disk full, it says so and leaves nothing
// behind, and the keep that it does make is a good one.
func TestInitOnFullDisk(t *testing.T) {
	l := bare(t)
	for name, flags := range map[string]string{
		"dir": "--user alice --backend dir", "image": "--user alice --size 64M",
		"preallocated": "--user alice --size 64M --preallocate", "on-image": "--user alice --size 64M --on-image " + smallDisk + "/keep.img",
	} {
		t.Run(name, func(t *testing.T) {
			_, done := l.fsDisk(t, "mkfs.ext4 -q -O encrypt -m 0 -b 4096", "")
			defer done()
			before := l.disk(t)
			refused, made := 0, false
			for _, n := range steps(4) {
				mend := l.leave(t, n)
				a := attempt{script: initLine(flags), exit: []int{13}}
				r := l.run(t, a, "--json")
				if r.Code == 0 {
					made = true
					mend()
					break
				}
				refused++
				if r.Code != 13 || !strings.Contains(r.Stderr, "no space left") {
					t.Errorf("with %d blocks: exit code %d\n%s", n, r.Code, r.Stderr)
				}
				l.noRecoveryFile(t)
				if after := l.disk(t); after != before {
					t.Errorf("with %d blocks: left behind:\n%s\nwas:\n%s", n, after, before)
				}
				mend()
				if t.Failed() {
					l.clear(t)
					break
				}
			}
			l.nothingLeft(t)
			if !made || refused < 4 {
				t.Fatalf("refused %d times, made %v", refused, made)
			}
			l.MustOverkeep(t, 0, "", "unlock", "alice", "--identity", "/run/new.txt")
			l.Alice(t, "echo x > x && test $(cat x) = x")
			l.Lock(t, "alice")
			l.MustOverkeep(t, 0, "", "destroy", "alice", "--yes")
			l.Must(t, "root", "rm /run/new.txt")
		})
	}
}

// With the disk full a change of the slots is made whole or not at all, and the
// keep opens and closes; so it does when the keep itself is full.
func TestFullDisk(t *testing.T) {
	l := bare(t)
	for name, flags := range map[string]string{"dir": "--user alice --backend dir", "image": "--user alice --size 64M", "on-image": "--user alice --size 64M --on-image " + smallDisk + "/keep.img"} {
		t.Run(name, func(t *testing.T) {
			_, done := l.fsDisk(t, "mkfs.ext4 -q -O encrypt -m 0 -b 4096", "")
			defer done()
			l.MustOverkeep(t, 0, fixture.Passphrase, strings.Fields(strings.TrimPrefix(initLine(flags), "exec overkeep $json "))...)
			defer func() {
				l.Overkeep(t, "", "lock", "alice", "--kill", "--yes")
				l.Must(t, "root", "rm -f "+smallDisk+"/.fill /run/new.txt; overkeep destroy alice --yes")
			}()
			l.Unlock(t, "alice")
			l.Alice(t, "echo "+word(marker)+" > marker; sync -f .")
			l.Lock(t, "alice")
			slots := func() string { return l.MustOverkeep(t, 0, "", "key", "list", "alice") }
			before, refused := slots(), 0
			add := "exec 3<<<" + word(fixture.Passphrase) + " 4<<<" + word("another passphrase") + "; exec overkeep --json key add alice --passphrase --name another --work-factor 12 --passphrase-fd 3 --new-passphrase-fd 4"
			for _, n := range steps(2) {
				mend := l.leave(t, n)
				r := l.run(t, attempt{script: add}, "")
				after := slots()
				if r.Code == 0 {
					mend()
					break
				}
				refused++
				if r.Code != 13 || !strings.Contains(r.Stderr, "no space left") {
					t.Errorf("key add with %d blocks: exit code %d\n%s", n, r.Code, r.Stderr)
				}
				// What fails after the exchange is told, but the new set stands.
				if after != before && !strings.Contains(after, "another") {
					t.Errorf("key add with %d blocks made of\n%s this:\n%s", n, before, after)
				}
				l.nothingLeft(t)
				// The disk is full below the keep. A directory needs nothing of it to be
				// opened; what is sparse may, and then says so.
				r = l.run(t, attempt{}, "--json")
				switch {
				case r.Code == 0:
					if got := l.Alice(t, "cat marker"); got != marker {
						t.Errorf("it reads %q", got)
					}
					l.Lock(t, "alice")
				case r.Code != 13 || name == "dir":
					t.Errorf("unlock with %d blocks: exit code %d\n%s", n, r.Code, r.Stderr)
				}
				l.nothingLeft(t)
				mend()
				l.Unlock(t, "alice")
				if got := l.Alice(t, "cat marker"); got != marker {
					t.Errorf("it reads %q", got)
				}
				l.Lock(t, "alice")
				if t.Failed() {
					return
				}
				if after != before {
					l.Must(t, "root", "exec 3<<<"+word(fixture.Passphrase)+"; overkeep key remove alice another --passphrase-fd 3")
					before = slots()
				}
			}
			if refused == 0 {
				t.Errorf("no change of the slots was refused")
			}
			l.MustOverkeep(t, 0, "another passphrase", "key", "verify", "alice", "--passphrase-fd", "0")
			l.MustOverkeep(t, 0, fixture.Passphrase, "key", "verify", "alice", "--passphrase-fd", "0")
		})
	}
}

// A build that fills the keep fails; the keep locks, unlocks while it is full, and
// works on once something has been deleted.
func TestFullKeep(t *testing.T) {
	l := bare(t)
	for name, flags := range map[string]string{"dir": "--user alice --backend dir", "image": "--user alice --size 64M", "preallocated": "--user alice --size 64M --preallocate"} {
		t.Run(name, func(t *testing.T) {
			_, done := l.fsDisk(t, "mkfs.ext4 -q -O encrypt -b 4096", "")
			defer done()
			l.MustOverkeep(t, 0, fixture.Passphrase, strings.Fields(strings.TrimPrefix(initLine(flags), "exec overkeep $json "))...)
			defer func() {
				l.Overkeep(t, "", "lock", "alice", "--kill", "--yes")
				l.Must(t, "root", "rm -f "+smallDisk+"/.fill /run/new.txt; overkeep destroy alice --yes")
			}()
			l.Write(t, "/run/big.nix", fixture.Derivation("big", "dd if=/dev/zero of=$out bs=65536"))
			l.Write(t, "/run/small.nix", fixture.Derivation("small", "echo small > $out"))
			l.Unlock(t, "alice")
			l.Alice(t, "echo "+word(marker)+" > marker; head -c 4M /dev/zero > ballast; sync -f .; nix-build -o small /run/small.nix")
			out, err := l.AliceRun("nix-build --no-out-link /run/big.nix")
			if err == nil || !strings.Contains(strings.ToLower(out), "no space left") {
				t.Errorf("a build that fills the keep: %v\n%s", err, out)
			}
			l.Lock(t, "alice")
			l.nothingLeft(t)
			l.Unlock(t, "alice")
			// Full for good this time, to the last block.
			out, _ = l.AliceRun("dd if=/dev/zero of=fill bs=65536 || true; dd if=/dev/zero of=fill2 bs=1 || true; sync -f . || true")
			if !strings.Contains(out, "No space left") {
				t.Errorf("the keep is not full: %s", out)
			}
			l.Lock(t, "alice")
			l.nothingLeft(t)
			for range 2 {
				l.Unlock(t, "alice")
				if got := l.Alice(t, "cat marker small"); got != marker+"\nsmall" {
					t.Errorf("it reads %q", got)
				}
				l.Lock(t, "alice")
			}
			l.Unlock(t, "alice")
			l.Alice(t, "rm -f fill fill2 ballast; sync -f .; nix-collect-garbage; sync -f .; nix-build -o small /run/small.nix; nix-store --verify --check-contents")
			l.Lock(t, "alice")
			l.nothingLeft(t)
		})
	}
}
