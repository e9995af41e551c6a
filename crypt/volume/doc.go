// Package volume is the encrypted place of a keep: an fscrypt directory, or an
// ext4 image file inside an fscrypt directory, behind one interface.
//
// It promises that what is below the mount point is encrypted on the device
// from its first byte on, that stock tools open it with nothing but the raw
// master key ("fscrypt unlock DIR --key=FILE"), that Open adds a key only after
// it has checked that master key, protector, policy and directory belong
// together, and that ProveLocked says nil only when the kernel has no key and
// the directory shows nothing but ciphertext. Whatever fails part-way is undone.
//
// # Words
//
// The directory is the fscrypt directory (Spec.Dir). The policy is what the
// kernel knows: a v2 encryption policy, named by a hash of its key. The
// protector is fscrypt's wrapping of the policy key; ours has the source
// raw_key, and the master key is that raw key. A no-key name is the form in
// which a directory lists an encrypted name while the key is absent.
//
// # The two back-ends
//
// Image (the private default) hides names, sizes, counts and extended
// attributes: all that shows is one file. Still visible are its size and which
// of its blocks were ever written. Spec.Preallocate takes all blocks at once,
// so stat(2) tells nothing any more and the disk cannot run full beneath the
// keep (without it, that is an I/O error inside, and the filesystem turns
// read-only); but the extent tree of the outer filesystem, which is not encrypted,
// still marks blocks that were never written.
//
// Dir needs no loop device and shares the free space of its filesystem, but
// shows the exact sizes, counts, tree shape, owners, times and extended
// attributes of everything in it.
//
// Either may live on a filesystem without encryption by way of Spec.FSImage: a
// file of ours that holds an ext4 with the encrypt feature.
//
// # How to start
//
// Create, once; then Open, and to lock, in this order: Unmount, RemoveKey until
// it says no file is busy and KeyStatus says Absent (RemoveKeyWait does just
// that), DropCaches, ProveLocked, DetachFS. Probe says beforehand whether a
// directory can hold a volume.
//
// All functions act in the mount namespace of the calling thread; call them
// from a process that lives in the view as a whole. They need root. Paths in
// Spec must have parents that only root can rename.
//
// # When not to use it
//
// The process that creates or opens should end soon after: fscrypt's key buffers
// are locked and wiped, but what Go's AES and HMAC expand from them stays on its
// heap until it does.
//
// There is no integrity: somebody with the disk can flip bits or put back old
// blocks. There is no protection from root while it is open. A removed key
// leaves what the page cache gave back to the free list in RAM.
//
// # Log output
//
// github.com/google/fscrypt narrates through the standard logger of package
// log: paths and descriptors, never keys (a test holds that). A command that
// links this package must call log.SetOutput(io.Discard) before anything else.
// This package does not: the standard logger belongs to the program.
package volume
