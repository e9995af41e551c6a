package lower

import (
	"errors"
	"testing"

	"github.com/google/go-cmp/cmp"
)

// Our own client gets the roots; through the proxy nobody does.
func TestFindRoots(t *testing.T) {
	f, socket := startFake(t, "x")
	got, err := dialed(t, socket).FindRoots(t.Context())
	if err != nil {
		t.Fatal(err)
	}
	if d := cmp.Diff([]Root{{"/proc/7/exe", p("x")}, {"/home/\xff\n", p("y")}}, got); d != "" {
		t.Error(d)
	}
	f.log()
	proxy, _ := startProxy(t, &Proxy{Upstream: socket})
	_, err = dialed(t, proxy).FindRoots(t.Context())
	var told *DaemonError
	if !errors.As(err, &told) || told.Op != opFindRoots {
		t.Errorf("through the proxy: %v", err)
	}
	for _, op := range f.log() {
		if op == "FindRoots" {
			t.Error("the proxy asked for roots")
		}
	}
}
