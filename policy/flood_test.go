package policy

import (
	"errors"
	"fmt"
	"runtime"
	"strings"
	"testing"
)

// A user's file is read by root, whatever the user wrote: ten thousand mistakes in it
// cost no more than those that are told.
func TestManyMistakes(t *testing.T) {
	const words = 10_000
	var b strings.Builder
	for i := range 3000 {
		fmt.Fprintf(&b, "let %s%04d = unfree\n", strings.Repeat("a", 40), i)
	}
	b.WriteString("personal unfre")
	for i := range words - 1 {
		fmt.Fprintf(&b, " or %s%04d", strings.Repeat("b", 40), i)
	}
	var before, after runtime.MemStats
	runtime.ReadMemStats(&before)
	_, err := Parse(Source{Name: "alice", Text: []byte(b.String())})
	var errs *Errors
	if !errors.As(err, &errs) || len(errs.List) != MaxErrors || errs.More != words-MaxErrors {
		t.Fatalf("%.300v", err)
	}
	runtime.ReadMemStats(&after)
	// To look for what one word may have meant takes 4 MB here.
	if used := after.TotalAlloc - before.TotalAlloc; used > 256<<20 {
		t.Errorf("%d bytes were allocated to tell %d mistakes", used, MaxErrors)
	}
}

// All files of a policy together are bounded, too.
func TestTotalSize(t *testing.T) {
	var sources []Source
	for i := range MaxText/MaxSource + 1 {
		sources = append(sources, Source{Name: fmt.Sprint(i), Text: []byte(strings.Repeat("\n", MaxSource-20) + "personal unfree\n")})
	}
	if _, err := Parse(sources[1:]...); err != nil {
		t.Error(err)
	}
	if _, err := Parse(sources...); err == nil || err.Error() != "4:1:1: the policy files have more than 4194304 bytes together" {
		t.Errorf("got %v", err)
	}
}
