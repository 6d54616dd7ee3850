// The memory that ranks of one host share: an inbox for each rank, with a ring of bytes from every other one.
//
// An inbox lives in a memfd: it has no name in /dev/shm, so nothing is left of it however its processes end. The others
// open it through /proc/PID/fd. Every counter has one writer.
#pragma once
#include <sys/types.h>

#include <atomic>
#include <chrono>
#include <cstddef>
#include <cstdint>
#include <string>

namespace adf {

// A futex that processes share; where the system has none, sleeping takes its place.
struct Bell {
  std::atomic<uint32_t> rings;
  std::atomic<uint32_t> sleepers;

  void ring();
  // Until another ring than the `seen`-th, at most `limit`.
  void wait(uint32_t seen, std::chrono::nanoseconds limit, bool use_futex);
};

struct Ring {
  // Bytes written and read since the beginning.
  alignas(64) std::atomic<uint64_t> head;
  alignas(64) std::atomic<uint64_t> tail;
  // Messages that the receiver has copied straight out of the sender's memory.
  std::atomic<uint64_t> copied;
  // What one side wants to be woken for: the receiver's progress thread by data, the sender's by room.
  alignas(64) std::atomic<uint32_t> reader_waits;
  std::atomic<uint32_t> writer_waits;
  // The receiver is allowed to read the sender's memory.
  std::atomic<uint32_t> readable;
};

struct MessageHeader {
  uint32_t key;
  uint32_t zero;
  uint64_t epoch;
  uint64_t bytes;
  // Where the message lies in the sender's memory; 0: it follows in the ring.
  uint64_t address;
};

struct Inbox {
  uint64_t token;
  // Address of the token in the owner's memory, to try reading there.
  uint64_t probe;
  // 1 + the rank that stopped the exchange.
  std::atomic<uint32_t> stopped;
  std::atomic<uint32_t> left;
  // The owner's buffers may be gone: what it announced and nobody has copied is lost.
  std::atomic<uint32_t> closed;
  // Why the owner stopped or left the exchange: written once, whole, see `Segment::say`.
  std::atomic<uint32_t> said;
  char reason[2048];
  // The owner's calling thread and its progress thread sleep here.
  alignas(64) Bell caller;
  alignas(64) Bell worker;
};

// A mapped inbox and its rings.
class Segment {
 public:
  Segment() = default;
  ~Segment();
  Segment(const Segment&) = delete;
  Segment& operator=(const Segment&) = delete;

  // An inbox of this process, or another's. Raises ExchangeError with the reason of the system.
  void create(int size, size_t ring_bytes, uint64_t token);
  void open(pid_t pid, int fd, int size, size_t ring_bytes, uint64_t token);

  // The first reason stays. Cut, if need be, between two characters of its UTF-8. Read it after a flag that was set
  // after it was said.
  void say(const std::string& reason);
  std::string said() const;

  Inbox& inbox() const { return *static_cast<Inbox*>(memory_); }
  Ring& ring(int source) const;
  char* data(int source) const { return reinterpret_cast<char*>(&ring(source) + 1); }
  size_t ring_bytes() const { return ring_bytes_; }
  int fd() const { return fd_; }

 private:
  void map(int fd, int size, size_t ring_bytes);

  void* memory_ = nullptr;
  size_t bytes_ = 0, ring_bytes_ = 0;
  int fd_ = -1;
};

}  // namespace adf
