package move

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"io"
	"os"
	"path/filepath"
	"slices"
	"strings"

	"golang.org/x/sys/unix"

	"overkeep/overlay/layout"
	"overkeep/overlay/nixdb"
	"overkeep/overlay/plan"
	"overkeep/overlay/wipe"
)

// CleanResult says what was done so that nothing sealed is left on the system store's
// device, and what was not.
type CleanResult struct {
	Files    wipe.Report       `json:"files"` // what was overwritten in the store
	Logs     wipe.Report       `json:"logs"`  // and of build logs
	Derivers int               `json:"derivers"`
	Database nixdb.ScrubResult `json:"database"`
	Slack    []CleanedDir      `json:"slack"`
	Devices  []CleanedDevice   `json:"devices"`
	// Left says what could not be done, and why; empty means that a search of the
	// devices finds nothing.
	Left []string `json:"left,omitempty"`
}

// CleanedDir is a directory that held names.
type CleanedDir struct {
	Dir string `json:"dir"`
	wipe.SlackReport
}

// CleanedDevice is the file system that holds a directory.
type CleanedDevice struct {
	Dir string `json:"dir"`
	wipe.DeviceReport
}

// clean removes what is left of what this operation took out of the system store.
func (r *run) clean(ctx context.Context) (*CleanResult, error) {
	var paths []string
	for _, m := range r.op.Moves {
		if m.Kind == plan.Seal && r.moved[m.Path] || m.Kind == plan.Release && !r.moved[m.Path] {
			paths = append(paths, m.Path)
		}
	}
	drvs := map[string]bool{}
	for _, row := range r.sealed {
		if strings.HasSuffix(row.Path, ".drv") {
			drvs[base(row.Path)] = true
		}
		if row.Deriver != "" {
			drvs[base(row.Deriver)] = true
		}
	}
	var links []string
	for _, m := range r.res.Roots {
		links = append(links, filepath.Dir(m.From))
	}
	return r.World.clean(ctx, traces{paths: paths, drvs: keys(drvs), dirs: links, files: r.wiped})
}

// traces are what a clean looks for.
type traces struct {
	paths []string    // of the store
	drvs  []string    // base names, for their logs
	dirs  []string    // more directories whose file systems held something
	files wipe.Report // what was overwritten before
}

func keys[V any](m map[string]V) (out []string) {
	for k := range m {
		out = append(out, k)
	}
	slices.Sort(out)
	return out
}

// clean removes what the system's side tells of paths, and logs.
func (w *World) clean(ctx context.Context, t traces) (*CleanResult, error) {
	paths, drvs, dirs := t.paths, t.drvs, t.dirs
	c := &CleanResult{Files: t.files, Slack: []CleanedDir{}, Devices: []CleanedDevice{}}
	note := func(what string, err error) { c.Left = append(c.Left, fmt.Sprintf("%s: %v", what, err)) }
	// What is valid in the system store by now is no secret of ours.
	rows, err := valid(ctx, w.systemDB(), paths)
	if err != nil {
		return c, err
	}
	var names [][]byte
	sealed := map[string]bool{}
	for _, p := range paths {
		if _, ok := rows[p]; ok {
			continue
		}
		sealed[base(p)] = true
		names = append(names, hashPart(p))
	}
	var private []string // derivations that are not in the system store
	known, err := valid(ctx, w.systemDB(), inStore(drvs))
	if err != nil {
		return c, err
	}
	for _, d := range drvs {
		if _, ok := known[storeDir+"/"+d]; !ok || sealed[d] {
			private = append(private, d)
		}
	}
	if c.Logs, err = w.cleanLogs(ctx, drvs); err != nil {
		if ctx.Err() != nil {
			return c, err
		}
		note("build logs", err)
	}
	if c.Derivers, err = nixdb.ClearDeriver(ctx, w.systemDB(), inStore(private)); err != nil {
		note("derivers in Nix's database", err)
	}
	for _, d := range private {
		names = append(names, hashPart(d))
	}
	slices.SortFunc(names, bytes.Compare)
	names = slices.CompactFunc(names, bytes.Equal)
	if c.Database, err = nixdb.Scrub(ctx, w.systemDB(), names); err != nil {
		note("Nix's database", err)
	}
	if err == nil && c.Database.Left > 0 {
		c.Left = append(c.Left, fmt.Sprintf("Nix's database: %d copies of names in its free pages", c.Database.Left))
	}
	if c.Database.Live > 0 {
		c.Left = append(c.Left, "Nix's database names them still: a derivation that makes them is in the system store (seal it, too)")
	}
	w.cleanSlack(ctx, c, names, drvs, note)
	seen := map[uint64]bool{}
	device := func(name string, dir *os.File) {
		var st unix.Stat_t
		if err := unix.Fstat(int(dir.Fd()), &st); err != nil || seen[uint64(st.Dev)] {
			return
		}
		seen[uint64(st.Dev)] = true
		rep, err := wipe.Device(ctx, dir)
		if err == nil && rep.Trim != wipe.Done && name == storeDir {
			// No trim clears the blocks of long links' targets: they are used once more.
			var left int
			if left, err = wipe.Reuse(ctx, dir, t.files.Blocks); err == nil {
				rep, err = wipe.Device(ctx, dir)
			}
			if left > 0 {
				c.Left = append(c.Left, fmt.Sprintf("%d blocks with targets of symbolic links", left))
			}
		}
		if err != nil {
			note("device of "+name, err)
		}
		if rep.Trim != wipe.Done || rep.Checkpoint != wipe.Done {
			c.Left = append(c.Left, rep.Notes...)
		}
		c.Devices = append(c.Devices, CleanedDevice{name, rep})
	}
	device(storeDir, w.Lower)
	for _, d := range append([]string{filepath.Join(w.System, "db"), logDir, "/nix/var/nix/gcroots"}, dirs...) {
		f, err := w.Outside(d)
		if err != nil {
			continue // gone, and with it what was there
		}
		device(d, f)
		f.Close()
	}
	return c, ctx.Err()
}

