// Package traces proves, with a real Nix, old and new, that personal bytes are
// born encrypted: whatever alice does in her view, no name, content or store hash
// of it is ever outside, on the raw disk, in the system store and its database,
// in her home, in /tmp, /var or /run, or in another's process; not while the keep
// is open, not after the lock, and not after everything was killed or the power
// was cut half-way.
//
// Canaries are random strings that every step puts into names and contents. They
// reach the machine by standard input only, so that the test itself leaves no
// trace. That the search finds what there is, is shown by the same search for a
// control that bob spreads in plain, and that the canaries are there at all, by
// a look into the keep.
//
// The arguments of a running build, like those of any process, can be read by
// everybody on a machine whose /proc is not mounted with hidepid; that is not
// looked for; nor is what alice asks to have outside, as with nix-channel, which
// keeps its list in her home. Do not look here for what a crash does to the keep.
package traces

import (
	"crypto/rand"
	"slices"
	"strings"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"overkeep/tests/bed"
	"overkeep/tests/fixture"
)

const patience = 60 * time.Second // ends a wait for what never comes

// machines bounds how many run at a time.
var machines = make(chan struct{}, 2)

// back-ends of a keep, and how they are asked for.
var backends = []struct {
	name string
	args []string
}{
	{"image", []string{"--backend", "image", "--size", "256M"}},
	{"dir", []string{"--backend", "dir"}},
	{"on-image", []string{"--backend", "image", "--on-image", "/srv/alice.img", "--size", "256M"}},
}

// each runs f with alice's keep made, of every back-end, on every suite.
func each(t *testing.T, f func(t *testing.T, k *fixture.Keep, backend string)) {
	for _, b := range backends {
		for _, suite := range bed.Suites {
			t.Run(b.name+"/"+string(suite), func(t *testing.T) {
				t.Parallel()
				machines <- struct{}{}
				t.Cleanup(func() { <-machines }) // after the machine's own
				m := bed.Start(t, suite)
				k := &fixture.Keep{Machine: m}
				// Compressed, a log would hide what it leaks.
				m.Write(t, "/etc/nix/nix.conf", m.Read(t, "/etc/nix/nix.conf")+"compress-build-log = false\n")
				m.Install(t, bed.Binary(t))
				m.SystemNix(t)
				k.MustOverkeep(t, 0, fixture.Passphrase, append([]string{"init", "--user", "alice", "--work-factor", "12",
					"--passphrase-fd", "0", "--recovery-out", fixture.RecoveryFile, "--yes"}, b.args...)...)
				f(t, k, b.name)
			})
		}
	}
}

// canary returns a random string: letters and digits, as a store path's name may
// hold, and none of the letters that would let it be part of a hash.
func canary() string { return "teou" + strings.ToLower(rand.Text()) }

// command runs a script in alice's view; see enter.
func command(asRoot bool, script, input string) bed.Command {
	as := ""
	if asRoot {
		as = " --as-root"
	}
	// The script is the first part of standard input, the rest is its own.
	const split = "::end of script::"
	return bed.Command{
		User: "root", Dir: "/", Stdin: script + "\n" + split + "\n" + input + "\n",
		Script: "exec overkeep run alice" + as + ` -- bash -euo pipefail -c 'cd ~alice/keep; s=; while IFS= read -r l && test "$l" != "` + split + `"; do s+="$l"$'\''\n'\''; done; eval "$s"'`,
	}
}

// A step is one thing alice does. Her script says CANARY where the canary goes.
type step struct {
	name   string
	root   bool // done by root in her view
	script string
}

// expression writes a Nix expression with a canary in every part of it to
// CANARY-build.nix; last is what the build does at its end.
func expression(last string) string {
	return `
		cat > CANARY-build.nix <<'END'
		derivation {
		  name = "CANARY-name"; system = builtins.currentSystem; builder = "/bin/sh"; attribute = "CANARY-attribute"; source = ./CANARY-source;
		  args = [ "-c" ''echo CANARY-in-log; echo CANARY-left > CANARY-file; mkdir -p $out/bin; cat $source/CANARY-file > $out/CANARY-output
		    echo "#!/bin/sh" > $out/bin/CANARY-program; chmod +x $out/bin/CANARY-program; ` + last + `'' ];
		}
END
`
}

