package main

import (
	"fmt"
	"slices"
	"strings"

	"overkeep/systemd/keep"
)

// Exit codes. A number means one thing for good: none is used again for
// something else, and new ones are added at the end of the table below.
const (
	exitOK            = 0  // done
	exitInternal      = 1  // a bug, or the system refused something unforeseen
	exitUsage         = 2  // the command line is wrong; nothing was done
	exitLocked        = 3  // the keep must be unlocked first
	exitWrongKey      = 4  // the key or passphrase opens no slot
	exitNotLocked     = 5  // the keep is NOT locked: something holds it, or it is open
	exitTampered      = 6  // what is on disk is not what was written
	exitUnsupported   = 7  // kernel, file system or Nix cannot do it
	exitNoKeep        = 8  // there is no such keep
	exitExists        = 9  // it exists already and is not overwritten
	exitNotRoot       = 10 // needs root
	exitAborted       = 11 // the user said no, or interrupted
	exitDamaged       = 12 // a file of the keep cannot be read
	exitNoSpace       = 13 // the disk or the keep is full
	exitInUse         = 14 // another overkeep command works on the keep
	exitUnknownFormat = 15 // written by a newer version
	exitWorkFactor    = 16 // a slot asks for more work than is allowed
	exitMountPoint    = 17 // something is in the way of the view
	exitPlugin        = 18 // an age plugin is missing or refused
	exitPolicy        = 19 // a policy or a file of expectations has a mistake
	exitRequire       = 20 // a require line of the policy does not hold
	exitExpectation   = 21 // the policy does not do what is expected of it
	exitNoPath        = 22 // the stores have no such path
	exitNix           = 23 // Nix did not do what it was asked for
	exitPlan          = 24 // a plan cannot be carried out: changed stores, or not what was written
	exitLeft          = 25 // some paths did not move
	exitNotPermitted  = 26 // the policy does not permit it
	exitUnfinished    = 27 // a move stopped half way; the next command goes on
	exitBlocked       = 28 // nothing of what was asked for can move
	exitResidue       = 29 // something of sealed paths is left on the device
)

// exitTable is what `overkeep help exit-codes` and the man page show.
var exitTable = []struct {
	code    int
	name    string
	meaning string
}{
	{exitOK, "ok", "Done. For lock this means with proof."},
	{exitInternal, "internal", "A bug, or the system refused something unforeseen."},
	{exitUsage, "usage", "The command line or a setting is wrong. Nothing was done."},
	{exitLocked, "locked", "The keep must be unlocked first."},
	{exitWrongKey, "wrong key", "The passphrase or key opens no slot."},
	{exitNotLocked, "not locked", "The keep is NOT locked: something holds it, or it must be locked first."},
	{exitTampered, "tampered", "What is on disk is not what overkeep wrote: damaged, exchanged or rolled back."},
	{exitUnsupported, "unsupported", "The kernel, the file system or the installed Nix cannot do it."},
	{exitNoKeep, "no such keep", "There is no keep of that name."},
	{exitExists, "exists", "The keep or file exists already; nothing was overwritten."},
	{exitNotRoot, "not root", "It needs root. Nothing was done."},
	{exitAborted, "aborted", "You said no, interrupted, or did not confirm the recovery key."},
	{exitDamaged, "damaged", "A file of the keep cannot be read."},
	{exitNoSpace, "no space", "The disk or the keep is full."},
	{exitInUse, "in use", "Another overkeep command is working on the keep."},
	{exitUnknownFormat, "unknown format", "The keep was written by a version this one does not know."},
	{exitWorkFactor, "work factor", "A slot asks for more memory and time than is allowed."},
	{exitMountPoint, "mount point", "Something is in the way where the view wants to mount."},
	{exitPlugin, "plugin", "An age plugin is missing, or refused."},
	{exitPolicy, "policy", "The policy, or its expectations, cannot be read: a mistake, with its place."},
	{exitRequire, "require", "A require line of the policy does not hold."},
	{exitExpectation, "expectation", "The policy does not do what is expected of it."},
	{exitNoPath, "no such path", "The stores have no such path."},
	{exitNix, "nix", "Nix was asked and did not answer. Its own words are in the message."},
	{exitPlan, "plan", "The plan is not what was written, or the stores changed since."},
	{exitLeft, "left", "Some paths stay where they are; they are named."},
	{exitNotPermitted, "not permitted", "The policy keeps a path private that would become readable."},
	{exitUnfinished, "unfinished", "A move stopped half way; the next command that moves goes on."},
	{exitBlocked, "blocked", "Nothing of it can move; what holds it is named."},
	{exitResidue, "residue", "Something of sealed paths is left on the system's disk."},
}

// exitOf is the exit code of every code of the library.
var exitOf = map[keep.Code]int{
	keep.CodeInternal:    exitInternal,
	keep.CodeUsage:       exitUsage,
	keep.CodeNotRoot:     exitNotRoot,
	keep.CodeNoKeep:      exitNoKeep,
	keep.CodeKeepExists:  exitExists,
	keep.CodeWrongKey:    exitWrongKey,
	keep.CodeTampered:    exitTampered,
	keep.CodeForeign:     exitTampered,
	keep.CodeDamaged:     exitDamaged,
	keep.CodeVersion:     exitUnknownFormat,
	keep.CodeWorkFactor:  exitWorkFactor,
	keep.CodeUnsupported: exitUnsupported,
	keep.CodeNoNix:       exitUnsupported,
	keep.CodeLocked:      exitLocked,
	keep.CodeUnlocked:    exitNotLocked,
	keep.CodeNotLocked:   exitNotLocked,
	keep.CodeNoSpace:     exitNoSpace,
	keep.CodeMountPoint:  exitMountPoint,
	keep.CodeAborted:     exitAborted,
	keep.CodeUnconfirmed: exitAborted,
	keep.CodeBusyRun:     exitInUse,
	keep.CodePlugin:      exitPlugin,
	codePolicy:           exitPolicy,
	codeRequire:          exitRequire,
	codeExpectation:      exitExpectation,
	codeNoPath:           exitNoPath,
	codeNix:              exitNix,
	codePlan:             exitPlan,
	codeNotPermitted:     exitNotPermitted,
	codeUnfinished:       exitUnfinished,
	codeBlocked:          exitBlocked,
}

// exitLines renders the given codes, or all of them, one a line.
func exitLines(codes ...int) string {
	var b strings.Builder
	for _, e := range exitTable {
		if len(codes) == 0 || slices.Contains(codes, e.code) {
			fmt.Fprintf(&b, "  %2d  %-14s  %s\n", e.code, e.name, e.meaning)
		}
	}
	return b.String()
}
