// Package move carries paths from one store to the other: out of the plaintext
// system store into a keep (*seal*), and back (*release*).
//
// It promises, at every instant and after a crash between any two system calls:
//
//   - a path is valid in the place that the journal and the two databases name, with
//     contents whose NAR hash was verified on the way; a path that does not match its
//     hash is not moved, and is named;
//   - the system store is closed under references;
//   - nothing leaves the system store that one of Nix's roots there needs, temporary
//     roots and running processes included, and no collector runs meanwhile;
//   - what was sealed is overwritten before it is let go of, and what lay in the
//     system store only for a release that did not happen, too.
//
// Start with Open for a World, call World.Recover before anything else, then
// World.Run with the moves of a plan (package plan). World.History tells what was
// done, for undo.
//
// The journal (directory "journal" of the keep) is the only record of moves. The
// databases are the truth about where a path is valid; the journal says what was
// under way.
//
// A mover is a root process in the keep's view. It is one more process that uses
// the keep: a lock names it, or ends it, and the next mover goes on from the journal.
//
// Do not use it to decide what moves (package plan does) or to move what is in
// nobody's database.
package move
