#pragma once
#include <map>
#include <string>

#define FAKE_API extern "C" __attribute__((visibility("default")))

namespace fake {

// How often this thread has called each of the entry points that are counted.
inline std::map<std::string, int>& calls() {
  thread_local std::map<std::string, int> counts;
  return counts;
}
inline void note_call(const char* name) { ++calls()[name]; }

}  // namespace fake
