package doctor

import (
	"context"
	"errors"
	"fmt"
	"net"
	"os"
	"os/user"
	"path/filepath"
	"strconv"
	"strings"
	"time"
)

// loginFacts is what was found of PAM and systemd. All of it is advice: a keep
// can be unlocked by hand.
type loginFacts struct {
	pam       string // the file of /etc/pam.d that sessions share; "" if none
	module    string // our PAM module; "" if it is not installed
	moduleOn  bool   // a file of /etc/pam.d names it
	systemd   bool   // is the machine's init
	seats     bool   // logind has made its directories
	bus       outcome
	userUnit  bool // user@.service is installed
	userKnown bool
	userErr   error
	uid       int
	homeUID   int // owner of the home; -1 if it is not there
	runDir    bool
}

func (l loginFacts) checks(c Config) []Check {
	var out []Check
	add := func(c Check) { c.Group = Login; out = append(out, c) }
	pam := Check{Name: "PAM", Answer: Yes, Found: l.pam}
	if l.pam == "" {
		pam.Answer, pam.Missing, pam.Remedy = No, "a session stack in /etc/pam.d", "apt install libpam-runtime"
	}
	add(pam)
	sys := Check{Name: "systemd", Answer: Yes, Found: "is the init"}
	if !l.systemd {
		sys.Answer, sys.Found, sys.Missing = No, "", "systemd as the init: nothing locks a keep at logout or suspend by itself"
		sys.Or = "lock by hand: overkeep lock"
	}
	add(sys)
	add(l.logindCheck())
	sessions := Check{Name: "user sessions", Answer: Yes, Found: "user@.service"}
	switch {
	case l.runDir:
		sessions.Found = "a session of the user is open"
	case !l.userUnit:
		sessions.Answer, sessions.Found, sessions.Missing = No, "", "user@.service, the user's own services"
		sessions.Remedy = "apt install libpam-systemd"
	}
	add(sessions)
	if c.User != "" {
		add(l.userCheck(c.User))
	}
	add(l.moduleCheck())
	return out
}

func (l loginFacts) logindCheck() Check {
	c := Check{Name: "logind", Answer: Yes, Found: "the system bus answers"}
	switch {
	case !l.systemd && !l.seats:
		c.Answer, c.Found, c.Missing = No, "", "logind, which tells of logins, suspend and screen locks"
		c.Or = "it comes with systemd as the init"
	case !l.seats:
		c.Answer, c.Found, c.Missing = No, "", "a running systemd-logind"
		c.Remedy = "systemctl start systemd-logind"
	case errors.Is(l.bus.err, os.ErrPermission), !l.bus.tried:
		c.Answer, c.Found, c.Missing = Unsure, "", "permission to connect to the system bus"
	case l.bus.err != nil:
		c.Answer, c.Found, c.Missing = No, "", "a system bus that takes connections"
		c.Remedy = "systemctl start dbus.socket"
	}
	return c
}

func (l loginFacts) userCheck(name string) Check {
	c := Check{Name: "user", Answer: Yes, Needed: true, Found: quote(name)}
	bad := func(format string, a ...any) { c.Answer, c.Missing = No, fmt.Sprintf(format, a...) }
	switch {
	case !l.userKnown && l.userErr != nil:
		c.Answer, c.Missing = Unsure, oneLine(l.userErr.Error())
	case !l.userKnown:
		bad("a user of that name")
		c.Remedy = "useradd -m " + quote(name)
	case l.uid == 0:
		bad("a person: a keep does not belong to root, who reads everything anyway")
		c.Or = "name somebody else: --user NAME"
	case l.homeUID < 0:
		bad("a home directory")
		c.Remedy = "mkhomedir_helper " + quote(name)
	case l.homeUID != l.uid:
		bad("a home of the user's own: it belongs to uid %d", l.homeUID)
		c.Or = "give the home to the user, or name another one: --user NAME"
	}
	return c
}

func (l loginFacts) moduleCheck() Check {
	c := Check{Name: "unlock at login", Answer: Yes, Found: l.module}
	switch {
	case l.module == "":
		c.Answer, c.Missing = No, "the PAM module, which is not installed: unlock by hand"
		c.Remedy = "overkeep unlock"
	case !l.moduleOn:
		c.Answer, c.Missing = No, "a line for it in /etc/pam.d"
		c.Remedy = "pam-auth-update --enable overkeep"
	}
	return c
}

const ourModule = "pam_overkeep.so"

func probeLogin(ctx context.Context, c Config) loginFacts {
	l := loginFacts{homeUID: -1}
	for _, f := range []string{"common-session", "system-auth", "system-login", "login"} {
		if isFile("/etc/pam.d/" + f) {
			l.pam = "/etc/pam.d/" + f
			break
		}
	}
	for _, p := range []string{
		"/usr/lib/*/security/", "/lib/*/security/", "/usr/lib/security/", "/lib/security/", "/usr/lib64/security/",
		"/run/current-system/sw/lib/security/",
	} {
		if found, err := filepath.Glob(p + ourModule); err == nil && len(found) > 0 {
			l.module = found[0]
			break
		}
	}
	stacks, _ := filepath.Glob("/etc/pam.d/*")
	for _, f := range stacks {
		b, err := readBounded(f)
		l.moduleOn = l.moduleOn || err == nil && namesModule(b, "pam_overkeep")
	}
	l.systemd = isDirectory("/run/systemd/system") // sd_booted(3)
	l.seats = isDirectory("/run/systemd/seats")
	for _, d := range []string{"/usr/lib", "/lib", "/etc"} {
		l.userUnit = l.userUnit || isFile(d+"/systemd/system/user@.service")
	}
	ctx, cancel := context.WithTimeout(ctx, 2*time.Second)
	defer cancel()
	conn, err := new(net.Dialer).DialContext(ctx, "unix", "/run/dbus/system_bus_socket")
	if l.bus = ended(err); err == nil {
		conn.Close()
	}
	if c.User == "" {
		return l
	}
	u, err := user.Lookup(c.User)
	if err != nil {
		if unknown := user.UnknownUserError(""); !errors.As(err, &unknown) {
			l.userErr = err
		}
		return l
	}
	l.userKnown = true
	l.uid, _ = strconv.Atoi(u.Uid)
	for _, p := range stairs(u.HomeDir) {
		if p.path == u.HomeDir && p.mode.IsDir() {
			l.homeUID = int(p.uid)
		}
	}
	l.runDir = isDirectory("/run/user/" + u.Uid)
	return l
}

// namesModule says whether a PAM configuration, comments left out, uses a module.
func namesModule(b []byte, module string) bool {
	for l := range strings.Lines(string(b)) {
		l, _, _ = strings.Cut(l, "#")
		if strings.Contains(l, module) {
			return true
		}
	}
	return false
}

func isDirectory(p string) bool {
	fi, err := os.Stat(p)
	return err == nil && fi.IsDir()
}

func isFile(p string) bool {
	fi, err := os.Stat(p)
	return err == nil && fi.Mode().IsRegular()
}
