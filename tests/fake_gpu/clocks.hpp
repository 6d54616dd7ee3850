// Vector clocks: what every task (a stream, or one host thread of one rank) knows of the others.
#pragma once
#include <cstdint>
#include <memory>
#include <string>
#include <vector>

namespace fake {

using Clock = std::vector<uint64_t>;

inline void join(Clock& into, const Clock& from) {
  if (into.size() < from.size()) into.resize(from.size());
  for (size_t i = 0; i < from.size(); i++)
    if (from[i] > into[i]) into[i] = from[i];
}

// Advances a task's own component and returns it.
inline uint64_t tick(Clock& clock, int task) {
  if (clock.size() <= static_cast<size_t>(task)) clock.resize(task + 1);
  return ++clock[task];
}

// A point in a task's life at which memory is touched. `op` counts the task's operations, `launch` those of the whole
// process in the order in which the host issued them.
struct Moment {
  int task;
  uint64_t op, time, launch;
  Clock clock;
  std::string where;

  bool before(const Moment& other) const {
    return static_cast<size_t>(task) < other.clock.size() && other.clock[task] >= time;
  }
};

using MomentPtr = std::shared_ptr<const Moment>;

}  // namespace fake
