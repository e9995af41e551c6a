package gcroot

import (
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"

	"golang.org/x/sys/unix"

	"overkeep/overlay/layout"
	"overkeep/overlay/plan"
	"overkeep/overlay/view"
	"overkeep/tests/need"
)

const storePath = "/nix/store/aaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaa-x"

func place(t testing.TB) Place {
	k, err := layout.New("/", "alice")
	if err != nil {
		t.Fatal(err)
	}
	return Place{Keep: k, User: view.User{Name: "alice", UID: 1000, GID: 100, Home: "/home/alice"}, WorkDir: "keep"}
}

func TestClassify(t *testing.T) {
	const auto = "0hash"
	for _, c := range []struct {
		link  string
		owner int
		auto  string
		kind  plan.RootKind
		shown string // "": the link itself
		to    string
	}{
		{"/proc/12/exe", -1, "", plan.RootProcess, "pid 12 (bash)", ""},
		{"/proc/12/fd/3", -1, "", plan.RootProcess, "pid 12 (bash)", ""},
		{"/proc/12", -1, "", plan.RootProcess, "pid 12 (bash)", ""},
		{"{temp:12}", -1, "", plan.RootTemp, "pid 12 (bash)", ""},
		{"{temp:12", -1, "", plan.RootOther, "", ""},
		{"{temp:-1}", -1, "", plan.RootOther, "", ""},
		{"{temp:}", -1, "", plan.RootOther, "", ""},
		{"/proc/+1/exe", -1, "", plan.RootOther, "", ""},
		{"/proc/self/exe", 1000, auto, plan.RootUser, "", "home/work/links/proc/self/exe"}, // a link like any other, if somebody made it a root
		{"/proc/sys/kernel/modprobe", -1, "", plan.RootBoot, "", ""},
		{"{censored}", -1, "", plan.RootOther, "", ""},
		{"{lsof}", -1, "", plan.RootOther, "", ""},
		{"", -1, "", plan.RootOther, "", ""},
		{"/run/current-system", 0, auto, plan.RootBoot, "", ""},
		{"/run/current-system", 1000, auto, plan.RootBoot, "", ""},
		{"/run/current-systems", 1000, auto, plan.RootUser, "", "home/work/links/run/current-systems"},
		{"/nix/var/nix/gcroots/booted-system", 0, "", plan.RootBoot, "", ""},
		{"/nix/var/nix/profiles/system", 0, "", plan.RootBoot, "", ""},
		{"/nix/var/nix/profiles/system-42-link", 0, "", plan.RootBoot, "", ""},
		{"/nix/var/nix/profiles/system-profiles/test-1-link", 0, "", plan.RootBoot, "", ""},
		{"/nix/var/nix/profiles/systematic-1-link", 0, "", plan.RootOther, "", ""},
		{"/nix/var/nix/profiles/default-1-link", 0, "", plan.RootOther, "", ""},
		{"/nix/var/nix/profiles/default-1-link", 1000, "", plan.RootOther, "", ""},
		{"/nix/var/nix/profiles/default-1-link", 1000, auto, plan.RootOther, "", ""},
		{"/nix/var/nix/profiles/per-user/root/channels", 0, "", plan.RootOther, "", ""},
		{"/nix/var/nix/profiles/per-user/alice/profile-3-link", 1000, "", plan.RootUser, "", "home/state/profiles/profile-3-link"},
		{"/nix/var/nix/profiles/per-user/alice/profile-3-link", 0, "", plan.RootOther, "", ""},
		{"/nix/var/nix/profiles/per-user/bob/profile-3-link", 1000, "", plan.RootOther, "", ""},
		{"/nix/var/nix/profiles/per-user/alice2/profile-3-link", 1000, "", plan.RootOther, "", ""},
		{"/nix/var/nix/gcroots/per-user/alice/x", 1000, "", plan.RootUser, "", "home/work/links/nix/var/nix/gcroots/per-user/alice/x"},
		{"/nix/var/nix/gcroots/mine", 1000, "", plan.RootOther, "", ""},
		{"/nix/var/nix/gcroots/auto/x", 1000, "", plan.RootOther, "", ""},
		{"/nix/var/nix/gcroots/overkeep/alice/x", 0, "", plan.RootOwnPin, "", ""},
		{"/nix/var/nix/gcroots/overkeep/bob/x", 0, "", plan.RootKeepPin, "", ""},
		{"/nix/var/nix/gcroots/overkeep/alice@2f78/x", 0, "", plan.RootKeepPin, "", ""},
		{"/home/alice/result", 1000, auto, plan.RootUser, "", "home/work/links/home/alice/result"},
		{"/home/alice/result", 1000, "", plan.RootOther, "", ""},
		{"/home/alice/result", 1001, auto, plan.RootOther, "", ""},
		{"/home/alice/result", 0, auto, plan.RootOther, "", ""},
		{"/home/alice/result", -1, auto, plan.RootOther, "", ""},
		{"/home/bob/result", 1000, auto, plan.RootUser, "", "home/work/links/home/bob/result"},
		{"/home/alice/.local/state/nix/profiles/profile-1-link", 1000, auto, plan.RootUser, "", "home/state/profiles/profile-1-link"},
		{"/home/alice/.local/state/nix", 1000, auto, plan.RootUser, "", "home/work/links/home/alice/.local/state/nix"},
		{"/home/alice/.cache/nix/x/y", 1000, auto, plan.RootUser, "", "home/cache/x/y"},
		{"/home/alice/keep/result", 1000, auto, plan.RootUser, "", "home/work/result"},
		{"/home/alice/../bob/x", 1000, auto, plan.RootOther, "", ""},
		{"/home/alice//x", 1000, auto, plan.RootOther, "", ""},
		{"home/alice/x", 1000, auto, plan.RootOther, "", ""},
		{"/home/alice/\xff", 1000, auto, plan.RootOther, "", ""},
		{"/home/alice/a\nb", 1000, auto, plan.RootOther, "", ""},
	} {
		r := Classify(place(t), Fact{Link: c.link, Path: storePath, Owner: c.owner, Auto: c.auto, Comm: "bash"})
		want := plan.Root{Link: c.link, Path: storePath, Kind: c.kind, To: c.to}
		if c.shown != "" {
			want.Link = c.shown
		}
		if c.kind == plan.RootUser && c.auto != "" {
			want.Auto = "/nix/var/nix/gcroots/auto/" + c.auto
		}
		if r != want {
			t.Errorf("%q of %d:\n%+v, want\n%+v", c.link, c.owner, r, want)
		}
	}
	taken := Classify(place(t), Fact{Link: "/home/alice/keep/result", Owner: 1000, Auto: auto, Taken: true})
	if taken.To != "home/work/links/home/alice/keep/result" {
		t.Errorf("%+v", taken)
	}
	root := place(t)
	root.User.UID = 0
	if r := Classify(root, Fact{Link: "/root/result", Auto: auto}); r.Kind != plan.RootOther {
		t.Errorf("root's links would move along: %+v", r)
	}
}

