// A thread beside the caller's, for calls that return only once other ranks have come: the caller waits as long as it
// likes, and goes on without what never comes back.
#pragma once
#include <atomic>
#include <functional>
#include <memory>
#include <thread>

namespace adf {

class Aside {
 public:
  // Work that is stuck when this ends stays behind in its thread: it must own what it touches.
  Aside();
  ~Aside();
  Aside(const Aside&) = delete;
  Aside& operator=(const Aside&) = delete;

  // Begins work behind all that was begun before; after a failure nothing more is done.
  void begin(std::function<void()> work);
  // Whether all that was begun is over. Raises what it failed with, each time.
  bool settled() const;
  // As `settled`, without raising.
  bool idle() const;

 private:
  struct Shared;
  std::shared_ptr<Shared> shared_;
  std::thread thread_;
};

}  // namespace adf
