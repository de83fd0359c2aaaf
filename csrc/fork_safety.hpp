// OpenMP after a fork. libgomp caches the team of each thread; in a process forked by that thread
// the team is gone, and the next parallel region would wait for it forever.
#pragma once

#include <exception>
#include <thread>

namespace polyhead {

// True if the calling thread forked this process, and may have lost its team.
bool omp_team_lost();

// Runs `work`, whose parallel regions have `threads` threads, on a thread with a usable team.
template <class Work>
void run_fork_safe(int threads, Work&& work) {
  if (threads == 1 || !omp_team_lost()) return work();
  // A new thread has no team yet, and creates one.
  std::exception_ptr error;
  std::thread([&] {
    try {
      work();
    } catch (...) {
      error = std::current_exception();
    }
  }).join();
  if (error) std::rethrow_exception(error);
}

}  // namespace polyhead
