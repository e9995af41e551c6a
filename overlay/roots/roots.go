// Package roots finds the store paths that the targets of a policy's closure-of
// stand for: a store path, a profile or another symbolic link that ends in the
// store, or a directory of such links.
//
// It promises: every step of the way is taken below the root directory that was
// given, absolute link targets included, so that another installation can be
// looked at and nobody can lead a look-up out of it; links, steps and entries are
// bounded; and what could not be resolved is an error with a reason, never an
// empty answer. It also tells who else could have changed the answer.
//
// Start with Resolver.Resolve and Result.Graph; Resolver.Boot finds what a NixOS
// needs to boot. It looks at links only: whether a path is valid in Nix's
// database, and what its closure is, others know. Access control lists are not
// looked at.
package roots

import (
	"errors"
	"fmt"
	"io"
	"maps"
	"os"
	"path"
	"slices"
	"strings"

	"golang.org/x/sys/unix"

	"overkeep/overlay/drv/storepath"
	"overkeep/policy/graph"
)

// Bounds. The kernel follows 40 links (path_resolution(7)); a machine has some
// thousands of gcroots.
const (
	maxLinks   = 40
	maxSteps   = 4096   // path components of one look-up, those of links included
	maxTarget  = 4096   // bytes
	maxEntries = 200000 // below a directory, in all
	maxDepth   = 10     // directories in directories
)

var (
	// ErrTarget: the text is not an absolute path, nor one below ~/ with a known home.
	ErrTarget = errors.New("not a target of closure-of")
	// ErrMissing: it does not exist, or a link on the way leads nowhere.
	ErrMissing = errors.New("there is nothing")
	// ErrLoop: more links or steps than the bound; usually a link to itself.
	ErrLoop = errors.New("too many links")
	// ErrDenied: a directory on the way may not be searched or read.
	ErrDenied = errors.New("not allowed to look")
	// ErrNoRoot: it exists, but does not lead to a store path.
	ErrNoRoot = errors.New("leads to no store path")
	// ErrBroad: a directory with too many entries, or one that holds the store.
	ErrBroad = errors.New("holds too much")
	// ErrInvalid: the store path is not in the graph.
	ErrInvalid = errors.New("not a valid path of the store")
)

// Resolver resolves targets. The zero value is for the running system.
type Resolver struct {
	Root     string // directory that stands for "/"; default "/"
	StoreDir string // default /nix/store
	Home     string // what ~ means, seen from Root; empty: not known
}

// Result is what a target stands for.
type Result struct {
	Target string
	Bases  []string // base names, sorted, each once
	// Directory: the target is a directory of links. Bases may be empty then, and
	// some may be of paths that are no more.
	Directory bool
	Stale     int // links of a directory that lead nowhere
	// Writers are the users beside root, sorted, who could have made the target
	// lead elsewhere; Anyone: a directory on the way is open to a group or to all.
	Writers []uint32
	Anyone  bool
}

// Graph is the result as a policy takes it: lookup gives the id of a base name. A
// single path that is not in the graph is unknown, with ErrInvalid; of a directory
// such entries are left out, as Nix's collector leaves them out.
func (r Result) Graph(lookup func(base string) (graph.ID, bool)) (graph.Root, error) {
	root := graph.Root{Known: true}
	for _, b := range r.Bases {
		id, ok := lookup(b)
		switch {
		case ok:
			root.IDs = append(root.IDs, id)
		case !r.Directory:
			return graph.Root{}, fmt.Errorf("%q: %w", r.Target, ErrInvalid)
		}
	}
	return root, nil
}

// Resolve finds the store paths of a target: an absolute path, or one that begins
// with "~/". As in Nix (followLinksToStorePath) the first store path on the way
// counts: /run/current-system/sw/bin/x is the path of the system.
func (r Resolver) Resolve(target string) (Result, error) {
	res := Result{Target: target}
	abs, err := r.absolute(target)
	if err != nil {
		return res, err
	}
	w, err := r.walker()
	if err != nil {
		return res, err
	}
	defer w.close()
	end, err := w.walk(abs)
	switch {
	case err != nil:
	case end.base != "":
		res.Bases = []string{end.base}
	case end.dir:
		res.Directory = true
		res.Bases, res.Stale, err = w.list(end.path)
	default:
		err = ErrNoRoot
	}
	if err != nil {
		return Result{Target: target}, fmt.Errorf("%.200q: %w", target, err)
	}
	res.Writers, res.Anyone = slices.Sorted(maps.Keys(w.writers)), w.anyone
	return res, nil
}

func (r Resolver) absolute(target string) (string, error) {
	rest, home := strings.CutPrefix(target, "~/")
	switch {
	case len(target) > maxTarget:
		return "", fmt.Errorf("%w: %d bytes are more than %d", ErrTarget, len(target), maxTarget)
	case strings.ContainsRune(target, 0):
		return "", fmt.Errorf("%w: a zero byte in %.200q", ErrTarget, target)
	case home && r.Home == "":
		return "", fmt.Errorf("%w: %.200q, and no home is known", ErrTarget, target)
	case home:
		return path.Join("/", r.Home) + "/" + rest, nil
	case !strings.HasPrefix(target, "/"):
		return "", fmt.Errorf("%w: %.200q is not absolute", ErrTarget, target)
	}
	return target, nil
}

