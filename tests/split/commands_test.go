package split

import (
	"path"
	"strings"
	"testing"

	"overkeep/tests/fixture"
)

// Everyday work with stock Nix, in the view, without a setting or a word of
// overkeep's. What needs nixpkgs is not here: "nix develop" and "nix
// print-dev-env" want a derivation whose builder is bash.
func TestEverydayWork(t *testing.T) {
	each(t, "", func(t *testing.T, l *laptop) {
		lower := l.build(t, rootOut, echo("lower", "from below"), "-o /nix/var/nix/gcroots/lower")
		l.unlockOf(t, "alice")
		said := l.at(t, alice, "nix-store --check-validity "+lower+"; nix eval --expr 1; nix-build --no-out-link "+l.expression(t, echo("quiet", "q", lower))+" 2>&1")
		if strings.Contains(said, "warning") {
			t.Errorf("stock Nix in the view is not as quiet as elsewhere:\n%s", said)
		}
		hostState := "find /nix/store /nix/var/nix/gcroots /nix/var/nix/profiles /nix/var/log/nix /home/alice -xdev | grep -v /nix/var/nix/gcroots/overkeep/ | sort"
		before := l.Must(t, "root", hostState)
		for _, w := range []struct {
			name string
			work func(*testing.T, *laptop, string)
		}{
			{"build", workBuild}, {"roots", workRoots}, {"log", workLog}, {"failed", workFailed}, {"profile", workProfile},
			{"env", workEnv}, {"shell", workShell}, {"flake", workFlake}, {"store", workStore}, {"delete", workDelete},
		} {
			t.Run(w.name, func(t *testing.T) {
				l.at(t, alice, "mkdir "+w.name)
				w.work(t, l, lower)
				l.verify(t, alice)
			})
		}
		l.personalGC(t)
		l.noWhiteouts(t)
		l.verify(t)
		// Outside nothing has come or gone, but for links in her home to the profiles.
		after := l.Must(t, "root", hostState+" | grep -vx -e /home/alice/.nix-profile -e /home/alice/.nix-channels -e '/home/alice/.nix-defexpr.*'")
		if before != after {
			t.Errorf("outside the view there was\n%s\nand is\n%s", before, after)
		}
	})
}

// tool is an expression for a package with a program, as far as there can be one
// without nixpkgs.
func tool(name, says string) string {
	return fixture.Derivation(name, "mkdir -p $out/bin; echo '#!/bin/sh' > $out/bin/"+name+"; echo 'echo "+says+"' >> $out/bin/"+name+"; chmod +x $out/bin/"+name)
}

func workBuild(t *testing.T, l *laptop, lower string) {
	file := l.expression(t, echo("by-nix-build", "b", lower))
	out := l.at(t, alice, "cd build; nix build --print-out-paths --file "+file+" 2>/dev/null; readlink result >/dev/null; cat result")
	if !strings.HasSuffix(out, "\nb\n"+lower) {
		t.Errorf("nix build: %q", out)
	}
	if out := l.at(t, alice, "cd build; nix build --impure --no-link --print-out-paths --expr 'import "+file+"' 2>&1"); out != l.at(t, alice, "readlink build/result") {
		t.Errorf("what is built was built again: %q", out)
	}
	l.at(t, alice, "nix build --rebuild --no-link --file "+file)
	if out := l.at(t, alice, "nix-instantiate --eval -E '(import "+file+").name'; nix eval --impure --raw --expr '(import "+file+").name' 2>/dev/null"); out != "\"by-nix-build\"\nby-nix-build" {
		t.Errorf("eval: %q", out)
	}
}

func workRoots(t *testing.T, l *laptop, lower string) {
	rooted := l.build(t, alice, echo("rooted", "r", lower), "-o roots/link")
	two := l.build(t, alice, echo("two", "t"), "")
	l.at(t, alice, "nix-store --realise --indirect --add-root roots/two "+two)
	if out := l.at(t, alice, "nix-store --query --roots "+rooted+" 2>/dev/null"); !strings.Contains(out, "/home/alice/keep/roots/link") {
		t.Errorf("the roots of a built path: %q", out)
	}
	l.personalGC(t)
	l.have(t, alice, true, map[string]string{"by -o": rooted, "by --add-root": two})
	// Moved along with its directory, or removed, a link is no root any more.
	l.at(t, alice, "mv roots/link roots/elsewhere; rm roots/two")
	l.personalGC(t)
	l.have(t, alice, false, map[string]string{"by -o": rooted, "by --add-root": two})
}

