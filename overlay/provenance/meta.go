package provenance

import (
	"encoding/json"
	"fmt"
	"strings"

	"overkeep/overlay/drv/storepath"
	"overkeep/policy/graph"
)

// MetaExpression is a Nix function from a derivation to what Meta reads. Use it
// where a command evaluates anyway:
//
//	nix eval --json INSTALLABLE --apply EXPRESSION
//	nix-instantiate --eval --strict --json -E "EXPRESSION (import ./. { })"
//
// It builds nothing. licence has SPDX ids, or nixpkgs's short names or full names
// where there is none; unfree is what nixpkgs says, or follows from the licences'
// "free", or is null.
const MetaExpression = `package:
let
  meta = package.meta or { };
  many = x: if builtins.isList x then x else [ x ];
  licences = if meta ? license then many meta.license else [ ];
  name = l: if builtins.isString l then l else l.spdxId or (l.shortName or (l.fullName or null));
  free = l: if builtins.isAttrs l then l.free or null else null;
  path = p: builtins.unsafeDiscardStringContext (toString p);
in
{
  overkeepMeta = 1;
  drvPath = path package.drvPath;
  outPaths = map (o: path package.${o}.outPath) (package.outputs or [ "out" ]);
  licence = builtins.filter builtins.isString (map name licences);
  unfree =
    if meta ? unfree then
      meta.unfree
    else if builtins.any (l: free l == false) licences then
      true
    else if licences != [ ] && builtins.all (l: free l == true) licences then
      false
    else
      null;
}`

// Meta reads what MetaExpression yields for one derivation:
//
//	{"overkeepMeta":1,
//	 "drvPath":"/nix/store/….drv",      optional
//	 "outPaths":["/nix/store/…", …],
//	 "licence":["MIT", …],              a string or a list; empty or null: unknown
//	 "unfree":true}                     false; null or missing: unknown
//
// There is a record for the derivation and for each output. Unknown keys are
// ignored, so that the expression may tell more one day.
func Meta(storeDir string, b []byte) ([]Record, error) {
	o, err := decode("meta", b)
	if err != nil {
		return nil, err
	}
	if v, _ := o["overkeepMeta"].(json.Number); v != "1" {
		return nil, fmt.Errorf("meta: %w %q", ErrVersion, v)
	}
	r := Record{How: ByMeta}
	switch v := o["unfree"].(type) {
	case nil:
	case bool:
		r.Unfree = graph.No
		if v {
			r.Unfree = graph.Yes
		}
	default:
		return nil, fmt.Errorf("meta: %w: unfree is neither true, false nor null", ErrInput)
	}
	licences, err := texts("licence", o["licence"], maxTexts)
	if err != nil {
		return nil, err
	}
	r.Licences = add(nil, licences...)
	paths, err := texts("outPaths", o["outPaths"], maxPackage)
	if err != nil {
		return nil, err
	}
	drvPath, err := texts("drvPath", o["drvPath"], 1)
	if err != nil {
		return nil, err
	}
	var out []Record
	for _, p := range append(drvPath, paths...) {
		base, ok := storepath.Base(storeDir, p)
		if !ok {
			return nil, fmt.Errorf("meta: %w: %.200q is no store path", ErrInput, p)
		}
		if r.Unfree != graph.Unknown || len(r.Licences) > 0 {
			r.Path = strings.Clone(base)
			out = append(out, r)
		}
	}
	return out, nil
}

// texts is a string, or a list of strings; null is none.
func texts(key string, v any, max int) ([]string, error) {
	switch v := v.(type) {
	case nil:
		return nil, nil
	case string:
		return []string{v}, nil
	case list:
		if len(v) > max {
			return nil, fmt.Errorf("meta: %w: %d of %s, more than %d", ErrSize, len(v), key, max)
		}
		out := make([]string, len(v))
		for i := range v {
			var ok bool
			if out[i], ok = v[i].(string); !ok {
				return nil, fmt.Errorf("meta: %w: %s has what is no string", ErrInput, key)
			}
		}
		return out, nil
	}
	return nil, fmt.Errorf("meta: %w: %s is neither a string nor a list", ErrInput, key)
}
