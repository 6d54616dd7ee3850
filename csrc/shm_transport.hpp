// CPU tensors between processes of one host, through memory they share.
//
// A small message is written into the receiver's ring by the post itself and read by the wait: no thread is woken for
// it. A large one is announced there, and the receiver copies it straight out of the sender's memory (or, where the
// system does not allow that, the two pass it through the ring); a progress thread does so while the caller computes.
#pragma once
#include <condition_variable>
#include <deque>
#include <memory>
#include <mutex>
#include <thread>
#include <unordered_map>

#include "shm_segment.hpp"
#include "transport.hpp"

namespace adf {

struct ShmOptions {
  size_t ring_bytes = size_t{1} << 20;
  bool futex = true;
  bool direct = true;
};

class ShmTransport final : public Transport {
 public:
  // Makes this rank's inbox. The others need `address` and the token, which all ranks share, to `connect`.
  ShmTransport(int rank, int size, uint64_t token, const ShmOptions& options);
  ~ShmTransport() override;

  std::pair<int, int> address() const;
  // (pid, fd) of every rank. All ranks must have connected before the first post.
  void connect(const std::vector<std::pair<int, int>>& addresses);

  bool on_host() const override { return true; }
  void attach(Group* group) override;
  void detach(Group* group) override;
  void submit(const Group& group, uint64_t epoch, Stream stream) override;
  bool order(const Group& group, uint64_t epoch, Stream stream, Clock::time_point deadline) override;
  bool finish(const Group& group, uint64_t epoch, Clock::time_point deadline) override;
  State state(const Group& group, uint64_t epoch) override;
  std::vector<int> missing(const Group& group, uint64_t epoch) override;
  void inspect() override;
  void leave(const std::string& reason) override;
  bool left(int rank) override;
  void abort(const std::string& reason) noexcept override;
  void close() override;

 private:
  using Lock = std::unique_lock<std::mutex>;
  struct Pending {
    const Group* group;
    uint64_t epoch;
    char* buffer;
    size_t bytes;
    int mark;
    uint32_t key;
    bool begun = false;
    size_t moved = 0;
    // Receiving: where it lies in the sender's memory. Sending: which of the messages that the receiver copies itself.
    uint64_t source = 0;
    uint64_t ticket = 0;
  };
  // All messages in one direction between this rank and one other, in order.
  struct Line {
    int peer;
    bool sends;
    Segment* segment;
    int source;
    std::deque<Pending> queue, announced;
    uint64_t tickets = 0;
    // Queued messages that the caller does not copy itself.
    int large = 0;
    // A thread is at work on it, perhaps without the lock.
    bool busy = false;

    Ring& ring() const { return segment->ring(source); }
  };
  class Driving;

  // Up to here a message is cheaper to copy twice than to announce.
  static constexpr size_t kSmall = size_t{64} << 10;

  bool advance(Line* line, Lock* lock, bool everything);
  bool advance_all(Lock* lock);
  bool send_some(Line* line, Lock* lock, bool everything);
  bool receive_some(Line* line, Lock* lock);
  void tell(const std::string& reason) noexcept;
  [[noreturn]] void raise_left(const Pending& pending, int peer) const;
  void check_header(const MessageHeader& header, const Pending& pending, int peer) const;
  bool pull(const Pending& pending, pid_t pid, int* error);
  bool wait_for(int mark, Lock* lock, Clock::time_point deadline);
  void complete(int mark);
  void notify(int peer, const std::atomic<uint32_t>& worker_waits);
  bool ask_for_worker();
  bool stopping() const;
  void work();
  void join_worker();

  uint64_t token_;
  ShmOptions options_;
  std::chrono::microseconds spin_;
  std::vector<std::unique_ptr<Segment>> segments_;
  std::vector<pid_t> pids_;
  // Guards everything below, but not the copying.
  std::mutex mutex_;
  std::deque<Line> lines_;
  // Unfinished messages of each mark.
  std::vector<int> open_;
  std::vector<int> free_marks_;
  std::unordered_map<uint32_t, std::string> names_;
  // The caller is waiting and moves everything itself meanwhile.
  bool driving_ = false;
  std::atomic<bool> closing_{false}, aborted_{false}, told_{false};
  std::thread worker_;
};

}  // namespace adf