func workLog(t *testing.T, l *laptop, _ string) {
	out := l.build(t, alice, fixture.Derivation("logged", "echo a line of the log; echo > $out"), "-o log/logged")
	for _, c := range []string{"nix log " + out, "nix-store --read-log " + out, "nix log $(nix-store --query --deriver " + out + ")"} {
		if got := l.at(t, alice, c+" 2>/dev/null"); got != "a line of the log" {
			t.Errorf("%s: %q", c, got)
		}
	}
	if got, err := l.try(bobOut, "nix log "+out); err == nil {
		t.Errorf("bob reads alice's log: %s", got)
	}
}

func workFailed(t *testing.T, l *laptop, _ string) {
	out, err := l.try(alice, "nix-build --keep-failed --no-out-link "+l.expression(t, fixture.Derivation("failing", "echo what is left > left; echo in the log; exit 7")))
	if err == nil || !strings.Contains(out, "in the log") {
		t.Fatalf("a failing build: %v %s", err, out)
	}
	_, rest, ok := strings.Cut(out, "keeping build directory")
	if !ok {
		t.Fatalf("no build directory was kept:\n%s", out)
	}
	dir := strings.Trim(strings.Fields(rest)[0], "'\"‘’;")
	if !strings.HasPrefix(dir, "/run/overkeep/alice/k/") {
		t.Errorf("a failed build's directory is kept outside the keep, in %s", dir)
	}
	// On older Nix it is the build user's, on newer ones whose build it was: root
	// sees it in any case, and in the view alone.
	if got := l.at(t, rootInView, "cat $(find "+dir+" -name left)"); got != "what is left" {
		t.Errorf("the failed build left %q", got)
	}
	if got := l.Must(t, "root", "find / -xdev -name left -o -path '/tmp/nix-*' -o -path '/nix/var/nix/builds/*'"); got != "" {
		t.Errorf("outside the view there is %s", got)
	}
}

func workProfile(t *testing.T, l *laptop, lower string) {
	one, two := l.build(t, alice, tool("one", "this is one"), ""), l.build(t, alice, tool("two", "this is two"), "")
	l.at(t, alice, "nix profile install "+one+"; nix profile install "+two)
	if got := l.at(t, alice, "~/.nix-profile/bin/one; ~/.nix-profile/bin/two; nix profile list --json 2>/dev/null | grep -oF -e "+one+" -e "+two+" | sort -u | wc -l"); got != "this is one\nthis is two\n2" {
		t.Errorf("the profile: %q", got)
	}
	l.personalGC(t)
	l.have(t, alice, true, map[string]string{"one": one, "two": two})
	l.at(t, alice, "nix profile remove "+one)
	l.lockOf(t, "alice")
	if out := l.Must(t, "root", "find -L /home/alice /nix/var/nix/profiles -name one -o -name two 2>/dev/null"); out != "" {
		t.Errorf("a locked keep's profile shows %s", out)
	}
	l.unlockOf(t, "alice")
	if got := l.at(t, alice, "~/.nix-profile/bin/two; test ! -e ~/.nix-profile/bin/one"); got != "this is two" {
		t.Errorf("the profile after remove and lock: %q", got)
	}
	l.at(t, alice, "nix profile rollback; ~/.nix-profile/bin/one; nix profile rollback --to $(basename $(readlink ~/.local/state/nix/profiles/profile) | tr -cd 0-9)")
	l.at(t, alice, "nix profile remove --all || nix profile remove '.*'")
	l.at(t, alice, "nix profile wipe-history; nix-collect-garbage -d")
	l.have(t, alice, false, map[string]string{"one": one, "two": two})
	l.at(t, alice, "nix profile install "+lower+" 2>&1 || true") // a file, no package: refused, and nothing breaks
}