// Boot is what the next start of a NixOS needs, as base names; empty where there
// is no such link.
type Boot struct {
	NixOS   bool   // it is one: /etc/NIXOS exists
	Booted  string // /run/booted-system: kernel and modules that run
	Current string // /run/current-system: what was activated last
	Profile string // /nix/var/nix/profiles/system: what the boot menu takes by default
}

// Targets of Boot, for a policy's text.
const (
	BootedSystem  = "/run/booted-system"
	CurrentSystem = "/run/current-system"
	SystemProfile = "/nix/var/nix/profiles/system"
	nixosMarker   = "/etc/NIXOS"
)

// Boot looks for the systems of a NixOS. A link that is missing is no error; one
// that cannot be followed is.
func (r Resolver) Boot() (Boot, error) {
	var b Boot
	for _, l := range []struct {
		target string
		to     *string
	}{{BootedSystem, &b.Booted}, {CurrentSystem, &b.Current}, {SystemProfile, &b.Profile}} {
		res, err := r.Resolve(l.target)
		switch {
		case errors.Is(err, ErrMissing):
		case err != nil:
			return Boot{}, err
		case res.Directory:
			return Boot{}, fmt.Errorf("%q: %w", l.target, ErrNoRoot)
		default:
			*l.to = res.Bases[0]
		}
	}
	w, err := r.walker()
	if err != nil {
		return Boot{}, err
	}
	defer w.close()
	_, err = w.walk(nixosMarker)
	if err != nil && !errors.Is(err, ErrMissing) {
		return Boot{}, fmt.Errorf("%q: %w", nixosMarker, err)
	}
	b.NixOS = err == nil
	return b, nil
}

// walker looks paths up below a root, one component at a time: the kernel never
// follows a link, so none can be put in the way between a check and a use.
type walker struct {
	store   string
	stack   []place // the root, then the directory of each component
	writers map[uint32]bool
	anyone  bool
}

// place is an open directory (O_PATH).
type place struct {
	fd   int
	name string
	st   unix.Stat_t
}

// end is what a look-up came to.
type end struct {
	base string // of the first store path on the way
	dir  bool   // a directory, at path
	file string // the name of something else that is no link
	path string // where it really is, seen from the root
}

func (r Resolver) walker() (*walker, error) {
	root, store := r.Root, r.StoreDir
	if root == "" {
		root = "/"
	}
	if store == "" {
		store = storepath.Dir
	}
	fd, err := unix.Open(root, unix.O_PATH|unix.O_DIRECTORY|unix.O_CLOEXEC, 0)
	if err != nil {
		return nil, fmt.Errorf("root %q: %w", root, why(err))
	}
	w := &walker{store: store, writers: map[uint32]bool{}, stack: []place{{fd: fd}}}
	if err := unix.Fstat(fd, &w.stack[0].st); err != nil {
		w.close()
		return nil, fmt.Errorf("root %q: %w", root, err)
	}
	return w, nil
}

func (w *walker) close() { w.pop(0) }

// pop closes all but the first n places.
func (w *walker) pop(n int) {
	for _, p := range w.stack[n:] {
		_ = unix.Close(p.fd)
	}
	w.stack = w.stack[:n]
}

func (w *walker) path() string {
	names := make([]string, len(w.stack))
	for i, p := range w.stack {
		names[i] = p.name
	}
	if len(names) == 1 {
		return "/"
	}
	return strings.Join(names, "/")
}

// why gives an error of the kernel its type.
func why(err error) error {
	switch {
	case errors.Is(err, unix.ENOENT):
		return ErrMissing
	case errors.Is(err, unix.EACCES), errors.Is(err, unix.EPERM):
		return ErrDenied
	case errors.Is(err, unix.ENOTDIR):
		return ErrNoRoot
	case errors.Is(err, unix.ENAMETOOLONG):
		return ErrTarget
	}
	return err
}

