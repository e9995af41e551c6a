// Package recovery runs the commands of docs/RECOVERY.md as they stand there, on
// keeps of every back-end, with nothing but Debian's own age and fscrypt.
package recovery

import (
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"

	"overkeep/tests/bed"
	"overkeep/tests/fixture"
)

// block is an indented block of the document that is to be run.
type block struct {
	kinds   []string // back-ends, or "all"
	command string
}

// blocks reads the blocks that follow a comment <!-- run: KIND... -->.
func blocks(t *testing.T) []block {
	t.Helper()
	root, err := bed.ModuleRoot()
	if err != nil {
		t.Fatal(err)
	}
	b, err := os.ReadFile(filepath.Join(root, "docs/RECOVERY.md"))
	if err != nil {
		t.Fatal(err)
	}
	var out []block
	var cur *block
	for line := range strings.Lines(string(b)) {
		line = strings.TrimRight(line, "\n")
		if rest, ok := strings.CutPrefix(line, "<!-- run: "); ok {
			out = append(out, block{kinds: strings.Fields(strings.TrimSuffix(rest, "-->"))})
			cur = &out[len(out)-1]
			continue
		}
		switch code, ok := strings.CutPrefix(line, "    "); {
		case cur == nil || line == "":
		case ok:
			cur.command += code + "\n"
		default:
			cur = nil
		}
	}
	for _, x := range out {
		if x.command == "" {
			t.Fatalf("a marker %v has no commands behind it", x.kinds)
		}
	}
	return out
}

func TestDocument(t *testing.T) {
	all := blocks(t)
	for _, tt := range []struct {
		kind  string
		suite bed.Suite
		args  []string
	}{
		{"image", bed.Forky, nil},
		{"dir", bed.Trixie, []string{"--backend=dir"}},
		{"on-image", bed.Trixie, []string{"--on-image", "/srv/alice.img"}},
	} {
		t.Run(tt.kind, func(t *testing.T) {
			k := fixture.New(t, tt.suite, tt.args...)
			k.Unlock(t)
			k.Alice(t, "head -c 300000 /dev/urandom >blob; sha256sum <blob >blob.sum; echo unlucky >note")
			path := k.Alice(t, "nix-build --no-out-link -E "+fixture.Quote(fixture.Derivation("rescued", "echo built > $out"))+" 2>/dev/null")
			k.Lock(t)
			// Without overkeep: its program is not there.
			k.Must(t, "root", "mv /usr/local/bin/overkeep /root/hidden; cp "+fixture.RecoveryFile+" /run/recovery.txt 2>/dev/null || true")
			ran := 0
			for _, b := range all {
				if !slices.Contains(b.kinds, "all") && !slices.Contains(b.kinds, tt.kind) {
					continue
				}
				ran++
				if out, err := k.Run("root", b.command); err != nil {
					t.Fatalf("%s\n%v\n%s", b.command, err, out)
				}
			}
			if ran < 5 {
				t.Fatalf("only %d blocks were run", ran)
			}
			k.Must(t, "root", "cd /run/rescued && [ \"$(sha256sum <blob)\" = \"$(cat blob.sum)\" ] && grep -q unlucky note")
			if got := k.Must(t, "root", "cat /run/rescued-store/"+filepath.Base(path)); got != "built" {
				t.Errorf("the store path reads %q", got)
			}
			if out, err := k.Run("root", "ls /run/raw"); err == nil {
				t.Errorf("the raw key is left behind: %s", out)
			}
			// And it is locked again, and whole.
			k.Must(t, "root", "mv /root/hidden /usr/local/bin/overkeep")
			if out := k.MustOverkeep(t, 0, "", "status", "alice"); !strings.Contains(out, "locked") {
				t.Errorf("status afterwards: %s", out)
			}
			k.Unlock(t)
			if got := k.Alice(t, "cat note "+path); got != "unlucky\nbuilt" {
				t.Errorf("afterwards the keep reads %q", got)
			}
			k.Lock(t)
		})
	}
}

// The way back with overkeep itself: the recovery key, then a new passphrase.
func TestForgotten(t *testing.T) {
	k := fixture.New(t, bed.Forky)
	recovery := k.Must(t, "root", "grep AGE-SECRET-KEY "+fixture.RecoveryFile)
	k.MustOverkeep(t, 0, recovery, "unlock", "alice", "--recovery", "--passphrase-fd", "0")
	k.Lock(t)
	k.Must(t, "root", "printf 'a quite new passphrase' >/run/new")
	k.Must(t, "root", "overkeep key change alice --identity "+fixture.RecoveryFile+" --new-passphrase-fd 7 7</run/new")
	k.MustOverkeep(t, 4, fixture.Passphrase, "unlock", "alice", "--passphrase-fd", "0")
	k.MustOverkeep(t, 0, "a quite new passphrase", "unlock", "alice", "--passphrase-fd", "0")
	k.Lock(t)
	// A damaged passphrase slot: refused by name, then let pass by name.
	k.Must(t, "root", "printf x | dd of=/var/lib/overkeep/alice/slots/passphrase.age bs=1 seek=60 conv=notrunc status=none")
	if r := k.Overkeep(t, "", "unlock", "alice", "--identity", fixture.RecoveryFile); r.Code != 6 || !strings.Contains(r.Stderr, "passphrase") {
		t.Errorf("a damaged slot: exit code %d\n%s", r.Code, r.Stderr)
	}
	k.MustOverkeep(t, 0, "", "unlock", "alice", "--identity", fixture.RecoveryFile, "--ignore-damaged-slot", "passphrase")
	k.Lock(t)
}
