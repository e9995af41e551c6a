package move

import (
	"bytes"
	"errors"
	"fmt"
	"hash/crc32"
	"os"
	"path/filepath"
	"strings"
	"testing"

	"overkeep/overlay/gcroot"
	"overkeep/overlay/nixdb"
	"overkeep/overlay/plan"
)

func line(text string) string {
	return fmt.Sprintf("%08x %s\n", crc32.Checksum([]byte(text), castagnoli), text)
}

const first = `{"type":"begin","version":1,"id":1,"kind":"apply","stage":".overkeep-0011223344556677"}`

func TestReadJournal(t *testing.T) {
	const left = `{"type":"left","batch":1,"left":[{"path":"/nix/store/p","why":"alive","by":"x"}]}`
	for _, c := range []struct {
		name, text string
		events     int // -1: no operation
		whole      int // lines that count
		err        error
	}{
		{"empty", "", -1, 0, nil},
		{"begin", line(first), 0, 1, nil},
		{"begin and event", line(first) + line(left), 1, 2, nil},
		{"cut in the first line", line(first)[:20], -1, 0, nil},
		{"cut in the last line", line(first) + line(left)[:30], 0, 1, nil},
		{"last line without its end", line(first) + strings.TrimSuffix(line(left), "\n"), 0, 1, nil},
		{"last line wrong, its end there", line(first) + strings.Replace(line(left), "alive", "alibi", 1), 0, 1, nil},
		{"zeros at the end", line(first) + "\x00\x00\x00\n", 0, 1, nil},
		{"wrong in the middle", line(first) + strings.Replace(line(left), "alive", "alibi", 1) + line(left), 0, 1, ErrJournal},
		{"event first", line(left) + line(left), -1, 0, ErrJournal},
		{"begin twice", line(first) + line(first) + line(left), 0, 1, ErrJournal},
		{"newer", line(strings.Replace(first, `"version":1`, `"version":2`, 1)) + line(left), -1, 0, ErrJournalVersion},
		{"unknown event", line(first) + line(`{"type":"moved"}`) + line(left), 0, 1, ErrJournal},
		{"unknown field", line(first) + line(`{"type":"end","x":1}`) + line(left), 0, 1, ErrJournal},
		{"no checksum", line(first) + "{}\n" + line(left), 0, 1, ErrJournal},
	} {
		t.Run(c.name, func(t *testing.T) {
			op, whole, err := readJournal(strings.NewReader(c.text))
			if !errors.Is(err, c.err) || (err != nil) != (c.err != nil) {
				t.Fatalf("error %v, want %v", err, c.err)
			}
			if got := strings.Count(c.text[:whole], "\n"); got != c.whole {
				t.Errorf("%d lines count, want %d", got, c.whole)
			}
			if (op == nil) != (c.events < 0) {
				t.Fatalf("operation %v, want %d events", op, c.events)
			}
			if op != nil && len(op.events) != c.events {
				t.Errorf("%d events, want %d", len(op.events), c.events)
			}
		})
	}
}

// TestJournalCut: whatever a crash leaves of a file, what is read is a prefix of what was
// written, and writing goes on behind it.
func TestJournalCut(t *testing.T) {
	dir := t.TempDir()
	j, err := create(dir, event{Kind: Seal, Stage: ".overkeep-1"})
	if err != nil {
		t.Fatal(err)
	}
	row := nixdb.Info{Path: "/nix/store/p", NarHash: "sha256:00", Sigs: []string{"k:1"}, Refs: []string{"/nix/store/q"}}
	for i := range 3 {
		if err := j.add(event{Type: evBatch, Batch: i + 1, Items: []item{{Info: row, Kind: plan.Seal}}}); err != nil {
			t.Fatal(err)
		}
	}
	if err := j.close(); err != nil {
		t.Fatal(err)
	}
	file := fileOf(dir, 1)
	b, err := os.ReadFile(file)
	if err != nil {
		t.Fatal(err)
	}
	for n := range len(b) + 1 {
		if err := os.WriteFile(file, b[:n], 0o600); err != nil {
			t.Fatal(err)
		}
		op, err := load(dir, 1, true)
		if err != nil {
			t.Fatalf("cut at %d: %v", n, err)
		}
		want := bytes.Count(b[:n], []byte("\n"))
		if op == nil {
			if want != 0 {
				t.Fatalf("cut at %d: no operation, want %d lines", n, want)
			}
			continue
		}
		if len(op.events) != want-1 {
			t.Fatalf("cut at %d: %d events, want %d", n, len(op.events), want-1)
		}
		j, err := reopen(dir, 1)
		if err != nil {
			t.Fatal(err)
		}
		if err := j.add(event{Type: evEnd}); err != nil {
			t.Fatal(err)
		}
		_ = j.close()
		if op, err = load(dir, 1, false); err != nil || !op.ended() || len(op.events) != want {
			t.Fatalf("cut at %d and gone on: %+v, %v", n, op, err)
		}
	}
}

