// Package provenance records where store paths came from, as it passes by, and
// gives it back as the origins of a policy's graph: flake input URLs, licences,
// unfree. Nix's database has none of this.
//
// Two halves. Pure parsers turn what Nix writes anyway into records: Lock
// (flake.lock), Archive (nix flake archive --json), Meta (what MetaExpression
// yields under nix eval --json), Derivation (the url and urls of a .drv). A Store
// keeps records in a file inside the keep.
//
// It promises: a parser takes bounded input and gives records or an error, never a
// panic; a record is only ever added, so what is known of a path grows and all
// sources of it stand side by side; a crash loses at most what was being added.
//
// What "from" speaks of: the source path of the input itself, not what was built
// of it. A policy says built-from (from "…") for the latter.
//
// All of it is a claim of who wrote the flake or the derivation: good to say that
// a path is private, and no proof that one is public. Passwords in URLs, and in
// http URLs user names (they can be tokens), are not recorded. The names and URLs are as private as the paths, so a Store lies in
// the encrypted volume and nowhere else.
package provenance

import (
	"bytes"
	"encoding/json"
	"errors"
	"fmt"
	"net/url"
	"slices"
	"strings"
	"unicode/utf8"

	"overkeep/overlay/drv"
	"overkeep/overlay/drv/storepath"
	"overkeep/policy/graph"
)

// Ways in which a record was learned.
const (
	ByLock       = "flake.lock"
	ByArchive    = "flake archive"
	ByMeta       = "meta"
	ByDerivation = "derivation"
)

// Record is what was learned of one path at one time.
type Record struct {
	Path     string // base name, HASH-NAME
	From     []string
	Licences []string
	Unfree   graph.Tri
	How      string // one of the ways above
	When     int64  // seconds since 1970; Store.Add sets it where it is 0
}

// Bounds. The largest flake.lock files have some hundred inputs and 100 KiB.
const (
	MaxInput   = 16 << 20 // bytes of a parsed text
	maxNodes   = 20000    // inputs of a lock file or an archive
	maxDepth   = 100      // inputs of inputs
	maxText    = 4096     // bytes of a URL or a licence
	maxTexts   = 64       // URLs or licences of a path
	maxPackage = 4096     // paths of a meta text
)

var (
	// ErrInput: a text that is not of its format.
	ErrInput = errors.New("not readable")
	// ErrSize: a text or a part of it is larger than its bound.
	ErrSize = errors.New("too large")
	// ErrVersion: a version that is not known.
	ErrVersion = errors.New("unknown version")
)

// object and list are JSON as encoding/json decodes it: keys match exactly, and
// of a repeated key the last one counts, as in Nix.
type (
	object = map[string]any
	list   = []any
)

// decode reads one JSON value that must be an object.
func decode(what string, b []byte) (object, error) {
	if len(b) > MaxInput {
		return nil, fmt.Errorf("%s: %w: %d bytes, more than %d", what, ErrSize, len(b), MaxInput)
	}
	if !utf8.Valid(b) {
		return nil, fmt.Errorf("%s: %w: invalid UTF-8", what, ErrInput)
	}
	var v any
	d := json.NewDecoder(bytes.NewReader(b))
	d.UseNumber()
	if err := d.Decode(&v); err != nil {
		return nil, fmt.Errorf("%s: %w: %v, at byte %d", what, ErrInput, err, d.InputOffset())
	}
	o, ok := v.(object)
	if !ok {
		return nil, fmt.Errorf("%s: %w: it is no object", what, ErrInput)
	}
	if _, err := d.Token(); err == nil || d.InputOffset() < int64(len(bytes.TrimRight(b, " \t\r\n"))) {
		return nil, fmt.Errorf("%s: %w: something follows the value, at byte %d", what, ErrInput, d.InputOffset())
	}
	return o, nil
}

// text is the string under a key of an object, "" if there is none.
func text(o object, key string) string {
	s, _ := o[key].(string)
	return s
}

// clean makes a URL or licence fit to be kept: bounded, one line of UTF-8, no
// password.
func clean(s string) (string, bool) {
	if s == "" || len(s) > maxText || !utf8.ValidString(s) || strings.ContainsFunc(s, func(r rune) bool { return r < 0x20 || r == 0x7f }) {
		return "", false
	}
	return withoutPassword(s), true
}

