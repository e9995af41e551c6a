package doctor

import (
	"context"
	"errors"
	"fmt"
	"strings"

	"golang.org/x/sys/unix"

	"overkeep/crypt/volume"
)

// Answer is what a check came to.
type Answer = volume.Answer

// The three answers.
const (
	Yes    = volume.Yes
	No     = volume.No
	Unsure = volume.Unsure
)

// Group is what a check is about.
type Group string

// The groups, in the order in which Run returns them.
const (
	Kernel     Group = "kernel"
	Filesystem Group = "filesystem"
	Nix        Group = "nix"
	Login      Group = "login"
	Safety     Group = "safety"
)

// Check is one thing that was tried. It holds nothing private: no content of a
// file, no name of a personal path, no kernel command line.
type Check struct {
	Name   string `json:"name"`
	Group  Group  `json:"group"`
	Answer Answer `json:"answer"`
	// Needed says that a keep cannot be used without; else it is advice.
	Needed bool   `json:"needed"`
	Found  string `json:"found,omitempty"`
	// Missing is what is missing, in words; empty after Yes.
	Missing string `json:"missing,omitempty"`
	// Remedy is a command to paste; "" where none is known.
	Remedy string `json:"remedy,omitempty"`
	// Or is another way, in words or as a command.
	Or string `json:"or,omitempty"`
}

// Verdict is the answer over everything needed: No if one is no, else Unsure if
// one could not be told, else Yes.
func Verdict(checks []Check) Answer {
	v := Yes
	for _, c := range checks {
		switch {
		case !c.Needed || c.Answer == Yes:
		case c.Answer == No:
			return No
		default:
			v = Unsure
		}
	}
	return v
}

// outcome is how one attempt went. The zero value: it was not made.
type outcome struct {
	tried bool
	err   error
	found string
	// after names what failed before, so that this could not be tried.
	after string
}

func worked(found string) outcome    { return outcome{tried: true, found: found} }
func ended(err error) outcome        { return outcome{tried: true, err: err} }
func behind(what string) outcome     { return outcome{after: what} }
func (o outcome) works() bool        { return o.tried && o.err == nil }
func wrong(f string, a ...any) error { return &wrongError{fmt.Sprintf(f, a...)} }

// wrongError says that an attempt ran to its end and the outcome was not what
// it must be: an answer, and not an accident.
type wrongError struct{ text string }

func (e *wrongError) Error() string { return e.text }

// machine is what every judgement may want to know.
type machine struct {
	root    bool    // the process may do everything
	release release // of the kernel
	sudo    bool    // remedies are pasted into a shell that is not root's
	at      string  // --root
}

// again runs this once more; see shell.
const again = "overkeep doctor"

// shell writes a remedy as the shell it is pasted into wants it: with sudo where
// that is not root's, and with --root where overkeep was given one.
func (m machine) shell(remedy string) string {
	verb, self := strings.CutPrefix(remedy, "overkeep ")
	if self {
		remedy = "overkeep "
		if m.at != "/" && !strings.Contains(verb, "--root ") {
			remedy += "--root " + quote(m.at) + " "
		}
		remedy += verb
	}
	word, _, _ := strings.Cut(remedy, " ")
	switch {
	case remedy == "" || !m.sudo:
		return remedy
	case word == "exit", word == "ulimit": // of this very shell
		return remedy
	case remedy == nixInstaller: // asks for sudo itself
		return remedy
	case !self && strings.ContainsAny(remedy, ";&|<>$'"):
		return "sudo sh -c " + quote(remedy)
	}
	return "sudo " + remedy
}

// feature is something that an attempt is about.
type feature struct {
	name   string
	group  Group
	needed bool
	what   string       // what is missing without it
	since  release      // the first kernel that has it; zero: not the kernel's alone
	option string       // what a kernel may have been built without
	also   []unix.Errno // errors that mean no, beside the usual ones
	remedy string
	or     string
}

