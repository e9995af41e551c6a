package keep

import (
	"errors"
	"os"

	"github.com/BurntSushi/toml"

	"overkeep/overlay/layout"
	"overkeep/overlay/nixconf"
)

// Config is the machine's settings, /etc/overkeep/config.toml. Everything has a
// safe default; the file need not exist.
type Config struct {
	// Substituters: "none" (default) or "inherit", see overlay/nixconf.
	Substituters nixconf.Substituters `toml:"substituters"`
}

// ReadConfig reads the settings below root. Unknown keys are refused with their
// name, malformed lines with their position.
func ReadConfig(root string) (Config, error) {
	c := Config{Substituters: nixconf.None}
	path := layout.ConfigFile(root)
	b, err := readSmall(path, 64<<10)
	if errors.Is(err, os.ErrNotExist) {
		return c, nil
	}
	if err != nil {
		return c, errorf(CodeUsage, path, "settings: %w", err)
	}
	md, err := toml.Decode(string(b), &c)
	var pe toml.ParseError
	if errors.As(err, &pe) {
		return c, errorf(CodeUsage, path, "settings %s:%d: %s", path, pe.Position.Line, pe.Message)
	}
	if err != nil {
		return c, errorf(CodeUsage, path, "settings %s: a value is of the wrong kind (substituters is a string)", path)
	}
	if u := md.Undecoded(); len(u) > 0 {
		return c, errorf(CodeUsage, path, "settings %s: unknown key %q", path, u[0].String())
	}
	if c.Substituters != nixconf.None && c.Substituters != nixconf.Inherit {
		return c, errorf(CodeUsage, path, "settings %s: substituters = %q; it is %q or %q", path, c.Substituters, nixconf.None, nixconf.Inherit)
	}
	return c, nil
}

// loadConfig is ReadConfig for where a mistake in the file must not stop what is
// being done: the safe defaults hold then. Unlock reads the file strictly first.
func loadConfig(root string) Config {
	c, err := ReadConfig(root)
	if err != nil {
		return Config{Substituters: nixconf.None}
	}
	return c
}
