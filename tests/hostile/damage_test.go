package hostile

import (
	"crypto/sha256"
	"encoding/hex"
	"encoding/json"
	"fmt"
	"os"
	"strings"
	"testing"

	"golang.org/x/sys/unix"

	"overkeep/tests/fixture"
)

// The exit codes that stand for a keep that is not what it was.
var (
	tampered = []int{6}
	damaged  = []int{12}
	newer    = []int{15}
	// One flipped bit can make any of them, depending on where it hits.
	notWhatItWas = []int{6, 12, 15}
)

const list = slotDir + "/set.json"

// A header that is cut off or changed, in any place, opens nothing and is said
// to be what is wrong.
func TestDamagedHeader(t *testing.T) {
	l := newLaptop(t)
	const file = keepDir + "/keep.json"
	good := string(l.read(t, file))
	put := func(b string) func(*testing.T) func() {
		return func(t *testing.T) func() { return l.content(t, file, []byte(b)) }
	}
	change := func(old, new string) func(*testing.T) func() {
		return func(t *testing.T) func() { return l.edit(t, file, old, new) }
	}
	backup := []string{"cp -a BACKUP/alice"}
	value := func(key string) string { // `"key": value` as it stands in the file
		for line := range strings.Lines(good) {
			if strings.HasPrefix(strings.TrimSpace(line), `"`+key+`":`) {
				return strings.TrimSuffix(strings.TrimSpace(line), ",")
			}
		}
		t.Fatalf("no %q in %s", key, good)
		return ""
	}
	set := func(key, v string) func(*testing.T) func() { return change(value(key), `"`+key+`": `+v) }

	cases := []attempt{
		{name: "empty", bad: put(""), exit: damaged, says: []string{"alice", "empty"}, remedy: backup},
		{name: "zeros", bad: put(strings.Repeat("\x00", len(good))), exit: damaged, remedy: backup},
		{name: "too long", bad: put(good + strings.Repeat(" ", 1<<20)), exit: damaged, remedy: backup},
		{name: "two of them", bad: put(good + good), exit: damaged, remedy: backup},
		{name: "not an object", bad: put("[]\n"), exit: damaged, remedy: backup},
		{name: "null", bad: put("null\n"), exit: damaged, remedy: backup},
		{name: "deep", bad: put(strings.Repeat("[", 12000)), exit: damaged, remedy: backup},
		{name: "key repeated", bad: set("user", `"alice", "user": "alice"`), exit: damaged, says: []string{"user"}},
		{name: "key in capitals", bad: change(`"user"`, `"User"`), exit: damaged, says: []string{"User"}},
		{name: "unknown key", bad: set("version", `1, "colour": "red"`), exit: damaged, says: []string{"colour"}},
		{name: "escape sequence", bad: set("user", `"\u001b[31mroot"`), exit: notWhatItWas},
		{name: "invalid UTF-8", bad: set("user", "\"\xff\xfe\""), exit: notWhatItWas},

		{name: "version/newer", bad: set("version", "2"), exit: newer, says: []string{"version 2", "knows 1"}, remedy: []string{"overkeep version"}},
		{name: "version/newer with new keys", bad: set("version", `7, "colour": "red"`), exit: newer, says: []string{"version 7"}},
		{name: "version/none", bad: change(value("version")+",", ""), exit: []int{12, 15}},
		{name: "version/zero", bad: set("version", "0"), exit: []int{12, 15}},
		{name: "version/negative", bad: set("version", "-1"), exit: newer, says: []string{"-1"}},
		{name: "version/huge", bad: set("version", "99999999999999999999"), exit: []int{12, 15}},
		{name: "version/a word", bad: set("version", `"one"`), exit: damaged, says: []string{"byte"}},
		{name: "features/unknown", bad: set("features", `["shiny"]`), exit: newer, says: []string{"shiny"}},
		{name: "features/unknown with its key", bad: set("features", `["shiny"], "shine": 3`), exit: newer, says: []string{"shiny"}},
		{name: "features/many", bad: set("features", "["+strings.Repeat(`"x",`, 3000)+`"x"]`), exit: []int{12, 15}},

		{name: "id/other", bad: set("id", `"`+strings.Repeat("0", 32)+`"`), exit: tampered},
		{name: "id/path", bad: set("id", `"../../../etc"`), exit: damaged, says: []string{"id"}},
		{name: "name/other", bad: set("name", `"bob"`), exit: tampered, says: []string{`"bob"`}},
		{name: "name/path", bad: set("name", `"../alice"`), exit: notWhatItWas},
		{name: "user/unknown", bad: set("user", `"mallory"`), exit: tampered, says: []string{`"mallory"`}, remedy: []string{"useradd"}},
		{name: "user/bob", bad: set("user", `"bob"`), exit: tampered, says: []string{`"bob"`, "1000", "1001"}},
		{name: "user/bob with his uid", bad: func(t *testing.T) func() {
			b := strings.Replace(good, value("user"), `"user": "bob"`, 1)
			return l.content(t, file, []byte(strings.Replace(b, value("uid"), `"uid": 1001`, 1)))
		}, exit: tampered, remedy: backup},
		{name: "user/root", bad: func(t *testing.T) func() {
			b := strings.Replace(good, value("user"), `"user": "root"`, 1)
			return l.content(t, file, []byte(strings.Replace(b, value("uid"), `"uid": 0`, 1)))
		}, exit: damaged},
		{name: "uid/a word", bad: set("uid", `"1000"`), exit: damaged, says: []string{"byte"}},
		{name: "uid/negative", bad: set("uid", "-1"), exit: damaged},
		{name: "uid/fraction", bad: set("uid", "1000.5"), exit: damaged},
		{name: "created/other", bad: set("created", `"1999-12-31T23:59:59Z"`), exit: tampered, remedy: backup},
		{name: "created/no time", bad: set("created", `"yesterday"`), exit: damaged, says: []string{"yesterday"}},
		{name: "backend/unknown", bad: set("backend", `"cloud"`), exit: damaged, says: []string{"cloud"}},
		{name: "backend/the other", bad: set("backend", `"dir"`), exit: notWhatItWas},
		{name: "size/other", bad: set("size", "68719476736"), exit: tampered},
		{name: "size/negative", bad: set("size", "-1"), exit: damaged},
		{name: "size/overflow", bad: set("size", "1e30"), exit: damaged},
		{name: "work_dir/other", bad: set("work_dir", `"papers"`), exit: tampered},
		{name: "work_dir/path", bad: set("work_dir", `"../../etc"`), exit: damaged, says: []string{"../../etc"}},
		{name: "fs_image/added", bad: set("size", value("size")[len(`"size": `):]+`, "fs_image": "/root/victim/image"`), exit: notWhatItWas},
		{name: "fs_image/relative", bad: set("size", value("size")[len(`"size": `):]+`, "fs_image": "../x"`), exit: notWhatItWas},
	}
	for _, n := range []int{1, len(good) / 3, len(good) / 2, len(good) - 3} {
		cases = append(cases, attempt{name: fmt.Sprintf("cut off at %d", n), bad: put(good[:n]), exit: damaged, says: []string{"alice"}, remedy: backup})
	}
	for _, c := range flips(good, 17) {
		cases = append(cases, attempt{name: c.name, bad: put(c.content), exit: notWhatItWas})
	}
	for _, a := range cases {
		l.try(t, a)
	}
	l.opens(t)
}

