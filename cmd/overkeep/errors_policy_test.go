package main

import (
	"fmt"
	"io/fs"
	"strings"
	"testing"

	"overkeep/overlay/nixdb"
	"overkeep/overlay/verdict"
	"overkeep/policy"
)

func TestPolicyErrors(t *testing.T) {
	mistake := func(name string) error {
		_, err := policy.Parse(policy.Source{Name: name, Text: []byte("system unfre\n"), Root: true})
		return err
	}
	h := here{verb: []string{"why"}, line: []string{"why", "x"}}
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