// walk looks up an absolute path, starting from the root.
func (w *walker) walk(abs string) (end, error) {
	w.pop(1)
	todo := strings.Split(abs, "/")
	links := 0
	for steps := 0; len(todo) > 0; steps++ {
		if steps > maxSteps {
			return end{}, ErrLoop
		}
		name := todo[0]
		todo = todo[1:]
		switch {
		case name == "" || name == ".":
			continue
		case name == "..":
			w.pop(max(len(w.stack)-1, 1))
			continue
		case w.path() == w.store:
			if !storepath.IsBase(name) {
				return end{}, ErrNoRoot
			}
			return end{base: name}, nil
		}
		p := place{name: name}
		var err error
		dir := w.stack[len(w.stack)-1]
		p.fd, err = unix.Openat(dir.fd, name, unix.O_PATH|unix.O_NOFOLLOW|unix.O_CLOEXEC, 0)
		if err != nil {
			// The store need not be there to know which path is meant.
			if base := w.storeBase(name, todo); errors.Is(err, unix.ENOENT) && base != "" {
				return end{base: base}, nil
			}
			return end{}, why(err)
		}
		if err := unix.Fstat(p.fd, &p.st); err != nil {
			_ = unix.Close(p.fd)
			return end{}, err
		}
		w.trust(&dir.st, &p.st)
		switch p.st.Mode & unix.S_IFMT {
		case unix.S_IFDIR:
			w.stack = append(w.stack, p)
		case unix.S_IFLNK:
			to, err := readlink(p.fd)
			_ = unix.Close(p.fd)
			if err != nil {
				return end{}, why(err)
			}
			if links++; links > maxLinks {
				return end{}, ErrLoop
			}
			if strings.HasPrefix(to, "/") {
				w.pop(1)
			}
			todo = append(strings.Split(to, "/"), todo...)
		default:
			_ = unix.Close(p.fd)
			if len(todo) > 0 {
				return end{}, ErrNoRoot
			}
			return end{file: name}, nil
		}
	}
	return end{dir: true, path: w.path()}, nil
}

// storeBase is the store path that the rest of a path names by its text, if any.
func (w *walker) storeBase(name string, todo []string) string {
	rest, ok := strings.CutPrefix(path.Join(w.path(), name, path.Join(todo...)), w.store+"/")
	base, _, _ := strings.Cut(rest, "/")
	if !ok || slices.Contains(todo, "..") || !storepath.IsBase(base) {
		return ""
	}
	return base
}

// trust notes who could put something else in the place of an entry of dir.
func (w *walker) trust(dir, entry *unix.Stat_t) {
	w.writer(dir.Uid)
	if dir.Mode&0o022 == 0 {
		return
	}
	if dir.Mode&unix.S_ISVTX == 0 {
		w.anyone = true
		return
	}
	w.writer(entry.Uid) // in a sticky directory each his own
}

func (w *walker) writer(uid uint32) {
	if uid != 0 {
		w.writers[uid] = true
	}
}

// readlink reads the link that fd is.
func readlink(fd int) (string, error) {
	buf := make([]byte, unix.PathMax)
	n, err := unix.Readlinkat(fd, "", buf)
	if err == nil && n == len(buf) {
		err = unix.ENAMETOOLONG
	}
	return string(buf[:max(n, 0)]), err
}

// list finds all that a directory holds: links to store paths, and, as in Nix's
// findRoots, files that are named like a store path. Directories are entered, links
// to directories are not.
func (w *walker) list(top string) (bases []string, stale int, err error) {
	type dir struct {
		path  string
		depth int
	}
	found := map[string]bool{}
	entries := 0
	todo := []dir{{top, 0}}
	for len(todo) > 0 {
		d := todo[len(todo)-1]
		todo = todo[:len(todo)-1]
		if d.path == w.store || d.path == "/" || strings.HasPrefix(w.store, d.path+"/") {
			return nil, 0, ErrBroad
		}
		names, err := w.names(d.path, maxEntries-entries)
		if d.depth > 0 && errors.Is(err, ErrMissing) {
			continue // it went meanwhile
		}
		if err != nil {
			return nil, 0, err
		}
		entries += len(names)
		for _, name := range names {
			at := d.path + "/" + name
			end, err := w.walk(at)
			switch {
			case errors.Is(err, ErrMissing), errors.Is(err, ErrLoop):
				stale++
			case errors.Is(err, ErrNoRoot):
			case err != nil:
				return nil, 0, err
			case end.base != "":
				found[end.base] = true
			case end.file != "" && end.file == name && storepath.IsBase(name):
				found[name] = true
			case end.dir && end.path == at:
				if d.depth == maxDepth {
					return nil, 0, ErrBroad
				}
				todo = append(todo, dir{at, d.depth + 1})
			}
		}
	}
	return slices.Sorted(maps.Keys(found)), stale, nil
}

// names reads a directory of at most max entries.
func (w *walker) names(at string, max int) ([]string, error) {
	end, err := w.walk(at)
	if err != nil {
		return nil, err
	}
	if !end.dir || end.path != at {
		return nil, ErrMissing // swapped meanwhile
	}
	dir := w.stack[len(w.stack)-1]
	w.writer(dir.st.Uid)
	if dir.st.Mode&0o022 != 0 { // sticky or not: others may add to it
		w.anyone = true
	}
	fd, err := unix.Openat(dir.fd, ".", unix.O_RDONLY|unix.O_DIRECTORY|unix.O_CLOEXEC, 0)
	if err != nil {
		return nil, why(err)
	}
	f := os.NewFile(uintptr(fd), at)
	defer f.Close()
	names, err := f.Readdirnames(max + 1)
	if len(names) > max {
		return nil, ErrBroad
	}
	if len(names) > 0 || errors.Is(err, io.EOF) {
		err = nil
	}
	return names, why(err)
}