// flip is a content with one bit changed.
type flip struct{ name, content string }

// flips changes single bits of s at n places, spread over all of it, every bit of
// a byte in turn.
func flips(s string, n int) []flip {
	var out []flip
	for i := range n {
		at, bit := i*len(s)/n, i%8
		b := []byte(s)
		b[at] ^= 1 << bit
		out = append(out, flip{fmt.Sprintf("bit %d of byte %d", bit, at), string(b)})
	}
	return out
}

// The list of slots and the slot files themselves: cut off, changed, exchanged,
// planted, removed, of a newer version.
func TestDamagedSlots(t *testing.T) {
	l := newLaptop(t)
	const (
		first    = slotDir + "/passphrase.age"
		recovery = slotDir + "/recovery.age"
	)
	set, file := string(l.read(t, list)), string(l.read(t, first))
	put := func(path, b string) func(*testing.T) func() {
		return func(t *testing.T) func() { return l.content(t, path, []byte(b)) }
	}
	change := func(old, new string) func(*testing.T) func() {
		return func(t *testing.T) func() { return l.edit(t, list, old, new) }
	}
	look := []string{"key list alice"}
	ignore := []string{"key list alice", "--ignore-damaged-slot passphrase"}

	cases := []attempt{
		{name: "list/empty", bad: put(list, ""), exit: damaged, says: []string{"set.json"}},
		{name: "list/cut off", bad: put(list, set[:len(set)/2]), exit: damaged, says: []string{"set.json"}},
		{name: "list/one byte less", bad: put(list, set[:len(set)-3]), exit: damaged, says: []string{"set.json"}},
		{name: "list/too long", bad: put(list, set+strings.Repeat(" ", 1<<20)), exit: notWhatItWas},
		{name: "list/gone", bad: func(t *testing.T) func() { return l.swap(t, list, nothing) }, exit: tampered, says: []string{"set.json"}},
		{name: "list/newer", bad: change(`"version": 1`, `"version": 2`), exit: newer, says: []string{"version 2"}, remedy: []string{"overkeep version"}},
		{name: "list/unknown feature", bad: change(`"features": []`, `"features": ["shiny"]`), exit: newer, says: []string{"shiny"}},
		{name: "list/a word for a number", bad: change(`"epoch": `, `"epoch": "x" `), exit: damaged},
		{name: "list/a string for the epoch", bad: change(`"epoch": 3`, `"epoch": "3"`), exit: damaged, says: []string{"set.json", "byte"}},
		{name: "list/key repeated", bad: change(`"epoch": 3`, `"epoch": 3, "epoch": 3`), exit: damaged, says: []string{"epoch"}},
		{name: "list/epoch", bad: change(`"epoch": 3`, `"epoch": 4`), exit: tampered},
		{name: "list/epoch back", bad: change(`"epoch": 3`, `"epoch": 2`), exit: tampered},
		{name: "list/role", bad: change(`"role": "recovery"`, `"role": ""`), exit: notWhatItWas},
		{name: "list/label", bad: change(`"label": ""`, `"label": "trust me"`), exit: tampered},
		{name: "list/label with an escape", bad: change(`"label": ""`, `"label": "\u001b[2J"`), exit: damaged},
		{name: "list/of another keep", bad: change(`"keep_id": "`, `"keep_id": "x`), exit: tampered},
		{name: "list/other policy", bad: func(t *testing.T) func() {
			return l.edit(t, list, `"policy": "`+policyOf(t, set), `"policy": "`+strings.Repeat("0", 32))
		}, exit: tampered},
		{name: "list/no mac", bad: change(`"mac": "`, `"mac": "", "x": "`), exit: damaged},

		{name: "slot/gone", bad: func(t *testing.T) func() { return l.swap(t, first, nothing) }, exit: tampered, says: []string{"passphrase.age", "removed"}, remedy: ignore},
		{name: "slot/empty", bad: put(first, ""), exit: tampered, says: []string{"passphrase.age"}, remedy: ignore},
		{name: "slot/cut off", bad: put(first, file[:len(file)-1]), exit: tampered, says: []string{"passphrase.age"}, remedy: ignore},
		{name: "slot/one byte more", bad: put(first, file+"\n"), exit: tampered, says: []string{"passphrase.age"}, remedy: ignore},
		{name: "slot/huge", bad: put(first, file+strings.Repeat("x", 4<<20)), exit: tampered, says: []string{"passphrase.age"}, remedy: ignore},
		{name: "slots/swapped", bad: func(t *testing.T) func() {
			exchange(t, l.path(first), l.path(recovery))
			return func() { exchange(t, l.path(first), l.path(recovery)) }
		}, exit: tampered, says: []string{"swapped"}, remedy: look},
		{name: "slots/one twice", bad: put(recovery, file), exit: tampered, says: []string{"recovery.age", "swapped"}},
		{name: "slots/planted", bad: put(slotDir+"/backdoor.age", file), exit: tampered, says: []string{"backdoor.age"}, remedy: look},
		{name: "slots/planted with an odd name", bad: put(slotDir+"/\x1b[31m\n", file), exit: tampered},
		{name: "slots/planted editor file", bad: put(slotDir+"/set.json~", set), exit: tampered, says: []string{"set.json~"}},
		{name: "slots/a thousand planted", bad: func(t *testing.T) func() {
			return l.shell(t, "cd "+slotDir+" && seq -f %g.age 1500 | xargs touch", "cd "+slotDir+" && seq -f %g.age 1500 | xargs rm")
		}, exit: tampered},
		{name: "slots/all gone", bad: func(t *testing.T) func() { return l.swap(t, slotDir, nothing) }, exit: notWhatItWas, says: []string{"slots"}},
		{name: "slots/empty directory", bad: func(t *testing.T) func() { return l.swap(t, slotDir, mkdir) }, exit: tampered, says: []string{"set.json"}},
		{name: "slots/no stranger's key", stdin: text("not the passphrase"), bad: put(slotDir+"/backdoor.age", file), exit: tampered},
	}
	for _, c := range flips(set, 25) {
		cases = append(cases, attempt{name: "list/" + c.name, bad: put(list, c.content), exit: notWhatItWas})
	}
	for _, c := range flips(file, 12) {
		cases = append(cases, attempt{name: "slot/" + c.name, bad: put(first, c.content), exit: tampered, says: []string{"passphrase.age"}, remedy: ignore})
	}
	for _, a := range cases {
		l.try(t, a)
	}

	// The way out that the remedy names.
	t.Run("another slot opens it once the damage is known", func(t *testing.T) {
		defer put(first, file[:20])(t)()
		l.MustOverkeep(t, 0, "", "unlock", "alice", "--identity", fixture.RecoveryFile, "--ignore-damaged-slot", "passphrase")
		if got := l.Alice(t, "cat marker"); got != marker {
			t.Errorf("it reads %q", got)
		}
		l.Lock(t)
	})
	t.Run("but not if another one is damaged as well", func(t *testing.T) {
		defer put(first, file[:20])(t)()
		defer put(slotDir+"/backdoor.age", file)(t)()
		l.refused(t, attempt{script: "exec overkeep $json unlock alice --identity " + fixture.RecoveryFile + " --ignore-damaged-slot passphrase",
			exit: tampered, says: []string{"backdoor.age"}})
	})
	l.opens(t)
}

