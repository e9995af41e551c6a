// Package cache writes store paths out as a stock binary cache: a directory that
// `nix copy --from file://DIR` reads (the manual's "Local Binary Cache Store").
//
// It promises: a file under a name that Nix reads is whole or absent; a path is announced
// (HASH.narinfo) only when its archive is on disk and had the hash that was asked for; and
// what an earlier, interrupted call finished is not done again. Archives are not
// compressed, so whoever can read the directory can read the files.
//
// Start with Write. It is for taking everything out of a keep; it is no server, signs
// nothing, and removes no path.
package cache

import (
	"bytes"
	"context"
	"crypto/sha256"
	"errors"
	"fmt"
	"io"
	"os"
	"runtime"
	"strings"
	"sync"

	"golang.org/x/sys/unix"

	"overkeep/overlay/drv/storepath"
	"overkeep/overlay/tree"
)

// ErrInfo: what is said of a path cannot be written in a narinfo.
var ErrInfo = errors.New("not the facts of a store path")

// ErrForeign: the directory is the cache of another store, or something is in the way.
var ErrForeign = errors.New("not a binary cache of this store")

// Info is what a Nix database says of a path.
type Info struct {
	Path    string // absolute, in /nix/store
	NarHash [sha256.Size]byte
	NarSize int64    // bytes
	Refs    []string // absolute; in any order
	Deriver string   // absolute or empty
	Sigs    []string // "KEY:BASE64"
	CA      string   // content address or empty
}

// Options of Write.
type Options struct {
	UID, GID int // own all that is made; files have mode 0600, directories 0700
	Workers  int // archives written at a time; 0 is tree.DefaultWorkers
	// Progress is as in tree.Options; what is kept counts as well. One call at a time.
	Progress func(n int64)
	// Done, if not nil, is called for every path that was tried, one call at a time, in
	// no order: kept if an earlier call had announced it. A path without an error is
	// announced by then, but durably so only when Write returns.
	Done func(i int, kept bool, err error)
}

// The names in a cache.
const (
	infoName = "nix-cache-info"
	narDir   = "nar"
	// suffix ends the names of files that are being written, which Nix does not read.
	suffix = ".overkeep-tmp"
)

// batch is how many archives are announced at a time: syncfs(2) comes between.
const batch = 512

// Write writes infos, whose trees lie by their base names in store, to the directory dst.
// Other files there are left alone. A path that cannot be read, or whose tree does not have
// its hash (*tree.MismatchError), is not announced and the others are; Done gets the
// error, and the error returned joins all. Facts that make no sense are ErrInfo before anything
// is written. Write returns early when ctx ends or dst cannot be written to. It may be repeated
// after any of these.
func Write(ctx context.Context, dst, store *os.File, infos []Info, o Options) error {
	defer runtime.KeepAlive(dst)
	w := &writing{ctx: ctx, dst: int(dst.Fd()), store: store, infos: infos, o: o, files: make([]out, len(infos))}
	seen := make(map[string]bool, len(infos))
	for i := range infos {
		name, text, err := narinfo(&infos[i])
		if err == nil && seen[name] {
			err = fmt.Errorf("%w: %q %w", ErrInfo, infos[i].Path, errTwice)
		}
		if err != nil {
			return err
		}
		seen[name] = true
		w.files[i] = out{name, text}
	}
	if err := ctx.Err(); err != nil {
		return err
	}
	if err := w.begin(); err != nil {
		return err
	}
	defer unix.Close(w.nar)
	var errs []error
	for from := 0; from < len(infos); from += batch {
		more, err := w.batch(from, min(from+batch, len(infos)))
		errs = append(errs, more...)
		if err != nil {
			return errors.Join(append(errs, err)...)
		}
	}
	return errors.Join(errs...)
}

// out is a narinfo.
type out struct {
	name string
	text []byte
}

type writing struct {
	ctx      context.Context
	dst, nar int
	store    *os.File
	infos    []Info
	files    []out
	o        Options
	mu       sync.Mutex // of the callers' functions
}

// begin makes what every cache has.
func (w *writing) begin() error {
	err := again(func() error { return unix.Mkdirat(w.dst, narDir, 0o700) })
	if err != nil && !errors.Is(err, unix.EEXIST) {
		return failed("make", narDir, err)
	}
	made := err == nil
	err = again(func() (err error) {
		w.nar, err = unix.Openat(w.dst, narDir, unix.O_RDONLY|unix.O_DIRECTORY|unix.O_NOFOLLOW|unix.O_CLOEXEC, 0)
		return err
	})
	if err != nil {
		if errors.Is(err, unix.ELOOP) || errors.Is(err, unix.ENOTDIR) {
			err = ErrForeign
		}
		return failed("open", narDir, err)
	}
	if made {
		err = again(func() error { return unix.Fchown(w.nar, w.o.UID, w.o.GID) })
	}
	if err == nil {
		err = w.info()
	}
	if err != nil {
		_ = unix.Close(w.nar)
		return err
	}
	return nil
}

