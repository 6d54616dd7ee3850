// Slots of one rank over a transport: who sends what to whom, in which order, and who has to wait for it.
#pragma once
#include <functional>
#include <map>
#include <memory>
#include <optional>
#include <unordered_map>

#include "transport.hpp"
#include "watchdog.hpp"

namespace adf {

struct Statistics {
  uint64_t posts = 0, sent_bytes = 0, waits_elided = 0;
  double post_us = 0, wait_us = 0;
  std::map<std::string, double> wait_us_by_slot;
};

struct PostRecord {
  std::string slot, phase;
  uint64_t epoch;
  double age_s;
  std::string state;
};

// One thread at a time drives a channel; check, abort, broken, stats and history may come from any thread.
// Messages of all errors name this rank, the peers, the slot, its exchange number, and what to do.
class Channel {
 public:
  // `pids` of the ranks on this host, 0 where a rank is not to be watched; empty: none is.
  // `names` are what messages call the ranks. Whoever waits calls `pause` a few times a second; what that throws, ends
  // the wait.
  Channel(std::shared_ptr<Transport> transport, double timeout_s, std::vector<int> pids, bool use_pidfd,
          std::vector<int> names = {}, std::function<void()> pause = {});
  ~Channel();

  int add(const std::string& name, std::vector<Message> messages, int depth);
  // What `freeze` must be told of every rank, by rank: see Transport::window.
  std::vector<size_t> window(const std::vector<int>& slots) const;
  void freeze(const std::string& phase, const std::vector<int>& slots,
              const std::vector<std::vector<size_t>>& windows = {});
  void release(const std::string& phase);

  // Before the next send buffer is written: `stream` waits for the last use of it.
  void acquire(int slot, Stream stream);
  void post(int slot, Stream stream);
  // `stream` waits for the epoch `lag` posts before the latest. Epochs before the first are over.
  void wait(int slot, Stream stream, int lag);
  // The host waits for all that is under way in some slots.
  void drain(const std::vector<int>& slots);

  void check();
  void abort(const std::string& reason);
  // As abort, when another has said so.
  void report(const std::string& reason);
  // This rank posts no more; others go on until they need it.
  void leave(const std::string& reason);
  // A rank that leaves tells the others where its transport cannot.
  void mark_left(int rank);
  std::optional<std::string> broken() const;
  Statistics stats() const;
  void clear_stats();
  std::vector<PostRecord> history();
  // Waits up to `patience_s` for what is under way. Raises a failure that nobody has been told of.
  void close(double patience_s);

 private:
  struct Phase {
    std::vector<int> slots;
    size_t cursor = 0;
  };
  struct Slot : Group {
    std::string phase;
    // Of the phase that it is frozen in; null before.
    Phase* order = nullptr;
    uint64_t posted = 0;
    // Posts that the transport has taken on; one less than `posted` during a post.
    uint64_t submitted = 0;
    // The latest epoch that a reader has waited for, plus one; what depth 1 depends on.
    uint64_t waited = 0;
    uint64_t bytes = 0;
    bool receives = false;
    double wait_us = 0;
    // Number of the post in the whole channel, for each of the depth.
    std::vector<uint64_t> sequence;
  };
  struct Posted {
    std::shared_ptr<Slot> slot;
    uint64_t epoch = 0;
    Clock::time_point when;
  };
  static constexpr uint64_t kHistory = 256;

  const Slot& at(int slot) const;
  Slot& at(int slot) { return const_cast<Slot&>(static_cast<const Channel*>(this)->at(slot)); }
  std::vector<const Group*> groups(const std::vector<int>& slots) const;
  // A child of the process that made this channel: it must not touch what it shares with other ranks.
  bool forked() const;
  void enter();
  void put_away();
  void grow_history(size_t marks);
  void guard_order(const Slot& slot);
  // Waits until the transport can take posts and give up slots; `where` names this rank and what it does.
  void settle(const std::string& where);
  void post_now(const std::shared_ptr<Slot>& slot, Stream stream);
  void order_after(Slot* slot, uint64_t epoch, Stream stream);
  void finish(Slot* slot, int64_t epoch, Clock::time_point deadline);
  Clock::time_point deadline() const;
  // What `attempt(until)` returns, tried until a deadline.
  template <typename Attempt>
  bool patiently(Clock::time_point deadline, Attempt attempt);
  State state(const Posted& posted) const;
  std::string place(const Slot& slot, uint64_t epoch) const;
  std::string unconnected() const;
  std::string late(const Slot& slot, uint64_t epoch, double waited_s) const;
  [[noreturn]] void raise();
  void fail(const std::string& reason);
  void look(const std::vector<int>& ended);
  std::optional<std::string> lost_peer(const std::vector<int>& ended);
  std::optional<std::string> standstill();

  std::shared_ptr<Transport> transport_;
  double timeout_s_;
  std::function<void()> pause_;
  std::vector<std::shared_ptr<Slot>> slots_;
  std::map<std::string, Phase> phases_;
  uint64_t sequence_ = 0;
  // Up to which post a stream has waited. The lane runs in order, so it has waited for all before it as well; streams
  // given to a channel must live as long as it does.
  std::unordered_map<Stream, uint64_t> ordered_;
  bool closed_ = false;
  std::atomic<bool> told_{false};
  int fork_count_;

  // The watchdog reads these; `pids_` stays as it is.
  std::vector<pid_t> pids_;
  mutable std::mutex mutex_;
  std::vector<Posted> history_ = std::vector<Posted>(kHistory);
  // Marks of all slots: at most so many posts are under way.
  size_t under_way_ = 0;
  uint64_t recorded_ = 0;
  Statistics stats_;
  std::vector<bool> left_;

  // Only the watchdog touches these.
  uint64_t stands_at_ = 0;
  std::optional<Clock::time_point> stands_since_, ended_since_;

  // Its thread calls `look`, from before this pointer is set: nothing that it runs may go through it.
  std::unique_ptr<Watchdog> watchdog_;
};

}  // namespace adf
