package holder

import (
	"encoding/hex"
	"os"
	"runtime"
	"testing"
	"unsafe"

	"golang.org/x/sys/unix"
)

// removeKey removes the key of b's directory and tells whether files of it are
// still in use. A key once removed goes for good with the last of them.
func (b *bed) removeKey() (busy bool) {
	b.t.Helper()
	var arg unix.FscryptRemoveKeyArg
	arg.Key_spec.Type = unix.FSCRYPT_KEY_SPEC_TYPE_IDENTIFIER
	id, err := hex.DecodeString(b.target.Trees[0].Key)
	if err != nil {
		b.t.Fatal(err)
	}
	copy(arg.Key_spec.U[:], id)
	f, err := os.Open(b.host)
	if err != nil {
		b.t.Fatal(err)
	}
	defer f.Close()
	_, _, e := unix.Syscall(unix.SYS_IOCTL, f.Fd(), unix.FS_IOC_REMOVE_ENCRYPTION_KEY, uintptr(unsafe.Pointer(&arg)))
	if e != 0 && e != unix.ENOKEY {
		b.t.Fatal(e)
	}
	return arg.Removal_status_flags&unix.FSCRYPT_KEY_REMOVAL_STATUS_FLAG_FILES_BUSY != 0
}

// The judge is the kernel: with whatever Scan names the key stays in use, and
// when Scan names nobody the key goes.
func TestScanAgreesWithKernel(t *testing.T) {
	for _, kind := range []string{"dir", "sealed"} {
		for _, x := range []struct{ role, arg string }{
			{"wait", ""},
			{"open", "/home/note"},
			{"open", "/home"},
			{"path", "/home/note"},
			{"deleted", "/home/gone"},
			{"fifo", "/home/fifo"},
			{"chdir", "/home"},
			{"chroot", ""},
			{"mmap", "/home/note"},
			{"socket", "/home/socket"},
			{"inotify", "/home/note"},
			{"inotify", "/home"},
			{"fanotify", "/home/note"},
			{"io_uring", "/home/note"},
			{"thread-cwd", "/home"},
			{"thread-fd", "/home/note"},
		} {
			t.Run(kind+" "+x.role+x.arg, func(t *testing.T) {
				b := newBed(t, kind, "")
				h := b.start(x.role, b.volume+x.arg)
				if err := UnmountIn(b.view, b.target); err != nil {
					t.Fatal(err)
				}
				named := b.scan()
				busy := b.removeKey()
				if busy != (len(named) > 0) {
					t.Errorf("kernel says busy %v, holders %v", busy, named)
				}
				if busy != (x.role != "wait") {
					t.Errorf("kernel says busy %v", busy)
				}
				h.end()
				b.wantNone("after")
				if x.role == "io_uring" {
					// The kernel takes a ring apart after its process has ended.
					for b.removeKey() {
						runtime.Gosched()
					}
				}
				if b.removeKey() {
					t.Error("nobody is named, but the key is in use")
				}
			})
		}
	}
}
