package hostile

import (
	"encoding/json"
	"errors"
	"io/fs"
	"os"
	"strings"
	"sync"
	"testing"

	"golang.org/x/sys/unix"

	"overkeep/tests/bed"
	"overkeep/tests/fixture"
)

// What lies in alice's home where the view wants to mount: it is named, and
// neither covered nor followed; once it is moved away, as the remedy says, the
// keep opens.
func TestHome(t *testing.T) {
	l := newLaptop(t)
	l.Must(t, "root", "install -d -o bob -m 0777 /home/bobs; chmod 755 /home/bob; mkdir -p /root/victim")
	const home = "/home/alice"
	at := func(p string, make func(p string) error) func(*testing.T) func() {
		return func(t *testing.T) func() { return l.swap(t, home+p, make) }
	}
	link := func(to string) func(string) error { return func(p string) error { return os.Symlink(to, p) } }
	file := func(p string) error { return os.WriteFile(p, []byte("mine\n"), 0o600) }
	alices := func(then func(p string) error) func(string) error {
		return func(p string) error {
			return errors.Join(os.Mkdir(p, 0o755), os.Chown(p, 1000, 1000), then(p))
		}
	}
	for _, a := range []attempt{
		{name: "keep with a file in it", bad: at("/keep", alices(func(p string) error { return file(p + "/thesis.tex") })), says: []string{"/home/alice/keep", "not empty"}, remedy: []string{"mv /home/alice/keep "}},
		{name: "keep with a hidden file in it", bad: at("/keep", alices(func(p string) error { return file(p + "/.hidden") })), says: []string{"/home/alice/keep"}},
		{name: "keep is a file", bad: at("/keep", file), says: []string{"/home/alice/keep"}},
		{name: "keep is a FIFO", bad: at("/keep", func(p string) error { return unix.Mkfifo(p, 0o666) }), says: []string{"/home/alice/keep"}},
		{name: "keep is bob's", bad: at("/keep", func(p string) error { return errors.Join(os.Mkdir(p, 0o777), os.Chown(p, 1001, 1001)) }), says: []string{"/home/alice/keep"}},
		{name: "keep leads to etc", bad: at("/keep", link("/etc")), says: []string{"/home/alice/keep"}},
		{name: "keep leads to bob", bad: at("/keep", link("/home/bobs")), says: []string{"/home/alice/keep"}},
		{name: "keep leads to root", bad: at("/keep", link("/root/victim")), says: []string{"/home/alice/keep"}},
		{name: "keep leads nowhere", bad: at("/keep", link("/nowhere")), says: []string{"/home/alice/keep"}},
		{name: "keep leads to itself", bad: at("/keep", link("keep")), says: []string{"/home/alice/keep"}},
		{name: "cache leads to etc", bad: at("/.cache", link("/etc")), says: []string{"/home/alice/.cache/nix"}},
		{name: "cache leads to bob", bad: at("/.cache", link("/home/bob")), says: []string{"/home/alice/.cache/nix"}},
		{name: "cache is a file", bad: at("/.cache", file), says: []string{"/home/alice/.cache/nix"}},
		{name: "cache/nix is a file", bad: at("/.cache/nix", file), says: []string{"/home/alice/.cache/nix"}, remedy: []string{"mv /home/alice/.cache/nix"}},
		{name: "cache/nix leads to etc", bad: at("/.cache/nix", link("/etc")), says: []string{"/home/alice/.cache/nix"}},
		{name: "cache/nix leads to bob's", bad: at("/.cache/nix", link("/home/bobs")), says: []string{"/home/alice/.cache/nix"}},
		{name: "state is a device", bad: at("/.local/state", func(p string) error { return unix.Mknod(p, unix.S_IFCHR|0o666, int(unix.Mkdev(1, 3))) }), says: []string{"/home/alice/.local/state/nix"}},
		{name: "local is not hers to write", bad: at("/.local", func(p string) error { return os.Mkdir(p, 0o755) }), says: []string{"/home/alice/.local/"}},
		{name: "home is gone", bad: func(t *testing.T) func() { return l.swap(t, home, nothing) }, says: []string{home}},
		{name: "home is a file", bad: func(t *testing.T) func() { return l.swap(t, home, file) }, says: []string{home}},
		{name: "home leads to bob's", bad: func(t *testing.T) func() { return l.swap(t, home, link("/home/bobs")) }, says: []string{"/home/bobs"}},
		{name: "home is root's", bad: func(t *testing.T) func() { return l.swap(t, home, mkdir) }, says: []string{home}},
	} {
		a.exit = []int{17}
		others := l.snapshot(t, "/etc", "/home/bob", "/home/bobs")
		l.try(t, a)
		if diff := others.diff(l.snapshot(t, "/etc", "/home/bob", "/home/bobs")); diff != "" {
			t.Errorf("%s: another's files:\n%s", a.name, diff)
		}
	}

	t.Run("home is a link of root's", func(t *testing.T) {
		l.Must(t, "root", "mkdir -p /srv/homes; mv /home/alice /srv/homes/alice; ln -s /srv/homes/alice /home/alice")
		defer l.Must(t, "root", "overkeep lock alice --kill --yes --quiet; rm /home/alice; mv /srv/homes/alice /home/alice")
		l.opens(t)
		l.Unlock(t, "alice")
		if out := l.MustOverkeep(t, 0, "", "status", "alice"); !strings.Contains(out, "  unlocked") {
			t.Errorf("status of an open keep:\n%s", out)
		}
		l.Lock(t, "alice")
	})
	t.Run("moved while it is open", func(t *testing.T) {
		l.Unlock(t, "alice")
		l.Alice(t, "cd; mv .cache .cache.old; mv .local/share .local/shared; mkdir -p .cache/nix; echo mine > .cache/nix/x")
		l.Lock(t, "alice")
		l.nothingLeft(t)
		l.Must(t, "alice", "rm -r .cache; mv .cache.old .cache; mv .local/shared .local/share")
	})
	t.Run("the remedy works", func(t *testing.T) {
		defer at("/keep", alices(func(p string) error { return file(p + "/thesis.tex") }))(t)()
		r := l.run(t, attempt{}, "--json")
		var doc struct {
			Error *problem `json:"error"`
		}
		if err := json.Unmarshal([]byte(r.Stderr), &doc); err != nil || doc.Error == nil {
			t.Fatalf("%v: %s", err, r.Stderr)
		}
		l.Must(t, "root", doc.Error.Remedy[0].Command)
		l.opens(t)
		if got := l.Must(t, "root", "cat /home/alice/keep.before-overkeep/thesis.tex"); got != "mine" {
			t.Errorf("her file reads %q", got)
		}
		l.Must(t, "root", "rm -r /home/alice/keep.before-overkeep")
	})
	l.opens(t)
}

