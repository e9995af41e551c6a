package layout

import (
	"errors"
	"strings"
	"testing"
)

func TestNewRefusesHostileNames(t *testing.T) {
	for _, name := range []string{
		"", ".", "..", "a/b", "../x", "-x", ".x", "a b", "a,b", "a:b", "A", "ä", "a\x00b", "a\nb",
		strings.Repeat("a", 33), strings.Repeat("a", 255), "a+b", "a%b", "$x",
	} {
		var e *NameError
		if _, err := New("", name); !errors.As(err, &e) {
			t.Errorf("name %q: error %v, want *NameError", name, err)
		}
	}
	for _, name := range []string{"alice", "a", "_x", "alice-acme", "a.b", "0", strings.Repeat("a", 32)} {
		if _, err := New("", name); err != nil {
			t.Errorf("name %q: %v", name, err)
		}
	}
}

func TestRootMustBePlain(t *testing.T) {
	for _, root := range []string{"x", "./x", "/a b", "/a,b", "/a:b", "/a+b", "/a\x00", "/ä", "/" + strings.Repeat("x", 60)} {
		if _, err := New(root, "alice"); err == nil {
			t.Errorf("root %q accepted", root)
		}
	}
	k, err := New("/srv/x/../y/", "alice")
	if err != nil || k.Root != "/srv/y" {
		t.Fatalf("got %+v, %v; want root /srv/y", k, err)
	}
}

// Everything of a keep hangs below the root, except its pins, which are gcroots
// of the system store and must not collide between two roots.
func TestPathsHangBelowTheRoot(t *testing.T) {
	k, err := New("/srv/two", "alice")
	if err != nil {
		t.Fatal(err)
	}
	for _, p := range []string{
		k.StateDir(), k.Header(), k.Slots(), k.VolumeDir(), k.Building(), k.RunDir(), k.RunLock(), k.NamespaceDir(),
		k.Namespace(), k.Volume(), k.FSMount(), k.SystemSocketDir(), k.LowerSocketDir(), k.SocketDir(), k.NixConfDir(), k.RemountHook(),
		k.InnerHeader(), k.Upper(), k.Work(), k.NixState(), k.NixDB(), k.Log(), k.Builds(), k.DaemonHome(), k.Tmp(), k.Home("x"),
		ConfigFile(k.Root), StateRoot(k.Root), RunRoot(k.Root),
	} {
		if !strings.HasPrefix(p, "/srv/two/") {
			t.Errorf("%q is not below the root", p)
		}
	}
	other, _ := New("/srv/three", "alice")
	main, _ := New("/", "alice")
	if k.Pins() == other.Pins() || k.Pins() == main.Pins() {
		t.Errorf("two roots share the pins %q", k.Pins())
	}
}

// No root is "/", and never where somebody happens to stand.
func TestNoRootIsSlash(t *testing.T) {
	for _, p := range []string{ConfigFile(""), StateRoot(""), RunRoot("")} {
		if !strings.HasPrefix(p, "/") {
			t.Errorf("%q is relative", p)
		}
	}
}

// A socket's path must fit sockaddr_un (108 bytes with its NUL, unix(7)), also
// with the longest root and name.
func TestSocketPathsFit(t *testing.T) {
	k, err := New("/"+strings.Repeat("r", maxRoot-1), strings.Repeat("n", 32))
	if err != nil {
		t.Fatal(err)
	}
	for _, p := range []string{k.SocketDir() + "/socket", k.LowerSocketDir() + "/control", k.SystemSocketDir() + "/socket", k.NixState() + "/gc-socket/socket"} {
		if len(p) > 107 {
			t.Errorf("%q has %d bytes", p, len(p))
		}
	}
}
