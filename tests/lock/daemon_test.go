package lock

import (
	"slices"
	"strings"
	"testing"

	"overkeep/overlay/holder"
	"overkeep/systemd/keep"
	"overkeep/tests/fixture"
	"overkeep/tests/lock/proof"
)

// stopped is a builder's script that stops, so that its build never ends unasked.
// The builder itself cannot: it is the first process of its pid namespace.
const stopped = "/bin/sh -c 'kill -STOP $$'; true"

// building starts a build as alice and returns once its builder has stopped, with
// the client and the machine's pids of builder and worker.
func (k *locked) building(t *testing.T, script string) (client *holding, builder int) {
	t.Helper()
	before := map[int]bool{}
	for _, p := range proof.Processes(t, k.Machine) {
		before[p.PID] = true
	}
	p, err := k.Start("root", asAlice(script))
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(p.Kill)
	proof.Await(t, func() string {
		select {
		case <-p.Done():
			t.Fatalf("the build ended:\n%s", p.Output())
		default:
		}
		for _, x := range proof.Processes(t, k.Machine) {
			if !before[x.PID] && x.State == "T" {
				builder = x.Inside
				return ""
			}
		}
		return "no builder has stopped: " + p.Output()
	})
	return &holding{Proc: p, release: func(*testing.T) { p.Kill(); <-p.Done() }}, builder
}

// TestBuild: a build in progress holds the keep, by its builder (which lives in a
// namespace of its own) and by the daemon's worker (which has the database open).
func TestBuild(t *testing.T) {
	both(t, func(t *testing.T, k *locked) {
		build := "exec nix-build --no-out-link -E " + fixture.Quote(fixture.Derivation("endless", stopped))
		check := func(t *testing.T, hs []holder.Holder, builder int) {
			t.Helper()
			if !slices.ContainsFunc(hs, func(h holder.Holder) bool { return h.PID == builder }) {
				t.Errorf("the builder, pid %d, is not named: %v", builder, hs)
			}
			if !slices.ContainsFunc(hs, func(h holder.Holder) bool {
				return strings.Contains(h.Command, "nix-daemon") &&
					slices.ContainsFunc(h.Holds, func(x holder.Hold) bool { return x.How == holder.OpenFile })
			}) {
				t.Errorf("no nix-daemon is named: %v", hs)
			}
		}
		t.Run("refused", func(t *testing.T) {
			e := k.open(t)
			client, builder := k.building(t, build)
			check(t, k.refused(t), builder)
			if s := k.status(t); s.State != keep.Unlocked {
				t.Errorf("after a refusal the state is %q", s.State)
			}
			e.Readable(t)
			// Also a second build is still let in.
			k.Alice(t, nixBuild("second", "echo > $out"))
			client.release(t)
			k.lockSoon(t)
			k.isLocked(t, e)
		})
		t.Run("waited for", func(t *testing.T) {
			e := k.open(t)
			client, _ := k.building(t, build)
			p := k.waiting(t)
			e.Readable(t)
			client.release(t)
			if r, err := p.Wait(); err != nil || r.Code != 0 {
				t.Fatalf("lock --wait: %v, exit code %d\n%s", err, r.Code, r.Stdout)
			}
			k.isLocked(t, e)
		})
		t.Run("waited for to its good end", func(t *testing.T) {
			e := k.open(t)
			client, builder := k.building(t, "exec nix-build --no-out-link -E "+
				fixture.Quote(fixture.Derivation("patient", stopped+"; echo done > $out")))
			p := k.waiting(t)
			// The builder has a pid namespace of its own; its number in the machine
			// is the second of NSpid, which is what lock names, too.
			k.Must(t, "root", "kill -CONT "+fixture.Quote(itoa(builder)))
			if r, err := p.Wait(); err != nil || r.Code != 0 {
				t.Fatalf("lock --wait: %v, exit code %d\n%s", err, r.Code, r.Stdout)
			}
			k.isLocked(t, e)
			r, err := client.Wait()
			if err != nil || r.Code != 0 {
				t.Fatalf("a build that lock waited for: %v, exit code %d\n%s", err, r.Code, r.Stdout)
			}
			e = k.open(t)
			if out := k.Alice(t, nixBuild("patient", stopped+"; echo done > $out")); k.Alice(t, "cat "+out) != "done" {
				t.Error("the build that lock waited for did not leave its output")
			}
			k.lockSoon(t)
			k.isLocked(t, e)
		})
		t.Run("killed", func(t *testing.T) {
			e := k.open(t)
			client, builder := k.building(t, build)
			check(t, k.kill(t), builder)
			k.isLocked(t, e)
			<-client.Done()
			k.open(t)
			k.Alice(t, "nix-store --verify --check-contents")
			k.lockSoon(t)
			k.isLocked(t, e)
		})
	})
}

// lockSoon locks once what the daemon still does for a client that has gone is
// over: until then lock refuses, which is its right.
func (k *locked) lockSoon(t *testing.T) {
	t.Helper()
	proof.Await(t, func() string {
		switch r := k.Overkeep(t, "", "lock", name); r.Code {
		case 0:
			return ""
		case exitNotLocked:
			return r.Stderr
		default:
			t.Fatalf("lock: exit code %d\n%s%s", r.Code, r.Stdout, r.Stderr)
			return ""
		}
	})
}

// TestSecondDaemon: a nix-daemon that somebody started by hand in the view is
// named: it has taken a copy of the mounts, and its worker the database.
func TestSecondDaemon(t *testing.T) {
	both(t, func(t *testing.T, k *locked) {
		daemon := asRoot(`export NIX_CONF_DIR=/run/overkeep/alice/nix NIX_REMOTE= NIX_DAEMON_SOCKET_PATH=/run/second/socket
			nix-daemon & trap "kill $!" EXIT
			until test -S $NIX_DAEMON_SOCKET_PATH; do sleep 0.01; done
			echo pid $!; wait`)
		start := func(t *testing.T) *holding {
			t.Helper()
			k.Must(t, "root", "rm -rf /run/second; mkdir /run/second")
			return k.hold(t, daemon, "")
		}
		t.Run("idle", func(t *testing.T) {
			e := k.open(t)
			held := start(t)
			named(t, k.refused(t), held.pid, holder.MountNamespace)
			e.Readable(t)
			held.release(t)
			k.lockSoon(t)
			k.isLocked(t, e)
		})
		t.Run("building", func(t *testing.T) {
			e := k.open(t)
			held := start(t)
			client, builder := k.building(t, "NIX_REMOTE=unix:///run/second/socket exec nix-build --no-out-link -E "+
				fixture.Quote(fixture.Derivation("by-hand", stopped)))
			hs := k.refused(t)
			named(t, hs, held.pid, holder.MountNamespace)
			if !slices.ContainsFunc(hs, func(h holder.Holder) bool { return h.PID == builder }) {
				t.Errorf("the builder, pid %d, is not named: %v", builder, hs)
			}
			e.Readable(t)
			k.kill(t)
			k.isLocked(t, e)
			client.release(t)
			held.release(t)
		})
	})
}