// The account that the keep was made for is another one now, or none.
func TestAccount(t *testing.T) {
	l := newLaptop(t)
	passwd := func(script string) func(*testing.T) func() {
		return func(t *testing.T) func() {
			return l.shell(t, "cp -a /etc/passwd /run/passwd; sed -i '"+script+"' /etc/passwd", "cp -a /run/passwd /etc/passwd")
		}
	}
	for _, a := range []attempt{
		{name: "deleted", bad: passwd("/^alice:/d"), says: []string{`"alice"`, "1000"}, remedy: []string{"useradd"}},
		{name: "another uid", bad: passwd("s/^alice:x:1000:/alice:x:1234:/"), says: []string{`"alice"`, "1000", "1234"}, remedy: []string{"usermod"}},
		{name: "uid 0", bad: passwd("s/^alice:x:1000:/alice:x:0:/"), says: []string{`"alice"`, "1000"}},
		{name: "renamed", bad: passwd("s/^alice:/alicia:/"), says: []string{`"alice"`, "1000"}, remedy: []string{"useradd"}},
	} {
		a.exit = []int{6}
		l.try(t, a)
	}
	t.Run("deleted while it is open", func(t *testing.T) {
		l.Unlock(t, "alice")
		defer passwd("/^alice:/d")(t)()
		l.MustOverkeep(t, 0, "", "status", "alice")
		l.MustOverkeep(t, 0, "", "lock", "alice")
		l.nothingLeft(t)
	})
	l.opens(t)
}

