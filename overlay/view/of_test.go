package view

import (
	"testing"

	"github.com/moby/sys/mountinfo"
)

func TestOf(t *testing.T) {
	overlay := func(at, options string) *mountinfo.Info {
		return &mountinfo.Info{Mountpoint: at, FSType: "overlay", VFSOptions: "rw,lowerdir=/nix/store," + options + ",xino=auto"}
	}
	alice := overlay("/nix/store", "upperdir=/run/overkeep/alice/k/store/upper,workdir=/run/overkeep/alice/k/store/work")
	for _, c := range []struct {
		name  string
		table Table
		want  string // root name
	}{
		{"none", Table{{Mountpoint: "/nix/store", FSType: "ext4"}}, ""},
		{"of another place", Table{overlay("/x", "upperdir=/run/overkeep/alice/k/store/upper")}, ""},
		{"of another maker", Table{overlay("/nix/store", "upperdir=/home/alice/upper")}, ""},
		{"no table", nil, ""},
		{"of another kind", Table{{Mountpoint: "/nix/store", FSType: "tmpfs", VFSOptions: alice.VFSOptions}}, ""},
		{"as a lower", Table{overlay("/nix/store", "lowerdir=/run/overkeep/bob/k/store/upper")}, ""},
		{"alice", Table{alice}, "/ alice"},
		{"below a root", Table{overlay("/nix/store", "upperdir=/srv/x/run/overkeep/bob/k/store/upper")}, "/srv/x bob"},
		{"the topmost", Table{alice, overlay("/nix/store", "upperdir=/run/overkeep/bob/k/store/upper")}, "/ bob"},
		{"no name", Table{overlay("/nix/store", "upperdir=/run/overkeep/../k/store/upper")}, ""},
	} {
		got := ""
		if k := c.table.keep(); k != nil {
			got = k.Root + " " + k.Name
		}
		if got != c.want {
			t.Errorf("%s: %q, want %q", c.name, got, c.want)
		}
	}
}