func TestJournalLock(t *testing.T) {
	dir := filepath.Join(t.TempDir(), "journal")
	lock, err := openJournals(dir)
	if err != nil {
		t.Fatal(err)
	}
	if _, err := openJournals(dir); !errors.Is(err, ErrBusy) {
		t.Errorf("a second mover got %v", err)
	}
	lock.Close()
	again, err := openJournals(dir)
	if err != nil {
		t.Fatal(err)
	}
	again.Close()
	if err := os.Chmod(dir, 0o755); err != nil {
		t.Fatal(err)
	}
	if _, err := openJournals(dir); !errors.Is(err, ErrJournal) {
		t.Errorf("a directory that others can read: %v", err)
	}
}

func TestUndoable(t *testing.T) {
	rows := []nixdb.Info{{Path: "/nix/store/p"}}
	past := []Past{{ID: 1, Kind: Apply, Sealed: rows}, {ID: 2, Kind: Seal, Sealed: rows}, {ID: 3, Kind: Wipe}, {ID: 4, Kind: Release}}
	for _, c := range []struct {
		undone []int
		want   int
	}{{nil, 2}, {[]int{2}, 1}, {[]int{2, 1}, 0}} {
		list := past
		for i, of := range c.undone {
			list = append(list, Past{ID: 5 + i, Kind: Undo, Of: of, Released: rows, Whole: true})
		}
		got := 0
		if p := Undoable(list); p != nil {
			got = p.ID
		}
		if got != c.want {
			t.Errorf("with %v undone: %d, want %d", c.undone, got, c.want)
		}
	}
	// An undo that was cut short is gone on with; one that left a path for good is done.
	two := append(rows, nixdb.Info{Path: "/nix/store/q"})
	past = []Past{{ID: 1, Kind: Seal, Sealed: rows}, {ID: 2, Kind: Apply, Sealed: two}, {ID: 3, Kind: Undo, Of: 2, Released: rows}}
	if p := Undoable(past); p == nil || p.ID != 2 || len(p.Sealed) != 1 || p.Sealed[0].Path != "/nix/store/q" {
		t.Errorf("half undone: %+v", p)
	}
	if len(past[1].Sealed) != 2 {
		t.Errorf("the history was changed: %+v", past[1])
	}
	past[2].Whole = true
	if p := Undoable(past); p == nil || p.ID != 1 {
		t.Errorf("undone but for what was left: %+v", p)
	}
	rest := append(past[:2:2], Past{ID: 3, Kind: Undo, Of: 2, Released: rows}, Past{ID: 4, Kind: Undo, Of: 2, Released: two[1:]})
	if p := Undoable(rest); p == nil || p.ID != 1 {
		t.Errorf("undone in two goes: %+v", p)
	}
}

