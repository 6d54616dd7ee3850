#include "watchdog.hpp"

#include <poll.h>
#include <sys/eventfd.h>
#include <sys/syscall.h>
#include <unistd.h>

#include <cerrno>
#include <cstdio>
#include <cstring>
#include <system_error>

namespace adf {
namespace {

constexpr int kPeriodMs = 200;

// A process that has ended but is not yet reaped still has an entry, in state Z.
bool ended_by_proc(pid_t pid) {
  char path[64], line[512];
  snprintf(path, sizeof path, "/proc/%d/stat", static_cast<int>(pid));
  FILE* file = fopen(path, "r");
  if (file == nullptr) return errno == ENOENT;
  const size_t length = fread(line, 1, sizeof line - 1, file);
  fclose(file);
  line[length] = '\0';
  const char* name_end = strrchr(line, ')');
  return length == 0 || (name_end != nullptr && (name_end[2] == 'Z' || name_end[2] == 'X'));
}

}  // namespace

Peers::Peers(std::vector<pid_t> pids, bool use_pidfd) : pids_(std::move(pids)), ended_(pids_.size(), false) {
  for (pid_t pid : pids_) {
    pidfds_.push_back(pid > 0 && use_pidfd ? static_cast<int>(syscall(SYS_pidfd_open, pid, 0)) : -1);
  }
}

Peers::~Peers() {
  for (int fd : pidfds_) {
    if (fd >= 0) ::close(fd);
  }
}

std::vector<int> Peers::wait(int wake_fd, int milliseconds) {
  std::vector<pollfd> polled{{wake_fd, POLLIN, 0}};
  for (size_t i = 0; i < pids_.size(); ++i) polled.push_back({ended_[i] ? -1 : pidfds_[i], POLLIN, 0});
  poll(polled.data(), polled.size(), milliseconds);
  std::vector<int> ranks;
  for (size_t i = 0; i < pids_.size(); ++i) {
    if (pids_[i] <= 0) continue;
    if (!ended_[i]) ended_[i] = pidfds_[i] >= 0 ? polled[i + 1].revents != 0 : ended_by_proc(pids_[i]);
    if (ended_[i]) ranks.push_back(static_cast<int>(i));
  }
  return ranks;
}

Watchdog::Watchdog(std::vector<pid_t> pids, bool use_pidfd, std::function<void(const std::vector<int>&)> look)
    : peers_(std::move(pids), use_pidfd), look_(std::move(look)), wake_fd_(eventfd(0, EFD_CLOEXEC)) {
  if (wake_fd_ < 0) throw std::system_error(errno, std::generic_category(), "eventfd");
  thread_ = std::thread([this] {
    pollfd woken{wake_fd_, POLLIN, 0};
    while (poll(&woken, 1, 0) == 0) {
      const std::vector<int> ended = peers_.wait(wake_fd_, kPeriodMs);
      look_(ended);
    }
  });
}

Watchdog::~Watchdog() {
  stop();
  ::close(wake_fd_);
}

void Watchdog::stop() {
  if (!thread_.joinable()) return;
  eventfd_t one = 1;
  eventfd_write(wake_fd_, one);
  thread_.join();
}

}  // namespace adf
