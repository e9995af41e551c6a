package slot

import (
	"bytes"
	"encoding/hex"
	"encoding/json"
	"slices"
	"time"

	"overkeep/crypt/strictjson"
)

// The JSON of set.json.
type wireSet struct {
	Version   int        `json:"version"`
	Features  []string   `json:"features"`
	KeepID    string     `json:"keep_id"`
	Protector string     `json:"protector"`
	Policy    string     `json:"policy"`
	Epoch     uint64     `json:"epoch"`
	Confirmed bool       `json:"confirmed"`
	Slots     []wireSlot `json:"slots"`
	MAC       string     `json:"mac"`
}

type wireSlot struct {
	Name    string `json:"name"`
	Kind    Kind   `json:"kind"`
	Role    string `json:"role"`
	Created string `json:"created"`
	Label   string `json:"label"`
	SHA256  string `json:"sha256"`
}

const timeLayout = "2006-01-02T15:04:05Z"

// marshal writes set.json. The set must be complete: hashes and MAC in place.
func (s *Set) marshal() ([]byte, error) {
	w := wireSet{
		Version: s.Version, Features: append([]string{}, s.Features...),
		KeepID: s.KeepID, Protector: s.Protector, Policy: s.Policy,
		Epoch: s.Epoch, Confirmed: s.Confirmed, Slots: []wireSlot{}, MAC: hex.EncodeToString(s.MAC),
	}
	for _, x := range s.Slots {
		w.Slots = append(w.Slots, wireSlot{x.Name, x.Kind, x.Role, x.Created.UTC().Format(timeLayout), x.Label, x.SHA256})
	}
	var b bytes.Buffer
	e := json.NewEncoder(&b)
	e.SetEscapeHTML(false)
	e.SetIndent("", "  ")
	if err := e.Encode(w); err != nil {
		return nil, err
	}
	if b.Len() > MaxSetSize {
		return nil, formatf("set.json of %d bytes, at most %d are allowed", b.Len(), MaxSetSize)
	}
	return b.Bytes(), nil
}

// parse reads set.json and nothing else: no unknown, repeated or missing key, no
// trailing data, no unknown version or feature. Version and features are judged
// first, so that a newer file is called newer and not malformed.
func parse(b []byte) (*Set, error) {
	if len(b) > MaxSetSize {
		return nil, formatf("set.json of more than %d bytes", MaxSetSize)
	}
	if err := judgeVersion(b); err != nil {
		return nil, err
	}
	var w wireSet
	if err := strictjson.Decode(b, &w); err != nil {
		return nil, &FormatError{Err: err}
	}
	s := &Set{
		Version: w.Version, Features: w.Features,
		Binding: Binding{KeepID: w.KeepID, Protector: w.Protector, Policy: w.Policy},
		Epoch:   w.Epoch, Confirmed: w.Confirmed,
	}
	if !isHex(w.MAC, sha256Size) {
		return nil, formatf("mac %s is not 64 hex digits", quote(w.MAC))
	}
	s.MAC, _ = hex.DecodeString(w.MAC)
	for _, x := range w.Slots {
		t, err := time.Parse(timeLayout, x.Created)
		if err != nil || t.Format(timeLayout) != x.Created {
			return nil, formatf("slot created %s", quote(x.Created))
		}
		if !isHex(x.SHA256, sha256Size) {
			return nil, formatf("sha256 %s is not 64 hex digits", quote(x.SHA256))
		}
		s.Slots = append(s.Slots, Slot{x.Name, x.Kind, x.Role, t, x.Label, x.SHA256})
	}
	if err := s.check(); err != nil {
		return nil, err
	}
	return s, nil
}

// judgeVersion looks at version and features alone.
func judgeVersion(b []byte) error {
	var head struct {
		Version  *int              `json:"version"`
		Features []json.RawMessage `json:"features"`
	}
	if err := json.Unmarshal(b, &head); err != nil {
		return &FormatError{Err: err}
	}
	if head.Version == nil {
		return formatf("no version")
	}
	if *head.Version != Version {
		return &VersionError{*head.Version}
	}
	for _, raw := range head.Features {
		var f string
		if err := json.Unmarshal(raw, &f); err != nil {
			return &FormatError{Err: err}
		}
		if isFeature(f) && !slices.Contains(features, f) {
			return &FeatureError{f}
		}
	}
	return nil
}
