package badinput

import (
	"fmt"
	"strings"
	"testing"

	"overkeep/tests/bed"
	"overkeep/tests/fixture"
)

// TestHolds: what somebody needs stays where it is, and who that is is named, by the
// plan and by a seal. When the holder is gone it moves.
func TestHolds(t *testing.T) {
	w := newWorld(t)
	t.Run("processes", w.processes)
	t.Run("others", w.others)
	t.Run("a build outside", w.buildOutside)
	t.Run("a build in the view", w.buildInView)
	t.Run("come up later", w.later)
	t.Run("links", w.links)
	t.Run("commands", w.commands)
	t.Run("undo", w.undo)
	t.Run("permission", w.permission)
}

// held says that a path is held by what plan calls why, and by something whose name
// begins so: neither seal nor apply moves it.
func (w *world) held(t *testing.T, name, why, by string) {
	t.Helper()
	if gotWhy, gotBy := w.blockedBy(t, at(name)); gotWhy != why || !strings.HasPrefix(gotBy, by) {
		t.Errorf("%s: blocked by %q %q, want %q %q", name, gotWhy, gotBy, why, by)
	}
	w.says(t, blocked, []string{"seal", "--keep", "alice", "--yes", at(name)}, at(name), by)
	w.exec(t, ok, "apply", "--keep", "alice", "--yes")
	w.home(t, "system", name)
}

// start starts a process of a user's, and waits until it says that it is ready.
func (w *world) start(t *testing.T, user, script string) *bed.Proc {
	t.Helper()
	p, err := w.Start(user, script, daemon)
	if err != nil {
		t.Fatal(err)
	}
	return p
}

// await waits for a condition in the machine; the script's exit code ends a hang.
func (w *world) await(t *testing.T, condition string) {
	t.Helper()
	w.Must(t, "root", "for n in $(seq 3000); do if "+condition+"; then exit 0; fi; read -t 0.02 <> <(:) || :; done; echo never: "+fixture.Quote(condition)+"; exit 1")
}

func (w *world) processes(t *testing.T) {
	for _, c := range []struct{ name, script, ready string }{
		{"secret-cwd", "cd $p; exec sleep 10001", "ls -l /proc/*/cwd"},
		{"secret-open", "exec 7<$p/f; exec sleep 10002", "ls -l /proc/*/fd/7"},
		{"secret-run", "exec $p/run", "ls -l /proc/*/exe"},
		{"secret-environment", "SECRET=$p exec sleep 10003", "cat /proc/*/environ"},
	} {
		w.add(t, tree{c.name, `mkdir $out; echo f >$out/f; cp /usr/bin/busybox $out/busybox; printf '#!/usr/bin/busybox sh\n' >$out/x; cp /usr/bin/sleep $out/run; chmod 755 $out/run`, nil})
		p := w.start(t, "bob", "p="+at(c.name)+"; "+strings.Replace(c.script, "$p/run", "$p/run 10004", 1))
		w.await(t, c.ready+" 2>/dev/null | tr '\\0' '\\n' | grep -q "+at(c.name))
		w.held(t, c.name, "process", "pid ")
		p.Kill()
		<-p.Done()
		w.move(t, ok, "apply")
		w.home(t, "keep", c.name)
	}
	// A process of alice's in her view is one, too: what it has open lies below.
	w.add(t, tree{"secret-in-view", "echo x >$out", nil})
	p := w.start(t, "root", "exec "+fixture.ViewCommand("exec 7<"+at("secret-in-view")+"; exec sleep 10005"))
	w.await(t, "ls -l /proc/*/fd/7 2>/dev/null | grep -q "+at("secret-in-view"))
	w.held(t, "secret-in-view", "process", "pid ")
	p.Kill()
	<-p.Done()
	w.await(t, "! ls -l /proc/*/fd/7 2>/dev/null | grep -q "+at("secret-in-view"))
	w.move(t, ok, "apply")
	w.home(t, "keep", "secret-in-view")
	w.sound(t)
}

