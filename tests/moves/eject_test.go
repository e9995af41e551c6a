package moves

import (
	"strings"
	"testing"
)

// TestEjectTo: the NARs of a keep are written where root alone can look, and nowhere else;
// what moves nothing also changes no root.
func TestEjectTo(t *testing.T) {
	t.Parallel()
	w := newWorld(t)
	w.script(t)
	w.Must(t, "alice", "mkdir -m 755 /home/alice/theirs")
	for _, dir := range []string{"/home/alice/theirs", "/run/open"} {
		w.Must(t, "root", "mkdir -p "+dir)
		if r := w.Overkeep(t, "", "eject", "--keep", "alice", "--yes", "--to", dir); r.Code == 0 || !strings.Contains(r.Stderr, "look into it") {
			t.Errorf("%s: exit code %d %s", dir, r.Code, r.Stderr)
		}
		if out := w.Must(t, "root", "ls -A "+dir); out != "" {
			t.Errorf("%s holds %q", dir, out)
		}
	}
	for range 2 { // one that is there already is gone on with
		w.overkeepOK(t, "eject", "--keep", "alice", "--yes", "--to", "/run/nars")
	}
	if out := w.Must(t, "root", "stat -c %a%u /run/nars; ls /run/nars/*.narinfo | wc -l"); !strings.HasPrefix(out, "7000") {
		t.Errorf("%q", out)
	}

	// An undo of an eject that is declined leaves the roots that the eject has made.
	const roots = "ls /nix/var/nix/gcroots/overkeep-ejected/alice"
	w.policy(t, inSystem)
	w.overkeepOK(t, "eject", "--keep", "alice", "--yes")
	made := w.Must(t, "root", roots)
	if !strings.Contains(made, w.canary) {
		t.Fatalf("roots %q", made)
	}
	if r := w.Overkeep(t, "n\n", "undo", "--keep", "alice"); r.Code == 0 {
		t.Fatalf("declined, and done: %+v", r)
	}
	if now := w.Must(t, "root", roots); now != made {
		t.Errorf("roots %q, were %q", now, made)
	}
	w.overkeepOK(t, undo(w)...)
	st := w.look(t, false)
	st.sound(t, w)
	st.at(t, w, inKeep)
	if out := w.Must(t, "root", "ls /nix/var/nix/gcroots/overkeep-ejected"); out != "" {
		t.Errorf("left: %q", out)
	}

	// One that is refused for want of room names nothing outside.
	w.Alice(t, "head -c 32M /dev/urandom > ~/keep/priv-large; nix-store --add ~/keep/priv-large; rm ~/keep/priv-large")
	w.Must(t, "root", "sync -f /; fallocate -l $(($(stat -f -c '%f * %S' /) - 26*1024*1024)) /fill")
	r := w.Overkeep(t, "", "eject", "--keep", "alice", "--yes")
	if r.Code == 0 || !strings.Contains(r.Stderr, "free") {
		t.Errorf("no room, and exit code %d: %s", r.Code, r.Stderr)
	}
	w.Must(t, "root", "rm /fill")
	if out := w.Must(t, "root", "ls -R /nix/var/nix/gcroots/overkeep-ejected"); strings.Contains(out, w.canary) {
		t.Errorf("named outside: %q", out)
	}
}
