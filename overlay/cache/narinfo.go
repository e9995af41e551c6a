package cache

import (
	"errors"
	"fmt"
	"slices"
	"strconv"
	"strings"

	"overkeep/overlay/drv/storepath"
)

// maxField bounds a signature and a content address, in bytes; Nix writes some hundred.
const maxField = 4096

// narinfo is the file that announces a path, as Nix writes it (libstore/nar-info.cc). It
// depends on the facts alone: the archive is not compressed, so its file is the NAR.
func narinfo(in *Info) (name string, text []byte, err error) {
	base, err := baseOf("path", in.Path)
	if err != nil {
		return "", nil, err
	}
	if in.NarSize <= 0 {
		return "", nil, fmt.Errorf("%w: %q has a size of %d", ErrInfo, in.Path, in.NarSize)
	}
	hash := "sha256:" + storepath.Base32(in.NarHash[:])
	var b strings.Builder
	line := func(key, value string) { b.WriteString(key + ": " + value + "\n") }
	line("StorePath", in.Path)
	line("URL", narDir+"/"+narName(in))
	line("Compression", "none")
	line("FileHash", hash)
	line("FileSize", strconv.FormatInt(in.NarSize, 10))
	line("NarHash", hash)
	line("NarSize", strconv.FormatInt(in.NarSize, 10))
	refs := make([]string, len(in.Refs))
	for i, r := range in.Refs {
		if refs[i], err = baseOf("reference", r); err != nil {
			return "", nil, err
		}
	}
	slices.Sort(refs)
	line("References", strings.Join(slices.Compact(refs), " "))
	if in.Deriver != "" {
		d, err := baseOf("deriver", in.Deriver)
		if err != nil {
			return "", nil, err
		}
		line("Deriver", d)
	}
	for _, s := range in.Sigs {
		if err := field("signature", s); err != nil {
			return "", nil, err
		}
		if !strings.Contains(s, ":") {
			return "", nil, fmt.Errorf("%w: signature %q names no key", ErrInfo, s)
		}
		line("Sig", s)
	}
	if in.CA != "" {
		if err := field("content address", in.CA); err != nil {
			return "", nil, err
		}
		line("CA", in.CA)
	}
	return base[:32] + ".narinfo", []byte(b.String()), nil
}

func narName(in *Info) string { return storepath.Base32(in.NarHash[:]) + ".nar" }

func baseOf(what, path string) (string, error) {
	base, ok := storepath.Base(storepath.Dir, path)
	if !ok {
		return "", fmt.Errorf("%w: %s %.300q is no path of the store", ErrInfo, what, path)
	}
	return base, nil
}

// field refuses what would be another line, or another value, to who reads it.
func field(what, s string) error {
	for i := range len(s) {
		if s[i] <= ' ' || s[i] >= 0x7f {
			return fmt.Errorf("%w: %s %.300q", ErrInfo, what, s)
		}
	}
	if s == "" || len(s) > maxField {
		return fmt.Errorf("%w: %s of %d bytes", ErrInfo, what, len(s))
	}
	return nil
}

var errTwice = errors.New("is there twice")
