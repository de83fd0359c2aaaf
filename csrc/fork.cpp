#include "fork.hpp"

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

bool may_miss_its_team() { return forked; }

}  // namespace polyhead
