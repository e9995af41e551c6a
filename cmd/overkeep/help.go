package main

import (
	"strings"

	"github.com/spf13/cobra"
)

// helpTopics are the help texts that belong to no command. cobra takes a command
// without Run and children for one.
func helpTopics() []*cobra.Command {
	return []*cobra.Command{
		{Use: "concepts", Short: "Keep, slot, view, lock with proof: the words and what they promise", Long: conceptsText},
		{Use: "policy", Short: "The language that says what is private", Long: policyText},
		{Use: "recovery", Short: "When the passphrase, the machine or overkeep is gone", Long: recoveryText},
		{Use: "scripting", Short: "JSON, descriptors for secrets, and no questions", Long: scriptingText},
		{Use: "exit-codes", Short: "What each exit code means", Long: "Exit codes. A number means one thing for good and is never used for another.\n\n" +
			strings.TrimRight(exitLines(), "\n") + "\n\nrun and shell end with the exit code of what they ran."},
	}
}

const conceptsText = `SYSTEM STORE and PERSONAL STORE. /nix/store, as the distribution or NixOS made
it, holds public software: everybody reads it, it is plain and fast. The personal
store holds what is a privacy risk or somebody's property, and is encrypted. A
personal path may use system paths; never the other way round.

                        system store            personal store
  readable by           everyone                its user alone, while unlocked
  file system           plain                   encrypted
  garbage collection    the system's schedule   the user's own; neither breaks the other
  keep-outputs and      the system's choice     yes
  keep-derivations

KEEP. One user's personal store with its keys and settings. On disk it is a
public header, the slots, and an encrypted volume (fscrypt, in the kernel). A
thief who has the disk learns the header, how many slots there are, and about
how much is in it.

SLOT. One way to open a keep: a passphrase, an SSH key, a token, the recovery
key. Every slot is an age file that holds the same master key. Slots come and go;
the volume is never encrypted again. "overkeep key" manages them.

VIEW. A mount namespace of the user, in which both stores are one /nix/store and
stock nix works: it finds the personal nix-daemon where it looks for the system's.
Outside of the view nothing of the keep is to be seen or mounted. "overkeep run"
and "overkeep shell" enter it.

LOCK WITH PROOF. Taking the key away is not a lock: open files, mounts and copies
of mounts keep it in the kernel. "overkeep lock" ends with 0 only when nothing is
mounted in any namespace, the kernel says that the key is absent, and names on
disk read as ciphertext. Else it says NOT locked, names who holds the keep, and
ends with 5. Between the two is the state "locking": never taken for locked.

NOT PROMISED. While a keep is unlocked, root and the user's own programs read it.
A plain sleep keeps the key in memory: lock first. There is no integrity against
somebody who changes the disk while you are away. Use disk encryption, too, if
you can.`

const recoveryText = `PASSPHRASE FORGOTTEN. The recovery key opens the keep; then set a new one:

    sudo overkeep unlock alice --recovery
    sudo overkeep key change alice --recovery

If it lies in a file (init --recovery-out), that is an identity file:

    sudo overkeep unlock alice --identity /media/stick/alice.txt

TEST IT once a year. This opens nothing, and tells which slot it would open:

    sudo overkeep key verify alice --recovery

RECOVERY KEY LOST OR SEEN. Make another one, with the passphrase:

    sudo overkeep key recovery alice

OVERKEEP GONE. A keep opens with stock tools: age and fscrypt of any distribution.
The slot is an age file, and what is in it is the raw key of an fscrypt protector.
As root, with the disk mounted:

    umask 077
    age -d -i recovery.txt /var/lib/overkeep/alice/slots/recovery.age >/dev/shm/key
    fscrypt unlock /var/lib/overkeep/alice/volume --key=/dev/shm/key
    shred -u /dev/shm/key

A keep of the back-end image then has the file "image" in that directory, an ext4
file system to mount with "mount -o loop". Lock again with "fscrypt lock".

DISK DAMAGED. slots/ and keep.json hold no secret without a key: put copies of
them into your backup. Without all of the slots nothing opens the volume.`

const scriptingText = `JSON. With --json the result is one JSON object on standard output, and an error is
one JSON object on standard error: {"error": {"code", "exit", "message", "name",
"missing", "remedy": [{"why", "command"}], "holders": [...]}}. Standard output is
empty then. The exit code is the same with and without --json. Fields may be
added; none changes its meaning.

    overkeep status --json | jq -r '.keeps[] | "\(.keep) \(.state)"'

SECRETS come from a descriptor, never from an argument or a variable of the
environment: others would see them there. One line, without its newline, at most
4096 bytes:

    overkeep unlock alice --passphrase-fd 0 <passphrase-file
    overkeep key change alice --passphrase-fd 3 --new-passphrase-fd 4 3<old 4<new

QUESTIONS go to the terminal and not to standard input. Without a terminal what
would be asked is an error; --yes answers yes to "do you mean it", and init takes
--recovery-out for the recovery key.

DRY RUN. --dry-run says what a command would do, in order, and does nothing. It
asks for no secret.

ENVIRONMENT. OVERKEEP_ROOT is the default of --root. NO_COLOR and TERM=dumb turn
colour off. sudo drops OVERKEEP_ROOT: give --root.`

const policyText = `A policy is lines. "system" lines grant, "personal" lines veto, and what nothing
grants is personal. A system path refers to system paths only. The order of lines
and files means nothing. Root's policy may grant; a keep's own file may only veto.

    # a comment
    key cache.nixos.org-1:6NCHdD59X431o0gWypbMrAURkbJ16ZPMQFGspcDShjY=
    let boot = closure-of /run/current-system
    system   signed-by cache.nixos.org-1 or boot
    personal name "*-acme-*"
    personal built-here and built-from (name "*-acme-*")
    personal unfree when known
    require  system boot

CONDITIONS are put together with and, or, not and ( ), out of:

    signed-by KEY        a signature by that declared key, verified
    unsigned             no declared key's signature verifies
    built-here           it was built on this machine
    kind KIND            source, derivation, output or fixed-output
    name GLOB            its name, without the hash
    licence GLOB         as far as it was recorded
    unfree               as far as it was recorded
    from GLOB            the URL of the flake input or download it is
    larger-than SIZE     64K, 2G: its size as a NAR
    closure-of WHAT      what a store path, profile or name needs to run
    depends-on (COND)    needs such a path to run
    built-from (COND)    such a path went into its build, even if no reference remains

UNKNOWN. Not every fact is known of every path. A grant counts only on yes; a veto
counts on yes and on unknown. "when known" at the end of a veto lets the unknown
pass, for that line.

REQUIRE moves nothing: "policy check" ends with 20 if such a path would be personal.

EXPECTATIONS stand beside a policy (policy.test) and are checked by "policy test".`
