package slot

import (
	"crypto/hkdf"
	"crypto/hmac"
	"crypto/sha256"
	"encoding/binary"
	"runtime"

	"overkeep/crypt/secret"
)

const macInfo = "overkeep slot set v1"

// encodeMAC writes every field of the set but the MAC: numbers as 8 bytes big
// endian, strings and lists behind their length. No two sets share an encoding,
// and none depends on how JSON happens to write it.
func (s *Set) encodeMAC() []byte {
	var b []byte
	num := func(n uint64) { b = binary.BigEndian.AppendUint64(b, n) }
	str := func(v string) { num(uint64(len(v))); b = append(b, v...) }
	str(macInfo)
	num(uint64(int64(s.Version)))
	num(uint64(len(s.Features)))
	for _, f := range s.Features {
		str(f)
	}
	str(s.KeepID)
	str(s.Protector)
	str(s.Policy)
	num(s.Epoch)
	if s.Confirmed {
		num(1)
	} else {
		num(0)
	}
	num(uint64(len(s.Slots)))
	for _, x := range s.Slots {
		str(x.Name)
		str(string(x.Kind))
		str(x.Role)
		num(uint64(x.Created.Unix()))
		str(x.Label)
		str(x.SHA256)
	}
	return b
}

func (s *Set) mac(master *secret.Bytes) ([]byte, error) {
	if err := checkMaster(master); err != nil {
		return nil, err
	}
	key, err := hkdf.Key(sha256.New, master.Bytes(), nil, macInfo, sha256.Size)
	runtime.KeepAlive(master)
	if err != nil {
		return nil, err
	}
	defer clear(key)
	h := hmac.New(sha256.New, key)
	h.Write(s.encodeMAC())
	return h.Sum(nil), nil
}

// VerifyMAC says whether the set was written by a holder of the master key:
// HMAC-SHA256 (RFC 2104) under HKDF-SHA256(master, info "overkeep slot set v1")
// (RFC 5869). If not, it is a *TamperError with Reason BadMAC.
func (s *Set) VerifyMAC(master *secret.Bytes) error {
	want, err := s.mac(master)
	if err != nil {
		return err
	}
	if !hmac.Equal(want, s.MAC) {
		return &TamperError{Reason: BadMAC}
	}
	return nil
}

// CheckEpoch compares the epoch of the public set with the one pinned inside the
// volume. An older public set was rolled back: a *TamperError. A newer one is what
// a crash leaves between Commit and the pin; its MAC holds, so the caller pins it
// (roll forward).
func CheckEpoch(public, inside uint64) (rollForward bool, err error) {
	if public < inside {
		return false, &TamperError{Reason: RolledBack}
	}
	return public > inside, nil
}
