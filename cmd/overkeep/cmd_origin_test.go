package main

import (
	"bytes"
	"strings"
	"testing"

	"overkeep/overlay/provenance"
	"overkeep/policy/graph"
)

func TestOriginMatch(t *testing.T) {
	hash := strings.Repeat("0", 32)
	base := hash + "-payroll-0.3"
	for pattern, want := range map[string]bool{
		"payroll-0.3": true, "payroll": false, "payroll-*": true, "*": true, base: true, "/nix/store/" + base: true,
		hash: true, strings.Repeat("1", 32): false, hash + "-*": true, "source": false,
	} {
		m, err := originMatch(pattern)
		if err != nil || m(base) != want {
			t.Errorf("%q: %v", pattern, err)
		}
	}
	for _, pattern := range []string{"/home/alice", "/nix/store/" + base + "/bin", "[", strings.Repeat("*a", 5000)} {
		if _, err := originMatch(pattern); err == nil {
			t.Errorf("%q is a pattern", pattern)
		}
	}
}

func TestOriginOptions(t *testing.T) {
	for _, o := range []originRecordOptions{
		{flake: "--option"}, {metas: []string{"-f"}}, {file: "-x", metas: []string{"a"}}, {file: "x"}, {impure: true},
	} {
		if o.check() == nil {
			t.Errorf("%+v passes", o)
		}
	}
	for _, o := range []originRecordOptions{{}, {flake: "/x"}, {metas: []string{"/x#y"}, impure: true}, {file: "x", metas: []string{"y"}}} {
		if err := o.check(); err != nil {
			t.Errorf("%+v: %v", o, err)
		}
	}
}

func TestBounded(t *testing.T) {
	for _, drop := range []bool{false, true} {
		b := &bounded{max: 4, drop: drop}
		_, err1 := b.Write([]byte("abc"))
		n, err2 := b.Write([]byte("def"))
		if err1 != nil || (err2 == nil) != drop || drop && n != 3 || b.Len() > 4 || !b.over {
			t.Errorf("drop %v: %d %v %v %q", drop, n, err1, err2, b.String())
		}
	}
}

// What is recorded is shown with what it says, escaped, and unknown stays unknown.
func TestOriginReports(t *testing.T) {
	rec := provenance.Record{Path: strings.Repeat("0", 32) + "-x", From: []string{"git+ssh://a\u202eb"}, Licences: []string{"MIT"}, Unfree: graph.Yes, How: "meta", When: 86400}
	l := learnedOf(rec)
	if l.Unfree == nil || !*l.Unfree || l.When != "1970-01-02T00:00:00Z" {
		t.Errorf("%+v", l)
	}
	if u := learnedOf(provenance.Record{Path: rec.Path}).Unfree; u != nil {
		t.Errorf("unknown is shown as %v", *u)
	}
	var b bytes.Buffer
	originList{Paths: []originPath{{l, []learned{l}}}, Damaged: 2}.print(&page{w: &b})
	recorded{New: []learned{l}}.print(&page{w: &b})
	for _, want := range []string{"/nix/store/" + rec.Path, `from git+ssh://a\u202eb  (meta, 1970-01-02T00:00:00Z)`, "licence MIT", "unfree", "2 records cannot be read"} {
		if !strings.Contains(b.String(), want) {
			t.Errorf("no %q in\n%s", want, &b)
		}
	}
	b.Reset()
	recorded{New: make([]learned, maxLearned+2)}.print(&page{w: &b})
	if !strings.Contains(b.String(), "2 more") {
		t.Errorf("%s", &b)
	}
}
