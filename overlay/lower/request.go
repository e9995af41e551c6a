package lower

import (
	"fmt"
	"strings"
)

// Op is an operation of the worker protocol.
type Op uint32

// The operations that are let through. local-overlay-store.cc asks its lower
// store IsValidPath, QueryReferrers, QueryPathInfo, QueryPathFromHashPart,
// QueryValidPaths, QueryValidDerivers and QueryRealisation; SetOptions opens
// every connection. QueryAllValidPaths is for people who look at the lower
// store through the socket.
const (
	opIsValidPath           Op = 1
	opQueryReferrers        Op = 6
	opSetOptions            Op = 19
	opQueryAllValidPaths    Op = 23
	opQueryPathInfo         Op = 26
	opQueryPathFromHashPart Op = 29
	opQueryValidPaths       Op = 31
	opQueryValidDerivers    Op = 33
	opQueryRealisation      Op = 43

	// Ours only. A client's temp root would write any name to disk, and the roots of the
	// system are nobody's business who may only read its store.
	opAddTempRoot Op = 11
	opFindRoots   Op = 14
)

var opNames = map[Op]string{
	1: "IsValidPath", 6: "QueryReferrers", 7: "AddToStore", 8: "AddTextToStore", 9: "BuildPaths", 10: "EnsurePath",
	11: "AddTempRoot", 12: "AddIndirectRoot", 13: "SyncWithGC", 14: "FindRoots", 18: "QueryDeriver", 19: "SetOptions",
	20: "CollectGarbage", 21: "QuerySubstitutablePathInfo", 22: "QueryDerivationOutputs", 23: "QueryAllValidPaths",
	26: "QueryPathInfo", 28: "QueryDerivationOutputNames", 29: "QueryPathFromHashPart", 30: "QuerySubstitutablePathInfos",
	31: "QueryValidPaths", 32: "QuerySubstitutablePaths", 33: "QueryValidDerivers", 34: "OptimiseStore", 35: "VerifyStore",
	36: "BuildDerivation", 37: "AddSignatures", 38: "NarFromPath", 39: "AddToStoreNar", 40: "QueryMissing",
	41: "QueryDerivationOutputMap", 42: "RegisterDrvOutput", 43: "QueryRealisation", 44: "AddMultipleToStore",
	45: "AddBuildLog", 46: "BuildPathsWithResults", 47: "AddPermRoot",
}

func (o Op) String() string {
	if s, ok := opNames[o]; ok {
		return s
	}
	return fmt.Sprintf("operation %d", uint32(o))
}

// RefusedError says that the client asked for something a lower store does not
// give. Reason is shown to the client; it contains nothing the client sent.
type RefusedError struct {
	Op     Op
	Reason string
}

func (e *RefusedError) Error() string {
	return fmt.Sprintf("lower store refused %s: %s", e.Op, e.Reason)
}

// request is a parsed request. Settings are parsed and dropped.
type request struct {
	op    Op
	arg   string   // a path, a hash part or an output id
	paths []string // QueryValidPaths
}

// encode is the request as it goes upstream.
func (q request) encode() msg {
	m := msg(nil).num(uint64(q.op))
	switch q.op {
	case opSetOptions:
		return append(m, neutralOptions...)
	case opQueryAllValidPaths, opFindRoots:
		return m
	case opQueryValidPaths:
		return m.list(q.paths).num(0) // never substitute
	default:
		return m.str(q.arg)
	}
}

// neutralOptions is the body of our own SetOptions: keep-failed, keep-going,
// fallback, verbosity (warnings), max-jobs, max-silent-time, an obsolete 1,
// verbose-build (lvlVomit, that is no), two obsolete zeros, cores, substitute,
// and no further setting. The client's own list would tell the system daemon
// everything the personal nix.conf overrides, access tokens included.
var neutralOptions = msg(nil).num(0).num(0).num(0).num(1).num(1).num(0).num(1).num(7).num(0).num(0).num(1).num(0).num(0)

// readRequest reads the next request for a store at storeDir. It returns io.EOF
// when the client closed between two requests, a *RefusedError for what is not
// allowed (its arguments are then unread), or ErrProtocol.
func readRequest(w *wire, storeDir string) (request, error) {
	if _, err := w.r.Peek(1); err != nil {
		return request{}, err // io.EOF between requests is a clean end
	}
	w.begin(maxRequest, nil)
	n, err := w.u32()
	if err != nil {
		return request{}, err
	}
	q := request{op: Op(n)}
	path := func(s string) error {
		if !ValidPath(storeDir, s) {
			return violated("%s: argument is not a store path", q.op)
		}
		return nil
	}
	switch q.op {
	case opIsValidPath, opQueryPathInfo, opQueryReferrers, opQueryValidDerivers:
		if q.arg, err = w.str(maxString); err == nil {
			err = path(q.arg)
		}
	case opQueryPathFromHashPart:
		if q.arg, err = w.str(maxString); err == nil && !hashPart(q.arg) {
			err = violated("%s: argument is not a hash part", q.op)
		}
	case opQueryRealisation:
		if q.arg, err = w.str(maxString); err == nil && !outputID(q.arg) {
			err = violated("%s: argument is not an output id", q.op)
		}
	case opQueryAllValidPaths:
	case opQueryValidPaths:
		err = w.list(maxList, func(s string) error {
			q.paths = append(q.paths, s)
			return path(s)
		})
		if err != nil {
			break
		}
		var substitute uint32
		if substitute, err = w.u32(); err == nil && substitute != 0 {
			err = &RefusedError{q.op, "substitution would write to the lower store"}
		}
	case opSetOptions:
		err = readOptions(w)
	default:
		err = &RefusedError{q.op, "the lower store is read-only"}
	}
	return q, err
}

func readOptions(w *wire) error {
	for range 12 {
		if _, err := w.u32(); err != nil {
			return err
		}
	}
	n, err := w.u32()
	if err != nil {
		return err
	}
	if n > maxList {
		return violated("too many settings")
	}
	for ; n > 0; n-- {
		for range 2 {
			if _, err := w.bytes(maxSetting); err != nil {
				return err
			}
		}
	}
	return nil
}

// ValidPath reports whether s is storeDir, a slash and a valid base name, by
// the rules of Nix's StorePath (path.cc).
func ValidPath(storeDir, s string) bool {
	base, ok := strings.CutPrefix(s, storeDir+"/")
	if !ok || len(base) < 34 || len(base) > 33+211 || !hashPart(base[:32]) || base[32] != '-' {
		return false
	}
	name := base[33:]
	if name == "." || name == ".." || strings.HasPrefix(name, ".-") || strings.HasPrefix(name, "..-") {
		return false
	}
	for _, c := range []byte(name) {
		if !alnum(c) && strings.IndexByte("+-._?=", c) < 0 {
			return false
		}
	}
	return true
}

func alnum(c byte) bool {
	return c >= '0' && c <= '9' || c >= 'a' && c <= 'z' || c >= 'A' && c <= 'Z'
}

// hashPart: 32 characters of Nix's base 32, which has no e, o, t, u.
func hashPart(s string) bool {
	for _, c := range []byte(s) {
		if !(c >= '0' && c <= '9' || c >= 'a' && c <= 'z') || strings.IndexByte("eotu", c) >= 0 {
			return false
		}
	}
	return len(s) == 32
}

// outputID: ALGO:HASH!OUTPUT, printable; upstream parses it in full.
func outputID(s string) bool {
	if !strings.Contains(s, "!") {
		return false
	}
	for _, c := range []byte(s) {
		if c <= ' ' || c > '~' {
			return false
		}
	}
	return true
}
