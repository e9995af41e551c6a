package verdict

import (
	"context"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"slices"
	"strings"

	"overkeep/overlay/drv/storepath"
	"overkeep/overlay/facts"
	"overkeep/overlay/nixdb"
	"overkeep/overlay/roots"
	"overkeep/policy"
	"overkeep/policy/glob"
	"overkeep/policy/graph"
)

// LoadFor loads what is needed to judge the paths that words name, and returns for
// each word its paths: a store path or a file below one, HASH-NAME, a hash, a link
// that ends in the store, a directory of such links, or else a name (what begins with
// it and a dash counts, too) or a pattern of names. A word that names nothing has
// none. The cost does not depend on the size of the stores, but for names, which are
// looked for in the index of paths.
func LoadFor(ctx context.Context, in Input, p *policy.Policy, words []string) (*World, [][]graph.ID, error) {
	f := finder{in: in, dir: storeDir(in)}
	found := make([][]string, len(words))
	var targets []string
	for i, w := range words {
		paths, err := f.word(ctx, w)
		if err != nil {
			return nil, nil, err
		}
		found[i] = paths
		targets = append(targets, paths...)
	}
	need := facts.Need{Build: p.Needs().BuildInput, Most: fewPaths}
	for _, pattern := range p.ClosurePatterns() {
		paths, err := f.pattern(ctx, pattern.Glob, pattern.Base)
		if err != nil {
			return nil, nil, err
		}
		need.Roots = append(need.Roots, paths...)
	}
	closures, err := resolve(ctx, in, []*policy.Policy{p})
	if err != nil {
		return nil, nil, err
	}
	for _, c := range closures {
		for _, b := range c.found.Bases { // none where it could not be resolved
			need.Roots = append(need.Roots, f.dir+"/"+b)
		}
	}
	w, err := load(ctx, in, []*policy.Policy{p}, closures, func(o facts.Options) (*facts.Snapshot, error) {
		l, err := facts.LoadFor(ctx, in.Stores, targets, need, o)
		if errors.Is(err, facts.ErrMany) {
			return facts.Open(ctx, in.Stores, o)
		}
		if err != nil {
			return nil, err
		}
		return &facts.Snapshot{Loaded: *l}, nil
	})
	if err != nil {
		return nil, nil, err
	}
	out := make([][]graph.ID, len(words))
	for i, paths := range found {
		for _, path := range paths {
			if id := w.Index.Path(path); id != graph.NoID && !slices.Contains(out[i], id) {
				out[i] = append(out[i], id)
			}
		}
	}
	return w, out, nil
}

// fewPaths are read one by one; beyond them one reading of everything is faster
// (about 50 us a path against 1 us).
const fewPaths = 20000

// finder looks for paths by their names in the databases.
type finder struct {
	in  Input
	dir string
	dbs []*nixdb.DB
}

func (f *finder) open(ctx context.Context) error {
	for _, s := range f.in.Stores[len(f.dbs):] {
		db, err := nixdb.Open(ctx, s.DB)
		if err != nil {
			return err
		}
		f.dbs = append(f.dbs, db)
	}
	return nil
}

// search collects what a query finds in any of the databases, sorted.
func (f *finder) search(ctx context.Context, query func(*nixdb.DB, func(string)) error) ([]string, error) {
	if err := f.open(ctx); err != nil {
		return nil, err
	}
	var out []string
	for _, db := range f.dbs {
		if err := query(db, func(path string) { out = append(out, path) }); err != nil {
			return nil, err
		}
	}
	slices.Sort(out)
	return slices.Compact(out), nil
}

func (f *finder) word(ctx context.Context, word string) ([]string, error) {
	if rest, ok := strings.CutPrefix(word, f.dir+"/"); ok {
		base, _, _ := strings.Cut(rest, "/")
		return []string{f.dir + "/" + base}, nil
	}
	switch {
	case storepath.IsBase(word):
		return []string{f.dir + "/" + word}, nil
	case isHash(word):
		// "-" is what follows a hash, "." the next byte after it.
		return f.search(ctx, func(db *nixdb.DB, each func(string)) error {
			return db.Between(ctx, f.dir+"/"+word+"-", f.dir+"/"+word+".", each)
		})
	case strings.Contains(word, "/") || word == "." || word == "..":
		return f.link(word)
	}
	patterns := []string{word}
	if !strings.ContainsAny(word, "*?[") {
		patterns = []string{glob.Escape(word), glob.Escape(word) + "-*"}
	}
	var out []string
	for _, p := range patterns {
		g, err := glob.Compile(p)
		if err != nil {
			return nil, fmt.Errorf("%w: %q: %w", ErrWord, word, err)
		}
		paths, err := f.pattern(ctx, g, false)
		if err != nil {
			return nil, err
		}
		out = append(out, paths...)
	}
	slices.Sort(out)
	return slices.Compact(out), nil
}

// ErrWord is a word that can name nothing.
var ErrWord = errors.New("not a path, name, hash or pattern")

// hashLetters are Nix's base 32.
const hashLetters = "0123456789abcdfghijklmnpqrsvwxyz"

func isHash(s string) bool { return len(s) == graph.HashLen && strings.Trim(s, hashLetters) == "" }

// link follows a file of the caller's to the store.
func (f *finder) link(word string) ([]string, error) {
	abs, err := filepath.Abs(word)
	if err != nil {
		return nil, err
	}
	res, err := roots.Resolver{Root: "/", StoreDir: f.dir}.Resolve(abs)
	if err != nil {
		if errors.Is(err, os.ErrPermission) {
			return nil, err
		}
		return nil, nil
	}
	var out []string
	for _, b := range res.Bases {
		out = append(out, f.dir+"/"+b)
	}
	return out, nil
}

// pattern finds the paths whose name, or HASH-NAME, matches.
func (f *finder) pattern(ctx context.Context, g *glob.Glob, base bool) ([]string, error) {
	return f.search(ctx, func(db *nixdb.DB, each func(string)) error {
		return db.Holding(ctx, string(g.Literal()), func(path string) {
			b := strings.TrimPrefix(path, f.dir+"/")
			if len(b) <= graph.HashLen+1 || !base && b[graph.HashLen] != '-' {
				return
			}
			if !base {
				b = b[graph.HashLen+1:]
			}
			if g.Match([]byte(b)) {
				each(path)
			}
		})
	})
}
