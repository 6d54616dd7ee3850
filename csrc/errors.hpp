// What can go wrong between ranks, and the one place where a channel remembers that it did.
#pragma once
#include <atomic>
#include <mutex>
#include <stdexcept>
#include <string>

namespace adf {

// Another rank died, hung or did something else than this one. Python sees it as one class, set by `use_error`.
struct ExchangeError : std::runtime_error {
  using std::runtime_error::runtime_error;
};

// The first failure of a channel; the caller's thread, the progress thread and the watchdog all report here.
class Health {
 public:
  bool broken() const { return broken_.load(std::memory_order_acquire); }

  // Returns whether this was the first failure.
  bool fail(const std::string& reason) {
    std::lock_guard<std::mutex> lock(mutex_);
    if (broken()) return false;
    reason_ = reason;
    broken_.store(true, std::memory_order_release);
    return true;
  }

  std::string reason() const {
    std::lock_guard<std::mutex> lock(mutex_);
    return reason_;
  }

 private:
  mutable std::mutex mutex_;
  std::string reason_;
  std::atomic<bool> broken_{false};
};

}  // namespace adf
