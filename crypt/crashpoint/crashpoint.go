// Package crashpoint names the places where a crash would hurt, so that a test
// can crash exactly there.
//
// Code that must survive a crash calls At before every durable step (a write,
// an fsync, a rename). In a normal build At is an empty function and nothing
// can be injected. Built with the tag "inject", At counts its calls from 1 and
// obeys the environment:
//
//	OVERKEEP_CRASH_AT=N     act at call N
//	OVERKEEP_CRASH_COUNT=FILE
//	                        count in FILE, over all processes that are given the
//	                        same one; without it every process counts for itself
//	OVERKEEP_CRASH_HOW=kill             SIGKILL ourselves (the default)
//	OVERKEEP_CRASH_HOW=killgroup        SIGKILL our whole process group: whoever waits
//	                                    for us is gone as well and cannot clean up
//	OVERKEEP_CRASH_HOW=stop             SIGSTOP ourselves; SIGCONT goes on from there
//	OVERKEEP_CRASH_HOW=shutdown:PATH    first stop the ext4 filesystem that holds
//	                                    PATH without flushing its journal, as a
//	                                    power cut would (EXT4_IOC_SHUTDOWN), then
//	                                    killgroup
//	OVERKEEP_CRASH_LOG=FILE             append every name passed, one a line
//
// A counted call acts once: the processes that go on after the crash count on,
// past N. Both files are best on a filesystem that is not shut down.
//
// Names are constants of the source or slot names: public, never a secret, never
// a personal store path.
//
// Never ship a binary built with the tag. Give "killgroup" and "shutdown" only
// to a process that leads a group of its own, or the test dies with it.
package crashpoint
