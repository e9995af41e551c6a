package layers

import (
	"errors"
	"go/ast"
	"go/parser"
	"go/token"
	"io/fs"
	"os"
	"path"
	"path/filepath"
	"sort"
	"strconv"
	"strings"
	"testing"
)

const module = "overkeep"

// source is one Go file of the tree.
type source struct {
	path string // from the module's root, with slashes
	text []byte
	file *ast.File
	fset *token.FileSet
}

func parse(path string, text []byte) (*source, error) {
	s := &source{path: path, text: text, fset: token.NewFileSet()}
	var err error
	s.file, err = parser.ParseFile(s.fset, path, text, parser.ParseComments|parser.SkipObjectResolution)
	return s, err
}

// dir is the package's directory, top the first folder of it.
func (s *source) dir() string  { return path.Dir(s.path) }
func (s *source) top() string  { t, _, _ := strings.Cut(s.path, "/"); return t }
func (s *source) isTest() bool { return strings.HasSuffix(s.path, "_test.go") }

// at is "file:line" of a node, for messages.
func (s *source) at(n ast.Node) string {
	return s.path + ":" + strconv.Itoa(s.fset.Position(n.Pos()).Line)
}

// imports calls f with every import path of the file.
func (s *source) imports(f func(path, at string)) {
	for _, i := range s.file.Imports {
		if p, err := strconv.Unquote(i.Path.Value); err == nil {
			f(p, s.at(i))
		}
	}
}

// selectors calls f with every "x.Name" whose x is a plain identifier.
func (s *source) selectors(f func(x, name, at string)) {
	ast.Inspect(s.file, func(n ast.Node) bool {
		if sel, ok := n.(*ast.SelectorExpr); ok {
			if id, ok := sel.X.(*ast.Ident); ok {
				f(id.Name, sel.Sel.Name, s.at(sel))
			}
		}
		return true
	})
}

// root is the module's directory.
func root(t *testing.T) string {
	t.Helper()
	dir, err := os.Getwd()
	if err != nil {
		t.Fatal(err)
	}
	for {
		if _, err := os.Stat(filepath.Join(dir, "go.mod")); err == nil {
			return dir
		} else if !errors.Is(err, fs.ErrNotExist) || dir == filepath.Dir(dir) {
			t.Fatalf("no go.mod above the working directory: %v", err)
		}
		dir = filepath.Dir(dir)
	}
}

// files are the paths of the tree that are ours, from the module's root: nothing
// hidden (.ci excepted), nothing built.
func files(t *testing.T) []string {
	t.Helper()
	var out []string
	dir := root(t)
	err := filepath.WalkDir(dir, func(p string, d fs.DirEntry, err error) error {
		if err != nil {
			return err
		}
		rel, err := filepath.Rel(dir, p)
		if err != nil {
			return err
		}
		rel = filepath.ToSlash(rel)
		if d.IsDir() {
			if hidden := strings.HasPrefix(d.Name(), ".") && rel != "." && rel != ".ci"; hidden || rel == "bin" {
				return filepath.SkipDir
			}
			return nil
		}
		out = append(out, rel)
		return nil
	})
	if err != nil {
		t.Fatal(err)
	}
	sort.Strings(out)
	return out
}

// sources are all Go files of the tree, whatever their build tags.
func sources(t *testing.T) []*source {
	t.Helper()
	var out []*source
	dir := root(t)
	for _, f := range files(t) {
		if path.Ext(f) != ".go" || strings.Contains(f, "/testdata/") {
			continue
		}
		text, err := os.ReadFile(filepath.Join(dir, f))
		if err != nil {
			t.Fatal(err)
		}
		s, err := parse(f, text)
		if err != nil {
			t.Fatal(err)
		}
		out = append(out, s)
	}
	if len(out) == 0 {
		t.Fatal("found no Go file at all")
	}
	return out
}
