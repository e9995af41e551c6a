package main

import (
	"context"
	"strings"

	"github.com/spf13/cobra"

	"overkeep/systemd/keep"
)

type renderOptions struct {
	keep    string
	explain bool
}

func newRender(a *app) *cobra.Command {
	var o renderOptions
	cmd := exits(&cobra.Command{
		Use:     "render [KEEP]",
		Short:   "Show the configuration of a keep's view",
		GroupID: "look",
		Long: `Show what unlock writes and mounts: the personal nix-daemon's nix.conf with its
store URL, which nobody needs to write by hand, the mounts as commands of
mount(8), and the environment. With --explain every line comes with its reason.`,
		Example: `  sudo overkeep render
  sudo overkeep render alice --explain`,
		Args:              a.args(0, 1),
		ValidArgsFunction: a.completeKeep,
		RunE: func(cmd *cobra.Command, args []string) error {
			o.keep = first(args)
			return runRender(cmd.Context(), a, o)
		},
	}, exitNoKeep, exitNotRoot)
	cmd.Flags().BoolVar(&o.explain, "explain", false, "say why, line by line")
	return cmd
}

func runRender(_ context.Context, a *app, o renderOptions) error {
	k, err := a.open(o.keep)
	if err != nil {
		return err
	}
	r, err := k.Render()
	if err != nil {
		return err
	}
	return a.ui.report(rendered{r, o.explain})
}

// rendered is the result of render.
type rendered struct {
	*keep.Rendered
	explain bool
}

func (r rendered) print(p *page) {
	p.printf("%s\n", p.style("1", "# nix.conf of the personal nix-daemon"))
	blank := true // none at the start
	for _, l := range strings.Split(strings.TrimSpace(r.NixConf), "\n") {
		if !r.explain && (strings.HasPrefix(l, "#") || l == "") {
			continue
		}
		if l == "" && blank {
			continue
		}
		blank = l == ""
		p.printf("%s\n", printable(l))
	}
	p.printf("\n%s\n", p.style("1", "# mounts, in the user's view only, after the volume itself"))
	for _, m := range r.Mounts {
		if r.explain {
			p.printf("\n# %s\n", printable(m.Why))
		}
		p.printf("%s\n", printable(m.Command()))
	}
	p.printf("\n%s\n", p.style("1", "# environment of a session in the view"))
	if r.explain {
		p.printf("# stock nix needs none; this sends temporary files of every program into the keep\n")
	}
	for _, e := range r.Env {
		p.printf("%s\n", printable(e))
	}
}
