package main

import (
	"strings"
	"testing"
)

func TestParseSize(t *testing.T) {
	for in, want := range map[string]int64{
		"0": 0, "1": 1, "512": 512, "512B": 512,
		"1K": 1 << 10, "1k": 1 << 10, "1KiB": 1 << 10, "1kib": 1 << 10,
		"512M": 512 << 20, "20G": 20 << 30, "20GiB": 20 << 30, "1T": 1 << 40, "1P": 1 << 50,
		"1024P": 1 << 60, "1152921504606846976": 1 << 60, "007M": 7 << 20,
	} {
		got, err := parseSize(in)
		if err != nil || got != want {
			t.Errorf("parseSize(%q) = %d, %v; want %d", in, got, err, want)
		}
	}
}

func TestParseSizeRefuses(t *testing.T) {
	for _, in := range []string{
		"", " ", "G", "B", "iB", "-1", "-20G", "+20G", "1.5G", "1,5G", "20 G", " 20G", "20G ", "20G\n",
		"20GB", "20gb", "20Gi", "20Gb", "20MM", "20GG", "20GiBiB", "20E", "20X", "0x10", "1e9", "١G", "２G", "20Ｇ",
		"1025P", "1152921504606846977", "9223372036854775807", "9223372036854775808", "18446744073709551616",
		"99999999999999999999", "9223372036854775807K", "16777216T", strings.Repeat("9", 1000), "20G\x00", "\xff", "inf", "NaN", "all",
	} {
		if got, err := parseSize(in); err == nil {
			t.Errorf("parseSize(%q) = %d, want an error", in, got)
		}
	}
}

func FuzzParseSize(f *testing.F) {
	for _, s := range []string{"20G", "512M", "1T", "1024P", "20GB", "-1", "", "9223372036854775807K"} {
		f.Add(s)
	}
	f.Fuzz(func(t *testing.T, s string) {
		n, err := parseSize(s)
		if err != nil {
			return
		}
		if n < 0 || n > maxSize {
			t.Fatalf("parseSize(%q) = %d", s, n)
		}
		// What is written as a whole multiple reads back as the same number.
		if w := formatSize(n); !strings.Contains(w, ".") {
			if again, err := parseSize(w); err != nil || again != n {
				t.Fatalf("parseSize(formatSize(%d) = %q) = %d, %v", n, w, again, err)
			}
		}
	})
}

func TestFormatSize(t *testing.T) {
	for in, want := range map[int64]string{
		0: "0B", 1: "1B", 1023: "1023B", 1 << 10: "1K", 1536: "1.5K", 20 << 30: "20G", 1 << 60: "1024P", 430080: "420K",
	} {
		if got := formatSize(in); got != want {
			t.Errorf("formatSize(%d) = %q, want %q", in, got, want)
		}
	}
}
