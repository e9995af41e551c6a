package keep

import (
	"context"
	"path/filepath"

	"overkeep/overlay/layout"
	"overkeep/overlay/nixdb"
	"overkeep/overlay/provenance"
)

// maxPassiveOrigins bounds, in bytes, the file of origins that is written unasked:
// the supervisor holds it in memory while it adds to it, and a user's builds decide
// how much that is. It is some hundred thousand sources; overkeep origin may go on.
const maxPassiveOrigins = 32 << 20

// origins records where sources come from as they pass by: by the lock files of the
// flakes that were evaluated in the view.
type origins struct {
	k       layout.Keep
	sources provenance.Sources
}

func newOrigins(k layout.Keep) *origins {
	return &origins{k, provenance.Sources{Dir: k.Upper(), Valid: func(ctx context.Context, paths []string) ([]string, error) {
		db, err := nixdb.Open(ctx, filepath.Join(k.NixDB(), "db.sqlite"))
		if err != nil {
			return nil, err
		}
		return db.Exists(ctx, paths)
	}}}
}

// record looks at the sources that are new since the last call, in the first call at
// all of them: an earlier supervisor may not have come to it. Nothing is left open
// in the volume. What goes wrong is left as it is; an origin that is not recorded is
// unknown, which a policy can deal with.
func (o *origins) record(ctx context.Context) {
	// A mistake in a reader of users' files must not end the session.
	defer func() { _ = recover() }()
	var store *provenance.Store
	_, _ = o.sources.Look(ctx, func(_ string, records []provenance.Record) (err error) {
		if len(records) == 0 {
			return nil
		}
		if store == nil {
			if store, err = provenance.OpenWithin(o.k.Provenance(), maxPassiveOrigins); err != nil {
				return err
			}
		}
		_, err = store.Add(records...)
		return err
	})
	if store != nil && store.Wasteful() {
		_ = store.Compact()
	}
}
