package nixdb

import "context"

// ScrubResult says what Scrub found and did.
type ScrubResult struct {
	Hits      int   `json:"hits"`      // occurrences outside of live rows before
	Live      int   `json:"live"`      // names that live rows still hold: nothing is done about these
	Vacuumed  bool  `json:"vacuumed"`  // the file was written anew
	WALBytes  int64 `json:"walBytes"`  // of the WAL that was overwritten
	Left      int   `json:"left"`      // occurrences outside of live rows after; 0 unless err
	Truncated bool  `json:"truncated"` // the WAL is empty now; false: a reader kept it, but it holds none of the names
}

// Scrub makes that none of names (hash parts, base names) stands in the bytes of the
// database file outside of live rows, in its WAL or in its journal, also while Nix has
// it open. ErrBusy: someone kept it in use for longer than busyTimeout; nothing
// is broken, try again.
func Scrub(ctx context.Context, file string, names [][]byte) (ScrubResult, error) {
	return ScrubResult{}, errTODO
}
