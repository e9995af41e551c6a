package verdicts

import (
	"strings"
	"testing"
	"time"
)

const git = `export GIT_AUTHOR_NAME=a GIT_AUTHOR_EMAIL=a@example.org GIT_COMMITTER_NAME=a GIT_COMMITTER_EMAIL=a@example.org; `

// eventually waits until cond holds: what the supervisor records shows nowhere else.
func eventually(t *testing.T, what string, cond func() bool) {
	t.Helper()
	for end := time.Now().Add(patience); !cond(); time.Sleep(100 * time.Millisecond) {
		if time.Now().After(end) {
			t.Fatalf("it never happens: %s", what)
		}
	}
}

// from lists the paths that come from where a pattern says.
func (w *world) from(t *testing.T, pattern string) listed {
	t.Helper()
	var l listed
	w.ask(t, &l, "list", "--keep", "alice", "--where", `from "`+pattern+`"`)
	return l
}

// The input of a flake that was built in the view is known without any command, also
// beside lock files that were made to harm.
func passive(t *testing.T, w *world) {
	w.Alice(t, `mkdir -p ~/keep/hostile; cd ~/keep/hostile
		for i in link huge deep; do mkdir -p $i/source; done
		ln -s /etc/shadow link/source/flake.lock
		truncate -s 3M huge/source/flake.lock
		{ for i in {1..200000}; do printf '['; done; } > deep/source/flake.lock
		for i in link huge deep; do nix-store --add $i/source; done`)
	w.Alice(t, git+`mkdir -p ~/keep/client ~/keep/flake; cd ~/keep/client
		git init -q; echo data > data; git add .; git commit -qm 1
		cd ~/keep/flake; git init -q
		cat > flake.nix <<'F'
{
  inputs.client = { url = "git+file:///home/alice/keep/client"; flake = false; };
  outputs = { client, ... }: {
    packages.x86_64-linux.tool = (derivation {
      name = "tool"; system = "x86_64-linux"; builder = "/bin/sh"; args = [ "-c" "echo tool > $out" ];
    }) // { meta.license = { shortName = "acme-eula"; free = false; }; };
    packages.x86_64-linux.default = derivation {
      name = "work"; system = "x86_64-linux"; builder = "/bin/sh"; args = [ "-c" "read l < ${client}/data; echo $l > $out" ];
    };
  };
}
F
		git add .; `+flakes+`flake lock 2>/dev/null; git add .; git commit -qm 1
		`+flakes+`build -o work . 2>&1`)
	var found listed
	eventually(t, "the flake's input is known", func() bool {
		found = w.from(t, "git+file:///home/alice/keep/client?*")
		return len(found) > 0
	})
	if len(found) != 1 || found.names() != "source" {
		t.Errorf("%+v", found)
	}
	for p, x := range found {
		if out := w.Alice(t, "cat "+p+"/data"); out != "data" || strings.Join(x.Lies, " ") != "personal" {
			t.Errorf("%s: %+v, holds %q", p, x, out)
		}
	}
	// What was built of it is found by the flow of the build, no reference left.
	var l listed
	w.ask(t, &l, "list", "--keep", "alice", "--where", `kind output and built-from (from "git+file:///home/alice/keep/client?*")`)
	if l.names() != "work" {
		t.Errorf("built from it: %+v", l)
	}
}

// originList is the JSON of origin list.
type originList struct {
	Paths []struct {
		Path           string
		From, Licences []string
		Unfree         *bool
		Records        []struct{ How, When string }
	}
}

type recorded struct {
	Found int
	New   []struct{ Path string }
}

