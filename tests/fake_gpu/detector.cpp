#include "detector.hpp"

#include <algorithm>
#include <tuple>

namespace fake {
namespace {

bool ordered(const Access& a, const Access& b) {
  const Moment &m = *a.moment, &n = *b.moment;
  if (m.task == n.task) return m.op != n.op || a.part == b.part;
  return m.before(n) || n.before(m);
}

std::string describe(const Access& access) {
  return (access.write ? "write by " : "read by ") + access.what + " on " + access.moment->where;
}

}  // namespace

// The first segment that begins at or after `at`; one that reaches over `at` is cut there.
std::map<uintptr_t, Detector::Segment>::iterator Detector::split(uintptr_t at) {
  auto next = segments_.lower_bound(at);
  if (next == segments_.begin() || (next != segments_.end() && next->first == at)) return next;
  auto previous = std::prev(next);
  if (previous->second.end <= at) return next;
  auto cut = segments_.emplace_hint(next, at, previous->second);
  previous->second.end = at;
  return cut;
}

void Detector::access(Access access, const void* begin, size_t bytes) {
  if (!bytes) return;
  const auto from = reinterpret_cast<uintptr_t>(begin), to = from + bytes;
  const size_t number = accesses_.size();
  accesses_.push_back(std::move(access));
  const Access& mine = accesses_.back();
  split(to);
  auto segment = split(from);
  for (uintptr_t at = from; at < to;) {
    if (segment == segments_.end() || segment->first > at) {
      const uintptr_t end = segment == segments_.end() ? to : std::min(to, segment->first);
      segment = segments_.emplace_hint(segment, at, Segment{end, {}});
    }
    for (size_t other : segment->second.accesses) {
      const Access& theirs = accesses_[other];
      if ((mine.write || theirs.write) && !ordered(theirs, mine)) pairs_.emplace(std::minmax(other, number), at);
    }
    segment->second.accesses.push_back(number);
    at = segment->second.end;
    ++segment;
  }
}

std::vector<Race> Detector::races() const {
  using Key = std::tuple<uint64_t, int, uint64_t, int, uintptr_t>;
  std::map<Key, Race> sorted;
  for (const auto& [pair, at] : pairs_) {
    const Access *a = &accesses_[pair.first], *b = &accesses_[pair.second];
    if (std::pair(b->moment->launch, b->part) < std::pair(a->moment->launch, a->part)) std::swap(a, b);
    const char* kind = !a->write ? "WAR" : b->write ? "WAW" : "RAW";
    sorted[{a->moment->launch, a->part, b->moment->launch, b->part, at}] = {kind, fake::describe(*a),
                                                                            fake::describe(*b), describe(at)};
  }
  std::vector<Race> races;
  for (auto& [_, race] : sorted) races.push_back(std::move(race));
  return races;
}

void Detector::name(const void* begin, size_t bytes, std::string label) {
  const auto from = reinterpret_cast<uintptr_t>(begin);
  labels_[from] = {from + bytes, std::move(label)};
}

std::string Detector::describe(uintptr_t at) const {
  auto next = labels_.upper_bound(at);
  if (next != labels_.begin()) {
    const auto& [begin, label] = *std::prev(next);
    if (at < label.end) return label.text + "+" + std::to_string(at - begin);
  }
  return "unnamed memory";
}

void Detector::clear() {
  accesses_.clear();
  segments_.clear();
  pairs_.clear();
  labels_.clear();
}

}  // namespace fake
