package main

import (
	"errors"

	"overkeep/overlay/move"
	"overkeep/overlay/plan"
	"overkeep/systemd/keep"
)

// What can go wrong with moves, beside the codes of systemd/keep and of policies.
const (
	codePlan         keep.Code = "plan"
	codeNotPermitted keep.Code = "not-permitted"
	codeUnfinished   keep.Code = "unfinished"
	codeBlocked      keep.Code = "blocked"
)

var moveCodes = []keep.Code{codePlan, codeNotPermitted, codeUnfinished, codeBlocked}

// explainMoves is explain for what moves paths; nil where err is of another kind.
func explainMoves(err error, h here) *problem {
	var (
		changed   *planChanged
		file      *plan.FileError
		permitted *plan.NotPermittedError
		blocked   *blockedError
		half      *move.UnfinishedError
		space     *move.SpaceError
		collector *move.CollectorError
		there     *plan.NotThereError
	)
	again := func(why string) []remedy { return []remedy{{why, h.again()}} }
	switch {
	case errors.As(err, &half):
		return &problem{Code: codeUnfinished, Message: half.Error(), Remedy: []remedy{{"Nothing is lost; the next command that moves goes on from the journal:", h.command("wipe")}}}
	case errors.As(err, &changed):
		return &problem{Code: codePlan, Message: changed.Error(), Name: changed.file, Remedy: []remedy{{"Make a new plan and look at it:", h.command("plan", "--out", changed.file)}}}
	case errors.As(err, &file):
		return &problem{Code: codePlan, Message: file.Error(), Remedy: []remedy{{"Make a new plan:", h.command("plan", "--out", "~/keep/plan")}}}
	case errors.As(err, &permitted):
		return &problem{Code: codeNotPermitted, Message: permitted.Error(), Name: permitted.Path,
			Remedy: []remedy{{"See why it is private:", h.command("why", permitted.Path)}, {"Permit it in the policy:", h.command("policy", "edit")}}}
	case errors.As(err, &there):
		return &problem{Code: codeNoPath, Message: there.Error(), Name: there.Path, Remedy: []remedy{{"See where it lies:", h.command("why", there.Path)}}}
	case errors.As(err, &blocked):
		return &problem{Code: codeBlocked, Message: blocked.Error(), Name: blocked.p.Blocked[0].Path, Remedy: again("When that is out of the way:")}
	case errors.As(err, &space):
		return &problem{Code: keep.CodeNoSpace, Message: space.Error() + "; nothing was moved", Remedy: roomRemedy(space, h)}
	case errors.As(err, &collector):
		return &problem{Code: keep.CodeBusyRun, Message: collector.Error(), Remedy: again("When it is done:")}
	case errors.Is(err, move.ErrBusy):
		return &problem{Code: keep.CodeBusyRun, Message: move.ErrBusy.Error(), Remedy: again("When that is done:")}
	case errors.Is(err, move.ErrJournalVersion):
		return &problem{Code: keep.CodeVersion, Message: err.Error(), Remedy: remedies(&keep.Error{Code: keep.CodeVersion}, h)}
	case errors.Is(err, move.ErrJournal):
		return &problem{Code: keep.CodeDamaged, Message: err.Error(), Remedy: []remedy{{"Look at it:", h.command("run", "--as-root", "--", "ls", "-l", "/run/overkeep/"+h.keep+"/k/journal")}}}
	}
	return nil
}

// roomRemedy is how room is made where it is missing.
func roomRemedy(e *move.SpaceError, h here) []remedy {
	switch e.Where {
	case move.InKeep:
		return []remedy{{"Collect garbage in the keep:", h.command("run", "--", "nix-collect-garbage", "-d")}}
	case move.InSystem:
		return []remedy{{"Collect garbage in the system store, outside of the view:", "sudo nix-collect-garbage"}}
	}
	return []remedy{{Why: "Make room on the disk; the keep's image grows with what is in it."}}
}
