// Finds accesses to the same bytes that no edge orders, at least one of them a write.
//
// Every access is kept, so what is reported depends on the edges alone and not on which of two threads came first.
#pragma once
#include <map>
#include <utility>

#include "clocks.hpp"

namespace fake {

// One access. Parts of one operation with different numbers run side by side, as the messages of a group do.
struct Access {
  MomentPtr moment;
  int part;
  bool write;
  std::string what;
};

struct Race {
  std::string kind;           // RAW, WAR or WAW: the access issued later against the one issued earlier
  std::string first, second;  // in the order of issue
  std::string memory;
};

class Detector {
 public:
  void access(Access access, const void* begin, size_t bytes);
  // Every racing pair of accesses once, in the order of issue.
  std::vector<Race> races() const;
  // Reports say `label`+offset for addresses in the range.
  void name(const void* begin, size_t bytes, std::string label);
  void clear();

 private:
  // Accesses by number; each segment of memory lists those that touched all of it.
  struct Segment {
    uintptr_t end;
    std::vector<size_t> accesses;
  };
  struct Label {
    uintptr_t end;
    std::string text;
  };
  std::map<uintptr_t, Segment>::iterator split(uintptr_t at);
  std::string describe(uintptr_t at) const;

  std::vector<Access> accesses_;
  std::map<uintptr_t, Segment> segments_;
  std::map<std::pair<size_t, size_t>, uintptr_t> pairs_;
  std::map<uintptr_t, Label> labels_;
};

}  // namespace fake
