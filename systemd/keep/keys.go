package keep

import (
	"context"
	"maps"
	"os"
	"time"

	"filippo.io/age"

	"overkeep/crypt/secret"
	"overkeep/crypt/slot"
	"overkeep/crypt/volume"
	"overkeep/overlay/layout"
	"overkeep/overlay/view"
)

// Action is what a key operation does to the slot set.
type Action string

const (
	ActionAdd      Action = "add"
	ActionRemove   Action = "remove"
	ActionChange   Action = "change"   // a new passphrase in the same slot
	ActionRecovery Action = "recovery" // a new recovery key in place of the old
	ActionConfirm  Action = "confirm"  // the recovery key has been shown to be held
)

// NewSlot describes a change of the slot set.
type NewSlot struct {
	Action    Action `json:"action"`
	Name      string `json:"name,omitempty"`
	Recipient string `json:"recipient,omitempty"` // "" for a passphrase slot
	Label     string `json:"label,omitempty"`
}

// Auth is what opens a slot: a passphrase, or the text of an identity file (age,
// SSH private key, plugin), for any slot or the named one. The keep does not own
// the secrets.
type Auth struct {
	Passphrase *secret.Bytes
	Identity   *secret.Bytes
	Slot       string
	// IgnoreDamaged names a damaged slot whose damage the user has seen.
	IgnoreDamaged string
}

func (a Auth) apply(r *request) []*secret.Bytes {
	r.Slot, r.Salvage = a.Slot, a.IgnoreDamaged
	var s []*secret.Bytes
	if a.Passphrase != nil {
		r.Secrets, s = append(r.Secrets, secretPassphrase), append(s, a.Passphrase)
	}
	if a.Identity != nil {
		r.Secrets, s = append(r.Secrets, secretIdentity), append(s, a.Identity)
	}
	return s
}

// KeyInfo is what Keys tells of one slot.
type KeyInfo struct {
	Name    string    `json:"name"`
	Kind    slot.Kind `json:"kind"`
	Role    string    `json:"role,omitempty"`
	Label   string    `json:"label,omitempty"`
	Created time.Time `json:"created"`
	Weak    []string  `json:"weak,omitempty"`    // why it is weaker than it should be
	Damaged string    `json:"damaged,omitempty"` // what is wrong with its file
}

// KeyList is the public face of a keep's slot set. Nothing of it is authenticated
// before the keep has been unlocked with it.
type KeyList struct {
	Keep      string    `json:"keep"`
	Epoch     uint64    `json:"epoch"`
	Protector string    `json:"protector"` // fscrypt protector descriptor
	Policy    string    `json:"policy"`    // fscrypt policy key identifier
	Slots     []KeyInfo `json:"slots"`
	Findings  []string  `json:"findings,omitempty"` // of the set as a whole
}

// Keys lists the slots, without any key.
func (k *Keep) Keys() (*KeyList, error) {
	set, files, err := loadSlots(k.Slots(), k.Name)
	if err != nil {
		return nil, classified(err)
	}
	out := &KeyList{Keep: k.Name, Epoch: set.Epoch, Protector: set.Protector, Policy: set.Policy}
	weak := map[string][]string{}
	for _, w := range slot.Weakest(set, files) {
		if w.Slot == "" {
			out.Findings = append(out.Findings, w.String())
		}
		weak[w.Slot] = append(weak[w.Slot], w.Reason)
	}
	damaged := map[string]string{}
	for _, f := range files.Findings {
		if _, ok := set.Lookup(f.Slot); !ok {
			out.Findings = append(out.Findings, f.Error())
			continue
		}
		damaged[f.Slot] = f.Reason
	}
	for _, s := range set.Slots {
		out.Slots = append(out.Slots, KeyInfo{Name: s.Name, Kind: s.Kind, Role: s.Role, Label: s.Label,
			Created: s.Created, Weak: weak[s.Name], Damaged: damaged[s.Name]})
	}
	return out, nil
}

