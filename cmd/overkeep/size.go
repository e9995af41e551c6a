package main

import (
	"fmt"
	"strconv"
	"strings"
)

// size is a number of bytes as a flag: 20G, 512M, 1T, binary multiples. It
// implements pflag.Value.
type size int64

// maxSize is 2^60 bytes, the most a volume takes.
const maxSize = 1 << 60

var sizeUnits = []struct {
	letter byte
	shift  uint
}{{'K', 10}, {'M', 20}, {'G', 30}, {'T', 40}, {'P', 50}}

// parseSize reads a whole number of bytes with an optional unit K, M, G, T or P
// (also written KiB and so on), at most 2^60. Nothing else: no sign, no
// fraction, no decimal unit, for nobody agrees on what 20GB is.
func parseSize(s string) (int64, error) {
	digits := strings.TrimRight(s, "BbiKkMmGgTtPp")
	unit := strings.ToUpper(s[len(digits):])
	if digits == "" || strings.Trim(digits, "0123456789") != "" || len(digits) > 19 {
		return 0, fmt.Errorf("%q is not a size; write it as 512M, 20G or 1T", s)
	}
	n, err := strconv.ParseInt(digits, 10, 64)
	if err != nil {
		return 0, fmt.Errorf("%q is more than 2^60 bytes", s)
	}
	shift, ok := unitShift(unit)
	if !ok {
		return 0, fmt.Errorf("%q is not a size; the units are K, M, G, T and P, each 1024 of the one before", s)
	}
	if n > maxSize>>shift {
		return 0, fmt.Errorf("%q is more than 2^60 bytes", s)
	}
	return n << shift, nil
}

func unitShift(unit string) (uint, bool) {
	if unit == "" || unit == "B" {
		return 0, true
	}
	for _, u := range sizeUnits {
		if unit == string(u.letter) || unit == string(u.letter)+"IB" {
			return u.shift, true
		}
	}
	return 0, false
}

// formatSize writes n in the largest unit that divides it, or with one decimal.
func formatSize(n int64) string { return string(appendSize(nil, n)) }

func appendSize(b []byte, n int64) []byte {
	for i := len(sizeUnits) - 1; i >= 0; i-- {
		u := sizeUnits[i]
		if n < 1<<u.shift {
			continue
		}
		whole, rest := n>>u.shift, n&(1<<u.shift-1)
		if rest != 0 {
			tenths := (rest>>(u.shift-10)*10 + 1<<9) >> 10 // 10 bits of the rest are enough for one decimal
			whole, rest = whole+tenths/10, tenths%10
			b = strconv.AppendInt(b, whole, 10)
			return append(b, '.', byte('0'+rest), u.letter)
		}
		return append(strconv.AppendInt(b, whole, 10), u.letter)
	}
	return append(strconv.AppendInt(b, n, 10), 'B')
}

func (s *size) String() string { return formatSize(int64(*s)) }
func (s *size) Type() string   { return "SIZE" }
func (s *size) Set(v string) error {
	n, err := parseSize(v)
	if err == nil {
		*s = size(n)
	}
	return err
}