const (
	storeDir = "/nix/store"
	logDir   = "/nix/var/log/nix" // the system's; in the view it is covered by the keep's
)

// cleanSlack clears old copies of names in the directories that had them.
func (w *World) cleanSlack(ctx context.Context, c *CleanResult, names [][]byte, drvs []string, note func(string, error)) {
	slack := func(name string, dir *os.File, names [][]byte) {
		if len(names) == 0 {
			return
		}
		rep, err := wipe.Slack(ctx, dir, names)
		if err != nil {
			note("directory "+name, err)
			return
		}
		if rep.Looked != wipe.Done || rep.After > 0 {
			c.Left = append(c.Left, rep.Notes...)
		}
		c.Slack = append(c.Slack, CleanedDir{name, rep})
	}
	// No personal collection may come upon the entries that this puts there: it would
	// give up at them (see newStage).
	if lock, err := gcLock(ctx, w.personalGC(), unix.LOCK_SH); err != nil {
		note("directory "+storeDir, err)
	} else {
		slack(storeDir, w.Lower, names)
		lock.Close()
	}
	if pins, err := os.Open(w.Keep.Pins()); err == nil {
		slack(w.Keep.Pins(), pins, names)
		pins.Close()
	}
	if links, err := openAt(w.Lower, ".links"); err == nil {
		var hashes [][]byte
		for _, n := range c.Files.LinkNames {
			hashes = append(hashes, []byte(n))
		}
		slack(storeDir+"/.links", links, hashes)
		links.Close()
	}
	// A log's directory has the first two letters of the hash, its name the rest.
	of := map[string][][]byte{}
	for _, d := range drvs {
		of[d[:2]] = append(of[d[:2]], hashPart(d)[2:])
	}
	for dir, names := range of {
		name := filepath.Join(logDir, "drvs", dir)
		if f, err := w.Outside(name); err == nil {
			slack(name, f, names)
			f.Close()
		}
	}
}

func inStore(bases []string) (out []string) {
	for _, b := range bases {
		out = append(out, storeDir+"/"+b)
	}
	return out
}

// Outside opens a directory of the machine as it is outside the view.
func (w *World) Outside(dir string) (*os.File, error) {
	fd, err := unix.Openat2(int(w.Host.Fd()), strings.TrimPrefix(dir, "/"), &unix.OpenHow{
		Flags: unix.O_RDONLY | unix.O_DIRECTORY | unix.O_CLOEXEC, Resolve: unix.RESOLVE_IN_ROOT | unix.RESOLVE_NO_MAGICLINKS})
	if err != nil {
		return nil, &os.PathError{Op: "open", Path: dir, Err: err}
	}
	return os.NewFile(uintptr(fd), dir), nil
}

// maxLog bounds the log that is carried over; a longer one is wiped all the same.
const maxLog = 1 << 30

// cleanLogs carries the build logs of derivations into the keep, where `nix log` in the
// view finds them, and wipes them outside.
func (w *World) cleanLogs(ctx context.Context, drvs []string) (wipe.Report, error) {
	logs, err := w.Outside(logDir)
	if errors.Is(err, unix.ENOENT) {
		return wipe.Report{}, nil
	}
	if err != nil {
		return wipe.Report{}, err
	}
	defer logs.Close()
	for _, d := range drvs {
		for _, suffix := range []string{"", ".bz2"} {
			if err := w.keepLog(logs, d, suffix); err != nil {
				return wipe.Report{}, err
			}
		}
	}
	return wipe.Logs(ctx, logs, drvs)
}

