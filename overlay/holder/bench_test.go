package holder

import (
	"context"
	"os/exec"
	"testing"

	"golang.org/x/sys/unix"
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
			off := offLimits(1)
			skip := func(pid int) bool { return pid == 1 && off }
			b.ReportAllocs()
			before := cpuTime(b)
			for b.Loop() {
				if got, err := Scan(context.Background(), bed.target, skip); err != nil || len(got) != 0 {
					b.Fatalf("got %v, %v", got, err)
				}
			}
			// On a busy machine this tells more than the time that passed.
			b.ReportMetric(float64(cpuTime(b)-before)/1e6/float64(b.N), "cpu-ms/op")
		})
	}
}

func cpuTime(b *testing.B) int64 {
	var r unix.Rusage
	if err := unix.Getrusage(unix.RUSAGE_SELF, &r); err != nil {
		b.Fatal(err)
	}
	return r.Utime.Nano() + r.Stime.Nano()
}