// withoutPassword drops the password of scheme://user:password@host/, and for http
// and https the user, too: tokens are written there. It takes the text as it is,
// for URLs in lock files need not parse.
func withoutPassword(s string) string {
	scheme, rest, ok := strings.Cut(s, "://")
	if !ok {
		return s
	}
	authority := rest
	if i := strings.IndexAny(rest, "/?#"); i >= 0 {
		authority = rest[:i]
	}
	at := strings.LastIndexByte(authority, '@')
	if at < 0 {
		return s
	}
	if strings.HasSuffix(scheme, "http") || strings.HasSuffix(scheme, "https") {
		return scheme + "://" + rest[at+1:]
	}
	user, _, _ := strings.Cut(authority[:at], ":")
	return scheme + "://" + user + rest[at:]
}

// add appends what is clean and new, up to the bound.
func add(to []string, texts ...string) []string {
	for _, s := range texts {
		if c, ok := clean(s); ok && len(to) < maxTexts && !slices.Contains(to, c) {
			to = append(to, c)
		}
	}
	return to
}

// Derivation gives the URLs that a derivation claims for the outputs whose content
// is fixed by a hash (fetchurl and its like): they are known as soon as the .drv
// is valid, before anything is fetched.
func Derivation(storeDir string, d *drv.Derivation) []Record {
	from := add(nil, d.Claims().URLs...)
	if len(from) == 0 {
		return nil
	}
	var out []Record
	for _, o := range d.Outputs {
		if base, ok := storepath.Base(storeDir, o.Path); ok && o.Kind() == drv.Fixed {
			out = append(out, Record{Path: strings.Clone(base), From: cloned(from), How: ByDerivation})
		}
	}
	return out
}

// cloned frees texts from the file they are part of.
func cloned(l []string) []string {
	out := make([]string, len(l))
	for i, s := range l {
		out[i] = strings.Clone(s)
	}
	return out
}

// query appends the parameters that are not empty, in the given order.
func query(s string, pairs ...string) string {
	sep := "?"
	if strings.Contains(s, "?") {
		sep = "&"
	}
	for i := 0; i < len(pairs); i += 2 {
		if pairs[i+1] != "" {
			s += sep + pairs[i] + "=" + url.QueryEscape(pairs[i+1])
			sep = "&"
		}
	}
	return s
}

// URL is the text of a flake reference in the form of attributes, as in
// flake.lock, without what only pins its content (narHash, lastModified):
//
//	github:OWNER/REPO/REV        gitlab:, sourcehut: likewise; host and dir as parameters
//	git+ssh://HOST/PATH?rev=REV  ref and dir as parameters; hg+… likewise
//	https://HOST/FILE.tar.gz     tarball and file, as they are
//	path:/DIR
//	flake:NAME                   indirect
//
// It is empty for what it does not know.
func URL(attrs map[string]any) string {
	get := func(k string) string { return text(attrs, k) }
	switch typ := get("type"); typ {
	case "github", "gitlab", "sourcehut":
		s := typ + ":" + get("owner") + "/" + get("repo")
		if get("owner") == "" || get("repo") == "" {
			return ""
		}
		if at := firstOf(get("rev"), get("ref")); at != "" {
			s += "/" + at
		}
		return query(s, "host", get("host"), "dir", get("dir"))
	case "git", "mercurial":
		u := get("url")
		if u == "" {
			return ""
		}
		prefix := map[string]string{"git": "git+", "mercurial": "hg+"}[typ]
		if strings.HasPrefix(u, "/") {
			u = "file://" + u
		}
		if !strings.HasPrefix(u, prefix) && !strings.HasPrefix(u, "git:") {
			u = prefix + u
		}
		return query(u, "ref", get("ref"), "rev", get("rev"), "dir", get("dir"))
	case "tarball", "file":
		return get("url")
	case "path":
		if p := get("path"); p != "" {
			return "path:" + p
		}
	case "indirect":
		if id := get("id"); id != "" {
			s := "flake:" + id
			for _, part := range []string{get("ref"), get("rev")} {
				if part != "" {
					s += "/" + part
				}
			}
			return s
		}
	}
	return ""
}

func firstOf(texts ...string) string {
	for _, s := range texts {
		if s != "" {
			return s
		}
	}
	return ""
}
