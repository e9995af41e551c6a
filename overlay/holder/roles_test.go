package holder

import (
	"context"
	"errors"
	"fmt"
	"io"
	"net"
	"os"
	"os/exec"
	"path/filepath"
	"syscall"
	"unsafe"

	"golang.org/x/sys/unix"
)

// roles are what a helper process does before it says "ready" and waits for the
// end of its standard input.
var roles = map[string]func(args []string) error{
	"wait": func([]string) error { return nil },
	"open": func(a []string) error { return keepOpen(a[0]) },
	"path": func(a []string) error {
		_, err := unix.Open(a[0], unix.O_PATH, 0)
		return err
	},
	"deleted": func(a []string) error { return openAndRemove(a[0]) },
	"fifo": func(a []string) error {
		if err := unix.Mkfifo(a[0], 0o600); err != nil {
			return err
		}
		_, err := unix.Open(a[0], unix.O_RDWR, 0)
		return err
	},
	"chdir":  func(a []string) error { return os.Chdir(a[0]) },
	"chroot": func(a []string) error { return unix.Chroot(a[0]) },
	"mmap":   func(a []string) error { return mapAndClose(a[0]) },
	"unshare-fd": func([]string) error { // a namespace without a process
		f, err := newSpace(nil)
		kept = append(kept, f)
		return err
	},
	"socket": func(a []string) error {
		if err := os.Chdir(filepath.Dir(a[0])); err != nil { // sun_path is short
			return err
		}
		l, err := net.Listen("unix", filepath.Base(a[0]))
		kept = append(kept, l)
		if err != nil {
			return err
		}
		return os.Chdir("/")
	},
	"thread-cwd": func(a []string) error {
		return stayOnThread(func() error {
			if err := unix.Unshare(unix.CLONE_FS); err != nil {
				return err
			}
			return unix.Chdir(a[0])
		})
	},
	"thread-fd": func(a []string) error {
		return stayOnThread(func() error {
			if err := unix.Unshare(unix.CLONE_FILES); err != nil {
				return err
			}
			_, err := unix.Open(a[0], unix.O_RDONLY, 0)
			return err
		})
	},
	"thread-ns": func([]string) error {
		return stayOnThread(func() error { return unix.Unshare(unix.CLONE_NEWNS) })
	},
	"inotify": func(a []string) error {
		fd, err := unix.InotifyInit1(unix.IN_CLOEXEC)
		if err != nil {
			return err
		}
		_, err = unix.InotifyAddWatch(fd, a[0], unix.IN_MODIFY)
		return err
	},
	"fanotify": func(a []string) error {
		fd, err := unix.FanotifyInit(unix.FAN_CLASS_NOTIF|unix.FAN_CLOEXEC, unix.O_RDONLY)
		if err != nil {
			return err
		}
		return unix.FanotifyMark(fd, unix.FAN_MARK_ADD, unix.FAN_OPEN, unix.AT_FDCWD, a[0])
	},
	// The first thread ends, another lives on with what both had.
	"no-leader": func(a []string) error {
		if err := keepOpen(a[0]); err != nil {
			return err
		}
		if err := mapAndClose(a[1]); err != nil {
			return err
		}
		if err := os.Chdir(a[2]); err != nil {
			return err
		}
		go func() {
			fmt.Println("ready")
			_, _ = io.Copy(io.Discard, os.Stdin)
			os.Exit(0)
		}()
		// exit(2) as a bare system call ends the calling thread, the first.
		unix.RawSyscall(unix.SYS_EXIT, 0, 0, 0)
		return nil
	},
	"many": func(a []string) error {
		for i := range 100 {
			if err := keepOpen(a[0]); err != nil {
				return err
			}
			if err := openAndRemove(fmt.Sprintf("%s-%d", a[0], i)); err != nil {
				return err
			}
		}
		return nil
	},
	// A scan by somebody who may not look into others' processes.
	"scan-as-nobody": func([]string) error {
		if err := syscall.Setuid(65534); err != nil {
			return err
		}
		_, err := Scan(context.Background(), Target{Devices: []uint64{1}}, nil)
		var e *IncompleteError
		if !errors.As(err, &e) || e.Count == 0 || !errors.Is(err, os.ErrPermission) {
			return fmt.Errorf("got error %v, want *IncompleteError", err)
		}
		return nil
	},
	"io_uring": func(a []string) error {
		var params [120]byte
		ring, _, e := unix.Syscall(unix.SYS_IO_URING_SETUP, 4, uintptr(unsafe.Pointer(&params)), 0)
		if e != 0 {
			return e
		}
		fd, err := unix.Open(a[0], unix.O_RDONLY, 0)
		if err != nil {
			return err
		}
		defer unix.Close(fd)
		list := [1]int32{int32(fd)}
		const registerFiles = 2
		if _, _, e := unix.Syscall6(unix.SYS_IO_URING_REGISTER, ring, registerFiles, uintptr(unsafe.Pointer(&list)), 1, 0, 0); e != 0 {
			return e
		}
		return nil
	},
}

var kept []any // what must not be collected

func keepOpen(name string) error {
	f, err := os.Open(name)
	kept = append(kept, f)
	return err
}

func mapAndClose(name string) error {
	fd, err := unix.Open(name, unix.O_RDONLY, 0)
	if err != nil {
		return err
	}
	defer unix.Close(fd)
	_, err = unix.Mmap(fd, 0, 4096, unix.PROT_READ, unix.MAP_SHARED)
	return err
}

func openAndRemove(name string) error {
	if err := os.WriteFile(name, []byte("x"), 0o600); err != nil {
		return err
	}
	if err := keepOpen(name); err != nil {
		return err
	}
	return os.Remove(name)
}

func stayOnThread(f func() error) error {
	done := make(chan error)
	go onThread(func() error {
		done <- f()
		select {}
	})
	return <-done
}

func play(role string, args []string) int {
	f, ok := roles[role]
	if !ok {
		fmt.Fprintf(os.Stderr, "no role %q\n", role)
		return 2
	}
	if err := f(args); err != nil {
		fmt.Fprintf(os.Stderr, "%s: %v\n", role, err)
		return 1
	}
	fmt.Println("ready")
	_, _ = io.Copy(io.Discard, os.Stdin)
	return 0
}

// unshared makes a command start in a copy of its parent's mount namespace.
func unshared(cmd *exec.Cmd) *exec.Cmd {
	cmd.SysProcAttr = &unix.SysProcAttr{Unshareflags: unix.CLONE_NEWNS}
	return cmd
}
