package main

import (
	"strings"
	"testing"

	"overkeep/policy"
)

// Every kind of starter, with and without keys and private names, is a policy; only
// where Nix came with an installer is its profile granted.
func TestStarter(t *testing.T) {
	for _, kind := range machineKinds {
		for _, keys := range [][]string{nil, {cacheKey}} {
			for _, private := range [][]string{nil, {"*-acme-*", `a"b`, "c"}} {
				for _, profile := range []bool{false, true} {
					s := starter{Kind: kind, Keys: keys, Private: private, Profile: profile}
					if _, err := policy.Parse(policy.Source{Name: "policy", Text: []byte(s.text()), Root: true}); err != nil {
						t.Errorf("%+v: %v\n%s", s, err, s.text())
					}
					granted := strings.Contains(s.text(), "system closure-of "+defaultProfile+"\n")
					if granted != (profile && kind == kindLinux) {
						t.Errorf("%+v: %s granted: %t", s, defaultProfile, granted)
					}
				}
			}
		}
	}
}
