// Package bench measures what the split costs, beside the same thing done by
// hand with the stock tools (age, fscrypt, mount, nix) in the same run, and
// prints ratios. An absolute number says more about the machine than about us.
//
// `make bench` runs it, on a throw-away laptop. It asserts nothing.
package bench

import (
	"fmt"
	"slices"
	"strconv"
	"strings"
	"testing"

	"overkeep/tests/bed"
	"overkeep/tests/fixture"
)

// rounds of each pair; the median counts.
const rounds = 11

// laptop is a machine with a keep of ours, which an X25519 key opens (so that no
// key derivation is in the figures), and the same thing made by hand.
type laptop struct {
	*fixture.Keep
}

const byHandSetup = `
fscrypt setup --force --quiet </dev/null >/dev/null
head -c 32 /dev/urandom >/run/raw
age-keygen -o /run/id 2>/dev/null
age -r "$(age-keygen -y /run/id)" -o /srv/hand.age /run/raw
mkdir /srv/enc
fscrypt encrypt /srv/enc --source=raw_key --name=hand --key=/run/raw --quiet
truncate -s 512M /srv/enc/image
mkfs.ext4 -q -m 0 -E lazy_itable_init=0,lazy_journal_init=0 /srv/enc/image
mkdir -p /run/hand/k /run/hand/sys /run/hand/sock /run/hand/conf
mount -o loop /srv/enc/image /run/hand/k
cd /run/hand/k
mkdir -p store/upper store/work nix log builds home/cache home/state home/share home/work
chown root:nixbld store/upper; chmod 1775 store/upper; chown -R alice home
cd /
umount /run/hand/k
fscrypt lock /srv/enc --quiet
printf '#!/bin/sh\nexit 0\n' >/run/hand/hook; chmod +x /run/hand/hook
cat >/run/hand/conf/nix.conf <<CONF
!include /etc/nix/nix.conf
store = local-overlay://?state=/run/hand/k/nix&log=/run/hand/k/log&upper-layer=/run/hand/k/store/upper&remount-hook=/run/hand/hook&lower-store=unix%3A%2F%2F%2Frun%2Fhand%2Fsys%2Fsocket%3Fpath-info-cache-size%3D0
extra-experimental-features = nix-command flakes local-overlay-store
build-dir = /run/hand/k/builds
keep-outputs = true
keep-derivations = true
CONF
su alice -c 'mkdir -p ~/.cache/nix ~/.local/state/nix ~/.local/share/nix ~/hand'
cat >/run/hand/open <<'OPEN'
set -e
age -d -i /run/id /srv/hand.age >/run/raw
fscrypt unlock /srv/enc --key=/run/raw --quiet
mount -o loop,noatime /srv/enc/image /run/hand/k
mount --bind /nix/var/nix/daemon-socket /run/hand/sys
mount -t overlay overlay -o lowerdir=/nix/store,upperdir=/run/hand/k/store/upper,workdir=/run/hand/k/store/work,xino=auto,index=off,metacopy=off,redirect_dir=nofollow /nix/store
mount --bind /run/hand/sock /nix/var/nix/daemon-socket
mount --bind /run/hand/k/log /nix/var/log/nix
mount --bind /run/hand/k/home/cache /home/alice/.cache/nix
mount --bind /run/hand/k/home/state /home/alice/.local/state/nix
mount --bind /run/hand/k/home/share /home/alice/.local/share/nix
mount --bind /run/hand/k/home/work /home/alice/hand
rm -f /run/hand/sock/socket
NIX_CONF_DIR=/run/hand/conf TMPDIR=/run/hand/k/builds HOME=/run/hand/k setsid nix-daemon >/dev/null 2>&1 &
echo $! >/run/hand/pid
while ! [ -S /run/hand/sock/socket ]; do sleep 0.001; done
OPEN
cat >/run/hand/close <<'CLOSE'
set -e
kill "$(cat /run/hand/pid)"
while kill -0 "$(cat /run/hand/pid)" 2>/dev/null; do sleep 0.001; done
umount /home/alice/hand /home/alice/.local/share/nix /home/alice/.local/state/nix /home/alice/.cache/nix /nix/var/log/nix
umount /nix/var/nix/daemon-socket /nix/store /run/hand/sys /run/hand/k
fscrypt lock /srv/enc --quiet
CLOSE
`

func newLaptop(b *testing.B) *laptop {
	b.Helper()
	k := fixture.New(b, bed.Forky)
	k.Must(b, "root", byHandSetup)
	k.Must(b, "root", "age-keygen -y /run/id >/run/id.pub")
	k.MustOverkeep(b, 0, fixture.Passphrase, "key", "add", "alice", "--name", "bench", "--recipient-file", "/run/id.pub", "--passphrase-fd", "0")
	return &laptop{k}
}

// in is a script that runs another in the hand-made view's namespace: the
// nix-daemon made by hand lives there.
const inHand = `nsenter -t "$(cat /run/hand/pid)" -m -- `

// time runs a script and returns the seconds it took inside the machine, as its
// own shell saw it.
func (l *laptop) time(b *testing.B, script string) float64 {
	b.Helper()
	out := l.Must(b, "root", "a=$EPOCHREALTIME; { "+script+"; } >/dev/null 2>&1; z=$EPOCHREALTIME; echo $(( (${z/./} - ${a/./}) ))")
	us, err := strconv.ParseFloat(out[strings.LastIndexByte(out, '\n')+1:], 64)
	if err != nil {
		b.Fatalf("time of %q: %v", script, err)
	}
	return us / 1e6
}

func median(x []float64) float64 {
	x = slices.Clone(x)
	slices.Sort(x)
	return x[len(x)/2]
}

