package badinput

import (
	"fmt"
	"testing"
)

// TestSpace: room is asked for before anything begins; without it nothing has changed.
func TestSpace(t *testing.T) {
	w := newWorld(t, "--size", "64M")
	w.fullKeep(t)
}

func (w *world) fullKeep(t *testing.T) {
	w.add(t, tree{"secret-small", "echo small >$out", nil},
		tree{"secret-large", "head -c 80M /dev/urandom >$out", nil},
		tree{"secret-holes", "truncate -s 400M $out", nil})
	before := w.where(t)
	// All or nothing: not even what would fit.
	w.says(t, noSpace, []string{"apply", "--keep", "alice", "--yes"}, "the keep has", "bytes free", "nothing was moved", "overkeep run -- nix-collect-garbage")
	w.same(t, before)
	w.exec(t, noSpace, "seal", "--keep", "alice", "--yes", at("secret-large"))
	w.same(t, before)
	w.sound(t)
	w.gone(t, "secret-large")
	r := w.Overkeep(t, "", "apply", "--keep", "alice", "--yes")
	t.Logf("a hole of 400 MB into a keep of 64 MB: exit code %d", r.Code)
	switch r.Code {
	case ok:
		w.home(t, "keep", "secret-holes", "secret-small")
		w.move(t, ok, "undo")
	case noSpace:
	default:
		t.Errorf("exit code %d\n%s%s", r.Code, r.Stdout, r.Stderr)
	}
	w.home(t, "system", "secret-holes", "secret-small")
	w.gone(t, "secret-holes")

	// Files without a byte take room, too.
	w.add(t, tree{"secret-inodes", "mkdir $out; cd $out; seq -f 'f%.0f' 30000 | xargs touch", nil})
	before = w.where(t)
	out := w.says(t, noSpace, []string{"apply", "--keep", "alice", "--yes"}, "nothing was moved")
	t.Logf("%s", out)
	w.same(t, before)
	w.gone(t, "secret-inodes")
	w.move(t, ok, "apply")
	w.home(t, "keep", "secret-small")
	w.move(t, ok, "undo")

	// A keep that is filled by other things, to different degrees.
	w.add(t, tree{"secret-middle", "head -c 4M /dev/urandom >$out", nil})
	before = w.where(t)
	for _, mb := range []int{2, 10} {
		w.Must(t, "root", fmt.Sprintf(`overkeep run alice --as-root -- bash -euo pipefail -c 'cd /run/overkeep/alice/k; sync -f .
			free=$(($(stat -f -c "%%a * %%S" .))); fallocate -l $((free - %d * 1048576)) filler'`, mb))
		w.exec(t, noSpace, "apply", "--keep", "alice", "--yes")
		w.Must(t, "root", "overkeep run alice --as-root -- rm /run/overkeep/alice/k/filler")
		w.same(t, before)
	}
	w.move(t, ok, "apply")
	w.home(t, "keep", "secret-middle", "secret-small")
	w.sound(t)
}

// TestFullDisk: where the system store lies and the keep's image grows.
func TestFullDisk(t *testing.T) {
	w := newWorld(t, "--size", "256M")
	// fill leaves so much of what the file system calls free. It keeps 16 MB of that for
	// itself, which not even root can have.
	fill := func(mb int) (mend func()) {
		t.Helper()
		w.Must(t, "root", fmt.Sprintf(`sync -f /
			free=$(($(stat -f -c '%%f * %%S' /)))
			fallocate -l $((free - %d * 1048576)) /filler; sync -f /`, mb))
		return func() { w.Must(t, "root", "rm /filler; sync -f /") }
	}
	w.add(t, tree{"secret-there", "head -c 64M /dev/urandom >$out", nil}, tree{"secret-out", "head -c 64M /dev/urandom >$out", nil})
	w.move(t, ok, "seal", at("secret-there"))
	before := w.where(t)
	for _, mb := range []int{40, 60, 76} { // 76: all but what the file system keeps
		mend := fill(mb)
		w.says(t, noSpace, []string{"undo", "--keep", "alice", "--yes"}, "the system store has", "nothing was moved", "sudo nix-collect-garbage")
		w.says(t, noSpace, []string{"seal", "--keep", "alice", "--yes", at("secret-out")}, "the disk that the keep lies on has", "nothing was moved", "Make room on the disk")
		w.same(t, before)
		mend()
	}
	w.Write(t, "/etc/overkeep/policy", "system name \"*\"\n")
	mend := fill(50)
	w.says(t, noSpace, []string{"release", "--keep", "alice", "--yes", at("secret-there")}, "the system store has", "nothing was moved")
	w.says(t, noSpace, []string{"apply", "--keep", "alice", "--yes"}, "the system store has", "nothing was moved")
	w.same(t, before)
	mend()
	w.move(t, ok, "apply")
	w.home(t, "system", "secret-there", "secret-out")
	w.sound(t)
}
