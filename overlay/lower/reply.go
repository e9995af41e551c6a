package lower

// Tags of the frames that come before the result of an operation
// (worker-protocol.hh). STDERR_READ and STDERR_WRITE belong to operations that
// are not let through.
const (
	stderrNext          = 0x6f6c6d67
	stderrLast          = 0x616c7473
	stderrError         = 0x63787470
	stderrStartActivity = 0x53545254
	stderrStopActivity  = 0x53544f50
	stderrResult        = 0x52534c54
)

// maxErrorParts bounds the traces of one error and the fields of one log frame.
const maxErrorParts = 10_000

// readFrames reads log frames up to STDERR_LAST or STDERR_ERROR. failed tells
// which; text is the error's message.
func readFrames(w *wire) (failed bool, text string, err error) {
	for {
		tag, err := w.u64()
		if err != nil {
			return false, "", err
		}
		switch tag {
		case stderrLast:
			return false, "", nil
		case stderrError:
			text, err := readError(w)
			return true, text, err
		case stderrNext:
			_, err = w.bytes(maxSetting)
		case stderrStartActivity: // id, level, type, text, fields, parent
			if err = w.numbers(3); err == nil {
				_, err = w.bytes(maxSetting)
			}
			if err == nil {
				err = readFields(w)
			}
			if err == nil {
				err = w.numbers(1)
			}
		case stderrStopActivity:
			err = w.numbers(1)
		case stderrResult: // id, type, fields
			if err = w.numbers(2); err == nil {
				err = readFields(w)
			}
		default:
			err = violated("unknown frame before a result")
		}
		if err != nil {
			return false, "", err
		}
	}
}

func readFields(w *wire) error {
	n, err := w.u64()
	if err == nil && n > maxErrorParts {
		err = violated("too many fields in a log frame")
	}
	for ; err == nil && n > 0; n-- {
		var kind uint64
		if kind, err = w.u64(); err != nil {
			break
		}
		switch kind {
		case 0:
			err = w.numbers(1)
		case 1:
			_, err = w.bytes(maxSetting)
		default:
			err = violated("unknown field in a log frame")
		}
	}
	return err
}

// readError reads the body of STDERR_ERROR as it is since protocol 1.26: the
// word Error, a level, a name, the message, no position, traces.
func readError(w *wire) (string, error) {
	if kind, err := w.str(maxString); err != nil || kind != "Error" {
		return "", orViolated(err, "unknown kind of error")
	}
	if err := w.numbers(1); err != nil {
		return "", err
	}
	if _, err := w.bytes(maxString); err != nil {
		return "", err
	}
	text, err := w.str(maxSetting)
	if err != nil {
		return "", err
	}
	if pos, err := w.u64(); err != nil || pos != 0 {
		return "", orViolated(err, "error with a position")
	}
	traces, err := w.u64()
	if err == nil && traces > maxErrorParts {
		err = violated("too many traces in an error")
	}
	for ; err == nil && traces > 0; traces-- {
		var pos uint64
		if pos, err = w.u64(); err == nil && pos != 0 {
			err = violated("trace with a position")
		}
		if err == nil {
			_, err = w.bytes(maxSetting)
		}
	}
	return text, err
}

func orViolated(err error, text string) error {
	if err != nil {
		return err
	}
	return violated("%s", text)
}

// errorFrame is STDERR_ERROR with text, level 0 (error).
func errorFrame(text string) msg {
	return msg(nil).num(stderrError).str("Error").num(0).str("Error").str(text).num(0).num(0)
}

func noteFrame(text string) msg { return msg(nil).num(stderrNext).str(text + "\n") }

// result is what is kept of a reply.
type result struct {
	failed bool   // the reply was STDERR_ERROR
	text   string // its message
	number uint64 // IsValidPath, AddTempRoot; QueryPathInfo: valid or not
	paths  []string
	roots  []Root
}

// readReply reads the whole reply to an operation. When collect is false lists
// are only checked.
func readReply(w *wire, op Op, collect bool) (result, error) {
	var r result
	var err error
	if r.failed, r.text, err = readFrames(w); err != nil || r.failed {
		return r, err
	}
	each := func(s string) error {
		if collect {
			r.paths = append(r.paths, s)
		}
		return nil
	}
	switch op {
	case opSetOptions:
	case opIsValidPath, opAddTempRoot:
		r.number, err = w.u64()
	case opQueryPathInfo:
		if r.number, err = w.u64(); err == nil && r.number != 0 {
			err = readPathInfo(w)
		}
	case opQueryReferrers, opQueryValidDerivers, opQueryValidPaths, opQueryAllValidPaths, opQueryRealisation:
		err = w.list(maxReplyList, each)
	case opFindRoots:
		r.roots, err = readRoots(w)
	case opQueryPathFromHashPart:
		_, err = w.bytes(maxString)
	default:
		err = violated("no reply known for %s", op)
	}
	return r, err
}

// maxReplyList leaves room for the largest stores; nothing is kept of them
// unless asked for.
const maxReplyList = 64_000_000

// readPathInfo: deriver, NAR hash, references, registration time, NAR size,
// ultimate, signatures, content address (since protocol 1.16).
func readPathInfo(w *wire) error {
	for range 2 {
		if _, err := w.bytes(maxString); err != nil {
			return err
		}
	}
	if err := w.list(maxReplyList, nil); err != nil {
		return err
	}
	if err := w.numbers(3); err != nil {
		return err
	}
	if err := w.list(maxReplyList, nil); err != nil {
		return err
	}
	_, err := w.bytes(maxString)
	return err
}
