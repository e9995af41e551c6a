package traces

import (
	"bytes"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"sort"
	"strconv"
	"strings"
	"testing"

	"golang.org/x/sys/unix"

	"overkeep/tests/fixture"
)

// The kinds of places where a trace can be.
const (
	onDisk    = "raw disk"
	inName    = "file name"
	inContent = "file content"
	inLink    = "symbolic link"
	inXattr   = "extended attribute"
	inTables  = "system database"
	inArgv    = "arguments of a process"
	inEnv     = "environment of a process"
)

// everywhere is all of them.
var everywhere = []string{onDisk, inName, inContent, inLink, inXattr, inTables, inArgv, inEnv}

// finding is one trace.
type finding struct{ kind, where, what string }

func (f finding) String() string { return f.kind + " " + f.where + " shows " + f.what }

// kinds are those of a list of findings, by needle.
func kinds(found []finding, needle string) []string {
	set := map[string]bool{}
	for _, f := range found {
		if f.what == needle {
			set[f.kind] = true
		}
	}
	var out []string
	for k := range set {
		out = append(out, k)
	}
	sort.Strings(out)
	return out
}

// volume is where the keep's ciphertext lies. While the keep is open the kernel
// shows it decrypted to root of any namespace, fscrypt's keys being of the whole
// file system: then it is left out of the walk, and the raw disk speaks for it.
const volume = "/var/lib/overkeep/alice/volume"

// largest file the walk reads; larger ones are on the raw disk.
const largest = 32 << 20

// outside looks for needles wherever somebody without the keep could: as a thief
// on the raw disk, as root of the machine in the host's namespace by names,
// contents, links and attributes of everything that lies outside of /usr, in the
// system store's database, and in /proc.
func outside(t *testing.T, k *fixture.Keep, open bool, needles ...string) []finding {
	t.Helper()
	found := disk(t, k, needles...)
	for _, top := range []string{"/nix", "/home", "/tmp", "/var", "/run", "/etc", "/root", "/srv", "/opt", "/mnt", "/media", "/dev/shm"} {
		found = append(found, walk(t, k.Root, top, open, needles)...)
	}
	tables := k.Must(t, "root", "sqlite3 /nix/var/nix/db/db.sqlite .dump; nix-store --dump-db; nix-store --gc --print-roots")
	for _, n := range needles {
		if strings.Contains(tables, n) {
			found = append(found, finding{inTables, "db.sqlite", n})
		}
	}
	return append(found, processes(t, k, needles)...)
}

// disk is the part of outside that also works on a machine that is off.
func disk(t *testing.T, k *fixture.Keep, needles ...string) (found []finding) {
	t.Helper()
	for n, at := range k.Find(t, needles...) {
		for i, offset := range at {
			if i == 3 {
				break // enough to see what it is
			}
			found = append(found, finding{onDisk, k.Owner(offset), n})
		}
	}
	return found
}

func walk(t *testing.T, root, top string, open bool, needles []string) (found []finding) {
	t.Helper()
	look := func(kind, where string, b []byte) {
		for _, n := range needles {
			if bytes.Contains(b, []byte(n)) {
				found = append(found, finding{kind, where, n})
			}
		}
	}
	err := filepath.WalkDir(root+top, func(p string, d fs.DirEntry, err error) error {
		rel := strings.TrimPrefix(p, root)
		if os.IsNotExist(err) {
			return nil // gone meanwhile, or never there
		}
		if err != nil {
			return err
		}
		switch {
		case rel == volume && open:
			return fs.SkipDir
		case rel == "/run/overkeep/alice/ns/mnt": // a mount namespace, no file
			return nil
		}
		look(inName, rel, []byte(d.Name()))
		look(inXattr, rel, xattrs(p))
		switch {
		case d.Type()&fs.ModeSymlink != 0:
			to, err := os.Readlink(p)
			if err != nil && !os.IsNotExist(err) {
				return err
			}
			look(inLink, rel, []byte(to))
		case d.Type().IsRegular():
			fi, err := d.Info()
			if err != nil || fi.Size() > largest {
				return nil
			}
			b, err := os.ReadFile(p)
			if err != nil && !os.IsNotExist(err) && !(strings.HasPrefix(rel, volume+"/") && !open) {
				return err
			}
			look(inContent, rel, b)
		}
		return nil
	})
	if err != nil {
		t.Fatalf("search %s: %v", top, err)
	}
	return found
}

// xattrs are all attributes of a file, names and values.
func xattrs(p string) []byte {
	names := make([]byte, 64<<10)
	n, err := unix.Llistxattr(p, names)
	if err != nil || n == 0 {
		return nil
	}
	all := bytes.Clone(names[:n])
	value := make([]byte, 64<<10)
	for name := range bytes.SplitSeq(names[:n], []byte{0}) {
		if v, err := unix.Lgetxattr(p, string(name), value); err == nil {
			all = append(all, value[:v]...)
		}
	}
	return all
}

// processes looks at the arguments and environments of the machine's processes,
// but for alice's own and those of the build users, which build for her: the
// kernel shows everybody what they run as.
func processes(t *testing.T, k *fixture.Keep, needles []string) (found []finding) {
	t.Helper()
	dirs, err := filepath.Glob(k.Root + "/proc/[0-9]*")
	if err != nil || len(dirs) == 0 {
		t.Fatalf("the machine has no processes: %v", err)
	}
	for _, dir := range dirs {
		var st unix.Stat_t
		if unix.Stat(dir, &st) != nil || st.Uid == aliceUID || st.Uid > buildUsers && st.Uid <= buildUsers+100 {
			continue
		}
		for file, kind := range map[string]string{"cmdline": inArgv, "environ": inEnv} {
			b, _ := os.ReadFile(filepath.Join(dir, file)) // it may have ended
			for _, n := range needles {
				if bytes.Contains(b, []byte(n)) {
					found = append(found, finding{kind, "pid " + filepath.Base(dir) + " of uid " + strconv.Itoa(int(st.Uid)), n})
				}
			}
		}
	}
	return found
}

// The user ids of the machine (tests/bed/rootfs).
const (
	aliceUID   = 1000
	buildUsers = 30000
)

// inside returns the files of the keep that show needle, by name or content, with
// paths from the volume's top; as root in the view. The needle goes in by stdin.
func inside(t *testing.T, k *fixture.Keep, needle string) string {
	t.Helper()
	return enter(t, k, true, `read n; cd /run/overkeep/alice/k
		grep -rlaF -e "$n" . || true
		find . -name "*$n*" -o -lname "*$n*"`, needle)
}

// enter runs a script in alice's view, as her or as root. Nothing of it, nor of
// its input, is in the arguments or environment of a process that is not of the
// view: both come by stdin.
func enter(t *testing.T, k *fixture.Keep, asRoot bool, script, input string) string {
	t.Helper()
	r, err := k.Exec(command(asRoot, script, input))
	if err != nil || r.Code != 0 {
		t.Fatalf("in the view: %v, exit code %d of\n%s\n%s%s", err, r.Code, script, r.Stdout, r.Stderr)
	}
	return r.Stdout
}

func describe(found []finding) string {
	var b strings.Builder
	for _, f := range found {
		fmt.Fprintln(&b, f)
	}
	return b.String()
}