// ChangeKeys changes the slot set; auth opens a present slot. newPass is the
// passphrase of an added or changed passphrase slot. confirm is called for a new
// recovery key before the set is replaced, as in Init. An *Error that is InForce
// came after that.
func (k *Keep) ChangeKeys(ctx context.Context, auth Auth, change NewSlot, newPass *secret.Bytes, logN int, force bool, confirm func(*secret.Bytes) error) error {
	if err := requireRoot(); err != nil {
		return err
	}
	release, err := runLock(k.Keep)
	if err != nil {
		return err
	}
	defer release()
	needsPass := change.Action == ActionChange || change.Action == ActionAdd && change.Recipient == ""
	if needsPass && newPass.Len() < MinPassphrase {
		return errorf(CodeUsage, "passphrase", "the passphrase has %d bytes; the least is %d", newPass.Len(), MinPassphrase)
	}
	if logN == 0 {
		logN = slot.DefaultLogN
	}
	req := request{Root: k.Root, Name: k.Name, StateDir: k.StateDir(), Header: k.Header, NewSlot: &change, LogN: logN, Force: force}
	secrets := auth.apply(&req)
	if needsPass {
		req.Secrets, secrets = append(req.Secrets, secretNewPassphrase), append(secrets, newPass)
	}
	if change.Action == ActionRecovery {
		recovery, _, err := slot.NewRecovery()
		if err != nil {
			return classified(err)
		}
		defer recovery.Wipe()
		// Shown and confirmed before it replaces the old one: until then the old
		// recovery key is the one that works.
		if _, err := k.Verify(ctx, auth); err != nil {
			return err
		}
		if err := confirm(recovery); err != nil {
			return classified(err)
		}
		req.Secrets, secrets = append(req.Secrets, secretNewPassphrase), append(secrets, recovery)
	}
	before, _, unread := loadSlots(k.Slots(), k.Name)
	err = k.inVolumeNamespace(func(ns *view.Namespace) error {
		_, err := k.m.child(ctx, "keys", req, childOptions{ns: ns, secrets: secrets}, nil)
		return err
	})
	if err == nil || unread != nil { // a set that cannot be read is not replaced
		return err
	}
	// The helper may have died after the exchange, or failed to pin the new epoch,
	// which the next unlock does.
	if after, _, lerr := loadSlots(k.Slots(), k.Name); lerr != nil || after.Epoch != before.Epoch {
		return inForce(err)
	}
	return err
}

// inVolumeNamespace runs f with the keep's own namespace when there is one, or a
// new one with the mount points made for it.
func (k *Keep) inVolumeNamespace(f func(*view.Namespace) error) error {
	ns, err := existingNamespace(k.Keep)
	if err != nil {
		return err
	}
	if ns != nil && !hasVolume(ns, k.Keep) {
		// Sessions may live there: what is mounted for a moment is not for them.
		ns.Close()
		ns = nil
	}
	if ns == nil {
		if err := ensureRunDirs(k.Keep); err != nil {
			return err
		}
		defer removeRunDirs(k.Keep)
		if ns, err = privateNamespace(); err != nil {
			return err
		}
	}
	defer ns.Close()
	return f(ns)
}

// hasVolume reports whether the volume is mounted in ns.
func hasVolume(ns *view.Namespace, k layout.Keep) bool {
	return ns.Do(func() error {
		_, err := os.Lstat(k.InnerHeader())
		return err
	}) == nil
}

// Verify proves that auth opens a slot of the authenticated set, and returns its
// name. Nothing is unlocked.
func (k *Keep) Verify(ctx context.Context, auth Auth) (string, error) {
	if err := requireRoot(); err != nil {
		return "", err
	}
	req := request{Root: k.Root, Name: k.Name, StateDir: k.StateDir(), Header: k.Header}
	secrets := auth.apply(&req)
	ns, err := privateNamespace()
	if err != nil {
		return "", err
	}
	defer ns.Close()
	var r openResult
	_, err = k.m.child(ctx, "verify", req, childOptions{ns: ns, secrets: secrets}, &r)
	return r.Slot, err
}

