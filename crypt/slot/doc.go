// Package slot keeps the ways to open a keep. The keep has one master key of 32
// random bytes; a slot is that key encrypted to one passphrase, key file or
// token, as a plain age file whose plaintext is exactly those 32 bytes. Any slot
// opens the keep; so does stock age without this package:
//
//	age -d -i key.txt slots/recovery.age > raw && fscrypt unlock DIR --key=raw
//
// Start with NewSet, Wrap, (*Set).Add and Commit to make a set; with Load and
// (*Set).Open to use one.
//
// # What it promises
//
//   - The set is replaced as one directory (Commit): a crash leaves the complete
//     old set or the complete new one.
//   - What was opened is what was listed: every file is read once, through
//     directory file descriptors, and the bytes that were hashed are the bytes
//     that are decrypted. The list carries a MAC under a key derived from the
//     master key, checked after a slot has opened and before the key is returned.
//   - No key derivation runs before its cost is known and within bounds: age
//     itself would follow a file to 2^22 (4 GiB of memory).
//   - Nothing is guessed about an unknown version or feature: it is refused.
//
// # One damaged slot must not lock the user out
//
// Load does not fail when a slot file is missing, changed, swapped or not listed.
// It returns the set with one finding for each, and Open refuses, naming the slot,
// because damage is the trace that tampering leaves too. Keys.IgnoreDamaged names
// the slots whose damage the user has seen and accepts; those are skipped, the
// others still open, and the MAC of the list must still verify. It takes names,
// not a yes: what was not named is refused, also next time. Nothing is lost by the
// skip, since a damaged slot is never decrypted. The next Commit without that slot
// (or with a new file for it) heals the set.
//
// If set.json itself is damaged, no set can be verified and Load fails. The slot
// files are still plain age files: OpenFile, or stock age, opens one by itself.
//
// # What it does not promise
//
//   - age does not say who encrypted. Somebody who can write the whole directory
//     and the volume can put a decoy of his own key in their place, encrypted to
//     your public key. Compare Binding.Policy with what the kernel derives from
//     the opened key, and CheckEpoch with what is pinned inside the volume.
//   - Removing a slot is not revoking it: who copied the file earlier, or finds its
//     blocks on the device, still opens it with the old passphrase, as the master
//     key is the same. After a leak make a new keep.
//   - age takes passphrases and identities as Go strings and decrypts into heap
//     buffers; those copies cannot be wiped. Call this package in a short-lived
//     process, so that they die with it.
//
// Do not use it for keys that are not exactly 32 bytes, or for sets on filesystems
// without renameat2(RENAME_EXCHANGE).
package slot
