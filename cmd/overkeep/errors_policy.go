package main

import (
	"errors"
	"io/fs"
	"path"
	"slices"
	"strings"

	"overkeep/overlay/facts"
	"overkeep/overlay/layout"
	"overkeep/overlay/nixdb"
	"overkeep/overlay/provenance"
	"overkeep/overlay/verdict"
	"overkeep/policy"
	"overkeep/systemd/keep"
)

// What can go wrong with policies, beside the codes of systemd/keep.
const (
	codePolicy      keep.Code = "policy"
	codeRequire     keep.Code = "require"
	codeExpectation keep.Code = "expectation"
	codeNoPath      keep.Code = "no-such-path"
	codeNix         keep.Code = "nix"
)

var policyCodes = []keep.Code{codePolicy, codeRequire, codeExpectation, codeNoPath, codeNix}

// explainPolicy is explain for what decides; nil where err is of another kind.
func explainPolicy(err error, h here) *problem {
	var (
		text   *policy.Errors
		source *verdict.SourceError
		noPath *pathError
		file   *fs.PathError
		nix    *nixError
	)
	switch {
	case errors.As(err, &text):
		return &problem{Code: codePolicy, Message: text.Detail(), Name: text.List[0].Source, Remedy: policyRemedy(text.List[0].Source, h)}
	case errors.As(err, &source):
		p := &problem{Code: codePolicy, Message: source.Error(), Name: source.Path}
		p.Remedy = []remedy{{"See what it is:", "ls -l " + quoteWord(source.Path)}}
		return p
	case errors.As(err, &noPath):
		p := &problem{Code: codeNoPath, Message: noPath.Error(), Name: noPath.word}
		pattern := "*" + strings.Trim(path.Base(noPath.word), "*") + "*"
		p.Remedy = []remedy{{"Look for a part of the name:", h.command(append(append([]string{"list"}, sightFlags(h.line)...), "--where", "name \""+pattern+"\"")...)}}
		return p
	case errors.As(err, &nix):
		p := &problem{Code: codeNix, Message: nix.Error()}
		if nix.offline {
			p.Remedy = append(p.Remedy, remedy{"If it needs the network, or a build:", h.command(append(slices.Clone(h.line), "--fetch")...)})
		}
		p.Remedy = append(p.Remedy, remedy{"The same by hand:", h.command(append([]string{"run", nix.keep, "--", "nix"}, nix.args...)...)})
		return p
	case errors.Is(err, provenance.ErrInput), errors.Is(err, provenance.ErrVersion), errors.Is(err, provenance.ErrUnsafe), errors.Is(err, provenance.ErrSize):
		if errors.Is(err, provenance.ErrVersion) {
			return &problem{Code: keep.CodeVersion, Message: err.Error(), Remedy: remedies(&keep.Error{Code: keep.CodeVersion}, h)}
		}
		return &problem{Code: keep.CodeDamaged, Message: err.Error(), Remedy: originRemedy(h)}
	case errors.Is(err, nixdb.ErrMissing):
		return &problem{Code: keep.CodeNoNix, Message: err.Error(), Remedy: []remedy{{"What the machine has of Nix:", h.command("doctor")}}}
	case errors.Is(err, nixdb.ErrCorrupt):
		return &problem{Code: keep.CodeDamaged, Message: err.Error(), Remedy: []remedy{{"Let Nix look at it:", "nix-store --verify"}}}
	case errors.Is(err, nixdb.ErrSchema), errors.Is(err, facts.ErrTooLarge):
		return &problem{Code: keep.CodeUnsupported, Message: err.Error(), Remedy: []remedy{{"What the machine has of Nix:", h.command("doctor")}}}
	case errors.Is(err, nixdb.ErrBusy):
		return &problem{Code: keep.CodeBusyRun, Message: err.Error(), Remedy: []remedy{{"Once more:", h.again()}}}
	case errors.Is(err, nixdb.ErrUnreadable), errors.As(err, &file) && errors.Is(err, fs.ErrPermission):
		h.sudo = true
		return &problem{Code: keep.CodeNotRoot, Message: err.Error(), Remedy: []remedy{{"The same as root:", h.again()}}}
	}
	return nil
}

// policyRemedy is the command that opens a policy file with a mistake.
func policyRemedy(name string, h here) []remedy {
	root := layout.PolicyFile(h.root)
	switch {
	case !strings.HasPrefix(name, "/"):
		return []remedy{{"How the language goes:", "overkeep help policy"}}
	case name == root || strings.HasPrefix(name, layout.PolicyDir(h.root)+"/"):
		h.sudo = true
		args := []string{"policy", "edit"}
		if name != root {
			args = append(args, path.Base(name))
		}
		return []remedy{{"Mend it:", h.command(args...)}}
	}
	return []remedy{{"Mend it, and look again:", h.again()}}
}

// originRemedy puts the file of recorded origins aside.
func originRemedy(h here) []remedy {
	k, err := layout.New(h.root, h.keep)
	if err != nil {
		return nil
	}
	dir := k.Provenance()
	return []remedy{{"Put it aside; what lock files say is recorded anew:",
		h.command("run", k.Name, "--as-root", "--", "mv", dir, dir+".damaged")}}
}
