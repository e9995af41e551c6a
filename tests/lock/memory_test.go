package lock

import (
	"bufio"
	"bytes"
	"encoding/json"
	"fmt"
	"io"
	"os"
	"strconv"
	"strings"
	"testing"

	"github.com/google/fscrypt/crypto"
	"github.com/google/fscrypt/metadata"
	"google.golang.org/protobuf/proto"

	"overkeep/tests/bed"
	"overkeep/tests/crash/inject"
	"overkeep/tests/fixture"
	"overkeep/tests/lock/proof"
)

// needles are the secrets of the keep by name, as bytes.
type needles map[string][]byte

// secrets gets the keep's secrets with stock tools, from slot and metadata: the
// master key is what `age -d` makes of the recovery slot, the policy key what
// fscrypt's own library unwraps with it.
func (k *locked) secrets(t *testing.T) needles {
	t.Helper()
	r, err := k.Exec(bed.Command{Script: "exec age -d -i - /var/lib/overkeep/alice/slots/recovery.age", Stdin: k.recovery})
	if err != nil || r.Code != 0 {
		t.Fatalf("age -d: %v, %d %s", err, r.Code, r.Stderr)
	}
	n := needles{"master key": []byte(r.Stdout), "passphrase": []byte(k.pass), "recovery key": []byte(k.recovery)}
	if len(n["master key"]) != 32 {
		t.Fatalf("the recovery slot holds %d bytes", len(n["master key"]))
	}
	n["policy key"] = k.policyKey(t, n["master key"])
	return n
}

// policyKey unwraps the key that the kernel was given.
func (k *locked) policyKey(t *testing.T, master []byte) []byte {
	t.Helper()
	var set struct{ Protector, Policy string }
	if err := json.Unmarshal([]byte(k.Read(t, "/var/lib/overkeep/alice/slots/set.json")), &set); err != nil {
		t.Fatal(err)
	}
	var protector metadata.ProtectorData
	var policy metadata.PolicyData
	for path, m := range map[string]proto.Message{"protectors/" + set.Protector: &protector, "policies/" + set.Policy: &policy} {
		if err := proto.Unmarshal([]byte(k.Read(t, "/.fscrypt/"+path)), m); err != nil {
			t.Fatalf("%s: %v", path, err)
		}
	}
	key := func(b []byte) *crypto.Key {
		x, err := crypto.NewFixedLengthKeyFromReader(bytes.NewReader(b), len(b))
		if err != nil {
			t.Fatal(err)
		}
		return x
	}
	pk, err := crypto.Unwrap(key(master), protector.WrappedKey)
	if err != nil {
		t.Fatalf("unwrap the protector: %v", err)
	}
	key2, err := crypto.Unwrap(pk, policy.WrappedPolicyKeys[0].WrappedKey)
	if err != nil {
		t.Fatalf("unwrap the policy: %v", err)
	}
	return bytes.Clone(key2.Data())
}

// found says in which processes of the machine which secret lies: "master key in
// 17 (overkeep)". It reads all that /proc/PID/mem gives of readable mappings.
func (k *locked) found(t *testing.T, n needles) []string {
	t.Helper()
	var out []string
	total := int64(0)
	for _, p := range proof.Processes(t, k.Machine) {
		hits, read := scan(p.PID, n)
		total += read
		for what := range n {
			if hits[what] {
				out = append(out, what+" in "+p.String())
			}
		}
	}
	if total == 0 {
		t.Fatal("no process's memory could be read")
	}
	return out
}

// scan searches the memory of one process. What ends meanwhile has no memory.
func scan(pid int, n needles) (hits map[string]bool, read int64) {
	hits = map[string]bool{}
	maps, err := os.Open(fmt.Sprintf("/proc/%d/maps", pid))
	if err != nil {
		return
	}
	defer maps.Close()
	mem, err := os.Open(fmt.Sprintf("/proc/%d/mem", pid))
	if err != nil {
		return
	}
	defer mem.Close()
	longest := 0
	for _, b := range n {
		longest = max(longest, len(b))
	}
	buf := make([]byte, 1<<20)
	for s := bufio.NewScanner(maps); s.Scan(); {
		f := strings.Fields(s.Text())
		from, to, _ := strings.Cut(f[0], "-")
		lo, err1 := strconv.ParseInt(from, 16, 64)
		hi, err2 := strconv.ParseInt(to, 16, 64)
		if err1 != nil || err2 != nil || f[1][0] != 'r' {
			continue // beyond the sign: [vsyscall]
		}
		for at := lo; at < hi; {
			m, err := mem.ReadAt(buf[:min(int64(len(buf)), hi-at)], at)
			read += int64(m)
			for what, b := range n {
				hits[what] = hits[what] || bytes.Contains(buf[:m], b)
			}
			if err != nil && err != io.EOF || m == 0 {
				at += int64(m) + int64(os.Getpagesize()) // a page that cannot be read
				at -= at % int64(os.Getpagesize())
				continue
			}
			if at += int64(m); at < hi {
				at -= int64(longest - 1) // one that crosses the edge
			}
		}
	}
	return
}

