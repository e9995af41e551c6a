// Package lower stands between a personal Nix store and the system's
// nix-daemon, which is its lower store, so that nothing the personal store has
// learned to be valid can be collected before it is pinned.
//
// It promises, for every connection that Proxy.Serve accepts:
//
//   - A store path is temp-rooted in the system store before the client is told
//     that it is valid. Temp roots live as long as the upstream connection does.
//   - The upstream connection is closed only after BeforeClose has returned nil
//     and every temp root was sent once more (see session.finish for why), or
//     after Serve was told to end and its grace is over, which is logged.
//   - Nothing is written to the system store. Only the queries a lower store
//     needs are let through; anything else is answered with a protocol error
//     and the connection is closed.
//   - With Absent set, upstream does not hear of a path that the directory of the
//     system store has no entry of.
//   - No name of a path that the system store does not have is written to the
//     system's disk: temp roots are plain files (/nix/var/nix/temproots/PID),
//     so a path is rooted only after the system store itself said it is valid,
//     and is asked for again under the root.
//   - The client's settings (they may hold access tokens) are not passed on.
//
// Start with Proxy: set Upstream and BeforeClose and call Serve with a listener.
// Client is a small reader of the same protocol for the supervisor's own
// questions.
//
// Do not use it as a general proxy of the worker protocol: builds, copies and
// substitution are refused on purpose. It does not protect from the
// system's root, and a proxy that is killed drops its temp roots; set Rooted
// (a durable pin before the answer) where that matters.
//
// Words: client = the personal nix-daemon, upstream = the system's nix-daemon,
// operation = one request of the worker protocol. The protocol is as in Nix's
// src/libstore/worker-protocol*.cc, daemon.cc and remote-store.cc, read at
// 2.26.3 and 2.34.8.
package lower
