package main

import (
	"context"
	"encoding/json"
	"encoding/xml"
	"errors"
	"io"
	"os"
	"os/exec"
	"path"
	"path/filepath"
	"strconv"
	"strings"

	"github.com/rogpeppe/go-internal/testscript"

	"overkeep/overlay/verdict"
	"overkeep/tests/storegen"
)

// world makes a machine's root directory of a file that storegen.ParseWorld reads: its
// database and its profiles. $DB is that database; $APP and $APP_HASH are its app-1.0,
// $KEY is the key cache-1.
//
//	world FILE ROOT
func world(ts *testscript.TestScript, neg bool, args []string) {
	if neg || len(args) != 2 {
		ts.Fatalf("usage: world file root")
	}
	w, err := storegen.ParseWorld(ts.ReadFile(args[0]))
	ts.Check(err)
	root := ts.MkAbs(args[1])
	dir := filepath.Dir(filepath.Join(root, verdict.SystemDB))
	ts.Check(os.MkdirAll(dir, 0o755))
	ts.Check(w.Store().Write(context.Background(), dir))
	ts.Check(w.Links(root))
	rel, err := filepath.Rel(ts.MkAbs("."), root)
	ts.Check(err)
	ts.Setenv("DB", rel+verdict.SystemDB)
	ts.Setenv("APP", storegen.StoreDir+storegen.Base("app-1.0"))
	ts.Setenv("APP_HASH", storegen.Base("app-1.0")[:32])
	ts.Setenv("KEY", storegen.PublicKey("cache-1"))
}

// exitsWith runs a program whose exit code is given: exits CODE program [args...]
func exitsWith(ts *testscript.TestScript, neg bool, args []string) {
	if neg || len(args) < 2 {
		ts.Fatalf("usage: exits code program [args...]")
	}
	err := ts.Exec(args[1], args[2:]...)
	code := 0
	var exit *exec.ExitError
	if errors.As(err, &exit) {
		code = exit.ExitCode()
	} else {
		ts.Check(err)
	}
	if strconv.Itoa(code) != args[0] {
		ts.Fatalf("exit code %d, want %s", code, args[0])
	}
}

// sameverdicts compares what "list --json" and "list" wrote.
func sameverdicts(ts *testscript.TestScript, neg bool, args []string) {
	if neg || len(args) != 2 {
		ts.Fatalf("usage: sameverdicts json text")
	}
	var list map[string]struct{ Placement, Reason string }
	ts.Check(json.Unmarshal([]byte(ts.ReadFile(args[0])), &list))
	lines := 0
	for line := range strings.Lines(ts.ReadFile(args[1])) {
		f := strings.Fields(line) // placement, layers, size and unit, path, reason
		lines++
		for p, v := range list {
			if strings.Contains(line, " "+path.Base(p)+" ") && (f[0] != v.Placement || !strings.Contains(line, "  "+v.Reason)) {
				ts.Fatalf("%s: %+v in JSON, and %q", p, v, line)
			}
		}
	}
	if lines != len(list) || lines == 0 {
		ts.Fatalf("%d lines and %d paths in JSON", lines, len(list))
	}
}

// wellformed checks XML, or with -json JSON.
func wellformed(ts *testscript.TestScript, neg bool, args []string) {
	switch {
	case neg || len(args) == 0:
		ts.Fatalf("usage: wellformed [-json] file")
	case args[0] == "-json":
		if !json.Valid([]byte(ts.ReadFile(args[1]))) {
			ts.Fatalf("%s is not JSON", args[1])
		}
		return
	}
	d := xml.NewDecoder(strings.NewReader(ts.ReadFile(args[0])))
	elements := 0
	for {
		t, err := d.Token()
		if errors.Is(err, io.EOF) {
			break
		}
		ts.Check(err)
		if _, ok := t.(xml.StartElement); ok {
			elements++
		}
	}
	if elements < 2 {
		ts.Fatalf("%s: %d elements", args[0], elements)
	}
}
