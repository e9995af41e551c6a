package doctor

import (
	"context"
	"os"
	"sync"

	"golang.org/x/sys/unix"

	"overkeep/overlay/layout"
)

// Config says for whom to look.
type Config struct {
	Root string // of the keeps' state, as --root; "" is "/"
	User string // whose keep it is to be; "" leaves out what is about a user
	// Sudo says that remedies are pasted into a shell that is not root's. It is
	// taken for granted where the process is not root.
	Sudo bool
}

// facts is everything that the judgement reads.
type facts struct {
	kernel kernelFacts
	fs     fsFacts
	nix    nixFacts
	login  loginFacts
	safety safetyFacts
}

// probes gather facts. Tests put their own in place.
type probes struct {
	machine func(Config) machine
	kernel  func(context.Context) kernelFacts
	fs      func(context.Context, Config) fsFacts
	nix     func(context.Context, Config) nixFacts
	login   func(context.Context, Config) loginFacts
	safety  func(context.Context, Config) safetyFacts
}

var live = probes{liveMachine, probeKernel, probeFS, probeNix, probeLogin, probeSafety}

// Run tries everything and returns the checks in the order of their groups. It
// needs no root, but then much of the answer is Unsure. It takes a second or
// two; what waits for others (a nix-daemon, a program) gives up after some
// seconds. Ending ctx ends it early, and makes what was under way Unsure.
func Run(ctx context.Context, c Config) []Check { return run(ctx, c, live) }

func run(ctx context.Context, c Config, p probes) []Check {
	root, err := layout.CheckRoot(c.Root)
	if err != nil {
		return []Check{{
			Name: "root of the keeps", Group: Filesystem, Answer: No, Needed: true,
			Missing: "a usable --root: " + err.Error(),
		}}
	}
	c.Root = root
	m := p.machine(c)
	var f facts
	var all sync.WaitGroup
	all.Go(func() { f.kernel = p.kernel(ctx) })
	all.Go(func() { f.fs = p.fs(ctx, c) })
	all.Go(func() { f.nix = p.nix(ctx, c) })
	all.Go(func() { f.login = p.login(ctx, c) })
	all.Go(func() { f.safety = p.safety(ctx, c) })
	all.Wait()
	return f.checks(m, c)
}

// checks is the whole judgement. It is pure.
func (f facts) checks(m machine, c Config) []Check {
	var out []Check
	out = append(out, f.kernel.checks(m, len(f.nix.buildUsers) > 0)...)
	out = append(out, f.fs.checks(m, f.kernel.image.volume.works())...)
	out = append(out, f.nix.checks(m, f.login.systemd)...)
	out = append(out, f.login.checks(c)...)
	out = append(out, f.safety.checks()...)
	for i := range out {
		out[i].Remedy = m.shell(out[i].Remedy)
	}
	return out
}

func liveMachine(c Config) machine {
	m := machine{root: os.Geteuid() == 0, at: c.Root}
	m.sudo = c.Sudo || !m.root
	var u unix.Utsname
	if unix.Uname(&u) == nil {
		m.release = parseRelease(unix.ByteSliceToString(u.Release[:]))
	}
	return m
}