// A keep from the future, as one looks when the clock has been set back, is no
// worse; one from before the epoch's day either.
func TestClock(t *testing.T) {
	l := newLaptop(t)
	for _, year := range []string{"2099", "1971"} {
		set := func(t *testing.T, from, to string) {
			l.Unlock(t, "alice")
			for _, f := range []string{keepDir + "/keep.json", "/run/overkeep/alice/k/keep.json"} {
				l.Must(t, "root", `overkeep run alice --as-root -- sed -i 's/"created": "`+from+`-/"created": "`+to+`-/' `+f+`; overkeep run alice --as-root -- grep -q '"created": "`+to+`-' `+f)
			}
			l.Lock(t, "alice")
		}
		now := l.Must(t, "root", "date -u +%Y")
		t.Run(year, func(t *testing.T) {
			set(t, now, year)
			l.opens(t)
			l.MustOverkeep(t, 0, "", "status", "alice")
			l.Must(t, "root", "exec 3<<<"+word(fixture.Passphrase)+" 4<<<"+word(fixture.Passphrase)+"; overkeep key change alice --passphrase-fd 3 --new-passphrase-fd 4 --work-factor 12")
			l.opens(t)
			set(t, year, now)
		})
	}
	l.opens(t)
}

// The same twice, one after the other or at once.
func TestTwice(t *testing.T) {
	l := newLaptop(t)
	json := func(t *testing.T, line string) map[string]any {
		t.Helper()
		var v map[string]any
		decode(t, l.MustOverkeep(t, 0, fixture.Passphrase, append([]string{"--json"}, strings.Fields(line)...)...), &v)
		return v
	}
	if v := json(t, "lock alice"); v["already"] != true {
		t.Errorf("lock of a locked keep: %v", v)
	}
	if v := json(t, "unlock alice --passphrase-fd 0"); v["already"] != false {
		t.Errorf("unlock: %v", v)
	}
	if v := json(t, "unlock alice --passphrase-fd 0"); v["already"] != true {
		t.Errorf("unlock of an open keep: %v", v)
	}
	// It is open: whatever is given, nothing is asked and nothing changes.
	if r := l.Overkeep(t, "wrong passphrase", "unlock", "alice", "--passphrase-fd", "0"); r.Code != 0 {
		t.Errorf("unlock of an open keep with a wrong key: exit code %d: %s", r.Code, r.Stderr)
	}
	if v := json(t, "lock alice"); v["already"] != false {
		t.Errorf("lock: %v", v)
	}
	if v := json(t, "lock alice"); v["already"] != true {
		t.Errorf("lock of a locked keep: %v", v)
	}
	l.nothingLeft(t)

	// at runs lines at once and returns their codes and errors.
	at := func(t *testing.T, lines ...string) (rs []bed.Result) {
		rs = make([]bed.Result, len(lines))
		var wg sync.WaitGroup
		for i, line := range lines {
			wg.Go(func() {
				var err error
				if rs[i], err = l.Exec(bed.Command{Script: "exec overkeep " + line, Stdin: fixture.Passphrase, Within: patience}); err != nil {
					t.Error(err)
				}
			})
		}
		wg.Wait()
		return rs
	}
	for range 6 {
		init := "init second --user alice --size 64M --work-factor 12 --passphrase-fd 0 --recovery-out /run/"
		won := 0
		for i, r := range at(t, init+"0.txt", init+"1.txt", init+"2.txt") {
			name := "/run/" + string(rune('0'+i)) + ".txt"
			_, err := os.Stat(l.path(name))
			switch r.Code {
			case 0:
				won++
				l.MustOverkeep(t, 0, "", "key", "verify", "second", "--identity", name)
			case 9, 14:
				if !errors.Is(err, fs.ErrNotExist) {
					t.Errorf("a refused init left its recovery file: %v", err)
				}
			default:
				t.Errorf("init at once: exit code %d: %s", r.Code, r.Stderr)
			}
		}
		if won != 1 {
			t.Errorf("%d inits of one name won", won)
		}
		l.MustOverkeep(t, 0, "", "destroy", "second", "--yes")
		l.Must(t, "root", "rm -f /run/?.txt")
		l.nothingLeft(t)
	}
	for range 6 {
		codes := map[int]int{}
		for _, r := range at(t, "unlock alice --passphrase-fd 0", "unlock alice --passphrase-fd 0", "status alice", "lock alice") {
			codes[r.Code]++
			if r.Code != 0 && r.Code != 14 {
				t.Errorf("at once: exit code %d: %s", r.Code, r.Stderr)
			}
		}
		if codes[0] == 0 {
			t.Errorf("nobody got through: %v", codes)
		}
		l.MustOverkeep(t, 0, "", "lock", "alice")
		l.nothingLeft(t)
	}
	l.opens(t)
}

