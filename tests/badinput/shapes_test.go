package badinput

import (
	"slices"
	"strings"
	"testing"
	"time"
)

// TestShapes: trees of every awkward shape go into the keep and come back as they were,
// by the eyes of the real Nix; what is damaged stays, and is named.
func TestShapes(t *testing.T) {
	w := newWorld(t, "--size", "2G") // inodes for many
	t.Run("awkward", w.awkward)
	t.Run("optimised", w.optimised)
	t.Run("damaged in the keep", w.damagedInKeep)
	t.Run("many", w.many)
	t.Run("damaged", w.damaged) // last: it stays so
}

func (w *world) awkward(t *testing.T) {
	long := "$(printf 'n%.0s' $(seq 255))"
	trees := []tree{
		{"secret-hole", `truncate -s 40M $out; printf end | dd of=$out bs=1 seek=30M conv=notrunc status=none`, nil},
		{"secret-holes", `mkdir $out; cd $out; truncate -s 10M all; truncate -s 5M mixed; printf x >>mixed
			for n in 0 1 2 3; do printf $n | dd of=mixed bs=1 seek=$((n * 1000000)) conv=notrunc status=none; done`, nil},
		{"secret-hard", `mkdir -p $out/d; cd $out; echo same >a; ln a b; ln a d/c; echo other >e; ln e d/e`, nil},
		{"secret-long", `mkdir $out; cd $out; echo x >` + long + `; mkdir -p d/` + long[:len(long)-1] + `); ln -s ` + long + ` d/l`, nil},
		{"secret-loops", `mkdir $out; cd $out; ln -s l l; ln -s a b; ln -s b a; ln -s . here; ln -s .. up; ln -s /nix/store/nowhere gone; ln -s / root; ln -s "$(printf 'x/%.0s' $(seq 2000))x" far`, nil},
		{"secret-empty-file", `: >$out`, nil},
		{"secret-empty-dir", `mkdir $out`, nil},
		{"secret-empties", `mkdir -p $out/a/b/c $out/d; : >$out/e; : >$out/a/f; chmod +x $out/e`, nil},
		{"secret-program", `printf '#!/bin/sh\necho run' >$out; chmod 555 $out`, nil},
		{"secret-programs", `mkdir $out; cd $out; printf '#!/bin/sh\necho run' >x; chmod 755 x; cp x y; chmod 644 y; cp x z; chmod 100 z; chmod 4755 x`, nil},
		{"secret-link", `ln -s /etc/shadow $out`, nil},
		{"secret-names", `mkdir $out; cd $out; : >"$(printf '\377\376')"; : >"$(printf 'a\nb')"; : >' '; : >'*'; : >-rf; : >'\'; : >"$(printf '\001\033[31m')"; mkdir "$(printf 'd\200')"; : >"$(printf 'd\200/\303\050')"; : >.overkeep-0; : >x.lock; : >.links; : >'~nix~case~hack~1'`, nil},
		// as deep as Nix lets a NAR be
		{"secret-deep", `d=$out/$(printf 'd/%.0s' $(seq 62)); mkdir -p $d; echo bottom >$d/f`, nil},
		{"secret-self", `mkdir $out; echo $out >$out/me`, []string{"secret-self"}},
		{"secret-one-of-two", `echo 1 >$out`, nil},
		{"secret-" + strings.Repeat("n", 200), `echo name >$out`, nil},
	}
	w.add(t, trees...)
	before := w.where(t)
	used := func(dir, name string) string { return w.Must(t, "root", "du -k "+dir+"/"+name+" | cut -f1") }
	sparse := used("/nix/store", at("secret-hole")[11:])
	m := w.move(t, ok, "apply")
	if len(m.Left) > 0 || len(m.Sealed) != len(trees) {
		t.Errorf("%d sealed of %d, left %v", len(m.Sealed), len(trees), m.Left)
	}
	for _, x := range trees {
		w.home(t, "keep", x.name)
	}
	w.sound(t)
	in := w.Must(t, "root", "overkeep run alice --as-root -- du -k "+upper+at("secret-hole")[10:]+" | cut -f1")
	t.Logf("a file of 40 MB with holes takes %s KiB in the system store and %s in the keep", sparse, in)
	// Nothing that looks like ours in a tree, and no link in it, was touched.
	got := w.Alice(t, `cd `+at("secret-names")+`; ls -A | wc -l; cd `+at("secret-programs")+`; stat -c '%n %a %U' *; readlink `+at("secret-link")+`; ls -A `+at("secret-hard")+`/d`)
	if want := "13\nx 555 root\ny 444 root\nz 555 root\n/etc/shadow\nc\ne"; got != want {
		t.Errorf("in the keep\n%s\nwant\n%s", got, want)
	}
	w.move(t, ok, "undo")
	w.same(t, before)
	w.sound(t)
	w.move(t, ok, "apply") // and for good
}