// keepLog copies one log, if it is there and the keep has none.
func (w *World) keepLog(logs *os.File, drv, suffix string) error {
	rel := filepath.Join("drvs", drv[:2], drv[2:]+suffix)
	fd, err := unix.Openat2(int(logs.Fd()), rel, &unix.OpenHow{Flags: unix.O_RDONLY | unix.O_NOFOLLOW | unix.O_NONBLOCK | unix.O_CLOEXEC,
		Resolve: unix.RESOLVE_BENEATH | unix.RESOLVE_NO_SYMLINKS})
	if errors.Is(err, unix.ENOENT) {
		return nil
	}
	if err != nil {
		return err
	}
	from := os.NewFile(uintptr(fd), "build log")
	defer from.Close()
	dir := w.Keep.Log()
	for _, sub := range []string{"drvs", drv[:2]} {
		dir = filepath.Join(dir, sub)
		if err := os.Mkdir(dir, 0o755); err != nil && !errors.Is(err, os.ErrExist) {
			return err
		}
		if err := os.Chmod(dir, 0o755); err != nil { // as Nix makes it, whatever our umask
			return err
		}
	}
	name := filepath.Join(dir, drv[2:]+suffix)
	if _, err := os.Lstat(name); err == nil {
		return nil
	}
	to, err := os.OpenFile(name+".new", os.O_CREATE|os.O_TRUNC|os.O_WRONLY|unix.O_NOFOLLOW, 0o644)
	if err != nil {
		return err
	}
	_, err = io.Copy(to, io.LimitReader(from, maxLog))
	if err == nil {
		err = to.Chmod(0o644)
	}
	if err == nil {
		err = fsync(to)
	}
	if err := errors.Join(err, to.Close()); err != nil {
		_ = os.Remove(to.Name())
		return err
	}
	return os.Rename(to.Name(), name)
}

// Wipe removes what the system's side still tells of paths that have been sealed
// before and of private, which are paths of the keep.
func (w *World) Wipe(ctx context.Context, private []nixdb.Info) (*CleanResult, error) {
	past, err := w.History()
	if err != nil {
		return nil, err
	}
	paths, drvs := map[string]bool{}, map[string]bool{}
	add := func(rows []nixdb.Info) {
		for _, row := range rows {
			paths[row.Path] = true
			if strings.HasSuffix(row.Path, ".drv") {
				drvs[base(row.Path)] = true
			} else if row.Deriver != "" {
				drvs[base(row.Deriver)] = true
			}
		}
	}
	for _, p := range past {
		add(p.Sealed)
	}
	add(private)
	stage, err := newStage()
	if err != nil {
		return nil, err
	}
	j, err := create(w.journals(), event{Kind: Wipe, Stage: stage})
	if err != nil {
		return nil, err
	}
	defer j.close()
	c, err := w.clean(ctx, traces{paths: keys(paths), drvs: keys(drvs)})
	if err != nil {
		return c, errors.Join(err, j.add(event{Type: evEnd}))
	}
	if err := j.add(event{Type: evCleaned, Result: c}); err != nil {
		return c, err
	}
	return c, j.add(event{Type: evEnd})
}

// OwnRows are the rows of all paths that lie in an open keep and not in the system
// store: no other place may name them.
func OwnRows(ctx context.Context, k layout.Keep) ([]nixdb.Info, error) {
	db := filepath.Join(k.NixDB(), "db.sqlite")
	if _, err := os.Stat(db); errors.Is(err, os.ErrNotExist) {
		return nil, nil // nothing was ever built
	}
	all, err := nixdb.ReadLayered(ctx, db, k.Upper())
	if err != nil {
		return nil, err
	}
	var own []string
	for i, p := range all.Paths {
		if all.Own[i] {
			own = append(own, p)
		}
	}
	rows, err := valid(ctx, db, own)
	if err != nil {
		return nil, err
	}
	out := make([]nixdb.Info, 0, len(rows))
	for _, p := range own {
		if row, ok := rows[p]; ok {
			out = append(out, row)
		}
	}
	return out, nil
}

// Names are the hash parts that the system's side may not hold: of private, and of all
// that was sealed before, unless the system store has them.
func (w *World) Names(ctx context.Context, private []nixdb.Info) ([][]byte, error) {
	past, err := w.History()
	if err != nil {
		return nil, err
	}
	paths := map[string]bool{}
	for _, row := range private {
		paths[row.Path] = true
	}
	for _, p := range past {
		for _, row := range p.Sealed {
			paths[row.Path] = true
		}
	}
	rows, err := valid(ctx, w.systemDB(), keys(paths))
	if err != nil {
		return nil, err
	}
	var out [][]byte
	for _, p := range keys(paths) {
		if _, ok := rows[p]; !ok {
			out = append(out, hashPart(p))
		}
	}
	return out, nil
}

// hashPart is what identifies a path, and what nothing else looks like.
func hashPart(path string) []byte {
	hash, _, _ := strings.Cut(base(path), "-")
	return []byte(hash)
}
