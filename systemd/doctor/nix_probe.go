package doctor

import (
	"context"
	"errors"
	"fmt"
	"net/url"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"sync"
	"time"

	"golang.org/x/sys/unix"

	"overkeep/overlay/layout"
	"overkeep/overlay/lower"
	"overkeep/overlay/view"
	"overkeep/systemd/keep"
)

// patience bounds what waits for Nix.
const patience = 10 * time.Second

func probeNix(ctx context.Context, c Config) nixFacts {
	ctx, cancel := context.WithTimeout(ctx, patience)
	defer cancel()
	n := nixFacts{searched: keep.NixPath, daemon: findIn(keep.NixPath, "nix-daemon"), client: findIn(keep.NixPath, "nix")}
	if b, err := readBounded("/etc/os-release"); err == nil {
		n.debian = likeDebian(b)
	}
	conf, err := keep.ReadConfig(c.Root)
	n.substituters, n.configErr = conf.Substituters, err
	if n.inView = inView(c.Root); n.inView {
		return n
	}
	var all sync.WaitGroup
	all.Go(func() {
		n.answers = dial(ctx)
		n.probeStore() // afterwards: Nix sets the mode of the store right when it opens it
	})
	if n.daemon != "" {
		all.Go(func() {
			b, err := output(nixCommand(ctx, n.daemon, "--version"))
			n.version, n.versionErr = string(b), err
		})
	}
	if n.client != "" {
		all.Go(func() { n.settings, n.settingsErr = nixSettings(ctx, n.client) })
		if os.Geteuid() == 0 {
			all.Go(func() { n.trial = tryStore(ctx, n.client) })
		}
	} else {
		n.trial = behind("the program nix")
	}
	all.Wait()
	n.probeBuildUsers(ctx)
	return n
}

// inView says whether /nix/store is the overlay of a keep below root.
func inView(root string) bool {
	m, err := mountOf(layout.NixStore)
	return err == nil && m.FSType == "overlay" && m.Mountpoint == layout.NixStore &&
		strings.Contains(","+m.VFSOptions, ",upperdir="+layout.RunRoot(root)+"/")
}

func dial(ctx context.Context) outcome {
	c, err := lower.Dial(ctx, filepath.Join(layout.NixDaemonSocket, "socket"))
	if err != nil {
		return ended(err)
	}
	defer c.Close()
	if c.Nix() == "" {
		return worked("")
	}
	return worked("Nix " + oneLine(c.Nix()))
}

func (n *nixFacts) probeStore() {
	var st unix.Statx_t
	fi, err := os.Lstat(layout.NixStore)
	if err == nil {
		err = unix.Statx(unix.AT_FDCWD, layout.NixStore, unix.AT_SYMLINK_NOFOLLOW, unix.STATX_BASIC_STATS, &st)
	}
	if err != nil {
		n.storeErr = err
		n.asLower = behind(layout.NixStore)
		return
	}
	n.store = pathFacts{layout.NixStore, fi.Mode(), st.Uid}
	n.encrypted = st.Attributes&unix.STATX_ATTR_ENCRYPTED != 0
	if m, err := mountOf(layout.NixStore); err == nil {
		n.storeType = m.FSType
	}
	if os.Geteuid() == 0 {
		n.asLower = ended(lowerTrial())
	}
}

// lowerTrial mounts an overlay over the real /nix/store, on a directory of a
// throw-away tmpfs, looks into it, and unmounts it. A lower layer is only read.
func lowerTrial() error {
	trials.Lock()
	defer trials.Unlock()
	return privately(func() (err error) {
		dir, done, err := scratch()
		if err != nil {
			return err
		}
		defer func() { err = errors.Join(err, done()) }()
		in := func(name string) string { return filepath.Join(dir, name) }
		if err := mkdirs(in("upper"), in("work"), in("merged")); err != nil {
			return err
		}
		m, err := overlayMount(layout.NixStore, in("upper"), in("work"), in("merged"))
		if err != nil {
			return err
		}
		if err := view.Make([]view.Mount{m}, view.User{}); err != nil {
			return err
		}
		d, err := os.Open(in("merged"))
		if err == nil {
			_, err = d.Readdirnames(1)
			if err != nil && err.Error() == "EOF" { // an empty store
				err = nil
			}
			d.Close()
		}
		return errors.Join(err, undo(m))
	})
}

