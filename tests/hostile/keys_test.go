package hostile

import (
	"fmt"
	"strings"
	"testing"

	"filippo.io/age"
	"filippo.io/age/plugin"
	"golang.org/x/sys/unix"

	"overkeep/tests/bed"
	"overkeep/tests/fixture"
	"overkeep/tests/lock/proof"
)

// Whatever is given in place of the key: it is refused for what it is, and
// nothing of the keep is touched.
func TestWrongKeys(t *testing.T) {
	l := newLaptop(t)
	other, err := age.GenerateX25519Identity()
	if err != nil {
		t.Fatal(err)
	}
	l.Write(t, "/run/other.txt", other.String()+"\n")
	l.Write(t, "/run/other.pub", other.Recipient().String()+"\n")
	l.Write(t, "/run/words", "no key at all\n")
	l.Write(t, "/run/empty", "")
	l.Write(t, "/run/plugin.txt", plugin.EncodeIdentity("nosuchtoken", []byte("serial number"))+"\n")
	l.Must(t, "root", `printf '\377\376\000\001binary' > /run/binary; head -c 100000 /dev/zero | tr '\0' a > /run/long
		ssh-keygen -V >/dev/null 2>&1 || true; mkdir -p /run/directory; ln -sf /run/nowhere /run/dangling`)

	wrong := []string{"key list alice", "--recovery"}
	identity := func(file string) string {
		return "exec overkeep $json unlock alice --identity " + file
	}
	const fd = "exec overkeep $json unlock alice --passphrase-fd "
	recovery := fd + "0 --recovery"
	key := strings.TrimSpace(l.Must(t, "root", "grep -v '^#' "+fixture.RecoveryFile))
	typo := []byte(key)
	typo[len(typo)-3] ^= 'Q' ^ 'P'
	if string(typo) == key {
		t.Fatal("no typing error made")
	}

	for _, a := range []attempt{
		{name: "passphrase/wrong", stdin: text("correct horse battery stable"), exit: []int{4}, remedy: wrong},
		{name: "passphrase/a part", stdin: text(fixture.Passphrase[:20]), exit: []int{4}, remedy: wrong},
		{name: "passphrase/more", stdin: text(fixture.Passphrase + " "), exit: []int{4}, remedy: wrong},
		{name: "passphrase/other case", stdin: text(strings.ToUpper(fixture.Passphrase)), exit: []int{4}, remedy: wrong},
		{name: "passphrase/short", stdin: text("x"), exit: []int{4}, remedy: wrong},
		{name: "passphrase/empty", stdin: text(""), exit: []int{2}, says: []string{"--passphrase-fd"}},
		{name: "passphrase/a newline", stdin: text("\n"), exit: []int{2}, says: []string{"--passphrase-fd"}},
		{name: "passphrase/two lines", stdin: text(fixture.Passphrase + "\nmore\n"), exit: []int{2}, says: []string{"line"}},
		{name: "passphrase/binary", stdin: text("\xff\xfe\x80\x81\x1b[31m\x07bell\x7f"), exit: []int{4}, remedy: wrong},
		{name: "passphrase/with NUL", stdin: text("correct\x00horse"), exit: []int{2}, says: []string{"NUL"}},
		{name: "passphrase/1 MiB", stdin: text(strings.Repeat("a", 1<<20)), exit: []int{2}, says: []string{"4096"}},
		{name: "passphrase/endless", script: fd + "3 3</dev/zero", exit: []int{2}, says: []string{"4096"}},

		{name: "descriptor/not open", script: fd + "99", exit: []int{2}, says: []string{"99", "not open"}},
		{name: "descriptor/closed", script: fd + "0 <&-", exit: []int{2}, says: []string{"--passphrase-fd 0"}},
		{name: "descriptor/standard output", script: fd + "1", exit: []int{2}, says: []string{"--passphrase-fd 1"}},
		{name: "descriptor/negative", script: fd + "-1", exit: []int{2}, says: []string{"passphrase-fd"}},
		{name: "descriptor/a word", script: fd + "stdin", exit: []int{2}, says: []string{"passphrase-fd"}},
		{name: "descriptor/huge", script: fd + "99999999999999999999", exit: []int{2}, says: []string{"passphrase-fd"}},
		{name: "descriptor/a directory", script: fd + "3 3</etc", exit: []int{2}, says: []string{"--passphrase-fd 3"}},
		{name: "descriptor/write only", script: fd + "3 3>/dev/null", exit: []int{2}, says: []string{"--passphrase-fd 3"}},

		{name: "identity/another", script: identity("/run/other.txt"), exit: []int{4}, remedy: wrong},
		{name: "identity/public", script: identity("/run/other.pub"), exit: []int{2}, says: []string{"public key"}},
		{name: "identity/words", script: identity("/run/words"), exit: []int{2}, says: []string{"/run/words"}},
		{name: "identity/binary", script: identity("/run/binary"), exit: []int{2}, says: []string{"/run/binary"}},
		{name: "identity/empty", script: identity("/run/empty"), exit: []int{2}, says: []string{"/run/empty"}},
		{name: "identity/too long", script: identity("/run/long"), exit: []int{2}, says: []string{"/run/long"}},
		{name: "identity/no such file", script: identity("/run/nowhere"), exit: []int{2}, says: []string{"/run/nowhere"}},
		{name: "identity/dangling link", script: identity("/run/dangling"), exit: []int{2}, says: []string{"/run/dangling"}},
		{name: "identity/a directory", script: identity("/run/directory"), exit: []int{2}, says: []string{"/run/directory"}},
		{name: "identity/a slot file", script: identity(slotDir + "/recovery.age"), exit: []int{2}, says: []string{"recovery.age"}},
		{name: "identity/no plugin", script: identity("/run/plugin.txt"), exit: []int{18}, says: []string{"age-plugin-nosuchtoken"}, remedy: []string{"age-plugin-"}},

		{name: "recovery/typing error", script: recovery, stdin: text(string(typo)), exit: []int{4}, says: []string{"checksum"}},
		{name: "recovery/of another", script: recovery, stdin: text(other.String()), exit: []int{4}},
		{name: "recovery/passphrase", script: recovery, exit: []int{4}, says: []string{"recovery key"}},
		{name: "recovery/empty", script: recovery, stdin: text(""), exit: []int{2}},

		{name: "slot/unknown", script: fd + "0 --slot nosuch", exit: []int{2}, says: []string{"nosuch"}},
		{name: "slot/odd name", script: fd + `0 --slot $'../\033x'`, exit: []int{2}},
		{name: "slot/of another kind", script: fd + "0 --slot recovery", exit: []int{4}},
		{name: "slot/ignore no slot", script: fd + "0 --slot passphrase --ignore-damaged-slot passphrase", stdin: text("not it at all"), exit: []int{4}},
		{name: "two ways at once", script: fd + "0 --identity /run/other.txt", exit: []int{2}},
		{name: "on the command line", script: `exec overkeep $json unlock alice --passphrase=` + fixture.Quote(fixture.Passphrase), exit: []int{2}, says: []string{"never taken from the command line"}},
		{name: "nobody to ask", script: "exec setsid -w overkeep $json unlock alice", exit: []int{2}, says: []string{"terminal"}, remedy: []string{"--passphrase-fd"}},
	} {
		l.try(t, a)
	}

	t.Run("a key is in no message", func(t *testing.T) {
		for _, script := range []string{
			"overkeep unlock alice --passphrase=" + fixture.Quote(fixture.Passphrase), "overkeep unlock alice " + key,
			"overkeep key verify alice --identity " + key, "overkeep unlock --recovery " + key,
		} {
			out, err := l.Run("root", script)
			if err == nil || strings.Contains(out, fixture.Passphrase) || strings.Contains(out, key) {
				t.Errorf("it answers (%v):\n%s", err, out)
			}
		}
	})
	t.Run("a newline at the end is not part of it", func(t *testing.T) {
		l.MustOverkeep(t, 0, fixture.Passphrase+"\n", "key", "verify", "alice", "--passphrase-fd", "0")
	})
	l.opens(t)
}