var steps = []step{
	{name: "sources", script: `
		mkdir CANARY-source; echo CANARY-content > CANARY-source/CANARY-file; ln -s CANARY-target CANARY-link
		git init -q CANARY-repo; cp -r CANARY-source CANARY-repo/; cd CANARY-repo; git add .; git -c user.name=CANARY-author -c user.email=a@b commit -qm CANARY-message`},
	{name: "build", script: expression("true") + `
		nix-build CANARY-build.nix -o CANARY-result; nix log $(readlink CANARY-result) | grep -q CANARY-in-log; ls CANARY-result/CANARY-output`},
	{name: "failed build", script: expression("exit 9") + `
		! nix-build --keep-failed CANARY-build.nix; ` + expression("true")},
	{name: "roots", script: `
		p=$(readlink CANARY-result); nix-store --realise --add-root CANARY-root $p; nix-store --query --roots $p | grep -q CANARY-root
		nix build --impure --file CANARY-build.nix -o CANARY-root2; nix-instantiate --add-root CANARY-root3 CANARY-build.nix`},
	{name: "profile", script: `
		p=$(readlink CANARY-result); nix profile install $p; ls ~/.nix-profile/bin/CANARY-program; nix profile list
		nix-env --profile ~/.local/state/nix/profiles/CANARY-profile --install $p; nix-env --profile ~/.local/state/nix/profiles/CANARY-profile --query --out-path`},
	{name: "flake", script: `
		mkdir CANARY-flake; cd CANARY-flake; git init -q .
		cat > flake.nix <<'END'
		{ inputs.CANARY-input = { url = "path:/home/alice/keep/CANARY-source"; flake = false; };
		  outputs = { self, CANARY-input }: rec {
		    CANARY-attr.CANARY-inner = "CANARY-value ${builtins.readFile "${CANARY-input}/CANARY-file"}";
		    packages.SYSTEM.default = derivation {
		      name = "CANARY-flake"; system = "SYSTEM"; builder = "/bin/sh"; args = [ "-c" "echo '${CANARY-attr.CANARY-inner}' > $out" ];
		    };
		  };
		}
END
		sed -i s/SYSTEM/$(nix eval --impure --raw --expr builtins.currentSystem)/ flake.nix
		git add .; nix flake lock; git add .; nix build -o ../CANARY-flake-result; nix eval --raw .#CANARY-attr.CANARY-inner; nix flake show; nix flake metadata; nix flake archive
		nix eval --raw git+file:///home/alice/keep/CANARY-flake#CANARY-attr.CANARY-inner; nix build --no-link path:.
		nix flake update CANARY-input; git add .; git -c user.name=CANARY -c user.email=a@b commit -qm CANARY-commit; nix eval --raw .#CANARY-attr.CANARY-inner`},
	{name: "fetchers", script: `
		tar -czf CANARY-tar.tar.gz CANARY-source; k=file:///home/alice/keep
		nix eval --impure --expr "builtins.readDir (builtins.fetchGit { url = \"$k/CANARY-repo\"; name = \"CANARY-git\"; })"
		nix eval --impure --expr "builtins.readDir (builtins.fetchTarball { url = \"$k/CANARY-tar.tar.gz\"; name = \"CANARY-tarball\"; })"
		nix eval --impure --expr "builtins.readDir (builtins.fetchTree { type = \"git\"; url = \"$k/CANARY-repo\"; })"
		nix-prefetch-url --name CANARY-fetched $k/CANARY-tar.tar.gz; nix flake prefetch --flake-registry '' git+$k/CANARY-repo`},
	// Debian's Nix makes the history's file and writes nothing into it; another would.
	{name: "repl", script: `
		printf 'x = "CANARY-typed"\nx\n:l CANARY-build.nix\n:q\n' | script -qec "nix repl" /dev/null
		test -e ~/.local/share/nix/repl-history; echo CANARY-typed >> ~/.local/share/nix/repl-history`},
	{name: "shells", script: `
		p=$(readlink CANARY-result); nix shell $p -c sh -c 'type CANARY-program'
		NIX_BUILD_SHELL=/bin/bash nix-shell CANARY-build.nix --run 'echo CANARY-in-shell; echo CANARY > $NIX_BUILD_TOP/CANARY-top'
		echo CANARY > $(mktemp -t CANARY-XXXXXX)`},
	{name: "store", script: `
		p=$(readlink CANARY-result); nix store add ./CANARY-source; nix-store --add CANARY-tar.tar.gz; nix copy --to file:///home/alice/keep/CANARY-cache $p; nix-store --export $p > CANARY-export
		nix path-info --json $p; nix-store --query --graph $p; nix derivation show $p; nix store verify --no-trust $p; nix-store --verify --check-contents; nix store delete $(nix-store --add CANARY-export)`},
	{name: "errors", script: `
		! nix build --impure --show-trace --expr 'throw "CANARY-thrown"'; ! nix-build CANARY-not-there.nix; ! nix build .#CANARY-no-attribute; ! nix log /nix/store/00000000000000000000000000000000-CANARY`},
	{name: "root in the view", root: true, script: `
		nix-build CANARY-build.nix -o CANARY-root-result; nix eval --raw path:$PWD/CANARY-flake#CANARY-attr.CANARY-inner; nix flake metadata path:$PWD/CANARY-flake; nix build --no-link path:$PWD/CANARY-flake
		nix eval --impure --expr 'builtins.readDir (builtins.fetchTarball "file:///home/alice/keep/CANARY-tar.tar.gz")'
		printf '"CANARY-root-typed"\n:q\n' | script -qec "nix repl" /dev/null; nix profile install $(readlink CANARY-result); NIX_BUILD_SHELL=/bin/bash nix-shell CANARY-build.nix --run 'true'`},
	{name: "collection", script: `rm CANARY-root CANARY-root2 CANARY-root3; nix-collect-garbage -d; nix store optimise; nix-store --gc --print-roots`},
}

