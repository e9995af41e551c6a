package nixconf

import (
	"net/url"
	"strings"
	"testing"

	"overkeep/overlay/layout"
)

func config(t *testing.T, root string) Config {
	t.Helper()
	k, err := layout.New(root, "alice")
	if err != nil {
		t.Fatal(err)
	}
	return Config{Keep: k, User: "alice", LowerSocket: k.LowerSocketDir() + "/socket"}
}

// parse reads the store URL as Nix does: the query split first, then decoded once.
func parse(t *testing.T, s string) map[string]string {
	t.Helper()
	scheme, q, ok := strings.Cut(s, "://?")
	if !ok || scheme != "local-overlay" {
		t.Fatalf("store URL %q", s)
	}
	out := map[string]string{}
	for _, part := range strings.Split(q, "&") {
		k, v, _ := strings.Cut(part, "=")
		v, err := url.QueryUnescape(v)
		if err != nil {
			t.Fatal(err)
		}
		if _, twice := out[k]; twice {
			t.Errorf("parameter %q twice", k)
		}
		out[k] = v
	}
	return out
}

func TestStoreURL(t *testing.T) {
	c := config(t, "/")
	q := parse(t, c.StoreURL())
	for k, want := range map[string]string{
		"state":        "/run/overkeep/alice/k/nix",
		"log":          "/run/overkeep/alice/k/log",
		"upper-layer":  "/run/overkeep/alice/k/store/upper",
		"remount-hook": "/run/overkeep/alice/overkeep-remount",
		"lower-store":  "unix:///run/overkeep/alice/lower/socket?path-info-cache-size=0",
	} {
		if q[k] != want {
			t.Errorf("%s = %q, want %q", k, q[k], want)
		}
	}
	if strings.Count(c.StoreURL(), "?") != 1 {
		t.Errorf("the nested URL is not percent-encoded: %q", c.StoreURL())
	}
}

// Everything the personal daemon writes lies inside the volume.
func TestEverythingIsInsideTheVolume(t *testing.T) {
	c := config(t, "/srv/x")
	in := c.Keep.Volume() + "/"
	q := parse(t, c.StoreURL())
	for _, k := range []string{"state", "log", "upper-layer"} {
		if !strings.HasPrefix(q[k], in) {
			t.Errorf("%s = %q, outside the volume", k, q[k])
		}
	}
	for _, e := range c.Environment("/usr/bin") {
		k, v, _ := strings.Cut(e, "=")
		switch k {
		case "HOME", "TMPDIR", "XDG_CACHE_HOME":
			if !strings.HasPrefix(v, in) {
				t.Errorf("%s, outside the volume", e)
			}
		case "NIX_STATE_DIR":
			t.Error("NIX_STATE_DIR would part the lock files of the build users")
		}
	}
}

func TestSettings(t *testing.T) {
	c := config(t, "/")
	get := func(c Config) map[string]string {
		out := map[string]string{}
		for _, l := range c.Lines() {
			if l.Why == "" {
				t.Errorf("%s has no reason", l.Key)
			}
			if strings.ContainsAny(l.Key+l.Value, "\n\r") {
				t.Errorf("%s spans lines", l.Key)
			}
			out[l.Key] = l.Value
		}
		return out
	}
	s := get(c)
	for k, want := range map[string]string{
		"sandbox": "true", "sandbox-fallback": "false", "keep-outputs": "true", "keep-derivations": "true",
		"auto-optimise-store": "false", "builders": "", "post-build-hook": "", "allowed-users": "alice root",
		"trusted-users": "root", "substituters": "", "build-dir": "/run/overkeep/alice/k/builds",
	} {
		if got, ok := s[k]; !ok || got != want {
			t.Errorf("%s = %q (set: %v), want %q", k, got, ok, want)
		}
	}
	if _, ok := s["json-log-path"]; !ok {
		t.Error("the system's log path holds")
	}
	c.OldNix = true
	if _, ok := get(c)["json-log-path"]; ok {
		t.Error("an old Nix is given a setting that it does not know")
	}
	c.Substituters = Inherit
	if _, ok := get(c)["substituters"]; ok {
		t.Error("inherit still sets substituters")
	}
	text := c.Render()
	if i, j := strings.Index(text, "!include /etc/nix/nix.conf"), strings.Index(text, "\nstore = "); i < 0 || j < i {
		t.Error("the system's settings must come first, ours override them")
	}
}