// optimised: what Nix has made one file of in a public and a private path stays whole
// in the public one.
func (w *world) optimised(t *testing.T) {
	w.add(t,
		tree{"pub-shared", `mkdir $out; seq 20000 >$out/numbers; echo public >$out/own`, nil},
		tree{"secret-shared", `mkdir $out; seq 20000 >$out/numbers; echo private >$out/own; seq 5000 >$out/more; cp $out/more $out/again`, nil},
		tree{"secret-shared-2", `seq 5000 >$out`, nil})
	w.Must(t, "root", "nix-store --optimise 2>/dev/null")
	inode := func() string { return w.Must(t, "root", "stat -c '%i' "+at("pub-shared")+"/numbers") }
	if a, b := inode(), w.Must(t, "root", "stat -c %i "+at("secret-shared")+"/numbers"); a != b {
		t.Fatalf("inodes %s and %s: nothing is shared", a, b)
	}
	m := w.move(t, ok, "apply")
	w.home(t, "keep", "secret-shared", "secret-shared-2")
	if m.Cleaned == nil || m.Cleaned.Files.Shared == 0 {
		t.Errorf("nothing shared is named: %+v", m.Cleaned)
	}
	got := w.Must(t, "root", "seq 20000 | cmp - "+at("pub-shared")+"/numbers; cat "+at("pub-shared")+"/own; cd /nix/store/.links; stat -c '%h %s' *")
	if !strings.HasPrefix(got, "public\n") {
		t.Errorf("%s", got)
	}
	// Of what was private alone not even the link of the optimiser is left.
	private := w.Must(t, "root", "seq 5000 | wc -c")
	for line := range strings.Lines(got) {
		if f := strings.Fields(line); len(f) == 2 && (f[0] == "1" || f[1] == private) {
			t.Errorf(".links still has a file of %s bytes with %s links", f[1], f[0])
		}
	}
	w.sound(t)
	// It can come back, beside a path that shares with it.
	w.move(t, ok, "undo")
	w.home(t, "system", "secret-shared", "secret-shared-2")
	w.sound(t)
	w.Must(t, "root", "nix-store --optimise 2>/dev/null")
	w.move(t, ok, "seal", at("secret-shared"), at("secret-shared-2"))
	w.sound(t)
}

