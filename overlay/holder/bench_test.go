package holder

import (
	"context"
	"os/exec"
	"testing"
)

// BenchmarkScan looks at a machine with 300 more processes, of which none holds
// anything: the usual case of a lock.
func BenchmarkScan(b *testing.B) {
	for _, kind := range []string{"image", "dir"} {
		b.Run(kind, func(b *testing.B) {
			bed := newBed(b, kind, "")
			for range 300 {
				cmd := exec.Command("sleep", "infinity")
				if err := cmd.Start(); err != nil {
					b.Fatal(err)
				}
				b.Cleanup(func() { cmd.Process.Kill(); cmd.Wait() })
			}
			b.ReportAllocs()
			for b.Loop() {
				if got, err := Scan(context.Background(), bed.target, offLimits); err != nil || len(got) != 0 {
					b.Fatalf("got %v, %v", got, err)
				}
			}
		})
	}
}
