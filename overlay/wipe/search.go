package wipe

import (
	"context"
	"io"

	"overkeep/overlay/wipe/needle"
)

// Search reads all of r, such as a Disk, and calls each for every occurrence of a name:
// its index and the offset in bytes, ascending. Hash parts (32 digits of Nix's
// base 32) are looked for at once at the speed of reading, whatever their number;
// other strings of at least four bytes at some GB/s. What is compressed, encrypted, or
// cut by the end of a block whose next one lies elsewhere is not found.
func Search(ctx context.Context, r io.Reader, names [][]byte, each func(name int, offset int64)) error {
	set, err := needle.New(names)
	if err != nil || len(names) == 0 {
		return err
	}
	return set.Stream(ctx, r, each)
}
