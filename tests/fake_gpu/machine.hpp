// The machine of the double: contexts (one per rank), streams as threads, events, and one lock around all of it.
#pragma once
#include <atomic>
#include <condition_variable>
#include <deque>
#include <functional>
#include <map>
#include <mutex>
#include <random>
#include <thread>
#include <unordered_map>

#include "clocks.hpp"
#include "detector.hpp"

namespace fake {

using Lock = std::unique_lock<std::mutex>;

// Objects behind opaque handles; a handle that was destroyed is never found again.
template <class T>
class Table {
 public:
  explicit Table(uintptr_t first) : next_(first) {}
  void* add(std::shared_ptr<T> object) {
    next_ += 16;
    objects_[next_] = std::move(object);
    return reinterpret_cast<void*>(next_);
  }
  std::shared_ptr<T> find(const void* handle) const {
    auto found = objects_.find(reinterpret_cast<uintptr_t>(handle));
    return found == objects_.end() ? nullptr : found->second;
  }
  bool remove(const void* handle) { return objects_.erase(reinterpret_cast<uintptr_t>(handle)); }
  void clear() { objects_.clear(); }
  const std::unordered_map<uintptr_t, std::shared_ptr<T>>& all() const { return objects_; }

 private:
  uintptr_t next_;
  std::unordered_map<uintptr_t, std::shared_ptr<T>> objects_;
};

// One record of an event: what a wait that was issued after it waits for.
struct Recorded {
  bool done = false;
  Clock clock;
};

struct Event {
  int context;
  std::shared_ptr<Recorded> latest;
};

// What one host thread of one rank knows.
struct HostTask {
  int id = -1;
  Clock clock;
  uint64_t ops = 0;
};

// A queue of operations that one thread carries out in order.
class Stream {
 public:
  using Body = std::function<void(Stream&, Lock&)>;

  Stream(int context, std::string label);
  ~Stream();

  // Call with the machine's lock held. `host` is the issuing thread's clock.
  void push(std::string what, const Clock& host, Body body);
  // From a body: let time pass until `ready`; false if the machine gave up instead.
  bool block(Lock& lock, std::string reason, std::function<bool()> ready);
  // From a body: memory is touched now. The clock defaults to the stream's.
  void access(bool write, const void* begin, size_t bytes, std::string what, int part = 0,
              const Clock* clock = nullptr);
  // From a body, without the lock: a random time, at most the machine's delay.
  void dawdle();

  bool idle() const { return queue_.empty() && !busy_; }
  bool stuck() const { return ready_ && !ready_(); }
  bool can_go_on() const { return ready_ && ready_(); }
  std::string status() const;

  const int context;
  const std::string label;
  const int task;
  Clock clock;
  // What was queued on a destroyed stream is still carried out.
  bool destroyed = false;
  std::condition_variable wake;

 private:
  struct Operation {
    std::string what;
    uint64_t launch;
    Clock host;
    Body body;
  };
  void run();

  std::deque<Operation> queue_;
  bool busy_ = false, stop_ = false;
  uint64_t ops_ = 0, launch_ = 0;
  std::string doing_, reason_;
  std::function<bool()> ready_;
  std::mt19937 random_;
  std::thread thread_;
};

class Machine {
 public:
  std::mutex mutex;
  std::condition_variable changed;
  std::atomic<bool> null_mode{false};
  Table<Stream> streams{0x51000000};
  Table<Event> events{0x52000000};
  Detector detector;
  std::vector<std::string> misuses;
  // A thread that is not the test's captures a graph, in CUDA's strictest mode.
  bool capturing = false;
  // What a body found in memory that it did not expect.
  std::vector<std::string> wrong_reads;
  uint64_t launches = 0;
  std::atomic<int> max_delay_us{0};
  int tasks = 0;
  unsigned seed = 0;
  bool released = false;

  // What the calling thread knows as a part of a rank: one thread may play the hosts of several.
  HostTask& host(int context);
  // The stream of a handle; null means the context's default stream. nullptr if there is none.
  std::shared_ptr<Stream> stream(void* handle);
  void* add_stream(int context);
  // Wakes what can go on now.
  void notify();
  // Until every stream is idle, or none has been able to move for `grace_ms`: then their statuses, one a line.
  std::string drain(Lock& lock, int grace_ms);
  void misuse(std::string what) { misuses.push_back(std::move(what)); }
  // Lets every blocked operation end, and forgets everything.
  void reset();

 private:
  std::map<int, void*> default_streams_;
  std::map<int, int> stream_counts_;
  std::vector<std::shared_ptr<Stream>> everything() const;
  unsigned generation_ = 0;
};

Machine& machine();

// From a body, without the lock: half, then a while later the rest, so that a reader who does not wait may see both.
void copy(Stream& stream, void* target, const void* source, size_t bytes);

// The calling thread's context: a rank, or -1.
int& current_context();
// CUstreamCaptureMode of the calling thread.
int& capture_mode();

}  // namespace fake
