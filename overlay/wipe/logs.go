package wipe

import (
	"context"
	"errors"
	"os"
	"path"
	"strings"

	"golang.org/x/sys/unix"

	"overkeep/overlay/drv/storepath"
)

// LogFiles are the places, below the log directory (…/log/nix), where Nix keeps the
// build log of a derivation, by its base name HASH-NAME.drv (libstore/local-fs-store.cc,
// getBuildLogExact; compressed unless compress-build-log is off).
func LogFiles(drv string) []string {
	if !storepath.IsBase(drv) || !strings.HasSuffix(drv, ".drv") {
		return nil
	}
	var files []string
	for _, f := range []string{path.Join("drvs", drv[:2], drv[2:]), path.Join("drvs", drv)} {
		files = append(files, f, f+".bz2")
	}
	return files
}

// Logs finds the build logs of derivations (base names HASH-NAME.drv) below logs
// (…/log/nix) and wipes them as Trees does. What has no log is no error; it may be
// repeated. The text of a log lies compressed, its name does not.
func Logs(ctx context.Context, logs *os.File, drvs []string) (r Report, err error) {
	// By directory, so that each is synced once.
	in := map[string][]string{}
	for _, d := range drvs {
		for _, f := range LogFiles(d) {
			in[path.Dir(f)] = append(in[path.Dir(f)], path.Base(f))
		}
	}
	for dir, names := range in {
		how := unix.OpenHow{Flags: unix.O_RDONLY | unix.O_DIRECTORY | unix.O_CLOEXEC,
			Resolve: unix.RESOLVE_BENEATH | unix.RESOLVE_NO_SYMLINKS | unix.RESOLVE_NO_XDEV}
		var fd int
		err := retry(func() (err error) { fd, err = unix.Openat2(int(logs.Fd()), dir, &how); return err })
		if errors.Is(err, unix.ENOENT) {
			continue
		}
		if err != nil {
			return r, quoted("open", dir, err)
		}
		d := os.NewFile(uintptr(fd), dir)
		some, err := Trees(ctx, d, names, Options{})
		r.Add(some)
		if err := errors.Join(err, d.Close()); err != nil {
			return r, err
		}
	}
	return r, nil
}