func decode(t *testing.T, s string, v any) {
	t.Helper()
	if err := json.Unmarshal([]byte(s), v); err != nil {
		t.Fatalf("%v: %s", err, s)
	}
}

// Something else in the place of what overkeep has below /run: it is not followed,
// and nothing hangs.
func TestRunPlaces(t *testing.T) {
	l := newLaptop(t)
	l.Must(t, "root", "mkdir -m 700 /root/victim; mkdir -m 750 /root/victim/dir; echo untouched > /root/victim/file; chmod 640 /root/victim/file")
	const run = "/run/overkeep"
	link := func(to string) func(string) error { return func(p string) error { return os.Symlink(to, p) } }
	kinds := map[string]func(string) error{
		"link to a victim directory": link("/root/victim/dir"), "link to a victim file": link("/root/victim/file"), "dangling link": link("/root/victim/new"),
		"FIFO": func(p string) error { return unix.Mkfifo(p, 0o600) }, "file": func(p string) error { return os.WriteFile(p, []byte("{"), 0o600) }, "directory": mkdir,
		"device": func(p string) error { return unix.Mknod(p, unix.S_IFCHR|0o600, int(unix.Mkdev(1, 5))) },
	}
	for _, place := range []string{"", "/.alice.lock", "/alice", "/alice/k", "/alice/ns", "/alice/socket", "/alice/state.json", "/alice/nix", "/alice/lower"} {
		for kind, make := range kinds {
			if kind == "directory" && place != "/.alice.lock" && place != "/alice/state.json" {
				continue // that is what belongs there
			}
			t.Run("run"+place+"/"+kind, func(t *testing.T) {
				if strings.HasPrefix(place, "/alice/") {
					l.Must(t, "root", "mkdir -p "+run+"/alice")
				}
				victim := l.snapshot(t)
				mend := sync1(l.swap(t, run+place, make))
				defer mend()
				r := l.run(t, attempt{}, "")
				if r.Code == 0 {
					l.Lock(t, "alice")
				} else {
					l.answer(t, attempt{exit: []int{2, 6, 12, 17}}, r, l.run(t, attempt{}, "--json"))
				}
				if diff := victim.diff(l.snapshot(t)); diff != "" {
					t.Errorf("followed:\n%s", diff)
				}
				mend()
				if strings.HasPrefix(place, "/alice") {
					l.Must(t, "root", "[ ! -d "+run+"/alice ] || find "+run+"/alice -xdev -depth -delete")
				}
				l.nothingLeft(t)
			})
		}
	}
	l.opens(t)
}
