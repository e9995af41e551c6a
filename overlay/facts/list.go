package facts

import (
	"bytes"
	"context"
	"encoding/base64"
	"encoding/hex"
	"io"
	"slices"
	"strconv"
	"unicode/utf8"

	"overkeep/overlay/nixdb"
	"overkeep/policy/graph"
)

// Listing says what WriteJSON writes. The zero value is everything, as Nix does.
type Listing struct {
	// Only says which paths to write; nil: all. It is called by several goroutines.
	Only func(id graph.ID) bool
	// Extra appends further members of a path's object, each with a comma before
	// it: `,"verdict":"system"`. It is called by several goroutines.
	Extra func(b []byte, id graph.ID) []byte
}

// WriteJSON writes all paths as one JSON object by store path, in no order, each with
// the members of `nix path-info --json --json-format 1` and those of
// Listing.Extra. What only the database knows is read from it again, as of the
// moment of the graph; for a path in both databases it is the lower's row.
//
// The states of the databases stay open until it returns: w should not be
// somebody's pager.
func (s *Snapshot) WriteJSON(ctx context.Context, w io.Writer, o Listing) error {
	out := &object{w: w}
	for _, l := range s.stores {
		if err := s.storeJSON(ctx, l, out, &o); err != nil {
			return err
		}
	}
	end := "}\n"
	if !out.begun {
		end = "{}\n"
	}
	_, err := io.WriteString(w, end)
	return err
}

// object is a JSON object that is being written.
type object struct {
	w     io.Writer
	begun bool
}

// members writes some, each of which begins with a comma.
func (o *object) members(b []byte) error {
	if len(b) == 0 {
		return nil
	}
	if !o.begun {
		b[0] = '{'
		o.begun = true
	}
	_, err := o.w.Write(b)
	return err
}

// perBuffer is how many ids, of a kilobyte each or so, are in a buffer.
const perBuffer = 1 << 11

// storeJSON writes the paths of a database: its readers fill a buffer per range of
// ids, which are written in order, and window of them are in memory at most.
func (s *Snapshot) storeJSON(ctx context.Context, l *loading, out *object, o *Listing) error {
	ctx, cancel := context.WithCancel(ctx)
	defer cancel()
	ranges := l.ranges(perBuffer)
	window := 2*l.snap.Readers() + 1
	filled, written := make([]chan []byte, len(ranges)), make([]chan struct{}, len(ranges))
	spare := make(chan []byte, window)
	tasks := make([]task, len(ranges))
	for i, c := range ranges {
		filled[i], written[i] = make(chan []byte, 1), make(chan struct{})
		tasks[i] = func(ctx context.Context, reader int) error {
			if i >= window {
				select {
				case <-written[i-window]:
				case <-ctx.Done():
					return ctx.Err()
				}
			}
			var b []byte
			select {
			case b = <-spare:
			default:
			}
			b, err := s.rangeJSON(ctx, l, reader, c, b[:0], o)
			if err == nil {
				filled[i] <- b
			}
			return err
		}
	}
	failed := make(chan error, 1)
	go func() {
		err := l.perform(ctx, tasks)
		if err != nil {
			cancel()
		}
		failed <- err
	}()
	for i := range ranges {
		var b []byte
		select {
		case b = <-filled[i]:
		case <-ctx.Done():
			return <-failed
		}
		if err := out.members(b); err != nil {
			cancel()
			<-failed // the readers are no longer in use
			return err
		}
		close(written[i])
		select {
		case spare <- b:
		default:
		}
	}
	return <-failed
}

// rangeJSON appends the paths of a range, each with a comma before it.
func (s *Snapshot) rangeJSON(ctx context.Context, l *loading, reader int, c *chunk, b []byte, o *Listing) ([]byte, error) {
	prefix := s.o.StoreDir + "/"
	var refs []graph.ID
	err := l.snap.Paths(ctx, reader, c.lo, c.hi, true, func(r *nixdb.Row) error {
		row := l.rows.row(r.ID)
		if row < 0 || baseOf(r.Path, prefix) == nil {
			return nil
		}
		id := l.id(row)
		if l.ids != nil && int(id) < s.stores[0].n {
			return nil // the lower database has it
		}
		if o.Only != nil && !o.Only(id) {
			return nil
		}
		b = append(b, `,"`...)
		b = append(b, r.Path...)
		b = append(b, `":{"ca":`...)
		b = appendText(b, r.CA)
		b = append(b, `,"deriver":`...)
		b = appendText(b, r.Deriver)
		b = append(b, `,"narHash":`...)
		b = appendSRI(b, r.Hash)
		b = append(b, `,"narSize":`...)
		b = strconv.AppendInt(b, r.NarSize, 10)
		b = append(b, `,"references":[`...)
		refs = append(refs[:0], s.Graph.References(id)...)
		slices.SortFunc(refs, func(x, y graph.ID) int { return bytes.Compare(s.Graph.BaseName(x), s.Graph.BaseName(y)) })
		for i, ref := range refs {
			if i > 0 {
				b = append(b, ',')
			}
			b = append(b, '"')
			b = append(b, prefix...)
			b = append(b, s.Graph.BaseName(ref)...)
			b = append(b, '"')
		}
		b = append(b, `],"registrationTime":`...)
		b = strconv.AppendInt(b, r.RegistrationTime, 10)
		b = append(b, `,"signatures":[`...)
		n := 0
		for sig := range bytes.FieldsSeq(r.Sigs) {
			if n > 0 {
				b = append(b, ',')
			}
			b = appendText(b, sig)
			n++
		}
		b = append(b, `],"storeDir":`...)
		b = appendText(b, []byte(s.o.StoreDir))
		b = append(b, `,"ultimate":`...)
		b = strconv.AppendBool(b, r.Ultimate)
		b = append(b, `,"version":1`...)
		if o.Extra != nil {
			b = o.Extra(b, id)
		}
		b = append(b, '}')
		return nil
	})
	return b, err
}

// appendSRI appends a NAR hash as Nix prints it, or null.
func appendSRI(b, hash []byte) []byte {
	digits := hashDigits(hash)
	if digits == nil {
		return append(b, "null"...)
	}
	var raw [32]byte
	_, _ = hex.Decode(raw[:], digits) // they have been looked at
	b = append(b, `"sha256-`...)
	b = base64.StdEncoding.AppendEncode(b, raw[:])
	return append(b, '"')
}

// appendText appends a JSON string, null for an empty one.
func appendText(b, s []byte) []byte {
	if len(s) == 0 {
		return append(b, "null"...)
	}
	b = append(b, '"')
	plain := true
	for _, c := range s {
		plain = plain && c >= ' ' && c < 0x7f && c != '"' && c != '\\'
	}
	if plain {
		return append(append(b, s...), '"')
	}
	for len(s) > 0 {
		r, n := utf8.DecodeRune(s) // what is no UTF-8 becomes U+FFFD
		s = s[n:]
		switch {
		case r == '"' || r == '\\':
			b = append(b, '\\', byte(r))
		case r < ' ' || r == 0x7f:
			b = append(b, `\u00`...)
			b = append(b, "0123456789abcdef"[r>>4], "0123456789abcdef"[r&15])
		default:
			b = utf8.AppendRune(b, r)
		}
	}
	return append(b, '"')
}
