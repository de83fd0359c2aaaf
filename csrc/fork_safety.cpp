#include "fork_safety.hpp"

#if defined(__unix__) || defined(__APPLE__)
#include <pthread.h>
#endif

namespace polyhead {
namespace {

thread_local bool forked = false;

#if defined(__unix__) || defined(__APPLE__)
[[maybe_unused]] const int kRegistered = pthread_atfork(nullptr, nullptr, [] { forked = true; });
#endif

}  // namespace

bool omp_team_lost() { return forked; }

}  // namespace polyhead