func workEnv(t *testing.T, l *laptop, _ string) {
	three := l.build(t, alice, tool("three-1", "three"), "")
	l.at(t, alice, "nix-env --profile ~/keep/env/profile --install "+three)
	if got := l.at(t, alice, "env/profile/bin/three-1; nix-env --profile ~/keep/env/profile --query"); got != "three\nthree-1" {
		t.Errorf("nix-env: %q", got)
	}
	l.personalGC(t)
	l.at(t, alice, "env/profile/bin/three-1; nix-env --profile ~/keep/env/profile --uninstall three; test ! -e env/profile/bin/three-1; nix-env --profile ~/keep/env/profile --rollback; env/profile/bin/three-1")
}

func workShell(t *testing.T, l *laptop, _ string) {
	out := l.build(t, alice, tool("handy", "at hand"), "-o shell/handy")
	if got := l.at(t, alice, "nix shell "+out+" -c handy"); got != "at hand" {
		t.Errorf("nix shell: %q", got)
	}
	dev := l.expression(t, `derivation { name = "dev"; system = builtins.currentSystem; builder = "/bin/sh"; handy = builtins.storePath `+out+`; }`)
	if got := l.at(t, alice, "nix-shell "+dev+" --run '$handy/bin/handy; echo $name'", "NIX_BUILD_SHELL=/bin/bash"); got != "at hand\ndev" {
		t.Errorf("nix-shell: %q", got)
	}
}

func workFlake(t *testing.T, l *laptop, lower string) {
	l.at(t, alice, `cd flake; mkdir lib app; system=$(nix eval --impure --raw --expr builtins.currentSystem 2>/dev/null)
		cat > lib/flake.nix <<-'END'
			{ outputs = _: { says = "by a flake"; }; }
		END
		cat > app/flake.nix <<-END
			{
			  inputs.lib.url = "path:/home/alice/keep/flake/lib";
			  outputs = { self, lib }: {
			    packages.$system.default = derivation {
			      name = "app"; system = "$system"; builder = "/bin/sh";
			      args = [ "-c" "read s < \${self}/source; echo \$s \${lib.says} > \$out" ];
			    };
			    apps.$system.default = { type = "app"; program = "\${derivation {
			      name = "run"; system = "$system"; builder = "/bin/sh"; args = [ "-c" "echo '#!/bin/sh' > \$out; echo 'echo ran' >> \$out; chmod +x \$out" ];
			    }}"; };
			  };
			}
		END
		echo source > app/source
		cd app; git init -q .; git add .; git -c user.name=a -c user.email=a@b commit -qm one`)
	if got := l.at(t, alice, "cd flake/app; nix flake lock 2>/dev/null; git add flake.lock; nix build 2>/dev/null; cat result"); got != "source by a flake" {
		t.Errorf("a flake in a git directory: %q", got)
	}
	if got := l.at(t, alice, "cd flake/app; echo changed > source; nix build -o dirty . 2>&1 | grep -c dirty; cat dirty; nix build -o path path:. 2>/dev/null; cat path"); got != "1\nchanged by a flake\nchanged by a flake" {
		t.Errorf("a changed flake, as git and as path: %q", got)
	}
	show := l.at(t, alice, "cd flake/app; nix flake show 2>/dev/null; nix flake metadata 2>/dev/null; nix run 2>/dev/null; nix run git+file:///home/alice/keep/flake/app 2>/dev/null")
	for _, want := range []string{"package", "app", "lib", "git+file:///home/alice/keep/flake/app", "path:/home/alice/keep/flake/lib", "ran\nran"} {
		if !strings.Contains(show, want) {
			t.Errorf("nix flake does not show %q:\n%s", want, show)
		}
	}
	if got := l.at(t, alice, "cd flake/app; nix build --no-link --print-out-paths 2>/dev/null; nix flake check 2>&1 | tail -n 1; nix flake update 2>&1 >/dev/null | tail -n 1"); !strings.HasPrefix(got, storeDir) || strings.Contains(got, "error") {
		t.Errorf("a flake again: %q", got)
	}
	// The source is a store path like any other: alice's.
	for _, p := range strings.Fields(l.at(t, alice, "ls -d "+storeDir+"/*-source")) {
		if !l.inUpper(t, p) || l.exists(rootOut, p) {
			t.Errorf("the flake's source %s: upper %v, system store %v", p, l.inUpper(t, p), l.exists(rootOut, p))
		}
	}
}

