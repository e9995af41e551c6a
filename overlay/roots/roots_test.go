package roots

import (
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"runtime"
	"slices"
	"strings"
	"testing"

	"github.com/google/go-cmp/cmp"
	"golang.org/x/sys/unix"

	"overkeep/overlay/drv/storepath"
	"overkeep/policy/graph"
	"overkeep/tests/need"
)

func base(name string) string { return strings.Repeat("0", 32) + "-" + name }
func sp(name string) string   { return "/nix/store/" + base(name) }

// machine makes a tree: "path -> target" is a link, "path/" a directory, "path" a
// file; "path!" a FIFO.
func machine(t testing.TB, entries ...string) string {
	t.Helper()
	root := t.TempDir()
	for _, e := range entries {
		name, target, link := strings.Cut(e, " -> ")
		at := filepath.Join(root, strings.TrimRight(name, "!"))
		dir := filepath.Dir(at)
		if strings.HasSuffix(name, "/") {
			dir = at
		}
		err := os.MkdirAll(dir, 0o755)
		switch {
		case err != nil || dir == at:
		case link:
			err = os.Symlink(target, at)
		case strings.HasSuffix(name, "!"):
			err = unix.Mkfifo(at, 0o600)
		default:
			err = os.WriteFile(at, nil, 0o600)
		}
		if err != nil {
			t.Fatal(err)
		}
	}
	return root
}

var laptop = []string{
	"/nix/store/" + base("nixos") + "/sw -> " + sp("path"),
	"/nix/store/.links/",
	"/nix/var/nix/profiles/system -> system-42-link",
	"/nix/var/nix/profiles/system-41-link -> " + sp("nixos-old"),
	"/nix/var/nix/profiles/system-42-link -> " + sp("nixos"),
	"/nix/var/nix/profiles/per-user/u/profile -> profile-1-link",
	"/nix/var/nix/profiles/per-user/u/profile-1-link -> " + sp("env"),
	"/nix/var/nix/gcroots/auto/a -> /home/u/src/result",
	"/nix/var/nix/gcroots/auto/b -> /home/u/gone",
	"/nix/var/nix/gcroots/auto/c -> /home/u/loop",
	"/nix/var/nix/gcroots/profiles -> /nix/var/nix/profiles",
	"/nix/var/nix/gcroots/by-name/" + base("named"),
	"/nix/var/nix/gcroots/by-name/README",
	"/nix/var/nix/gcroots/empty/",
	"/run/booted-system -> " + sp("nixos-old"),
	"/run/current-system -> " + sp("nixos"),
	"/run/fifo!",
	"/etc/NIXOS",
	"/etc/profiles/per-user/u -> /etc/static/profiles/u",
	"/etc/static -> " + sp("etc") + "/etc",
	"/var/run -> /run",
	"/home/u/.nix-profile -> .local/state/nix/profiles/profile",
	"/home/u/.local/state/nix/profiles/profile -> profile-7-link",
	"/home/u/.local/state/nix/profiles/profile-7-link -> " + sp("env"),
	"/home/u/src/result -> " + sp("result"),
	"/home/u/src/up -> ../../../../../../nix/store/" + base("up"),
	"/home/u/loop -> loop",
	"/home/u/file",
	"/home/u/to-file -> file",
	"/home/u/to-root -> /",
	"/home/u/store -> /nix/store",
	"/home/u/into -> store/" + base("x") + "/bin/../../" + base("y"),
	"/home/u/links -> /nix/store/.links/x",
	"/home/u/empty-name -> /nix/store//./" + base("x") + "//",
	"/home/u/out -> " + "../../../../../../../../../../../../../../../../../../etc/passwd",
}