// A command that waits for a secret ends when it is told to, and has done
// nothing.
func TestInterrupted(t *testing.T) {
	l := newLaptop(t)
	for name, args := range map[string]string{
		"passphrase": "unlock alice --passphrase-fd 3 3</run/pipe",
		"identity":   "unlock alice --identity /run/pipe",
		"init":       "init second --user alice --recovery-out /run/second.txt --passphrase-fd 3 3</run/pipe",
	} {
		for _, sig := range []unix.Signal{unix.SIGINT, unix.SIGTERM, unix.SIGHUP} {
			ok := t.Run(fmt.Sprintf("%s/%s", name, unix.SignalName(sig)), func(t *testing.T) {
				l.Must(t, "root", "rm -f /run/pipe; mkfifo /run/pipe")
				before := l.snapshot(t)
				p, err := l.Start("root", "exec overkeep "+args)
				if err != nil {
					t.Fatal(err)
				}
				// The pipe takes a writer once its reader is there, and what was
				// written is gone once the reader reads: from then on it waits.
				var w int
				proof.Await(t, func() string {
					if w, err = unix.Open(l.path("/run/pipe"), unix.O_WRONLY|unix.O_NONBLOCK, 0); err != nil {
						return fmt.Sprintf("nobody opens the pipe: %v; %s", err, p.Output())
					}
					return ""
				})
				defer unix.Close(w)
				if _, err := unix.Write(w, []byte("c")); err != nil {
					t.Fatal(err)
				}
				proof.Await(t, func() string {
					if n, err := unix.IoctlGetInt(w, unix.TIOCINQ); err != nil || n != 0 {
						return fmt.Sprintf("nobody reads the pipe: %d, %v; %s", n, err, p.Output())
					}
					return ""
				})
				if err := p.Signal(sig); err != nil {
					t.Fatal(err)
				}
				r := finish(t, p)
				if r.Code != 11 || !strings.Contains(r.Stdout, "interrupted") {
					t.Errorf("exit code %d, want 11\n%s", r.Code, r.Stdout)
				}
				l.nothingLeft(t)
				if diff := before.diff(l.snapshot(t)); diff != "" {
					t.Error(diff)
				}
			})
			if !ok {
				return // each of the others would be waited for as long
			}
		}
	}
	l.opens(t)
}

// finish waits for a process in the background, not for ever.
func finish(t *testing.T, p *bed.Proc) bed.Result {
	t.Helper()
	ended := func() bool {
		select {
		case <-p.Done():
			return true
		default:
			return false
		}
	}
	defer p.Kill()
	proof.Await(t, func() string {
		if !ended() {
			return "the command does not end: " + p.Output()
		}
		return ""
	})
	r, err := p.Wait()
	if err != nil {
		t.Fatal(err)
	}
	return r
}