// info writes nix-cache-info, or finds one for the same store.
func (w *writing) info() error {
	want := []byte("StoreDir: " + storepath.Dir + "\n")
	have, err := read(w.dst, infoName, 4096)
	switch {
	case errors.Is(err, unix.ENOENT):
	case err != nil:
		return failed("read", infoName, err)
	default:
		for line := range strings.Lines(string(have)) {
			if key, value, ok := strings.Cut(line, ":"); ok && key == "StoreDir" && strings.TrimSpace(value) == storepath.Dir {
				return nil
			}
		}
		if len(have) > 0 { // empty: torn by a power cut
			return failed("use", infoName, ErrForeign)
		}
	}
	return w.file(w.dst, infoName, func(f io.Writer) error { _, err := f.Write(want); return err })
}

// batch writes the archives of some paths, then announces them. Its error is of the
// directory; those of single paths are in errs.
func (w *writing) batch(from, to int) (errs []error, err error) {
	ctx, cancel := context.WithCancelCause(w.ctx)
	defer cancel(nil)
	results := make([]error, to-from)
	kept := make([]bool, to-from)
	tried := make([]bool, to-from)
	// Two paths with one content share its archive: the same worker does both.
	same := map[[sha256.Size]byte][]int{}
	var first []int
	for i := from; i < to; i++ {
		h := w.infos[i].NarHash
		if same[h] == nil {
			first = append(first, i)
		}
		same[h] = append(same[h], i)
	}
	next := 0
	take := func() int {
		w.mu.Lock()
		defer w.mu.Unlock()
		if next == len(first) || ctx.Err() != nil {
			return -1
		}
		next++
		return next - 1
	}
	var wait sync.WaitGroup
	workers := w.o.Workers
	if workers <= 0 {
		workers = tree.DefaultWorkers
	}
	for range min(workers, len(first)) {
		wait.Go(func() {
			for k := take(); k >= 0; k = take() {
				for _, i := range same[w.infos[first[k]].NarHash] {
					tried[i-from] = true
					var fatal bool
					kept[i-from], fatal, results[i-from] = w.path(ctx, i)
					if fatal {
						cancel(results[i-from])
						return
					}
				}
			}
		})
	}
	wait.Wait()
	cause := context.Cause(ctx)
	// What is announced must be on disk before; also after an error, so that the work is not lost.
	if err := again(func() error { return unix.Syncfs(w.dst) }); err != nil {
		return nil, failed("sync", narDir, err)
	}
	for i := range results {
		if !tried[i] {
			continue
		}
		if f := w.files[from+i]; results[i] == nil && !kept[i] {
			if err := w.file(w.dst, f.name, func(o io.Writer) error { _, err := o.Write(f.text); return err }); err != nil {
				return nil, err
			}
		}
		if results[i] != nil && cause == nil {
			errs = append(errs, results[i])
		}
		if w.o.Done != nil {
			w.o.Done(from+i, kept[i], results[i])
		}
	}
	if err := again(func() error { return unix.Syncfs(w.dst) }); err != nil {
		return nil, failed("sync", infoName, err)
	}
	return errs, cause
}

// path writes the archive of a path unless it is there. A fatal error ends everything.
func (w *writing) path(ctx context.Context, i int) (kept, fatal bool, err error) {
	in := &w.infos[i]
	if w.has(i) {
		w.progress(in.NarSize)
		return true, false, nil
	}
	base, _ := storepath.Base(storepath.Dir, in.Path) // narinfo saw that it is one
	o := tree.Options{}
	if w.o.Progress != nil {
		o.Progress = w.progress
	}
	err = w.file(w.nar, narName(in), func(f io.Writer) error {
		r, err := tree.Dump(ctx, f, w.store, base, o)
		switch {
		case err != nil:
			return err
		case r.NarHash != in.NarHash:
			return &tree.MismatchError{Name: base, Want: in.NarHash, Got: r.NarHash}
		case r.NarSize != in.NarSize:
			return fmt.Errorf("%w: %q has %d bytes as a NAR, not %d", ErrInfo, in.Path, r.NarSize, in.NarSize)
		}
		return nil
	})
	var ours *Error
	return false, errors.As(err, &ours), err
}

func (w *writing) progress(n int64) {
	if w.o.Progress != nil {
		w.mu.Lock()
		defer w.mu.Unlock()
		w.o.Progress(n)
	}
}

// has reports whether a path is announced with these very facts, and its archive is there.
// An archive was on disk before it was announced.
func (w *writing) has(i int) bool {
	f := w.files[i]
	have, err := read(w.dst, f.name, len(f.text)+1)
	if err != nil || !bytes.Equal(have, f.text) {
		return false
	}
	var st unix.Stat_t
	err = again(func() error { return unix.Fstatat(w.nar, narName(&w.infos[i]), &st, unix.AT_SYMLINK_NOFOLLOW) })
	return err == nil && st.Mode&unix.S_IFMT == unix.S_IFREG && st.Size == w.infos[i].NarSize
}