func TestResolve(t *testing.T) {
	root := machine(t, laptop...)
	r := Resolver{Root: root, Home: "/home/u"}
	one := func(name string) []string { return []string{base(name)} }
	for _, c := range []struct {
		target string
		want   []string
		err    error
	}{
		{"/run/current-system", one("nixos"), nil},
		{"/run/current-system/", one("nixos"), nil},
		{"//run/./../run/current-system", one("nixos"), nil},
		{"/var/run/booted-system", one("nixos-old"), nil},
		{"/run/current-system/sw/bin/x", one("nixos"), nil}, // as Nix: the first on the way
		{"/nix/var/nix/profiles/system", one("nixos"), nil},
		{"/nix/var/nix/gcroots/profiles/system", one("nixos"), nil},
		{"~/.nix-profile", one("env"), nil},
		{"/home/u/.nix-profile/bin", one("env"), nil},
		{"/etc/profiles/per-user/u", one("etc"), nil},
		{"/home/u/src/up", one("up"), nil},
		{"/home/u/into", one("x"), nil},
		{"/home/u/empty-name", one("x"), nil},
		{sp("not-there"), one("not-there"), nil},
		{sp("nixos") + "/sw", one("nixos"), nil},
		{"/home/u/store/" + base("z") + "/file", one("z"), nil},

		{"/nix/var/nix/profiles", []string{base("env"), base("nixos"), base("nixos-old")}, nil},
		{"/nix/var/nix/gcroots/auto", one("result"), nil},
		{"/nix/var/nix/gcroots", []string{base("named"), base("result")}, nil}, // no links to directories
		{"/nix/var/nix/gcroots/profiles", []string{base("env"), base("nixos"), base("nixos-old")}, nil},
		{"/nix/var/nix/gcroots/empty", nil, nil},

		{"", nil, ErrTarget},
		{"run/current-system", nil, ErrTarget},
		{"~", nil, ErrTarget},
		{"~root/.nix-profile", nil, ErrTarget},
		{"/run/\x00", nil, ErrTarget},
		{"/" + strings.Repeat("x", 256), nil, ErrTarget}, // a name that cannot be
		{"/" + strings.Repeat("x/", maxTarget), nil, ErrTarget},
		{"/nothing", nil, ErrMissing},
		{"/home/u/gone/x", nil, ErrMissing},
		{"/nix/var/nix/gcroots/auto/b", nil, ErrMissing},
		{"/home/u/loop", nil, ErrLoop},
		{"/home/u/loop/x", nil, ErrLoop},
		{"/home/u/file", nil, ErrNoRoot},
		{"/home/u/file/x", nil, ErrNoRoot},
		{"/home/u/to-file", nil, ErrNoRoot},
		{"/home/u/out", nil, ErrMissing},
		{"/run/fifo", nil, ErrNoRoot},
		{"/nix/store/.links", nil, ErrNoRoot},
		{"/home/u/links", nil, ErrNoRoot},
		{"/nix/store/" + strings.Repeat("e", 32) + "-x", nil, ErrNoRoot},
		{"/nix/store", nil, ErrBroad},
		{"/home/u/store", nil, ErrBroad},
		{"/nix", nil, ErrBroad},
		{"/", nil, ErrBroad},
		{"/home/u/to-root", nil, ErrBroad},
	} {
		res, err := r.Resolve(c.target)
		if !errors.Is(err, c.err) || !slices.Equal(res.Bases, c.want) {
			t.Errorf("%.80q: %q %v", c.target, res.Bases, err)
		}
		if err != nil && (res.Directory || len(err.Error()) > 1000) {
			t.Errorf("%.80q: %+v %.500v", c.target, res, err)
		}
	}
	if res, err := r.Resolve("/nix/var/nix/gcroots/auto"); err != nil || !res.Directory || res.Stale != 2 {
		t.Errorf("%+v %v", res, err)
	}
	if _, err := (Resolver{Root: root}).Resolve("~/.nix-profile"); !errors.Is(err, ErrTarget) {
		t.Errorf("without a home: %v", err)
	}
	if _, err := (Resolver{Root: root + "/none"}).Resolve("/run"); !errors.Is(err, ErrMissing) {
		t.Errorf("without a root: %v", err)
	}
	if res, err := (Resolver{Root: root, StoreDir: "/run"}).Resolve("/var/run/" + base("other")); err != nil || !slices.Equal(res.Bases, one("other")) {
		t.Errorf("another store: %+v %v", res, err)
	}
}

