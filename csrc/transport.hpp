// What carries messages between ranks. A channel decides when; a transport moves bytes and says when they are there.
#pragma once
#include <chrono>
#include <cstdint>
#include <string>
#include <utility>
#include <vector>

#include "errors.hpp"

namespace adf {

using Clock = std::chrono::steady_clock;
using Stream = uintptr_t;

inline double microseconds_since(Clock::time_point began) {
  return std::chrono::duration<double, std::micro>(Clock::now() - began).count();
}

// One direction of a slot to or from one peer; `buffers` has one address for each of the slot's depth.
struct Message {
  int peer;
  bool sends;
  size_t bytes;
  std::vector<char*> buffers;
};

// Everything that one post of a slot moves, as one group. Its transport keeps `marks`, at least one for each of the
// depth: epoch e uses the mark e modulo their number, and is posted only once the epoch whose mark it takes is over.
struct Group {
  std::string name;
  int depth = 0;
  bool sends = false;
  std::vector<Message> messages;
  std::vector<int> marks;
};

enum class State { kQueued, kRunning, kDone };

// One ordered lane of exchanges between `size` ranks. Called by one thread at a time, except for inspect, state, left
// and abort, which a watchdog's thread calls as well, after `watched`.
class Transport {
 public:
  Transport(int rank, int size) : rank_(rank), size_(size) {}
  virtual ~Transport() = default;
  Transport(const Transport&) = delete;
  Transport& operator=(const Transport&) = delete;

  int rank() const { return rank_; }
  int size() const { return size_; }
  // What messages call a rank: its number among all processes of the run, where the transport is of some of them.
  std::string name(int rank) const { return std::to_string(called_.empty() ? rank : called_.at(rank)); }
  std::string name() const { return "rank " + name(rank_); }
  void set_names(std::vector<int> names) { called_ = std::move(names); }
  Health& health() { return health_; }
  const Health& health() const { return health_; }

  // True if waiting blocks the host: there are no streams.
  virtual bool on_host() const = 0;

  // Make and free what marks the completion of each of a group's epochs.
  virtual void attach(Group* group) = 0;
  virtual void detach(Group* group) = 0;

  // Before the first post of a phase, on all its ranks: `open` begins to connect to the peers of its groups, and does
  // not wait for them. Transports that write into their peers' memory need a window for the groups. `window`: how many
  // bytes of it are for messages of each rank, and at this rank's own place for what it sends. `open` takes what all
  // ranks say, by rank; the window ends with its last group. Others need none, and say nothing.
  virtual std::vector<size_t> window(const std::vector<const Group*>&) const { return {}; }
  virtual void open(const std::vector<const Group*>&, const std::vector<std::vector<size_t>>&) {}

  // Let the host wait for what `open` began, before anything is submitted or detached. False: it is not over at the
  // deadline. Raises ExchangeError if it failed.
  virtual bool opened(Clock::time_point) { return true; }

  // Begin the messages of an epoch, after everything that is on `stream` now.
  virtual void submit(const Group& group, uint64_t epoch, Stream stream) = 0;

  // Let `stream` go on only after an epoch; on the host, wait for it. False: it was not there at the deadline.
  virtual bool order(const Group& group, uint64_t epoch, Stream stream, Clock::time_point deadline) = 0;

  // Let the host wait for an epoch. False: it was not there at the deadline.
  virtual bool finish(const Group& group, uint64_t epoch, Clock::time_point deadline) = 0;

  virtual State state(const Group& group, uint64_t epoch) = 0;

  // Peers that an unfinished epoch still waits for.
  virtual std::vector<int> missing(const Group& group, uint64_t epoch) = 0;

  // The calling thread is a watchdog's: what it asks from now on must not disturb what other threads do.
  virtual void watched() {}

  // Raises ExchangeError if the transport or another rank has failed meanwhile.
  virtual void inspect() = 0;

  // This rank will post no more; what it has posted can still be received. True if a rank has left so.
  virtual void leave(const std::string&) {}
  virtual bool left(int) { return false; }

  // Tell every rank that can be told, and release whoever waits. May be called from any thread, and twice.
  virtual void abort(const std::string& reason) = 0;

  // In good order, with nothing under way, or after abort.
  virtual void close() = 0;

 private:
  int rank_, size_;
  std::vector<int> called_;
  Health health_;
};

}  // namespace adf