// damaged: what is not what its hash says is never moved, in whatever way it is
// damaged; it is named, and the others move, save those that it holds.
func (w *world) damaged(t *testing.T) {
	make := `mkdir $out; echo one >$out/f; echo two >$out/g; ln -s f $out/l; mkdir $out/d`
	damage := map[string]string{
		"secret-bit": `printf O | dd of=f bs=1 conv=notrunc status=none`, "secret-longer": `echo more >>f`, "secret-shorter": `truncate -s 1 f`,
		"secret-mode": `chmod 555 f`, "secret-more": `echo h >h`, "secret-fewer": `rm g`, "secret-link-else": `ln -sfn g l`,
		"secret-renamed": `mv f h`, "secret-kind": `rmdir d; : >d`, "secret-pipe": `mkfifo p`, "secret-socket": `mknod n c 1 3`,
		"secret-huge": `truncate -s 15T f`,
	}
	var trees []tree
	var bad []string
	script := ""
	for name, s := range damage {
		trees = append(trees, tree{name, make, nil})
		bad = append(bad, name)
		script += "cd " + at(name) + "; chmod u+w . f; " + s + "; cd /\n"
	}
	slices.Sort(bad)
	trees = append(trees,
		tree{"secret-held-by-bad", "echo x >$out", nil}, // what a damaged one refers to has to stay
		tree{"secret-refers", make, []string{"secret-held-by-bad"}},
		tree{"secret-on-top", "echo y >$out", []string{"secret-refers"}}, // what refers to it need not
		tree{"secret-times", make, nil},                                  // no time is part of a NAR
		tree{"secret-whole", make, nil})
	w.add(t, trees...)
	w.Must(t, "root", script+"cd "+at("secret-refers")+"; chmod u+w f; printf O | dd of=f bs=1 conv=notrunc status=none; touch "+at("secret-times")+"/f")
	m := w.move(t, left, "apply")
	for _, name := range append(bad, "secret-refers") {
		if why := m.why(at(name)); why != "corrupt" && !(why == "strange" && (name == "secret-pipe" || name == "secret-socket" || name == "secret-huge")) {
			t.Errorf("%s: left because %q", name, why)
		}
		w.home(t, "system", name)
	}
	if why := m.why(at("secret-held-by-bad")); why != "referenced" {
		t.Errorf("what a damaged path refers to: left because %q", why)
	}
	w.home(t, "system", "secret-held-by-bad")
	w.home(t, "keep", "secret-on-top", "secret-times", "secret-whole")
	if n := len(m.Left); n != len(damage)+2 {
		t.Errorf("%d left: %v", n, m.Left)
	}
	w.Must(t, "root", "truncate -s 1 "+at("secret-huge")+"/f") // the real Nix would read all of it
	known := append(bad, "secret-refers")
	w.sound(t, known...)
	// In words, too; and again: nothing has become of it.
	w.says(t, left, []string{"apply", "--keep", "alice", "--yes"}, at("secret-bit"), "not what its hash says")
	w.move(t, left, "seal", at("secret-bit"))
	// Whole again, it moves.
	w.Must(t, "root", "printf o | dd of="+at("secret-bit")+"/f bs=1 conv=notrunc status=none")
	w.move(t, ok, "seal", at("secret-bit"))
	w.home(t, "keep", "secret-bit")
	w.move(t, ok, "undo")
	w.home(t, "system", "secret-bit")
}

// damagedInKeep is the same the other way round.
func (w *world) damagedInKeep(t *testing.T) {
	w.add(t, tree{"secret-base", "echo base >$out", nil}, tree{"secret-mid", "echo mid >$out", []string{"secret-base"}},
		tree{"secret-top", "echo top >$out", []string{"secret-mid"}}, tree{"secret-beside", "echo beside >$out", []string{"secret-base"}})
	w.move(t, ok, "apply")
	w.home(t, "keep", "secret-base", "secret-mid", "secret-top", "secret-beside")
	flip := func(from, to string) {
		w.Must(t, "root", "overkeep run alice --as-root -- bash -c 'printf "+to+" | dd of="+upper+at("secret-mid")[10:]+" bs=1 conv=notrunc status=none'")
	}
	flip("m", "M")
	m := w.move(t, left, "undo")
	if a, b := m.why(at("secret-mid")), m.why(at("secret-top")); a != "corrupt" || b != "needs" || len(m.Left) != 2 {
		t.Errorf("left: %v", m.Left)
	}
	w.home(t, "keep", "secret-mid", "secret-top")
	w.home(t, "system", "secret-base", "secret-beside")
	w.sound(t, "secret-mid")
	flip("M", "m")
	w.move(t, ok, "apply")
	w.home(t, "keep", "secret-base", "secret-mid", "secret-top", "secret-beside")
	w.sound(t)
}

// many: a directory with 100,000 entries.
func (w *world) many(t *testing.T) {
	w.add(t, tree{"secret-many", `mkdir $out; cd $out; perl -e 'for (1..60000) { open F, ">f$_"; print F "$_\n"; close F } for (1..40000) { symlink "here", "l$_" }'`, nil})
	if n := w.Must(t, "root", "ls -f "+at("secret-many")+" | wc -l"); n != "100002" {
		t.Fatalf("%s entries", n)
	}
	start := time.Now()
	w.move(t, ok, "seal", at("secret-many"))
	sealed := time.Since(start)
	w.home(t, "keep", "secret-many")
	start = time.Now()
	w.move(t, ok, "undo")
	t.Logf("100,000 entries: sealed in %.1f s, undone in %.1f s", sealed.Seconds(), time.Since(start).Seconds())
	w.home(t, "system", "secret-many")
	w.sound(t)
	w.gone(t, "secret-many")
}