func active(t *testing.T, w *world) {
	w.tool = w.Alice(t, "cd ~/keep/flake; "+flakes+"build -o tool .#tool 2>/dev/null; readlink tool")
	judge := func(placement, reason, line string) {
		t.Helper()
		var a whyAnswer
		w.ask(t, &a, "why", "--keep", "alice", w.tool)
		a.Paths[0].is(t, placement, reason, "personal", line)
	}
	judge("system", "granted", `+ system name "tool"`)

	const flake = "/home/alice/keep/flake"
	record := func(args ...string) (r recorded) {
		t.Helper()
		w.ask(t, &r, append([]string{"origin", "record", "--keep", "alice"}, args...)...)
		return r
	}
	// A dry run tells and keeps nothing.
	for range 2 {
		if r := record("--dry-run", "--meta", flake+"#tool"); len(r.New) != 2 {
			t.Errorf("%+v", r)
		}
	}
	judge("system", "granted", `+ system name "tool"`)
	if r := record("--meta", flake+"#tool"); len(r.New) != 2 { // the derivation and its output
		t.Errorf("%+v", r)
	}
	judge("personal", "vetoed", "- personal unfree when known (policy:7)")
	// Alice, who may not write the records, is told the same.
	var in whyAnswer
	decode(t, w.Alice(t, "overkeep why --json ./flake/tool"), &in)
	in.Paths[0].is(t, "personal", "vetoed", "personal", "- personal unfree when known (policy:7)")
	var l originList
	w.ask(t, &l, "origin", "list", "--keep", "alice", "tool")
	if len(l.Paths) != 1 || l.Paths[0].Path != w.tool || l.Paths[0].Unfree == nil || !*l.Paths[0].Unfree || strings.Join(l.Paths[0].Licences, " ") != "acme-eula" ||
		len(l.Paths[0].Records) != 1 || l.Paths[0].Records[0].How != "meta" || l.Paths[0].Records[0].When == "" {
		t.Errorf("%+v", l)
	}

	// The flake itself is known by asking alone; its input was known before.
	if r := record(flake); len(r.New) != 1 || r.Found < 2 {
		t.Errorf("%+v", r)
	}
	if r := record(flake); len(r.New) != 0 || r.Found < 2 {
		t.Errorf("once more: %+v", r)
	}
	if l := w.from(t, "git+file://"+flake+"*"); l.names() != "source" {
		t.Errorf("%+v", l)
	}
	// The lock files of both stores again: what the supervisor found.
	if r := record(); len(r.New) != 0 || r.Found == 0 {
		t.Errorf("all sources: %+v", r)
	}

	// Nix ran as alice, with her groups and places, without a network and a terminal.
	ns := w.Must(t, "root", "readlink /proc/self/ns/net")
	runs := strings.Split(w.Read(t, "/tmp/nix-was-run"), "\n")
	if len(runs) < 5 || runs[0] != "alice" || runs[1] != w.Must(t, "alice", "id -Gn") || runs[2] == ns || !strings.HasPrefix(runs[2], "net:[") ||
		runs[3] != "/home/alice /run/overkeep/alice/k/tmp" || strings.TrimSpace(runs[4]) != "?" {
		t.Errorf("nix was run by %q (the machine's network is %s)", runs, ns)
	}
	w.Must(t, "root", "rm /tmp/nix-was-run")
	record("--fetch", flake)
	if runs := strings.Split(w.Read(t, "/tmp/nix-was-run"), "\n"); len(runs) < 5 || runs[0] != "alice" || runs[2] != ns {
		t.Errorf("with --fetch nix was run by %q (the machine's network is %s)", runs, ns)
	}
	if out := w.asRoot(t, "cd /run/overkeep/alice/k/provenance; stat -c '%U %G %a' . *"); out != "root alice 2750\nroot alice 640\n" {
		t.Errorf("records are %s", out)
	}

	// Nix says no: its words, its exit code.
	r := w.Overkeep(t, "", "origin", "record", "--keep", "alice", "--meta", flake+"#no-such-package")
	if r.Code != 23 || !strings.Contains(r.Stderr, "no-such-package") || !strings.Contains(r.Stderr, "overkeep run alice -- nix eval") {
		t.Errorf("%+v", r)
	}
	// Only root records, and only root looks: inside the view, too.
	for _, verb := range []string{"record", "list", "forget x"} {
		if out, err := w.AliceRun("overkeep origin " + verb); err == nil || !strings.Contains(out, "root") {
			t.Errorf("alice: origin %s: %v %s", verb, err, out)
		}
	}

	// What is forgotten is unknown again.
	w.MustOverkeep(t, 2, "", "origin", "forget", "--keep", "alice", "tool") // nobody there to ask
	w.MustOverkeep(t, 0, "", "origin", "forget", "--keep", "alice", "--dry-run", "tool")
	judge("personal", "vetoed", "- personal unfree when known (policy:7)")
	w.MustOverkeep(t, 0, "", "origin", "forget", "--keep", "alice", "--yes", "tool")
	judge("system", "granted", `+ system name "tool"`)
}