// The zero value looks at the running system; only what is sure everywhere is asked.
func TestRunningSystem(t *testing.T) {
	if res, err := (Resolver{}).Resolve(sp("x")); err != nil || !slices.Equal(res.Bases, []string{base("x")}) {
		t.Errorf("%+v %v", res, err)
	}
	if _, err := (Resolver{}).Resolve("/dev/null"); !errors.Is(err, ErrNoRoot) {
		t.Error(err)
	}
	// A link of /proc is followed by its text, not by magic.
	if _, err := (Resolver{Root: t.TempDir()}).Resolve("/proc/self/root"); !errors.Is(err, ErrMissing) {
		t.Error(err)
	}
}

func TestManyLinks(t *testing.T) {
	var entries []string
	for i := 1; i <= maxLinks+1; i++ {
		entries = append(entries, fmt.Sprintf("/l%d -> l%d", i, i-1))
	}
	entries = append(entries, "/l0 -> "+sp("x"), "/long -> "+strings.Repeat("./", 2000)+"l0")
	r := Resolver{Root: machine(t, entries...)}
	if res, err := r.Resolve(fmt.Sprintf("/l%d", maxLinks-1)); err != nil || len(res.Bases) != 1 {
		t.Errorf("as many as may be: %+v %v", res, err)
	}
	if _, err := r.Resolve(fmt.Sprintf("/l%d", maxLinks)); !errors.Is(err, ErrLoop) {
		t.Errorf("one more: %v", err)
	}
	if res, err := r.Resolve("/long"); err != nil || len(res.Bases) != 1 {
		t.Errorf("a long one: %+v %v", res, err)
	}
	for i, to := range []string{"s1", "s2", "l0"} { // few links, many steps
		if err := os.Symlink(strings.Repeat("./", 2000)+to, filepath.Join(r.Root, fmt.Sprintf("s%d", i))); err != nil {
			t.Fatal(err)
		}
	}
	if res, err := r.Resolve("/s1"); err != nil || len(res.Bases) != 1 {
		t.Errorf("many steps: %+v %v", res, err)
	}
	if _, err := r.Resolve("/s0"); !errors.Is(err, ErrLoop) {
		t.Errorf("too many steps: %v", err)
	}
}

func TestDeepDirectory(t *testing.T) {
	deep := strings.Repeat("/d", maxDepth)
	r := Resolver{Root: machine(t, "/top"+deep+"/l -> "+sp("x"), "/over"+deep+"/d/l -> "+sp("x"))}
	if res, err := r.Resolve("/top"); err != nil || len(res.Bases) != 1 {
		t.Errorf("%+v %v", res, err)
	}
	if res, err := r.Resolve("/over"); !errors.Is(err, ErrBroad) {
		t.Errorf("%+v %v", res, err)
	}
}

func TestGraph(t *testing.T) {
	ids := map[string]graph.ID{base("a"): 3, base("b"): 5}
	lookup := func(b string) (graph.ID, bool) { id, ok := ids[b]; return id, ok }
	for _, c := range []struct {
		res  Result
		want graph.Root
		err  error
	}{
		{Result{Bases: []string{base("a")}}, graph.Root{Known: true, IDs: []graph.ID{3}}, nil},
		{Result{Bases: []string{base("c")}}, graph.Root{}, ErrInvalid},
		{Result{Directory: true}, graph.Root{Known: true}, nil},
		{Result{Directory: true, Bases: []string{base("a"), base("b"), base("c")}}, graph.Root{Known: true, IDs: []graph.ID{3, 5}}, nil},
	} {
		got, err := c.res.Graph(lookup)
		if diff := cmp.Diff(c.want, got); diff != "" || !errors.Is(err, c.err) {
			t.Errorf("%+v: %v %s", c.res, err, diff)
		}
	}
}