// Whole: what an operation was to move has moved or was left; not so after an early end.
func TestPast(t *testing.T) {
	moves := []plan.Move{{Path: "/nix/store/p"}, {Path: "/nix/store/q"}}
	p, q := item{Info: nixdb.Info{Path: "/nix/store/p"}, Kind: plan.Seal}, item{Info: nixdb.Info{Path: "/nix/store/q"}, Kind: plan.Seal}
	batch := event{Type: evBatch, Items: []item{p, q}}
	gone := func(paths ...string) event { return event{Type: evGone, Paths: paths} }
	for _, c := range []struct {
		name   string
		events []event
		sealed int
		whole  bool
	}{
		{"nothing done", nil, 0, false},
		{"taken back", []event{batch, {Type: evBack}, {Type: evEnd}}, 0, false},
		{"one of two", []event{batch, gone("/nix/store/p"), {Type: evEnd}}, 1, false},
		{"both", []event{batch, gone("/nix/store/p", "/nix/store/q"), {Type: evEnd}}, 2, true},
		{"one, and one left", []event{{Type: evLeft, Left: []Left{{Path: "/nix/store/q", Why: Alive}}}, batch, gone("/nix/store/p"), {Type: evEnd}}, 1, true},
	} {
		past := (&operation{begin: event{Kind: Seal, Moves: moves}, events: c.events}).past()
		if len(past.Sealed) != c.sealed || past.Whole != c.whole {
			t.Errorf("%s: %d sealed, whole %v", c.name, len(past.Sealed), past.Whole)
		}
	}
}

// A root that went along is known after an interruption, too: the directory that it was
// in is on a device that has to be cleaned.
func TestReplayRoots(t *testing.T) {
	rec := gcroot.Record{Link: "/home/alice/result", Path: "/nix/store/p", To: "home/work/result"}
	op := &operation{events: []event{
		{Type: evBatch, Batch: 1, Items: []item{{Info: nixdb.Info{Path: "/nix/store/p"}, Kind: plan.Seal}}},
		{Type: evKept, Batch: 1, Paths: []string{"/nix/store/p"}, Roots: []gcroot.Record{rec}},
		{Type: evDeleting, Batch: 1, Paths: []string{"/nix/store/p"}},
		{Type: evGone, Batch: 1, Paths: []string{"/nix/store/p"}},
	}}
	r, _ := (&World{}).replay(op, nil)
	if len(r.res.Roots) != 1 || r.res.Roots[0].From != rec.Link || !r.dirty {
		t.Errorf("%+v, dirty %v", r.res.Roots, r.dirty)
	}
}

func TestBatches(t *testing.T) {
	move := func(k plan.Kind, unit int, size int64) plan.Move {
		return plan.Move{Kind: k, Unit: unit, NarSize: size}
	}
	var many []plan.Move
	for i := range 2*batchPaths + 1 {
		many = append(many, move(plan.Seal, i, 1))
	}
	circle := make([]plan.Move, batchPaths+10)
	for i := range circle {
		circle[i] = move(plan.Seal, 7, 1)
	}
	for _, c := range []struct {
		name  string
		moves []plan.Move
		want  []int
	}{
		{"none", nil, nil},
		{"one", many[:1], []int{1}},
		{"by number", many, []int{batchPaths, batchPaths, 1}},
		{"by bytes", []plan.Move{move(plan.Seal, 0, batchBytes), move(plan.Seal, 1, 1), move(plan.Seal, 2, batchBytes)}, []int{1, 1, 1}},
		{"larger than a batch", []plan.Move{move(plan.Seal, 0, 3*batchBytes)}, []int{1}},
		{"kinds apart", []plan.Move{move(plan.Seal, 0, 1), move(plan.Release, 1, 1)}, []int{1, 1}},
		{"a circle stays whole", circle, []int{len(circle)}},
	} {
		var got []int
		total := 0
		for _, b := range batches(c.moves) {
			got = append(got, len(b))
			total += len(b)
		}
		if fmt.Sprint(got) != fmt.Sprint(c.want) || total != len(c.moves) {
			t.Errorf("%s: %v, want %v", c.name, got, c.want)
		}
	}
}

func FuzzJournal(f *testing.F) {
	f.Add([]byte(line(first) + line(`{"type":"end"}`)))
	f.Add([]byte(line(first)[:30]))
	f.Fuzz(func(t *testing.T, b []byte) {
		op, whole, err := readJournal(bytes.NewReader(b))
		if whole < 0 || whole > int64(len(b)) {
			t.Fatalf("%d of %d bytes are whole", whole, len(b))
		}
		if err == nil {
			again, n, err := readJournal(bytes.NewReader(b[:whole]))
			if err != nil || n != whole || (again == nil) != (op == nil) {
				t.Fatalf("what was whole reads otherwise: %v %d %v", again, n, err)
			}
		}
	})
}
