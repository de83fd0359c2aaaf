// Threads of OpenMP after a fork. libgomp keeps the team of a thread that ran one; in a process
// forked by that thread the team is gone, and the next parallel region would wait for it for ever.
#pragma once

#include <exception>
#include <thread>

namespace polyhead {

// Whether the calling thread is the one that forked this process, and may miss its team.
bool omp_team_lost();

// Runs `work`, of so many threads, where its parallel regions find or make a team.
template <class Work>
void run_fork_safe(int threads, Work&& work) {
  if (threads == 1 || !omp_team_lost()) return work();
  // A new thread has no team yet, and makes one.
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
