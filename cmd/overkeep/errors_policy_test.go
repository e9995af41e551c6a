package main

import (
	"fmt"
	"io/fs"
	"strings"
	"testing"

	"overkeep/overlay/nixdb"
	"overkeep/overlay/provenance"
	"overkeep/overlay/verdict"
	"overkeep/policy"
)

func TestPolicyErrors(t *testing.T) {
	mistake := func(name string) error {
		_, err := policy.Parse(policy.Source{Name: name, Text: []byte("system unfre\n"), Root: true})
		return err
	}
	h := here{verb: []string{"why"}, line: []string{"why", "x"}, keep: "alice"}
	for _, x := range []struct {
		err     error
		exit    int
		message string
		command string
	}{
		{mistake("/etc/overkeep/policy"), exitPolicy, `did you mean "unfree"?`, "sudo overkeep policy edit"},
		{mistake("/etc/overkeep/policy.d/work.policy"), exitPolicy, "work.policy:1:8", "sudo overkeep policy edit work.policy"},
		{mistake("/home/alice/draft"), exitPolicy, "^~~~~", "overkeep why x"},
		{mistake("--where"), exitPolicy, "--where:1:8", "overkeep help policy"},
		{&verdict.SourceError{Path: "/etc/overkeep/policy", Reason: "is a symbolic link"}, exitPolicy, "is a symbolic link", "ls -l /etc/overkeep/policy"},
		{&pathError{"/nix/store/x"}, exitNoPath, `"/nix/store/x"`, `overkeep list --where 'name "*x*"'`},
		{&pathError{"vim-*"}, exitNoPath, `"vim-*"`, `overkeep list --where 'name "*vim-*"'`},
		{fmt.Errorf("%q: %w", "db", nixdb.ErrMissing), exitUnsupported, "no Nix database", "overkeep doctor"},
		{nixdb.ErrCorrupt, exitDamaged, "damaged", "nix-store --verify"},
		{nixdb.ErrSchema, exitUnsupported, "schema", "overkeep doctor"},
		{&nixError{args: []string{"flake", "metadata", "x"}, words: "warning: you don't have Internet access; x\nerror: no\x1b[2J\n", keep: "alice"},
			exitNix, "nix flake metadata did not answer:\nerror: no\\x1b[2J", "overkeep run alice -- nix flake metadata x"},
		{&nixError{args: []string{"eval"}, keep: "alice"}, exitNix, "nix eval", "overkeep run alice -- nix eval"},
		{fmt.Errorf("provenance: %w: x", provenance.ErrInput), exitDamaged, "not readable",
			"overkeep run alice --as-root -- mv /run/overkeep/alice/k/provenance /run/overkeep/alice/k/provenance.damaged"},
		{fmt.Errorf("provenance: %w: x", provenance.ErrVersion), exitUnknownFormat, "unknown version", "overkeep version"},
		{nixdb.ErrBusy, exitInUse, "locked", "overkeep why x"},
		{nixdb.ErrUnreadable, exitNotRoot, "cannot be opened", "sudo overkeep why x"},
		{&fs.PathError{Op: "open", Path: "/x", Err: fs.ErrPermission}, exitNotRoot, "permission", "sudo overkeep why x"},
	} {
		p := explain(x.err, h)
		if p.Exit != x.exit || !strings.Contains(p.Message, x.message) {
			t.Errorf("%v: exit %d, %q", x.err, p.Exit, p.Message)
		}
		if len(p.Remedy) == 0 || p.Remedy[0].Command != x.command {
			t.Errorf("%v: remedies %+v, want %q", x.err, p.Remedy, x.command)
		} else if strings.Contains(x.command, "overkeep ") {
			parses(t, x.command)
		}
	}
}