func workStore(t *testing.T, l *laptop, lower string) {
	out := l.build(t, alice, echo("copied", "c", lower), "-o store/copied")
	added := strings.Fields(l.at(t, alice, "cd store; echo text > file; mkdir dir; echo more > dir/file; nix store add ./dir; nix store add-file ./file; nix-store --add file; nix store add --mode flat ./file"))
	if len(added) != 4 {
		t.Fatalf("added: %v", added)
	}
	for _, p := range added {
		if !l.inUpper(t, p) || l.exists(rootOut, p) {
			t.Errorf("added %s: upper %v, system store %v", p, l.inUpper(t, p), l.exists(rootOut, p))
		}
	}
	// To a cache in the keep, and back after it was deleted.
	cache := "file:///home/alice/keep/store/cache"
	l.at(t, alice, "nix copy --to "+cache+" "+out+"; rm store/copied; nix-store --gc")
	l.have(t, alice, false, map[string]string{"deleted": out})
	info := l.at(t, alice, "nix path-info --store "+cache+" --all")
	for _, p := range []string{out, lower} {
		if !strings.Contains(info, p) {
			t.Errorf("the cache lacks %s: %s", p, info)
		}
	}
	if _, err := l.try(alice, "nix copy --from "+cache+" "+out); err == nil {
		t.Error("a path without a signature was taken from a cache by a user who is not trusted")
	}
	l.at(t, rootInView, "nix copy --no-check-sigs --from file:///home/alice/keep/store/cache "+out)
	if got := l.at(t, alice, "cat "+out); got != "c\n"+lower {
		t.Errorf("after the way through a cache: %q", got)
	}
	if l.inUpper(t, lower) {
		t.Error("the system's path came back from the cache into the keep")
	}
	l.at(t, alice, "nix-store --realise --add-root store/copied "+out)
	// Export and import, whole closures, as root.
	l.at(t, rootInView, "cd ~alice/keep/store; nix-store --export $(nix-store --query --requisites "+out+") > closure; rm copied; nix-store --gc; nix-store --import < closure")
	if got := l.at(t, alice, "cat "+out+"; nix why-depends "+out+" "+lower+" 2>/dev/null | grep -c "+path.Base(lower)); got != "c\n"+lower+"\n1" {
		t.Errorf("after export and import: %q", got)
	}
	l.at(t, alice, "nix store verify --no-trust "+out+" "+lower+"; nix path-info -rsSh "+out+"; nix derivation show "+out+" || true; nix store ls --long "+out+"; nix hash path "+out)
	l.at(t, alice, "nix store optimise")
	l.noWhiteouts(t)
}

func workDelete(t *testing.T, l *laptop, lower string) {
	out := l.build(t, alice, echo("deleted", "d", lower), "")
	l.at(t, alice, "nix-store --query --hash "+out)
	l.at(t, alice, "nix store delete $(nix-store --query --deriver "+out+") "+out+" || nix store delete --ignore-liveness "+out)
	l.have(t, alice, false, map[string]string{"deleted": out})
	// The system's is not alice's to delete, whatever Nix says it did.
	for _, c := range []string{"nix store delete " + lower, "nix-store --delete " + lower, "nix store delete --ignore-liveness " + lower} {
		l.try(alice, c)
		l.have(t, rootOut, true, map[string]string{"the system's after " + c: lower})
		if got, err := l.try(alice, "cat "+lower+"; nix-store --check-validity "+lower); err != nil || got != "from below" {
			t.Errorf("the system's path in the view after %q: %q %v", c, got, err)
		}
		if _, err := l.try(alice, "rm -f "+lower+" || touch "+storeDir+"/mine || echo > "+lower); err == nil {
			t.Error("alice wrote to the store")
		}
	}
	l.noWhiteouts(t)
}