// nixCommand runs a program of Nix without anything of the caller's environment:
// a user's settings, or a Nix of another place, are not what is asked about.
func nixCommand(ctx context.Context, name string, args ...string) *exec.Cmd {
	cmd := exec.CommandContext(ctx, name, args...)
	cmd.Dir = "/"
	cmd.Env = []string{"PATH=/usr/bin:/bin", "HOME=/", "LC_ALL=C", "NIX_USER_CONF_FILES=/dev/null"}
	cmd.WaitDelay = time.Second
	return cmd
}

// nixSettings asks for the settings in force, with the feature switched on: Nix
// drops from the list what it does not know.
func nixSettings(ctx context.Context, nix string) (map[string]string, error) {
	b, err := output(nixCommand(ctx, nix, "--extra-experimental-features", "nix-command "+overlayFeature, "config", "show"))
	if err != nil {
		return nil, err
	}
	return parseSettings(b, "experimental-features", "sandbox", "build-users-group", "auto-allocate-uids"), nil
}

func (n *nixFacts) probeBuildUsers(ctx context.Context) {
	n.buildGroup = "nixbld" // nix.conf(5), for root
	if g, told := n.settings["build-users-group"]; told && os.Geteuid() == 0 {
		n.buildGroup = g
	}
	if n.buildGroup == "" {
		return
	}
	if b, err := readBounded("/etc/group"); err == nil {
		n.buildUsers, n.groupFound = groupMembers(b, n.buildGroup)
	}
	if !n.groupFound { // another database than the file
		if b, err := output(exec.CommandContext(ctx, "getent", "group", n.buildGroup)); err == nil {
			n.buildUsers, n.groupFound = groupMembers(b, n.buildGroup)
		}
	}
}

// tryStore has Nix open a local-overlay store whose layers, databases and mount
// are thrown away: in a private namespace where every mount of the machine is
// read-only, so that whatever Nix takes for its place, it writes nowhere.
func tryStore(ctx context.Context, nix string) outcome {
	trials.Lock()
	defer trials.Unlock()
	return ended(privately(func() (err error) {
		err = unix.MountSetattr(unix.AT_FDCWD, "/", unix.AT_RECURSIVE, &unix.MountAttr{Attr_set: unix.MOUNT_ATTR_RDONLY})
		if err != nil { // Linux 5.12
			return fmt.Errorf("a namespace without anything to write to could not be made: %w", plain{err})
		}
		dir, done, err := scratch()
		if err != nil {
			return fmt.Errorf("%w", plain{err})
		}
		defer func() { err = errors.Join(err, done()) }()
		in := func(name string) string { return filepath.Join(dir, name) }
		const store = "nix/store"
		for _, d := range []string{"conf", "home", "upper", "work", "lower", "lower/nix", "lower/" + store, "top", "top/nix", "top/" + store} {
			if err := os.Mkdir(in(d), 0o755); err != nil {
				return err
			}
		}
		m, err := overlayMount(in("lower/"+store), in("upper"), in("work"), in("top/"+store))
		if err != nil {
			return err
		}
		if err := view.Make([]view.Mount{m}, view.User{}); err != nil {
			return fmt.Errorf("mount an overlay: %w", plain{err})
		}
		url := "local-overlay://?root=" + url.QueryEscape(in("top")) +
			"&lower-store=" + url.QueryEscape("local?root="+url.QueryEscape(in("lower"))) +
			"&upper-layer=" + url.QueryEscape(in("upper"))
		cmd := nixCommand(ctx, nix, "--extra-experimental-features", "nix-command "+overlayFeature,
			"--option", "build-users-group", "", "store", "info", "--store", url)
		cmd.Env = append(cmd.Env, "NIX_CONF_DIR="+in("conf"), "HOME="+in("home"), "TMPDIR="+in("home"))
		_, err = outputInTrial(cmd)
		return errors.Join(judgeStore(ctx, err), undo(m))
	}))
}

// plain hides an errno from the judgement: it is not the answer to the question
// that was asked.
type plain struct{ error }

// judgeStore tells a Nix that refuses from one that could not be run.
func judgeStore(ctx context.Context, err error) error {
	var exit *exec.ExitError
	switch {
	case ctx.Err() != nil:
		return ctx.Err()
	case errors.As(err, &exit) && exit.Exited():
		return wrong("%s", err)
	case err != nil:
		return fmt.Errorf("run nix: %w", plain{err})
	}
	return nil
}
