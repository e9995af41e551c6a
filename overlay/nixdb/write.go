package nixdb

import (
	"context"
	"errors"
	"fmt"
)

// Info is all that a Nix database says of one path, so that the path can be
// registered elsewhere as if it had been built or fetched there.
type Info struct {
	Path             string   `json:"path"` // /nix/store/HASH-NAME
	Deriver          string   `json:"deriver,omitempty"`
	NarHash          string   `json:"narHash"` // as stored: sha256:HEX
	NarSize          int64    `json:"narSize"` // bytes, 0 if not known
	RegistrationTime int64    `json:"registrationTime"`
	Ultimate         bool     `json:"ultimate,omitempty"`
	Sigs             []string `json:"sigs,omitempty"`
	CA               string   `json:"ca,omitempty"`
	Refs             []string `json:"refs,omitempty"`    // paths, sorted; itself among them if it says so
	Outputs          []Output `json:"outputs,omitempty"` // of a .drv, by id
}

// Output is a row of DerivationOutputs: what a derivation calls an output, and
// where that is or would be.
type Output struct {
	ID   string `json:"id"`
	Path string `json:"path"`
}

// MissingRefError: a path refers to one that is neither registered nor among those
// to register.
type MissingRefError struct{ Path, Ref string }

func (e *MissingRefError) Error() string {
	return fmt.Sprintf("%q refers to %q, which is not registered", e.Path, e.Ref)
}

// ConflictError: the database knows a path with another NAR hash.
type ConflictError struct{ Path string }

func (e *ConflictError) Error() string {
	return fmt.Sprintf("%q is registered with another hash", e.Path)
}

// ReferredError: a path cannot go, for one that stays refers to it.
type ReferredError struct{ Path, By string }

func (e *ReferredError) Error() string {
	return fmt.Sprintf("%q is referred to by %q", e.Path, e.By)
}

var errTODO = errors.New("not built yet")

// ReadInfos reads what a database says of paths, as of one moment, in their order;
// missing are those that it does not know. A path that is given twice is read once.
func ReadInfos(ctx context.Context, file string, paths []string) (infos []Info, missing []string, err error) {
	return nil, nil, errTODO
}

// ReadClosure reads paths and all that they refer to, directly or not, as of one
// moment: references before their referrers, but for cycles. A path or reference
// without a row is a *MissingRefError (with an empty Path for one that was asked for).
func ReadClosure(ctx context.Context, file string, paths []string) ([]Info, error) {
	return nil, errTODO
}

// Register adds rows, with their references and outputs, in one transaction: all or
// none. A reference is to a path of infos or to one that is registered; else it is
// a *MissingRefError. A path that is registered with the same NAR hash keeps its
// row, to which missing references and outputs are added; with another hash it is a
// *ConflictError. Repeating it changes nothing.
//
// The caller holds what Nix asks for (gc.lock, the path's lock).
func Register(ctx context.Context, file string, infos []Info) error { return errTODO }

// Invalidate removes the rows of paths, their references and the outputs of
// derivations in one transaction, with secure_delete: all or none. A path to which a
// remaining row refers is a *ReferredError; one of expect (path to NAR hash, may be
// nil) that is registered with another hash a *ConflictError. A path without
// a row is no error, so it may be repeated.
//
// What names a removed path still: see ClearDeriver. What stands in free pages and in
// the WAL: see Scrub.
func Invalidate(ctx context.Context, file string, paths []string, expect map[string]string) error {
	return errTODO
}

// Derived returns the registered paths that name one of drvs as their deriver.
func Derived(ctx context.Context, file string, drvs []string) ([]string, error) { return nil, errTODO }

// ClearDeriver makes that no row names one of drvs as its deriver, and says how many
// did. Nix takes such a path as one whose deriver is not known.
func ClearDeriver(ctx context.Context, file string, drvs []string) (int, error) { return 0, errTODO }