// places of the keep where the steps are known to write; that each shows a canary
// is what makes "nowhere else" mean something.
var written = []string{
	"store/upper/", "log/drvs/", "builds/", "nix/db/", "nix/gcroots/auto/", "home/work/", "home/state/profiles/",
	"home/share/repl-history", "home/cache/eval-cache-", "home/cache/fetcher-cache-", "tmp/",
}

// laptop is a machine with alice's keep and what has been seen of it.
type laptop struct {
	*fixture.Keep
	n       string // the canary
	control string
	seen    map[finding]bool // what was reported once is not again
}

// newLaptop spreads a control and opens the keep.
func newLaptop(t *testing.T, k *fixture.Keep) *laptop {
	t.Helper()
	l := &laptop{Keep: k, n: canary(), control: canary(), seen: map[finding]bool{}}
	spread(t, k, l.control)
	if found := outside(t, k, false, l.n); len(found) > 0 {
		t.Fatalf("the canary is older than the keep:\n%s", describe(found))
	}
	l.sees(t)
	k.Unlock(t)
	return l
}

// sees fails the test unless the search finds the control in every kind of place.
func (l *laptop) sees(t *testing.T) {
	t.Helper()
	if found := outside(t, l.Keep, false, l.control); !slices.Equal(kinds(found, l.control), sorted(everywhere)) {
		t.Errorf("the search is blind: of the control it finds\n%s", describe(found))
	}
}

// clean fails the test for every new trace of a needle.
func (l *laptop) clean(t *testing.T, when string, open bool, needles ...string) {
	t.Helper()
	l.report(t, when, outside(t, l.Keep, open, needles...))
}

