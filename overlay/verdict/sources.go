package verdict

import (
	"errors"
	"fmt"
	"io"
	"io/fs"
	"os"
	"path/filepath"
	"slices"
	"strings"

	"golang.org/x/sys/unix"

	"overkeep/overlay/layout"
	"overkeep/policy"
)

// Suffix is what the name of a drop-in ends in.
const Suffix = ".policy"

// PolicySources reads the policy that holds for a keep: root's policy and its
// drop-ins, which may grant, and the drop-ins inside the keep, which may only veto.
// keep is nil where no keep is open: then it is the policy of the system alone. What
// is not there is left out; an empty result means that there is no policy, and that
// everything is personal.
//
// A file that cannot be read, leads nowhere, went away since it was listed, or is too
// long, is an error: a veto that is not read is a path in plaintext. Errors are
// *os.PathError, *SourceError, or *policy.Errors beyond a bound of package policy.
func PolicySources(root string, keep *layout.Keep) ([]policy.Source, error) {
	var out []policy.Source
	total := 0
	add := func(files []string, isRoot bool) error {
		for _, f := range files {
			s, err := read(f, isRoot, isRoot)
			if err != nil {
				return err
			}
			out = append(out, s)
			// The files of a user are as many and as long as the user likes, and root
			// reads them: the parser says what is wrong, before memory is gone.
			if total += len(s.Text); len(out) > policy.MaxSources || total > policy.MaxText {
				_, err := policy.Parse(out...)
				return err
			}
		}
		return nil
	}
	files, err := listPolicies(layout.PolicyDir(root))
	if err != nil {
		return nil, err
	}
	file := layout.PolicyFile(root)
	if there, err := exists(file); err != nil {
		return nil, err
	} else if there {
		files = append([]string{file}, files...)
	}
	if err := add(files, true); err != nil {
		return nil, err
	}
	if keep == nil {
		return out, nil
	}
	own, err := listPolicies(keep.Policy())
	if err != nil {
		return nil, err
	}
	return out, add(own, false)
}

// exists reports whether something has that name. A link that leads nowhere has it.
func exists(name string) (bool, error) {
	_, err := os.Lstat(name)
	if errors.Is(err, fs.ErrNotExist) {
		return false, nil
	}
	return err == nil, err
}

// listPolicies returns the drop-ins in dir, sorted; none if dir is not there, and of
// more than a policy can have so many that the parser complains.
func listPolicies(dir string) ([]string, error) {
	if there, err := exists(dir); !there {
		return nil, err
	}
	d, err := os.Open(dir)
	if err != nil {
		return nil, err
	}
	defer d.Close()
	var out []string
	for len(out) <= policy.MaxSources {
		names, err := d.Readdirnames(1024)
		for _, n := range names {
			if strings.HasSuffix(n, Suffix) && !strings.HasPrefix(n, ".") {
				out = append(out, filepath.Join(dir, n))
			}
		}
		if err == io.EOF {
			break
		}
		if err != nil {
			return nil, err
		}
	}
	slices.Sort(out)
	return out[:min(len(out), policy.MaxSources+1)], nil
}

// SourceError is a policy file that is none.
type SourceError struct{ Path, Reason string }

func (e *SourceError) Error() string { return fmt.Sprintf("policy file %q %s", e.Path, e.Reason) }

// PolicyFile reads a file that the caller named. isRoot says whether it may grant.
func PolicyFile(path string, isRoot bool) (policy.Source, error) { return read(path, isRoot, false) }

// read reads one file; an owned one must be root's alone (or, for an installation
// of a user's own below --root, that user's).
func read(path string, isRoot, owned bool) (policy.Source, error) {
	// A user's file may be anything the user likes, a pipe or a link elsewhere, and
	// root reads it.
	flags := os.O_RDONLY | unix.O_NONBLOCK
	if !isRoot {
		flags |= unix.O_NOFOLLOW
	}
	f, err := os.OpenFile(path, flags, 0)
	if errors.Is(err, unix.ELOOP) {
		return policy.Source{}, &SourceError{path, "is a symbolic link"}
	}
	if err != nil {
		return policy.Source{}, err
	}
	defer f.Close()
	fi, err := f.Stat()
	if err != nil {
		return policy.Source{}, err
	}
	if !fi.Mode().IsRegular() {
		return policy.Source{}, &SourceError{path, "is no regular file"}
	}
	var st unix.Stat_t
	if err := unix.Fstat(int(f.Fd()), &st); err != nil {
		return policy.Source{}, err
	}
	if owned && (st.Uid != 0 && int(st.Uid) != os.Geteuid() || st.Mode&0o022 != 0) {
		return policy.Source{}, &SourceError{path, "can be written by others than root, and grants"}
	}
	// One byte more than is allowed: the parser then says so, with the position.
	text, err := io.ReadAll(io.LimitReader(f, policy.MaxSource+1))
	if err != nil {
		return policy.Source{}, err
	}
	return policy.Source{Name: path, Text: text, Root: isRoot}, nil
}