// others: roots of another user, of root, of nobody; another keep's pin; a public path
// that somebody holds and that refers to it.
func (w *world) others(t *testing.T) {
	w.add(t, tree{"secret-bobs", "echo x >$out", nil}, tree{"secret-roots", "echo x >$out", nil}, tree{"secret-boot", "echo x >$out", nil},
		tree{"secret-below", "echo x >$out", nil}, tree{"pub-above", "echo x >$out", []string{"secret-below"}})
	w.Must(t, "bob", "nix-store --realise "+at("secret-bobs")+" --add-root ~/result >/dev/null", daemon)
	w.Must(t, "root", "nix-store --realise "+at("pub-above")+" --add-root /root/above >/dev/null; ln -s "+at("secret-roots")+" /nix/var/nix/gcroots/odd; ln -s "+at("secret-boot")+" /run/current-system; ln -s /run/current-system /nix/var/nix/gcroots/", daemon)
	w.held(t, "secret-bobs", "other", "/home/bob/result")
	w.held(t, "secret-roots", "other", "/nix/var/nix/gcroots/odd")
	w.held(t, "secret-boot", "boot", "/run/current-system")
	w.held(t, "secret-below", "other", "/root/above")
	w.home(t, "system", "pub-above")

	w.MustOverkeep(t, 0, "bob's passphrase", "init", "--user", "bob", "--work-factor", "10", "--passphrase-fd", "0", "--recovery-out", "/run/bob", "--yes", "--size", "64M")
	w.MustOverkeep(t, 0, "bob's passphrase", "unlock", "bob", "--passphrase-fd", "0")
	w.add(t, tree{"secret-pinned", "echo x >$out", nil})
	w.Must(t, "root", "overkeep run bob -- nix-store --realise "+at("secret-pinned")+" --add-root /home/bob/keep/result >/dev/null")
	w.MustOverkeep(t, 0, "", "lock", "bob", "--yes") // settled by then
	w.held(t, "secret-pinned", "keep-pin", "/nix/var/nix/gcroots/overkeep/bob")
	w.MustOverkeep(t, 0, "bob's passphrase", "destroy", "bob", "--yes")

	w.Must(t, "root", "rm /home/bob/result /root/above /nix/var/nix/gcroots/odd /nix/var/nix/gcroots/current-system /run/current-system")
	w.move(t, ok, "apply")
	w.home(t, "keep", "secret-bobs", "secret-roots", "secret-boot", "secret-below", "secret-pinned", "pub-above")
	w.sound(t)
}

// slow is a derivation that reads its dependency, waits in its build until gate lets it
// go on, and reads it again.
func slow(name, dep string) string {
	return fixture.Derivation(name, "read x <"+at(dep)+"; echo $x >$out; : >/gate/started; read y </gate/go; read z <"+at(dep)+" && echo $z >>$out", at(dep))
}

const sandbox = " --option sandbox-paths '/bin/sh=/usr/bin/busybox /gate=/run/gate' 2>&1"

// gate is a directory that builds see, which tells them to go on.
func (w *world) gate(t *testing.T) (open func()) {
	t.Helper()
	w.Must(t, "root", "rm -rf /run/gate; mkdir -m 777 /run/gate; mkfifo -m 666 /run/gate/go; chmod 777 /run/gate")
	return func() { w.Must(t, "root", "echo go >/run/gate/go") }
}

func (w *world) buildOutside(t *testing.T) {
	w.add(t, tree{"secret-input", "echo input >$out", nil})
	open := w.gate(t)
	w.Write(t, "/run/slow.nix", slow("pub-slow", "secret-input"))
	p := w.start(t, "root", "exec nix-build --no-out-link /run/slow.nix"+sandbox)
	w.await(t, "test -e /run/gate/started")
	why, by := w.blockedBy(t, at("secret-input"))
	if why != "temp" && why != "process" {
		t.Errorf("a build at work: blocked by %q %q", why, by)
	}
	w.exec(t, blocked, "seal", "--keep", "alice", "--yes", at("secret-input"))
	w.home(t, "system", "secret-input")
	open()
	if r, err := p.Wait(); err != nil || r.Code != 0 {
		t.Errorf("the build: %v %+v", err, r)
	}
	w.sound(t)
	w.move(t, ok, "seal", at("secret-input"))
	w.home(t, "keep", "secret-input")
}

