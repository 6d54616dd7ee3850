#include "aside.hpp"

#include <condition_variable>
#include <deque>
#include <exception>
#include <mutex>

namespace adf {

struct Aside::Shared {
  std::mutex mutex;
  std::condition_variable changed;
  std::deque<std::function<void()>> queue;
  // Begun and not over; asked by every post, so without the lock.
  std::atomic<int> open{0};
  std::atomic<bool> failed{false};
  std::exception_ptr failure;
  bool ending = false;

  void run() {
    std::unique_lock<std::mutex> lock(mutex);
    for (;;) {
      changed.wait(lock, [this] { return ending || !queue.empty(); });
      if (ending) return;
      const auto work = std::move(queue.front());
      queue.pop_front();
      lock.unlock();
      std::exception_ptr thrown;
      try {
        if (!failed.load()) work();
      } catch (...) {
        thrown = std::current_exception();
      }
      lock.lock();
      if (thrown) {
        failure = thrown;
        failed.store(true, std::memory_order_release);
      }
      open.fetch_sub(1, std::memory_order_release);
    }
  }
};

Aside::Aside() : shared_(std::make_shared<Shared>()), thread_([shared = shared_] { shared->run(); }) {}

Aside::~Aside() {
  {
    std::lock_guard<std::mutex> lock(shared_->mutex);
    shared_->ending = true;
  }
  shared_->changed.notify_all();
  if (idle()) {
    thread_.join();
  } else {
    thread_.detach();
  }
}

void Aside::begin(std::function<void()> work) {
  std::lock_guard<std::mutex> lock(shared_->mutex);
  shared_->open.fetch_add(1);
  shared_->queue.push_back(std::move(work));
  shared_->changed.notify_all();
}

bool Aside::idle() const { return shared_->open.load(std::memory_order_acquire) == 0; }

bool Aside::settled() const {
  if (!idle()) return false;
  if (shared_->failed.load(std::memory_order_acquire)) std::rethrow_exception(shared_->failure);
  return true;
}

}  // namespace adf
