package provenance

import (
	"encoding/json"
	"fmt"
	"maps"
	"slices"
	"strings"

	"overkeep/overlay/drv/storepath"
)

// lock is a parsed flake.lock.
type lock struct {
	nodes map[string]object
	root  string
}

// Lock reads a flake.lock (version 5 to 7). Each input that has a narHash gives a
// record: its store path follows from the hash, without evaluation or network
// (fetchers/fetchers.cc, computeStorePath), and its URLs are the locked and the
// original one. Inputs without a hash (relative paths) give none.
func Lock(storeDir string, b []byte) ([]Record, error) {
	l, err := readLock(b)
	if err != nil {
		return nil, err
	}
	var out []Record
	for _, name := range slices.Sorted(maps.Keys(l.nodes)) {
		if name == l.root {
			continue
		}
		r, ok, err := l.record(storeDir, name)
		if err != nil {
			return nil, err
		}
		if ok {
			out = append(out, r)
		}
	}
	return out, nil
}

func readLock(b []byte) (lock, error) {
	o, err := decode("flake.lock", b)
	if err != nil {
		return lock{}, err
	}
	if v, _ := o["version"].(json.Number); v != "5" && v != "6" && v != "7" {
		return lock{}, fmt.Errorf("flake.lock: %w %q", ErrVersion, v)
	}
	nodes, ok := o["nodes"].(object)
	if !ok {
		return lock{}, fmt.Errorf("flake.lock: %w: it has no nodes", ErrInput)
	}
	if len(nodes) > maxNodes {
		return lock{}, fmt.Errorf("flake.lock: %w: %d nodes, more than %d", ErrSize, len(nodes), maxNodes)
	}
	l := lock{map[string]object{}, text(o, "root")}
	for name, n := range nodes {
		if l.nodes[name], ok = n.(object); !ok {
			return lock{}, fmt.Errorf("flake.lock: %w: node %.100q is no object", ErrInput, name)
		}
	}
	if l.nodes[l.root] == nil {
		return lock{}, fmt.Errorf("flake.lock: %w: the root %.100q is no node", ErrInput, l.root)
	}
	return l, nil
}

// record is what a node tells; not ok: nothing.
func (l lock) record(storeDir, name string) (r Record, ok bool, err error) {
	locked, _ := l.nodes[name]["locked"].(object)
	if locked == nil {
		return r, false, fmt.Errorf("flake.lock: %w: node %.100q is not locked", ErrInput, name)
	}
	hash := text(locked, "narHash")
	if info, _ := l.nodes[name]["info"].(object); info != nil && hash == "" { // version 5
		hash = text(info, "narHash")
	}
	r.From = l.urls(name)
	if hash == "" || len(r.From) == 0 {
		return r, false, nil
	}
	h, err := storepath.ParseHash(hash)
	if err != nil || h.Algo != "sha256" {
		return r, false, fmt.Errorf("flake.lock: %w: node %.100q: the narHash %.100q", ErrInput, name, hash)
	}
	// Input::getName in fetchers.cc
	p, err := storepath.Fixed(storeDir, firstOf(text(locked, "name"), "source"), storepath.NAR, h)
	if err != nil {
		return r, false, fmt.Errorf("flake.lock: %w: node %.100q: %w", ErrInput, name, err)
	}
	r.Path, _ = storepath.Base(storeDir, p)
	r.How = ByLock
	return r, true, nil
}

// urls are the texts of a node's references.
func (l lock) urls(name string) []string {
	var from []string
	for _, which := range []string{"locked", "original"} {
		if attrs, _ := l.nodes[name][which].(object); attrs != nil {
			from = add(from, URL(attrs))
		}
	}
	return from
}

// input finds the node that an input of a node is; "": there is none. An input is
// the name of a node, or a path of inputs from the root ("follows"), whose steps
// can be such paths themselves: a budget ends cycles.
func (l lock) input(node, name string, budget *int) string {
	inputs, _ := l.nodes[node]["inputs"].(object)
	for {
		if *budget--; *budget < 0 {
			return ""
		}
		switch v := inputs[name].(type) {
		case string:
			if l.nodes[v] != nil {
				return v
			}
			return ""
		case list:
			if len(v) == 0 {
				return l.root
			}
			at := l.root
			for _, step := range v[:len(v)-1] {
				s, _ := step.(string)
				if at = l.input(at, s, budget); at == "" {
					return ""
				}
			}
			name, _ = v[len(v)-1].(string)
			inputs, _ = l.nodes[at]["inputs"].(object)
		default:
			return ""
		}
	}
}

// Archive reads what "nix flake archive --json" wrote: the store path of a flake
// and of each input, recursively. The URLs of the inputs come from lockFile, the
// content of the flake's flake.lock (nil: none are known); that of the flake
// itself is self, as the user gave it ("": unknown).
func Archive(storeDir string, b, lockFile []byte, self string) ([]Record, error) {
	top, err := decode("flake archive", b)
	if err != nil {
		return nil, err
	}
	l := lock{}
	if lockFile != nil {
		if l, err = readLock(lockFile); err != nil {
			return nil, err
		}
	}
	type visit struct {
		o     object
		node  string // in the lock file; "": not known there
		depth int
	}
	var out []Record
	todo := []visit{{top, l.root, 0}}
	for n := 0; n < len(todo); n++ { // todo grows
		v := todo[n]
		path, _ := v.o["path"].(string)
		base, ok := storepath.Base(storeDir, path)
		if v.o["path"] != nil && !ok {
			return nil, fmt.Errorf("flake archive: %w: %.200q is no store path", ErrInput, path)
		}
		var from []string
		switch {
		case n == 0:
			from = add(nil, self)
		case v.node != "" && v.node != l.root:
			from = l.urls(v.node)
		}
		if ok && len(from) > 0 {
			out = append(out, Record{Path: strings.Clone(base), From: from, How: ByArchive})
		}
		if v.o["inputs"] == nil {
			continue
		}
		inputs, ok := v.o["inputs"].(object)
		if !ok {
			return nil, fmt.Errorf("flake archive: %w: inputs that are no object", ErrInput)
		}
		if v.depth >= maxDepth || len(todo)+len(inputs) > maxNodes {
			return nil, fmt.Errorf("flake archive: %w: more than %d inputs, or more than %d deep", ErrSize, maxNodes, maxDepth)
		}
		for _, name := range slices.Sorted(maps.Keys(inputs)) {
			o, ok := inputs[name].(object)
			if !ok {
				return nil, fmt.Errorf("flake archive: %w: input %.100q is no object", ErrInput, name)
			}
			next := ""
			if v.node != "" {
				budget := followSteps
				next = l.input(v.node, name, &budget)
			}
			todo = append(todo, visit{o, next, v.depth + 1})
		}
	}
	return out, nil
}

// followSteps bounds the look-up of one input.
const followSteps = 1000

// Flake reads what "nix flake metadata --json" and "nix flake archive --json" wrote
// of one flake: the first has the lock file, also one that was not written to disk,
// and the flake's own URL.
func Flake(storeDir string, metadata, archive []byte) ([]Record, error) {
	o, err := decode("flake metadata", metadata)
	if err != nil {
		return nil, err
	}
	locks, ok := o["locks"].(object)
	if !ok {
		return nil, fmt.Errorf("flake metadata: %w: it has no locks", ErrInput)
	}
	lockFile, err := json.Marshal(locks)
	if err != nil {
		return nil, err
	}
	locked, err := Lock(storeDir, lockFile)
	if err != nil {
		return nil, err
	}
	archived, err := Archive(storeDir, archive, lockFile, text(o, "url"))
	return append(locked, archived...), err
}