// TestMemory: the keys and the passphrase are in the memory of no process of the
// machine, be the keep locked or open; and the search can find them.
func TestMemory(t *testing.T) {
	for _, b := range backends {
		if b.name == "on-image" {
			continue // the metadata is in the image
		}
		t.Run(b.name, func(t *testing.T) {
			t.Parallel()
			k := newKeep(t, bed.Forky, b.args...)
			n := k.secrets(t)
			none := func(when string) {
				t.Helper()
				for _, s := range k.found(t, n) {
					t.Errorf("%s: %s", when, s)
				}
			}
			none("after init and a lock")

			// Somebody has them, and is found.
			for what, b := range n {
				p, err := k.Start("root", "exec perl -e '$| = 1; local $/; $x = <STDIN>; $y = pack(\"H*\", $x); $x = \"\"; print \"ready\\n\"; sleep 1 while 1' < <(printf %s "+
					fixture.Quote(fmt.Sprintf("%x", b))+")")
				if err != nil {
					t.Fatal(err)
				}
				proof.Await(t, func() string {
					if strings.Contains(p.Output(), "ready") {
						return ""
					}
					return "the control process is not ready: " + p.Output()
				})
				if got := strings.Join(k.found(t, n), ", "); !strings.HasPrefix(got, what+" in ") || strings.Contains(got, ",") {
					t.Errorf("a process has the %s in memory; found: %q", what, got)
				}
				p.Kill()
				<-p.Done()
			}

			e := k.open(t)
			none("unlocked")
			k.Alice(t, nixBuild("memory", "echo > $out"))
			none("unlocked, after a build")
			k.MustOverkeep(t, 0, k.pass, "key", "verify", name, "--passphrase-fd=0")
			none("unlocked, after a key was verified")
			k.mustLock(t)
			k.isLocked(t, e)
			none("locked")
			k.MustOverkeep(t, 0, k.recovery, "unlock", name, "--recovery", "--passphrase-fd=0")
			none("unlocked with the recovery key")
			k.mustLock(t)
			none("locked again")

			// In the one moment when it is needed, the helper process has the key,
			// and whoever was given the passphrase that: so this is where it would be
			// found later, had it stayed.
			k.Install(t, inject.Binary(t))
			k.whileAdding(t, func() {
				got := strings.Join(k.found(t, n), "\n")
				for _, what := range []string{"master key", "policy key"} {
					if !strings.Contains(got, what+" in ") {
						t.Errorf("just before the key is added nobody has the %s; found:\n%s", what, got)
					}
				}
			})
			none("unlocked, after it was stopped in between")
			k.mustLock(t)
			none("locked in the end")
		})
	}
}

// whileAdding unlocks, and calls f while the helper process stands right before
// it gives the key to the kernel.
func (k *locked) whileAdding(t *testing.T, f func()) {
	t.Helper()
	const log = "/run/steps"
	k.MustOverkeep(t, 0, "", "lock", name)
	unlock := "exec env OVERKEEP_CRASH_COUNT=/run/count.$1 OVERKEEP_CRASH_LOG=" + log + " overkeep unlock alice --passphrase-fd=0"
	r, err := k.Exec(bed.Command{Script: "set -- all; " + unlock, Stdin: k.pass})
	if err != nil || r.Code != 0 {
		t.Fatalf("unlock: %v, %+v", err, r)
	}
	at := 0
	for i, step := range strings.Split(k.Read(t, log), "\n") {
		if step == "volume.key.add" {
			at = i + 1
		}
	}
	if at == 0 {
		t.Fatalf("unlock has no step volume.key.add:\n%s", k.Read(t, log))
	}
	k.mustLock(t)
	p, err := k.Start("root", fmt.Sprintf("set -- one; export OVERKEEP_CRASH_AT=%d OVERKEEP_CRASH_HOW=stop; exec 0< <(printf %%s %s); %s", at, fixture.Quote(k.pass), unlock))
	if err != nil {
		t.Fatal(err)
	}
	defer p.Kill()
	stopped := 0
	proof.Await(t, func() string {
		select {
		case <-p.Done():
			t.Fatalf("unlock did not stop:\n%s", p.Output())
		default:
		}
		for _, x := range proof.Processes(t, k.Machine) {
			if x.State == "T" {
				stopped = x.Inside
				return ""
			}
		}
		return "unlock does not stop"
	})
	f()
	k.Must(t, "root", fmt.Sprint("kill -CONT ", stopped))
	if r, err := p.Wait(); err != nil || r.Code != 0 {
		t.Fatalf("unlock that was stopped: %v, %+v", err, r)
	}
}