// buildInView: the keep's own daemon builds with a path of the system store as input.
func (w *world) buildInView(t *testing.T) {
	w.add(t, tree{"secret-view-input", "echo input >$out", nil})
	open := w.gate(t)
	w.Write(t, "/run/slow.nix", slow("pub-view-slow", "secret-view-input"))
	p := w.start(t, "root", "exec overkeep run alice --as-root -- env NIX_REMOTE=daemon nix-build --no-out-link /run/slow.nix"+sandbox)
	w.await(t, "test -e /run/gate/started")
	r := w.Overkeep(t, "", "seal", "--keep", "alice", "--yes", at("secret-view-input"))
	t.Logf("seal of an input of a build in the view: exit code %d\n%s%s", r.Code, r.Stdout, r.Stderr)
	open()
	if r, err := p.Wait(); err != nil || r.Code != 0 {
		t.Errorf("the build: %v %+v", err, r)
	}
	switch r.Code {
	case ok:
		w.home(t, "keep", "secret-view-input")
	case left, blocked:
		w.home(t, "system", "secret-view-input")
		w.move(t, ok, "seal", at("secret-view-input"))
	default:
		t.Errorf("exit code %d", r.Code)
	}
	w.sound(t)
}

// hold takes the lock of the system's collector, as a collection would, until the
// returned function is called: whoever moves waits at that point.
func (w *world) hold(t *testing.T) (release func()) {
	t.Helper()
	w.Must(t, "root", "rm -f /run/held")
	p := w.start(t, "root", "exec 9<>/nix/var/nix/gc.lock; flock -x 9; touch /run/held; exec sleep 10009")
	w.await(t, "test -e /run/held")
	return func() { p.Kill(); <-p.Done() }
}

// incoming waits until a seal has copied so many paths, and wants the collector's lock.
func (w *world) incoming(t *testing.T, n int) {
	t.Helper()
	w.await(t, fmt.Sprintf(`overkeep run alice --as-root -- sh -c 'test $(ls /run/overkeep/alice/k/store/incoming 2>/dev/null | wc -l) -eq %d'`, n))
}

// later: what comes up after the plan was made, while the path is being copied.
func (w *world) later(t *testing.T) {
	w.add(t, tree{"secret-root-later", "echo x >$out", nil}, tree{"secret-used-later", "echo x >$out", nil}, tree{"secret-locked", "echo x >$out", nil},
		tree{"secret-referred-later", "echo x >$out", nil}, tree{"secret-free", "echo x >$out", nil})
	release := w.hold(t)
	p := w.start(t, "root", "exec overkeep apply --keep alice --yes --json")
	w.incoming(t, 5)
	w.Must(t, "root", "ln -s "+at("secret-root-later")+" /nix/var/nix/gcroots/later")
	user := w.start(t, "bob", "exec 7<"+at("secret-used-later")+"; exec sleep 10006")
	locker := w.start(t, "root", "exec 9>"+at("secret-locked")+".lock; flock -x 9; touch /run/locked; exec sleep 10007")
	w.await(t, "test -e /run/locked && ls -l /proc/*/fd/7 2>/dev/null | grep -q "+at("secret-used-later"))
	w.add(t, tree{"pub-referrer", "echo x >$out", []string{"secret-referred-later"}})
	// Another one, meanwhile, is told so.
	w.says(t, inUse, []string{"apply", "--keep", "alice", "--yes"}, "another")
	w.exec(t, inUse, "undo", "--keep", "alice", "--yes")
	w.exec(t, inUse, "wipe", "--keep", "alice", "--yes")
	release()
	r, err := p.Wait()
	if err != nil || r.Code != left {
		t.Errorf("%v %+v", err, r)
	}
	for name, why := range map[string]string{"secret-root-later": "alive", "secret-used-later": "alive", "secret-locked": "locked", "secret-referred-later": "referenced"} {
		if !strings.Contains(r.Stdout, fmt.Sprintf(`{"path":%q,"why":%q`, at(name), why)) && !strings.Contains(strings.Join(strings.Fields(r.Stdout), ""), fmt.Sprintf(`{"path":%q,"why":%q`, at(name), why)) {
			t.Errorf("%s is not named as %s:\n%s", name, why, r.Stdout)
		}
		w.home(t, "system", name)
	}
	w.home(t, "keep", "secret-free")
	user.Kill()
	locker.Kill()
	<-user.Done()
	<-locker.Done()
	w.Must(t, "root", "rm /nix/var/nix/gcroots/later "+at("secret-locked")+".lock")
	w.move(t, ok, "apply")
	w.home(t, "keep", "secret-root-later", "secret-used-later", "secret-locked", "secret-referred-later", "pub-referrer")
	w.sound(t)
}

