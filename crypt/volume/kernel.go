package volume

import (
	"encoding/hex"
	"errors"
	"fmt"
	"os/user"
	"unsafe"

	"github.com/google/fscrypt/crypto"
	"github.com/google/fscrypt/filesystem"
	"github.com/google/fscrypt/keyring"
	"golang.org/x/sys/unix"
)

// kernel is the fscrypt part of the kernel (Documentation/filesystems/
// fscrypt.rst). Tests put a double in its place. Errors are, or wrap, the errno.
type kernel interface {
	// setPolicy gives the empty directory dir the v2 policy of this package.
	setPolicy(dir int, descriptor string) error
	// policy reads the policy of dir; ENODATA if it has none.
	policy(dir int) (policyInfo, error)
	// addKey adds the key to the filesystem of dir and checks its descriptor.
	addKey(dir int, descriptor string, key *crypto.Key) error
	// removeKey removes the key for all users. dir must not be encrypted with
	// it: an fd of the directory itself keeps it busy. ENOKEY if absent.
	removeKey(dir int, descriptor string) (Removal, error)
	keyStatus(dir int, descriptor string) (Status, error)
}

// policyInfo is a policy as the kernel has it. Options has the fields of
// struct fscrypt_policy_v2 that precede the identifier.
type policyInfo struct {
	Descriptor string
	Options    [5]uint8
}

// ourOptions: version 2, AES-256-XTS for contents, AES-256-CTS for names, names
// padded to 32 bytes, data units of the filesystem's block size.
var ourOptions = [5]uint8{
	unix.FSCRYPT_POLICY_V2, unix.FSCRYPT_MODE_AES_256_XTS, unix.FSCRYPT_MODE_AES_256_CTS,
	unix.FSCRYPT_POLICY_FLAGS_PAD_32, 0,
}

type linux struct{}

var live kernel = linux{}

func ioctl(fd int, req uint, arg unsafe.Pointer) error {
	if _, _, errno := unix.Syscall(unix.SYS_IOCTL, uintptr(fd), uintptr(req), uintptr(arg)); errno != 0 {
		return errno
	}
	return nil
}

func identifier(descriptor string) (id [unix.FSCRYPT_KEY_IDENTIFIER_SIZE]byte, err error) {
	if b, err := hex.DecodeString(descriptor); err == nil && len(b) == len(id) {
		return [unix.FSCRYPT_KEY_IDENTIFIER_SIZE]byte(b), nil
	}
	return id, fmt.Errorf("policy %q is not 32 hex digits", descriptor)
}

func (linux) setPolicy(dir int, descriptor string) error {
	id, err := identifier(descriptor)
	if err != nil {
		return err
	}
	p := unix.FscryptPolicyV2{
		Version: ourOptions[0], Contents_encryption_mode: ourOptions[1], Filenames_encryption_mode: ourOptions[2],
		Flags: ourOptions[3], Log2_data_unit_size: ourOptions[4], Master_key_identifier: id,
	}
	return ioctl(dir, unix.FS_IOC_SET_ENCRYPTION_POLICY, unsafe.Pointer(&p))
}

func (linux) policy(dir int) (policyInfo, error) {
	arg := unix.FscryptGetPolicyExArg{Size: 24}
	if err := ioctl(dir, unix.FS_IOC_GET_ENCRYPTION_POLICY_EX, unsafe.Pointer(&arg)); err != nil {
		return policyInfo{}, err
	}
	p := policyInfo{Options: [5]uint8(arg.Policy[:5])}
	switch arg.Policy[0] {
	case unix.FSCRYPT_POLICY_V1:
		p.Options[4] = 0 // a byte of the v1 descriptor
		p.Descriptor = hex.EncodeToString(arg.Policy[4:12])
	case unix.FSCRYPT_POLICY_V2:
		p.Descriptor = hex.EncodeToString(arg.Policy[8:24])
	default:
		return p, fmt.Errorf("policy version %d", arg.Policy[0])
	}
	return p, nil
}

// rootUser is what keyring wants to know whose claim to a key is added; a
// literal, because a look-up would ask the name service.
var rootUser = &user.User{Uid: "0", Gid: "0", Username: "root"}

func (linux) addKey(dir int, descriptor string, key *crypto.Key) error {
	// Of a Mount, the keyring package uses the path alone, and this one leads to
	// the very directory that was checked.
	return keyring.AddEncryptionKey(key, descriptor, &keyring.Options{
		Mount: &filesystem.Mount{Path: procFD(dir)},
		User:  rootUser,
	})
}

func keySpec(descriptor string) (s unix.FscryptKeySpecifier, err error) {
	id, err := identifier(descriptor)
	s.Type = unix.FSCRYPT_KEY_SPEC_TYPE_IDENTIFIER
	copy(s.U[:], id[:])
	return s, err
}

func (linux) removeKey(dir int, descriptor string) (Removal, error) {
	spec, err := keySpec(descriptor)
	if err != nil {
		return Removal{}, err
	}
	arg := unix.FscryptRemoveKeyArg{Key_spec: spec}
	err = ioctl(dir, unix.FS_IOC_REMOVE_ENCRYPTION_KEY_ALL_USERS, unsafe.Pointer(&arg))
	return Removal{
		FilesBusy:  arg.Removal_status_flags&unix.FSCRYPT_KEY_REMOVAL_STATUS_FLAG_FILES_BUSY != 0,
		OtherUsers: arg.Removal_status_flags&unix.FSCRYPT_KEY_REMOVAL_STATUS_FLAG_OTHER_USERS != 0,
	}, err
}

func (linux) keyStatus(dir int, descriptor string) (Status, error) {
	spec, err := keySpec(descriptor)
	if err != nil {
		return Unknown, err
	}
	arg := unix.FscryptGetKeyStatusArg{Key_spec: spec}
	if err := ioctl(dir, unix.FS_IOC_GET_ENCRYPTION_KEY_STATUS, unsafe.Pointer(&arg)); err != nil {
		return Unknown, err
	}
	switch arg.Status {
	case unix.FSCRYPT_KEY_STATUS_ABSENT:
		return Absent, nil
	case unix.FSCRYPT_KEY_STATUS_PRESENT:
		return Present, nil
	case unix.FSCRYPT_KEY_STATUS_INCOMPLETELY_REMOVED:
		return Incomplete, nil
	}
	return Unknown, fmt.Errorf("key status %d", arg.Status)
}

func procFD(fd int) string { return fmt.Sprintf("/proc/self/fd/%d", fd) }

// errnoOf digs the kernel's word out of a wrapped error; 0 if there is none.
func errnoOf(err error) unix.Errno {
	var e unix.Errno
	if errors.As(err, &e) {
		return e
	}
	return 0
}