// report prints medians and the median of the pairs' ratios.
func report(b *testing.B, name string, ours, theirs []float64) {
	ratios := make([]float64, len(ours))
	for i := range ours {
		ratios[i] = ours[i] / theirs[i]
	}
	fmt.Printf("%-44s ours %7.1f ms   by hand %7.1f ms   ratio %.2f (min %.2f, max %.2f, %d pairs)\n",
		name, median(ours)*1e3, median(theirs)*1e3, median(ratios), slices.Min(ratios), slices.Max(ratios), len(ratios))
	b.ReportMetric(median(ours)*1e3, "ms/ours")
	b.ReportMetric(median(theirs)*1e3, "ms/by-hand")
	b.ReportMetric(median(ratios), "ratio")
	b.ReportMetric(0, "ns/op")
}

// openHand is the script that opens by hand: in a namespace of its own, which
// lives as long as its nix-daemon.
const openHand = "unshare -m --propagation slave bash /run/hand/open"

// BenchmarkUnlockLock: everything of unlock but the key derivation, and lock
// when nothing holds. The aims are 100 ms and 50 ms.
func BenchmarkUnlockLock(b *testing.B) {
	l := newLaptop(b)
	for b.Loop() {
		var open, openH, shut, shutH []float64
		for range rounds {
			open = append(open, l.time(b, "overkeep unlock alice --identity /run/id"))
			shut = append(shut, l.time(b, "overkeep lock alice"))
			openH = append(openH, l.time(b, openHand))
			shutH = append(shutH, l.time(b, inHand+"bash /run/hand/close"))
		}
		report(b, "unlock without the key derivation", open, openH)
		report(b, "lock when nothing holds", shut, shutH)
	}
}

// BenchmarkKDF: what the key derivation itself takes, for the passphrase slot of
// a keep at the default work factor, beside the whole unlock.
func BenchmarkKDF(b *testing.B) {
	l := newLaptop(b)
	l.MustOverkeep(b, 0, fixture.Passphrase+"\n", "lock", "alice")
	l.Must(b, "root", "printf %s "+fixture.Quote(fixture.Passphrase)+" >/run/pass")
	for b.Loop() {
		var verify, unlock []float64
		for range 5 {
			verify = append(verify, l.time(b, "overkeep key verify alice --passphrase-fd 0 </run/pass"))
			unlock = append(unlock, l.time(b, "overkeep unlock alice --passphrase-fd 0 </run/pass"))
			l.Must(b, "root", "overkeep lock alice")
		}
		report(b, "unlock beside opening a slot (work 2^12)", unlock, verify)
	}
}

// tiny is a build in which Nix does nearly all of the work; work one that computes
// for about half a second and writes and reads as a compiler does, in a shell that
// has nothing but itself.
const (
	tiny = `i=0; while [ $i -lt 300 ]; do echo $i $lib; i=$((i+1)); done > $out`
	work = `n=0; i=0; while [ $i -lt 150000 ]; do i=$((i+1)); n=$(((n*31+i)%65521)); case $i in *00) echo $n $i $lib;; esac; done > $out; ` +
		`m=0; while read a b c; do m=$((m+a)); done < $out; echo $m >> $out`
)

// chain is n derivations that run a script, each depending on the one before and on a
// path of the system store, which is asked of the lower store.
func chain(n int, script, tag, lib string) string {
	var s strings.Builder
	s.WriteString("let lib = builtins.storePath " + lib + "; sys = builtins.currentSystem; ")
	for i := range n {
		dep := `""`
		if i > 0 {
			dep = fmt.Sprintf("p%d", i-1)
		}
		fmt.Fprintf(&s, "p%d = derivation { name = \"%s-%d\"; system = sys; builder = \"/bin/sh\"; dep = %s; inherit lib; "+
			"args = [ \"-c\" ''%s'' ]; }; ", i, tag, i, dep, script)
	}
	fmt.Fprintf(&s, "in p%d", n-1)
	return s.String()
}

// BenchmarkBuild: builds in the view beside builds in the same overlay set up by
// hand. The aim is 1.05. The tiny ones show what Nix's questions to the lower store
// cost, the others what a user sees.
func BenchmarkBuild(b *testing.B) {
	b.Run("tiny", func(b *testing.B) { builds(b, 40, tiny, rounds) })
	b.Run("work", func(b *testing.B) { builds(b, 8, work, 7) })
}

func builds(b *testing.B, n int, script string, rounds int) {
	l := newLaptop(b)
	lib := l.Must(b, "root", "nix-build --no-out-link -E "+fixture.Quote(fixture.Derivation("lib", "echo lib > $out"))+" 2>/dev/null")
	l.Must(b, "root", "overkeep unlock alice --identity /run/id; "+openHand)
	for b.Loop() {
		var ours, hand []float64
		for i := range rounds {
			l.Write(b, "/srv/ours.nix", chain(n, script, fmt.Sprintf("o%d-%d", b.N, i), lib))
			l.Write(b, "/srv/hand.nix", chain(n, script, fmt.Sprintf("h%d-%d", b.N, i), lib))
			const build = "nix-build --no-out-link "
			ours = append(ours, l.time(b, "overkeep run alice -- "+build+"/srv/ours.nix"))
			hand = append(hand, l.time(b, inHand+"setpriv --reuid alice --regid alice --init-groups env HOME=/home/alice USER=alice TMPDIR=/tmp "+build+"/srv/hand.nix"))
		}
		report(b, fmt.Sprintf("%d builds of %.0f ms in a chain", n, median(hand)/float64(n)*1e3), ours, hand)
	}
	l.Must(b, "root", inHand+"bash /run/hand/close; overkeep lock alice")
}