// links: a user who plays with the links that lead to roots of hers reaches nothing that
// is not hers anyway.
func (w *world) links(t *testing.T) {
	w.Must(t, "root", "mkdir -p /root/precious; echo precious >/root/precious/result; cp -a /etc/shadow /run/shadow.was; ls -la /root/precious /etc /home/bob >/run/before")
	w.add(t, tree{"secret-linked", "echo x >$out", nil})
	p := at("secret-linked")
	w.Must(t, "alice", "mkdir d; nix-store --realise "+p+" --add-root ~/d/result >/dev/null; nix-store --realise "+p+" --add-root ~/direct >/dev/null", daemon)
	// Between plan and apply the directory is a link to another's.
	w.plan(t)
	w.Must(t, "alice", "mv d e; ln -s /root/precious d; rm direct; ln -s /etc/shadow direct")
	w.move(t, ok, "apply", planFile)
	w.home(t, "keep", "secret-linked")
	w.Must(t, "root", "test \"$(readlink /home/alice/d)\" = /root/precious; test \"$(readlink /home/alice/direct)\" = /etc/shadow; test \"$(cat /root/precious/result)\" = precious")
	w.Must(t, "alice", "test -L e/result; rm -r e d direct")
	// It comes back while the place of the link is another's directory.
	w.move(t, ok, "undo")
	w.Must(t, "root", "nix-store --gc --print-roots >/dev/null", daemon)

	// And all the time.
	w.Must(t, "alice", "mkdir d; nix-store --realise "+p+" --add-root ~/d/result >/dev/null; ln -s /root/precious away", daemon)
	racer := w.start(t, "alice", "cd; while :; do mv -T --exchange d away 2>/dev/null || { mv d x && mv away d && mv x away; } ; ln -sfn /etc/shadow d/result 2>/dev/null || :; ln -sfn "+p+" d/result 2>/dev/null || :; done")
	for range 6 {
		for _, c := range []string{"seal", "undo"} {
			args := []string{c, "--keep", "alice", "--yes"}
			if c == "seal" {
				args = append(args, p)
			}
			// Held or not, at this instant: any of these is an answer.
			if r := w.Overkeep(t, "", args...); r.Code != ok && r.Code != left && r.Code != blocked && r.Code != noPath && r.Code != usage {
				t.Errorf("%s: exit code %d\n%s%s", c, r.Code, r.Stdout, r.Stderr)
			}
		}
	}
	racer.Kill()
	<-racer.Done()
	w.Must(t, "root", `cmp /etc/shadow /run/shadow.was; test "$(cat /root/precious/result)" = precious
		ls -la /root/precious /etc /home/bob >/run/after; diff /run/before /run/after`)
	w.Must(t, "root", "rm -rf /home/alice/d /home/alice/x /home/alice/away /run/before /run/after")
	w.sound(t)
}

