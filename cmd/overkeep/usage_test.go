package main

import (
	"slices"
	"strings"
	"testing"
)

func TestNearest(t *testing.T) {
	names := []string{"lock", "unlock", "status", "init", "destroy"}
	for in, want := range map[string]string{
		"lokc": "lock", "unlok": "unlock", "statsu": "status", "stat": "status", "destory": "destroy",
		"x": "", "zzzzzz": "", "": "", "lo": "",
	} {
		if got := nearest(in, names); got != want {
			t.Errorf("nearest(%q) = %q, want %q", in, got, want)
		}
	}
}

func TestSecretInArgs(t *testing.T) {
	for _, line := range []string{
		"unlock --passphrase=hunter2", "unlock --password=hunter2 alice", "--passphrase=hunter2 unlock", "unlock -passphrase=hunter2",
		"unlock --key=hunter2", "unlock AGE-SECRET-KEY-1hunter2", "key add --recipient age-secret-key-1hunter2", "unlock --identity=AGE-SECRET-KEY-PQ-1hunter2",
	} {
		e := secretInArgs(strings.Fields(line))
		if e == nil {
			t.Errorf("%q was let through", line)
			continue
		}
		if strings.Contains(e.msg+strings.Join(e.line, " "), "hunter2") {
			t.Errorf("%q: the secret is repeated: %q", line, e.line)
		}
	}
	for _, line := range []string{
		"", "unlock alice", "unlock --passphrase-fd=0", "key add --passphrase", "key add --passphrase=true", "unlock --recovery",
		"run -- mysql --password=hunter2", "unlock --identity /keys/AGE.txt", "key change --new-passphrase-fd=3",
	} {
		if e := secretInArgs(strings.Fields(line)); e != nil {
			t.Errorf("%q was refused", line)
		}
	}
}

func TestLineEdits(t *testing.T) {
	f := strings.Fields
	for i, x := range []struct{ got, want []string }{
		{replaceWord(f("key lst a"), "lst", "list"), f("key list a")},
		{deleteWord(f("lock a b a"), "a"), f("lock a b")},
		{deleteFirst(f("run a a -- a"), "a"), f("run a -- a")},
		{renameFlag(f("init --sise=3G -- --sise"), "sise", "size"), f("init --size=3G -- --sise")},
		{setFlag(f("init --size 3 x"), "size", "20G"), f("init --size 20G x")},
		{setFlag(f("init --size=3 x"), "size", "20G"), f("init --size=20G x")},
		{setFlag(f("lock --wait=x"), "wait", ""), f("lock --wait")},
		{without(f("init --size 3 --user x"), "size"), f("init --user x")},
		{without(f("init --size=3 --user x"), "size"), f("init --user x")},
	} {
		if !slices.Equal(x.got, x.want) {
			t.Errorf("%d: got %q, want %q", i, x.got, x.want)
		}
	}
}