func nothing(string) error { return nil }

func mkdir(p string) error { return os.Mkdir(p, 0o700) }

func exchange(t *testing.T, a, b string) {
	t.Helper()
	if err := unix.Renameat2(unix.AT_FDCWD, a, unix.AT_FDCWD, b, unix.RENAME_EXCHANGE); err != nil {
		t.Fatal(err)
	}
}

func policyOf(t *testing.T, set string) string {
	t.Helper()
	var v struct{ Policy string }
	if err := json.Unmarshal([]byte(set), &v); err != nil || v.Policy == "" {
		t.Fatalf("policy of %s: %v", set, err)
	}
	return v.Policy
}

func hash(b []byte) string {
	h := sha256.Sum256(b)
	return hex.EncodeToString(h[:])
}

// A set that was good once is not good again: whole or in part, it is refused
// for being old.
func TestRolledBack(t *testing.T) {
	l := newLaptop(t)
	copySlots := func(to string) { l.Must(t, "root", "rm -rf "+to+" && cp -a "+slotDir+" "+to) }
	copySlots("/root/slots-1")
	l.MustOverkeep(t, 0, fixture.Passphrase+"\n", "key", "verify", "alice", "--passphrase-fd", "0")
	l.Must(t, "root", `exec 3<<<"`+fixture.Passphrase+`" 4<<<"`+fixture.Passphrase+`"
		overkeep key change alice --passphrase-fd 3 --new-passphrase-fd 4 --work-factor 12`)
	copySlots("/root/slots-2")
	l.Must(t, "root", `exec 3<<<"`+fixture.Passphrase+`" 4<<<"a second passphrase"
		overkeep key add alice --passphrase --name second --passphrase-fd 3 --new-passphrase-fd 4 --work-factor 12`)
	l.opens(t)
	now := slotDir
	back := func(what, from string) func(*testing.T) func() {
		return func(t *testing.T) func() {
			if what == "" {
				return l.swap(t, now, func(p string) error { return os.CopyFS(p, os.DirFS(l.path(from))) })
			}
			return l.content(t, now+"/"+what, l.read(t, from+"/"+what))
		}
	}
	for _, a := range []attempt{
		{name: "all of it", bad: back("", "/root/slots-1"), exit: tampered, says: []string{"rolled back"}},
		{name: "all of it, one change ago", bad: back("", "/root/slots-2"), exit: tampered, says: []string{"rolled back"}},
		{name: "the list alone", bad: back("set.json", "/root/slots-1"), exit: tampered},
		{name: "the list alone, one change ago", bad: back("set.json", "/root/slots-2"), exit: tampered, says: []string{"second.age"}},
		{name: "one slot alone", bad: back("passphrase.age", "/root/slots-1"), exit: tampered, says: []string{"passphrase.age"}},
		{name: "for a change of keys", bad: back("", "/root/slots-2"), exit: tampered, says: []string{"rolled back"},
			script: `exec 4<<<"a third passphrase"; exec overkeep $json key add alice --passphrase --name third --passphrase-fd 0 --new-passphrase-fd 4`},
		{name: "to a removed slot", bad: func(t *testing.T) func() {
			return l.content(t, now+"/old.age", l.read(t, "/root/slots-1/passphrase.age"))
		},
			exit: tampered, says: []string{"old.age"}},
	} {
		l.try(t, a)
	}
	l.opens(t)
}
