package main

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"io"
	"os"
	"os/exec"
	"path/filepath"

	"overkeep/overlay/verdict"
	"overkeep/policy"
)

// otherSources are the policy files in force beside one.
func otherSources(a *app, s *sight, file string) ([]policy.Source, error) {
	all, err := verdict.PolicySources(a.root, s.of)
	if err != nil {
		return nil, err
	}
	var out []policy.Source
	for _, src := range all {
		if src.Name != file {
			out = append(out, src)
		}
	}
	return out, nil
}

// editText lets the user edit a copy beside the file, where it is as private as the
// file itself and so is what an editor leaves behind, until check has no complaint.
// It returns nil where nothing was changed.
func (a *app) editText(ctx context.Context, file string, old []byte, check func([]byte) error) ([]byte, error) {
	tty, err := a.ui.tty("the new text", "")
	if err != nil {
		return nil, usagef("editing needs a terminal; without one, replace %q yourself and check it", file)
	}
	defer tty.Close()
	f, err := os.CreateTemp(filepath.Dir(file), ".edit-*-"+filepath.Base(file))
	if err != nil {
		return nil, err
	}
	defer os.Remove(f.Name())
	_, err = f.Write(old)
	if err := errors.Join(err, f.Close()); err != nil {
		return nil, err
	}
	for {
		if err := runEditor(ctx, tty, f.Name()); err != nil {
			return nil, err
		}
		text, err := readBounded(f.Name())
		if err != nil {
			return nil, err
		}
		if bytes.Equal(text, old) {
			a.ui.note("nothing was changed")
			return nil, nil
		}
		err = check(text)
		if err == nil {
			return text, nil
		}
		var wrong *policy.Errors
		if !errors.As(err, &wrong) {
			return nil, err
		}
		fmt.Fprintln(tty, wrong.Detail())
		again, err := a.ui.confirm(ctx, "Edit once more? Otherwise nothing is changed.")
		if err != nil {
			return nil, err
		}
		if !again {
			return nil, wrong
		}
	}
}

// readBounded reads a policy with one byte more than the parser takes.
func readBounded(name string) ([]byte, error) {
	f, err := os.Open(name)
	if err != nil {
		return nil, err
	}
	defer f.Close()
	return io.ReadAll(io.LimitReader(f, policy.MaxSource+1))
}

// runEditor runs $VISUAL, $EDITOR, or what there is, on the terminal. The variable
// may hold arguments, so a shell reads it, as git and sudoedit let one.
func runEditor(ctx context.Context, tty *os.File, name string) error {
	editor := os.Getenv("VISUAL")
	if editor == "" {
		editor = os.Getenv("EDITOR")
	}
	if editor == "" {
		for _, e := range []string{"sensible-editor", "editor", "nano", "vi"} {
			if _, err := exec.LookPath(e); err == nil {
				editor = e
				break
			}
		}
	}
	if editor == "" {
		return usagef("no editor was found: set $EDITOR")
	}
	c := exec.CommandContext(ctx, "/bin/sh", "-c", editor+` "$1"`, editor, name)
	c.Stdin, c.Stdout, c.Stderr = tty, tty, tty
	if err := c.Run(); err != nil {
		return aborted(fmt.Sprintf("the editor %q ended with %v, so nothing was changed", editor, err))
	}
	return nil
}
