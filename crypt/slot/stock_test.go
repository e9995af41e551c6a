package slot

import (
	"bytes"
	"fmt"
	"io"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"syscall"
	"testing"

	"golang.org/x/sys/unix"

	"overkeep/tests/need"
)

// The distribution's age opens what we write, with nothing of ours at hand.
func TestStockAgeOpensOurs(t *testing.T) {
	need.Tool(t, "age")
	k := newKeep(t)
	edPriv, edPub := sshKey(t, newEd25519(t), "")
	r, kind, err := ParseRecipient(edPub, nil)
	if err != nil {
		t.Fatal(err)
	}
	k.add(t, Slot{Name: "ed", Kind: kind, Created: testTime}, r)
	k.commit(t)
	for name, key := range map[string][]byte{
		"laptop":   []byte(k.laptop.String() + "\n"),
		"recovery": append(bytes.Clone(k.recovery.Bytes()), '\n'),
		"ed":       edPriv,
	} {
		file := filepath.Join(t.TempDir(), "key")
		overwrite(t, file, key)
		out, err := exec.Command("age", "-d", "-i", file, k.path(name+".age")).Output()
		if err != nil || !bytes.Equal(out, k.master.Bytes()) {
			t.Errorf("%s: %v", name, err)
		}
	}
	out := filepath.Join(t.TempDir(), "raw")
	onTerminal(t, string(k.pass.Bytes())+"\n", 1, "age", "-d", "-o", out, k.path("alice.age"))
	if !bytes.Equal(read(t, out), k.master.Bytes()) {
		t.Error("passphrase: another key")
	}
}

// We open what the distribution's age writes.
func TestWeOpenStockAge(t *testing.T) {
	need.Tool(t, "age", "age-keygen")
	dir := t.TempDir()
	master := newMaster(t)
	raw, key := filepath.Join(dir, "raw"), filepath.Join(dir, "key")
	overwrite(t, raw, master.Bytes())
	if out, err := exec.Command("age-keygen", "-o", key).CombinedOutput(); err != nil {
		t.Fatalf("%v %s", err, out)
	}
	pub, err := exec.Command("age-keygen", "-y", key).Output()
	if err != nil {
		t.Fatal(err)
	}
	ids, err := ParseIdentities(bytes.NewReader(read(t, key)), nil, nil)
	if err != nil {
		t.Fatal(err)
	}
	recipient := strings.TrimSpace(string(pub))
	byKey, armored, byPass := filepath.Join(dir, "k.age"), filepath.Join(dir, "a.age"), filepath.Join(dir, "p.age")
	for _, args := range [][]string{{"-r", recipient, "-o", byKey, raw}, {"-a", "-r", recipient, "-o", armored, raw}} {
		if out, err := exec.Command("age", args...).CombinedOutput(); err != nil {
			t.Fatalf("%v %s", err, out)
		}
	}
	onTerminal(t, "correct horse\n", 2, "age", "-p", "-o", byPass, raw)

	m, err := OpenFile(read(t, byKey), identities(ids...))
	if err != nil || !m.Equal(master) {
		t.Error("key:", err)
	}
	m, err = OpenFile(read(t, byPass), Keys{Passphrase: sec(t, "correct horse")})
	if err != nil || !m.Equal(master) {
		t.Error("passphrase:", err)
	}
	if _, err := OpenFile(read(t, armored), identities(ids...)); err == nil {
		t.Error("an armored file is not a slot file")
	}
}

// onTerminal runs a program that insists on a terminal, and types line at each of
// its prompts, which end in ": ".
func onTerminal(t *testing.T, line string, prompts int, name string, args ...string) {
	t.Helper()
	ptmx, err := os.OpenFile("/dev/ptmx", os.O_RDWR, 0)
	if err != nil {
		t.Fatal(err)
	}
	defer ptmx.Close()
	if err := unix.IoctlSetPointerInt(int(ptmx.Fd()), unix.TIOCSPTLCK, 0); err != nil {
		t.Fatal(err)
	}
	n, err := unix.IoctlGetInt(int(ptmx.Fd()), unix.TIOCGPTN)
	if err != nil {
		t.Fatal(err)
	}
	tty, err := os.OpenFile(fmt.Sprintf("/dev/pts/%d", n), os.O_RDWR|unix.O_NOCTTY, 0)
	if err != nil {
		t.Fatal(err)
	}
	cmd := exec.Command(name, args...)
	cmd.Stdin, cmd.Stdout, cmd.Stderr = tty, tty, tty
	cmd.SysProcAttr = &syscall.SysProcAttr{Setsid: true, Setctty: true}
	if err := cmd.Start(); err != nil {
		t.Fatal(err)
	}
	tty.Close()
	var seen bytes.Buffer
	buf := make([]byte, 1024)
	for typed := 0; ; {
		n, err := ptmx.Read(buf) // EIO when the program has closed its end
		seen.Write(buf[:n])
		if typed < prompts && strings.Count(seen.String(), ": ") > typed {
			typed++
			if _, err := io.WriteString(ptmx, line); err != nil {
				t.Fatal(err)
			}
		}
		if err != nil {
			break
		}
	}
	if err := cmd.Wait(); err != nil {
		t.Fatalf("%s %q: %v, %q", name, args, err, seen.String())
	}
}
