package batch

import (
	"bytes"
	"database/sql"
	"errors"
	"fmt"
	"path/filepath"
	"strings"
	"testing"
	"time"
)

// with opens a database that the statements made.
func with(t *testing.T, statements string) *Conn {
	t.Helper()
	file := filepath.Join(t.TempDir(), "x?#%.sqlite")
	db, err := sql.Open("sqlite3", "file:"+strings.NewReplacer("%", "%25", "?", "%3f", "#", "%23").Replace(file))
	if err != nil {
		t.Fatal(err)
	}
	if _, err := db.Exec(statements); err != nil {
		t.Fatal(err)
	}
	if err := db.Close(); err != nil {
		t.Fatal(err)
	}
	c, err := Open(file, false, time.Second)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		if err := c.Close(); err != nil {
			t.Error(err)
		}
	})
	return c
}

func prepare(t *testing.T, c *Conn, q string, columns int) *Stmt {
	t.Helper()
	s, err := c.Prepare(q, columns)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(s.Close)
	return s
}

func TestTypes(t *testing.T) {
	c := with(t, "create table t (a); insert into t values (7), (-9223372036854775808), (1.5), ('text'), (''), (x'00'), (null)")
	s := prepare(t, c, "select a, rowid from t order by rowid", 2)
	rows := NewRows(2, ManyRows)
	if more, err := s.Next(rows); more || err != nil || rows.N != 7 {
		t.Fatal(more, err, rows.N)
	}
	want := []struct {
		typ  Type
		i    int64
		text string
	}{{Integer, 7, ""}, {Integer, -1 << 63, ""}, {Float, 0, ""}, {Text, 0, "text"}, {Text, 0, ""}, {Blob, 0, ""}, {Null, 0, ""}}
	for i, w := range want {
		if rows.Type(i, 0) != w.typ || rows.Int(i, 0) != w.i || string(rows.Text(i, 0)) != w.text || rows.Int(i, 1) != int64(i+1) {
			t.Errorf("row %d: %d %d %q", i, rows.Type(i, 0), rows.Int(i, 0), rows.Text(i, 0))
		}
	}
}

// Rows beyond the buffer's number and its text come in further calls, none is lost.
func TestBuffers(t *testing.T) {
	c := with(t, fmt.Sprintf(`create table t (a);
		with recursive n(i) as (select 1 union all select i + 1 from n where i < 3000) insert into t select printf('%%.*c', i * 7 %% 5000, 'x') from n;
		insert into t values (printf('%%.*c', %d, 'y')), (printf('%%.*c', %d, 'z')), ('end')`, Longest, Longest+1))
	for _, max := range []int{1, 2, 100, 5000} {
		s := prepare(t, c, "select rowid, a, a from t order by rowid", 3)
		rows := NewRows(3, max)
		n := 0
		for more := true; more; {
			var err error
			if more, err = s.Next(rows); err != nil {
				t.Fatal(err)
			}
			for i := range rows.N {
				n++
				want, text := n*7%5000, rows.Text(i, 1)
				switch n {
				case 3001:
					want = Longest
				case 3002:
					if rows.Type(i, 1) != TooLong || text != nil {
						t.Fatalf("too long: %d", rows.Type(i, 1))
					}
					continue
				case 3003:
					want = 3
				}
				if rows.Int(i, 0) != int64(n) || len(text) != want || !bytes.Equal(text, rows.Text(i, 2)) {
					t.Fatalf("row %d of a buffer for %d: %d bytes", n, max, len(text))
				}
			}
		}
		if n != 3003 {
			t.Errorf("%d rows in a buffer for %d", n, max)
		}
	}
}

func TestPairs(t *testing.T) {
	c := with(t, `create table t (a, b); with recursive n(i) as (select 1 union all select i + 1 from n where i < 20000) insert into t select i, -i from n;
		insert into t values (1, 'x'), (null, 2), (3, 4.5), (x'', 1)`)
	s := prepare(t, c, "select a, b from t order by rowid", 2)
	pairs := make([][2]int64, PairsPerCall)
	total, wrong := 0, 0
	for more := true; more; {
		n, bad, m, err := s.NextPairs(pairs)
		if err != nil {
			t.Fatal(err)
		}
		for _, p := range pairs[:n] {
			if total++; p != [2]int64{int64(total), -int64(total)} {
				t.Fatal(p, total)
			}
		}
		more, wrong = m, wrong+bad
	}
	if total != 20000 || wrong != 4 {
		t.Error(total, wrong)
	}
}

func TestBind(t *testing.T) {
	c := with(t, "create table t (a unique, b); insert into t values ('k', 1), ('', 2), (5, 3)")
	s := prepare(t, c, "select b from t where a = ?", 1)
	rows := NewRows(1, 1)
	ask := func(bind error) int64 {
		t.Helper()
		defer s.Reset()
		if bind != nil {
			t.Fatal(bind)
		}
		if _, err := s.Next(rows); err != nil {
			t.Fatal(err)
		}
		if rows.N == 0 {
			return 0
		}
		return rows.Int(0, 0)
	}
	if a, b, n, none := ask(s.BindText(1, []byte("k"))), ask(s.BindText(1, nil)), ask(s.BindInt(1, 5)), ask(s.BindText(1, []byte("no"))); a != 1 || b != 2 || n != 3 || none != 0 {
		t.Error(a, b, n, none)
	}
	if err := s.BindInt(2, 1); err == nil {
		t.Error("a parameter that there is not")
	}
}

// What is refused: writing, other numbers of columns, what is no statement, a file
// that is no database or is not there.
func TestRefused(t *testing.T) {
	c := with(t, "create table t (a); insert into t values (1)")
	for _, q := range []string{"delete from t", "create table u (a)", "vacuum", "", "-- nothing", "select", "select a from u", "pragma journal_mode=delete"} {
		if s, err := c.Prepare(q, 0); err == nil {
			s.Close()
			t.Errorf("%q was taken", q)
		}
	}
	if _, err := c.Prepare("select a, a from t", 1); err == nil {
		t.Error("two columns for one")
	}
	s := prepare(t, c, "select a from t", 1)
	if _, err := s.Next(NewRows(2, 1)); err == nil {
		t.Error("a buffer for two columns")
	}
	if _, err := s.Next(NewRows(1, 0)); err == nil {
		t.Error("a buffer for no rows")
	}
	if _, _, _, err := s.NextPairs(make([][2]int64, PairsPerCall)); err == nil {
		t.Error("pairs of one column")
	}
	s2 := prepare(t, c, "select a, a from t", 2)
	if _, _, _, err := s2.NextPairs(make([][2]int64, 10)); err == nil {
		t.Error("a short buffer for pairs")
	}
	_, err := Open(filepath.Join(t.TempDir(), "none"), false, time.Second)
	var e *Error
	if !errors.As(err, &e) || e.Code&0xff != 14 { // SQLITE_CANTOPEN
		t.Error(err)
	}
	if err := c.Exec("begin"); err != nil {
		t.Error(err)
	}
}