func TestBoot(t *testing.T) {
	for _, c := range []struct {
		name    string
		entries []string
		want    Boot
		err     error
	}{
		{"NixOS", laptop, Boot{NixOS: true, Booted: base("nixos-old"), Current: base("nixos"), Profile: base("nixos")}, nil},
		{"Debian", []string{"/etc/debian_version", "/run/lock/"}, Boot{}, nil},
		{"system-manager", []string{"/run/current-system -> " + sp("x")}, Boot{Current: base("x")}, nil},
		{"dangling", []string{"/etc/NIXOS", "/run/current-system -> /gone"}, Boot{NixOS: true}, nil},
		{"not a link", []string{"/etc/NIXOS", "/run/current-system"}, Boot{}, ErrNoRoot},
		{"a directory", []string{"/etc/NIXOS", "/run/current-system/x -> " + sp("x")}, Boot{}, ErrNoRoot},
		{"a loop", []string{"/etc/NIXOS", "/run/current-system -> current-system"}, Boot{}, ErrLoop},
	} {
		got, err := Resolver{Root: machine(t, c.entries...)}.Boot()
		if got != c.want || !errors.Is(err, c.err) {
			t.Errorf("%s: %+v %v", c.name, got, err)
		}
	}
}

// Who could have changed the answer.
func TestTrust(t *testing.T) {
	need.Root(t)
	root := machine(t, laptop...)
	chown := func(uid int, names ...string) {
		for _, n := range names {
			if err := os.Lchown(filepath.Join(root, n), uid, uid); err != nil {
				t.Fatal(err)
			}
		}
	}
	mode := func(m fs.FileMode, name string) {
		if err := os.Chmod(filepath.Join(root, name), m); err != nil {
			t.Fatal(err)
		}
	}
	chown(1000, "home/u", "home/u/src", "home/u/.local", "home/u/.local/state", "home/u/.local/state/nix", "home/u/.local/state/nix/profiles")
	for name, want := range map[string]Result{
		"/run/current-system":       {},
		sp("x"):                     {},
		"~/.nix-profile":            {Writers: []uint32{1000}},
		"/nix/var/nix/gcroots/auto": {Writers: []uint32{1000}},
	} {
		res, err := Resolver{Root: root, Home: "/home/u"}.Resolve(name)
		if err != nil || !slices.Equal(res.Writers, want.Writers) || res.Anyone != want.Anyone {
			t.Errorf("%s: %+v %v", name, res, err)
		}
	}
	// In a sticky directory the link's owner, without the bit anybody.
	chown(1001, "run/current-system")
	mode(0o777|fs.ModeSticky, "run")
	res, err := Resolver{Root: root}.Resolve("/run/current-system")
	if err != nil || !slices.Equal(res.Writers, []uint32{1001}) || res.Anyone {
		t.Errorf("sticky: %+v %v", res, err)
	}
	mode(0o777, "run")
	if res, err := (Resolver{Root: root}).Resolve("/run/current-system"); err != nil || !res.Anyone {
		t.Errorf("open to all: %+v %v", res, err)
	}
	mode(0o777|fs.ModeSticky, "nix/var/nix/gcroots/empty")
	if res, err := (Resolver{Root: root}).Resolve("/nix/var/nix/gcroots/empty"); err != nil || !res.Anyone {
		t.Errorf("a directory that all may add to: %+v %v", res, err)
	}
}

// What may not be looked at is unknown, not empty.
func TestDenied(t *testing.T) {
	need.Root(t)
	root := machine(t, "/secret/l -> "+sp("x"), "/dir/sub/l -> "+sp("x"), "/open -> /secret/l")
	if err := errors.Join(os.Chmod(filepath.Join(root, "secret"), 0o700), os.Chmod(filepath.Join(root, "dir/sub"), 0o711)); err != nil {
		t.Fatal(err)
	}
	for p := root; p != "/" && p != os.TempDir(); p = filepath.Dir(p) { // what t.TempDir made is root's alone
		if st, err := os.Stat(p); err == nil && st.Mode()&0o001 == 0 {
			if err := os.Chmod(p, st.Mode()|0o055); err != nil {
				t.Fatal(err)
			}
		}
	}
	errs := map[string]error{}
	done := make(chan struct{})
	go func() {
		defer close(done)
		runtime.LockOSThread() // and never unlocked: the thread ends with the goroutine
		if err := unix.Setfsuid(65534); err != nil {
			errs["setfsuid"] = err
			return
		}
		for _, target := range []string{"/secret/l", "/secret", "/open", "/dir", "/dir/sub", "/dir/sub/l"} {
			_, errs[target] = Resolver{Root: root}.Resolve(target)
		}
	}()
	<-done
	for target, err := range errs {
		if want := target != "/dir/sub/l"; errors.Is(err, ErrDenied) != want || !want && err != nil {
			t.Errorf("%s: %v", target, err)
		}
	}
	if len(errs) != 6 {
		t.Error(errs)
	}
}

