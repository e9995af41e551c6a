package wipe

import (
	"context"
	"errors"
	"os"
)

// SlackReport says what Slack did.
type SlackReport struct {
	Before  int      `json:"before"`  // occurrences in the directory's blocks outside of entries
	After   int      `json:"after"`   // the same at the end
	Fillers int      `json:"fillers"` // entries created and removed
	Notes   []string `json:"notes,omitempty"`
}

// Slack removes old copies of names that stand in the blocks of directory dir itself
// (not below), beside its entries. It creates and removes entries of its own there.
func Slack(ctx context.Context, dir *os.File, names [][]byte) (SlackReport, error) {
	return SlackReport{}, errors.New("not built yet")
}
