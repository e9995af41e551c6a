package main

import (
	"runtime"
	"runtime/debug"

	"github.com/spf13/cobra"
)

func newVersion(a *app) *cobra.Command {
	return &cobra.Command{
		Use:     "version",
		Short:   "Show the version",
		GroupID: "look",
		Long:    `Show the version, the commit it was built from, and the Go that built it.`,
		Example: `  overkeep version
  overkeep version --json`,
		Args: a.args(0, 0),
		RunE: func(*cobra.Command, []string) error { return a.ui.report(buildVersion()) },
	}
}

type versionReport struct {
	Version  string `json:"version"`
	Commit   string `json:"commit,omitempty"`
	Modified bool   `json:"modified,omitempty"`
	Go       string `json:"go"`
	Platform string `json:"platform"`
	time     string // of the commit
}

func buildVersion() versionReport {
	v := versionReport{Version: "(devel)", Go: runtime.Version(), Platform: runtime.GOOS + "/" + runtime.GOARCH}
	info, ok := debug.ReadBuildInfo()
	if !ok {
		return v
	}
	if info.Main.Version != "" {
		v.Version = info.Main.Version
	}
	for _, s := range info.Settings {
		switch s.Key {
		case "vcs.revision":
			v.Commit = s.Value
		case "vcs.time":
			v.time = s.Value
		case "vcs.modified":
			v.Modified = s.Value == "true"
		}
	}
	return v
}

func (v versionReport) print(p *page) {
	p.printf("overkeep %s", v.Version)
	if v.Commit != "" {
		p.printf(" (commit %.12s", v.Commit)
		if v.Modified {
			p.printf(", with changes")
		}
		p.printf(")")
	}
	p.printf(", %s, %s\n", v.Go, v.Platform)
}