// off is clean for a machine that is switched off.
func (l *laptop) off(t *testing.T, when string, needles ...string) {
	t.Helper()
	l.report(t, when, disk(t, l.Keep, needles...))
}

func (l *laptop) report(t *testing.T, when string, found []finding) {
	t.Helper()
	for _, f := range found {
		if !l.seen[f] {
			l.seen[f] = true
			t.Errorf("%s: %s", when, f)
		}
	}
}

// do takes a step.
func (l *laptop) do(t *testing.T, s step) {
	t.Helper()
	r, err := l.Exec(command(s.root, strings.ReplaceAll(s.script, "CANARY", l.n), ""))
	if err != nil || r.Code != 0 {
		t.Errorf("%s: %v, exit code %d\n%s%s", s.name, err, r.Code, r.Stdout, r.Stderr)
	}
}

// Step by step, and at the end by every name that there is.
func TestBornEncrypted(t *testing.T) {
	each(t, func(t *testing.T, k *fixture.Keep, _ string) {
		l := newLaptop(t, k)
		for _, s := range steps {
			l.do(t, s)
			l.clean(t, s.name, true, l.n)
		}
		needles := append(hashes(t, k), l.n)
		there := "\n" + inside(t, k, l.n)
		for _, w := range written {
			if !strings.Contains(there, "\n./"+w) {
				t.Errorf("no canary in %s of the keep: the steps do not do what they are to", w)
			}
		}
		l.clean(t, "open", true, needles...)
		k.Lock(t)
		l.clean(t, "locked", false, needles...)
		l.sees(t)
		k.Kill(t)
		l.off(t, "switched off", needles...)
		if len(disk(t, k, l.control)) == 0 {
			t.Error("the search of a machine that is off is blind")
		}
	})
}

func sorted(s []string) []string {
	s = slices.Clone(s)
	slices.Sort(s)
	return s
}

// spread puts a control, in plain, into every kind of place there is. It comes
// to the machine by standard input like the canaries, and only then spreads.
func spread(t *testing.T, k *fixture.Keep, control string) {
	t.Helper()
	r, err := k.Exec(bed.Command{User: "bob", Stdin: control + "\n", Script: `read n
		echo $n > ~/content; touch ~/$n; ln -s $n ~/link
		echo > /tmp/$n.sh; nix-store --add /tmp/$n.sh`})
	if err != nil || r.Code != 0 {
		t.Fatalf("the control: %v %+v", err, r)
	}
	p, err := k.Start("bob", `n=$(cat ~/content); export CONTROL=$n; (exec -a $n sleep infinity) & echo running; wait`)
	if err != nil {
		t.Fatal(err)
	}
	await(t, p, "running")
	if err := unix.Lsetxattr(k.Root+"/home/bob/content", "trusted.control", []byte(control), 0); err != nil {
		t.Fatalf("the control's attribute: %v", err)
	}
}

// await waits until a running command has written word.
func await(t *testing.T, p *bed.Proc, word string) {
	t.Helper()
	for end := time.Now().Add(patience); !strings.Contains(p.Output(), word); time.Sleep(10 * time.Millisecond) {
		select {
		case <-p.Done():
			t.Fatalf("it ended before it said %q:\n%s", word, p.Output())
		default:
		}
		if time.Now().After(end) {
			t.Fatalf("it never says %q:\n%s", word, p.Output())
		}
	}
}

// hashes are the hash parts of all personal store paths.
func hashes(t *testing.T, k *fixture.Keep) (out []string) {
	t.Helper()
	for name := range strings.FieldsSeq(enter(t, k, true, "ls /run/overkeep/alice/k/store/upper", "")) {
		if h, _, ok := strings.Cut(name, "-"); ok && len(h) == 32 {
			out = append(out, h)
		}
	}
	if len(out) == 0 {
		t.Fatal("the keep has no store paths")
	}
	return out
}
