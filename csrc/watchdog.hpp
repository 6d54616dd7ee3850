// One thread that looks after a channel while its caller computes: which peers have died, how long the exchange stands.
#pragma once
#include <sys/types.h>

#include <functional>
#include <thread>
#include <vector>

namespace adf {

// Processes of the other ranks on this host. A pidfd becomes readable when its process ends; kernels and sandboxes
// without pidfds are asked through /proc.
class Peers {
 public:
  // `pids` by rank, 0 for a rank that is not watched (this one, another host).
  Peers(std::vector<pid_t> pids, bool use_pidfd);
  ~Peers();
  Peers(const Peers&) = delete;
  Peers& operator=(const Peers&) = delete;

  // Sleeps until a process ends, `wake_fd` is readable or `milliseconds` have passed; returns the ranks that ended.
  std::vector<int> wait(int wake_fd, int milliseconds);

 private:
  std::vector<pid_t> pids_;
  std::vector<int> pidfds_;
  std::vector<bool> ended_;
};

class Watchdog {
 public:
  // Calls `look(ranks that have ended)` a few times a second, from a thread of its own, until `stop`.
  Watchdog(std::vector<pid_t> pids, bool use_pidfd, std::function<void(const std::vector<int>&)> look);
  ~Watchdog();
  void stop();

 private:
  Peers peers_;
  std::function<void(const std::vector<int>&)> look_;
  int wake_fd_;
  std::thread thread_;
};

}  // namespace adf