// commands: without root, without a keep that is open, without anything to do.
func (w *world) commands(t *testing.T) {
	w.add(t, tree{"secret-command", "echo x >$out", nil})
	before := w.where(t)
	for _, c := range [][]string{{"plan"}, {"apply", "--yes"}, {"undo", "--yes"}, {"seal", "--yes", at("secret-command")}, {"release", "--yes", at("secret-command")}, {"wipe", "--yes"}} {
		for _, user := range []string{"alice", "bob"} {
			r, err := w.Exec(bed.Command{User: user, Script: "exec overkeep " + fixture.Quote(append(c, "--keep", "alice")...)})
			if err != nil || r.Code != notRoot {
				t.Errorf("%s as %s: %v %+v", c, user, err, r)
			}
		}
	}
	w.says(t, noPath, []string{"seal", "--keep", "alice", "--yes", "secret-nowhere"}, "secret-nowhere")
	w.exec(t, noPath, "seal", "--keep", "alice", "--yes", "/nix/store/../../etc/shadow")
	w.exec(t, noPath, "seal", "--keep", "alice", "--yes", "/etc/shadow")
	w.same(t, before)
	w.Lock(t)
	for _, c := range [][]string{{"plan"}, {"apply", "--yes"}, {"undo", "--yes"}, {"seal", "--yes", at("secret-command")}, {"release", "--yes", at("secret-command")}, {"wipe", "--yes"}} {
		w.says(t, locked, append(c, "--keep", "alice"), "unlock")
	}
	w.Unlock(t)
	w.same(t, before)
	w.move(t, ok, "apply")
}

// undo: more often than there was something, and of what is there no more.
func (w *world) undo(t *testing.T) {
	w.add(t, tree{"secret-first", "echo 1 >$out", nil})
	zero := w.where(t)
	w.move(t, ok, "apply")
	one := w.where(t)
	w.add(t, tree{"secret-second", "echo 2 >$out", []string{"secret-third"}}, tree{"secret-third", "echo 3 >$out", nil})
	two := w.where(t)
	w.move(t, ok, "apply")
	w.move(t, ok, "undo")
	w.same(t, two)
	w.gone(t, "secret-second", "secret-third")
	w.same(t, one)
	w.move(t, ok, "undo") // of the one before
	w.same(t, zero)

	// The keep's collector takes one: the other comes back, and that one is named.
	w.add(t, tree{"secret-kept", "echo kept >$out", nil}, tree{"secret-taken", "echo taken >$out", []string{"secret-kept"}})
	w.move(t, ok, "seal", at("secret-kept"))
	w.home(t, "keep", "secret-kept", "secret-taken")
	w.Alice(t, "nix-store --delete "+at("secret-taken")+" >/dev/null 2>&1")
	w.says(t, ok, []string{"undo", "--keep", "alice", "--yes"}, at("secret-taken"))
	w.home(t, "system", "secret-kept")
	w.sound(t)
	if strings.Contains(w.where(t), "secret-taken") {
		t.Error("what was collected is there")
	}
	w.move(t, ok, "apply")
}

// permission: nothing personal is released, whether it was named or only needed.
func (w *world) permission(t *testing.T) {
	w.add(t, tree{"secret-never", "echo x >$out", nil}, tree{"pub-needs", "echo y >$out", []string{"secret-never"}}, tree{"pub-not", "echo z >$out", nil})
	w.move(t, ok, "seal", at("secret-never"), at("pub-not"))
	w.home(t, "keep", "secret-never", "pub-needs", "pub-not")
	before := w.where(t)
	for _, c := range [][]string{{at("secret-never")}, {at("pub-needs")}, {at("pub-not"), at("secret-never")}} {
		w.says(t, notPermitted, append([]string{"release", "--keep", "alice", "--yes"}, c...), "secret-never")
		w.exec(t, notPermitted, append([]string{"release", "--keep", "alice", "--dry-run"}, c...)...)
	}
	w.Write(t, "/etc/overkeep/policy", "system name \"*\" and not name \"*\"\n")
	w.exec(t, notPermitted, "release", "--keep", "alice", "--yes", at("pub-not"))
	w.Write(t, "/etc/overkeep/policy", policy)
	w.same(t, before)
	w.move(t, ok, "release", at("pub-not"))
	w.home(t, "system", "pub-not")
	w.sound(t)
}