// Where the personal collector looks is where the link is seen.
func TestSeen(t *testing.T) {
	p := place(t)
	for to, want := range map[string]string{
		"home/work/links/x":           "/home/alice/keep/links/x",
		"home/state/profiles/p-1":     "/home/alice/.local/state/nix/profiles/p-1",
		"home/other/x":                p.Keep.Volume() + "/home/other/x",
		"home/workings/links/srv/res": p.Keep.Volume() + "/home/workings/links/srv/res",
	} {
		if got := p.Seen(to); got != want {
			t.Errorf("%s: %s, want %s", to, got, want)
		}
	}
	p.WorkDir = ""
	if got := p.Seen("home/work/links/x"); got != p.Keep.Volume()+"/home/work/links/x" {
		t.Error(got)
	}
}

// FuzzClassify: whatever a daemon calls a link, only the user's own link moves, and to
// a place in the keep's part for it.
func FuzzClassify(f *testing.F) {
	for _, l := range []string{"/home/alice/result", "{temp:1}", "/proc/1/exe", "/nix/var/nix/profiles/per-user/alice/p-1-link", "/home/alice/../x", "/a\x00"} {
		f.Add(l, 1000, "x")
	}
	p := place(f)
	f.Fuzz(func(t *testing.T, link string, owner int, auto string) {
		for _, taken := range []bool{false, true} {
			r := Classify(p, Fact{Link: link, Path: storePath, Owner: owner, Auto: auto, Taken: taken})
			if r.Kind != plan.RootUser {
				if r.To != "" || r.Auto != "" {
					t.Fatalf("%+v", r)
				}
				continue
			}
			if owner != 1000 || !local(r.To) || r.Link != link || !filepath.IsAbs(p.Seen(r.To)) {
				t.Fatalf("%q: %+v", link, r)
			}
		}
	})
}