// judge turns an attempt into a check.
func (m machine) judge(f feature, o outcome) Check {
	c := Check{Name: f.name, Group: f.group, Needed: f.needed, Found: o.found}
	switch {
	case !o.tried && o.after == "" && m.root:
		c.Answer, c.Missing = Unsure, "an attempt"
	case !o.tried && o.after != "":
		c.Answer, c.Missing = Unsure, "it was not tried: "+o.after+" has to work first"
	case !o.tried:
		m.wantsRoot(&c)
	case o.err == nil:
		c.Answer = Yes
	default:
		m.explain(&c, f, o.err)
		if c.Answer == No && c.Remedy == "" && c.Or == "" {
			c.Or = otherKernel(f.since, f.option)
		}
	}
	return c
}

// otherKernel is the remedy where no command is one.
func otherKernel(since release, option string) string {
	s := "boot a newer kernel, or one built with it"
	if since != (release{}) {
		s = fmt.Sprintf("boot Linux %s or newer", since)
	}
	if option != "" {
		s += ", built with " + option
	}
	return s
}

func (m machine) wantsRoot(c *Check) {
	c.Answer, c.Missing, c.Remedy, c.Or = Unsure, "root, to try it", again, ""
}

// explain judges an attempt that ended with an error.
func (m machine) explain(c *Check, f feature, err error) {
	var (
		unsup *volume.UnsupportedError
		bad   *wrongError
		errno unix.Errno
	)
	refused := errors.As(err, &errno) && (errno == unix.EPERM || errno == unix.EACCES)
	switch {
	case errors.As(err, &unsup):
		c.Answer, c.Missing, c.Remedy = No, oneLine(unsup.Missing), f.remedy
	case errors.As(err, &bad):
		c.Answer, c.Missing, c.Remedy, c.Or = No, f.what+": "+bad.text, f.remedy, f.or
	case refused && !m.root:
		m.wantsRoot(c)
	case refused:
		c.Answer, c.Or = No, "run it outside of the container, or allow it there"
		c.Missing = fmt.Sprintf("%s: root is not allowed to (%v); a container or a security module forbids it", f.what, errno)
	case meansNo(errno, f.also):
		c.Answer, c.Remedy, c.Or = No, f.remedy, f.or
		c.Missing = m.sinceWhen(f, errno)
	case errors.Is(err, context.DeadlineExceeded), errors.Is(err, context.Canceled):
		c.Answer, c.Missing = Unsure, "an answer in time"
	default:
		c.Answer, c.Missing = Unsure, oneLine(err.Error())
	}
}

// meansNo tells the errors by which a kernel says that it has no such thing from
// those by which it says that something else went wrong.
func meansNo(errno unix.Errno, also []unix.Errno) bool {
	switch errno {
	case unix.ENOSYS, unix.ENOTTY, unix.EINVAL, unix.ENODEV, unix.EOPNOTSUPP, unix.ENOPKG, unix.ENOENT, unix.ENXIO:
		return true
	}
	for _, e := range also {
		if e == errno {
			return true
		}
	}
	return false
}

// sinceWhen says what is missing, and whether the kernel ought to have it.
func (m machine) sinceWhen(f feature, errno unix.Errno) string {
	why := fmt.Sprintf("%s (%v)", f.what, errno)
	none := release{}
	switch {
	case f.since == none || m.release == none:
		return why
	case m.release.less(f.since):
		return fmt.Sprintf("%s: it came with Linux %s, this is %s", why, f.since, m.release)
	case f.option != "":
		return fmt.Sprintf("%s: Linux %s is new enough (%s) and says no; built without %s, or switched off", why, m.release, f.since, f.option)
	}
	return fmt.Sprintf("%s: Linux %s is new enough (%s) and says no; it is switched off or forbidden here", why, m.release, f.since)
}

// oneLine makes a message fit a table: one line, bounded.
func oneLine(s string) string {
	const most = 300
	s = strings.Join(strings.Fields(strings.ToValidUTF8(s, "?")), " ")
	if r := []rune(s); len(r) > most {
		s = string(r[:most]) + "…"
	}
	return s
}

// quote makes s one word for a POSIX shell.
func quote(s string) string {
	if s != "" && strings.Trim(s, "abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ0123456789/_.,:=@%+-") == "" && s[0] != '-' {
		return s
	}
	return "'" + strings.ReplaceAll(s, "'", `'\''`) + "'"
}
