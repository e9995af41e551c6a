package keep

import (
	"context"
	"slices"

	"overkeep/crypt/crashpoint"
	"overkeep/overlay/holder"
)

// endFirst refuses new work and ends what holds the keep, while all of the view and the
// supervisor are there still: a build whose inputs are unmounted before it has ended may
// end well with other contents, a collection that finds the user's directories unmounted
// takes what their links hold, and a mover that is asked to end needs the supervisor to
// set right what it has begun. A process that has nothing but a copy of the mounts is
// left alone.
func (l *locker) endFirst(ctx context.Context) error {
	pid := supervisorPID(l.c.k)
	if pid != 0 {
		crashpoint.At("lock.end")
		_, _ = control(l.c.k, "drain") // else stopSupervisor sees to it
	}
	// The daemon's workers are the supervisor's children now, and holders like others.
	hs := slices.DeleteFunc(l.holders(ctx, map[int]bool{pid: true}), func(h holder.Holder) bool {
		return h.PID <= 0 || !slices.ContainsFunc(h.Holds, func(x holder.Hold) bool {
			return x.How != holder.MountNamespace && x.How != holder.NamespaceFile
		})
	})
	if len(hs) == 0 {
		return nil
	}
	return l.deal(ctx, errHeld, hs)
}