// Somebody swaps a directory for a link to elsewhere while we look: the answer is
// one that the machine gave at some time, never one from outside its root.
func TestSwappedWhileLooking(t *testing.T) {
	outside := machine(t, "/d/l -> "+sp("outside"))
	root := machine(t, "/a/d/l -> "+sp("inside"), "/b -> "+outside, "/b2 -> "+strings.Repeat("../", 40)+outside[1:])
	if err := os.Symlink(outside, filepath.Join(root, "a2")); err != nil {
		t.Fatal(err)
	}
	stop, stopped := make(chan struct{}), make(chan error, 1)
	go func() {
		for {
			select {
			case <-stop:
				stopped <- nil
				return
			default:
			}
			for range 2 {
				if err := unix.Renameat2(unix.AT_FDCWD, root+"/a", unix.AT_FDCWD, root+"/a2", unix.RENAME_EXCHANGE); err != nil {
					stopped <- err
					return
				}
			}
		}
	}()
	seen := map[string]int{}
	for i := 0; i < 3000 || i < 300000 && (seen["inside"] == 0 || seen["missing"] == 0); i++ {
		for _, target := range []string{"/a/d/l", "/a/d", "/b/d/l", "/b2/d/l"} {
			res, err := Resolver{Root: root}.Resolve(target)
			switch {
			case slices.Contains(res.Bases, base("outside")):
				t.Fatalf("%s: led outside", target)
			case err == nil:
				seen["inside"]++
			case errors.Is(err, ErrMissing):
				seen["missing"]++
			default:
				t.Fatalf("%s: %v", target, err)
			}
		}
	}
	close(stop)
	if err := <-stopped; err != nil {
		t.Fatal(err)
	}
	if seen["inside"] == 0 || seen["missing"] == 0 {
		t.Errorf("nothing was swapped: %v", seen)
	}
}

func FuzzLinks(f *testing.F) {
	f.Add("/run/x", "../run", sp("x"))
	tmp := "/dev/shm" // memory: each case makes a tree
	if st, err := os.Stat(tmp); err != nil || !st.IsDir() {
		tmp = ""
	}
	f.Fuzz(func(t *testing.T, target, a, b string) {
		dir, err := os.MkdirTemp(tmp, "roots")
		if err != nil {
			t.Fatal(err)
		}
		defer os.RemoveAll(dir)
		root := filepath.Join(dir, "root")
		for _, d := range []string{"run/sub", "nix/store"} {
			if err := os.MkdirAll(filepath.Join(root, d), 0o700); err != nil {
				t.Fatal(err)
			}
		}
		if err := os.Symlink(sp("outside"), filepath.Join(dir, "outside")); err != nil {
			t.Fatal(err)
		}
		_ = os.Symlink(a, filepath.Join(root, "run/x")) // not every text can be a link
		_ = os.Symlink(b, filepath.Join(root, "run/sub/x"))
		for _, target := range []string{target, "/run/x", "/run"} {
			res, err := Resolver{Root: root, Home: "/run"}.Resolve(target)
			if (err == nil) != (len(res.Bases) == 1 || res.Directory) {
				t.Fatalf("%q: %+v %v", target, res, err)
			}
			for _, found := range res.Bases {
				if !storepath.IsBase(found) || found == base("outside") && !strings.Contains(target+a+b, found) {
					t.Fatalf("%q: %q", target, found)
				}
			}
		}
	})
}
