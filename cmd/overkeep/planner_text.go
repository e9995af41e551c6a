package main

import (
	"os"
	"strings"

	"golang.org/x/sys/unix"

	"overkeep/overlay/plan"
)

// storeMedium is what the file system of the system store is like.
func storeMedium(store *os.File) plan.Medium {
	var m plan.Medium
	var fs unix.Statfs_t
	if unix.Fstatfs(int(store.Fd()), &fs) == nil && fs.Type == unix.EXT4_SUPER_MAGIC {
		m.FSType = "ext4"
	}
	return m
}

type planReport struct{ *plan.Plan }

func (r planReport) print(p *page) {
	for _, g := range r.Groups() {
		p.printf("%s %d %s\n", g.Kind, g.Paths, g.Reason.Reason)
	}
	for _, b := range r.Blocked {
		p.printf("blocked %s: %s\n", b.Path, blockedWords(&b))
	}
}

func (m *planner) report(p *plan.Plan) report { return planReport{p} }

func (m *planner) text(a *app, p *plan.Plan) string {
	b := &strings.Builder{}
	planReport{p}.print(&page{w: b})
	return b.String()
}

func blockedWords(b *plan.Blocked) string { return string(b.Why) + " " + b.By }
