package slot

import (
	"crypto/sha256"
	"encoding/hex"
	"errors"
	"io/fs"
	"slices"
	"strings"

	"golang.org/x/sys/unix"
)

// Files is what Load found beside the list.
type Files struct {
	// Content holds the files whose hash is the listed one, by slot name.
	Content map[string][]byte
	// Findings has one entry for each listed file that is missing or different,
	// and for each file that is not listed. See the package comment for what
	// Open makes of them.
	Findings []*TamperError
}

// Load reads the slot set in dir, in one pass: each file is opened and read once,
// and what was hashed is what it returns. No link is followed, no file but a
// regular one within its bound (MaxSetSize, MaxFileSize) is read. A Commit at the
// same time is waited for.
//
// A set.json that is missing or not a file is a *TamperError, an unknown one a
// *VersionError or *FeatureError, any other a *FormatError; a dir that is not
// there is fs.ErrNotExist. Damage to single slots is not an error here but is in
// Files. The MAC is not checked: that takes the key (Open, VerifyMAC).
func Load(dir string) (*Set, Files, error) {
	d, err := openLocked(unix.AT_FDCWD, dir, unix.LOCK_SH)
	if err != nil {
		return nil, Files{}, err
	}
	defer d.Close()

	b, err := readAt(d, setFile, MaxSetSize)
	if err != nil {
		return nil, Files{}, finding("", setFile, err)
	}
	s, err := parse(b)
	if err != nil {
		return nil, Files{}, err
	}
	names, err := entries(d)
	if err != nil {
		return nil, Files{}, err
	}

	files := Files{Content: make(map[string][]byte, len(s.Slots))}
	listed := map[string]bool{setFile: true}
	for _, x := range s.Slots {
		file := x.Name + suffix
		listed[file] = true
		b, err := readAt(d, file, MaxFileSize)
		switch {
		case err != nil:
			files.Findings = append(files.Findings, finding(x.Name, file, err))
		case hash(b) != x.SHA256:
			reason := Changed
			if slices.ContainsFunc(s.Slots, func(y Slot) bool { return y.SHA256 == hash(b) }) {
				reason = Swapped
			}
			files.Findings = append(files.Findings, &TamperError{Slot: x.Name, File: file, Reason: reason})
		default:
			files.Content[x.Name] = b
		}
	}
	slices.Sort(names)
	for _, file := range names {
		if !listed[file] {
			e := &TamperError{File: file, Reason: Planted}
			if name, ok := strings.CutSuffix(file, suffix); ok && CheckName(name) == nil {
				e.Slot = name
			}
			files.Findings = append(files.Findings, e)
		}
	}
	return s, files, nil
}

func hash(b []byte) string {
	h := sha256.Sum256(b)
	return hex.EncodeToString(h[:])
}

// refuse returns the findings that ignore does not name.
func (f Files) refuse(ignore []string) error {
	var errs []error
	for _, e := range f.Findings {
		if !slices.Contains(ignore, e.label()) {
			errs = append(errs, e)
		}
	}
	return errors.Join(errs...)
}

// finding returns what Load found about that slot.
func (f Files) finding(slot string) error {
	for _, e := range f.Findings {
		if e.Slot == slot {
			return e
		}
	}
	return finding(slot, slot+suffix, fs.ErrNotExist)
}
