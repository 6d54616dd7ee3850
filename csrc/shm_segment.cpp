#include "shm_segment.hpp"

#include <fcntl.h>
#include <linux/futex.h>
#include <sys/mman.h>
#include <sys/stat.h>
#include <sys/syscall.h>
#include <unistd.h>

#include <algorithm>
#include <cerrno>
#include <climits>
#include <cstring>
#include <new>
#include <thread>

#include "errors.hpp"

namespace adf {
namespace {

constexpr auto kNap = std::chrono::microseconds(100);
// What is written to `said`.
enum : uint32_t { kNothing, kWriting, kWritten };

// Processes share them; where one needed a lock, that would lie in one of them.
static_assert(std::atomic<uint32_t>::is_always_lock_free && std::atomic<uint64_t>::is_always_lock_free);

// The bytes of a text that fit into `most` without breaking a character.
size_t fitting(const std::string& text, size_t most) {
  size_t bytes = std::min(text.size(), most);
  if (bytes == text.size()) return bytes;
  while (bytes > 0 && (static_cast<unsigned char>(text[bytes]) & 0xc0) == 0x80) --bytes;
  return bytes;
}

[[noreturn]] void fail(const std::string& what) {
  throw ExchangeError("shared memory between ranks: " + what + ": " + strerror(errno));
}

timespec span(std::chrono::nanoseconds ns) {
  return {static_cast<time_t>(ns.count() / 1000000000), static_cast<long>(ns.count() % 1000000000)};
}

}  // namespace

void Bell::ring() {
  rings.fetch_add(1, std::memory_order_seq_cst);
  if (sleepers.load(std::memory_order_seq_cst) > 0)
    syscall(SYS_futex, &rings, FUTEX_WAKE, INT_MAX, nullptr, nullptr, 0);
}

void Bell::wait(uint32_t seen, std::chrono::nanoseconds limit, bool use_futex) {
  sleepers.fetch_add(1, std::memory_order_seq_cst);
  const timespec timeout = span(limit);
  long result = 0;
  if (use_futex && rings.load(std::memory_order_seq_cst) == seen) {
    result = syscall(SYS_futex, &rings, FUTEX_WAIT, seen, &timeout, nullptr, 0);
  }
  const bool no_futex = !use_futex || (result < 0 && errno != EAGAIN && errno != EINTR && errno != ETIMEDOUT);
  sleepers.fetch_sub(1, std::memory_order_seq_cst);
  if (no_futex && rings.load() == seen) {
    const timespec nap = span(std::min<std::chrono::nanoseconds>(limit, kNap));
    nanosleep(&nap, nullptr);
  }
}

Segment::~Segment() {
  if (memory_ != nullptr) munmap(memory_, bytes_);
  if (fd_ >= 0) ::close(fd_);
}

void Segment::say(const std::string& reason) {
  uint32_t nothing = kNothing;
  if (inbox().said.compare_exchange_strong(nothing, kWriting)) {
    const size_t bytes = fitting(reason, sizeof inbox().reason - 1);
    memcpy(inbox().reason, reason.data(), bytes);
    inbox().reason[bytes] = '\0';
    inbox().said.store(kWritten, std::memory_order_release);
  }
  // Another thread may be at it: whoever has said something may tell others to read it.
  while (inbox().said.load(std::memory_order_acquire) != kWritten) std::this_thread::yield();
}

std::string Segment::said() const {
  return inbox().said.load(std::memory_order_acquire) == kWritten ? inbox().reason : "";
}

Ring& Segment::ring(int source) const {
  char* first = static_cast<char*>(memory_) + sizeof(Inbox);
  return *reinterpret_cast<Ring*>(first + static_cast<size_t>(source) * (sizeof(Ring) + ring_bytes_));
}

void Segment::create(int size, size_t ring_bytes, uint64_t token) {
  fd_ = static_cast<int>(syscall(SYS_memfd_create, "asyncdiff_fast", 1u /* MFD_CLOEXEC */));
  if (fd_ < 0) fail("memfd_create");
  map(fd_, size, ring_bytes);
  new (memory_) Inbox{};
  for (int source = 0; source < size; ++source) new (&ring(source)) Ring{};
  inbox().token = token;
  inbox().probe = reinterpret_cast<uint64_t>(&inbox().token);
}

void Segment::open(pid_t pid, int fd, int size, size_t ring_bytes, uint64_t token) {
  const std::string path = "/proc/" + std::to_string(pid) + "/fd/" + std::to_string(fd);
  const int opened = ::open(path.c_str(), O_RDWR | O_CLOEXEC);
  if (opened < 0) fail("opening " + path);
  struct stat found{};
  const bool fits = fstat(opened, &found) == 0 &&
                    static_cast<size_t>(found.st_size) == sizeof(Inbox) + size * (sizeof(Ring) + ring_bytes);
  if (fits) {
    try {
      map(opened, size, ring_bytes);
    } catch (...) {
      ::close(opened);
      throw;
    }
  }
  ::close(opened);
  if (!fits || inbox().token != token) throw ExchangeError("shared memory between ranks: " + path + " is another's");
}

void Segment::map(int fd, int size, size_t ring_bytes) {
  ring_bytes_ = ring_bytes;
  bytes_ = sizeof(Inbox) + static_cast<size_t>(size) * (sizeof(Ring) + ring_bytes);
  if (fd == fd_ && ftruncate(fd, static_cast<off_t>(bytes_)) != 0) fail("ftruncate");
  void* memory = mmap(nullptr, bytes_, PROT_READ | PROT_WRITE, MAP_SHARED, fd, 0);
  if (memory == MAP_FAILED) fail("mmap");
  memory_ = memory;
}

}  // namespace adf
