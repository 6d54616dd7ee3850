// One thread that looks after a channel while its caller computes: which peers have died, how long the exchange stands.
#pragma once
#include <sys/types.h>

#include <functional>
#include <thread>
#include <vector>

namespace adf {

// One process of this host: not merely its number, which another may take over. A pidfd becomes readable when its
// process ends; kernels and sandboxes without pidfds are asked through /proc, where a process has the time of its
// start.
class Process {
 public:
  // 0: none, which never ends.
  Process(pid_t pid, bool use_pidfd);
  ~Process();
  Process(Process&& other) noexcept;
  Process(const Process&) = delete;
  Process& operator=(const Process&) = delete;

  pid_t pid() const { return pid_; }
  // To be polled, -1 where there is none.
  int pidfd() const { return pidfd_; }
  bool ended() const;

 private:
  pid_t pid_;
  int pidfd_ = -1;
  unsigned long long started_ = 0;
};

// Processes of the other ranks on this host.
class Peers {
 public:
  // `pids` by rank, 0 for a rank that is not watched (this one, another host).
  Peers(const std::vector<pid_t>& pids, bool use_pidfd);

  // Sleeps until a process ends, `wake_fd` is readable or `milliseconds` have passed; returns the ranks that ended.
  std::vector<int> wait(int wake_fd, int milliseconds);

 private:
  std::vector<Process> processes_;
  std::vector<bool> ended_;
};

class Watchdog {
 public:
  // Calls `begin()` and then `look(ranks that have ended)` a few times a second, from a thread of its own, until
  // `stop`.
  Watchdog(std::vector<pid_t> pids, bool use_pidfd, std::function<void()> begin,
           std::function<void(const std::vector<int>&)> look);
  ~Watchdog();
  void stop();

 private:
  Peers peers_;
  std::function<void()> begin_;
  std::function<void(const std::vector<int>&)> look_;
  int wake_fd_;
  std::thread thread_;
};

}  // namespace adf
