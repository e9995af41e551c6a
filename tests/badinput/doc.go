// Package badinput shows what moves do with what they should not be given: plans that
// were edited, cut off or made elsewhere; paths that vanish, change or are damaged
// between plan and apply; trees of every awkward shape; stores and disks without room;
// and paths that somebody holds. Either a command does what was asked for, or it says
// what is wrong with the exit code of the manual, and nothing has moved.
//
// Do not look here for kills and failing system calls (tests/moves).
package badinput