// stage is a machine and a keep of directories, with a link of the user's in it.
type stage struct {
	testing.TB
	Mover
	root plan.Root
}

func newStage(t testing.TB) *stage {
	need.Root(t)
	dir := t.TempDir()
	s := &stage{TB: t, Mover: Mover{Place: place(t), Host: filepath.Join(dir, "host")}}
	s.Keep.Root = filepath.Join(dir, "keep")
	for _, d := range []string{s.Host + autoDir, s.Host + "/home/alice/dir", s.Keep.Volume() + "/nix/gcroots", s.Keep.Volume() + "/home/work", s.Keep.Volume() + "/home/state"} {
		if err := os.MkdirAll(d, 0o755); err != nil {
			t.Fatal(err)
		}
	}
	s.must(os.Chmod(s.Keep.Volume(), 0o700))
	for _, d := range []string{s.Host + "/home/alice", s.Host + "/home/alice/dir", s.Keep.Volume() + "/home/work", s.Keep.Volume() + "/home/state"} {
		s.must(os.Chown(d, 1000, 100))
	}
	s.must(os.Symlink(storePath, s.Host+"/home/alice/dir/result"))
	s.must(os.Lchown(s.Host+"/home/alice/dir/result", 1000, 100))
	link := "/home/alice/dir/result"
	s.must(os.Symlink(link, s.Host+autoDir+"/"+autoName(link)))
	s.root = Classify(s.Place, Fact{Link: link, Path: storePath, Owner: 1000, Auto: autoName(link)})
	return s
}

func (s *stage) must(err error) {
	s.Helper()
	if err != nil {
		s.Fatal(err)
	}
}

// links are all links of host and keep as "name -> text uid".
func (s *stage) links() []string {
	var out []string
	for _, top := range []string{s.Host, s.Keep.Volume()} {
		s.must(filepath.WalkDir(top, func(p string, d os.DirEntry, err error) error {
			if err != nil || d.Type() != os.ModeSymlink {
				return err
			}
			text, err := os.Readlink(p)
			var st unix.Stat_t
			if err == nil {
				err = unix.Lstat(p, &st)
			}
			p = strings.Replace(strings.Replace(p, s.Host, "host:", 1), s.Keep.Volume(), "keep:", 1)
			out = append(out, fmt.Sprintf("%s -> %s %d", p, text, st.Uid))
			return err
		}))
	}
	return out
}