// opKeys replaces the slot set, then pins its epoch inside the volume.
func opKeys(ctx context.Context, c *call) (any, error) {
	set, files, master, _, err := c.openSlots()
	if err != nil {
		return nil, err
	}
	defer master.Wipe()
	if err := slot.Sweep(c.slotsDir()); err != nil {
		return nil, err
	}
	spec, id := c.spec(), volumeID(set)
	// A set that was rolled back as a whole is refused before anything is built
	// on it, and the new epoch is pinned after: between the two a crash leaves a
	// public epoch that is ahead, which the next unlock rolls forward.
	return nil, c.inVolume(ctx, spec, id, master, func() error {
		if err := c.checkInner(set.Epoch); err != nil {
			return err
		}
		next, files, err := c.change(set, files, master)
		if err != nil {
			return err
		}
		if err := slot.Commit(c.slotsDir(), next, files, master); err != nil {
			return err
		}
		return c.writeInner(next.Epoch)
	})
}

// inVolume runs f with the volume mounted: the view's own mount when the keep is
// open, else one that is closed again.
func (c *call) inVolume(ctx context.Context, spec volume.Spec, id volume.ID, master *secret.Bytes, f func() error) error {
	if _, err := os.Lstat(c.k.InnerHeader()); err == nil {
		if err := f(); err != nil {
			return err
		}
		return nil
	}
	return withVolume(ctx, spec, id, master, c.k.Volume(), f)
}

// change computes the next set and its files; pure but for the key derivation.
func (c *call) change(set *slot.Set, have slot.Files, master *secret.Bytes) (*slot.Set, map[string][]byte, error) {
	n := c.NewSlot
	if n == nil {
		return nil, nil, errorf(CodeUsage, "", "no change given")
	}
	now := time.Now().UTC().Truncate(time.Second)
	files := maps.Clone(have.Content)
	wrap := func(name string, to age.Recipient) error {
		b, err := slot.Wrap(master, to)
		files[name] = b
		return err
	}
	var next *slot.Set
	var err error
	switch n.Action {
	case ActionConfirm:
		next, err = set.Confirm()
	case ActionRemove:
		if next, err = set.Remove(n.Name, c.Force); err == nil {
			delete(files, n.Name)
		}
	case ActionAdd:
		s := slot.Slot{Name: n.Name, Kind: slot.Passphrase, Created: now, Label: n.Label}
		var to age.Recipient
		if n.Recipient == "" {
			to, err = slot.NewPassphraseRecipient(c.secrets[secretNewPassphrase], c.LogN)
		} else {
			to, s.Kind, err = slot.ParseRecipient(n.Recipient, terminalUI())
		}
		if err != nil {
			return nil, nil, err
		}
		if next, err = set.Add(s); err == nil {
			err = wrap(s.Name, to)
		}
	case ActionChange:
		old, ok := set.Lookup(n.Name)
		if !ok || old.Kind != slot.Passphrase {
			return nil, nil, errorf(CodeUsage, n.Name, "%q is not a passphrase slot of this keep", n.Name)
		}
		to, err := slot.NewPassphraseRecipient(c.secrets[secretNewPassphrase], c.LogN)
		if err != nil {
			return nil, nil, err
		}
		old.Created = now
		if next, err = set.Replace(old); err != nil {
			return nil, nil, err
		}
		if err := wrap(old.Name, to); err != nil {
			return nil, nil, err
		}
	case ActionRecovery:
		to, err := recoveryRecipient(c.secrets[secretNewPassphrase])
		if err != nil {
			return nil, nil, err
		}
		s := slot.Slot{Name: "recovery", Kind: slot.X25519, Role: slot.Recovery, Created: now}
		if _, ok := set.Lookup(s.Name); ok {
			next, err = set.Replace(s)
		} else {
			next, err = set.Add(s)
		}
		if err != nil {
			return nil, nil, err
		}
		if err := wrap(s.Name, to); err != nil {
			return nil, nil, err
		}
		// The new key has been confirmed before this process was asked.
		next, err = next.Confirm()
		if err != nil {
			return nil, nil, err
		}
	default:
		return nil, nil, errorf(CodeUsage, string(n.Action), "no key action %q", n.Action)
	}
	return next, files, err
}

// recoveryRecipient is the public side of a recovery key.
func recoveryRecipient(key *secret.Bytes) (age.Recipient, error) {
	id, err := slot.ParseRecovery(key)
	if err != nil {
		return nil, err
	}
	x, ok := id.(*age.X25519Identity)
	if !ok {
		return nil, errorf(CodeInternal, "", "recovery key of type %T", id)
	}
	return x.Recipient(), nil
}
