package moves

import "testing"

// TestTakenPlace: a link of alice's cannot come along into the keep, for something else
// of hers is at its place there, or on the way to it. What it holds stays, and is named;
// nothing is left half done, and without the obstacle it all moves.
func TestTakenPlace(t *testing.T) {
	t.Parallel()
	w := newWorld(t)
	w.script(t)
	for _, c := range []struct{ name, block, clear string }{
		{"another link to the same path", "mkdir -p ~/keep/links/home/alice; ln -s " + w.top + "/x ~/keep/links/home/alice/result", "rm ~/keep/links/home/alice/result"},
		{"a link on the way", "rm -rf ~/keep/links; ln -s /home/alice ~/keep/links", "rm ~/keep/links"},
		{"a file on the way", "rm -rf ~/keep/links; echo mine > ~/keep/links", "rm ~/keep/links"},
	} {
		t.Run(c.name, func(t *testing.T) {
			w.bring(t, inSystem)
			asBuiltOutside(t, w)
			w.Alice(t, c.block)
			if r := w.Overkeep(t, "", apply(w)...); r.Code != 25 { // paths left
				t.Errorf("exit code %d\n%s%s", r.Code, r.Stdout, r.Stderr)
			}
			st := w.look(t, false)
			st.sound(t, w)
			if st.home(w.top) != string(inSystem) || st.Result != w.top {
				t.Errorf("%s is %s; the link leads to %q", w.top, st.home(w.top), st.Result)
			}
			w.Alice(t, c.clear)
			w.overkeepOK(t, apply(w)...)
			st = w.look(t, false)
			st.sound(t, w)
			st.at(t, w, inKeep)
		})
	}
}