// TestMove: every step, each twice as after a kill, there and back.
func TestMove(t *testing.T) {
	s := newStage(t)
	seen := "/home/alice/keep/links/home/alice/dir/result"
	inKeep := []string{
		"keep:/home/work/links/home/alice/dir/result -> " + storePath + " 1000",
		"keep:/nix/gcroots/auto/" + autoName(seen) + " -> " + seen + " 0",
	}
	onHost := s.links()
	if len(onHost) != 2 {
		t.Fatalf("%q", onHost)
	}
	rec, err := s.Look(s.root)
	s.must(err)
	if again, err := s.Look(s.root); err != nil || again != rec || rec.Text != storePath || rec.UID != 1000 {
		t.Fatalf("%+v %v", rec, err)
	}
	step := func(name string, f func(Record) error, want ...string) {
		t.Helper()
		for range 2 {
			if err := f(rec); err != nil {
				t.Fatalf("%s: %v", name, err)
			}
			if got := s.links(); !slices.Equal(got, want) {
				t.Fatalf("%s: %q, want %q", name, got, want)
			}
		}
	}
	step("make", s.Make, append(slices.Clone(onHost), inKeep...)...)
	step("remove", s.Remove, inKeep...)
	if _, err := s.Look(s.root); !errors.Is(err, ErrChanged) {
		t.Errorf("look at what has gone: %v", err)
	}
	step("restore", s.Restore, append(slices.Clone(onHost), inKeep...)...)
	step("drop", s.Drop, onHost...)
}

// TestProfile: the generation that a profile's name leads to stays the current one where
// it goes, unless the keep has chosen another; the name itself stays outside.
func TestProfile(t *testing.T) {
	for _, chosen := range []bool{false, true} {
		s := newStage(t)
		dir := "/home/alice/.local/state/nix/profiles"
		inside := s.Keep.Volume() + "/home/state/profiles"
		s.must(os.MkdirAll(s.Host+dir, 0o755))
		link := func(text, at string) {
			s.must(os.Symlink(text, at))
			s.must(os.Lchown(at, 1000, 100))
		}
		link("profile-3-link", s.Host+dir+"/profile")
		link(storePath, s.Host+dir+"/profile-3-link")
		for _, d := range []string{"/home/alice/.local", "/home/alice/.local/state", "/home/alice/.local/state/nix", dir} {
			s.must(os.Chown(s.Host+d, 1000, 100))
		}
		s.must(os.Symlink(dir+"/profile-3-link", s.Host+autoDir+"/"+autoName(dir+"/profile-3-link")))
		current := "profile-3-link"
		if chosen {
			s.must(os.MkdirAll(inside, 0o755))
			s.must(os.Chown(inside, 1000, 100))
			current = "profile-9-link"
			link(current, inside+"/profile")
		}
		root := Classify(s.Place, Fact{Link: dir + "/profile-3-link", Path: storePath, Owner: 1000, Auto: autoName(dir + "/profile-3-link")})
		rec, err := s.Look(root)
		s.must(err)
		for range 2 {
			s.must(s.Make(rec))
			s.must(s.Remove(rec))
		}
		if got, err := os.Readlink(inside + "/profile"); err != nil || got != current {
			t.Errorf("chosen %v: the profile in the keep is %q, %v", chosen, got, err)
		}
		for range 2 {
			s.must(s.Restore(rec))
			s.must(s.Drop(rec))
		}
		if got, err := os.Readlink(inside + "/profile"); (err == nil) != chosen || chosen && got != current {
			t.Errorf("chosen %v: afterwards it is %q, %v", chosen, got, err)
		}
		if got, err := os.Readlink(s.Host + dir + "/profile"); err != nil || got != "profile-3-link" {
			t.Errorf("outside it is %q, %v", got, err)
		}
	}
	for link, want := range map[string]string{"profile-3-link": "profile", "a-b-12-link": "a-b", "profile": "", "-3-link": "", "profile--link": "", "profile-x-link": "", "result": ""} {
		if got := profileOf(link); got != want {
			t.Errorf("%q: %q, want %q", link, got, want)
		}
	}
}

