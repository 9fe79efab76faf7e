// The cores that a process may use, whatever thread asks: one that is kept on one core (see EventLoop.stay_on) hands
// that on to every thread that it starts.
#pragma once
#include <sched.h>
#include <unistd.h>

namespace expertd {

// Those of its first thread, which is nobody's to keep anywhere; false: unknown.
inline bool cores_of_process(cpu_set_t* cores) { return sched_getaffinity(getpid(), sizeof(*cores), cores) == 0; }

// For a thread to begin with.
inline void run_on_any_core() {
  cpu_set_t cores;
  if (cores_of_process(&cores)) (void)sched_setaffinity(0, sizeof(cores), &cores);
}

}  // namespace expertd