// Nothing is touched that is not what was planned.
func TestChanged(t *testing.T) {
	link := "/home/alice/dir/result"
	for name, c := range map[string]struct {
		change func(s *stage)
		look   error
		remove error // of a record from before
	}{
		"leads elsewhere": {func(s *stage) {
			s.must(os.Remove(s.Host + link))
			s.must(os.Symlink(storePath+"y", s.Host+link))
			s.must(os.Lchown(s.Host+link, 1000, 100))
		}, ErrChanged, ErrChanged},
		"another's": {func(s *stage) { s.must(os.Lchown(s.Host+link, 1001, 100)) }, ErrChanged, nil},
		"a file": {func(s *stage) {
			s.must(os.Remove(s.Host + link))
			s.must(os.WriteFile(s.Host+link, []byte("x"), 0o644))
		}, ErrChanged, ErrChanged},
		"gone":           {func(s *stage) { s.must(os.Remove(s.Host + link)) }, ErrChanged, nil},
		"directory gone": {func(s *stage) { s.must(os.RemoveAll(s.Host + "/home/alice/dir")) }, ErrChanged, nil},
		"directory of root's": {func(s *stage) {
			s.must(os.Chown(s.Host+"/home/alice/dir", 0, 0))
		}, nil, unix.EACCES},
		"entry of another link": {func(s *stage) {
			s.must(os.Remove(s.Host + s.root.Auto))
			s.must(os.Symlink("/home/bob/result", s.Host+s.root.Auto))
		}, ErrChanged, ErrChanged},
		// The user exchanges a directory for a link to where only root may write.
		"directory is a link to root's": {func(s *stage) {
			s.must(os.Mkdir(s.Host+"/root", 0o700))
			s.must(os.Symlink(storePath, s.Host+"/root/result"))
			s.must(os.RemoveAll(s.Host + "/home/alice/dir"))
			s.must(os.Symlink("/root", s.Host+"/home/alice/dir"))
		}, ErrChanged, unix.EACCES},
		// A link out of the host's root stays in it.
		"directory is a link to the outside": {func(s *stage) {
			s.must(os.RemoveAll(s.Host + "/home/alice/dir"))
			s.must(os.Symlink("/../../"+s.Keep.Volume(), s.Host+"/home/alice/dir"))
		}, ErrChanged, nil},
	} {
		t.Run(name, func(t *testing.T) {
			s := newStage(t)
			rec, err := s.Look(s.root)
			s.must(err)
			c.change(s)
			before := s.links()
			if _, err := s.Look(s.root); !errors.Is(err, c.look) {
				t.Errorf("look: %v, want %v", err, c.look)
			}
			if err := s.Remove(rec); !errors.Is(err, c.remove) {
				t.Errorf("remove: %v, want %v", err, c.remove)
			}
			if c.remove != nil {
				if after := s.links(); !slices.Equal(before, after) && name != "entry of another link" {
					t.Errorf("%q became %q", before, after)
				}
			}
		})
	}
}

// What is in the keep already stays.
func TestTaken(t *testing.T) {
	s := newStage(t)
	rec, err := s.Look(s.root)
	s.must(err)
	at := s.Keep.Volume() + "/" + s.root.To
	s.must(os.MkdirAll(filepath.Dir(at), 0o755))
	s.must(os.WriteFile(at, []byte("precious"), 0o600))
	if err := s.Make(rec); !errors.Is(err, ErrTaken) || !Theirs(err) {
		t.Errorf("make: %v", err)
	}
	if err := s.Drop(rec); !errors.Is(err, ErrChanged) || !Theirs(err) {
		t.Errorf("drop: %v", err)
	}
	if b, err := os.ReadFile(at); err != nil || string(b) != "precious" {
		t.Errorf("%q %v", b, err)
	}
	// A way through a link out of the keep is no way.
	s = newStage(t)
	s.must(os.Symlink(s.Host+"/home", s.Keep.Volume()+"/home/work/links"))
	if err := s.Make(rec); !errors.Is(err, unix.ELOOP) || !Theirs(err) {
		t.Errorf("make through a link: %v", err)
	}
	if err := s.Drop(rec); !Theirs(err) {
		t.Errorf("drop through a link: %v", err)
	}
	if Theirs(nil) || Theirs(unix.EIO) || Theirs(unix.EACCES) { // what may go another time
		t.Error("too much is theirs")
	}
	for _, to := range []string{"", "nix/x", "home/../nix/x", "/home/x", "home//x"} {
		rec.To = to
		if err := s.Make(rec); !errors.Is(err, ErrTaken) {
			t.Errorf("make %q: %v", to, err)
		}
	}
}
